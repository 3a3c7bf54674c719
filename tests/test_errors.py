"""Tests that errors end in the name of their entry in docs/errors.md."""

import ast
import copy
import inspect
import pathlib
import pickle
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxnorm
import jaxnorm.linen
import jaxnorm.nnx

ROOT = pathlib.Path(__file__).parent.parent
X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3, 3, 8)), jnp.float32)
STATE, PARAMS = jaxnorm.init_batch_stats(8), jaxnorm.init_params(8)
LAYER = jaxnorm.linen.BatchNorm()


def variables(layer=LAYER):
    return jax.eval_shape(lambda: layer.init(jax.random.key(0), X, use_running_average=False))


def linen(layer=LAYER, **call):
    """Calls a layer with its variables, which are made by init."""
    jax.eval_shape(lambda v: layer.apply(v, X, **call), variables())


def norm(x=X, params=None, batch_stats=STATE, **options):
    """The call of the functions, while JAX traces."""
    jax.eval_shape(lambda: jaxnorm.batch_norm(x, params, batch_stats, **options))


def made(name, *args, **options):
    """A layer of NNX for the channels of X."""
    return getattr(jaxnorm.nnx, name)(8, *args, rngs=nnx.Rngs(0), **options)


def recalibrated(step, batches):
    jaxnorm.recalibrate(step, jaxnorm.init_batch_stats(1), batches)


def trained(state, x):
    return jaxnorm.batch_norm(x, None, state)[1]


def exported():
    onnx = pytest.importorskip("jaxnorm.onnx", reason="needs the extra onnx", exc_type=ImportError)
    onnx.to_onnx(lambda x: jaxnorm.batch_norm(x, None, STATE)[0], [("B", 8)])


# What raises the error, by name; several calls where several places raise it.
TRIGGERS = [
    ("batch-stats-not-mutable", lambda: linen(use_running_average=False)),
    ("batch-stats-missing", lambda: LAYER.apply({"params": PARAMS}, X, True)),
    ("use-running-average-missing", lambda: linen()),
    ("use-running-average-missing", lambda: made("BatchNorm", use_running_average=None)(X)),
    (
        "use-running-average-twice",
        lambda: linen(jaxnorm.linen.BatchNorm(True), use_running_average=True),
    ),
    ("momentum-of-flax", lambda: made("BatchNorm", momentum=0.99)),
    ("momentum-of-flax", lambda: jaxnorm.linen.BatchNorm(momentum=0.9)),
    ("momentum-and-decay", lambda: made("BatchNorm", momentum=0.1, decay=0.9)),
    ("x-not-float", lambda: norm(X.astype(int))),
    ("x-not-float", lambda: norm(X.astype(complex))),
    ("x-rank", lambda: norm(X[0, 0, 0])),
    ("x-rank", lambda: made("BatchNorm2d")(X[0])),
    ("one-value-per-channel", lambda: norm(X[:1, 0, 0])),
    ("mask-not-bool", lambda: norm(mask=jnp.ones(X.shape))),
    ("mask-rank", lambda: norm(mask=jnp.ones(4, bool))),
    ("mask-shape", lambda: norm(mask=jnp.ones((3, 1, 1, 1), bool))),
    ("not-a-python-bool", lambda: jax.jit(lambda b: norm(use_running_average=b))(True)),
    ("not-a-python-bool", lambda: made("BatchNorm", update_stats="no")),
    ("params-shape", lambda: norm(X.transpose(0, 3, 1, 2), PARAMS, None)),
    (
        "params-shape",
        lambda: LAYER.apply(LAYER.init(jax.random.key(0), X[..., :3], True), X, True),
    ),
    ("batch-stats-shape", lambda: norm(X.transpose(0, 3, 1, 2))),
    ("batch-stats-keys", lambda: norm(batch_stats={"mean": STATE["mean"]})),
    ("batch-stats-dtype", lambda: norm(batch_stats={**STATE, "mean": jnp.zeros(8, int)})),
    ("batch-stats-dtype", lambda: norm(batch_stats={**STATE, "count": True})),
    ("count-missing", lambda: norm(batch_stats={k: STATE[k] for k in ("mean", "var")})),
    ("count-not-whole", lambda: norm(batch_stats={**STATE, "count": jnp.float32(1.5)})),
    ("no-batch-stats", lambda: norm(batch_stats=None, use_running_average=True)),
    ("number-of-channels", lambda: jaxnorm.linen.BatchNorm2d(64)),
    ("number-of-channels", lambda: jaxnorm.linen.InstanceNorm2d(64)),
    ("number-of-channels", lambda: jaxnorm.linen.BatchNorm2d(num_features=64)),
    ("number-of-channels", lambda: jaxnorm.linen.GroupNorm(8, num_channels=64)),
    ("number-of-channels", lambda: jaxnorm.linen.LayerNorm(normalized_shape=64)),
    ("argument-name", lambda: jaxnorm.linen.BatchNorm(eps=1e-3)),
    ("argument-name", lambda: made("InstanceNorm2d", affine=False)),
    ("groups-divide-channels", lambda: made("GroupNorm", num_groups=3)(X)),
    ("groups-divide-channels", lambda: jaxnorm.group_norm(X, num_groups=3)),
    ("num-groups-and-group-size", lambda: made("GroupNorm", group_size=4)),
    ("virtual-batch-size", lambda: norm(virtual_batch_size=3)),
    ("virtual-batch-size", lambda: norm(batch_stats=None, virtual_batch_size=2, channel_axis=0)),
    ("axis-name-unbound", lambda: norm(axis_name="data")),
    ("axis-name-unbound", lambda: norm(axis_name="data", mask=X > 0)),
    ("axis-name-unbound", lambda: norm(axis_name="data", axis_index_groups=[[0, 1]])),
    ("axis-name-unbound", lambda: jaxnorm.layer_norm(X, axis_name="data")),
    ("axis-index-groups", lambda: norm(axis_index_groups=[[0, 1]])),
    (
        "axis-index-groups",
        lambda: jax.vmap(
            lambda x: jaxnorm.rms_norm(x, axis_name="d", axis_index_groups=[[0]]), axis_name="d"
        )(X),
    ),
    (
        "accumulation-malformed",
        lambda: norm(batch_stats={**STATE, "accumulation": {"start": STATE}}),
    ),
    ("no-states", lambda: jaxnorm.begin_accumulation({})),
    ("nothing-to-freeze", lambda: jaxnorm.linen.trainable_mask({"scale": X}, {})),
    ("no-states", lambda: jaxnorm.nnx.freeze(made("LayerNorm"))),
    ("recalibrate-structure", lambda: recalibrated(lambda state, x: {}, [X])),
    ("recalibrate-not-finite", lambda: recalibrated(trained, [np.full((4, 1), np.inf)])),
    ("recalibrate-empty", lambda: recalibrated(trained, [])),
    ("recalibrate-unmoved", lambda: recalibrated(lambda state, x: state, [np.ones((4, 1))])),
    ("export-in-training", exported),
]
NAME = r"\[([a-z]+(?:-[a-z]+)+)\]$"


@pytest.mark.parametrize(("name", "trigger"), TRIGGERS)
def test_the_error_ends_in_the_name_of_its_entry(name, trigger):
    with pytest.raises((ValueError, TypeError, NameError)) as error:
        trigger()
    found = re.search(NAME, str(error.value))
    assert found, str(error.value)
    assert found[1] == name


def test_each_name_has_an_entry_and_a_trigger():
    raised = {
        found[1]
        for file in (ROOT / "jaxnorm").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Raise | ast.Return)
        for part in ast.walk(node)
        if isinstance(part, ast.Constant) and isinstance(part.value, str)
        if (found := re.search(NAME, part.value))
    }
    headings = re.findall(r"^## (.*)$", (ROOT / "docs/errors.md").read_text(), re.M)
    assert headings == sorted({name for name, _ in TRIGGERS})
    assert raised == {*headings}


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jaxnorm.linen.BatchNorm(name="norm")(x)


def test_errors_name_the_layer_in_a_model_of_linen():
    with pytest.raises(ValueError, match=r"^BatchNorm \(norm\): use_running_average should be"):
        Model().init(jax.random.key(0), X)


def test_an_unbound_axis_is_still_a_name_error_of_jax():
    with pytest.raises(NameError, match=r"^batch_norm: .*unbound axis name: data") as error:
        norm(axis_name="data")
    assert isinstance(error.value.__cause__, NameError)


# ---- The names of arguments ----


@pytest.mark.parametrize(
    ("layer", "given", "wanted"),
    [
        ("BatchNorm", {"eps": 1e-3}, "eps should be epsilon"),
        ("BatchNorm", {"affine": False}, "affine should be use_scale and use_bias"),
        ("RMSNorm", {"elementwise_affine": False}, "elementwise_affine should be use_scale,"),
        ("InstanceNorm", {"axis": 1}, "axis should be feature_axes"),
        ("BatchNorm", {"feature_axes": 1, "data_format": "NC"}, "data_format should be axis"),
        ("BatchNorm", {"decay_rate": 0.9}, "decay_rate should be decay"),
        ("GroupNorm", {"groups": 2}, "groups should be num_groups"),
    ],
)
@pytest.mark.parametrize("module", [jaxnorm.linen, jaxnorm.nnx], ids=["linen", "nnx"])
def test_names_of_other_libraries_are_answered_by_flax_s(module, layer, given, wanted):
    channels = {"num_features": 8, "rngs": nnx.Rngs(0)} if module is jaxnorm.nnx else {}
    with pytest.raises(TypeError, match=f"^{layer}: {wanted}"):
        getattr(module, layer)(**channels, **given)


def test_other_names_are_python_s_errors():
    with pytest.raises(TypeError, match="unexpected keyword argument 'no_argument'"):
        jaxnorm.linen.GroupNorm(no_argument=1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'no_argument'"):
        made("GroupNorm", no_argument=1)


class OfLinen(jaxnorm.linen.BatchNorm):
    eps: float = 1e-3


class OfNnx(jaxnorm.nnx.BatchNorm):
    def __init__(self, num_features, *, epsilon=1e-5, **options):
        super().__init__(num_features, epsilon=options.pop("eps", epsilon), **options)


def test_a_subclass_may_have_an_argument_of_such_a_name():
    assert OfLinen(eps=1e-2).eps == 1e-2
    assert OfNnx(8, eps=1e-2, rngs=nnx.Rngs(0)).epsilon == 1e-2


def test_layers_are_copied_pickled_and_described_as_before():
    layer = jaxnorm.linen.BatchNorm(epsilon=1e-2)
    for same in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.clone()):
        assert same == layer
    assert next(iter(inspect.signature(jaxnorm.linen.BatchNorm).parameters)) == (
        "use_running_average"
    )
    norm = made("BatchNorm", epsilon=1e-2)
    for same in (copy.deepcopy(norm), nnx.clone(norm), nnx.merge(*nnx.split(norm))):
        assert type(same) is type(norm)
        assert same.epsilon == 1e-2
    many = nn.vmap(
        jaxnorm.linen.BatchNorm,
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True},
    )(use_running_average=False)
    assert many.init(jax.random.key(0), X)["params"]["scale"].shape == (4, 8)


@pytest.mark.parametrize("make", [jaxnorm.linen.LayerNorm, lambda **a: made("RMSNorm", **a)])
def test_an_axis_of_a_layer_norm_is_both_of_its_axes(make):
    # feature_axes alone would still normalize over the last axis.
    with pytest.raises(TypeError, match=r"write feature_axes=\.\.\., reduction_axes="):
        make(axis=1)


@pytest.mark.parametrize("name", ["axis", "channel_axis", "data_format"])
@pytest.mark.parametrize("make", [jaxnorm.linen.GroupNorm, lambda **a: made("GroupNorm", **a)])
def test_the_channels_of_a_group_norm_are_on_the_last_axis(make, name):
    with pytest.raises(TypeError, match=rf"{name} should not .* write jnp.moveaxis\(x, 1, -1\)"):
        make(**{name: 1})


@pytest.mark.parametrize(
    ("shape", "channel_axis", "mask", "index"),
    [
        ((4, 5, 3), -1, (4, 5), "mask[..., None]"),
        ((4, 5, 3), -1, (4,), "mask[..., None, None]"),
        ((5, 5, 3), -1, (5, 5), "mask[..., None]"),
        ((4, 6, 5, 3), -1, (6, 5), "mask[None, :, :, None]"),
        ((4, 5, 5, 5), 1, (4, 5, 5), "mask[:, None]"),
        ((4, 7, 7), 1, (4, 7), "mask[:, None]"),
    ],
)
def test_the_index_for_a_mask_leaves_out_the_channels(shape, channel_axis, mask, index):
    x, mask = jnp.ones(shape), jnp.ones(mask, bool)
    with pytest.raises(ValueError, match=re.escape(f"write {index} [mask-rank]")):
        jaxnorm.batch_norm(x, channel_axis=channel_axis, mask=mask)
    jaxnorm.batch_norm(x, channel_axis=channel_axis, mask=eval(index))


@pytest.mark.parametrize(
    ("shape", "mask"), [((4, 4, 3), (4,)), ((4, 5), (4, 5, 1)), ((4, 5), (7,))]
)
def test_a_mask_of_another_rank_without_a_single_index_gets_none(shape, mask):
    with pytest.raises(ValueError, match="write it with all axes of x, and with size 1 along the"):
        jaxnorm.batch_norm(jnp.ones(shape), mask=jnp.ones(mask, bool))


@pytest.mark.parametrize(
    "box", [lambda init: init, lambda init: nn.with_partitioning(init, (None,))]
)
def test_the_parameter_of_another_shape_is_the_one_that_is_named(box):
    ones, zeros = (box(init) for init in (nn.initializers.ones, nn.initializers.zeros))
    layer = jaxnorm.linen.LayerNorm(scale_init=ones, bias_init=zeros)
    params = layer.init(jax.random.key(0), X)["params"]
    with pytest.raises(ValueError, match=r"shape \(3,\), but were made for \(8,\)"):
        layer.apply({"params": params}, X[..., :3])
    other = layer.init(jax.random.key(0), X[..., :3])["params"]
    mixed = {"scale": params["scale"], "bias": other["bias"]}
    with pytest.raises(ValueError, match=r"shape \(8,\), but were made for \(3,\)"):
        layer.apply({"params": mixed}, X)


@pytest.mark.parametrize(
    ("kind", "write"),
    [
        ("LayerNorm", "feature_axes=1 and reduction_axes=1"),
        ("BatchNorm", "in a layer axis=1"),
        ("GroupNorm", r"jnp.moveaxis\(x, 1, -1\) for a layer"),
    ],
)
def test_the_hint_of_another_axis_has_the_arguments_of_the_layer(kind, write):
    options = {"BatchNorm": {"use_running_average": True}, "GroupNorm": {"num_groups": 2}}
    layer = getattr(jaxnorm.linen, kind)(**options.get(kind, {}))
    variables = layer.init(jax.random.key(0), X)
    with pytest.raises(ValueError, match=f"axis 1 of x has that size; .* {write}"):
        layer.apply(variables, X.transpose(0, 3, 1, 2))
