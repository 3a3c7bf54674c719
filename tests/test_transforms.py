"""Tests the norms under JAX's transformations."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors, nnx
from models import quick_jit

import jaxnorm
import jaxnorm.linen as linen
import jaxnorm.nnx

KEY = jax.random.key(2)
RNG = np.random.default_rng(9)
XS = jnp.asarray(RNG.normal(0.5, 2, (3, 4, 5, 6)), jnp.float32)  # three batches of (N, L, C)
X, C = XS[0], 6
FUNCTION = {"batch": jaxnorm.batch_norm, "instance": jaxnorm.instance_norm}
LINEN = {
    "batch": functools.partial(linen.BatchNorm, use_running_average=False),
    "instance": functools.partial(
        linen.InstanceNorm, use_running_average=False, track_running_stats=True, epsilon=1e-5
    ),
}
NNX = {
    "batch": functools.partial(jaxnorm.nnx.BatchNorm, C),
    "instance": functools.partial(
        jaxnorm.nnx.InstanceNorm, C, track_running_stats=True, epsilon=1e-5
    ),
}
both = pytest.mark.parametrize("kind", FUNCTION)
# The programs differ in fusions and reductions: a few units in the last place.
close = functools.partial(chex.assert_trees_all_close, rtol=2e-6, atol=2e-6)


def first(scale=1.0):
    """Returns initial variables with a different scale."""
    params = jaxnorm.init_params(C)
    return {
        "params": {**params, "scale": params["scale"] * scale},
        "batch_stats": jaxnorm.init_batch_stats(C),
    }


def stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@functools.partial(quick_jit, static_argnums=0)
def steps(kind, xs, variables=None):
    """Applies a layer to one batch after another; returns all outputs and the last state."""
    variables = first() if variables is None else variables
    ys, state = [], variables["batch_stats"]
    for x in xs:
        y, state = FUNCTION[kind](x, variables["params"], state)
        ys.append(y)
    return jnp.stack(ys), state


@functools.partial(quick_jit, static_argnums=0)
def through(kind, x, layers):
    """Applies one layer after another to a batch; returns the output and all states."""
    states = []
    for variables in layers:
        x, state = FUNCTION[kind](x, variables["params"], variables["batch_stats"])
        states.append(state)
    return x, stack(states)


@functools.partial(quick_jit, static_argnums=0)
def whole(kind, xs):
    """Concatenates all batches."""
    y, state = FUNCTION[kind](xs.reshape(-1, *xs.shape[-2:]), *first().values())
    return y.reshape(xs.shape), state


@functools.partial(quick_jit, static_argnums=0)
def train(model, variables, *inputs):
    """Returns the output of a Linen model, and its updated variables."""
    return model.apply(variables, *inputs, mutable=["batch_stats"])


def state_of(layer):
    return {key: getattr(layer, key)[...] for key in ("mean", "var", "count")}


def put(layer, variables):
    """Sets the variables of an NNX layer, or of a stack of layers."""
    for values in variables.values():
        for key, value in values.items():
            getattr(layer, key).set_value(value)
    return layer


MEMBERS = [first(scale) for scale in (0.5, 1.0, 2.0)]

# ---- vmap ----


@both
def test_nn_vmap_makes_an_ensemble_with_a_state_each(kind):
    ensemble = nn.vmap(
        LINEN[kind].func,
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True},
    )(**LINEN[kind].keywords)
    chex.assert_trees_all_equal(ensemble.init(KEY, XS), stack([first()] * 3))
    y, updates = train(ensemble, stack(MEMBERS), XS)
    alone = [through(kind, x, [member]) for x, member in zip(XS, MEMBERS, strict=True)]
    close(y, jnp.stack([y for y, _ in alone]))
    close(updates["batch_stats"], jax.tree.map(lambda a: a[:, 0], stack([s for _, s in alone])))


@both
def test_nnx_vmap_makes_an_ensemble_with_a_state_each(kind):
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make(rngs):
        return NNX[kind](rngs=rngs)

    ensemble = make(nnx.Rngs(0))
    close(state_of(ensemble), stack([first()] * 3)["batch_stats"])
    y = nnx.vmap(lambda layer, x: layer(x))(put(ensemble, stack(MEMBERS)), XS)
    alone = [through(kind, x, [member]) for x, member in zip(XS, MEMBERS, strict=True)]
    close(y, jnp.stack([y for y, _ in alone]))
    close(state_of(ensemble), jax.tree.map(lambda a: a[:, 0], stack([s for _, s in alone])))


@both
def test_nn_vmap_shares_a_state_that_is_synced(kind):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, xs):
            shared = nn.vmap(
                LINEN[kind].func,
                variable_axes={"params": None, "batch_stats": None},
                split_rngs={"params": False},
                axis_name="members",
            )
            return shared(axis_name="members", name="norm", **LINEN[kind].keywords)(xs)

    variables = Model().init(KEY, XS)
    chex.assert_trees_all_equal(variables["batch_stats"]["norm"], first()["batch_stats"])
    y, updates = train(Model(), variables, XS)
    close((y, updates["batch_stats"]["norm"]), whole(kind, XS))


@both
def test_nnx_vmap_shares_a_state_that_is_synced(kind):
    layer = NNX[kind](axis_name="members", rngs=nnx.Rngs(0))
    y = nnx.vmap(lambda layer, x: layer(x), in_axes=(None, 0), axis_name="members")(layer, XS)
    close((y, state_of(layer)), whole(kind, XS))


@both
def test_a_shared_state_that_is_not_synced_is_refused_by_flax(kind):
    layer = NNX[kind](rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="axis spec None but output was batched"):
        nnx.vmap(lambda layer, x: layer(x), in_axes=(None, 0))(layer, XS)


@both
@pytest.mark.parametrize("frontend", ["function", "linen", "nnx"])
def test_nested_vmaps_sync_over_both_axis_names(kind, frontend):
    xs = jnp.stack([XS, XS[::-1] ** 2])
    names = {"axis_name": ("a", "b")}
    if frontend == "nnx":
        layer = NNX[kind](**names, rngs=nnx.Rngs(0))
        inner = nnx.vmap(lambda layer, x: layer(x), in_axes=(None, 0), axis_name="b")
        y = nnx.vmap(inner, in_axes=(None, 0), axis_name="a")(layer, xs)
        close((y, state_of(layer)), whole(kind, xs))
        return
    if frontend == "function":
        call = lambda x: FUNCTION[kind](x, *first().values(), **names)  # noqa: E731
    else:
        call = lambda x: LINEN[kind](**names).apply(first(), x, mutable=["batch_stats"])  # noqa: E731
    inner = jax.vmap(call, axis_name="b", out_axes=(0, None))
    y, state = quick_jit(jax.vmap(inner, axis_name="a", out_axes=(0, None)))(xs)
    close((y, state.get("batch_stats", state)), whole(kind, xs))


# ---- scan ----


@both
def test_nn_scan_over_layers_keeps_a_state_each(kind):
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return LINEN[kind](name="norm")(x), None

    layers = nn.scan(
        Layer,
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True},
        length=3,
    )()
    nested = lambda v: {key: {"norm": value} for key, value in v.items()}  # noqa: E731
    chex.assert_trees_all_equal(layers.init(KEY, X, None), nested(stack([first()] * 3)))
    variables = nested(stack(MEMBERS))
    (y, _), updates = train(layers, variables, X, None)
    close((y, updates["batch_stats"]["norm"]), through(kind, X, MEMBERS))


@both
def test_nnx_scan_over_layers_keeps_a_state_each(kind):
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make(rngs):
        return NNX[kind](rngs=rngs)

    layers = put(make(nnx.Rngs(0)), stack(MEMBERS))
    forward = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    close((forward(X, layers), state_of(layers)), through(kind, X, MEMBERS))


@both
def test_nn_scan_over_steps_carries_the_state(kind):
    class Step(nn.Module):
        @nn.compact
        def __call__(self, carry, x):
            return carry, LINEN[kind](name="norm")(x)

    model = nn.scan(
        Step,
        variable_broadcast="params",
        variable_carry="batch_stats",
        split_rngs={"params": False},
    )()
    variables = Step().init(KEY, None, X)
    (_, ys), updates = train(model, variables, None, XS)
    close((ys, updates["batch_stats"]["norm"]), steps(kind, XS))


@both
def test_nnx_scan_over_steps_carries_the_state(kind):
    layer = NNX[kind](rngs=nnx.Rngs(0))

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def train(layer, x):
        return layer, layer(x)

    layer, ys = train(layer, XS)
    close((ys, state_of(layer)), steps(kind, XS))


@both
def test_lax_scan_carries_a_split_module(kind):
    graph, state = nnx.split(NNX[kind](rngs=nnx.Rngs(0)))

    def step(state, x):
        layer = nnx.merge(graph, state)
        y = layer(x)
        return nnx.state(layer), y

    state, ys = jax.lax.scan(step, state, XS)
    close((ys, state_of(nnx.merge(graph, state))), steps(kind, XS))


# ---- remat, grad, jit ----


@functools.partial(quick_jit, static_argnums=0)
def expected_gradients(kind, x):
    """Returns the gradients of the sum of the sines of the output, and the state."""

    def loss(params):
        y, state = FUNCTION[kind](x, params, first()["batch_stats"])
        return jnp.sum(jnp.sin(y)), state

    return jax.grad(loss, has_aux=True)(first()["params"])


@both
@pytest.mark.parametrize("wrap", [nn.remat, nn.jit], ids=["remat", "jit"])
def test_nn_remat_and_nn_jit_give_the_gradients_and_move_the_state_once(kind, wrap):
    layer = wrap(LINEN[kind].func)(**LINEN[kind].keywords)
    variables = layer.init(KEY, X)

    def loss(params):
        y, updates = layer.apply({**variables, "params": params}, X, mutable=["batch_stats"])
        return jnp.sum(jnp.sin(y)), updates["batch_stats"]

    grad = quick_jit(jax.grad(loss, has_aux=True))
    close(grad(variables["params"]), expected_gradients(kind, X))


@both
@pytest.mark.parametrize("wrap", [lambda f: f, nnx.remat], ids=["plain", "remat"])
def test_nnx_grad_remat_and_jit_give_the_gradients_and_move_the_state_once(kind, wrap):
    layer = NNX[kind](rngs=nnx.Rngs(0))

    @wrap
    def forward(layer, x):
        return layer(x)

    @nnx.jit
    @nnx.grad
    def grad(layer, x):
        return jnp.sum(jnp.sin(forward(layer, x)))

    grads = grad(layer, X)
    close((nnx.to_pure_dict(grads), state_of(layer)), expected_gradients(kind, X))


@both
def test_a_split_module_goes_through_jax_grad_and_jit(kind):
    graph, params, stats = nnx.split(NNX[kind](rngs=nnx.Rngs(0)), nnx.Param, nnx.BatchStat)

    def loss(params):
        layer = nnx.merge(graph, params, stats, copy=True)
        return jnp.sum(jnp.sin(layer(X))), nnx.state(layer, nnx.BatchStat)

    grads, stats = quick_jit(jax.grad(loss, has_aux=True))(params)
    expected, state = expected_gradients(kind, X)
    close((nnx.to_pure_dict(grads), nnx.to_pure_dict(stats)), (expected, state))


@both
@pytest.mark.parametrize(
    "transform",
    [
        lambda f: jax.vmap(f)(XS),
        lambda f: jax.eval_shape(f, X),
        lambda f: jax.jit(f)(X),
    ],
    ids=["vmap", "eval_shape", "jit"],
)
def test_a_module_in_training_that_a_jax_transformation_closes_over_is_refused_by_flax(
    kind, transform
):
    layer = NNX[kind](rngs=nnx.Rngs(0))
    with pytest.raises(errors.TraceContextError):
        transform(lambda x: layer(x))
    layer.eval()
    transform(lambda x: layer(x))  # nothing is updated
    chex.assert_trees_all_equal(state_of(layer), first()["batch_stats"])


# ---- eval_shape ----


@both
def test_jax_eval_shape_tells_the_variables_and_what_a_step_returns(kind):
    layer = LINEN[kind]()
    variables = jax.eval_shape(layer.init, KEY, X)
    described = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)  # noqa: E731
    assert described(variables) == described(first())
    train = functools.partial(layer.apply, mutable=["batch_stats"])
    y, updates = jax.eval_shape(train, variables, X)
    assert described(y) == described(X)
    assert described(updates) == described({"batch_stats": first()["batch_stats"]})


@both
def test_nnx_eval_shape_tells_the_shapes_of_a_module_and_of_its_output(kind):
    layer = nnx.eval_shape(lambda: NNX[kind](rngs=nnx.Rngs(0)))
    assert layer.mean.shape == (C,)
    assert (layer.count.shape, layer.count.dtype) == ((), jnp.int32)
    layer = NNX[kind](rngs=nnx.Rngs(0))
    y = nnx.eval_shape(lambda layer, x: layer(x), layer, X)
    assert (y.shape, y.dtype) == (X.shape, X.dtype)


# ---- Calls and modes ----


@both
def test_a_layer_called_twice_moves_twice(kind):
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x, y):
            norm = LINEN[kind](name="norm")
            return jnp.stack([norm(x), norm(y)])

    expected = steps(kind, XS[:2])
    variables = Twice().init(KEY, *XS[:2])
    assert int(variables["batch_stats"]["norm"]["count"]) == 0
    ys, updates = train(Twice(), variables, *XS[:2])
    close((ys, updates["batch_stats"]["norm"]), expected)

    layer = NNX[kind](rngs=nnx.Rngs(0))
    ys = nnx.jit(lambda layer, x, y: jnp.stack([layer(x), layer(y)]))(layer, *XS[:2])
    close((ys, state_of(layer)), expected)


class Nested(nnx.Module):
    def __init__(self, kind):
        self.norms = nnx.List([NNX[kind](rngs=nnx.Rngs(0))])

    def __call__(self, x):
        return self.norms[0](x)


@both
def test_train_and_eval_choose_the_statistics_of_every_layer(kind):
    model = Nested(kind)
    trained, state = steps(kind, [X])
    for _ in range(2):  # switches the mode twice
        put(model.norms[0], first())
        model.train()
        close((model(X), state_of(model.norms[0])), (trained[0], state))
        model.eval()
        expected, _ = FUNCTION[kind](X, first()["params"], state, use_running_average=True)
        close((model(X), state_of(model.norms[0])), (expected, state))


@both
def test_a_view_evaluates_with_the_same_variables_while_the_model_trains(kind):
    model = Nested(kind)
    view = nnx.view(model, use_running_average=True)
    trained, state = steps(kind, [X])
    close(model(X), trained[0])
    expected, _ = FUNCTION[kind](X, first()["params"], state, use_running_average=True)
    close((view(X), state_of(model.norms[0])), (expected, state))
    assert int(view.norms[0].count[...]) == 1


# ---- Residuals ----

BIG = (4, 8, 8, 32)
SAMPLES = {"batch": 1, "instance": 4, "group": 4, "layer": 4 * 8 * 8, "rms": 4 * 8 * 8}
NORMS = {
    "batch": lambda x, params: jaxnorm.batch_norm(x, params)[0],
    "instance": lambda x, params: jaxnorm.instance_norm(x, params)[0],
    "group": functools.partial(jaxnorm.group_norm, num_groups=8),
    "layer": jaxnorm.layer_norm,
    "rms": jaxnorm.rms_norm,
}
LAYERS = {
    "batch": ("BatchNorm", {"use_running_average": False}),
    "evaluated batch": ("BatchNorm", {"use_running_average": True}),
    "instance": ("InstanceNorm", {}),
    "tracking instance": (
        "InstanceNorm",
        {"use_running_average": False, "track_running_stats": True},
    ),
    "group": ("GroupNorm", {"num_groups": 8}),
    "layer": ("LayerNorm", {}),
    "rms": ("RMSNorm", {}),
}
each_dtype = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])


def kept(f, *args):
    """Returns the arrays that a jitted function keeps for its backward pass."""
    return jax.tree.leaves(jax.eval_shape(lambda *a: jax.vjp(jax.jit(f), *a)[1], *args))


def assert_only_x_is_kept(found, kind, x, layers=()):
    """Checks that only x, and arrays of the size of parameters or statistics, are kept."""
    channels = 1 if kind in ("layer", "rms") else x.shape[-1]
    small = max(x.shape[-1], SAMPLES[kind] * channels) * int(np.prod(layers))
    large = [(a.shape, a.dtype) for a in found if a.size > small]
    assert large == [((*layers, *x.shape), x.dtype)]
    assert len(found) <= 7  # x, the mean as a pair, var, 1 / sqrt(var + epsilon), scale, epsilon


@each_dtype
@pytest.mark.parametrize("kind", NORMS)
def test_a_function_keeps_x_and_small_arrays(kind, dtype):
    x, params = jnp.ones(BIG, dtype), jaxnorm.init_params(BIG[-1])
    assert_only_x_is_kept(kept(NORMS[kind], x, params), kind, x)


@each_dtype
@pytest.mark.parametrize("kind", NORMS)
def test_a_scan_over_layers_keeps_each_layer_s_x_and_small_arrays(kind, dtype):
    x, params = jnp.ones(BIG, dtype), stack([jaxnorm.init_params(BIG[-1])] * 3)

    def forward(x, params):
        return jax.lax.scan(lambda x, params: (NORMS[kind](x, params), None), x, params)[0]

    assert_only_x_is_kept(kept(forward, x, params), kind, x, layers=(3,))


@each_dtype
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("frontend", ["linen", "nnx"])
def test_a_layer_keeps_x_and_small_arrays(frontend, layer, dtype):
    name, options = LAYERS[layer]
    x = jnp.ones(BIG, dtype)
    if frontend == "linen":
        module = getattr(linen, name)(**options)
        variables = jax.eval_shape(module.init, KEY, x)
        params, stats = variables["params"], variables.get("batch_stats", {})

        def forward(x, params, stats):
            variables = {"params": params, "batch_stats": stats}
            return module.apply(variables, x, mutable=["batch_stats"])[0]
    else:
        module = getattr(jaxnorm.nnx, name)(BIG[-1], **options, rngs=nnx.Rngs(0))
        graph, params, stats = nnx.split(module, nnx.Param, ...)

        def forward(x, params, stats):
            return nnx.merge(graph, params, stats, copy=True)(x)

    assert_only_x_is_kept(kept(forward, x, params, stats), layer.split()[-1], x)
