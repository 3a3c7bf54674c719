"""Tests that other tools fold, fuse, quantize and convert the files, and keep the outputs."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxconverter_common.float16
import onnxruntime
import onnxruntime.transformers.float16
import onnxruntime.transformers.optimizer
import onnxsim
import onnxslim
import pytest
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

import jaxnorm.linen
import jaxnorm.onnx

BATCH, INSTANCE, GROUP, LAYER, RMS = (
    f"{name}Normalization" for name in ("Batch", "Instance", "Group", "Layer", "RMS")
)
# x and y are of order 1; folding a scale rounds the weights again, by a relative 6e-8.
CLOSE = {"atol": 5e-6, "rtol": 5e-6}


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(0.5, 1.0, shape).astype(np.float32)


def run(model, x):
    opened = onnxruntime.InferenceSession(model.SerializeToString())
    return opened.run(None, {"x": x})[0]


def count(model, operator):
    return [node.op_type for node in model.graph.node].count(operator)


def xfail_for(error, message):
    """Reports a known limitation of another library, and raises any other error."""
    if not re.search(message, str(error)):
        raise error
    pytest.xfail(f"a limitation of another library: {message}")


def copied(model):
    """Copies a model for the tools that modify their input."""
    return onnx.ModelProto.FromString(model.SerializeToString())


def error_of(y, expected):
    """Returns the largest error relative to the largest value."""
    largest = np.abs(expected).max()
    return np.abs(np.float32(y) - expected).max() / largest


# ---- Convolutional networks ----


class Network(nn.Module):
    norm: str

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(self.normalized(nn.Conv(8, (3, 3), use_bias=False)(x), train))
        x = nn.relu(self.normalized(nn.Conv(8, (3, 3))(x), train))
        return nn.Dense(10)(x.mean((1, 2)))

    def normalized(self, x, train):
        layers = jaxnorm.linen
        by_state = {"use_running_average": not train}
        match self.norm:
            case "batch":
                return layers.BatchNorm(**by_state)(x)
            case "tracking":
                return layers.InstanceNorm(track_running_stats=True, **by_state)(x)
            case "instance":
                return layers.InstanceNorm()(x)
            case "group":
                return layers.GroupNorm(num_groups=4)(x)
            case "layer":
                return layers.LayerNorm()(x)
            case _:
                return layers.RMSNorm()(x)


NORMS = {
    "batch": BATCH,
    "tracking": BATCH,
    "instance": INSTANCE,
    "group": GROUP,
    "layer": LAYER,
    "rms": RMS,
}
IMAGES = (16, 14, 3)


def moved(variables):
    """Returns variables as after training, none of which is 0 or 1."""
    rng = np.random.default_rng(0)
    change = {"float32": lambda a: a + rng.uniform(0.1, 0.3, a.shape).astype(np.float32)}
    return jax.tree.map(lambda a: change.get(a.dtype.name, lambda a: a)(a), variables)


def exported(model, shape, x):
    """Returns the graph, and the output of JAX."""
    variables = moved(model.init(jax.random.key(0), x))

    def evaluate(x):
        return model.apply(variables, x)

    return jaxnorm.onnx.to_onnx(evaluate, [shape], input_names=["x"]), np.asarray(evaluate(x))


@functools.cache
def network(norm):
    x = normal((4, *IMAGES))
    model, expected = exported(Network(norm), ("B", *IMAGES), x)
    assert count(model, NORMS[norm]) == 2
    return model, x, expected


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    """Changes to a temporary folder, because the tools leave files in the current one."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def files(tmp_path):
    """Runs a tool that reads a file and writes another one."""

    def through(model, tool, **options):
        given, made = str(tmp_path / "given.onnx"), str(tmp_path / "made.onnx")
        onnx.save(model, given)
        tool(given, made, **options)
        return onnx.load(made)

    return through


def by_onnxsim(model, _):
    simplified, agrees = onnxsim.simplify(copied(model))
    assert agrees
    return simplified


def by_onnxslim(model, _):
    return onnxslim.slim(copied(model))


def by_preprocessing(model, files):
    return files(model, quant_pre_process)


TOOLS = [by_onnxsim, by_onnxslim, by_preprocessing]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("tool", TOOLS)
def test_a_norm_by_running_statistics_is_folded_and_any_other_kept(tool, norm, files):
    model, x, expected = network(norm)
    made = tool(model, files)
    # The pre-processing runs onnxruntime, which may expand group norm, for which it has no kernel.
    kept = norm != "group" or tool is not by_preprocessing
    if NORMS[norm] == BATCH:
        assert count(made, BATCH) == 0
    elif kept:
        assert count(made, NORMS[norm]) == 2
    assert count(made, "Conv") == 2
    np.testing.assert_allclose(run(made, x), expected, **CLOSE)


class Followed(nn.Module):
    """A layer, followed by batch norm with running statistics."""

    layer: nn.Module

    @nn.compact
    def __call__(self, x):
        return jaxnorm.linen.BatchNorm(use_running_average=True)(self.layer.copy()(x))


LAYERS = {
    "conv 1d": (lambda: nn.Conv(8, (3,)), (8, 3)),
    "conv 3d": (lambda: nn.Conv(8, (3, 3, 3)), (4, 5, 6, 3)),
    "strided": (lambda: nn.Conv(8, (3, 3), strides=2), (8, 6, 3)),
    "valid": (lambda: nn.Conv(8, (3, 3), padding="VALID"), (8, 6, 3)),
    "circular": (lambda: nn.Conv(8, (3, 3), padding="CIRCULAR"), (8, 6, 3)),
    "dilated": (lambda: nn.Conv(8, (3, 3), kernel_dilation=2), (8, 6, 3)),
    "depthwise": (lambda: nn.Conv(3, (3, 3), feature_group_count=3), (8, 6, 3)),
    "transposed": (lambda: nn.ConvTranspose(8, (4, 4), strides=(2, 2)), (8, 6, 3)),
}


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("name", LAYERS)
def test_every_kind_of_convolution_takes_its_batch_norm(name, tool, files):
    layer, shape = LAYERS[name]
    x = normal((2, *shape))
    model, expected = exported(Followed(layer()), ("B", *shape), x)
    assert count(model, BATCH) == 1
    made = tool(model, files)
    assert count(made, BATCH) == 0
    # A convolution sums up to 81 products of order 1.
    np.testing.assert_allclose(run(made, x), expected, atol=5e-5, rtol=5e-6)


@pytest.mark.parametrize("tool", TOOLS)
def test_a_batch_norm_behind_a_dense_layer_is_folded_or_stays(tool, files):
    x = normal((4, 3))
    model, expected = exported(Followed(nn.Dense(8)), ("B", 3), x)
    made = tool(model, files)
    assert count(made, BATCH) <= 1
    np.testing.assert_allclose(run(made, x), expected, **CLOSE)


class BetweenCasts(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), dtype=jnp.float16)(x)
        return jaxnorm.linen.BatchNorm(use_running_average=True)(x).astype(jnp.float32)


class BeforeConvolution(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Conv(8, (3, 3))(jaxnorm.linen.BatchNorm(use_running_average=True)(x))


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("network", [BetweenCasts, BeforeConvolution])
def test_a_batch_norm_between_casts_or_before_a_convolution_agrees(network, tool, files):
    x = normal((4, *IMAGES))
    model, expected = exported(network(), ("B", *IMAGES), x)
    made = tool(model, files)
    assert count(made, BATCH) <= 1
    # In float16, the convolution is rounded by a relative 2^-11, after sums in another order.
    assert error_of(run(made, x), expected) < 2.0**-10


# ---- 8 bits ----


class Images(CalibrationDataReader):
    """Provides eight batches for calibration."""

    def __init__(self):
        self.batches = iter([{"x": normal((4, *IMAGES), seed)} for seed in range(1, 9)])

    def get_next(self):
        return next(self.batches, None)


def quantized(model, files, **options):
    read = {"calibration_data_reader": Images(), "per_channel": True}
    return files(model, quantize_static, **read, **options)


# The inputs and the weights of three layers are rounded to 1/255 of their range: six times.
# The largest measured error is 9e-3.
EIGHT_BITS = 6 / 255


@pytest.mark.parametrize("norm", NORMS)
def test_static_quantization_after_the_preprocessing(norm, files):
    model, x, expected = network(norm)
    made = quantized(by_preprocessing(model, files), files)
    assert count(made, NORMS[norm]) <= (0 if NORMS[norm] == BATCH else 2)
    assert count(made, "DequantizeLinear") > count(made, "QuantizeLinear") > 0
    assert 0 < error_of(run(made, x), expected) < EIGHT_BITS


@pytest.mark.parametrize("norm", NORMS)
def test_dynamic_quantization_after_the_preprocessing(norm, files):
    model, x, expected = network(norm)
    made = files(by_preprocessing(model, files), quantize_dynamic)
    assert count(made, NORMS[norm]) <= (0 if NORMS[norm] == BATCH else 2)
    assert count(made, "ConvInteger") == 2
    assert 0 < error_of(run(made, x), expected) < EIGHT_BITS


def test_static_quantization_alone_computes_the_same(files):
    model, x, expected = network("batch")
    made = quantized(model, files)
    assert 0 < error_of(run(made, x), expected) < EIGHT_BITS


def test_static_quantization_alone_takes_a_group_norm(files):
    model, x, expected = network("group")
    try:
        made = quantized(model, files)
    except ValueError as error:
        xfail_for(error, "Unable to get valid quantization scale")
    assert 0 < error_of(run(made, x), expected) < EIGHT_BITS


def test_the_operators_format_keeps_a_relu_behind_a_transpose(files):
    # This also happens without norms: jax2onnx moves the last Transpose before the last Relu.
    x = normal((4, *IMAGES))
    kernel = np.random.default_rng(1).normal(0, 0.2, (3, 3, 3, 8)).astype(np.float32)

    def convolved(x):
        return nn.relu(nn.Conv(8, (3, 3), use_bias=False).apply({"params": {"kernel": kernel}}, x))

    model = jaxnorm.onnx.to_onnx(
        lambda x: convolved(x).mean((1, 2)), [("B", *IMAGES)], input_names=["x"]
    )
    expected = np.asarray(convolved(x).mean((1, 2)))
    assert [node.op_type for node in model.graph.node][:4] == [
        "Transpose",
        "Conv",
        "Transpose",
        "Relu",
    ]
    made = by_preprocessing(model, files)
    by_format = {
        how: error_of(run(quantized(made, files, quant_format=how), x), expected)
        for how in (QuantFormat.QDQ, QuantFormat.QOperator)
    }
    assert 0 < by_format[QuantFormat.QDQ] < EIGHT_BITS
    if by_format[QuantFormat.QOperator] > 0.1:  # the measured error is 0.3
        pytest.xfail("the operators' format drops a Relu behind a Transpose")
    assert 0 < by_format[QuantFormat.QOperator] < EIGHT_BITS


# ---- Transformers, and half precision ----


class Transformer(nn.Module):
    """Two pre-norm blocks."""

    norm: type[nn.Module]
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        how = {"dtype": self.dtype}
        for _ in range(2):
            y = self.norm(**how)(x)
            x = x + nn.MultiHeadDotProductAttention(num_heads=4, **how)(y)
            y = nn.Dense(64, **how)(self.norm(**how)(x))
            x = x + nn.Dense(32, **how)(nn.gelu(y))
        return self.norm(**how)(x)


FEATURES = {jaxnorm.linen.LayerNorm: LAYER, jaxnorm.linen.RMSNorm: RMS}
TOKENS = normal((2, 7, 32))


@functools.cache
def transformer(norm):
    """Returns the variables, the graph and the output of a transformer in float32."""
    model = Transformer(norm)
    keys = iter(jax.random.split(jax.random.key(1), 100))
    variables = jax.tree.map(
        lambda a: a + 0.1 * jax.random.normal(next(keys), a.shape),
        model.init(jax.random.key(0), TOKENS),
    )

    def evaluate(x):
        return model.apply(variables, x)

    made = jaxnorm.onnx.to_onnx(evaluate, [("B", 7, 32)], input_names=["x"])
    assert count(made, FEATURES[norm]) == 5
    return variables, made, np.asarray(evaluate(TOKENS))


def in_jax(norm, dtype):
    """Returns the error of JAX's output in half precision, relative to float32."""
    variables, _, expected = transformer(norm)
    y = Transformer(norm, dtype).apply(variables, TOKENS.astype(dtype))
    return error_of(y.astype(jnp.float32), expected)


def half(norm, dtype, given):
    variables, _, _ = transformer(norm)

    def evaluate(x):
        return Transformer(norm, dtype).apply(variables, x.astype(dtype)).astype(given)

    inputs = [jax.ShapeDtypeStruct(("B", 7, 32), given)]
    return jaxnorm.onnx.to_onnx(evaluate, inputs, input_names=["x"])


# A graph rounds to float16 as often as JAX, at the same or similar places, so the errors are of the
# same size. The measured ratio is 0.5 to 0.7.
AS_JAX = 2.0


@pytest.mark.parametrize("norm", FEATURES)
def test_a_float16_transformer_errs_no_more_than_in_jax(norm):
    model = half(norm, jnp.float16, jnp.float16)
    onnx.checker.check_model(model, full_check=True)
    y = run(model, TOKENS.astype(np.float16))
    assert y.dtype == np.float16
    assert count(model, FEATURES[norm]) == 5
    assert 0 < error_of(y, transformer(norm)[2]) < AS_JAX * in_jax(norm, jnp.float16)


@pytest.mark.parametrize("norm", FEATURES)
def test_a_bfloat16_transformer_errs_no_more_than_in_jax(norm):
    # On a CPU, neither onnx's Einsum nor onnxruntime's Gemm supports bfloat16.
    model = half(norm, jnp.bfloat16, jnp.float32)
    try:
        y = run(model, TOKENS)
    except Exception as error:
        xfail_for(error, r"bfloat16.*Einsum|Could not find an implementation")
    assert 0 < error_of(y, transformer(norm)[2]) < AS_JAX * in_jax(norm, jnp.bfloat16)


def by_onnxruntime(model):
    return onnxruntime.transformers.float16.convert_float_to_float16(
        copied(model), keep_io_types=True
    )


def by_converter(model):
    simplified = by_onnxsim(model, None)
    return onnxconverter_common.float16.convert_float_to_float16(simplified, keep_io_types=True)


@pytest.mark.filterwarnings("ignore:the float32 number .* will be truncated:UserWarning")
@pytest.mark.parametrize("convert", [by_onnxruntime, by_converter])
@pytest.mark.parametrize("norm", FEATURES)
def test_a_transformer_that_is_converted_to_float16_errs_no_more_than_in_jax(norm, convert):
    _, model, expected = transformer(norm)
    made = convert(model)
    assert count(made, FEATURES[norm]) == 5
    assert 0 < error_of(run(made, TOKENS), expected) < AS_JAX * in_jax(norm, jnp.float16)


def test_the_converter_alone_takes_a_cast_of_jax2onnx():
    _, model, expected = transformer(jaxnorm.linen.LayerNorm)
    made = onnxconverter_common.float16.convert_float_to_float16(copied(model))
    try:
        y = run(made, TOKENS.astype(np.float16))
    except Exception as error:
        xfail_for(error, r"Type Error: Type \(tensor\(float16\)\) of output arg")
    assert 0 < error_of(y, expected) < AS_JAX * in_jax(jaxnorm.linen.LayerNorm, jnp.float16)


@pytest.mark.filterwarnings("ignore:the float32 number .* will be truncated:UserWarning")
@pytest.mark.parametrize("convert", [by_onnxruntime, by_converter])
@pytest.mark.parametrize("norm", NORMS)
def test_a_network_that_is_converted_to_float16(norm, convert):
    model, x, expected = network(norm)
    made = convert(model)
    # Each of a dozen steps rounds by a relative 2^-11 at most. The largest measured error is 8e-4.
    assert 0 < error_of(run(made, x), expected) < 12 * 2.0**-11


@pytest.mark.parametrize(
    ("norm", "fused"), [(jaxnorm.linen.LayerNorm, 4), (jaxnorm.linen.RMSNorm, 0)]
)
def test_the_optimizer_for_transformers_fuses_layer_norms_with_the_sums_before_them(
    norm, fused, tmp_path
):
    _, model, expected = transformer(norm)
    onnx.save(model, tmp_path / "model.onnx")
    made = onnxruntime.transformers.optimizer.optimize_model(
        str(tmp_path / "model.onnx"), model_type="bert", num_heads=4, hidden_size=32, opt_level=0
    ).model
    assert count(made, "SkipLayerNormalization") >= fused
    assert count(made, FEATURES[norm]) <= 5 - fused
    np.testing.assert_allclose(run(made, TOKENS), expected, **CLOSE)
