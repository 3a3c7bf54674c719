"""The norms as pure functions. They differ in which entries of x share one mean."""

from collections.abc import Callable, Sequence
from typing import TypedDict, Unpack, overload

import jax
from jax.typing import ArrayLike, DTypeLike

from jaxnorm._core import arguments, checks
from jaxnorm._core.collectives import AxisName, mapped_axes
from jaxnorm._core.layout import Layout
from jaxnorm._core.sample import Sample
from jaxnorm._core.variables import Affine, BatchStats, State
from jaxnorm._norm import Options, Tracking, tracked_norm, untracked_norm

Limit = ArrayLike | Callable[[jax.Array], ArrayLike]


def batch_norm(
    x: ArrayLike,
    params: Affine | None = None,
    batch_stats: State = None,  # type: ignore[assignment]  # without a state, State is None
    *,
    use_running_average: bool = False,
    update_stats: bool | None = None,
    momentum: ArrayLike | None = 0.1,
    epsilon: ArrayLike = 1e-5,
    channel_axis: int | Sequence[int] = -1,
    mask: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    virtual_batch_size: int | None = None,
    skip_nonfinite: bool = True,
    dtype: DTypeLike | None = None,
) -> tuple[jax.Array, State]:
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
      virtual_batch_size: normalize every so many consecutive samples (axis 0) by their own
        statistics, as if each device had no more: ghost batch norm. One update is made by the
        moments of the whole batch, over axis_name too. Evaluation ignores it.
      skip_nonfinite: a channel whose batch holds NaN or Inf keeps its state. Its y is NaN still.
      dtype: y's dtype; None is x's.

    Returns:
      y, of x's shape, and the new batch_stats: the given ones if they do not move.

    Raises:
      ValueError: if x is not of a float dtype or has fewer than two axes; if params, batch_stats
        or the mask do not fit it; if the state is needed and missing; if batch statistics are
        used and a channel has exactly one value; if virtual_batch_size does not divide the samples
        of each device.

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
      Hoffer, Hubara & Soudry, Train Longer, Generalize Better, 2017: ghost batch norm.
      https://arxiv.org/abs/1705.08741
      torch.nn.BatchNorm2d, PyTorch 2.13.
    """
    x = checks.float_array("batch_norm", x)
    layout = checks.layout("batch_norm", x.ndim, channel_axis)
    options = Options("batch_norm", epsilon, mask, dtype)
    tracking = Tracking(
        use_running_average,
        update_stats,
        momentum,
        skip_nonfinite,
        stats_axes=mapped_axes("batch_norm", axis_name, axis_index_groups),
        virtual_batch_size=virtual_batch_size,
    )
    return tracked_norm(x, params, batch_stats, layout, options, tracking)


class _RenormOptions(TypedDict, total=False):
    """The options of `batch_renorm`, for its overloads."""

    r_max: Limit
    d_max: Limit
    use_running_average: bool
    update_stats: bool | None
    momentum: ArrayLike | None
    epsilon: ArrayLike
    channel_axis: int | Sequence[int]
    mask: ArrayLike | None
    axis_name: AxisName | None
    axis_index_groups: Sequence[Sequence[int]] | None
    virtual_batch_size: int | None
    skip_nonfinite: bool
    dtype: DTypeLike | None


# The state is needed, though params in front of it are not.
@overload
def batch_renorm(
    x: ArrayLike,
    params: Affine | None,
    batch_stats: BatchStats,
    **options: Unpack[_RenormOptions],
) -> tuple[jax.Array, BatchStats]: ...


@overload
def batch_renorm(
    x: ArrayLike,
    params: Affine | None = None,
    *,
    batch_stats: BatchStats,
    **options: Unpack[_RenormOptions],
) -> tuple[jax.Array, BatchStats]: ...


def batch_renorm(
    x: ArrayLike,
    params: Affine | None = None,
    batch_stats: BatchStats | None = None,
    *,
    r_max: Limit = 3.0,
    d_max: Limit = 5.0,
    use_running_average: bool = False,
    update_stats: bool | None = None,
    momentum: ArrayLike | None = 0.1,
    epsilon: ArrayLike = 1e-5,
    channel_axis: int | Sequence[int] = -1,
    mask: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    virtual_batch_size: int | None = None,
    skip_nonfinite: bool = True,
    dtype: DTypeLike | None = None,
) -> tuple[jax.Array, BatchStats]:
    r"""Normalizes as batch norm, corrected towards the running statistics, for small batches.

    .. math::
        y = scale \cdot (\hat x\, r + d) + bias, \quad
        r = \mathrm{clip}_{1/r_{max}}^{r_{max}} \frac{\sigma_{batch}}{\sigma}, \quad
        d = \mathrm{clip}_{-d_{max}}^{d_{max}} \frac{\mu_{batch} - \mu}{\sigma}

    Within the limits y is that of evaluation, whatever else is in the batch, while the gradient
    still goes through the batch's statistics; r and d are constants for it. With r_max=1 and
    d_max=0 it is batch norm. A first state (mean 0, variance 1) is nothing to correct towards:
    begin with these and relax them, as the paper does, by schedules of the count:

        r_max = optax.linear_schedule(1.0, 3.0, 35_000, transition_begin=5_000)
        d_max = optax.linear_schedule(0.0, 5.0, 20_000, transition_begin=5_000)

    The running value is the variance, and sigma its root, with epsilon added as in the batch's (the
    paper and Keras average sigma itself). The paper's momentum is 0.01.

    Args:
      x: the input, of shape (N, C), (N, \*space, C), or any other with at least two axes; any
        float dtype.
      params: {"scale", "bias"}, as in `batch_norm`.
      batch_stats: the state {"mean": (C,), "var": (C,), "count": ()}; it is needed.
      r_max: the largest r, at least 1, and 1 / r_max the smallest; or a function of the count.
      d_max: the largest d either way, at least 0; or a function of the count.
      use_running_average: normalize by the state, as batch norm does in evaluation.
      update_stats: move the state by the batch's moments; None means: when the batch normalizes.
      momentum: how much the batch weighs in the new state; None is the cumulative average.
      epsilon: added to the variance, in units of x squared.
      channel_axis: the axis or axes that keep their own statistics; "C" is x's shape over them.
      mask: bool, of x's rank, broadcasting against x; True counts, as in `batch_norm`.
      axis_name: mapped axes (of shard_map, pmap or vmap) over which the batch is spread.
      axis_index_groups: lists of indices along axis_name that are one batch each.
      virtual_batch_size: normalize every so many consecutive samples by their own statistics.
      skip_nonfinite: a channel whose batch holds NaN or Inf keeps its state. Its y is NaN still.
      dtype: y's dtype; None is x's.

    Returns:
      y, of x's shape, and the new batch_stats: the given ones if they do not move.

    Raises:
      ValueError: as `batch_norm`; and if batch_stats is missing, r_max is a number below 1, or
        d_max one below 0.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxnorm
      >>> x = jnp.array([[1.0], [3.0]])  # x_hat is -1 and 1
      >>> state = {"mean": jnp.array([1.0]), "var": jnp.array([0.25]), "count": jnp.int32(9)}
      >>> y, _ = jaxnorm.batch_renorm(x, None, state, epsilon=0.0)
      >>> print(y[:, 0])  # r = 1 / 0.5 and d = (2 - 1) / 0.5
      [0. 4.]

    References:
      Ioffe, Batch Renormalization, 2017. https://arxiv.org/abs/1702.03275
    """
    arguments.limits("batch_renorm", r_max, d_max)
    checks.batch_stats("batch_renorm", batch_stats)
    x = checks.float_array("batch_renorm", x)
    layout = checks.layout("batch_renorm", x.ndim, channel_axis)
    options = Options("batch_renorm", epsilon, mask, dtype)
    tracking = Tracking(
        use_running_average,
        update_stats,
        momentum,
        skip_nonfinite,
        stats_axes=mapped_axes("batch_renorm", axis_name, axis_index_groups),
        virtual_batch_size=virtual_batch_size,
        limits=(r_max, d_max),
    )
    return tracked_norm(x, params, batch_stats, layout, options, tracking)


def instance_norm(
    x: ArrayLike,
    params: Affine | None = None,
    batch_stats: State = None,  # type: ignore[assignment]  # without a state, State is None
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
) -> tuple[jax.Array, State]:
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
    x = checks.float_array("instance_norm", x)
    layout = checks.layout("instance_norm", x.ndim, channel_axis, batch_axis)
    options = Options("instance_norm", epsilon, mask, dtype)
    tracking = Tracking(
        use_running_average,
        update_stats,
        momentum,
        skip_nonfinite,
        update_axes=mapped_axes("instance_norm", axis_name, axis_index_groups),
    )
    return tracked_norm(x, params, batch_stats, layout, options, tracking)


def group_norm(
    x: ArrayLike,
    params: Affine | None = None,
    *,
    num_groups: int = 32,
    epsilon: ArrayLike = 1e-5,
    channel_axis: int = -1,
    batch_axis: int | Sequence[int] | None = 0,
    mask: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    r"""Normalizes each group of neighbouring channels of each sample, over the other axes too.

    .. math:: y_{ng} = scale \cdot \frac{x_{ng} - E[x_{ng}]}{\sqrt{Var[x_{ng}] + \epsilon}} + bias

    One channel a group is instance norm; one group is layer norm over all but the batch axis.

    Args:
      x: the input, of shape (N, \*space, C), any float dtype.
      params: {"scale", "bias"}, each of shape (C,), or of x's rank and broadcasting against x;
        either or both may be missing.
      num_groups: into how many groups the channels are divided.
      epsilon: added to the variance, in units of x squared.
      channel_axis: the axis of the channels.
      batch_axis: the axis or axes that are kept apart; None is one sample without a batch axis.
      mask: bool, of x's rank, broadcasting against x; True counts. What is masked out never
        reaches a statistic or a gradient, be it NaN or Inf, and y is 0 there.
      axis_name: mapped axes (of shard_map, pmap or vmap) over which each sample is spread.
      axis_index_groups: lists of indices along axis_name that hold one sample together.
      dtype: y's dtype; None is x's.

    Returns:
      y, of x's shape.

    Raises:
      ValueError: if x is not of a float dtype; if params or the mask do not fit it; if an axis
        does not exist or has two roles; if num_groups does not divide the channels.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxnorm
      >>> x = jnp.array([[1.0, 3.0, 10.0, 30.0]])
      >>> print(jaxnorm.group_norm(x, num_groups=2, epsilon=0.0))
      [[-1.  1. -1.  1.]]

    References:
      Wu & He, Group Normalization, 2018. https://arxiv.org/abs/1803.08494
      torch.nn.GroupNorm, PyTorch 2.13.
    """
    x = checks.float_array("group_norm", x)
    layout, batch, num_groups = checks.group_layout(x.shape, channel_axis, batch_axis, num_groups)
    (channel,) = layout.channels
    axes = tuple(a for a in layout.reduced if a not in batch)
    groups, where = (channel, num_groups), mapped_axes("group_norm", axis_name, axis_index_groups)
    if axes:
        sample = Sample(axes, groups=groups, mapped_axes=where)
    else:  # sums for each channel would be of the size of x
        sample = Sample((channel + 1,), split=groups, mapped_axes=where)
    return untracked_norm(x, params, layout, sample, Options("group_norm", epsilon, mask, dtype))


def layer_norm(
    x: ArrayLike,
    params: Affine | None = None,
    *,
    axis: int | Sequence[int] = -1,
    epsilon: ArrayLike = 1e-5,
    mask: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    r"""Normalizes over the given axes, the features, for each entry of the others.

    .. math:: y = scale \cdot \frac{x - E[x]}{\sqrt{Var[x] + \epsilon}} + bias

    Args:
      x: the input, of shape (\*batch, C), or any other; any float dtype.
      params: {"scale", "bias"}, each of x's shape over `axis`, in its order, or of x's rank and
        broadcasting against x; either or both may be missing.
      axis: the axes that share one mean and variance, and that the parameters lie along.
      epsilon: added to the variance, in units of x squared.
      mask: bool, of x's rank, broadcasting against x; True counts. What is masked out never
        reaches a statistic or a gradient, be it NaN or Inf, and y is 0 there.
      axis_name: mapped axes (of shard_map, pmap or vmap) over which the features are spread.
      axis_index_groups: lists of indices along axis_name that hold one row of features together.
      dtype: y's dtype; None is x's.

    Returns:
      y, of x's shape.

    Raises:
      ValueError: if x is not of a float dtype; if params or the mask do not fit it; if an axis
        does not exist or repeats.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxnorm
      >>> print(jaxnorm.layer_norm(jnp.array([[1.0, 3.0], [10.0, 30.0]]), epsilon=0.0))
      [[-1.  1.]
       [-1.  1.]]

    References:
      Ba, Kiros & Hinton, Layer Normalization, 2016. https://arxiv.org/abs/1607.06450
      torch.nn.LayerNorm, PyTorch 2.13.
    """
    x = checks.float_array("layer_norm", x)
    layout = Layout(x.ndim, arguments.features("layer_norm", "axis", axis, x.ndim))
    sample = Sample(
        layout.channels, mapped_axes=mapped_axes("layer_norm", axis_name, axis_index_groups)
    )
    return untracked_norm(x, params, layout, sample, Options("layer_norm", epsilon, mask, dtype))


def rms_norm(
    x: ArrayLike,
    params: Affine | None = None,
    *,
    axis: int | Sequence[int] = -1,
    epsilon: ArrayLike = 1e-5,
    mask: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    r"""Divides by the root of the mean square over the given axes; no mean is subtracted.

    .. math:: y = scale \cdot \frac{x}{\sqrt{E[x^2] + \epsilon}} + bias

    For torch.nn.RMSNorm with eps=None write epsilon=jnp.finfo(x.dtype).eps.

    Args:
      x: the input, of shape (\*batch, C), or any other; any float dtype.
      params: {"scale", "bias"}, each of x's shape over `axis`, in its order, or of x's rank and
        broadcasting against x; either or both may be missing, as the bias mostly is.
      axis: the axes that share one mean square, and that the parameters lie along.
      epsilon: added to the mean square, in units of x squared.
      mask: bool, of x's rank, broadcasting against x; True counts. What is masked out never
        reaches a statistic or a gradient, be it NaN or Inf, and y is 0 there.
      axis_name: mapped axes (of shard_map, pmap or vmap) over which the features are spread.
      axis_index_groups: lists of indices along axis_name that hold one row of features together.
      dtype: y's dtype; None is x's.

    Returns:
      y, of x's shape.

    Raises:
      ValueError: if x is not of a float dtype; if params or the mask do not fit it; if an axis
        does not exist or repeats.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxnorm
      >>> print(jaxnorm.rms_norm(jnp.array([[1.0, 7.0]]), epsilon=0.0))
      [[0.2 1.4]]

    References:
      Zhang & Sennrich, Root Mean Square Layer Normalization, 2019.
      https://arxiv.org/abs/1910.07467
      torch.nn.RMSNorm, PyTorch 2.13.
    """
    x = checks.float_array("rms_norm", x)
    layout = Layout(x.ndim, arguments.features("rms_norm", "axis", axis, x.ndim))
    sample = Sample(
        layout.channels,
        centered=False,
        mapped_axes=mapped_axes("rms_norm", axis_name, axis_index_groups),
    )
    return untracked_norm(x, params, layout, sample, Options("rms_norm", epsilon, mask, dtype))
