"""The axes of x, and the reshaping of parameters from the channels' shape to the rank of x."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike


@dataclasses.dataclass(frozen=True)
class Layout:
    """The axes of x.

    Attributes:
      ndim: the rank of x.
      channels: the axes that the parameters have, not negative, in the order of the axes of the
        parameters. In layer and RMS norm, these are also the axes that are reduced over.
      batch: the axis along which entries are normalized separately, in instance norm and for
        virtual batches; otherwise None.
    """

    ndim: int
    channels: tuple[int, ...]
    batch: int | None = None

    def shape(self, x: ArrayLike) -> tuple[int, ...]:
        """Returns the shape of x over the channel axes."""
        return tuple(jnp.shape(x)[a] for a in self.channels)

    @property
    def reduced(self) -> tuple[int, ...]:
        """The axes that batch and instance norm reduce over; not used by layer and RMS norm."""
        return tuple(a for a in range(self.ndim) if a != self.batch and a not in self.channels)

    @property
    def with_batch_axis(self) -> "Layout":
        """The layout of x with a new first axis, along which entries are normalized separately."""
        return Layout(self.ndim + 1, tuple(a + 1 for a in self.channels), batch=0)

    def expand(self, a: jax.Array) -> jax.Array:
        """Expands an array from the shape of the channels to the rank of x, if necessary."""
        if a.ndim != len(self.channels):
            return a
        order = sorted(range(a.ndim), key=self.channels.__getitem__)
        others = tuple(i for i in range(self.ndim) if i not in self.channels)
        return lax.expand_dims(jnp.transpose(a, order), others)

    def squeeze_to_channels(self, a: jax.Array) -> jax.Array:
        """Squeezes an array of the rank of x, with reduced axes of size 1, to one row per sample.

        The rows have the shape of the channels. Without a batch axis there is one row.
        """
        batch = () if self.batch is None else (self.batch,)
        rows = jnp.transpose(a, (*batch, *self.channels, *self.reduced))
        rows = lax.squeeze(rows, range(len(batch) + len(self.channels), self.ndim))
        return rows if batch else rows[None]
