"""Tests the layers of flax.nnx."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxnorm
import jaxnorm.linen
import jaxnorm.nnx as jnn

RNG = np.random.default_rng(5)
X = jnp.asarray(RNG.standard_normal((6, 5, 4, 8)), jnp.float32)
TRACKING = {
    "batch": lambda **options: jnn.BatchNorm(8, rngs=nnx.Rngs(0), **options),
    "instance": lambda **options: jnn.InstanceNorm(
        8, track_running_stats=True, rngs=nnx.Rngs(0), **options
    ),
}
STATELESS = {
    "InstanceNorm": {},
    "GroupNorm": {"num_groups": 4},
    "LayerNorm": {},
    "RMSNorm": {},
}
both = pytest.mark.parametrize("kind", TRACKING)


def state_of(layer):
    return {key: getattr(layer, key)[...] for key in ("mean", "var", "count")}


@both
def test_the_state_is_that_of_the_linen_layer_in_training_and_evaluation(kind):
    layer = TRACKING[kind](momentum=0.3)
    linen = getattr(jaxnorm.linen, type(layer).__name__)(momentum=0.3, track_running_stats=True)
    variables = linen.init(jax.random.key(0), X, use_running_average=False)
    chex.assert_trees_all_equal(state_of(layer), variables["batch_stats"])
    for step in range(3):
        x = X + step
        y, updates = linen.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
        variables = {**variables, **updates}
        np.testing.assert_array_equal(layer(x), y)
        chex.assert_trees_all_equal(state_of(layer), variables["batch_stats"])
    layer.eval()
    np.testing.assert_array_equal(layer(X), linen.apply(variables, X, use_running_average=True))
    chex.assert_trees_all_equal(state_of(layer), variables["batch_stats"])
    layer.train()
    layer(X)
    assert int(layer.count[...]) == 4


@pytest.mark.parametrize("name", STATELESS)
def test_a_layer_without_a_state_is_the_linen_layer(name):
    options = {**STATELESS[name], "epsilon": 0.01}
    layer = getattr(jnn, name)(8, rngs=nnx.Rngs(0), **options)
    linen = getattr(jaxnorm.linen, name)(**options)
    mask = jnp.asarray(RNG.random(X.shape) < 0.8)
    variables = linen.init(jax.random.key(0), X)
    assert set(variables) == {"params"}
    np.testing.assert_array_equal(layer(X, mask=mask), linen.apply(variables, X, mask=mask))
    assert set(nnx.to_pure_dict(nnx.state(layer))) == set(variables["params"])


@both
def test_update_stats_is_independent_of_what_normalizes(kind):
    layer = TRACKING[kind]()
    layer(X, update_stats=False)
    assert int(layer.count[...]) == 0
    layer(X, use_running_average=True, update_stats=True)
    assert int(layer.count[...]) == 1


@both
def test_a_half_precision_state_is_widened_in_place(kind):
    layer = TRACKING[kind]()
    for key in ("mean", "var"):
        getattr(layer, key).set_value(getattr(layer, key)[...].astype(jnp.bfloat16))
    layer(X)
    assert (layer.mean[...].dtype, layer.var[...].dtype) == (jnp.float32, jnp.float32)
    _, expected = getattr(jaxnorm, f"{kind}_norm")(X, None, jaxnorm.init_batch_stats(8))
    chex.assert_trees_all_close(state_of(layer), expected, rtol=1e-6)


@both
def test_a_clone_keeps_the_state_from_before_a_step(kind):
    layer = TRACKING[kind]()
    before = nnx.clone(layer)
    layer(X)
    assert (int(before.count[...]), int(layer.count[...])) == (0, 1)


def test_the_variables_are_params_and_batch_stats():
    layer = TRACKING["batch"]()
    assert set(nnx.to_pure_dict(nnx.state(layer, nnx.Param))) == {"scale", "bias"}
    assert set(nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat))) == {"mean", "var", "count"}


@pytest.mark.parametrize("name", ["BatchNorm", "LayerNorm"])
def test_tabulate_shows_a_model_s_variables(name):
    model = nnx.Sequential(getattr(jnn, name)(8, rngs=nnx.Rngs(0)))
    table = nnx.tabulate(model, X, console_kwargs={"width": 200})
    for variable in ("scale", "bias", *(("mean", "var", "count") if name == "BatchNorm" else ())):
        assert f"{variable}: " in table


def test_a_layer_of_known_rank_refuses_other_ranks_and_takes_one_sample():
    layer = jnn.InstanceNorm2d(8, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(layer(X[2]), layer(X)[2], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="InstanceNorm2d: x should have 3 or 4 axes, but has 5"):
        layer(X[None])
    with pytest.raises(ValueError, match="BatchNorm3d: x should have 5 axes, but has 4"):
        jnn.BatchNorm3d(8, rngs=nnx.Rngs(0))(X)


# ---- Errors ----


def run(frontend, name, options):
    if frontend == "linen":
        return getattr(jaxnorm.linen, name)(**options).init(jax.random.key(0), X)
    return getattr(jnn, name)(8, rngs=nnx.Rngs(0), **options)(X)


@pytest.mark.parametrize("frontend", ["linen", "nnx"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"group_size": 4},
            "GroupNorm: one of num_groups and group_size should be given, because each "
            "determines the other, but has num_groups=32 and group_size=4; write num_groups=None",
        ),
        ({"num_groups": None}, "but has num_groups=None and group_size=None"),
        (
            {"num_groups": 3},
            "GroupNorm: num_groups should divide the channels of x, because all groups are of one "
            "size, but is 3 for 8 channels",
        ),
        ({"num_groups": 0}, "num_groups should be a positive int"),
        (
            {"num_groups": None, "group_size": 3},
            "group_size should divide the channels of x, because all groups are of one size, but "
            "is 3 for 8 channels",
        ),
        (
            {"num_groups": 4, "reduction_axes": (0, 1)},
            "GroupNorm: reduction_axes should hold the last axis, because it is the channel "
            "axis, but is (0, 1)",
        ),
    ],
)
def test_groups_that_cannot_be_are_refused(frontend, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        run(frontend, "GroupNorm", options)


@pytest.mark.parametrize("frontend", ["linen", "nnx"])
@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature_axes": (1, -3)}, "feature_axes should name each axis once, but is (1, -3)"),
        ({"feature_axes": 4}, "feature_axes should lie between -4 and 3, because x has 4 axes"),
        ({"reduction_axes": 4}, "reduction_axes should lie between -4 and 3, because x has 4"),
        ({"reduction_axes": (3, -1)}, "reduction_axes should name each axis once, but is (3, -1)"),
    ],
)
def test_axes_that_repeat_or_do_not_exist_are_refused(frontend, name, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        run(frontend, name, options)


@pytest.mark.parametrize("name", ["BatchNorm", *STATELESS])
def test_another_number_of_features_names_both(name):
    options = {"num_groups": 1} if name == "GroupNorm" else {}
    layer = getattr(jnn, name)(5, rngs=nnx.Rngs(0), **options)
    with pytest.raises(ValueError, match=r"shape \(8,\).* has shape \(5,\)"):
        layer(X)


@both
def test_momentum_and_decay_are_those_of_linen(kind):
    with pytest.raises(ValueError, match="momentum or decay should be given, not both"):
        TRACKING[kind](momentum=0.1, decay=0.9)
    with pytest.raises(ValueError, match=r"momentum should not lie .* but is 0.99; .* decay=0.99"):
        TRACKING[kind](momentum=0.99)
    layer = TRACKING[kind](decay=0.75)
    layer(X + 1)
    np.testing.assert_allclose(layer.mean[...], 0.25 * (X + 1).mean((0, 1, 2)), rtol=1e-5)


@both
def test_statistics_that_nobody_chose_are_refused(kind):
    with pytest.raises(ValueError, match="use_running_average should be given, to the constructor"):
        TRACKING[kind](use_running_average=None)(X)
