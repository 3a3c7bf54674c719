"""Freezes norms in NNX models: functions that change a model, and the type of its parameters."""

from typing import Any

from flax import nnx

from jaxnorm._layers.nnx_base import Tracked
from jaxnorm._layers.nnx_models import tracking


class FrozenParam(nnx.BatchStat[Any]):
    """The scale or the bias of a frozen norm: a constant that is not an nnx.Param.

    It is an nnx.BatchStat, so that the filters of nnx.split, nnx.state and the transformations of
    NNX select it together with the running statistics. See `freeze`.

    Example:
      >>> from flax import nnx
      >>> import jaxnorm.nnx
      >>> layer = jaxnorm.nnx.BatchNorm(1, rngs=nnx.Rngs(0))
      >>> jaxnorm.nnx.freeze(layer)
      >>> isinstance(layer.scale, jaxnorm.nnx.FrozenParam), isinstance(layer.scale, nnx.Param)
      (True, False)

    References:
      torchvision.ops.FrozenBatchNorm2d, torchvision 0.28, whose weight and bias are buffers.
    """


def freeze(model: nnx.Module) -> None:
    """Freezes the norms of a model that have running statistics.

    These layers then normalize by the running statistics and do not update them, also after
    `model.train()` and whatever the call says. Their scale and bias become `FrozenParam`, which
    nnx.grad and nnx.Optimizer with wrt=nnx.Param leave out: they have no gradients and no weight
    decay. The paths in nnx.state(model) stay the same, and so does the structure of a checkpoint of
    the whole state.

    Create the optimizer after the call, because its state has the structure of the parameters. The
    layers without running statistics, such as `LayerNorm`, are not changed. `recalibrate` needs
    `unfreeze` first.

    Args:
      model: a model, or the part of it to freeze, which is changed in place.

    Raises:
      ValueError: if no layer of the model has running statistics; if another module of the model
        shares the scale or the bias of a layer. Modules outside of it are not checked.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> import jaxnorm.nnx
      >>> model = nnx.Sequential(
      ...     nnx.Linear(3, 4, rngs=nnx.Rngs(0)), jaxnorm.nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
      >>> jaxnorm.nnx.freeze(model)
      >>> optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)
      >>> model.train()
      >>> y = model(jnp.ones((8, 3)))
      >>> print(model.layers[1].count[...], list(nnx.state(model, nnx.Param)["layers"]))
      0 [0]

    References:
      torchvision.ops.FrozenBatchNorm2d, torchvision 0.28.
    """
    layers = [layer for _, layer in tracking(model)]
    if not layers:
        raise ValueError(
            "freeze: model should hold layers with running statistics, such as "
            "jaxnorm.nnx.BatchNorm, because these are frozen, but holds none "
            "[no-states]"
        )
    _set_frozen(model, layers, True)


def unfreeze(model: nnx.Module) -> None:
    """Makes the frozen norms of a model trainable again: the opposite of `freeze`.

    Scale and bias become nnx.Param again. Create a new optimizer after the call.

    Args:
      model: a model, or the part of it to unfreeze, which is changed in place.

    Raises:
      ValueError: if another module of the model shares the scale or the bias of a frozen layer.

    Example:
      >>> from flax import nnx
      >>> import jaxnorm.nnx
      >>> layer = jaxnorm.nnx.BatchNorm(1, rngs=nnx.Rngs(0))
      >>> jaxnorm.nnx.freeze(layer)
      >>> jaxnorm.nnx.unfreeze(layer)
      >>> list(nnx.state(layer, nnx.Param))
      ['bias', 'scale']

    References:
      As `freeze`.
    """
    _set_frozen(model, [layer for _, layer in tracking(model) if layer._frozen], False)


def _set_frozen(model: nnx.Module, layers: list[Tracked], frozen: bool) -> None:
    """Sets the mode and the type of scale and bias. Shared variables stay shared."""
    kind: type[nnx.Variable[Any]] = FrozenParam if frozen else nnx.Param
    held = [(layer, name, getattr(layer, name)) for layer in layers for name in ("scale", "bias")]
    held = [(layer, name, old) for layer, name, old in held if old is not None]
    variables, owners = {id(old) for *_, old in held}, {id(layer) for layer in layers}
    for path, node in nnx.iter_graph(model):
        held_by_node = map(id, getattr(node, "__dict__", {}).values())
        if id(node) not in owners and variables & set(held_by_node):
            raise ValueError(
                f"{'freeze' if frozen else 'unfreeze'}: a frozen norm should not share its scale "
                f"or bias with another module, because their type changes, but the "
                f"{type(node).__name__} at {'.'.join(map(str, path)) or 'the root'} shares one; "
                f"give each module separate parameters"
            )
    new = {id(old): kind.from_metadata(old.get_raw_value(), old.get_metadata()) for *_, old in held}
    for layer, name, old in held:
        setattr(layer, name, new[id(old)])
    for layer in layers:
        if frozen:
            layer._frozen = True
        else:
            del layer._frozen  # a model that was never frozen has none
