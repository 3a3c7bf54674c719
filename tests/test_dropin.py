"""Tests that models with Flax norms run unchanged with the layers of jaxnorm."""

import functools
import inspect

import chex
import flax.linen
import flax.nnx
import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
import pytest
from flax import nnx
from models import quick_jit

import jaxnorm.linen
import jaxnorm.nnx

KEY = jax.random.key(1)
STEPS, BATCH = 5, 8
FRONTENDS = {"linen": (flax.linen, jaxnorm.linen), "nnx": (flax.nnx, jaxnorm.nnx)}
NETWORKS = [  # both frontends where they differ, otherwise one of them
    ("linen", "ResNet18", "BatchNorm"),
    ("nnx", "ResNet18", "BatchNorm"),
    ("linen", "ResNet18", "InstanceNorm"),
    ("nnx", "ResNet18", "GroupNorm"),
    ("linen", "Transformer", "LayerNorm"),
    ("nnx", "Transformer", "LayerNorm"),
    ("linen", "Transformer", "RMSNorm"),
    ("nnx", "Transformer", "RMSNorm"),
]
TRAINED_FAST = [("nnx", "Transformer", "LayerNorm")]
NAMES = ["BatchNorm", "InstanceNorm", "GroupNorm", "LayerNorm", "RMSNorm"]
each_frontend = pytest.mark.parametrize("frontend", FRONTENDS)
each_name = pytest.mark.parametrize("name", NAMES)
# In float64, Flax's E[x^2] - E[x]^2 is also accurate. Of the 15 digits, 18 layers and 5 steps
# lose a few. With the flags of the tests, the losses of the transformer differ by 2e-9, and its
# parameters by 1e-9; with the compiler's default flags, they agreed with rtol=1e-9 and atol=1e-11.
SAME = {"rtol": 1e-8, "atol": 5e-9}


# ---- Training a model ----


def data(network):
    """Returns a batch of images or sequences, its labels, and another batch, in float64."""
    rng = np.random.default_rng(5)
    shape = (BATCH, 16, 16, 3) if network == "ResNet18" else (BATCH, 7, 6)
    x, other = rng.normal(0.5, 1, (2, *shape))
    return jnp.asarray(x), jnp.asarray(rng.integers(models.CLASSES, size=BATCH)), other


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train_linen(norms, network, kind, dtype=jnp.float64):
    """Returns the initial variables, losses, last variables, and the evaluation function."""
    model = getattr(models, network)(norms, kind, dtype)
    x, labels, _ = data(network)
    first = quick_jit(functools.partial(model.init, train=False))(KEY, x)
    first = jax.tree.map(widen, first)
    optimizer = optax.sgd(0.05, momentum=0.9)

    def step(carry):
        variables, opt_state = carry

        def loss(params):
            logits, updates = model.apply(
                {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
            )
            return cross_entropy(logits, labels), updates

        (value, updates), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        changes, opt_state = optimizer.update(grads, opt_state)
        params = optax.apply_updates(variables["params"], changes)
        return ({"params": params, **updates}, opt_state), value

    carry, losses = run(step, (first, optimizer.init(first["params"])))
    return first, losses, carry[0], quick_jit(functools.partial(model.apply, train=False))


def train_nnx(norms, network, kind, dtype=jnp.float64):
    """The NNX version of `train_linen`; variables are pure dicts of the state of the model."""
    model = getattr(models, "NNX" + network)(norms, kind, dtype, rngs=nnx.Rngs(KEY))
    nnx.update(model, jax.tree.map(widen, nnx.state(model, nnx.BatchStat)))
    x, labels, _ = data(network)
    first = variables_of(model)
    optimizer = nnx.Optimizer(model, optax.sgd(0.05, momentum=0.9), wrt=nnx.Param)
    graph, state = nnx.split((model, optimizer))

    def step(state):
        model, optimizer = nnx.merge(graph, state)
        value, grads = nnx.value_and_grad(lambda m: cross_entropy(m(x), labels))(model)
        optimizer.update(model, grads)
        return nnx.state((model, optimizer)), value

    model.train()
    state, losses = run(step, state)
    model, _ = nnx.merge(graph, state)

    model.eval()
    graph, kept = nnx.split(model)

    @quick_jit
    def evaluate(variables, x):
        model = nnx.merge(graph, kept, copy=True)
        for values in variables.values():
            nnx.update(model, nnx.State(values))
        return model(x)

    return first, losses, variables_of(model), evaluate


def run(step, carry):
    step, losses = quick_jit(step), []
    for _ in range(STEPS):
        carry, loss = step(carry)
        losses.append(float(loss))
    return carry, losses


def widen(statistic):
    """Converts to float64, because Flax's running statistics are float32 for any param_dtype."""
    return statistic.astype(jnp.float64) if statistic.dtype == jnp.float32 else statistic


def variables_of(model):
    """Returns the state of a model in the form of Linen's variables."""
    return {
        "params": nnx.to_pure_dict(nnx.state(model, nnx.Param)),
        "batch_stats": nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)),
    }


def without_count(tree):
    """Returns the tree without its counts, and the list of the counts."""
    flat = flax.traverse_util.flatten_dict(tree)
    counts = [value for path, value in flat.items() if path[-1] == "count"]
    kept = {path: value for path, value in flat.items() if path[-1] != "count"}
    return flax.traverse_util.unflatten_dict(kept), counts


def linen_shapes(norms, network, kind):
    model = getattr(models, network)(norms, kind)
    x = data(network)[0].astype(jnp.float32)
    return jax.eval_shape(functools.partial(model.init, train=False), KEY, x)


def nnx_shapes(norms, network, kind):
    make = getattr(models, "NNX" + network)
    return variables_of(nnx.eval_shape(lambda: make(norms, kind, rngs=nnx.Rngs(KEY))))


SHAPES = {"linen": linen_shapes, "nnx": nnx_shapes}
TRAIN = {"linen": train_linen, "nnx": train_nnx}


@pytest.mark.parametrize(
    ("frontend", "network", "kind"),
    [
        pytest.param(*network, marks=() if network in TRAINED_FAST else pytest.mark.slow)
        for network in NETWORKS
    ],
)
def test_a_model_trains_the_same_after_changing_the_import(x64, frontend, network, kind):
    flax_run, run = (TRAIN[frontend](norms, network, kind) for norms in FRONTENDS[frontend])
    first, losses, last, evaluate = run
    flax_first, flax_losses, flax_last, flax_evaluate = flax_run

    chex.assert_trees_all_equal(first["params"], flax_first["params"])
    np.testing.assert_allclose(losses, flax_losses, **SAME)
    assert losses[-1] < 0.9 * losses[0]  # training reduces the loss
    chex.assert_trees_all_close(last["params"], flax_last["params"], **SAME)
    if kind != "BatchNorm":
        assert not first.get("batch_stats")
        return

    stats, counts = without_count(last["batch_stats"])
    assert [int(count) for count in counts] == [STEPS] * 20
    stats, flax_stats = (
        flax.traverse_util.flatten_dict(t) for t in (stats, flax_last["batch_stats"])
    )
    assert stats.keys() == flax_stats.keys()
    biased = {}
    for path, value in stats.items():
        if path[-1] == "var":  # an average of the initial 1 and unbiased variances
            n = BATCH * (16 * models.WIDTHS[0] // len(value)) ** 2  # half the size in each stage
            value = 0.9**STEPS + (value - 0.9**STEPS) * (n - 1) / n
        np.testing.assert_allclose(value, flax_stats[path], **SAME, err_msg=str(path))
        biased[path] = value
    for path in list(biased):
        biased[*path[:-1], "count"] = jnp.int32(STEPS)

    other = data(network)[2]
    y = evaluate(
        {"params": last["params"], "batch_stats": flax.traverse_util.unflatten_dict(biased)}, other
    )
    np.testing.assert_allclose(y, flax_evaluate(flax_last, other), **SAME)


@each_frontend
@pytest.mark.parametrize(
    ("network", "kind"),
    [
        ("ResNet18", "BatchNorm"),
        ("ResNet18", "InstanceNorm"),
        ("ResNet18", "GroupNorm"),
        ("Transformer", "LayerNorm"),
        ("Transformer", "RMSNorm"),
    ],
)
def test_a_model_has_flax_s_variables_by_name_shape_and_dtype_and_counts(frontend, network, kind):
    flax_variables, variables = (
        SHAPES[frontend](norms, network, kind) for norms in FRONTENDS[frontend]
    )
    stats, counts = without_count(variables.pop("batch_stats", {}))
    assert [(a.shape, a.dtype) for a in counts] == [((), jnp.int32)] * len(stats and counts)
    assert len(counts) == (20 if kind == "BatchNorm" else 0)
    described = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)  # noqa: E731
    assert described(stats) == described(flax_variables.pop("batch_stats", {}))
    assert described(variables) == described(flax_variables)


# ---- Every argument ----

X = jnp.asarray(np.random.default_rng(6).normal(0.5, 1, (4, 5, 3, 6)), jnp.float32)
EVERY = {
    "defaults": {},
    "no bias": {"use_bias": False},
    "no scale": {"use_scale": False},
    "neither": {"use_scale": False, "use_bias": False},
    "epsilon": {"epsilon": 0.3},
    "inits": {"scale_init": flax.nnx.initializers.normal(), "bias_init": nnx.initializers.normal()},
    "bfloat16": {"dtype": jnp.bfloat16},
    "param_dtype": {"param_dtype": jnp.float16, "dtype": jnp.float32},
    "accurate": {"use_fast_variance": False},
}
FEATURES = [  # options, and num_features for NNX
    ({"reduction_axes": (1, 2, 3)}, 6),
    ({"reduction_axes": (-1, 1)}, 6),
    ({"reduction_axes": 1, "feature_axes": 1}, 5),
    ({"reduction_axes": (1, 2), "feature_axes": -1}, 6),
    ({"reduction_axes": (2, 3), "feature_axes": 1}, 5),
]
OWN = {
    "BatchNorm": [({"axis": 1}, 5), ({"axis": (-1,)}, 6)],
    "InstanceNorm": [({"feature_axes": 1}, 5), ({"feature_axes": (-1,)}, 6)],
    "GroupNorm": [
        ({"num_groups": 2}, 6),
        ({"num_groups": 6}, 6),
        ({"num_groups": None, "group_size": 2}, 6),
        ({"num_groups": 3, "reduction_axes": (1, 2, 3)}, 6),
        ({"num_groups": 3, "reduction_axes": (-3, -2, -1)}, 6),
    ],
    "LayerNorm": FEATURES,
    "RMSNorm": FEATURES,
}
SEVERAL = [
    {"reduction_axes": (1, 3), "feature_axes": (1, 3)},
    {"reduction_axes": (1, 2, 3), "feature_axes": (-1, 2)},
]
LINEN_OWN = {  # flax.nnx raises an error for these, or repeats means along a wrong axis
    "GroupNorm": [
        {"num_groups": 3, "reduction_axes": (2, 3)},
        {"num_groups": 1, "reduction_axes": (3,)},
    ],
    "LayerNorm": SEVERAL,
    "RMSNorm": SEVERAL,
}


def arguments(name):
    groups = {"num_groups": 3} if name == "GroupNorm" else {}
    for case, options in EVERY.items():
        if name == "RMSNorm":
            options = {key: value for key, value in options.items() if "bias" not in key}
        yield pytest.param(name, groups | options, 6, id=f"{name} {case}")
    for options, features in OWN[name]:
        yield pytest.param(name, options, features, id=f"{name} {options}")


def linen_arguments(name):
    yield from arguments(name)
    for options in LINEN_OWN[name]:
        yield pytest.param(name, options, None, id=f"{name} {options}")


def made(module, name, options, **others):
    """Makes a layer of a namespace, in training, with a momentum of a quarter."""
    if name == "BatchNorm":
        memory = "decay" if module.__name__.startswith("jaxnorm") else "momentum"
        options = {"use_running_average": False, memory: 0.75, **options}
    return functools.partial(getattr(module, name), **options, **others)


def assert_same_outputs(y, y_flax):
    assert y.dtype == y_flax.dtype
    # Flax's variance loses a digit; in bfloat16, Flax rounds x first, and y after each operation.
    tolerance = float(4 * jnp.finfo(y.dtype).eps) + 1e-5
    y, y_flax = (a.astype(jnp.float32) for a in (y, y_flax))
    np.testing.assert_allclose(y, y_flax, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("name", "options", "features"), [p for name in LINEN_OWN for p in linen_arguments(name)]
)
def test_linen_s_arguments_mean_what_they_mean_in_flax(name, options, features):
    flax_norm, norm = (made(norms, name, options)() for norms in FRONTENDS["linen"])
    variables = norm.init(KEY, X)
    chex.assert_trees_all_equal(variables, flax_norm.init(KEY, X))
    chex.assert_trees_all_equal_dtypes(variables, flax_norm.init(KEY, X))
    # All entries differ, so that an exchange of two of them is detected.
    variables = jax.tree.map(lambda a: a + jnp.arange(a.size).reshape(a.shape) / 8, variables)
    variables = jax.tree.map(lambda a: a.astype(norm.param_dtype), variables)
    assert_same_outputs(norm.apply(variables, X), flax_norm.apply(variables, X))


@pytest.mark.parametrize(
    ("name", "options", "features"), [p for name in NAMES for p in arguments(name)]
)
def test_nnx_s_arguments_mean_what_they_mean_in_flax(name, options, features):
    layers, draws = [], []
    for norms in FRONTENDS["nnx"]:
        rngs = nnx.Rngs(KEY)
        layers.append(made(norms, name, options)(features, rngs=rngs))
        draws.append(rngs.params())
    flax_norm, norm = layers
    assert draws[0] == draws[1]  # both used the same number of keys
    params = nnx.state(norm, nnx.Param)
    chex.assert_trees_all_equal(params, nnx.state(flax_norm, nnx.Param))
    chex.assert_trees_all_equal_dtypes(params, nnx.state(flax_norm, nnx.Param))
    for layer in layers:
        for variable in (layer.scale, getattr(layer, "bias", None)):
            if variable is not None:
                variable[...] += (jnp.arange(variable.size) / 8).astype(variable.dtype)
    assert_same_outputs(norm(X), flax_norm(X))
    if name == "BatchNorm":
        n = X.size / features
        biased = 0.75 + (norm.var[...] - 0.75) * (n - 1) / n
        # The error of Flax's mean may be as large as its rounding of x.
        tolerance = float(jnp.finfo(norm.dtype or X.dtype).eps) + 1e-5
        np.testing.assert_allclose(norm.mean[...], flax_norm.mean[...], rtol=0, atol=tolerance)
        np.testing.assert_allclose(biased, flax_norm.var[...], rtol=tolerance)
        assert (norm.mean.dtype, norm.var.dtype) == (flax_norm.mean.dtype, flax_norm.var.dtype)
        assert int(norm.count[...]) == 1
        norm.var[...] = flax_norm.var[...]
        assert_same_outputs(norm(X, True), flax_norm(X, True))


@each_name
def test_nnx_s_parameters_carry_the_metadata(name):
    options = {"scale_metadata": {"group": "norms"}}
    if name != "RMSNorm":
        options["bias_metadata"] = {"weight_decay": False}
    options |= {"num_groups": 3} if name == "GroupNorm" else {}
    flax_norm, norm = (
        made(norms, name, options)(6, rngs=nnx.Rngs(0)) for norms in FRONTENDS["nnx"]
    )
    assert norm.scale.get_metadata() == flax_norm.scale.get_metadata()
    assert norm.scale.group == "norms"
    if name != "RMSNorm":
        assert norm.bias.get_metadata() == flax_norm.bias.get_metadata()
        assert norm.bias.weight_decay is False


def linen_call(layer):
    variables = layer(axis_name=None).init(KEY, X[0])  # Flax already needs the axis here
    return lambda x: layer().apply(variables, x, mutable=["batch_stats"])[0]


def nnx_call(layer):
    graph, state = nnx.split(layer(6, rngs=nnx.Rngs(KEY)))
    return lambda x: nnx.merge(graph, state, copy=True)(x)


CALL = {"linen": linen_call, "nnx": nnx_call}


@each_frontend
@pytest.mark.parametrize("name", [name for name in NAMES if name != "InstanceNorm"])
def test_an_axis_name_spreads_what_it_spreads_in_flax(frontend, name):
    options = {"axis_name": "d"} | ({"num_groups": 3} if name == "GroupNorm" else {})
    flax_norm, norm = (
        quick_jit(jax.vmap(CALL[frontend](made(norms, name, options)), axis_name="d"))
        for norms in FRONTENDS[frontend]
    )
    assert_same_outputs(norm(X), flax_norm(X))
    assert float(abs(norm(X[:1]) - norm(X)[:1]).max()) > 0.01  # the other samples have an effect


# ---- Names, order, defaults ----


@each_frontend
@each_name
def test_the_constructor_has_flax_s_arguments_in_their_order_with_their_defaults(frontend, name):
    # The signature of the class is hidden by NNX's metaclass.
    flax_signature, signature = (
        inspect.signature(getattr(norms, name).__init__) for norms in FRONTENDS[frontend]
    )
    flax_parameters = [
        p for p in flax_signature.parameters.values() if p.name not in ("parent", "name")
    ]
    parameters = list(signature.parameters.values())[: len(flax_parameters)]
    assert len(flax_parameters) > 10
    assert [p.name for p in parameters] == [p.name for p in flax_parameters]
    assert [p.kind for p in parameters] == [p.kind for p in flax_parameters]
    # The weight of the new value is 0.1 in jaxnorm, and 0.01 in Flax.
    defaults = [
        {p.name: p.default for p in ps if p.name != "momentum"}
        for ps in (parameters, flax_parameters)
    ]
    assert defaults[0] == defaults[1]


@each_frontend
@each_name
def test_the_call_takes_flax_s_arguments(frontend, name):
    flax_parameters, parameters = (
        {p.name: (p.kind, p.default) for p in inspect.signature(c).parameters.values()}
        for c in (getattr(norms, name).__call__ for norms in FRONTENDS[frontend])
    )
    assert flax_parameters.items() <= parameters.items()
    by_position = lambda ps: [n for n, (kind, _) in ps.items() if kind.name != "KEYWORD_ONLY"]  # noqa: E731
    assert by_position(parameters)[: len(by_position(flax_parameters))] == by_position(
        flax_parameters
    )
