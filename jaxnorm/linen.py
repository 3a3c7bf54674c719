"""The norms as layers of flax.linen, with the arguments of Flax's layers and of the functions."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype, Initializer

import jaxnorm
from jaxnorm._core.collectives import AxisName
from jaxnorm._layers import attributes, calls, linen_base
from jaxnorm._layers.linen_frozen import frozen as frozen
from jaxnorm._layers.linen_frozen import trainable_mask as trainable_mask
from jaxnorm.functional import Limit


class BatchNorm(linen_base.Tracked):
    """Normalizes each channel over the batch and all other axes: `jaxnorm.batch_norm` as a layer.

    The input has the shape (N, C) or (N, *space, C), unless `axis` names other channel axes.

    A drop-in replacement for flax.linen.BatchNorm, with the same arguments, parameters and
    collection. The differences: `momentum` is the weight of the new value and defaults to 0.1
    (Flax's momentum is `decay` here); the running variance is unbiased; `batch_stats` also has a
    `count`; y has the dtype of x unless `dtype` is given; statistics are accurate at any offset.

    Call the layer with `use_running_average=False` to train (apply then needs
    mutable=["batch_stats"]), and with `use_running_average=True` to evaluate. With
    `use_running_average=False, update_stats=False` it normalizes by the batch and does not update
    the running statistics.

    Attributes:
      use_running_average: whether to normalize by the running statistics, as in evaluation, or by
        those of the batch, as in training. Give it either here or in the call.
      axis: the channel axis or axes of x.
      momentum: weight of the new batch in the running average; None weighs all batches equally.
      epsilon: added to the variance, in units of x squared.
      dtype: the dtype of y. Defaults to the dtype of x.
      param_dtype: the dtype of scale and bias.
      use_bias: whether the layer has a bias.
      use_scale: whether the layer has a scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      axis_name: mapped axes (of shard_map, pmap or vmap) over which the batch is distributed.
      axis_index_groups: lists of indices along axis_name; each group is a batch.
      use_fast_variance: accepted without effect; the variance is always accurate.
      force_float32_reductions: accepted without effect; statistics are float32 or wider.
      decay: 1 - momentum, the momentum of Flax, Haiku and Keras; give only one of the two.
      update_stats: whether to update the running statistics. None updates them in training.
      track_running_stats: whether the layer has running statistics. Without them it always
        normalizes by the batch.
      skip_nonfinite: whether a channel with NaN or Inf in the batch keeps its running statistics.
      virtual_batch_size: the number of consecutive samples that are normalized together (ghost
        batch norm). The running statistics are updated once, by the whole batch.

    Raises:
      ValueError: if momentum and decay are both given; if momentum lies between 0.5 and 1.0. The
        call raises it in the same cases as `jaxnorm.batch_norm`. With running statistics also: if
        use_running_average is given neither as an attribute nor in the call, or in both; if the
        running statistics are missing; if they cannot be updated because `batch_stats` is not
        mutable.
      TypeError: if an argument is given by its name in another library, such as `eps`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jaxnorm.linen
      >>> x = jnp.array([[1.0], [3.0]])
      >>> layer = jaxnorm.linen.BatchNorm()
      >>> variables = layer.init(jax.random.key(0), x, use_running_average=False)
      >>> y, updates = layer.apply(
      ...     variables, x, use_running_average=False, mutable=["batch_stats"])
      >>> print(y[:, 0].round(3), updates["batch_stats"]["mean"])
      [-1.  1.] [0.2]
      >>> y = layer.apply(variables | updates, x, use_running_average=True)

    References:
      flax.linen.BatchNorm, flax 0.12; torch.nn.BatchNorm2d, PyTorch 2.13.
    """

    use_running_average: bool | None = None
    axis: int | Sequence[int] = -1
    momentum: float | None = attributes.MOMENTUM
    epsilon: float = 1e-5
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = nn.initializers.zeros
    scale_init: Initializer = nn.initializers.ones
    axis_name: AxisName | None = None
    axis_index_groups: Sequence[Sequence[int]] | None = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    decay: float | None = None
    update_stats: bool | None = None
    track_running_stats: bool = True
    skip_nonfinite: bool = True
    virtual_batch_size: int | None = None

    _norm: ClassVar[calls.TrackedNorm] = staticmethod(calls.batch_norm)
    _param_axes = staticmethod(attributes.batch_norm_axes)


class BatchRenorm(BatchNorm):
    """Batch norm, corrected towards the running statistics: `jaxnorm.batch_renorm` as a layer.

    It is meant for small batches. Within the limits, y in training equals y in evaluation. Begin
    with r_max=1 and d_max=0, which is batch norm, and relax the limits as training proceeds, for
    example by a schedule of the count, such as one of optax.

    Attributes:
      r_max: the largest correction of the scale, at least 1; a number, or a function of the count.
      d_max: the largest correction of the mean, in running standard deviations, at least 0; a
        number, or a function of the count.

    The other attributes are those of `BatchNorm`; `track_running_stats` must be True.

    Raises:
      ValueError: in the same cases as `BatchNorm`; if r_max is a number less than 1, or d_max is a
        number less than 0; if track_running_stats is False.
      TypeError: if an argument is given by its name in another library, such as `eps`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import jaxnorm.linen
      >>> x = jnp.array([[1.0], [3.0]])
      >>> layer = jaxnorm.linen.BatchRenorm(
      ...     use_running_average=False,
      ...     r_max=optax.linear_schedule(1.0, 3.0, 35_000, transition_begin=5_000),
      ...     d_max=optax.linear_schedule(0.0, 5.0, 20_000, transition_begin=5_000))
      >>> variables = layer.init(jax.random.key(0), x)
      >>> y, updates = layer.apply(variables, x, mutable=["batch_stats"])
      >>> print(y[:, 0].round(3), updates["batch_stats"]["count"])
      [-1.  1.] 1

    References:
      Ioffe, Batch Renormalization, 2017. https://arxiv.org/abs/1702.03275
    """

    r_max: Limit = 3.0
    d_max: Limit = 5.0

    _norm = staticmethod(calls.batch_renorm)


class InstanceNorm(linen_base.Tracked):
    """Normalizes each channel of each sample: `jaxnorm.instance_norm` as a layer.

    The input has the shape (N, *space, C), unless `feature_axes` names other channel axes.

    A drop-in replacement for flax.linen.InstanceNorm, with the same arguments and parameters. The
    differences: y has the dtype of x unless `dtype` is given; the statistics are accurate at any
    offset; `axis_name` distributes samples, not the entries of one sample.

    With `track_running_stats=True` the layer has running statistics in `batch_stats`, as in
    PyTorch, and is called like `BatchNorm`. Without them it always normalizes by the statistics of
    each sample, and `use_running_average` has no effect. Evaluation by running statistics computes
    a different function than training, because differences between the samples are not removed.
    Compare the results of both ways to evaluate.

    Attributes:
      epsilon: added to the variance, in units of x squared.
      dtype: the dtype of y. Defaults to the dtype of x.
      param_dtype: the dtype of scale and bias.
      use_bias: whether the layer has a bias.
      use_scale: whether the layer has a scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      feature_axes: the channel axis or axes of x. Axis 0 is the batch axis.
      axis_name: mapped axes (of shard_map, pmap or vmap) over which the samples are distributed.
      axis_index_groups: lists of indices along axis_name; each group updates one state.
      use_fast_variance: accepted without effect; the variance is always accurate.
      force_float32_reductions: accepted without effect; statistics are float32 or wider.
      use_running_average: whether to normalize by the running statistics, as in evaluation, or by
        those of each sample, as in training. Give it either here or in the call. It has no effect
        if the layer has no running statistics.
      momentum: weight of the new batch in the running average; None weighs all batches equally.
      decay: 1 - momentum, the momentum of Flax, Haiku and Keras; give only one of the two.
      update_stats: whether to update the running statistics. None updates them in training.
      track_running_stats: whether the layer has running statistics.
      skip_nonfinite: whether a channel with NaN or Inf in any sample keeps its running statistics.

    Raises:
      ValueError: if momentum and decay are both given; if momentum lies between 0.5 and 1.0. The
        call raises it in the same cases as `jaxnorm.instance_norm`. With running statistics also:
        if use_running_average is given neither as an attribute nor in the call, or in both; if the
        running statistics are missing; if they cannot be updated because `batch_stats` is not
        mutable.
      TypeError: if an argument is given by its name in another library, such as `eps`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jaxnorm.linen
      >>> x = jnp.array([[[1.0], [3.0]], [[10.0], [30.0]]])  # (N, L, C) = (2, 2, 1)
      >>> layer = jaxnorm.linen.InstanceNorm()
      >>> print(layer.apply(layer.init(jax.random.key(0), x), x)[:, :, 0].round(3))
      [[-1.  1.]
       [-1.  1.]]

    References:
      flax.linen.InstanceNorm, flax 0.12; torch.nn.InstanceNorm2d, PyTorch 2.13.
    """

    epsilon: float = 1e-6
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = nn.initializers.zeros
    scale_init: Initializer = nn.initializers.ones
    feature_axes: int | Sequence[int] = -1
    axis_name: AxisName | None = None
    axis_index_groups: Sequence[Sequence[int]] | None = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    use_running_average: bool | None = None
    momentum: float | None = attributes.MOMENTUM
    decay: float | None = None
    update_stats: bool | None = None
    track_running_stats: bool = False
    skip_nonfinite: bool = True

    _norm = staticmethod(calls.instance_norm)
    _param_axes = staticmethod(attributes.instance_norm_axes)


class GroupNorm(linen_base.Untracked):
    """Normalizes each group of channels of each sample: `jaxnorm.group_norm` as a layer.

    The input has the shape (N, *space, C).

    A drop-in replacement for flax.linen.GroupNorm, with the same arguments and parameters. The
    differences: y has the dtype of x unless `dtype` is given; the statistics are accurate at any
    offset.

    Attributes:
      num_groups: the number of groups. None if group_size is given.
      group_size: the number of channels of a group. Give it with num_groups=None.
      epsilon: added to the variance, in units of x squared.
      dtype: the dtype of y. Defaults to the dtype of x.
      param_dtype: the dtype of scale and bias.
      use_bias: whether the layer has a bias.
      use_scale: whether the layer has a scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      reduction_axes: the axes to reduce over, including the last. None means all but the first.
      axis_name: mapped axes (of shard_map, pmap or vmap) over which each sample is distributed.
      axis_index_groups: lists of indices along axis_name; the devices of a group hold parts of the
        same samples.
      use_fast_variance: accepted without effect; the variance is always accurate.
      force_float32_reductions: accepted without effect; statistics are float32 or wider.

    Raises:
      ValueError: unless exactly one of num_groups and group_size is given. The call raises it in
        the same cases as `jaxnorm.group_norm`.
      TypeError: if an argument is given by its name in another library, such as `eps`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jaxnorm.linen
      >>> x = jnp.array([[1.0, 3.0, 10.0, 30.0]])
      >>> layer = jaxnorm.linen.GroupNorm(num_groups=2)
      >>> print(layer.apply(layer.init(jax.random.key(0), x), x).round(3))
      [[-1.  1. -1.  1.]]

    References:
      flax.linen.GroupNorm, flax 0.12; torch.nn.GroupNorm, PyTorch 2.13.
    """

    num_groups: int | None = 32
    group_size: int | None = None
    epsilon: float = 1e-6
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = nn.initializers.zeros
    scale_init: Initializer = nn.initializers.ones
    reduction_axes: int | Sequence[int] | None = None
    axis_name: AxisName | None = None
    axis_index_groups: Sequence[Sequence[int]] | None = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True

    _norm = staticmethod(calls.group_norm)
    _param_axes = staticmethod(attributes.group_norm_axes)


class LayerNorm(linen_base.Untracked):
    """Normalizes over the features: `jaxnorm.layer_norm` as a layer.

    The input may have any number of axes.

    A drop-in replacement for flax.linen.LayerNorm, with the same arguments and parameters. The
    differences: y has the dtype of x unless `dtype` is given; the statistics are accurate at any
    offset.

    Attributes:
      epsilon: added to the variance, in units of x squared.
      dtype: the dtype of y. Defaults to the dtype of x.
      param_dtype: the dtype of scale and bias.
      use_bias: whether the layer has a bias.
      use_scale: whether the layer has a scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      reduction_axes: the axes that the mean and the variance are computed over.
      feature_axes: the axes of the parameters.
      axis_name: mapped axes (of shard_map, pmap or vmap) over which the features are distributed.
      axis_index_groups: lists of indices along axis_name; the devices of a group hold parts of the
        same features.
      use_fast_variance: accepted without effect; the variance is always accurate.
      force_float32_reductions: accepted without effect; statistics are float32 or wider.

    Raises:
      ValueError: from the call, in the same cases as `jaxnorm.layer_norm`.
      TypeError: if an argument is given by its name in another library, such as `eps`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jaxnorm.linen
      >>> x = jnp.array([[1.0, 3.0], [10.0, 30.0]])
      >>> layer = jaxnorm.linen.LayerNorm()
      >>> print(layer.apply(layer.init(jax.random.key(0), x), x).round(3))
      [[-1.  1.]
       [-1.  1.]]

    References:
      flax.linen.LayerNorm, flax 0.12; torch.nn.LayerNorm, PyTorch 2.13.
    """

    epsilon: float = 1e-6
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = nn.initializers.zeros
    scale_init: Initializer = nn.initializers.ones
    reduction_axes: int | Sequence[int] = -1
    feature_axes: int | Sequence[int] = -1
    axis_name: AxisName | None = None
    axis_index_groups: Sequence[Sequence[int]] | None = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True

    _norm = staticmethod(calls.layer_norm)
    _param_axes = staticmethod(attributes.feature_axes)


class RMSNorm(linen_base.Untracked):
    """Divides by the root mean square of the features: `jaxnorm.rms_norm` as a layer.

    The input may have any number of axes.

    A drop-in replacement for flax.linen.RMSNorm, with the same arguments and parameters. The
    difference: y has the dtype of x unless `dtype` is given.

    Attributes:
      epsilon: added to the mean square, in units of x squared.
      dtype: the dtype of y. Defaults to the dtype of x.
      param_dtype: the dtype of the scale.
      use_scale: whether the layer has a scale.
      scale_init: initializer of the scale.
      reduction_axes: the axes that the mean square is computed over.
      feature_axes: the axes of the scale.
      axis_name: mapped axes (of shard_map, pmap or vmap) over which the features are distributed.
      axis_index_groups: lists of indices along axis_name; the devices of a group hold parts of the
        same features.
      use_fast_variance: accepted without effect; there is only one way.
      force_float32_reductions: accepted without effect; statistics are float32 or wider.

    Raises:
      ValueError: from the call, in the same cases as `jaxnorm.rms_norm`.
      TypeError: if an argument is given by its name in another library, such as `eps`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jaxnorm.linen
      >>> x = jnp.array([[3.0, -3.0]])
      >>> layer = jaxnorm.linen.RMSNorm()
      >>> print(layer.apply(layer.init(jax.random.key(0), x), x).round(3))
      [[ 1. -1.]]

    References:
      flax.linen.RMSNorm, flax 0.12; torch.nn.RMSNorm, PyTorch 2.13.
    """

    epsilon: float = 1e-6
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_scale: bool = True
    scale_init: Initializer = nn.initializers.ones
    reduction_axes: int | Sequence[int] = -1
    feature_axes: int | Sequence[int] = -1
    axis_name: AxisName | None = None
    axis_index_groups: Sequence[Sequence[int]] | None = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True

    _norm = staticmethod(calls.rms_norm)
    _param_axes = staticmethod(attributes.feature_axes)


class BatchNorm1d(BatchNorm):
    """`BatchNorm` for (N, C) and (N, L, C) only, with the same arguments."""

    ranks = (2, 3)


class BatchNorm2d(BatchNorm):
    """`BatchNorm` for (N, H, W, C) only, with the same arguments."""

    ranks = (4,)


class BatchNorm3d(BatchNorm):
    """`BatchNorm` for (N, D, H, W, C) only, with the same arguments."""

    ranks = (5,)


class InstanceNorm1d(InstanceNorm):
    """`InstanceNorm` for (N, L, C) or one sample (L, C), with the same arguments."""

    ranks = (2, 3)


class InstanceNorm2d(InstanceNorm):
    """`InstanceNorm` for (N, H, W, C) or one sample (H, W, C), with the same arguments."""

    ranks = (3, 4)


class InstanceNorm3d(InstanceNorm):
    """`InstanceNorm` for (N, D, H, W, C) or one sample (D, H, W, C), with the same arguments."""

    ranks = (4, 5)


def recalibrate(
    model: nn.Module,
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    *,
    progress: Callable[[int], Any] | None = None,
    **call: Any,
) -> dict[str, Any]:
    """Recomputes a model's running statistics from batches: `jaxnorm.recalibrate`.

    Args:
      model: a model with layers of `jaxnorm.linen`.
      variables: its variables; they are left as they are.
      batches: the data. Each batch is the first argument of the model; for pairs of inputs and
        labels, write `(x for x, _ in loader)`.
      progress: called after each batch with the number of batches done.
      **call: the other arguments of model.apply, such as train=True (training mode is needed)
        or rngs.

    Returns:
      The variables with new batch_stats.

    Raises:
      ValueError: as `jaxnorm.recalibrate`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jaxnorm.linen
      >>> x = jnp.array([[1.0], [2.0], [3.0], [6.0], [8.0]])
      >>> layer = jaxnorm.linen.BatchNorm()
      >>> variables = layer.init(jax.random.key(0), x, use_running_average=False)
      >>> new = jaxnorm.linen.recalibrate(
      ...     layer, variables, [x[:2], x[2:]], use_running_average=False)
      >>> print(new["batch_stats"]["mean"], new["batch_stats"]["var"])
      [4.] [8.5]

    References:
      As `jaxnorm.recalibrate`.
    """

    def step(batch_stats: Any, batch: Any, others: dict[str, Any]) -> Any:
        variables = {**others, "batch_stats": batch_stats}
        _, updates = model.apply(variables, batch, mutable=["batch_stats"], **call)
        return updates["batch_stats"]

    others = {name: value for name, value in variables.items() if name != "batch_stats"}
    batch_stats = jaxnorm.recalibrate(
        step, variables.get("batch_stats", {}), batches, others, progress=progress
    )
    return {**others, "batch_stats": batch_stats}
