"""The norms as layers of flax.nnx, with the arguments of Flax's layers and of the functions."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.typing import Dtype, Initializer
from jax.typing import ArrayLike

from jaxnorm._core.collectives import AxisName
from jaxnorm._layers import attributes, calls, nnx_base
from jaxnorm._layers.nnx_frozen import FrozenParam as FrozenParam
from jaxnorm._layers.nnx_frozen import freeze as freeze
from jaxnorm._layers.nnx_frozen import unfreeze as unfreeze
from jaxnorm._layers.nnx_models import begin_accumulation as begin_accumulation
from jaxnorm._layers.nnx_models import end_accumulation as end_accumulation
from jaxnorm._layers.nnx_models import recalibrate as recalibrate
from jaxnorm.functional import Limit

NONE: Mapping[str, Any] = MappingProxyType({})
ZEROS, ONES = nnx.initializers.zeros_init(), nnx.initializers.ones_init()


class BatchNorm(nnx_base.Tracked):
    """Normalizes each channel over the batch and all other axes: `jaxnorm.batch_norm` in NNX.

    The input has the shape (N, C) or (N, *space, C), unless `axis` names other channel axes.

    A drop-in replacement for flax.nnx.BatchNorm, with the same arguments, parameters and state, and
    an additional `count`. `model.train()` and `model.eval()` select the statistics.
    `jaxnorm.linen.BatchNorm` lists the differences from Flax.

    Args:
      num_features: the number of channels, or the shape of x over the channel axes.
      use_running_average: whether to normalize by the running statistics, as in evaluation, or by
        those of the batch, as in training. train() and eval() set it, and the argument of the call
        overrides it.
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
      promote_dtype: accepted without effect; nothing needs to be promoted.
      rngs: the source of the keys for the initializers.
      bias_metadata: metadata for the nnx.Param of the bias.
      scale_metadata: metadata for the nnx.Param of the scale.
      decay: 1 - momentum, the momentum of Flax, Haiku and Keras; give only one of the two.
      update_stats: whether to update the running statistics. None updates them in training.
      track_running_stats: whether the layer has running statistics. Without them it always
        normalizes by the batch.
      skip_nonfinite: whether a channel with NaN or Inf in the batch keeps its running statistics.
      virtual_batch_size: the number of consecutive samples that are normalized together (ghost
        batch norm). The running statistics are updated once, by the whole batch.

    Raises:
      ValueError: if momentum and decay are both given; if momentum lies between 0.5 and 1.0. The
        call raises it in the same cases as `jaxnorm.batch_norm` and, with running statistics, if
        use_running_average is None both in the layer and in the call.
      TypeError: if an argument is given by its name in another library, such as `eps`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import jaxnorm.nnx
      >>> x = jnp.array([[1.0], [3.0]])
      >>> layer = jaxnorm.nnx.BatchNorm(1, rngs=nnx.Rngs(0))
      >>> print(layer(x)[:, 0].round(3), layer.mean[...], layer.count[...])
      [-1.  1.] [0.2] 1
      >>> layer.eval()
      >>> print(layer(x).shape, layer.count[...])
      (2, 1) 1

    References:
      flax.nnx.BatchNorm, flax 0.12; torch.nn.BatchNorm2d, PyTorch 2.13.
    """

    _norm: ClassVar[calls.TrackedNorm] = staticmethod(calls.batch_norm)

    axis: int | Sequence[int]
    virtual_batch_size: int | None

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        use_running_average: bool | None = False,
        axis: int | Sequence[int] = -1,
        momentum: float | None = attributes.MOMENTUM,
        epsilon: float = 1e-5,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = ZEROS,
        scale_init: Initializer = ONES,
        axis_name: AxisName | None = None,
        axis_index_groups: Sequence[Sequence[int]] | None = None,
        use_fast_variance: bool = True,
        promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = NONE,
        scale_metadata: Mapping[str, Any] = NONE,
        decay: float | None = None,
        update_stats: bool | None = None,
        track_running_stats: bool = True,
        skip_nonfinite: bool = True,
        virtual_batch_size: int | None = None,
    ) -> None:
        nnx_base.declare(self, locals())


class BatchRenorm(BatchNorm):
    """Batch norm, corrected towards the running statistics: `jaxnorm.batch_renorm` in NNX.

    Args:
      num_features: the number of channels, or the shape of x over the channel axes.
      r_max: the largest correction of the scale, at least 1; a number, or a function of the count.
      d_max: the largest correction of the mean, in running standard deviations, at least 0; a
        number, or a function of the count.
      use_running_average: whether to normalize by the running statistics, as in evaluation, or by
        those of the batch, as in training. train() and eval() set it, and the argument of the call
        overrides it.
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
      promote_dtype: accepted without effect; nothing needs to be promoted.
      rngs: the source of the keys for the initializers.
      bias_metadata: metadata for the nnx.Param of the bias.
      scale_metadata: metadata for the nnx.Param of the scale.
      decay: 1 - momentum, the momentum of Flax, Haiku and Keras; give only one of the two.
      update_stats: whether to update the running statistics. None updates them in training.
      track_running_stats: must be True, because there is no correction without running statistics.
      skip_nonfinite: whether a channel with NaN or Inf in the batch keeps its running statistics.
      virtual_batch_size: the number of consecutive samples that are normalized together (ghost
        batch norm). The running statistics are updated once, by the whole batch.

    Raises:
      ValueError: in the same cases as `BatchNorm`; if r_max is a number less than 1, or d_max is a
        number less than 0; if track_running_stats is False.
      TypeError: if an argument is given by its name in another library, such as `eps`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import jaxnorm.nnx
      >>> layer = jaxnorm.nnx.BatchRenorm(1, r_max=1.0, d_max=0.0, rngs=nnx.Rngs(0))
      >>> print(layer(jnp.array([[1.0], [3.0]]))[:, 0].round(3))
      [-1.  1.]

    References:
      Ioffe, Batch Renormalization, 2017. https://arxiv.org/abs/1702.03275
    """

    _norm = staticmethod(calls.batch_renorm)

    r_max: Limit
    d_max: Limit

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        r_max: Limit = 3.0,
        d_max: Limit = 5.0,
        use_running_average: bool | None = False,
        axis: int | Sequence[int] = -1,
        momentum: float | None = attributes.MOMENTUM,
        epsilon: float = 1e-5,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = ZEROS,
        scale_init: Initializer = ONES,
        axis_name: AxisName | None = None,
        axis_index_groups: Sequence[Sequence[int]] | None = None,
        use_fast_variance: bool = True,
        promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = NONE,
        scale_metadata: Mapping[str, Any] = NONE,
        decay: float | None = None,
        update_stats: bool | None = None,
        track_running_stats: bool = True,
        skip_nonfinite: bool = True,
        virtual_batch_size: int | None = None,
    ) -> None:
        nnx_base.declare(self, locals())


class InstanceNorm(nnx_base.Tracked):
    """Normalizes each channel of each sample: `jaxnorm.instance_norm` in NNX.

    The input has the shape (N, *space, C), unless `feature_axes` names other channel axes.

    A drop-in replacement for flax.nnx.InstanceNorm, with the same arguments and parameters. With
    `track_running_stats=True` it has the state and the calls of `BatchNorm`.
    `jaxnorm.linen.InstanceNorm` lists the differences from Flax.

    Args:
      num_features: the number of channels, or the shape of x over the channel axes.
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
      promote_dtype: accepted without effect; nothing needs to be promoted.
      rngs: the source of the keys for the initializers.
      bias_metadata: metadata for the nnx.Param of the bias.
      scale_metadata: metadata for the nnx.Param of the scale.
      use_running_average: whether to normalize by the running statistics, as in evaluation, or by
        those of each sample, as in training. train() and eval() set it, and the argument of the
        call overrides it. It has no effect if the layer has no running statistics.
      momentum: weight of the new batch in the running average; None weighs all batches equally.
      decay: 1 - momentum, the momentum of Flax, Haiku and Keras; give only one of the two.
      update_stats: whether to update the running statistics. None updates them in training.
      track_running_stats: whether the layer has running statistics.
      skip_nonfinite: whether a channel with NaN or Inf in any sample keeps its running statistics.

    Raises:
      ValueError: if momentum and decay are both given; if momentum lies between 0.5 and 1.0. The
        call raises it in the same cases as `jaxnorm.instance_norm` and, with running statistics, if
        use_running_average is None both in the layer and in the call.
      TypeError: if an argument is given by its name in another library, such as `eps`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import jaxnorm.nnx
      >>> x = jnp.array([[[1.0], [3.0]], [[10.0], [30.0]]])  # (N, L, C) = (2, 2, 1)
      >>> print(jaxnorm.nnx.InstanceNorm(1, rngs=nnx.Rngs(0))(x)[:, :, 0].round(3))
      [[-1.  1.]
       [-1.  1.]]

    References:
      flax.nnx.InstanceNorm, flax 0.12; torch.nn.InstanceNorm2d, PyTorch 2.13.
    """

    _norm = staticmethod(calls.instance_norm)

    feature_axes: int | Sequence[int]

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        epsilon: float = 1e-6,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = ZEROS,
        scale_init: Initializer = ONES,
        feature_axes: int | Sequence[int] = -1,
        axis_name: AxisName | None = None,
        axis_index_groups: Sequence[Sequence[int]] | None = None,
        use_fast_variance: bool = True,
        promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = NONE,
        scale_metadata: Mapping[str, Any] = NONE,
        use_running_average: bool | None = False,
        momentum: float | None = attributes.MOMENTUM,
        decay: float | None = None,
        update_stats: bool | None = None,
        track_running_stats: bool = False,
        skip_nonfinite: bool = True,
    ) -> None:
        nnx_base.declare(self, locals())


class GroupNorm(nnx_base.Untracked):
    """Normalizes each group of channels of each sample: `jaxnorm.group_norm` in NNX.

    The input has the shape (N, *space, C).

    A drop-in replacement for flax.nnx.GroupNorm, with the same arguments and parameters.
    `jaxnorm.linen.GroupNorm` lists the differences from Flax.

    Args:
      num_features: the number of channels.
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
      promote_dtype: accepted without effect; nothing needs to be promoted.
      rngs: the source of the keys for the initializers.
      bias_metadata: metadata for the nnx.Param of the bias.
      scale_metadata: metadata for the nnx.Param of the scale.

    Raises:
      ValueError: unless exactly one of num_groups and group_size is given; if the groups do not
        divide the channels. The call raises it in the same cases as `jaxnorm.group_norm`.
      TypeError: if an argument is given by its name in another library, such as `eps`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import jaxnorm.nnx
      >>> x = jnp.array([[1.0, 3.0, 10.0, 30.0]])
      >>> print(jaxnorm.nnx.GroupNorm(4, num_groups=2, rngs=nnx.Rngs(0))(x).round(3))
      [[-1.  1. -1.  1.]]

    References:
      flax.nnx.GroupNorm, flax 0.12; torch.nn.GroupNorm, PyTorch 2.13.
    """

    _norm = staticmethod(calls.group_norm)

    num_features: int
    num_groups: int | None
    group_size: int | None
    use_bias: bool
    reduction_axes: int | Sequence[int] | None

    def __init__(
        self,
        num_features: int,
        num_groups: int | None = 32,
        group_size: int | None = None,
        *,
        epsilon: float = 1e-6,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = ZEROS,
        scale_init: Initializer = ONES,
        reduction_axes: int | Sequence[int] | None = None,
        axis_name: AxisName | None = None,
        axis_index_groups: Sequence[Sequence[int]] | None = None,
        use_fast_variance: bool = True,
        promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = NONE,
        scale_metadata: Mapping[str, Any] = NONE,
    ) -> None:
        nnx_base.declare(self, locals())
        attributes.number_of_groups(self, num_features)


class LayerNorm(nnx_base.Untracked):
    """Normalizes over the features: `jaxnorm.layer_norm` in NNX.

    The input may have any number of axes.

    A drop-in replacement for flax.nnx.LayerNorm, with the same arguments and parameters.
    `jaxnorm.linen.LayerNorm` lists the differences from Flax.

    Args:
      num_features: the number of features, or the shape of x over feature_axes.
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
      promote_dtype: accepted without effect; nothing needs to be promoted.
      rngs: the source of the keys for the initializers.
      bias_metadata: metadata for the nnx.Param of the bias.
      scale_metadata: metadata for the nnx.Param of the scale.

    Raises:
      ValueError: from the call, in the same cases as `jaxnorm.layer_norm`.
      TypeError: if an argument is given by its name in another library, such as `eps`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import jaxnorm.nnx
      >>> x = jnp.array([[1.0, 3.0], [10.0, 30.0]])
      >>> print(jaxnorm.nnx.LayerNorm(2, rngs=nnx.Rngs(0))(x).round(3))
      [[-1.  1.]
       [-1.  1.]]

    References:
      flax.nnx.LayerNorm, flax 0.12; torch.nn.LayerNorm, PyTorch 2.13.
    """

    _norm = staticmethod(calls.layer_norm)

    use_bias: bool
    reduction_axes: int | Sequence[int]
    feature_axes: int | Sequence[int]

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        epsilon: float = 1e-6,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = ZEROS,
        scale_init: Initializer = ONES,
        reduction_axes: int | Sequence[int] = -1,
        feature_axes: int | Sequence[int] = -1,
        axis_name: AxisName | None = None,
        axis_index_groups: Sequence[Sequence[int]] | None = None,
        use_fast_variance: bool = True,
        promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = NONE,
        scale_metadata: Mapping[str, Any] = NONE,
    ) -> None:
        nnx_base.declare(self, locals())


class RMSNorm(nnx_base.Untracked):
    """Divides by the root mean square of the features: `jaxnorm.rms_norm` in NNX.

    The input may have any number of axes.

    A drop-in replacement for flax.nnx.RMSNorm, with the same arguments and parameters.
    `jaxnorm.linen.RMSNorm` lists the differences from Flax.

    Args:
      num_features: the number of features, or the shape of x over feature_axes.
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
      promote_dtype: accepted without effect; nothing needs to be promoted.
      rngs: the source of the keys for the initializers.
      scale_metadata: metadata for the nnx.Param of the scale.

    Raises:
      ValueError: from the call, in the same cases as `jaxnorm.rms_norm`.
      TypeError: if an argument is given by its name in another library, such as `eps`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import jaxnorm.nnx
      >>> print(jaxnorm.nnx.RMSNorm(2, rngs=nnx.Rngs(0))(jnp.array([[3.0, -3.0]])).round(3))
      [[ 1. -1.]]

    References:
      flax.nnx.RMSNorm, flax 0.12; torch.nn.RMSNorm, PyTorch 2.13.
    """

    _norm = staticmethod(calls.rms_norm)

    reduction_axes: int | Sequence[int]
    feature_axes: int | Sequence[int]

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        epsilon: float = 1e-6,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_scale: bool = True,
        scale_init: Initializer = ONES,
        reduction_axes: int | Sequence[int] = -1,
        feature_axes: int | Sequence[int] = -1,
        axis_name: AxisName | None = None,
        axis_index_groups: Sequence[Sequence[int]] | None = None,
        use_fast_variance: bool = True,
        promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        scale_metadata: Mapping[str, Any] = NONE,
    ) -> None:
        nnx_base.declare(self, locals())

    def __call__(self, x: ArrayLike, mask: ArrayLike | None = None) -> jax.Array:
        """Normalizes x.

        Args:
          x: the input, any float dtype.
          mask: bool, with the rank of x and broadcasting against x. True marks entries to include.

        Returns:
          y, with the shape of x.
        """
        return super().__call__(x, mask=mask)


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
