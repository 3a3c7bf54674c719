"""Plots of running statistics."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxnorm._core.arguments import positive_int
from jaxnorm.inspect._numbers import concrete, distances, in_order, matched, norms
from jaxnorm.inspect._summary import NormSummary, norm_summary, worst_first

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS_IN_A_ROW = 4
DRIFT_TITLES = (
    "mean: distance in standard deviations",
    "standard deviation: distance as a ratio - 1",
)
MOST_BARS = 64  # the bars of more channels would merge
FIRST, SECOND, OTHERS, NUMBERED = "#1f77b4", "#e6842a", "#b5b5b5", "#333333"
MOST = 1e4  # the upper end of the axes for drift
LEAST = 1e-3  # the lower end of the axis for standard deviations
# matplotlib's tab10 without its gray, which is the color of the norms that are not named.
COLORS = ("C0", "C1", "C2", "C3", "C4", "C5", "C6", "C8", "C9")


def plot_layers(
    running: Any,
    batch: Any = None,
    *,
    names: tuple[str, str] = ("running", "batch"),
    worst: int | None = 16,
) -> Figure:
    """Plots statistics, mean plus and minus std per channel, in one panel per norm.

    Args:
      running: as in `flat`, with concrete values.
      batch: the statistics of the same norms over other data or at another time. Defaults to None,
        which draws the running statistics alone.
      names: the names of the two in the legend.
      worst: the largest number of panels. If there are more norms, the worst norms are drawn, with
        the worst one first: those with the largest sum of the two numbers of `drift` or, if batch
        is None, those that `summary` lists first with `worst`. An overview above the panels shows
        all norms, and marks these. None draws a panel for every norm.

    Returns:
      A matplotlib figure. The channels of each panel are sorted by their running means, and the
      numbers of channels that are not finite or dead, as in `summary`, are written into the panel.
      Long names are abbreviated from the left.

    Raises:
      ValueError: in the same cases as `drift`, if values are traced, or if worst is not a positive
        int.

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
    states = norms("plot_layers", running)
    others = None if batch is None else norms("plot_layers", batch)
    concrete("plot_layers", states)
    concrete("plot_layers", others or {})
    order = in_order(states)
    rows = {name: norm_summary(name, states[name]) for name in order}
    ranked, drifts = [row.path for row in worst_first(tuple(rows.values()))], {}
    if others is not None:
        for name, state, other in matched("plot_layers", states, others):
            drifts[name] = float(sum(distances(state, other).values()))
        ranked = _largest_first(order, drifts)
    limit = _limit("plot_layers", worst, len(order), "it counts panels")
    chosen = ranked[:limit] if limit < len(order) else order
    lines, above = math.ceil(len(chosen) / PANELS_IN_A_ROW), int(len(chosen) < len(order))
    columns = math.ceil(len(chosen) / lines)
    figure = _figure((1 + 2.8 * columns, 0.5 + 2.2 * lines + 2.6 * above))
    grid = figure.add_gridspec(lines + above, columns, height_ratios=[1.2] * above + [1] * lines)
    numbered = enumerate(_abbreviated(chosen, order, 34).values(), 1)
    titles = [f"{number}. {title}" if above else title for number, title in numbered]

    def draw(axes: Any, i: int) -> None:
        state, other = states[chosen[i]], others and others[chosen[i]]
        _draw_layer(axes, state, other, names, rows[chosen[i]])

    places = [grid[above + i // columns, i % columns] for i in range(len(chosen))]
    _draw_panels(figure, places, titles, draw)
    if above:
        chart = _axes(figure, grid[0, :])
        title = _overview_title(names, alone=others is None)
        chart.set_title(f"{title}; numbered: the worst {len(chosen)} of {len(order)} norms", size=9)
        _draw_overview(chart, list(rows.values()), drifts, [order.index(name) for name in chosen])
    return figure


def _limit(function: str, worst: int | None, number: int, why: str) -> int:
    """Returns how many of a number of norms are drawn or named."""
    return number if worst is None else positive_int(function, "worst", worst, why)


def _overview_title(names: tuple[str, str], *, alone: bool) -> str:
    """Returns what the overview shows of each norm."""
    if alone:
        return "std of the channels, from the smallest to the largest"
    return f"drift of {names[0]} from {names[1]}, mean and std added"


def _draw_panels(
    figure: Figure,
    places: Sequence[Any],
    titles: Sequence[str],
    draw: Callable[[Any, int], None],
) -> None:
    """Draws the layers into their places of a grid, with the legend of all below."""
    columns = places[0].get_gridspec().ncols
    for i, (place, title) in enumerate(zip(places, titles, strict=True)):
        axes = _axes(figure, place)
        draw(axes, i)
        axes.set_title(title, size=8)
        if i + columns >= len(places):
            axes.set_xlabel("channel, by running mean")
        if i % columns == 0:
            axes.set_ylabel("mean ± std")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=2, frameon=False, markerscale=2
    )


def plot_drift(
    history: Mapping[int, Any], reference: Any = None, *, worst: int | None = 8
) -> Figure:
    """Plots the drift of each norm's running statistics over the steps.

    Args:
      history: maps each step to the state after it (as in `flat`, with concrete values). It must
        contain at least two steps.
      reference: the state that the drift is measured from. Defaults to the last state.
      worst: the largest number of norms in color and in the legend. If there are more norms, these
        are the norms with the largest sum of the two numbers, averaged over the steps, with the
        worst one first; the others are thin gray lines. None names every norm.

    Returns:
      A matplotlib figure with the two numbers of `drift` over the steps, and one line per norm.
      Each named norm has a color of its own, and long names are abbreviated from the left. The
      vertical axes are logarithmic above 1 if the drift exceeds 30, and end at 10,000; the legend
      notes a drift that is larger or not finite.

    Raises:
      ValueError: if there are fewer than two steps, if values are traced, if worst is not a
        positive int, and in the same cases as `drift`.

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
            f"statistics change, but holds {len(history)}"
        )
    steps = sorted(history)
    apart = _drift_over_steps([history[step] for step in steps], reference)
    order = in_order(apart)
    limit = _limit("plot_drift", worst, len(order), "it counts norms")
    named = order
    if limit < len(order):
        named = _largest_first(order, {k: sum(v.mean(1)) for k, v in apart.items()})[:limit]
    colors = dict(zip(named, _distinct_colors(len(named)), strict=True))
    labels = _abbreviated(named, order, 40)
    texts = [labels[name] + _note(apart[name]) for name in named]
    if len(named) < len(order):
        texts.append(f"{len(order) - len(named)} other norms")
    columns = max(1, min(4, 150 // (9 + max(map(len, texts)))))  # what fits below the panels
    figure = _figure((10, 3.5 + 0.2 * math.ceil(len(texts) / columns)))
    styles: dict[str, Any] = {
        name: {"color": OTHERS, "lw": 0.5, "zorder": 1, "label": "_"} for name in order
    }
    for k, name in enumerate(named):  # the worst one is on top
        above = 3 - k / len(named)
        styles[name] = {"color": colors[name], "lw": 1.4, "zorder": above, "label": labels[name]}
    _draw_drift(figure, steps, apart, styles)
    lines = dict(zip(order, figure.axes[0].lines, strict=True))
    gray = [name for name in order if name not in colors]
    figure.legend(
        [lines[name] for name in [*named, *gray[:1]]],
        texts,
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=8,
    )
    return figure


def _draw_drift(
    figure: Figure,
    steps: Sequence[int],
    apart: Mapping[str, np.ndarray],
    styles: Mapping[str, Mapping[str, Any]],
) -> None:
    """Draws the two numbers of `drift` over the steps, with a line for each style."""
    grid = figure.add_gridspec(1, 2)
    for i, title in enumerate(DRIFT_TITLES):
        axes = _axes(figure, grid[0, i])
        for name, style in styles.items():
            axes.plot(steps, apart[name][i], **style)
        axes.set(title=title, xlabel="step")
        _scale(axes, np.concatenate([apart[name][i] for name in styles]))


def _note(numbers: np.ndarray) -> str:
    """Returns what the lines of a norm cannot show."""
    if np.any(np.isnan(numbers)):
        return " (not finite)"
    return f" (up to {np.max(numbers):.0e})" if np.max(numbers) > MOST else ""


def _largest_first(order: list[str], values: Mapping[str, float]) -> list[str]:
    """Returns the names by descending value; values that are not finite come first."""
    finite = {name: v if math.isfinite(v) else math.inf for name, v in values.items()}
    return sorted(order, key=lambda name: -finite[name])


def _drift_over_steps(states: Sequence[Any], reference: Any) -> dict[str, np.ndarray]:
    """Returns for each norm an array of shape (2, steps) with the two numbers of `drift`."""
    found = [norms("plot_drift", state) for state in states]
    last = found[-1] if reference is None else norms("plot_drift", reference)
    for state in (*found, last):
        concrete("plot_drift", state)
        matched("plot_drift", state, last)
    drifts = {}
    for name, to in last.items():
        over_steps = {k: np.stack([state[name][k] for state in found]) for k in ("mean", "var")}
        # Broadcast here, because XLA would multiply by the reciprocal of a broadcast divisor.
        same = {k: np.broadcast_to(to[k], over_steps[k].shape) for k in over_steps}
        numbers = jax.vmap(distances)(over_steps, same)
        drifts[name] = np.stack([numbers["mean_drift"], numbers["std_drift"]])
    return drifts


def _draw_layer(
    axes: Axes, state: Any, other: Any, names: tuple[str, str], row: NormSummary
) -> None:
    """Draws one norm: a line in a band, and points with bars or a band for the other state."""
    mean, std = _mean_std(state)
    order = np.argsort(mean)
    channels = np.arange(len(order))
    mean, std = mean[order], std[order]
    if len(order) == 1:  # a line and a band of one point are invisible
        axes.errorbar(channels, mean, std, fmt="s", ms=5, capsize=4, color=FIRST)
    axes.fill_between(channels, mean - std, mean + std, color=FIRST, alpha=0.25, lw=0)
    axes.plot(channels, mean, color=FIRST, label=names[0], zorder=3)
    if other is not None:
        mean, std = (a[order] for a in _mean_std(other))
        if len(order) <= MOST_BARS:
            axes.errorbar(channels, mean, std, fmt="o", ms=3, lw=0.8, color=SECOND, label=names[1])
        else:
            ms = max(0.6, min(1.5, 400 / len(order)))
            axes.fill_between(channels, mean - std, mean + std, color=SECOND, alpha=0.25, lw=0)
            axes.plot(channels, mean, "o", ms=ms, color=SECOND, label=names[1])
    problems = {"not finite": row.nonfinite, "dead": row.dead}
    text = ", ".join(f"{number} {problem}" for problem, number in problems.items() if number)
    axes.text(0.03, 0.97, text, color="#c0161d", size=8, va="top", transform=axes.transAxes)
    axes.locator_params(axis="x", integer=True)


def _draw_overview(
    axes: Axes, rows: Sequence[NormSummary], drifts: Mapping[str, float], chosen: list[int]
) -> None:
    """Draws one bar per norm in the order of the model, and numbers the chosen ones.

    Each bar is the drift of the norm or, without drifts, the range of its standard deviations.
    """
    low = np.array([0.0 if drifts else row.std_min for row in rows])
    high = np.array([drifts.get(row.path, row.std_max) for row in rows])
    # Bars that are not finite are the longest.
    most = np.max(high, initial=0, where=high <= MOST) or 1.0
    high = np.where(high <= most, high, 1.2 * most)
    if np.any(low != 0):
        axes.set_yscale("log")
        # Bars of dead channels end at the bottom.
        low, high = np.maximum(np.nan_to_num(low), LEAST), np.maximum(high, LEAST)
    elif most > 30:
        axes.set_yscale("symlog", linthresh=1)
    color = [OTHERS] * len(high)
    for rank, i in enumerate(chosen, 1):
        color[i] = NUMBERED
        where: Any = {"xytext": (0, 2), "textcoords": "offset points", "ha": "center"}
        axes.annotate(str(rank), (i, high[i]), size=7, **where)
    axes.vlines(np.arange(len(high)), low, high, color=color, lw=1.5)
    axes.plot(chosen, high[chosen], "o", ms=2, color=NUMBERED)
    axes.set_xlabel("norm, in the order of the model")
    axes.margins(x=0.01, y=0.1)
    axes.locator_params(axis="x", integer=True)


def _mean_std(state: Any) -> tuple[np.ndarray, np.ndarray]:
    mean, var = (np.ravel(np.asarray(state[key])).astype(float) for key in ("mean", "var"))
    with np.errstate(invalid="ignore"):  # a negative variance is drawn as a gap
        return mean, np.sqrt(var)


def _abbreviated(names: Sequence[str], among: Sequence[str], width: int) -> dict[str, str]:
    """Returns the names, cut from the left to what fits the width and still tells them apart."""
    short = {}
    for name in names:
        parts = name.split("/")
        ends = ["/".join(parts[i:]) for i in reversed(range(len(parts)))]
        told_apart = [
            end
            for end in ends
            if end == name or sum(f"/{other}".endswith(f"/{end}") for other in among) == 1
        ]
        end = [told_apart[0], *(e for e in told_apart if len(e) <= width)][-1]
        cut = "" if end == name else "…/"
        short[name] = cut + end if len(end) <= width else f"…{end[-width:]}"
    return {name: text or "norm" for name, text in short.items()}


def _distinct_colors(number: int) -> list[Any]:
    """Colors of which no two are equal."""
    if number <= len(COLORS):
        return list(COLORS[:number])
    from matplotlib import colormaps

    return list(colormaps["turbo"](np.linspace(0.03, 0.97, number)))


def _scale(axes: Axes, values: np.ndarray) -> None:
    """Scales the vertical axis so that a few huge values do not hide the others."""
    most = np.max(values, initial=0, where=np.isfinite(values))
    if most > 30:
        axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(0, MOST if most > MOST else None)


def _figure(size: tuple[float, float]) -> Figure:
    # Imported here because only plots need matplotlib. pyplot would keep every figure in memory.
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained", dpi=110)


def _axes(figure: Figure, place: Any) -> Axes:
    axes = figure.add_subplot(place)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return axes
