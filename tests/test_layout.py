"""Tests that parameters are expanded to the rank of x, and back."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxnorm._core.layout import Layout

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
    spread = layout.expand(a)
    expected = [1] * layout.ndim
    for axis, size in zip(layout.channels, sizes, strict=True):
        expected[axis] = size
    assert spread.shape == tuple(expected)
    assert layout.expand(spread) is spread or layout.ndim == len(layout.channels)
    np.testing.assert_array_equal(layout.squeeze_to_channels(spread), a[None])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_there_is_a_row_for_each_sample(layout):
    sizes = {a: 2 + i for i, a in enumerate(layout.channels)}
    samples = 1 if layout.batch is None else 9
    shape = [samples if a == layout.batch else sizes.get(a, 1) for a in range(layout.ndim)]
    a = np.arange(np.prod(shape)).reshape(shape)
    rows = layout.squeeze_to_channels(a)
    assert rows.shape == (samples, *sizes.values())
    for k, row in enumerate(rows):
        one = a if layout.batch is None else a.take([k], layout.batch)
        np.testing.assert_array_equal(layout.squeeze_to_channels(one)[0], row)
