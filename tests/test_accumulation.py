"""Tests that micro-batches update the state as one large batch does."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxnorm
import jaxnorm.linen
import jaxnorm.nnx

pytestmark = pytest.mark.usefixtures("strict")
NORMS = [jaxnorm.batch_norm, jaxnorm.instance_norm]
both = pytest.mark.parametrize("norm", NORMS, ids=lambda norm: norm.__name__)
RNG = np.random.default_rng(0)
X = RNG.normal(300, 2, (12, 5, 3)).astype(np.float32)
MASK = RNG.random((12, 5, 1)) < 0.7
STATE = {"mean": jnp.array([1.0, 2, 3]), "var": jnp.array([4.0, 5, 6]), "count": jnp.int32(7)}
# The mean of a micro-batch is rounded to float32, with an error of up to 1.5e-5 at 300. The squares
# of its distance to the others, about 1, then have errors of 3e-5; the variances are about 4.
CLOSE = {"rtol": 1e-5}


def statistics(state):
    return {key: state[key] for key in ("mean", "var", "count")}


@both
@pytest.mark.parametrize("momentum", [0.1, None, 1.0])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("cuts", [[], [4, 8], [2, 3, 11]])
def test_micro_batches_make_one_update_equal_to_the_large_batch_s(norm, momentum, masked, cuts):
    mask = MASK if masked else np.ones_like(MASK)
    state = jaxnorm.begin_accumulation(STATE)
    for x, m in zip(np.split(X, cuts), np.split(mask, cuts), strict=True):
        y, state = norm(x, None, state, momentum=momentum, mask=m)
        np.testing.assert_array_equal(y, norm(x, None, STATE, mask=m)[0])  # y does not change
    _, expected = norm(X, None, STATE, momentum=momentum, mask=mask)
    chex.assert_trees_all_close(statistics(state), expected, **CLOSE)
    assert state["count"] == 8


@both
def test_after_every_micro_batch_the_state_is_that_of_all_since_the_beginning(norm):
    state = jaxnorm.begin_accumulation(STATE)
    for end in (4, 8, 12):
        _, state = norm(X[end - 4 : end], None, state)
        _, expected = norm(X[:end], None, STATE)
        chex.assert_trees_all_close(statistics(state), expected, **CLOSE)


@both
def test_beginning_anew_is_another_update(norm):
    state = STATE
    for step in range(2):
        state = jaxnorm.begin_accumulation(state)
        for x in np.split(X + step, 3):
            _, state = norm(x, None, state)
    expected = norm(X + 1, None, norm(X, None, STATE)[1])[1]
    chex.assert_trees_all_close(statistics(state), expected, **CLOSE)


@both
def test_when_chooses_whether_accumulation_restarts(norm):
    @jax.jit
    def micro_step(state, x, when):
        _, state = norm(x, None, state)
        return jaxnorm.begin_accumulation(state, when)

    state = jaxnorm.begin_accumulation(STATE, when=False)  # begins: there is none yet
    for k, x in enumerate(np.split(np.concatenate([X, X + 1]), 6)):
        state = micro_step(state, x, k % 3 == 2)
    expected = norm(X + 1, None, norm(X, None, STATE)[1])[1]
    chex.assert_trees_all_close(statistics(state), expected, **CLOSE)


@both
def test_scan_carries_what_has_accumulated(norm):
    def step(state, x):
        return norm(x, None, state)[1], None

    halves = {**STATE, "mean": STATE["mean"].astype(jnp.bfloat16)}
    for first in (STATE, halves):
        state, _ = jax.lax.scan(step, jaxnorm.begin_accumulation(first), X.reshape(3, 4, 5, 3))
        chex.assert_trees_all_close(statistics(state), norm(X, None, first)[1], **CLOSE)


@both
def test_a_poisoned_micro_batch_skips_the_whole_update_of_its_channel(norm):
    state = jaxnorm.begin_accumulation(STATE)
    poisoned = X.copy()
    poisoned[5, 0, 1] = np.nan
    for x in np.split(poisoned, 3):
        _, state = norm(x, None, state)
    expected = norm(poisoned, None, STATE)[1]
    chex.assert_trees_all_close(statistics(state), expected, **CLOSE)
    np.testing.assert_array_equal(state["mean"][1], STATE["mean"][1])


@both
def test_evaluation_does_not_change_the_accumulation(norm):
    _, state = norm(X[:4], None, jaxnorm.begin_accumulation(STATE))
    _, after = norm(X, None, state, use_running_average=True)
    assert after is state


def test_a_single_entry_of_a_channel_is_only_used_with_later_ones():
    state = jaxnorm.begin_accumulation(STATE)
    for k in range(12):
        one = np.zeros_like(MASK)
        one[k, 0] = True
        _, state = jaxnorm.batch_norm(X, None, state, mask=one)
        if k == 0:
            chex.assert_trees_all_equal(statistics(state), STATE)
    first = np.zeros_like(MASK)
    first[:, 0] = True
    expected = jaxnorm.batch_norm(X, None, STATE, mask=first)[1]
    chex.assert_trees_all_close(statistics(state), expected, **CLOSE)


def test_update_batch_stats_accumulates_too():
    state = jaxnorm.begin_accumulation(STATE)
    for x in np.split(X, 3):
        state = jaxnorm.update_batch_stats(state, jaxnorm.moments(x, (0, 1)))
    expected = jaxnorm.batch_norm(X, None, STATE)[1]
    chex.assert_trees_all_close(statistics(state), expected, **CLOSE)


def test_trees_of_states_begin_and_end():
    tree = {
        "a": {"bn": STATE},
        "b": {"c": {"bn": jax.tree.map(lambda a: jnp.stack([a, a]), STATE)}},
    }
    begun = jaxnorm.begin_accumulation(tree)
    assert begun["b"]["c"]["bn"]["accumulation"]["moments"]["mean"].shape == (2, 3)
    assert begun["a"]["bn"]["accumulation"]["start"]["count"] == 7
    chex.assert_trees_all_equal(jaxnorm.end_accumulation(begun), tree)


@pytest.mark.parametrize("function", [jaxnorm.begin_accumulation, jaxnorm.end_accumulation])
@pytest.mark.parametrize("nothing", [{}, {"a": {}}, {"kernel": jnp.ones(3)}, None])
def test_a_tree_without_a_state_is_an_error(function, nothing):
    with pytest.raises(ValueError, match=f"{function.__name__}: batch_stats .* holds none"):
        function(nothing)


def test_a_state_that_lacks_its_count_is_an_error_that_names_it():
    state = {key: STATE[key] for key in ("mean", "var")}
    with pytest.raises(ValueError, match=r"begin_accumulation: \['a'\].*'count': jnp.int32\(0\)"):
        jaxnorm.begin_accumulation({"a": state})


# ---- Layers, and optax.MultiSteps ----


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = jaxnorm.linen.BatchNorm(use_running_average=False, momentum=0.3)(x)
        x = nn.Dense(4)(x)
        options = {"use_running_average": False, "track_running_stats": True}
        x = jaxnorm.linen.InstanceNorm(**options)(x)
        return nn.Dense(1)(jnp.tanh(x))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.bn = jaxnorm.nnx.BatchNorm(3, momentum=0.3, rngs=rngs)
        self.norm = jaxnorm.nnx.InstanceNorm(3, track_running_stats=True, rngs=rngs)
        self.dense = nnx.Linear(3, 1, rngs=rngs)

    def __call__(self, x):
        return self.dense(jnp.tanh(self.norm(self.bn(x))))


@pytest.mark.slow
@jax.numpy_dtype_promotion("standard")  # optax.MultiSteps mixes dtypes
def test_linen_layers_accumulate_under_multisteps_as_one_large_batch():
    k, model = 3, Linen()
    variables = model.init(jax.random.key(0), X)
    optimizer = optax.MultiSteps(optax.sgd(0.1), k)

    @jax.jit
    def micro_step(train, x):
        params, batch_stats, opt_state = train

        def loss(params):
            variables = {"params": params, "batch_stats": batch_stats}
            y, updates = model.apply(variables, x, mutable=["batch_stats"])
            return jnp.mean(y**2), updates["batch_stats"]

        grads, batch_stats = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        last = optimizer.has_updated(opt_state)
        return (params, jaxnorm.begin_accumulation(batch_stats, last), opt_state), None

    params = variables["params"]
    batch_stats = jaxnorm.begin_accumulation(variables["batch_stats"])
    # The input of the first norm is the data, so that its state can be predicted.
    expected = variables["batch_stats"]["BatchNorm_0"]
    train = (params, batch_stats, optimizer.init(params))
    for epoch in range(2):
        train, _ = jax.lax.scan(micro_step, train, (X + epoch).reshape(k, 4, 5, 3))
        update = functools.partial(jaxnorm.batch_norm, momentum=0.3)
        _, expected = update(X + epoch, None, expected)
    found = train[1]["BatchNorm_0"]
    chex.assert_trees_all_close(statistics(found), dict(expected), **CLOSE)
    assert train[1]["InstanceNorm_0"]["count"] == 2


def test_nnx_layers_accumulate_in_place():
    model, whole = Nnx(nnx.Rngs(0)), Nnx(nnx.Rngs(0))
    jaxnorm.nnx.begin_accumulation(model)

    @nnx.jit
    def micro_step(model, x, last):
        model(x)
        jaxnorm.nnx.begin_accumulation(model, last)

    for k, x in enumerate(np.split(np.concatenate([X, X + 1]), 6)):
        micro_step(model, x, k % 3 == 2)
    whole(X)
    whole(X + 1)
    for key in ("mean", "var", "count"):
        found, expected = (getattr(m.bn, key)[...] for m in (model, whole))
        np.testing.assert_allclose(found, expected, **CLOSE)
    assert model.norm.count[...] == 2
    assert nnx.state(model, nnx.BatchStat)["bn"]["accumulation"] is not None
    jaxnorm.nnx.end_accumulation(model)
    assert nnx.state(model).keys() == nnx.state(whole).keys()
    assert "accumulation" not in nnx.state(model, nnx.BatchStat)["bn"]
    model(X)
    assert model.bn.count[...] == 3


def test_nnx_scan_carries_layers_that_begin_anew():
    model = Nnx(nnx.Rngs(0))
    jaxnorm.nnx.begin_accumulation(model)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def train(model, batch):
        x, last = batch
        model(x)
        jaxnorm.nnx.begin_accumulation(model, last)
        return model

    train(model, (X.reshape(6, 2, 5, 3), jnp.arange(6) % 3 == 2))
    assert model.bn.count[...] == model.norm.count[...] == 2


def test_an_nnx_model_without_running_statistics_is_an_error():
    layer = jaxnorm.nnx.BatchNorm(3, track_running_stats=False, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"batch_stats should .* holds none"):
        jaxnorm.nnx.begin_accumulation(layer)
