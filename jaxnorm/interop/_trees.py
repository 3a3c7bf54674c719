"""What is called what? Nested dicts and dotted names, and the user's map between two of them."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxnorm._walk import leaves

Tree = dict[str, Any]


def flatten(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their dotted names; the parts of a list are called "0", "1", ..."""
    return {".".join(names): leaf for names, leaf in leaves(tree)}


def settled(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves without those that a state accumulates, which are nobody else's business."""
    return {name: value for name, value in flat.items() if ".accumulation." not in f".{name}"}


def nest(function: str, flat: Mapping[str, Any]) -> Tree:
    """Nested dicts of the leaves that have these dotted names."""
    tree: Tree = {}
    for name, value in flat.items():
        *path, last = name.split(".")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise ValueError(
                    f"{function}: {name!r} should be inside {key!r}, but that is an array; give "
                    f"one of them another name"
                )
        if last in node:
            raise ValueError(
                f"{function}: {name!r} should be one thing, but is two; give one of them another "
                f"name"
            )
        node[last] = value
    return tree


def split(name: str) -> tuple[str, str]:
    """The module's name and the leaf's: 'a.b.weight' is ('a.b', 'weight')."""
    module, _, leaf = name.rpartition(".")
    return module, leaf


def join(*names: str) -> str:
    """The dotted name, of those parts that are not empty."""
    return ".".join(name for name in names if name)


def renamed(name: str, names: Mapping[str, str]) -> str:
    """The name, with its longest part that the map knows, from the front, replaced."""
    parts = name.split(".") if name else []
    for end in range(len(parts), -1, -1):
        front = ".".join(parts[:end])
        if front in names:
            return join(names[front], *parts[end:])
    return name


def inverted(function: str, names: Mapping[str, str]) -> dict[str, str]:
    """The map the other way round."""
    back = {ours: theirs for theirs, ours in names.items()}
    if len(back) != len(names):
        twice = sorted(o for o in back if list(names.values()).count(o) > 1)
        raise ValueError(
            f"{function}: names should give each module a name of its own, but {twice} stand for "
            f"several"
        )
    return back


def array(function: str, name: str, value: Any) -> np.ndarray:
    """Whatever holds an array, as NumPy's, in its dtype: JAX would narrow 64 bits to 32."""
    value = value.detach() if hasattr(value, "detach") else value
    try:
        return np.asarray(value)
    except (TypeError, RuntimeError):  # PyTorch's bfloat16, or another device's memory
        pass
    try:
        return np.asarray(jnp.from_dlpack(value))
    except Exception as error:
        raise ValueError(
            f"{function}: {name!r} should be an array in this machine's memory, but is "
            f"{type(value).__name__}; for PyTorch, write tensor.cpu()"
        ) from error
