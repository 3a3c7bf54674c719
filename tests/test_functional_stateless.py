"""Tests group, layer and RMS norm, the functions without a state."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.extend.core import jaxprs_in_params
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

import jaxnorm
from jaxnorm._core import platforms

try:
    import torch
except ImportError:  # not in the environments of the lowest and the newest versions
    torch = None
else:
    torch.set_num_threads(1)  # with more threads, most of the time is spent waiting
pytestmark = pytest.mark.usefixtures("strict")
RNG = np.random.default_rng(4)
group_norm = functools.partial(jaxnorm.group_norm, num_groups=4)
NORMS = {"group": group_norm, "layer": jaxnorm.layer_norm, "rms": jaxnorm.rms_norm}
each = pytest.mark.parametrize("kind", NORMS)


def reference(kind, x, mask=None, epsilon=1e-5, num_groups=4):
    """Normalizes x, (N, H, W, C), in float64 NumPy; masked outputs are 0."""
    x = np.asarray(x, np.float64)
    mask = np.broadcast_to(True if mask is None else mask, x.shape)
    shape, axes = x.shape, (-1,)
    if kind == "group":
        x, mask = (a.reshape(*shape[:-1], num_groups, -1) for a in (x, mask))
        axes = (1, 2, 4)
    n = np.maximum(mask.sum(axes, keepdims=True), 1)
    total = functools.partial(np.sum, axis=axes, keepdims=True, where=mask)
    mean = 0 if kind == "rms" else total(x) / n
    var = total((x - mean) ** 2) / n
    return np.where(mask, (x - mean) / np.sqrt(var + epsilon), 0).reshape(shape)


# ---- Accuracy ----


@each
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("offset", [0, 1e2, 1e3, 1e4, 1e5, 1e6])
def test_y_is_within_2e_6_of_float64_at_any_offset(kind, masked, offset):
    x = (RNG.standard_normal((4, 6, 5, 32)) + offset).astype(np.float32)
    mask = RNG.random((4, 6, 5, 32)) < 0.8 if masked else None
    for f in (NORMS[kind], jax.jit(NORMS[kind])):
        # 2e-6 is a few units in the last place of y, which reaches 4.
        np.testing.assert_allclose(f(x, mask=mask), reference(kind, x, mask), rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", ["group", "layer"])
@pytest.mark.parametrize("constant", [0.1, -1e3, 3.3333e9, 1e10])
def test_a_constant_becomes_zero(kind, constant):
    x = jnp.full((3, 7, 5, 12), constant, jnp.float32)
    np.testing.assert_array_equal(jax.jit(NORMS[kind])(x), 0)


# ---- Relations between the norms ----


def test_one_channel_a_group_is_instance_norm_and_one_group_is_layer_norm():
    x = jnp.asarray(RNG.standard_normal((3, 5, 4, 6)), jnp.float32)
    params = {k: jnp.asarray(RNG.standard_normal(6), jnp.float32) for k in ("scale", "bias")}
    instance, _ = jaxnorm.instance_norm(x, params)
    np.testing.assert_allclose(
        jaxnorm.group_norm(x, params, num_groups=6), instance, rtol=1e-6, atol=1e-6
    )
    of_x_rank = {k: v.reshape(1, 1, 1, 6) for k, v in params.items()}
    layer = jaxnorm.layer_norm(x, of_x_rank, axis=(1, 2, 3))
    np.testing.assert_allclose(
        jaxnorm.group_norm(x, params, num_groups=1), layer, rtol=1e-6, atol=2e-6
    )


def test_rms_norm_of_centered_rows_is_layer_norm():
    x = RNG.standard_normal((7, 16)).astype(np.float32)
    x -= x.mean(-1, keepdims=True)
    np.testing.assert_allclose(jaxnorm.rms_norm(x), jaxnorm.layer_norm(x), rtol=1e-5, atol=1e-6)


# ---- PyTorch: in float64, results differ by the order of sums ----

ASSERT = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-13)
LIKE_TORCH = {
    "group": (
        lambda x, p: jaxnorm.group_norm(x, p, num_groups=3, channel_axis=1),
        lambda x, w, b: torch.nn.functional.group_norm(x, 3, w, b),
        (6,),
    ),
    "layer": (
        jaxnorm.layer_norm,
        lambda x, w, b: torch.nn.functional.layer_norm(x, (5,), w, b),
        (5,),
    ),
    "layer over two axes": (
        lambda x, p: jaxnorm.layer_norm(x, p, axis=(-2, -1)),
        lambda x, w, b: torch.nn.functional.layer_norm(x, (4, 5), w, b),
        (4, 5),
    ),
    "rms": (
        lambda x, p: jaxnorm.rms_norm(x, {"scale": p["scale"]}),
        lambda x, w, b: torch.nn.functional.rms_norm(x, (5,), w, 1e-5) + 0 * b.sum(),
        (5,),
    ),
    "rms with eps=None": (
        lambda x, p: jaxnorm.rms_norm(x, {"scale": p["scale"]}, epsilon=jnp.finfo(x.dtype).eps),
        lambda x, w, b: torch.nn.functional.rms_norm(x, (5,), w) + 0 * b.sum(),
        (5,),
    ),
}


@pytest.mark.parametrize("name", LIKE_TORCH)
def test_y_and_gradients_are_pytorch_s(x64, name):
    pytest.importorskip("torch")
    function, torch_function, shape = LIKE_TORCH[name]
    x, dy = RNG.standard_normal((2, 3, 6, 4, 5)) + 1
    params = {k: RNG.standard_normal(shape) for k in ("scale", "bias")}
    y, vjp = jax.vjp(function, jnp.asarray(x), jax.tree.map(jnp.asarray, params))
    tensors = [torch.tensor(a, requires_grad=True) for a in (x, *params.values())]
    y_torch = torch_function(*tensors)
    y_torch.backward(torch.from_numpy(dy))
    ASSERT(y, y_torch.detach())
    dx, dparams = vjp(jnp.asarray(dy))
    gradients = (dx, dparams["scale"], dparams["bias"])
    for found, tensor in zip(gradients, tensors, strict=True):
        ASSERT(found, tensor.grad)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(0, 5, 8), (3, 0, 8), (0, 8)], ids=str)
@pytest.mark.parametrize("kind", NORMS)
def test_an_empty_input_gives_an_empty_output_and_gradients_of_0(kind, shape, masked):
    x, params = jnp.ones(shape), jaxnorm.init_params(8)
    mask = jnp.ones((1,) * len(shape), bool) if masked else None
    y, vjp = jax.vjp(lambda x, params: NORMS[kind](x, params, mask=mask), x, params)
    dx, of_params = vjp(y)
    assert y.shape == dx.shape == shape
    jax.tree.map(np.testing.assert_array_equal, of_params, {k: np.zeros(8) for k in of_params})


# ---- Axes and parameters ----


@pytest.mark.parametrize("channel_axis", [1, 2, -1])
@pytest.mark.parametrize("batch_axis", [None, 0, (0,), (0, 3), (-2, 0)])
def test_group_norm_takes_channels_and_batch_on_any_axes(channel_axis, batch_axis):
    x = RNG.standard_normal((3, 4, 4, 5, 4)).astype(np.float32)
    y = group_norm(x, channel_axis=channel_axis, batch_axis=batch_axis, num_groups=2)
    batch = () if batch_axis is None else np.ravel(batch_axis) % 5
    # The reference normalizes every group of every batch entry separately.
    moved = np.moveaxis(x, [*batch, channel_axis], [*range(len(batch)), len(batch)])
    expected = np.zeros_like(moved)
    for i in np.ndindex(moved.shape[: len(batch)]):
        for group in (slice(0, 2), slice(2, 4)):
            part = moved[(*i, group)].astype(np.float64)
            expected[(*i, group)] = (part - part.mean()) / np.sqrt(part.var() + 1e-5)
    found = np.moveaxis(y, [*batch, channel_axis], [*range(len(batch)), len(batch)])
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("norm", [jaxnorm.layer_norm, jaxnorm.rms_norm])
@pytest.mark.parametrize("axis", [0, -1, (1, 2), (2, 1), (0, -1, 1)])
def test_parameters_have_the_axes_in_their_order(norm, axis):
    x = jnp.asarray(RNG.standard_normal((3, 4, 5)), jnp.float32)
    axes = [a % 3 for a in np.ravel(axis)]
    scale = jnp.asarray(RNG.standard_normal([x.shape[a] for a in axes]), jnp.float32)
    names = "abc"
    product = f"abc,{''.join(names[a] for a in axes)}->abc"
    expected = jnp.einsum(product, norm(x, axis=axis), scale)
    np.testing.assert_allclose(norm(x, {"scale": scale}, axis=axis), expected, rtol=1e-6)


@each
@pytest.mark.parametrize("shape", [(3, 1, 1, 8), (3, 4, 5, 8), (1, 4, 5, 1), (1, 1, 1, 1)])
def test_parameters_of_x_s_rank_are_of_the_call(kind, shape):
    x = jnp.asarray(RNG.standard_normal((3, 4, 5, 8)), jnp.float32)
    scale, bias = (jnp.asarray(RNG.standard_normal(shape), jnp.float32) for _ in range(2))
    y = NORMS[kind](x, {"scale": scale, "bias": bias})
    np.testing.assert_allclose(y, NORMS[kind](x) * scale + bias, rtol=1e-5, atol=1e-6)


# ---- Masks ----


@each
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_masked_entries_affect_neither_values_nor_gradients(kind, poison):
    x = jnp.asarray(RNG.standard_normal((3, 4, 5, 8)), jnp.float32)
    mask = jnp.asarray(RNG.random((3, 4, 5, 8)) < 0.7).at[0].set(False)
    weights = jnp.asarray(RNG.standard_normal(x.shape), jnp.float32)
    per_entry = jnp.asarray(RNG.standard_normal(x.shape), jnp.float32)

    def loss(x, params):
        y = NORMS[kind](x, params, mask=mask)
        return jnp.sum(y * jnp.where(mask, weights, poison)), y

    grad = jax.grad(loss, (0, 1), has_aux=True)
    params = {"scale": per_entry, "bias": jnp.ones(8)}
    poisoned = {"scale": jnp.where(mask, per_entry, poison), "bias": jnp.ones(8)}
    found, expected = grad(jnp.where(mask, x, poison), poisoned), grad(x, params)
    chex.assert_trees_all_equal(found, expected)
    chex.assert_tree_all_finite(found)
    for masked in (found[1], found[0][0], found[0][1]["scale"]):
        np.testing.assert_array_equal(jnp.where(mask, 0, masked), 0)


# ---- Every transformation ----


@pytest.mark.parametrize(
    ("kind", "masked", "order"),
    [
        ("rms", False, 2),
        pytest.param("layer", True, 3, marks=pytest.mark.slow),
        *(
            pytest.param(kind, masked, 3, marks=pytest.mark.exhaustive)
            for kind in NORMS
            for masked in (False, True)
            if (kind, masked) != ("layer", True)
        ),
    ],
)
def test_derivatives_of_every_order_and_mode(x64, kind, masked, order):
    norm = functools.partial(NORMS[kind], mask=jnp.asarray(RNG.random((3, 2, 8)) < 0.8))
    norm = norm if masked else NORMS[kind]
    x, scale = jnp.asarray(RNG.standard_normal((3, 2, 8))), jnp.asarray(RNG.standard_normal(8))

    def f(x, scale, epsilon):
        return norm(x, {"scale": scale, "bias": scale**2}, epsilon=epsilon)

    check_grads(f, (x, scale, jnp.asarray(0.3)), order=order)
    check_grads(jax.jit(f), (x, scale, jnp.asarray(0.3)), order=1)


@each
def test_vmap_is_a_loop(kind):
    xs = jnp.asarray(RNG.standard_normal((3, 2, 4, 8)), jnp.float32)
    expected = jnp.stack([NORMS[kind](x) for x in xs])
    np.testing.assert_allclose(jax.vmap(NORMS[kind])(xs), expected, rtol=0, atol=2e-6)


@each
def test_export_with_symbolic_sizes_serves_any_size(kind):
    n, length = export.symbolic_shape("n, length")
    spec = jax.ShapeDtypeStruct((n, length, 8), jnp.float32)
    exported = export.export(jax.jit(NORMS[kind]))(spec)
    for shape in ((2, 3, 8), (1, 7, 8)):
        x = jnp.asarray(RNG.standard_normal(shape), jnp.float32)
        np.testing.assert_allclose(exported.call(x), NORMS[kind](x), rtol=0, atol=2e-6)


def test_group_norm_exports_with_a_symbolic_number_of_channels():
    norm = functools.partial(jaxnorm.group_norm, num_groups=2)
    spec = jax.ShapeDtypeStruct(export.symbolic_shape("n, length, c"), jnp.float32)
    exported = export.export(jax.jit(norm))(spec)
    x = jnp.asarray(RNG.standard_normal((2, 3, 6)), jnp.float32)
    np.testing.assert_allclose(exported.call(x), norm(x), rtol=0, atol=2e-6)


@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("norm", [jaxnorm.layer_norm, jaxnorm.rms_norm])
def test_the_gradient_exports_with_symbolic_sizes_too(norm, axis):
    def gradient(x):
        params = jaxnorm.init_params(8, use_bias=norm is jaxnorm.layer_norm)
        return jax.grad(lambda x: jnp.sum(jnp.sin(norm(x, params, axis=axis))))(x)

    n, height, width = export.symbolic_shape("n, height, width")
    sizes = (n, height, width, 8) if axis == -1 else (n, 8, height, width)
    exported = export.export(jax.jit(gradient))(jax.ShapeDtypeStruct(sizes, jnp.float32))
    x = jnp.asarray(RNG.standard_normal((2, 3, 5, 8) if axis == -1 else (2, 8, 3, 5)), jnp.float32)
    np.testing.assert_allclose(exported.call(x), gradient(x), rtol=0, atol=2e-6)


SPREAD = {"group": P(None, "d"), "layer": P(None, None, "d"), "rms": P(None, None, "d")}


@each
@pytest.mark.parametrize("masked", [False, True])
def test_a_sample_distributed_over_devices_is_the_whole_sample(x64, kind, masked):
    x, weights = (jnp.asarray(a) for a in RNG.standard_normal((2, 3, 8, 16)))
    mask = jnp.asarray(RNG.random(x.shape) < 0.5) if masked else jnp.ones(x.shape, bool)
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = SPREAD[kind]
    spread = jax.shard_map(
        lambda x, mask: NORMS[kind](x, mask=mask, axis_name="d"),
        mesh=mesh,
        in_specs=(spec, spec),
        out_specs=spec,
    )

    def whole(x, mask):
        return NORMS[kind](x, mask=mask)

    np.testing.assert_allclose(jax.jit(spread)(x, mask), whole(x, mask), rtol=1e-12, atol=1e-13)
    found, expected = (
        jax.jit(jax.grad(lambda x, f=f: jnp.sum(weights * f(x, mask))))(x) for f in (spread, whole)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-12)


# ---- Compiled programs ----


@each
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_is_kept_for_the_backward_pass_is_x_and_arrays_of_the_statistics_size(kind, dtype):
    x = jnp.ones((4, 8, 8, 32), dtype)
    _, vjp = jax.vjp(jax.jit(NORMS[kind]), x, jaxnorm.init_params(32))
    kept = [(a.shape, a.dtype) for a in jax.tree.leaves(vjp) if a.size > 4 * 8 * 8]
    assert kept == [(x.shape, x.dtype)]


@pytest.mark.parametrize("affine", [False, True])
def test_group_norm_reduces_per_channel_and_small_arrays_per_group(affine):
    x = jnp.ones((4, 8, 8, 32))
    params = jaxnorm.init_params(32) if affine else None

    def step(x, params, dy):
        y, vjp = jax.vjp(functools.partial(jaxnorm.group_norm, num_groups=8), x, params)
        return y, vjp(dy)

    def reductions(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "reduce_sum" and eqn.invars[0].aval.size == x.size:
                yield eqn.params["axes"]
            for inner in jaxprs_in_params(eqn.params):
                yield from reductions(inner)

    with platforms.formulated_for("cuda"):  # this formulation has no loop
        found = list(reductions(jax.make_jaxpr(step)(x, params, x).jaxpr))
    assert len(found) <= 2 + 2  # forward and backward
    assert all(set(axes) <= {1, 2} for axes in found)  # over space, not over a group


# ---- Errors ----

X = jnp.ones((4, 5, 6))
BAD = {
    "groups that do not divide": (
        jaxnorm.group_norm,
        {"num_groups": 4},
        "group_norm: num_groups should divide the channels of x, because all groups are of one "
        "size, but is 4 for 6 channels",
    ),
    "no groups": (jaxnorm.group_norm, {"num_groups": 0}, "num_groups should be a positive int"),
    "groups that are no int": (
        jaxnorm.group_norm,
        {"num_groups": 2.0},
        "num_groups should be a positive int",
    ),
    "one axis, two roles": (
        jaxnorm.group_norm,
        {"num_groups": 2, "channel_axis": 0},
        "batch_axis and channel_axis should differ, because every sample has all channels, but "
        "both name axis 0 of x",
    ),
    "a batch axis that repeats": (
        jaxnorm.group_norm,
        {"num_groups": 2, "batch_axis": (0, -3)},
        "batch_axis should name each axis once",
    ),
    "an axis that does not exist": (jaxnorm.layer_norm, {"axis": 3}, "axis should lie between -3"),
    "an axis that repeats": (jaxnorm.rms_norm, {"axis": (1, 1)}, "axis should name each axis once"),
    "scale of another shape": (
        jaxnorm.layer_norm,
        {"params": {"scale": jnp.ones(5)}},
        "params['scale'] should have the channels' shape (6,), or x's rank",
    ),
    "scale in another order": (
        jaxnorm.layer_norm,
        {"axis": (2, 1), "params": {"scale": jnp.ones((5, 6))}},
        "params['scale'] should have the channels' shape (6, 5)",
    ),
    "mask of another rank": (
        jaxnorm.rms_norm,
        {"mask": np.ones((4, 5), bool)},
        "mask should have x's rank",
    ),
    "integer input": (
        jaxnorm.layer_norm,
        {"x": np.ones((4, 6), int)},
        "x should have a float dtype",
    ),
    "one axis alone": (jaxnorm.group_norm, {"x": jnp.ones(6)}, "x should have at least 2 axes"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_an_error_at_trace_time_that_says_what_to_write(case):
    norm, bad, message = BAD[case]
    with pytest.raises(ValueError) as error:  # noqa: PT011
        jax.eval_shape(lambda: norm(**{"x": X, **bad}))
    assert message in str(error.value)
    assert str(error.value).startswith(f"{norm.__name__}: ")
