"""The update of running statistics by the moments of a batch."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxnorm._core import arguments, checks
from jaxnorm._core.collectives import LOCAL, MappedAxes, sharded_like
from jaxnorm._core.moments import (
    Moments,
    about_mean,
    interpolate,
    merge,
    pool,
    pool_devices,
    unshift,
)
from jaxnorm._core.sample import widen
from jaxnorm._core.variables import BatchStats, statistics_dtype


def update_batch_stats(
    batch_stats: BatchStats,
    moments: Moments,
    *,
    momentum: ArrayLike | None = 0.1,
    skip_nonfinite: bool = True,
) -> BatchStats:
    """Moves running statistics by the moments of a batch.

    .. math::
        mean \\leftarrow (1 - m)\\, mean + m\\, mean_{batch}, \\quad
        var \\leftarrow (1 - m)\\, var + m\\, var_{batch} \\tfrac{n}{n - 1}

    The momentum m weighs the new value, as in PyTorch; what is stored is the unbiased variance. A
    channel whose sample has fewer than two entries keeps its state, and so, by default, does one
    whose moments are not finite; the count moves when at least one channel has moved. With
    momentum=None every batch weighs the same, m = 1 / count; a batch that would skip any channel
    then moves nothing, because one count cannot weigh channels that have seen different batches.
    Nothing here has a gradient.

    Args:
      batch_stats: the state, with mean and var of shape (C,) and count of shape ().
      moments: the batch's moments, with fields of shape (C,), or (N, C) with one row a sample: the
        rows' means and unbiased variances are then averaged first, as instance norm does.
      momentum: how much the new value weighs, a float or None for the cumulative average.
      skip_nonfinite: whether a channel with NaN or Inf in its moments keeps its state.

    Returns:
      The new state, in new arrays. It keeps the dtypes of the given one, except that half
      precision is widened to float32.

    Raises:
      ValueError: if batch_stats lacks a key, or its shapes and those of the moments disagree.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxnorm
      >>> m = jaxnorm.moments(jnp.array([[1.0], [3.0]]), axis=0)
      >>> new = jaxnorm.update_batch_stats(jaxnorm.init_batch_stats(1), m)
      >>> print(new["mean"], new["var"], new["count"])
      [0.2] [1.1] 1

    References:
      torch.nn.BatchNorm2d, PyTorch 2.13.
    """
    function = "update_batch_stats"
    batch_stats = checks.batch_stats(function, batch_stats)
    update = Update.checked(function, momentum, skip_nonfinite)
    if not isinstance(moments, Moments):
        raise ValueError(
            f"{function}: moments should be Moments, as `moments` returns them, but is "
            f"{type(moments).__name__}"
        )
    checks.moments_shape(function, jnp.shape(moments.mean), batch_stats["mean"].shape)
    has_rows = jnp.ndim(moments.mean) > batch_stats["mean"].ndim
    rows = moments if has_rows else jax.tree.map(lambda a: a[None], moments)
    return update_running_stats(batch_stats, rows, update, between=not has_rows)


def merge_batch_stats(
    stacked: BatchStats, counts: ArrayLike | None = None, *, between: bool = True
) -> BatchStats:
    r"""Merges the states of replicas, hosts, ensemble members or federated clients into one.

    .. math::
        mean = \sum_k w_k\, mean_k, \quad
        var = \sum_k w_k\, (var_k + (mean_k - mean)^2), \quad w_k = n_k / \textstyle\sum_j n_j

    Averaging variances alone loses the variance between the replicas: of two shards with means 0
    and 4 and variances 1 it says 1 where the truth is 5.

    Args:
      stacked: the states with a leading axis, one entry a replica: mean and var of shape (K, C),
        count of shape (K,).
      counts: how much each replica weighs, of shape (K,), such as how many entries or samples it
        has seen; None: each state's own count. Where all are 0, all weigh the same.
      between: True for batch norm: the variance between the replicas is added (the law of total
        variance). False for instance norm, whose variance is within each sample: plain averages.

    Returns:
      One state; its count is the sum of the counts, and at most the largest int32.

    Raises:
      ValueError: if stacked lacks a key, its shapes disagree, or counts is not of shape (K,).

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxnorm
      >>> stacked = {"mean": jnp.array([[0.0], [4.0]]), "var": jnp.array([[1.0], [1.0]]),
      ...            "count": jnp.array([5, 5])}
      >>> merged = jaxnorm.merge_batch_stats(stacked)
      >>> print(merged["mean"], merged["var"], merged["count"])
      [2.] [5.] 10

    References:
      Chan, Golub & LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample
      Variances, 1979.
    """
    stacked = checks.stacked_batch_stats("merge_batch_stats", stacked)
    between = arguments.boolean("merge_batch_stats", "between", between)
    mean, var, count = lax.stop_gradient([stacked[k] for k in ("mean", "var", "count")])
    weights = count if counts is None else checks.weights("merge_batch_stats", counts, count.shape)
    weights = weights.astype(widen(mean).dtype)
    weights = jnp.where(jnp.any(weights > 0), weights, jnp.ones_like(weights))
    weights = weights / jnp.sum(weights)
    n = jnp.broadcast_to(weights.reshape(-1, *(1,) * (mean.ndim - 1)), mean.shape)
    # What weighs nothing is left out before arithmetic, be it NaN.
    mean, var = (jnp.where(n > 0, widen(a), 0) for a in (mean, var))
    rows = Moments(n, mean, var)
    merged = unshift(*pool(mean, about_mean(rows), between=between))
    most = jnp.iinfo(count.dtype).max
    return {
        "mean": merged.mean,
        "var": merged.var,
        "count": lax.reduce(
            count, jnp.zeros((), count.dtype), lambda a, b: a + jnp.minimum(b, most - a), (0,)
        ),
    }


@dataclasses.dataclass(frozen=True)
class Update:
    """How running statistics move.

    Attributes:
      momentum: how much the new value weighs; None is the cumulative average.
      skip_nonfinite: whether a channel with NaN or Inf in its moments keeps its state.
    """

    momentum: ArrayLike | None
    skip_nonfinite: bool

    @classmethod
    def checked(cls, function: str, momentum: Any, skip_nonfinite: Any) -> "Update":
        """An update with the arguments of a public function."""
        if momentum is not None:
            momentum = arguments.number(function, "momentum", momentum)
        return cls(momentum, arguments.boolean(function, "skip_nonfinite", skip_nonfinite))


def update_running_stats(
    batch_stats: BatchStats,
    rows: Moments,
    update: Update,
    *,
    between: bool,
    mapped_axes: MappedAxes = LOCAL,
) -> BatchStats:
    """Moves the state once, by rows of moments; other devices may hold more rows.

    The rows are parts of one sample, to be pooled with what is between them (batch norm), or
    samples of their own, to be averaged (instance norm). A state that accumulates moves anew from
    where it began, by all that it has seen since.
    """
    stats, rows = lax.stop_gradient((batch_stats, rows))
    batch = _pooled(rows, mapped_axes) if between else _averaged(rows, mapped_axes)
    accumulation = stats.get("accumulation")
    if accumulation is None:
        return _moved(stats, batch, update, between)
    seen = Moments(**accumulation["moments"])
    batch = jax.tree.map(sharded_like, batch, seen)
    batch = jax.tree.map(
        lambda new, old: new.astype(old.dtype), merge(seen, batch, between=between), seen
    )
    update = dataclasses.replace(update, momentum=accumulation.get("momentum", update.momentum))
    moved = _moved(accumulation["start"], batch, update, between)
    moments = {"count": batch.count, "mean": batch.mean, "var": batch.var}
    moved["accumulation"] = {**accumulation, "moments": moments}
    return moved


def _moved(stats: BatchStats, batch: Moments, update: Update, between: bool) -> BatchStats:
    """The state after one step towards the batch; its sharding stays the same."""
    batch = jax.tree.map(lambda a: sharded_like(a, stats["mean"]), batch)
    # A sample of fewer than two entries has no unbiased variance; averages are of unbiased ones.
    enough = batch.count > (1 if between else 0)
    correction = batch.count / jnp.maximum(batch.count - 1, 1) if between else 1
    mean, var = batch.mean, batch.var * correction
    moves = enough
    if update.skip_nonfinite:
        moves &= jnp.isfinite(mean) & jnp.isfinite(var)
    momentum = update.momentum
    if momentum is None:  # the count is the weight: either every channel moves or none
        momentum = 1 / (stats["count"].astype(mean.dtype) + 1)
        moves = jnp.broadcast_to(jnp.all(moves), moves.shape)

    def step(old: jax.Array, new: jax.Array) -> jax.Array:
        old, new = widen(old, new), widen(new, old)
        m = jnp.asarray(momentum).astype(old.dtype)
        return jnp.where(moves, interpolate(old, new, m), old)

    count = stats["count"]
    # One reduction, whose result is the new count itself: any(moves) would be a kernel more.
    after = count + (count < jnp.iinfo(count.dtype).max).astype(count.dtype)
    after = jnp.where(moves, after, count)
    return {
        "mean": step(stats["mean"], mean).astype(statistics_dtype(stats["mean"].dtype)),
        "var": step(stats["var"], var).astype(statistics_dtype(stats["var"].dtype)),
        "count": jnp.max(after) if moves.size else count,
    }


def _pooled(rows: Moments, mapped_axes: MappedAxes) -> Moments:
    """The moments of the sample that the rows are parts of."""
    if rows.mean.shape[0] == 1 and mapped_axes.axis_name is None:
        return Moments(rows.count[0], rows.mean[0], rows.var[0])
    return unshift(*pool_devices(mapped_axes, *pool(rows.mean, about_mean(rows))))


def _averaged(rows: Moments, mapped_axes: MappedAxes) -> Moments:
    """How many samples count, and the mean over them of their means and unbiased variances.

    A sample of fewer than two entries has no unbiased variance; it does not count.
    """
    unbiased = rows.var * (rows.count / jnp.maximum(rows.count - 1, 1))
    stacked = jnp.stack([jnp.ones_like(unbiased), rows.mean, unbiased])
    sums = jnp.sum(jnp.where(rows.count > 1, stacked, jnp.zeros_like(stacked)), axis=1)
    samples, mean, var = mapped_axes.sum(*sums)
    n = jnp.maximum(samples, 1)
    return Moments(samples, mean / n, var / n)
