"""Who holds the rest of a sample? The devices along mapped axes, asked in one collective."""

import dataclasses
import math
from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

AxisName = Hashable | tuple[Hashable, ...]


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices that work on one sample: those of the mapped axes, or of one group of them.

    Attributes:
      axis_name: the axes of shard_map, pmap or vmap; None is this device alone.
      groups: which indices along them go together; None means all.
    """

    axis_name: AxisName | None = None
    groups: tuple[tuple[int, ...], ...] | None = None

    def number(self) -> int:
        """How many devices work on this device's sample."""
        if self.axis_name is None:
            return 1
        return len(self.groups[0]) if self.groups else lax.axis_size(self.axis_name)

    def sum(self, *xs: jax.Array) -> Sequence[jax.Array]:
        """For each x, of one shape, its sum over the devices."""
        if self.axis_name is None:
            return xs
        stacked = jnp.stack(xs)
        if self.groups is None:
            return tuple(lax.psum(stacked, self.axis_name))
        return tuple(jnp.sum(self.rows(stacked), axis=0))

    def rows(self, x: jax.Array) -> jax.Array:
        """Every device's x on a new leading axis; 0 for the devices of other groups.

        One psum of a table that each device writes its own row into: shard_map's default checks
        refuse all_gather for replicated outputs, and psum refuses groups there and under vmap.
        """
        if self.axis_name is None:
            return x[None]
        size, k = lax.axis_size(self.axis_name), lax.axis_index(self.axis_name)
        table = lax.psum(jnp.zeros((size, *x.shape), x.dtype).at[k].set(x), self.axis_name)
        if self.groups is None:
            return table
        group_of = {i: g for g, group in enumerate(self.groups) for i in group}
        group = jnp.asarray([group_of[i] for i in range(size)])
        same = (group == group[k]).reshape(size, *(1,) * x.ndim)
        return jnp.where(same, table, jnp.zeros((), x.dtype))


HERE = Devices()


def devices(
    function: str, axis_name: AxisName | None, axis_index_groups: Sequence[Sequence[int]] | None
) -> Devices:
    """The devices that the public arguments name."""
    if axis_index_groups is None:
        return Devices(axis_name)
    groups = tuple(tuple(group) for group in axis_index_groups)
    if axis_name is None:
        raise ValueError(
            f"{function}: axis_index_groups should come with axis_name, because it groups the "
            f"indices along that axis, but axis_name is None"
        )
    try:
        size = lax.axis_size(axis_name)
    except NameError:  # not bound, as in evaluation, where no device asks another; asking would say
        return Devices(axis_name, groups)
    members = sorted(i for group in groups for i in group)
    if members != list(range(size)) or len({len(group) for group in groups}) != 1:
        raise ValueError(
            f"{function}: axis_index_groups should hold each index of {axis_name!r}, 0 to "
            f"{size - 1}, once, in groups of one size, but is {axis_index_groups}"
        )
    return Devices(axis_name, groups)


def explicit_devices(x: jax.Array, axis: int) -> int:
    """Over how many devices an axis of x is spread, as far as x's type says."""
    sharding = jax.typeof(x).sharding
    names = sharding.spec[axis] if axis < len(sharding.spec) else None
    names = () if names is None else names if isinstance(names, tuple) else (names,)
    return math.prod(sharding.mesh.shape[name] for name in names)
