"""Defines a ResNet-18 and a small transformer in Linen and NNX, for any namespace of norms.

`norms` is flax.linen or jaxnorm.linen, or flax.nnx or jaxnorm.nnx. The only other difference is
that Flax's momentum of 0.9 is called decay in jaxnorm.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

WIDTHS = (4, 8, 16, 32)  # few channels, so that the models compile fast
CLASSES = 5

# For programs that run a few times, compiling takes most of the time.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.partial(jax.jit, static_argnums=(1, 2))
def kernel_init(key, shape, dtype=jnp.float32):
    """Returns a chirp whose phase is the key, which compiles faster than random numbers."""
    phase = jnp.sum(jax.random.key_data(key).astype(dtype)) / 2.0**31
    i = jnp.arange(math.prod(shape), dtype=dtype).reshape(shape)
    return jnp.sin(0.618 * i * i + jnp.pi * phase) * math.sqrt(2 / math.prod(shape[:-1]))


def norm_maker(norms, kind, **options):
    """Returns a function that makes norm layers of the namespace; kind is the class name."""
    if kind == "BatchNorm":
        options["decay" if norms.__name__.startswith("jaxnorm") else "momentum"] = 0.9
    if kind == "GroupNorm":
        options["num_groups"] = 2
    return functools.partial(getattr(norms, kind), **options)


# ---- Linen ----


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut, which is projected where the shape changes."""

    norm: functools.partial
    features: int
    strides: int
    dtype: type

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(
            nn.Conv, use_bias=False, kernel_init=kernel_init, param_dtype=self.dtype
        )
        y = conv(self.features, (3, 3), strides=self.strides)(x)
        y = nn.relu(self.norm()(y))
        y = conv(self.features, (3, 3))(y)
        y = self.norm(scale_init=nn.initializers.constant(0.5))(y)
        if y.shape != x.shape:
            x = conv(self.features, (1, 1), strides=self.strides)(x)
            x = self.norm()(x)
        return nn.relu(x + y)


class ResNet18(nn.Module):
    """Four stages of two basic blocks (He et al., 2015, table 1), for small images."""

    norms: object
    kind: str = "BatchNorm"
    dtype: type = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        options = {"use_running_average": not train} if self.kind == "BatchNorm" else {}
        norm = norm_maker(self.norms, self.kind, param_dtype=self.dtype, **options)
        x = nn.Conv(
            WIDTHS[0], (3, 3), use_bias=False, kernel_init=kernel_init, param_dtype=self.dtype
        )(x)
        x = nn.relu(norm()(x))
        for stage, features in enumerate(WIDTHS):
            for block in range(2):
                strides = 2 if stage > 0 and block == 0 else 1
                x = BasicBlock(norm, features, strides, self.dtype)(x)
        return nn.Dense(CLASSES, kernel_init=kernel_init, param_dtype=self.dtype)(x.mean((1, 2)))


class Transformer(nn.Module):
    """Two pre-norm layers of self attention and a feed-forward network, and a last norm."""

    norms: object
    kind: str = "LayerNorm"
    dtype: type = jnp.float32

    @nn.compact
    def __call__(self, x, train=True):
        norm = norm_maker(self.norms, self.kind, param_dtype=self.dtype)
        dense = functools.partial(nn.Dense, kernel_init=kernel_init, param_dtype=self.dtype)
        attention = functools.partial(
            nn.MultiHeadDotProductAttention, kernel_init=kernel_init, param_dtype=self.dtype
        )
        x = dense(16)(x)
        for _ in range(2):
            x = x + attention(2)(norm()(x))
            x = x + dense(16)(nn.gelu(dense(32)(norm()(x))))
        return dense(CLASSES)(norm()(x).mean(1))


# ---- NNX ----


class NNXBasicBlock(nnx.Module):
    """The NNX version of `BasicBlock`."""

    def __init__(self, norm, inputs, features, strides, dtype, rngs):
        conv = functools.partial(
            nnx.Conv, use_bias=False, kernel_init=kernel_init, param_dtype=dtype, rngs=rngs
        )
        self.conv_0 = conv(inputs, features, (3, 3), strides=strides)
        self.norm_0 = norm(features, rngs=rngs)
        self.conv_1 = conv(features, features, (3, 3))
        self.norm_1 = norm(features, scale_init=nnx.initializers.constant(0.5), rngs=rngs)
        self.projects = strides != 1 or inputs != features
        if self.projects:
            self.conv_2 = conv(inputs, features, (1, 1), strides=strides)
            self.norm_2 = norm(features, rngs=rngs)

    def __call__(self, x):
        y = nnx.relu(self.norm_0(self.conv_0(x)))
        y = self.norm_1(self.conv_1(y))
        if self.projects:
            x = self.norm_2(self.conv_2(x))
        return nnx.relu(x + y)


class NNXResNet18(nnx.Module):
    """The NNX version of `ResNet18`; model.train() and model.eval() select the statistics."""

    def __init__(self, norms, kind="BatchNorm", dtype=jnp.float32, *, rngs):
        norm = norm_maker(norms, kind, param_dtype=dtype)
        linear = functools.partial(
            nnx.Linear, kernel_init=kernel_init, param_dtype=dtype, rngs=rngs
        )
        self.conv = nnx.Conv(
            3,
            WIDTHS[0],
            (3, 3),
            use_bias=False,
            kernel_init=kernel_init,
            param_dtype=dtype,
            rngs=rngs,
        )
        self.norm = norm(WIDTHS[0], rngs=rngs)
        inputs, blocks = WIDTHS[0], []
        for stage, features in enumerate(WIDTHS):
            for block in range(2):
                strides = 2 if stage > 0 and block == 0 else 1
                blocks.append(NNXBasicBlock(norm, inputs, features, strides, dtype, rngs))
                inputs = features
        self.blocks = nnx.List(blocks)
        self.head = linear(inputs, CLASSES)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


class NNXTransformerLayer(nnx.Module):
    """One pre-norm layer."""

    def __init__(self, norm, dtype, rngs):
        linear = functools.partial(
            nnx.Linear, kernel_init=kernel_init, param_dtype=dtype, rngs=rngs
        )
        self.norm_0 = norm(16, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            2, 16, decode=False, kernel_init=kernel_init, param_dtype=dtype, rngs=rngs
        )
        self.norm_1 = norm(16, rngs=rngs)
        self.wide = linear(16, 32)
        self.narrow = linear(32, 16)

    def __call__(self, x):
        x = x + self.attention(self.norm_0(x))
        return x + self.narrow(nnx.gelu(self.wide(self.norm_1(x))))


class NNXTransformer(nnx.Module):
    """The NNX version of `Transformer`."""

    def __init__(self, norms, kind="LayerNorm", dtype=jnp.float32, *, rngs):
        norm = norm_maker(norms, kind, param_dtype=dtype)
        linear = functools.partial(
            nnx.Linear, kernel_init=kernel_init, param_dtype=dtype, rngs=rngs
        )
        self.embed = linear(6, 16)
        self.layers = nnx.List(NNXTransformerLayer(norm, dtype, rngs) for _ in range(2))
        self.norm = norm(16, rngs=rngs)
        self.head = linear(16, CLASSES)

    def __call__(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))
