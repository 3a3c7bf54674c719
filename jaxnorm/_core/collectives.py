"""Mapped axes over which the entries of x are distributed, and the sums over them."""

import dataclasses
import math
from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

AxisName = Hashable | tuple[Hashable, ...]


@dataclasses.dataclass(frozen=True)
class MappedAxes:
    """The devices that work on one sample: those of the mapped axes, or of one group of them.

    Attributes:
      axis_name: the axes of shard_map, pmap or vmap; None is this device alone.
      groups: which indices along them go together; None means all.
    """

    axis_name: AxisName | None = None
    groups: tuple[tuple[int, ...], ...] | None = None

    def size(self) -> int:
        """How many devices work on this device's sample."""
        if self.axis_name is None:
            return 1
        return len(self.groups[0]) if self.groups else lax.axis_size(self.axis_name)

    def sum(self, *xs: jax.Array) -> Sequence[jax.Array]:
        """For each x, of one shape, its sum over the devices, all in one collective."""
        if self.axis_name is None:
            return xs
        return tuple(self._psum(jnp.stack(xs)))

    def max(self, numbers: jax.Array) -> jax.Array:
        """The largest of the numbers that the devices of the axis have, whatever their group.

        They are alike on the devices of a group, so without groups nothing is asked.
        """
        return numbers if self.groups is None else lax.pmax(numbers, self.axis_name)

    def _psum(self, x: jax.Array) -> jax.Array:
        """The sum over the devices of this group.

        With groups it is of a table with one row a group, into which each device puts its x: psum
        refuses groups under shard_map and vmap.
        """
        total: jax.Array
        if self.groups is None:
            total = lax.psum(x, self.axis_name)
            return total
        size, k = lax.axis_size(self.axis_name), lax.axis_index(self.axis_name)
        group_of = {i: g for g, group in enumerate(self.groups) for i in group}
        group = jnp.asarray([group_of[i] for i in range(size)])[k]
        table = jnp.zeros((len(self.groups), *x.shape), x.dtype).at[group].set(x)
        total = lax.psum(table, self.axis_name)[group]
        return total


LOCAL = MappedAxes()


def mapped_axes(
    function: str, axis_name: AxisName | None, axis_index_groups: Sequence[Sequence[int]] | None
) -> MappedAxes:
    """The devices that the public arguments name."""
    if axis_index_groups is None:
        return MappedAxes(axis_name)
    groups = tuple(tuple(group) for group in axis_index_groups)
    if axis_name is None:
        raise ValueError(
            f"{function}: axis_index_groups should come with axis_name, because it groups the "
            f"indices along that axis, but axis_name is None"
        )
    try:
        size = lax.axis_size(axis_name)
    except NameError:  # not bound, as in evaluation, where no device asks another; asking would say
        return MappedAxes(axis_name, groups)
    members = sorted(i for group in groups for i in group)
    if members != list(range(size)) or len({len(group) for group in groups}) != 1:
        raise ValueError(
            f"{function}: axis_index_groups should hold each index of {axis_name!r}, 0 to "
            f"{size - 1}, once, in groups of one size, but is {axis_index_groups}"
        )
    return MappedAxes(axis_name, groups)


def sharded_like(a: jax.Array, like: jax.Array) -> jax.Array:
    """An array with the sharding of another one of its shape.

    Only where the sharding is a part of the array's type, as it is on the explicit axes of a mesh:
    JAX then refuses to combine arrays of different shardings.
    """
    found, wanted = jax.typeof(a).sharding, jax.typeof(like).sharding
    mesh = found.mesh if wanted.mesh.empty else wanted.mesh
    if mesh.empty or found.spec == wanted.spec:
        return a
    resharded: jax.Array = jax.sharding.reshard(a, jax.sharding.NamedSharding(mesh, wanted.spec))
    return resharded


def number_of_shards(x: jax.Array, axis: int) -> int:
    """Over how many devices an axis of x is spread, as far as x's type says."""
    sharding = jax.typeof(x).sharding
    names = sharding.spec[axis] if axis < len(sharding.spec) else None
    names = () if names is None else names if isinstance(names, tuple) else (names,)
    return math.prod(sharding.mesh.shape[name] for name in names)
