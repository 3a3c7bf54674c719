"""Mistakes that type checkers report; test_types.py checks the error code in each comment.

This file is never run.
"""

import jax
from flax import nnx

import jaxnorm
from jaxnorm import Affine, BatchStats, interop


def functions(x: jax.Array, params: Affine, state: BatchStats, either: BatchStats | None) -> None:
    # A misspelled name.
    jaxnorm.linnen.BatchNorm()  # rejected: attr-defined
    # A misspelled argument.
    jaxnorm.batch_norm(x, params, state, momentun=0.1)  # rejected: call-arg
    jaxnorm.batch_renorm(x, params, state, rmax=2.0)  # rejected: call-overload
    jaxnorm.layer_norm(x, eps=1e-6)  # rejected: call-arg

    # Batch renorm has no meaning without a state.
    jaxnorm.batch_renorm(x)  # rejected: call-overload
    jaxnorm.batch_renorm(x, params, r_max=2.0)  # rejected: call-overload
    jaxnorm.batch_renorm(x, params, None)  # rejected: call-overload
    jaxnorm.batch_renorm(x, params, either)  # rejected: arg-type

    # An option of another type.
    jaxnorm.batch_norm(x, params, state, epsilon="small")  # rejected: arg-type
    jaxnorm.batch_renorm(x, params, state, r_max="large")  # rejected: call-overload
    jaxnorm.batch_norm(x, params, state, use_running_average="no")  # rejected: arg-type
    jaxnorm.group_norm(x, num_groups=2.0)  # rejected: arg-type

    # A state in another place, an option by position, and a dict with other keys.
    jaxnorm.batch_norm(x, state)  # rejected: arg-type
    jaxnorm.batch_norm(x, params, state, 0.1)  # rejected: call-arg, arg-type
    jaxnorm.batch_norm(x, params, {"running_mean": x})  # rejected: type-var
    print(state["running_mean"])  # rejected: typeddict-item

    # Without a state, there is no new state.
    _, new = jaxnorm.batch_norm(x, params)
    print(new["mean"])  # rejected: index
    _, new_or_none = jaxnorm.instance_norm(x, params, either)
    print(new_or_none["mean"])  # rejected: index


def layers(x: jax.Array, rngs: nnx.Rngs) -> None:
    jaxnorm.linen.BatchNorm(momentun=0.1)  # rejected: call-arg
    jaxnorm.linen.BatchNorm(epsilon="small")  # rejected: arg-type
    jaxnorm.nnx.BatchNorm(2, momentun=0.1, rngs=rngs)  # rejected: call-arg
    jaxnorm.nnx.BatchRenorm(2, momentun=0.1, rngs=rngs)  # rejected: call-arg
    jaxnorm.nnx.BatchRenorm(2, epsilon="small", rngs=rngs)  # rejected: arg-type
    jaxnorm.nnx.InstanceNorm2d(2)  # rejected: call-arg

    layer = jaxnorm.nnx.BatchNorm(2, rngs=rngs)
    layer(x, training=True)  # rejected: call-arg
    print(layer.running_mean)  # rejected: attr-defined
    print(layer.scale[...])  # rejected: index
    layer.use_running_average = "no"  # rejected: assignment


def conversion(params: Affine) -> None:
    interop.to_torch({"params": params}, name={})  # rejected: call-arg
    interop.from_torch({}, count="three")  # rejected: arg-type
