"""Mapped axes over which the entries of x are distributed, and sums over them."""

import dataclasses
import math
from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

AxisName = Hashable | tuple[Hashable, ...]


@dataclasses.dataclass(frozen=True)
class MappedAxes:
    """The devices that share one mean: those of the mapped axes, or of one group of them.

    Attributes:
      axis_name: the axes of shard_map, pmap or vmap; None means this device only.
      groups: the groups of indices along these axes; None means one group with all of them.
      function: the name of the public function, which errors begin with.
    """

    axis_name: AxisName | None = None
    groups: tuple[tuple[int, ...], ...] | None = None
    function: str = dataclasses.field(default="", compare=False)

    def size(self) -> int:
        """Returns the number of devices that share one mean with this device."""
        if self.axis_name is None:
            return 1
        return len(self.groups[0]) if self.groups else self._number_of_devices()

    def sum(self, *xs: jax.Array) -> Sequence[jax.Array]:
        """Sums arrays of one shape over the devices, in one collective."""
        if self.axis_name is None:
            return xs
        return tuple(self._psum(jnp.stack(xs)))

    def max(self, numbers: jax.Array) -> jax.Array:
        """Returns the largest number on any device of the axis, over all groups.

        A loop that contains a collective has to run equally often on all devices. The numbers are
        equal within a group, so without groups no collective is needed.
        """
        if self.groups is None:
            return numbers
        self._number_of_devices()  # raises an error if the axis is not bound
        largest: jax.Array = lax.pmax(numbers, self.axis_name)
        return largest

    def _psum(self, x: jax.Array) -> jax.Array:
        """Sums x over the devices of this group.

        With groups, each device writes x to the row of its group in a table of zeros, and the table
        is summed, because psum does not support groups under shard_map and vmap.
        """
        total: jax.Array
        size = self._number_of_devices()
        if self.groups is None:
            total = lax.psum(x, self.axis_name)
            return total
        k = lax.axis_index(self.axis_name)
        group_of = {i: g for g, group in enumerate(self.groups) for i in group}
        group = jnp.asarray([group_of[i] for i in range(size)])[k]
        table = jnp.zeros((len(self.groups), *x.shape), x.dtype).at[group].set(x)
        total = lax.psum(table, self.axis_name)[group]
        return total

    def _number_of_devices(self) -> int:
        """Returns the size of the mapped axes; raises an error if one of them is not bound."""
        try:
            return lax.axis_size(self.axis_name)
        except NameError as error:
            raise NameError(
                f"{self.function}: axis_name should be an axis of a shard_map, pmap or vmap around "
                f"the call, because statistics are summed over it, but is {self.axis_name!r} "
                f"({error}); under jit alone, write axis_name=None: the statistics are those of "
                f"the whole batch [axis-name-unbound]"
            ) from error


LOCAL = MappedAxes()


def mapped_axes(
    function: str, axis_name: AxisName | None, axis_index_groups: Sequence[Sequence[int]] | None
) -> MappedAxes:
    """Checks the public arguments and returns the mapped axes.

    Args:
      function: the name of the public function.
      axis_name: the mapped axes, or None for this device only.
      axis_index_groups: lists of indices along these axes, or None for a single group.
    """
    if axis_index_groups is None:
        return MappedAxes(axis_name, function=function)
    groups = tuple(tuple(group) for group in axis_index_groups)
    if axis_name is None:
        raise ValueError(
            f"{function}: axis_index_groups should come with axis_name, because it groups the "
            f"indices along that axis, but axis_name is None [axis-index-groups]"
        )
    try:
        size = lax.axis_size(axis_name)
    except NameError:  # not bound; allowed in evaluation, and a collective would raise an error
        return MappedAxes(axis_name, groups, function)
    members = sorted(i for group in groups for i in group)
    if members != list(range(size)) or len({len(group) for group in groups}) != 1:
        raise ValueError(
            f"{function}: axis_index_groups should hold each index of {axis_name!r}, 0 to "
            f"{size - 1}, once, in groups of one size, but is {axis_index_groups} "
            f"[axis-index-groups]"
        )
    return MappedAxes(axis_name, groups, function)


def sharded_like(a: jax.Array, like: jax.Array) -> jax.Array:
    """Reshards an array like another one of the same shape, on the explicit axes of a mesh.

    There the sharding is part of the array's type, and JAX does not combine arrays of different
    shardings.

    Args:
      a: the array to reshard.
      like: an array of the same shape, whose sharding is wanted.
    """
    found, wanted = jax.typeof(a).sharding, jax.typeof(like).sharding
    mesh = found.mesh if wanted.mesh.empty else wanted.mesh
    if mesh.empty or found.spec == wanted.spec:
        return a
    resharded: jax.Array = jax.sharding.reshard(a, jax.sharding.NamedSharding(mesh, wanted.spec))
    return resharded


def number_of_shards(x: jax.Array, axis: int) -> int:
    """Returns the number of shards of an axis of x; 1 if the type of x has no sharding."""
    sharding = jax.typeof(x).sharding
    names = sharding.spec[axis] if axis < len(sharding.spec) else None
    names = () if names is None else names if isinstance(names, tuple) else (names,)
    return math.prod(sharding.mesh.shape[name] for name in names)
