"""Folds norms with running statistics into the layers before them."""

from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxnorm._core import arguments, checks
from jaxnorm._core.normalize import affine, rstd
from jaxnorm._core.reduction import widen
from jaxnorm._core.variables import Affine, BatchStats
from jaxnorm._stats import state_checks, trees


def fold_scale_shift(
    params: Affine | None, batch_stats: BatchStats, *, epsilon: ArrayLike = 1e-5
) -> tuple[jax.Array, jax.Array]:
    r"""Converts a norm in evaluation to a multiplier and an offset: y = multiplier * x + offset.

    .. math::
        multiplier = \frac{scale}{\sqrt{var + \epsilon}}, \quad
        offset = bias - mean \cdot multiplier

    This applies to batch norm, and to instance norm with running statistics. If the mean is large
    compared to the standard deviation, this form is less accurate than the norm, which subtracts
    the mean first.

    Args:
      params: {"scale", "bias"}, each of shape (C,). Either or both may be missing.
      batch_stats: the state {"mean": (C,), "var": (C,), "count": ()}.
      epsilon: the epsilon of the norm, in units of x squared.

    Returns:
      The multiplier and the offset, of shape (C,), in the dtype of the statistics.

    Raises:
      ValueError: if the shapes of params and batch_stats do not match.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxnorm
      >>> state = {"mean": jnp.array([3.0]), "var": jnp.array([4.0]), "count": jnp.int32(9)}
      >>> multiplier, offset = jaxnorm.fold_scale_shift(None, state, epsilon=0.0)
      >>> print(multiplier, offset)
      [0.5] [-1.5]

    References:
      Jacob et al., Quantization and Training of Neural Networks, 2018, section 3.2.
      https://arxiv.org/abs/1712.05877
    """
    state = state_checks.batch_stats("fold_scale_shift", batch_stats)
    mean, var = widen(state["mean"]), widen(state["var"])
    scale, bias = checks.params("fold_scale_shift", params, mean.shape, mean.shape)
    number = arguments.number("fold_scale_shift", "epsilon", epsilon, least=0)
    multiplier = affine(rstd(var, jnp.asarray(number, float)), scale, None)
    return multiplier, affine(-mean * multiplier, None, bias)


def fold_into(
    layer: Mapping[str, Any],
    params: Affine | None,
    batch_stats: BatchStats,
    *,
    epsilon: ArrayLike = 1e-5,
    feature_axis: int = -1,
) -> dict[str, jax.Array]:
    """Folds a norm in evaluation into the Dense, Conv or ConvTranspose before it.

    The new layer replaces both the layer and the norm. The kernel may have any rank, and may be
    grouped or depthwise, because its outputs are along one axis.

    Args:
      layer: {"kernel": ..., "bias": (C,)}; the bias may be missing.
      params: the parameters of the norm, as in `fold_scale_shift`.
      batch_stats: the running statistics of the norm.
      epsilon: the epsilon of the norm.
      feature_axis: the axis of the outputs in the kernel. Defaults to the last axis, as in Flax;
        use -2 for a flax.linen.ConvTranspose with transpose_kernel=True.

    Returns:
      {"kernel", "bias"} of the new layer, in the dtype of the kernel. The layer needs
      use_bias=True.

    Raises:
      ValueError: if there is no kernel, or its number of outputs differs from the number of
        channels of the norm.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxnorm
      >>> state = {"mean": jnp.array([3.0]), "var": jnp.array([4.0]), "count": jnp.int32(9)}
      >>> print(jaxnorm.fold_into({"kernel": jnp.array([[6.0]])}, None, state, epsilon=0.0))
      {'kernel': Array([[3.]], dtype=float32), 'bias': Array([-1.5], dtype=float32)}

    References:
      torch.nn.utils.fusion.fuse_conv_bn_weights, PyTorch 2.13.
    """
    if not isinstance(layer, Mapping) or "kernel" not in layer:
        raise ValueError(
            f"fold_into: layer should have a 'kernel', as Dense, Conv and ConvTranspose have, but "
            f"has {sorted(layer) if isinstance(layer, Mapping) else type(layer).__name__}"
        )
    multiplier, offset = fold_scale_shift(params, batch_stats, epsilon=epsilon)
    kernel = jnp.asarray(layer["kernel"])
    (last,) = arguments.axes("fold_into", "feature_axis", feature_axis, kernel.ndim)
    outputs = kernel.shape[last]
    if multiplier.shape != (outputs,):
        raise ValueError(
            f"fold_into: the layer should have as many outputs as the norm has channels, but has "
            f"{outputs}, on axis {feature_axis} of a kernel of shape {kernel.shape}, for "
            f"{multiplier.shape}"
        )
    others = tuple(a for a in range(kernel.ndim) if a != last)
    wide = widen(kernel, multiplier) * jnp.expand_dims(multiplier, others)
    bias = layer.get("bias")
    bias = offset if bias is None else affine(widen(jnp.asarray(bias)), multiplier, offset)
    return {"kernel": wide.astype(kernel.dtype), "bias": bias.astype(kernel.dtype)}


def fold_variables(
    variables: Mapping[str, Any],
    pairs: Mapping[str, str],
    *,
    epsilon: ArrayLike = 1e-5,
    feature_axis: int = -1,
) -> dict[str, Any]:
    """Folds norms of a whole model into the layers before them.

    Args:
      variables: {"params": ..., "batch_stats": ...}, as in Linen.
      pairs: maps each layer to the norm after it: {"Block_0.Conv_0": "Block_0.BatchNorm_0"}. The
        names of the modules are joined by dots; in a list, the index is the name. The input of the
        norm must be the output of the layer, and nothing else may use that output.
      epsilon: the epsilon of the norms.
      feature_axis: the axis of the outputs in the kernels, as in `fold_into`.

    Returns:
      The variables of the model without these norms. Its folded layers have a bias.

    Raises:
      ValueError: if a name does not exist, a norm is listed twice, or a layer and its norm do not
        match. The error names the pair.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxnorm
      >>> state = {"mean": jnp.array([3.0]), "var": jnp.array([4.0]), "count": jnp.int32(9)}
      >>> variables = {"params": {"Dense_0": {"kernel": jnp.array([[6.0]])}},
      ...              "batch_stats": {"BatchNorm_0": state}}
      >>> folded = jaxnorm.fold_variables(variables, {"Dense_0": "BatchNorm_0"}, epsilon=0.0)
      >>> print(folded["params"]["Dense_0"]["bias"], folded["batch_stats"])
      [-1.5] {}

    References:
      torch.nn.utils.fusion.fuse_conv_bn_eval, PyTorch 2.13.
    """
    params, stats = (variables.get(name, {}) for name in ("params", "batch_stats"))
    if len(set(pairs.values())) != len(pairs):
        raise ValueError(f"fold_variables: pairs should name each norm once, but are {dict(pairs)}")
    for layer, norm in pairs.items():
        state, affine_params = (trees.at(tree, norm.split(".")) for tree in (stats, params))
        if not isinstance(state, Mapping):
            raise ValueError(
                f"fold_variables: pairs should name norms with running statistics, but "
                f"batch_stats have no {norm!r}"
            )
        kernel_and_bias = trees.at(params, layer.split("."))
        if not isinstance(kernel_and_bias, Mapping):
            raise ValueError(
                f"fold_variables: pairs should name layers of the model, but params have no "
                f"{layer!r}"
            )
        try:
            folded = fold_into(
                kernel_and_bias,
                affine_params,
                cast(BatchStats, state),
                epsilon=epsilon,
                feature_axis=feature_axis,
            )
        except ValueError as error:
            raise ValueError(f"fold_variables: {norm!r} into {layer!r}: {error}") from error
        stats = trees.replaced(stats, norm.split("."), None)
        params = trees.replaced(params, layer.split("."), folded)
        params = trees.replaced(params, norm.split("."), None)
    return {**variables, "params": params, "batch_stats": stats}
