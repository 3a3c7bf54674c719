"""Plots of running statistics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxnorm.inspect._numbers import drift, pairs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS_IN_A_ROW = 4


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
    both = list(pairs("plot_layers", running, batch))
    columns = min(PANELS_IN_A_ROW, len(both))
    rows = math.ceil(len(both) / columns)
    figure, panels = _figure(rows, columns, (1 + 2.8 * columns, 0.5 + 2.2 * rows))
    for axes, (name, *states) in zip(panels, both, strict=False):
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
    for axes in panels[len(both) :]:
        axes.set_visible(False)
    for axes in panels[max(0, len(both) - columns) : len(both)]:
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


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, Any]:
    # Imported here because only plots need matplotlib. pyplot would keep every figure in memory.
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained", dpi=110)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels
