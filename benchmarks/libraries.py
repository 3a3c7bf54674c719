"""The norms of every JAX library, each as a pair of functions over plain trees.

`make(library, norm, shape, layout)` returns `params, state, apply`, where
`apply(params, state, x, training)` returns y and the new state. x is (N, *space, C), or
(N, C, *space) if the layout is "first".
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

NORMS = ("batch", "instance", "group32", "group4", "layer", "rms")
Made = tuple[Any, Any, Callable[..., tuple[jax.Array, Any]]]


class MissingError(Exception):
    """The library has no such norm, or not in this layout."""


def channels(shape: tuple[int, ...], layout: str) -> int:
    """Returns the number of channels of x."""
    return shape[1] if layout == "first" else shape[-1]


def make_jaxnorm(norm: str, shape: tuple[int, ...], layout: str) -> Made:
    """Makes the functions of jaxnorm."""
    import jaxnorm

    c, axis = channels(shape, layout), 1 if layout == "first" else -1
    params = jaxnorm.init_params(c, use_bias=norm != "rms")

    def stateless(f: Callable[..., jax.Array], **options: Any) -> Made:
        return params, None, lambda p, s, x, training: (f(x, p, **options), s)

    if norm == "batch":
        return (
            params,
            jaxnorm.init_batch_stats(c),
            lambda p, s, x, training: jaxnorm.batch_norm(
                x, p, s, use_running_average=not training, channel_axis=axis
            ),
        )
    if norm == "instance":
        return (
            params,
            None,
            lambda p, s, x, training: jaxnorm.instance_norm(x, p, channel_axis=axis),
        )
    if norm.startswith("group"):
        return stateless(jaxnorm.group_norm, num_groups=int(norm[5:]), channel_axis=axis)
    return stateless({"layer": jaxnorm.layer_norm, "rms": jaxnorm.rms_norm}[norm], axis=axis)


def make_linen(norm: str, shape: tuple[int, ...], layout: str) -> Made:
    """Makes the layers of flax.linen."""
    import flax.linen as nn

    axis = 1 if layout == "first" else -1
    if layout == "first" and norm.startswith(("group", "instance")):
        raise MissingError
    module = {
        "batch": lambda: nn.BatchNorm(axis=axis, momentum=0.9),
        "instance": nn.InstanceNorm,
        "layer": lambda: nn.LayerNorm(reduction_axes=axis, feature_axes=axis),
        "rms": lambda: nn.RMSNorm(reduction_axes=axis, feature_axes=axis),
    }.get(norm, lambda: nn.GroupNorm(int(norm[5:])))()

    def call(x: jax.Array, training: bool) -> dict[str, Any]:
        return {"use_running_average": not training} if norm == "batch" else {}

    variables = dict(module.init(jax.random.key(0), jnp.ones(shape), **call(None, True)))
    params = variables.pop("params")

    def apply(p: Any, s: Any, x: jax.Array, training: bool) -> tuple[jax.Array, Any]:
        if norm == "batch" and training:
            return module.apply({"params": p, **s}, x, mutable=["batch_stats"], **call(x, True))
        return module.apply({"params": p, **s}, x, **call(x, training)), s

    return params, variables, apply


def make_nnx(norm: str, shape: tuple[int, ...], layout: str) -> Made:
    """Makes the layers of flax.nnx, which are split and merged."""
    from flax import nnx

    c, axis, rngs = channels(shape, layout), 1 if layout == "first" else -1, nnx.Rngs(0)
    if layout == "first" and norm.startswith(("group", "instance")):
        raise MissingError
    module = {
        "batch": lambda: nnx.BatchNorm(c, axis=axis, momentum=0.9, rngs=rngs),
        "instance": lambda: nnx.InstanceNorm(c, rngs=rngs),
        "layer": lambda: nnx.LayerNorm(c, reduction_axes=axis, feature_axes=axis, rngs=rngs),
        "rms": lambda: nnx.RMSNorm(c, reduction_axes=axis, feature_axes=axis, rngs=rngs),
    }.get(norm, lambda: nnx.GroupNorm(c, int(norm[5:]), rngs=rngs))()
    graph, params, state = nnx.split(module, nnx.Param, ...)

    def apply(p: Any, s: Any, x: jax.Array, training: bool) -> tuple[jax.Array, Any]:
        merged = nnx.merge(graph, p, s, copy=True)
        if norm == "batch":
            return merged(x, use_running_average=not training), nnx.state(merged, nnx.BatchStat)
        return merged(x), s

    return params, state, apply


def make_haiku(norm: str, shape: tuple[int, ...], layout: str) -> Made:
    """Makes the modules of dm-haiku."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import haiku as hk

    axis, data = (1, "channels_first") if layout == "first" else (-1, "channels_last")

    def net(x: jax.Array, training: bool) -> jax.Array:
        if norm == "batch":
            return hk.BatchNorm(True, True, 0.9, data_format=data)(x, training)
        if norm == "instance":
            return hk.InstanceNorm(True, True, data_format=data)(x)
        if norm.startswith("group"):
            return hk.GroupNorm(int(norm[5:]), data_format=data)(x)
        if norm == "layer":
            return hk.LayerNorm(axis, True, True, param_axis=axis)(x)
        return hk.RMSNorm(axis, param_axis=axis)(x)

    f = hk.without_apply_rng(hk.transform_with_state(net))
    params, state = f.init(jax.random.key(0), jnp.ones(shape), True)
    return params, state, f.apply


def make_equinox(norm: str, shape: tuple[int, ...], layout: str) -> Made:
    """Makes the layers of Equinox, which take one sample with channels first; x is transposed."""
    import equinox as eqx

    c = channels(shape, layout)
    if layout == "last" and len(shape) > 2 and norm in ("batch", "instance", "group32", "group4"):
        raise MissingError
    if layout == "first" and norm in ("layer", "rms"):
        raise MissingError
    if norm == "batch":
        layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(c, axis_name="n", mode="batch")
        arrays, static = eqx.partition(layer, eqx.is_inexact_array)

        def apply(p: Any, s: Any, x: jax.Array, training: bool) -> tuple[jax.Array, Any]:
            norm = eqx.combine(p, static)
            norm = norm if training else eqx.nn.inference_mode(norm)
            return jax.vmap(norm, axis_name="n", in_axes=(0, None), out_axes=(0, None))(x, s)

        return arrays, state, apply
    made = {
        "instance": lambda: eqx.nn.GroupNorm(c, c),
        "layer": lambda: eqx.nn.LayerNorm(c),
        "rms": lambda: eqx.nn.RMSNorm(c),
    }.get(norm, lambda: eqx.nn.GroupNorm(int(norm[5:]), c))()
    arrays, static = eqx.partition(made, eqx.is_inexact_array)
    rows = len(shape) - 1 if norm in ("layer", "rms") else 1

    def stateless(p: Any, s: Any, x: jax.Array, training: bool) -> tuple[jax.Array, Any]:
        f = eqx.combine(p, static)
        for _ in range(rows):
            f = jax.vmap(f)
        return f(x), s

    return arrays, None, stateless


def make_keras(norm: str, shape: tuple[int, ...], layout: str) -> Made:
    """Makes the layers of Keras on the JAX backend."""
    import os

    os.environ["KERAS_BACKEND"] = "jax"
    import keras

    if layout == "first" and norm == "rms":  # its scale does not broadcast in this layout
        raise MissingError
    axis = 1 if layout == "first" else -1
    layers = keras.layers
    layer = {
        "batch": lambda: layers.BatchNormalization(axis=axis, momentum=0.9),
        "instance": lambda: layers.GroupNormalization(groups=-1, axis=axis),
        "layer": lambda: layers.LayerNormalization(axis=axis),
        "rms": lambda: layers.RMSNormalization(axis=axis),
    }.get(norm, lambda: layers.GroupNormalization(groups=int(norm[5:]), axis=axis))()
    layer.build(shape)
    params = [v.value for v in layer.trainable_variables]
    state = [v.value for v in layer.non_trainable_variables]

    def apply(p: Any, s: Any, x: jax.Array, training: bool) -> tuple[jax.Array, Any]:
        return layer.stateless_call(p, s, x, **({"training": training} if norm == "batch" else {}))

    return params, state, apply


def make_scale(norm: str, shape: tuple[int, ...], layout: str) -> Made:
    """Makes y = 1.0001 x, the lower limit that memory bandwidth sets."""
    return None, None, lambda p, s, x, training: (x * jnp.asarray(1.0001, x.dtype), s)


LIBRARIES: dict[str, Callable[[str, tuple[int, ...], str], Made]] = {
    "jaxnorm": make_jaxnorm,
    "flax.linen": make_linen,
    "flax.nnx": make_nnx,
    "dm-haiku": make_haiku,
    "equinox": make_equinox,
    "keras": make_keras,
    "scaling": make_scale,
}


@functools.cache
def version(library: str) -> str:
    """Returns the installed version of the package that contains the library."""
    from importlib import metadata

    package = {"flax.linen": "flax", "flax.nnx": "flax", "scaling": "jax"}.get(library, library)
    return metadata.version(package)
