"""Tests that check_batch_stats finds all problems, and nothing else."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, serialization

import jaxnorm
import jaxnorm.linen
import jaxnorm.nnx

GOOD = {"mean": jnp.array([1.0, 2.0]), "var": jnp.array([3.0, 4.0]), "count": jnp.int32(5)}
BN = "['batch_stats']['bn']"


def findings(state, **params):
    variables = {"params": {"bn": params}, "batch_stats": {"bn": state}}
    return [tuple(finding) for finding in jaxnorm.check_batch_stats(variables)]


def test_a_trained_state_has_none():
    assert findings(GOOD, scale=jnp.ones(2), bias=jnp.ones(2)) == []
    assert jaxnorm.check_batch_stats(GOOD) == []
    stacked = jax.tree.map(lambda a: jnp.stack([a, a, a]), GOOD)  # as from nn.scan or nn.vmap
    assert findings(stacked, scale=jnp.ones((3, 2))) == []


@pytest.mark.parametrize(
    ("bad", "key", "problem"),
    [
        ({"mean": jnp.array([jnp.nan, 1])}, "mean", "is not finite in 1 of 2 channels"),
        ({"var": jnp.array([jnp.inf, jnp.nan])}, "var", "is not finite in 2 of 2 channels"),
        ({"var": jnp.array([1.0, -0.5])}, "var", "is negative in 1 of 2 channels"),
        ({"count": jnp.int32(-1)}, "count", "is negative"),
        ({"count": jnp.float32(5)}, "count", "has dtype float32, and should have integers"),
        ({"count": jnp.zeros(2, jnp.int32) + 5}, "count", r"has shape (2,), and should have one"),
        ({"count": jnp.zeros(3, jnp.int32) + 5}, "count", r"has shape (3,), and should have one"),
        ({"count": None}, "count", "is missing"),
        ({"var": None}, "var", "is missing"),
        ({"mean": None}, "mean", "is missing"),
        ({"var": jnp.ones(3)}, "var", "has shape (3,), and the mean (2,)"),
        ({"mean": jnp.ones(2, jnp.bfloat16)}, "mean", "has dtype bfloat16, in which a running"),
        ({"var": jnp.ones(2, jnp.float16)}, "var", "has dtype float16, in which a running"),
        ({"mean": jnp.ones(2, jnp.int32)}, "mean", "has dtype int32, and should have floats"),
    ],
)
def test_each_of_these_is_found_alone(bad, key, problem):
    ((path, found),) = findings({**GOOD, **bad})
    assert path == f"{BN}[{key!r}]"
    assert found.startswith(problem)


def test_a_first_state_was_never_trained():
    ((path, problem),) = findings(jaxnorm.init_batch_stats(2))
    assert (path, problem[:20]) == (f"{BN}['count']", "is 0: never trained,")


def test_parameters_of_another_shape_are_found_beside_the_state():
    assert findings(GOOD, scale=jnp.ones(3)) == [
        (f"{BN}['mean']", "has shape (2,), and the scale (3,)")
    ]


def test_what_was_accumulated_is_looked_at_too():
    state = jaxnorm.begin_accumulation(GOOD)
    assert findings(state) == []
    _, state = jaxnorm.batch_norm(jnp.array([[1.0, 2], [3, jnp.nan]]), None, state)
    paths = [path for path, _ in findings(state)]
    assert paths == [f"{BN}['accumulation']['moments'][{key!r}]" for key in ("mean", "var")]


@pytest.mark.parametrize("nothing", [{}, {"params": {"Dense_0": {"bias": jnp.ones(2)}}}, None])
def test_no_state_at_all_is_a_finding(nothing):
    ((path, problem),) = jaxnorm.check_batch_stats(nothing)
    assert (path, problem[:29]) == ("", "holds no running statistics: ")


def test_a_finding_reads_as_a_sentence():
    (finding,) = jaxnorm.check_batch_stats({**GOOD, "count": None})
    assert str(finding) == "['count'] is missing"


# ---- Changes that checkpoint formats do not detect ----


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        options = {"use_running_average": False, "use_bias": False, "use_scale": False}
        return nn.Dense(3)(jaxnorm.linen.BatchNorm(**options)(x))


def trained():
    model, x = Model(), jnp.ones((4, 2)) * jnp.arange(4.0)[:, None]
    variables = model.init(jax.random.key(0), x)
    return model, variables, variables | model.apply(variables, x, mutable=["batch_stats"])[1]


def test_a_restored_state_is_held_against_a_new_model_s():
    model, first, variables = trained()
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 2)))
    for like in (first, shapes):
        assert jaxnorm.check_batch_stats(variables, like) == []
    wrong = {
        "batch_stats": {
            "BatchNorm_0": jax.tree.map(
                lambda a: jnp.concatenate([a, a]) if a.ndim else a,
                variables["batch_stats"]["BatchNorm_0"],
            )
        }
    }
    restored = serialization.from_bytes(first, serialization.to_bytes(first | wrong))
    found = jaxnorm.check_batch_stats(restored, shapes)
    assert [str(f) for f in found] == [
        f"['batch_stats']['BatchNorm_0'][{key!r}] is float32[4], and float32[2] was expected"
        for key in ("mean", "var")
    ]


def test_missing_and_unexpected_states_are_found():
    _, _, variables = trained()
    other = {"batch_stats": {"BatchNorm_1": variables["batch_stats"]["BatchNorm_0"]}}
    found = jaxnorm.check_batch_stats(variables, other)
    assert [str(f) for f in found] == [
        "['batch_stats']['BatchNorm_0'] is not expected",
        "['batch_stats']['BatchNorm_1'] is missing",
    ]


def test_a_wider_dtype_is_found_beside_the_expected(x64):
    wide = {key: np.asarray(GOOD[key], np.float64) for key in ("mean", "var")} | {"count": 5}
    found = jaxnorm.check_batch_stats({**GOOD, **wide, "count": GOOD["count"]}, GOOD)
    assert [f.path for f in found] == ["['mean']", "['var']"]


def test_an_nnx_model_is_checked_as_a_dict():
    layer = jaxnorm.nnx.BatchNorm(2, rngs=nnx.Rngs(0))
    state = nnx.to_pure_dict(nnx.state({"bn": layer}))
    ((path, problem),) = jaxnorm.check_batch_stats(state)
    assert (path, problem[:6]) == ("['bn']['count']", "is 0: ")
    layer(jnp.array([[1.0, 2], [3, 5]]))
    assert jaxnorm.check_batch_stats(nnx.to_pure_dict(nnx.state({"bn": layer}))) == []
