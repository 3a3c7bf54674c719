"""The update of running statistics by the moments of a batch."""

import dataclasses
import functools
from typing import cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxnorm._core import arguments
from jaxnorm._core.collectives import LOCAL, MappedAxes, sharded_like
from jaxnorm._core.moments import (
    Moments,
    about_mean,
    check_moments,
    interpolate,
    merge,
    pool,
    pool_devices,
    unshift,
)
from jaxnorm._core.reduction import widen
from jaxnorm._core.variables import BatchStats, statistics_dtype
from jaxnorm._stats import state_checks


def update_batch_stats(
    batch_stats: BatchStats,
    moments: Moments,
    *,
    momentum: ArrayLike | None = 0.1,
    skip_nonfinite: bool = True,
) -> BatchStats:
    """Updates running statistics with the moments of a batch.

    .. math::
        mean \\leftarrow (1 - m)\\, mean + m\\, mean_{batch}, \\quad
        var \\leftarrow (1 - m)\\, var + m\\, var_{batch} \\tfrac{n}{n - 1}

    The momentum m is the weight of the new value, as in PyTorch, and the stored variance is
    unbiased. A channel keeps its state if it has fewer than two entries in the batch (with one row
    per sample, if every sample has fewer than two) or, by default, if its moments are not finite.
    The count is incremented if at least one channel is updated.

    With momentum=None, all batches have the same weight: m = 1 / (count + 1), where count is the
    count of the input state. If any channel would be skipped, no channel is updated, because the
    single count would be wrong for some channels.

    The result has no gradient.

    Args:
      batch_stats: the state, with mean and var of shape (C,) and count of shape ().
      moments: the moments of the batch, with fields of shape (C,), or of shape (N, C) with one row
        per sample. The means and unbiased variances of the rows are averaged, as in instance norm.
      momentum: weight of the new value. Defaults to 0.1. None weighs all batches equally
        (cumulative average).
      skip_nonfinite: whether a channel with NaN or Inf in its moments keeps its state.

    Returns:
      The new state, in new arrays. The dtypes are those of the input state, except that half
      precision is widened to float32.

    Raises:
      ValueError: if batch_stats lacks a key; if moments is not Moments, or a field does not have a
        float dtype; if the shapes do not match; if momentum is not a finite number.

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
    batch_stats = state_checks.batch_stats(function, batch_stats)
    if momentum is not None:
        momentum = arguments.number(function, "momentum", momentum)
    skip_nonfinite = arguments.boolean(function, "skip_nonfinite", skip_nonfinite)
    check_moments(function, "moments", moments)
    state_checks.moments_shape(function, jnp.shape(moments.mean), batch_stats["mean"].shape)
    has_rows = jnp.ndim(moments.mean) > batch_stats["mean"].ndim
    rows = moments if has_rows else jax.tree.map(lambda a: a[None], moments)
    update = Update(momentum, skip_nonfinite)
    return update_running_stats(batch_stats, rows, update, between=not has_rows)


def merge_batch_stats(
    stacked: BatchStats, counts: ArrayLike | None = None, *, between: bool = True
) -> BatchStats:
    r"""Merges the states of replicas, hosts, ensemble members or federated clients into one.

    .. math::
        mean = \sum_k w_k\, mean_k, \quad
        var = \sum_k w_k\, (var_k + (mean_k - mean)^2), \quad w_k = n_k / \textstyle\sum_j n_j

    Averaging only the variances ignores the variance between the replicas: for two shards with
    means 0 and 4 and variance 1, the result would be 1, but the variance of all data is 5.

    Args:
      stacked: the states with a leading axis, one entry per replica: mean and var of shape (K, C),
        count of shape (K,).
      counts: the weight of each replica, of shape (K,), such as the number of entries or samples
        that it has seen. None uses the counts of the states. If all are 0, all have the same
        weight.
      between: whether to add the variance between the replicas (law of total variance). Use True
        for batch norm. Use False for instance norm, whose variance is computed within each sample;
        the variances are then averaged.

    Returns:
      One state. Its count is the sum of the counts, and at most the largest int32.

    Raises:
      ValueError: if stacked lacks a key, its shapes disagree, the shape of counts is not (K,), or
        an entry of counts is negative.

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
    stacked = state_checks.stacked_batch_stats("merge_batch_stats", stacked)
    between = arguments.boolean("merge_batch_stats", "between", between)
    mean, var, count = lax.stop_gradient([stacked[k] for k in ("mean", "var", "count")])
    weights = (
        count if counts is None else state_checks.weights("merge_batch_stats", counts, count.shape)
    )
    weights = weights.astype(widen(mean).dtype)
    weights = jnp.where(jnp.any(weights > 0), weights, jnp.ones_like(weights))
    weights = weights / jnp.sum(weights)
    n = jnp.broadcast_to(weights.reshape(-1, *(1,) * (mean.ndim - 1)), mean.shape)
    # Entries of weight 0 may be NaN, so they are replaced before the arithmetic.
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
    """The rule by which running statistics are updated.

    Attributes:
      momentum: weight of the new value; None is the cumulative average.
      skip_nonfinite: whether a channel with NaN or Inf in its moments keeps its state.
    """

    momentum: ArrayLike | None
    skip_nonfinite: bool


def update_running_stats(
    batch_stats: BatchStats,
    rows: Moments,
    update: Update,
    *,
    between: bool,
    mapped_axes: MappedAxes = LOCAL,
) -> BatchStats:
    """Updates the state once, by rows of moments; other devices may hold more rows.

    Each row has the moments of a part of the batch, or of a sample. With `between` (batch norm),
    the rows are parts of one batch and are pooled, including the variance between them. Without it
    (instance norm), the rows are those of the samples and are averaged. A state that accumulates is
    updated from its start, by all batches since then.

    Args:
      batch_stats: the state, as `state_checks.batch_stats` returns it.
      rows: the moments, with fields of shape (K, *channels).
      update: the momentum, and whether to skip channels that are not finite.
      between: whether the rows are parts of one batch; otherwise they are samples.
      mapped_axes: the devices that hold more rows of the same update.
    """
    stats, rows = lax.stop_gradient((batch_stats, rows))
    batch = _pooled(rows, mapped_axes) if between else _averaged(rows, mapped_axes)
    accumulation = stats.get("accumulation")
    if accumulation is None:
        return _updated(stats, batch, update, between)
    seen = Moments(**accumulation["moments"])
    batch = jax.tree.map(sharded_like, batch, seen)
    batch = jax.tree.map(
        lambda new, old: new.astype(old.dtype), merge(seen, batch, between=between), seen
    )
    update = dataclasses.replace(update, momentum=accumulation.get("momentum", update.momentum))
    updated = _updated(accumulation["start"], batch, update, between)
    moments = {"count": batch.count, "mean": batch.mean, "var": batch.var}
    updated["accumulation"] = {**accumulation, "moments": moments}
    return updated


def _updated(stats: BatchStats, batch: Moments, update: Update, between: bool) -> BatchStats:
    """Updates a state with the moments of a batch; the result has the state's sharding."""
    batch = jax.tree.map(functools.partial(sharded_like, like=stats["mean"]), batch)
    # A channel of fewer than two entries has no unbiased variance. Without `between`, the count is
    # the number of samples, and var is unbiased already.
    changes = batch.count > (1 if between else 0)
    correction = batch.count / jnp.maximum(batch.count - 1, 1) if between else 1
    mean, var, count = batch.mean, batch.var * correction, stats["count"]
    if update.skip_nonfinite:
        changes &= jnp.isfinite(mean) & jnp.isfinite(var)
    momentum = update.momentum
    if momentum is None:  # the weight depends on the count: either all channels change or none
        momentum = 1 / (count.astype(mean.dtype) + 1)
        changes = jnp.broadcast_to(jnp.all(changes), changes.shape)
    updated = {}
    for key, old, new in (("mean", stats["mean"], mean), ("var", stats["var"], var)):
        wide, new = widen(old, new), widen(new, old)
        mixed = interpolate(wide, new, jnp.asarray(momentum).astype(wide.dtype))
        updated[key] = jnp.where(changes, mixed, wide).astype(statistics_dtype(old.dtype))
    # One reduction gives the new count directly; any(changes) would need another kernel.
    new_count = count + (count < jnp.iinfo(count.dtype).max).astype(count.dtype)
    new_count = jnp.where(changes, new_count, count)
    updated["count"] = jnp.max(new_count) if changes.size else count
    return cast(BatchStats, updated)


def _pooled(rows: Moments, mapped_axes: MappedAxes) -> Moments:
    """Pools rows, which are parts of one batch, into the moments of the batch."""
    if rows.mean.shape[0] == 1 and mapped_axes.axis_name is None:
        one: Moments = jax.tree.map(functools.partial(lax.squeeze, dimensions=(0,)), rows)
        return one
    # The means of the rows serve as their shifts.
    return unshift(*pool_devices(mapped_axes, *pool(rows.mean, about_mean(rows))))


def _averaged(rows: Moments, mapped_axes: MappedAxes) -> Moments:
    """Averages the means and the unbiased variances of the samples; the count is their number.

    A sample of fewer than two entries has no unbiased variance and is left out.
    """
    unbiased = rows.var * (rows.count / jnp.maximum(rows.count - 1, 1))
    stacked = jnp.stack([jnp.ones_like(unbiased), rows.mean, unbiased])
    sums = jnp.sum(jnp.where(rows.count > 1, stacked, jnp.zeros_like(stacked)), axis=1)
    samples, mean, var = mapped_axes.sum(*sums)
    n = jnp.maximum(samples, 1)
    return Moments(samples, mean / n, var / n)
