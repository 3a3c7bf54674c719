"""Defines the names of a norm's arrays in PyTorch and jaxnorm, and the result of a conversion."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

# For each array of a norm in PyTorch, the collection and the name in jaxnorm.
LEAVES = {
    "weight": ("params", "scale"),
    "bias": ("params", "bias"),
    "running_mean": ("batch_stats", "mean"),
    "running_var": ("batch_stats", "var"),
    "num_batches_tracked": ("batch_stats", "count"),
}
COUNT = "num_batches_tracked"
RUNNING = ("running_mean", "running_var", COUNT)
# The notes of arrays that only the source has, and of arrays that only the result has.
LEFT_OUT, INITIAL = "left out", "initial"

Convert = Callable[[str, np.ndarray], tuple[str, Any] | None]


class Entry(NamedTuple):
    """One array of a conversion.

    Attributes:
      torch_name: its name in PyTorch; None if PyTorch's model does not have it.
      collection: "params" or "batch_stats".
      name: its name in this collection; None if the variables do not have it.
      value: the converted array, or the original one if it is left out.
      note: what changed, other than the name.
    """

    torch_name: str | None
    collection: str
    name: str | None
    value: Any
    note: str = ""


def initial_statistics(shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Returns the running statistics of a norm before the first batch, by PyTorch's names."""
    values = np.zeros(shape, np.float32), np.ones(shape, np.float32), np.zeros((), np.int32)
    return dict(zip(RUNNING, values, strict=True))


def converted(
    convert: Convert | None, name: str, value: np.ndarray
) -> tuple[str | None, np.ndarray, str]:
    """Returns the new name, value and note of an array that does not belong to a norm."""
    new_name, new = (name, value) if convert is None else convert(name, value) or (None, value)
    note = "" if new is value else "converted"
    return new_name, new, LEFT_OUT if new_name is None else note


def check_names_and_shapes(
    function: str,
    found: Mapping[str, Sequence[int]],
    expected: Mapping[str, Sequence[int]],
    origin: Mapping[str, str],
    hint: str = "",
) -> None:
    """Checks that both have the same names and shapes."""

    def described(name: str) -> str:
        return f"{name!r} (from {origin[name]!r})" if name in origin else repr(name)

    problems = [f"{described(name)} is missing" for name in expected if name not in found]
    problems += [f"{described(name)} is not expected" for name in found if name not in expected]
    problems += [
        f"{described(name)} should have shape {tuple(expected[name])}, but has {tuple(found[name])}"
        for name in found
        if name in expected and tuple(found[name]) != tuple(expected[name])
    ]
    if problems:
        raise ValueError(
            f"{function}: the result should have the names and shapes of like, but\n  "
            + "\n  ".join(problems)
            + "\nwrite names= if modules have other names, and track_running_stats=False to leave "
            f"the running statistics out, or True to add initial ones{hint}"
        )
