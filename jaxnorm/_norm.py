"""How does a norm run? Check, lay out, normalize, and update where there is a state."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxnorm import _checks
from jaxnorm._devices import HERE, explicit_devices
from jaxnorm._moments import Moments, about_zero, measure
from jaxnorm._normalize import infinite_for_zero, normalize, renormalize
from jaxnorm._running import advance
from jaxnorm._sample import Sample, widen

# Traced, differentiated and lowered once for all layers of one shape.
_measure = jax.jit(measure, static_argnums=0)
_normalize = jax.jit(normalize, static_argnums=(0, 1))


def untracked_norm(function, x, params, layout, sample, *, epsilon, mask, dtype):
    """y of a norm without a state, whose parameters lie along the layout's channels."""
    scale, bias, mask = _operands(function, x, params, mask, layout)
    given, epsilon = epsilon, _checks.number(function, "epsilon", epsilon, least=0)
    dtype, shape = _checks.float_dtype(function, "dtype", dtype) or x.dtype, x.shape
    measured = _divisible(_measure(sample, x, mask), epsilon, given)
    x, scale, bias, mask = map(sample.laid_out, (x, scale, bias, mask))
    y = _normalize(dtype, sample.as_laid_out, x, scale, bias, epsilon, mask, *measured)
    return y.reshape(shape)


def tracked_norm(
    function,
    x,
    params,
    batch_stats,
    *,
    use_running_average,
    update_stats,
    momentum,
    epsilon,
    channel_axis,
    mask,
    skip_nonfinite,
    dtype,
    batch_axis=None,
    virtual_batch_size=None,
    limits=None,
    entries_on=HERE,
    samples_on=HERE,
):
    """Batch norm of each sample along batch_axis (None: x is one sample), and one update by all.

    Other devices hold more entries of the same sample, or more samples. Virtual batches are
    samples, too, to normalize by; the update pools them again.
    """
    x = _checks.float_array(function, x)
    layout = _checks.layout(function, x.ndim, channel_axis, batch_axis)
    given_epsilon, epsilon = epsilon, _checks.number(function, "epsilon", epsilon, least=0)
    momentum = None if momentum is None else _checks.number(function, "momentum", momentum)
    skip_nonfinite = _checks.boolean(function, "skip_nonfinite", skip_nonfinite)
    dtype = _checks.float_dtype(function, "dtype", dtype) or x.dtype
    scale, bias, mask = _operands(function, x, params, mask, layout)
    use_running_average, update_stats = _checks.switches(
        function, batch_stats is not None, use_running_average, update_stats
    )
    mean: Any = None
    var: Any = None
    if batch_stats is not None:
        state = _checks.batch_stats(function, batch_stats, layout.shape(x), shape=x.shape)
        mean, var = layout.spread(state["mean"]), layout.spread(state["var"])
        mean, var = lax.stop_gradient((widen(mean, x), widen(var, x)))
    shape = one_sample = x.shape
    run = layout
    if virtual_batch_size is not None and not use_running_average:
        virtual_batch_size = _checks.virtual_batches(
            function, virtual_batch_size, shape, layout, explicit_devices(x, 0)
        )
        run, one_sample = layout.folded, (virtual_batch_size, *shape[1:])
        samples_on, entries_on = entries_on, HERE
        fold = functools.partial(_fold, size=virtual_batch_size)
        x, mask, scale, bias, mean, var = (
            None if a is None else fold(a) for a in (x, mask, scale, bias, mean, var)
        )
    if not use_running_average and mask is None:
        _checks.several_values(function, one_sample, layout, entries_on.number())

    sample = Sample(run.reduced, devices=entries_on)
    measured: Any = None
    moving: Sample | None = sample
    if update_stats or not use_running_average:
        measured = _measure(sample, x, mask, mean)
    used = measured
    if use_running_average:
        moving, used = None, (mean, Moments(jnp.zeros_like(var), jnp.zeros_like(mean), var))
    elif limits is not None:
        limits = tuple(
            _checks.number(function, name, a(state["count"]) if callable(a) else a)
            for name, a in zip(("r_max", "d_max"), limits, strict=True)
        )
        scale, bias = renormalize(scale, bias, measured, mean, var, epsilon, limits)
    used = _divisible(used, epsilon, given_epsilon)
    y = _normalize(dtype, moving, x, scale, bias, epsilon, mask, *used).reshape(shape)
    if not update_stats:
        return y, batch_stats
    return y, advance(
        state,
        jax.tree.map(run.rows, about_zero(*measured)),
        momentum=momentum,
        skip_nonfinite=skip_nonfinite,
        between=layout.batch is None,
        devices=samples_on,
    )


def _divisible(measured, epsilon, given):
    """The shift and the moments, by which nothing is divided by 0, for epsilon as it was given."""
    if not _checks.is_traced(given) and float(given) > 0:
        return measured
    shift, moments = measured
    return shift, dataclasses.replace(moments, var=infinite_for_zero(moments.var, epsilon))


def _operands(function, x, params, mask, layout):
    """Scale and bias, in x's rank, and the mask, all checked."""
    mask = _checks.mask(function, mask, x.shape)
    given = _checks.params(function, params, x.shape, layout.shape(x))
    scale, bias = (
        None if a is None else _seen(mask, layout.spread(a), a.ndim == x.ndim) for a in given
    )
    return scale, bias, mask


def _seen(mask, a, of_x_rank):
    """Entries of a call-time parameter that only masked entries of x see are 0, be they NaN."""
    if mask is None or not of_x_rank:
        return a
    alone = tuple(i for i in range(a.ndim) if a.shape[i] == 1)
    return jnp.where(jnp.any(mask, alone, keepdims=True), a, jnp.zeros((), a.dtype))


# ---- Virtual batches: (N, ...) as (N / size, size, ...) ----


def _fold(a, *, size):
    """What has one entry for all samples has one for all virtual batches."""
    if a.shape[0] == 1 and size != 1:
        return a[None]
    return a.reshape(a.shape[0] // size, size, *a.shape[1:])
