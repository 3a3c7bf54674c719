"""Converts between nested dicts and dotted names, and applies the user's map of names."""

import difflib
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxnorm._stats.trees import leaves

Tree = dict[str, Any]
Arrays = Mapping[str, np.ndarray]


def flatten(function: str, tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by their dotted names; the items of a list are "0", "1", ..."""
    flat: dict[str, Any] = {}
    for parts, leaf in leaves(tree):
        name = ".".join(parts)
        if any("." in part or not part for part in parts):
            raise ValueError(
                f"{function}: the names of modules and arrays should not be empty nor contain "
                f"dots, because the parts of {list(parts)} are joined by dots; rename them"
            )
        if name in flat:
            raise ValueError(
                f"{function}: {name!r} should be one array, but is two; give one of them another "
                f"name"
            )
        flat[name] = leaf
    return flat


def without_accumulation(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the leaves without accumulated moments, which other frameworks do not have."""
    return {name: value for name, value in flat.items() if ".accumulation." not in f".{name}"}


def nest(function: str, flat: Mapping[str, Any]) -> Tree:
    """Returns the leaves as nested dicts, from their dotted names."""
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
                f"{function}: {name!r} should be one array or module, but is two; give one of "
                f"them another name"
            )
        node[last] = value
    return tree


def split(name: str) -> tuple[str, str]:
    """Returns the module's name and the leaf's: 'a.b.weight' is ('a.b', 'weight')."""
    module, _, leaf = name.rpartition(".")
    return module, leaf


def join(*names: str) -> str:
    """Joins the names that are not empty by dots."""
    return ".".join(name for name in names if name)


def renamed(name: str, names: Mapping[str, str]) -> str:
    """Returns the name, with the longest of its prefixes that is in the map replaced."""
    parts = name.split(".") if name else []
    for end in range(len(parts), -1, -1):
        prefix = ".".join(parts[:end])
        if prefix in names:
            return join(names[prefix], *parts[end:])
    return name


def suggestion(name: str, known: Iterable[str]) -> str:
    """Returns the end of an error message: the known names that are similar to the wrong one."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, close))}" if close else ""


def check_names(function: str, names: Iterable[str], found: Iterable[str], owner: str) -> None:
    """Checks that every name is a module that contains arrays; "" is the whole model."""
    modules: set[str] = set()
    for name in found:
        parts = name.split(".")
        modules |= {".".join(parts[:end]) for end in range(len(parts))}
    unknown = [name for name in names if name not in modules]
    if unknown:
        raise ValueError(
            f"{function}: names should name modules of {owner} that contain arrays, but it has no "
            f"{unknown}{suggestion(unknown[0], modules - {''})}"
        )


def inverted(function: str, names: Mapping[str, str]) -> dict[str, str]:
    """Returns the inverse map; raises if two modules have the same new name."""
    inverse = {name: torch_name for torch_name, name in names.items()}
    if len(inverse) != len(names):
        new_names = list(names.values())
        twice = sorted(name for name in inverse if new_names.count(name) > 1)
        raise ValueError(
            f"{function}: names should give each module a different name, because the map is also "
            f"inverted, but {twice} stand for several modules"
        )
    return inverse


def array(function: str, name: str, value: Any) -> np.ndarray:
    """Converts an array to NumPy and keeps its dtype; JAX would convert 64 bits to 32."""
    try:
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(value, torch.Tensor):
            value = _from_tensor(torch, value.detach())
        return np.asarray(value)
    except (TypeError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{function}: {name!r} should be an array in the memory of the CPU, but is "
            f"{type(value).__name__}: {error}; for PyTorch, write tensor.cpu()"
        ) from error


def _from_tensor(torch: Any, tensor: Any) -> np.ndarray:
    """Returns the array of a PyTorch tensor, with ml_dtypes for bfloat16 and float8."""
    dtype = getattr(ml_dtypes, str(tensor.dtype).removeprefix("torch."), None)
    if dtype is None:
        return np.asarray(tensor.resolve_conj().resolve_neg().numpy())
    integers = {1: torch.uint8, 2: torch.int16}[tensor.element_size()]
    return np.asarray(tensor.view(integers).numpy()).view(dtype)
