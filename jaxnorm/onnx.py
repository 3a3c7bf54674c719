"""How does a model leave for ONNX? In evaluation, each norm as one of ONNX's own operators.

While jax2onnx traces, the two functions that every norm runs through give way to one primitive,
and the primitive becomes one node. What no operator computes is left to the two functions, and
becomes as many nodes as they take.
"""

import contextvars
import dataclasses
import functools
import math
import os
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jax2onnx
import numpy as np
import onnx
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching
from jax2onnx.plugins._patching import AssignSpec, MonkeyPatchSpec
from jax2onnx.plugins.plugin_system import PrimitiveLeafPlugin, register_primitive

from jaxnorm import _arguments, _checks, _platforms, functional
from jaxnorm._devices import HERE, Devices
from jaxnorm._layout import Layout
from jaxnorm._normalize import affine
from jaxnorm._sample import select
from jaxnorm.variables import statistics_dtype

# Operator -> the opset from which on it is what is written here.
OPSETS = {
    "InstanceNormalization": 6,
    "BatchNormalization": 15,
    "LayerNormalization": 17,
    "GroupNormalization": 21,  # that of opset 18 has one scale for a whole group
    "RMSNormalization": 23,
}


@dataclasses.dataclass(frozen=True)
class Options:
    """The arguments of `to_onnx` that the norms ask for while they are traced."""

    native: bool = True
    update_stats: bool | None = None


# The default holds for `jax2onnx.to_onnx` itself; it is frozen.
OPTIONS = contextvars.ContextVar("options", default=Options())  # noqa: B039
# jax2onnx replaces functions of jax.numpy while it traces: jnp.shape then gives a traced array.
JNP = types.SimpleNamespace(**vars(jnp))
# A graph is for no platform, and jax2onnx knows no choice among them.
LAX = types.SimpleNamespace(**vars(lax))
LAX.platform_dependent = lambda *args, default, **platforms: default(*args)


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
        with _platforms.formulated_for("cuda"):
            model = jax2onnx.to_onnx(fn, inputs, opset=opset, return_mode="proto", **options)
    finally:
        OPTIONS.reset(token)
    # Where it moves transposes, jax2onnx leaves some sizes between the nodes as they were before.
    del model.graph.value_info[:]
    model = onnx.shape_inference.infer_shapes(model)
    if output_path is not None:
        onnx.save_model(model, output_path)
    return model


def _never_true(update_stats: Any) -> bool | None:
    """The argument of `to_onnx`, checked."""
    if update_stats is None or not _arguments.boolean("to_onnx", "update_stats", update_stats):
        return update_stats
    raise ValueError(
        "to_onnx: update_stats should be False or None, because a graph keeps no state, but is "
        "True; write update_stats=False to normalize by the batch, or by each sample, and to leave "
        "the running statistics"
    )


# ---- Which operator? ----


@dataclasses.dataclass(frozen=True)
class Operator:
    """One of ONNX's operators, and how a norm's x and parameters lie in it.

    Attributes:
      name: the operator's name.
      parts: for each axis of its input, the axes of x that it is made of: none, one, or several.
      shape: the shape of its scale and bias.
      num_groups: that of GroupNormalization.
    """

    name: str
    parts: tuple[tuple[int, ...], ...]
    shape: tuple[int, ...]
    num_groups: int | None = None

    @property
    def of_rows(self) -> bool:
        """Whether it normalizes the last axes, whatever axes are in front; or (N, C, *space)."""
        return self.name in ("LayerNormalization", "RMSNormalization")

    def attributes(self, dtype: Any) -> dict[str, Any]:
        """Its attributes, but for epsilon."""
        if self.name in ("BatchNormalization", "InstanceNormalization"):
            return {}
        if self.of_rows:
            return {"axis": -len(self.shape), "stash_type": int(dtype)}
        return {"num_groups": self.num_groups, "stash_type": int(dtype)}


def _tracked_norm(original: Callable[..., Any]) -> Callable[..., Any]:
    """Stands for `tracked_norm`: y by the state, which stays as it is, or by x itself."""

    @functools.wraps(original)
    def norm(function, x, params, batch_stats, **options):
        x = _checks.float_array(function, x)
        axes = options["channel_axis"], options.get("batch_axis")
        layout = _checks.layout(function, x.ndim, *axes)
        first = () if layout.batch is None else (layout.batch,)
        statistics, mask = {}, None
        if OPTIONS.get().update_stats is not None:
            options["update_stats"] = OPTIONS.get().update_stats
        if _by_state(function, batch_stats, options):
            state = _checks.batch_stats(function, batch_stats, layout.shape(x))
            statistics = {key: state[key] for key in ("mean", "var")}
            mask = _checks.mask(function, options["mask"], x.shape)
            # By the state, all axes but the channels' are alike: any can be the first.
            operator = _of_channels("BatchNormalization", layout, first or layout.reduced[:1], x)
        else:
            # Without a batch axis, as in batch norm, x is one sample.
            operator = _of_channels("InstanceNormalization", layout, first, x)
            _alone(function, options.get("entries_on", HERE))
            special = (options.get(key) for key in ("mask", "limits", "virtual_batch_size"))
            if any(option is not None for option in special):
                operator = None
            else:
                _checks.several_values(function, x.shape, layout, 1)

        def plain(x, params, statistics):
            state = {**batch_stats, **statistics} if statistics else batch_stats
            return original(function, x, params, state, **options)[0]

        run = functools.partial(_by_operator, function, operator, plain, layout)
        how = {key: options[key] for key in ("epsilon", "dtype")}
        return run(x, params, statistics, mask=mask, **how), batch_stats

    return norm


def _untracked_norm(original: Callable[..., Any]) -> Callable[..., Any]:
    """Stands for `untracked_norm`."""

    @functools.wraps(original)
    def norm(function, x, params, layout, sample, *, epsilon, mask, dtype):
        _alone(function, sample.devices)
        groups = sample.groups or sample.split
        reduced = () if sample.split else sample.axes  # or they count the split axis as two
        kept = tuple(a for a in range(x.ndim) if a not in (*reduced, *layout.channels))
        operator = None
        if mask is None and groups is not None:
            operator = _of_channels("GroupNormalization", layout, kept, x, groups[1])
        elif mask is None and layout.channels:
            name = "LayerNormalization" if sample.centred else "RMSNormalization"
            parts = tuple((a,) for a in (*kept, *layout.channels))
            operator = Operator(name, parts, layout.shape(x))

        def plain(x, params, _):
            options = {"epsilon": epsilon, "mask": mask, "dtype": dtype}
            return original(function, x, params, layout, sample, **options)

        run = functools.partial(_by_operator, function, operator, plain, layout)
        return run(x, params, {}, mask=None, epsilon=epsilon, dtype=dtype)

    return norm


def _by_state(function: str, batch_stats: Any, options: dict[str, Any]) -> bool:
    """Whether the running statistics normalize; they do not move."""
    switches = options["use_running_average"], options["update_stats"]
    by_state, moves = _arguments.switches(function, batch_stats is not None, *switches)
    if moves:
        raise ValueError(
            f"{function}: the running statistics should not move in an export, because a graph "
            f"keeps no state, but they do with use_running_average={switches[0]} and "
            f"update_stats={switches[1]}; to evaluate, write use_running_average=True, in NNX "
            f"model.eval(); to normalize by the batch, or by each sample, write "
            f"update_stats=False, or to_onnx(..., update_stats=False) for all norms"
        )
    return by_state


def _alone(function: str, devices: Devices) -> None:
    """The statistics of x need no other device."""
    if devices != HERE:
        raise ValueError(
            f"{function}: axis_name should be None in an export, because a graph runs on one "
            f"device, but is {devices.axis_name!r}; write axis_name=None"
        )


def _of_channels(
    name: str, layout: Layout, first: Sequence[int], x: jax.Array, num_groups: int | None = None
) -> Operator:
    """An operator on (N, C, *space), where N is made of the first axes."""
    rest = (a for a in range(x.ndim) if a not in (*first, *layout.channels))
    parts = (tuple(first), layout.channels, *((a,) for a in rest))
    return Operator(name, parts, (math.prod(layout.shape(x)),), num_groups)


# ---- From x to y ----


def _by_operator(function, operator, plain, layout, x, params, statistics, *, mask, epsilon, dtype):
    """y by the operator, or plainly: where there is none, or where a graph could not name it."""
    scale, bias = _checks.params(function, params, x.shape, layout.shape(x))
    params = {key: a for key, a in (("scale", scale), ("bias", bias)) if a is not None}
    if operator is None or not OPTIONS.get().native or not _constant(epsilon, *operator.shape):
        return plain(x, params, statistics)

    @jax.custom_jvp
    def by_operator(x, params, statistics):
        wide = x.astype(statistics_dtype(x.dtype))
        (scale, bias), after = _split(operator, layout, params, x)
        scale = np.ones(operator.shape, wide.dtype) if scale is None else scale
        bias = np.zeros(operator.shape, wide.dtype) if bias is None else bias
        operands = (scale,) if operator.name == "RMSNormalization" else (scale, bias)
        order = [a for part in operator.parts for a in part]
        moved = lax.transpose(wide, order)
        y = norm_p.bind(
            lax.reshape(moved, [math.prod(x.shape[a] for a in part) for part in operator.parts]),
            *operands,
            *(statistics[key] for key in ("mean", "var") if statistics),
            function=function,
            operator=operator,
            epsilon=float(epsilon),
        )
        y = lax.transpose(lax.reshape(y, moved.shape), np.argsort(order).tolist())
        y = affine(y, *(None if a is None else layout.spread(a) for a in after))
        return select(mask, y).astype(x.dtype if dtype is None else dtype)

    # No operator has a derivative: a function that asks for one gets what JAX makes of the norm's.
    by_operator.defjvp(lambda primals, tangents: jax.jvp(plain, primals, tangents))
    return by_operator(x, params, statistics)


def _constant(epsilon: Any, *sizes: Any) -> bool:
    """Whether the attributes and the shape of the parameters are known now."""
    return not isinstance(epsilon, jax.core.Tracer) and all(isinstance(n, int) for n in sizes)


def _split(operator, layout, params, x):
    """Scale and bias for the operator, and those that follow it; None for neither."""
    scale, bias = params.get("scale"), params.get("bias")
    if scale is not None and not _along(layout, scale, x):
        return (None, None), (scale, bias)
    if bias is not None and (operator.name == "RMSNormalization" or not _along(layout, bias, x)):
        return (scale, None), (None, bias)
    return (scale, bias), (None, None)


def _along(layout: Layout, a: jax.Array, x: jax.Array) -> bool:
    """Whether a parameter has one entry for each channel, in the order of the channels."""
    if a.ndim == len(layout.channels):
        return True
    sizes = tuple(n if i in layout.channels else 1 for i, n in enumerate(x.shape))
    return a.shape == sizes and layout.channels == tuple(sorted(layout.channels))


# ---- The primitive, and its node ----

norm_p = Primitive("jaxnorm")
norm_p.def_abstract_eval(lambda x, *operands, **params: x)


def _batched(args, dims, **params):
    """Members of a vmap are more samples for one node; with their own parameters, a node each."""
    (x, *operands), (axis, *others) = args, dims
    if any(d is not None for d in others):
        size = next(a.shape[d] for a, d in zip(operands, others, strict=True) if d is not None)
        rows = (
            [a] * size if d is None else jnp.unstack(a, axis=d)
            for a, d in zip(args, dims, strict=True)
        )
        members = [norm_p.bind(*row, **params) for row in zip(*rows, strict=True)]
        return jnp.stack(members), 0
    x = jnp.moveaxis(x, axis, 0)
    if params["operator"].of_rows:
        return norm_p.bind(x, *operands, **params), 0
    y = norm_p.bind(lax.reshape(x, (x.shape[0] * x.shape[1], *x.shape[2:])), *operands, **params)
    return lax.reshape(y, x.shape), 0


batching.primitive_batchers[norm_p] = _batched


@register_primitive(jaxpr_primitive=norm_p.name)
class NormPlugin(PrimitiveLeafPlugin):
    """What jax2onnx asks: what to replace while it traces, and what becomes of the primitive."""

    _PRIM = norm_p

    @classmethod
    def binding_specs(cls) -> list[AssignSpec | MonkeyPatchSpec]:
        """The norms' two functions, and jax.numpy and jax.lax for this package alone."""
        files = [m for name, m in list(sys.modules.items()) if name.startswith("jaxnorm.")]
        return [
            *(AssignSpec(file, "jnp", JNP) for file in files if hasattr(file, "jnp")),
            *(AssignSpec(file, "lax", LAX) for file in files if hasattr(file, "lax")),
            MonkeyPatchSpec(functional, "tracked_norm", _tracked_norm),
            MonkeyPatchSpec(functional, "untracked_norm", _untracked_norm),
        ]

    def lower(self, ctx: Any, eqn: Any) -> None:
        """Adds the node."""
        operator, function = eqn.params["operator"], eqn.params["function"]
        if ctx.opset < OPSETS[operator.name]:
            raise ValueError(
                f"to_onnx: opset should be at least {OPSETS[operator.name]}, because {function} "
                f"becomes {operator.name} as of then, but is {ctx.opset}; native=False makes do "
                f"without the operator"
            )
        x = ctx.get_value_for_var(eqn.invars[0])
        y = getattr(ctx.builder, operator.name)(
            x,
            *(_operand(ctx, var, operator.shape, x.dtype) for var in eqn.invars[1:]),
            epsilon=eqn.params["epsilon"],
            **operator.attributes(x.dtype),
            _outputs=[ctx.fresh_name(operator.name)],
        )
        y.type, y.shape = x.type, x.shape
        ctx.bind_value_for_var(eqn.outvars[0], y)


def _operand(ctx, var, shape, dtype):
    """A parameter in the operator's shape and in x's dtype, an initializer if it is a constant."""
    value = ctx.get_value_for_var(var)
    if value.const_value is not None:
        a = value.const_value.numpy()
        if a.shape == shape and value.dtype == dtype:
            return value
        return ctx.bind_const_for_var(object(), a.astype(dtype.numpy()).reshape(shape))
    if value.dtype != dtype:
        value = ctx.builder.Cast(value, to=int(dtype))
    if var.aval.shape != shape:
        value = ctx.builder.Reshape(value, ctx.bind_const_for_var(object(), np.asarray(shape)))
    return value
