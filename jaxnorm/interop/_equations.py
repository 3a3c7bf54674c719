"""Lists the equations of a jaxpr, to find the first uses of its inputs and all of its results."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.extend.core import Literal

# Primitives that call a jaxpr with the same operands, and the parameter that contains it.
CALLS = {
    "pjit": "jaxpr",
    "jit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
}
# A model may cast or reshape all of its parameters before it calls its first module.
REARRANGEMENTS = {
    "broadcast_in_dim",
    "convert_element_type",
    "copy",
    "expand_dims",
    "optimization_barrier",
    "reduce_precision",
    "reshape",
    "rev",
    "sharding_constraint",
    "squeeze",
    "transpose",
}


@dataclasses.dataclass(frozen=True)
class Constant:
    """A value that is known at trace time."""

    value: Any


@dataclasses.dataclass(frozen=True)
class Equation:
    """One equation. Its values are numbered, because two calls of a jaxpr share its variables.

    Attributes:
      eqn: the equation of the jaxpr.
      operands: the numbers of its operands, or constants.
      results: the numbers of its results.
    """

    eqn: Any
    operands: tuple[int | Constant, ...]
    results: tuple[int, ...]


class Equations:
    """The equations of a function of named arrays, including those of the functions it calls."""

    def __init__(self, function: Callable[[Mapping[str, Any]], Any], arrays: Mapping[str, Any]):
        closed = jax.make_jaxpr(function)(dict(arrays))
        self._numbers = itertools.count()
        self.inputs = {name: next(self._numbers) for name in sorted(arrays)}
        self.equations: list[Equation] = []
        self._inline(closed, tuple(self.inputs.values()))

    def first_uses(self) -> dict[str, int]:
        """Returns the index of the first equation that computes with each array, if any."""
        alias = {number: name for name, number in self.inputs.items()}
        uses: dict[str, int] = {}
        for index, equation in enumerate(self.equations):
            names = [alias.get(operand) for operand in _numbered(equation.operands)]
            if equation.eqn.primitive.name in REARRANGEMENTS:
                pairs = zip(equation.operands, equation.results, strict=False)
                alias |= {r: alias[o] for o, r in pairs if isinstance(o, int) and o in alias}
            else:
                for name in names:
                    if name is not None:
                        uses.setdefault(name, index)
        return uses

    def results(self, arrays: Mapping[str, Any], sizes: set[int]) -> list[jax.Array]:
        """Returns every floating-point array of one of these sizes that the function computes."""

        @jax.jit
        def computed(arrays: Mapping[str, Any]) -> list[jax.Array]:
            values = {number: arrays[name] for name, number in self.inputs.items()}
            kept = []
            for equation in self.equations:
                results = _evaluated(equation, values)
                values |= dict(zip(equation.results, results, strict=True))
                kept += [a for a in results if a.size in sizes and _is_float(a)]
            return kept

        found: list[jax.Array] = computed({name: arrays[name] for name in self.inputs})
        return found

    def _inline(self, closed: Any, given: Sequence[int | Constant]) -> tuple[int | Constant, ...]:
        """Appends the equations of a jaxpr, and returns its results."""
        jaxpr = getattr(closed, "jaxpr", closed)
        values: dict[Any, int | Constant] = dict(zip(jaxpr.invars, given, strict=True))
        constants = map(Constant, getattr(closed, "consts", ()))
        values |= dict(zip(jaxpr.constvars, constants, strict=True))

        def read(atom: Any) -> int | Constant:
            return Constant(atom.val) if isinstance(atom, Literal) else values[atom]

        for eqn in jaxpr.eqns:
            operands = tuple(map(read, eqn.invars))
            called = eqn.params.get(CALLS.get(eqn.primitive.name, ""))
            results: tuple[int | Constant, ...]
            if called is not None:
                results = self._inline(called, operands)
            else:
                numbers = tuple(next(self._numbers) for _ in eqn.outvars)
                self.equations.append(Equation(eqn, operands, numbers))
                results = numbers
            values |= dict(zip(eqn.outvars, results, strict=True))
        return tuple(map(read, jaxpr.outvars))


def _numbered(operands: Sequence[int | Constant]) -> Iterator[int]:
    return (operand for operand in operands if isinstance(operand, int))


def _evaluated(equation: Equation, values: Mapping[int, Any]) -> list[Any]:
    """Returns the results of one equation."""
    primitive = equation.eqn.primitive
    operands = (o.value if isinstance(o, Constant) else values[o] for o in equation.operands)
    with equation.eqn.ctx.manager:
        results = primitive.bind(*operands, **primitive.get_bind_params(equation.eqn.params))
    return list(results) if primitive.multiple_results else [results]


def _is_float(a: Any) -> bool:
    return jax.numpy.issubdtype(a.dtype, jax.numpy.floating)
