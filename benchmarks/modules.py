"""Defines the ResNet-50 of `models.py` in Linen and NNX, with either batch norm."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from models import IMAGES, NONE, Step, cross_entropy, shapes, training_step

BF16 = jnp.bfloat16
FLAX = {"momentum": 0.9, "epsilon": 1e-5, "dtype": BF16}


def linen_norm(library: str) -> Callable[[], Any]:
    """Makes a batch norm in Linen, in training."""
    if library == NONE:
        return lambda: lambda x: x
    if library == "jaxnorm":
        from jaxnorm.linen import BatchNorm

        return functools.partial(BatchNorm, use_running_average=False, dtype=BF16)
    return functools.partial(nn.BatchNorm, use_running_average=False, **FLAX)


class LinenResNet(nn.Module):
    """A ResNet-50; `depth` is the number of bottlenecks of each stage."""

    library: str
    blocks: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits of images."""
        norm = linen_norm(self.library)

        def conv(x: jax.Array, features: int, size: int = 3, strides: int = 1) -> jax.Array:
            options = {"strides": (strides, strides), "use_bias": False, "dtype": BF16}
            return nn.Conv(features, (size, size), **options)(x)

        x = nn.max_pool(nn.relu(norm()(conv(x, 64, 7, 2))), (3, 3), (2, 2), "SAME")
        for stage, blocks in enumerate(self.blocks):
            features = 64 * 2**stage
            for block in range(blocks):
                strides = 2 if stage and not block else 1
                y = nn.relu(norm()(conv(x, features, 1)))
                y = nn.relu(norm()(conv(y, features, 3, strides)))
                y = norm()(conv(y, 4 * features, 1))
                if x.shape != y.shape:
                    x = norm()(conv(x, 4 * features, 1, strides))
                x = nn.relu(x + y)
        return nn.Dense(1000, use_bias=False, dtype=BF16)(x.mean((1, 2)))


def linen_step(library: str, blocks: tuple[int, ...]) -> Step:
    """Returns a training step of the Linen model; `library` is jaxnorm, flax.linen or none."""
    model = LinenResNet(library, blocks)
    state = jax.eval_shape(model.init, jax.random.key(0), IMAGES[0])
    params, stats = state["params"], state.get("batch_stats", {})

    def loss(params: Any, stats: Any, x: jax.Array, labels: jax.Array) -> tuple[jax.Array, Any]:
        given = {"params": params, "batch_stats": stats}
        logits, new = model.apply(given, x, mutable=["batch_stats"])
        return cross_entropy(logits, labels), new.get("batch_stats", {})

    return training_step(loss), (params, stats, *IMAGES), number_of_norms(blocks)


def nnx_norm(library: str, features: int, rngs: nnx.Rngs) -> Callable[[jax.Array], jax.Array]:
    """Makes a batch norm in NNX."""
    if library == NONE:
        return lambda x: x
    if library == "jaxnorm":
        from jaxnorm.nnx import BatchNorm

        return BatchNorm(features, dtype=BF16, rngs=rngs)
    return nnx.BatchNorm(features, rngs=rngs, **FLAX)


class ConvNorm(nnx.Module):
    """A convolution without bias, and a norm."""

    def __init__(
        self, library: str, ins: int, outs: int, size: int, strides: int, rngs: nnx.Rngs
    ) -> None:
        options = {"strides": (strides, strides), "use_bias": False, "dtype": BF16}
        self.conv = nnx.Conv(ins, outs, (size, size), rngs=rngs, **options)
        self.norm = nnx_norm(library, outs, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the normalized convolution of x."""
        return self.norm(self.conv(x))


class Bottleneck(nnx.Module):
    """The block of a ResNet-50."""

    def __init__(self, library: str, ins: int, features: int, strides: int, rngs: nnx.Rngs) -> None:
        self.first = ConvNorm(library, ins, features, 1, 1, rngs)
        self.second = ConvNorm(library, features, features, 3, strides, rngs)
        self.third = ConvNorm(library, features, 4 * features, 1, 1, rngs)
        change = ins != 4 * features or strides > 1
        self.short = ConvNorm(library, ins, 4 * features, 1, strides, rngs) if change else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the output of the block."""
        y = self.third(nnx.relu(self.second(nnx.relu(self.first(x)))))
        return nnx.relu(y + (x if self.short is None else self.short(x)))


class NNXResNet(nnx.Module):
    """A ResNet-50; `depth` is the number of bottlenecks of each stage."""

    def __init__(self, library: str, blocks: tuple[int, ...], rngs: nnx.Rngs) -> None:
        self.enter, ins = ConvNorm(library, 3, 64, 7, 2, rngs), 64
        self.blocks = nnx.List([])
        for stage, number in enumerate(blocks):
            for block in range(number):
                strides = 2 if stage and not block else 1
                self.blocks.append(Bottleneck(library, ins, 64 * 2**stage, strides, rngs))
                ins = 256 * 2**stage
        self.leave = nnx.Linear(ins, 1000, use_bias=False, dtype=BF16, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits of images."""
        x = nnx.max_pool(nnx.relu(self.enter(x)), (3, 3), (2, 2), "SAME")
        for block in self.blocks:
            x = block(x)
        return self.leave(x.mean((1, 2)))


def nnx_step(library: str, blocks: tuple[int, ...]) -> Step:
    """Returns a training step of the NNX model; `library` is jaxnorm, flax.nnx or none."""
    model = nnx.eval_shape(lambda: NNXResNet(library, blocks, nnx.Rngs(0)))
    graph, params, stats = nnx.split(model, nnx.Param, ...)

    def loss(params: Any, stats: Any, x: jax.Array, labels: jax.Array) -> tuple[jax.Array, Any]:
        merged = nnx.merge(graph, params, stats, copy=True)
        logits = merged(x)
        return cross_entropy(logits, labels), nnx.split(merged, nnx.Param, ...)[2]

    return training_step(loss), (shapes(params), shapes(stats), *IMAGES), number_of_norms(blocks)


def number_of_norms(blocks: tuple[int, ...]) -> int:
    """Counts the first norm, three for each bottleneck, and one where the shape changes."""
    return 1 + 3 * sum(blocks) + len(blocks)
