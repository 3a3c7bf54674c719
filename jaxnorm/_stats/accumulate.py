"""Accumulation of running statistics: one update for several batches."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxnorm._core.variables import statistics_dtype
from jaxnorm._stats import state_checks
from jaxnorm._stats.trees import Tree, map_states


def begin_accumulation(batch_stats: Tree, when: ArrayLike = True) -> Tree:
    r"""Starts accumulation: the following batches make one update of the running statistics.

    Use this for gradient accumulation, where k micro-batches would otherwise update a state k
    times. An accumulating state stores its initial value and the merged moments of all batches
    since. After each micro-batch, its mean, var and count are those after a single update by all
    micro-batches so far; after the last one, they are those after an update by one large batch.
    Call this function again at each step of the optimizer.

    Args:
      batch_stats: a state {"mean": (C,), "var": (C,), "count": ()}, or a tree of them, such as
        Flax's collection: dicts, lists, tuples, dataclasses of flax.struct, or any other pytree.
      when: a bool, which may be traced. If it is False, states that already accumulate are not
        restarted; states that do not accumulate start in any case. Defaults to True.

    Returns:
      The same tree with an entry "accumulation" in each state, which norms and layers update. The
      entry contains the initial state, under "start", and the moments since then, under "moments".

    Raises:
      ValueError: if there are no states, a state lacks a key, or `when` is not a bool.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxnorm
      >>> x = jnp.array([[0.0], [1.0], [5.0], [6.0]])
      >>> state = jaxnorm.begin_accumulation(jaxnorm.init_batch_stats(1))
      >>> for micro_batch in (x[:2], x[2:]):
      ...     y, state = jaxnorm.batch_norm(micro_batch, None, state)
      >>> print(state["mean"], state["count"])  # 0.1 of the mean of all four, in one update
      [0.3] 1

    References:
      Chan, Golub & LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample
      Variances, 1979, for the merging of moments.
    """
    kind = getattr(when, "dtype", np.dtype(type(when)))
    if kind != np.dtype(bool) or jnp.ndim(when):
        raise ValueError(
            f"begin_accumulation: when should be a bool, because it says whether to start again, "
            f"but is {when!r}; write when=complete == 0, for instance"
        )

    def begin(path: str, state: Any) -> Any:
        where = f"begin_accumulation: {path}" if path else "begin_accumulation"
        state = state_checks.batch_stats(where, state, counts=None)
        fresh = _accumulating(state["mean"], state["var"], state["count"])
        if "accumulation" not in state:
            return fresh
        return jax.tree.map(lambda new, old: jnp.where(when, new, old), fresh, state)

    return map_states("begin_accumulation", begin, batch_stats)


def end_accumulation(batch_stats: Tree) -> Tree:
    """Ends accumulation: each batch makes one update of the running statistics again.

    Args:
      batch_stats: a state, or a tree of them. States that do not accumulate are not changed.

    Returns:
      The same tree without the entries that `begin_accumulation` added. mean, var and count do not
      change.

    Raises:
      ValueError: if there are no states.

    Example:
      >>> import jaxnorm
      >>> state = jaxnorm.begin_accumulation(jaxnorm.init_batch_stats(3))
      >>> print(sorted(state), sorted(jaxnorm.end_accumulation(state)))
      ['accumulation', 'count', 'mean', 'var'] ['count', 'mean', 'var']

    References:
      The counterpart of `begin_accumulation`.
    """

    def end(_: str, state: Any) -> Any:
        return {key: value for key, value in state.items() if key != "accumulation"}

    return map_states("end_accumulation", end, batch_stats)


def _accumulating(mean: Any, var: Any, count: Any, **override: jax.Array) -> Any:
    """Returns the state with empty moments; half precision is widened, as in any update."""
    dtype = statistics_dtype(mean.dtype)
    start = {"mean": mean.astype(dtype), "var": var.astype(dtype), "count": count}
    moments = {key: jnp.zeros_like(mean, dtype) for key in ("count", "mean", "var")}
    return {**start, "accumulation": {"start": start, "moments": moments, **override}}


def fresh_accumulation(path: str, state: Any) -> Any:
    """Returns a state with momentum 1, whose statistics will be those of all batches so far."""
    state = state_checks.batch_stats(f"recalibrate: {path}", state, counts=None)
    mean, var, count = state["mean"], state["var"], state["count"]
    first = jnp.zeros_like(mean), jnp.ones_like(var), jnp.zeros_like(count)
    return _accumulating(*first, momentum=jnp.ones_like(mean, statistics_dtype(mean.dtype)))
