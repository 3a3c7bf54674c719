"""Tests that converted kernels agree with PyTorch's weights, and are restored bit for bit."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from cases import images
from flax import nnx

from jaxnorm import interop

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("torch_seed")


def assert_round_trip(module, convert, variables, **options):
    back = interop.to_torch(variables, convert=convert.inverse, like=module.state_dict(), **options)
    expected = {key: value.detach().numpy() for key, value in module.state_dict().items()}
    assert back.keys() == expected.keys()
    for key, a in expected.items():
        assert back[key].dtype == a.dtype, key
        assert back[key].tobytes() == a.tobytes(), key


def converted(module, convert, **options):
    """Converts one module that is called "m", and checks that it is restored."""
    model = torch.nn.ModuleDict({"m": module})
    variables = interop.from_torch(model.state_dict(), convert=convert, **options)
    assert_round_trip(model, convert, variables, **options)
    return {"params": variables["params"]["m"]}


def assert_agree(found, expected):
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=0, atol=1e-5)


# ---- Each kind ----


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_convolutions(ndim, groups):
    x, x_torch = images(2, *(7, 6, 5)[:ndim], 4)
    module = getattr(torch.nn, f"Conv{ndim}d")(4, 8, 3, stride=2, padding=1, groups=groups)
    layer = nn.Conv(8, (3,) * ndim, strides=2, padding=1, feature_group_count=groups)
    y = layer.apply(converted(module, interop.kernels()), x)
    assert_agree(np.moveaxis(y, -1, 1), module(x_torch))


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize(("kind", "transpose_kernel"), [("conv_transpose", False), ("conv", True)])
def test_transposed_convolutions(ndim, kind, transpose_kernel):
    x, x_torch = images(2, *(5, 4, 3)[:ndim], 4)
    module = getattr(torch.nn, f"ConvTranspose{ndim}d")(
        4, 3, 3, stride=2, padding=1, output_padding=1
    )
    layer = nn.ConvTranspose(
        3,
        (3,) * ndim,
        strides=(2,) * ndim,
        padding=((3 - 1 - 1, 3 - 1 - 1 + 1),) * ndim,
        transpose_kernel=transpose_kernel,
    )
    y = layer.apply(converted(module, interop.kernels({"m": kind})), x)
    assert_agree(np.moveaxis(y, -1, 1), module(x_torch))


def test_a_linear():
    x = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    module = torch.nn.Linear(4, 3)
    y = nn.Dense(3).apply(converted(module, interop.kernels()), x)
    assert_agree(y, module(torch.from_numpy(x)))


class Conv1D(torch.nn.Module):
    """The class of Hugging Face's GPT-2."""

    def __init__(self, before, after):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(before, after))
        self.bias = torch.nn.Parameter(torch.randn(after))

    def forward(self, x):
        return x @ self.weight + self.bias


def test_a_transposed_linear():
    x = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    module = Conv1D(4, 4)  # square, so that the shape is ambiguous
    y = nn.Dense(4).apply(converted(module, interop.kernels({"m": "transposed_linear"})), x)
    assert_agree(y, module(torch.from_numpy(x)))


def test_an_embedding():
    tokens = np.array([[3, 0, 6]])
    module = torch.nn.Embedding(7, 4)
    y = nn.Embed(7, 4).apply(converted(module, interop.kernels({"m": "embedding"})), tokens)
    assert_agree(y, module(torch.from_numpy(tokens)))


@pytest.mark.parametrize("space", [(5,), (5, 3), (2, 5, 3)])
def test_a_linear_behind_a_flatten(space):
    x, x_torch = images(2, *space, 4)
    module = torch.nn.Linear(4 * int(np.prod(space)), 6)
    convert = interop.kernels({"m": interop.Flattened(4, *space)})
    y = nn.Dense(6).apply(converted(module, convert), x.reshape(2, -1))
    assert_agree(y, module(x_torch.flatten(1)))


@pytest.mark.parametrize("space", [(5,), (5, 3), (2, 5, 3)])
def test_a_linear_before_an_unflatten(space):
    x = np.random.default_rng(0).standard_normal((2, 6)).astype(np.float32)
    module = torch.nn.Linear(6, 4 * int(np.prod(space)))
    convert = interop.kernels({"m": interop.Unflattened(4, *space)})
    y = nn.Dense(module.out_features).apply(converted(module, convert), x).reshape(2, *space, 4)
    assert_agree(np.moveaxis(y, -1, 1), module(torch.from_numpy(x)).reshape(2, 4, *space))


def test_a_layer_norm_over_several_axes():
    x = np.random.default_rng(0).standard_normal((2, 5, 4)).astype(np.float32)
    module = torch.nn.LayerNorm((5, 4))
    torch.nn.init.normal_(module.weight)
    layer = nn.LayerNorm(epsilon=1e-5, reduction_axes=(-2, -1), feature_axes=(-2, -1))
    y = layer.apply(converted(module, interop.kernels({"m": "norm"})), x)
    assert_agree(y, module(torch.from_numpy(x)))


def test_a_module_may_be_called_as_its_leaf_is():
    weight = np.ones((2, 3), np.float32)
    convert = interop.kernels({"embedding": "embedding", "kernel": "linear"})
    for module, leaf in (("embedding", "embedding"), ("kernel", "kernel")):
        name, value = convert(f"{module}.weight", weight)
        assert name == f"{module}.{leaf}"
        assert convert.inverse(name, value)[0] == f"{module}.weight"


def test_what_is_unchanged_stays_as_it_is():
    weight = np.ones((2, 3), np.float32)
    for leaf in ("weight", "kernel", "embedding"):
        convert = interop.kernels({"m": "unchanged"})
        assert convert(f"m.{leaf}", weight) == (f"m.{leaf}", weight)
        assert convert.inverse(f"m.{leaf}", weight) == (f"m.{leaf}", weight)


def test_what_is_left_out():
    state_dict = {"a.weight": np.ones((2, 3)), "b.weight": np.ones((2, 3)), "b.bias": np.ones(2)}
    variables = interop.from_torch(state_dict, norms=[], convert=interop.kernels({"b": None}))
    assert list(variables["params"]) == ["a"]
    back = interop.to_torch(variables, convert=interop.kernels({"a": None}).inverse)
    assert back == {}


def test_other_leaves_do_not_change():
    state_dict = {
        "cls_token": np.ones((1, 1, 8)),
        "pos.table": np.ones((1, 2, 3, 4, 5, 6)),
        "attention.in_proj_weight": np.ones((24, 8)),
        "prelu.weight": np.ones(3),
        "scale.weight": np.ones(()),
    }
    convert = interop.kernels()
    for name, value in state_dict.items():
        assert convert(name, value) == (name, value)
        assert convert.inverse(name, value) == (name, value)


# ---- Whole models ----


class Decoder(torch.nn.Module):
    """A model with each kind once, and a norm."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(7, 6)
        self.grow = torch.nn.Linear(6, 8 * 3 * 2)
        self.norm = torch.nn.BatchNorm2d(8)
        self.up = torch.nn.ConvTranspose2d(8, 4, 4, 2, 1)
        self.conv = torch.nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.head = torch.nn.Linear(4 * 6 * 4, 5)

    def forward(self, tokens):
        x = self.norm(self.grow(self.embed(tokens)).reshape(-1, 8, 3, 2))
        return self.head(self.conv(self.up(x)).flatten(1))


KINDS = {
    "embed": "embedding",
    "grow": interop.Unflattened(8, 3, 2),
    "up": "conv_transpose",
    "head": interop.Flattened(4, 6, 4),
}


def run(embed, grow, norm, up, conv, head, tokens):
    x = norm(grow(embed(tokens)).reshape(-1, 3, 2, 8))
    x = conv(up(x))
    return head(x.reshape(len(x), -1))


class LinenDecoder(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        return run(
            nn.Embed(7, 6, name="Embed_0"),
            nn.Dense(48, name="grow"),
            nn.BatchNorm(use_running_average=True, name="norm"),
            nn.ConvTranspose(4, (4, 4), (2, 2), padding="SAME", name="up"),
            nn.Conv(4, (3, 3), feature_group_count=2, name="conv"),
            nn.Dense(5, name="head"),
            tokens,
        )


class NnxDecoder(nnx.Module):
    def __init__(self, rngs):
        self.Embed_0 = nnx.Embed(7, 6, rngs=rngs)
        self.grow = nnx.Linear(6, 48, rngs=rngs)
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.up = nnx.ConvTranspose(8, 4, (4, 4), (2, 2), padding="SAME", rngs=rngs)
        self.conv = nnx.Conv(4, 4, (3, 3), feature_group_count=2, rngs=rngs)
        self.head = nnx.Linear(96, 5, rngs=rngs)

    def __call__(self, tokens):
        return run(self.Embed_0, self.grow, self.norm, self.up, self.conv, self.head, tokens)


@pytest.mark.parametrize("of_module", [False, True])
def test_a_model_agrees_in_linen_and_nnx(of_module):
    module, names = Decoder().eval(), {"embed": "Embed_0"}
    convert = interop.kernels(KINDS, names=names)
    if of_module:
        told = {name: kind for name, kind in KINDS.items() if not isinstance(kind, str)}
        convert = interop.kernels_of(module, kinds=told, names=names)
    variables = interop.from_torch(module.state_dict(), names=names, convert=convert)
    assert_round_trip(module, convert, variables, names=names)
    tokens = np.array([3, 0, 6])
    expected = module(torch.from_numpy(tokens))

    params, stats = variables["params"], variables["batch_stats"]
    assert_agree(LinenDecoder().apply(interop.to_flax(variables), tokens), expected)

    model = NnxDecoder(nnx.Rngs(0))
    state = nnx.state(model)
    stats = interop.to_flax(variables)["batch_stats"]
    nnx.replace_by_pure_dict(state, interop.to_nnx({"params": params, "batch_stats": stats}))
    nnx.update(model, state)
    assert_agree(model(tokens), expected)


def test_without_the_order_of_the_flatten_the_outputs_differ():
    module = Decoder().eval()
    convert = interop.kernels(KINDS | {"head": "linear"}, names={"embed": "Embed_0"})
    variables = interop.from_torch(module.state_dict(), names={"embed": "Embed_0"}, convert=convert)
    tokens = np.array([3, 0, 6])
    y = LinenDecoder().apply(interop.to_flax(variables), tokens)
    assert np.abs(y - module(torch.from_numpy(tokens)).detach().numpy()).max() > 0.01


def test_jax_arrays_are_restored_too():
    convert = interop.kernels(KINDS)
    kernel = jnp.arange(96.0 * 5).reshape(96, 5)
    name, weight = convert.inverse("head.kernel", kernel)
    assert name == "head.weight"
    np.testing.assert_array_equal(convert(name, weight)[1], kernel)


# ---- Kinds from the classes ----


def test_subclasses_and_lazy_modules_that_are_initialized():
    class Conv2dSame(torch.nn.Conv2d):
        pass

    lazy = torch.nn.LazyLinear(3)
    lazy(torch.ones(2, 5))
    model = torch.nn.ModuleDict(
        {
            "conv": Conv2dSame(3, 4, 3),
            "lazy": lazy,
            "attention": torch.nn.MultiheadAttention(8, 2),
            "lstm": torch.nn.LSTM(8, 8),
            "bag": torch.nn.EmbeddingBag(5, 3),
            "gpt": Conv1D(4, 12),
            "ln": torch.nn.LayerNorm((2, 3)),
            "bn": torch.nn.BatchNorm1d(3),
            "bilinear": torch.nn.Bilinear(2, 3, 4),
            "up": torch.nn.ConvTranspose1d(3, 4, 3),
        }
    )
    convert = interop.kernels_of(model)
    assert dict(convert.kinds) == {
        "conv": "conv",
        "lazy": "linear",
        "attention.out_proj": "linear",
        "bag": "embedding",
        "gpt": "transposed_linear",
        "ln": "norm",
        "bilinear": "unchanged",
        "up": "conv_transpose",
    }
    variables = interop.from_torch(model.state_dict(), convert=convert)
    assert variables["params"]["ln"]["scale"].shape == (2, 3)
    assert_round_trip(model, convert, variables)


def test_shared_weights_are_an_error_unless_kinds_lists_them():
    model = torch.nn.ModuleDict(
        {"wte": torch.nn.Embedding(7, 4), "lm_head": torch.nn.Linear(4, 7, bias=False)}
    )
    model["lm_head"].weight = model["wte"].weight
    with pytest.raises(ValueError, match=r"'lm_head' has that of 'wte'.*\{'lm_head': None\}"):
        interop.kernels_of(model)
    convert = interop.kernels_of(model, kinds={"lm_head": None})
    variables = interop.from_torch(model.state_dict(), convert=convert)
    assert {k: list(v) for k, v in variables["params"].items()} == {"wte": ["embedding"]}
    twice = interop.kernels_of(model, kinds={"lm_head": "linear", "wte": "embedding"})
    assert len(interop.from_torch(model.state_dict(), convert=twice)["params"]) == 2


def test_a_shared_module_is_refused():
    linear = torch.nn.Linear(4, 4)
    with pytest.raises(ValueError, match="'b' has that of 'a'"):
        interop.kernels_of(torch.nn.ModuleDict({"a": linear, "b": linear}))


def test_what_looks_like_a_flatten_is_warned_of():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8 * 49, 10)
    )
    with pytest.warns(UserWarning, match=r"'2': Flattened\(8, 7, 7\)"):
        assert interop.kernels_of(model).kinds["2"] == "linear"
    for kind in (interop.Flattened(8, 7, 7), "linear"):
        assert interop.kernels_of(model, kinds={"2": kind}).kinds["2"] == kind


@pytest.mark.parametrize("features", [8, 20])
def test_a_linear_behind_a_mean_is_not_warned_of(features):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(features, 64))
    assert interop.kernels_of(model).kinds["1"] == "linear"


# ---- Errors ----


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2, 3))


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (lambda: torch.nn.ConvTranspose2d(4, 4, 3, groups=2), "one group.*but has 2"),
        (lambda: torch.nn.LazyConv2d(4, 3), "be initialized"),
        (Attention, "known class.*Attention"),
        (
            lambda: torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv2d(2, 3, 3)),
            "remove_parametrizations",
        ),
        (
            lambda: torch.nn.utils.parametrizations.spectral_norm(
                torch.nn.Conv2d(2, 3, 3, bias=False)
            ),
            "remove_parametrizations",
        ),
    ],
)
def test_modules_that_cannot_be_converted(module, words):
    model = torch.nn.ModuleDict({"m": module()})
    for kinds in (None, {"m": "conv"}):
        if isinstance(model["m"], Attention) and kinds:
            continue  # the kind is given
        with pytest.raises(ValueError, match=f"kernels_of: 'm' should .*{words}"):
            interop.kernels_of(model, kinds=kinds)
    assert interop.kernels_of(model, kinds={"m": "unchanged"}).kinds["m"] == "unchanged"


def test_a_state_dict_is_no_module():
    with pytest.raises(ValueError, match=r"should be a torch\.nn\.Module, but is OrderedDict"):
        interop.kernels_of(torch.nn.Linear(2, 2).state_dict())
    with pytest.raises(ValueError, match=r"should be a torch\.nn\.Module, but is Linear"):
        interop.kernels_of(torch.nn.Linear)


def test_the_names_of_kinds_are_those_of_the_model():
    with pytest.raises(ValueError, match=r"it has no \['haed'\]"):
        interop.kernels_of(Decoder(), kinds={"haed": "linear"})


@pytest.mark.parametrize(
    ("kinds", "words"),
    [
        ({"a": "convolution"}, "'a' should be of one of the kinds 'conv', "),
        ({"a": 3}, "but is 3"),
        ({"a.weight": "conv"}, "names of modules, but one is 'a.weight'"),
        ({"Block_0.up": "conv"}, "'Block_0.up' is the new name of 'layer1.0.up'"),
    ],
)
def test_kinds_that_do_not_exist(kinds, words):
    with pytest.raises(ValueError, match=words):
        interop.kernels(kinds, names={"layer1.0": "Block_0"})


@pytest.mark.parametrize("shape", [(), (8,), (8, 0), (8, 2.5), (8, True), ((8, 7, 7),)])
@pytest.mark.parametrize("kind", [interop.Flattened, interop.Unflattened])
def test_shapes_that_cannot_be_flattened(kind, shape):
    with pytest.raises(ValueError, match=rf"write {kind.__name__}\(channels, height, width\)"):
        kind(*shape)


@pytest.mark.parametrize(
    ("kind", "name", "value", "words"),
    [
        (
            "embedding",
            "m.weight",
            np.ones(3),
            r"2 axes.*the kind of its module is 'embedding'.*\(3,\)",
        ),
        ("conv", "m.weight", np.ones((2, 3)), "3 to 5 axes"),
        ("linear", "m.weight", np.ones((2, 3, 3, 3)), "2 axes"),
        (interop.Flattened(2, 3), "m.weight", np.ones((5, 7)), "an axis of 6 features.*but has 7"),
        (interop.Unflattened(2, 3), "m.weight", np.ones((5, 7)), "but has 5"),
        (interop.Unflattened(2, 3), "m.bias", np.ones(5), "but has 5"),
        ("linear", "m.kernel", np.ones((2, 3)), "'weight', because 'kernel' could not be restored"),
        ("linear", "m.weight", 3.0, "array of numbers, but is float"),
        ("linear", "m.weight", np.array({}), "array of numbers, but is object"),
    ],
)
def test_arrays_that_are_not_of_their_kind(kind, name, value, words):
    with pytest.raises(ValueError, match=words):
        interop.kernels({"m": kind})(name, value)


def test_a_weight_of_too_many_axes_and_a_name_that_could_not_be_restored():
    with pytest.raises(ValueError, match="3 to 5 axes"):
        interop.kernels()("m.weight", np.ones((1,) * 6))
    with pytest.raises(ValueError, match=r"write kernels\(\{'m': 'unchanged'\}\)"):
        interop.kernels()("m.embedding", np.ones((2, 3)))
    with pytest.raises(ValueError, match="should be called 'kernel'"):
        interop.kernels().inverse("m.weight", np.ones((2, 3)))


def test_an_embedding_of_a_flax_model_is_converted_to_pytorch():
    name, weight = interop.kernels().inverse("e.embedding", np.ones((5, 2)))
    assert (name, weight.shape) == ("e.weight", (5, 2))


def test_what_kernels_returns_does_not_change():
    kinds = {"m": "embedding"}
    convert = interop.kernels(kinds)
    kinds["m"] = "linear"
    assert convert.kinds["m"] == "embedding"
    with pytest.raises(TypeError):
        convert.kinds["m"] = "linear"


def test_kernels_with_kinds_need_the_same_names():
    """Checks the error for other names, with which a transposed convolution would be wrong."""
    names = {"up": "ConvTranspose_0"}
    state_dict = {"up.weight": np.ones((3, 3, 2, 2), np.float32)}
    right = interop.kernels({"up": "conv_transpose"}, names=names)
    wrong = interop.kernels({"up": "conv_transpose"})
    variables = interop.from_torch(state_dict, names=names, convert=right)
    assert interop.to_torch(variables, names=names, convert=right.inverse).keys() == {"up.weight"}
    for call in (
        lambda: interop.from_torch(state_dict, names=names, convert=wrong),
        lambda: interop.from_torch(state_dict, convert=right),
        lambda: interop.to_torch(variables, names=names, convert=wrong.inverse),
        lambda: interop.to_torch(variables, convert=right.inverse),
    ):
        with pytest.raises(ValueError, match="names should be the map that kernels was given"):
            call()
    interop.from_torch(state_dict, names=names, convert=interop.kernels())  # there are no kinds
