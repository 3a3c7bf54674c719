"""Compares batch renorm with the paper's formula in float64 NumPy, and with Keras."""

import importlib.util
import json
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import later_state, normal, some_params
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxnorm
import jaxnorm.linen
import jaxnorm.nnx

X = normal((6, 5, 3))
STATE, PARAMS = later_state(), some_params()
STATE["var"] *= [1, 0.1, 30]  # r is on both sides of its limits


def reference_renorm(x, params, state, r_max, d_max, mask=None, epsilon=1e-5):
    """Computes algorithm 1 of Ioffe, 2017, in float64 NumPy, one channel at a time."""
    counts = np.broadcast_to(True if mask is None else mask, x.shape)
    y = np.zeros(x.shape)
    for c in range(x.shape[-1]):
        chosen = counts[..., c]
        batch = x[..., c][chosen]
        sigma_batch, sigma = np.sqrt(batch.var() + epsilon), np.sqrt(state["var"][c] + epsilon)
        r = np.clip(sigma_batch / sigma, 1 / r_max, r_max)
        d = np.clip((batch.mean() - state["mean"][c]) / sigma, -d_max, d_max)
        x_hat = (batch - batch.mean()) / sigma_batch * r + d
        y[..., c][chosen] = params["scale"][c] * x_hat + params["bias"][c]
    return y


@pytest.mark.parametrize(("r_max", "d_max"), [(3, 5), (1.1, 0.2), (1, 0), (1e9, 1e9)])
@pytest.mark.parametrize("masked", [False, True])
def test_it_is_the_paper_s_algorithm(x64, r_max, d_max, masked):
    mask = np.random.default_rng(1).random((6, 5, 1)) < 0.7 if masked else None
    y, new = jaxnorm.batch_renorm(X, PARAMS, STATE, r_max=r_max, d_max=d_max, mask=mask)
    expected = reference_renorm(X, PARAMS, STATE, r_max, d_max, mask)
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-13)
    chex.assert_trees_all_equal(new, jaxnorm.batch_norm(X, PARAMS, STATE, mask=mask)[1])


def test_within_the_limits_y_is_that_of_evaluation(x64):
    y, _ = jaxnorm.batch_renorm(X, PARAMS, STATE, r_max=1e9, d_max=1e9)
    expected, _ = jaxnorm.batch_norm(X, PARAMS, STATE, use_running_average=True)
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)


def test_limits_of_1_and_0_are_batch_norm(x64):
    found = jaxnorm.batch_renorm(X, PARAMS, STATE, r_max=1.0, d_max=0.0)
    expected = jaxnorm.batch_norm(X, PARAMS, STATE)
    chex.assert_trees_all_close(found, expected, rtol=1e-15)


def test_the_corrections_are_constants_for_the_derivative(x64):
    weights = jnp.asarray(normal(X.shape, seed=3))
    sigma = np.sqrt(STATE["var"] + 1e-5)
    r = np.clip(np.sqrt(X.var((0, 1)) + 1e-5) / sigma, 1 / 1.5, 1.5)
    d = np.clip((X.mean((0, 1)) - STATE["mean"]) / sigma, -0.5, 0.5)

    def renorm(x, params):
        return jnp.sum(
            weights * jaxnorm.batch_renorm(x, params, STATE, r_max=1.5, d_max=0.5)[0] ** 2
        )

    def plain(x, params):
        mean, var = jnp.mean(x, (0, 1)), jnp.var(x, (0, 1))
        x_hat = (x - mean) / jnp.sqrt(var + 1e-5) * r + d
        return jnp.sum(weights * (x_hat * params["scale"] + params["bias"]) ** 2)

    params = jax.tree.map(jnp.asarray, PARAMS)
    found, expected = (jax.grad(f, (0, 1))(jnp.asarray(X), params) for f in (renorm, plain))
    chex.assert_trees_all_close(found, expected, rtol=1e-10, atol=1e-12)


def test_limits_may_be_schedules_of_the_count():
    r_max = optax.linear_schedule(1.0, 3.0, 10)
    d_max = optax.linear_schedule(0.0, 5.0, 10)
    state = {**STATE, "count": jnp.int32(4)}
    f = jax.jit(lambda state: jaxnorm.batch_renorm(X, PARAMS, state, r_max=r_max, d_max=d_max)[0])
    expected, _ = jaxnorm.batch_renorm(X, PARAMS, state, r_max=1.8, d_max=2.0)
    np.testing.assert_allclose(f(state), expected, rtol=1e-6, atol=1e-6)


def test_evaluation_is_that_of_batch_norm(x64):
    found = jaxnorm.batch_renorm(X, PARAMS, STATE, use_running_average=True)
    chex.assert_trees_all_equal(
        found, jaxnorm.batch_norm(X, PARAMS, STATE, use_running_average=True)
    )


def test_virtual_batches_are_each_corrected_towards_the_one_state(x64):
    y, new = jaxnorm.batch_renorm(X, PARAMS, STATE, virtual_batch_size=2, r_max=1.2)
    parts = [jaxnorm.batch_renorm(x, PARAMS, STATE, r_max=1.2)[0] for x in np.split(X, 3)]
    np.testing.assert_allclose(y, np.concatenate(parts), rtol=1e-12)
    expected = jaxnorm.batch_norm(X, PARAMS, STATE)[1]
    chex.assert_trees_all_close(new, expected, rtol=1e-12)


def test_a_spread_batch_is_the_whole_batch_in_one_collective_each_way():
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jnp.asarray(X, jnp.float32)

    def step(x):
        def loss(x):
            y, new = jaxnorm.batch_renorm(x, PARAMS, STATE, axis_name="d")
            return jax.lax.psum(jnp.sum(y**2), "d"), new

        return jax.value_and_grad(loss, has_aux=True)(x)

    spread = jax.jit(
        jax.shard_map(step, mesh=mesh, in_specs=P("d"), out_specs=((P(), P()), P("d")))
    )
    (_, new), gradient = spread(x)
    expected = jaxnorm.batch_renorm(x, PARAMS, STATE)[1]
    chex.assert_trees_all_close(new, expected, rtol=1e-6)
    wanted = jax.grad(lambda x: jnp.sum(jaxnorm.batch_renorm(x, PARAMS, STATE)[0] ** 2))(x)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-4)  # sums of 30 terms
    # One for the statistics, one for their gradient, and one for the loss of this test.
    assert spread.lower(x).compile().as_text().count(" all-reduce(") <= 3


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"r_max": 0.5}, "r_max should be a finite number of at least 1, but is 0.5"),
        ({"d_max": -1}, "d_max should be a finite number of at least 0, but is -1"),
    ],
)
def test_limits_that_are_none_are_refused(bad, message):
    with pytest.raises(ValueError, match=f"batch_renorm: {message}"):
        jaxnorm.batch_renorm(X, PARAMS, STATE, **bad)
    with pytest.raises(ValueError, match=f"BatchRenorm: {message}"):
        jaxnorm.linen.BatchRenorm(**bad)
    with pytest.raises(ValueError, match=f"BatchRenorm: {message}"):
        jaxnorm.nnx.BatchRenorm(3, **bad, rngs=nnx.Rngs(0))


def test_it_needs_a_state():
    with pytest.raises(ValueError, match="batch_renorm: batch_stats should have the keys"):
        jaxnorm.batch_renorm(X, PARAMS)
    with pytest.raises(ValueError, match="track_running_stats should be True"):
        jaxnorm.linen.BatchRenorm(track_running_stats=False)
    with pytest.raises(ValueError, match="track_running_stats should be True"):
        jaxnorm.nnx.BatchRenorm(3, track_running_stats=False, rngs=nnx.Rngs(0))


def test_both_layers_are_the_function():
    x = jnp.asarray(X, jnp.float32)
    state = {**jaxnorm.init_batch_stats(3), "mean": jnp.array([1.0, 2, 3])}
    expected, new = jaxnorm.batch_renorm(x, None, state, r_max=1.2, d_max=0.3)
    layer = jaxnorm.linen.BatchRenorm(use_running_average=False, r_max=1.2, d_max=0.3)
    variables = {**layer.init(jax.random.key(0), x[:1, :1]), "batch_stats": state}
    y, updates = layer.apply(variables, x, mutable=["batch_stats"])
    chex.assert_trees_all_close((y, updates["batch_stats"]), (expected, new), rtol=1e-6)
    evaluated = layer.clone(use_running_average=True).apply(variables, x)
    np.testing.assert_allclose(
        evaluated, jaxnorm.batch_norm(x, None, state, use_running_average=True)[0], rtol=1e-6
    )
    module = jaxnorm.nnx.BatchRenorm(3, r_max=1.2, d_max=0.3, rngs=nnx.Rngs(0))
    module.mean.set_value(state["mean"])
    np.testing.assert_allclose(module(x), y, rtol=1e-6)
    np.testing.assert_allclose(module.mean[...], new["mean"], rtol=1e-6)


KERAS = """
import json, os, sys
os.environ["KERAS_BACKEND"] = "jax"
import keras, numpy as np
x, scale, bias, mean, sigma = (np.asarray(a, "float32") for a in json.load(sys.stdin))
clipping = {"rmin": 1 / 1.5, "rmax": 1.5, "dmax": 0.5}
layer = keras.layers.BatchNormalization(
    renorm=True, renorm_clipping=clipping, epsilon=1e-5, momentum=0.9, renorm_momentum=0.9)
layer.build(x.shape)
layer.gamma.assign(scale)
layer.beta.assign(bias)
layer.renorm_mean.assign(mean)
layer.renorm_stddev.assign(sigma)
print(json.dumps(np.asarray(layer(x, training=True)).tolist()))
"""


@pytest.mark.slow
def test_y_is_keras():
    """Passes the running sigma, which Keras averages, and which is sqrt(var) in jaxnorm."""
    if importlib.util.find_spec("keras") is None:
        pytest.skip("Keras is not there")
    given = X, PARAMS["scale"], PARAMS["bias"], STATE["mean"], np.sqrt(STATE["var"] + 1e-5)
    result = subprocess.run(
        [sys.executable, "-c", KERAS],
        input=json.dumps([a.tolist() for a in given]),
        capture_output=True,
        text=True,
        check=True,
    )
    y, _ = jaxnorm.batch_renorm(jnp.asarray(X, jnp.float32), PARAMS, STATE, r_max=1.5, d_max=0.5)
    # Both use float32, and Keras a one-pass variance: a few units in the last place.
    np.testing.assert_allclose(y, json.loads(result.stdout), rtol=1e-5, atol=1e-5)
