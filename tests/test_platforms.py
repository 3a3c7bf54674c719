"""Tests the formulation of every platform on a CPU.

`pytest --formulation tpu` and `--formulation cuda` run whole files of tests with one of them.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

import jaxnorm
from jaxnorm._core import platforms

RNG = np.random.default_rng(5)
NORMS = {
    "batch": lambda x, **options: jaxnorm.batch_norm(x, **options)[0],
    "instance": lambda x, **options: jaxnorm.instance_norm(x, **options)[0],
    "group": functools.partial(jaxnorm.group_norm, num_groups=4),
    "layer": jaxnorm.layer_norm,
    "rms": jaxnorm.rms_norm,
}
AXES = {"batch": (0, 1, 2), "instance": (1, 2), "group": (1, 2, 4), "layer": (3,), "rms": (3,)}
CENTERED = [kind for kind in NORMS if kind != "rms"]
LARGEST = float(np.finfo(np.float32).max)
SLOW = pytest.mark.slow


# A change of the formulation clears JAX's caches. With the scope of a module, pytest orders the
# tests so that the formulation changes twice, and not before each test.
@pytest.fixture(scope="module", params=["cpu", "tpu", "cuda"], autouse=True)
def formulation(request):
    with platforms.formulated_for(request.param):
        yield request.param


def normalized(kind, x):
    """Normalizes in float64 NumPy, with epsilon=0."""
    shape, x = x.shape, np.asarray(x, np.float64)
    x = x.reshape(*shape[:-1], 4, -1) if kind == "group" else x
    mean, std = (f(x, axis=AXES[kind], keepdims=True) for f in (np.mean, np.std))
    return ((x - mean) / std).reshape(shape)


@pytest.mark.parametrize("kind", CENTERED)
def test_y_is_within_2e_6_at_every_offset(kind):
    """Also checks means of about one standard deviation, and of a few."""
    draws = RNG.standard_normal((8, 28, 28, 32))
    f = jax.jit(functools.partial(NORMS[kind], epsilon=0.0))
    for offset in (0, 0.9, 1.1, 1.7, 3, 3.8, 4.2, 1e2, 1e3, 1e4, 1e5, 1e6):
        x = (draws + offset).astype(np.float32)
        np.testing.assert_allclose(f(x), normalized(kind, x), rtol=0, atol=2e-6)


ORDERS = [
    ("batch_norm", (9, 8, 5, 7), {"channel_axis": 1}, (0, 2, 3)),
    ("batch_norm", (128, 5, 3, 8), {"channel_axis": -1}, (0, 1, 2)),
    ("batch_norm", (9, 5, 8, 3, 7), {"channel_axis": -1}, (0, 1, 2, 3)),
    ("batch_norm", (9, 8, 5, 7), {"channel_axis": (1, 3)}, (0, 2)),
    ("batch_norm", (8, 6, 9, 7), {"channel_axis": 0}, (1, 2, 3)),
    ("instance_norm", (9, 8, 5, 7), {"channel_axis": 1}, (2, 3)),
    ("instance_norm", (128, 5, 3, 8), {"channel_axis": 3}, (1, 2)),
    ("instance_norm", (8, 9, 7, 6), {"channel_axis": 0, "batch_axis": 3}, (1, 2)),
    ("layer_norm", (9, 8, 5, 7), {"axis": 1}, (1,)),
    ("layer_norm", (9, 8, 5, 7), {"axis": 0}, (0,)),
    ("layer_norm", (9, 8, 5, 7), {"axis": (1, 2)}, (1, 2)),
    ("layer_norm", (9, 8, 5, 7), {"axis": (1, 2, 3)}, (1, 2, 3)),
]


@pytest.mark.parametrize(("name", "shape", "options", "axes"), ORDERS)
@pytest.mark.parametrize("masked", [False, pytest.param(True, marks=SLOW)])
def test_axes_in_any_order(name, shape, options, axes, masked):
    """Uses data far from 0, so that a loop computes the moments again."""
    x = (RNG.standard_normal(shape) + 1e3).astype(np.float32)
    mask = np.ones(shape, bool)
    if masked:  # at least every other entry is included
        mask = (RNG.random(shape) < 0.5) | (np.indices(shape).sum(0) % 2 == 0)
    f = functools.partial(getattr(jaxnorm, name), mask=mask if masked else None, epsilon=0.0)
    y = jax.jit(functools.partial(f, **options))(x)
    y = y[0] if isinstance(y, tuple) else y
    wide = x.astype(np.float64)
    mean = wide.mean(axes, keepdims=True, where=mask)
    std = wide.std(axes, keepdims=True, where=mask)
    np.testing.assert_allclose(y, np.where(mask, (wide - mean) / std, 0), rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["batch", "instance", "group"])
def test_a_first_row_unlike_the_rest_costs_nothing_that_y_shows(kind, dtype):
    """Checks that y is accurate although, on GPU, the shift is computed from these entries."""
    x = RNG.standard_normal((4, 64, 64, 8))
    x[:, 0] += 100
    x = jnp.asarray(x, dtype)
    y = jax.jit(functools.partial(NORMS[kind], epsilon=0.0))(x)
    # In float32, the variance may lose four of 24 bits; in half precision, y is rounded once.
    rtol = 2.0**-20 if dtype == "float32" else float(jnp.finfo(dtype).eps) * 0.6
    np.testing.assert_allclose(y.astype(float), normalized(kind, x), rtol=rtol, atol=2e-6)


@pytest.mark.parametrize("kind", CENTERED)
@pytest.mark.parametrize(
    "constant",
    [0.1, LARGEST, *(pytest.param(c, marks=SLOW) for c in (1e-30, 3.3333e9, 1e30, -LARGEST))],
)
def test_constants_up_to_the_largest_give_0_exactly(kind, constant, formulation):
    if formulation == "cuda":
        constant = np.clip(constant, -1e38, 1e38)  # the mean of the part must not round up to Inf
    x = jnp.full((4, 14, 14, 32), constant, jnp.float32)
    np.testing.assert_array_equal(jax.jit(NORMS[kind])(x), 0)
    # If the sum overflows, or on a GPU the square of a rounding error, the variance is Inf.
    if kind == "batch" and abs(constant) < (1e25 if formulation == "cuda" else 1e35):
        m = jaxnorm.moments(x, (0, 1, 2))
        np.testing.assert_array_equal(m.mean, np.float32(constant))
        np.testing.assert_array_equal(m.var, 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30, "constant", "offset"])
def test_one_bad_channel_leaves_the_others_their_bits(bad):
    x = RNG.standard_normal((16, 9, 9, 8)).astype(np.float32)
    spoilt = x.copy()
    if bad == "constant":
        spoilt[..., 3] = LARGEST
    elif bad == "offset":
        spoilt[..., 3] += 1e6
    else:
        spoilt[2, 3, 4, 3] = bad
    for kind in ("batch", "instance"):
        f = jax.jit(NORMS[kind])
        good, found = (np.delete(np.asarray(f(a)), 3, axis=-1) for a in (x, spoilt))
        np.testing.assert_array_equal(found, good)


def test_nan_and_inf_are_measured_a_bounded_number_of_times_and_skipped():
    x = RNG.standard_normal((16, 9, 9, 3)).astype(np.float32)
    x[0, 0, 0, 1], x[0, 0, 0, 2] = np.nan, np.inf
    y, state = jax.jit(jaxnorm.batch_norm)(x, None, jaxnorm.init_batch_stats(3))
    assert np.isnan(y[..., 1:]).all()
    assert np.isfinite(y[..., 0]).all()
    np.testing.assert_array_equal(state["mean"][1:], 0)
    np.testing.assert_array_equal(state["var"][1:], 1)


def test_samples_that_overflow_give_finite_y():
    """Checks that y is 0 as in PyTorch, and not NaN, if squares and sums overflow."""
    x = RNG.standard_normal((4, 14, 14, 8)).astype(np.float32) * 1e30
    for kind in CENTERED:
        assert np.isfinite(jax.jit(NORMS[kind])(x)).all()


@pytest.mark.parametrize("kind", NORMS)
def test_a_mask_keeps_nan_from_y_and_gradient(kind):
    x = (RNG.standard_normal((4, 5, 5, 8)) + 3).astype(np.float32)
    mask = RNG.random((4, 5, 5, 8)) < 0.7
    f = lambda x: jnp.sum(jnp.sin(NORMS[kind](x, mask=mask)))  # noqa: E731
    clean, poisoned = (jnp.asarray(np.where(mask, x, a), x.dtype) for a in (0, np.nan))
    (value, gradient), (expected, other) = (
        jax.jit(jax.value_and_grad(f))(a) for a in (poisoned, clean)
    )
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_array_equal(np.where(mask, 0, gradient), 0)
    # These are sums of a few hundred float32 terms.
    np.testing.assert_allclose(gradient, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "kind",
    [k if k in ("batch", "layer") else pytest.param(k, marks=pytest.mark.slow) for k in NORMS],
)
def test_derivatives_in_both_modes_to_order_two(kind, x64):
    x = jnp.asarray(RNG.standard_normal((2, 3, 2, 8)) + 3)
    check_grads(lambda x: NORMS[kind](x), (x,), order=2)


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("offset", [pytest.param(0.0, marks=SLOW), 30.0])
def test_models_under_vmap_are_each_their_own(kind, offset):
    """Checks two models; only the moments of the second are computed again."""
    x = RNG.standard_normal((2, 4, 5, 5, 8)).astype(np.float32)
    x[1] += offset
    found = jax.jit(jax.vmap(NORMS[kind]))(x)
    for a, b in zip(found, x, strict=True):
        np.testing.assert_allclose(a, jax.jit(NORMS[kind])(b), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("groups", [None, [[0, 1], [2, 3]], [[0, 3], [1, 2]]])
@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("masked", [pytest.param(False, marks=SLOW), True])
def test_a_batch_on_several_devices_is_one_batch(groups, offset, masked):
    """Uses unequal counts, one device without entries, and one group that is far from 0."""
    x = RNG.standard_normal((4, 6, 5, 8)).astype(np.float32)
    x[2:] += np.float32(offset)
    counts = [[[[0.3]]], [[[1.0]]], [[[0.0]]], [[[0.6]]]]
    mask = RNG.random((4, 6, 5, 1)) < counts if masked else np.ones((4, 6, 5, 1), bool)
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))

    def synced(x, mask):
        state = jaxnorm.init_batch_stats(8)
        options = {"axis_name": "d", "axis_index_groups": groups}
        f = functools.partial(jaxnorm.batch_norm, mask=mask if masked else None, **options)
        y, vjp, state = jax.vjp(lambda x: f(x, None, state), x, has_aux=True)
        return y, vjp(jnp.cos(y))[0], jax.tree.map(lambda a: a[None], state)

    spread = jax.shard_map(synced, mesh=mesh, in_specs=(P("d"), P("d")), out_specs=P("d"))
    y, gradient, state = jax.jit(spread)(x.reshape(24, 5, 8), mask.reshape(24, 5, 1))
    y, gradient = (np.asarray(a).reshape(x.shape) for a in (y, gradient))
    for group in groups or [[0, 1, 2, 3]]:
        options = {"mask": jnp.asarray(mask[group])} if masked else {}
        first = jaxnorm.init_batch_stats(8)
        whole, vjp, new = jax.vjp(
            lambda x, first=first, options=options: jaxnorm.batch_norm(x, None, first, **options),
            jnp.asarray(x[group]),
            has_aux=True,
        )
        # The sums have another order; the running mean, of 1e4, is rounded to 1e-4.
        np.testing.assert_allclose(y[group], whole, rtol=0, atol=4e-6)
        np.testing.assert_allclose(gradient[group], vjp(jnp.cos(whole))[0], rtol=0, atol=4e-6)
        for k in group:
            for key in ("mean", "var"):
                np.testing.assert_allclose(state[key][k], new[key], rtol=2e-6, atol=1e-6)


def test_x_alone_is_kept_for_the_backward_pass():
    x = jnp.ones((64, 4, 128), jnp.bfloat16)
    for norm in NORMS.values():
        _, vjp = jax.vjp(jax.jit(norm), x)
        kept = [leaf for leaf in jax.tree.leaves(vjp) if leaf.size > 64 * 128]
        assert [leaf.dtype for leaf in kept] == [jnp.bfloat16]


def test_a_gpu_has_no_loop_and_no_conditional(formulation):
    x = jax.ShapeDtypeStruct((8, 6, 6, 8), jnp.float32)
    for norm in NORMS.values():
        step = jax.grad(lambda x, norm=norm: jnp.sum(jnp.sin(norm(x))))
        text = str(jax.make_jaxpr(step)(x))
        loops = re.findall(r"\b(?:while|cond)\[", text)
        assert bool(loops) == (formulation != "cuda" and norm is not NORMS["rms"])


@pytest.mark.parametrize("name", ["moments", "batch_norm"])
def test_a_tpu_has_no_barrier_and_a_cpu_has_one(name, formulation):
    """On a TPU it would hide from the compiler that both passes read one x."""
    x = jax.ShapeDtypeStruct((64, 8), jnp.float32)
    f = {
        "moments": lambda x: jaxnorm.moments(x, 0).var,
        "batch_norm": NORMS["batch"],
    }[name]
    text = jax.jit(jax.grad(lambda x: jnp.sum(f(x)))).lower(x).as_text()
    barriers = text.count("optimization_barrier")
    assert {"cpu": barriers > 0, "tpu": barriers == 0, "cuda": True}[formulation]


def test_a_gpu_measures_a_part_of_a_row_only_with_a_backward_pass(formulation):
    x = jax.ShapeDtypeStruct((4, 64), jnp.float32)
    var = lambda x: jaxnorm.moments(x, 1).var  # noqa: E731
    forward, backward = (
        " slice[" in str(jax.make_jaxpr(f)(x)) for f in (var, jax.grad(lambda x: jnp.sum(var(x))))
    )
    assert (forward, backward) == (False, formulation == "cuda")


def test_the_running_mean_is_where_a_tpu_begins(formulation):
    """Checks that a good shift is not replaced: the bits are those of sums about the shift."""
    x = (RNG.standard_normal((64, 8)) + 50).astype(np.float32)
    state = {"mean": jnp.full(8, 50.0), "var": jnp.ones(8), "count": jnp.int32(9)}
    found, _ = jax.jit(jaxnorm.batch_norm)(x, None, state)
    about, _ = jax.jit(jaxnorm.batch_norm)(x - np.float32(50), None, jaxnorm.init_batch_stats(8))
    if formulation == "tpu":
        np.testing.assert_array_equal(found, about)
    # Each result is within 2e-6 of float64.
    np.testing.assert_allclose(found, about, rtol=0, atol=4e-6)


@pytest.mark.parametrize("guess", [np.nan, np.inf, 1e30, -1e8])
def test_a_running_mean_that_is_far_off_does_no_harm(guess):
    x = RNG.standard_normal((64, 3)).astype(np.float32)
    state = {"mean": jnp.full(3, guess), "var": jnp.ones(3), "count": jnp.int32(9)}
    found, _ = jax.jit(functools.partial(jaxnorm.batch_norm, epsilon=0.0))(x, None, state)
    expected = (x - x.mean(0, np.float64)) / x.std(0, dtype=np.float64)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("formulation", ["cpu"], indirect=True)
def test_programs_for_all_platforms_are_exported_together():
    """Checks an export, in which the platform is chosen when the program is loaded."""
    x = jnp.asarray(RNG.standard_normal((4, 6, 6, 8)), jnp.float32)
    with platforms.formulated_for(None):
        for norm in NORMS.values():
            f = jax.jit(
                lambda x, norm=norm: (norm(x), jax.grad(lambda x: jnp.sum(norm(x) ** 2))(x))
            )
            exported = jax.export.export(f, platforms=("cpu", "cuda", "tpu"))(x)
            found = jax.export.deserialize(exported.serialize()).call(x)
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, f(x)
            )
