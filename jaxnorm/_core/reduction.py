"""The entries of x that share one mean, and sums over them."""

import dataclasses
import math
from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp

from jaxnorm._core.collectives import LOCAL, MappedAxes, number_of_shards
from jaxnorm._core.variables import statistics_dtype

Array = TypeVar("Array", jax.Array, jax.Array | None)


def widen(x: jax.Array, *others: jax.Array) -> jax.Array:
    """Converts x to the widest of float32 and the dtypes of x and the others."""
    return x.astype(statistics_dtype(x.dtype, *(other.dtype for other in others)))


def select(mask: jax.Array | None, x: jax.Array) -> jax.Array:
    """Returns x where the mask is True, and 0 elsewhere, even where x is NaN or Inf."""
    return x if mask is None else jnp.where(mask, x, jnp.zeros((), x.dtype))


@dataclasses.dataclass(frozen=True)
class Reduction:
    """The axes of x, and the devices, that one mean is computed over.

    Attributes:
      axes: the reduced axes, not negative.
      groups: an axis, and the number of groups that its neighboring entries form. The axis is not
        reduced: each of its entries gets the sum of its group.
      split: an axis of x, and the number of groups that it is split into before the sums. It
        becomes two axes, and `axes` are numbered after the split. Group norm has `groups` if x has
        other axes to reduce over, and otherwise `split`. `shifted_moments` takes x before the
        split, and all arrays of `normalize` are split (`split_axis`).
      centered: whether the mean is subtracted; otherwise the mean is 0, and var is E[x^2].
      mapped_axes: the mapped axes over which the entries are distributed.
    """

    axes: tuple[int, ...]
    groups: tuple[int, int] | None = None
    split: tuple[int, int] | None = None
    centered: bool = True
    mapped_axes: MappedAxes = LOCAL

    @property
    def after_split(self) -> "Reduction":
        """The same reduction, for an x whose axis is already split."""
        return dataclasses.replace(self, split=None)

    def split_axis(self, a: Array) -> Array:
        """Reshapes an array of the rank of x, so that the axis in `split`, if any, becomes two."""
        if a is None or self.split is None:
            return a
        axis, number = self.split
        parts = (1, 1) if a.shape[axis] == 1 else (number, a.shape[axis] // number)
        return a.reshape(*a.shape[:axis], *parts, *a.shape[axis + 1 :])

    def transposed(self, order: Sequence[int]) -> "Reduction":
        """Returns the same reduction, for an x with its axes in another order."""
        groups = self.groups and (order.index(self.groups[0]), self.groups[1])
        axes = tuple(i for i, a in enumerate(order) if a in self.axes)
        return dataclasses.replace(self, axes=axes, groups=groups)

    def sum(self, *xs: jax.Array) -> Sequence[jax.Array]:
        """Sums arrays over the entries on this device; the reduced axes are kept, with size 1.

        With groups, each entry of the kept axis gets the sum of its group. This sum follows the
        sum over x, because a sum over a short part of an axis is slow. Small groups then cost no
        more than large ones, in the forward and in the backward pass.
        """
        sums = [jnp.sum(x, self.axes, keepdims=True) for x in xs]
        if self.groups is None:
            return sums
        axis, _ = self.groups
        split = [Reduction((), split=self.groups).split_axis(s) for s in sums]
        joined = [jnp.sum(s, axis + 1, keepdims=True) for s in split]
        return [
            jnp.broadcast_to(j, parts.shape).reshape(total.shape)
            for j, parts, total in zip(joined, split, sums, strict=True)
        ]

    def count(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Counts the entries on this device, in the dtype of x and in the shape of their sum."""
        given = (1,) * x.ndim if mask is None else mask.shape
        # The sizes of the axes along which the mask broadcasts are factors of the count.
        factor = math.prod(x.shape[a] for a in self.axes if given[a] == 1)
        if self.groups is not None and given[self.groups[0]] == 1:
            axis, number = self.groups
            factor *= x.shape[axis] // number
        count = jnp.asarray(factor, x.dtype)
        if mask is not None:
            count = count * self.sum(mask.astype(x.dtype))[0]
        return jnp.broadcast_to(count, [1 if a in self.axes else n for a, n in enumerate(x.shape)])

    def moments_about(
        self,
        shift: jax.Array | None,
        x: jax.Array,
        mask: jax.Array | None,
        count: jax.Array,
        factor: jax.Array | None = None,
        *,
        first: Sequence[int] = (),
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Computes the count, the mean and the biased variance of x - shift, over all devices.

        x is in float32 or wider, and `count` is the number of its entries on this device. This
        needs one collective, or none without mapped axes. The terms of the mean can be multiplied
        by `factor`, so that a sum of finite entries does not overflow. The axes in `first` are
        summed over before the others, and XLA does not fuse the two sums.
        """
        # mean = E[d] and var = E[d^2] - mean^2, which are those of x - shift.
        d = select(mask, x if shift is None else x - shift)
        terms = (d if factor is None else d * factor, d * d) if self.centered else (d * d,)
        if first:
            partial = (jnp.sum(t, first, keepdims=True) for t in terms)
            terms = tuple(jax.lax.optimization_barrier(t) for t in partial)
        *totals, squares = self.sum(*terms)
        total = totals[0] if self.centered else jnp.zeros_like(count)
        if mask is None:
            count = count * self.mapped_axes.size()
            total, squares = self.mapped_axes.sum(total, squares)
        else:
            count, total, squares = self.mapped_axes.sum(count, total, squares)
        n = jnp.maximum(count, 1)
        if not self.centered:
            return count, total, squares / n
        mean = total / (n if factor is None else n * factor)
        # If the sum of squares overflows, mean * mean may too, and Inf - Inf would be NaN.
        var = jnp.where(squares == jnp.inf, squares, squares / n - mean * mean)
        return count, mean, jnp.maximum(var, 0)

    def part(self, x: jax.Array, one_in: int, at_least: int) -> jax.Array:
        """Returns a part of the entries: at least 1 / `one_in` of them, and about `at_least`.

        The entries are taken with a stride along the inner axes. If there are none, they are taken
        along the first axis, which may be distributed over devices. If only the last axis is
        reduced, whose entries are contiguous, the part consists of the first entries, at least a
        sixteenth. Axes that are known to be sharded, or whose size is symbolic (jax.export), are
        not reduced in size.
        """
        axes = [a for a in self.axes if isinstance(x.shape[a], int) and number_of_shards(x, a) == 1]
        last = x.ndim - 1
        one_in = min(one_in, max(math.prod(x.shape[a] for a in axes) // at_least, 1))
        if axes == [last]:
            return jax.lax.slice_in_dim(x, 0, -(-x.shape[last] // min(one_in, 16)), axis=last)
        for axis in [a for a in axes if 0 < a < last] or [a for a in axes if a < last]:
            stride = max(min(x.shape[axis], one_in), 1)
            x, one_in = jax.lax.slice_in_dim(x, 0, None, stride, axis), one_in // stride
        return x
