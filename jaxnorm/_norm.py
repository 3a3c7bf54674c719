"""The steps of every norm: check the arguments, normalize, update the running statistics.

`tracked_norm` calls three functions, and `untracked_norm` the first two of them:
`shifted_moments` in `_core/moments.py` computes the moments of x, `normalize` in
`_core/normalize.py` computes y, and `update_running_stats` in `_stats/update.py` updates the state.
The first two are jitted here. The sums over x are in `_core/reduction.py`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxnorm._core import arguments, checks
from jaxnorm._core.collectives import LOCAL, MappedAxes, number_of_shards
from jaxnorm._core.layout import Layout
from jaxnorm._core.moments import Moments, shifted_moments, unshift
from jaxnorm._core.normalize import infinite_for_zero, normalize, renormalize
from jaxnorm._core.reduction import Reduction, widen
from jaxnorm._core.variables import Affine
from jaxnorm._stats import state_checks
from jaxnorm._stats.update import Update, update_running_stats

# These are traced and differentiated once for all layers of one shape. They are inlined, because
# the compiler for TPU does not propagate a layout through a function that is called more than once:
# a step of three convolutions with four images takes 1.24 times flax.linen's cycles if they are
# inlined, and 1.98 times otherwise.
_shifted_moments_jit = jax.jit(shifted_moments, static_argnums=0, inline=True)
_normalize_jit = jax.jit(normalize, static_argnums=(0, 1), inline=True)


class _Operands(NamedTuple):
    """The arrays that broadcast against x, in the rank of x; None if there is no such array."""

    x: jax.Array
    mask: jax.Array | None
    scale: jax.Array | None
    bias: jax.Array | None
    mean: Any = None
    var: Any = None

    def map(self, change: Callable[[Any], Any]) -> "_Operands":
        """Applies a function to each array."""
        x, *others = self
        return _Operands(change(x), *(None if a is None else change(a) for a in others))


@dataclasses.dataclass(frozen=True)
class Options:
    """The arguments that every norm has.

    Attributes:
      function: the name of the public function, which errors begin with.
      epsilon: the number that is added to the variance.
      mask: a bool array that marks the entries to include, or None.
      dtype: the dtype of y, or None for that of x.
    """

    function: str
    epsilon: ArrayLike
    mask: ArrayLike | None
    dtype: DTypeLike | None

    def checked(self, x: jax.Array) -> "Options":
        """Returns the checked options, with the dtype of y."""
        epsilon = arguments.number(self.function, "epsilon", self.epsilon, least=0)
        dtype = x.dtype
        if self.dtype is not None:
            dtype = arguments.float_dtype(self.function, "dtype", self.dtype)
        return dataclasses.replace(self, epsilon=epsilon, dtype=dtype)


@dataclasses.dataclass(frozen=True)
class Tracking:
    """The arguments of the norms that have running statistics.

    Attributes:
      use_running_average: whether to normalize by the running statistics.
      update_stats: whether to update them; None updates them if x is normalized by the batch.
      momentum: the weight of the new batch; None is the cumulative average.
      skip_nonfinite: whether channels with NaN or Inf keep their running statistics.
      stats_axes: mapped axes over which the entries that share a mean are distributed.
      update_axes: other mapped axes, over which only the update of the running statistics sums.
      virtual_batch_size: the number of samples that are normalized together; None means all.
      limits: r_max and d_max of batch renorm; None for other norms.
    """

    use_running_average: bool | None
    update_stats: bool | None
    momentum: ArrayLike | None
    skip_nonfinite: bool
    stats_axes: MappedAxes = LOCAL
    update_axes: MappedAxes = LOCAL
    virtual_batch_size: int | None = None
    limits: tuple[Any, Any] | None = None

    def checked(self, function: str, tracked: bool) -> "Tracking":
        """Returns the checked options; the first two become bools. `tracked`: there is a state."""
        use_running_average, update_stats = (
            None if value is None else arguments.boolean(function, name, value)
            for name, value in (
                ("use_running_average", self.use_running_average),
                ("update_stats", self.update_stats),
            )
        )
        momentum, use_running_average = self.momentum, bool(use_running_average)
        if momentum is not None:
            momentum = arguments.number(function, "momentum", momentum)
        if update_stats is None:
            update_stats = tracked and not use_running_average
        if not tracked and (use_running_average or update_stats):
            name = "use_running_average" if use_running_average else "update_stats"
            raise ValueError(
                f"{function}: {name}=True should come with batch_stats, but batch_stats is None; "
                f"pass the trained state, or init_batch_stats(num_features) to begin with "
                f"[no-batch-stats]"
            )
        return dataclasses.replace(
            self,
            use_running_average=use_running_average,
            update_stats=update_stats,
            momentum=momentum,
            skip_nonfinite=arguments.boolean(function, "skip_nonfinite", self.skip_nonfinite),
        )


def untracked_norm(
    x: jax.Array, params: Affine | None, layout: Layout, reduction: Reduction, options: Options
) -> jax.Array:
    """Normalizes without running statistics; the parameters have the axes `layout.channels`.

    Args:
      x: the input, of a float dtype.
      params: {"scale", "bias"}, either or both of which may be missing, or None.
      layout: the axes of x that the parameters have.
      reduction: the entries that share one mean.
      options: the options of every norm, which are not checked yet.
    """
    operands, options = _operands(x, params, layout, options), options.checked(x)
    shifted = _shifted_moments_jit(reduction, x, operands.mask)
    operands, reduction = operands.map(reduction.split_axis), reduction.after_split
    return _compute_y(reduction, operands, options, shifted).reshape(x.shape)


def tracked_norm(
    x: jax.Array,
    params: Affine | None,
    batch_stats: Any,
    layout: Layout,
    options: Options,
    tracking: Tracking,
) -> tuple[jax.Array, Any]:
    """Normalizes over the reduced axes of the layout, and updates the running statistics once.

    The layout of batch norm has no batch axis, so that all samples are normalized together. With
    virtual batches, a new first axis, with one entry for each virtual batch, is the batch axis, and
    the update pools their moments.

    Args:
      x: the input, of a float dtype.
      params: {"scale", "bias"}, either or both of which may be missing, or None.
      batch_stats: the state, or None.
      layout: the channel axes and the batch axis of x.
      options: the options of every norm, which are not checked yet.
      tracking: the options of the norms with running statistics, which are not checked yet.
    """
    function, options = options.function, options.checked(x)
    tracking = tracking.checked(function, batch_stats is not None)
    use_running_average = tracking.use_running_average
    state: Any = None
    if batch_stats is not None:
        state = state_checks.batch_stats(function, batch_stats, layout.shape(x), x_shape=x.shape)
    operands = _operands(x, params, layout, options, state)
    split_layout, shape = layout, x.shape
    if tracking.virtual_batch_size is not None and not use_running_average:
        operands, tracking = _in_virtual_batches(function, operands, layout, tracking)
        split_layout, shape = layout.with_batch_axis, operands.x.shape[1:]
    if not use_running_average and options.mask is None:
        checks.more_than_one_value(function, shape, layout, tracking.stats_axes.size())
    reduction = Reduction(split_layout.reduced, mapped_axes=tracking.stats_axes)
    shifted: Any = None
    if tracking.update_stats or not use_running_average:
        shifted = _shifted_moments_jit(reduction, operands.x, operands.mask, operands.mean)
    if use_running_average:
        zero = jnp.zeros_like(operands.mean)  # of x - shift, as the running mean is the shift
        constants = operands.mean, Moments(zero, zero, operands.var)
        y = _compute_y(None, operands, options, constants)
    else:
        if tracking.limits is not None:
            operands = _corrected(operands, shifted, options, tracking.limits, state)
        y = _compute_y(reduction, operands, options, shifted)
    if tracking.update_stats:
        rows = jax.tree.map(split_layout.squeeze_to_channels, unshift(*shifted))
        update = Update(tracking.momentum, tracking.skip_nonfinite)
        batch_stats = update_running_stats(  # between: the rows are parts of one batch
            state, rows, update, between=layout.batch is None, mapped_axes=tracking.update_axes
        )
    return y.reshape(x.shape), batch_stats


# ---- The steps ----


def _operands(
    x: jax.Array, params: Affine | None, layout: Layout, options: Options, state: Any = None
) -> _Operands:
    """Checks and expands the arrays. The state is a constant under differentiation."""
    mask: jax.Array | None = None
    if options.mask is not None:
        mask = checks.mask(options.function, options.mask, x.shape, layout.channels)
    affine: list[jax.Array | None] = [None, None]
    for i, a in enumerate(checks.params(options.function, params, x.shape, layout.shape(x))):
        if a is not None:
            of_x_rank, a = a.ndim == x.ndim, layout.expand(a)
            affine[i] = _zero_where_masked(mask, a) if of_x_rank and mask is not None else a
    scale, bias = affine
    if state is None:
        return _Operands(x, mask, scale, bias)
    mean, var = (widen(layout.expand(state[key]), x) for key in ("mean", "var"))
    return _Operands(x, mask, scale, bias, *lax.stop_gradient((mean, var)))


def _compute_y(
    reduction: Reduction | None,
    operands: _Operands,
    options: Options,
    shifted: tuple[jax.Array, Moments],
) -> jax.Array:
    """Computes y from the moments of x, or from constant moments if the reduction is None."""
    (shift, moments), epsilon = shifted, jnp.asarray(options.epsilon, float)
    # A traced epsilon may be 0.
    if not isinstance(options.epsilon, float) or options.epsilon == 0:
        moments = dataclasses.replace(moments, var=infinite_for_zero(moments.var, epsilon))
    x, mask, scale, bias, *_ = operands
    y: jax.Array = _normalize_jit(
        options.dtype, reduction, x, scale, bias, epsilon, mask, shift, moments
    )
    return y


def _corrected(
    operands: _Operands,
    shifted: tuple[jax.Array, Moments],
    options: Options,
    limits: tuple[Any, Any],
    state: Any,
) -> _Operands:
    """Returns the operands with the scale and the bias of batch renorm."""
    r_max, d_max = (
        arguments.number(
            options.function, name, limit(state["count"]) if callable(limit) else limit
        )
        for name, limit in zip(("r_max", "d_max"), limits, strict=True)
    )
    _, _, scale, bias, mean, var = operands
    epsilon = jnp.asarray(options.epsilon, float)
    scale, bias = renormalize(scale, bias, shifted, mean, var, epsilon, (r_max, d_max))
    return operands._replace(scale=scale, bias=bias)


def _zero_where_masked(mask: jax.Array, a: jax.Array) -> jax.Array:
    """Sets parameters to 0 where they only apply to masked entries, because 0 * NaN is NaN."""
    broadcast_axes = tuple(i for i in range(a.ndim) if a.shape[i] == 1)
    return jnp.where(jnp.any(mask, broadcast_axes, keepdims=True), a, jnp.zeros((), a.dtype))


# ---- Virtual batches: (N, ...) as (N / size, size, ...) ----


def _in_virtual_batches(
    function: str, operands: _Operands, layout: Layout, tracking: Tracking
) -> tuple[_Operands, Tracking]:
    """Splits the samples into virtual batches; only the update sums over devices then."""
    x, size = operands.x, cast(int, tracking.virtual_batch_size)
    size = checks.virtual_batches(function, size, x.shape, layout, number_of_shards(x, 0))
    operands = operands.map(functools.partial(_split_virtual_batches, size=size))
    update_axes = tracking.stats_axes
    return operands, dataclasses.replace(tracking, stats_axes=LOCAL, update_axes=update_axes)


def _split_virtual_batches(a: jax.Array, *, size: int) -> jax.Array:
    """Splits the first axis into virtual batches; an axis of size 1 broadcasts against all."""
    if a.shape[0] == 1 and size != 1:
        return a[None]
    return a.reshape(a.shape[0] // size, size, *a.shape[1:])
