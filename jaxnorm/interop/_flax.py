"""Converts the variables of Flax's norms, in which batch_stats have no count."""

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from jaxnorm._stats.trees import map_states
from jaxnorm.interop._trees import Tree


def from_flax(variables: Mapping[str, Any], *, count: ArrayLike | None = None) -> Tree:
    """Adds a count to the batch_stats of flax.linen.BatchNorm.

    Nothing else changes. Flax's running variance is biased, and the unbiased one cannot be computed
    from it; updates with new batches move it towards the unbiased variance.

    Args:
      variables: {"params": ..., "batch_stats": ...} of a Flax model.
      count: the number of batches that the statistics represent. For layers under nn.scan or
        nn.vmap, an array of shape (L,) with one number each. None means 0. Unless the statistics
        are the initial ones, there is a warning, because with momentum=None and count 0 the next
        batch replaces the statistics.

    Returns:
      The variables with a count in every state. States that have a count keep it.

    Raises:
      ValueError: if there is no collection batch_stats, or it has no running statistics.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxnorm import interop
      >>> stats = {"BatchNorm_0": {"mean": jnp.ones(2), "var": jnp.ones(2)}}
      >>> variables = interop.from_flax({"params": {}, "batch_stats": stats}, count=1000)
      >>> print(variables["batch_stats"]["BatchNorm_0"]["count"])
      1000

    References:
      flax.linen.BatchNorm, flax 0.12.
    """
    uncounted = []

    def add(path: str, state: Any) -> Any:
        if state.get("count") is not None:
            return state
        if count is None and not (np.all(state["mean"] == 0) and np.all(state["var"] == 1)):
            uncounted.append(path)
        return {**state, "count": np.asarray(0 if count is None else count, np.int32)}

    batch_stats = map_states("from_flax", add, _collection("from_flax", variables))
    if uncounted:
        warnings.warn(
            f"from_flax: {', '.join(uncounted)} have no count, and get 0; with momentum=None the "
            f"next batch would replace them; write count= the number of batches that they "
            f"represent, or count=0",
            stacklevel=2,
        )
    return {**variables, "batch_stats": batch_stats}


def to_flax(variables: Mapping[str, Any]) -> Tree:
    """Removes the count from batch_stats, for flax.linen.BatchNorm.

    Args:
      variables: {"params": ..., "batch_stats": ...} of a model with layers of jaxnorm.

    Returns:
      The variables, without counts and without the entries of `begin_accumulation`.

    Raises:
      ValueError: if there is no collection batch_stats, or it has no running statistics.

    Example:
      >>> import jaxnorm
      >>> from jaxnorm import interop
      >>> variables = {"params": {}, "batch_stats": {"BatchNorm_0": jaxnorm.init_batch_stats(2)}}
      >>> sorted(interop.to_flax(variables)["batch_stats"]["BatchNorm_0"])
      ['mean', 'var']

    References:
      flax.linen.BatchNorm, flax 0.12.
    """

    def drop(_: str, state: Any) -> Any:
        return {key: state[key] for key in ("mean", "var")}

    return {
        **variables,
        "batch_stats": map_states("to_flax", drop, _collection("to_flax", variables)),
    }


def _collection(function: str, variables: Mapping[str, Any]) -> Any:
    """Returns the collection of the running statistics."""
    if not isinstance(variables, Mapping) or "batch_stats" not in variables:
        found = sorted(variables) if isinstance(variables, Mapping) else type(variables).__name__
        raise ValueError(
            f"{function}: variables should have the collection 'batch_stats', but is {found}; "
            f"write {function}({{'params': params, 'batch_stats': batch_stats}}) [no-states]"
        )
    return variables["batch_stats"]
