"""Tests that norms are exported as one operator, and that the graphs compute what JAX computes."""

import collections
import doctest
import functools
import pathlib
import re
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import jax2onnx
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from flax import nnx

import jaxnorm
import jaxnorm.linen
import jaxnorm.nnx
import jaxnorm.onnx
from jaxnorm.onnx._plugin import OPSETS

ROOT = pathlib.Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "onnx.md"
NATIVE = set(OPSETS)
# Operators that only change the layout; all others compute.
LAYOUT = {"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Shape", "Gather", "Concat", "Identity"}
# x and y are of order 1: a float32 sum in another order differs by a few 1e-7.
CLOSE = {"atol": 5e-6, "rtol": 5e-6}


def normal(shape, seed=0, offset=1.0):
    return np.random.default_rng(seed).normal(offset, 2.0, shape).astype(np.float32)


C = 6
SCALE, BIAS, MEAN = normal((3, C), seed=1)
PARAMS = {"scale": SCALE, "bias": BIAS}
STATE = {"mean": MEAN, "var": 1 + MEAN**2, "count": np.int32(5)}
WIDE = {"scale": normal((1, 3, 5, C), seed=2), "bias": normal((1, 3, 5, C), seed=3)}
ROWS = {key: a[0, 0] for key, a in WIDE.items()}
NARROW = {key: a[:, :1] for key, a in WIDE.items()}


def by_state(x, params=PARAMS, state=STATE, norm=jaxnorm.batch_norm, **options):
    return norm(x, params, state, use_running_average=True, **options)[0]


def batch_norm(x, params=PARAMS, **options):
    return jaxnorm.batch_norm(x, params, **options)[0]


def instance_norm(x, params=PARAMS, **options):
    return jaxnorm.instance_norm(x, params, **options)[0]


def group_norm(x, params=PARAMS, **options):
    return jaxnorm.group_norm(x, params, num_groups=3, **options)


def layer_norm(x, params=PARAMS, **options):
    return jaxnorm.layer_norm(x, params, **options)


def rms_norm(x, params=None, **options):
    return jaxnorm.rms_norm(x, {"scale": SCALE} if params is None else params, **options)


ALL = [by_state, batch_norm, instance_norm, group_norm, layer_norm, rms_norm]


def export(fn, *inputs, **options):
    model = jaxnorm.onnx.to_onnx(fn, inputs, **options)
    onnx.checker.check_model(model, full_check=True)
    return model


def session(model, **options):
    settings = onnxruntime.SessionOptions()
    for name, value in options.items():
        setattr(settings, name, value)
    return onnxruntime.InferenceSession(model.SerializeToString(), settings)


def run(model, *xs):
    opened = session(model)
    return opened.run(None, {i.name: x for i, x in zip(opened.get_inputs(), xs, strict=True)})[0]


def operators(model, ignored=LAYOUT):
    return [node.op_type for node in model.graph.node if node.op_type not in ignored]


def operands(model, operator):
    """Returns the inputs of the only node of an operator, except x; each is an initializer."""
    constants = {a.name: onnx.numpy_helper.to_array(a) for a in model.graph.initializer}
    (node,) = (n for n in model.graph.node if n.op_type == operator)
    return [constants[name] for name in node.input[1:]]


def attribute(model, operator, name):
    (node,) = (n for n in model.graph.node if n.op_type == operator)
    (found,) = (onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name)
    return found


BATCH, INSTANCE, GROUP, LAYER, RMS = (
    f"{name}Normalization" for name in ("Batch", "Instance", "Group", "Layer", "RMS")
)

X, ANY = ("B", 4, 5, C), ("B", "H", "W", C)
SECOND = ("B", C, 4, 5)  # channels are the second axis, as in ONNX


def case(fn, shape, /, *computing, moves=0, **options):
    """Makes a case: a norm, the shape of x, and the operators and Transpose nodes of its graph."""
    return functools.partial(fn, **options), shape, list(computing), moves


def per_channel(a, *shape):
    return {k: v.reshape(shape) if v.ndim else v for k, v in a.items()}


CASES = {
    "batch norm": case(by_state, X, BATCH, moves=2),
    "batch norm of (N, C)": case(by_state, ("B", C), BATCH),
    "batch norm of (N, L, C)": case(by_state, ("B", 4, C), BATCH, moves=2),
    "batch norm in 3d": case(by_state, ("B", 4, 2, 3, C), BATCH, moves=2),
    "batch norm, channels second": case(by_state, SECOND, BATCH, channel_axis=1),
    "batch norm, channels first": case(by_state, (C, 4, "B"), BATCH, moves=2, channel_axis=0),
    "batch norm, two channel axes": case(
        by_state,
        ("B", 2, 3, 4),
        BATCH,
        moves=2,
        params=per_channel(PARAMS, 3, 2),
        state=per_channel(STATE, 3, 2),
        channel_axis=(2, 1),
    ),
    "batch norm, each entry a channel": case(
        by_state, (2, 3), BATCH, params=None, state=per_channel(STATE, 2, 3), channel_axis=(0, 1)
    ),
    "batch norm without parameters": case(by_state, X, BATCH, moves=2, params=None),
    "batch norm with a scale": case(by_state, X, BATCH, moves=2, params={"scale": SCALE}),
    "batch norm with a bias": case(by_state, X, BATCH, moves=2, params={"bias": BIAS}),
    "batch norm, a mask": case(
        lambda x: by_state(x, mask=x > 0), X, "Greater", BATCH, "Expand", "Where", moves=2
    ),
    "batch norm over devices": case(by_state, X, BATCH, moves=2, axis_name="devices"),
    "batch norm, virtual batches": case(by_state, X, BATCH, moves=2, virtual_batch_size=2),
    "batch renorm": case(by_state, X, BATCH, moves=2, norm=jaxnorm.batch_renorm),
    "instance norm by its state": case(by_state, X, BATCH, moves=2, norm=jaxnorm.instance_norm),
    "one sample by its state": case(
        by_state, (4, 5, C), BATCH, moves=2, norm=jaxnorm.instance_norm, batch_axis=None
    ),
    "batch norm by the batch": case(batch_norm, X, INSTANCE, moves=2),
    "batch norm of (N, C) by the batch": case(batch_norm, ("B", C), INSTANCE, moves=2),
    "batch norm, the state frozen": case(
        batch_norm, X, INSTANCE, moves=2, batch_stats=STATE, update_stats=False
    ),
    "instance norm": case(instance_norm, X, INSTANCE, moves=2),
    "instance norm of (N, L, C)": case(instance_norm, ("B", 4, C), INSTANCE, moves=2),
    "instance norm of any space": case(instance_norm, ANY, INSTANCE, moves=2),
    "instance norm, channels second": case(instance_norm, SECOND, INSTANCE, channel_axis=1),
    "instance norm, samples last": case(
        instance_norm, (C, 4, "B"), INSTANCE, moves=2, batch_axis=-1, channel_axis=0
    ),
    "instance norm of one sample": case(
        instance_norm, (4, 5, C), INSTANCE, moves=2, batch_axis=None
    ),
    "instance norm, the state frozen": case(
        instance_norm, X, INSTANCE, moves=2, batch_stats=STATE, update_stats=False
    ),
    "instance norm over devices": case(instance_norm, X, INSTANCE, moves=2, axis_name="devices"),
    "instance norm, scales over space": case(
        instance_norm, ("B", 3, 5, C), INSTANCE, "Mul", "Add", moves=2, params=WIDE
    ),
    "group norm": case(group_norm, X, GROUP, moves=2),
    "group norm of (N, C)": case(group_norm, ("B", C), GROUP),
    "group norm of any space": case(group_norm, ANY, GROUP, moves=2),
    "group norm, channels second": case(group_norm, SECOND, GROUP, channel_axis=1),
    "group norm of one sample": case(group_norm, (4, 5, C), GROUP, moves=2, batch_axis=None),
    "group norm, two batch axes": case(group_norm, (3, 4, 5, C), GROUP, moves=2, batch_axis=(0, 1)),
    "group norm without parameters": case(group_norm, X, GROUP, moves=2, params=None),
    "layer norm": case(layer_norm, X, LAYER),
    "layer norm of (N, C)": case(layer_norm, ("B", C), LAYER),
    "layer norm of one row": case(layer_norm, (C,), LAYER),
    "layer norm of any space": case(layer_norm, ANY, LAYER),
    "layer norm over three axes": case(
        layer_norm, ("B", 3, 5, C), LAYER, params=per_channel(WIDE, 3, 5, C), axis=(1, 2, 3)
    ),
    "layer norm over the second axis": case(layer_norm, SECOND, LAYER, moves=2, axis=1),
    "layer norm over axes in another order": case(
        layer_norm, ("B", C, 4, 5), LAYER, moves=2, params=per_channel(ROWS, 5, C), axis=(3, 1)
    ),
    "layer norm over axes in another order, parameters of x's rank": case(
        layer_norm,
        ("B", C, 4, 5),
        LAYER,
        "Mul",
        "Add",
        moves=2,
        params={key: a.swapaxes(1, 3).reshape(1, C, 1, 5) for key, a in NARROW.items()},
        axis=(3, 1),
    ),
    "layer norm, biases over rows": case(
        layer_norm, ("B", 3, 5, C), LAYER, "Add", params={"scale": SCALE, "bias": WIDE["bias"]}
    ),
    "layer norm, scales over rows": case(
        layer_norm, ("B", 3, 5, C), LAYER, "Mul", "Add", params={**WIDE, "bias": BIAS}
    ),
    "layer norm without parameters": case(layer_norm, X, LAYER, params=None),
    "RMS norm": case(rms_norm, X, RMS),
    "RMS norm with a bias": case(rms_norm, X, RMS, "Add", params=PARAMS),
    "RMS norm over the second axis": case(rms_norm, SECOND, RMS, moves=2, axis=1),
}
SIZES = {"H": 4, "W": 3}


@pytest.mark.parametrize("name", CASES)
def test_each_norm_is_one_operator_that_computes_what_jax_computes(name):
    fn, shape, computing, moves = CASES[name]
    model = export(fn, shape)
    assert operators(model) == computing
    # A later jax2onnx may need fewer of them.
    assert [node.op_type for node in model.graph.node].count("Transpose") <= moves
    assert sum(node.op_type in NATIVE for node in model.graph.node) == 1
    for batch in (2, 5):
        x = normal([SIZES.get(n, batch) if isinstance(n, str) else n for n in shape], seed=batch)
        y = run(model, x)
        assert y.dtype == np.float32
        np.testing.assert_allclose(y, fn(x), **CLOSE)


@pytest.mark.parametrize(
    ("norm", "operator", "expected"),
    [
        (by_state, BATCH, [SCALE, BIAS, STATE["mean"], STATE["var"]]),
        (functools.partial(by_state, norm=jaxnorm.instance_norm), BATCH,
         [SCALE, BIAS, STATE["mean"], STATE["var"]]),
        (functools.partial(by_state, params=None), BATCH,
         [np.ones(C), np.zeros(C), STATE["mean"], STATE["var"]]),
        (instance_norm, INSTANCE, [SCALE, BIAS]),
        (group_norm, GROUP, [SCALE, BIAS]),
        (layer_norm, LAYER, [SCALE, BIAS]),
        (rms_norm, RMS, [SCALE]),
    ],
)  # fmt: skip
def test_parameters_and_statistics_are_initializers_and_epsilon_an_attribute(
    norm, operator, expected
):
    model = export(functools.partial(norm, epsilon=1e-3), ("B", 4, C))
    found = operands(model, operator)
    assert [a.dtype for a in found] == [np.float32] * len(expected)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)  # the bits are equal
    assert attribute(model, operator, "epsilon") == np.float32(1e-3)


def test_half_precision_parameters_become_float32_initializers():
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), PARAMS)
    found = operands(export(functools.partial(layer_norm, params=params), ("B", C)), LAYER)
    for a, name in zip(found, ("scale", "bias"), strict=True):
        assert a.dtype == np.float32
        np.testing.assert_array_equal(a, params[name].astype(jnp.float32))


# ---- PyTorch ----


def loaded(module, **tensors):
    module.load_state_dict({k: torch.asarray(v) for k, v in tensors.items()}, strict=False)
    return module.eval()


AFFINE = {"weight": SCALE, "bias": BIAS}
RUNNING = {"running_mean": STATE["mean"], "running_var": STATE["var"]}
MODULES = {
    "batch norm": lambda: loaded(torch.nn.BatchNorm2d(C), **AFFINE, **RUNNING),
    "batch norm of (N, C)": lambda: loaded(torch.nn.BatchNorm1d(C), **AFFINE, **RUNNING),
    "batch norm by the batch": lambda: loaded(
        torch.nn.BatchNorm2d(C, track_running_stats=False), **AFFINE
    ),
    "instance norm by its state": lambda: loaded(
        torch.nn.InstanceNorm2d(C, affine=True, track_running_stats=True), **AFFINE, **RUNNING
    ),
    "instance norm": lambda: loaded(torch.nn.InstanceNorm2d(C, affine=True), **AFFINE),
    "group norm": lambda: loaded(torch.nn.GroupNorm(3, C), **AFFINE),
    "layer norm": lambda: loaded(torch.nn.LayerNorm(C), **AFFINE),
    "RMS norm": lambda: loaded(torch.nn.RMSNorm(C, eps=1e-5), weight=SCALE),
}


@pytest.mark.parametrize("name", MODULES)
def test_the_graph_computes_what_pytorch_computes_with_the_same_weights(name):
    fn, shape, _, _ = CASES[name]
    x = normal((7, *shape[1:]), seed=9)
    with torch.no_grad():
        if name in ("layer norm", "RMS norm"):
            expected = MODULES[name]()(torch.asarray(x)).numpy()
        else:
            first = torch.asarray(np.ascontiguousarray(np.moveaxis(x, -1, 1)))
            expected = np.moveaxis(MODULES[name]()(first).numpy(), 1, -1)
    np.testing.assert_allclose(run(export(fn, shape), x), expected, **CLOSE)


# ---- Models ----


class Model(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        track = {"use_running_average": not train}
        x = nn.Conv(8, (3, 3), use_bias=False)(x)
        x = nn.relu(jaxnorm.linen.BatchNorm(**track)(x))
        x = nn.Conv(8, (3, 3))(x)
        x = nn.relu(jaxnorm.linen.InstanceNorm(track_running_stats=True, **track)(x))
        x = nn.relu(jaxnorm.linen.InstanceNorm()(nn.Conv(8, (3, 3))(x)))
        x = nn.gelu(jaxnorm.linen.GroupNorm(num_groups=4)(nn.Conv(8, (3, 3))(x)))
        x = jaxnorm.linen.LayerNorm()(x).mean((1, 2))
        x = jaxnorm.linen.RMSNorm()(nn.Dense(16)(x))
        return nn.Dense(10)(jaxnorm.linen.BatchNorm(**track)(x))


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.batch = jaxnorm.nnx.BatchNorm(8, rngs=rngs)
        self.second = nnx.Conv(8, 8, (3, 3), rngs=rngs)
        self.instance = jaxnorm.nnx.InstanceNorm(8, track_running_stats=True, rngs=rngs)
        self.own = jaxnorm.nnx.InstanceNorm(8, rngs=rngs)
        self.group = jaxnorm.nnx.GroupNorm(8, num_groups=4, rngs=rngs)
        self.layer = jaxnorm.nnx.LayerNorm(8, rngs=rngs)
        self.dense = nnx.Linear(8, 16, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.rms = jaxnorm.nnx.RMSNorm(16, rngs=rngs)
        self.last = jaxnorm.nnx.BatchNorm(16, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.batch(self.first(x)))
        x = self.own(nnx.relu(self.instance(self.second(x))))
        x = self.layer(nnx.gelu(self.group(x))).mean((1, 2))
        return self.last(self.rms(self.dropout(self.dense(x))))


IMAGES = ("B", 12, 10, 3)
NORMS = {BATCH: 3, INSTANCE: 1, GROUP: 1, LAYER: 1, RMS: 1}


@functools.cache
def linen_model():
    """Returns a model after three steps of training, so that all statistics have changed."""
    model = Model()
    variables = model.init(jax.random.key(0), normal((4, 12, 10, 3)))
    train = jax.jit(functools.partial(model.apply, train=True, mutable=["batch_stats"]))
    for seed in range(3):
        _, updates = train(variables, normal((4, 12, 10, 3), seed))
        variables = {**variables, **updates}
    return model, variables


def nnx_model():
    model = Net(nnx.Rngs(0))
    for seed in range(3):
        model(normal((4, 12, 10, 3), seed))
    model.eval()
    return model


def linen_fn():
    model, variables = linen_model()
    return lambda x: model.apply(variables, x)


# jax2onnx reads the variables of Flax's own layers in a way that Flax has deprecated.
@pytest.mark.filterwarnings("ignore:'.value' access is now deprecated:DeprecationWarning:jax2onnx")
@pytest.mark.parametrize("get", [linen_fn, nnx_model], ids=["linen", "nnx"])
def test_a_whole_model_keeps_one_operator_for_each_norm(get):
    fn = get()
    model = export(fn, IMAGES)
    found = collections.Counter(operators(model))
    assert {name: found[name] for name in NATIVE} == NORMS
    assert not found.keys() & {"Sqrt", "Rsqrt", "ReduceMean", "Reciprocal"}
    for batch in (1, 5):
        x = normal((batch, 12, 10, 3), seed=batch)
        # Each of the seven norms in a row divides by a standard deviation, which scales errors.
        np.testing.assert_allclose(run(model, x), fn(x), atol=1e-4, rtol=1e-4)


def test_the_running_statistics_of_a_model_are_in_the_graph():
    _, variables = linen_model()
    model = export(linen_fn(), IMAGES)
    constants = {a.name: onnx.numpy_helper.to_array(a) for a in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type == BATCH]
    for node, name in zip(nodes, ["BatchNorm_0", "InstanceNorm_0", "BatchNorm_1"], strict=True):
        mean, var = (constants[i] for i in node.input[3:])
        state = variables["batch_stats"][name]
        np.testing.assert_array_equal(mean, state["mean"])
        np.testing.assert_array_equal(var, state["var"])


def test_convolutions_meet_their_norms_without_a_transpose_between_and_swallow_them(tmp_path):
    _, variables = linen_model()

    def fn(x):
        x = nn.Conv(8, (3, 3), use_bias=False).apply({"params": variables["params"]["Conv_0"]}, x)
        x = by_state(x, variables["params"]["BatchNorm_0"], variables["batch_stats"]["BatchNorm_0"])
        return nn.Conv(8, (3, 3)).apply({"params": variables["params"]["Conv_1"]}, nn.relu(x))

    model = export(fn, IMAGES)
    computing = ["Conv", BATCH, "Relu", "Conv"]
    assert [node.op_type for node in model.graph.node] == ["Transpose", *computing, "Transpose"]
    path = tmp_path / "optimized.onnx"
    session(model, optimized_model_filepath=str(path), log_severity_level=3)
    assert BATCH not in operators(onnx.load(path))


LAYERS = {
    "BatchNorm": BATCH,
    "InstanceNorm": INSTANCE,
    "GroupNorm": GROUP,
    "LayerNorm": LAYER,
    "RMSNorm": RMS,
}


@pytest.mark.parametrize("name", LAYERS)
def test_each_layer_is_one_operator_in_both_faces(name):
    x = normal((3, 4, 5, C))
    options = {"num_groups": 3} if name == "GroupNorm" else {}
    layer = getattr(jaxnorm.linen, name)(**options)
    call = {"use_running_average": True} if name == "BatchNorm" else {}
    variables = layer.init(jax.random.key(0), x, **call)
    other = getattr(jaxnorm.nnx, name)(C, rngs=nnx.Rngs(0), **options)
    other.eval()
    for fn in (lambda x: layer.apply(variables, x, **call), other):
        model = export(fn, X)
        assert operators(model) == [LAYERS[name]]
        np.testing.assert_allclose(run(model, x), fn(x), **CLOSE)


@pytest.mark.parametrize("axes", [(1, 2, 3), (-1,)])
def test_a_layer_norm_whose_parameters_lie_along_other_axes(axes):
    layer = jaxnorm.linen.LayerNorm(reduction_axes=(1, 2, 3), feature_axes=axes)
    x = normal((3, 4, 5, C))
    variables = layer.init(jax.random.key(0), x)
    keys = iter(jax.random.split(jax.random.key(1)))
    variables = jax.tree.map(lambda a: jax.random.normal(next(keys), a.shape), variables)
    model = export(lambda x: layer.apply(variables, x), X)
    assert operators(model) == ([LAYER] if len(axes) == 3 else [LAYER, "Mul", "Add"])
    np.testing.assert_allclose(run(model, x), layer.apply(variables, x), **CLOSE)


# ---- Under transformations ----


@pytest.mark.parametrize("norm", ALL)
def test_a_vmap_over_samples_is_still_one_operator(norm):
    x, shape = normal((2, 4, 5, C)), (2, "B", 5, C)
    for axis in (0, 2):
        fn = jax.vmap(norm, axis, axis)
        model = export(fn, shape)
        assert sum(node.op_type in NATIVE for node in model.graph.node) == 1
        np.testing.assert_allclose(run(model, x), fn(x), **CLOSE)


@pytest.mark.parametrize("norm", [layer_norm, rms_norm])
def test_a_vmap_over_rows_is_still_one_operator(norm):
    model, x = export(jax.vmap(norm), ("B", C)), normal((3, C))
    assert sum(node.op_type in NATIVE for node in model.graph.node) == 1
    np.testing.assert_allclose(run(model, x), norm(x), **CLOSE)


@pytest.mark.parametrize("norm", [by_state, group_norm, layer_norm])
def test_members_with_their_own_parameters_have_an_operator_each(norm):
    # These are jax.Arrays: under jit, a vmap of a custom_jvp in JAX 0.10.2 rejects NumPy arrays.
    params = {k: jnp.stack([a, 2 * a, 3 * a]) for k, a in PARAMS.items()}
    fn = jax.vmap(lambda x, params: norm(x, params=params), (None, 0), 1)
    model = export(lambda x: fn(x, params), ("B", 4, C))
    assert sum(node.op_type in NATIVE for node in model.graph.node) == 3
    x = normal((2, 4, C))
    np.testing.assert_allclose(run(model, x), fn(x, params), **CLOSE)


@pytest.mark.parametrize("norm", ALL)
def test_jit_and_remat_change_nothing(norm):
    fn = jax.jit(jax.checkpoint(norm))
    model, plain = export(fn, X), export(norm, X)
    assert operators(model) == operators(plain)


@pytest.mark.parametrize("norm", ALL)
def test_a_gradient_is_exported_as_what_jax_makes_of_it(norm):
    fn = jax.grad(lambda x: jnp.sum(jnp.sin(norm(x))))
    model = export(fn, ("B", 5, C))
    x = normal((3, 5, C))
    np.testing.assert_allclose(run(model, x), fn(x), **CLOSE)


def test_nan_does_not_cross_a_mask_into_an_exported_gradient():
    fn = jax.grad(lambda x: jnp.sum(jnp.sin(by_state(x, mask=x == x))))
    x = normal((3, 5, C))
    x[1, 2] = np.nan
    gradient = run(export(fn, ("B", 5, C)), x)
    np.testing.assert_allclose(gradient, fn(x), **CLOSE)
    assert np.isfinite(gradient).all()


# ---- dtypes ----


@pytest.mark.parametrize("norm", ALL)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_x_is_computed_in_float32_and_y_has_its_dtype(norm, dtype):
    x = normal((3, 4, 5, C)).astype(dtype)
    model = export(norm, jax.ShapeDtypeStruct(X, dtype))
    kind = {"float16": onnx.TensorProto.FLOAT16, "bfloat16": onnx.TensorProto.BFLOAT16}[dtype]
    ends = (*model.graph.input, *model.graph.output)
    assert [end.type.tensor_type.elem_type for end in ends] == [kind, kind]
    assert operators(model) == ["Cast", *operators(export(norm, X)), "Cast"]
    # onnxruntime does not exchange bfloat16 with NumPy: both ends are float32, which is exact.
    model = export(lambda x: norm(x.astype(dtype)).astype(jnp.float32), X)
    y, expected = run(model, x.astype(np.float32)), norm(x).astype(jnp.float32)
    # y is rounded after sums in another order: at most to the neighbor, 2^-10 or 2^-7 away.
    np.testing.assert_allclose(y, expected, rtol=2.0 ** (-10 if dtype == "float16" else -7))


def test_dtype_is_that_of_y():
    x = normal((3, C))
    model = export(functools.partial(layer_norm, dtype=jnp.float16), ("B", C))
    y = run(model, x)
    assert y.dtype == np.float16
    np.testing.assert_allclose(y, layer_norm(x, dtype=jnp.float16), rtol=2.0**-10)


@pytest.mark.parametrize("norm", [by_state, group_norm, layer_norm, rms_norm])
def test_float64_is_computed_in_float64(norm):
    with jax.enable_x64(True):
        x = np.float64(normal((3, 5, C)))
        model = export(norm, ("B", 5, C), enable_double_precision=True)
        y = run(model, x)
        assert y.dtype == np.float64
        # epsilon is a float32 attribute, which differs from 1e-5 by 2.5e-13.
        np.testing.assert_allclose(y, norm(x), rtol=1e-10, atol=1e-10)


# ---- Norms that are not one operator ----


def masked(norm):
    return lambda x: norm(x, mask=x > 0)


PLAIN = {
    "batch norm": masked(batch_norm),
    "instance norm": masked(instance_norm),
    "group norm": masked(group_norm),
    "layer norm": masked(layer_norm),
    "RMS norm": masked(rms_norm),
    "batch renorm by the batch": lambda x: jaxnorm.batch_renorm(
        x, PARAMS, STATE, update_stats=False
    )[0],
    "an epsilon of the data": lambda x: layer_norm(x, epsilon=jnp.abs(x[0, 0, 0, 0])),
    "features of any number": lambda x: jaxnorm.layer_norm(x, axis=(0, 1)),
}


@pytest.mark.parametrize("name", PLAIN)
def test_what_no_operator_computes_becomes_ordinary_operators(name):
    model = export(PLAIN[name], X)
    assert not NATIVE.intersection(operators(model))
    x = normal((3, 4, 5, C))
    np.testing.assert_allclose(run(model, x), PLAIN[name](x), **CLOSE)


def test_virtual_batches_become_ordinary_operators():
    fn = functools.partial(batch_norm, virtual_batch_size=2)
    model, x = export(fn, (4, 3, C)), normal((4, 3, C))
    assert not NATIVE.intersection(operators(model))
    np.testing.assert_allclose(run(model, x), fn(x), **CLOSE)


def test_nan_does_not_cross_a_mask_in_the_graph():
    x = normal((3, C))
    x[1] = np.nan
    mask = np.array([[True], [False], [True]])
    for fn in (masked_rows(batch_norm, mask), masked_rows(by_state, mask)):
        y = run(export(fn, (3, C)), x)
        np.testing.assert_allclose(y, fn(x), **CLOSE)
        assert np.isfinite(y).all()


def masked_rows(norm, mask):
    return lambda x: norm(x, mask=mask)


@pytest.mark.parametrize("norm", ALL)
def test_native_false_is_accurate_at_any_offset_and_needs_no_new_opset(norm):
    if norm is by_state:
        state = {**STATE, "mean": MEAN + 10_000}
        norm = functools.partial(by_state, state=state)
    model = export(norm, ("B", 9, 11, C), native=False, opset=17)
    assert not NATIVE.intersection(operators(model))
    x = normal((5, 9, 11, C), offset=10_000.0)
    with jax.enable_x64(True):
        expected = norm(np.float64(x))
    # Sums in onnxruntime's order have errors up to 1e-5 here; the operators have 1e-3 to NaN.
    np.testing.assert_allclose(run(model, x), expected, atol=5e-5)


# ---- Errors ----


def test_training_is_refused():
    message = (
        r"batch_norm: the running statistics should not be updated in an export, because a graph "
        r"keeps no state, but they are updated with use_running_average=False and "
        r"update_stats=None; to evaluate, write use_running_average=True, in NNX model.eval\(\); "
        r"to normalize by the batch, or by each sample, write update_stats=False, or "
        r"to_onnx\(\.\.\., update_stats=False\) for all norms \[export-in-training\]"
    )
    with pytest.raises(ValueError, match=message):
        export(lambda x: jaxnorm.batch_norm(x, PARAMS, STATE)[0], X)
    for native in (True, False):
        with pytest.raises(ValueError, match="instance_norm: the running statistics should not"):
            export(lambda x: jaxnorm.instance_norm(x, PARAMS, STATE)[0], X, native=native)
    with pytest.raises(ValueError, match="use_running_average=True and update_stats=True"):
        export(functools.partial(by_state, update_stats=True), X)


def test_a_model_in_training_is_refused():
    model, variables = linen_model()
    with pytest.raises(
        ValueError, match="batch_norm: the running statistics should not be updated"
    ):
        export(lambda x: model.apply(variables, x, train=True, mutable=["batch_stats"])[0], IMAGES)
    model = Net(nnx.Rngs(0))
    with pytest.raises(
        ValueError, match="batch_norm: the running statistics should not be updated"
    ):
        export(model, IMAGES)
    assert model.batch.count[...] == 0


@pytest.mark.parametrize("norm", [batch_norm, group_norm, layer_norm, rms_norm])
def test_statistics_of_x_over_devices_are_refused(norm):
    name = norm.__name__
    message = f"{name}: axis_name should be None .* one device, but is 'i'; write axis_name=None"
    with pytest.raises(ValueError, match=message):
        export(jax.vmap(functools.partial(norm, axis_name="i"), axis_name="i"), X)


@pytest.mark.parametrize(
    ("norm", "opset", "operator"),
    [(by_state, 15, BATCH), (layer_norm, 17, LAYER), (group_norm, 21, GROUP), (rms_norm, 23, RMS)],
)
def test_an_opset_older_than_the_operator_is_refused(norm, opset, operator):
    x = normal((3, 4, C))
    message = (
        rf"to_onnx: opset should be at least {opset}, because \w+ becomes {operator}, which needs "
        rf"it, but is {opset - 1}; write a higher opset, or native=False"
    )
    with pytest.raises(ValueError, match=message):
        export(norm, ("B", 4, C), opset=opset - 1)
    np.testing.assert_allclose(run(export(norm, ("B", 4, C), opset=opset), x), norm(x), **CLOSE)


def test_the_checks_of_a_norm_are_the_same_in_an_export():
    with pytest.raises(ValueError, match=r"layer_norm: params\['scale'\] should have the channels"):
        export(layer_norm, ("B", C + 1))
    with pytest.raises(
        ValueError, match=r"batch_norm: batch_stats\['mean'\] should have shape \(7,"
    ):
        export(by_state, ("B", C + 1))
    with pytest.raises(ValueError, match="instance_norm: Expected more than 1 spatial element"):
        export(instance_norm, ("B", 1, C))
    with pytest.raises(ValueError, match="mask should be bool"):
        export(lambda x: by_state(x, mask=x), ("B", C))


# ---- Normalizing by the statistics of x in training mode ----

OWN = {BATCH: 0, INSTANCE: 4, GROUP: 1, LAYER: 1, RMS: 1}


def immutable(model, variables):
    return lambda x: model.apply(variables, x, train=True)


def mutable(model, variables):
    return lambda x: model.apply(variables, x, train=True, mutable=["batch_stats"])[0]


@pytest.mark.parametrize("write", [immutable, mutable])
def test_a_linen_model_by_the_statistics_of_x_needs_no_edit(write):
    model, variables = linen_model()
    before = jax.tree.map(np.asarray, variables)
    exported = export(write(model, variables), IMAGES, update_stats=False)
    found = collections.Counter(operators(exported))
    assert {name: found[name] for name in NATIVE} == OWN
    x = normal((5, 12, 10, 3), seed=5)
    expected = mutable(model, variables)(x)
    # There are seven norms in a row, as in evaluation above.
    np.testing.assert_allclose(run(exported, x), expected, atol=1e-4, rtol=1e-4)
    assert np.abs(expected - model.apply(variables, x)).max() > 0.1
    jax.tree.map(np.testing.assert_array_equal, variables, before)


def by_attributes(model):
    model.set_attributes(use_running_average=False)


def by_view(model):
    return nnx.view(model, use_running_average=False)


def by_training(model):
    model.train()
    model.dropout.deterministic = True


@pytest.mark.filterwarnings("ignore:'.value' access is now deprecated:DeprecationWarning:jax2onnx")
@pytest.mark.parametrize("switch", [by_attributes, by_view, by_training])
def test_an_nnx_model_by_the_statistics_of_x_keeps_its_state(switch):
    model = nnx_model()
    evaluated = model(x := normal((5, 12, 10, 3), seed=5))
    model = switch(model) or model
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))
    with pytest.raises(ValueError, match=r"to_onnx\(\.\.\., update_stats=False\)"):
        export(model, IMAGES)
    exported = export(model, IMAGES, update_stats=False)
    found = collections.Counter(operators(exported))
    assert {name: found[name] for name in NATIVE} == OWN
    after = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    jax.tree.map(np.testing.assert_array_equal, after, before)  # this also fails for traced arrays
    y, expected = run(exported, x), model(x)
    np.testing.assert_allclose(y, expected, atol=1e-4, rtol=1e-4)
    assert np.abs(y - evaluated).max() > 0.1


def test_an_nnx_model_whose_layers_freeze_their_statistics_needs_no_argument():
    model = nnx_model()
    model.set_attributes(use_running_average=False, update_stats=False, raise_if_not_found=False)
    assert operators(export(model.batch, ("B", 4, 5, 8))) == [INSTANCE]


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("norm", [jaxnorm.batch_norm, jaxnorm.instance_norm, jaxnorm.batch_renorm])
def test_update_stats_false_is_that_of_every_norm(norm, native):
    def training(x):
        return norm(x, PARAMS, STATE)[0]

    def frozen(x):
        return norm(x, PARAMS, STATE, update_stats=False)[0]

    model = export(training, X, update_stats=False, native=native)
    assert operators(model) == operators(export(frozen, X, native=native))
    x = normal((3, 4, 5, C))
    np.testing.assert_allclose(run(model, x), training(x), **CLOSE)


def test_update_stats_false_leaves_evaluation_and_adaptation_by_the_state():
    for fn in (by_state, functools.partial(by_state, update_stats=True)):
        assert operators(export(fn, X, update_stats=False)) == [BATCH]


def test_with_update_stats_false_the_state_that_a_function_returns_is_the_given_one():
    model = export(lambda x: jaxnorm.batch_norm(x, PARAMS, STATE), X, update_stats=False)
    x = normal((3, 4, 5, C))
    opened = session(model)
    y, *state = opened.run(None, {opened.get_inputs()[0].name: x})
    np.testing.assert_allclose(y, batch_norm(x), **CLOSE)
    for found, key in zip(state, sorted(STATE), strict=True):  # as a dict's leaves
        np.testing.assert_array_equal(found, STATE[key])


def test_update_stats_is_false_or_none():
    with pytest.raises(ValueError, match="to_onnx: update_stats should be False or None, because"):
        export(by_state, X, update_stats=True)
    with pytest.raises(ValueError, match="to_onnx: update_stats should be a Python bool"):
        export(by_state, X, update_stats="no")
    with pytest.raises(ValueError, match="the running statistics should not be updated"):
        export(lambda x: jaxnorm.batch_norm(x, PARAMS, STATE)[0], X)  # an argument, not a mode


# ---- Caches and global state ----


@pytest.mark.parametrize("norm", ALL)
def test_an_export_neither_reads_jax_s_caches_nor_leaves_anything_in_them(norm):
    fn, x = jax.jit(lambda x: jnp.maximum(norm(x), 0.0)), normal((3, 4, 5, C))
    before = fn(x)  # traced with the shapes of the export
    model = export(fn, x.shape)
    assert sum(node.op_type in NATIVE for node in model.graph.node) == 1
    np.testing.assert_array_equal(fn(x), before)
    fresh = jax.jit(lambda x: jnp.maximum(norm(x), 0.0))
    export(fresh, x.shape)  # this is its first trace
    np.testing.assert_array_equal(fresh(x), before)


def test_an_export_that_fails_leaves_nothing_behind_either():
    fn, x = jax.jit(lambda x: rms_norm(jnp.maximum(x, 0.0))), normal((3, C))
    with pytest.raises(ValueError, match="opset"):
        export(fn, x.shape, opset=21, native=True)
    np.testing.assert_array_equal(fn(x), rms_norm(jnp.maximum(x, 0.0)))
    assert operators(export(fn, x.shape, native=False)) != operators(export(fn, x.shape))


def test_with_channels_second_at_its_ends_a_graph_is_the_operator_alone():
    model = export(by_state, X, inputs_as_nchw=[0], outputs_as_nchw=[0])
    assert [node.op_type for node in model.graph.node] == [BATCH]
    x = normal((3, 4, 5, C))
    y = run(model, np.ascontiguousarray(np.moveaxis(x, -1, 1)))
    np.testing.assert_allclose(np.moveaxis(y, 1, -1), by_state(x), **CLOSE)


def test_jax2onnx_itself_knows_the_norms_and_leaves_the_caches():
    fn, x = jax.jit(lambda x: jnp.maximum(rms_norm(x), 0.0)), normal((3, C))
    export(fn, x.shape, native=False)  # applies to this export only
    assert operators(jax2onnx.to_onnx(fn, [x.shape])) == [RMS, "Max"]
    with pytest.raises(NotImplementedError, match="jaxnorm"):
        fn(x)
    jax.clear_caches()
    np.testing.assert_array_equal(fn(x), jnp.maximum(rms_norm(x), 0.0))


def test_the_model_is_written_where_a_path_says(tmp_path):
    model = export(by_state, ("B", C), output_path=tmp_path / "model.onnx", input_names=["x"])
    assert onnx.load(tmp_path / "model.onnx") == model
    assert [i.name for i in model.graph.input] == ["x"]


# ---- The documents ----


def test_the_example_of_to_onnx_runs():
    failed, run = doctest.testmod(jaxnorm.onnx)
    assert (failed, run > 0) == (0, True)


BLOCKS = re.findall(r"^## ([^\n]*)\n[^#]*?^```python\n(.*?)^```", DOCUMENT.read_text(), re.S | re.M)


def test_every_block_of_the_document_is_found():
    assert len(BLOCKS) == DOCUMENT.read_text().count("```python") > 0


@pytest.mark.parametrize(("heading", "code"), BLOCKS)
def test_the_code_of_the_document_runs(heading, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # one of the blocks writes a file
    folders = [str(ROOT / name) for name in ("examples", "tests")]  # as in the checkout
    monkeypatch.setattr(sys, "path", [*sys.path, *folders])
    assert "assert " in code  # each block checks its results
    exec(compile(code, f"docs/onnx.md: {heading}", "exec"), {})
