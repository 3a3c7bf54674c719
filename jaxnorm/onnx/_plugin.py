"""Defines the plugin of jax2onnx, which replaces functions at trace time and creates the nodes."""

import sys
import types
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax2onnx.plugins._patching import AssignSpec, MonkeyPatchSpec
from jax2onnx.plugins.plugin_system import PrimitiveLeafPlugin, register_primitive

from jaxnorm import functional
from jaxnorm.onnx._operators import tracked_norm, untracked_norm
from jaxnorm.onnx._primitive import norm_p

# The first opset in which each operator has the definition that is used here.
OPSETS = {
    "InstanceNormalization": 6,
    "BatchNormalization": 15,
    "LayerNormalization": 17,
    "GroupNormalization": 21,  # in opset 18 it has one scale per group
    "RMSNormalization": 23,
}
# jax2onnx replaces functions of jax.numpy while it traces: jnp.shape then gives a traced array.
JNP = types.SimpleNamespace(**vars(jnp))
# A graph has no platform, and jax2onnx does not support a choice of platforms.
LAX = types.SimpleNamespace(**vars(lax))
LAX.platform_dependent = lambda *args, default, **platforms: default(*args)


@register_primitive(jaxpr_primitive=norm_p.name)
class NormPlugin(PrimitiveLeafPlugin):
    """The interface to jax2onnx: the replacements at trace time, and the conversion to a node."""

    _PRIM = norm_p

    @classmethod
    def binding_specs(cls) -> list[AssignSpec | MonkeyPatchSpec]:
        """Returns the replacements of the two norm functions and of this package's jnp and lax."""
        files = [m for name, m in list(sys.modules.items()) if name.startswith("jaxnorm.")]
        return [
            *(AssignSpec(file, "jnp", JNP) for file in files if hasattr(file, "jnp")),
            *(AssignSpec(file, "lax", LAX) for file in files if hasattr(file, "lax")),
            MonkeyPatchSpec(functional, "tracked_norm", tracked_norm),
            MonkeyPatchSpec(functional, "untracked_norm", untracked_norm),
        ]

    def lower(self, ctx: Any, eqn: Any) -> None:
        """Adds the node."""
        operator, function = eqn.params["operator"], eqn.params["function"]
        if ctx.opset < OPSETS[operator.name]:
            raise ValueError(
                f"to_onnx: opset should be at least {OPSETS[operator.name]}, because {function} "
                f"becomes {operator.name}, which needs it, but is {ctx.opset}; write a higher "
                f"opset, or native=False to export without this operator"
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


def _operand(ctx: Any, var: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """Returns a parameter in the operator's shape and dtype, as an initializer if constant."""
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
