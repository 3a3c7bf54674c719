"""Converts the StarGAN generator from PyTorch to Flax NNX, and draws a photograph for each label.

    python examples/stargan_nnx.py G.safetensors

The file is the state dict of a PyTorch generator: .safetensors, or .ckpt if PyTorch is installed.
stargan.py has the same generator in Linen, with training and a comparison of two ways to evaluate.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
from flax import nnx
from sklearn.datasets import load_sample_image

from jaxnorm import interop
from jaxnorm.nnx import InstanceNorm


class ConvNorm(nnx.Module):
    """A convolution, and nn.InstanceNorm2d(affine=True, track_running_stats=True) of PyTorch."""

    def __init__(self, conv: nnx.Conv | nnx.ConvTranspose, *, rngs: nnx.Rngs) -> None:
        self.conv = conv
        self.norm = InstanceNorm(
            conv.out_features, track_running_stats=True, epsilon=1e-5, rngs=rngs
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the normalized output of the convolution."""
        return self.norm(self.conv(x))


class Block(nnx.Module):
    """A residual block of two convolutions."""

    def __init__(self, features: int, *, rngs: nnx.Rngs) -> None:
        def conv() -> nnx.Conv:
            return nnx.Conv(features, features, (3, 3), padding=1, use_bias=False, rngs=rngs)

        self.first = ConvNorm(conv(), rngs=rngs)
        self.second = ConvNorm(conv(), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x to an array of the same shape."""
        return x + self.second(nnx.relu(self.first(x)))


class Generator(nnx.Module):
    """Changes the attributes of images, (N, H, W, 3), to those of the labels, (N, labels).

    After `generator.train()`, it normalizes by each image's own statistics, and updates the running
    statistics; after `generator.eval()`, it normalizes by the running statistics.
    """

    def __init__(
        self, features: int = 64, labels: int = 5, blocks: int = 6, *, rngs: nnx.Rngs
    ) -> None:
        sizes: dict[str, Any] = {"kernel_size": (4, 4), "strides": (2, 2)}
        options: dict[str, Any] = {"use_bias": False, "rngs": rngs}
        enter = nnx.Conv(3 + labels, features, (7, 7), padding=3, **options)
        self.enter = ConvNorm(enter, rngs=rngs)
        self.down = nnx.List(
            ConvNorm(nnx.Conv(n, 2 * n, padding=1, **sizes, **options), rngs=rngs)
            for n in (features, 2 * features)
        )
        self.blocks = nnx.List(Block(4 * features, rngs=rngs) for _ in range(blocks))
        self.up = nnx.List(  # PyTorch's padding of 1 is Flax's 4 - 1 - 1
            ConvNorm(nnx.ConvTranspose(n, n // 2, padding=2, **sizes, **options), rngs=rngs)
            for n in (4 * features, 2 * features)
        )
        self.leave = nnx.Conv(features, 3, (7, 7), padding=3, **options)

    def __call__(self, x: jax.Array, labels: jax.Array) -> jax.Array:
        """Returns images of the shape of x, in [-1, 1]."""
        everywhere = jnp.broadcast_to(labels[:, None, None], (*x.shape[:3], labels.shape[-1]))
        x = jnp.concatenate([x, everywhere], axis=-1)
        for layer in (self.enter, *self.down):
            x = nnx.relu(layer(x))
        for block in self.blocks:
            x = block(x)
        for layer in self.up:
            x = nnx.relu(layer(x))
        return jnp.tanh(self.leave(x))


# ---- From PyTorch ----


def module_names(blocks: int = 6) -> dict[str, str]:
    """Returns a map from the names in the original nn.Sequential to those in this file."""
    names = {"main.0": "enter.conv", "main.1": "enter.norm"}
    for side, first in (("down", 3), ("up", 9 + blocks)):
        for k in range(2):
            names[f"main.{first + 3 * k}"] = f"{side}.{k}.conv"
            names[f"main.{first + 3 * k + 1}"] = f"{side}.{k}.norm"
    for k in range(blocks):
        inside = {"0": "first.conv", "1": "first.norm", "3": "second.conv", "4": "second.norm"}
        names |= {f"main.{9 + k}.main.{i}": f"blocks.{k}.{name}" for i, name in inside.items()}
    return names | {f"main.{15 + blocks}": "leave"}


def load(generator: Generator, state_dict: Any) -> None:
    """Replaces the variables of the generator by those of a state dict, or a file of it."""
    names = module_names(len(generator.blocks))
    # A state dict does not say which convolutions are transposed.
    up = dict.fromkeys((k for k, v in names.items() if v.startswith("up")), "conv_transpose")
    state = nnx.state(generator)
    variables = interop.from_torch(
        state_dict,
        names=names,
        convert=interop.kernels(up, names=names),
        like=interop.from_nnx(nnx.to_pure_dict(state)),
    )
    nnx.replace_by_pure_dict(state, interop.to_nnx(variables))
    nnx.update(generator, state)


# ---- Pictures ----


def draw(generator: Generator, labels: int, path: Path) -> None:
    """Draws a photograph, and the generator's output for each label."""
    x = load_sample_image("flower.jpg")[100:356, 200:456] / np.float32(127.5) - 1
    generator.eval()
    y = nnx.jit(Generator.__call__)(generator, jnp.tile(x, (labels, 1, 1, 1)), jnp.eye(labels))
    figure = matplotlib.figure.Figure(figsize=(2.2 * (labels + 1), 2.4), layout="constrained")
    titles = ["input", *(f"label {k}" for k in range(labels))]
    pictures = np.concatenate([x[None], y])
    for axes, title, picture in zip(figure.subplots(1, labels + 1), titles, pictures, strict=True):
        axes.imshow(np.clip((picture + 1) / 2, 0, 1))
        axes.set(xticks=[], yticks=[], title=title)
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> None:
    """Loads the weights, and draws."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", type=Path, metavar="G.safetensors")
    parser.add_argument("--features", type=int, default=64, help="channels of the first layer")
    parser.add_argument("--labels", type=int, default=5, help="attributes of an image")
    parser.add_argument("--blocks", type=int, default=6, help="residual blocks")
    parser.add_argument("--out", type=Path, default=Path("stargan.png"), help="the picture")
    options = parser.parse_args(arguments)
    generator = Generator(options.features, options.labels, options.blocks, rngs=nnx.Rngs(0))
    try:
        load(generator, options.weights)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"stargan_nnx.py: {error}")
    draw(generator, options.labels, options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
