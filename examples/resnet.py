"""Converts a ResNet from PyTorch to Flax, with torchvision's names and unchanged weights.

    python examples/resnet.py resnet50.safetensors

The file is the state dict of torchvision's resnet18, 34, 50, 101 or 152: .safetensors, or .pth if
PyTorch is installed. The depth is determined from its names. The modules have torchvision's names,
so no map is needed; only the axes of the kernels differ.
"""

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxnorm import interop
from jaxnorm.linen import BatchNorm


def conv(features: int, size: int, strides: int, name: str) -> nn.Conv:
    """Returns a convolution without bias, with the same padding on both sides, as in PyTorch."""
    return nn.Conv(
        features,
        (size, size),
        strides=(strides, strides),
        padding=size // 2,
        use_bias=False,
        name=name,
    )


class Projection(nn.Module):
    """The projection of a shortcut: in PyTorch, an nn.Sequential of a convolution and a norm."""

    features: int
    strides: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Projects x to the features and the size of the block."""
        x = conv(self.features, 1, self.strides, "0")(x)
        return BatchNorm(use_running_average=not train, name="1")(x)


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut, projected where the shape changes."""

    features: int
    strides: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps (N, H, W, C) to (N, H / strides, W / strides, features)."""
        y = conv(self.features, 3, self.strides, "conv1")(x)
        y = nn.relu(BatchNorm(use_running_average=not train, name="bn1")(y))
        y = conv(self.features, 3, 1, "conv2")(y)
        y = BatchNorm(use_running_average=not train, name="bn2")(y)
        if y.shape != x.shape:
            x = Projection(self.features, self.strides, name="downsample")(x, train)
        return nn.relu(x + y)


class Bottleneck(nn.Module):
    """Three convolutions, the last with four times the features of the others, and a shortcut."""

    features: int
    strides: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps (N, H, W, C) to (N, H / strides, W / strides, 4 * features)."""
        y = conv(self.features, 1, 1, "conv1")(x)
        y = nn.relu(BatchNorm(use_running_average=not train, name="bn1")(y))
        y = conv(self.features, 3, self.strides, "conv2")(y)  # in the paper, conv1 has the strides
        y = nn.relu(BatchNorm(use_running_average=not train, name="bn2")(y))
        y = conv(4 * self.features, 1, 1, "conv3")(y)
        y = BatchNorm(use_running_average=not train, name="bn3")(y)
        if y.shape != x.shape:
            x = Projection(4 * self.features, self.strides, name="downsample")(x, train)
        return nn.relu(x + y)


class Stage(nn.Module):
    """A sequence of blocks, the first of which may halve the size."""

    block: type[BasicBlock] | type[Bottleneck]
    blocks: int
    features: int
    strides: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps (N, H, W, C) to (N, H / strides, W / strides, features of the block)."""
        for k in range(self.blocks):
            x = self.block(self.features, 1 if k else self.strides, name=str(k))(x, train)
        return x


class ResNet(nn.Module):
    """He et al., Deep Residual Learning, 2015, table 1. https://arxiv.org/abs/1512.03385.

    Attributes:
      block: the module of which the stages consist.
      blocks: the number of blocks of each of the four stages.
      classes: the number of logits.
      features: the channels of the first stage; each stage doubles them.
    """

    block: type[BasicBlock] | type[Bottleneck]
    blocks: Sequence[int]
    classes: int = 1000
    features: int = 64

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Returns the logits of images, (N, H, W, 3)."""
        x = conv(self.features, 7, 2, "conv1")(x)
        x = nn.relu(BatchNorm(use_running_average=not train, name="bn1")(x))
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))  # equivalent to -inf, because x >= 0
        x = nn.max_pool(x, window_shape=(3, 3), strides=(2, 2))
        for k, blocks in enumerate(self.blocks):
            stage = (self.block, blocks, self.features * 2**k, min(k, 1) + 1)
            x = Stage(*stage, name=f"layer{k + 1}")(x, train)
        return nn.Dense(self.classes, name="fc")(x.mean((1, 2)))


ResNet18 = functools.partial(ResNet, BasicBlock, (2, 2, 2, 2))
ResNet50 = functools.partial(ResNet, Bottleneck, (3, 4, 6, 3))


# ---- From PyTorch ----


def from_pytorch(state_dict: Any, model: ResNet | None = None) -> dict[str, Any]:
    """Converts the state dict of a ResNet, or a file of it, and checks it against the model."""
    like = None
    if model is not None:
        x = jnp.zeros((1, 64, 64, 3))
        like = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False))
    return interop.from_torch(state_dict, convert=interop.kernels(), like=like)


def model_of(variables: dict[str, Any]) -> ResNet:
    """Returns the ResNet for the variables, whose names determine its blocks."""
    params = variables["params"]
    try:
        stages = [params[f"layer{k + 1}"] for k in range(4)]
        block = Bottleneck if "conv3" in stages[0]["0"] else BasicBlock
        classes, features = len(params["fc"]["bias"]), len(params["bn1"]["scale"])
    except KeyError as error:
        raise ValueError(
            f"the weights should have the names of a ResNet of torchvision, but have no {error}"
        ) from None
    return ResNet(block, tuple(map(len, stages)), classes, features)


def main(arguments: list[str] | None = None) -> None:
    """Loads the weights, and prints the network's prediction for a photograph of scikit-learn."""
    from sklearn.datasets import load_sample_image

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", type=Path, metavar="resnet50.safetensors")
    options = parser.parse_args(arguments)
    try:
        model = model_of(from_pytorch(options.weights))
        variables = from_pytorch(options.weights, model)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"resnet.py: {error}")
    image = load_sample_image("flower.jpg")[100:324, 200:424] / np.float32(255)
    image = (image - jnp.array([0.485, 0.456, 0.406])) / jnp.array([0.229, 0.224, 0.225])
    logits = model.apply(variables, image[None], train=False)
    best = np.argsort(-logits[0])[:5]
    print("the five likeliest of", model.classes, "classes for the flower:", *best)


if __name__ == "__main__":
    main()
