"""Tests the initial parameters and running statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnorm


@pytest.mark.parametrize("num_features", [3, (2, 3)])
def test_first_parameters_change_nothing(num_features):
    params = jaxnorm.init_params(num_features)
    np.testing.assert_array_equal(params["scale"], np.ones(num_features))
    np.testing.assert_array_equal(params["bias"], np.zeros(num_features))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_either_parameter_may_be_left_out():
    assert set(jaxnorm.init_params(3, use_scale=False)) == {"bias"}
    assert set(jaxnorm.init_params(3, use_bias=False)) == {"scale"}
    assert jaxnorm.init_params(3, use_scale=False, use_bias=False) == {}


def test_parameters_have_the_dtype_asked_for():
    assert jaxnorm.init_params(3, dtype=jnp.bfloat16)["scale"].dtype == jnp.bfloat16


@pytest.mark.parametrize("num_features", [3, (2, 3)])
def test_a_first_state_is_mean_0_var_1_count_0(num_features):
    state = jaxnorm.init_batch_stats(num_features)
    np.testing.assert_array_equal(state["mean"], np.zeros(num_features))
    np.testing.assert_array_equal(state["var"], np.ones(num_features))
    assert (state["count"].shape, state["count"].dtype, int(state["count"])) == ((), "int32", 0)


@pytest.mark.parametrize(
    ("asked", "made"),
    [("float16", "float32"), ("bfloat16", "float32"), ("float32", "float32")],
)
def test_a_state_is_never_below_float32(asked, made):
    assert jaxnorm.init_batch_stats(3, dtype=asked)["var"].dtype == made


def test_a_state_may_be_float64(x64):
    assert jaxnorm.init_batch_stats(3, dtype=jnp.float64)["var"].dtype == jnp.float64
