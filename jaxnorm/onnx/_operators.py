"""Traces norms for an export, as the primitive of one ONNX operator or as JAX primitives.

While jax2onnx traces, `tracked_norm` and `untracked_norm` replace the two functions of these names
that every norm calls. Norms that no operator computes still call the original functions, and become
several nodes.
"""

import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import numpy as np
from jax import lax

from jaxnorm._core import checks
from jaxnorm._core.collectives import LOCAL, MappedAxes
from jaxnorm._core.layout import Layout
from jaxnorm._core.normalize import affine
from jaxnorm._core.reduction import Reduction, select
from jaxnorm._core.variables import statistics_dtype
from jaxnorm._norm import Options, Tracking
from jaxnorm._stats import state_checks
from jaxnorm.onnx._primitive import norm_p


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """The arguments of `to_onnx` that the norms need at trace time."""

    native: bool = True
    update_stats: bool | None = None


# The default, which is immutable, applies to direct calls of `jax2onnx.to_onnx`.
OPTIONS = contextvars.ContextVar("options", default=ExportOptions())  # noqa: B039


@dataclasses.dataclass(frozen=True)
class Operator:
    """An ONNX operator, and the layout of its inputs.

    Attributes:
      name: the name of the operator.
      parts: for each axis of its input, the axes of x that form it: none, one, or several.
      shape: the shape of its scale and bias.
      num_groups: the attribute of GroupNormalization.
    """

    name: str
    parts: tuple[tuple[int, ...], ...]
    shape: tuple[int, ...]
    num_groups: int | None = None

    @property
    def normalizes_last_axes(self) -> bool:
        """Whether it normalizes the last axes; otherwise the input is (N, C, *space)."""
        return self.name in ("LayerNormalization", "RMSNormalization")

    def attributes(self, dtype: Any) -> dict[str, Any]:
        """Returns its attributes, except epsilon."""
        if self.name in ("BatchNormalization", "InstanceNormalization"):
            return {}
        if self.normalizes_last_axes:
            return {"axis": -len(self.shape), "stash_type": int(dtype)}
        return {"num_groups": self.num_groups, "stash_type": int(dtype)}


def tracked_norm(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces `tracked_norm`: normalizes by the state or by x, without updating the state."""

    @functools.wraps(original)
    def norm(
        x: jax.Array,
        params: Any,
        batch_stats: Any,
        layout: Layout,
        options: Options,
        tracking: Tracking,
    ) -> tuple[jax.Array, Any]:
        function = options.function
        batch_axes = () if layout.batch is None else (layout.batch,)
        statistics, mask = {}, None
        operator: Operator | None
        if OPTIONS.get().update_stats is not None:
            tracking = dataclasses.replace(tracking, update_stats=OPTIONS.get().update_stats)
        if _uses_running_stats(function, batch_stats, tracking):
            state = state_checks.batch_stats(function, batch_stats, layout.shape(x))
            statistics = {key: state[key] for key in ("mean", "var")}
            mask = checks.mask(function, options.mask, x.shape, layout.channels)
            # With the state, any axis except the channels can be the first.
            first = batch_axes or layout.reduced[:1]
            operator = _channel_operator("BatchNormalization", layout, first, x)
        else:
            operator = _instance_operator(layout, batch_axes, x, options, tracking)

        def fallback(x: jax.Array, params: Any, statistics: dict[str, Any]) -> jax.Array:
            state = {**batch_stats, **statistics} if statistics else batch_stats
            y: jax.Array = original(x, params, state, layout, options, tracking)[0]
            return y

        run = functools.partial(_by_operator, options, operator, fallback, layout)
        return run(x, params, statistics, mask), batch_stats

    return norm


def untracked_norm(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces `untracked_norm`."""

    @functools.wraps(original)
    def norm(
        x: jax.Array, params: Any, layout: Layout, reduction: Reduction, options: Options
    ) -> jax.Array:
        _check_one_device(options.function, reduction.mapped_axes)
        groups = reduction.groups or reduction.split
        # With split, reduction.axes are numbered after the split, and not as the axes of x are.
        reduced = () if reduction.split else reduction.axes
        kept = tuple(a for a in range(x.ndim) if a not in (*reduced, *layout.channels))
        operator = None
        if options.mask is None and groups is not None:
            operator = _channel_operator("GroupNormalization", layout, kept, x, groups[1])
        elif options.mask is None and layout.channels:
            name = "LayerNormalization" if reduction.centered else "RMSNormalization"
            parts = tuple((a,) for a in (*kept, *layout.channels))
            operator = Operator(name, parts, layout.shape(x))

        def fallback(x: jax.Array, params: Any, _: Any) -> jax.Array:
            y: jax.Array = original(x, params, layout, reduction, options)
            return y

        return _by_operator(options, operator, fallback, layout, x, params, {}, None)

    return norm


def _uses_running_stats(function: str, batch_stats: Any, tracking: Tracking) -> bool:
    """Returns whether to normalize by the running statistics; raises if they would be updated."""
    checked = tracking.checked(function, batch_stats is not None)
    if checked.update_stats:
        raise ValueError(
            f"{function}: the running statistics should not be updated in an export, because a "
            f"graph keeps no state, but they are updated with "
            f"use_running_average={tracking.use_running_average} and "
            f"update_stats={tracking.update_stats}; to evaluate, write use_running_average=True, "
            f"in NNX model.eval(); to normalize by the batch, or by each sample, write "
            f"update_stats=False, or to_onnx(..., update_stats=False) for all norms "
            f"[export-in-training]"
        )
    return bool(checked.use_running_average)


def _check_one_device(function: str, mapped_axes: MappedAxes) -> None:
    """Checks that the statistics of x do not need other devices."""
    if mapped_axes != LOCAL:
        raise ValueError(
            f"{function}: axis_name should be None in an export, because a graph runs on one "
            f"device, but is {mapped_axes.axis_name!r}; write axis_name=None"
        )


def _channel_operator(
    name: str, layout: Layout, first: Sequence[int], x: jax.Array, num_groups: int | None = None
) -> Operator:
    """Returns an operator on (N, C, *space), in which the first axes form N."""
    rest = (a for a in range(x.ndim) if a not in (*first, *layout.channels))
    parts = (tuple(first), layout.channels, *((a,) for a in rest))
    return Operator(name, parts, (math.prod(layout.shape(x)),), num_groups)


def _instance_operator(
    layout: Layout,
    batch_axes: Sequence[int],
    x: jax.Array,
    options: Options,
    tracking: Tracking,
) -> Operator | None:
    """Returns the operator that normalizes by the statistics of x; None if there is none."""
    _check_one_device(options.function, tracking.stats_axes)
    special = options.mask, tracking.limits, tracking.virtual_batch_size
    if any(option is not None for option in special):
        return None
    checks.more_than_one_value(options.function, x.shape, layout, 1)
    # Without a batch axis, as in batch norm, x is one sample.
    return _channel_operator("InstanceNormalization", layout, batch_axes, x)


# ---- From x to y ----


def _by_operator(
    options: Options,
    operator: Operator | None,
    fallback: Callable[[jax.Array, Any, Any], jax.Array],
    layout: Layout,
    x: jax.Array,
    params: Any,
    statistics: dict[str, Any],
    mask: jax.Array | None,
) -> jax.Array:
    """Computes y by the operator, or by ordinary operators if it is None or cannot be used."""
    epsilon = cast(Any, options.epsilon)
    scale, bias = checks.params(options.function, params, x.shape, layout.shape(x))
    params = {key: a for key, a in (("scale", scale), ("bias", bias)) if a is not None}
    if operator is None or not OPTIONS.get().native or not _constant(epsilon, *operator.shape):
        return fallback(x, params, statistics)

    @jax.custom_jvp
    def by_operator(x: jax.Array, params: Any, statistics: dict[str, Any]) -> jax.Array:
        x_wide = x.astype(statistics_dtype(x.dtype))
        (scale, bias), after = _split(operator, layout, params, x)
        scale = np.ones(operator.shape, x_wide.dtype) if scale is None else scale
        bias = np.zeros(operator.shape, x_wide.dtype) if bias is None else bias
        operands: tuple[Any, ...] = (
            (scale,) if operator.name == "RMSNormalization" else (scale, bias)
        )
        operands += tuple(statistics[key] for key in ("mean", "var") if statistics)
        y = _bind(operator, x_wide, operands, function=options.function, epsilon=float(epsilon))
        y = affine(y, *(None if a is None else layout.expand(a) for a in after))
        return select(mask, y).astype(x.dtype if options.dtype is None else options.dtype)

    # Operators have no derivative, so derivatives are those of the fallback.
    by_operator.defjvp(lambda primals, tangents: jax.jvp(fallback, primals, tangents))
    y: jax.Array = by_operator(x, params, statistics)
    return y


def _bind(operator: Operator, x: jax.Array, operands: Sequence[Any], **params: Any) -> jax.Array:
    """Applies the operator to x, whose axes are transposed and reshaped to its input and back."""
    order = [a for part in operator.parts for a in part]
    transposed = lax.transpose(x, order)
    shape = [math.prod(x.shape[a] for a in part) for part in operator.parts]
    y = norm_p.bind(lax.reshape(transposed, shape), *operands, operator=operator, **params)
    return lax.transpose(lax.reshape(y, transposed.shape), np.argsort(order).tolist())


def _constant(epsilon: Any, *sizes: Any) -> bool:
    """Returns whether the attributes and the shape of the parameters are known at trace time."""
    return not isinstance(epsilon, jax.core.Tracer) and all(isinstance(n, int) for n in sizes)


def _split(
    operator: Operator, layout: Layout, params: dict[str, jax.Array], x: jax.Array
) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Returns scale and bias for the operator, and those to apply after it; each may be None."""
    scale, bias = params.get("scale"), params.get("bias")
    if scale is not None and not _varies_along_channels(layout, scale, x):
        return (None, None), (scale, bias)
    if bias is not None and (
        operator.name == "RMSNormalization" or not _varies_along_channels(layout, bias, x)
    ):
        return (scale, None), (None, bias)
    return (scale, bias), (None, None)


def _varies_along_channels(layout: Layout, a: jax.Array, x: jax.Array) -> bool:
    """Returns whether a parameter has one entry for each channel, in the order of the channels."""
    if a.ndim == len(layout.channels):
        return True
    sizes = tuple(n if i in layout.channels else 1 for i, n in enumerate(x.shape))
    return a.shape == sizes and layout.channels == tuple(sorted(layout.channels))
