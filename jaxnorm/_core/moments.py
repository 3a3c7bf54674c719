"""Moments of x: the count, mean and biased variance of the entries that share one mean."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxnorm._core import arguments, checks, platforms
from jaxnorm._core.collectives import AxisName, MappedAxes, mapped_axes, sharded_like
from jaxnorm._core.reduction import Reduction, select, widen


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
    """The number of entries that share one mean, their mean, and their biased variance.

    The three fields have the same shape, such as (C,), and the same float dtype, float32 or wider.
    The count is a float as well, because a count in int32 could overflow. Without entries, count,
    mean and variance are 0.

    Attributes:
      count: the number of entries, or of those where the mask is True.
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

    # Annotated as Any, because JAX rebuilds the class with tracers, None and other objects.
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
    r"""Computes the count, the mean and the biased variance of x over the given axes.

    .. math::
        d = x - s, \quad e = E[d], \quad mean = s + e, \quad var = E[d^2] - e^2

    The shift s is near the mean, or 0 where the mean is small compared to the standard deviation,
    so that E[d^2] - e^2 loses few bits. On GPU, s is the mean of a part of x. On other platforms, s
    is 0 at first. Where the mean then is large compared to the standard deviation, the moments are
    computed again with the mean as s. The result is as accurate for temperatures in kelvin, or at
    an offset of 1e6, as for data around zero. The variance of constants is exactly 0. The function
    is differentiable to any order.

    Args:
      x: the data, of any shape and any float dtype.
      axis: the axes to reduce over.
      mask: bool, with the rank of x and broadcasting against x. True marks the entries to include.
        The other entries, even if they are NaN or Inf, do not affect the moments or their
        gradients.
      axis_name: the mapped axes (of shard_map, pmap or vmap) over which x is distributed. On GPU,
        the sums of the devices are added in two collectives of the size of the moments. On other
        platforms, there is one such collective, and one for each recomputation about the mean, of
        which there are at most two. With axis_index_groups, each collective has one row per group,
        and the number of recomputations is reduced as well.
      axis_index_groups: lists of indices along axis_name; each group has moments of its own.

    Returns:
      Moments whose fields have the shape of x without the reduced axes, in float32 or wider.

    Raises:
      ValueError: if the dtype of x is not a float dtype; if an axis does not exist or is repeated;
        if the mask is not bool, has another rank than x, or does not broadcast; if
        axis_index_groups do not contain each index of axis_name once, in groups of one size.
      NameError: if axis_name is not bound.

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
    reduction = Reduction(axes, mapped_axes=mapped_axes("moments", axis_name, axis_index_groups))
    shift, about_shift = shifted_moments(reduction, x, mask)
    found: Moments = jax.tree.map(lambda a: jnp.squeeze(a, axes), unshift(shift, about_shift))
    return found


def unshift(shift: jax.Array, about_shift: Moments) -> Moments:
    """Computes the moments of x from those of x - shift.

    Args:
      shift: the shift, in the shape of the moments.
      about_shift: the moments of x - shift.
    """
    return dataclasses.replace(about_shift, mean=shift + about_shift.mean)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 4))
def shifted_moments(
    reduction: Reduction,
    x: jax.Array,
    mask: jax.Array | None = None,
    guess: jax.Array | None = None,
    differentiated: bool = False,
) -> tuple[jax.Array, Moments]:
    """Computes a shift near the mean of x, and the moments of x - shift.

    A guess of the mean, such as the running mean, is the first shift on TPU; other platforms do not
    use it. It can save a second pass, and affects the result only by rounding. The mean is shift +
    moments.mean. The two are kept as a pair, because y would lose precision if they were rounded to
    one number and the mean is large compared to the standard deviation. Norms over the last axis in
    half precision may use one number (`platforms._with_mean_as_shift`). The derivative rule passes
    `differentiated`, because on GPU another formulation is faster then.

    Args:
      reduction: the entries that share one mean.
      x: the data, of any float dtype.
      mask: bool, with the rank of x and broadcasting against x, or None.
      guess: a guess of the mean, with the rank of x and size 1 on the reduced axes, or None.
      differentiated: whether the moments are computed for a derivative.
    """
    if not reduction.centered:
        wide = widen(x)
        count, zero, var = reduction.moments_about(None, wide, mask, reduction.count(wide, mask))
        return zero, Moments(count, zero, var)
    compute = platforms.moments_formulation(reduction, x, differentiated=differentiated)
    shift, *moments = compute(x, mask, guess)
    return shift, Moments(*moments)


@shifted_moments.defjvp
def _shifted_moments_jvp(
    reduction: Reduction, differentiated: bool, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[tuple[jax.Array, Moments], tuple[jax.Array, Moments]]:
    """Computes the tangents for `moments`, and selects the differentiated formulation.

    In a norm, `normalize` computes the tangents of the moments, and XLA removes those of this rule.
    """
    x, mask, guess = primals
    x_dot = tangents[0]
    shift, moments = shifted_moments(reduction, x, mask, guess, True)

    # Checkpointed, so that the residual is x in its own dtype, not x - mean in float32.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def linear(x: jax.Array, shift: jax.Array, moments: Moments, x_dot: jax.Array) -> Moments:
        x, shift, moments = platforms.barrier_on_cpu((x, shift, moments))
        x, x_dot, split_mask = map(reduction.split_axis, (x, x_dot, mask))
        return moments_dot(reduction, x, split_mask, shift, moments, x_dot)

    return (shift, moments), (jnp.zeros_like(shift), linear(x, shift, moments, x_dot))


def moments_dot(
    reduction: Reduction,
    x: jax.Array,
    mask: jax.Array | None,
    shift: jax.Array,
    moments: Moments,
    x_dot: jax.Array,
) -> Moments:
    """Computes the tangent of the moments: E[x_dot] and 2 E[(x - mean) x_dot].

    The shift is a constant, because the mean and the variance do not depend on it. In the arrays of
    the size of x, the axis of `Reduction.split` is already split.

    Args:
      reduction: the reduction of the moments, after the split.
      x: the data.
      mask: the mask, or None.
      shift: the shift.
      moments: the moments of x - shift.
      x_dot: the tangent of x, in the shape of x.
    """
    x_dot = select(mask, widen(x_dot))
    n = jnp.maximum(moments.count, 1)
    products = center(x, mask, shift, moments) * x_dot
    terms = (x_dot, products) if reduction.centered else (products,)
    *totals, of_products = reduction.sum(*terms)
    total = totals[0] if reduction.centered else jnp.zeros_like(n)
    mean_dot, half_var_dot = reduction.mapped_axes.sum(total / n, of_products / n)
    return Moments(jnp.zeros_like(n), mean_dot, 2 * half_var_dot)


def center(x: jax.Array, mask: jax.Array | None, shift: jax.Array, moments: Moments) -> jax.Array:
    """Computes x - mean as (x - shift) - moments.mean, which is exact near the shift.

    Args:
      x: the data, of any float dtype.
      mask: bool, broadcasting against x, or None; x counts as 0 where it is False.
      shift: the shift, with the rank of x.
      moments: the moments of x - shift, with the rank of x.
    """
    difference: jax.Array = (select(mask, widen(x, shift)) - shift) - moments.mean
    return difference


# ---- moments -> merged moments ----


def merge_moments(a: Moments, b: Moments) -> Moments:
    r"""Merges the moments of two disjoint sets of entries into those of their union.

    .. math::
        mean = \frac{n_a mean_a + n_b mean_b}{n_a + n_b}, \quad
        var = \frac{n_a (var_a + (mean_a - mean)^2) + n_b (var_b + (mean_b - mean)^2)}{n_a + n_b}

    The result is exact, in any order and for any sizes. For the micro-batches of one step of batch
    norm, merge their moments and call `update_batch_stats` once. (The moments of instance norm have
    one row per sample: concatenate them instead.)

    Args:
      a: moments with fields of any shape.
      b: moments of the same shape; a or b may be empty, with count 0.

    Returns:
      The moments of all entries together, of the same shape.

    Raises:
      ValueError: if a or b is not Moments, if a field does not have a float dtype, or if the shapes
        differ.

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
    check_moments("merge_moments", "a", a)
    check_moments("merge_moments", "b", b)
    checks.same_moments("merge_moments", jnp.shape(a.mean), jnp.shape(b.mean))
    return merge(a, b)


def check_moments(function: str, name: str, given: Any) -> None:
    """Checks that an argument is Moments, and that its fields have float dtypes.

    Args:
      function: the name of the public function, which errors begin with.
      name: the name of the argument.
      given: the value of the argument.
    """
    if not isinstance(given, Moments):
        raise ValueError(
            f"{function}: {name} should be Moments, as `moments` returns them, but is "
            f"{type(given).__name__}"
        )
    for field in ("count", "mean", "var"):
        dtype = jnp.result_type(getattr(given, field))
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"{function}: {name}.{field} should have a float dtype, as `moments` returns it, "
                f"but has {dtype}"
            )


def merge(a: Moments, b: Moments, *, between: bool = True) -> Moments:
    """Merges the moments of two disjoint sets of entries; `between` is as in `pool`.

    Args:
      a: moments with fields of any shape.
      b: moments of the same shape; a or b may be empty, with count 0.
      between: whether to include the variance between the means of a and b.
    """
    a, b = jax.tree.map(widen, a, b), jax.tree.map(widen, b, a)
    count = a.count + b.count
    n = jnp.maximum(count, 1)
    weight, d = b.count / n, b.mean - a.mean
    spread = b.var + (a.count / n) * d * d if between else b.var
    return Moments(count, interpolate(a.mean, b.mean, weight), interpolate(a.var, spread, weight))


def interpolate(a: jax.Array, b: jax.Array, weight: jax.Array) -> jax.Array:
    """Computes (1 - weight) * a + weight * b as a step from the nearer of the two.

    In float32, the two weights usually do not add up to exactly 1. If an average is multiplied by
    their sum at every step, its error grows with the number of steps. A step from a towards b
    gives exactly a if both are equal, and exactly b if the weight is 1.

    Args:
      a: an array, whose weight is 1 - weight.
      b: an array of the same shape, whose weight is `weight`.
      weight: an array that broadcasts against a and b.
    """
    return jnp.where(weight < 0.5, a + weight * (b - a), b - (1 - weight) * (b - a))


def about_mean(moments: Moments) -> Moments:
    """Computes the moments of x - mean from those of x."""
    return dataclasses.replace(moments, mean=jnp.zeros_like(moments.mean))


def pool(shifts: jax.Array, rows: Moments, *, between: bool = True) -> tuple[jax.Array, Moments]:
    """Pools the moments of disjoint sets of entries.

    Each row of the leading axis has the shift of one set, and its moments about this shift. The
    result is a common shift, and the moments of the union about it.

    The variance is that within the sets plus that between them (Chan, Golub & LeVeque, 1979).
    Without `between`, it is the mean of the variances of the rows, weighted by count. A row of
    count 0 has weight 0.

    Args:
      shifts: the shift of each set, of shape (K, ...).
      rows: the moments of each set about its shift, with fields of shape (K, ...).
      between: whether to include the variance between the means of the sets.
    """
    rows = dataclasses.replace(rows, count=sharded_like(rows.count, shifts))
    count = jnp.sum(rows.count, axis=0, keepdims=True)
    # Any of the shifts would do. As it is one of them, equal shifts differ from it by exactly 0.
    shift = jnp.max(shifts, axis=0, keepdims=True, where=rows.count > 0, initial=-jnp.inf)
    shift = jnp.where(count > 0, shift, jnp.zeros_like(shift))
    means = (shifts - shift) + rows.mean
    weights = rows.count / jnp.maximum(count, 1)
    mean = jnp.sum(weights * means, axis=0, keepdims=True)
    spread = rows.var + (means - mean) ** 2 if between else rows.var
    var = jnp.sum(weights * spread, axis=0, keepdims=True)
    shift, count, mean, var = (jnp.squeeze(a, 0) for a in (shift, count, mean, var))
    return shift, Moments(count, mean, var)


def pool_devices(
    mapped_axes: MappedAxes, shift: jax.Array, moments: Moments
) -> tuple[jax.Array, Moments]:
    """Pools the moments of the devices, in two collectives.

    Args:
      mapped_axes: the devices; without mapped axes, the arguments are returned.
      shift: the shift of this device, in the shape of the moments.
      moments: the moments of this device about its shift.
    """
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
