"""Tests that each argument of each public function and layer is checked while JAX traces."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxnorm
import jaxnorm.linen
import jaxnorm.nnx

X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6, 6, 8)), jnp.float32)
STATE = jaxnorm.init_batch_stats(8)
TRACKED = {"batch_norm": jaxnorm.batch_norm, "instance_norm": jaxnorm.instance_norm}
PLAIN = {
    "group_norm": functools.partial(jaxnorm.group_norm, num_groups=2),
    "layer_norm": jaxnorm.layer_norm,
    "rms_norm": jaxnorm.rms_norm,
}
NORMS = {**TRACKED, "batch_renorm": jaxnorm.batch_renorm, **PLAIN}


def call(name, **options):
    """Calls a norm of X, with a state if it has one."""
    return NORMS[name](X, **({} if name in PLAIN else {"batch_stats": STATE}) | options)


def refused(message, function, *args, **options):
    """Checks that the error is raised at trace time, and names the found and expected value."""
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: function(*args, **options))


# ---- Numbers ----

NO_NUMBERS = [True, np.True_, "1e-5", 1j, np.ones((2, 1, 1)), float("nan"), float("inf"), [1e-5]]


@pytest.mark.parametrize("bad", [*NO_NUMBERS, None, -1, -1e-9, np.float32(-1)], ids=repr)
@pytest.mark.parametrize("name", NORMS)
def test_epsilon_is_a_number_of_at_least_0(name, bad):
    message = rf"^{name}: epsilon should be a finite number of at least 0, but is "
    refused(message, call, name, epsilon=bad)


@pytest.mark.parametrize("bad", [*NO_NUMBERS, np.ones((5, 1)), jnp.ones(8)], ids=repr)
@pytest.mark.parametrize("name", [*TRACKED, "batch_renorm"])
def test_momentum_is_a_number(name, bad):
    refused(rf"^{name}: momentum should be a finite number, but is ", call, name, momentum=bad)


@pytest.mark.parametrize(
    "good", [1, np.int64(1), np.float64(1), np.float32(1), np.array(1.0), jnp.bfloat16(1)], ids=repr
)
@pytest.mark.parametrize("name", NORMS)
def test_ints_and_numpy_s_numbers_are_taken_as_floats(name, good):
    expected = call(name, epsilon=1.0)
    jax.tree.map(np.testing.assert_array_equal, call(name, epsilon=good), expected)
    traced = jax.jit(lambda e: call(name, epsilon=e))(good)
    # In one compiled program, sums may have another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), traced, expected)
    if name not in PLAIN:
        _, state = call(name, momentum=good)
        np.testing.assert_array_equal(state["mean"], call(name, momentum=1.0)[1]["mean"])


@pytest.mark.parametrize(
    "bad",
    [{"r_max": 0.5}, {"r_max": np.float32(0.5)}, {"r_max": jnp.ones(8)}, {"d_max": -1}],
    ids=repr,
)
def test_limits_are_numbers(bad):
    refused(r"^batch_renorm: [rd]_max should be a finite number of ", call, "batch_renorm", **bad)


def test_what_a_schedule_gives_is_a_number():
    message = "batch_renorm: r_max should be a finite number, but is an array of shape"
    refused(message, call, "batch_renorm", r_max=lambda count: jnp.ones(3))


# ---- Whole numbers, switches, dtypes, axes ----


@pytest.mark.parametrize("good", [np.int64(2), np.int32(2)], ids=repr)
def test_numpy_s_integers_are_integers(good):
    two = call("group_norm", num_groups=2)
    np.testing.assert_array_equal(call("group_norm", num_groups=good), two)
    y, _ = call("batch_norm", virtual_batch_size=good)
    np.testing.assert_array_equal(y, call("batch_norm", virtual_batch_size=2)[0])
    assert jaxnorm.init_batch_stats(good)["mean"].shape == (2,)
    layer = jaxnorm.nnx.GroupNorm(np.int64(8), num_groups=good, epsilon=1e-5, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(layer(X), two, atol=1e-6)  # two programs round differently


@pytest.mark.parametrize("bad", [True, 2.0, 0, -2, "2", None], ids=repr)
def test_numbers_of_groups_are_positive_ints(bad):
    refused("^group_norm: num_groups should be a positive int", call, "group_norm", num_groups=bad)
    if bad is not None:
        message = "^batch_norm: virtual_batch_size should be a positive int"
        refused(message, call, "batch_norm", virtual_batch_size=bad)


@pytest.mark.parametrize("bad", ["no", 1, None], ids=repr)
@pytest.mark.parametrize("name", TRACKED)
def test_skip_nonfinite_is_a_bool(name, bad):
    refused(f"^{name}: skip_nonfinite should be a Python bool", call, name, skip_nonfinite=bad)


@pytest.mark.parametrize("bad", [jnp.int32, bool, jnp.complex64, "float33", 3], ids=repr)
@pytest.mark.parametrize("name", NORMS)
def test_dtype_is_a_float_dtype(name, bad):
    refused(f"^{name}: dtype should be a float dtype, such as", call, name, dtype=bad)


@pytest.mark.parametrize("bad", [np.ones(8, complex), np.ones(8, bool)], ids=["complex", "bool"])
@pytest.mark.parametrize("name", NORMS)
def test_parameters_are_numbers(name, bad):
    message = rf"^{name}: params\['scale'\] should have a float or an integer dtype"
    refused(message, call, name, params={"scale": bad})


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_at_least_one_axis_is_reduced(name):
    refused(f"^{name}: axis should name at least one axis", call, name, axis=())
    refused(f"^{name}: axis should be an int or a tuple of ints", call, name, axis=True)


def test_one_sample_of_channels_alone_is_normalized_in_groups():
    x = X[0, 0, 0]
    y = jaxnorm.group_norm(x, num_groups=2, batch_axis=None)
    np.testing.assert_allclose(y, jaxnorm.group_norm(x[None], num_groups=2)[0], atol=1e-6)
    refused("at least 2 axes", jaxnorm.group_norm, x, num_groups=2)
    refused("channel_axis should be one axis", call, "group_norm", channel_axis=(1, 2))


# ---- The other functions ----


@pytest.mark.parametrize("bad", [True, 2.5, -1, "3", (2, -1), None], ids=repr)
def test_first_variables_have_a_number_of_channels(bad):
    for function in (jaxnorm.init_params, jaxnorm.init_batch_stats):
        refused(f"^{function.__name__}: num_features should be an int", function, bad)


def test_first_variables_are_of_float_dtypes():
    for function in (jaxnorm.init_params, jaxnorm.init_batch_stats):
        refused(f"^{function.__name__}: dtype should be a float", function, 3, dtype=jnp.int32)
    refused("^init_params: use_bias should be a Python bool", jaxnorm.init_params, 3, use_bias=1)


def test_the_update_takes_moments_and_numbers():
    m = jaxnorm.moments(X, (0, 1, 2))
    update = functools.partial(jaxnorm.update_batch_stats, STATE)
    refused("^update_batch_stats: moments should be Moments", update, {"mean": 0})
    counts = dataclasses.replace(m, count=jnp.int32([40] * 3))
    refused("^update_batch_stats: moments.count should have a float dtype", update, counts)
    refused("^merge_moments: a.count should have a float dtype", jaxnorm.merge_moments, counts, m)
    half = {"mean": STATE["mean"]}
    refused("^update_batch_stats: batch_stats should have", jaxnorm.update_batch_stats, half, m)
    refused("^update_batch_stats: momentum should be a finite number", update, m, momentum=True)
    refused("^update_batch_stats: skip_nonfinite should be", update, m, skip_nonfinite="no")
    refused("^merge_moments: b should be Moments", jaxnorm.merge_moments, m, None)


def test_merging_takes_weights():
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), STATE)
    merge = functools.partial(jaxnorm.merge_batch_stats, stacked)
    refused("^merge_batch_stats: counts should be at least 0", merge, jnp.array([1, -1]))
    refused("^merge_batch_stats: counts should be at least 0", merge, jnp.array([1, jnp.nan]))
    refused("^merge_batch_stats: counts should be numbers", merge, jnp.array([True, False]))
    refused("^merge_batch_stats: between should be a Python bool", merge, between=1)


def test_folding_takes_a_layer_and_an_axis():
    layer = {"kernel": jnp.ones((3, 8))}
    fold = functools.partial(jaxnorm.fold_into, layer, None, STATE)
    refused("^fold_into: feature_axis should lie between -2 and 1", fold, feature_axis=5)
    refused("^fold_scale_shift: epsilon should be a finite number", fold, epsilon=-1)
    refused("^fold_into: layer should have a 'kernel'", jaxnorm.fold_into, None, None, STATE)


@pytest.mark.parametrize("held", [{}, [], {"start": {}}, {"start": STATE, "moments": {}}], ids=repr)
def test_an_accumulation_that_is_none_is_refused(held):
    message = r"batch_stats\['accumulation'\] should hold 'start' and 'moments'"
    refused(message, jaxnorm.batch_norm, X, None, {**STATE, "accumulation": held})


@pytest.mark.parametrize("bad", [1, "yes", jnp.ones(3, bool)], ids=repr)
def test_when_is_one_bool(bad):
    refused("^begin_accumulation: when should be a bool", jaxnorm.begin_accumulation, STATE, bad)


# ---- Layers ----

LINEN = ["BatchNorm", "BatchNorm2d", "InstanceNorm", "InstanceNorm2d", "LayerNorm", "RMSNorm"]
MAKERS = [
    lambda name, **o: getattr(jaxnorm.linen, name)(**o),
    lambda name, **o: getattr(jaxnorm.nnx, name)(8, rngs=nnx.Rngs(0), **o),
]


@pytest.mark.parametrize("first", [64, 768, True, np.int64(64)], ids=repr)
@pytest.mark.parametrize("name", LINEN)
def test_num_features_in_linen_is_an_error_that_explains_it(name, first):
    if name[:5] == "Batch" and first is True:
        return  # use_running_average
    message = rf"^{name}: .* the number of channels is not an argument: write {name}\(\)"
    refused(message, getattr(jaxnorm.linen, name), first)


@pytest.mark.parametrize("make", MAKERS, ids=["linen", "nnx"])
@pytest.mark.parametrize("name", ["BatchNorm", "InstanceNorm"])
@pytest.mark.parametrize("bad", [-0.1, 1.5, float("nan"), True, "0.1", 1j], ids=repr)
def test_layers_take_a_momentum_between_0_and_1(make, name, bad):
    refused(f"^{name}: momentum should be a number between 0 and 1", make, name, momentum=bad)
    refused(f"^{name}: decay should be a number between 0 and 1", make, name, decay=bad)


@pytest.mark.parametrize("make", MAKERS, ids=["linen", "nnx"])
@pytest.mark.parametrize("name", ["BatchNorm", "InstanceNorm", "LayerNorm", "RMSNorm"])
@pytest.mark.parametrize(
    "bad",
    [
        {"epsilon": -1e-5},
        {"epsilon": "1e-5"},
        {"epsilon": True},
        {"dtype": jnp.int32},
        {"param_dtype": bool},
        {"use_scale": "no"},
    ],
    ids=repr,
)
def test_layers_check_what_they_are_given(make, name, bad):
    refused(rf"^{name}: {next(iter(bad))} should be ", make, name, **bad)


@pytest.mark.parametrize("make", MAKERS, ids=["linen", "nnx"])
def test_switches_of_layers_are_bools(make):
    for bad in ({"use_running_average": 1}, {"update_stats": "no"}, {"skip_nonfinite": None}):
        refused(rf"^BatchNorm: {next(iter(bad))} should be a ", make, "BatchNorm", **bad)


def test_a_traced_momentum_and_epsilon_stay_allowed():
    def y(momentum, epsilon):
        layer = jaxnorm.nnx.BatchNorm(8, momentum=momentum, epsilon=epsilon, rngs=nnx.Rngs(0))
        return layer(X), layer.mean[...]

    expected = y(0.25, 1e-3)
    found = jax.jit(y)(0.25, 1e-3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)


# ---- Channels on another axis ----


@pytest.mark.parametrize(
    ("function", "axis"),
    [(jaxnorm.batch_norm, "channel_axis"), (jaxnorm.instance_norm, "channel_axis")],
)
def test_channels_on_another_axis_are_named(function, axis):
    x = jnp.ones((2, 8, 5, 5))
    message = re.escape(f"axis 1 of x has that size; if it is the channel axis, write {axis}=1")
    refused(message, function, x, jaxnorm.init_params(8))
    refused(message, function, x, None, STATE)
    refused(message.replace("channel_axis", "axis"), jaxnorm.layer_norm, x, jaxnorm.init_params(8))


def test_layers_name_the_axis_too():
    x = jnp.ones((2, 8, 5, 5))
    message = "axis 1 of x has that size"
    refused(message, jaxnorm.nnx.BatchNorm(8, rngs=nnx.Rngs(0)), x)
    layer = jaxnorm.linen.BatchNorm(use_running_average=False)
    variables = layer.init(jax.random.key(0), X)
    refused(message, layer.apply, variables, x, mutable=["batch_stats"])


# ---- A count that is a float ----


def trained():
    """Returns a state after three batches."""
    state = STATE
    for _ in range(3):
        _, state = jaxnorm.batch_norm(X, None, state)
    return state


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("under", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_float_count_is_converted_to_an_integer(dtype, under):
    state = trained()
    cast = {**state, "count": state["count"].astype(dtype)}
    step = under(lambda state: jaxnorm.batch_norm(X, None, state, momentum=None)[1])
    found, expected = step(cast), step(state)
    assert found["count"].dtype == jnp.int32
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    merged = jaxnorm.merge_batch_stats(jax.tree.map(lambda a: jnp.stack([a, a]), cast))
    assert (merged["count"], merged["count"].dtype) == (6, jnp.int32)
    begun = jaxnorm.begin_accumulation(cast)
    assert begun["count"].dtype == begun["accumulation"]["start"]["count"].dtype == jnp.int32


def test_a_count_that_is_not_a_whole_number_is_an_error():
    bad = {**STATE, "count": jnp.float32(2.5)}
    message = (
        r"batch_norm: batch_stats\['count'\] should be a whole number, because it counts updates, "
        r"but is 2.5; were states averaged that have seen different numbers of batches\? "
        r"merge_batch_stats merges those"
    )
    refused(message, jaxnorm.batch_norm, X, None, bad)
    (finding,) = jaxnorm.check_batch_stats({**trained(), "count": jnp.float32(2.5)})
    assert finding.path == "['count']"


def test_three_steps_of_flax_s_loop_that_averages_the_state_over_devices():
    """Checks lax.pmean of batch_stats between the steps, as in flax/examples/imagenet."""
    layer = jaxnorm.linen.BatchNorm(use_running_average=False, axis_name="batch")
    x = X.reshape(2, 2, 6, 6, 8)
    variables = layer.init(jax.random.key(0), x[0])
    sync = jax.pmap(lambda stats: jax.lax.pmean(stats, "batch"), "batch")
    step = jax.pmap(
        lambda stats, x: layer.apply({**variables, "batch_stats": stats}, x, mutable="batch_stats"),
        "batch",
    )
    stats = jax.tree.map(lambda a: jnp.stack([a, a]), variables["batch_stats"])
    expected = STATE
    for _ in range(3):
        _, updates = step(stats, x)
        assert updates["batch_stats"]["count"].dtype == jnp.int32
        stats = sync(updates["batch_stats"])
        assert stats["count"].dtype == jnp.float32
        _, expected = jaxnorm.batch_norm(X, None, expected)
    found = jax.tree.map(lambda a: a[0], stats)
    assert found["count"] == 3
    # The sums over two devices have another order than those on one device.
    np.testing.assert_allclose(found["mean"], expected["mean"], atol=1e-6)
    np.testing.assert_allclose(found["var"], expected["var"], rtol=1e-5)


def test_a_scan_that_carries_a_float_count_names_it():
    cast = {**STATE, "count": jnp.float32(0)}
    with pytest.raises(TypeError, match=r"\['count'\].*float32.*int32"):
        jax.lax.scan(lambda s, x: (jaxnorm.batch_norm(x, None, s)[1], None), cast, X[None])


def test_a_float_count_costs_one_more_program_at_the_second_step():
    step = jax.jit(lambda state: jaxnorm.batch_norm(X, None, state)[1])
    state = {**STATE, "count": jnp.float32(0)}
    for _ in range(4):
        state = step(state)
    assert step._cache_size() == 2


def test_a_state_may_be_donated():
    step = jax.jit(lambda state: jaxnorm.batch_norm(X, None, state)[1], donate_argnums=0)
    state, kept = jax.tree.map(jnp.copy, STATE), STATE
    for _ in range(3):
        state, kept = step(state), jaxnorm.batch_norm(X, None, kept)[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state, kept)
