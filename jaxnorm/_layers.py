"""What do the Flax layers share? From a layer's attributes to the arguments of a function.

A layer is anything with the attributes of Flax's own classes. Where its variables live is the
business of the face that it belongs to.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jaxnorm import _checks


class Default(float):
    """A default that differs from the same number given by the user: None has a meaning here."""


MOMENTUM = Default(0.1)


def check_momentum(layer: Any) -> None:
    """Momentum weighs the new value and decay the old one; Flax's momentum is our decay."""
    name, momentum, decay = type(layer).__name__, layer.momentum, layer.decay
    if decay is not None and not isinstance(momentum, Default):
        raise ValueError(
            f"{name}: momentum or decay should be given, not both, because decay = 1 - momentum, "
            f"but has momentum={momentum} and decay={decay}"
        )
    if momentum is not None and 0.5 < momentum < 1.0:
        raise ValueError(
            f"{name}: momentum should not lie between 0.5 and 1.0, because it weighs the new value "
            f"as in PyTorch, but is {momentum}; if it is Flax's, which weighs the old value, write "
            f"decay={momentum}"
        )


def check_rank(layer: Any, shape: Sequence[int]) -> None:
    """A layer for 1, 2 or 3 space axes takes only inputs of its ranks."""
    if layer.ranks is not None and len(shape) not in layer.ranks:
        ranks = " or ".join(str(rank) for rank in layer.ranks)
        raise ValueError(
            f"{type(layer).__name__}: x should have {ranks} axes, but has shape {tuple(shape)}"
        )


def channel_axes(layer: Any, name: str, axis: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    """The channel axes in rising order, as Flax lays its parameters out."""
    return tuple(sorted(_checks.axes(type(layer).__name__, name, axis, ndim)))


def instance_axes(layer: Any, ndim: int) -> tuple[int | None, tuple[int, ...]]:
    """The batch axis, None for a layer of known rank that gets one sample, and the channel axes.

    The channel axes are said for a batch; one sample lacks the axis in front of them.
    """
    name, batched = type(layer).__name__, ndim if layer.ranks is None else layer.ranks[-1]
    axes = tuple(sorted(_checks.axes(name, "feature_axes", layer.feature_axes, batched)))
    if 0 in axes:
        raise ValueError(
            f"{name}: feature_axes should not hold axis 0, because it is that of the samples, but "
            f"is {layer.feature_axes}"
        )
    if ndim == batched:
        return 0, axes
    return None, tuple(a - 1 for a in axes)


def tracked_arguments(layer: Any, ndim: int, mask: Any, initializing: bool) -> dict[str, Any]:
    """The arguments of batch_norm and instance_norm that are attributes of the layer.

    A layer is initialized with any input, on one device: one value per channel, or an axis name
    that no one has bound, is harmless then. A mask says that the number of values is not known.
    """
    if initializing and mask is None:
        mask = jnp.ones((1,) * ndim, bool)
    return {
        "momentum": layer.momentum if layer.decay is None else 1 - layer.decay,
        "epsilon": layer.epsilon,
        "mask": mask,
        "axis_name": None if initializing else layer.axis_name,
        "axis_index_groups": None if initializing else layer.axis_index_groups,
        "skip_nonfinite": layer.skip_nonfinite,
        "dtype": layer.dtype,
    }
