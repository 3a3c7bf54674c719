"""Averages a network's weights, and shows what its running statistics are worth then.

    python examples/averaging.py

Averaged weights often generalize better, but nobody has ever seen what they make of the data: the
running statistics are those of the weights that training went through. One pass over the training
images without gradients, `jaxnorm.linen.recalibrate`, measures them anew.
"""

import argparse
from typing import Any

import jax
import numpy as np
import optax
from digits import Images, TrainState, accuracy, batches, create_state, load_sklearn, train_step
from tqdm import tqdm

import jaxnorm.linen


def train(
    data: Images, *, epochs: int, warmup: int, decay: float, seed: int
) -> tuple[TrainState, dict[str, Any]]:
    """Trains a network with batch norm; the last state, and its weights averaged in two ways.

    Stochastic weight averaging takes the plain mean of the weights after each epoch from the
    warmup on; the exponential moving average, from there on too, weighs every step.
    """
    state = create_state(jaxnorm.linen.BatchNorm, data.images, seed)
    rng, ema = np.random.default_rng(seed), optax.ema(decay)
    after_epochs, averaged, ema_state = [], state.params, ema.init(state.params)
    for epoch in tqdm(range(epochs), desc="training", unit="epoch"):
        for batch in batches(data, 32, rng):
            state, _ = train_step(state, *batch)
            if epoch >= warmup:
                averaged, ema_state = ema.update(state.params, ema_state)
        if epoch >= warmup:
            after_epochs.append(state.params)
    mean = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *after_epochs)
    return state, {
        "last weights": state.params,
        "mean of the epochs' (SWA)": mean,
        f"moving average (EMA, {decay})": averaged,
    }


def recalibrated(state: TrainState, data: Images) -> TrainState:
    """The state with running statistics of its weights, over all the training images."""
    images = np.array_split(data.images, 8)
    with tqdm(total=len(images), desc="recalibrating", unit="batch") as bar:
        variables = jaxnorm.linen.recalibrate(
            state.apply_fn.__self__,
            {"params": state.params, "batch_stats": state.batch_stats},
            images,
            use_running_average=False,
            progress=lambda done: bar.update(done - bar.n),
        )
    return state.replace(batch_stats=variables["batch_stats"])


def main(arguments: list[str] | None = None) -> None:
    """Trains, averages, and prints each average's accuracy before and after recalibration."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=4, help="epochs before averaging begins")
    parser.add_argument("--decay", type=float, default=0.99, help="of the moving average")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if not 0 <= options.warmup < options.epochs:
        parser.error(f"--warmup should be less than --epochs, but is {options.warmup}")
    train_images, test = load_sklearn()
    state, weights = train(train_images, **vars(options))
    print(f"\n{'':28}{'running statistics as':>26}")
    print(f"{'test accuracy':28}{'training left':>14}{'recalibrated':>14}")
    print("-" * 56)
    for name, params in weights.items():
        given = state.replace(params=params)
        cells = [accuracy(s, test) for s in (given, recalibrated(given, train_images))]
        print(f"{name:28}" + "".join(f"{cell:>14.1%}" for cell in cells))


if __name__ == "__main__":
    main()
