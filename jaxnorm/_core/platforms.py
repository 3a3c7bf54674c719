"""The formulations that differ between platforms, each with the measurement that justifies it.

The numbers for TPU and GPU are estimates of XLA's compilers for one TPU v5e and one NVIDIA H100, as
printed by `make bench-accelerators`; those for CPU are times on one core. The mathematics is the
same on every platform; each function describes the difference. Other platforms use the default.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxnorm._core.collectives import number_of_shards
from jaxnorm._core.reduction import Reduction, select, widen

ShiftedMoments = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
Carry = tuple[jax.Array, ...]

_FORCED: contextvars.ContextVar[str | None] = contextvars.ContextVar("forced", default=None)


@contextlib.contextmanager
def formulated_for(platform: str | None) -> Iterator[None]:
    """Uses the formulations of a platform on any platform, in this thread.

    Tests use this to run each formulation on a CPU, and the export to ONNX uses it because a graph
    has one formulation. With None, the platform that a program is compiled for decides.
    """
    before = _FORCED.get()
    _FORCED.set(platform)
    jax.clear_caches()
    try:
        yield
    finally:
        _FORCED.set(before)
        jax.clear_caches()


def choose(default: Callable[..., Any], **platforms: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that calls the one for the platform that the program is compiled for.

    Call the result only where JAX does not linearize it: in a function with a custom derivative
    rule, or in the rule itself. Otherwise JAX would keep the residuals of every branch.

    Args:
      default: the function for all other platforms.
      **platforms: the functions for single platforms: cpu, tpu, cuda or rocm.
    """
    forced = _FORCED.get()
    if forced is not None:
        return platforms.get(forced, default)
    return functools.partial(lax.platform_dependent, default=default, **platforms)


# ---- The shift, and the moments of x - shift ----

MAX_ROUNDS = 2


def moments_formulation(
    reduction: Reduction, x: jax.Array, *, differentiated: bool
) -> Callable[[jax.Array, jax.Array | None, jax.Array | None], ShiftedMoments]:
    """Chooses how the moments are computed: a function of x, its mask and a guess of its mean.

    The function returns a shift near the mean, and the count, mean and variance of x - shift.

    On a GPU, the shift is computed from a part of x. On other platforms, the first shift does not
    depend on x, because computing it from x would need another pass over x that the compiler cannot
    fuse. If this shift is far from the mean, a loop computes the moments again. On a TPU, the
    forward pass of batch norm takes 1.00 times flax.linen's cycles this way; in bfloat16, a shift
    from a part of x took 1.9 times. This loop is not used on a GPU, because the host would have to
    check its condition in each layer. Convolutions are library calls on a GPU, so that the sums
    cannot be fused with the operation that writes x, and need a pass over x in any case.

    The guess, such as the running mean, is the first shift on TPU only: on a CPU, sums about a
    number per channel other than 0 take twice the time.

    Args:
      reduction: the entries that share one mean.
      x: the data, before the split.
      differentiated: whether the moments are computed for a derivative.
    """
    # Norms over the last axis in half precision need one number; see _with_mean_as_shift.
    rows, half = reduction.axes == (reduction.split_axis(x).ndim - 1,), x.dtype.itemsize < 4
    about_part = functools.partial(
        _moments_about_part,
        reduction,
        whole_rows=rows and not differentiated,
        mean_as_shift=rows and half and differentiated,
    )
    about_guess = functools.partial(
        _moments_about_guess,
        reduction,
        order=_order_on_tpu(reduction, x),
        mean_as_shift=rows and half,
    )
    about_zero = functools.partial(_moments_about_guess, reduction, use_guess=False)
    return choose(about_zero, tpu=about_guess, cuda=about_part, rocm=about_part)


def _order_on_tpu(reduction: Reduction, x: jax.Array) -> tuple[int, ...] | None:
    """Returns the order of axes in which a loop on a TPU reads a convolution's result uncopied.

    The operand of a loop has the default layout of a TPU for its shape. The result of a convolution
    over images has another layout, with samples and channels in the tiles of 8 by 128, and would be
    copied for the loop. With the copy, the training step of a ResNet takes 1.28 times flax.linen's
    cycles; in this order it takes 1.00. The results of matrix products, with two or three axes, are
    not copied.

    With fewer than eight images, the compiler moves a part of each image to the axis of the
    samples, and no order of the axes of x gives that layout. With the order returned here, a step
    of three convolutions takes 1.09 to 1.33 times flax.linen's cycles, and without it 1.18 to 1.64.
    """
    if x.ndim < 4 or reduction.split is not None:
        return None
    # The channels are the only axis besides axis 0 that is kept, or that is summed over.
    kept = [a for a in range(1, x.ndim) if a not in reduction.axes]
    alone = [axes[0] for axes in (kept, reduction.axes) if len(axes) == 1]
    channels = alone[0] if alone else x.ndim - 1
    space = [a for a in range(1, x.ndim) if a != channels]
    n, c = x.shape[0], x.shape[channels]
    if channels == 0 or not (isinstance(n, int) and isinstance(c, int)):
        return None
    n //= number_of_shards(x, 0)
    if n < 8:
        return (0, *reversed(space), channels) if len(space) == 2 else None
    # The axis that needs less padding comes last, where a tile has 128 entries.
    by_channels, by_samples = (-(-c // 128) * -(-n // 8), -(-n // 128) * -(-c // 8))
    return (*space, 0, channels) if by_channels <= by_samples else (*space, channels, 0)


def _moments_about_guess(
    reduction: Reduction,
    x: jax.Array,
    mask: jax.Array | None,
    guess: jax.Array | None,
    *,
    use_guess: bool = True,
    order: tuple[int, ...] | None = None,
    mean_as_shift: bool = False,
) -> ShiftedMoments:
    """Computes the moments about the guess or 0.

    While the mean is far from the shift, at most twice, the moments are computed again about the
    mean, with the axes of x in the given order.
    """
    wide, wide_mask = widen(reduction.split_axis(x)), reduction.split_axis(mask)
    first: jax.Array | None = None
    if guess is not None and use_guess:
        first = guess.astype(wide.dtype)
        first = jnp.where(jnp.isfinite(first), first, 0)
    count, mean, var = reduction.moments_about(
        first, wide, wide_mask, reduction.count(wide, wide_mask)
    )
    shift = jnp.zeros_like(mean) if first is None else first + jnp.zeros_like(mean)
    if order is not None:
        reduction = reduction.transposed(order)
        mask = None if mask is None else jnp.transpose(mask, order)
        x, shift, count, mean, var = (jnp.transpose(a, order) for a in (x, shift, count, mean, var))
    body, initial = _recomputation(reduction, x, mask, (shift, count, mean, var))
    _, *found = lax.while_loop(lambda carry: jnp.any(carry[0] > 0), body, initial)
    shift, mean, var = (lax.expand_dims(a, reduction.axes) for a in found)
    if order is not None:
        back = [order.index(i) for i in range(len(order))]
        shift, count, mean, var = (jnp.transpose(a, back) for a in (shift, count, mean, var))
    return (
        _with_mean_as_shift(shift, count, mean, var) if mean_as_shift else (shift, count, mean, var)
    )


def _with_mean_as_shift(
    shift: jax.Array, count: jax.Array, mean: jax.Array, var: jax.Array
) -> ShiftedMoments:
    """Replaces the shift by the mean of x as one float32 number.

    This is for norms over the last axis in half precision, where y has few digits. These norms have
    a mean for every pixel or token, which is read and broadcast over the channels wherever it is
    used. With one number instead of two, layer norm's step of three convolutions takes 1.03 times
    flax.linen's cycles on a TPU instead of 1.22 times, and 1.00 times its bytes on an H100 instead
    of 1.12 times.
    """
    return shift + mean, count, jnp.zeros_like(mean), var


def _recomputation(
    reduction: Reduction, x: jax.Array, mask: jax.Array | None, measured: ShiftedMoments
) -> tuple[Callable[[Carry], Carry], Carry]:
    """Returns the body and the initial carry of the loop that computes the moments again.

    The carry is the number of rounds that are left, the shift, the mean and the variance.

    If mean^2 is large compared to the variance, the variance is a small difference of large
    numbers. In half precision, mean^2 <= 15 var loses up to four bits, which does not affect y. In
    float32, the error of y should be at most 2e-6 at every offset: it is 1.4e-6 with mean^2 <= var,
    3.8e-6 with 3 var and 1e-5 with 15 var. `is_far` is True for NaN.

    The loop closes over x in its own dtype and layout, and widens it inside; otherwise a TPU would
    write out the widened x before the loop. The number of rounds has the rank of x, because JAX
    0.10.2 cannot vmap, over an explicitly sharded axis, a loop that carries a scalar.
    """
    shift, count, mean, var = measured
    limit = 15.0 if x.dtype.itemsize < 4 else 1.0

    def is_far(mean: jax.Array, var: jax.Array) -> jax.Array:
        """Returns whether the mean of x - shift is too large for an accurate variance."""
        return ~((jnp.abs(mean) <= jnp.sqrt(limit * var)) & (var < jnp.inf))

    def rounds_left(rounds: jax.Array | int, mean: jax.Array, var: jax.Array) -> jax.Array:
        """Returns the number of remaining rounds: 0 if no moments have to be computed again."""
        most = jnp.max(jnp.where(is_far(mean, var), rounds, 0), keepdims=True, initial=0)
        return reduction.mapped_axes.max(most)

    def body(carry: Carry) -> Carry:
        rounds, (shift, mean, var) = carry[0], map(expand, carry[1:])
        far = is_far(mean, var)
        # If the sum of finite entries overflowed, the first round sums them divided by the count.
        near = shift + mean
        finite = jnp.isfinite(near)
        shift = jnp.where(far & finite, near, shift)
        factor = jnp.where(finite, 1, 1 / jnp.maximum(count, 1))
        wide, wide_mask = widen(reduction.split_axis(x)), reduction.split_axis(mask)
        _, new_mean, new_var = reduction.moments_about(
            shift, wide, wide_mask, reduction.count(wide, wide_mask), factor
        )
        mean, var = jnp.where(far, new_mean, mean), jnp.where(far, new_var, var)
        return rounds_left(rounds - 1, mean, var), *map(squeeze, (shift, mean, var))

    # The loop carries statistics without the reduced axes: a TPU pads a last axis of size 1.
    squeeze = functools.partial(lax.squeeze, dimensions=reduction.axes)
    expand = functools.partial(lax.expand_dims, dimensions=reduction.axes)
    return body, (rounds_left(MAX_ROUNDS, mean, var), *map(squeeze, (shift, mean, var)))


def _moments_about_part(
    reduction: Reduction,
    x: jax.Array,
    mask: jax.Array | None,
    guess: jax.Array | None,
    *,
    whole_rows: bool,
    mean_as_shift: bool,
) -> ShiftedMoments:
    """Computes moments about the mean of a part of x.

    The part is one entry in 16, or one in 4096 in half precision.

    For a share p of the entries, (mean - shift)^2 <= var (1 - p) / p for any x, as the variance
    between the part and the rest is (mean - shift)^2 p / (1 - p). In float32, the variance
    therefore loses at most four bits. In half precision, it loses at most twelve of its 24 bits,
    and y has only eleven (float16) or eight (bfloat16). In half precision, one entry in 16 would
    need 1 % more bytes for a ResNet's step on an H100, and one more kernel for each norm. In
    float32, the part has at least 16 entries, if there are as many: with one entry of 15, the error
    of y was 2.05e-6.

    With `whole_rows`, norms over the last axis use the mean of all entries. XLA for GPU then
    compiles the forward pass to one kernel that reads x once (2.0 times the bytes of x; flax.linen:
    3.0). With the backward pass, this needs 11 to 14 times the bytes of x, and a part needs 8.1
    times (flax.linen: 8.0).
    """
    x, mask = reduction.split_axis(x), reduction.split_axis(mask)
    part = x  # with a mask, all entries of a part may be masked
    if mask is None and not whole_rows:
        half = x.dtype.itemsize < 4
        part = reduction.part(x, one_in=4096 if half else 16, at_least=1 if half else 16)
    part, wide = widen(part), widen(x)
    n, count = reduction.count(part, mask), reduction.count(wide, mask)
    if mask is None:
        n = n * reduction.mapped_axes.size()
        # Divided before the sum, so that the sum itself is the shift. This saves a kernel, and all
        # uses see the same number; x - total / n may be contracted to a fused multiply-add.
        (shift,) = reduction.mapped_axes.sum(*reduction.sum(part * (1 / jnp.maximum(n, 1))))
    else:
        total, n = reduction.mapped_axes.sum(*reduction.sum(select(mask, part)), n)
        shift = jnp.maximum(total / jnp.maximum(n, 1), jnp.finfo(n.dtype).min)
    first = _summed_first_on_gpu(reduction, x)
    moments = reduction.moments_about(shift, wide, mask, count, first=first)
    if mean_as_shift:
        return _with_mean_as_shift(shift, *moments)
    if not whole_rows:
        # A barrier, or XLA would share x - shift between the sums and y, and write it in float32.
        shift = lax.optimization_barrier(shift)
    return shift, *moments


def _summed_first_on_gpu(reduction: Reduction, x: jax.Array) -> tuple[int, ...]:
    """Returns the axes to sum over first, so that XLA does not write out x - shift in float32.

    In batch norm with at least 64 images, these are the spatial axes: a ResNet-50's step moves
    1.010 times flax.linen's bytes this way, and 1.020 times with one sum. With 32 images, it moves
    1.047 times this way, and 1.019 times with one sum.

    In instance and group norm with fewer than 64 images, it is the last spatial axis: StarGAN's
    step with 16 images moves 0.95 times flax.linen's bytes this way, and 1.04 times with one sum; a
    ResNet-50's step moves 0.98 and 1.07 times. They need seven and two more kernels.
    """
    batch_size = x.shape[0]
    if len(reduction.axes) < 2 or not isinstance(batch_size, int):
        return ()
    many = batch_size // number_of_shards(x, 0) >= 64
    if reduction.axes[0] == 0:
        return reduction.axes[1:] if many else ()
    return () if many or reduction.axes[-1] == x.ndim - 1 else reduction.axes[-1:]


# ---- The forward pass and the backward pass ----


@jax.custom_jvp
def barrier_on_cpu(arrays: Any) -> Any:
    """Puts arrays behind a barrier on CPU, so that the two passes do not share x - mean.

    Without it, XLA for CPU shares x - mean between both passes and writes it out in float32: batch
    norm takes 1.2 times and layer norm twice as long. On TPU and GPU, a barrier only hides from the
    compiler that x is the same operand: RMS norm on H100 moves 9 times the bytes of x with it, and
    8 times without.
    """
    # One barrier per array, because a common one would make all vary over the same mapped axes.
    barriers = functools.partial(jax.tree.map, lax.optimization_barrier)
    return choose(lambda arrays: arrays, cpu=barriers)(arrays)


@barrier_on_cpu.defjvp
def _barrier_on_cpu_jvp(primals: Any, tangents: Any) -> Any:
    return barrier_on_cpu(*primals), tangents[0]


# ---- Sums along the features ----


def multiply_along(w: jax.Array, t: jax.Array, x: jax.Array) -> jax.Array:
    """Computes w * t. Its gradient for t is a sum along the axis where t has size 1, and w has not.

    On CPU, w * t is then computed as a matrix product. Otherwise XLA for CPU would fuse the sum
    with the arithmetic around it and not vectorize the result: a layer norm's backward pass takes
    two to thirty times as long.

    Args:
      w: the scale, with the rank of x, or a scalar.
      t: an array with the rank of x.
      x: the array whose shape the product broadcasts to.
    """
    summed = [a for a in range(t.ndim) if t.shape[a] != x.shape[a]]
    if len(summed) != 1 or (w.ndim and w.shape[summed[0]] != w.size):
        return w * t
    (axis,) = summed
    behind = range(axis + 1, x.ndim)
    if (axis == 0 and behind) or any(number_of_shards(t, a) > 1 for a in behind):
        return w * t
    along = jnp.broadcast_to(w.reshape(-1, 1), (x.shape[axis], 1))

    def product(t: jax.Array, along: jax.Array) -> jax.Array:
        if not behind:
            return jnp.matmul(t, along.T, precision=lax.Precision.HIGHEST)
        rows = t.reshape(*t.shape[: axis + 1], math.prod(t.shape[a] for a in behind))
        along = along * jnp.ones_like(rows[..., :1])
        return jnp.matmul(along, rows, precision=lax.Precision.HIGHEST).reshape(x.shape)

    def plain(t: jax.Array, along: jax.Array) -> jax.Array:
        return along.reshape(*(1 for _ in range(axis)), -1, *(1 for _ in behind)) * t

    y: jax.Array = choose(plain, cpu=product)(t, along)
    return y
