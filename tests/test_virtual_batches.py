"""Tests that virtual batches are normalized separately, and the update uses the whole batch."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnorm
import jaxnorm.linen
import jaxnorm.nnx

pytestmark = pytest.mark.usefixtures("strict")
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(300, 2, (8, 5, 3)), jnp.float32)
MASK = jnp.asarray(RNG.random((8, 5, 1)) < 0.7)
PARAMS = {"scale": jnp.array([1.0, 2, 3]), "bias": jnp.array([4.0, 5, 6])}
STATE = jaxnorm.init_batch_stats(3)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize(
    "params",
    [
        PARAMS,
        {"scale": jnp.asarray(RNG.normal(1, 1, (8, 1, 3)), jnp.float32)},
        {"bias": jnp.asarray(RNG.normal(1, 1, (1, 5, 1)), jnp.float32)},
    ],
    ids=["per channel", "per sample", "per place"],
)
@pytest.mark.parametrize("mask", [None, MASK, MASK[:1]], ids=["whole", "masked", "shared mask"])
def test_each_is_normalized_as_a_batch_and_the_update_is_that_of_all(size, params, mask):
    options = {"virtual_batch_size": size, "mask": mask}
    y, new = jaxnorm.batch_norm(X, params, STATE, **options)
    for start in range(0, 8, size):
        here = slice(start, start + size)

        def cut(a, here=here):
            return a if a is None or a.ndim < 3 or a.shape[0] == 1 else a[here]

        alone, _ = jaxnorm.batch_norm(X[here], jax.tree.map(cut, params), mask=cut(mask))
        np.testing.assert_allclose(y[here], alone, rtol=1e-6, atol=2e-6)  # sums in another order
    chex.assert_trees_all_close(new, jaxnorm.batch_norm(X, params, STATE, mask=mask)[1], rtol=1e-6)


def test_gradients_are_those_of_the_batches_apart():
    weights = jnp.asarray(RNG.standard_normal(X.shape), jnp.float32)

    def together(x, params):
        return jnp.sum(weights * jaxnorm.batch_norm(x, params, virtual_batch_size=2)[0])

    def apart(x, params):
        parts = zip(jnp.split(weights, 4), jnp.split(x, 4), strict=True)
        return sum(jnp.sum(w * jaxnorm.batch_norm(x, params)[0]) for w, x in parts)

    found, expected = (jax.grad(f, (0, 1))(X, PARAMS) for f in (together, apart))
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)  # sums of 40 terms


def test_channels_may_be_second():
    y, new = jaxnorm.batch_norm(
        jnp.moveaxis(X, -1, 1), PARAMS, STATE, channel_axis=1, virtual_batch_size=2
    )
    expected, state = jaxnorm.batch_norm(X, PARAMS, STATE, virtual_batch_size=2)
    np.testing.assert_allclose(jnp.moveaxis(y, 1, -1), expected, rtol=1e-6, atol=2e-6)
    chex.assert_trees_all_close(new, state, rtol=1e-6)


def test_one_channel_is_enough():
    _, new = jaxnorm.batch_norm(X[..., :1], None, jaxnorm.init_batch_stats(1), virtual_batch_size=2)
    _, expected = jaxnorm.batch_norm(X[..., :1], None, jaxnorm.init_batch_stats(1))
    chex.assert_trees_all_close(new, expected, rtol=1e-6)  # sums in another order


@pytest.mark.parametrize("update_stats", [False, True])
def test_evaluation_ignores_it(update_stats):
    options = {"use_running_average": True, "update_stats": update_stats}
    found = jaxnorm.batch_norm(X, PARAMS, STATE, virtual_batch_size=3, **options)
    chex.assert_trees_all_equal(found, jaxnorm.batch_norm(X, PARAMS, STATE, **options))


@pytest.mark.parametrize("size", [3, 16])
def test_the_samples_are_a_multiple(size):
    with pytest.raises(ValueError, match=f"should divide the samples .* but is {size} for 8"):
        jaxnorm.batch_norm(X, virtual_batch_size=size)


@pytest.mark.parametrize("size", [0, -2, 2.0, "2"])
def test_the_size_is_a_positive_int(size):
    with pytest.raises(ValueError, match="virtual_batch_size should be a positive int"):
        jaxnorm.batch_norm(X, virtual_batch_size=size)


def test_samples_lie_on_axis_0():
    with pytest.raises(ValueError, match="samples on axis 0, but channel_axis is"):
        jaxnorm.batch_norm(X, channel_axis=0, virtual_batch_size=2)


def test_one_value_in_a_virtual_batch_is_an_error():
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        jaxnorm.batch_norm(X[:, 0], virtual_batch_size=1)


def test_a_poisoned_virtual_batch_leaves_the_others():
    x = X.at[0, 0, 1].set(jnp.nan)
    y, new = jaxnorm.batch_norm(x, None, STATE, virtual_batch_size=4)
    assert np.isnan(y[:4, :, 1]).all()
    assert np.isfinite(y[4:]).all()
    assert (new["mean"][1], new["var"][1]) == (0, 1)
    assert new["mean"][0] > 0


# ---- MappedAxes: a virtual batch is on one device ----


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_a_sharded_batch_keeps_its_sharding(kind):
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType[kind],))
    f = functools.partial(jaxnorm.batch_norm, virtual_batch_size=2)
    expected = f(X, PARAMS, STATE)
    with jax.set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, P("d")))
        found = jax.jit(f)(x, PARAMS, STATE)
        gradient = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(f(x)[0]))))(x)
    assert found[0].sharding.spec[0] == "d"
    chex.assert_trees_all_close(
        jax.device_get(found), jax.device_get(expected), rtol=1e-6, atol=2e-6
    )
    wanted = jax.grad(lambda x: jnp.sum(jnp.sin(f(x)[0])))(X)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-6)


def test_a_virtual_batch_that_would_span_explicit_devices_is_an_error():
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, P("d")))
        with pytest.raises(ValueError, match="but is 4 for 8 samples on 4 devices"):
            jax.jit(functools.partial(jaxnorm.batch_norm, virtual_batch_size=4))(x)


def test_axis_name_spreads_the_update_alone_in_two_small_collectives():
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def step(x):
        y, new = jaxnorm.batch_norm(x, PARAMS, STATE, axis_name="d", virtual_batch_size=2)
        return y, new

    spread = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=P("d"), out_specs=(P("d"), P())))
    expected = jaxnorm.batch_norm(X, PARAMS, STATE, virtual_batch_size=2)
    chex.assert_trees_all_close(spread(X), expected, rtol=1e-6, atol=2e-6)
    # These are the sums of the means, and then of the squares about their mean. A table would be
    # one collective, but grow with the number of devices.
    assert spread.lower(X).compile().as_text().count(" all-reduce(") <= 2
    with pytest.raises(ValueError, match="but is 4 for 2 samples"):
        jax.shard_map(
            functools.partial(jaxnorm.batch_norm, virtual_batch_size=4),
            mesh=mesh,
            in_specs=P("d"),
            out_specs=(P("d"), None),
        )(X)


@pytest.mark.parametrize("unit", [1, 2.0**-4])
def test_the_variance_of_virtual_batches_on_devices_keeps_its_digits(unit):
    """Means of whole numbers and entries at a distance of 1: float32 has them exactly."""
    means = 2**20 + np.array([[0, 1], [3, 4], [9, 2]])
    x = unit * (means[..., None, None] + np.array([-1.0, 1, 1, -1])[:, None])

    def step(x):
        state = jaxnorm.init_batch_stats(1)
        options = {"axis_name": "d", "virtual_batch_size": 1, "momentum": 1.0}
        return jaxnorm.batch_norm(x, None, state, **options)[1]

    found = jax.jit(jax.vmap(step, axis_name="d", out_axes=None))(x.astype(np.float32))
    # The mean of all, 19/6 above 2^20, is rounded, and its error has no part in the variance.
    np.testing.assert_allclose(found["mean"], x.mean(), rtol=2.0**-23)
    np.testing.assert_allclose(found["var"], x.var(ddof=1), rtol=1e-6)


def test_micro_batches_of_one_entry_accumulate_over_devices():
    """A single entry has no variance, but it is a part of the accumulated batch."""
    x = jnp.asarray([[[[3.0]], [[9.0]]], [[[5.0]], [[9.0]]]])  # (micro-batches, devices, N, C)
    mask = jnp.asarray([[[[True]], [[False]]]] * 2)

    def step(x, mask):
        state = jaxnorm.begin_accumulation(jaxnorm.init_batch_stats(1))
        options = {"axis_name": "d", "virtual_batch_size": 1, "momentum": 1.0}
        for k in range(2):
            _, state = jaxnorm.batch_norm(x[k], None, state, mask=mask[k], **options)
        return state

    state = jax.vmap(step, axis_name="d", in_axes=1, out_axes=None)(x, mask)
    assert (state["mean"], state["var"], state["count"]) == (4, 2, 1)


# ---- Layers ----


def test_linen_and_nnx_layers_have_it_and_initialize_with_any_batch():
    expected = jaxnorm.batch_norm(X, None, STATE, virtual_batch_size=4)
    layer = jaxnorm.linen.BatchNorm(use_running_average=False, virtual_batch_size=4)
    variables = layer.init(jax.random.key(0), X[:1])
    y, updates = layer.apply(variables, X, mutable=["batch_stats"])
    chex.assert_trees_all_close((y, updates["batch_stats"]), expected, rtol=1e-6, atol=2e-6)
    module = jaxnorm.nnx.BatchNorm(3, virtual_batch_size=4, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(module(X), y, rtol=1e-6, atol=2e-6)
    np.testing.assert_allclose(module.mean[...], expected[1]["mean"], rtol=1e-6)


def test_split_batch_norm_is_the_same_fold_with_a_state_for_each_domain():
    """Normalizes the samples of two domains, the two halves, by the statistics of each."""
    domains = jnp.stack([X[:4], X[4:] * 2 - 100])
    states = jax.tree.map(lambda a: jnp.stack([a, a]), STATE)
    split = jax.vmap(jaxnorm.batch_norm, in_axes=(0, None, 0))
    ys, states = split(domains, PARAMS, states)
    for k in range(2):
        y, state = jaxnorm.batch_norm(domains[k], PARAMS, STATE)
        np.testing.assert_allclose(ys[k], y, rtol=1e-6, atol=2e-6)
        chex.assert_trees_all_close(jax.tree.map(lambda a, k=k: a[k], states), state, rtol=1e-6)
