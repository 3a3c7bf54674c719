"""A table of the running statistics of a model, with one row per norm."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxnorm._core.arguments import number, positive_int
from jaxnorm.inspect._numbers import concrete, extremes, in_order, norms

HEADER = ("norm", "channels", "count", "mean min", "max", "std min", "max", "not finite", "dead")
EPSILON = 1e-5  # the default of the norms


@dataclasses.dataclass(frozen=True)
class NormSummary:
    """The numbers of one norm.

    Attributes:
      path: the name of the norm as in `flat`, such as "block/BatchNorm_0". It is empty for a
        state that is not in a tree.
      channels: the number of channels.
      count: the number of updates; the largest if a norm has several counts, and None if it has no
        count.
      mean_min: the smallest mean of the channels, in units of x.
      mean_max: the largest mean.
      std_min: the smallest standard deviation of the channels, in units of x.
      std_max: the largest standard deviation.
      nonfinite: the number of channels whose mean or standard deviation is not finite, which
        includes those with a negative variance. The extremes and `dead` leave these channels out.
        The extremes are NaN if no channel remains.
      dead: the number of channels whose variance is at most epsilon.

    Example:
      >>> import jaxnorm
      >>> import jaxnorm.inspect
      >>> (row,) = jaxnorm.inspect.summary({"norm": jaxnorm.init_batch_stats(4)})
      >>> row.path, row.channels, row.std_min
      ('norm', 4, 1.0)

    References:
      dataclasses.asdict, which makes a dict of a row; pandas.DataFrame takes a list of rows.
    """

    path: str
    channels: int
    count: float | None
    mean_min: float
    mean_max: float
    std_min: float
    std_max: float
    nonfinite: int
    dead: int


@dataclasses.dataclass(frozen=True, repr=False)
class Summary:
    """The summary of a model: an iterable of rows that prints as a table.

    Attributes:
      norms: the numbers of every norm, in the order of the model.
      rows: the numbers of the norms that the table lists: all in the order of the model, or the
        worst ones. Iterating over the summary gives these rows.
      epsilon: the variance up to which a channel is counted as dead.

    Example:
      >>> import jaxnorm
      >>> import jaxnorm.inspect
      >>> state = {"a": jaxnorm.init_batch_stats(4), "b": jaxnorm.init_batch_stats(2)}
      >>> summary = jaxnorm.inspect.summary(state)
      >>> [(row.path, row.channels) for row in summary]
      [('a', 4), ('b', 2)]

    References:
      jaxnorm.inspect.summary, which returns it.
    """

    norms: tuple[NormSummary, ...]
    rows: tuple[NormSummary, ...]
    epsilon: float

    def __iter__(self) -> Iterator[NormSummary]:
        """Iterates over the rows."""
        return iter(self.rows)

    def __len__(self) -> int:
        """Returns the number of rows."""
        return len(self.rows)

    def __str__(self) -> str:
        """Returns the table, with the totals of all norms below it."""
        lines = [HEADER, *map(_cells, self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = [
            "  ".join(
                [cells[0].ljust(widths[0])]
                + [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
            )
            for cells in lines
        ]
        if len(self.rows) < len(self.norms):
            table.append(f"Listed: the worst {len(self.rows)} of {len(self.norms)} norms.")
        return "\n".join([*table, self._totals()])

    def __repr__(self) -> str:
        """Returns the table, so that a notebook displays it."""
        return str(self)

    def _totals(self) -> str:
        channels, nonfinite, dead = (
            sum(getattr(row, field) for row in self.norms)
            for field in ("channels", "nonfinite", "dead")
        )
        norms = f"{len(self.norms)} norm{'s' * (len(self.norms) != 1)}"
        return (
            f"Total: {norms}, {channels:,} channels, {nonfinite:,} not finite, {dead:,} dead "
            f"(variance <= {self.epsilon:g})."
        )


def summary(batch_stats: Any, *, worst: int | None = None, epsilon: float = EPSILON) -> Summary:
    """Summarizes the running statistics of a model in a table with one row per norm.

    Args:
      batch_stats: as in `flat`, with concrete values, so do not call this under jit.
      worst: the number of norms to list, with the worst one first. The norms are ordered by the
        share of channels that are not finite, then by the share that is dead, and then by the
        standard deviation that is furthest from 1 as a factor. Defaults to None, which lists all
        norms in the order of the model.
      epsilon: the epsilon of the norms. A channel is dead if its variance is at most epsilon,
        because the norm then divides mainly by the square root of epsilon.

    Returns:
      A `Summary`. `print` it for the table; iterate over it for the rows, which are dataclasses.

    Raises:
      ValueError: if there are no running statistics, if values are traced, or if worst is not a
        positive int.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxnorm.inspect
      >>> state = {"mean": jnp.array([-1.0, 2.0]), "var": jnp.array([0.0, 9.0]), "count": 7}
      >>> print(jaxnorm.inspect.summary({"block": {"norm": state}}))
      norm        channels  count  mean min  max  std min  max  not finite  dead
      block/norm         2      7        -1    2        0    3           0     1
      Total: 1 norm, 2 channels, 0 not finite, 1 dead (variance <= 1e-05).

    References:
      torchinfo.summary and flax.linen.tabulate, which summarize the parameters of a model.
    """
    epsilon = number("summary", "epsilon", epsilon, 0.0)
    if worst is not None:
        worst = positive_int("summary", "worst", worst, "it is the number of norms to list")
    found = norms("summary", batch_stats)
    concrete("summary", found)
    rows = tuple(norm_summary(path, found[path], epsilon) for path in in_order(found))
    listed = rows if worst is None else tuple(worst_first(rows)[:worst])
    return Summary(rows, listed, float(epsilon))


def norm_summary(path: str, state: Any, epsilon: float = EPSILON) -> NormSummary:
    """Returns the numbers of the norm with this state."""
    mean, var = (np.ravel(np.asarray(state[key])) for key in ("mean", "var"))
    finite = np.isfinite(mean) & np.isfinite(var) & (var >= 0)
    ends = dict.fromkeys(("mean_min", "mean_max", "std_min", "std_max"), math.nan)
    if finite.any():
        ends = {k: float(v) for k, v in extremes(mean[finite], var[finite]).items()}
    return NormSummary(
        path,
        mean.size,
        np.max(np.asarray(state["count"])).item() if "count" in state else None,
        **ends,
        nonfinite=int(np.sum(~finite)),
        dead=int(np.sum(var[finite] <= epsilon)),
    )


def worst_first(rows: tuple[NormSummary, ...]) -> list[NormSummary]:
    """Returns the rows in the order that `summary` documents for `worst`."""

    def badness(row: NormSummary) -> tuple[float, float, float]:
        channels = max(row.channels, 1)
        stds = (row.std_min, row.std_max)
        factors = [abs(math.log(std)) if std > 0 else math.inf for std in stds if std >= 0]
        return row.nonfinite / channels, row.dead / channels, max(factors, default=math.inf)

    return sorted(rows, key=badness, reverse=True)


def _cells(row: NormSummary) -> tuple[str, ...]:
    return (
        row.path or "norm",
        f"{row.channels}",
        "" if row.count is None else f"{row.count}",
        *(f"{x:.3g}" for x in (row.mean_min, row.mean_max, row.std_min, row.std_max)),
        f"{row.nonfinite}",
        f"{row.dead}",
    )
