"""Trains a small classifier of digits with four norms, and compares them.

    python examples/digits.py                     # scikit-learn's 1,797 scanned digits, 8x8
    python examples/digits.py --mnist DIR         # MNIST's four original IDX files, 28x28

It is also a reference for training loops: one train state contains params and batch_stats, every
step updates both, and evaluation uses the running statistics.
"""

import argparse
import functools
import gzip
import math
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import matplotlib.figure
import matplotlib.ticker
import numpy as np
import optax
from flax.training import train_state
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from jaxnorm.linen import BatchNorm, InstanceNorm

Norm = Callable[..., nn.Module] | None

NORMS: dict[str, Norm] = {
    "no norm": None,
    "BatchNorm": BatchNorm,
    "InstanceNorm": InstanceNorm,
    "InstanceNorm, running": functools.partial(InstanceNorm, track_running_stats=True),
}
# Dashed, because the two instance norms have the same training curve.
STYLES = [("#7f7f7f", "-"), ("#1f77b4", "-"), ("#e6842a", "-"), ("#1b7f4b", "--")]
MISTAKES_SHOWN = 12


class Images(NamedTuple):
    """Images in [0, 1], of shape (N, H, W, 1), and their labels, of shape (N,)."""

    images: np.ndarray
    labels: np.ndarray


# The data


def load_sklearn() -> tuple[Images, Images]:
    """Returns three quarters of scikit-learn's digits for training, and the rest for testing."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    split = train_test_split(images, labels, test_size=0.25, random_state=0, stratify=labels)
    return Images(split[0], split[2]), Images(split[1], split[3])


def load_mnist(folder: Path) -> tuple[Images, Images]:
    """Returns MNIST's training and test images, from the four files in the folder."""

    def load(part: str) -> Images:
        images = read_idx(folder, f"{part}-images-idx3-ubyte", ndim=3)
        labels = read_idx(folder, f"{part}-labels-idx1-ubyte", ndim=1)
        largest = labels.max(initial=0)
        if not 0 < len(images) == len(labels) or largest > 9:
            raise ValueError(
                f"{folder}: the {part} files should hold a label from 0 to 9 for each image, but "
                f"hold {len(images)} images and {len(labels)} labels up to {largest}; take both "
                f"from the same download of MNIST"
            )
        return Images(images[..., None] / np.float32(255), labels.astype(np.int32))

    return load("train"), load("t10k")


def read_idx(folder: Path, name: str, ndim: int) -> np.ndarray:
    """Reads the uint8 array in an IDX file: 0, 0, 8, ndim, each size as 4 bytes, the values."""
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise ValueError(
            f"{folder / name}: there should be this file, or {name}.gz, but there is none; give "
            f"--mnist the folder that holds MNIST's four files under their original names"
        )
    content = path.read_bytes()
    # The content decides, because some browsers unpack a file without changing its name.
    if content.startswith(b"\x1f\x8b"):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise _damaged(path, "be a whole gzip file", str(error)) from error
    header = 4 + 4 * ndim
    if content[:4] != bytes([0, 0, 8, ndim]) or len(content) < header:
        expected = f"begin with the {header} bytes of an IDX header, 00 00 08 {ndim:02x} first"
        raise _damaged(path, expected, f"it begins with {content[:4].hex(' ') or 'nothing'}")
    shape = struct.unpack(f">{ndim}I", content[4:header])
    values = np.frombuffer(content, np.uint8, offset=header)
    if values.size != math.prod(shape):
        sizes = " x ".join(map(str, shape))
        raise _damaged(path, f"hold {sizes} values", f"there are {values.size}")
    return values.reshape(shape)


def _damaged(path: Path, expected: str, found: str) -> ValueError:
    """Returns the error for a file with unexpected contents."""
    return ValueError(f"{path}: it should {expected}, but {found}; replace it by an intact copy")


def change_contrast(images: np.ndarray) -> np.ndarray:
    """Halves the contrast and adds brightness: black becomes 0.4 and white 0.9."""
    return np.float32(0.5) * images + np.float32(0.4)


# The model and its training


class Classifier(nn.Module):
    """Two convolutions, each followed by the norm, and a dense layer."""

    norm: Norm

    @nn.compact
    def __call__(
        self, x: jax.Array, *, use_running_average: bool, update_stats: bool | None = None
    ) -> jax.Array:
        """Returns the logits of the ten classes."""

        def normalize(x):
            if self.norm is None:
                return x
            return self.norm(use_running_average=use_running_average, update_stats=update_stats)(x)

        # VALID, because padding with zeros would add a dark frame to a brightened image.
        x = nn.Conv(16, (3, 3), padding="VALID")(x)
        x = nn.relu(normalize(x))
        x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        x = nn.Conv(32, (3, 3))(x)
        x = nn.relu(normalize(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


class TrainState(train_state.TrainState):
    """The state of training: params, the optimizer's state, and the running statistics."""

    batch_stats: Any


def create_state(norm: Norm, images: np.ndarray, seed: int) -> TrainState:
    """Returns the untrained model with this norm, for images of this shape."""
    model = Classifier(norm)
    variables = model.init(jax.random.key(seed), images[:1], use_running_average=False)
    return TrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        batch_stats=variables.get("batch_stats", {}),  # not every norm has running statistics
        tx=optax.sgd(0.05, momentum=0.9),
    )


@jax.jit
def train_step(
    state: TrainState, images: jax.Array, labels: jax.Array
) -> tuple[TrainState, jax.Array]:
    """Returns the state after one step, and the loss before it."""

    def loss_of(params):
        logits, updates = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            images,
            use_running_average=False,
            mutable=["batch_stats"],
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss, updates.get("batch_stats", {})

    (loss, batch_stats), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, batch_stats=batch_stats), loss


@functools.partial(jax.jit, static_argnames="use_running_average")
def predict(state: TrainState, images: jax.Array, *, use_running_average: bool = True) -> jax.Array:
    """Returns the most likely labels, by running statistics or by those of the images."""
    logits = state.apply_fn(
        {"params": state.params, "batch_stats": state.batch_stats},
        images,
        use_running_average=use_running_average,
        update_stats=False,
    )
    return logits.argmax(-1)


class Run(NamedTuple):
    """A trained model, with the history of its training."""

    state: TrainState
    losses: list[float]  # the mean of each epoch's steps
    accuracies: list[float]  # on the test images, after each epoch
    seconds: float


def fit(name: str, train: Images, test: Images, *, epochs: int, seed: int) -> Run:
    """Trains the model with the norm of this name."""
    state = create_state(NORMS[name], train.images, seed)
    start = time.perf_counter()
    batch_size = min(len(train.labels), 32 if len(train.labels) < 10_000 else 128)
    rng = np.random.default_rng(seed)
    losses, accuracies = [], []
    steps = epochs * (len(train.labels) // batch_size)
    with tqdm(total=steps, desc=f"{name:21}", unit="step") as progress:
        for _ in range(epochs):
            epoch = []
            for batch in batches(train, batch_size, rng):
                state, loss = train_step(state, *batch)
                epoch.append(loss)
                progress.update()
            losses.append(float(np.mean(epoch)))
            accuracies.append(accuracy(state, test))
            progress.set_postfix_str(f"loss {losses[-1]:.3f}, test accuracy {accuracies[-1]:.1%}")
    return Run(state, losses, accuracies, time.perf_counter() - start)


def batches(data: Images, size: int, rng: np.random.Generator) -> Iterator[Images]:
    """Returns one epoch of shuffled batches, without an incomplete last batch."""
    order = rng.permutation(len(data.labels))
    for first in range(0, len(order) - size + 1, size):
        chosen = order[first : first + size]
        yield Images(data.images[chosen], data.labels[chosen])


def accuracy(state: TrainState, data: Images, **how: bool) -> float:
    """Returns the accuracy of the model on the images."""
    return float(np.mean(predict(state, data.images, **how) == data.labels))


# Output


def table(runs: dict[str, Run], test: Images) -> str:
    """Returns a table of the accuracies of each model, and the seconds of training."""
    changed = test._replace(images=change_contrast(test.images))
    blocks = ("as evaluated", "running statistics", "own statistics")
    head = ["test accuracy", *["clean", "changed"] * len(blocks), "seconds"]

    def percentages(run: Run, *, use_running_average: bool) -> list[str]:
        how = {"use_running_average": use_running_average}
        return [f"{accuracy(run.state, data, **how):.1%}" for data in (test, changed)]

    rows = []
    for name, run in runs.items():
        evaluated = percentages(run, use_running_average=True)
        running = evaluated if run.state.batch_stats else ["-", "-"]
        own = percentages(run, use_running_average=False) if NORMS[name] else ["-", "-"]
        rows.append([name, *evaluated, *running, *own, f"{run.seconds:.1f}"])
    lines = [f"{row[0]:21}" + "".join(f"{cell:>10}" for cell in row[1:]) for row in [head, *rows]]
    above = " " * 21 + "".join(f"{block:>20}" for block in blocks)
    return "\n".join([above, lines[0], "-" * len(lines[0]), *lines[1:], "", NOTES])


NOTES = """\
Accuracy on clean and on changed test images, with different statistics.
changed: images with half the contrast and more brightness, 0.5 x + 0.4 for x in [0, 1].
as evaluated: by the running statistics if the model has them, else by those of the images.
own statistics: those of each image for InstanceNorm, of all test images for BatchNorm.
seconds: for all epochs, including compilation and a test after each epoch."""


def draw_curves(runs: dict[str, Run], path: Path) -> None:
    """Draws the loss and the accuracy of each model after each epoch."""
    figure = matplotlib.figure.Figure(figsize=(10, 4))
    figure.set_layout_engine("constrained", wspace=0.06)
    left, right = figure.subplots(1, 2)
    for (name, run), (color, line) in zip(runs.items(), STYLES, strict=True):
        epochs = range(1, len(run.losses) + 1)
        style: dict[str, Any] = {"color": color, "linestyle": line, "marker": "o", "markersize": 3}
        left.plot(epochs, run.losses, **style)
        percent = [100 * accuracy for accuracy in run.accuracies]
        right.plot(epochs, percent, label=f"{name}: {percent[-1]:.1f} %", **style)
    left.set(title="Training loss, the mean of each epoch", ylabel="cross-entropy", yscale="log")
    right.set(title="Test accuracy after each epoch", ylabel="correct (%)")
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    right.legend(title="after the last epoch", frameon=False)
    figure.suptitle("Loss and test accuracy of each network")
    figure.savefig(path, dpi=150)


def draw_mistakes(runs: dict[str, Run], test: Images, path: Path) -> None:
    """Draws the first test images that each model misclassifies."""
    figure = matplotlib.figure.Figure(figsize=(12, 0.4 + 1.45 * len(runs)))
    heights = [0.4, *[1.45] * len(runs)]
    panels = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    title = "Test images that each network misclassifies"
    panels[0].suptitle(title, y=0.8)
    for row, (name, run), (color, _) in zip(panels[1:], runs.items(), STYLES, strict=True):
        predicted = np.asarray(predict(run.state, test.images))
        wrong = np.flatnonzero(predicted != test.labels)
        title = f"{name}: {len(wrong)} of {len(test.labels)} test images wrong"
        if len(wrong) > MISTAKES_SHOWN:
            title += f", the first {MISTAKES_SHOWN} of them"
        row.suptitle(title, color=color, x=0.01, y=0.92, ha="left", weight="bold", size=11)
        grid = row.subplots(1, MISTAKES_SHOWN)
        row.subplots_adjust(left=0.01, right=0.99, top=0.58, bottom=0.06, wspace=0.3)
        for axes in grid:
            axes.axis("off")
        for axes, i in zip(grid, wrong, strict=False):
            axes.imshow(test.images[i, :, :, 0], cmap="gray_r", vmin=0, vmax=1)
            axes.set_title(f"read {predicted[i]}, is {test.labels[i]}", size=9)
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> None:
    """Trains the four models, prints the table and writes the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mnist", type=Path, metavar="DIR", help="read MNIST's IDX files from DIR")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the initial params and the shuffling"
    )
    parser.add_argument("--out", type=Path, default=Path("digits"), help="folder for the pictures")
    options = parser.parse_args(arguments)
    if options.epochs < 1:
        parser.error(f"--epochs should be at least 1, but is {options.epochs}")
    try:
        train, test = load_mnist(options.mnist) if options.mnist else load_sklearn()
        options.out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        sys.exit(f"digits.py: {error}")

    runs = {
        name: fit(name, train, test, epochs=options.epochs, seed=options.seed) for name in NORMS
    }
    print(f"\n{table(runs, test)}\n")
    draw_curves(runs, options.out / "curves.png")
    draw_mistakes(runs, test, options.out / "mistakes.png")
    print(f"wrote {options.out / 'curves.png'} and {options.out / 'mistakes.png'}")


if __name__ == "__main__":
    main()
