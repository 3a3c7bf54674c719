"""Converts the StarGAN generator from PyTorch to Flax, and shows two ways to evaluate it.

    python examples/stargan.py                    # trained to reproduce its input, a minute or two
    python examples/stargan.py G.safetensors      # the state dict of a PyTorch generator

The generator (Choi et al., StarGAN, 2018, https://arxiv.org/abs/1711.09020, table 4) is a
well-known model that uses instance norm with running statistics: in evaluation, it normalizes every
image by the statistics of the training images instead of its own. The example draws the effect.
"""

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import optax
from sklearn.datasets import load_sample_images
from tqdm import tqdm

from jaxnorm import interop
from jaxnorm.linen import InstanceNorm

LABELS = 5
BLOCKS = 6


class Block(nn.Module):
    """A residual block of two convolutions."""

    @nn.compact
    def __call__(self, x: jax.Array, use_running_average: bool) -> jax.Array:
        """Maps x to an array of the same shape."""
        y = x
        for k in range(2):
            y = nn.Conv(x.shape[-1], (3, 3), padding=1, use_bias=False, name=f"conv_{k}")(y)
            y = norm(f"norm_{k}", use_running_average)(y)
            y = nn.relu(y) if k == 0 else y
        return x + y


class Generator(nn.Module):
    """Changes the attributes of images, (N, H, W, 3), to those of the labels, (N, LABELS)."""

    features: int = 64

    @nn.compact
    def __call__(self, x: jax.Array, labels: jax.Array, *, use_running_average: bool) -> jax.Array:
        """Returns images of the shape of x, in [-1, 1]."""
        everywhere = jnp.broadcast_to(labels[:, None, None], (*x.shape[:3], labels.shape[-1]))
        x = jnp.concatenate([x, everywhere], axis=-1)

        def normalized(name, x):
            return nn.relu(norm(f"{name}_norm", use_running_average)(x))

        options: dict[str, Any] = {"padding": 3, "use_bias": False}
        x = normalized("enter", nn.Conv(self.features, (7, 7), name="enter", **options)(x))
        options = {"kernel_size": (4, 4), "strides": (2, 2), "use_bias": False}
        for k, features in enumerate((2 * self.features, 4 * self.features)):
            x = normalized(
                f"down_{k}", nn.Conv(features, padding=1, name=f"down_{k}", **options)(x)
            )
        for k in range(BLOCKS):
            x = Block(name=f"block_{k}")(x, use_running_average)
        for k, features in enumerate((2 * self.features, self.features)):
            up = nn.ConvTranspose(features, padding="SAME", name=f"up_{k}", **options)
            x = normalized(f"up_{k}", up(x))
        return jnp.tanh(nn.Conv(3, (7, 7), padding=3, use_bias=False, name="leave")(x))


def norm(name: str, use_running_average: bool) -> InstanceNorm:
    """Returns the norm that is InstanceNorm2d(affine=True, track_running_stats=True) in PyTorch."""
    return InstanceNorm(
        use_running_average=use_running_average,
        track_running_stats=True,
        epsilon=1e-5,
        name=name,
    )


# ---- From PyTorch ----


def module_names() -> dict[str, str]:
    """Returns a map from the names in the original nn.Sequential to those in this file."""
    names = {"main.0": "enter", "main.1": "enter_norm"}
    for k in range(2):
        names |= {f"main.{3 + 3 * k}": f"down_{k}", f"main.{4 + 3 * k}": f"down_{k}_norm"}
    for k in range(BLOCKS):
        inside = {"0": "conv_0", "1": "norm_0", "3": "conv_1", "4": "norm_1"}
        names |= {f"main.{9 + k}.main.{i}": f"block_{k}.{name}" for i, name in inside.items()}
    after = 9 + BLOCKS
    for k in range(2):
        names |= {f"main.{after + 3 * k}": f"up_{k}", f"main.{after + 1 + 3 * k}": f"up_{k}_norm"}
    return names | {f"main.{after + 6}": "leave"}


# A state dict does not say that two of the convolutions are transposed.
kernels = interop.kernels(
    {
        torch_name: "conv_transpose"
        for torch_name, name in module_names().items()
        if name in ("up_0", "up_1")
    },
    names=module_names(),
)


def from_pytorch(state_dict: Any) -> dict[str, Any]:
    """Converts the state dict of the generator, or a .safetensors file of it."""
    return interop.from_torch(state_dict, names=module_names(), convert=kernels)


# ---- Pictures ----


def photographs(size: int = 128) -> np.ndarray:
    """Returns overlapping square parts of scikit-learn's photographs, at half size, in [-1, 1]."""
    images = [image[::2, ::2] / np.float32(127.5) - 1 for image in load_sample_images().images]
    height, width, _ = images[0].shape
    corners = itertools.product(range(0, height - size, 28), range(0, width - size, 32))
    parts = [image[y : y + size, x : x + size] for y, x in corners for image in images]
    return np.stack(parts)


def trained_variables(images: np.ndarray, features: int, steps: int) -> dict[str, Any]:
    """Trains a generator to reproduce its input for any labels, and returns its variables."""
    model, optimizer = Generator(features), optax.adam(2e-3)
    labels = np.eye(LABELS, dtype=np.float32)
    variables: Any = model.init(
        jax.random.key(0), images[:1], labels[:1], use_running_average=False
    )
    opt_state = optimizer.init(variables["params"])

    @jax.jit
    def step(variables, opt_state, x, labels):
        def loss(params):
            given = {**variables, "params": params}
            y, updates = model.apply(
                given, x, labels, use_running_average=False, mutable=["batch_stats"]
            )
            return jnp.mean(jnp.abs(y - x)), updates

        (value, updates), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        changes, opt_state = optimizer.update(grads, opt_state)
        params = optax.apply_updates(variables["params"], changes)
        return {"params": params, **updates}, opt_state, value

    rng = np.random.default_rng(0)
    with tqdm(range(steps), desc="training", unit="step") as bar:
        for _ in bar:
            chosen, label = rng.integers(len(images), size=4), rng.integers(LABELS, size=4)
            variables, opt_state, value = step(variables, opt_state, images[chosen], labels[label])
            bar.set_postfix_str(f"mean error {float(value):.3f}")
    return variables


def draw(variables: dict[str, Any], images: np.ndarray, path: Path) -> None:
    """Draws two photographs, unchanged and with half the contrast, evaluated in both ways."""
    chosen = images[len(images) // 2 :][:2]
    inputs = np.concatenate([chosen, 0.5 * chosen])
    labels = np.tile(np.eye(LABELS, dtype=np.float32)[0], (len(inputs), 1))
    features = np.shape(variables["params"]["enter_norm"]["scale"])[0]

    @jax.jit
    def evaluate(x):
        call = Generator(features).apply
        by_state = call(variables, x, labels, use_running_average=True)
        by_own, _ = call(variables, x, labels, use_running_average=False, mutable=["batch_stats"])
        return by_state, by_own

    by_state, by_own = (np.asarray(y) for y in evaluate(inputs))
    columns = {
        "input": inputs,
        "evaluated by running statistics": by_state,
        "by each image's own": by_own,
        "difference": np.abs(by_state - by_own) - 1,
    }
    figure = matplotlib.figure.Figure(figsize=(9.4, 9.8), layout="constrained")
    grid = figure.subplots(len(inputs), len(columns))
    rows = ["photograph", "photograph", "half the contrast", "half the contrast"]
    for row, axes_of_row in enumerate(grid):
        for axes, (title, pictures) in zip(axes_of_row, columns.items(), strict=True):
            axes.imshow(np.clip((pictures[row] + 1) / 2, 0, 1))
            axes.set(xticks=[], yticks=[])
            if row == 0:
                axes.set_title(title, size=10)
        axes_of_row[0].set_ylabel(rows[row], size=10)
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    """Loads or trains the weights, and draws."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", type=Path, nargs="?", metavar="G.safetensors")
    parser.add_argument(
        "--features",
        type=int,
        default=16,
        help="channels of the first layer, without weights; published: 64",
    )
    parser.add_argument("--steps", type=int, default=200, help="steps of training, without weights")
    parser.add_argument("--out", type=Path, default=Path("stargan.png"), help="the picture")
    options = parser.parse_args(arguments)
    images = photographs()
    try:
        if options.weights is None:
            variables = trained_variables(images, options.features, options.steps)
        else:
            variables = from_pytorch(options.weights)
    except (OSError, ValueError) as error:
        sys.exit(f"stargan.py: {error}")
    draw(variables, images, options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
