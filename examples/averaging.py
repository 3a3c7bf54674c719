"""Averages the weights of a network, and compares its accuracy before and after recalibration.

    python examples/averaging.py

Averaged weights often generalize better, but the running statistics still describe the weights of
the training steps. `jaxnorm.linen.recalibrate` recomputes them in one pass over the training
images, without gradients.
"""

import argparse
from typing import Any

import jax
import numpy as np
import optax
from digits import (
    Classifier,
    Images,
    TrainState,
    accuracy,
    batches,
    create_state,
    load_sklearn,
    train_step,
)
from tqdm import tqdm

import jaxnorm.linen


def train(
    data: Images, *, epochs: int, warmup: int, decay: float, seed: int
) -> tuple[TrainState, dict[str, Any]]:
    """Trains a network with batch norm, and returns the last state and two averages of its weights.

    The learning rate is high and constant, as for stochastic weight averaging (Izmailov et al.,
    2018), which takes the plain mean of the weights after each epoch; the exponential moving
    average weighs every step. Both begin after the warmup.
    """
    state = create_state(jaxnorm.linen.BatchNorm, data.images, seed)
    optimizer = optax.sgd(0.3, momentum=0.9)
    state = state.replace(tx=optimizer, opt_state=optimizer.init(state.params))
    rng, ema = np.random.default_rng(seed), optax.ema(decay)
    after_epochs, moving, ema_state = [], state.params, ema.init(state.params)
    for epoch in tqdm(range(epochs), desc=f"training, seed {seed}", unit="epoch"):
        for batch in batches(data, 32, rng):
            state, _ = train_step(state, *batch)
            if epoch >= warmup:
                moving, ema_state = ema.update(state.params, ema_state)
        if epoch >= warmup:
            after_epochs.append(state.params)
    mean = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *after_epochs)
    return state, {
        "the last": state.params,
        "mean over epochs (SWA)": mean,
        f"moving average ({decay})": moving,
    }


def recalibrated(state: TrainState, data: Images) -> TrainState:
    """Returns the state with running statistics that are recomputed for its weights."""
    variables = jaxnorm.linen.recalibrate(
        Classifier(jaxnorm.linen.BatchNorm),
        {"params": state.params, "batch_stats": state.batch_stats},
        tqdm(np.array_split(data.images, 8), desc="recalibrating", unit="batch", leave=False),
        use_running_average=False,
    )
    return state.replace(batch_stats=variables["batch_stats"])


def main(arguments: list[str] | None = None) -> None:
    """Trains, averages, and prints the accuracies before and after recalibration."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2, help="epochs before averaging begins")
    parser.add_argument("--decay", type=float, default=0.99, help="of the moving average")
    parser.add_argument("--seeds", type=int, default=3, help="how many networks are trained")
    options = parser.parse_args(arguments)
    if not 0 <= options.warmup < options.epochs:
        parser.error(f"--warmup should be less than --epochs, but is {options.warmup}")
    if options.seeds < 1:
        parser.error(f"--seeds should be at least 1, but is {options.seeds}")
    images, test = load_sklearn()
    accuracies: dict[str, list[list[float]]] = {}
    for seed in range(options.seeds):
        settings = {"epochs": options.epochs, "warmup": options.warmup, "decay": options.decay}
        state, weights = train(images, seed=seed, **settings)
        for name, params in weights.items():
            averaged = state.replace(params=params)
            states = averaged, recalibrated(averaged, images)
            accuracies.setdefault(name, []).append([accuracy(s, test) for s in states])
    print(table(accuracies))


def table(accuracies: dict[str, list[list[float]]]) -> str:
    """Returns a table with a row for each choice of weights, and a column for each network."""
    number = len(next(iter(accuracies.values())))
    head = [*(f"seed {seed}" for seed in range(number)), "mean"]
    lines = [
        "test accuracy, with the running statistics from training -> recalibrated",
        f"{'weights':24}" + "".join(f"{cell:>18}" for cell in head),
    ]
    lines.append("-" * len(lines[1]))
    for name, pairs in accuracies.items():
        cells = [f"{a:.1%} -> {b:.1%}" for a, b in [*pairs, np.mean(pairs, axis=0)]]
        lines.append(f"{name:24}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
