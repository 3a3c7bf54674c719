"""The base classes of the layers in `jaxnorm.linen`: their variables and their call."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import errors
from jax.typing import ArrayLike

from jaxnorm._core import checks
from jaxnorm._core.variables import Affine, BatchStats, init_batch_stats
from jaxnorm._layers import attributes, calls
from jaxnorm._layers.linen_frozen import FROZEN


class Norm(nn.Module):
    """The checks of all layers that do not need an input."""

    # The axes of x that the parameters have, from the layer and the rank of x.
    _param_axes: ClassVar[Callable[..., tuple[int, ...]]]

    if not TYPE_CHECKING:  # type checkers read the arguments of __init__

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            attributes.check_names(cls, kwargs)
            return super().__new__(cls)

    def __post_init__(self) -> None:
        attributes.check(self, infers_channels=True)
        super().__post_init__()


class Tracked(Norm):
    """The call of the layers that may have running statistics."""

    _norm: ClassVar[calls.TrackedNorm]
    ranks: ClassVar[tuple[int, ...] | None] = None

    @nn.compact
    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        update_stats: bool | None = None,
        mask: ArrayLike | None = None,
    ) -> jax.Array:
        """Normalizes x, and updates the running statistics, if there are any, in training.

        Args:
          x: the input, of the shape that the class describes, any float dtype.
          use_running_average: as the attribute; with running statistics, give just one of the two.
          update_stats: as the attribute, which it overrides.
          mask: bool, with the rank of x and broadcasting against x. True marks entries to include.

        Returns:
          y, with the shape of x.
        """
        batch_stats = None
        if self.track_running_stats:
            use_running_average = _one_of(self, self.use_running_average, use_running_average)
            batch_stats = _batch_stats(self, x)
        params = _params(self, x)
        if batch_stats is not None and FROZEN.value:
            use_running_average, update_stats = True, False
            params = jax.lax.stop_gradient(params)
        return calls.normalize_and_update(
            self,
            x,
            params,
            batch_stats,
            _write_back,
            use_running_average=use_running_average,
            update_stats=update_stats,
            mask=mask,
            initializing=self.is_initializing(),
        )


class Untracked(Norm):
    """The call of the layers without running statistics."""

    _norm: ClassVar[Callable[..., jax.Array]]

    @nn.compact
    def __call__(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
        """Normalizes x.

        Args:
          x: the input, of the shape that the class describes, any float dtype.
          mask: bool, with the rank of x and broadcasting against x. True marks entries to include.

        Returns:
          y, with the shape of x.
        """
        initializing = self.is_initializing()
        return self._norm(self, x, _params(self, x), mask=mask, initializing=initializing)


def _one_of(module: Norm, held: bool | None, given: bool | None) -> bool:
    """Returns use_running_average from the attribute or the call, of which one is not None."""
    if held is None and given is None:
        raise ValueError(
            f"{_where(module)}: use_running_average should be given, as an attribute or to the "
            f"call, because it selects the statistics to normalize by, but is None; write "
            f"use_running_average=not train, and pass train to the model "
            f"[use-running-average-missing]"
        )
    if held is not None and given is not None:
        raise ValueError(
            f"{_where(module)}: use_running_average should be given once, because neither of the "
            f"two overrides the other, but is {held} as an attribute and {given} in the call; "
            f"leave it out of one of them [use-running-average-twice]"
        )
    return cast(bool, given if held is None else held)


def _where(module: Norm) -> str:
    """Returns the name of the class, and the path of the layer in a model."""
    path = "/".join(module.path)
    return type(module).__name__ + (f" ({path})" if path else "")


def _shape(module: Norm, x: ArrayLike) -> tuple[int, ...]:
    return tuple(jnp.shape(x)[a] for a in module._param_axes(module, jnp.ndim(x)))


def _params(module: Norm, x: ArrayLike) -> Affine:
    """Returns the parameters of the layer, and creates them at initialization."""
    shape = _shape(module, x)
    names = [name for name in ("scale", "bias") if getattr(module, f"use_{name}", False)]
    try:
        params = {
            name: module.param(name, getattr(module, f"{name}_init"), shape, module.param_dtype)
            for name in names
        }
    except errors.ScopeParamShapeError as error:
        held = (nn.unbox(module.get_variable("params", name)) for name in names)
        made = next(jnp.shape(a) for a in held if a is not None and jnp.shape(a) != shape)
        hint = checks.other_axis(type(module).__name__, made, jnp.shape(x))
        raise ValueError(
            f"{_where(module)}: the parameters should have the channels' shape {shape}, but were "
            f"made for {made}{hint}; {error} [params-shape]"
        ) from error
    return cast(Affine, params)


def _batch_stats(module: Norm, x: ArrayLike) -> BatchStats:
    """Returns the running statistics of the layer, and creates them at initialization."""
    if module.is_initializing():
        first = init_batch_stats(_shape(module, x), dtype=module.param_dtype)
        for key, value in first.items():
            module.variable("batch_stats", key, lambda value=value: value)
    keys = ("mean", "var", "count", "accumulation")
    found: dict[str, Any] = {key: module.get_variable("batch_stats", key) for key in keys}
    if all(value is None for value in found.values()):
        raise ValueError(
            f"{_where(module)}: the variables should hold this layer's batch_stats, because "
            f"it tracks running statistics, but do not; write model.apply({{'params': params, "
            f"'batch_stats': batch_stats}}, ...) with the batch_stats of init or of training, or "
            f"track_running_stats=False for a layer without them "
            f"[batch-stats-missing]"
        )
    return cast(BatchStats, found)


def _write_back(module: Norm, batch_stats: BatchStats) -> None:
    """Stores the updated statistics in the collection, which has to be mutable."""
    if not module.is_mutable_collection("batch_stats"):
        raise ValueError(
            f"{_where(module)}: batch_stats should be mutable, because the running "
            f"statistics are updated in training, but it is not; write y, updates = model.apply("
            f"variables, x, ..., mutable=['batch_stats']) and continue with "
            f"updates['batch_stats'], or use_running_average=True to evaluate, or "
            f"update_stats=False to leave them [batch-stats-not-mutable]"
        )
    for key, value in batch_stats.items():
        module.put_variable("batch_stats", key, value)
