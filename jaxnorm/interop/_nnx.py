"""How do Linen's two collections become NNX's one tree, and back?"""

from collections.abc import Mapping
from typing import Any

from jaxnorm.interop._trees import Tree, flatten, nest, settled, split

STATE = ("mean", "var", "count")


def to_nnx(variables: Mapping[str, Any]) -> Tree:
    """Puts params and batch_stats into one tree, as NNX has them.

    Args:
      variables: {"params": ..., "batch_stats": ...}.

    Returns:
      One tree of nested dicts, for `nnx.replace_by_pure_dict(state, tree)`, which takes the digits
      of lists as strings.

    Raises:
      ValueError: if both collections have an array of one name.

    Example:
      >>> import jaxnorm
      >>> from jaxnorm import interop
      >>> variables = {"params": {"bn": jaxnorm.init_params(2)},
      ...              "batch_stats": {"bn": jaxnorm.init_batch_stats(2)}}
      >>> sorted(interop.to_nnx(variables)["bn"])
      ['bias', 'count', 'mean', 'scale', 'var']

    References:
      flax.nnx.replace_by_pure_dict, flax 0.12.
    """
    params, stats = (flatten(variables.get(name, {})) for name in ("params", "batch_stats"))
    twice = sorted(params.keys() & stats.keys())
    if twice:
        raise ValueError(f"to_nnx: {twice} should be in one collection, but are in both")
    return nest("to_nnx", {**params, **stats})


def from_nnx(tree: Mapping[Any, Any]) -> Tree:
    """Parts an NNX model's tree into params and batch_stats.

    Args:
      tree: `nnx.to_pure_dict(nnx.state(model))`. What accumulates is left out.

    Returns:
      {"params": ..., "batch_stats": ...}: a module's mean, var and count are its batch_stats.

    Example:
      >>> from flax import nnx
      >>> import jaxnorm.nnx
      >>> from jaxnorm import interop
      >>> layer = jaxnorm.nnx.BatchNorm(2, rngs=nnx.Rngs(0))
      >>> variables = interop.from_nnx(nnx.to_pure_dict(nnx.state(layer)))
      >>> sorted(variables["params"]), sorted(variables["batch_stats"])
      (['bias', 'scale'], ['count', 'mean', 'var'])

    References:
      flax.nnx.to_pure_dict, flax 0.12.
    """
    flat = settled(flatten(tree))
    norms = {split(name)[0] for name in flat if split(name)[1] == "mean"}

    def of_a_state(name: str) -> bool:
        module, leaf = split(name)
        return module in norms and leaf in STATE

    return {
        "params": nest("from_nnx", {k: v for k, v in flat.items() if not of_a_state(k)}),
        "batch_stats": nest("from_nnx", {k: v for k, v in flat.items() if of_a_state(k)}),
    }
