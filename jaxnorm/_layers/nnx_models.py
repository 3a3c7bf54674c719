"""Accumulation and recalibration in NNX models, for all layers at once."""

from collections.abc import Callable, Iterable
from typing import Any

from flax import nnx
from jax.typing import ArrayLike

import jaxnorm
from jaxnorm._core.variables import BatchStats
from jaxnorm._layers.nnx_base import Tracked, read_batch_stats, write_back


def begin_accumulation(model: nnx.Module, when: ArrayLike = True) -> None:
    """Begins one update for several batches in all layers: `jaxnorm.begin_accumulation`.

    Args:
      model: a model with layers of `jaxnorm.nnx`, which are changed in place.
      when: a bool, which may be traced. If it is False, layers that already accumulate are not
        restarted; layers that do not accumulate begin in any case. Defaults to True.

    Raises:
      ValueError: if no layer of the model has running statistics, or if `when` is not a bool.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import jaxnorm.nnx
      >>> x = jnp.array([[0.0], [1.0], [5.0], [6.0]])
      >>> layer = jaxnorm.nnx.BatchNorm(1, rngs=nnx.Rngs(0))
      >>> jaxnorm.nnx.begin_accumulation(layer)
      >>> y = layer(x[:2]), layer(x[2:])
      >>> print(layer.mean[...], layer.count[...])
      [0.3] 1

    References:
      As `jaxnorm.begin_accumulation`.
    """
    layers = dict(tracking(model))
    states = {name: read_batch_stats(layer) for name, layer in layers.items()}
    for name, state in jaxnorm.begin_accumulation(states, when).items():
        layers[name].accumulation = nnx.BatchStat(state["accumulation"])


def end_accumulation(model: nnx.Module) -> None:
    """Ends accumulation in all layers; the running statistics stay as they are.

    Args:
      model: a model with layers of `jaxnorm.nnx`, which are changed in place.

    Example:
      >>> from flax import nnx
      >>> import jaxnorm.nnx
      >>> layer = jaxnorm.nnx.BatchNorm(1, rngs=nnx.Rngs(0))
      >>> jaxnorm.nnx.begin_accumulation(layer)
      >>> jaxnorm.nnx.end_accumulation(layer)
      >>> layer.accumulation is None
      True

    References:
      As `jaxnorm.end_accumulation`.
    """
    for _, layer in tracking(model):
        layer.accumulation = nnx.data(None)


def recalibrate(
    model: nnx.Module,
    batches: Iterable[Any],
    *,
    progress: Callable[[int], Any] | None = None,
    **call: Any,
) -> None:
    """Recomputes a model's running statistics from batches: `jaxnorm.recalibrate`.

    During the call, the layers of `jaxnorm.nnx` normalize by the batch, in any mode of the model.
    The modes of other layers, such as dropout, are not changed.

    Args:
      model: a model with layers of `jaxnorm.nnx`, whose running statistics are set at the end.
      batches: the data. Each batch is the first argument of the model; for pairs of inputs and
        labels, write `(x for x, _ in loader)`.
      progress: called after each batch with the number of batches done.
      **call: the other arguments of the model.

    Raises:
      ValueError: as `jaxnorm.recalibrate`, and if a layer is frozen. The model is not changed then.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import jaxnorm.nnx
      >>> x = jnp.array([[1.0], [2.0], [3.0], [6.0], [8.0]])
      >>> layer = jaxnorm.nnx.BatchNorm(1, rngs=nnx.Rngs(0))
      >>> jaxnorm.nnx.recalibrate(layer, [x[:2], x[2:]])
      >>> print(layer.mean[...], layer.var[...])
      [4.] [8.5]

    References:
      As `jaxnorm.recalibrate`.
    """
    for name, layer in tracking(model):
        if layer._frozen:
            raise ValueError(
                f"recalibrate: the norms should not be frozen, because frozen statistics are "
                f"not updated, but {name} is; write unfreeze(model) first [recalibrate-unmoved]"
            )
    graph, variables = nnx.split(model)

    def step(batch_stats: dict[str, Any], batch: Any, variables: Any) -> dict[str, BatchStats]:
        copy = nnx.merge(graph, variables, copy=True)
        layers = dict(tracking(copy))
        for name, layer in layers.items():
            layer.use_running_average, layer.update_stats = False, None
            layer.accumulation = nnx.BatchStat(batch_stats[name]["accumulation"])
            write_back(layer, batch_stats[name])
        copy(batch, **call)
        return {name: read_batch_stats(layer) for name, layer in layers.items()}

    layers = dict(tracking(model))
    states = {name: read_batch_stats(layer) for name, layer in layers.items()}
    new = jaxnorm.recalibrate(step, states, batches, variables, progress=progress)
    end_accumulation(model)
    for name, layer in layers.items():
        write_back(layer, new[name])


def tracking(model: nnx.Module) -> list[tuple[str, Tracked]]:
    """Returns the layers that have running statistics, by their paths in the model."""
    return [
        (".".join(map(str, path)) or type(module).__name__, module)
        for path, module in nnx.iter_modules(model)
        if isinstance(module, Tracked) and hasattr(module, "mean")
    ]
