"""Tests bounds on the residuals, reductions and temporaries of compiled programs."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnorm

SHAPE = (4, 14, 14, 128)
NORMS = {
    "batch": lambda x, p: jaxnorm.batch_norm(x, p)[0],
    "instance": lambda x, p: jaxnorm.instance_norm(x, p)[0],
    "group32": lambda x, p: jaxnorm.group_norm(x, p, num_groups=32),
    "group4": lambda x, p: jaxnorm.group_norm(x, p, num_groups=4),
    "layer": jaxnorm.layer_norm,
    "rms": jaxnorm.rms_norm,
}
# Sums over arrays of the size of x, which are reductions or, over rows in the backward pass, matrix
# products: of x and x * x forward, of g and g * x_hat backward, and for layer and RMS norm two or
# one more, over the rows. The loop that computes the moments again has two.
LOOP = 2
SUMS = {
    **dict.fromkeys(("batch", "instance", "group32", "group4"), 2 + 2 + LOOP),
    "layer": 2 + 4 + LOOP,
    "rms": 1 + 3,
}


@pytest.fixture(scope="module")
def programs():
    """Compiles a forward and backward pass of each norm once."""
    compiled = {}

    def get(name, dtype):
        if (name, dtype) not in compiled:
            x = jax.ShapeDtypeStruct(SHAPE, dtype)
            params = jax.eval_shape(lambda: jaxnorm.init_params(SHAPE[-1]))

            def step(x, params, g):
                y, vjp = jax.vjp(NORMS[name], x, params)
                return y, vjp(g)

            compiled[name, dtype] = jax.jit(step).lower(x, params, x).compile()
        return compiled[name, dtype]

    return get


def sums_of_full_size(text):
    """Returns the number of reductions and matrix products that take an array of the size of x."""
    size = 4 * 14 * 14 * 128
    found = 0
    for computation in text.split("\n}\n"):
        shapes = dict(re.findall(r"%(\S+) = \w+\[([\d,]*)\]", computation))
        for operand in re.findall(r" (?:reduce|dot)\(%([^,)]+)", computation):
            dimensions = [int(n) for n in shapes[operand].split(",") if n]
            found += jnp.prod(jnp.array(dimensions)) == size
    return int(found)


@pytest.mark.parametrize("name", NORMS)
def test_sums_of_full_size_are_as_few_as_can_be(programs, name):
    assert sums_of_full_size(programs(name, "float32").as_text()) <= SUMS[name]


@pytest.mark.parametrize("name", NORMS)
def test_float32_needs_no_temporary_of_x_s_size(programs, name):
    x_bytes = 4 * 14 * 14 * 128 * 4
    assert programs(name, "float32").memory_analysis().temp_size_in_bytes < 0.2 * x_bytes


@pytest.mark.parametrize("name", NORMS)
def test_bfloat16_is_widened_a_few_times_at_most(programs, name):
    """Bounds XLA's float32 copies on CPU, of twice the bytes of x: of x, g and, in the loop, d."""
    x_bytes = 4 * 14 * 14 * 128 * 2
    copies = 2 if name == "rms" else 3
    temporaries = programs(name, "bfloat16").memory_analysis().temp_size_in_bytes
    assert temporaries < (2 * copies + 0.3) * x_bytes


@pytest.mark.parametrize("norm", [jaxnorm.layer_norm, jaxnorm.rms_norm])
@pytest.mark.parametrize("explicit", [False, True])
def test_sums_over_channels_that_come_first_are_matrix_products_too(norm, explicit):
    """Checks for products, because XLA fuses reductions with the pass: 30 times the time on CPU."""
    kind = AxisType.Explicit if explicit else AxisType.Auto
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    x = jax.random.normal(jax.random.key(0), (4, 128, 14, 14))
    x = jax.device_put(x, NamedSharding(mesh, P("data")))
    params = jaxnorm.init_params(128, use_bias=norm is jaxnorm.layer_norm)

    def step(x, params):
        return jax.grad(lambda x, p: jnp.sum(jnp.sin(norm(x, p, axis=1))), argnums=(0, 1))(
            x, params
        )

    with jax.set_mesh(mesh):
        program = jax.jit(step).lower(x, params).compile()
        found = program(x, params)
    # There is one for each sum of the backward pass. A compiler may join two of them.
    products = len(re.findall(r" dot\(", program.as_text()))
    assert 1 <= products <= (2 if norm is jaxnorm.layer_norm else 1)
    swapped = jax.grad(lambda x, p: jnp.sum(jnp.sin(norm(x, p))), argnums=(0, 1))
    expected = swapped(jnp.moveaxis(jnp.asarray(jax.device_get(x)), 1, -1), params)
    # These are sums of a thousand float32 terms, in another order.
    np.testing.assert_allclose(found[0], jnp.moveaxis(expected[0], -1, 1), rtol=1e-4, atol=1e-5)
    for key, value in expected[1].items():
        np.testing.assert_allclose(found[1][key], value, rtol=1e-4, atol=1e-4)
