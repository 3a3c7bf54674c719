"""How do several batches make one update? The states of a model, which then accumulate."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxnorm import _checks
from jaxnorm.variables import statistics_dtype

Tree = TypeVar("Tree")


def begin_accumulation(batch_stats: Tree, when: ArrayLike = True) -> Tree:
    r"""Makes the batches from here on one update, however many they are.

    For gradient accumulation: of k micro-batches, a state would move k times, a little each. One
    that accumulates keeps where it began and the merged moments of what it has seen since, and its
    mean, var and count are, after every micro-batch, those after one update by all of them. After
    the k-th it is where one large batch would have moved it. Begin anew with each step of the
    optimizer; this is all that there is to do.

    Args:
      batch_stats: a state {"mean": (C,), "var": (C,), "count": ()}, or any dict of dicts of them,
        as Flax's collection is.
      when: a bool, traced or not: whether to begin anew. Where it is False, a state that
        accumulates already goes on; one that does not begins in any case.

    Returns:
      The same with an entry "accumulation" in each state, which norms and layers then serve: what
      "start" was, and the "moments" since.

    Raises:
      ValueError: if there is no state in it, or one lacks a key.

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
      Variances, 1979: how moments merge.
    """

    def begin(path: str, state: Any) -> Any:
        where = f"begin_accumulation: {path}" if path else "begin_accumulation"
        state = _checks.batch_stats(where, state, stacked=True)
        fresh = _accumulating(state["mean"], state["var"], state["count"])
        if "accumulation" not in state:
            return fresh
        return jax.tree.map(lambda new, old: jnp.where(when, new, old), fresh, state)

    return map_states("begin_accumulation", begin, batch_stats)


def end_accumulation(batch_stats: Tree) -> Tree:
    """Makes each batch an update of its own again.

    Args:
      batch_stats: a state, or any dict of dicts of them, whether they accumulate or not.

    Returns:
      The same without the entries that `begin_accumulation` added; mean, var and count stay.

    Raises:
      ValueError: if there is no state in it.

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
    """The state, with nothing seen since; half precision is widened, as any update would."""
    dtype = statistics_dtype(mean.dtype)
    start = {"mean": mean.astype(dtype), "var": var.astype(dtype), "count": count}
    moments = {key: jnp.zeros_like(mean, dtype) for key in ("count", "mean", "var")}
    return {**start, "accumulation": {"start": start, "moments": moments, **override}}


def recollecting(path: str, state: Any) -> Any:
    """A first state that moves all the way: after every batch it is that of all batches so far."""
    state = _checks.batch_stats(f"recalibrate: {path}", state, stacked=True)
    mean, var, count = state["mean"], state["var"], state["count"]
    first = jnp.zeros_like(mean), jnp.ones_like(var), jnp.zeros_like(count)
    return _accumulating(*first, momentum=jnp.ones_like(mean, statistics_dtype(mean.dtype)))


def is_state(tree: Any) -> bool:
    """Whether this is one norm's state, and not a dict of them."""
    return isinstance(tree, Mapping) and {"mean", "var"} <= set(tree)


def states(tree: Any, path: str = "") -> list[tuple[str, Any]]:
    """Every state in a tree of dicts, with its path, such as ['block']['BatchNorm_0']."""
    if is_state(tree):
        return [(path, tree)]
    if not isinstance(tree, Mapping):
        return []
    return [found for key in tree for found in states(tree[key], f"{path}[{key!r}]")]


def map_states(function: str, change: Callable[[str, Any], Any], tree: Any) -> Any:
    """The tree with every state in it changed; there is at least one."""
    if not states(tree):
        raise ValueError(
            f"{function}: batch_stats should be a state with the keys 'mean', 'var' and 'count', "
            f"or a dict that holds some, but holds none"
        )

    def walk(path: str, node: Any) -> Any:
        if is_state(node):
            return change(path, node)
        if not isinstance(node, Mapping):
            return node
        return {key: walk(f"{path}[{key!r}]", value) for key, value in node.items()}

    return walk("", tree)
