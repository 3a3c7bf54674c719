"""Lists the norms of a PyTorch model as a table, with information that a state dict lacks."""

from typing import Any

from jaxnorm.interop._table import table_lines
from jaxnorm.interop._torch_modules import named_modules
from jaxnorm.interop._torch_norms import NormRow, norm_row


class NormRows(tuple[NormRow, ...]):
    """The result of `describe_torch`: a tuple of rows that is printed as a table.

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
        """Returns a table with one row for each norm."""
        header = ("name", "PyTorch", "epsilon", "momentum", "tracks", "jaxnorm")
        return "\n".join(table_lines([header, *map(_cells, self)]))


def describe_torch(module: Any) -> NormRows:
    """Lists the norms of a PyTorch model, with the arguments of the corresponding jaxnorm layers.

    A state dict does not contain epsilon and momentum, nor whether a layer tracks running
    statistics. The defaults of epsilon differ. In PyTorch, epsilon is 1e-5, or None in RMSNorm. In
    jaxnorm, it is 1e-5 in BatchNorm and BatchRenorm and, as in Flax, 1e-6 in all other layers.

    A module is recognized by the name of its class or of a base class. A module that looks like a
    norm but is not recognized is listed as "unknown". A call of torch.nn.functional.layer_norm in a
    `forward` is not a module, and cannot be listed.

    Args:
      module: a torch.nn.Module.

    Returns:
      A tuple with a `NormRow` for each norm, in the order of the model; str() formats it as a
      table. A norm with two names is listed twice.

    Raises:
      ValueError: if module is not a model.

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
    """Returns the cells of one row; the note is a comment after the code."""
    epsilon = "-" if row.epsilon is None else f"{row.epsilon:g}"
    momentum = "-" if row.momentum is None else f"{row.momentum:g}"
    if row.tracks and row.arguments.get("momentum", 0) is None:
        momentum = "None"
    code = f"{row.code}  # {row.note}" if row.note else row.code
    tracks = "yes" if row.tracks else "-"
    return row.name or "-", row.torch_class, epsilon, momentum, tracks, code
