"""The norms as pure functions: batch, instance, group, layer and RMS norm, and batch renorm."""

from collections.abc import Callable, Sequence
from typing import TypedDict, Unpack, overload

import jax
from jax.typing import ArrayLike, DTypeLike

from jaxnorm._core import arguments, checks
from jaxnorm._core.collectives import AxisName, mapped_axes
from jaxnorm._core.layout import Layout
from jaxnorm._core.reduction import Reduction
from jaxnorm._core.variables import Affine, BatchStats, State
from jaxnorm._norm import Options, Tracking, tracked_norm, untracked_norm
from jaxnorm._stats import state_checks

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

    As in PyTorch, x is normalized by the biased variance, the running variance is unbiased, and
    momentum is the weight of the new value (in Flax, of the old value). Channels are last by
    default. The input state is not modified; the new state is returned.

    ======================= ================ ==============================
    `use_running_average`   `update_stats`   purpose
    ======================= ================ ==============================
    False                   None (= True)    training
    True                    None (= False)   evaluation
    False                   False            batch statistics, state frozen
    True                    True             adaptation: normalize by the
                                             input state, then update it
    ======================= ================ ==============================

    Args:
      x: the input, of shape (N, C), (N, \*space, C), or any other shape with at least two axes,
        and of any float dtype.
      params: {"scale", "bias"}, each of shape (C,), or with the rank of x and broadcasting against
        x. Either or both may be missing.
      batch_stats: the state {"mean": (C,), "var": (C,), "count": ()}. With None, there are no
        running statistics, and the statistics of the batch are always used.
      use_running_average: whether to normalize by the state instead of the batch. The state is
        constant under differentiation; scale and bias still have gradients.
      update_stats: whether to update the state with the moments of the batch. None updates it if
        x is normalized by the batch.
      momentum: weight of the new batch in the running average, as in PyTorch; 1 - momentum is
        Flax's momentum. Defaults to 0.1. None weighs all batches equally (cumulative average).
      epsilon: added to the variance, in units of x squared.
      channel_axis: the axis or axes that are not reduced over; "C" is the shape of x over them.
      mask: bool, with the rank of x and broadcasting against x. True marks the entries to include.
        The other entries, even if they are NaN or Inf, do not affect statistics or gradients, and y
        is 0 there.
      axis_name: the mapped axes (of shard_map, pmap or vmap) over which the batch is distributed.
        The statistics are those of the whole batch, however it is distributed.
      axis_index_groups: lists of indices along axis_name; each group is a batch.
      virtual_batch_size: the number of consecutive samples (axis 0) that are normalized together
        (ghost batch norm). The virtual batches of a device consist of its own samples. The state is
        updated once, by the moments of the whole batch over all devices of axis_name. Ignored if
        use_running_average is True.
      skip_nonfinite: whether a channel with NaN or Inf in the batch keeps its state; with
        momentum=None, all channels then keep it. The y of the channel is still NaN.
      dtype: the dtype of y. Defaults to the dtype of x.

    Returns:
      A pair (y, batch_stats). y has the shape of x; batch_stats is the updated state, or the input
      state if it was not updated.

    Raises:
      ValueError: if the dtype of x is not a float dtype or x has fewer than two axes; if params,
        batch_stats or the mask do not match x; if a required state is missing; if batch statistics
        are used without a mask and a channel has exactly one value; if virtual_batch_size does not
        divide the number of samples of each device; if axis_index_groups do not contain each index
        of axis_name once, in groups of one size.
      NameError: if statistics are summed over axis_name, and it is not bound.

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


# The state is required, although params, which come before it, are optional.
@overload
def batch_renorm(
    x: ArrayLike,
    params: Affine | None,
    batch_stats: BatchStats,
    **options: Unpack[_RenormOptions],
) -> tuple[jax.Array, BatchStats]:
    """Normalizes with a state that is given as the third argument; see the implementation."""


@overload
def batch_renorm(
    x: ArrayLike,
    params: Affine | None = None,
    *,
    batch_stats: BatchStats,
    **options: Unpack[_RenormOptions],
) -> tuple[jax.Array, BatchStats]:
    """Normalizes with a state that is given by name; see the implementation."""


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
    r"""Normalizes by the batch, with a correction towards the running statistics.

    .. math::
        y = scale \cdot (\hat x\, r + d) + bias, \quad
        r = \mathrm{clip}_{1/r_{max}}^{r_{max}} \frac{\sigma_{batch}}{\sigma}, \quad
        d = \mathrm{clip}_{-d_{max}}^{d_{max}} \frac{\mu_{batch} - \mu}{\sigma}

    It is meant for small batches. Within the limits, y equals the output of evaluation, whatever
    the other samples of the batch are. The gradient is taken through the statistics of the batch; r
    and d are constants. With r_max=1 and d_max=0 this is batch norm. Correcting towards the initial
    state (mean 0, variance 1) is not useful. The defaults are the final limits of the paper. Begin
    with r_max=1 and d_max=0, and relax both by schedules of the count, as in the paper:

        r_max = optax.linear_schedule(1.0, 3.0, 35_000, transition_begin=5_000)
        d_max = optax.linear_schedule(0.0, 5.0, 20_000, transition_begin=5_000)

    The state contains the running variance; sigma is the square root of variance + epsilon. (The
    paper and Keras average sigma itself.) The paper uses momentum 0.01.

    Args:
      x: the input, of shape (N, C), (N, \*space, C), or any other shape with at least two axes,
        and of any float dtype.
      params: {"scale", "bias"}, as in `batch_norm`.
      batch_stats: the state {"mean": (C,), "var": (C,), "count": ()}; it is required.
      r_max: the limit of r, which is clipped to [1 / r_max, r_max]: a number of at least 1, or a
        function of the count. Defaults to 3.0.
      d_max: the limit of d, which is clipped to [-d_max, d_max]: a number of at least 0, or a
        function of the count. Defaults to 5.0.
      use_running_average: whether to normalize by the state, as batch norm does in evaluation.
      update_stats: whether to update the state with the moments of the batch. None updates it if
        x is normalized by the batch.
      momentum: weight of the new batch in the running average. Defaults to 0.1. None weighs all
        batches equally.
      epsilon: added to the variance, in units of x squared.
      channel_axis: the axis or axes that are not reduced over; "C" is the shape of x over them.
      mask: bool, True for the entries to include, as in `batch_norm`.
      axis_name: the mapped axes (of shard_map, pmap or vmap) over which the batch is distributed.
      axis_index_groups: lists of indices along axis_name; each group is a batch.
      virtual_batch_size: the number of consecutive samples that are normalized together.
      skip_nonfinite: whether a channel with NaN or Inf in the batch keeps its state; with
        momentum=None, all channels then keep it. The y of the channel is still NaN.
      dtype: the dtype of y. Defaults to the dtype of x.

    Returns:
      A pair (y, batch_stats). y has the shape of x; batch_stats is the updated state, or the input
      state if it was not updated.

    Raises:
      ValueError: in the same cases as `batch_norm`; if batch_stats is missing; if r_max is a number
        less than 1, or d_max is a number less than 0. The results of functions of the count are not
        compared with these bounds.
      NameError: if statistics are summed over axis_name, and it is not bound.

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
    state_checks.batch_stats("batch_renorm", batch_stats)
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
    r"""Normalizes each channel of each sample over the other axes of the sample.

    .. math:: y_n = scale \cdot \frac{x_n - E[x_n]}{\sqrt{Var[x_n] + \epsilon}} + bias

    y equals the output of `batch_norm` under jax.vmap over the batch axis. The state is updated
    once, by the average over the samples of their means and of their unbiased variances; the
    variance between the samples is not included. This follows PyTorch with two exceptions: the
    count is incremented (in PyTorch it stays 0), and momentum=None is a cumulative average (in
    PyTorch it leaves the state at mean 0 and variance 1).

    Args:
      x: the input, of shape (N, \*space, C), or (\*space, C) with batch_axis=None, and of any float
        dtype.
      params: {"scale", "bias"}, each of shape (C,), or with the rank of x and broadcasting against
        x. Either or both may be missing.
      batch_stats: the state {"mean": (C,), "var": (C,), "count": ()}. With None, there are no
        running statistics, and the statistics of each sample are always used.
      use_running_average: whether to normalize by the state, as batch norm does in evaluation.
      update_stats: whether to update the state with the moments of the samples. None updates it if
        x is normalized by them. `batch_norm` has a table of the combinations with
        use_running_average.
      momentum: weight of the new batch in the running average. Defaults to 0.1. None weighs all
        batches equally.
      epsilon: added to the variance, in units of x squared.
      channel_axis: the axis or axes that are not reduced over; "C" is the shape of x over them.
      batch_axis: the axis of the samples. None means that x is one sample without a batch axis.
      mask: bool, with the rank of x and broadcasting against x. True marks the entries to include.
        The other entries, even if they are NaN or Inf, do not affect statistics or gradients, and y
        is 0 there.
      axis_name: the mapped axes (of shard_map, pmap or vmap) over which the samples are
        distributed. They are only needed to update the state; y does not depend on other samples.
      axis_index_groups: lists of indices along axis_name; each group updates one state.
      skip_nonfinite: whether a channel with NaN or Inf in any sample keeps its state.
      dtype: the dtype of y. Defaults to the dtype of x.

    Returns:
      A pair (y, batch_stats). y has the shape of x; batch_stats is the updated state, or the input
      state if it was not updated.

    Raises:
      ValueError: in the same cases as `batch_norm`; if batch_axis is a channel axis; if instance
        statistics are used without a mask and a sample has exactly one spatial element.
      NameError: if statistics are summed over axis_name, and it is not bound.

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
    r"""Normalizes each group of neighboring channels of each sample, over all axes but the batch.

    .. math:: y_{ng} = scale \cdot \frac{x_{ng} - E[x_{ng}]}{\sqrt{Var[x_{ng}] + \epsilon}} + bias

    With one channel per group this is instance norm; with one group it is layer norm over all axes
    except the batch axis.

    Args:
      x: the input, of shape (N, \*space, C) and of any float dtype.
      params: {"scale", "bias"}, each of shape (C,), or with the rank of x and broadcasting against
        x. Either or both may be missing.
      num_groups: the number of groups that the channels are divided into. Defaults to 32.
      epsilon: added to the variance, in units of x squared.
      channel_axis: the axis of the channels.
      batch_axis: the axis or axes of the samples. None means that x is one sample without a batch
        axis.
      mask: bool, with the rank of x and broadcasting against x. True marks the entries to include.
        The other entries, even if they are NaN or Inf, do not affect statistics or gradients, and y
        is 0 there.
      axis_name: the mapped axes (of shard_map, pmap or vmap) over which each sample is distributed.
      axis_index_groups: lists of indices along axis_name; the devices of a group hold parts of the
        same samples.
      dtype: the dtype of y. Defaults to the dtype of x.

    Returns:
      y, with the shape of x.

    Raises:
      ValueError: if the dtype of x is not a float dtype; if params or the mask do not match x; if
        an axis does not exist or is used twice; if num_groups does not divide the number of
        channels.
      NameError: if statistics are summed over axis_name, and it is not bound.

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
    groups, devices = (channel, num_groups), mapped_axes("group_norm", axis_name, axis_index_groups)
    if axes:
        reduction = Reduction(axes, groups=groups, mapped_axes=devices)
    else:  # x has no other axes, so that the sums of the channels would have the size of x
        reduction = Reduction((channel + 1,), split=groups, mapped_axes=devices)
    return untracked_norm(x, params, layout, reduction, Options("group_norm", epsilon, mask, dtype))


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
    r"""Normalizes over the feature axes, separately for each position along the other axes.

    .. math:: y = scale \cdot \frac{x - E[x]}{\sqrt{Var[x] + \epsilon}} + bias

    Args:
      x: the input, of shape (\*batch, C) or any other shape, and of any float dtype.
      params: {"scale", "bias"}, each with the shape of x over `axis`, in the order of `axis`, or
        with the rank of x and broadcasting against x. Either or both may be missing.
      axis: the feature axis or axes, which are reduced over and which the parameters have. Defaults
        to the last axis.
      epsilon: added to the variance, in units of x squared.
      mask: bool, with the rank of x and broadcasting against x. True marks the entries to include.
        The other entries, even if they are NaN or Inf, do not affect statistics or gradients, and y
        is 0 there.
      axis_name: the mapped axes (of shard_map, pmap or vmap) over which the features are
        distributed.
      axis_index_groups: lists of indices along axis_name; the devices of a group hold parts of the
        same features.
      dtype: the dtype of y. Defaults to the dtype of x.

    Returns:
      y, with the shape of x.

    Raises:
      ValueError: if the dtype of x is not a float dtype; if params or the mask do not match x; if
        an axis does not exist or is repeated.
      NameError: if statistics are summed over axis_name, and it is not bound.

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
    reduction = Reduction(
        layout.channels, mapped_axes=mapped_axes("layer_norm", axis_name, axis_index_groups)
    )
    return untracked_norm(x, params, layout, reduction, Options("layer_norm", epsilon, mask, dtype))


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
    r"""Divides x by its root mean square over the feature axes, without subtracting the mean.

    .. math:: y = scale \cdot \frac{x}{\sqrt{E[x^2] + \epsilon}} + bias

    To match torch.nn.RMSNorm with eps=None, write epsilon=jnp.finfo(x.dtype).eps.

    Args:
      x: the input, of shape (\*batch, C) or any other shape, and of any float dtype.
      params: {"scale", "bias"}, each with the shape of x over `axis`, in the order of `axis`, or
        with the rank of x and broadcasting against x. Either or both may be missing; the bias
        usually is.
      axis: the feature axis or axes, which are reduced over and which the parameters have. Defaults
        to the last axis.
      epsilon: added to the mean square, in units of x squared.
      mask: bool, with the rank of x and broadcasting against x. True marks the entries to include.
        The other entries, even if they are NaN or Inf, do not affect statistics or gradients, and y
        is 0 there.
      axis_name: the mapped axes (of shard_map, pmap or vmap) over which the features are
        distributed.
      axis_index_groups: lists of indices along axis_name; the devices of a group hold parts of the
        same features.
      dtype: the dtype of y. Defaults to the dtype of x.

    Returns:
      y, with the shape of x.

    Raises:
      ValueError: if the dtype of x is not a float dtype; if params or the mask do not match x; if
        an axis does not exist or is repeated.
      NameError: if statistics are summed over axis_name, and it is not bound.

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
    reduction = Reduction(
        layout.channels,
        centered=False,
        mapped_axes=mapped_axes("rms_norm", axis_name, axis_index_groups),
    )
    return untracked_norm(x, params, layout, reduction, Options("rms_norm", epsilon, mask, dtype))
