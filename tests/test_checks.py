"""Tests that every error of the functions is raised at trace time, and says what to write."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnorm

X = jnp.ones((4, 5, 3))
STATE = jaxnorm.init_batch_stats(3)
BOTH = {"batch_norm": jaxnorm.batch_norm, "instance_norm": jaxnorm.instance_norm}

BAD = {
    # name: (arguments, the message after the name of the function)
    "integer input": (
        {"x": np.ones((4, 5, 3), np.int32)},
        "x should have a float dtype, because y gets that of x, but has int32; write "
        "x.astype(jnp.float32)",
    ),
    "bool input": (
        {"x": np.ones((4, 5, 3), bool)},
        "x should have a float dtype, because y gets that of x, but has bool",
    ),
    "complex input": (
        {"x": np.ones((4, 5, 3), np.complex64)},
        "x should have a float dtype, because y gets that of x, but has complex64; write x.real",
    ),
    "rank too small": ({"x": jnp.ones(3)}, "x should have at least 2 axes, such as (N,"),
    "axis out of range": (
        {"channel_axis": 3},
        "channel_axis should lie between -3 and 2, because x has 3 axes, but is 3",
    ),
    "axis that repeats": (
        {"channel_axis": (1, -2)},
        "channel_axis should name each axis once, but is (1, -2)",
    ),
    "axis that is no int": (
        {"channel_axis": 1.0},
        "channel_axis should be an int or a tuple of ints, but is 1.0",
    ),
    "scale of another channel count": (
        {"params": {"scale": jnp.ones(4)}},
        "params['scale'] should have the channels' shape (3,), or x's rank and broadcast against x "
        "of shape (4, 5, 3), but has shape (4,)",
    ),
    "bias of x's rank that does not broadcast": (
        {"params": {"bias": jnp.ones((2, 1, 3))}},
        "params['bias'] should have the channels' shape (3,)",
    ),
    "misspelled parameter": (
        {"params": {"gamma": jnp.ones(3)}},
        "params should be a dict of 'scale' and 'bias', but is ['gamma']; write {'scale': weight,",
    ),
    "an array for params": (
        {"params": jnp.ones(3)},
        "params should be a dict of 'scale' and 'bias', but is ArrayImpl",
    ),
    "state of another channel count": (
        {"batch_stats": jaxnorm.init_batch_stats(5)},
        "batch_stats['mean'] should have shape (3,), because it holds one number for each channel, "
        "but has shape (5,)",
    ),
    "half a state": (
        {"batch_stats": {"mean": STATE["mean"]}},
        "batch_stats should have the keys 'mean', 'var' and 'count', but is ['mean']; "
        "pass the state of one layer, or init_batch_stats(num_features) before training",
    ),
    "a state of PyTorch": (
        {"batch_stats": {"running_mean": STATE["mean"], "running_var": STATE["var"]}},
        "but is ['running_mean', 'running_var']; write interop.from_torch(state_dict)",
    ),
    "state without count": (
        {"batch_stats": {"mean": STATE["mean"], "var": STATE["var"]}},
        "but is ['mean', 'var']; write {**batch_stats, 'count': jnp.int32(0)}",
    ),
    "a count for each channel": (
        {"batch_stats": {**STATE, "count": jnp.zeros(3, jnp.int32)}},
        "batch_stats['count'] should have shape (), because it counts updates, but has shape (3,)",
    ),
    "a count that is no number": (
        {"batch_stats": {**STATE, "count": jnp.zeros((), bool)}},
        "batch_stats['count'] should be an integer, because it counts updates, but is bool",
    ),
    "evaluation without a state": (
        {"use_running_average": True},
        "use_running_average=True should come with batch_stats, but batch_stats is None; pass",
    ),
    "update without a state": (
        {"update_stats": True},
        "update_stats=True should come with batch_stats, but batch_stats is None; pass",
    ),
    "mask of another rank": (
        {"mask": np.ones(4, bool)},
        "mask should have x's rank, because an (N,) mask on (N, C) with N = C would silently mask "
        "channels, but has shape (4,) for x of shape (4, 5, 3); write mask[..., None, None]",
    ),
    "mask of one rank less": ({"mask": np.ones((4, 5), bool)}, "write mask[..., None]"),
    "mask that does not broadcast": (
        {"mask": np.ones((4, 2, 1), bool)},
        "mask should broadcast against x of shape (4, 5, 3), but has shape (4, 2, 1); each of its "
        "axes should have the size of that axis of x, or 1",
    ),
    "mask that is not bool": (
        {"mask": np.ones((4, 5, 1), np.int32)},
        "mask should be bool, True where an entry counts, but is int32; write mask.astype(bool)",
    ),
    "groups without an axis name": (
        {"axis_index_groups": [[0, 1]]},
        "axis_index_groups should come with axis_name",
    ),
}


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_an_error_at_trace_time_that_says_what_to_write(function, case):
    bad, message = BAD[case]
    arguments = {"x": X, **bad}
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        jax.eval_shape(lambda: BOTH[function](**arguments))
    assert str(error.value).startswith(f"{function}: ")


@pytest.mark.parametrize("shape", [(1, 3), (1, 1, 3), (1, 1, 1, 1, 3)])
def test_one_value_per_channel_has_no_variance(shape):
    message = f"Expected more than 1 value per channel when training, got input size {shape}"
    with pytest.raises(ValueError, match=re.escape(message)):
        jaxnorm.batch_norm(jnp.ones(shape))


@pytest.mark.parametrize("shape", [(4, 3), (4, 1, 3), (1, 1, 1, 3)])
def test_one_spatial_element_has_no_variance(shape):
    message = f"Expected more than 1 spatial element when training, got input size {shape}"
    with pytest.raises(ValueError, match=re.escape(message)):
        jaxnorm.instance_norm(jnp.ones(shape))


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("shape", [(0, 5, 3), (4, 0, 3)])
def test_an_empty_batch_is_no_error_and_does_not_update_the_state(function, shape):
    y, new = BOTH[function](jnp.ones(shape), None, STATE)
    assert y.shape == shape
    for key, value in STATE.items():
        np.testing.assert_array_equal(new[key], value)


def test_the_batch_axis_is_no_channel_axis():
    message = "both name axis 0 of x; write batch_axis=None for one sample without a batch axis"
    with pytest.raises(ValueError, match=re.escape(message)):
        jaxnorm.instance_norm(X, channel_axis=0)


def test_a_traced_switch_is_refused():
    message = "use_running_average should be a Python bool, because it chooses which program is"
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda flag: jaxnorm.batch_norm(X, None, STATE, use_running_average=flag))(True)


@pytest.mark.parametrize("groups", [[[0, 1]], [[0, 1], [1, 2]], [[0, 1, 2], [3]]])
def test_groups_contain_each_index_once_and_have_one_size(groups):
    def f(x):
        return jaxnorm.moments(x, 0, axis_name="d", axis_index_groups=groups)

    with pytest.raises(ValueError, match="axis_index_groups should hold each index of 'd', 0 to 3"):
        jax.vmap(f, axis_name="d")(jnp.ones((4, 2, 3)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((jnp.ones(3, jnp.int32), 0), "moments: x should have a float dtype"),
        ((X, 3), "moments: axis should lie between -3 and 2"),
        ((X, (0, 0)), "moments: axis should name each axis once"),
    ],
)
def test_moments_refuses_what_the_norms_refuse(arguments, message):
    with pytest.raises(ValueError, match=message):
        jaxnorm.moments(*arguments)


def test_moments_of_other_channels_do_not_update_a_state():
    with pytest.raises(ValueError, match=re.escape("moments should have the shape (3,) of the")):
        jaxnorm.update_batch_stats(STATE, jaxnorm.moments(jnp.ones((4, 5)), 0))


@pytest.mark.parametrize("key", ["mean", "var"])
def test_integer_running_statistics_are_an_error(key):
    state = {**STATE, key: jnp.ones(3, jnp.int8)}
    with pytest.raises(
        ValueError, match=rf"batch_stats\['{key}'\] should have a float dtype, .* int8"
    ):
        jaxnorm.batch_norm(X, None, state)
