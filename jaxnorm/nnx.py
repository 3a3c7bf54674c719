"""The layers of flax.nnx: declare variables, call a function, write the state back."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.typing import Dtype, Initializer
from jax.typing import ArrayLike

import jaxnorm
from jaxnorm import _layers
from jaxnorm._core import arguments
from jaxnorm._core.collectives import AxisName
from jaxnorm._core.variables import Affine, BatchStats, init_batch_stats
from jaxnorm.functional import Limit

Axes = int | Sequence[int]
Groups = Sequence[Sequence[int]]
Norm = Callable[..., tuple[jax.Array, BatchStats | None]]
Metadata = Mapping[str, Any]
NONE: Metadata = MappingProxyType({})
ZEROS, ONES = nnx.initializers.zeros_init(), nnx.initializers.ones_init()


class _Norm(nnx.Module):
    """The attributes of every layer: the constructor's arguments, and the parameters."""

    num_features: Axes
    epsilon: float
    dtype: Dtype | None
    param_dtype: Dtype
    use_scale: bool
    axis_name: AxisName | None
    axis_index_groups: Groups | None
    use_fast_variance: bool
    promote_dtype: Callable[..., Any]
    scale: nnx.Param[jax.Array] | None
    bias: nnx.Param[jax.Array] | None


class _Tracked(_Norm):
    """The attributes of the layers that may have running statistics, which are none otherwise."""

    use_bias: bool
    use_running_average: bool | None
    momentum: float | None
    decay: float | None
    update_stats: bool | None
    track_running_stats: bool
    skip_nonfinite: bool
    mean: nnx.BatchStat[jax.Array]
    var: nnx.BatchStat[jax.Array]
    count: nnx.BatchStat[jax.Array]
    accumulation: nnx.BatchStat[Any] | None

    ranks: ClassVar[tuple[int, ...] | None] = None

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Serves nnx.view, which gives the statistics that normalize in the view.

        Args:
          use_running_average: as the attribute; None leaves it.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average


class BatchNorm(_Tracked):
    """Normalizes each channel over the batch and all other axes: `jaxnorm.batch_norm` in NNX.

    A drop-in replacement for flax.nnx.BatchNorm, with the same arguments, parameters and state, and
    an additional `count`. `model.train()` and `model.eval()` select the statistics.
    `jaxnorm.linen.BatchNorm` lists the differences from Flax.

    Args:
      num_features: the number of channels, or the shape of x over the channel axes.
      use_running_average: whether to normalize by the running statistics instead of the batch's
        (training); train() and eval() set it, and the call overrides it.
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
      promote_dtype: accepted, without effect: nothing needs to be promoted.
      rngs: the source of the keys for the initializers.
      bias_metadata: metadata of the bias, an nnx.Param.
      scale_metadata: metadata of the scale, an nnx.Param.
      decay: 1 - momentum, the momentum of Flax, Haiku and Keras; give only one of the two.
      update_stats: whether to update the running statistics. None updates them in training.
      track_running_stats: whether the layer has running statistics. Without them it always
        normalizes by the batch.
      skip_nonfinite: whether a channel with NaN or Inf in the batch keeps its running statistics.
      virtual_batch_size: the number of consecutive samples that are normalized together (ghost
        batch norm). The running statistics are updated once, by the whole batch.

    Raises:
      ValueError: as `jaxnorm.linen.BatchNorm`.

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

    norm: ClassVar[Norm] = staticmethod(_layers.batch_norm)
    axis: Axes
    virtual_batch_size: int | None

    def __init__(
        self,
        num_features: Axes,
        *,
        use_running_average: bool | None = False,
        axis: Axes = -1,
        momentum: float | None = _layers.MOMENTUM,
        epsilon: float = 1e-5,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = ZEROS,
        scale_init: Initializer = ONES,
        axis_name: AxisName | None = None,
        axis_index_groups: Groups | None = None,
        use_fast_variance: bool = True,
        promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Metadata = NONE,
        scale_metadata: Metadata = NONE,
        decay: float | None = None,
        update_stats: bool | None = None,
        track_running_stats: bool = True,
        skip_nonfinite: bool = True,
        virtual_batch_size: int | None = None,
    ) -> None:
        _declare(self, locals())
        _declare_batch_stats(self)

    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        update_stats: bool | None = None,
        mask: ArrayLike | None = None,
    ) -> jax.Array:
        """Normalizes x, and updates the running statistics in training.

        Args:
          x: the input, of shape (N, C) or (N, *space, C), any float dtype.
          use_running_average: as the attribute, which it overrides.
          update_stats: as the attribute, which it overrides.
          mask: bool, with the rank of x and broadcasting against x. True marks entries to include.

        Returns:
          y, with the shape of x.
        """
        return _tracked_norm(self, self.norm, x, use_running_average, update_stats, mask)


class BatchRenorm(BatchNorm):
    """Batch norm, corrected towards the running statistics: `jaxnorm.batch_renorm` in NNX.

    Args:
      num_features: the number of channels, or the shape of x over the channel axes.
      r_max: the largest correction of the scale, at least 1; a number, or a function of the count.
      d_max: the largest correction of the mean, in running standard deviations, at least 0; a
        number, or a function of the count.
      use_running_average: whether to normalize by the running statistics instead of the batch's
        (training); train() and eval() set it, and the call overrides it.
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
      promote_dtype: accepted, without effect: nothing needs to be promoted.
      rngs: the source of the keys for the initializers.
      bias_metadata: metadata of the bias, an nnx.Param.
      scale_metadata: metadata of the scale, an nnx.Param.
      decay: 1 - momentum, the momentum of Flax, Haiku and Keras; give only one of the two.
      update_stats: whether to update the running statistics. None updates them in training.
      track_running_stats: always True: there is no correction without running statistics.
      skip_nonfinite: whether a channel with NaN or Inf in the batch keeps its running statistics.
      virtual_batch_size: the number of consecutive samples that are normalized together (ghost
        batch norm). The running statistics are updated once, by the whole batch.

    Raises:
      ValueError: as `jaxnorm.linen.BatchRenorm`.

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

    norm = staticmethod(_layers.batch_renorm)

    r_max: Limit
    d_max: Limit

    def __init__(
        self,
        num_features: Axes,
        *,
        r_max: Limit = 3.0,
        d_max: Limit = 5.0,
        use_running_average: bool | None = False,
        axis: Axes = -1,
        momentum: float | None = _layers.MOMENTUM,
        epsilon: float = 1e-5,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = ZEROS,
        scale_init: Initializer = ONES,
        axis_name: AxisName | None = None,
        axis_index_groups: Groups | None = None,
        use_fast_variance: bool = True,
        promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Metadata = NONE,
        scale_metadata: Metadata = NONE,
        decay: float | None = None,
        update_stats: bool | None = None,
        track_running_stats: bool = True,
        skip_nonfinite: bool = True,
        virtual_batch_size: int | None = None,
    ) -> None:
        _declare(self, locals())
        _declare_batch_stats(self)
        _layers.check_limits(self)


class InstanceNorm(_Tracked):
    """Normalizes each channel of each sample: `jaxnorm.instance_norm` in NNX.

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
      feature_axes: the channel axis or axes of x; axis 0 is the samples'.
      axis_name: mapped axes (of shard_map, pmap or vmap) over which the samples are distributed.
      axis_index_groups: lists of indices along axis_name; each group updates one state.
      use_fast_variance: accepted without effect; the variance is always accurate.
      promote_dtype: accepted, without effect: nothing needs to be promoted.
      rngs: the source of the keys for the initializers.
      bias_metadata: metadata of the bias, an nnx.Param.
      scale_metadata: metadata of the scale, an nnx.Param.
      use_running_average: normalize by the running statistics (evaluation), not by the samples'
        own, where the layer tracks them; train() and eval() set it, and the call overrides it.
      momentum: weight of the new batch in the running average; None weighs all batches equally.
      decay: 1 - momentum, the momentum of Flax, Haiku and Keras; give only one of the two.
      update_stats: whether to update the running statistics. None updates them in training.
      track_running_stats: whether the layer has running statistics.
      skip_nonfinite: a channel that holds NaN or Inf in any sample keeps its running statistics.

    Raises:
      ValueError: as `jaxnorm.linen.InstanceNorm`.

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

    feature_axes: Axes

    def __init__(
        self,
        num_features: Axes,
        *,
        epsilon: float = 1e-6,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = ZEROS,
        scale_init: Initializer = ONES,
        feature_axes: Axes = -1,
        axis_name: AxisName | None = None,
        axis_index_groups: Groups | None = None,
        use_fast_variance: bool = True,
        promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Metadata = NONE,
        scale_metadata: Metadata = NONE,
        use_running_average: bool | None = False,
        momentum: float | None = _layers.MOMENTUM,
        decay: float | None = None,
        update_stats: bool | None = None,
        track_running_stats: bool = False,
        skip_nonfinite: bool = True,
    ) -> None:
        _declare(self, locals())
        _declare_batch_stats(self)

    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        update_stats: bool | None = None,
        mask: ArrayLike | None = None,
    ) -> jax.Array:
        """Normalizes x, and updates the running statistics, if there are any, in training.

        Args:
          x: the input, of shape (N, *space, C), any float dtype.
          use_running_average: as the attribute, which it overrides.
          update_stats: as the attribute, which it overrides.
          mask: bool, with the rank of x and broadcasting against x. True marks entries to include.

        Returns:
          y, with the shape of x.
        """
        return _tracked_norm(
            self, _layers.instance_norm, x, use_running_average, update_stats, mask
        )


class GroupNorm(_Norm):
    """Normalizes each group of channels of each sample: `jaxnorm.group_norm` in NNX.

    A drop-in replacement for flax.nnx.GroupNorm, with the same arguments and parameters.
    `jaxnorm.linen.GroupNorm` lists the differences from Flax.

    Args:
      num_features: the number of channels.
      num_groups: into how many groups the channels are divided; None where group_size says it.
      group_size: how many channels a group has; instead of num_groups.
      epsilon: added to the variance, in units of x squared.
      dtype: the dtype of y. Defaults to the dtype of x.
      param_dtype: the dtype of scale and bias.
      use_bias: whether the layer has a bias.
      use_scale: whether the layer has a scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      reduction_axes: the axes that share one mean, the last among them; None: all but the first.
      axis_name: mapped axes (of shard_map, pmap or vmap) over which each sample is distributed.
      axis_index_groups: lists of indices along axis_name that hold one sample together.
      use_fast_variance: accepted without effect; the variance is always accurate.
      promote_dtype: accepted, without effect: nothing needs to be promoted.
      rngs: the source of the keys for the initializers.
      bias_metadata: metadata of the bias, an nnx.Param.
      scale_metadata: metadata of the scale, an nnx.Param.

    Raises:
      ValueError: as `jaxnorm.linen.GroupNorm`, and if the groups do not divide the channels.

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

    num_features: int
    num_groups: int | None
    group_size: int | None
    use_bias: bool
    reduction_axes: Axes | None

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
        reduction_axes: Axes | None = None,
        axis_name: AxisName | None = None,
        axis_index_groups: Groups | None = None,
        use_fast_variance: bool = True,
        promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Metadata = NONE,
        scale_metadata: Metadata = NONE,
    ) -> None:
        _declare(self, locals())
        _layers.number_of_groups(self, num_features)

    def __call__(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
        """Normalizes x.

        Args:
          x: the input, of shape (N, *space, C), any float dtype.
          mask: bool, with the rank of x and broadcasting against x. True marks entries to include.

        Returns:
          y, with the shape of x.
        """
        return _layers.group_norm(self, x, _params(self), mask=mask)


class LayerNorm(_Norm):
    """Normalizes over the features: `jaxnorm.layer_norm` in NNX.

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
      reduction_axes: the axes that share one mean and variance.
      feature_axes: the axes of the parameters.
      axis_name: mapped axes (of shard_map, pmap or vmap) over which the features are distributed.
      axis_index_groups: lists of indices along axis_name that hold one row of features together.
      use_fast_variance: accepted without effect; the variance is always accurate.
      promote_dtype: accepted, without effect: nothing needs to be promoted.
      rngs: the source of the keys for the initializers.
      bias_metadata: metadata of the bias, an nnx.Param.
      scale_metadata: metadata of the scale, an nnx.Param.

    Raises:
      ValueError: as `jaxnorm.linen.LayerNorm`.

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

    use_bias: bool
    reduction_axes: Axes
    feature_axes: Axes

    def __init__(
        self,
        num_features: Axes,
        *,
        epsilon: float = 1e-6,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = ZEROS,
        scale_init: Initializer = ONES,
        reduction_axes: Axes = -1,
        feature_axes: Axes = -1,
        axis_name: AxisName | None = None,
        axis_index_groups: Groups | None = None,
        use_fast_variance: bool = True,
        promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Metadata = NONE,
        scale_metadata: Metadata = NONE,
    ) -> None:
        _declare(self, locals())

    def __call__(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
        """Normalizes x.

        Args:
          x: the input, any float dtype.
          mask: bool, with the rank of x and broadcasting against x. True marks entries to include.

        Returns:
          y, with the shape of x.
        """
        return _layers.layer_norm(self, x, _params(self), mask=mask)


class RMSNorm(_Norm):
    """Divides by the root mean square of the features: `jaxnorm.rms_norm` in NNX.

    A drop-in replacement for flax.nnx.RMSNorm, with the same arguments and parameters.
    `jaxnorm.linen.RMSNorm` lists the differences from Flax.

    Args:
      num_features: the number of features, or the shape of x over feature_axes.
      epsilon: added to the mean square, in units of x squared.
      dtype: the dtype of y. Defaults to the dtype of x.
      param_dtype: the dtype of the scale.
      use_scale: whether the layer has a scale.
      scale_init: initializer of the scale.
      reduction_axes: the axes that share one mean square.
      feature_axes: the axes of the scale.
      axis_name: mapped axes (of shard_map, pmap or vmap) over which the features are distributed.
      axis_index_groups: lists of indices along axis_name that hold one row of features together.
      use_fast_variance: accepted, without effect: there is only one way.
      promote_dtype: accepted, without effect: nothing needs to be promoted.
      rngs: the source of the keys for the initializers.
      scale_metadata: metadata of the scale, an nnx.Param.

    Raises:
      ValueError: as `jaxnorm.linen.RMSNorm`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import jaxnorm.nnx
      >>> print(jaxnorm.nnx.RMSNorm(2, rngs=nnx.Rngs(0))(jnp.array([[3.0, -3.0]])).round(3))
      [[ 1. -1.]]

    References:
      flax.nnx.RMSNorm, flax 0.12; torch.nn.RMSNorm, PyTorch 2.13.
    """

    reduction_axes: Axes
    feature_axes: Axes

    def __init__(
        self,
        num_features: Axes,
        *,
        epsilon: float = 1e-6,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_scale: bool = True,
        scale_init: Initializer = ONES,
        reduction_axes: Axes = -1,
        feature_axes: Axes = -1,
        axis_name: AxisName | None = None,
        axis_index_groups: Groups | None = None,
        use_fast_variance: bool = True,
        promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        scale_metadata: Metadata = NONE,
    ) -> None:
        _declare(self, locals())

    def __call__(self, x: ArrayLike, mask: ArrayLike | None = None) -> jax.Array:
        """Normalizes x.

        Args:
          x: the input, any float dtype.
          mask: bool, with the rank of x and broadcasting against x. True marks entries to include.

        Returns:
          y, with the shape of x.
        """
        return _layers.rms_norm(self, x, _params(self), mask=mask)


class BatchNorm1d(BatchNorm):
    """`BatchNorm` for (N, C) and (N, L, C) alone, with the same arguments.

    Raises:
      ValueError: if x has another rank; else as `BatchNorm`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import jaxnorm.nnx
      >>> layer = jaxnorm.nnx.BatchNorm1d(2, rngs=nnx.Rngs(0))
      >>> y = layer(jnp.ones((4, 6, 2)))
      >>> y.shape
      (4, 6, 2)

    References:
      torch.nn.BatchNorm1d, PyTorch 2.13.
    """

    ranks = (2, 3)


class BatchNorm2d(BatchNorm):
    """`BatchNorm` for (N, H, W, C) alone, with the same arguments.

    Raises:
      ValueError: if x has another rank; else as `BatchNorm`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import jaxnorm.nnx
      >>> layer = jaxnorm.nnx.BatchNorm2d(2, rngs=nnx.Rngs(0))
      >>> y = layer(jnp.ones((4, 6, 6, 2)))
      >>> y.shape
      (4, 6, 6, 2)

    References:
      torch.nn.BatchNorm2d, PyTorch 2.13.
    """

    ranks = (4,)


class BatchNorm3d(BatchNorm):
    """`BatchNorm` for (N, D, H, W, C) alone, with the same arguments.

    Raises:
      ValueError: if x has another rank; else as `BatchNorm`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import jaxnorm.nnx
      >>> layer = jaxnorm.nnx.BatchNorm3d(2, rngs=nnx.Rngs(0))
      >>> y = layer(jnp.ones((4, 6, 6, 6, 2)))
      >>> y.shape
      (4, 6, 6, 6, 2)

    References:
      torch.nn.BatchNorm3d, PyTorch 2.13.
    """

    ranks = (5,)


class InstanceNorm1d(InstanceNorm):
    """`InstanceNorm` for (N, L, C), and for one sample (L, C), with the same arguments.

    Raises:
      ValueError: if x has another rank; else as `InstanceNorm`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import jaxnorm.nnx
      >>> layer = jaxnorm.nnx.InstanceNorm1d(2, rngs=nnx.Rngs(0))
      >>> y = layer(jnp.ones((4, 6, 2)))
      >>> y.shape
      (4, 6, 2)

    References:
      torch.nn.InstanceNorm1d, PyTorch 2.13.
    """

    ranks = (2, 3)


class InstanceNorm2d(InstanceNorm):
    """`InstanceNorm` for (N, H, W, C), and for one sample (H, W, C), with the same arguments.

    Raises:
      ValueError: if x has another rank; else as `InstanceNorm`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import jaxnorm.nnx
      >>> layer = jaxnorm.nnx.InstanceNorm2d(2, rngs=nnx.Rngs(0))
      >>> y = layer(jnp.ones((4, 6, 6, 2)))
      >>> y.shape
      (4, 6, 6, 2)

    References:
      torch.nn.InstanceNorm2d, PyTorch 2.13.
    """

    ranks = (3, 4)


class InstanceNorm3d(InstanceNorm):
    """`InstanceNorm` for (N, D, H, W, C), and for one sample (D, H, W, C), with the same arguments.

    Raises:
      ValueError: if x has another rank; else as `InstanceNorm`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import jaxnorm.nnx
      >>> layer = jaxnorm.nnx.InstanceNorm3d(2, rngs=nnx.Rngs(0))
      >>> y = layer(jnp.ones((4, 6, 6, 6, 2)))
      >>> y.shape
      (4, 6, 6, 6, 2)

    References:
      torch.nn.InstanceNorm3d, PyTorch 2.13.
    """

    ranks = (4, 5)


def begin_accumulation(model: nnx.Module, when: ArrayLike = True) -> None:
    """Makes the batches from here on one update of each layer: `jaxnorm.begin_accumulation`.

    Args:
      model: a model with layers of this file, which are changed in place.
      when: a bool, traced or not: whether to begin anew; layers that do not accumulate yet begin
        in any case.

    Raises:
      ValueError: if no layer of the model has running statistics.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import jaxnorm.nnx
      >>> x = jnp.array([[0.0], [1.0], [5.0], [6.0]])
      >>> layer = jaxnorm.nnx.BatchNorm(1, rngs=nnx.Rngs(0))
      >>> jaxnorm.nnx.begin_accumulation(layer)
      >>> y = layer(x[:2]), layer(x[2:])
      >>> print(layer.mean[...], layer.count[...])
      [0.3] 1

    References:
      As `jaxnorm.begin_accumulation`.
    """
    layers = dict(_tracking(model))
    states = {name: _batch_stats(layer) for name, layer in layers.items()}
    for name, state in jaxnorm.begin_accumulation(states, when).items():
        layers[name].accumulation = nnx.BatchStat(state["accumulation"])


def end_accumulation(model: nnx.Module) -> None:
    """Makes each batch an update of its own again; the running statistics stay as they are.

    Args:
      model: a model with layers of this file, which are changed in place.

    Example:
      >>> from flax import nnx
      >>> import jaxnorm.nnx
      >>> layer = jaxnorm.nnx.BatchNorm(1, rngs=nnx.Rngs(0))
      >>> jaxnorm.nnx.begin_accumulation(layer)
      >>> jaxnorm.nnx.end_accumulation(layer)
      >>> layer.accumulation is None
      True

    References:
      As `jaxnorm.end_accumulation`.
    """
    for _, layer in _tracking(model):
        layer.accumulation = nnx.data(None)


def recalibrate(
    model: nnx.Module,
    batches: Iterable[Any],
    *,
    progress: Callable[[int], Any] | None = None,
    **call: Any,
) -> None:
    """Measures a model's running statistics anew over batches: `jaxnorm.recalibrate`.

    The layers of this file normalize by the batch for it, whatever the model's mode; other layers,
    such as dropout, are in the mode that they are in.

    Args:
      model: a model with layers of this file, whose running statistics are set at the end.
      batches: the data, each batch as the model's first argument: for pairs with labels, write
        `(x for x, _ in loader)`.
      progress: called after each batch with the number of batches done.
      **call: the other arguments of the model.

    Raises:
      ValueError: as `jaxnorm.recalibrate`; the model is then as it was.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import jaxnorm.nnx
      >>> x = jnp.array([[1.0], [2.0], [3.0], [6.0], [8.0]])
      >>> layer = jaxnorm.nnx.BatchNorm(1, rngs=nnx.Rngs(0))
      >>> jaxnorm.nnx.recalibrate(layer, [x[:2], x[2:]])
      >>> print(layer.mean[...], layer.var[...])
      [4.] [8.5]

    References:
      As `jaxnorm.recalibrate`.
    """
    graph, variables = nnx.split(model)

    def step(batch_stats: dict[str, Any], batch: Any, variables: Any) -> dict[str, BatchStats]:
        copy = nnx.merge(graph, variables, copy=True)
        layers = dict(_tracking(copy))
        for name, layer in layers.items():
            layer.use_running_average, layer.update_stats = False, None
            layer.accumulation = nnx.BatchStat(batch_stats[name]["accumulation"])
            _write_back(layer, batch_stats[name])
        copy(batch, **call)
        return {name: _batch_stats(layer) for name, layer in layers.items()}

    layers = dict(_tracking(model))
    states = {name: _batch_stats(layer) for name, layer in layers.items()}
    new = jaxnorm.recalibrate(step, states, batches, variables, progress=progress)
    end_accumulation(model)
    for name, layer in layers.items():
        _write_back(layer, new[name])


def _tracking(model: nnx.Module) -> list[tuple[str, _Tracked]]:
    """The layers that have running statistics, by their paths in the model."""
    return [
        (".".join(map(str, path)), module)
        for path, module in nnx.iter_modules(model)
        if isinstance(module, _Tracked) and hasattr(module, "mean")
    ]


def _declare(module: _Norm, given: dict[str, Any]) -> None:
    """Keeps the constructor's arguments as attributes, as Flax does, and makes the parameters."""
    making = ("self", "rngs", "scale_init", "bias_init", "scale_metadata", "bias_metadata")
    for name, value in given.items():
        if name not in making:
            setattr(module, name, value)
    _layers.check(module, infers_channels=False)
    arguments.channels(type(module).__name__, module.num_features)
    for name in ("scale", "bias"):
        if given.get(f"use_{name}"):
            key, init = given["rngs"].params(), given[f"{name}_init"]
            shape = _shape(module)
            value = init(key, shape, module.param_dtype)
            setattr(module, name, nnx.Param(value, **given[f"{name}_metadata"]))
        else:
            setattr(module, name, nnx.data(None))


def _declare_batch_stats(module: _Tracked) -> None:
    module.accumulation = nnx.data(None)
    if module.track_running_stats:
        first = init_batch_stats(_shape(module), dtype=module.param_dtype)
        for key, value in first.items():
            setattr(module, key, nnx.BatchStat(value))


def _batch_stats(module: _Tracked) -> BatchStats:
    batch_stats: BatchStats = {
        "mean": module.mean.get_value(),
        "var": module.var.get_value(),
        "count": module.count.get_value(),
    }
    if module.accumulation is not None:
        batch_stats["accumulation"] = module.accumulation.get_value()
    return batch_stats


def _shape(module: _Norm) -> tuple[int, ...]:
    return arguments.channels(type(module).__name__, module.num_features)


def _params(module: _Norm) -> Affine:
    params: Affine = {}
    if module.scale is not None:
        params["scale"] = module.scale[...]
    if module.bias is not None:
        params["bias"] = module.bias[...]
    return params


def _tracked_norm(
    module: _Tracked,
    norm: Norm,
    x: ArrayLike,
    use_running_average: bool | None,
    update_stats: bool | None,
    mask: ArrayLike | None,
) -> jax.Array:
    """Calls the norm on the variables, and writes the state back if it moved."""
    if use_running_average is None:
        use_running_average = module.use_running_average
    batch_stats = None
    if module.track_running_stats:
        batch_stats = _batch_stats(module)
        if use_running_average is None:
            raise ValueError(
                f"{type(module).__name__}: use_running_average should be given, to the constructor "
                f"or to the call, because it says which statistics normalize, but is None; "
                f"model.train() and model.eval() give it to all layers"
            )
    y, new_batch_stats = norm(
        module,
        x,
        _params(module),
        batch_stats,
        use_running_average=use_running_average,
        update_stats=update_stats,
        mask=mask,
    )
    if new_batch_stats is not None and new_batch_stats is not batch_stats:
        _write_back(module, new_batch_stats)
    return y


def _write_back(module: _Tracked, batch_stats: BatchStats) -> None:
    for key, value in batch_stats.items():
        getattr(module, key).set_value(value)  # not [...] =, which keeps a half's dtype
