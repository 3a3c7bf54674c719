"""Tests batch and instance norm, the functions with a state."""

import functools
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

import jaxnorm

pytestmark = pytest.mark.usefixtures("strict")
RNG = np.random.default_rng(2)
NORMS = (jaxnorm.batch_norm, jaxnorm.instance_norm)
both = pytest.mark.parametrize("norm", NORMS)


def normalized(norm, x, mask=None, epsilon=1e-5):
    """Normalizes in float64 NumPy, with channels last; masked outputs are 0."""
    x = np.asarray(x, np.float64)
    mask = np.broadcast_to(True if mask is None else mask, x.shape)
    axes = tuple(range(0 if norm is jaxnorm.batch_norm else 1, x.ndim - 1))
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mean of a sample that is masked out is empty
        mean = x.mean(axes, keepdims=True, where=mask)
        var = x.var(axes, keepdims=True, where=mask)
        return np.where(mask, (x - mean) / np.sqrt(var + epsilon), 0)


# ---- Accuracy ----


@both
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("offset", [0, 1e2, 1e3, 1e4, 1e5, 1e6, "kelvin"])
def test_y_is_within_2e_6_of_float64_at_any_offset(norm, masked, jit, offset):
    x = RNG.standard_normal((16, 12, 12, 8))
    x = (300.15 + 0.05 * x if offset == "kelvin" else offset + x).astype(np.float32)
    mask = RNG.random((16, 12, 12, 1)) < 0.6 if masked else None
    f = jax.jit(norm) if jit else norm
    y, _ = f(x, mask=mask)
    # 2e-6 is a few units in the last place of y, which reaches 4.
    np.testing.assert_allclose(y, normalized(norm, x, mask), rtol=0, atol=2e-6)


@both
@pytest.mark.parametrize("constant", [0.1, -1e3, 3.3333e9, 1e10])
def test_a_constant_becomes_zero(norm, constant):
    x = jnp.full((3, 7, 5, 2), constant, jnp.float32)
    np.testing.assert_array_equal(norm(x)[0], 0)
    np.testing.assert_array_equal(jax.jit(norm)(x)[0], 0)


def test_evaluation_subtracts_in_the_wide_dtype():
    # In bfloat16, 1001.3 and 1000.3 are the same number.
    state = {"mean": jnp.array([1000.3]), "var": jnp.array([1.0]), "count": jnp.int32(1)}
    x = jnp.full((2, 1), 1004, jnp.bfloat16)
    y, _ = jaxnorm.batch_norm(x, None, state, use_running_average=True, epsilon=0.0)
    np.testing.assert_allclose(y.astype(jnp.float32), 3.7, rtol=2**-8)  # bfloat16 rounding
    assert y.dtype == jnp.bfloat16


@pytest.mark.parametrize("offset", [0, 1e6])
def test_y_is_as_accurate_for_a_large_batch(offset):
    # A channel has a hundred thousand entries, too many for a sequential sum.
    x = (RNG.standard_normal((32, 56, 56, 2)) + offset).astype(np.float32)
    y, _ = jax.jit(jaxnorm.batch_norm)(x)
    np.testing.assert_allclose(y, normalized(jaxnorm.batch_norm, x), rtol=0, atol=2e-6)


# ---- Layout ----


@both
@pytest.mark.parametrize("space", [(), (5,), (5, 4), (3, 5, 4)])
@pytest.mark.parametrize("tracked", [False, True])
def test_channels_may_be_on_any_axis_of_any_rank(norm, space, tracked):
    if norm is jaxnorm.instance_norm and not space:
        space = (6,)
    x = RNG.standard_normal((4, *space, 3)).astype(np.float32)
    params = {"scale": jnp.array([1.0, 2.0, 3.0]), "bias": jnp.array([0.5, 0.0, -1.0])}
    state = jaxnorm.init_batch_stats(3) if tracked else None
    y, new = norm(x, params, state)
    for axis in range(0 if norm is jaxnorm.batch_norm else 1, x.ndim):
        for channel_axis in (axis, axis - x.ndim):
            y_moved, new_moved = norm(
                np.moveaxis(x, -1, axis), params, state, channel_axis=channel_axis
            )
            # The sums have another order: each x_hat is within 1e-6, and the scale is up to 3.
            np.testing.assert_allclose(np.moveaxis(y_moved, axis, -1), y, rtol=0, atol=6e-6)
            chex.assert_trees_all_close(new_moved, new, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("channel_axis", [(1, 3), (3, 1), (-1, -3)])
def test_several_channel_axes_have_their_shape_in_their_order(channel_axis):
    x = jnp.asarray(RNG.standard_normal((6, 2, 5, 3)), jnp.float32)
    shape = tuple(x.shape[a] for a in channel_axis)
    params = {"scale": jnp.asarray(RNG.standard_normal(shape), jnp.float32)}
    y, new = jaxnorm.batch_norm(
        x, params, jaxnorm.init_batch_stats(shape), channel_axis=channel_axis, momentum=1.0
    )
    assert new["mean"].shape == shape
    index = (2, 1) if x.shape[channel_axis[0]] == 3 else (1, 2)
    channel = x[:, 1, :, 2]
    np.testing.assert_allclose(new["mean"][index], channel.mean(), rtol=1e-5)
    expected = (channel - channel.mean()) / jnp.sqrt(channel.var() + 1e-5)
    np.testing.assert_allclose(
        y[:, 1, :, 2], expected * params["scale"][index], rtol=1e-4, atol=1e-6
    )


def test_the_samples_may_be_on_any_axis_or_there_is_only_one():
    x = jnp.asarray(RNG.standard_normal((4, 5, 6, 3)), jnp.float32)
    state = jaxnorm.init_batch_stats(3)
    y, new = jaxnorm.instance_norm(x, None, state)
    for axis in (1, 2, -2):
        y_moved, new_moved = jaxnorm.instance_norm(
            jnp.moveaxis(x, 0, axis), None, state, batch_axis=axis
        )
        # The sums have another order; each y is within 2e-6 of float64.
        np.testing.assert_allclose(jnp.moveaxis(y_moved, axis, 0), y, rtol=0, atol=4e-6)
        chex.assert_trees_all_close(new_moved, new, rtol=1e-6, atol=1e-6)
    one, _ = jaxnorm.instance_norm(x[2], None, state, batch_axis=None)
    np.testing.assert_allclose(one, y[2], rtol=0, atol=4e-6)


@both
def test_parameters_of_x_s_rank_modulate_each_sample_or_entry(norm):
    x = jnp.asarray(RNG.standard_normal((4, 5, 3)), jnp.float32)
    plain, _ = norm(x)
    for shape in ((4, 1, 3), (4, 5, 3), (1, 5, 1), (1, 1, 1)):
        scale, bias = (jnp.asarray(RNG.standard_normal(shape), jnp.float32) for _ in range(2))
        y, _ = norm(x, {"scale": scale, "bias": bias})
        np.testing.assert_allclose(y, plain * scale + bias, rtol=1e-5, atol=1e-6)


# ---- The two switches ----

STATE = {"mean": jnp.array([1.0, 2.0]), "var": jnp.array([4.0, 9.0]), "count": jnp.int32(5)}
X = jnp.asarray(RNG.standard_normal((4, 6, 2)), jnp.float32)


def by_state(x):
    return (x - STATE["mean"]) / jnp.sqrt(STATE["var"] + 1e-5)


@both
@pytest.mark.parametrize("use_running_average", [False, True])
@pytest.mark.parametrize("update_stats", [None, False, True])
def test_normalization_and_update_are_chosen_independently(norm, use_running_average, update_stats):
    y, new = norm(
        X, None, STATE, use_running_average=use_running_average, update_stats=update_stats
    )
    expected = by_state(X) if use_running_average else normalized(norm, X)
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-6)
    if update_stats is None:
        update_stats = not use_running_average
    _, moved = norm(X, None, STATE)
    chex.assert_trees_all_close(new, moved if update_stats else STATE, rtol=1e-7)
    assert int(new["count"]) == (6 if update_stats else 5)


@both
def test_adaptation_to_one_value_normalizes_and_skips_the_update(norm):
    x = jnp.ones((1, 1, 2))
    y, new = norm(x, None, STATE, use_running_average=True, update_stats=True)
    np.testing.assert_allclose(y, by_state(x), rtol=1e-6)
    chex.assert_trees_all_equal(new, STATE)


@both
def test_without_a_state_none_is_returned(norm):
    assert norm(X)[1] is None


@both
def test_the_given_state_is_never_changed_in_place(norm):
    state = {key: np.array(value) for key, value in STATE.items()}
    before = {key: value.copy() for key, value in state.items()}
    _, new = norm(X, None, state)
    chex.assert_trees_all_equal(state, before)
    assert not any(np.shares_memory(new[key], state[key]) for key in state)


@both
@pytest.mark.parametrize("x_dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, jnp.float32])
def test_y_has_x_s_dtype_or_the_given_one(norm, x_dtype, dtype):
    x = X.astype(x_dtype)
    y, new = norm(x, jaxnorm.init_params(2), STATE, dtype=dtype)
    assert y.dtype == (x_dtype if dtype is None else dtype)
    assert new["mean"].dtype == jnp.float32
    # y is rounded once from float32, and reaches 3.
    eps = float(jnp.finfo(y.dtype).eps)
    np.testing.assert_allclose(
        y.astype(jnp.float32), normalized(norm, x.astype(jnp.float32)), rtol=eps, atol=2e-6
    )


@pytest.mark.parametrize("state_dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64])
@pytest.mark.parametrize("x_dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_state_and_x_of_different_dtypes(x64, state_dtype, x_dtype):
    state = {**STATE, **{k: STATE[k].astype(state_dtype) for k in ("mean", "var")}}
    y, new = jaxnorm.batch_norm(
        X.astype(x_dtype), None, state, use_running_average=True, update_stats=True
    )
    assert y.dtype == x_dtype
    assert new["mean"].dtype == (jnp.float64 if state_dtype == jnp.float64 else jnp.float32)


# ---- Masks ----


@both
@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30])
def test_masked_entries_affect_neither_values_nor_gradients(norm, poison):
    mask = RNG.random((4, 6, 1)) < 0.6
    clean = jnp.asarray(X)
    dirty = jnp.where(mask, clean, poison)
    weights = jnp.asarray(RNG.standard_normal(X.shape), jnp.float32)

    def loss(x, params):
        y, new = norm(x, params, STATE, mask=jnp.asarray(mask))
        return jnp.sum(y * jnp.where(mask, weights, poison)), (y, new)

    grad = jax.grad(loss, (0, 1), has_aux=True)
    found, expected = (grad(x, jaxnorm.init_params(2)) for x in (dirty, clean))
    chex.assert_trees_all_equal(found, expected)
    chex.assert_tree_all_finite(found)
    np.testing.assert_array_equal(jnp.where(mask, 0, found[1][0]), 0)
    np.testing.assert_array_equal(jnp.where(mask, 0, found[0][0]), 0)


@both
@settings(max_examples=40, deadline=None)
@given(bits=st.lists(st.booleans(), min_size=24, max_size=24), seed=st.integers(0, 2**16))
def test_any_mask_gives_what_numpy_gives_of_the_entries_that_count(norm, bits, seed):
    x = np.random.default_rng(seed).standard_normal((4, 6, 2)).astype(np.float32)
    mask = np.array(bits).reshape(4, 6, 1)
    y, new = jax.jit(norm)(x, None, STATE, mask=mask)
    np.testing.assert_allclose(y, normalized(norm, x, mask), rtol=0, atol=5e-6)
    rows = (
        [x[mask[..., 0]]] if norm is jaxnorm.batch_norm else [x[n][mask[n, :, 0]] for n in range(4)]
    )
    rows = [row.astype(np.float64) for row in rows if len(row) > 1]
    if rows:
        mean = np.mean([row.mean(0) for row in rows], 0)
        var = np.mean([row.var(0, ddof=1) for row in rows], 0)
    else:
        mean, var = STATE["mean"], STATE["var"]
    np.testing.assert_allclose(new["mean"], 0.9 * STATE["mean"] + 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(new["var"], 0.9 * STATE["var"] + 0.1 * var, rtol=1e-5)
    assert int(new["count"]) == (6 if rows else 5)


@both
def test_one_value_known_only_at_run_time_becomes_the_bias(norm):
    mask = jnp.zeros((4, 6, 1), bool).at[:, 2].set(norm is jaxnorm.instance_norm).at[0, 2].set(True)
    y, new = norm(X, {"bias": jnp.array([3.0, 4.0])}, STATE, mask=mask)
    np.testing.assert_array_equal(y[0, 2], [3.0, 4.0])
    chex.assert_trees_all_equal(new, STATE)


@both
def test_a_poisoned_channel_has_nan_in_y_and_its_state_alone_is_kept(norm):
    x = X.at[1, 2, 0].set(jnp.nan)
    y, new = norm(x, None, STATE)
    assert jnp.isnan(y[1, 2, 0])
    assert jnp.all(jnp.isfinite(y[..., 1]))
    _, expected = norm(X, None, STATE)
    np.testing.assert_array_equal(new["mean"], [STATE["mean"][0], expected["mean"][1]])
    np.testing.assert_array_equal(new["var"], [STATE["var"][0], expected["var"][1]])
    assert int(new["count"]) == 6


# ---- Every transformation ----


@both
@pytest.mark.parametrize(
    ("case", "order"),
    [
        ("running", 2),
        pytest.param("masked", 3, marks=pytest.mark.slow),
        *(
            pytest.param(case, 3, marks=pytest.mark.exhaustive)
            for case in ("batch", "running", "frozen")
        ),
    ],
)
def test_derivatives_of_every_order_and_mode(x64, norm, case, order):
    mask = jnp.asarray(RNG.random((3, 4, 2)) < 0.7).at[:, :2].set(True)
    options = {
        "batch": {},
        "masked": {"mask": mask},
        "running": {"use_running_average": True},
        "frozen": {"update_stats": False},
    }[case]
    x, scale, bias = (jnp.asarray(RNG.standard_normal(s)) for s in ((3, 4, 2), (2,), (2,)))

    def f(x, scale, bias, epsilon):
        return norm(x, {"scale": scale, "bias": bias}, STATE, epsilon=epsilon, **options)[0]

    # These are finite differences, and samples of two to four entries have large third derivatives.
    check_grads(f, (x, scale, bias, jnp.asarray(0.3)), order=order, rtol=1e-4, atol=1e-4)
    check_grads(jax.jit(f), (x, scale, bias, jnp.asarray(0.3)), order=1)


@both
@pytest.mark.parametrize("use_running_average", [False, True])
def test_running_statistics_carry_no_gradient(norm, use_running_average):
    def loss(mean, var):
        state = {"mean": mean, "var": var, "count": jnp.int32(0)}
        y, new = norm(X, None, state, use_running_average=use_running_average, update_stats=True)
        return jnp.sum(y**2) + jnp.sum(new["mean"] + new["var"])

    for leaf in jax.grad(loss, (0, 1))(STATE["mean"], STATE["var"]):
        np.testing.assert_array_equal(leaf, 0)


@both
def test_vmap_is_a_loop_with_a_state_each(norm):
    xs = jnp.asarray(RNG.standard_normal((3, 4, 6, 2)), jnp.float32)
    states = jax.tree.map(lambda a: jnp.stack([a, a + 1, a + 2]), STATE)
    params = {"scale": jnp.asarray(RNG.standard_normal((3, 2)), jnp.float32)}
    found = jax.vmap(norm)(xs, params, states)
    each = [norm(*jax.tree.map(lambda a, k=k: a[k], (xs, params, states))) for k in range(3)]
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)  # another order of sums


@both
@pytest.mark.parametrize("momentum", [0.1, None])
def test_scan_carries_the_state(norm, momentum):
    xs = jnp.asarray(RNG.standard_normal((5, 4, 6, 2)), jnp.float32)

    def step(state, x):
        y, state = norm(x, None, state, momentum=momentum)
        return state, y

    found, _ = jax.lax.scan(step, STATE, xs)
    expected = functools.reduce(lambda state, x: step(state, x)[0], xs, STATE)
    chex.assert_trees_all_close(found, expected, rtol=1e-6)
    assert int(found["count"]) == 10


@both
def test_remat_increments_the_count_once(norm):
    @jax.checkpoint
    def block(x, state):
        y, state = norm(x, None, state)
        return jnp.sin(y), state

    def loss(x, state):
        y, state = block(x, state)
        return jnp.sum(y**2), state

    _, new = jax.grad(loss, has_aux=True)(X, STATE)
    chex.assert_trees_all_close(new, norm(X, None, STATE)[1], rtol=1e-6)


@both
def test_eval_shape_returns_the_shapes(norm):
    y, new = jax.eval_shape(functools.partial(norm, momentum=None), X, None, STATE)
    assert (y.shape, y.dtype) == (X.shape, X.dtype)
    assert jax.tree.map(lambda a: a.shape, new) == {"mean": (2,), "var": (2,), "count": ()}


@both
@pytest.mark.parametrize("use_running_average", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_export_with_symbolic_sizes_serves_any_size(norm, use_running_average, masked):
    def f(x, params, state, mask):
        return norm(x, params, state, use_running_average=use_running_average, mask=mask)

    n, h, w = export.symbolic_shape("n, h, w")
    spec = jax.ShapeDtypeStruct((n, h, w, 2), jnp.float32)
    mask_spec = jax.ShapeDtypeStruct((n, h, w, 1), jnp.bool_) if masked else None
    params = jaxnorm.init_params(2)
    exported = export.export(jax.jit(f))(
        spec,
        *jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (params, STATE)),
        mask_spec,
    )
    for shape in ((2, 3, 5), (4, 1, 2), (1, 6, 6)):
        x = jnp.asarray(RNG.standard_normal((*shape, 2)), jnp.float32)
        mask = jnp.asarray(RNG.random((*shape, 1)) < 0.9) if masked else None
        found, expected = exported.call(x, params, STATE, mask), f(x, params, STATE, mask)
        chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=2e-6)


@both
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("use_running_average", [False, True])
def test_what_is_kept_for_the_backward_pass_is_x_and_arrays_of_the_statistics_size(
    norm, dtype, use_running_average
):
    x = jnp.ones((4, 8, 8, 32), dtype)
    params, state = jaxnorm.init_params(32), jaxnorm.init_batch_stats(32)
    f = jax.jit(lambda x, p: norm(x, p, state, use_running_average=use_running_average)[0])
    _, vjp = jax.vjp(f, x, params)
    kept = [(a.shape, a.dtype) for a in jax.tree.leaves(vjp) if a.size > 4 * 32]
    assert kept == [(x.shape, x.dtype)]


# ---- MappedAxes ----


@both
@pytest.mark.parametrize("masked", [False, True])
def test_a_distributed_batch_is_the_whole_batch(x64, norm, masked):
    x = jnp.asarray(RNG.standard_normal((8, 5, 2)))
    mask = jnp.asarray(RNG.random((8, 5, 1)) < 0.5).at[2:4].set(False)
    mask = mask if masked else jnp.ones_like(mask)
    weights = jnp.asarray(RNG.standard_normal(x.shape))
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def whole(x, mask, **options):
        return norm(x, None, STATE, mask=mask, **options)

    spread = jax.shard_map(
        functools.partial(whole, axis_name="d"),
        mesh=mesh,
        in_specs=P("d"),
        out_specs=(P("d"), P()),
    )
    found, expected = jax.jit(spread)(x, mask), whole(x, mask)
    chex.assert_trees_all_close(found, expected, rtol=1e-6, atol=1e-12)  # the state is float32
    found, expected = (
        jax.jit(jax.grad(lambda x, f=f: jnp.sum(weights * f(x, mask)[0])))(x)
        for f in (spread, whole)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


@both
@pytest.mark.parametrize("explicit", [False, True])
def test_a_sharded_batch_under_jit_needs_no_axis_name(norm, explicit):
    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((4,), ("d",), axis_types=(kind,))
    x = jnp.asarray(RNG.standard_normal((8, 5, 2)), jnp.float32)
    expected = norm(x, jaxnorm.init_params(2), STATE)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, NamedSharding(mesh, P("d")))
        found = jax.jit(norm)(sharded, jaxnorm.init_params(2), STATE)
        gradient = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(norm(x)[0]))))(sharded)
    assert found[0].sharding.spec[0] == "d"
    chex.assert_trees_all_close(
        jax.device_get(found), jax.device_get(expected), rtol=1e-5, atol=1e-6
    )
    expected = jax.grad(lambda x: jnp.sum(jnp.sin(norm(x)[0])))(x)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)


def test_one_value_a_device_is_several_values():
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    f = jax.jit(
        jax.shard_map(
            lambda x: jaxnorm.batch_norm(x, axis_name="d")[0],
            mesh=mesh,
            in_specs=P("d"),
            out_specs=P("d"),
        )
    )
    x = jnp.array([[1.0], [3.0], [1.0], [3.0]])
    np.testing.assert_allclose(f(x), [[-1], [1], [-1], [1]], rtol=1e-5)


@pytest.mark.parametrize("spec", [P("d"), P(None, None, "d")])
@pytest.mark.parametrize("norm", ["batch", "layer, features second"])
def test_axes_that_are_known_to_be_sharded_are_neither_sliced_nor_joined(norm, spec):
    """Checks 100 rows on four devices, whose sixteenth is 7, which does not divide by four."""
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    x = jnp.asarray(RNG.standard_normal((100, 3, 100, 2)), jnp.float32)

    def loss(x):
        y = jaxnorm.batch_norm(x)[0] if norm == "batch" else jaxnorm.layer_norm(x, axis=1)
        return jnp.sum(jnp.sin(y))

    expected = jax.grad(loss)(x)
    with jax.set_mesh(mesh):
        found = jax.jit(jax.grad(loss))(jax.device_put(x, jax.NamedSharding(mesh, spec)))
    # These are sums over thousands of float32 terms, in another order.
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
