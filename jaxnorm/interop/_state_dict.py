"""Extracts a state dict from a PyTorch checkpoint, by a key and a prefix."""

import itertools
from collections.abc import Collection, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

EXTRA_STATE = "_extra_state"  # the suffix of the names under which PyTorch saves get_extra_state


def state_dict_of(
    function: str,
    given: Any,
    key: str | None = None,
    *,
    prefix: str | None = None,
    leave_out: Collection[str] = (),
) -> dict[str, Any]:
    """Returns the arrays below the key by name, without the prefix and the names to leave out."""
    found = _without_left_out(function, _mapping_at(function, given, key), leave_out)
    unnamed = [name for name in found if not isinstance(name, str)]
    if unnamed:
        raise ValueError(
            f"{function}: the state dict should be arrays by name, but has {_listed(unnamed)}"
        )
    others = {name: value for name, value in found.items() if not _is_array(value)}
    if others:
        raise ValueError(f"{function}: {_not_arrays(found, others, key)}")
    return _without_prefix(function, found, prefix) if prefix else found


def common_prefix(names: Collection[str]) -> str:
    """Returns the longest common prefix of the names in whole parts, without leaves."""
    parts = [name.split(".")[:-1] for name in names]
    same = itertools.takewhile(lambda column: len({*column}) == 1, zip(*parts, strict=False))
    return "".join(f"{column[0]}." for column in same)


def _mapping_at(function: str, given: Any, key: str | None) -> Mapping[str, Any]:
    """Returns the mapping that the key selects."""
    node = given
    for part in key.split(".") if key is not None else ():
        if not isinstance(node, Mapping) or part not in node:
            raise ValueError(
                f"{function}: key should lead to a mapping of arrays, but {key!r} is not there; "
                f"there is {_listed(_mappings(given)) or 'none'}"
            )
        node = node[part]
    if not isinstance(node, Mapping):
        raise ValueError(
            f"{function}: {'the state dict' if key is None else repr(key)} should be a mapping of "
            f"arrays, but is {type(node).__name__}; for a module, write model.state_dict()"
        )
    return node


def _without_left_out(
    function: str, given: Mapping[str, Any], leave_out: Collection[str]
) -> dict[str, Any]:
    """Returns the entries that match no pattern; raises if a pattern matches nothing."""
    patterns = [leave_out] if isinstance(leave_out, str) else [*leave_out]
    unused = [p for p in patterns if not any(fnmatchcase(str(name), p) for name in given)]
    if unused:
        raise ValueError(f"{function}: leave_out should match names, but {unused} match none")
    return {
        name: value
        for name, value in given.items()
        if not any(fnmatchcase(str(name), pattern) for pattern in patterns)
    }


def _not_arrays(found: Mapping[str, Any], others: Mapping[str, Any], key: str | None) -> str:
    """Returns the text of an error: the entries that are not arrays, and what to write."""
    extra = [name for name in others if str(name).endswith(EXTRA_STATE)]
    mappings = [".".join([*([key] if key else []), name]) for name in _mappings(found)]
    if extra:
        return (
            f"the state dict should be arrays by name, but {_listed(extra)} are extra states of "
            f"modules (get_extra_state); {_to_leave_out('*' + EXTRA_STATE)}"
        )
    if mappings:
        return (
            f"the state dict should be arrays by name, but {_listed(mappings)} are mappings of "
            f"arrays; write key={mappings[0]!r}, or --key {mappings[0]} on the command line"
        )
    kinds = [f"{name!r} is {type(value).__name__}" for name, value in others.items()]
    first = next(iter(others))
    return f"the state dict should be arrays by name, but {_listed(kinds)}; {_to_leave_out(first)}"


def _to_leave_out(pattern: Any) -> str:
    return f"write leave_out=[{pattern!r}], or --leave-out '{pattern}' on the command line"


def _without_prefix(function: str, found: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    others = [
        name for name in found if not name.removeprefix(prefix) or not name.startswith(prefix)
    ]
    if others:
        raise ValueError(
            f"{function}: all names should begin with the prefix {prefix!r}, but {_listed(others)} "
            f"do not; {_to_leave_out(others[0])}"
        )
    return {name.removeprefix(prefix): value for name, value in found.items()}


def _is_array(value: Any) -> bool:
    """Returns whether this is an array of any library, except NumPy arrays of objects or text."""
    kind = getattr(getattr(value, "dtype", None), "kind", "")
    return hasattr(value, "__array__") and kind not in ("O", "S", "U")


def _mappings(node: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    """Yields the dotted keys of the mappings that contain arrays."""
    for name, value in node.items() if isinstance(node, Mapping) else ():
        if isinstance(value, Mapping) and isinstance(name, str) and "." not in name:
            if any(map(_is_array, value.values())):
                yield ".".join((*path, name))
            yield from _mappings(value, (*path, name))


def _listed(names: Any) -> str:
    """Returns at most eight of the names, and the number of the others."""
    names = [name if isinstance(name, str) else repr(name) for name in names]
    more = len(names) - 8
    return ", ".join(names[:8]) + (f" and {more} more" if more > 0 else "")
