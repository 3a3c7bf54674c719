"""Tools to inspect running statistics: numbers for loggers, and plots."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnorm._stats import trees

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS_IN_A_ROW = 4


def flat(batch_stats: Any) -> dict[str, jax.Array]:
    """Every running statistic of a model under one name, for loggers of arrays and histograms.

    Args:
      batch_stats: a collection, all variables of a model, a train state, `nnx.state(model)`, one
        norm's state, or any other tree of states.

    Returns:
      For each norm at "block/BatchNorm_0" three entries, the arrays as they are: ".../mean" and
      ".../var" of shape (C,), in units of x and of x squared, and ".../count".

    Raises:
      ValueError: if there is no running statistic in it.

    Example:
      >>> import jaxnorm.inspect
      >>> state = {"block": {"BatchNorm_0": jaxnorm.init_batch_stats(2)}}
      >>> for name, value in jaxnorm.inspect.flat(state).items():
      ...     print(name, value)
      block/BatchNorm_0/mean [0. 0.]
      block/BatchNorm_0/var [1. 1.]
      block/BatchNorm_0/count 0

    References:
      flax.traverse_util.flatten_dict, flax 0.12, whose names these are with sep="/".
    """
    return {
        f"{name}/{key}" if name else key: state[key]
        for name, state in _norms("flat", batch_stats).items()
        for key in ("mean", "var", "count")
        if key in state
    }


def scalars(batch_stats: Any) -> dict[str, jax.Array]:
    """What to watch in a model's running statistics, as scalars for any logger; works under jit.

    Means that run away, a variance that goes to zero (a dead channel) or to infinity, a count that
    stands still in training, or moves in evaluation.

    Args:
      batch_stats: as in `flat`.

    Returns:
      For each norm at "block/BatchNorm_0": ".../mean_min" and ".../mean_max" over its channels, in
      units of x, ".../std_min" and ".../std_max", likewise, and ".../count", its largest where a
      norm has several.

    Raises:
      ValueError: if there is no running statistic in it.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxnorm.inspect
      >>> state = {"mean": jnp.array([-1.0, 2.0]), "var": jnp.array([4.0, 9.0]), "count": 7}
      >>> for name, value in jaxnorm.inspect.scalars({"norm": state}).items():
      ...     print(name, value)
      norm/mean_min -1.0
      norm/mean_max 2.0
      norm/std_min 2.0
      norm/std_max 3.0
      norm/count 7

    References:
      The scalars of torch.utils.tensorboard and of Weights & Biases are flat in this way.
    """
    found: dict[str, jax.Array] = {}
    for name, state in _norms("scalars", batch_stats).items():
        std = jnp.sqrt(state["var"])
        numbers = {
            "mean_min": jnp.min(state["mean"]),
            "mean_max": jnp.max(state["mean"]),
            "std_min": jnp.min(std),
            "std_max": jnp.max(std),
        }
        if "count" in state:
            numbers["count"] = jnp.max(jnp.asarray(state["count"]))
        found |= {f"{name}/{key}" if name else key: value for key, value in numbers.items()}
    return found


def drift(batch_stats: Any, reference: Any) -> dict[str, jax.Array]:
    r"""How far the running statistics of each norm are from others, in standard deviations.

    .. math::
        \sqrt{E_c[(mean - mean_{ref})^2 / var_{ref}]}, \quad \sqrt{E_c[(std / std_{ref} - 1)^2]}

    Of a state from the one before it: how fast it moves. Of running statistics from those of a
    batch (`recalibrate` over that batch alone gives them): how wrong evaluation would be on it.

    Args:
      batch_stats: as in `flat`.
      reference: the same norms' statistics at another time, or over other data.

    Returns:
      For each norm at "block/BatchNorm_0": ".../mean_drift", in standard deviations of the
      reference, and ".../std_drift", in parts of them.

    Raises:
      ValueError: if there is no running statistic in one of them, or they hold different norms.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxnorm.inspect
      >>> state = {"mean": jnp.array([1.0]), "var": jnp.array([9.0])}
      >>> reference = {"mean": jnp.array([0.0]), "var": jnp.array([4.0])}
      >>> print(jaxnorm.inspect.drift({"norm": state}, {"norm": reference}))
      {'norm/mean_drift': Array(0.5, dtype=float32), 'norm/std_drift': Array(0.5, dtype=float32)}

    References:
      Wu & Johnson, Rethinking "Batch" in BatchNorm, 2021, section 3, on how far population and
      batch statistics are apart. https://arxiv.org/abs/2105.07576
    """
    found = {}
    tiny = jnp.finfo(jnp.float32).tiny  # a channel that is dead in both has not moved: 0, not 0 / 0
    for name, a, b in _pairs("drift", batch_stats, reference):
        off = (a["mean"] - b["mean"]) ** 2 / (b["var"] + tiny)
        wide = (jnp.sqrt((a["var"] + tiny) / (b["var"] + tiny)) - 1) ** 2
        for key, squares in (("mean_drift", off), ("std_drift", wide)):
            found[f"{name}/{key}" if name else key] = jnp.sqrt(jnp.mean(squares))
    return found


def plot_layers(
    running: Any, batch: Any, *, names: tuple[str, str] = ("running", "batch")
) -> Figure:
    """Draws two sets of statistics, a panel a norm: each channel's mean, plus and minus its std.

    Args:
      running: as in `flat`, with values.
      batch: the same norms' statistics over other data or at another time.
      names: what the two are called in the legend.

    Returns:
      A matplotlib figure; the channels of a panel are in the order of their running means.

    Raises:
      ValueError: as `drift`.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxnorm.inspect
      >>> running = {"norm": jaxnorm.init_batch_stats(3)}
      >>> batch = {"norm": {"mean": jnp.array([0.1, 0.4, 0.2]), "var": jnp.ones(3)}}
      >>> figure = jaxnorm.inspect.plot_layers(running, batch)
      >>> figure.axes[0].get_title()
      'norm'

    References:
      matplotlib, fill_between and errorbar.
    """
    pairs = list(_pairs("plot_layers", running, batch))
    columns = min(PANELS_IN_A_ROW, len(pairs))
    rows = math.ceil(len(pairs) / columns)
    figure, panels = _figure(rows, columns, (1 + 2.8 * columns, 0.5 + 2.2 * rows))
    for axes, (name, *states) in zip(panels, pairs, strict=False):
        (mean, std), (other, other_std) = (
            (np.ravel(s["mean"]).astype(float), np.sqrt(np.ravel(s["var"]).astype(float)))
            for s in states
        )
        order = np.argsort(mean)
        channels = np.arange(len(order))
        mean, std, other, other_std = (a[order] for a in (mean, std, other, other_std))
        axes.fill_between(channels, mean - std, mean + std, color="#1f77b4", alpha=0.2, lw=0)
        axes.plot(channels, mean, color="#1f77b4", label=names[0])
        style: dict[str, Any] = {"fmt": "o", "ms": 3, "lw": 0.8, "color": "#e6842a"}
        axes.errorbar(channels, other, other_std, label=names[1], **style)
        axes.set_title(name, size=9)
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in panels[len(pairs) :]:
        axes.set_visible(False)
    for axes in panels[max(0, len(pairs) - columns) : len(pairs)]:
        axes.set_xlabel("channel, by running mean")
    for axes in panels[::columns]:
        axes.set_ylabel("mean ± std")
    lines, labels = panels[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure


def plot_drift(history: Mapping[int, Any], reference: Any = None) -> Figure:
    """Draws how far each norm's running statistics were, step by step, from where they ended.

    Args:
      history: the step, and the state after it (as in `flat`, with values), for two steps or more.
      reference: the state to measure from; the last one unless given.

    Returns:
      A matplotlib figure: the two numbers of `drift` over the steps, a line a norm.

    Raises:
      ValueError: if there are fewer than two steps, or as `drift`.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxnorm.inspect
      >>> state, history = jaxnorm.init_batch_stats(1), {}
      >>> for step in range(20):
      ...     _, state = jaxnorm.batch_norm(jnp.array([[4.0], [8.0]]), None, state)
      ...     history[step] = {"norm": state}
      >>> figure = jaxnorm.inspect.plot_drift(history)
      >>> len(figure.axes[0].lines[0].get_xdata())
      20

    References:
      matplotlib, plot.
    """
    if len(history) < 2:
        raise ValueError(
            f"plot_drift: history should hold two steps or more, because it draws how the "
            f"statistics move, but holds {len(history)}"
        )
    last = history[max(history)] if reference is None else reference
    steps = sorted(history)
    apart = [drift(history[step], last) for step in steps]
    figure, panels = _figure(1, 2, (10, 3.6))
    titles = {
        "mean_drift": "mean: distance in standard deviations",
        "std_drift": "standard deviation: distance as a ratio - 1",
    }
    lines = [name for name in apart[0] if name.endswith("mean_drift")]
    for axes, (kind, title) in zip(panels, titles.items(), strict=True):
        for i, line in enumerate(lines):
            norm = line.removesuffix("mean_drift")
            values = [float(numbers[norm + kind]) for numbers in apart]
            color = f"C{i % 10}"
            axes.plot(steps, values, color=color, lw=1.3, label=norm.rstrip("/") or "norm")
        axes.set(title=title, xlabel="step", ylim=(0, None))
    panels[1].legend(frameon=False, fontsize=8, ncols=math.ceil(len(lines) / 8))
    return figure


def _norms(function: str, tree: Any) -> dict[str, Any]:
    """Every norm's state, under the names of the keys that lead to it in batch_stats."""
    found = {}
    for path, state in trees.find(tree):
        parts = trees.names(path)
        parts = parts[1:] if parts[:1] == ("batch_stats",) else parts
        found["/".join(parts)] = trees.arrays(state, ("mean", "var", "count"))
    if not found:
        raise ValueError(
            f"{function}: batch_stats should hold running statistics, a dict with the keys 'mean' "
            f"and 'var', but holds none; of an NNX model, write nnx.state(model)"
        )
    return found


def _pairs(function: str, a: Any, b: Any) -> list[tuple[str, Any, Any]]:
    """The states of the same norms in both."""
    first, second = _norms(function, a), _norms(function, b)
    if first.keys() != second.keys():
        raise ValueError(
            f"{function}: both should hold the same norms, but only one holds "
            f"{', '.join(sorted(first.keys() ^ second.keys()))}"
        )
    return [(name, first[name], second[name]) for name in first]


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, Any]:
    # Here, since matplotlib is not needed for the numbers; and no pyplot, which keeps every figure.
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained", dpi=110)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels
