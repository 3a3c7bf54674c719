"""Which sample? The norms, each a choice of the entries that share one mean."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxnorm import _checks
from jaxnorm._devices import HERE, AxisName, devices
from jaxnorm._moments import Moments, Sample, about_zero, measure, widen
from jaxnorm._normalize import normalize
from jaxnorm._running import advance
from jaxnorm.variables import Affine, BatchStats


def batch_norm(
    x: ArrayLike,
    params: Affine | None = None,
    batch_stats: BatchStats | None = None,
    *,
    use_running_average: bool = False,
    update_stats: bool | None = None,
    momentum: ArrayLike | None = 0.1,
    epsilon: ArrayLike = 1e-5,
    channel_axis: int | Sequence[int] = -1,
    mask: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    skip_nonfinite: bool = True,
    dtype: DTypeLike | None = None,
) -> tuple[jax.Array, BatchStats | None]:
    r"""Normalizes each channel over the batch and all other axes.

    .. math:: y = scale \cdot \frac{x - E[x]}{\sqrt{Var[x] + \epsilon}} + bias

    As in PyTorch: the biased variance normalizes, the unbiased one is remembered, and momentum
    weighs the new value (Flax's weighs the old one). Channels are last unless `channel_axis` says
    otherwise. The given state is never changed; the new one is returned.

    ======================= ================ ==============================
    `use_running_average`   `update_stats`   what for
    ======================= ================ ==============================
    False                   None (= True)    training
    True                    None (= False)   evaluation
    False                   False            batch statistics, state frozen
    True                    True             adaptation: normalize by the
                                             state as given, then move it
    ======================= ================ ==============================

    Args:
      x: the input, of shape (N, C), (N, \*space, C), or any other with at least two axes; any
        float dtype.
      params: {"scale", "bias"}, each of shape (C,), or of x's rank and broadcasting against x;
        either or both may be missing.
      batch_stats: the state {"mean": (C,), "var": (C,), "count": ()}, or None: nothing is
        tracked, and the batch's own statistics are always used.
      use_running_average: normalize by the state, not by the batch. The state is a constant for
        the derivative; scale and bias still get theirs.
      update_stats: move the state by the batch's moments; None means: when the batch normalizes.
      momentum: how much the batch weighs in the new state; None is the cumulative average, in
        which all batches weigh the same.
      epsilon: added to the variance, in units of x squared.
      channel_axis: the axis or axes that keep their own statistics; "C" is x's shape over them.
      mask: bool, of x's rank, broadcasting against x; True counts. What is masked out never
        reaches a statistic or a gradient, be it NaN or Inf, and y is 0 there.
      axis_name: mapped axes (of shard_map, pmap or vmap) over which the batch is spread; the
        statistics are those of the whole batch, exact for any split.
      axis_index_groups: lists of indices along axis_name that are one batch each.
      skip_nonfinite: a channel whose batch holds NaN or Inf keeps its state. Its y is NaN still.
      dtype: y's dtype; None is x's.

    Returns:
      y, of x's shape, and the new batch_stats: the given ones if they do not move.

    Raises:
      ValueError: if x is not of a float dtype or has fewer than two axes; if params, batch_stats
        or the mask do not fit it; if the state is needed and missing; if batch statistics are
        used and a channel has exactly one value.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxnorm
      >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
      >>> y, stats = jaxnorm.batch_norm(x, batch_stats=jaxnorm.init_batch_stats(2), epsilon=0.0)
      >>> print(y)
      [[-1. -1.]
       [ 1.  1.]]
      >>> print(stats["mean"], stats["count"])
      [0.2 2. ] 1

    References:
      Ioffe & Szegedy, Batch Normalization, 2015. https://arxiv.org/abs/1502.03167
      torch.nn.BatchNorm2d, PyTorch 2.13.
    """
    return _tracked_norm(
        "batch_norm",
        x,
        params,
        batch_stats,
        use_running_average=use_running_average,
        update_stats=update_stats,
        momentum=momentum,
        epsilon=epsilon,
        channel_axis=channel_axis,
        batch_axis=None,
        mask=mask,
        entries_on=devices("batch_norm", axis_name, axis_index_groups),
        skip_nonfinite=skip_nonfinite,
        dtype=dtype,
    )


def instance_norm(
    x: ArrayLike,
    params: Affine | None = None,
    batch_stats: BatchStats | None = None,
    *,
    use_running_average: bool = False,
    update_stats: bool | None = None,
    momentum: ArrayLike | None = 0.1,
    epsilon: ArrayLike = 1e-5,
    channel_axis: int | Sequence[int] = -1,
    batch_axis: int | None = 0,
    mask: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    skip_nonfinite: bool = True,
    dtype: DTypeLike | None = None,
) -> tuple[jax.Array, BatchStats | None]:
    r"""Normalizes each channel of each sample over the sample's other axes.

    .. math:: y_n = scale \cdot \frac{x_n - E[x_n]}{\sqrt{Var[x_n] + \epsilon}} + bias

    Batch norm of one sample at a time: `batch_norm` vmapped over the batch axis. The state moves
    once, by the mean over the samples of their means and of their unbiased variances; variance
    between the samples does not enter it. As in PyTorch, but the count moves and momentum=None is
    the true cumulative average (there the one stays 0, and the other leaves the state at 0 and 1).

    Args:
      x: the input, of shape (N, \*space, C), or (\*space, C) with batch_axis=None; any float dtype.
      params: {"scale", "bias"}, each of shape (C,), or of x's rank and broadcasting against x;
        either or both may be missing.
      batch_stats: the state {"mean": (C,), "var": (C,), "count": ()}, or None: nothing is
        tracked, and each sample's own statistics are always used.
      use_running_average: normalize by the state, as batch norm does in evaluation.
      update_stats: move the state by the samples' moments; None means: when they normalize. The
        four combinations with use_running_average are those of `batch_norm`.
      momentum: how much the batch weighs in the new state; None is the cumulative average.
      epsilon: added to the variance, in units of x squared.
      channel_axis: the axis or axes that keep their own statistics; "C" is x's shape over them.
      batch_axis: the axis of the samples; None is one sample without a batch axis.
      mask: bool, of x's rank, broadcasting against x; True counts. What is masked out never
        reaches a statistic or a gradient, be it NaN or Inf, and y is 0 there.
      axis_name: mapped axes (of shard_map, pmap or vmap) over which the samples are spread: only
        the state needs the others' samples, y needs none.
      axis_index_groups: lists of indices along axis_name that move one state together.
      skip_nonfinite: a channel that holds NaN or Inf in any sample keeps its state.
      dtype: y's dtype; None is x's.

    Returns:
      y, of x's shape, and the new batch_stats: the given ones if they do not move.

    Raises:
      ValueError: as `batch_norm`; and if batch_axis is a channel axis, or instance statistics are
        used and a sample has exactly one spatial element.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxnorm
      >>> x = jnp.array([[[1.0], [3.0]], [[10.0], [30.0]]])  # (N, L, C) = (2, 2, 1)
      >>> y, stats = jaxnorm.instance_norm(x, batch_stats=jaxnorm.init_batch_stats(1), epsilon=0.0)
      >>> print(y[:, :, 0])
      [[-1.  1.]
       [-1.  1.]]
      >>> print(stats["mean"], stats["var"], stats["count"])  # 0.1 * 11, 0.9 + 0.1 * (2 + 200) / 2
      [1.1] [11.] 1

    References:
      Ulyanov, Vedaldi & Lempitsky, Instance Normalization, 2016. https://arxiv.org/abs/1607.08022
      torch.nn.InstanceNorm2d, PyTorch 2.13.
    """
    return _tracked_norm(
        "instance_norm",
        x,
        params,
        batch_stats,
        use_running_average=use_running_average,
        update_stats=update_stats,
        momentum=momentum,
        epsilon=epsilon,
        channel_axis=channel_axis,
        batch_axis=batch_axis,
        mask=mask,
        samples_on=devices("instance_norm", axis_name, axis_index_groups),
        skip_nonfinite=skip_nonfinite,
        dtype=dtype,
    )


def _tracked_norm(
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
    batch_axis,
    mask,
    skip_nonfinite,
    dtype,
    entries_on=HERE,
    samples_on=HERE,
):
    """Batch norm of each sample along batch_axis (None: x is one sample), and one update by all.

    Other devices hold more entries of the same sample, or more samples.
    """
    x = _checks.float_array(function, x)
    layout = _checks.layout(function, x.ndim, channel_axis, batch_axis)
    channels = tuple(x.shape[a] for a in layout.channels)
    scale, bias = _checks.params(function, params, x.shape, channels)
    use_running_average, update_stats = _checks.switches(
        function, batch_stats is not None, use_running_average, update_stats
    )
    state = batch_stats and _checks.batch_stats(function, batch_stats, channels)
    mask = _checks.mask(function, mask, x.shape)
    if not use_running_average and mask is None:
        _checks.several_values(function, x.shape, layout, entries_on.number())

    per_channel = [scale, bias, *((state["mean"], state["var"]) if use_running_average else ())]
    y, rows = _each_sample(
        functools.partial(
            _one_sample,
            Sample(layout.one_sample.reduced, entries_on),
            x.dtype if dtype is None else jnp.dtype(dtype),
            jnp.asarray(epsilon, float),
            update_stats,
        ),
        batch_axis,
        x,
        mask,
        *(a if a is None else layout.spread(a) for a in per_channel),
    )
    if not update_stats:
        return y, batch_stats
    rows = jax.tree.map(jax.vmap(layout.one_sample.collect), rows)
    return y, advance(
        state, rows, momentum=momentum, skip_nonfinite=skip_nonfinite, devices=samples_on
    )


def _one_sample(sample, dtype, epsilon, update_stats, x, mask, scale, bias, mean=None, var=None):
    """y, and the moments to update the state by; mean and var are the state's, where it is used."""
    if mean is None:
        y, measured = normalize(sample, dtype, x, scale, bias, epsilon, mask, None)
        return y, about_zero(*measured)
    mean, var = widen(mean, x), widen(var, x)
    given = mean, Moments(jnp.zeros_like(var), jnp.zeros_like(mean), var)
    y, _ = normalize(sample, dtype, x, scale, bias, epsilon, mask, given)
    return y, about_zero(*measure(sample, x, mask)) if update_stats else None


def _each_sample(step, batch_axis, x, *others):
    """step for each sample of x, vmapped; what has one entry for all samples is shared."""
    if batch_axis is None:
        y, moments = step(x, *others)
        return y, jax.tree.map(lambda a: a[None], moments)
    # Shared means in_axes=None: an array of size 1 need not be sharded as x is.
    shared = [a is None or a.shape[batch_axis] == 1 for a in others]
    squeezed = [
        lax.squeeze(a, (batch_axis,)) if one and a is not None else a
        for a, one in zip(others, shared, strict=True)
    ]
    in_axes = (batch_axis, *(None if one else batch_axis for one in shared))
    return jax.vmap(step, in_axes, out_axes=(batch_axis, 0))(x, *squeezed)
