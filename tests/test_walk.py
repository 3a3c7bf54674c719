"""Tests that all functions that take a tree of states see the same states."""

import types
from typing import Any

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, struct

import jaxnorm
import jaxnorm.nnx
from jaxnorm import inspect, interop


def state(k):
    """Returns a trained state of two channels."""
    values = {"mean": jnp.array([1.0, 2.0]) + k, "var": jnp.array([3.0, 4.0]) + k}
    return {**values, "count": jnp.int32(5 + k)}


@struct.dataclass
class TrainState:
    step: int
    batch_stats: Any


class Pair(nnx.Module):
    def __init__(self):
        self.a = jaxnorm.nnx.BatchNorm(2, rngs=nnx.Rngs(0))
        self.rest = nnx.List([jaxnorm.nnx.BatchNorm(2, rngs=nnx.Rngs(0))])


def nnx_state():
    model = Pair()
    for k, layer in enumerate([model.a, model.rest[0]]):
        for key, value in state(k).items():
            getattr(layer, key).set_value(value)
    return nnx.state(model, nnx.BatchStat)


# Each contains state(0) and state(1), in this order.
TREES = {
    "dict": lambda: {"a": state(0), "b": {"c": state(1)}},
    "list": lambda: [state(0), [state(1)]],
    "tuple": lambda: ({"a": state(0)}, (state(1),)),
    "FrozenDict": lambda: flax.core.freeze({"a": state(0), "b": {"c": state(1)}}),
    "list in a dict": lambda: {"a": state(0), "layers": [{"bn": state(1)}]},
    "a state beside a module of its own": lambda: {**state(0), "norm": state(1)},
    "flax.struct": lambda: TrainState(7, {"a": state(0), "b": [state(1)]}),
    "a mapping that is no pytree": lambda: types.MappingProxyType({"a": state(0), "b": [state(1)]}),
    "modules called mean and var": lambda: {"mean": state(0), "var": state(1)},
    "nnx.State": nnx_state,
}
# The containers that jit accepts; programs cannot use the others.
PYTREES = [name for name in TREES if name != "a mapping that is no pytree"]


@pytest.fixture(params=TREES)
def tree(request):
    return TREES[request.param]()


def test_check_batch_stats_looks_at_every_state(tree):
    assert jaxnorm.check_batch_stats(tree) == []
    bad = jaxnorm._stats.trees.map_states("", lambda _, s: {**s, "var": -s["var"]}, tree)
    problems = [finding.problem for finding in jaxnorm.check_batch_stats(bad)]
    assert problems == ["is negative in 2 of 2 channels"] * 2


def test_like_compares_every_state(tree):
    assert jaxnorm.check_batch_stats(tree, like=tree) == []
    other = jaxnorm._stats.trees.map_states("", lambda _, s: {**s, "mean": jnp.ones(3)}, tree)
    assert len(jaxnorm.check_batch_stats(tree, like=other)) == 2


def test_every_state_accumulates_in_its_own_kind_of_tree(tree):
    begun = jaxnorm.begin_accumulation(tree)
    assert type(begun) is type(tree)
    assert all("accumulation" in s for _, s in jaxnorm._stats.trees.states(begun))
    ended = jaxnorm.end_accumulation(begun)
    for (_, old), (_, new) in zip(
        jaxnorm._stats.trees.states(tree), jaxnorm._stats.trees.states(ended), strict=True
    ):
        jax.tree.map(np.testing.assert_array_equal, old, new)
    if not isinstance(tree, types.MappingProxyType):
        assert jax.tree.structure(ended) == jax.tree.structure(tree)


def test_inspect_sees_every_state(tree):
    counts = [int(v) for name, v in inspect.scalars(tree).items() if name.endswith("count")]
    assert sorted(counts) == [5, 6]
    assert len(inspect.flat(tree)) == 6
    assert all(v == 0 for v in inspect.drift(tree, tree).values())


@pytest.mark.parametrize("name", PYTREES)
def test_every_state_is_recalibrated(name):
    tree, x = TREES[name](), jnp.array([[1.0, 2.0], [3.0, 5.0], [8.0, 13.0], [9.0, 9.5]])

    def step(tree, x):
        def move(_, s):
            return jaxnorm.batch_norm(x, None, s)[1]

        return jaxnorm._stats.trees.map_states("step", move, tree)

    new = jaxnorm.recalibrate(step, tree, [x[:2], x[2:]])
    found = jaxnorm._stats.trees.states(new)
    assert len(found) == 2
    for _, s in found:
        np.testing.assert_allclose(s["mean"], x.mean(0), rtol=1e-6)  # float32 rounding
        np.testing.assert_allclose(s["var"], x.var(0, ddof=1), rtol=1e-6)


@pytest.mark.parametrize("collection", [dict, flax.core.freeze, lambda d: TrainState(1, d)])
def test_parameters_are_compared_through_lists(collection):
    bad = {"params": {"l": [{"bn": {"scale": jnp.ones(3)}}]}}
    good = {"batch_stats": {"l": [{"bn": state(0)}]}}
    (finding,) = jaxnorm.check_batch_stats({**bad, **good})
    assert finding.path == "['batch_stats']['l'][0]['bn']['mean']"


def test_what_is_left_of_a_state_is_found():
    found = jaxnorm.check_batch_stats({"batch_stats": [state(0), {"count": jnp.int32(3)}]})
    assert [str(f) for f in found] == [
        "['batch_stats'][1]['mean'] is missing",
        "['batch_stats'][1]['var'] is missing",
    ]


@pytest.mark.parametrize("held", [[], {}, {"start": state(0)}, {"moments": {}}])
def test_a_broken_accumulation_is_found(held):
    found = jaxnorm.check_batch_stats({**state(0), "accumulation": held})
    assert {f.path for f in found} == {"['accumulation']"}
    assert jaxnorm.check_batch_stats({**state(0), "accumulation": None}) == []


def test_nan_where_an_accumulation_began_is_found():
    begun = jaxnorm.begin_accumulation({**state(0), "mean": jnp.array([jnp.nan, 1])})
    paths = [f.path for f in jaxnorm.check_batch_stats(begun)]
    assert paths == ["['mean']", "['accumulation']['start']['mean']"]


def test_lists_of_numbers_are_arrays_as_in_a_json_file():
    listed = {"mean": [0.5, 1.5], "var": [1.0, 2.0], "count": 3}
    assert jaxnorm.check_batch_stats(listed) == []
    (finding, *_) = jaxnorm.check_batch_stats(listed, like=state(0))
    assert "was expected" in finding.problem


def test_folding_leaves_containers_what_they_are():
    @struct.dataclass
    class Block:
        conv: Any
        bn: Any

    params = Block({"kernel": jnp.ones((1, 2))}, {"scale": jnp.ones(2)})
    variables = {
        "params": {"block": params},
        "batch_stats": flax.core.freeze({"block": [state(0)]}),
    }
    with pytest.raises(ValueError, match=r"batch_stats have no 'block\.bn'"):
        jaxnorm.fold_variables(variables, {"block.conv": "block.bn"})
    variables["batch_stats"] = flax.core.freeze({"block": {"bn": state(0)}, "other": state(1)})
    folded = jaxnorm.fold_variables(variables, {"block.conv": "block.bn"})
    assert isinstance(folded["params"]["block"], Block)
    assert folded["params"]["block"].bn == {}
    assert sorted(folded["params"]["block"].conv) == ["bias", "kernel"]
    assert isinstance(folded["batch_stats"], flax.core.FrozenDict)
    assert list(folded["batch_stats"]) == ["other"]


def test_norms_in_lists_are_folded_and_the_others_keep_their_names():
    params = {"layers": [{"conv": {"kernel": jnp.ones((1, 2))}, "bn": {"scale": jnp.ones(2)}}, 1.0]}
    stats = {"layers": [{"bn": state(0)}, {"bn": state(1)}]}
    folded = jaxnorm.fold_variables(
        {"params": params, "batch_stats": stats}, {"layers.0.conv": "layers.0.bn"}
    )
    first, second = folded["params"]["layers"]
    assert sorted(first) == ["conv"]
    assert sorted(first["conv"]) == ["bias", "kernel"]
    assert second == 1.0
    assert folded["batch_stats"]["layers"][0] == {}
    assert jaxnorm._stats.trees.states(folded["batch_stats"])[0][0] == "['layers'][1]['bn']"
    assert sorted(params["layers"][0]) == ["bn", "conv"]  # the input is not changed


def test_states_in_lists_leave_for_pytorch():
    variables = {"params": [{"scale": jnp.ones(2), "bias": jnp.ones(2)}], "batch_stats": [state(0)]}
    assert sorted(interop.to_torch(variables)) == [
        "0.bias",
        "0.num_batches_tracked",
        "0.running_mean",
        "0.running_var",
        "0.weight",
    ]
