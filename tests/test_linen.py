"""Tests the layers of flax.linen."""

import dataclasses
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnorm
import jaxnorm.linen as jnn

RNG = np.random.default_rng(3)
KEY = jax.random.key(0)
X = jnp.asarray(RNG.standard_normal((6, 5, 4, 3)), jnp.float32)
TRACKING = {
    "batch": lambda **options: jnn.BatchNorm(**options),
    "instance": lambda **options: jnn.InstanceNorm(track_running_stats=True, **options),
}
FUNCTION = {"batch": jaxnorm.batch_norm, "instance": jaxnorm.instance_norm}
both = pytest.mark.parametrize("kind", TRACKING)


def names(options):
    return (" ".join(options) or "defaults") if isinstance(options, dict) else str(options)


# ---- Replacing Flax's layers ----


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_scale": False},
        {"use_bias": False},
        {"use_scale": False, "use_bias": False},
        {"epsilon": 0.1},
        {"scale_init": nn.initializers.normal(), "bias_init": nn.initializers.normal()},
        {"param_dtype": jnp.float16, "dtype": jnp.float32},
        {"dtype": jnp.bfloat16},
        {"use_fast_variance": False, "force_float32_reductions": False},
    ],
    ids=names,
)
@pytest.mark.parametrize(
    "axes",
    [
        -1,
        pytest.param(1, marks=pytest.mark.slow),
        (1, 3),
        pytest.param((-1, 2), marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", ["BatchNorm", "InstanceNorm"])
def test_flax_arguments_give_flax_parameters_state_and_outputs(name, axes, options):
    if name == "BatchNorm":
        options = {"axis": axes, **options}
        norm = jnn.BatchNorm(use_running_average=False, decay=0.75, **options)
        flax_norm = nn.BatchNorm(use_running_average=False, momentum=0.75, **options)
    else:
        options = {"feature_axes": axes, **options}
        norm, flax_norm = jnn.InstanceNorm(**options), nn.InstanceNorm(**options)
    variables, expected = norm.init(KEY, X), flax_norm.init(KEY, X)
    chex.assert_trees_all_equal(variables.get("params"), expected.get("params"))
    y, updates = norm.apply(variables, X, mutable=["batch_stats"])
    y_flax, updates_flax = flax_norm.apply(expected, X, mutable=["batch_stats"])
    assert y.dtype == y_flax.dtype
    # Flax's variance loses a digit, and its output in bfloat16 another one.
    tolerance = float(4 * jnp.finfo(y.dtype).eps) + 1e-5
    chex.assert_trees_all_close(
        y.astype(jnp.float32), y_flax.astype(jnp.float32), rtol=tolerance, atol=tolerance
    )
    if name == "BatchNorm":
        state, state_flax = updates["batch_stats"], updates_flax["batch_stats"]
        assert int(state.pop("count")) == 1
        assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, state_flax)
        np.testing.assert_allclose(state["mean"], state_flax["mean"], rtol=1e-4, atol=1e-6)
        n = X.size / state["var"].size  # unbiased in jaxnorm, biased in Flax
        biased = 0.75 + (state["var"] - 0.75) * (n - 1) / n
        np.testing.assert_allclose(biased, state_flax["var"], rtol=1e-4)


@pytest.mark.parametrize("name", ["BatchNorm", "InstanceNorm"])
def test_the_constructor_has_flax_s_arguments_in_their_order(name):
    fields, flax_fields = (
        [f.name for f in dataclasses.fields(getattr(m, name))] for m in (jnn, nn)
    )
    flax_fields = [field for field in flax_fields if field not in ("parent", "name")]
    assert fields[: len(flax_fields)] == flax_fields
    defaults = {
        field: (getattr(jnn, name)().__dict__[field], getattr(nn, name)().__dict__[field])
        for field in flax_fields
        if field != "momentum"  # the weights of the new value are 0.1 and 0.01
    }
    assert all(default == flax_default for default, flax_default in defaults.values()), defaults


# ---- Collections ----


@both
def test_init_makes_the_first_state_and_moves_nothing(kind):
    variables = TRACKING[kind](use_running_average=False).init(KEY, X + 5)
    chex.assert_trees_all_equal(variables["params"], jaxnorm.init_params(3))
    chex.assert_trees_all_equal(variables["batch_stats"], jaxnorm.init_batch_stats(3))


def test_init_takes_one_sample():
    variables = jnn.BatchNorm(use_running_average=False).init(KEY, jnp.ones((1, 784)))
    assert variables["batch_stats"]["mean"].shape == (784,)


@both
def test_init_normalizes_by_the_sample_s_own_statistics(kind):
    layer = TRACKING[kind](use_running_average=False, epsilon=0.1)
    y, _ = layer.init_with_output(KEY, X + 5)
    expected, _ = FUNCTION[kind](X + 5, epsilon=0.1)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-6)


@both
def test_an_axis_name_is_not_bound_yet_at_init(kind):
    layer = TRACKING[kind](
        use_running_average=False, axis_name="devices", axis_index_groups=[[0, 1], [2, 3]]
    )
    layer.init(KEY, X)


@both
def test_the_layer_is_the_function_over_its_variables(kind):
    layer = TRACKING[kind](momentum=0.3, epsilon=0.01)
    mask = jnp.asarray(RNG.random((6, 5, 4, 1)) < 0.7)
    variables = layer.init(KEY, X, use_running_average=False)
    for use_running_average in (False, True):
        for update_stats in (None, False, True):
            y, updates = layer.apply(
                variables,
                X,
                use_running_average,
                update_stats=update_stats,
                mask=mask,
                mutable=["batch_stats"],
            )
            expected, state = FUNCTION[kind](
                X,
                variables["params"],
                variables["batch_stats"],
                momentum=0.3,
                epsilon=0.01,
                use_running_average=use_running_average,
                update_stats=update_stats,
                mask=mask,
            )
            np.testing.assert_array_equal(y, expected)
            chex.assert_trees_all_equal(updates["batch_stats"], state)


@both
def test_evaluation_needs_no_mutable_collection_and_frozen_training_neither(kind):
    layer = TRACKING[kind]()
    variables = layer.init(KEY, X, use_running_average=False)
    layer.apply(variables, X, use_running_average=True)
    layer.apply(variables, X, use_running_average=False, update_stats=False)


def test_without_tracking_there_is_no_state_and_no_switch_to_give():
    for layer in (jnn.BatchNorm(track_running_stats=False), jnn.InstanceNorm()):
        variables = layer.init(KEY, X)
        assert set(variables) == {"params"}
        y = layer.apply(variables, X)
        np.testing.assert_array_equal(layer.apply(variables, X, use_running_average=True), y)


@both
def test_the_count_is_a_number_of_batches(kind):
    layer = TRACKING[kind](use_running_average=False)
    variables = layer.init(KEY, X)
    for step in range(3):
        _, updates = layer.apply(variables, X, mutable=["batch_stats"])
        variables = {**variables, **updates}
        assert int(variables["batch_stats"]["count"]) == step + 1


def test_skip_nonfinite_is_the_layer_s_to_switch():
    x = X.at[0, 0, 0, 0].set(jnp.nan)
    for skip in (True, False):
        layer = jnn.BatchNorm(use_running_average=False, skip_nonfinite=skip)
        _, updates = layer.apply(layer.init(KEY, X), x, mutable=["batch_stats"])
        assert bool(jnp.isnan(updates["batch_stats"]["mean"][0])) is not skip


def test_the_state_s_dtype_is_param_dtype_or_float32(x64):
    for param_dtype, expected in [
        (jnp.bfloat16, jnp.float32),
        (jnp.float32, jnp.float32),
        (jnp.float64, jnp.float64),
    ]:
        layer = jnn.BatchNorm(use_running_average=False, param_dtype=param_dtype)
        variables = layer.init(KEY, X)
        assert variables["params"]["scale"].dtype == param_dtype
        assert variables["batch_stats"]["mean"].dtype == expected


@both
def test_remat_increments_the_count_once(kind):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm = nn.remat(jnn.BatchNorm if kind == "batch" else jnn.InstanceNorm)
            options = {} if kind == "batch" else {"track_running_stats": True}
            return norm(use_running_average=False, **options)(x)

    model = Model()
    variables = model.init(KEY, X)

    def loss(params):
        y, updates = model.apply({**variables, "params": params}, X, mutable=["batch_stats"])
        return jnp.sum(jnp.sin(y)), updates

    _, updates = jax.grad(loss, has_aux=True)(variables["params"])
    (state,) = updates["batch_stats"].values()
    assert int(state["count"]) == 1


@both
def test_axis_name_spreads_the_batch(kind):
    layer = TRACKING[kind](use_running_average=False, axis_name="d")
    variables = layer.init(KEY, X)
    apply = lambda x: layer.apply(variables, x, mutable=["batch_stats"])  # noqa: E731
    y, updates = jax.vmap(apply, axis_name="d", out_axes=(0, None))(X.reshape(3, 2, 5, 4, 3))
    whole = TRACKING[kind](use_running_average=False)
    expected, updates_expected = whole.apply(variables, X, mutable=["batch_stats"])
    np.testing.assert_allclose(y.reshape(X.shape), expected, rtol=0, atol=2e-6)
    chex.assert_trees_all_close(updates, updates_expected, rtol=1e-5, atol=1e-7)


def test_tabulate_shows_parameters_and_state():
    table = jnn.BatchNorm(use_running_average=False).tabulate(KEY, X, console_kwargs={"width": 200})
    for word in ("scale", "bias", "mean", "var", "count"):
        assert word in table


# ---- 1d, 2d, 3d ----

RANKS = {
    jnn.BatchNorm1d: (2, 3),
    jnn.BatchNorm2d: (4,),
    jnn.BatchNorm3d: (5,),
    jnn.InstanceNorm1d: (2, 3),
    jnn.InstanceNorm2d: (3, 4),
    jnn.InstanceNorm3d: (4, 5),
}


@pytest.mark.parametrize("layer", RANKS)
@pytest.mark.parametrize("rank", range(1, 7))
def test_a_layer_of_known_rank_refuses_other_ranks(layer, rank):
    x = jnp.asarray(RNG.standard_normal((4, 3, 3, 3, 3, 3)[:rank]), jnp.float32)
    options = {"use_running_average": False} if issubclass(layer, jnn.BatchNorm) else {}
    if rank in RANKS[layer]:
        layer(**options).init(KEY, x)
    else:
        ranks = " or ".join(map(str, RANKS[layer]))
        message = f"{layer.__name__}: x should have {ranks} axes, but has {rank}"
        with pytest.raises(ValueError, match=re.escape(message)):
            layer(**options).init(KEY, x)


@pytest.mark.parametrize("axis", [-1, 1])
def test_an_instance_norm_of_known_rank_takes_one_sample(axis):
    layer = jnn.InstanceNorm2d(track_running_stats=True, feature_axes=axis)
    variables = layer.init(KEY, X, use_running_average=False)
    y, updates = layer.apply(variables, X[2], use_running_average=False, mutable=["batch_stats"])
    alone, updates_alone = layer.apply(
        variables, X[2:3], use_running_average=False, mutable=["batch_stats"]
    )
    np.testing.assert_allclose(y, alone[0], rtol=0, atol=1e-6)
    chex.assert_trees_all_close(updates, updates_alone, rtol=1e-6)


# ---- Errors ----


@both
def test_forgetting_mutable_says_what_to_write(kind):
    layer = TRACKING[kind](use_running_average=False)
    message = (
        "batch_stats should be mutable, because the running statistics are updated in training, "
        "but it is not; write y, updates = model.apply(variables, x, ..., mutable=['batch_stats'])"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        layer.apply(layer.init(KEY, X), X)


@both
def test_forgetting_the_state_is_no_silent_restart(kind):
    layer = TRACKING[kind](use_running_average=False)
    params = {"params": layer.init(KEY, X)["params"]}
    message = "write model.apply({'params': params, 'batch_stats': batch_stats}, ...)"
    with pytest.raises(ValueError, match=re.escape(message)):
        layer.apply(params, X, mutable=["batch_stats"])


def test_a_flax_state_without_count_says_what_to_add():
    layer = jnn.BatchNorm(use_running_average=True)
    variables = nn.BatchNorm(use_running_average=True).init(KEY, X)
    message = "but is ['mean', 'var']; write {**batch_stats, 'count': jnp.int32(0)}"
    with pytest.raises(ValueError, match=re.escape(message)):
        layer.apply(variables, X)


@both
def test_momentum_and_decay_together_are_refused(kind):
    with pytest.raises(ValueError, match=r"momentum or decay should be given, not both"):
        TRACKING[kind](momentum=0.1, decay=0.9)


@both
@pytest.mark.parametrize("momentum", [0.51, 0.9, 0.99, 0.999])
def test_a_flax_momentum_is_refused_and_decay_named(kind, momentum):
    with pytest.raises(ValueError, match=f"as in PyTorch, but is {momentum}; .* decay={momentum}"):
        TRACKING[kind](momentum=momentum)


@both
@pytest.mark.parametrize(
    ("options", "weight"),
    [
        ({}, 0.1),
        ({"momentum": 0.5}, 0.5),
        ({"momentum": 1.0}, 1.0),
        ({"momentum": 0.0}, 0.0),
        ({"decay": 0.99}, 0.01),
        ({"momentum": None}, 1.0),  # the first batch of a cumulative average
    ],
    ids=names,
)
def test_momentum_weighs_the_new_value_and_decay_the_old(kind, options, weight):
    layer = TRACKING[kind](use_running_average=False, **options)
    _, updates = layer.apply(layer.init(KEY, X), X + 1, mutable=["batch_stats"])
    np.testing.assert_allclose(
        updates["batch_stats"]["mean"], weight * (X + 1).mean((0, 1, 2)), rtol=1e-5
    )


@both
def test_a_wrong_channel_count_names_both_numbers(kind):
    for layer in (
        TRACKING[kind](use_running_average=True),
        TRACKING[kind](use_running_average=True, use_scale=False, use_bias=False),
    ):
        with pytest.raises(ValueError, match=r"\(2,\).*\(3,\)|\(2, ?\).*\(3, ?\)"):
            layer.apply(layer.init(KEY, X), X[..., :2])


def test_the_samples_axis_is_no_feature_axis():
    with pytest.raises(ValueError, match="feature_axes should not hold axis 0"):
        jnn.InstanceNorm(feature_axes=0).init(KEY, X)
