"""Calls a Linen or NNX model in evaluation mode with given variables."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxnorm.interop._nnx import from_nnx, to_nnx
from jaxnorm.interop._trees import Tree, flatten, nest


@dataclasses.dataclass(frozen=True)
class Model:
    """A model as a function of its variables, on one example input.

    Attributes:
      like: the shapes and dtypes of the variables.
      call: computes the output from the variables.
    """

    like: Tree
    call: Callable[[Mapping[str, Any]], Any]

    @property
    def shapes(self) -> dict[str, Any]:
        """The shapes and dtypes by dotted name, which begins with the collection."""
        return flatten("match", self.like)

    def call_flat(self, arrays: Mapping[str, Any]) -> Any:
        """Returns the output from variables by dotted name."""
        return self.call(nest("match", arrays))


def model_of(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Model:
    """Returns the function that a Linen or NNX model computes in evaluation mode.

    Raises:
      TypeError: if it is neither.
    """
    import flax.linen
    from flax import nnx

    if isinstance(model, flax.linen.Module):
        return _of_linen(model, args, kwargs)
    if isinstance(model, nnx.Module):
        return _of_nnx(model, args, kwargs)
    found = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
    raise TypeError(
        f"match: model should be a Module of flax.linen or flax.nnx, but is {found}; write "
        f"match_variables(variables, state_dict) for other models"
    )


def _of_linen(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Model:
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = jax.eval_shape(lambda: model.init(rngs, *args, **kwargs))
    like = {name: variables[name] for name in ("params", "batch_stats") if name in variables}
    return Model(like, lambda given: model.apply(given, *args, **kwargs))


def _of_nnx(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Model:
    from flax import nnx

    parts: Any = nnx.split(model, nnx.RngState, ...)
    graphdef, streams, state = parts
    like = from_nnx(nnx.to_pure_dict(state))
    like = {name: jax.eval_shape(lambda tree=tree: tree) for name, tree in like.items()}

    def call(variables: Mapping[str, Any]) -> Any:
        new = jax.tree.map(lambda a: a, state)  # copies the containers, which are modified
        nnx.replace_by_pure_dict(new, to_nnx(variables))
        evaluated = nnx.merge(graphdef, streams, new)
        evaluated.eval()
        return evaluated(*args, **kwargs)

    return Model(like, call)
