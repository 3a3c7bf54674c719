"""Lists the norms of a PyTorch model as a table, for which a state dict is not enough."""

from typing import Any

from jaxnorm.interop._torch_modules import named_modules
from jaxnorm.interop._torch_norms import NormRow, norm_row


class NormRows(tuple[NormRow, ...]):
    """The rows of `describe_torch`: a tuple that is printed as a table.

    Example:
      >>> from jaxnorm import interop
      >>> row = interop.NormRow("bn1", "BatchNorm2d", "BatchNorm", {"epsilon": 0.001}, 0.001, 0.1,
      ...                       tracks=True)
      >>> print(interop.NormRows([row]))
      name  PyTorch      epsilon  momentum  tracks  jaxnorm
      bn1   BatchNorm2d  0.001    0.1       yes     BatchNorm(epsilon=0.001)

    References:
      torch.nn.Module.named_modules, PyTorch 2.13.
    """

    def __str__(self) -> str:
        """A table with one row for each norm."""
        cells: list[tuple[str, ...]] = [
            ("name", "PyTorch", "epsilon", "momentum", "tracks", "jaxnorm")
        ]
        cells += [_cells(row) for row in self]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
            for line in cells
        )


def describe_torch(module: Any) -> NormRows:
    """Lists the norms of a PyTorch model, with the arguments for the same layers of jaxnorm.

    A state dict does not say epsilon, momentum, and whether a layer tracks running statistics. The
    defaults of epsilon differ: in PyTorch it is 1e-5, and here, as in Flax, 1e-6 in all layers but
    BatchNorm.

    Modules are recognized by the name of their class or of one that it inherits from. A module that
    looks like a norm and is not recognized is listed as "unknown". A call of
    torch.nn.functional.layer_norm in a `forward` is no module, and cannot be listed.

    Args:
      module: a torch.nn.Module.

    Returns:
      A tuple with a `NormRow` for each norm, in the model's order; str() makes a table of it. A
      norm that has two names is listed twice.

    Raises:
      ValueError: if this is no model.

    Example:
      >>> import torch
      >>> from jaxnorm import interop
      >>> model = torch.nn.Sequential(torch.nn.BatchNorm2d(8), torch.nn.GroupNorm(4, 8, eps=1e-3))
      >>> print(interop.describe_torch(model))
      name  PyTorch      epsilon  momentum  tracks  jaxnorm
      0     BatchNorm2d  1e-05    0.1       yes     BatchNorm(epsilon=1e-05)
      1     GroupNorm    0.001    -         -       GroupNorm(num_groups=4, epsilon=0.001)
      >>> interop.describe_torch(model)[1].arguments
      {'num_groups': 4, 'epsilon': 0.001}

    References:
      torch.nn.Module.named_modules, PyTorch 2.13.
    """
    modules = named_modules("describe_torch", module)
    first_names: dict[int, str] = {}
    rows = []
    for name, m in modules:
        row = norm_row(name, m)
        first = first_names.setdefault(id(m), name)
        if row is not None:
            rows.append(row if first == name else row.with_note(f"the same module as {first!r}"))
    return NormRows(rows)


def _cells(row: NormRow) -> tuple[str, ...]:
    """What the table says of a norm; the note is a comment after the code."""
    epsilon = "-" if row.epsilon is None else f"{row.epsilon:g}"
    momentum = "-" if row.momentum is None else f"{row.momentum:g}"
    if row.tracks and row.arguments.get("momentum", 0) is None:
        momentum = "None"
    code = f"{row.code}  # {row.note}" if row.note else row.code
    tracks = "yes" if row.tracks else "-"
    return row.name or "-", row.torch_class, epsilon, momentum, tracks, code
