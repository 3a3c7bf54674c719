"""Converts between the two collections of Linen and the one tree of NNX."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxnorm.interop._trees import Tree, flatten, join, nest, split, without_accumulation

STATISTICS = ("mean", "var", "count")


def to_nnx(variables: Mapping[str, Any]) -> Tree:
    """Merges params and batch_stats into one tree, as in NNX.

    Args:
      variables: {"params": ..., "batch_stats": ...}.

    Returns:
      One tree of nested dicts, for `nnx.replace_by_pure_dict(state, tree)`, which accepts the
      indices of lists as strings.

    Raises:
      ValueError: if both collections contain an array of the same name; if the name of a module or
        of an array is empty or contains a dot.

    Example:
      >>> import jaxnorm
      >>> from jaxnorm import interop
      >>> variables = {"params": {"bn": jaxnorm.init_params(2)},
      ...              "batch_stats": {"bn": jaxnorm.init_batch_stats(2)}}
      >>> sorted(interop.to_nnx(variables)["bn"])
      ['bias', 'count', 'mean', 'scale', 'var']

    References:
      flax.nnx.replace_by_pure_dict, flax 0.12.
    """
    params, stats = (
        flatten("to_nnx", variables.get(name, {})) for name in ("params", "batch_stats")
    )
    twice = sorted(params.keys() & stats.keys())
    if twice:
        raise ValueError(
            f"to_nnx: {twice} should be in one collection, because NNX has one tree, but are in "
            f"both; rename them in one of the two"
        )
    return nest("to_nnx", {**params, **stats})


def from_nnx(tree: Mapping[Any, Any]) -> Tree:
    """Splits the tree of an NNX model into params and batch_stats.

    Args:
      tree: `nnx.to_pure_dict(nnx.state(model))`. Accumulated moments and the random streams of
        Dropout (a key and its counter) are left out.

    Returns:
      {"params": ..., "batch_stats": ...}. If a module has a mean and a var, its mean, var and count
      are in batch_stats.

    Example:
      >>> from flax import nnx
      >>> import jaxnorm.nnx
      >>> from jaxnorm import interop
      >>> layer = jaxnorm.nnx.BatchNorm(2, rngs=nnx.Rngs(0))
      >>> variables = interop.from_nnx(nnx.to_pure_dict(nnx.state(layer)))
      >>> sorted(variables["params"]), sorted(variables["batch_stats"])
      (['bias', 'scale'], ['count', 'mean', 'var'])

    References:
      flax.nnx.to_pure_dict, flax 0.12.
    """
    flat = without_accumulation(flatten("from_nnx", tree))
    random = {split(name)[0] for name, leaf in flat.items() if _is_key(leaf)}
    flat = {k: v for k, v in flat.items() if split(k)[0] not in random}
    modules = {split(name)[0] for name in flat}
    norms = {m for m in modules if join(m, "mean") in flat and join(m, "var") in flat}

    def is_statistic(name: str) -> bool:
        module, leaf = split(name)
        return module in norms and leaf in STATISTICS

    return {
        "params": nest("from_nnx", {k: v for k, v in flat.items() if not is_statistic(k)}),
        "batch_stats": nest("from_nnx", {k: v for k, v in flat.items() if is_statistic(k)}),
    }


def _is_key(leaf: Any) -> bool:
    """Returns whether this is a key of jax.random."""
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
