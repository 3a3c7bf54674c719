"""Moves a ResNet-18 from PyTorch to Flax: torchvision's names and layout, its weights bit for bit.

    python examples/resnet.py resnet18.safetensors

The file is the state dict of torchvision.models.resnet18, saved with safetensors. The names of the
modules are torchvision's, so that no map is needed; only the axes of the kernels differ.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxnorm import interop
from jaxnorm.linen import BatchNorm


def conv(features: int, size: int, strides: int, name: str) -> nn.Conv:
    """A convolution without bias, padded on both sides alike, as PyTorch pads."""
    return nn.Conv(
        features,
        (size, size),
        strides=(strides, strides),
        padding=size // 2,
        use_bias=False,
        name=name,
    )


class Norms(nn.Module):
    """A shortcut's projection: the original's nn.Sequential of a convolution and a norm."""

    features: int
    strides: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Projects x to the block's features and size."""
        x = conv(self.features, 1, self.strides, "0")(x)
        return BatchNorm(use_running_average=not train, name="1")(x)


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut, projected where the shape changes."""

    features: int
    strides: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """(N, H, W, C) to (N, H / strides, W / strides, features)."""
        y = conv(self.features, 3, self.strides, "conv1")(x)
        y = nn.relu(BatchNorm(use_running_average=not train, name="bn1")(y))
        y = conv(self.features, 3, 1, "conv2")(y)
        y = BatchNorm(use_running_average=not train, name="bn2")(y)
        if y.shape != x.shape:
            x = Norms(self.features, self.strides, name="downsample")(x, train)
        return nn.relu(x + y)


class Stage(nn.Module):
    """Two blocks, the first of which may halve the size."""

    features: int
    strides: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """(N, H, W, C) to (N, H / strides, W / strides, features)."""
        x = BasicBlock(self.features, self.strides, name="0")(x, train)
        return BasicBlock(self.features, 1, name="1")(x, train)


class ResNet18(nn.Module):
    """He et al., Deep Residual Learning, 2015, table 1. https://arxiv.org/abs/1512.03385."""

    classes: int = 1000
    features: int = 64

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """The logits of images, (N, H, W, 3)."""
        x = conv(self.features, 7, 2, "conv1")(x)
        x = nn.relu(BatchNorm(use_running_average=not train, name="bn1")(x))
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))  # as good as -inf: x is not negative
        x = nn.max_pool(x, window_shape=(3, 3), strides=(2, 2))
        for k in range(4):
            x = Stage(self.features * 2**k, min(k, 1) + 1, name=f"layer{k + 1}")(x, train)
        return nn.Dense(self.classes, name="fc")(x.mean((1, 2)))


def from_pytorch(state_dict: Any) -> dict[str, Any]:
    """The network's variables, from its state dict or a .safetensors file of it."""
    return interop.from_torch(state_dict, convert=interop.kernels())


def main(arguments: list[str] | None = None) -> None:
    """Loads the weights, and says what the network makes of one of scikit-learn's photographs."""
    from sklearn.datasets import load_sample_image

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", type=Path, metavar="resnet18.safetensors")
    options = parser.parse_args(arguments)
    try:
        variables = from_pytorch(options.weights)
    except (OSError, ValueError) as error:
        sys.exit(f"resnet.py: {error}")
    image = load_sample_image("flower.jpg")[100:324, 200:424] / np.float32(255)
    image = (image - jnp.array([0.485, 0.456, 0.406])) / jnp.array([0.229, 0.224, 0.225])
    classes, features = (
        len(variables["params"][n][k]) for n, k in (("fc", "bias"), ("bn1", "scale"))
    )
    logits = ResNet18(classes, features).apply(variables, image[None], train=False)
    best = np.argsort(-logits[0])[:5]
    print("the five likeliest of", classes, "classes for the flower:", *best)


if __name__ == "__main__":
    main()
