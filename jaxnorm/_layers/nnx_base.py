"""The base classes of the layers in `jaxnorm.nnx`: their variables and their call."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import jax
from flax import nnx
from flax.typing import Dtype
from jax.typing import ArrayLike

from jaxnorm._core import arguments
from jaxnorm._core.collectives import AxisName
from jaxnorm._core.variables import Affine, BatchStats, init_batch_stats
from jaxnorm._layers import attributes, calls


class Norm(nnx.Module):
    """The attributes of every layer: the constructor's arguments, and the parameters."""

    num_features: int | Sequence[int]
    epsilon: float
    dtype: Dtype | None
    param_dtype: Dtype
    use_scale: bool
    axis_name: AxisName | None
    axis_index_groups: Sequence[Sequence[int]] | None
    use_fast_variance: bool
    promote_dtype: Callable[..., Any]
    scale: nnx.Param[jax.Array] | None
    bias: nnx.Param[jax.Array] | None

    if not TYPE_CHECKING:  # type checkers read the arguments of __init__

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            attributes.check_names(cls, kwargs)
            return super().__new__(cls)


class Tracked(Norm):
    """The attributes and the call of the layers that may have running statistics."""

    use_bias: bool
    use_running_average: bool | None
    momentum: float | None
    decay: float | None
    update_stats: bool | None
    track_running_stats: bool
    skip_nonfinite: bool
    mean: nnx.BatchStat[jax.Array]
    var: nnx.BatchStat[jax.Array]
    count: nnx.BatchStat[jax.Array]
    accumulation: nnx.BatchStat[Any] | None

    _norm: ClassVar[calls.TrackedNorm]
    _frozen: bool = False  # freeze() and unfreeze() set it
    ranks: ClassVar[tuple[int, ...] | None] = None

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Supports nnx.view, which selects the statistics to normalize by.

        Args:
          use_running_average: as the attribute; None leaves it.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average

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
          use_running_average: as the attribute, which it overrides.
          update_stats: as the attribute, which it overrides.
          mask: bool, with the rank of x and broadcasting against x. True marks entries to include.

        Returns:
          y, with the shape of x.
        """
        if use_running_average is None:
            use_running_average = self.use_running_average
        if self._frozen:
            use_running_average, update_stats = True, False
        batch_stats = None
        if self.track_running_stats:
            batch_stats = read_batch_stats(self)
            if use_running_average is None:
                raise ValueError(
                    f"{type(self).__name__}: use_running_average should be given, to the "
                    f"constructor or to the call, because it selects the statistics to "
                    f"normalize by, but is None; model.train() and model.eval() give it to all "
                    f"layers [use-running-average-missing]"
                )
        return calls.normalize_and_update(
            self,
            x,
            _params(self),
            batch_stats,
            write_back,
            use_running_average=use_running_average,
            update_stats=update_stats,
            mask=mask,
        )


class Untracked(Norm):
    """The call of the layers without running statistics."""

    _norm: ClassVar[Callable[..., jax.Array]]

    def __call__(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
        """Normalizes x.

        Args:
          x: the input, of the shape that the class describes, any float dtype.
          mask: bool, with the rank of x and broadcasting against x. True marks entries to include.

        Returns:
          y, with the shape of x.
        """
        return self._norm(self, x, _params(self), mask=mask)


def declare(module: Norm, given: dict[str, Any]) -> None:
    """Stores the constructor's arguments as attributes, as Flax does, and creates the variables."""
    making = ("self", "rngs", "scale_init", "bias_init", "scale_metadata", "bias_metadata")
    for name, value in given.items():
        if name not in making:
            setattr(module, name, value)
    attributes.check(module, infers_channels=False)
    shape = arguments.channels(type(module).__name__, module.num_features)
    for name in ("scale", "bias"):
        if given.get(f"use_{name}"):
            key, init = given["rngs"].params(), given[f"{name}_init"]
            value = init(key, shape, module.param_dtype)
            setattr(module, name, nnx.Param(value, **given[f"{name}_metadata"]))
        else:
            setattr(module, name, nnx.data(None))
    if isinstance(module, Tracked):
        module.accumulation = nnx.data(None)
        if module.track_running_stats:
            for name, value in init_batch_stats(shape, dtype=module.param_dtype).items():
                setattr(module, name, nnx.BatchStat(value))


def _params(module: Norm) -> Affine:
    params: Affine = {}
    if module.scale is not None:
        params["scale"] = module.scale[...]
    if module.bias is not None:
        params["bias"] = module.bias[...]
    return params


def read_batch_stats(module: Tracked) -> BatchStats:
    """Returns the running statistics of a layer."""
    batch_stats: BatchStats = {
        "mean": module.mean.get_value(),
        "var": module.var.get_value(),
        "count": module.count.get_value(),
    }
    if module.accumulation is not None:
        batch_stats["accumulation"] = module.accumulation.get_value()
    return batch_stats


def write_back(module: Tracked, batch_stats: BatchStats) -> None:
    """Stores the updated statistics in the layer's variables."""
    for key, value in batch_stats.items():
        getattr(module, key).set_value(value)  # [...] = would keep a half-precision dtype
