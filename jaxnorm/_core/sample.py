"""The set of entries of x that share one mean, and sums over it."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jaxnorm._core.collectives import LOCAL, MappedAxes, number_of_shards
from jaxnorm._core.variables import statistics_dtype

Array = TypeVar("Array", jax.Array, jax.Array | None)


def widen(x: jax.Array, *others: jax.Array) -> jax.Array:
    """x in the dtype of the arithmetic: float32, or the widest of x and the others."""
    return x.astype(statistics_dtype(x.dtype, *(other.dtype for other in others)))


def select(mask: jax.Array | None, x: jax.Array) -> jax.Array:
    """x where the mask is True, and 0 elsewhere, even where x is NaN or Inf."""
    return x if mask is None else jnp.where(mask, x, jnp.zeros((), x.dtype))


@dataclasses.dataclass(frozen=True)
class Sample:
    """The entries that share one mean: the reduced axes of x, and the devices that hold the rest.

    Attributes:
      axes: the reduced axes, not negative.
      groups: the axis along which neighbours belong together, and the number of groups; the axis
        is not reduced: each of its entries gets the sum of its group.
      split: an axis of x, and the number of groups that it is split into before anything is
        summed: it becomes two axes, and `axes` counts both. `shifted_moments` takes x as it came.
      centered: whether the mean is subtracted; otherwise it counts as 0, and var is E[x^2].
      mapped_axes: the axes over which the sample is distributed.
    """

    axes: tuple[int, ...]
    groups: tuple[int, int] | None = None
    split: tuple[int, int] | None = None
    centered: bool = True
    mapped_axes: MappedAxes = LOCAL

    @property
    def as_laid_out(self) -> "Sample":
        """The same entries of an x that is laid out."""
        return dataclasses.replace(self, split=None)

    def laid_out(self, a: Array) -> Array:
        """An array of the rank of x, or None, with the split axis as two."""
        if a is None or self.split is None:
            return a
        axis, number = self.split
        parts = (1, 1) if a.shape[axis] == 1 else (number, a.shape[axis] // number)
        return a.reshape(*a.shape[:axis], *parts, *a.shape[axis + 1 :])

    def ordered(self, order: Sequence[int]) -> "Sample":
        """The same entries of x with its axes in another order."""
        groups = self.groups and (order.index(self.groups[0]), self.groups[1])
        axes = tuple(i for i, a in enumerate(order) if a in self.axes)
        return dataclasses.replace(self, axes=axes, groups=groups)

    def sum(self, x: jax.Array, *, first: Sequence[int] = ()) -> jax.Array:
        """Sums over this device's entries; the reduced axes stay, with size 1.

        The sum over the axes in `first` is taken before that over the others, and XLA keeps the two
        apart.
        """
        if first:
            x = jax.lax.optimization_barrier(jnp.sum(x, first, keepdims=True))
        return self.join(jnp.sum(x, self.axes, keepdims=True))

    def join(self, sums: jax.Array, how: Callable[..., jax.Array] = jnp.sum) -> jax.Array:
        """The sums of the groups, each given to all of its members.

        They are joined after the sum over x, since a sum over a short part of an axis is slow: so a
        small group costs no more than a large one, forward and, in the transpose, backward.
        """
        if self.groups is None:
            return sums
        axis, _ = self.groups
        split = Sample((), split=self.groups).laid_out(sums)
        joined = how(split, axis + 1, keepdims=True)
        return jnp.broadcast_to(joined, split.shape).reshape(sums.shape)

    def count(self, x: jax.Array, mask: jax.Array | None, dtype: Any) -> jax.Array:
        """The number of this device's entries, in the shape of their sum."""
        shape = tuple(1 if a in self.axes else n for a, n in enumerate(x.shape))
        if mask is None:
            count = jnp.asarray(math.prod(x.shape[a] for a in self.axes), dtype)
        else:  # the mask in its own shape: an axis that it broadcasts along multiplies
            repeats = math.prod(x.shape[a] for a in self.axes if mask.shape[a] == 1)
            kept = tuple(a for a in self.axes if mask.shape[a] != 1)
            count = jnp.sum(mask, kept, dtype, keepdims=True) * jnp.asarray(repeats, dtype)
        return self.join(jnp.broadcast_to(count, shape))

    def moments_about(
        self,
        shift: jax.Array | None,
        x: jax.Array,
        mask: jax.Array | None,
        unit: jax.Array | None = None,
        *,
        first: Sequence[int] = (),
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The count, the mean and the biased variance of x - shift, over all devices.

        One collective, or none where the sample is on one device. What is summed for the mean can
        be multiplied by a unit first, so that a sum of finite entries does not overflow.
        `first` is explained at `sum`.
        """
        wide = widen(x)
        d = select(mask, wide if shift is None else wide - shift)
        count = self.count(x, mask, d.dtype)
        scaled = d if unit is None else d * unit
        total = self.sum(scaled, first=first) if self.centered else jnp.zeros_like(count)
        squares = self.sum(d * d, first=first)
        if mask is None:
            count = count * self.mapped_axes.size()
            total, squares = self.mapped_axes.sum(total, squares)
        else:
            count, total, squares = self.mapped_axes.sum(count, total, squares)
        n = jnp.maximum(count, 1)
        if not self.centered:
            return count, total, squares / n
        mean = total / (n if unit is None else n * unit)
        # Where squares of finite numbers overflow, so may the mean's: Inf - Inf would be NaN.
        var = jnp.where(squares == jnp.inf, squares, squares / n - mean * mean)
        return count, mean, jnp.maximum(var, 0)

    def part(self, x: jax.Array, share: int, least: int) -> jax.Array:
        """A part of each sample, one in `share` of its entries or more, and about `least` of them.

        They lie at equal distances along the inner axes, or else along the first one, which may be
        spread over devices. Of the last axis, whose entries are read together, the first ones are
        taken, at least a sixteenth. All of x along an axis that is known to be spread, or whose
        size is not known (jax.export).
        """
        axes = [a for a in self.axes if isinstance(x.shape[a], int) and number_of_shards(x, a) == 1]
        last = x.ndim - 1
        share = min(share, max(math.prod(x.shape[a] for a in axes) // least, 1))
        if axes == [last]:
            return jax.lax.slice_in_dim(x, 0, -(-x.shape[last] // min(share, 16)), axis=last)
        for axis in [a for a in axes if 0 < a < last] or [a for a in axes if a < last]:
            stride = max(min(x.shape[axis], share), 1)
            x, share = jax.lax.slice_in_dim(x, 0, None, stride, axis), share // stride
        return x
