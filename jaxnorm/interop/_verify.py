"""Compares the outputs of a PyTorch model and of a Flax model with its arrays."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnorm.interop._equations import Equations
from jaxnorm.interop._from_torch import from_torch
from jaxnorm.interop._kernels import Kernels
from jaxnorm.interop._models import Model
from jaxnorm.interop._pairs import Pair
from jaxnorm.interop._torch_calls import TorchCalls, tensors_of, with_distinct_values
from jaxnorm.interop._trees import Tree, flatten

HINT = (
    "compare the arguments of the modules, such as epsilon (describe_torch lists them), the kinds "
    "of the kernels, and the order in which modules of the same shapes are called"
)


@dataclasses.dataclass(frozen=True)
class ModelPair:
    """A PyTorch model and the same model in Flax, each with an example input.

    Attributes:
      model: the Flax model, as a function of its variables.
      module: the torch.nn.Module.
      args: its positional arguments.
      kwargs: its keyword arguments.
      kernels: the `convert` and the `names` of the conversion.
      pairs: the pairs of modules.
    """

    model: Model
    module: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    kernels: Kernels = dataclasses.field(default_factory=lambda: Kernels({}))
    pairs: tuple[Pair, ...] = ()

    def variables(self, module: Any = None) -> Tree:
        """Returns the arrays of the PyTorch model, or of a modified copy, as variables."""
        return from_torch(
            self.module if module is None else module,
            names=self.kernels.names,
            convert=self.kernels,
            like=self.model.like,
        )

    def verify(self, variables: Mapping[str, Any] | None, *, tolerance: float) -> float:
        """Returns the largest difference of the outputs, with current and with distinct values.

        If variables are given, only these are compared.
        """
        if variables is not None:
            return self._compare(self.module, variables, tolerance, "")
        difference = self._compare(self.module, self.variables(), tolerance, "")
        distinct = with_distinct_values(self.module)
        condition = " when no two of PyTorch's modules have the same values"
        return max(
            difference, self._compare(distinct, self.variables(distinct), tolerance, condition)
        )

    def _compare(
        self, module: Any, variables: Mapping[str, Any], tolerance: float, condition: str
    ) -> float:
        calls = TorchCalls(module, self.args, self.kwargs, keep=set())
        expected = tensors_of(calls.output)
        found = [np.asarray(a) for a in jax.tree.leaves(jax.jit(self.model.call)(variables))]
        if len(found) != len(expected):
            raise ValueError(
                f"verify: both models should return the same number of arrays, but module "
                f"returns {len(expected)} and the Flax model {len(found)}; wrap one of them"
            )
        differences = [_difference(a, b) for a, b in zip(found, expected, strict=True)]
        worst = max(differences, default=0.0)
        if not worst <= tolerance:  # it may be NaN
            raise ValueError(
                f"verify: the outputs should agree within {tolerance:g} of the largest value, but "
                f"differ by {worst:.2g}{condition}"
                f"{self._first_difference(module, variables, tolerance)}; {HINT}"
            )
        return worst

    def _first_difference(self, module: Any, variables: Mapping[str, Any], tolerance: float) -> str:
        """Returns the part of the error that names the first module that Flax does not compute."""
        partner = {pair.torch: pair for pair in self.pairs}
        calls = TorchCalls(module, self.args, self.kwargs, keep=set(partner))
        arrays = {k: jnp.asarray(a) for k, a in flatten("verify", variables).items()}
        sizes = {a.size for a in calls.outputs.values()}
        results = Equations(self.model.call_flat, arrays).results(arrays, sizes)
        computed = [np.asarray(a, np.float32) for a in results]  # as the outputs are
        for name in sorted(calls.outputs, key=calls.order.__getitem__):
            if not any(_same_values(a, calls.outputs[name], tolerance) for a in computed):
                pair = partner[name]
                return (
                    f"; the first module whose output the Flax model does not compute is {name!r}, "
                    f"matched with {pair.flax!r} by {pair.by}"
                )
        return ""


def _difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Returns the largest difference relative to the largest value, with channels first or last."""
    layouts = [expected]
    if expected.ndim > 2:
        layouts.append(np.moveaxis(expected, 1, -1))
    same_shape = [a.astype(np.float64) for a in layouts if a.shape == found.shape]
    if not same_shape:
        raise ValueError(
            f"verify: the outputs should have the same shape, up to the axis of the channels, "
            f"but PyTorch's has {expected.shape}, and that of Flax {found.shape}; "
            f"wrap one of the models"
        )
    largest = np.abs(same_shape[0]).max(initial=0)
    errors = [float(np.abs(found.astype(np.float64) - a).max(initial=0)) for a in same_shape]
    error = min(errors, key=lambda value: (np.isnan(value), value))
    return error / float(largest) if largest > 0 else error


def _same_values(found: np.ndarray, expected: np.ndarray, tolerance: float) -> bool:
    """Returns whether two arrays contain the same values, in any order and shape."""
    if found.size != expected.size:
        return False
    largest = np.abs(expected).max(initial=0)
    if not abs(found.mean() - expected.mean()) <= 10 * tolerance * largest:
        return False
    error = np.abs(np.sort(found, axis=None) - np.sort(expected, axis=None)).max(initial=0)
    return bool(error <= tolerance * largest)
