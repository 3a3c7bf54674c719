"""The names of a norm's arrays in PyTorch and jaxnorm, and checks of converted arrays."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

# The leaf in PyTorch: the collection and the leaf in jaxnorm.
LEAVES = {
    "weight": ("params", "scale"),
    "bias": ("params", "bias"),
    "running_mean": ("batch_stats", "mean"),
    "running_var": ("batch_stats", "var"),
    "num_batches_tracked": ("batch_stats", "count"),
}
THEIRS = {ours: theirs for theirs, ours in LEAVES.items()}
RUNNING = ("running_mean", "running_var", "num_batches_tracked")

Convert = Callable[[str, np.ndarray], tuple[str, Any] | None]


class Entry(NamedTuple):
    """One converted array: its name in PyTorch (theirs), its new name (ours), and a note."""

    theirs: str | None
    collection: str
    ours: str | None
    value: Any
    note: str = ""


def check(
    function: str,
    found: Mapping[str, Sequence[int]],
    expected: Mapping[str, Sequence[int]],
    origin: Mapping[str, str],
    hint: str = "",
) -> None:
    """Checks that both have the same names and shapes."""

    def named(name: str) -> str:
        return f"{name!r} (from {origin[name]!r})" if name in origin else repr(name)

    problems = [f"{named(name)} is missing" for name in expected if name not in found]
    problems += [f"{named(name)} is not expected" for name in found if name not in expected]
    problems += [
        f"{named(name)} should have shape {tuple(expected[name])}, but has {tuple(found[name])}"
        for name in found
        if name in expected and tuple(found[name]) != tuple(expected[name])
    ]
    if problems:
        raise ValueError(
            f"{function}: what comes out should be like the given model, but\n  "
            + "\n  ".join(problems)
            + "\nwrite names= where modules are called otherwise, and track_running_stats=False "
            f"or True to leave running statistics out or begin with first ones{hint}"
        )
