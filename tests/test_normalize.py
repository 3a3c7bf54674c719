"""Tests the normalize step and its derivatives."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.test_util import check_grads

import jaxnorm
from jaxnorm._core.moments import Moments, Reduction, shifted_moments
from jaxnorm._core.normalize import normalize

pytestmark = pytest.mark.usefixtures("x64")
RNG = np.random.default_rng(1)
X = RNG.standard_normal((3, 4, 2))  # the tests convert it to float64 JAX arrays
MASK = RNG.random((3, 4, 2)) < 0.6
SAMPLES = {"batch norm": (0, 1), "instance norm": (1,), "layer norm": (2,), "all": (0, 1, 2)}
PARAMS = {
    "per channel": (1, 1, 2),
    "per sample and channel": (3, 1, 2),
    "per entry": (3, 4, 2),
    "for all": (1, 1, 1),
}


def plain(axes, x, scale, bias, epsilon, mask):
    """Normalizes with jnp.mean, for derivatives by JAX in float64."""
    mean = jnp.mean(x, axes, keepdims=True, where=mask)
    var = jnp.mean((x - mean) ** 2, axes, keepdims=True, where=mask)
    y = (x - mean) * lax.rsqrt(var + epsilon) * scale + bias
    y = y if mask is None else jnp.where(mask, y, 0)
    return y, mean, var


def core(axes, x, scale, bias, epsilon, mask):
    reduction = Reduction(axes)
    shift, m = shifted_moments(reduction, x, mask)
    y = normalize(x.dtype, reduction, x, scale, bias, epsilon, mask, shift, m)
    return y, shift + m.mean, m.var


@pytest.mark.parametrize("axes", SAMPLES.values(), ids=SAMPLES)
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(shape, id=name, marks=() if name == "per channel" else pytest.mark.slow)
        for name, shape in PARAMS.items()
    ],
)
@pytest.mark.parametrize("masked", [pytest.param(False, marks=pytest.mark.slow), True])
def test_y_and_moments_and_all_their_derivatives_are_those_of_the_plain_formula(
    axes, shape, masked
):
    mask = MASK if masked else None
    if masked:  # at least two entries per sample, so that the plain formula has no 0 / 0
        mask = mask | (jnp.arange(3)[:, None, None] < 1) | (jnp.arange(4)[:, None] < 2)
    scale, bias = (jnp.asarray(RNG.standard_normal(shape)) for _ in range(2))
    arguments = (jnp.asarray(X), scale, bias, jnp.asarray(0.3))
    weights = [jnp.asarray(RNG.standard_normal(X.shape)) for _ in range(3)]

    def loss(f):
        return lambda *a: sum(
            jnp.sum(w * jnp.sin(out)) for w, out in zip(weights, f(axes, *a, mask), strict=True)
        )

    def value_gradient_and_hessian(f):
        every = (0, 1, 2, 3)
        return lambda *a: (
            jax.value_and_grad(loss(f), every)(*a),
            jax.hessian(loss(f), every)(*a),
        )

    found, wanted = (jax.jit(value_gradient_and_hessian(f))(*arguments) for f in (core, plain))
    # These are second derivatives of sums of a hundred terms of size 1, in float64: 1e-10.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-11), found, wanted
    )


@pytest.mark.parametrize("axes", SAMPLES.values(), ids=SAMPLES)
@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 3, 1), (3, 1, 1), (1, 3, 3), (3, 3, 1)])
def test_no_axis_is_taken_for_another_of_its_size(axes, shape):
    """Checks x with equal sizes, where only the position of an axis identifies it."""
    x, g = (jnp.asarray(RNG.standard_normal((3, 3, 3))) for _ in range(2))
    scale, bias = (jnp.asarray(RNG.standard_normal(shape)) for _ in range(2))

    def gradients(f):
        return jax.grad(
            lambda *a: jnp.sum(g * f(axes, *a, 0.3 + jnp.zeros(()), None)[0]), (0, 1, 2)
        )

    found, wanted = (gradients(f)(x, scale, bias) for f in (core, plain))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), found, wanted
    )


@pytest.mark.parametrize(
    ("missing", "order"),
    [
        ((), 2),
        pytest.param((), 3, marks=pytest.mark.slow),
        *(
            pytest.param(m, 3, marks=pytest.mark.exhaustive)
            for m in (("scale",), ("bias",), ("scale", "bias"))
        ),
    ],
)
@pytest.mark.parametrize("given", [False, True])
def test_the_derivative_to_any_order_in_any_mix_of_modes(missing, order, given):
    x = jnp.asarray(X)
    one_per_channel = {"scale": jnp.array([[[1.3, -0.7]]]), "bias": jnp.array([[[0.2, 0.5]]])}
    params = {k: v for k, v in one_per_channel.items() if k not in missing}
    statistics = shifted_moments(Reduction((0, 1)), 2 * x)

    def f(x, params, epsilon):
        scale, bias = params.get("scale"), params.get("bias")
        reduction = None if given else Reduction((0, 1))
        used = statistics if given else shifted_moments(reduction, x, MASK)
        return normalize(x.dtype, reduction, x, scale, bias, epsilon, MASK, *used)

    check_grads(f, (x, params, jnp.asarray(0.3)), order=order)


def test_a_traced_epsilon_of_the_size_of_the_variance_is_added():
    y = jax.jit(lambda x, epsilon: jaxnorm.layer_norm(x, epsilon=epsilon))
    x = jnp.array([[-1.0, 1.0]])  # of variance 1
    np.testing.assert_allclose(y(x, 1.0), x / np.sqrt(2), rtol=1e-6)  # a few roundings
    np.testing.assert_array_equal(y(0 * x, 0.0), 0 * x)


def test_moments_that_are_given_are_constants():
    x, scale, epsilon = jnp.asarray(X), jnp.array([[[1.3, -0.7]]]), jnp.asarray(0.3)
    measured = jnp.array([[[[0.1, 0.2]]], [[[0.3, -0.4]]], [[[1.5, 0.8]]]])

    def y(x, shift, mean, var):
        m = Moments(jnp.zeros_like(var), mean, var)
        return normalize(x.dtype, None, x, scale, None, epsilon, None, shift, m)

    for jacobian in (jax.jacfwd, jax.jacrev):
        for found in jacobian(y, (1, 2, 3))(x, *measured):
            np.testing.assert_array_equal(found, 0)


# ---- Compiled programs, which do not depend on the machine ----


def kept(f, *args):
    """Returns (shape, dtype) of the large residuals of jit(f)."""
    _, vjp = jax.vjp(jax.jit(f), *args)
    return [(a.shape, str(a.dtype)) for a in jax.tree.leaves(vjp) if a.size > 256]


def norm(x, scale, bias, *, given):
    shape = (*(1 for _ in x.shape[:-1]), x.shape[-1])
    zero, one = jnp.zeros(shape), jnp.ones(shape)
    reduction = None if given else Reduction((0, 1, 2))
    used = (zero, Moments(zero, zero, one)) if given else shifted_moments(reduction, x)
    return normalize(x.dtype, reduction, x, scale, bias, jnp.asarray(1e-5), None, *used)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_is_kept_for_the_backward_pass_is_x_itself(given, dtype):
    f = functools.partial(norm, given=given)
    x = jnp.ones((8, 6, 6, 64), dtype)
    scale, bias = jnp.ones((2, 1, 1, 1, 64), jnp.float32)
    itself = [(x.shape, str(x.dtype))]
    assert kept(f, x, scale, bias) == itself
    assert kept(lambda scale: f(x, scale, bias), scale) == itself
    assert kept(lambda bias: f(x, scale, bias), bias) == []
    # For given statistics, y is linear in x, so its derivative does not need x.
    assert kept(lambda x: f(x, scale, bias), x) == ([] if given else itself)


def test_forward_and_backward_reduce_arrays_of_x_s_size_twice_each():
    x = jnp.ones((8, 6, 6, 64), jnp.float32)
    scale, bias = jnp.ones((2, 1, 1, 1, 64), jnp.float32)

    def step(x, scale, bias, g):
        y, vjp = jax.vjp(functools.partial(norm, given=False), x, scale, bias)
        return y, vjp(g)

    text = jax.jit(step).lower(x, scale, bias, x).compile().as_text()
    reduced = []
    for computation in text.split("\n}\n"):
        shape_of = dict(re.findall(r"%(\S+) = \w+\[([\d,]*)\]", computation))
        reduced += [shape_of[operand] for operand in re.findall(r" reduce\(%([^,]+),", computation)]
    # Forward: the sums of x and x * x. Backward: those of g and g * x_hat. In the loop: two
    # sums.
    assert reduced.count("8,6,6,64") <= 2 + 2 + 2
