"""Tests that frozen norms evaluate and stay constant while other parameters are trained."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from models import quick_jit

import jaxnorm
import jaxnorm.linen
import jaxnorm.nnx
from jaxnorm import interop

KEY = jax.random.key(3)
RNG = np.random.default_rng(4)
C = 4
X = jnp.asarray(RNG.normal(2, 3, (6, 5, C)), jnp.float32)
NORMS = {
    "BatchNorm": {},
    "BatchNorm1d": {"virtual_batch_size": 3},
    "BatchRenorm": {},
    "InstanceNorm": {"track_running_stats": True},
}
every_norm = pytest.mark.parametrize("name", NORMS)
both_frontends = pytest.mark.parametrize("frontend", ["linen", "nnx"])


def randomized(tree):
    """Other values for every float array: a norm at its initial state is nearly the identity."""
    return jax.tree.map(
        lambda a: a if a.dtype == jnp.int32 else jnp.asarray(RNG.uniform(0.5, 2, a.shape), a.dtype),
        tree,
    )


def layer_of(frontend, name):
    """A layer as a function of (variables, x, how it normalizes), and its variables."""
    options = {"epsilon": 1e-3, **NORMS[name]}
    if frontend == "linen":
        linen = getattr(jaxnorm.linen, name)(**options)
        variables = randomized(linen.init(KEY, X, use_running_average=True))

        def apply(variables, x, *, frozen, **how):
            model = jaxnorm.linen.frozen()(linen.apply) if frozen else linen.apply
            y, updates = model(variables, x, mutable=["batch_stats"], **how)
            return y, variables | updates

        return apply, variables
    layer = getattr(jaxnorm.nnx, name)(C, **options, rngs=nnx.Rngs(0))

    def apply(variables, x, *, frozen, **how):
        copy = nnx.clone(layer)
        nnx.replace_by_pure_dict(state := nnx.state(copy), interop.to_nnx(variables))
        nnx.update(copy, state)
        if frozen:
            jaxnorm.nnx.freeze(copy)
        y = copy(x, **how)
        return y, interop.from_nnx(nnx.to_pure_dict(nnx.state(copy)))

    return apply, randomized(interop.from_nnx(nnx.to_pure_dict(nnx.state(layer))))


# ---- One layer ----


@both_frontends
@every_norm
def test_a_frozen_norm_is_the_formula_of_torchvision(frontend, name):
    """FrozenBatchNorm2d: w rsqrt(running_var + eps) x + b - running_mean w rsqrt(...)."""
    apply, variables = layer_of(frontend, name)
    y, _ = apply(variables, X, frozen=True, use_running_average=False)
    params, stats = (
        {k: np.asarray(v, np.float64) for k, v in variables[c].items()}
        for c in ("params", "batch_stats")
    )
    factor = params["scale"] / np.sqrt(stats["var"] + 1e-3)
    expected = np.asarray(X, np.float64) * factor + (params["bias"] - stats["mean"] * factor)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)  # float32, of values up to 30


@both_frontends
@every_norm
@pytest.mark.parametrize(
    "how",
    [
        {"use_running_average": False},
        {"use_running_average": False, "update_stats": True},
        {"use_running_average": True, "update_stats": True},
    ],
    ids=["train", "train, update", "update"],
)
def test_a_frozen_norm_evaluates_whatever_the_call_says(frontend, name, how):
    apply, variables = layer_of(frontend, name)

    def results(frozen, how):
        def loss(x):
            y, new = apply(variables, x, frozen=frozen, **how)
            return jnp.sum(jnp.sin(y)), (y, new)

        return jax.grad(loss, has_aux=True)(X)

    x_dot, (y, new) = results(True, how)
    expected, (y_expected, _) = results(False, {"use_running_average": True})
    np.testing.assert_array_equal(y, y_expected)
    np.testing.assert_array_equal(x_dot, expected)
    chex.assert_trees_all_equal(new, variables)


@every_norm
def test_scale_and_bias_of_a_frozen_norm_of_linen_have_gradient_zero(name):
    apply, variables = layer_of("linen", name)

    def gradients(frozen):
        def loss(params):
            given = {**variables, "params": params}
            y, _ = apply(given, X, frozen=frozen, use_running_average=True)
            return jnp.sum(y**2)

        return jax.grad(loss)(variables["params"])

    assert all(jnp.all(a != 0) for a in jax.tree.leaves(gradients(False)))
    assert not any(jnp.any(a) for a in jax.tree.leaves(gradients(True)))


@both_frontends
@pytest.mark.parametrize("name", ["InstanceNorm", "LayerNorm", "GroupNorm"])
def test_layers_without_running_statistics_are_not_frozen(frontend, name):
    options = {"num_groups": 2} if name == "GroupNorm" else {}
    if frontend == "linen":
        layer = getattr(jaxnorm.linen, name)(**options)
        params = layer.init(KEY, X)["params"]

        def loss(params):
            return jnp.sum(layer.apply({"params": params}, X) ** 3 + X * params["bias"])

        expected = jax.grad(loss)(params)
        with jaxnorm.linen.frozen():
            chex.assert_trees_all_equal(jax.grad(loss)(params), expected)
    else:
        model = nnx.List(
            [
                getattr(jaxnorm.nnx, name)(C, **options, rngs=nnx.Rngs(0)),
                jaxnorm.nnx.BatchNorm(C, rngs=nnx.Rngs(0)),
            ]
        )
        jaxnorm.nnx.freeze(model)
        assert type(model[0].scale) is type(model[0].bias) is nnx.Param
        assert not getattr(model[0], "_frozen", False)


# ---- Training steps ----


class Block(nn.Module):
    norm: str
    train: bool

    @nn.compact
    def __call__(self, x, _):
        norm = getattr(jaxnorm.linen, self.norm)(**NORMS[self.norm], name="norm")
        return jnp.sin(norm(nn.Dense(C)(x), use_running_average=not self.train)), None


SCANNED = functools.partial(
    nn.scan,
    variable_axes={"params": 0, "batch_stats": 0},
    split_rngs={"params": True},
    length=2,
)
WRAPS = {"plain": lambda block: block, "jit": nn.jit, "remat": nn.remat, "scan": SCANNED}
STEPS = [("BatchNorm", wrap) for wrap in WRAPS]
STEPS += [(name, "plain") for name in NORMS if name != "BatchNorm"]
every_step = pytest.mark.parametrize(("name", "wrap"), STEPS)


class Model(nn.Module):
    norm: str
    wrap: str

    @nn.compact
    def __call__(self, x, train):
        x, _ = WRAPS[self.wrap](Block)(self.norm, train, name="blocks")(x, None)
        return nn.Dense(1)(jaxnorm.linen.LayerNorm(name="layer_norm")(x))


@every_step
def test_linen_trains_the_other_parameters(name, wrap):
    model = Model(name, wrap)
    variables = randomized(model.init(KEY, X, False))
    params, batch_stats = variables["params"], variables["batch_stats"]
    mask = jaxnorm.linen.trainable_mask(params, batch_stats)
    transforms = {True: optax.adamw(0.1, weight_decay=0.1), False: optax.set_to_zero()}
    tx = optax.partition(transforms, mask)

    @quick_jit
    def step(params, batch_stats, opt_state):
        def loss(params):
            variables = {"params": params, "batch_stats": batch_stats}
            with jaxnorm.linen.frozen():
                y, updates = model.apply(variables, X, True, mutable=["batch_stats"])
            return jnp.mean((y - X[..., :1]) ** 2), (y, updates["batch_stats"])

        grads, (y, batch_stats) = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), batch_stats, opt_state, y

    new, new_stats, opt_state = params, batch_stats, tx.init(params)
    evaluated = model.apply(variables, X, False)
    for i in range(3):
        new, new_stats, opt_state, y = step(new, new_stats, opt_state)
        if i == 0:  # compiled as one program, and as several
            np.testing.assert_allclose(y, evaluated, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_equal(new_stats, batch_stats)
    norm, new_norm = params["blocks"].pop("norm"), new["blocks"].pop("norm")
    assert set(norm) == {"scale", "bias"}
    chex.assert_trees_all_equal(new_norm, norm)
    assert all(jnp.all(a != b) for a, b in zip(*map(jax.tree.leaves, (new, params)), strict=True))


class NNXBlock(nnx.Module):
    def __init__(self, name, rngs):
        self.dense = nnx.Linear(C, C, rngs=rngs)
        self.norm = getattr(jaxnorm.nnx, name)(C, **NORMS[name], rngs=rngs)

    def __call__(self, x):
        return jnp.sin(self.norm(self.dense(x)))


class NNXModel(nnx.Module):
    def __init__(self, name, wrap, rngs):
        self.wrap = wrap
        if wrap == "scan":
            make = nnx.split_rngs(splits=2)(nnx.vmap(lambda rngs: NNXBlock(name, rngs)))
            self.blocks = make(rngs)
        else:
            self.blocks = NNXBlock(name, rngs)
        self.layer_norm = jaxnorm.nnx.LayerNorm(C, rngs=rngs)
        self.dense = nnx.Linear(C, 1, rngs=rngs)

    def __call__(self, x):
        forward = lambda x, blocks: blocks(x)  # noqa: E731
        if self.wrap == "scan":
            # FrozenParam goes where the running statistics go.
            axes = nnx.StateAxes({(nnx.Param, nnx.BatchStat): 0, ...: None})
            forward = nnx.scan(forward, in_axes=(nnx.Carry, axes), out_axes=nnx.Carry)
        elif self.wrap != "plain":
            forward = {"jit": nnx.jit, "remat": nnx.remat}[self.wrap](forward)
        return self.dense(self.layer_norm(forward(x, self.blocks)))


@every_step
def test_nnx_trains_the_other_parameters(name, wrap):
    model = NNXModel(name, wrap, nnx.Rngs(0))
    nnx.update(model, randomized(nnx.state(model)))
    model.eval()
    evaluated = model(X)
    jaxnorm.nnx.freeze(model)
    model.train()
    first = nnx.to_pure_dict(nnx.state(nnx.clone(model)))
    optimizer = nnx.Optimizer(model, optax.adamw(0.1, weight_decay=0.1), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            y = model(X)
            return jnp.mean((y - X[..., :1]) ** 2), y

        grads, y = nnx.grad(loss, has_aux=True)(model)
        optimizer.update(model, grads)
        return y

    np.testing.assert_allclose(step(model, optimizer), evaluated, rtol=1e-4, atol=1e-5)
    for _ in range(2):
        step(model, optimizer)
    last = nnx.to_pure_dict(nnx.state(model))
    norm = first["blocks"].pop("norm")
    assert set(norm) == {"scale", "bias", "mean", "var", "count"}
    chex.assert_trees_all_equal(last["blocks"].pop("norm"), norm)
    assert all(jnp.all(a != b) for a, b in zip(*map(jax.tree.leaves, (first, last)), strict=True))


# ---- Linen: where the context is entered ----


def test_a_jitted_function_is_traced_again_in_the_context():
    layer = jaxnorm.linen.BatchNorm(use_running_average=False)
    variables = layer.init(KEY, X)
    apply = jax.jit(functools.partial(layer.apply, mutable=["batch_stats"]))
    count = lambda: int(apply(variables, X)[1]["batch_stats"]["count"])  # noqa: E731
    assert count() == 1
    with jaxnorm.linen.frozen():
        assert count() == 0
    assert count() == 1


def test_a_model_freezes_a_part_of_itself():
    class Parts(nn.Module):
        @nn.compact
        def __call__(self, x):
            with jaxnorm.linen.frozen():
                x = jaxnorm.linen.BatchNorm(use_running_average=False, name="backbone")(x)
            return jaxnorm.linen.BatchNorm(use_running_average=False, name="head")(x)

    variables = Parts().init(KEY, X)
    _, updates = Parts().apply(variables, X, mutable=["batch_stats"])
    counts = {name: int(stats["count"]) for name, stats in updates["batch_stats"].items()}
    assert counts == {"backbone": 0, "head": 1}


def test_the_context_ends_after_an_error():
    layer = jaxnorm.linen.BatchNorm(use_running_average=False)
    variables = layer.init(KEY, X)
    with pytest.raises(ZeroDivisionError), jaxnorm.linen.frozen():
        raise ZeroDivisionError
    _, updates = layer.apply(variables, X, mutable=["batch_stats"])
    assert updates["batch_stats"]["count"] == 1


# ---- Linen: the mask ----


def test_the_mask_is_that_of_the_norms_in_batch_stats():
    state, dense, affine = jaxnorm.init_batch_stats(2), {"kernel": 1.0, "bias": 1.0}, {"scale": 1.0}
    params = {
        "norm": {"scale": 1.0, "bias": 1.0},
        "dense": dense,
        "norm_2": affine,
        "layers": [{"norm": affine}, {"norm": affine}],
    }
    batch_stats = {"norm": state, "layers": [{"norm": state}, {}]}
    assert jaxnorm.linen.trainable_mask(params, batch_stats) == {
        "norm": {"scale": False, "bias": False},
        "dense": {"kernel": True, "bias": True},
        "norm_2": {"scale": True},
        "layers": [{"norm": {"scale": False}}, {"norm": {"scale": True}}],
    }
    own = {"scale": 1.0, "kernel": 1.0}  # of a module with statistics of its own, at the root
    assert jaxnorm.linen.trainable_mask(own, state) == {"scale": False, "kernel": True}


def test_the_mask_of_boxed_parameters_has_their_structure():
    ones = nn.with_partitioning(nn.initializers.ones, ("channels",))
    model = nn.Sequential(
        [nn.Dense(C), jaxnorm.linen.BatchNorm(use_running_average=True, scale_init=ones)]
    )
    variables = model.init(KEY, X)
    params = variables["params"]
    mask = jaxnorm.linen.trainable_mask(params, variables["batch_stats"])
    assert isinstance(params["layers_1"]["scale"], nn.Partitioned)
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    assert nn.unbox(mask) == {
        "layers_0": {"kernel": True, "bias": True},
        "layers_1": {"scale": False, "bias": False},
    }


@pytest.mark.parametrize(
    ("batch_stats", "found"), [({}, ""), ({"a": {"b": jaxnorm.init_batch_stats(1)}}, "'a/b'")]
)
def test_a_mask_that_would_freeze_nothing_is_an_error(batch_stats, found):
    with pytest.raises(ValueError, match=rf"trainable_mask: params should .* norms \[{found}\];"):
        jaxnorm.linen.trainable_mask({"norm": {"scale": 1.0}}, batch_stats)


# ---- NNX: types and paths ----


def test_freezing_keeps_paths_and_values_and_changes_the_type_alone():
    model = NNXModel("BatchNorm", "plain", nnx.Rngs(0))
    nnx.update(model, randomized(nnx.state(model)))
    types = lambda: {path: type(v) for path, v in nnx.to_flat_state(nnx.state(model))}  # noqa: E731
    before, values = types(), nnx.to_pure_dict(nnx.state(nnx.clone(model)))
    jaxnorm.nnx.freeze(model)
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(model)), values)
    frozen = {("blocks", "norm", leaf): jaxnorm.nnx.FrozenParam for leaf in ("scale", "bias")}
    assert types() == before | frozen
    nnx.split(model, nnx.Param, nnx.BatchStat)  # the filters still cover everything
    jaxnorm.nnx.freeze(model)
    assert types() == before | frozen
    jaxnorm.nnx.unfreeze(model)
    assert types() == before
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(model)), values)
    model(X)
    assert model.blocks.norm.count[...] == values["blocks"]["norm"]["count"] + 1


def test_a_frozen_model_takes_the_state_of_a_model_that_is_not():
    frozen, other = (NNXModel("BatchNorm", "plain", nnx.Rngs(seed)) for seed in (0, 1))
    nnx.update(other, randomized(nnx.state(other)))
    jaxnorm.nnx.freeze(frozen)
    nnx.update(frozen, nnx.state(other))
    assert isinstance(frozen.blocks.norm.scale, jaxnorm.nnx.FrozenParam)
    chex.assert_trees_all_equal(*(nnx.to_pure_dict(nnx.state(m)) for m in (frozen, other)))


def test_metadata_and_shared_variables_stay():
    first = jaxnorm.nnx.BatchNorm(C, rngs=nnx.Rngs(0), scale_metadata={"mine": 7}, use_bias=False)
    second = jaxnorm.nnx.BatchNorm(C, rngs=nnx.Rngs(0), use_bias=False)
    second.scale = first.scale
    for change in (jaxnorm.nnx.freeze, jaxnorm.nnx.unfreeze):
        change(nnx.List([first, second]))
        assert first.scale is second.scale
        assert first.scale.get_metadata("mine") == 7
        assert first.bias is None


def test_a_part_of_a_model_is_frozen_and_unfrozen():
    model = nnx.List([jaxnorm.nnx.BatchNorm(C, rngs=nnx.Rngs(0)) for _ in range(2)])
    jaxnorm.nnx.freeze(model[0])
    jaxnorm.nnx.unfreeze(model[1])  # nothing to do
    model.train()
    for norm in model:
        norm(X)
    assert [int(norm.count[...]) for norm in model] == [0, 1]


def test_a_model_without_running_statistics_cannot_be_frozen():
    with pytest.raises(ValueError, match="freeze: model should hold layers with running statist"):
        jaxnorm.nnx.freeze(jaxnorm.nnx.InstanceNorm(C, rngs=nnx.Rngs(0)))


def test_a_model_that_was_frozen_is_again_as_it_was():
    model = NNXModel("BatchNorm", "plain", nnx.Rngs(0))
    before = nnx.graphdef(model)
    jaxnorm.nnx.freeze(model)
    assert nnx.graphdef(model) != before
    jaxnorm.nnx.unfreeze(model)
    assert nnx.graphdef(model) == before


def test_a_scale_that_another_module_shares_is_not_replaced():
    norm = jaxnorm.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    other = jaxnorm.nnx.LayerNorm(3, rngs=nnx.Rngs(0))
    other.scale = norm.scale
    with pytest.raises(ValueError, match=r"freeze: .* the LayerNorm at layers\.1 shares one"):
        jaxnorm.nnx.freeze(nnx.Sequential(norm, other))
    assert isinstance(norm.scale, nnx.Param)
    assert other.scale is norm.scale


def test_frozen_norms_are_not_recalibrated():
    model = jaxnorm.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    jaxnorm.nnx.freeze(model)
    with pytest.raises(ValueError, match=r"but BatchNorm is; write unfreeze\(model\) first"):
        jaxnorm.nnx.recalibrate(model, [jnp.ones((4, 3))])
