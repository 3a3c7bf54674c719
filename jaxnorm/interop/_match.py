"""Proposes a map from the modules of a PyTorch model to those of a Flax model."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from jaxnorm.interop._equations import Equations
from jaxnorm.interop._from_torch import from_torch
from jaxnorm.interop._kernels import Kernels, kernels
from jaxnorm.interop._kernels_of import kernels_of
from jaxnorm.interop._layouts import Kind
from jaxnorm.interop._models import model_of
from jaxnorm.interop._pairs import (
    ModuleShapes,
    Pair,
    format_shapes,
    modules_of,
    names_of,
    pairs,
    with_notes,
)
from jaxnorm.interop._table import table_lines
from jaxnorm.interop._torch_calls import TorchCalls
from jaxnorm.interop._torch_modules import named_modules
from jaxnorm.interop._trees import Tree, split
from jaxnorm.interop._verify import ModelPair

# The text in the table for the module that is the whole model.
NO_NAME = '""'


@dataclasses.dataclass(frozen=True)
class Proposal:
    """The result of `match` and `match_variables`: pairs of modules, printed as a table.

    Attributes:
      pairs: a `Pair` for each matched module of the PyTorch model.
      only_torch: the unmatched modules of the PyTorch model, with their converted shapes.
      only_flax: the unmatched modules of the Flax model, with their shapes.
      kinds: the kinds of the kernels, by names in PyTorch.
      models: both models with their example inputs; None if the models are not known.

    Example:
      >>> import numpy as np
      >>> from jaxnorm import interop
      >>> state_dict = {f"{i}.weight": np.ones(8) for i in range(2)}
      >>> variables = {"params": {f"RMSNorm_{i}": {"scale": np.ones(8)} for i in range(2)}}
      >>> print(interop.match_variables(variables, state_dict))
      PyTorch  Flax  arrays in Flax  matched by
      only in PyTorch:
        0  scale [8]
        1  scale [8]
      only in Flax:
        RMSNorm_0  scale [8]
        RMSNorm_1  scale [8]
      2 of these can be paired by their order: write allow_order=True, and call verify()

    References:
      torch.nn.Module.named_modules, PyTorch 2.13.
    """

    pairs: tuple[Pair, ...]
    only_torch: tuple[ModuleShapes, ...]
    only_flax: tuple[ModuleShapes, ...]
    kinds: Mapping[str, Kind]
    models: ModelPair | None = None

    @property
    def names(self) -> dict[str, str]:
        """The `names` for `from_torch` and `to_torch`, from the pairs."""
        return names_of(self.pairs)

    @property
    def kernels(self) -> Kernels:
        """The `convert` for `from_torch`; its `inverse` is the `convert` for `to_torch`."""
        return Kernels(self.kinds, self.names)

    def variables(self) -> Tree:
        """Converts the arrays of the PyTorch model to variables of the Flax model.

        Returns:
          {"params": ..., "batch_stats": ...}, as from `from_torch`. For an NNX model, `to_nnx`
          converts them to the structure of its state.

        Raises:
          ValueError: if a module is unmatched, or the models are not known.
        """
        return self._complete().variables()

    def verify(
        self, variables: Mapping[str, Any] | None = None, *, tolerance: float = 1e-5
    ) -> float:
        """Compares the outputs of both models in evaluation.

        Modules with the same initial values can be exchanged without changing the output. The
        outputs are therefore compared twice: with the current values, and with values that differ
        between all modules, in a copy of the PyTorch model. If `variables` is given, they are
        compared once.

        Args:
          variables: the variables to evaluate. Defaults to `variables()`.
          tolerance: the largest difference allowed, relative to the largest value of the output.

        Returns:
          The largest difference, relative to the largest value of the output.

        Raises:
          ValueError: if the difference exceeds the tolerance; the error names the first module of
            the PyTorch model whose output the Flax model does not compute. Also if the shapes of
            the outputs differ, or a module is unmatched.
          TypeError: if the PyTorch model does not return tensors.
        """
        return self._complete().verify(variables, tolerance=tolerance)

    def __str__(self) -> str:
        """Returns a table with a row for each pair, and lists of the unmatched modules."""
        rows = [("PyTorch", "Flax", "arrays in Flax", "matched by")]
        for pair in self.pairs:
            by = f"{pair.by}; {pair.note}" if pair.note else pair.by
            rows.append(
                (pair.torch or NO_NAME, pair.flax or NO_NAME, format_shapes(pair.shapes), by)
            )
        lines = table_lines(rows)
        for title, rest in (
            ("only in PyTorch:", self.only_torch),
            ("only in Flax:", self.only_flax),
        ):
            if rest:
                lines.append(title)
                lines += [
                    f"  {module.name or NO_NAME}  {format_shapes(module.shapes)}" for module in rest
                ]
        if self.by_order_only:
            lines.append(
                f"{self.by_order_only} of these can be paired by their order: write "
                f"allow_order=True, and call verify()"
            )
        return "\n".join(lines)

    @property
    def by_order_only(self) -> int:
        """The number of unmatched modules of PyTorch that could be paired by order."""
        return len(pairs(list(self.only_torch), list(self.only_flax), {}, allow_order=True))

    def _complete(self) -> ModelPair:
        if self.models is None:
            raise ValueError(
                "match_variables: both models should be known, because this method calls them, but "
                "only their arrays are; write match(model, example_input, module, torch_input)"
            )
        if self.only_torch or self.only_flax:
            raise ValueError(
                f"match: each module should be matched, but these are not; write names= for "
                f"them, kinds= if a kernel has another layout, or allow_order=True\n{self}"
            )
        return dataclasses.replace(self.models, kernels=self.kernels, pairs=self.pairs)


def match(
    model: Any,
    example_input: Any,
    module: Any,
    torch_input: Any,
    *,
    kwargs: Mapping[str, Any] | None = None,
    torch_kwargs: Mapping[str, Any] | None = None,
    names: Mapping[str, str] | None = None,
    kinds: Mapping[str, Kind] | None = None,
    allow_order: bool = False,
) -> Proposal:
    """Proposes the `names` for `from_torch` from a PyTorch model and the same model in Flax.

    Both models are called once on an example, in evaluation mode, which does not change them.
    Modules are paired if their arrays have the same names and shapes after the kernels are
    converted to Flax's layout. The criteria are, in this order:

    1. `names`, if it contains the pair;
    2. the name of the module, if it is the same in both models;
    3. the shapes, if no other module of either model has the same shapes;
    4. with `allow_order=True`, the order in which the two models call the remaining modules.

    Pairs by criteria 2 to 4 can be wrong: `Proposal.verify` compares the outputs.

    Args:
      model: a Module of flax.linen, or one of flax.nnx, which is evaluated after `.eval()`.
      example_input: its input, an array; or a tuple of its positional arguments.
      module: the torch.nn.Module.
      torch_input: the same input as a tensor; or a tuple of the positional arguments of module.
      kwargs: keyword arguments of the model for evaluation, such as {"train": False}.
      torch_kwargs: keyword arguments of the PyTorch model.
      names: the known pairs, from names in PyTorch to names in Flax.
      kinds: the kinds of kernels that `kernels_of` cannot find, as given to it.
      allow_order: whether to pair modules by order alone. Defaults to False.

    Returns:
      A `Proposal`. str() formats it as a table, `names` is the map, `kernels` is the `convert`,
      `variables()` returns the variables of the model, and `verify()` compares the outputs.

    Raises:
      TypeError: if the model is not a Flax model.
      ValueError: if module is not a PyTorch model; if `names` contains modules that do not exist,
        or pairs modules of different shapes; in the same cases as `kernels_of`.

    Example:
      >>> import flax.linen as nn, numpy as np, torch
      >>> from jaxnorm import interop
      >>> from jaxnorm.linen import LayerNorm
      >>> module = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8))
      >>> model = nn.Sequential([nn.Dense(8), LayerNorm(epsilon=1e-5)])
      >>> x = np.ones((2, 4), np.float32)
      >>> proposal = interop.match(model, x, module, torch.from_numpy(x))
      >>> print(proposal)
      PyTorch  Flax      arrays in Flax           matched by
      0        layers_0  bias [8], kernel [4, 8]  unique shape
      1        layers_1  bias [8], scale [8]      unique shape
      >>> proposal.verify() < 1e-6
      True

    References:
      torch.nn.Module.register_forward_pre_hook, PyTorch 2.13; jax.make_jaxpr, JAX 0.10.
    """
    named_modules("match", module)  # raises an error if the models were exchanged
    args, torch_args = _arguments(example_input), _arguments(torch_input)
    complete_kinds = kernels_of(module, kinds=kinds).kinds
    converted = from_torch(module, convert=Kernels(complete_kinds))
    calls = TorchCalls(module, torch_args, torch_kwargs or {}, keep=set())
    flax_model = model_of(model, args, kwargs or {})
    uses = Equations(flax_model.call_flat, flax_model.shapes).first_uses()
    order: dict[str, int] = {}
    for name, position in uses.items():  # sorted by position
        order.setdefault(split(name.partition(".")[2])[0], position)
    models = ModelPair(flax_model, module, torch_args, torch_kwargs or {})
    torch_modules, modules = modules_of(converted, calls.order), modules_of(flax_model.like, order)
    return _proposal(torch_modules, modules, names, complete_kinds, models, allow_order=allow_order)


def match_variables(
    variables: Mapping[str, Any],
    state_dict: Any,
    *,
    names: Mapping[str, str] | None = None,
    kinds: Mapping[str, Kind] | None = None,
    allow_order: bool = False,
) -> Proposal:
    """Proposes the `names` for `from_torch` from arrays only, without the models.

    Modules are paired by the same criteria as in `match`. Because the order of the calls is not
    known, the natural order of the names is used instead, in which 2 comes before 10. The outputs
    cannot be compared either. Prefer `match` if you have both models.

    Args:
      variables: variables of the new model, or their `jax.eval_shape`.
      state_dict: as for `from_torch`.
      names: the known pairs, from names in PyTorch to names in Flax.
      kinds: the kinds of the kernels, as for `kernels`.
      allow_order: whether to pair modules by the order of their names alone. Defaults to False.

    Returns:
      A `Proposal`. Its `variables()` and `verify()` raise an error, because they need the models.

    Raises:
      ValueError: in the same cases as `match`.

    Example:
      >>> import numpy as np
      >>> from jaxnorm import interop
      >>> state_dict = {"a.1.weight": np.ones((8, 4)), "a.2.weight": np.ones(8)}
      >>> variables = {"params": {"Dense_0": {"kernel": np.ones((4, 8))},
      ...                         "RMSNorm_0": {"scale": np.ones(8)}}}
      >>> interop.match_variables(variables, state_dict).names
      {'a.1': 'Dense_0', 'a.2': 'RMSNorm_0'}

    References:
      torch.nn.Module.state_dict, PyTorch 2.13.
    """
    convert = kernels(kinds)
    torch_modules = modules_of(from_torch(state_dict, convert=convert))
    modules = modules_of(variables)
    return _proposal(torch_modules, modules, names, convert.kinds, None, allow_order=allow_order)


def _proposal(
    torch_modules: list[ModuleShapes],
    modules: list[ModuleShapes],
    names: Mapping[str, str] | None,
    kinds: Mapping[str, Kind],
    models: ModelPair | None,
    *,
    allow_order: bool,
) -> Proposal:
    found = pairs(torch_modules, modules, names or {}, allow_order=allow_order)
    paired = {pair.torch for pair in found}, {pair.flax for pair in found}
    return Proposal(
        tuple(with_notes(found, torch_modules, modules)),
        tuple(module for module in torch_modules if module.name not in paired[0]),
        tuple(module for module in modules if module.name not in paired[1]),
        MappingProxyType(dict(kinds)),
        models,
    )


def _arguments(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)
