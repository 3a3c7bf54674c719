"""Tests the moments of x and their merging against float64 NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

import jaxnorm
from jaxnorm._core.moments import Moments, Reduction, pool, shifted_moments

pytestmark = pytest.mark.usefixtures("strict")
RNG = np.random.default_rng(0)


def assert_moments(found, x, axis, where=None, rtol=1e-6):
    """Compares with float64 NumPy, within float32 rounding of the values."""
    x = np.asarray(x, np.float64)
    where = np.ones(x.shape, bool) if where is None else np.broadcast_to(where, x.shape)
    np.testing.assert_allclose(found.count, where.sum(axis), rtol=0)
    np.testing.assert_allclose(found.mean, x.mean(axis, where=where), rtol=rtol, atol=1e-6)
    np.testing.assert_allclose(found.var, x.var(axis, where=where), rtol=rtol)


@pytest.mark.parametrize("axis", [0, -1, (0, 2), (1, -1, 0), ()])
def test_moments_are_numpys_over_any_axes(axis):
    x = RNG.normal(3, 2, (4, 5, 6)).astype(np.float32)
    # The variance is a difference of squares of up to twice its size, with a few roundings of them.
    assert_moments(jaxnorm.moments(x, axis), x, axis, rtol=2e-6)


@pytest.mark.parametrize("offset", [0, 1e2, 1e3, 1e4, 1e5, 1e6])
def test_variance_keeps_its_digits_at_any_offset(offset):
    x = (RNG.standard_normal((64, 33)) + offset).astype(np.float32)
    # The only error is rounding mean and var to float32: a few units in the last place.
    assert_moments(jax.jit(lambda x: jaxnorm.moments(x, 0))(x), x, 0, rtol=5e-7)


@pytest.mark.parametrize("masked", [False, True])
def test_the_shift_is_one_number_in_whatever_the_compiler_fuses_it_into(masked):
    x = (RNG.standard_normal((16, 12, 12, 8)) + 1e6).astype(np.float32)
    mask = RNG.random((16, 12, 12, 1)) < 0.6 if masked else np.ones((16, 12, 12, 1), bool)
    measured = jax.jit(shifted_moments, static_argnums=0)(
        Reduction((0, 1, 2)), x, mask if masked else None
    )
    shift, mean = (np.asarray(a, np.float64) for a in (measured[0], measured[1].mean))
    expected = x.mean((0, 1, 2), np.float64, where=mask)
    # The mean is a pair, with the float32 rounding of d, which is a few units, and not of 1e6.
    np.testing.assert_allclose((shift + mean).ravel(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("step", [2, 16])  # the stride of the shift: of 8 and of 64 entries
@pytest.mark.parametrize("axes", [(0,), (0, 1, 2)])
def test_a_part_that_is_nothing_like_the_rest_costs_four_bits_at_most(axes, step):
    x = RNG.standard_normal((4 * step, *(4 * step,) * (len(axes) - 1), 5)) + 1e3
    x[(slice(None),) * (len(axes) > 1) + (slice(None, None, step),)] = 0
    x += 1e4
    x = x.astype(np.float32)
    # About the shift, the squared mean is 15 times the variance: 2^4 times a few roundings.
    assert_moments(jaxnorm.moments(x, axes), x, axes, rtol=16 * 2.0**-22)


@pytest.mark.parametrize("constant", [0.1, 1e3, 3.3333e9, 1e10])
@pytest.mark.parametrize("n", [1, 3, 1000])
def test_a_constant_has_variance_zero(constant, n):
    m = jaxnorm.moments(jnp.full((n, 2), constant, jnp.float32), 0)
    np.testing.assert_array_equal(m.var, 0)
    np.testing.assert_array_equal(m.mean, np.float32(constant))


@pytest.mark.parametrize("mask_shape", [(4, 5, 6), (4, 5, 1), (1, 5, 6), (4, 1, 1), (1, 1, 1)])
def test_a_mask_of_any_broadcasting_shape_chooses_what_counts(mask_shape):
    mask = RNG.random(mask_shape) < 0.7
    mask.flat[0] = True
    x = RNG.standard_normal((4, 5, 6)).astype(np.float32)
    poisoned = np.where(mask, x, np.nan).astype(np.float32)
    assert_moments(jaxnorm.moments(poisoned, (0, 1, 2), mask=mask), x, (0, 1, 2), mask, rtol=1e-5)


def test_an_empty_sample_has_count_mean_and_var_zero():
    nothing = Moments(*(np.zeros(3, np.float32),) * 3)
    x = jnp.full((4, 3), jnp.nan)
    for m in (
        jaxnorm.moments(x, 0, mask=jnp.zeros((4, 1), bool)),
        jaxnorm.moments(jnp.zeros((0, 3)), 0),
    ):
        jax.tree.map(np.testing.assert_array_equal, m, nothing)


def test_x_and_the_mask_are_checked():
    x = jnp.ones((4, 3))
    with pytest.raises(ValueError, match="moments: x should have a float dtype"):
        jaxnorm.moments(jnp.ones((4, 3), jnp.int32), 0)
    with pytest.raises(ValueError, match="moments: mask should be bool"):
        jaxnorm.moments(x, 0, mask=jnp.ones((4, 1)))
    with pytest.raises(ValueError, match="moments: mask should "):
        jaxnorm.moments(x, 0, mask=jnp.ones(3, bool))


def test_moments_are_not_modified_in_place():
    m = jaxnorm.moments(jnp.ones((4, 3)), 0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        m.count = jnp.zeros(3)


@pytest.mark.parametrize(
    ("dtype", "statistics"),
    [(jnp.float16, jnp.float32), (jnp.bfloat16, jnp.float32), (jnp.float32, jnp.float32)],
)
def test_moments_are_never_below_float32(dtype, statistics):
    for leaf in jax.tree.leaves(jaxnorm.moments(jnp.ones((2, 3), dtype), 0)):
        assert leaf.dtype == statistics


def test_moments_of_float64_stay_float64(x64):
    for leaf in jax.tree.leaves(jaxnorm.moments(jnp.ones((2, 3), jnp.float64), 0)):
        assert leaf.dtype == jnp.float64


def test_a_mean_that_is_not_subtracted_is_0_and_has_no_derivative():
    x, x_dot = (jnp.asarray(RNG.standard_normal((5, 3)), jnp.float32) for _ in range(2))
    measure = functools.partial(shifted_moments, Reduction((1,), centered=False))
    (shift, m), (shift_dot, m_dot) = jax.jvp(measure, (x,), (x_dot,))
    for zero in (shift, m.mean, shift_dot, m_dot.mean, m_dot.count):
        np.testing.assert_array_equal(zero, np.zeros((5, 1)))
    # Sums of three products in float32.
    expected = 2 * (np.float64(x) * np.float64(x_dot)).mean(1, keepdims=True)
    np.testing.assert_allclose(m_dot.var, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("masked", "order"),
    [
        (True, 2),
        pytest.param(True, 3, marks=pytest.mark.slow),
        pytest.param(False, 3, marks=pytest.mark.exhaustive),
    ],
)
def test_moments_have_every_derivative(x64, masked, order):
    x = jnp.asarray(RNG.standard_normal((5, 3)))
    mask = jnp.asarray(RNG.random((5, 3)) < 0.6) if masked else None

    def mean_and_var(x):
        m = jaxnorm.moments(x, 0, mask=mask)
        return m.mean, m.var

    check_grads(mean_and_var, (x,), order=order)
    check_grads(jax.jit(mean_and_var), (x,), order=order - 1)


def test_the_count_has_the_tangent_zero():
    x = jnp.ones((4, 3))
    _, tangent = jax.jvp(lambda x: jaxnorm.moments(x, 0), (x,), (x,))
    np.testing.assert_array_equal(tangent.count, 0)


def test_what_is_masked_out_has_gradient_zero_be_it_nan():
    x = jnp.array([[1.0], [jnp.nan], [4.0], [jnp.inf]])
    mask = jnp.array([[True], [False], [True], [False]])
    gradient = jax.grad(lambda x: jnp.sum(jaxnorm.moments(x, 0, mask=mask).var))(x)
    np.testing.assert_allclose(gradient[:, 0], [-1.5, 0, 1.5, 0])


def test_x_itself_is_kept_for_the_backward_pass():
    x = jnp.ones((64, 128), jnp.bfloat16)
    _, vjp = jax.vjp(jax.jit(lambda x: jaxnorm.moments(x, 0)), x)
    kept = [leaf for leaf in jax.tree.leaves(vjp) if leaf.size > 128]
    assert [leaf.dtype for leaf in kept] == [jnp.bfloat16]


@pytest.mark.parametrize("offset", [1e5, -1e5])
def test_pooling_is_exact_for_any_split(offset):
    x = (RNG.standard_normal((100, 3)) + offset).astype(np.float32)
    parts = np.split(x, [0, 7, 7, 60])  # two of the five are empty
    rows = [shifted_moments(Reduction((0,)), jnp.asarray(part)) for part in parts]
    shifts, moments = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
    shift, pooled = pool(shifts, moments)
    assert [a.shape for a in jax.tree.leaves((shift, pooled))] == [(1, 3)] * 4
    assert_moments(
        Moments(pooled.count[0], (shift + pooled.mean)[0], pooled.var[0]), x, 0, rtol=5e-7
    )


def test_pooling_no_entries_gives_count_mean_and_var_zero():
    zero = jnp.zeros((5, 3))
    for found in jax.tree.leaves(pool(zero, Moments(zero, zero, zero))):
        np.testing.assert_array_equal(found, np.zeros(3))


@pytest.mark.parametrize("groups", [None, [[0, 1], [2, 3]], [[0, 3], [1, 2]]])
@pytest.mark.parametrize("masked", [False, True])
def test_devices_pool_their_samples_and_gradients(x64, groups, masked):
    x = jnp.asarray(RNG.standard_normal((4, 6, 2)) + 1e3)
    mask = jnp.asarray(RNG.random((4, 6, 2)) < [[[0.2]], [[0.9]], [[0.0]], [[0.5]]])
    mask = mask if masked else jnp.ones_like(mask)
    members = groups or [[0, 1, 2, 3]]

    def synced(x):
        return jax.vmap(
            lambda x, mask: jaxnorm.moments(
                x, 0, mask=mask, axis_name="devices", axis_index_groups=groups
            ),
            axis_name="devices",
        )(x, mask)

    def whole(x):
        per_device = [None] * 4
        for group in members:
            index = jnp.asarray(group)
            m = jaxnorm.moments(x[index], (0, 1), mask=mask[index])
            for k in group:
                per_device[k] = m
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *per_device)

    weights = jnp.asarray(RNG.standard_normal((4, 2)))
    found, wanted = synced(x), whole(x)
    # The variance is about 1, and the shift cancels most of the squares of 1e3: 1e-11.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11), found, wanted)
    for f in (lambda m: m.mean, lambda m: m.var):
        found, wanted = (
            jax.grad(lambda x, g=g, f=f: jnp.sum(weights * f(g(x))))(x) for g in (synced, whole)
        )
        np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("offset", [0, 1e3, 1e6])
@pytest.mark.parametrize("cut", [0, 1, 50, 100])
def test_merging_two_samples_gives_the_moments_of_their_union(offset, cut):
    x = (RNG.standard_normal((100, 3)) + offset).astype(np.float32)
    x[cut:] += 4
    a, b = (jaxnorm.moments(part, 0) for part in (x[:cut], x[cut:]))
    merged = jaxnorm.merge_moments(a, b)
    # The means are rounded to float32, with errors of eps * offset; their distance is 2.
    rtol = 2e-6 + 2.0**-23 * offset
    assert_moments(merged, x, 0, rtol=rtol)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol),
        merged,
        jaxnorm.merge_moments(b, a),
    )


def test_merging_is_of_one_shape():
    a, b = (jaxnorm.moments(jnp.ones((4, n)), 0) for n in (2, 3))
    with pytest.raises(ValueError, match=r"a and b should be of one shape, .* \(2,\) and \(3,\)"):
        jaxnorm.merge_moments(a, b)


def test_merging_nothing_with_one_entry_gives_the_entry():
    nothing, one = (Moments(*map(jnp.float32, numbers)) for numbers in ((0, 0, 0), (1, 3, 0)))
    for merged in (jaxnorm.merge_moments(nothing, one), jaxnorm.merge_moments(one, nothing)):
        np.testing.assert_array_equal(jax.tree.leaves(merged), [1, 3, 0])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_merging_widens_to_the_wider_dtype(x64, dtype):
    a, b = (
        Moments(*(jnp.asarray(number, dtype) for number in numbers))
        for numbers, dtype in (((2, 1, 1), "float32"), ((2, 3, 1), dtype))
    )
    for merged in (jaxnorm.merge_moments(a, b), jaxnorm.merge_moments(b, a)):
        found = jax.tree.leaves(merged)
        assert [leaf.dtype for leaf in found] == [
            "float64" if dtype == "float64" else "float32"
        ] * 3
        np.testing.assert_array_equal(found, [4, 2, 2])


def test_the_moments_of_micro_batches_move_the_state_as_one_large_batch():
    x = RNG.normal(3, 2, (12, 5, 2)).astype(np.float32)
    state = jaxnorm.init_batch_stats(2)
    parts = [jaxnorm.moments(part, (0, 1)) for part in np.split(x, [2, 7])]
    merged = jaxnorm.merge_moments(jaxnorm.merge_moments(*parts[:2]), parts[2])
    found = jaxnorm.update_batch_stats(state, merged)
    _, expected = jaxnorm.batch_norm(x, None, state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)
    # In instance norm, each sample is a row, and the rows are concatenated.
    rows = [jax.vmap(lambda x: jaxnorm.moments(x, 0))(part) for part in np.split(x, [2, 7])]
    found = jaxnorm.update_batch_stats(
        state, jax.tree.map(lambda *parts: jnp.concatenate(parts), *rows)
    )
    _, expected = jaxnorm.instance_norm(x, None, state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)


def test_shard_map_gives_replicated_moments_under_its_default_checks():
    x = jnp.asarray(RNG.standard_normal((8, 3)), jnp.float32)
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    synced = jax.shard_map(
        lambda x: jaxnorm.moments(x, 0, axis_name="d"),
        mesh=mesh,
        in_specs=P("d"),
        out_specs=P(),
    )
    assert_moments(jax.jit(synced)(x), x, 0)
