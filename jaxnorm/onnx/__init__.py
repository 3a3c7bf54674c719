"""The export to ONNX, in which each norm becomes one operator of ONNX."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax2onnx
import onnx

from jaxnorm._core import arguments, platforms
from jaxnorm.onnx import _plugin as _plugin  # registers the norms with jax2onnx
from jaxnorm.onnx._operators import OPTIONS, Options


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
    """Exports a function or a Flax model in evaluation, each norm as one ONNX operator.

    By `jax2onnx.to_onnx`, which knows the norms of this package once this file is imported. It
    leaves what it has traced in JAX's caches, where later calls of jitted functions find it, and
    takes from there what it should trace: all of them are emptied before and after.

    A norm by running statistics becomes BatchNormalization, with the statistics in the graph; a
    mask on it becomes a Where. Parameters of x's rank that vary over more than the channels follow
    their operator as Mul and Add, and so does the bias of an RMS norm. What no operator computes
    becomes ordinary operators: any other mask, batch renorm and virtual batches by the batch, an
    epsilon that is computed, features without a fixed number.

    How accurate an operator is, is up to the runtime: see docs/onnx.md for data far from zero.

    Args:
      fn: a function of arrays that closes over parameters and state: of `jaxnorm.batch_norm` and
        the others, of `model.apply` in Linen; or an NNX model in evaluation.
      inputs: for each argument its shape, with names for the sizes that vary, as in
        ("B", 28, 28, 3); or a jax.ShapeDtypeStruct, or an array.
      opset: the version of ONNX's operators; GroupNormalization needs 21, RMSNormalization 23.
      native: whether norms become ONNX's operators; False: ordinary operators, which compute as
        the norms of this package do, and need no newer opset.
      update_stats: False: every norm of this package is called with update_stats=False, whatever
        the model says, so that a norm in training mode normalizes by the batch, or by each sample,
        and leaves its running statistics. None: as the model says, and running statistics that
        would move are an error, because the model may have been left in training mode by mistake.
      output_path: a file to write the model to, too.
      **options: the other options of `jax2onnx.to_onnx`, such as input_names or inputs_as_nchw.

    Returns:
      The model.

    Raises:
      ValueError: if a norm would move its running statistics; if update_stats is True; if a norm
        asks other devices (axis_name) for statistics of x; if the opset is older than a norm's
        operator.

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
    token = OPTIONS.set(Options(native, _never_true(update_stats)))
    try:
        # A GPU's formulation has neither a loop nor a choice of platforms. It clears the caches.
        with platforms.formulated_for("cuda"):
            model = jax2onnx.to_onnx(fn, inputs, opset=opset, return_mode="proto", **options)
    finally:
        OPTIONS.reset(token)
    # Where it moves transposes, jax2onnx leaves some sizes between the nodes as they were before.
    del model.graph.value_info[:]
    model = onnx.shape_inference.infer_shapes(model)
    if output_path is not None:
        onnx.save_model(model, output_path)
    return model


def _never_true(update_stats: bool | None) -> bool | None:
    """The argument of `to_onnx`, checked."""
    if update_stats is None or not arguments.boolean("to_onnx", "update_stats", update_stats):
        return update_stats
    raise ValueError(
        "to_onnx: update_stats should be False or None, because a graph keeps no state, but is "
        "True; write update_stats=False to normalize by the batch, or by each sample, and to leave "
        "the running statistics"
    )
