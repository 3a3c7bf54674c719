"""The normalize step, y = scale * x_hat + bias, and its derivative."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike, DTypeLike

from jaxnorm._core import platforms
from jaxnorm._core.moments import Moments, center, moments_dot
from jaxnorm._core.reduction import Reduction, select


def rstd(var: jax.Array, epsilon: jax.Array) -> jax.Array:
    """Computes 1 / sqrt(var + epsilon)."""
    return lax.rsqrt(var + epsilon.astype(var.dtype))


def infinite_for_zero(var: jax.Array, epsilon: jax.Array) -> jax.Array:
    """Replaces var by infinity where var + epsilon is 0, so that y is the bias there.

    Only used if epsilon may be 0, because without it XLA needs one kernel less for RMS norm on GPU.
    """
    return jnp.where(var + epsilon.astype(var.dtype) == 0, jnp.inf, var)


def scaled(d: jax.Array, r: jax.Array, w: jax.Array | None) -> jax.Array:
    """Computes d * r * w: d is x - mean, r has the shape of the moments, and w that of the scale.

    If r * w is smaller than x, it is computed first, so that only one product has the size of x.
    The transpose of d * (r * w) sums d * g over the reduced axes, where g is the cotangent of y,
    multiplies the result by r, and sums over the remaining axes. Without the product between the
    two sums, XLA would combine them and write out all products d * g.

    Args:
      d: x - mean.
      r: 1 / sqrt(var + epsilon), with the rank of x and the shape of the moments.
      w: the scale, with the rank of x, or None.
    """
    if w is None:
        return d * r
    return (d * r) * w if jnp.broadcast_shapes(r.shape, w.shape) == d.shape else d * (r * w)


def affine(x_hat: jax.Array, scale: jax.Array | None, bias: jax.Array | None) -> jax.Array:
    """Computes scale * x_hat + bias; None leaves out the factor or the term."""
    y = x_hat if scale is None else x_hat * scale.astype(x_hat.dtype)
    return y if bias is None else y + bias.astype(x_hat.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def normalize(
    dtype: Any,
    reduction: Reduction | None,
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    epsilon: jax.Array,
    mask: jax.Array | None,
    shift: jax.Array,
    moments: Moments,
) -> jax.Array:
    """Computes y in the given dtype; the shift and the moments are those of `shifted_moments`.

    Scale and bias have the rank of x. If the reduction is None, the shift and the moments are
    constants. Otherwise it is the reduction that the moments were computed with, after the split
    (`Reduction.after_split`).

    Args:
      dtype: the dtype of y.
      reduction: the reduction of the moments, or None if they are constants.
      x: the data, of any float dtype.
      scale: the scale, or None.
      bias: the bias, or None.
      epsilon: a scalar, which is added to the variance.
      mask: bool, with the rank of x and broadcasting against x, or None.
      shift: the shift, with the rank of x.
      moments: the moments of x - shift, with the rank of x.
    """
    # x_hat is d * r; `scaled` orders the products of d, r and scale.
    d, r = center(x, mask, shift, moments), rstd(moments.var, epsilon)
    y = scaled(d, r, None if scale is None else scale.astype(r.dtype))
    y = y if bias is None else y + bias.astype(y.dtype)
    return select(mask, y).astype(dtype)


@functools.partial(normalize.defjvp, symbolic_zeros=True)
def _normalize_jvp(
    dtype: DTypeLike,
    reduction: Reduction | None,
    primals: tuple[Any, ...],
    tangents: tuple[Any, ...],
) -> tuple[jax.Array, jax.Array]:
    """Computes the tangent of `normalize` such that its transpose is an efficient backward pass.

    With r = 1 / sqrt(var + epsilon), the tangent of y = scale * x_hat + bias is

        y_dot = scale r x_dot + x_hat A + B
        A = scale_dot - scale r^2 / 2 (var_dot + epsilon_dot)
        B = bias_dot - scale r mean_dot

    A and B have the shape of scale and the moments, broadcast together. In batch, instance and
    group norm this shape is small: in the transpose, A and B are one reduction over x each, from
    which the gradients of scale, bias and x are computed. In layer norm it is the shape of x, and
    the transpose is the usual rule.

    The tangents of the moments are computed here, from x_dot, and the given ones are not used.
    Thus x_dot is used only once, and in half precision the gradient of x is summed before it is
    rounded.
    """
    x, scale, _, epsilon, mask, *measured = primals
    y = normalize(dtype, reduction, *primals)
    given_dots = tangents[:4]

    # Checkpointed: x_hat is recomputed from x, so that the residual is x itself, in its own dtype,
    # and the two passes do not share x_hat.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def linear(
        x_dot: jax.Array | None,
        scale_dot: jax.Array | None,
        bias_dot: jax.Array | None,
        epsilon_dot: jax.Array | None,
    ) -> jax.Array:
        shift, moments = platforms.barrier_on_cpu(tuple(measured))
        x_barrier, r = platforms.barrier_on_cpu(x), rstd(moments.var, epsilon)
        mean_dot = var_dot = None
        if x_dot is not None:
            x_dot = x_dot.astype(r.dtype)
        if x_dot is not None and reduction is not None:
            moments_of = moments_dot(reduction, x_barrier, mask, shift, moments, x_dot)
            mean_dot, var_dot = moments_of.mean if reduction.centered else None, moments_of.var
        one = jnp.ones((), r.dtype)
        w = one if scale is None else scale.astype(r.dtype)
        wide_dot = _combine((-r * r / 2, _combine((one, var_dot), (one, epsilon_dot))))
        a = _combine((one, scale_dot), (one, _along(w, wide_dot, x)))
        b = _combine((one, bias_dot), (one, _along(w, _combine((-r, mean_dot)), x)))
        if a is not None:  # otherwise x is not a residual
            a = scaled(center(x_barrier, mask, shift, moments), r, a)
        y_dot = _combine((w * r, x_dot), (one, a), (one, b))
        # None means that all tangents are zero.
        y_dot = jnp.zeros((), r.dtype) if y_dot is None else select(mask, y_dot)
        return jnp.broadcast_to(y_dot.astype(dtype), y.shape)

    return y, linear(*(None if isinstance(t, SymbolicZero) else t for t in given_dots))


def _along(w: jax.Array, t: jax.Array | None, x: jax.Array) -> jax.Array | None:
    """Computes w * t by `multiply_along`; None is a tangent of zero."""
    return None if t is None else platforms.multiply_along(w, t, x)


def _combine(*terms: tuple[jax.Array, jax.Array | None]) -> jax.Array | None:
    """Sums factor * tangent over the tangents that are not zero; returns None if all are."""
    products = [factor * t.astype(factor.dtype) for factor, t in terms if t is not None]
    return functools.reduce(jnp.add, products) if products else None


def renormalize(
    scale: jax.Array | None,
    bias: jax.Array | None,
    measured: tuple[jax.Array, Moments],
    mean: jax.Array,
    var: jax.Array,
    epsilon: jax.Array,
    limits: tuple[ArrayLike, ArrayLike],
) -> tuple[jax.Array, jax.Array]:
    """Computes the scale and bias that make y, within the limits, equal to that of evaluation.

    (x - mean) / sigma = x_hat r + d, with r = sigma_batch / sigma and d = (mean_batch - mean) /
    sigma; both are constants for the derivative (Ioffe, Batch Renormalization, 2017).

    Args:
      scale: the scale, with the rank of x, or None.
      bias: the bias, with the rank of x, or None.
      measured: the shift and the moments of the batch.
      mean: the running mean, with the rank of x.
      var: the running variance, with the rank of x.
      epsilon: a scalar, which is added to both variances.
      limits: r_max and d_max.
    """
    (shift, moments), inverse = measured, rstd(var, epsilon)
    r = inverse * jnp.sqrt(moments.var + epsilon.astype(moments.var.dtype))
    d = ((shift - mean) + moments.mean) * inverse
    r_max, d_max = (jnp.asarray(limit, r.dtype) for limit in limits)
    r, d = lax.stop_gradient((jnp.clip(r, 1 / r_max, r_max), jnp.clip(d, -d_max, d_max)))
    return affine(r, scale, None), affine(d, scale, bias)
