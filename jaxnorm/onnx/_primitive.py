"""Defines the JAX primitive of an ONNX operator, and its batching rule."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching

norm_p = Primitive("jaxnorm")
norm_p.def_abstract_eval(lambda x, *operands, **params: x)


def _batched(
    args: Sequence[jax.Array], dims: Sequence[Any], **params: Any
) -> tuple[jax.Array, int]:
    """Adds the batch axis to the samples of one node; batched parameters need a node per member."""
    (x, *operands), (axis, *others) = args, dims
    if any(d is not None for d in others):
        size = next(a.shape[d] for a, d in zip(operands, others, strict=True) if d is not None)
        unstacked = (
            [a] * size if d is None else jnp.unstack(a, axis=d)
            for a, d in zip(args, dims, strict=True)
        )
        results = [norm_p.bind(*member, **params) for member in zip(*unstacked, strict=True)]
        return jnp.stack(results), 0
    x = jnp.moveaxis(x, axis, 0)
    if params["operator"].normalizes_last_axes:
        return norm_p.bind(x, *operands, **params), 0
    y = norm_p.bind(lax.reshape(x, (x.shape[0] * x.shape[1], *x.shape[2:])), *operands, **params)
    return lax.reshape(y, x.shape), 0


batching.primitive_batchers[norm_p] = _batched
