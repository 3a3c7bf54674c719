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
    """Returns all running statistics of a model under flat names, for loggers and histograms.

    Args:
      batch_stats: a collection, all variables of a model, a train state, `nnx.state(model)`, the
        state of one norm, or any other tree of states.

    Returns:
      Three arrays for each norm, such as "block/BatchNorm_0": ".../mean" and ".../var" of shape
      (C,), in units of x and of x squared, and ".../count".

    Raises:
      ValueError: if there are no running statistics.

    Example:
      >>> import jaxnorm.inspect
      >>> state = {"block": {"BatchNorm_0": jaxnorm.init_batch_stats(2)}}
      >>> for name, value in jaxnorm.inspect.flat(state).items():
      ...     print(name, value)
      block/BatchNorm_0/mean [0. 0.]
      block/BatchNorm_0/var [1. 1.]
      block/BatchNorm_0/count 0

    References:
      flax.traverse_util.flatten_dict, flax 0.12, which gives the same names with sep="/".
    """
    return {
        f"{name}/{key}" if name else key: state[key]
        for name, state in _norms("flat", batch_stats).items()
        for key in ("mean", "var", "count")
        if key in state
    }


def scalars(batch_stats: Any) -> dict[str, jax.Array]:
    """Summarizes the running statistics of a model as scalars for any logger. Works under jit.

    The scalars show means that diverge, variances that go to zero (dead channels) or to infinity,
    and counts that do not increase in training or increase in evaluation.

    Args:
      batch_stats: as in `flat`.

    Returns:
      For each norm, such as "block/BatchNorm_0": ".../mean_min", ".../mean_max", ".../std_min" and
      ".../std_max" over its channels, in units of x, and ".../count", the largest if a norm has
      several.

    Raises:
      ValueError: if there are no running statistics.

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
      torch.utils.tensorboard and Weights & Biases, which log scalars under flat names.
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
    r"""Measures the distance of running statistics from others, in standard deviations.

    .. math::
        \sqrt{E_c[(mean - mean_{ref})^2 / var_{ref}]}, \quad \sqrt{E_c[(std / std_{ref} - 1)^2]}

    The drift from the previous state shows how fast the statistics change. The drift from the
    statistics of a batch, which `recalibrate` with only that batch returns, shows how wrong
    evaluation would be on that batch.

    Args:
      batch_stats: as in `flat`.
      reference: the statistics of the same norms at another time, or over other data.

    Returns:
      For each norm, such as "block/BatchNorm_0": ".../mean_drift", in standard deviations of the
      reference, and ".../std_drift", relative to them.

    Raises:
      ValueError: if one of them has no running statistics, or they contain different norms.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxnorm.inspect
      >>> state = {"mean": jnp.array([1.0]), "var": jnp.array([9.0])}
      >>> reference = {"mean": jnp.array([0.0]), "var": jnp.array([4.0])}
      >>> print(jaxnorm.inspect.drift({"norm": state}, {"norm": reference}))
      {'norm/mean_drift': Array(0.5, dtype=float32), 'norm/std_drift': Array(0.5, dtype=float32)}

    References:
      Wu & Johnson, Rethinking "Batch" in BatchNorm, 2021, section 3, on the difference between
      population and batch statistics. https://arxiv.org/abs/2105.07576
    """
    found = {}
    tiny = jnp.finfo(jnp.float32).tiny  # a channel that is dead in both has drift 0, not 0 / 0
    for name, a, b in _pairs("drift", batch_stats, reference):
        off = (a["mean"] - b["mean"]) ** 2 / (b["var"] + tiny)
        wide = (jnp.sqrt((a["var"] + tiny) / (b["var"] + tiny)) - 1) ** 2
        for key, squares in (("mean_drift", off), ("std_drift", wide)):
            found[f"{name}/{key}" if name else key] = jnp.sqrt(jnp.mean(squares))
    return found


def plot_layers(
    running: Any, batch: Any, *, names: tuple[str, str] = ("running", "batch")
) -> Figure:
    """Plots two sets of statistics, mean plus and minus std per channel, in one panel per norm.

    Args:
      running: as in `flat`, with concrete values.
      batch: the statistics of the same norms over other data or at another time.
      names: the names of the two in the legend.

    Returns:
      A matplotlib figure. The channels of each panel are sorted by their running means.

    Raises:
      ValueError: in the same cases as `drift`.

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
    """Plots the drift of each norm's running statistics over the steps.

    Args:
      history: maps each step to the state after it (as in `flat`, with concrete values). It must
        contain at least two steps.
      reference: the state that the drift is measured from. Defaults to the last state.

    Returns:
      A matplotlib figure with the two numbers of `drift` over the steps, and one line per norm.

    Raises:
      ValueError: if there are fewer than two steps, and in the same cases as `drift`.

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
    """The state of every norm, by its path in batch_stats."""
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
    """The name of each norm with its states in both trees."""
    first, second = _norms(function, a), _norms(function, b)
    if first.keys() != second.keys():
        raise ValueError(
            f"{function}: both should hold the same norms, but only one holds "
            f"{', '.join(sorted(first.keys() ^ second.keys()))}"
        )
    return [(name, first[name], second[name]) for name in first]


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, Any]:
    # Imported here because only plots need matplotlib. pyplot would keep every figure in memory.
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained", dpi=110)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels
