"""The steps of every norm: check the arguments, normalize, update the running statistics."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxnorm._core import arguments, checks
from jaxnorm._core.collectives import LOCAL, MappedAxes, number_of_shards
from jaxnorm._core.layout import Layout
from jaxnorm._core.moments import Moments, shifted_moments, unshift
from jaxnorm._core.normalize import infinite_for_zero, normalize, renormalize
from jaxnorm._core.sample import Sample, widen
from jaxnorm._core.variables import Affine
from jaxnorm._stats.update import Update, update_running_stats

# Traced and differentiated once for all layers of one shape. Inlined, since the compiler for TPU
# moves no layout through the call of a function that is called more than once: with four images, a
# step of three convolutions took 1.98 times flax.linen's cycles, and takes 1.24.
_measure = jax.jit(shifted_moments, static_argnums=0, inline=True)
_normalize = jax.jit(normalize, static_argnums=(0, 1), inline=True)


class _Operands(NamedTuple):
    """The arrays that are laid against x, in its rank; None for those that there are not."""

    x: jax.Array
    mask: jax.Array | None
    scale: jax.Array | None
    bias: jax.Array | None
    mean: Any = None
    var: Any = None

    def map(self, change: Callable[[Any], Any]) -> "_Operands":
        """Each of them changed."""
        x, *others = self
        return _Operands(change(x), *(None if a is None else change(a) for a in others))


def untracked_norm(
    function: str,
    x: jax.Array,
    params: Affine | None,
    layout: Layout,
    sample: Sample,
    *,
    epsilon: ArrayLike,
    mask: ArrayLike | None,
    dtype: DTypeLike | None,
) -> jax.Array:
    """y of a norm without a state, whose parameters lie along the layout's channels."""
    operands = _operands(function, x, params, mask, layout)
    epsilon = arguments.number(function, "epsilon", epsilon, least=0)
    dtype = arguments.float_dtype(function, "dtype", dtype) or x.dtype
    measured = _measure(sample, x, operands.mask)
    laid_out, sample = operands.map(sample.laid_out), sample.as_laid_out
    return _normalized(dtype, sample, laid_out, epsilon, measured).reshape(x.shape)


def tracked_norm(
    function: str,
    x: ArrayLike,
    params: Affine | None,
    batch_stats: Any,
    *,
    use_running_average: bool,
    update_stats: bool | None,
    momentum: ArrayLike | None,
    epsilon: ArrayLike,
    channel_axis: int | Sequence[int],
    mask: ArrayLike | None,
    skip_nonfinite: bool,
    dtype: DTypeLike | None,
    batch_axis: int | None = None,
    virtual_batch_size: int | None = None,
    limits: tuple[Any, Any] | None = None,
    stats_axes: MappedAxes = LOCAL,
    update_axes: MappedAxes = LOCAL,
) -> tuple[jax.Array, Any]:
    """Batch norm of each sample along batch_axis (None: x is one sample), and one update by all.

    Other devices hold more entries of the same sample, or more samples. Virtual batches are
    samples, too, to normalize by; the update pools them again.
    """
    x = checks.float_array(function, x)
    layout = checks.layout(function, x.ndim, channel_axis, batch_axis)
    epsilon = arguments.number(function, "epsilon", epsilon, least=0)
    update = Update.checked(function, momentum, skip_nonfinite)
    dtype = arguments.float_dtype(function, "dtype", dtype) or x.dtype
    by_state, moves = arguments.resolve_mode(
        function, batch_stats is not None, use_running_average, update_stats
    )
    state: Any = None
    if batch_stats is not None:
        state = checks.batch_stats(function, batch_stats, layout.shape(x), shape=x.shape)
    operands = _operands(function, x, params, mask, layout, state)
    run, one_sample = layout, x.shape
    if virtual_batch_size is not None and not by_state:
        operands, one_sample = _in_virtual_batches(function, virtual_batch_size, operands, layout)
        run, update_axes, stats_axes = layout.with_batch_axis, stats_axes, LOCAL
    if not by_state and mask is None:
        checks.more_than_one_value(function, one_sample, layout, stats_axes.size())
    sample = Sample(run.reduced, mapped_axes=stats_axes)
    measured: Any = None
    if moves or not by_state:
        measured = _measure(sample, operands.x, operands.mask, operands.mean)
    if by_state:
        y = _normalized(dtype, None, operands, epsilon, _constants(operands))
    else:
        if limits is not None:
            operands = _corrected(function, operands, measured, epsilon, limits, state["count"])
        y = _normalized(dtype, sample, operands, epsilon, measured)
    if moves:
        rows, between = (
            jax.tree.map(run.squeeze_to_channels, unshift(*measured)),
            layout.batch is None,
        )
        batch_stats = update_running_stats(
            state, rows, update, between=between, mapped_axes=update_axes
        )
    return y.reshape(x.shape), batch_stats


# ---- The steps ----


def _operands(
    function: str,
    x: jax.Array,
    params: Affine | None,
    mask: ArrayLike | None,
    layout: Layout,
    state: Any = None,
) -> _Operands:
    """x and what is laid against it, all checked. The state is a constant for the derivative."""
    mask = checks.mask(function, mask, x.shape)
    given = checks.params(function, params, x.shape, layout.shape(x))
    scale, bias = (
        None if a is None else _zero_where_masked(mask, layout.expand(a), a.ndim == x.ndim)
        for a in given
    )
    if state is None:
        return _Operands(x, mask, scale, bias)
    mean, var = (widen(layout.expand(state[key]), x) for key in ("mean", "var"))
    return _Operands(x, mask, scale, bias, *lax.stop_gradient((mean, var)))


def _normalized(
    dtype: DTypeLike,
    sample: Sample | None,
    operands: _Operands,
    epsilon: ArrayLike,
    measured: tuple[jax.Array, Moments],
) -> jax.Array:
    """y by the moments that were measured, or by constants, for which the sample is None."""
    (shift, moments), number = measured, jnp.asarray(epsilon, float)
    if not isinstance(epsilon, float) or epsilon == 0:
        moments = dataclasses.replace(moments, var=infinite_for_zero(moments.var, number))
    x, mask, scale, bias, *_ = operands
    y: jax.Array = _normalize(dtype, sample, x, scale, bias, number, mask, shift, moments)
    return y


def _constants(operands: _Operands) -> tuple[jax.Array, Moments]:
    """The running statistics as a shift and moments; they count no entries."""
    zero = jnp.zeros_like(operands.mean)
    return operands.mean, Moments(zero, zero, operands.var)


def _corrected(
    function: str,
    operands: _Operands,
    measured: tuple[jax.Array, Moments],
    epsilon: ArrayLike,
    limits: tuple[Any, Any],
    count: jax.Array,
) -> _Operands:
    """The operands with the scale and the bias of batch renorm."""
    r_max, d_max = (
        arguments.number(function, name, limit(count) if callable(limit) else limit)
        for name, limit in zip(("r_max", "d_max"), limits, strict=True)
    )
    _, _, scale, bias, mean, var = operands
    epsilon = jnp.asarray(epsilon, float)
    scale, bias = renormalize(scale, bias, measured, mean, var, epsilon, (r_max, d_max))
    return operands._replace(scale=scale, bias=bias)


def _zero_where_masked(mask: jax.Array | None, a: jax.Array, of_x_rank: bool) -> jax.Array:
    """Entries of a call-time parameter that only masked entries of x see are 0, be they NaN."""
    if mask is None or not of_x_rank:
        return a
    alone = tuple(i for i in range(a.ndim) if a.shape[i] == 1)
    return jnp.where(jnp.any(mask, alone, keepdims=True), a, jnp.zeros((), a.dtype))


# ---- Virtual batches: (N, ...) as (N / size, size, ...) ----


def _in_virtual_batches(
    function: str, size: int, operands: _Operands, layout: Layout
) -> tuple[_Operands, tuple[int, ...]]:
    """The operands with the virtual batches as a first axis, and the shape of one of them."""
    x = operands.x
    size = checks.virtual_batches(function, size, x.shape, layout, number_of_shards(x, 0))
    return operands.map(functools.partial(_split_virtual_batches, size=size)), (size, *x.shape[1:])


def _split_virtual_batches(a: jax.Array, *, size: int) -> jax.Array:
    """What has one entry for all samples has one for all virtual batches."""
    if a.shape[0] == 1 and size != 1:
        return a[None]
    return a.reshape(a.shape[0] // size, size, *a.shape[1:])
