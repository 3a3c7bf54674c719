"""Tests gradients in half precision, an epsilon of 0, and the largest and smallest numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnorm

STATE = {"mean": jnp.zeros(64), "var": jnp.ones(64), "count": jnp.int32(0)}
NORMS = {
    "batch": lambda x, **o: jaxnorm.batch_norm(x, None, **o)[0],
    "instance": lambda x, **o: jaxnorm.instance_norm(x, None, **o)[0],
    "group": lambda x, **o: jaxnorm.group_norm(x, num_groups=4, **o),
    "layer": lambda x, **o: jaxnorm.layer_norm(x, **o),
    "rms": lambda x, **o: jaxnorm.rms_norm(x, **o),
}
# The axes that each norm reduces over; x is (8, 16, 64), or (8, 16, 4, 16) for group norm.
AXES = {"batch": (0, 1), "instance": (1,), "group": (1, 3), "layer": (2,), "rms": (2,)}


def reference(norm, x, g, epsilon=1e-5):
    """Computes y and the gradient of x in float64 NumPy, for the upstream gradient g."""
    x, g = np.asarray(x, np.float64), np.asarray(g, np.float64)
    shape, axes = x.shape, AXES[norm]
    if norm == "group":
        x, g = (a.reshape(8, 16, 4, 16) for a in (x, g))
    d = x if norm == "rms" else x - x.mean(axes, keepdims=True)
    r = 1 / np.sqrt((d**2).mean(axes, keepdims=True) + epsilon)
    y = d * r
    dx = r * (g - y * (g * y).mean(axes, keepdims=True))
    if norm != "rms":
        dx -= r * g.mean(axes, keepdims=True)
    return y.reshape(shape), dx.reshape(shape)


def rms(a):
    return float(np.sqrt(np.mean(np.square(a))))


# ---- Half precision: the gradient of x is rounded once ----


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("norm", NORMS)
def test_the_gradient_of_x_is_rounded_once(norm, dtype):
    rng = np.random.default_rng(0)
    # The upstream gradients have a large common part, which both terms of the gradient contain.
    x = jnp.asarray(rng.normal(size=(8, 16, 64)), dtype)
    g = jnp.asarray(10 + rng.normal(size=(8, 16, 64)), dtype)
    _, vjp = jax.vjp(NORMS[norm], x)
    (found,) = vjp(g)
    assert found.dtype == dtype
    _, exact = reference(norm, x, g)
    once = rms(np.asarray(jnp.asarray(exact, dtype), np.float64) - exact)
    assert rms(np.asarray(found, np.float64) - exact) <= 1.2 * once


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_large_upstream_gradients_in_float16_stay_finite_where_pytorch_s_do(norm):
    torch = pytest.importorskip("torch")
    g = (300 + np.random.default_rng(1).normal(size=(4, 64))).astype(np.float16)
    given = torch.zeros(4, 64, dtype=torch.float16, requires_grad=True)
    if norm == "layer":
        out = torch.nn.functional.layer_norm(given, (64,))
    else:
        out = torch.nn.functional.batch_norm(given, None, None, training=True)
    out.backward(torch.tensor(g))
    expected = given.grad.numpy().astype(np.float64)
    _, vjp = jax.vjp(NORMS[norm], jnp.zeros((4, 64), jnp.float16))
    (found,) = vjp(jnp.asarray(g))
    finite = np.isfinite(expected)
    assert finite.any()
    # These are 316 times differences of numbers near 300, in float32: 316 * 300 * 6e-8 * 4.
    found = np.asarray(found, np.float64)
    np.testing.assert_allclose(found[finite], expected[finite], rtol=2e-3, atol=0.1)


# ---- epsilon = 0 ----


@pytest.mark.parametrize("norm", NORMS)
def test_masked_data_do_not_affect_gradients_with_an_epsilon_of_0(norm):
    rng = np.random.default_rng(2)
    x = rng.normal(size=(8, 16, 64)).astype(np.float32)
    mask = np.ones_like(x, bool)
    mask[3] = False  # a whole sample
    mask[5, :7, :20] = False
    x[~mask] = np.nan
    params = {"scale": jnp.ones(64), "bias": jnp.ones(64)}

    def loss(x, params, epsilon):
        options = {"epsilon": epsilon, "mask": jnp.asarray(mask)}
        call = {
            "batch": lambda: jaxnorm.batch_norm(x, params, **options)[0],
            "instance": lambda: jaxnorm.instance_norm(x, params, **options)[0],
            "group": lambda: jaxnorm.group_norm(x, params, num_groups=4, **options),
            "layer": lambda: jaxnorm.layer_norm(x, params, **options),
            "rms": lambda: jaxnorm.rms_norm(x, params, **options),
        }
        return jnp.sum(jnp.sin(call[norm]()))

    gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
    found = gradient(x, params, 0.0)
    assert all(np.all(np.isfinite(a)) for a in jax.tree.leaves(found))
    np.testing.assert_array_equal(np.asarray(found[0])[~mask], 0)
    # The values where the mask is False have no effect.
    other = gradient(np.where(mask, x, 7).astype(np.float32), params, 0.0)
    jax.tree.map(np.testing.assert_array_equal, found, other)
    hessian = jax.jvp(lambda x: jax.grad(loss)(x, params, 0.0), (x,), (jnp.ones_like(x),))[1]
    assert np.all(np.isfinite(hessian))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("value", [0.0, 1.0, -3e5])
def test_constants_give_0_with_an_epsilon_of_0(norm, value):
    x = jnp.full((8, 16, 64), value)
    y, vjp = jax.vjp(functools.partial(NORMS[norm], epsilon=0.0), x)
    if norm == "rms":
        np.testing.assert_allclose(y, np.sign(value), rtol=1e-6)  # float32's rounding
        return
    np.testing.assert_array_equal(y, 0)
    np.testing.assert_array_equal(vjp(jnp.ones_like(x))[0], 0)


# ---- Large and small numbers ----


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("size", [1e-16, 1e-9, 1.0, 1e9, 1e18])
def test_y_does_not_depend_on_the_unit_of_x(norm, size):
    x = (size * np.random.default_rng(3).normal(size=(8, 16, 64))).astype(np.float32)
    # Only epsilon has a unit, so the results with 0 do not depend on the scale.
    y, _ = reference(norm, x, np.ones_like(x), epsilon=0.0)
    found = NORMS[norm](jnp.asarray(x), epsilon=0.0)
    np.testing.assert_allclose(found, y, rtol=0, atol=2e-6)  # as at every offset


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("size", [1e20, 1e25, 1e30])
def test_a_variance_above_the_largest_float32_gives_0_as_in_pytorch(norm, size):
    x = (size * np.random.default_rng(4).normal(size=(8, 16, 64))).astype(np.float32)
    y, vjp = jax.vjp(NORMS[norm], jnp.asarray(x))
    np.testing.assert_array_equal(y, 0)
    np.testing.assert_array_equal(vjp(jnp.ones_like(y))[0], 0)


@pytest.mark.parametrize("norm", NORMS)
def test_tiny_numbers_are_divided_by_the_root_of_epsilon(norm):
    x = (1e-25 * np.random.default_rng(5).normal(size=(8, 16, 64))).astype(np.float32)
    g = np.random.default_rng(6).normal(size=x.shape).astype(np.float32)
    y, dx = reference(norm, x, g)
    found, vjp = jax.vjp(NORMS[norm], jnp.asarray(x))
    np.testing.assert_allclose(found, y, rtol=1e-5, atol=1e-29)  # float32's rounding of x - mean
    np.testing.assert_allclose(vjp(jnp.asarray(g))[0], dx, rtol=1e-5, atol=1e-3)  # of 316 g - mean
    # With an epsilon of 0, the variance is 1e-50, which is 0 in float32.
    zero, vjp = jax.vjp(functools.partial(NORMS[norm], epsilon=0.0), jnp.asarray(x))
    np.testing.assert_array_equal(zero, 0)
    np.testing.assert_array_equal(vjp(jnp.asarray(g))[0], 0)


@pytest.mark.parametrize("norm", [norm for norm in NORMS if norm != "rms"])
@pytest.mark.parametrize("value", [1e10, 1e30, -1e37])
def test_large_constants_give_0(norm, value):
    x = jnp.full((8, 16, 64), value, jnp.float32)
    y, vjp = jax.vjp(NORMS[norm], x)
    np.testing.assert_array_equal(y, 0)
    assert np.all(np.isfinite(vjp(jnp.ones_like(x))[0]))
