"""Pairs the modules of two models by their names, the shapes of their arrays, and their order."""

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxnorm.interop._trees import flatten, inverted, renamed, split, suggestion

GIVEN, NAME, SHAPE, ORDER = "given", "name", "unique shape", "order"
Shapes = tuple[tuple[str, tuple[int, ...]], ...]


class Pair(NamedTuple):
    """A module of a PyTorch model, and the module of the Flax model that is proposed for it.

    Attributes:
      torch: the name of the module in PyTorch.
      here: the name of the module in the Flax model; the parts are joined by dots.
      shapes: the names and shapes of the arrays in the Flax model.
      by: the criterion: "given", "name", "unique shape" or "order".
      note: a reason why the pair may be wrong.

    Example:
      >>> from jaxnorm import interop
      >>> pair = interop.Pair("bn1", "BatchNorm_0", (("params scale", (8,)),), "unique shape")
      >>> pair.torch, pair.here
      ('bn1', 'BatchNorm_0')

    References:
      torch.nn.Module.named_modules, PyTorch 2.13.
    """

    torch: str
    here: str
    shapes: Shapes
    by: str
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Unit:
    """A module that contains arrays.

    Attributes:
      name: the dotted name of the module.
      shapes: the collection, name and shape of each of its arrays, sorted, parameters first.
      place: a sort key for its position in the order of the model.
    """

    name: str
    shapes: Shapes
    place: Any


def units(variables: Mapping[str, Any], order: Mapping[str, int] | None = None) -> list[Unit]:
    """The modules that contain arrays, in the given order.

    Without an order, or for modules that are not in it, the names are in their natural order, in
    which 2 comes before 10.
    """
    shapes: dict[str, dict[str, tuple[int, ...]]] = collections.defaultdict(dict)
    for collection in ("params", "batch_stats"):
        for name, value in flatten("match", variables.get(collection, {})).items():
            module, leaf = split(name)
            shapes[module][f"{collection} {leaf}"] = tuple(np.shape(value))
    last = len(order or ())

    def place(name: str) -> tuple[Any, ...]:
        return (order or {}).get(name, last), natural(name)

    def parameters_first(array: tuple[str, Any]) -> tuple[bool, str]:
        return array[0].startswith("batch_stats"), array[0]

    found = [
        Unit(name, tuple(sorted(of.items(), key=parameters_first)), place(name))
        for name, of in shapes.items()
    ]
    return sorted(found, key=lambda unit: unit.place)


def natural(name: str) -> list[tuple[int, int | str]]:
    """A sort key for names that sorts numbers by value."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part)) if part.isdigit() else (1, part) for part in parts if part]


def pairs(
    theirs: list[Unit], ours: list[Unit], given: Mapping[str, str], *, allow_order: bool
) -> list[Pair]:
    """The pairs, in the order of PyTorch's modules.

    Modules are paired only if their arrays have the same names and shapes.
    """
    _check_given(theirs, ours, given)
    here = {unit.name: unit for unit in ours}
    alike = _by_shapes(theirs, ours)
    found = {name: Pair(name, to, here[to].shapes, GIVEN) for name, to in given.items()}
    taken = set(given.values())

    def pair(unit: Unit, other: Unit, by: str) -> None:
        if unit.name not in found and other.name not in taken:
            found[unit.name] = Pair(unit.name, other.name, other.shapes, by)
            taken.add(other.name)

    for unit in theirs:
        other = here.get(unit.name)
        if other is not None and other.shapes == unit.shapes:
            pair(unit, other, NAME)
    for left, right in alike:
        if len(left) == len(right) == 1:
            pair(left[0], right[0], SHAPE)
    for left, right in alike if allow_order else []:
        left = [unit for unit in left if unit.name not in found]
        right = [unit for unit in right if unit.name not in taken]
        if len(left) == len(right):
            for unit, other in zip(left, right, strict=True):
                pair(unit, other, ORDER)
    return [found[unit.name] for unit in theirs if unit.name in found]


def with_notes(found: list[Pair], theirs: list[Unit], ours: list[Unit]) -> list[Pair]:
    """Adds a note to pairs of the same shapes that the models call in different orders."""
    partner = {pair.torch: pair.here for pair in found}
    crossed = set()
    for left, right in _by_shapes(theirs, ours):
        matched = [unit.name for unit in left if unit.name in partner]
        names = {partner[name] for name in matched}
        expected = [unit.name for unit in right if unit.name in names]
        crossed |= {n for n, e in zip(matched, expected, strict=True) if partner[n] != e}
    note = "the models call it in different orders"
    return [pair._replace(note=note) if pair.torch in crossed else pair for pair in found]


def names_of(found: Iterable[Pair]) -> dict[str, str]:
    """The map for `from_torch`, without the modules whose names are the same."""
    complete = {pair.torch: pair.here for pair in found}
    names = {name: here for name, here in complete.items() if name != here}
    back = inverted("match", names)
    # A prefix of a name may be in the map although the name itself does not change.
    for name, here in complete.items():
        if renamed(name, names) != here or renamed(here, back) != name:
            names[name] = here
    return names


def _by_shapes(theirs: list[Unit], ours: list[Unit]) -> list[tuple[list[Unit], list[Unit]]]:
    """The modules of both models whose arrays have the same names and shapes."""
    groups: dict[Shapes, tuple[list[Unit], list[Unit]]] = {}
    for side, found in enumerate((theirs, ours)):
        for unit in found:
            groups.setdefault(unit.shapes, ([], []))[side].append(unit)
    return list(groups.values())


def _check_given(theirs: list[Unit], ours: list[Unit], given: Mapping[str, str]) -> None:
    inverted("match", given)
    sides = [("PyTorch's model", theirs, given), ("the model", ours, list(given.values()))]
    for whose, found, names in sides:
        modules = {unit.name: unit for unit in found}
        for name in names:
            if name not in modules:
                raise ValueError(
                    f"match: names should name modules of {whose} that hold arrays, but it has no "
                    f"{name!r}{suggestion(name, modules)}"
                )
    shapes = {unit.name: unit.shapes for unit in ours}
    for unit in theirs:
        if unit.name in given and shapes[given[unit.name]] != unit.shapes:
            raise ValueError(
                f"match: {given[unit.name]!r} should have the arrays of {unit.name!r}, "
                f"{written(unit.shapes)}, because names pairs them, but has "
                f"{written(shapes[given[unit.name]])}; write kinds= if a kernel has another layout"
            )


def written(shapes: Shapes) -> str:
    """The shapes as text."""
    return ", ".join(f"{name.split()[1]} {list(shape)}" for name, shape in shapes)
