"""Converts the state of Haiku's norms: its averages become running statistics."""

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
    """Turns a Haiku model's params and state into variables.

    Of hk.BatchNorm, `scale` and `offset` become scale and bias, and the exponential moving averages
    `mean_ema` and `var_ema` the running mean and var: their `average`, which evaluation uses, with
    the bias of the first steps already taken out, not `hidden`. Haiku's variance is the biased one.
    The `counter` becomes the count. The sizes of 1 that Haiku keeps are dropped: (1, 1, C) is (C,).
    Every other module's arrays go to "params" as they are, under their own names; names are split
    at "/": "net/batch_norm" is `params["net"]["batch_norm"]`.

    Args:
      params: what hk.transform_with_state's init returned first.
      state: what it returned second, or training did; None if there is none.
      names: what modules are called here, with dots for slashes: {"net.~.batch_norm": "norm"}.

    Returns:
      {"params": ..., "batch_stats": ...}, nested dicts of NumPy arrays.

    Raises:
      ValueError: if one of a norm's two averages is missing, or its arrays have more than one axis
        that is not 1.

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
        owner, _, average = module.rpartition("/~/")
        if average in AVERAGES and {"average", "counter"} <= set(leaves):
            key = f"{module}/average"
            found = states.setdefault(owner, {})
            found[AVERAGES[average]] = _channels(key, array("from_haiku", key, leaves["average"]))
            counter = array("from_haiku", f"{module}/counter", leaves["counter"])
            found["count"] = np.asarray(counter, np.int32).reshape(())
    flat_params, flat_stats = {}, {}
    for owner, found in states.items():
        missing = [key for key in ("mean", "var") if key not in found]
        if missing:
            raise ValueError(
                f"from_haiku: '{owner}/~/{missing[0]}_ema' should be there, because the other "
                f"average is, but is missing"
            )
        for key, value in found.items():
            flat_stats[join(_name(owner, names), key)] = value
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
    """Of shape (C,); Haiku keeps the reduced axes, with size 1."""
    if max(a.shape, default=1) != a.size:
        raise ValueError(
            f"from_haiku: {key!r} should have one axis of the channels, and others of size 1, but "
            f"has shape {a.shape}"
        )
    return a.reshape(-1)
