import jax.numpy as jnp
import numpy as np
import pytest

from jaxnorm._layout import Layout

LAYOUTS = [
    Layout(4, (3,)),
    Layout(4, (1,), batch=0),
    Layout(4, (0,), batch=2),
    Layout(5, (4, 1), batch=0),
    Layout(5, (1, 4), batch=3),
    Layout(2, (1, 0)),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_axis_has_one_part(layout):
    batch = () if layout.batch is None else (layout.batch,)
    assert sorted((*layout.channels, *batch, *layout.reduced)) == list(range(layout.ndim))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_what_is_spread_lies_along_its_axes_and_is_collected_again(layout):
    sizes = range(2, 2 + len(layout.channels))
    a = jnp.arange(np.prod(sizes)).reshape(tuple(sizes))
    spread = layout.spread(a)
    expected = [1] * layout.ndim
    for axis, size in zip(layout.channels, sizes, strict=True):
        expected[axis] = size
    assert spread.shape == tuple(expected)
    assert layout.spread(spread) is spread or layout.ndim == len(layout.channels)
    one = layout.one_sample
    taken = spread if layout.batch is None else spread.squeeze(layout.batch)
    np.testing.assert_array_equal(one.collect(taken), a)
