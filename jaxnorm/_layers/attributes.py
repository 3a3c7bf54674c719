"""Checks the attributes of a layer, and computes the axes that they specify.

A layer is a Linen or NNX module with the attributes of Flax's classes.
"""

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxnorm._core import arguments


class Default(float):
    """The type of a default, which distinguishes it from the same number given by the user."""


MOMENTUM = Default(0.1)

# The names of arguments in other libraries, and in this one.
JAXNORM_NAMES = {
    "eps": ("epsilon",),  # PyTorch, Haiku, Equinox
    "affine": ("use_scale", "use_bias"),  # PyTorch
    "elementwise_affine": ("use_scale", "use_bias"),  # PyTorch
    "channelwise_affine": ("use_scale", "use_bias"),  # Equinox
    "use_weight": ("use_scale",),  # Equinox
    "num_channels": ("num_features",),  # PyTorch
    "normalized_shape": ("num_features",),  # PyTorch
    "num_features": ("num_features",),
    "features": ("num_features",),
    "scale": ("use_scale",),  # Keras
    "center": ("use_bias",),  # Keras
    "gamma_initializer": ("scale_init",),  # Keras
    "beta_initializer": ("bias_init",),  # Keras
    "synchronized": ("axis_name",),  # Keras
    "create_scale": ("use_scale",),  # Haiku
    "create_offset": ("use_bias",),  # Haiku
    "offset_init": ("bias_init",),  # Haiku
    "decay_rate": ("decay",),  # Haiku
    "cross_replica_axis": ("axis_name",),  # Haiku
    "cross_replica_axis_index_groups": ("axis_index_groups",),  # Haiku
    "groups": ("num_groups",),  # Haiku, Keras, Equinox
    "axis": ("axis", "feature_axes", "reduction_axes"),  # Keras, Haiku
    "data_format": ("axis", "feature_axes", "reduction_axes"),  # Haiku
    "channel_axis": ("axis", "feature_axes", "reduction_axes"),  # the functions of this package
    "param_axis": ("feature_axes",),  # Haiku
}


def check_names(layer: type[Any], kwargs: Mapping[str, Any]) -> None:
    """Raises an error, which says what to write, if a keyword has its name in another library.

    Other unknown names raise Python's own error in the constructor.
    """
    name, accepted = layer.__name__, _accepted(layer.__init__)
    if accepted is None:
        return
    for other in sorted((JAXNORM_NAMES.keys() & kwargs.keys()) - accepted):
        wanted = [known for known in JAXNORM_NAMES[other] if known in accepted]
        if wanted == ["reduction_axes"]:  # of a group norm, where it does not name the channels
            raise TypeError(
                f"{name}: {other} should not be given, because the layer requires the channels on "
                f"the last axis; write jnp.moveaxis(x, 1, -1), or call "
                f"jaxnorm.group_norm(..., channel_axis=1) [argument-name]"
            )
        if wanted:
            raise TypeError(
                f"{name}: {other} should be {' and '.join(wanted)}, because that is "
                f"jaxnorm's name for it; write {', '.join(f'{known}=...' for known in wanted)} "
                f"[argument-name]"
            )
        if JAXNORM_NAMES[other] == ("num_features",):
            raise TypeError(
                f"{name}: {other} should not be given, because the number of channels is not an "
                f"argument; leave it out [number-of-channels]"
            )


@functools.cache
def _accepted(constructor: Any) -> frozenset[str] | None:
    """Returns the names of a constructor's arguments; None if a subclass accepts any."""
    parameters = inspect.signature(constructor).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return None
    return frozenset(parameters)


# ---- Checks without an input ----


def check(layer: Any, *, infers_channels: bool) -> None:
    """Checks the attributes that any layer may have.

    Linen infers the channels from the input, so the number of channels that PyTorch's layers take
    first would be used as another argument.
    """
    name, held = type(layer).__name__, vars(layer)
    for switch in ("use_running_average", "update_stats"):
        value = held.get(switch)
        if value is None or isinstance(value, bool | np.bool_):
            continue
        message = (
            f"{name}: {switch} should be a bool or None, because it selects the statistics "
            f"to normalize by or to update, but is {value!r}"
        )
        first = infers_channels and switch == "use_running_average"
        if first and isinstance(value, int | np.integer):
            raise ValueError(
                f"{message}; the number of channels is not an argument: write {name}() "
                f"[number-of-channels]"
            )
        raise ValueError(f"{message} [not-a-python-bool]")
    number_of_channels = isinstance(layer.epsilon, int | float | np.number) and layer.epsilon >= 1
    if infers_channels and number_of_channels:
        raise ValueError(
            f"{name}: epsilon should be a small number, because it is added to the variance, but "
            f"is {layer.epsilon!r}; the number of channels is not an argument: write {name}(), and "
            f"epsilon=1e-5 for PyTorch's epsilon [number-of-channels]"
        )
    arguments.number(name, "epsilon", layer.epsilon, least=0)
    for argument in ("dtype", "param_dtype"):
        arguments.float_dtype(name, argument, held.get(argument))
    for switch in ("use_bias", "use_scale", "track_running_stats", "skip_nonfinite"):
        if switch in held:
            arguments.boolean(name, switch, held[switch])
    if "momentum" in held:
        _check_momentum(layer)
    if "r_max" in held:
        _check_limits(layer)
    if "num_groups" in held:
        _check_groups(layer)


def _check_momentum(layer: Any) -> None:
    """Checks momentum, the weight of the new value, and decay, which is Flax's momentum."""
    name, momentum, decay = type(layer).__name__, layer.momentum, layer.decay
    if decay is not None and not isinstance(momentum, Default):
        raise ValueError(
            f"{name}: momentum or decay should be given, not both, because decay = 1 - momentum, "
            f"but has momentum={momentum} and decay={decay} [momentum-and-decay]"
        )
    for argument, value in (("momentum", momentum), ("decay", decay)):
        if value is not None:
            arguments.number(name, argument, value, least=0, most=1)
    if momentum is not None and not isinstance(momentum, jax.core.Tracer) and 0.5 < momentum < 1.0:
        raise ValueError(
            f"{name}: momentum should not lie between 0.5 and 1.0, because it weighs the new value "
            f"as in PyTorch, but is {momentum}; if it is Flax's, which weighs the old value, write "
            f"decay={momentum} [momentum-of-flax]"
        )


def _check_limits(layer: Any) -> None:
    """Checks the limits and the running statistics of batch renorm."""
    arguments.limits(type(layer).__name__, layer.r_max, layer.d_max)
    if not layer.track_running_stats:
        raise ValueError(
            f"{type(layer).__name__}: track_running_stats should be True, because batch renorm "
            f"corrects towards the running statistics, but is False; without them, write BatchNorm"
        )


def _check_groups(layer: Any) -> None:
    """Checks that either the number or the size of the groups is given."""
    if (layer.num_groups is None) == (layer.group_size is None):
        raise ValueError(
            f"{type(layer).__name__}: one of num_groups and group_size should be given, because "
            f"each determines the other, but has num_groups={layer.num_groups} and "
            f"group_size={layer.group_size}; write num_groups=None with a group_size "
            f"[num-groups-and-group-size]"
        )


def number_of_groups(layer: Any, channels: int) -> int:
    """Returns the number of groups, which has to divide the number of channels."""
    _check_groups(layer)
    said = "num_groups" if layer.group_size is None else "group_size"
    divisor = arguments.positive_int(
        type(layer).__name__, said, getattr(layer, said), "it divides the channels"
    )
    if channels % divisor:
        raise ValueError(
            f"{type(layer).__name__}: {said} should divide the channels of x, because all groups "
            f"are of one size, but is {divisor} for {channels} channels; the channels are the last "
            f"axis of x [groups-divide-channels]"
        )
    return divisor if said == "num_groups" else channels // divisor


# ---- The axes of the parameters, in increasing order, as in Flax ----


def batch_norm_axes(layer: Any, ndim: int) -> tuple[int, ...]:
    """Returns the channel axes, and checks the rank of the input."""
    _check_rank(layer, ndim)
    return _sorted_axes(layer, "axis", ndim)


def instance_norm_axes(layer: Any, ndim: int) -> tuple[int, ...]:
    """Returns the channel axes of x; `feature_axes` counts a batch axis even for one sample."""
    _check_rank(layer, ndim)
    missing = 1 if is_one_sample(layer, ndim) else 0
    axes = _sorted_axes(layer, "feature_axes", ndim + missing)
    if 0 in axes:
        raise ValueError(
            f"{type(layer).__name__}: feature_axes should not hold axis 0, because it is the "
            f"batch axis, but is {layer.feature_axes}"
        )
    return tuple(a - missing for a in axes)


def group_norm_axes(layer: Any, ndim: int) -> tuple[int, ...]:
    """Returns the last axis, because Flax has no argument for another one."""
    return (ndim - 1,)


def feature_axes(layer: Any, ndim: int) -> tuple[int, ...]:
    """Returns the axes of the parameters of a layer or RMS norm."""
    return _sorted_axes(layer, "feature_axes", ndim)


def is_one_sample(layer: Any, ndim: int) -> bool:
    """Returns whether an instance norm of known rank gets an input without an axis of samples."""
    return layer.ranks is not None and ndim < layer.ranks[-1]


def _sorted_axes(layer: Any, attribute: str, ndim: int) -> tuple[int, ...]:
    axes = getattr(layer, attribute)
    return tuple(sorted(arguments.axes(type(layer).__name__, attribute, axes, ndim)))


def _check_rank(layer: Any, ndim: int) -> None:
    """Checks the rank of the input of a layer for 1, 2 or 3 spatial axes."""
    if layer.ranks is not None and ndim not in layer.ranks:
        ranks = " or ".join(str(rank) for rank in layer.ranks)
        raise ValueError(
            f"{type(layer).__name__}: x should have {ranks} axes, but has {ndim} [x-rank]"
        )
