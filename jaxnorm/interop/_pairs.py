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
      flax: the name of the module in the Flax model; the parts are joined by dots.
      shapes: the names and shapes of the arrays in the Flax model.
      by: the criterion: "given", "name", "unique shape" or "order".
      note: a reason why the pair may be wrong.

    Example:
      >>> from jaxnorm import interop
      >>> pair = interop.Pair("bn1", "BatchNorm_0", (("params scale", (8,)),), "unique shape")
      >>> pair.torch, pair.flax
      ('bn1', 'BatchNorm_0')

    References:
      torch.nn.Module.named_modules, PyTorch 2.13.
    """

    torch: str
    flax: str
    shapes: Shapes
    by: str
    note: str = ""


@dataclasses.dataclass(frozen=True)
class ModuleShapes:
    """The name of a module that contains arrays, and their shapes.

    Attributes:
      name: the dotted name of the module.
      shapes: the collection, name and shape of each of its arrays, sorted, parameters first.
      position: a sort key for the position of the module in the model.
    """

    name: str
    shapes: Shapes
    position: Any


def modules_of(
    variables: Mapping[str, Any], order: Mapping[str, int] | None = None
) -> list[ModuleShapes]:
    """Returns the modules that contain arrays, in the given order.

    Without an order, or for modules that are not in it, the names are in their natural order, in
    which 2 comes before 10.
    """
    shapes: dict[str, dict[str, tuple[int, ...]]] = collections.defaultdict(dict)
    for collection in ("params", "batch_stats"):
        for name, value in flatten("match", variables.get(collection, {})).items():
            module, leaf = split(name)
            shapes[module][f"{collection} {leaf}"] = tuple(np.shape(value))
    last = len(order or ())

    def position(name: str) -> tuple[Any, ...]:
        return (order or {}).get(name, last), natural(name)

    def parameters_first(array: tuple[str, Any]) -> tuple[bool, str]:
        return array[0].startswith("batch_stats"), array[0]

    found = [
        ModuleShapes(name, tuple(sorted(arrays.items(), key=parameters_first)), position(name))
        for name, arrays in shapes.items()
    ]
    return sorted(found, key=lambda module: module.position)


def natural(name: str) -> list[tuple[int, int | str]]:
    """Returns a sort key for names that sorts numbers by value."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part)) if part.isdigit() else (1, part) for part in parts if part]


def pairs(
    torch_modules: list[ModuleShapes],
    modules: list[ModuleShapes],
    given: Mapping[str, str],
    *,
    allow_order: bool,
) -> list[Pair]:
    """Returns the pairs, in the order of PyTorch's modules.

    Modules are paired only if their arrays have the same names and shapes.
    """
    _check_given(torch_modules, modules, given)
    by_name = {module.name: module for module in modules}
    groups = _by_shapes(torch_modules, modules)
    found = {
        torch_name: Pair(torch_name, name, by_name[name].shapes, GIVEN)
        for torch_name, name in given.items()
    }
    paired = set(given.values())

    def pair(torch_module: ModuleShapes, module: ModuleShapes, by: str) -> None:
        if torch_module.name not in found and module.name not in paired:
            found[torch_module.name] = Pair(torch_module.name, module.name, module.shapes, by)
            paired.add(module.name)

    for torch_module in torch_modules:
        module = by_name.get(torch_module.name)
        if module is not None and module.shapes == torch_module.shapes:
            pair(torch_module, module, NAME)
    for left, right in groups:
        if len(left) == len(right) == 1:
            pair(left[0], right[0], SHAPE)
    for left, right in groups if allow_order else []:
        left = [module for module in left if module.name not in found]
        right = [module for module in right if module.name not in paired]
        if len(left) == len(right):
            for torch_module, module in zip(left, right, strict=True):
                pair(torch_module, module, ORDER)
    return [found[module.name] for module in torch_modules if module.name in found]


def with_notes(
    found: list[Pair], torch_modules: list[ModuleShapes], modules: list[ModuleShapes]
) -> list[Pair]:
    """Adds a note to pairs of the same shapes that the models call in different orders."""
    partner = {pair.torch: pair.flax for pair in found}
    reordered = set()
    for left, right in _by_shapes(torch_modules, modules):
        matched = [module.name for module in left if module.name in partner]
        names = {partner[torch_name] for torch_name in matched}
        in_order = [module.name for module in right if module.name in names]
        reordered |= {t for t, name in zip(matched, in_order, strict=True) if partner[t] != name}
    note = "the models call the modules of these shapes in different orders"
    return [pair._replace(note=note) if pair.torch in reordered else pair for pair in found]


def names_of(found: Iterable[Pair]) -> dict[str, str]:
    """Returns the map for `from_torch`, without the modules whose names are the same."""
    complete = {pair.torch: pair.flax for pair in found}
    names = {torch_name: name for torch_name, name in complete.items() if torch_name != name}
    inverse = inverted("match", names)
    # A module whose name is the same must be in the map if the map contains a prefix of its name.
    for torch_name, name in complete.items():
        if renamed(torch_name, names) != name or renamed(name, inverse) != torch_name:
            names[torch_name] = name
    return names


def _by_shapes(
    torch_modules: list[ModuleShapes], modules: list[ModuleShapes]
) -> list[tuple[list[ModuleShapes], list[ModuleShapes]]]:
    """Returns the modules of both models, grouped by the names and shapes of their arrays."""
    groups: dict[Shapes, tuple[list[ModuleShapes], list[ModuleShapes]]] = {}
    for side, found in enumerate((torch_modules, modules)):
        for module in found:
            groups.setdefault(module.shapes, ([], []))[side].append(module)
    return list(groups.values())


def _check_given(
    torch_modules: list[ModuleShapes], modules: list[ModuleShapes], given: Mapping[str, str]
) -> None:
    inverted("match", given)
    torch_shapes = {module.name: module.shapes for module in torch_modules}
    shapes = {module.name: module.shapes for module in modules}
    for owner, known, names in (
        ("the PyTorch model", torch_shapes, given.keys()),
        ("the Flax model", shapes, given.values()),
    ):
        for name in names:
            if name not in known:
                raise ValueError(
                    f"match: names should name modules of {owner} that contain arrays, but it has "
                    f"no {name!r}{suggestion(name, known)}"
                )
    for torch_name, name in given.items():
        if shapes[name] != torch_shapes[torch_name]:
            raise ValueError(
                f"match: {name!r} should have the arrays of {torch_name!r}, "
                f"{format_shapes(torch_shapes[torch_name])}, because names pairs them, but has "
                f"{format_shapes(shapes[name])}; write kinds= if a kernel has another layout"
            )


def format_shapes(shapes: Shapes) -> str:
    """Returns the shapes as text."""
    return ", ".join(f"{name.split()[1]} {list(shape)}" for name, shape in shapes)
