"""Running statistics as numbers under flat names, for loggers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxnorm._stats import trees


def flat(batch_stats: Any) -> dict[str, jax.Array]:
    """Returns all running statistics of a model under flat names, for loggers and histograms.

    Args:
      batch_stats: a collection, all variables of a model, a train state, `nnx.state(model)`, the
        state of one norm, or any other tree of states.

    Returns:
      Three arrays for each norm, such as "block/BatchNorm_0": ".../mean" and ".../var" of shape
      (C,), in units of x and of x squared, and ".../count".

    Raises:
      ValueError: if there are no running statistics.

    Example:
      >>> import jaxnorm.inspect
      >>> state = {"block": {"BatchNorm_0": jaxnorm.init_batch_stats(2)}}
      >>> for name, value in jaxnorm.inspect.flat(state).items():
      ...     print(name, value)
      block/BatchNorm_0/mean [0. 0.]
      block/BatchNorm_0/var [1. 1.]
      block/BatchNorm_0/count 0

    References:
      flax.traverse_util.flatten_dict, flax 0.12, which gives the same names with sep="/".
    """
    return {
        f"{name}/{key}" if name else key: state[key]
        for name, state in norms("flat", batch_stats).items()
        for key in ("mean", "var", "count")
        if key in state
    }


def scalars(batch_stats: Any) -> dict[str, jax.Array]:
    """Summarizes the running statistics of a model as scalars for any logger. Works under jit.

    The scalars show means that diverge, variances that go to zero (dead channels) or to infinity,
    and counts that do not increase in training or increase in evaluation.

    Args:
      batch_stats: as in `flat`.

    Returns:
      For each norm, such as "block/BatchNorm_0": ".../mean_min", ".../mean_max", ".../std_min" and
      ".../std_max" over its channels, in units of x, and ".../count", the largest if a norm has
      several.

    Raises:
      ValueError: if there are no running statistics.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxnorm.inspect
      >>> state = {"mean": jnp.array([-1.0, 2.0]), "var": jnp.array([4.0, 9.0]), "count": 7}
      >>> for name, value in jaxnorm.inspect.scalars({"norm": state}).items():
      ...     print(name, value)
      norm/mean_min -1.0
      norm/mean_max 2.0
      norm/std_min 2.0
      norm/std_max 3.0
      norm/count 7

    References:
      torch.utils.tensorboard and Weights & Biases, which log scalars under flat names.
    """
    found: dict[str, jax.Array] = {}
    for name, state in norms("scalars", batch_stats).items():
        numbers = extremes(state["mean"], state["var"])
        if "count" in state:
            numbers["count"] = jnp.max(jnp.asarray(state["count"]))
        found |= {f"{name}/{key}" if name else key: value for key, value in numbers.items()}
    return found


def drift(batch_stats: Any, reference: Any) -> dict[str, jax.Array]:
    r"""Measures the distance of running statistics from others, in standard deviations.

    .. math::
        \sqrt{E_c[(mean - mean_{ref})^2 / var_{ref}]}, \quad \sqrt{E_c[(std / std_{ref} - 1)^2]}

    The drift from the previous state shows how fast the statistics change. The drift from the
    statistics of a batch, which `recalibrate` with only that batch returns, shows how wrong
    evaluation would be on that batch.

    Args:
      batch_stats: as in `flat`.
      reference: the statistics of the same norms at another time, or over other data.

    Returns:
      For each norm, such as "block/BatchNorm_0": ".../mean_drift", in standard deviations of the
      reference, and ".../std_drift", relative to them.

    Raises:
      ValueError: if one of them has no running statistics, or they contain different norms.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxnorm.inspect
      >>> state = {"mean": jnp.array([1.0]), "var": jnp.array([9.0])}
      >>> reference = {"mean": jnp.array([0.0]), "var": jnp.array([4.0])}
      >>> print(jaxnorm.inspect.drift({"norm": state}, {"norm": reference}))
      {'norm/mean_drift': Array(0.5, dtype=float32), 'norm/std_drift': Array(0.5, dtype=float32)}

    References:
      Wu & Johnson, Rethinking "Batch" in BatchNorm, 2021, section 3, on the difference between
      population and batch statistics. https://arxiv.org/abs/2105.07576
    """
    return {
        f"{name}/{key}" if name else key: value
        for name, a, b in pairs("drift", batch_stats, reference)
        for key, value in distances(a, b).items()
    }


def distances(state: Any, reference: Any) -> dict[str, jax.Array]:
    """Returns the two numbers of `drift` for one norm."""
    tiny = jnp.finfo(jnp.float32).tiny  # a channel that is dead in both has drift 0, not 0 / 0
    mean_ref, var_ref = reference["mean"], reference["var"]
    off = (state["mean"] - mean_ref) ** 2 / (var_ref + tiny)
    wide = (jnp.sqrt((state["var"] + tiny) / (var_ref + tiny)) - 1) ** 2
    return {"mean_drift": jnp.sqrt(jnp.mean(off)), "std_drift": jnp.sqrt(jnp.mean(wide))}


def extremes(mean: ArrayLike, var: ArrayLike) -> dict[str, jax.Array]:
    """Returns the smallest and largest mean and standard deviation of the channels."""
    std = jnp.sqrt(var)
    return {
        "mean_min": jnp.min(mean),
        "mean_max": jnp.max(mean),
        "std_min": jnp.min(std),
        "std_max": jnp.max(std),
    }


def norms(function: str, tree: Any) -> dict[str, Any]:
    """Returns the state of every norm, by its path in batch_stats."""
    found = {}
    for path, state in trees.find(tree):
        parts = trees.names(path)
        parts = parts[1:] if parts[:1] == ("batch_stats",) else parts
        found["/".join(parts)] = trees.arrays(state, ("mean", "var", "count"))
    if not found:
        raise ValueError(
            f"{function}: batch_stats should hold running statistics, a dict with the keys 'mean' "
            f"and 'var', but holds none; for an NNX model, write nnx.state(model)"
        )
    return found


def pairs(function: str, a: Any, b: Any) -> list[tuple[str, Any, Any]]:
    """Returns the name of each norm with its states in both trees."""
    return matched(function, norms(function, a), norms(function, b))


def matched(
    function: str, first: Mapping[str, Any], second: Mapping[str, Any]
) -> list[tuple[str, Any, Any]]:
    """Returns the name of each norm with its states in both; raises if the names differ."""
    if first.keys() != second.keys():
        raise ValueError(
            f"{function}: both should hold the same norms, but only one holds "
            f"{', '.join(sorted(first.keys() ^ second.keys()))}"
        )
    return [(name, first[name], second[name]) for name in first]


def concrete(function: str, states: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises an error if a value of a state is traced."""
    for name, state in states.items():
        for key, value in state.items():
            if isinstance(value, jax.core.Tracer):
                raise ValueError(
                    f"{function}: batch_stats should hold concrete values, because they are read "
                    f"in Python, but {f'{name}/{key}'.lstrip('/')} is traced; call {function} "
                    f"outside of jit, grad and vmap, or use scalars and drift, which work under jit"
                )


def in_order(names: Iterable[str]) -> list[str]:
    """Returns the names in the order of the model.

    jit returns dicts sorted by their keys as text, in which "norm_10" comes before "norm_2". If the
    names have that order, they are sorted with numbers as numbers; any other order is kept.
    """
    given = list(names)
    parts = [name.split("/") for name in given]
    if parts != sorted(parts):
        return given
    return sorted(
        given,
        key=lambda name: [
            [(int(n or -1), text) for n, text in re.findall(r"(\d+)|(\D+)", part)]
            for part in name.split("/")
        ],
    )
