"""Converts the params and the state of a Haiku model to variables."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxnorm.interop._trees import Tree, array, join, nest, renamed

AVERAGES = {"mean_ema": "mean", "var_ema": "var"}


def from_haiku(
    params: Mapping[str, Mapping[str, Any]],
    state: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    names: Mapping[str, str] | None = None,
) -> Tree:
    """Converts the params and the state of a Haiku model to variables.

    For hk.BatchNorm, `scale` and `offset` become scale and bias, and the exponential moving
    averages `mean_ema` and `var_ema` become the running mean and var. The values are those of
    `average`, which Haiku uses in evaluation and in which the bias of the first steps is corrected,
    not those of `hidden`. Haiku's variance is biased. `counter` becomes the count. Axes of size 1
    are removed: (1, 1, C) becomes (C,).

    The arrays of all other modules are copied to "params" unchanged. Names are split at "/":
    "net/batch_norm" becomes `params["net"]["batch_norm"]`.

    Args:
      params: the parameters, the first result of init of hk.transform_with_state.
      state: the state, the second result of init, or the state after training. None if there is no
        state.
      names: maps names of modules to new ones, with dots for slashes: {"net.~.batch_norm": "norm"}.

    Returns:
      {"params": ..., "batch_stats": ...}, nested dicts of NumPy arrays.

    Raises:
      ValueError: if one of the two averages of a norm is missing, or an array of a norm has more
        than one axis whose size is not 1.

    Example:
      >>> import numpy as np
      >>> from jaxnorm import interop
      >>> params = {"batch_norm": {"scale": np.ones((1, 2)), "offset": np.zeros((1, 2))}}
      >>> average = {"hidden": np.ones((1, 2)), "average": np.full((1, 2), 10.0), "counter": 1}
      >>> state = {f"batch_norm/~/{name}_ema": average for name in ("mean", "var")}
      >>> variables = interop.from_haiku(params, state)
      >>> print(variables["batch_stats"]["batch_norm"]["mean"])
      [10. 10.]

    References:
      haiku.BatchNorm and haiku.ExponentialMovingAverage, dm-haiku 0.0.
    """
    names = names or {}
    states: dict[str, dict[str, np.ndarray]] = {}
    for module, leaves in (state or {}).items():
        norm, _, average = module.rpartition("/~/")
        if average in AVERAGES and {"average", "counter"} <= set(leaves):
            key = f"{module}/average"
            found = states.setdefault(norm, {})
            found[AVERAGES[average]] = _channels(key, array("from_haiku", key, leaves["average"]))
            counter = array("from_haiku", f"{module}/counter", leaves["counter"])
            found["count"] = np.asarray(counter, np.int32).reshape(())
    flat_params, flat_stats = {}, {}
    for norm, found in states.items():
        missing = [key for key in ("mean", "var") if key not in found]
        if missing:
            raise ValueError(
                f"from_haiku: '{norm}/~/{missing[0]}_ema' should be in state, because the "
                f"other average is, but is missing; pass the complete state"
            )
        for key, value in found.items():
            flat_stats[join(_name(norm, names), key)] = value
    for module, leaves in params.items():
        is_norm = module in states or set(leaves) <= {"scale", "offset"}
        for leaf, value in leaves.items():
            key, a = f"{module}/{leaf}", array("from_haiku", f"{module}/{leaf}", value)
            name = {"offset": "bias"}.get(leaf, leaf) if is_norm else leaf
            flat_params[join(_name(module, names), name)] = _channels(key, a) if is_norm else a
    return {
        "params": nest("from_haiku", flat_params),
        "batch_stats": nest("from_haiku", flat_stats),
    }


def _name(module: str, names: Mapping[str, str]) -> str:
    return renamed(module.replace("/", "."), names)


def _channels(key: str, a: np.ndarray) -> np.ndarray:
    """Reshapes to (C,): Haiku keeps the reduced axes, with size 1."""
    if max(a.shape, default=1) != a.size:
        raise ValueError(
            f"from_haiku: {key!r} should have one axis of the channels and others of size 1, "
            f"because it becomes an array of shape (C,), but has shape {a.shape}"
        )
    return a.reshape(-1)
