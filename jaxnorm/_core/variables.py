"""The types of parameters and running statistics, and their initial values."""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxnorm._core import arguments


class Affine(TypedDict, total=False):
    """The parameters of a norm. A missing key leaves out the multiplication or the addition.

    Attributes:
      scale: the factor of x_hat, of shape (C,), or with the rank of x and broadcasting against x.
      bias: the number that is added, with the same shapes as scale.

    Example:
      >>> import jaxnorm
      >>> params: jaxnorm.Affine = jaxnorm.init_params(3)
      >>> sorted(params)
      ['bias', 'scale']

    References:
      The names of flax.linen.BatchNorm, flax 0.12; PyTorch's weight and bias.
    """

    scale: jax.Array
    bias: jax.Array


class BatchStats(TypedDict):
    """The running statistics of a norm.

    Attributes:
      mean: the running mean, of shape (C,), float32 or wider, in units of x.
      var: the running unbiased variance, of shape (C,), float32 or wider, in units of x squared.
      count: the number of updates, of shape (), int32. It saturates at the largest int32.
      accumulation: the accumulated moments of several batches; only present between
        `begin_accumulation` and `end_accumulation`.

    Example:
      >>> import jaxnorm
      >>> batch_stats: jaxnorm.BatchStats = jaxnorm.init_batch_stats(3)
      >>> sorted(batch_stats)
      ['count', 'mean', 'var']

    References:
      The names of flax.linen.BatchNorm, flax 0.12; PyTorch's running_mean, running_var and
      num_batches_tracked.
    """

    mean: jax.Array
    var: jax.Array
    count: jax.Array
    accumulation: NotRequired[Any]


if TYPE_CHECKING:
    from typing_extensions import TypeVar  # which every type checker has; at run time 3.13 has it

    State = TypeVar("State", bound=BatchStats | None, default=None)
else:
    from typing import TypeVar

    State = TypeVar("State", bound=BatchStats | None)


def init_params(
    num_features: int | Sequence[int],
    *,
    use_scale: bool = True,
    use_bias: bool = True,
    dtype: DTypeLike = jnp.float32,
) -> Affine:
    """Creates the initial parameters of a norm: scale 1 and bias 0.

    Args:
      num_features: the number of channels C, or the shape of x over the channel axes.
      use_scale: whether to create a scale. Defaults to True.
      use_bias: whether to create a bias. Defaults to True.
      dtype: the dtype of the parameters. Defaults to float32.

    Returns:
      A dict with the keys "scale" and "bias", or those that are used.

    Raises:
      ValueError: if num_features is not a number of channels or a shape, or if dtype is not a float
        dtype.

    Example:
      >>> import jaxnorm
      >>> print(jaxnorm.init_params(3, use_bias=False)["scale"])
      [1. 1. 1.]

    References:
      torch.nn.BatchNorm2d and flax.linen.BatchNorm, which have the same initial values.
    """
    shape = arguments.channels("init_params", num_features)
    dtype = arguments.float_dtype("init_params", "dtype", dtype)
    params: Affine = {}
    if arguments.boolean("init_params", "use_scale", use_scale):
        params["scale"] = jnp.ones(shape, dtype)
    if arguments.boolean("init_params", "use_bias", use_bias):
        params["bias"] = jnp.zeros(shape, dtype)
    return params


def init_batch_stats(
    num_features: int | Sequence[int], *, dtype: DTypeLike = jnp.float32
) -> BatchStats:
    """Creates the initial running statistics of a norm: mean 0, variance 1, count 0.

    Args:
      num_features: the number of channels C, or the shape of x over the channel axes.
      dtype: the dtype of mean and var. Defaults to float32. Half precision is widened to float32,
        because a running average in bfloat16 stalls.

    Returns:
      A dict with the keys "mean", "var" and "count".

    Raises:
      ValueError: if num_features is not a number of channels or a shape, or if dtype is not a float
        dtype.

    Example:
      >>> import jaxnorm
      >>> stats = jaxnorm.init_batch_stats(2)
      >>> print(stats["mean"], stats["var"], stats["count"])
      [0. 0.] [1. 1.] 0

    References:
      torch.nn.BatchNorm2d, which has the same initial values.
    """
    shape = arguments.channels("init_batch_stats", num_features)
    given = arguments.float_dtype("init_batch_stats", "dtype", dtype)
    dtype = statistics_dtype(jnp.result_type(float) if given is None else given)
    return {
        "mean": jnp.zeros(shape, dtype),
        "var": jnp.ones(shape, dtype),
        "count": jnp.zeros((), jnp.int32),
    }


def statistics_dtype(*dtypes: np.dtype) -> np.dtype:
    """Returns the dtype of statistics: the widest of the given dtypes and float32."""
    return functools.reduce(np.promote_types, dtypes, np.dtype(np.float32))
