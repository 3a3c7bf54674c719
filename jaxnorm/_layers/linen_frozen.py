"""Freezes norms in Linen models: a context for calls, and a mask for the optimizer."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from jaxnorm._stats import trees

# The flag is part of the keys of JAX's caches, so that jit traces again if it changes.
FROZEN = jax.make_user_context(False)


@contextlib.contextmanager
def frozen() -> Iterator[None]:
    """Freezes the norms that have running statistics, in the calls inside this context.

    The layers of `jaxnorm.linen` with running statistics normalize by them and do not update them,
    whatever `use_running_average` and `update_stats` the model gives them, and their scale and bias
    have gradient 0. The layers without running statistics, such as `LayerNorm`, are not
    affected.

    Use it as a context manager around the calls of a model or of a part of it, or as a decorator of
    `model.apply` or of a training step. It also takes effect inside jit, nn.scan and nn.remat. An
    optimizer with weight decay changes a scale whose gradient is 0: use `trainable_mask`.

    Returns:
      A context manager, which is a decorator as well.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jaxnorm.linen
      >>> x = jnp.array([[1.0], [3.0]])
      >>> layer = jaxnorm.linen.BatchNorm(use_running_average=False)
      >>> variables = layer.init(jax.random.key(0), x)
      >>> with jaxnorm.linen.frozen():
      ...     y, updates = layer.apply(variables, x, mutable=["batch_stats"])
      >>> print(y[:, 0].round(2), updates["batch_stats"]["count"])
      [1. 3.] 0

    References:
      torchvision.ops.FrozenBatchNorm2d, torchvision 0.28.
    """
    with FROZEN(True):
        yield


def trainable_mask(params: Mapping[str, Any], batch_stats: Mapping[str, Any]) -> Any:
    """Returns which parameters an optimizer trains while the norms are frozen: a mask for optax.

    A norm is frozen if it has running statistics, which are at its path in `batch_stats`. Leave
    norms out of `batch_stats` to train their scale and bias.

    Args:
      params: the parameters of a model, or their shapes.
      batch_stats: its running statistics, or those of the norms to freeze.

    Returns:
      A tree with the structure of params: False for scale and bias of the norms, and True for the
      other parameters.

    Raises:
      ValueError: if no norm in batch_stats has a scale or a bias in params: no parameter is
        frozen then, and no mask is needed.

    Example:
      >>> import jaxnorm.linen
      >>> params = {"Dense_0": {"kernel": 0.5}, "BatchNorm_0": {"bias": 0.0, "scale": 1.0}}
      >>> batch_stats = {"BatchNorm_0": jaxnorm.init_batch_stats(1)}
      >>> mask = jaxnorm.linen.trainable_mask(params, batch_stats)
      >>> mask
      {'BatchNorm_0': {'bias': False, 'scale': False}, 'Dense_0': {'kernel': True}}

      >>> import optax
      >>> tx = optax.partition({True: optax.adamw(1e-3), False: optax.set_to_zero()}, mask)

    References:
      optax.partition, optax 0.2.
    """
    norms = {trees.names(path) for path, _ in trees.find(batch_stats)}

    def trainable(path: tuple[Any, ...], _: Any) -> bool:
        # A parameter in a box of Flax has the path of the box, and the box's attribute.
        names = trees.names(path)
        return not any(
            name in ("scale", "bias") and names[:i] in norms for i, name in enumerate(names)
        )

    mask = jax.tree_util.tree_map_with_path(trainable, params)
    if all(jax.tree.leaves(mask)):
        raise ValueError(
            f"trainable_mask: params should hold the scale or the bias of a norm in batch_stats, "
            f"because these are not trained, but holds none for the norms "
            f"{sorted('/'.join(norm) for norm in norms)}; write trainable_mask("
            f"variables['params'], variables['batch_stats']) [nothing-to-freeze]"
        )
    return mask
