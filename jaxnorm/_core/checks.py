"""Checks x and the arrays that are given with it: dtypes, ranks and shapes.

The other checks are those of single arguments (`_core/arguments.py`), of running statistics
(`_stats/state_checks.py`) and of the attributes of layers (`_layers/attributes.py`).

The checks in this file run at trace time and raise a ValueError. In each, `function` is the name of
the public function, with which errors begin, and `shape` and `ndim` are those of x. A symbolic size
(of jax.export) passes every check that cannot be decided.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxnorm._core import arguments
from jaxnorm._core.arguments import Shape
from jaxnorm._core.layout import Layout


def float_array(function: str, x: ArrayLike) -> jax.Array:
    """Converts x to an array and checks that its dtype is a float dtype."""
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        hint = "write x.real and x.imag, and normalize each"
    elif not jnp.issubdtype(x.dtype, jnp.floating):
        hint = "write x.astype(jnp.float32)"
    else:
        return x
    raise ValueError(
        f"{function}: x should have a float dtype, because y gets that of x, but has {x.dtype}; "
        f"{hint} [x-not-float]"
    )


def layout(
    function: str,
    ndim: int,
    channel_axis: int | Sequence[int],
    batch_axis: int | None = None,
    least: int = 2,
) -> Layout:
    """Checks that the channel axes and the batch axis exist and differ.

    Args:
      function: the name of the public function.
      ndim: the rank of x.
      channel_axis: the channel axis or axes, which may be negative.
      batch_axis: the batch axis, or None if there is none.
      least: the least rank that is accepted.
    """
    if ndim < least:
        example = "(N, C)" if batch_axis is None else "(N, *space, C)"
        wanted = f"at least {least} axes, such as {example}" if least > 1 else "at least 1 axis"
        raise ValueError(f"{function}: x should have {wanted}, but has {ndim} [x-rank]")
    channels = arguments.axes(function, "channel_axis", channel_axis, ndim)
    if batch_axis is None:
        return Layout(ndim, channels)
    (batch,) = arguments.axes(function, "batch_axis", batch_axis, ndim)
    if batch in channels:
        raise ValueError(
            f"{function}: batch_axis and channel_axis should differ, because every sample has all "
            f"channels, but both name axis {batch} of x; write batch_axis=None for one sample "
            f"without a batch axis"
        )
    return Layout(ndim, channels, batch)


def group_layout(
    shape: Shape, channel_axis: int, batch_axis: int | Sequence[int] | None, num_groups: int
) -> tuple[Layout, Shape, int]:
    """Checks that the groups divide the one channel axis, and that it is not a batch axis.

    Args:
      shape: the shape of x.
      channel_axis: the channel axis, which may be negative.
      batch_axis: the batch axis or axes, or None if there is none.
      num_groups: the number of groups.
    """
    num_groups = arguments.positive_int(
        "group_norm", "num_groups", num_groups, "it is the number of groups of channels"
    )
    least = 1 if batch_axis is None else 2
    found = layout("group_norm", len(shape), channel_axis, least=least)
    if len(found.channels) != 1:
        raise ValueError(
            f"group_norm: channel_axis should be one axis, because groups are of neighboring "
            f"channels, but is {channel_axis!r}"
        )
    batch = (
        ()
        if batch_axis is None
        else arguments.axes("group_norm", "batch_axis", batch_axis, len(shape))
    )
    (channel,) = found.channels
    if channel in batch:
        raise ValueError(
            f"group_norm: batch_axis and channel_axis should differ, because every sample has all "
            f"channels, but both name axis {channel} of x"
        )
    channels = shape[channel]
    if isinstance(channels, int) and channels % num_groups:
        raise ValueError(
            f"group_norm: num_groups should divide the channels of x, because all groups are of "
            f"one size, but is {num_groups} for {channels} channels [groups-divide-channels]"
        )
    return found, batch, num_groups


def mask(
    function: str, mask: ArrayLike | None, shape: Shape, channels: Sequence[int] = ()
) -> jax.Array | None:
    """Checks that the mask is bool, has the rank of x, and broadcasts against x.

    Args:
      function: the name of the public function.
      mask: the mask, or None.
      shape: the shape of x.
      channels: the channel axes of x, which a mask of lower rank probably lacks.
    """
    if mask is None:
        return None
    mask = jnp.asarray(mask)
    if mask.dtype != jnp.bool_:
        raise ValueError(
            f"{function}: mask should be bool, True where an entry counts, but is {mask.dtype}; "
            f"write mask.astype(bool) [mask-not-bool]"
        )
    if mask.ndim != len(shape):
        raise ValueError(
            f"{function}: mask should have x's rank, because an (N,) mask on (N, C) with N = C "
            f"would silently mask channels, but has shape {mask.shape} for x of shape {shape}; "
            f"write {_mask_with_all_axes(mask.shape, shape, channels)} [mask-rank]"
        )
    if not _broadcasts(mask.shape, shape):
        raise ValueError(
            f"{function}: mask should broadcast against x of shape {shape}, but has shape "
            f"{mask.shape}; each of its axes should have the size of that axis of x, or 1 "
            f"[mask-shape]"
        )
    return mask


def _mask_with_all_axes(mask: Shape, shape: Shape, channels: Sequence[int]) -> str:
    """Returns what to write for a mask of another rank: an index, if only one fits x."""
    others = [a for a in range(len(shape)) if a not in channels]
    fitting = [
        axes
        for axes in itertools.combinations(others, len(mask))
        if _broadcasts(mask, [shape[a] for a in axes])
    ]
    if len(fitting) != 1:
        return "it with all axes of x, and with size 1 along the channels"
    (axes,), missing = fitting, len(shape) - len(mask)
    if axes == tuple(range(len(mask))):
        return f"mask[..., {', '.join(['None'] * missing)}]"
    index = [":" if a in axes else "None" for a in range(len(shape))]
    while index[-1] == ":":
        index.pop()
    return f"mask[{', '.join(index)}]"


def params(
    function: str, params: Mapping[str, Any] | None, shape: Shape, channels: Shape
) -> tuple[jax.Array | None, jax.Array | None]:
    """Checks that scale and bias are None, have the channels' shape, or broadcast in x's rank.

    Args:
      function: the name of the public function.
      params: the parameters, or None.
      shape: the shape of x.
      channels: the shape of x over the channel axes.
    """
    params = {} if params is None else params
    if not isinstance(params, Mapping) or not {"scale", "bias"}.issuperset(params):
        found = sorted(params) if isinstance(params, Mapping) else type(params).__name__
        raise ValueError(
            f"{function}: params should be a dict of 'scale' and 'bias', but is {found}; write "
            f"{{'scale': weight, 'bias': bias}} for PyTorch's names"
        )
    values = (params.get("scale"), params.get("bias"))
    scale, bias = (None if a is None else jnp.asarray(a) for a in values)
    for name, a in (("scale", scale), ("bias", bias)):
        if a is None:
            continue
        if not any(jnp.issubdtype(a.dtype, kind) for kind in (jnp.floating, jnp.integer)):
            raise ValueError(
                f"{function}: params[{name!r}] should have a float or an integer dtype, because y "
                f"is computed from it, but has {a.dtype}"
            )
        if agrees(a.shape, channels):
            continue
        if a.ndim != len(shape) or not _broadcasts(a.shape, shape):
            raise ValueError(
                f"{function}: params[{name!r}] should have the channels' shape {channels}, or x's "
                f"rank and broadcast against x of shape {shape}, but has shape {a.shape}"
                f"{other_axis(function, a.shape, shape)} [params-shape]"
            )
    return scale, bias


def other_axis(function: str, channels: Shape, shape: Shape) -> str:
    """Returns a hint about which axis of x has the size of the channels, such as for NCHW inputs.

    Args:
      function: the name of the public function.
      channels: the shape of what was given for the channels.
      shape: the shape of x.
    """
    sizes = enumerate(shape[1:], start=1)  # axis 0 is that of the samples
    axis = next((a for a, n in sizes if isinstance(n, int) and (n,) == channels), None)
    if axis is None:
        return ""
    if function in ("layer_norm", "rms_norm"):
        write = f"axis={axis}"
    elif function in ("LayerNorm", "RMSNorm"):
        write = f"feature_axes={axis} and reduction_axes={axis}"
    elif function in ("group_norm", "GroupNorm"):
        write = f"channel_axis={axis} in the function, or jnp.moveaxis(x, {axis}, -1) for a layer"
    else:
        write = f"channel_axis={axis}, or in a layer axis={axis} or feature_axes={axis}"
    return f"; axis {axis} of x has that size; if it is the channel axis, write {write}"


def more_than_one_value(function: str, shape: Shape, layout: Layout, devices: int) -> None:
    """Raises if each mean is that of exactly one entry.

    Args:
      function: the name of the public function.
      shape: the shape of x, or of one virtual batch.
      layout: the axes of x.
      devices: the number of devices that share one mean.
    """
    number = math.prod(shape[a] for a in layout.reduced) * devices
    if isinstance(number, int) and number == 1:
        kind = "value per channel" if layout.batch is None else "spatial element"
        raise ValueError(
            f"{function}: Expected more than 1 {kind} when training, got input size {shape}; the "
            f"variance of one value is 0, and y would be the bias whatever x is; write "
            f"use_running_average=True to evaluate, or train on more [one-value-per-channel]"
        )


def same_moments(function: str, a: Shape, b: Shape) -> None:
    """Checks that two moments have the same shape.

    Args:
      function: the name of the public function.
      a: the shape of the fields of the first moments.
      b: the shape of the fields of the second moments.
    """
    if not agrees(a, b):
        raise ValueError(
            f"{function}: a and b should be of one shape, because each entry belongs to one "
            f"channel, but have shapes {a} and {b}"
        )


def virtual_batches(function: str, size: int, shape: Shape, layout: Layout, devices: int) -> int:
    """Checks that the samples of each device divide into virtual batches.

    Args:
      function: the name of the public function.
      size: the number of samples of a virtual batch.
      shape: the shape of x.
      layout: the axes of x.
      devices: the number of shards of axis 0 of x.
    """
    if layout.batch is None and 0 in layout.channels:
        raise ValueError(
            f"{function}: virtual_batch_size should come with samples on axis 0, but channel_axis "
            f"is {layout.channels} [virtual-batch-size]"
        )
    size = arguments.positive_int(function, "virtual_batch_size", size, "it is a number of samples")
    samples = shape[0]
    if isinstance(samples, int) and samples % (size * devices):
        where = f" on {devices} devices" if devices > 1 else ""
        raise ValueError(
            f"{function}: virtual_batch_size should divide the samples of each device, because all "
            f"virtual batches are of one size and each lies on one device, but is {size} for "
            f"{samples} samples{where} [virtual-batch-size]"
        )
    return size


def agrees(shape: Shape, wanted: Shape) -> bool:
    """Returns whether two shapes are the same, as far as their sizes are known."""
    return len(shape) == len(wanted) and all(
        n == m or not (isinstance(n, int) and isinstance(m, int))
        for n, m in zip(shape, wanted, strict=True)
    )


def _broadcasts(shape: Shape, wanted: Sequence[Any]) -> bool:
    """Returns whether an array of x's rank broadcasts against x."""
    return all(n == 1 or agrees((n,), (m,)) for n, m in zip(shape, wanted, strict=True))
