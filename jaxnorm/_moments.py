"""What is measured? The moments of a sample: the entries of x that share one mean."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxnorm import _checks
from jaxnorm._devices import HERE, AxisName, Devices, devices, explicit_devices
from jaxnorm.variables import statistics_dtype


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


@dataclasses.dataclass(frozen=True)
class Sample:
    """The entries that share one mean: the reduced axes of x, and the devices that hold the rest.

    Attributes:
      axes: the reduced axes of x, not negative.
      groups: the axis of x along which neighbours belong together, and how many groups they make;
        it is not reduced: each of its entries gets the sum of its group.
      centred: whether the mean is subtracted; without, it counts as 0, and var is E[x^2].
      devices: those that the sample is spread over.
    """

    axes: tuple[int, ...]
    groups: tuple[int, int] | None = None
    centred: bool = True
    devices: Devices = HERE

    def sum(self, x: jax.Array) -> jax.Array:
        """Sums over this device's entries; the reduced axes stay, with size 1.

        Over three axes or more in two steps, which the barrier keeps apart: some versions of XLA
        for CPU (0.10.0; 0.10.2 does not) add all entries one after the other then, and a hundred
        thousand of them at an offset of 1e6 are too inexact for the second pass to mend: y is off
        by 0.07 instead of 1e-6. Over fewer axes the second step would only cost time.
        """
        first, rest = self.axes[:1], self.axes[1:]
        if len(rest) > 1:
            x, rest = lax.optimization_barrier(jnp.sum(x, rest, keepdims=True)), ()
        return self._join(jnp.sum(x, (*first, *rest), keepdims=True))

    def mean(self, x: jax.Array, n: jax.Array) -> jax.Array:
        """The mean of n entries, on this device; 0 where the sample is not centred."""
        total = self.sum(x) if self.centred else jnp.zeros_like(n)
        return total / n

    def part(self, x: jax.Array) -> jax.Array:
        """A part of each sample, a sixteenth of it or more: every few entries along one axis.

        Not along the last axis, whose entries are read together anyway, and along the first, which
        may be spread over devices, only where there is no other. All of x, where an axis is known
        to be spread, or its size is not known (jax.export).
        """
        inner = [
            a
            for a in self.axes
            if a < x.ndim - 1 and isinstance(x.shape[a], int) and explicit_devices(x, a) == 1
        ]
        if not inner:
            return x
        axis = max([a for a in inner if a > 0] or inner, key=lambda a: x.shape[a])
        step = min(max(x.shape[axis] // 4, 1), 16)
        return lax.slice_in_dim(x, 0, None, step, axis)

    def _join(self, sums: jax.Array) -> jax.Array:
        """The sums of the groups, each given to all its members.

        Joined after the sum over x, since a sum over a short part of an axis is slow: so a small
        group costs no more than a large one, forward and, in the transpose, backward.
        """
        if self.groups is None:
            return sums
        axis, number = self.groups
        size = sums.shape[axis] // number
        split = sums.reshape(*sums.shape[:axis], number, size, *sums.shape[axis + 1 :])
        joined = jnp.sum(split, axis + 1, keepdims=True)
        return jnp.broadcast_to(joined, split.shape).reshape(sums.shape)

    def count(self, x: jax.Array, mask: jax.Array | None, dtype: Any) -> jax.Array:
        """Counts this device's entries, in the shape of their sum."""
        shape = tuple(1 if a in self.axes else n for a, n in enumerate(x.shape))
        if mask is None:
            count = jnp.asarray(math.prod(x.shape[a] for a in self.axes), dtype)
        else:  # the mask in its own shape: an axis that it broadcasts along multiplies
            repeats = math.prod(x.shape[a] for a in self.axes if mask.shape[a] == 1)
            kept = tuple(a for a in self.axes if mask.shape[a] != 1)
            count = jnp.sum(mask, kept, dtype, keepdims=True) * jnp.asarray(repeats, dtype)
        return self._join(jnp.broadcast_to(count, shape))


def widen(x: jax.Array, *others: jax.Array) -> jax.Array:
    """x in the dtype of the arithmetic: float32, or the widest of x and the others."""
    return x.astype(statistics_dtype(x.dtype, *(other.dtype for other in others)))


def select(mask: jax.Array | None, x: jax.Array) -> jax.Array:
    """x where the mask is True, and 0 elsewhere, be x NaN or Inf there."""
    return x if mask is None else jnp.where(mask, x, jnp.zeros((), x.dtype))


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

    The shift s is the mean of a sixteenth of x or more, spread over x. So e^2 is at most 15 var,
    whatever x holds, and the difference loses four bits at most: as accurate for temperatures in
    kelvin, or at an offset of 1e6, as for data around zero, and exactly 0 for constants.
    Differentiable to any order.

    Args:
      x: the data, of any shape and any float dtype.
      axis: the axes to reduce.
      mask: bool, of x's rank, broadcasting against x; True counts. What is masked out never
        reaches the moments nor their gradients, be it NaN or Inf.
      axis_name: mapped axes (of shard_map, pmap or vmap) over which the sample is spread; the
        devices' moments are pooled exactly, weighted by count, in one collective.
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
    x = _checks.float_array("moments", x)
    axes = _checks.axes("moments", "axis", axis, x.ndim)
    mask = _checks.mask("moments", mask, x.shape)
    sample = Sample(axes, devices=devices("moments", axis_name, axis_index_groups))
    shift, about_shift = measure(sample, x, mask)
    return jax.tree.map(lambda a: jnp.squeeze(a, axes), about_zero(shift, about_shift))


def about_zero(shift: jax.Array, about_shift: Moments) -> Moments:
    """The moments of x, from those of x - shift."""
    return dataclasses.replace(about_shift, mean=shift + about_shift.mean)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def measure(
    sample: Sample, x: jax.Array, mask: jax.Array | None = None
) -> tuple[jax.Array, Moments]:
    """Measures a sample: a shift near its mean, and the moments of x - shift.

    The mean is shift + moments.mean, kept as a pair: rounded to one number it would lose the
    digits of y wherever the mean is large beside the standard deviation.
    """
    x = select(mask, widen(x))
    count = sample.count(x, mask, x.dtype)
    n = jnp.maximum(count, 1)
    # The mean of a part p of the entries will do: the variance between the part and the rest alone
    # is (mean - shift)^2 p / (1 - p). A mask may leave nothing of a part.
    part = sample.part(x) if mask is None else x
    shift = sample.mean(part, jnp.maximum(sample.count(part, mask, x.dtype), 1))
    # One number wherever XLA computes it anew: in x - total / n the quotient may stay unrounded in
    # one place (FMA) and not in another. A maximum in between, with the lowest float, rounds it.
    shift = jnp.maximum(shift, jnp.finfo(x.dtype).min)
    d = select(mask, x - shift)
    mean = sample.mean(d, n)
    var = jnp.maximum(sample.sum(d * d) / n - mean * mean, 0)
    return pool_devices(sample.devices, shift, Moments(count, mean, var))


@measure.defjvp
def _measure_jvp(sample, primals, tangents):
    x, mask = primals
    x_dot, _ = tangents
    shift, moments = measure(sample, x, mask)
    # Checkpointed: what is kept for the backward pass is x as it came, not x - mean in float32.
    drift = jax.checkpoint(functools.partial(moments_dot, sample))
    return (shift, moments), (jnp.zeros_like(shift), drift(x, mask, shift, moments, x_dot))


def moments_dot(
    sample: Sample,
    x: jax.Array,
    mask: jax.Array | None,
    shift: jax.Array,
    moments: Moments,
    x_dot: jax.Array,
) -> Moments:
    """The tangent of the moments: mean_dot = E[x_dot] and var_dot = 2 E[(x - mean) x_dot].

    The shift is a constant: moving it moves neither the mean nor the variance.
    """
    x_dot = select(mask, widen(x_dot))
    n = jnp.maximum(moments.count, 1)
    mean_dot, half_var_dot = sample.devices.sum(
        sample.mean(x_dot, n), sample.sum(centre(x, mask, shift, moments) * x_dot) / n
    )
    return Moments(jnp.zeros_like(n), mean_dot, 2 * half_var_dot)


def centre(x: jax.Array, mask: jax.Array | None, shift: jax.Array, moments: Moments) -> jax.Array:
    """x - mean, by way of the shift: the first difference is exact, the second is small."""
    return (select(mask, widen(x, shift)) - shift) - moments.mean


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
    _checks.same_moments("merge_moments", jnp.shape(a.mean), jnp.shape(b.mean))
    return merge(a, b)


def merge(a: Moments, b: Moments, *, between: bool = True) -> Moments:
    """The moments of two disjoint samples together; `between` is explained at `pool`."""
    rows = jax.tree.map(lambda a, b: jnp.stack([widen(a, b), widen(b, a)]), a, b)
    return about_zero(*pool(rows.mean, about_mean(rows), between=between))


def about_mean(moments: Moments) -> Moments:
    """The moments of x - mean, from those of x."""
    return dataclasses.replace(moments, mean=jnp.zeros_like(moments.mean))


def pool(shifts: jax.Array, rows: Moments, *, between: bool = True) -> tuple[jax.Array, Moments]:
    """Pools disjoint samples, a row each on the leading axis, into the moments of their union.

    Exact (Chan, Golub & LeVeque, 1979): within the samples plus between them. Without `between`
    the variance is the mean of the rows' own. A row of count 0 weighs nothing.
    """
    count = jnp.sum(rows.count, axis=0)
    # One of the shifts, so that those of equal ones differ by 0 exactly; which one does not matter.
    shift = jnp.max(shifts, axis=0, where=rows.count > 0, initial=-jnp.inf)
    shift = jnp.where(count > 0, shift, jnp.zeros_like(shift))
    means = (shifts - shift) + rows.mean
    weights = rows.count / jnp.maximum(count, 1)
    mean = jnp.sum(weights * means, axis=0)
    spread = rows.var + (means - mean) ** 2 if between else rows.var
    return shift, Moments(count, mean, jnp.sum(weights * spread, axis=0))


def pool_devices(devices: Devices, shift: jax.Array, moments: Moments) -> tuple[jax.Array, Moments]:
    """Pools what the devices have measured, in one collective."""
    if devices.axis_name is None:
        return shift, moments
    rows = devices.rows(jnp.stack([shift, moments.count, moments.mean, moments.var]))
    shifts, *others = jnp.moveaxis(rows, 1, 0)
    return pool(shifts, Moments(*others))
