"""Tests that a batch that is distributed over devices is normalized as the whole batch.

The first tests generate random splits: each sample is in a separate slot of one device. The other
slots of the device contain NaN and are masked out, so that the shapes are fixed and the sizes are
not.
"""

import functools
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from models import kernel_init, quick_jit

import jaxnorm
import jaxnorm.linen
import jaxnorm.nnx
from jaxnorm._core import platforms

pytestmark = pytest.mark.usefixtures("strict")
RNG = np.random.default_rng(11)
DEVICES, N, LENGTH, C = 4, 6, 3, 2
SHAPE = (N, LENGTH, C)
X = RNG.normal(1, 2, (8, 5, C)).astype(np.float32)  # for the tests without random splits
PARAMS = {"scale": jnp.array([1.5, -0.5]), "bias": jnp.array([0.1, -0.2])}
STATE = {"mean": jnp.array([0.5, -1.0]), "var": jnp.array([2.0, 3.0]), "count": jnp.int32(5)}
NORM = {"batch": jaxnorm.batch_norm, "instance": jaxnorm.instance_norm}
both = pytest.mark.parametrize("kind", NORM)
# A sum in another order differs by a few units in the last place of values around 1.
close = functools.partial(chex.assert_trees_all_close, rtol=2e-6, atol=2e-6)


def mesh(kind=AxisType.Auto, **axes):
    axes = axes or {"d": DEVICES}
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(kind,) * len(axes))


def shard_map(f, in_specs, out_specs, **axes):
    """Maps a function over the devices of a mesh, with the default checks of shard_map."""
    return jax.shard_map(f, mesh=mesh(**axes), in_specs=in_specs, out_specs=out_specs)


# ---- Any split ----


def by_shard_map(norm):
    f = functools.partial(norm, axis_name="d")
    return shard_map(
        lambda x, mask, params: f(x, params, STATE, mask=mask),
        (P("d"), P("d"), P()),
        (P("d"), P()),
    )


def by_vmap(norm):
    f = functools.partial(norm, axis_name="d")
    mapped = jax.vmap(
        lambda x, mask, params: f(x, params, STATE, mask=mask),
        in_axes=(0, 0, None),
        out_axes=(0, None),
        axis_name="d",
    )

    def on_slots(x, mask, params):
        x, mask = (a.reshape(DEVICES, N, *SHAPE[1:]) for a in (x, mask))
        y, state = mapped(x, mask, params)
        return y.reshape(-1, *SHAPE[1:]), state

    return on_slots


def by_nothing(norm):
    """Calls a function on arrays that are sharded already, or not at all, without axis name."""
    return lambda x, mask, params: norm(x, params, STATE, mask=mask)


SPREAD = {
    "shard_map": (by_shard_map, AxisType.Auto),
    "vmap": (by_vmap, None),
    "auto": (by_nothing, AxisType.Auto),
    "explicit": (by_nothing, AxisType.Explicit),
    "whole": (by_nothing, None),
}


@functools.cache
def program(kind, way):
    """Compiles y, the new state and the gradients for x and params, once for all splits."""
    make, axis_type = SPREAD[way]
    f = make(NORM[kind])

    def loss(x, params, mask, weights):
        y, state = f(x, mask, params)
        return jnp.sum(jnp.sin(y) * weights), (y, state)

    jitted = quick_jit(jax.value_and_grad(loss, (0, 1), has_aux=True))

    def run(x, mask, weights):
        if axis_type is None:
            return jax.device_get(jitted(x, PARAMS, mask, weights))
        current = mesh(axis_type)
        with jax.set_mesh(current):
            sharding = NamedSharding(current, P("d"))
            x, mask, weights = (jax.device_put(a, sharding) for a in (x, mask, weights))
            return jax.device_get(jitted(x, PARAMS, mask, weights))

    return run


def slot(device):
    """Returns the slots of samples, which are distinct on each device."""
    return device, (np.arange(N) + device) % N


def in_slots(a, device, fill):
    """Puts each sample in its slot of its device, and fills the other slots."""
    slots = np.full((DEVICES, *a.shape), fill, a.dtype)
    slots[slot(device)] = a
    return slots.reshape(-1, *a.shape[1:])


def from_slots(slots, device):
    return slots.reshape(DEVICES, N, *slots.shape[1:])[slot(device)]


def offsets():
    """Draws one offset for all samples, or one for each sample."""
    one = st.sampled_from([0.0, 1e2, 1e4, 1e6])
    return one | hnp.arrays(np.float32, (N, 1, 1), elements=one)


def indices(below):
    return hnp.arrays(np.int32, N, elements=st.integers(0, below - 1))


VALUES = hnp.arrays(np.float32, SHAPE, elements=st.floats(-8, 8, width=32, allow_subnormal=False))
MASKS = hnp.arrays(bool, SHAPE)
WEIGHTS = RNG.normal(0, 1, SHAPE).astype(np.float32)


@both
@pytest.mark.parametrize("way", [way for way in SPREAD if way != "whole"])
@settings(max_examples=60, deadline=None)
@given(values=VALUES, offset=offsets(), mask=MASKS, device=indices(DEVICES))
def test_any_split_over_devices_is_the_whole_batch(kind, way, values, offset, mask, device):
    x = (values + offset).astype(np.float32)
    slots = in_slots(x, device, np.nan), in_slots(mask, device, False)
    (_, (y, state)), (dx, dparams) = program(kind, way)(*slots, in_slots(WEIGHTS, device, 0))
    (_, (y_whole, state_whole)), whole = program(kind, "whole")(x, mask, WEIGHTS)
    # The largest errors in 1,600 draws were 2e-6 for y, which is up to 6; 2e-6 / deviation for dx;
    # 6e-6 for sums over 18 entries; 5e-7 for the state, relative to it and the largest entry.
    np.testing.assert_allclose(from_slots(y, device), y_whole, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(np.where(slots[1], 0, y), 0)
    largest = np.abs(np.where(mask, x, 0)).max() + 1
    np.testing.assert_allclose(state["mean"], state_whole["mean"], rtol=0, atol=1e-6 * largest)
    np.testing.assert_allclose(state["var"], state_whole["var"], rtol=2e-6)
    np.testing.assert_array_equal(state["count"], state_whole["count"])
    axes = (0, 1) if kind == "batch" else 1
    var = np.ma.array(x, np.float64, mask=~mask).var(axes, keepdims=True).filled(0)
    deviation = np.sqrt(var + 1e-5)
    np.testing.assert_allclose(
        from_slots(dx, device) * deviation, whole[0] * deviation, rtol=0, atol=1e-5
    )
    np.testing.assert_array_equal(np.where(slots[1], 0, dx), 0)
    chex.assert_trees_all_close(dparams, whole[1], rtol=0, atol=3e-5)


MICRO = 3


def rows_or_pooled(kind, x, mask, **options):
    """Returns the moments of the batch for batch norm, and of each sample for instance norm."""
    if kind == "batch":
        return jaxnorm.moments(x, (0, 1), mask=mask, **options)
    return jax.vmap(lambda x, mask: jaxnorm.moments(x, 0, mask=mask))(x, mask)


def micro_batches(mask, micro):
    return [mask & (micro == k)[:, None, None] for k in range(MICRO)]


@functools.cache
def micro_program(kind, spread):
    """Compiles one update by all moments, and the gradient of the moments."""

    def all_moments(x, mask, micro):
        options = {"axis_name": "d"} if spread else {}
        batches = micro_batches(mask, micro)
        parts = [rows_or_pooled(kind, x, batch, **options) for batch in batches]
        if kind == "batch":
            return functools.reduce(jaxnorm.merge_moments, parts)
        return jax.tree.map(lambda *rows: jnp.concatenate(rows), *parts)

    if spread:
        all_moments = shard_map(all_moments, P("d"), P() if kind == "batch" else P("d"))
    else:
        all_moments = lambda x, mask, _: rows_or_pooled(kind, x, mask)  # noqa: E731

    def loss(x, mask, micro):
        m = all_moments(x, mask, micro)
        state = jaxnorm.update_batch_stats(STATE, m)
        return jnp.sum(m.mean * PARAMS["scale"] + m.var * PARAMS["bias"]), state

    return quick_jit(jax.grad(loss, has_aux=True))


@functools.cache
def accumulating_program(kind):
    """Compiles the accumulation of all micro-batches, with one call for each."""

    def train(x, mask, micro):
        state = jaxnorm.begin_accumulation(STATE)
        for batch in micro_batches(mask, micro):
            _, state = NORM[kind](x, None, state, mask=batch, axis_name="d")
        return jaxnorm.end_accumulation(state)

    return quick_jit(shard_map(train, P("d"), P()))


@both
@settings(max_examples=60, deadline=None)
@given(values=VALUES, offset=offsets(), mask=MASKS, device=indices(DEVICES), micro=indices(MICRO))
def test_any_split_into_micro_batches_too(kind, values, offset, mask, device, micro):
    x = (values + offset).astype(np.float32)
    slots = in_slots(x, device, np.nan), in_slots(mask, device, False), in_slots(micro, device, -1)
    dx, state = micro_program(kind, True)(*slots)
    dx_whole, state_whole = micro_program(kind, False)(x, mask, micro)
    # Between micro-batches, the mean is rounded to float32. The error of the variance is this error
    # times the range of the entries.
    chosen = x[mask].astype(np.float64)
    rounding = 2.0**-23 * np.abs(chosen).max(initial=1)
    apart = np.ptp(chosen) if chosen.size else 0
    for found in (state, accumulating_program(kind)(*slots)):
        np.testing.assert_allclose(found["mean"], state_whole["mean"], rtol=0, atol=rounding)
        np.testing.assert_allclose(
            found["var"], state_whole["var"], rtol=2e-6, atol=rounding * (rounding + apart)
        )
        np.testing.assert_array_equal(found["count"], state_whole["count"])
    np.testing.assert_allclose(from_slots(dx, device), dx_whole, rtol=2e-6, atol=rounding)


# ---- pmap, several names, groups ----


def stepped(kind, axis_name=None, groups=None):
    """Returns y, the new state, and the gradients for x and params, on one of several devices."""

    def step(x, params):
        def loss(x, params):
            y, state = NORM[kind](x, params, STATE, axis_name=axis_name, axis_index_groups=groups)
            return jnp.sum(jnp.sin(y)), (y, state)

        (dx, dparams), (y, state) = jax.grad(loss, (0, 1), has_aux=True)(x, params)
        return y, state, dx, dparams

    return step


@functools.cache
def stepped_alone(kind):
    return quick_jit(stepped(kind))


@both
def test_pmap(kind):
    step = stepped(kind, "d")

    def synced(x, params):
        y, state, dx, dparams = step(x, params)
        return y, state, dx, jax.lax.psum(dparams, "d")

    y, state, dx, dparams = jax.pmap(synced, "d", in_axes=(0, None))(
        X.reshape(DEVICES, -1, *X.shape[1:]), PARAMS
    )
    expected = stepped_alone(kind)(X, PARAMS)
    close((y.reshape(X.shape), dx.reshape(X.shape)), (expected[0], expected[2]))
    for d in range(DEVICES):
        close(jax.tree.map(lambda a, d=d: a[d], (state, dparams)), (expected[1], expected[3]))


def over_two_names(way, f):
    """Maps f over x along both axes "a" and "b", and stacks all outputs along them."""
    names = "a", "b"

    def on_one(x, params):
        return jax.tree.map(lambda a: a[None], f(x, params))

    if way == "shard_map":
        return shard_map(on_one, (P(names), P()), P(names), a=2, b=2)

    def on_all(x, params):
        inner = jax.vmap(on_one, in_axes=(0, None), axis_name="b")
        outer = jax.vmap(inner, in_axes=(0, None), axis_name="a")
        stacked = outer(x.reshape(2, 2, -1, *x.shape[1:]), params)
        return jax.tree.map(lambda a: a.reshape(DEVICES, *a.shape[3:]), stacked)

    return on_all


@both
@pytest.mark.parametrize(
    ("way", "groups"),
    [("shard_map", None), ("shard_map", [[3, 0], [1, 2]]), ("vmap", [[3, 0], [1, 2]])],
)
def test_several_names_and_groups_along_them(kind, way, groups):
    step = stepped(kind, ("a", "b"), groups)
    y, state, dx, _ = quick_jit(over_two_names(way, step))(X, PARAMS)
    parts = X.reshape(DEVICES, -1, *X.shape[1:])
    for group in groups or [list(range(DEVICES))]:
        members = np.asarray(group)
        whole = stepped_alone(kind)(parts[members].reshape(-1, *X.shape[1:]), PARAMS)
        close(y[members].reshape(whole[0].shape), whole[0])
        close(dx[members].reshape(whole[0].shape), whole[2])
        for d in group:
            close(jax.tree.map(lambda a, d=d: a[d], state), whole[1])


# ---- Names that are not bound ----

LAYERS = {
    "BatchNorm": {"use_running_average": False},
    "InstanceNorm": {"use_running_average": False, "track_running_stats": True},
    "GroupNorm": {"num_groups": 1},
    "LayerNorm": {},
    "RMSNorm": {},
}


@pytest.mark.parametrize("groups", [None, [[0, 1], [2, 3]]])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_made_where_its_axis_name_is_not_bound(name, groups):
    options = {**LAYERS[name], "axis_name": "d", "axis_index_groups": groups}
    layer = getattr(jaxnorm.linen, name)(**options)
    y, _ = layer.init_with_output(jax.random.key(0), X)
    alone, _ = getattr(jaxnorm.linen, name)(**LAYERS[name]).init_with_output(jax.random.key(0), X)
    np.testing.assert_array_equal(y, alone)
    getattr(jaxnorm.nnx, name)(C, **options, rngs=nnx.Rngs(0))


@both
@pytest.mark.parametrize("groups", [None, [[0, 1], [2, 3]]])
def test_evaluation_needs_no_bound_axis_name_and_training_without_one_is_an_error(kind, groups):
    norm = functools.partial(NORM[kind], axis_name="d", axis_index_groups=groups)
    y, _ = norm(X, PARAMS, STATE, use_running_average=True)
    expected, _ = NORM[kind](X, PARAMS, STATE, use_running_average=True)
    np.testing.assert_array_equal(y, expected)
    with pytest.raises(NameError, match="unbound axis name: d"):
        norm(X, PARAMS, STATE)


# ---- Layers in training ----

STEPS = 5
XS = RNG.normal(0, 1, (STEPS, 8, 5, 3)).astype(np.float32)
TARGETS = RNG.normal(0, 1, (STEPS, 8, 1)).astype(np.float32)


class LinenNet(nn.Module):
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x):
        options = {"use_running_average": False, "axis_name": self.axis_name}
        dense = functools.partial(nn.Dense, kernel_init=kernel_init)
        x = nn.relu(jaxnorm.linen.BatchNorm(**options)(dense(8)(x)))
        x = jaxnorm.linen.InstanceNorm(track_running_stats=True, **options)(dense(8)(x))
        return dense(1)(nn.relu(x).mean(1))


class NNXNet(nnx.Module):
    def __init__(self, axis_name=None, *, rngs):
        dense = functools.partial(nnx.Linear, kernel_init=kernel_init, rngs=rngs)
        self.dense = nnx.List([dense(3, 8), dense(8, 8), dense(8, 1)])
        self.batch = jaxnorm.nnx.BatchNorm(8, axis_name=axis_name, rngs=rngs)
        self.instance = jaxnorm.nnx.InstanceNorm(
            8, axis_name=axis_name, track_running_stats=True, rngs=rngs
        )

    def __call__(self, x):
        x = nnx.relu(self.batch(self.dense[0](x)))
        x = nnx.relu(self.instance(self.dense[1](x)))
        return self.dense[2](x.mean(1))


def linen_net(axis_name):
    """Returns initial params and batch_stats, and a call that returns y and the updated state."""
    model = LinenNet(axis_name)
    variables = quick_jit(model.init)(jax.random.key(0), XS[0])

    def call(params, batch_stats, x):
        variables = {"params": params, "batch_stats": batch_stats}
        y, updates = model.apply(variables, x, mutable=["batch_stats"])
        return y, updates["batch_stats"]

    return variables["params"], variables["batch_stats"], call


def nnx_net(axis_name):
    graph, params, batch_stats = nnx.split(
        NNXNet(axis_name, rngs=nnx.Rngs(0)), nnx.Param, nnx.BatchStat
    )

    def call(params, batch_stats, x):
        model = nnx.merge(graph, params, batch_stats, copy=True)
        y = model(x)
        return y, nnx.state(model, nnx.BatchStat)

    return params, batch_stats, call


def trained(net, axis_name=None):
    """Returns params and batch_stats after the steps; with a name, it trains in shard_map."""
    params, batch_stats, call = net(axis_name)

    def step(carry, batch):
        params, batch_stats = carry
        x, target = batch

        def loss(params):
            y, new = call(params, batch_stats, x)
            error = jnp.mean((y - target) ** 2)
            return (error if axis_name is None else jax.lax.pmean(error, axis_name)), new

        grads, batch_stats = jax.grad(loss, has_aux=True)(params)
        return (optax.apply_updates(params, jax.tree.map(lambda g: -0.1 * g, grads)), batch_stats)

    def train(params, batch_stats, xs, targets):
        carry = params, batch_stats
        return jax.lax.scan(lambda *args: (step(*args), None), carry, (xs, targets))[0]

    if axis_name is not None:
        spread = P(None, axis_name)
        train = shard_map(train, (P(), P(), spread, spread), P())
    return quick_jit(train)(params, batch_stats, XS, TARGETS)


@pytest.mark.parametrize("net", [linen_net, nnx_net])
def test_a_model_trains_in_shard_map_as_on_one_device(net):
    # Each step adds a few units in the last place.
    chex.assert_trees_all_close(trained(net, "d"), trained(net), rtol=1e-5, atol=1e-5)


# ---- Masks, NaN and replicas ----


@functools.cache
def on_devices(kind, **options):
    """Returns y, the state and dx, with one row of x per device; the loss is sum(sin(y))."""

    def f(x, mask):
        y, state = NORM[kind](x, PARAMS, STATE, axis_name="d", mask=mask, **options)
        return jnp.sum(jnp.sin(y))[None], (y, state)

    def run(x, mask=True):
        def loss(x):
            spread = shard_map(f, P("d"), (P("d"), (P("d"), P())))
            losses, aux = spread(x, jnp.broadcast_to(mask, x.shape))
            return jnp.sum(losses), aux

        dx, (y, state) = jax.grad(loss, has_aux=True)(x)
        return y, state, dx

    return quick_jit(run)


def test_devices_are_weighted_by_their_unmasked_entries():
    x = np.zeros((DEVICES, 4, C), np.float32)
    x[0], x[1] = [[1], [2], [3], [4]], 10
    mask = np.zeros((DEVICES, 4, 1), bool)
    mask[0], mask[1, 0] = True, True
    x[~mask[..., 0]] = np.nan
    y, state, _ = on_devices("batch", momentum=1.0)(x, mask)
    np.testing.assert_allclose(state["mean"], 4.0, rtol=1e-6)  # the mean of means would be 6.25
    np.testing.assert_allclose(state["var"], 12.5, rtol=1e-6)  # (9 + 4 + 1 + 0 + 36) / 4
    x_hat = (10 - 4) / np.sqrt(10 + 1e-5)
    np.testing.assert_allclose(y[1, 0], PARAMS["scale"] * x_hat + PARAMS["bias"], rtol=1e-6)


@both
@pytest.mark.parametrize("empty", [0, 2])
def test_a_device_that_is_masked_out_has_weight_0(kind, empty):
    x = RNG.normal(100, 2, (DEVICES, 5, C)).astype(np.float32)
    x[empty] = np.nan
    mask = np.ones((DEVICES, 1, 1), bool)
    mask[empty] = False
    others = [d for d in range(DEVICES) if d != empty]
    y, state, dx = on_devices(kind, momentum=0.1)(x, mask)
    chex.assert_tree_all_finite((y, state, dx))
    expected, state_expected = quick_jit(NORM[kind])(x[others], PARAMS, STATE)
    # At an offset of 100, the mean of the state has an error of up to 1e-5.
    chex.assert_trees_all_close(state, state_expected, rtol=1e-6, atol=1e-5)
    close(y[np.asarray(others)], expected)
    np.testing.assert_array_equal(dx[empty], 0)


@both
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_nan_on_one_device_skips_the_channel_on_all_alike(kind, momentum):
    x = RNG.normal(1, 2, (DEVICES, 5, C)).astype(np.float32)
    run = on_devices(kind, momentum=momentum)
    _, clean, _ = run(x)
    x[2, 3, 0] = np.nan
    _, state, _ = run(x)
    for key in ("mean", "var", "count"):
        copies = [np.asarray(shard.data) for shard in state[key].addressable_shards]
        assert len(copies) == DEVICES
        for copy in copies:
            np.testing.assert_array_equal(copy, copies[0])
    # With momentum=None, one count cannot weigh channels that are averages of different batches.
    moved = clean if momentum else STATE
    for key in ("mean", "var"):
        assert state[key][0] == STATE[key][0]
        np.testing.assert_allclose(state[key][1], moved[key][1], rtol=1e-6)
    assert state["count"] == moved["count"]


def test_replicas_that_were_not_synced_are_merged_as_if_they_had_been():
    n = 1000
    x = np.sqrt(0.95 * (n - 1) / n) * np.where(np.arange(n) % 2, 1, -1)  # unbiased variance 0.95
    x = jnp.asarray(np.stack([x, x + 4])[..., None], jnp.float32)  # two shards, (N, C) = (1000, 1)
    first = jaxnorm.init_batch_stats(1)

    def update(x, axis_name=None):
        return jaxnorm.batch_norm(x, None, first, momentum=None, axis_name=axis_name)[1]

    @quick_jit
    def updates(x):
        synced = jax.vmap(lambda x: update(x, "d"), axis_name="d", out_axes=None)
        return jax.vmap(update)(x), synced(x)

    alone, synced = updates(x)
    np.testing.assert_allclose(alone["var"], 0.95, rtol=1e-6)
    merged = jaxnorm.merge_batch_stats(alone)
    np.testing.assert_allclose(merged["mean"], synced["mean"], rtol=1e-6)
    np.testing.assert_allclose(merged["var"], 4.95, rtol=1e-6)
    # The unbiased variances divide by 2 n - 1 and by n - 1, which differ by the order of 1 / n.
    np.testing.assert_allclose(merged["var"], synced["var"], rtol=1 / n)


# ---- Compiled programs ----

COLLECTIVES = r" (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\("
WIDE = jax.ShapeDtypeStruct((8, 12, 16), jnp.float32)  # (N, L, C)
FIRST = jaxnorm.init_params(16), jaxnorm.init_batch_stats(16)


def all_reduces(f, in_specs, out_specs, *args):
    """Returns the number of collectives, and checks that all of them are all-reduces."""
    return collectives(quick_jit(shard_map(f, in_specs, out_specs)), *args)


def collectives(jitted, *args):
    """Returns the number of all-reduces outside the loop, and checks for other collectives."""
    text = jitted.lower(*args).compile().as_text()
    assert set(re.findall(COLLECTIVES, text)) <= {"all-reduce"}
    return len(re.findall(COLLECTIVES, text[text.index("\nENTRY") :]))


def training_step(forward, layers=1):
    """Returns the loss, new params and states of an SGD step through a number of norms."""

    def step(x, params, states):
        def loss(params):
            y, new = x, []
            for p, state in zip(params, states, strict=True):
                y, state = forward(jnp.tanh(y), p, state)
                new.append(state)
            return jax.lax.pmean(jnp.mean(jnp.sin(y)), "d"), new

        (value, new), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return value, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), new

    return step


@pytest.mark.parametrize(
    ("kind", "options", "most"),
    [
        ("batch", {}, 1),
        ("batch", {"update_stats": False}, 1),
        ("batch", {"use_running_average": True}, 0),
        ("batch", {"use_running_average": True, "update_stats": True}, 1),
        ("instance", {}, 1),
        ("instance", {"update_stats": False}, 0),
        ("instance", {"use_running_average": True}, 0),
    ],
)
def test_one_collective_forward_and_none_where_none_is_needed(kind, options, most):
    """Checks upper bounds, here and below, because fewer collectives do no harm."""
    forward = functools.partial(NORM[kind], axis_name="d", **options)
    assert all_reduces(forward, (P("d"), P(), P()), (P("d"), P()), WIDE, *FIRST) <= most


@pytest.mark.parametrize(
    ("kind", "layers", "most"),
    [
        ("batch", 1, 2),  # includes the sums for loss, scale and bias
        ("batch", 3, 2 * 3),
        ("instance", 1, 1),  # here, also the states of all layers
        ("instance", 3, 1),
    ],
)
def test_one_collective_each_way_in_training(kind, layers, most):
    forward = functools.partial(NORM[kind], axis_name="d")
    args = WIDE, [FIRST[0]] * layers, [FIRST[1]] * layers
    step = training_step(forward, layers)
    assert all_reduces(step, (P("d"), P(), P()), P(), *args) <= most


STATELESS = {
    "group": (functools.partial(jaxnorm.group_norm, num_groups=4), P(None, "d"), P()),
    "layer": (jaxnorm.layer_norm, P(None, None, "d"), P("d")),
    "rms": (jaxnorm.rms_norm, P(None, None, "d"), P("d")),
}


@pytest.mark.parametrize("kind", STATELESS)
def test_one_collective_each_way_for_a_norm_whose_sample_is_spread(kind):
    norm, x_spec, params_spec = STATELESS[kind]

    def forward(x, params, state=None):
        return norm(x, params, axis_name="d"), state

    first = lambda x, params: forward(x, params)[0]  # noqa: E731
    assert all_reduces(first, (x_spec, params_spec), x_spec, WIDE, FIRST[0]) <= 1
    args = WIDE, [FIRST[0]], [None]
    step = training_step(forward)
    assert all_reduces(step, (x_spec, params_spec, P()), (P(), params_spec, P()), *args) <= 2


@both
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_a_sharded_batch_under_jit_takes_few_collectives_forward(kind, axis_type, platform):
    """Counts the collectives of the forward pass.

    Batch norm needs its sums, and on a GPU the shift before them. Instance norm needs those of the
    state and, with a loop, whether any sample on any device has to be computed again.
    """
    with jax.set_mesh(mesh(axis_type)), platforms.formulated_for(platform):
        x = jax.device_put(np.zeros(WIDE.shape, np.float32), P("d"))
        found = collectives(quick_jit(NORM[kind]), x, *FIRST)
    assert found <= {("batch", "cpu"): 1, ("instance", "cuda"): 1}.get((kind, platform), 2)
