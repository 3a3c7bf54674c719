"""Exports functions and models to ONNX, with one ONNX operator for each norm."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax2onnx
import onnx

from jaxnorm._core import arguments, platforms
from jaxnorm.onnx import _plugin as _plugin  # registers the norms with jax2onnx
from jaxnorm.onnx._operators import OPTIONS, ExportOptions


def to_onnx(
    fn: Callable[..., Any],
    inputs: Sequence[Any],
    *,
    opset: int = 23,
    native: bool = True,
    update_stats: bool | None = None,
    output_path: str | os.PathLike[str] | None = None,
    **options: Any,
) -> onnx.ModelProto:
    """Exports a function or a Flax model in evaluation, with one ONNX operator for each norm.

    This calls `jax2onnx.to_onnx`, which supports the norms of this package once this module is
    imported. JAX's caches are cleared before and after, because jax2onnx would reuse the traces of
    earlier calls, and later calls of jitted functions would reuse those of jax2onnx.

    A norm with running statistics becomes BatchNormalization, with the statistics in the graph; a
    mask on it becomes a Where. Parameters with the rank of x that vary over more axes than the
    channels become Mul and Add after the operator, and so does the bias of an RMS norm. Ordinary
    operators are used for a mask on a norm that does not use running statistics, for batch renorm
    and virtual batches that normalize by the batch, for a traced epsilon, and for a symbolic number
    of features.

    The accuracy of an operator depends on the runtime: see docs/onnx.md for data far from zero.

    Args:
      fn: a function of arrays that closes over parameters and state, for example one that calls
        `jaxnorm.batch_norm`, or `model.apply` in Linen; or an NNX model in evaluation mode.
      inputs: the shape of each argument, with names for the sizes that vary, as in
        ("B", 28, 28, 3); or a jax.ShapeDtypeStruct, or an array.
      opset: the version of ONNX's operators. GroupNormalization needs 21, RMSNormalization 23.
      native: whether norms become ONNX's norm operators. With False they become ordinary operators,
        which do the same computation as this package and do not need a recent opset.
      update_stats: False calls every norm of this package with update_stats=False, so that a norm
        in training mode normalizes by the batch, or by each sample, and does not update its running
        statistics. None keeps the setting of the model; running statistics that would be updated
        are then an error, because the model may be in training mode by mistake.
      output_path: a file to which the model is also written.
      **options: further options of `jax2onnx.to_onnx`, such as input_names or inputs_as_nchw.

    Returns:
      The ONNX model.

    Raises:
      ValueError: if a norm would update its running statistics; if update_stats is True; if a norm
        needs statistics of x from other devices (axis_name); if the opset is older than the
        operator of a norm.

    Example:
      >>> import jaxnorm
      >>> import jaxnorm.onnx
      >>> params, batch_stats = jaxnorm.init_params(3), jaxnorm.init_batch_stats(3)
      >>> def model(x):
      ...     return jaxnorm.batch_norm(x, params, batch_stats, use_running_average=True)[0]
      >>> exported = jaxnorm.onnx.to_onnx(model, [("B", 3)])
      >>> print([node.op_type for node in exported.graph.node])
      ['BatchNormalization']

    References:
      ONNX operators, opset 23. https://onnx.ai/onnx/operators
      jax2onnx 0.17.1. https://github.com/enpasos/jax2onnx
    """
    token = OPTIONS.set(ExportOptions(native, _checked(update_stats)))
    try:
        # The formulation for GPU has no loop and no choice of platforms. This clears the caches.
        with platforms.formulated_for("cuda"):
            model = jax2onnx.to_onnx(fn, inputs, opset=opset, return_mode="proto", **options)
    finally:
        OPTIONS.reset(token)
    # jax2onnx does not update some shapes between nodes when it moves transposes.
    del model.graph.value_info[:]
    model = onnx.shape_inference.infer_shapes(model)
    if output_path is not None:
        onnx.save_model(model, output_path)
    return model


def _checked(update_stats: bool | None) -> bool | None:
    """Checks that the argument of `to_onnx` is False or None."""
    if update_stats is None or not arguments.boolean("to_onnx", "update_stats", update_stats):
        return update_stats
    raise ValueError(
        "to_onnx: update_stats should be False or None, because a graph keeps no state, but is "
        "True; write update_stats=False to normalize by the batch, or by each sample, and to leave "
        "the running statistics"
    )
