"""Calls the functions of `jaxnorm.functional` with the attributes of a layer."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxnorm import functional
from jaxnorm._core import arguments, checks
from jaxnorm._core.layout import Layout
from jaxnorm._core.variables import Affine, BatchStats
from jaxnorm._layers import attributes

TrackedNorm = Callable[..., tuple[jax.Array, BatchStats | None]]


def normalize_and_update(
    layer: Any,
    x: ArrayLike,
    params: Affine,
    batch_stats: BatchStats | None,
    write_back: Callable[[Any, BatchStats], None],
    **call: Any,
) -> jax.Array:
    """Calls the norm of the layer, and writes the running statistics back if they were updated."""
    norm: TrackedNorm = layer._norm
    y, new_batch_stats = norm(layer, x, params, batch_stats, **call)
    if new_batch_stats is not None and new_batch_stats is not batch_stats:
        write_back(layer, new_batch_stats)
    return y


def batch_norm(
    layer: Any, x: ArrayLike, params: Affine, batch_stats: BatchStats | None, **call: Any
) -> tuple[jax.Array, BatchStats | None]:
    """Calls `jaxnorm.batch_norm` with the arguments of the layer and of the call."""
    return functional.batch_norm(x, params, batch_stats, **_batch_options(layer, x, **call))


def batch_renorm(
    layer: Any, x: ArrayLike, params: Affine, batch_stats: BatchStats, **call: Any
) -> tuple[jax.Array, BatchStats]:
    """Calls `jaxnorm.batch_renorm` with the arguments of the layer and of the call."""
    limits = {"r_max": layer.r_max, "d_max": layer.d_max}
    options = _batch_options(layer, x, **call)
    return functional.batch_renorm(x, params, batch_stats, **limits, **options)


def instance_norm(
    layer: Any, x: ArrayLike, params: Affine, batch_stats: BatchStats | None, **call: Any
) -> tuple[jax.Array, BatchStats | None]:
    """Calls `jaxnorm.instance_norm` with the arguments of the layer and of the call."""
    ndim = jnp.ndim(x)
    return functional.instance_norm(
        x,
        params,
        batch_stats,
        channel_axis=attributes.instance_norm_axes(layer, ndim),
        batch_axis=None if attributes.is_one_sample(layer, ndim) else 0,
        **_tracked_options(layer, ndim, **call),
    )


def group_norm(layer: Any, x: ArrayLike, params: Affine, **call: Any) -> jax.Array:
    """Calls `jaxnorm.group_norm` with the arguments of the layer and of the call."""
    name, ndim, channels = type(layer).__name__, jnp.ndim(x), jnp.shape(x)[-1]
    if layer.reduction_axes is None:
        kept: tuple[int, ...] = (0,)
    else:
        reduced = arguments.axes(name, "reduction_axes", layer.reduction_axes, ndim)
        if ndim - 1 not in reduced:
            raise ValueError(
                f"{name}: reduction_axes should hold the last axis, because it is the channel "
                f"axis, but is {layer.reduction_axes}"
            )
        kept = tuple(a for a in range(ndim) if a not in reduced)
    return functional.group_norm(
        x,
        params,
        num_groups=attributes.number_of_groups(layer, channels),
        batch_axis=kept,
        **_options(layer, **call),
    )


def layer_norm(layer: Any, x: ArrayLike, params: Affine, **call: Any) -> jax.Array:
    """Calls `jaxnorm.layer_norm` with the arguments of the layer and of the call."""
    return functional.layer_norm(x, **_feature_options(layer, x, params, **call))


def rms_norm(layer: Any, x: ArrayLike, params: Affine, **call: Any) -> jax.Array:
    """Calls `jaxnorm.rms_norm` with the arguments of the layer and of the call."""
    return functional.rms_norm(x, **_feature_options(layer, x, params, **call))


# ---- Arguments from attributes ----


def _options(layer: Any, *, mask: ArrayLike | None, initializing: bool = False) -> dict[str, Any]:
    """Returns the arguments of every norm. At initialization, no axis name needs to be bound."""
    return {
        "epsilon": layer.epsilon,
        "mask": mask,
        "axis_name": None if initializing else layer.axis_name,
        "axis_index_groups": None if initializing else layer.axis_index_groups,
        "dtype": layer.dtype,
    }


def _tracked_options(
    layer: Any,
    ndim: int,
    *,
    use_running_average: bool | None,
    update_stats: bool | None,
    mask: ArrayLike | None,
    initializing: bool = False,
) -> dict[str, Any]:
    """Returns the arguments of a norm that may have a state.

    A layer can be initialized with any input, even with one value per channel. A mask is passed for
    this purpose, because the number of values is not checked with a mask. Initialization does not
    update the state.
    """
    if update_stats is None:
        update_stats = layer.update_stats
    if initializing:
        update_stats = False
        mask = jnp.ones((1,) * ndim, bool) if mask is None else mask
    return {
        "use_running_average": layer.track_running_stats and use_running_average,
        "update_stats": update_stats,
        "momentum": layer.momentum if layer.decay is None else 1 - layer.decay,
        "skip_nonfinite": layer.skip_nonfinite,
        **_options(layer, mask=mask, initializing=initializing),
    }


def _batch_options(
    layer: Any, x: ArrayLike, *, initializing: bool = False, **call: Any
) -> dict[str, Any]:
    """Returns the arguments of batch norm; initialization ignores virtual_batch_size."""
    return {
        "channel_axis": attributes.batch_norm_axes(layer, jnp.ndim(x)),
        "virtual_batch_size": None if initializing else layer.virtual_batch_size,
        **_tracked_options(layer, jnp.ndim(x), initializing=initializing, **call),
    }


def _feature_options(layer: Any, x: ArrayLike, params: Affine, **call: Any) -> dict[str, Any]:
    """Returns the arguments of layer and RMS norm, whose parameters may have other axes."""
    name, shape = type(layer).__name__, jnp.shape(x)
    layout = Layout(len(shape), attributes.feature_axes(layer, len(shape)))
    reduced = arguments.axes(name, "reduction_axes", layer.reduction_axes, len(shape))
    scale, bias = checks.params(name, params, shape, layout.shape(x))
    spread = {"scale": scale, "bias": bias}
    return {
        "params": {k: layout.expand(a) for k, a in spread.items() if a is not None},
        "axis": reduced,
        **_options(layer, **call),
    }
