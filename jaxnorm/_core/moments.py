"""The moments of x: count, mean and biased variance of the entries that share one mean."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxnorm._core import arguments, checks, platforms
from jaxnorm._core.collectives import AxisName, MappedAxes, mapped_axes, sharded_like
from jaxnorm._core.sample import Sample, select, widen


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
    """How many entries a sample has, their mean, and their biased variance.

    The three fields have one shape, such as (C,), and one float dtype, float32 or wider: a count
    in int32 would overflow. An empty sample has count 0, mean 0 and variance 0.

    Attributes:
      count: how many entries count: all of them, or those where the mask is True.
      mean: their mean, in units of x.
      var: their biased variance (divided by count, not count - 1), in units of x squared.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxnorm
      >>> m = jaxnorm.moments(jnp.array([[1.0, 5.0], [3.0, 5.0]]), axis=0)
      >>> print(m.count, m.mean, m.var)
      [2. 2.] [2. 5.] [1. 0.]

    References:
      Chan, Golub & LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample
      Variances, 1979, which merges such triples.
    """

    # Annotated loosely: JAX rebuilds the class with tracers, None and other things in its fields.
    count: Any
    mean: Any
    var: Any


# ---- x -> moments ----


def moments(
    x: ArrayLike,
    axis: int | Sequence[int],
    *,
    mask: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> Moments:
    r"""Measures the count, the mean and the biased variance of x over the given axes.

    .. math::
        d = x - s, \quad e = E[d], \quad mean = s + e, \quad var = E[d^2] - e^2

    The shift s is near the mean: on GPU it is the mean of a part of x, and elsewhere x is measured
    about 0 and again about its mean where that was large beside the standard deviation. So the
    difference loses few bits: as accurate for temperatures in kelvin, or at an offset of 1e6, as
    for data around zero, and exactly 0 for constants. Differentiable to any order.

    Args:
      x: the data, of any shape and any float dtype.
      axis: the axes to reduce.
      mask: bool, of x's rank, broadcasting against x; True counts. What is masked out never
        reaches the moments nor their gradients, be it NaN or Inf.
      axis_name: mapped axes (of shard_map, pmap or vmap) over which the sample is spread; the
        devices' sums are added, in one collective (on GPU two) of the size of the moments.
      axis_index_groups: lists of indices along axis_name that are pooled together.

    Returns:
      Moments whose fields have x's shape without the reduced axes, in float32 or wider.

    Raises:
      ValueError: if x is not of a float dtype, an axis does not exist or repeats, or the mask is
        not bool, of x's rank, and broadcasting.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxnorm
      >>> x = jnp.array([[1.0, 3.0, jnp.nan], [4.0, 4.0, 4.0]])
      >>> m = jaxnorm.moments(x, axis=1, mask=jnp.isfinite(x))
      >>> print(m.count, m.mean, m.var)
      [2. 3.] [2. 4.] [1. 0.]

    References:
      Chan, Golub & LeVeque, Algorithms for Computing the Sample Variance, 1983: section 3.
    """
    x = checks.float_array("moments", x)
    axes = arguments.axes("moments", "axis", axis, x.ndim)
    mask = checks.mask("moments", mask, x.shape)
    sample = Sample(axes, mapped_axes=mapped_axes("moments", axis_name, axis_index_groups))
    shift, about_shift = shifted_moments(sample, x, mask)
    found: Moments = jax.tree.map(lambda a: jnp.squeeze(a, axes), unshift(shift, about_shift))
    return found


def unshift(shift: jax.Array, about_shift: Moments) -> Moments:
    """The moments of x, from those of x - shift."""
    return dataclasses.replace(about_shift, mean=shift + about_shift.mean)


def shifted_moments(
    sample: Sample,
    x: jax.Array,
    mask: jax.Array | None = None,
    guess: jax.Array | None = None,
) -> tuple[jax.Array, Moments]:
    """Measures a sample: a shift near its mean, and the moments of x - shift.

    A guess of the mean, such as the running mean, can save a second pass; the result depends on it
    by rounding alone. The mean is shift + moments.mean, kept as a pair: rounded to one number it
    would lose the digits of y wherever the mean is large beside the standard deviation.
    """
    return _measure(sample, False, x, mask, guess)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _measure(
    sample: Sample,
    differentiated: bool,
    x: jax.Array,
    mask: jax.Array | None,
    guess: jax.Array | None,
) -> tuple[jax.Array, Moments]:
    shift, *moments = platforms.shifted_moments(
        sample, x, mask, guess, differentiated=differentiated
    )
    return shift, Moments(*moments)


@_measure.defjvp
def _measure_jvp(
    sample: Sample, differentiated: bool, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[tuple[jax.Array, Moments], tuple[jax.Array, Moments]]:
    x, mask, guess = primals
    x_dot = tangents[0]
    shift, moments = _measure(sample, True, x, mask, guess)

    # Checkpointed: what is kept for the backward pass is x as it came, not x - mean in float32.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def linear(x: jax.Array, shift: jax.Array, moments: Moments, x_dot: jax.Array) -> Moments:
        x, shift, moments = platforms.apart_on_cpu((x, shift, moments))
        x, x_dot, laid_out = map(sample.laid_out, (x, x_dot, mask))
        return moments_dot(sample, x, laid_out, shift, moments, x_dot)

    return (shift, moments), (jnp.zeros_like(shift), linear(x, shift, moments, x_dot))


def moments_dot(
    sample: Sample,
    x: jax.Array,
    mask: jax.Array | None,
    shift: jax.Array,
    moments: Moments,
    x_dot: jax.Array,
) -> Moments:
    """The tangent of the moments: mean_dot = E[x_dot] and var_dot = 2 E[(x - mean) x_dot].

    The shift is a constant: moving it moves neither the mean nor the variance. The arrays of x's
    size are laid out.
    """
    x_dot = select(mask, widen(x_dot))
    n = jnp.maximum(moments.count, 1)
    total_dot = sample.sum(x_dot) if sample.centered else jnp.zeros_like(n)
    mean_dot, half_var_dot = sample.mapped_axes.sum(
        total_dot / n, sample.sum(center(x, mask, shift, moments) * x_dot) / n
    )
    return Moments(jnp.zeros_like(n), mean_dot, 2 * half_var_dot)


def center(x: jax.Array, mask: jax.Array | None, shift: jax.Array, moments: Moments) -> jax.Array:
    """x - mean, by way of the shift: the first difference is exact, the second is small."""
    difference: jax.Array = (select(mask, widen(x, shift)) - shift) - moments.mean
    return difference


# ---- moments -> moments of the whole ----


def merge_moments(a: Moments, b: Moments) -> Moments:
    r"""Merges the moments of two disjoint samples into those of their union.

    .. math::
        mean = \frac{n_a mean_a + n_b mean_b}{n_a + n_b}, \quad
        var = \frac{n_a (var_a + (mean_a - mean)^2) + n_b (var_b + (mean_b - mean)^2)}{n_a + n_b}

    Exact, in any order and for any sizes. For the micro-batches of one step of batch norm: merge
    their moments, then call `update_batch_stats` once. (Instance norm's are rows, one a sample:
    concatenate them instead.)

    Args:
      a: moments with fields of any one shape.
      b: moments of the same shape; either side may be empty, with count 0.

    Returns:
      The moments of all entries together, of the same shape.

    Raises:
      ValueError: if the shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxnorm
      >>> x = jnp.array([1.0, 3.0, 2.0, 2.0])
      >>> m = jaxnorm.merge_moments(jaxnorm.moments(x[:2], 0), jaxnorm.moments(x[2:], 0))
      >>> print(m.count, m.mean, m.var)
      4.0 2.0 0.5

    References:
      Chan, Golub & LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample
      Variances, 1979.
    """
    for name, given in (("a", a), ("b", b)):
        if not isinstance(given, Moments):
            raise ValueError(
                f"merge_moments: {name} should be Moments, as `moments` returns them, but is "
                f"{type(given).__name__}"
            )
    checks.same_moments("merge_moments", jnp.shape(a.mean), jnp.shape(b.mean))
    return merge(a, b)


def merge(a: Moments, b: Moments, *, between: bool = True) -> Moments:
    """The moments of two disjoint samples together; `between` is explained at `pool`."""
    (a, b) = (jax.tree.map(widen, one, other) for one, other in ((a, b), (b, a)))
    count = a.count + b.count
    n = jnp.maximum(count, 1)
    weight, d = b.count / n, b.mean - a.mean
    spread = b.var + (a.count / n) * d * d if between else b.var
    return Moments(count, interpolate(a.mean, b.mean, weight), interpolate(a.var, spread, weight))


def interpolate(a: jax.Array, b: jax.Array, weight: jax.Array) -> jax.Array:
    """(1 - weight) * a + weight * b, as a step from the nearer of the two.

    In float32 the two weights mostly do not add up to 1. An average that is multiplied by their sum
    at every step moves away from the truth, the further the more steps there are. A step from a
    towards b is a itself where both are equal, and b where the weight is 1.
    """
    return jnp.where(weight < 0.5, a + weight * (b - a), b - (1 - weight) * (b - a))


def about_mean(moments: Moments) -> Moments:
    """The moments of x - mean, from those of x."""
    return dataclasses.replace(moments, mean=jnp.zeros_like(moments.mean))


def pool(shifts: jax.Array, rows: Moments, *, between: bool = True) -> tuple[jax.Array, Moments]:
    """Pools disjoint samples, a row each on the leading axis, into the moments of their union.

    Exact (Chan, Golub & LeVeque, 1979): within the samples plus between them. Without `between`
    the variance is the mean of the rows' own. A row of count 0 weighs nothing.
    """
    rows = dataclasses.replace(rows, count=sharded_like(rows.count, shifts))
    count = jnp.sum(rows.count, axis=0, keepdims=True)
    # One of the shifts, so that those of equal ones differ by 0 exactly; which one does not matter.
    shift = jnp.max(shifts, axis=0, keepdims=True, where=rows.count > 0, initial=-jnp.inf)
    shift = jnp.where(count > 0, shift, jnp.zeros_like(shift))
    means = (shifts - shift) + rows.mean
    weights = rows.count / jnp.maximum(count, 1)
    mean = jnp.sum(weights * means, axis=0, keepdims=True)
    spread = rows.var + (means - mean) ** 2 if between else rows.var
    var = jnp.sum(weights * spread, axis=0, keepdims=True)
    shift, count, mean, var = (a[0] for a in (shift, count, mean, var))
    return shift, Moments(count, mean, var)


def pool_devices(
    mapped_axes: MappedAxes, shift: jax.Array, moments: Moments
) -> tuple[jax.Array, Moments]:
    """Pools what the devices have measured, in two collectives."""
    if mapped_axes.axis_name is None:
        return shift, moments
    count, total = mapped_axes.sum(moments.count, moments.count * (shift + moments.mean))
    n = jnp.maximum(count, 1)
    common = total / n
    mean = (shift - common) + moments.mean
    total, squares = mapped_axes.sum(
        moments.count * mean, moments.count * (moments.var + mean * mean)
    )
    mean = total / n
    return common, Moments(count, mean, jnp.maximum(squares / n - mean * mean, 0))
