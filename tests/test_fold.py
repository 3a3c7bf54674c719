"""Tests that a layer with a folded norm computes the same as the layer and the norm."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import later_state, normal, some_params

import jaxnorm
import jaxnorm.linen

KEY = jax.random.key(0)
LAYERS = {
    "Dense": (nn.Dense(3), (4, 6)),
    "Conv 1d": (nn.Conv(3, (3,)), (4, 7, 6)),
    "Conv 2d, strided": (nn.Conv(3, (3, 3), strides=2, padding="SAME"), (4, 7, 8, 6)),
    "Conv 3d": (nn.Conv(3, (2, 2, 2), padding="VALID"), (2, 4, 5, 3, 6)),
    "Conv, grouped": (nn.Conv(3, (3, 3), feature_group_count=3), (4, 7, 8, 6)),
    "Conv, depthwise": (nn.Conv(3, (3, 3), feature_group_count=3), (4, 7, 8, 3)),
    "Conv, no bias": (nn.Conv(3, (3, 3), use_bias=False), (4, 7, 8, 6)),
    "ConvTranspose": (nn.ConvTranspose(3, (4, 4), strides=(2, 2)), (4, 7, 8, 6)),
}


def test_multiplier_and_offset_are_the_norm(x64):
    x, state, params = normal((5, 3)), later_state(), some_params()
    multiplier, offset = jaxnorm.fold_scale_shift(params, state, epsilon=0.3)
    expected, _ = jaxnorm.batch_norm(x, params, state, use_running_average=True, epsilon=0.3)
    np.testing.assert_allclose(multiplier * x + offset, expected, rtol=1e-12, atol=1e-14)
    for some in ({}, {"scale": params["scale"]}, {"bias": params["bias"]}, None):
        multiplier, offset = jaxnorm.fold_scale_shift(some, state)
        expected, _ = jaxnorm.batch_norm(x, some, state, use_running_average=True)
        np.testing.assert_allclose(multiplier * x + offset, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", LAYERS)
def test_the_folded_layer_is_both(x64, name):
    layer, shape = LAYERS[name]
    layer, x = layer.clone(param_dtype=jnp.float64), normal(shape)
    given = layer.init(KEY, x)["params"]
    if "bias" in given:
        given = {**given, "bias": jnp.asarray(normal((3,), seed=3))}
    y = layer.apply({"params": given}, x)
    expected, _ = jaxnorm.batch_norm(y, some_params(), later_state(), use_running_average=True)
    folded = jaxnorm.fold_into(given, some_params(), later_state())
    found = layer.clone(use_bias=True).apply({"params": folded}, x)
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-12)


def test_a_transposed_kernel_has_its_outputs_on_another_axis(x64):
    layer = nn.ConvTranspose(
        3, (4, 4), strides=(2, 2), transpose_kernel=True, param_dtype=jnp.float64
    )
    x = normal((2, 5, 5, 6))
    given = layer.init(KEY, x)["params"]
    expected, _ = jaxnorm.batch_norm(
        layer.apply({"params": given}, x), some_params(), later_state(), use_running_average=True
    )
    folded = jaxnorm.fold_into(given, some_params(), later_state(), feature_axis=-2)
    np.testing.assert_allclose(layer.apply({"params": folded}, x), expected, rtol=1e-11, atol=1e-12)
    with pytest.raises(ValueError, match=r"has 6, on axis -1 of a kernel of shape \(4, 4, 3, 6\)"):
        jaxnorm.fold_into(given, some_params(), later_state())


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_pytorch_s_fusion(x64, transpose, bias):
    torch = pytest.importorskip("torch")
    from torch.nn.utils import fusion

    make = torch.nn.ConvTranspose2d if transpose else torch.nn.Conv2d
    torch.manual_seed(0)
    conv, norm = make(6, 3, 3, bias=bias).double().eval(), torch.nn.BatchNorm2d(3).double().eval()
    state, params = later_state(), some_params()
    with torch.no_grad():
        norm.weight[:], norm.bias[:] = (torch.from_numpy(params[k]) for k in ("scale", "bias"))
        norm.running_mean[:] = torch.from_numpy(state["mean"])
        norm.running_var[:] = torch.from_numpy(state["var"])
    fused = fusion.fuse_conv_bn_eval(conv, norm, transpose=transpose)
    axes = (2, 3, 0, 1) if transpose else (2, 3, 1, 0)  # (..., in, out)
    layer = {"kernel": conv.weight.detach().numpy().transpose(axes)}
    if bias:
        layer["bias"] = conv.bias.detach().numpy()
    found = jaxnorm.fold_into(layer, params, state)
    np.testing.assert_allclose(
        found["kernel"], fused.weight.detach().numpy().transpose(axes), rtol=1e-12
    )
    np.testing.assert_allclose(found["bias"], fused.bias.detach().numpy(), rtol=1e-12)


def test_a_half_precision_kernel_is_rounded_once():
    layer = {"kernel": jnp.asarray(normal((6, 3)), jnp.bfloat16)}
    found = jaxnorm.fold_into(layer, some_params(), later_state())
    assert found["kernel"].dtype == found["bias"].dtype == jnp.bfloat16
    multiplier, _ = jaxnorm.fold_scale_shift(some_params(), later_state())
    wide = np.asarray(layer["kernel"], np.float32) * np.asarray(multiplier)
    np.testing.assert_array_equal(found["kernel"], jnp.asarray(wide).astype(jnp.bfloat16))


# ---- Whole models ----


class Block(nn.Module):
    folded: bool

    @nn.compact
    def __call__(self, x):
        y = nn.Conv(3, (3, 3), use_bias=self.folded)(x)
        if not self.folded:
            y = jaxnorm.linen.BatchNorm(use_running_average=True)(y)
        return x + nn.relu(y)


class Model(nn.Module):
    folded: bool

    @nn.compact
    def __call__(self, x):
        x = Block(self.folded)(nn.Dense(3)(x))
        if not self.folded:
            options = {"use_running_average": True, "track_running_stats": True}
            x = jaxnorm.linen.InstanceNorm(epsilon=1e-5, **options)(nn.ConvTranspose(3, (2, 2))(x))
        else:
            x = nn.ConvTranspose(3, (2, 2))(x)
        return jaxnorm.linen.BatchNorm(use_running_average=True, name="last")(x)


PAIRS = {"Block_0.Conv_0": "Block_0.BatchNorm_0", "ConvTranspose_0": "InstanceNorm_0"}


def variables():
    made = Model(folded=False).init(KEY, jnp.ones((1, 5, 5, 2)))
    leaves, tree = jax.tree.flatten(made)
    rng = np.random.default_rng(0)
    new = [
        jnp.asarray(rng.uniform(0.5, 2, a.shape), a.dtype) if a.dtype == jnp.float32 else a
        for a in leaves
    ]
    return jax.tree.unflatten(tree, new)


def test_a_model_is_folded_by_named_pairs():
    given = variables()
    before = jax.tree.map(np.array, given)
    folded = jaxnorm.fold_variables(given, PAIRS)
    jax.tree.map(np.testing.assert_array_equal, given, before)
    x = jnp.asarray(normal((2, 5, 5, 2)), jnp.float32)
    expected = Model(folded=False).apply(given, x)
    shapes = jax.eval_shape(Model(folded=True).init, KEY, x)
    assert jax.tree.structure(folded) == jax.tree.structure(shapes)
    found = Model(folded=True).apply(folded, x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)  # float32, up to 100
    assert sorted(folded["batch_stats"]) == ["last"]


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ({"Conv_9": "Block_0.BatchNorm_0"}, "params have no 'Conv_9'"),
        ({"Block_0.Conv_0": "Block_0.BatchNorm_9"}, "batch_stats have no 'Block_0.BatchNorm_9'"),
        ({"Dense_0": "last", "ConvTranspose_0": "last"}, "pairs should name each norm once"),
        ({"last": "InstanceNorm_0"}, "'InstanceNorm_0' into 'last': .* should have a 'kernel'"),
    ],
)
def test_pairs_that_are_none_are_errors_that_name_them(pairs, message):
    with pytest.raises(ValueError, match=f"fold_variables: .*{message}"):
        jaxnorm.fold_variables(variables(), pairs)


def test_outputs_that_are_not_the_channels_are_an_error():
    with pytest.raises(ValueError, match=r"has 4, on axis -1 of a kernel of shape \(6, 4\), for"):
        jaxnorm.fold_into({"kernel": jnp.ones((6, 4))}, None, jaxnorm.init_batch_stats(3))
