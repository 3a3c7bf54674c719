"""Checks the running statistics that a function is given, and their moments and weights.

All checks run at trace time.
"""

from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxnorm._core.arguments import Shape
from jaxnorm._core.checks import agrees, other_axis
from jaxnorm._core.variables import BatchStats

KEYS = ("mean", "var", "count")


def batch_stats(
    function: str,
    stats: Any,
    channels: Shape | None = None,
    *,
    counts: Shape | None = (),
    x_shape: Shape = (),
) -> BatchStats:
    """Checks a state and, if it accumulates, the state that it started from.

    Args:
      function: the name of the public function, which errors begin with.
      stats: the state.
      channels: the shape of mean and var. None accepts any shape that both have.
      counts: the shape of the count. None accepts any shape, as stacked states have it.
      x_shape: the shape of x, for a hint about which axis the channels may be on.

    Returns:
      The state as arrays, with an integer count.

    Raises:
      ValueError: if a key is missing, or a shape or dtype differs.
    """
    state = _leaves(function, stats, channels, counts, x_shape)
    accumulation = stats.get("accumulation")
    if accumulation is None:
        return state
    start, moments = (
        accumulation.get(part) if isinstance(accumulation, Mapping) else None
        for part in ("start", "moments")
    )
    if not (
        isinstance(start, Mapping)
        and isinstance(moments, Mapping)
        and {"count", "mean", "var"} <= moments.keys()
    ):
        found = sorted(accumulation) if isinstance(accumulation, Mapping) else accumulation
        raise ValueError(
            f"{function}: batch_stats['accumulation'] should hold 'start' and 'moments', as "
            f"begin_accumulation makes them, but is {found!r}; write end_accumulation(state), and "
            f"then begin_accumulation to start again [accumulation-malformed]"
        )
    start = _leaves(function, start, state["mean"].shape, counts, x_shape)
    return cast(BatchStats, {**state, "accumulation": {**accumulation, "start": start}})


def stacked_batch_stats(function: str, stats: Any) -> BatchStats:
    """Checks states with a leading axis: mean and var of one shape, and a count for each entry."""
    mean = stats.get("mean") if isinstance(stats, Mapping) else None
    if mean is not None and jnp.ndim(mean) < 1:
        raise ValueError(
            f"{function}: batch_stats['mean'] should have a leading axis, with one entry for each "
            f"state, but has shape ()"
        )
    return _leaves(function, stats, None, jnp.shape(mean)[:1] if mean is not None else ())


def _leaves(
    function: str,
    stats: Any,
    channels: Shape | None,
    counts: Shape | None,
    x_shape: Shape = (),
) -> BatchStats:
    """Checks mean, var and count."""
    if not isinstance(stats, Mapping) or any(stats.get(key) is None for key in KEYS):
        raise _keys_missing(function, stats)
    state = {key: jnp.asarray(stats[key]) for key in KEYS}
    channels = state["mean"].shape if channels is None else channels
    counts = state["count"].shape if counts is None else counts
    for key, shape in (("mean", channels), ("var", channels), ("count", counts)):
        if not agrees(state[key].shape, shape):
            why = "it counts updates" if key == "count" else "it holds one number for each channel"
            raise ValueError(
                f"{function}: batch_stats[{key!r}] should have shape {shape}, because {why}, but "
                f"has shape {state[key].shape}"
                f"{other_axis(function, state[key].shape, x_shape) if key != 'count' else ''} "
                f"[batch-stats-shape]"
            )
    for key in ("mean", "var"):
        if not jnp.issubdtype(state[key].dtype, jnp.floating):
            raise ValueError(
                f"{function}: batch_stats[{key!r}] should have a float dtype, because averages are "
                f"not whole numbers, but has {state[key].dtype}; was it cast when it was restored? "
                f"[batch-stats-dtype]"
            )
    if not jnp.issubdtype(state["count"].dtype, jnp.integer):
        state["count"] = _whole_count(function, state["count"])
    return cast(BatchStats, state)


def _keys_missing(function: str, stats: Any) -> ValueError:
    """Returns the error for a state that is not a mapping with a mean, a var and a count."""
    found: Any = type(stats).__name__
    if isinstance(stats, Mapping):
        found = sorted(key for key in stats if stats[key] is not None)
    wanted = f"{function}: batch_stats should have the keys 'mean', 'var' and 'count', but is"
    if isinstance(stats, Mapping) and {"mean", "var"} <= set(found):
        return ValueError(
            f"{wanted} {found}; write {{**batch_stats, 'count': jnp.int32(0)}} for the state of "
            f"one layer, or interop.from_flax(variables) for a whole model [count-missing]"
        )
    write = "pass the state of one layer, or init_batch_stats(num_features) before training"
    if "running_mean" in found:
        write = "write interop.from_torch(state_dict) for statistics of PyTorch"
    return ValueError(f"{wanted} {found}; {write} [batch-stats-keys]")


def _whole_count(function: str, count: jax.Array) -> jax.Array:
    """Converts a number of updates that is not an integer.

    `lax.pmean` of a whole state, an exponential moving average of it, and a cast of the tree
    convert the count to a float. It is a whole number if all states have the same count.
    """
    if not jnp.issubdtype(count.dtype, jnp.floating):
        raise ValueError(
            f"{function}: batch_stats['count'] should be an integer, because it counts updates, "
            f"but is {count.dtype} [batch-stats-dtype]"
        )
    if not isinstance(count, jax.core.Tracer) and np.any(np.asarray(count, np.float64) % 1):
        raise ValueError(
            f"{function}: batch_stats['count'] should be a whole number, because it counts "
            f"updates, but is {count}; were states averaged that have seen different numbers of "
            f"batches? merge_batch_stats merges those; otherwise write {{**batch_stats, 'count': "
            f"jnp.int32(n)}} [count-not-whole]"
        )
    return jnp.round(count).astype(jnp.int32)


def weights(function: str, counts: ArrayLike, shape: Shape) -> jax.Array:
    """Checks the weights of states."""
    counts = jnp.asarray(counts)
    if not any(jnp.issubdtype(counts.dtype, kind) for kind in (jnp.floating, jnp.integer)):
        raise ValueError(f"{function}: counts should be numbers, but are {counts.dtype}")
    if not isinstance(counts, jax.core.Tracer) and not np.all(np.asarray(counts) >= 0):
        raise ValueError(
            f"{function}: counts should be at least 0, because they are weights, but are {counts}"
        )
    if not agrees(counts.shape, shape):
        raise ValueError(
            f"{function}: counts should have shape {shape}, one for each state, but have shape "
            f"{counts.shape}"
        )
    return counts


def moments_shape(function: str, shape: Shape, channels: Shape) -> None:
    """Checks that moments have the shape of the channels, or one leading axis more."""
    if not agrees(shape, channels) and not agrees(shape[1:], channels):
        raise ValueError(
            f"{function}: moments should have the shape {channels} of the running statistics, or "
            f"that shape after a leading axis of samples, but have shape {shape}"
        )
