"""Tests that the norms of PyTorch models are recognized, with the arguments of equal layers."""

import jax
import numpy as np
import pytest
from flax import nnx

import jaxnorm.linen
import jaxnorm.nnx
from jaxnorm import interop

torch = pytest.importorskip("torch")


def described(module):
    """Returns the row of one module."""
    (row,) = interop.describe_torch(torch.nn.ModuleDict({"m": module}))
    assert row.name == "m"
    return row


def input_like(*shape):
    """Returns an input in both layouts, small enough that epsilon has an effect."""
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return 0.01 * x + 0.02


def randomized(module):
    """Sets parameters and running statistics to values other than 1 and 0."""
    torch.manual_seed(0)
    with torch.no_grad():
        for array in (*module.parameters(), *module.buffers()):
            if array.is_floating_point():
                array.uniform_(0.5, 1.5)
    return module


def assert_same(module, arguments, *, shape, last=True, training=True):
    """Checks that the layer of the row agrees with PyTorch's module in training and evaluation.

    Three batches update the running statistics. With last=False, the axes are in PyTorch's order.
    """
    row = described(module)
    assert row.arguments == arguments
    torch_norm = randomized(module)
    layer = getattr(jaxnorm.linen, row.layer)(**row.arguments)
    assert eval(f"jaxnorm.linen.{row.code}", {"jaxnorm": jaxnorm}) == layer
    model = torch.nn.ModuleDict({"m": torch_norm})
    norms = ["m"] if model.state_dict() else None
    track = None if row.tracks else False
    read = interop.from_torch(model.state_dict(), norms=norms, count=0, track_running_stats=track)
    variables = {name: tree["m"] for name, tree in read.items() if tree}
    tracked = hasattr(layer, "use_running_average")

    def call(x, **options):
        if "axis_name" not in row.arguments:
            return layer.apply(variables, x, mutable=["batch_stats"], **options)
        one = jax.vmap(
            lambda x: layer.apply(variables, x, mutable=["batch_stats"], **options),
            axis_name=row.arguments["axis_name"],
            out_axes=(0, None),
        )
        y, updates = one(x.reshape(2, -1, *x.shape[1:]))
        return y.reshape(x.shape), updates

    def compare(k, **options):
        nonlocal variables
        x = input_like(*shape) * (k + 1)
        x_torch = torch.from_numpy(np.moveaxis(x, -1, 1).copy() if last else x)
        expected = torch_norm(x_torch).detach().numpy()
        expected = np.moveaxis(expected, 1, -1) if last else expected
        y, updates = call(x, **options)
        variables = {**variables, **updates}
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5)

    if training:
        torch_norm.train()
        for k in range(3):
            compare(k, **({"use_running_average": False} if tracked else {}))
    torch_norm.eval()
    compare(3, **({"use_running_average": True} if tracked else {}))
    return row


# ---- Every norm, with every option ----

IMAGES = (6, 5, 4, 8)


@pytest.mark.parametrize(
    ("options", "arguments", "momentum", "tracks"),
    [
        ({}, {"epsilon": 1e-5}, 0.1, True),
        ({"eps": 1e-3}, {"epsilon": 1e-3}, 0.1, True),
        ({"momentum": 0.3}, {"epsilon": 1e-5, "momentum": 0.3}, 0.3, True),
        ({"momentum": 0.9}, {"epsilon": 1e-5, "decay": 0.1}, 0.9, True),
        ({"momentum": 1.0}, {"epsilon": 1e-5, "momentum": 1.0}, 1.0, True),
        ({"momentum": None}, {"epsilon": 1e-5, "momentum": None}, None, True),
        ({"affine": False}, {"epsilon": 1e-5, "use_scale": False, "use_bias": False}, 0.1, True),
        ({"bias": False}, {"epsilon": 1e-5, "use_bias": False}, 0.1, True),
        (
            {"track_running_stats": False},
            {"epsilon": 1e-5, "track_running_stats": False},
            None,
            False,
        ),
    ],
)
def test_batch_norm(options, arguments, momentum, tracks):
    row = assert_same(torch.nn.BatchNorm2d(8, **options), arguments, shape=IMAGES)
    assert (row.layer, row.momentum, row.tracks) == ("BatchNorm", momentum, tracks)
    assert row.epsilon == arguments["epsilon"]


@pytest.mark.parametrize(("ndim", "shape"), [(1, (6, 8)), (1, (6, 5, 8)), (3, (6, 3, 2, 4, 8))])
def test_batch_norm_of_other_ranks(ndim, shape):
    module = getattr(torch.nn, f"BatchNorm{ndim}d")(8)
    assert assert_same(module, {"epsilon": 1e-5}, shape=shape).torch_class == f"BatchNorm{ndim}d"


def test_batch_norm_whose_running_statistics_were_stopped():
    module = torch.nn.BatchNorm2d(8)
    module.track_running_stats = False  # evaluation still uses them
    row = assert_same(module, {"epsilon": 1e-5, "update_stats": False}, shape=IMAGES)
    assert (row.momentum, row.tracks) == (None, True)


def test_synced_batch_norm():
    # In training, PyTorch only supports it on GPU; BatchNorm2d on the whole batch is equal.
    module = torch.nn.SyncBatchNorm(8)
    arguments = {"epsilon": 1e-5, "axis_name": "batch"}
    row = assert_same(module, arguments, shape=IMAGES, training=False)
    assert "axis of your own shard_map" in row.note
    batch_norm = torch.nn.BatchNorm2d(8)
    batch_norm.__class__ = type("SyncBatchNorm", (torch.nn.BatchNorm2d,), {})
    assert_same(batch_norm, arguments, shape=IMAGES)


def test_lazy_batch_norm():
    module = torch.nn.LazyBatchNorm2d(eps=1e-3, momentum=0.2)
    row = described(module)
    assert row.note == "not initialized yet"
    arguments = {"epsilon": 1e-3, "momentum": 0.2}
    assert (row.layer, row.arguments, row.tracks) == ("BatchNorm", arguments, True)
    bare = described(torch.nn.LazyBatchNorm2d(affine=False, track_running_stats=False))
    assert bare.code == (
        "BatchNorm(epsilon=1e-05, use_scale=False, use_bias=False, track_running_stats=False)"
    )
    module(torch.ones(2, 8, 3, 3))
    assert assert_same(module, arguments, shape=IMAGES).note == ""


class FrozenBatchNorm2d(torch.nn.Module):
    """torchvision's class, which only has buffers and never updates them."""

    def __init__(self, features, eps=1e-5):
        super().__init__()
        self.eps = eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(features))

    def forward(self, x):
        arrays = self.running_mean, self.running_var, self.weight, self.bias
        return torch.nn.functional.batch_norm(x, *arrays, eps=self.eps)


def test_frozen_batch_norm():
    module = FrozenBatchNorm2d(8, eps=1e-3)
    row = described(module)
    assert (row.layer, row.tracks, row.momentum) == ("BatchNorm", True, None)
    assert row.arguments == {"use_running_average": True, "epsilon": 1e-3}
    read = interop.from_torch({f"m.{k}": a for k, a in module.state_dict().items()}, count=0)
    variables = {name: tree["m"] for name, tree in read.items()}
    x = input_like(*IMAGES)
    y = jaxnorm.linen.BatchNorm(**row.arguments).apply(variables, x)
    expected = module(torch.from_numpy(np.moveaxis(x, -1, 1).copy())).numpy()
    np.testing.assert_allclose(y, np.moveaxis(expected, 1, -1), atol=1e-5)


AFFINE = {"affine": True}
BARE = {"use_scale": False, "use_bias": False}
TRACKED = {"track_running_stats": True}


@pytest.mark.parametrize(
    ("options", "arguments", "momentum"),
    [
        ({}, {"epsilon": 1e-5, **BARE}, None),
        (AFFINE, {"epsilon": 1e-5}, None),
        ({**AFFINE, "bias": False, "eps": 1e-4}, {"epsilon": 1e-4, "use_bias": False}, None),
        (TRACKED, {"epsilon": 1e-5, **BARE, **TRACKED}, 0.1),
        ({**AFFINE, **TRACKED}, {"epsilon": 1e-5, **TRACKED}, 0.1),
        (
            {**AFFINE, **TRACKED, "momentum": 0.7},
            {"epsilon": 1e-5, **TRACKED, "decay": 0.3},
            0.7,
        ),
        # PyTorch treats None as 0 in instance norms: the running statistics do not change.
        (
            {**AFFINE, **TRACKED, "momentum": None},
            {"epsilon": 1e-5, **TRACKED, "momentum": 0.0},
            0.0,
        ),
    ],
)
def test_instance_norm(options, arguments, momentum):
    row = assert_same(torch.nn.InstanceNorm2d(8, **options), arguments, shape=IMAGES)
    tracks = "track_running_stats" in options
    assert (row.layer, row.momentum, row.tracks) == ("InstanceNorm", momentum, tracks)


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ({}, {"num_groups": 4, "epsilon": 1e-5}),
        ({"eps": 1e-3}, {"num_groups": 4, "epsilon": 1e-3}),
        ({"affine": False}, {"num_groups": 4, "epsilon": 1e-5, **BARE}),
        ({"bias": False}, {"num_groups": 4, "epsilon": 1e-5, "use_bias": False}),
    ],
)
def test_group_norm(options, arguments):
    row = assert_same(torch.nn.GroupNorm(4, 8, **options), arguments, shape=IMAGES)
    assert (row.layer, row.momentum, row.tracks) == ("GroupNorm", None, False)


def axes(*axes):
    return {"reduction_axes": axes, "feature_axes": axes}


@pytest.mark.parametrize(
    ("shape", "options", "arguments"),
    [
        (8, {}, {"epsilon": 1e-5}),
        (8, {"eps": 1e-12}, {"epsilon": 1e-12}),
        (8, {"elementwise_affine": False}, {"epsilon": 1e-5, **BARE}),
        (8, {"bias": False}, {"epsilon": 1e-5, "use_bias": False}),
        ((4, 8), {}, {"epsilon": 1e-5, **axes(-2, -1)}),
        ((5, 4, 8), {"bias": False}, {"epsilon": 1e-5, "use_bias": False, **axes(-3, -2, -1)}),
        ((4, 8), {"elementwise_affine": False}, {"epsilon": 1e-5, **BARE, **axes(-2, -1)}),
    ],
)
def test_layer_norm(shape, options, arguments):
    module = torch.nn.LayerNorm(shape, **options)
    row = assert_same(module, arguments, shape=IMAGES, last=False)
    assert row.layer == "LayerNorm"
    assert (row.note != "") == (shape != 8)


@pytest.mark.parametrize(
    ("shape", "options", "arguments"),
    [
        (8, {"eps": 1e-6}, {"epsilon": 1e-6}),
        (8, {}, {"epsilon": 2.0**-23}),
        (8, {"eps": 1e-6, "elementwise_affine": False}, {"epsilon": 1e-6, "use_scale": False}),
        ((4, 8), {"eps": 1e-6}, {"epsilon": 1e-6, **axes(-2, -1)}),
    ],
)
def test_rms_norm(shape, options, arguments):
    row = assert_same(torch.nn.RMSNorm(shape, **options), arguments, shape=IMAGES, last=False)
    assert row.layer == "RMSNorm"


@pytest.mark.parametrize(
    ("dtype", "epsilon"),
    [(torch.float16, 2**-23), (torch.bfloat16, 2**-23), (torch.float64, 2**-52)],
)
def test_the_default_epsilon_of_rms_norm_is_that_of_the_dtype_it_computes_in(dtype, epsilon):
    module = torch.nn.RMSNorm(1, dtype=dtype)
    assert described(module).epsilon == epsilon
    x = torch.tensor([2**-13], dtype=dtype)
    expected = float(x) / np.sqrt(float(x) ** 2 + epsilon)
    assert module(x).item() == pytest.approx(expected, rel=1e-2)


# ---- Classes of other libraries ----


class LlamaRMSNorm(torch.nn.Module):
    def __init__(self, features, eps=1e-6):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(features))
        self.variance_epsilon = eps

    def forward(self, x):
        variance = x.pow(2).mean(-1, keepdim=True)
        return self.weight * x * torch.rsqrt(variance + self.variance_epsilon)


@pytest.mark.parametrize("name", ["LlamaRMSNorm", "T5LayerNorm", "MistralRMSNorm"])
def test_the_rms_norms_of_transformers(name):
    module = type(name, (LlamaRMSNorm,), {})(8, eps=1e-3)
    row = assert_same(module, {"epsilon": 1e-3}, shape=IMAGES, last=False)
    assert row.layer == "RMSNorm"
    LlamaRMSNorm.forward.__module__ = "transformers.models.llama.modeling_llama"
    assert described(module).note == ""


class BatchNormAct2d(torch.nn.BatchNorm2d):
    def __init__(self, features):
        super().__init__(features)
        self.act = torch.nn.ReLU()

    def forward(self, x):
        return self.act(super().forward(x))


class LayerNorm2d(torch.nn.LayerNorm):
    def forward(self, x):
        x = torch.nn.functional.layer_norm(
            x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps
        )
        return x.permute(0, 3, 1, 2)


def test_subclasses_with_a_forward_of_their_own():
    row = described(BatchNormAct2d(8))
    assert (row.torch_class, row.layer) == ("BatchNormAct2d", "BatchNorm")
    assert "its own forward" in row.note
    row = assert_same(LayerNorm2d(8, eps=1e-6), {"epsilon": 1e-6}, shape=IMAGES)
    assert (row.torch_class, row.layer) == ("LayerNorm2d", "LayerNorm")


@pytest.mark.parametrize(
    ("name", "attributes", "words"),
    [
        ("GemmaRMSNorm", {"weight": torch.ones(3), "eps": 1e-6}, "add 1 to the scale"),
        ("LayerNorm", {"gamma": torch.ones(3), "normalized_shape": (3,), "eps": 1e-6}, "gamma"),
        ("LayerNorm", {"weight": torch.ones(3)}, "has no attribute 'eps'"),
        ("FrozenBatchNorm2d", {"weight": torch.ones(3), "running_mean": torch.ones(3)}, "'eps'"),
        ("LlamaRMSNorm", {"weight": torch.ones(3), "bias": torch.ones(3), "eps": 1e-6}, "bias"),
        ("ActNorm", {"logs": torch.ones(3)}, ""),
        ("InPlaceABN", {"weight": torch.ones(3)}, ""),
        ("Whitening", {"running_mean": torch.ones(3)}, ""),
    ],
)
def test_what_only_looks_like_a_norm_is_unknown(name, attributes, words):
    module = type(name, (torch.nn.Module,), {})()
    for key, value in attributes.items():
        if isinstance(value, torch.Tensor):
            module.register_buffer(key, value)
        else:
            setattr(module, key, value)
    row = described(module)
    assert (row.torch_class, row.layer, row.arguments, row.code) == (name, "unknown", {}, "unknown")
    assert row.epsilon == attributes.get("eps")
    assert words in row.note


def test_norms_of_another_kind():
    assert described(torch.nn.LocalResponseNorm(2)).layer == "unknown"


def test_modules_that_are_no_norms():
    model = torch.nn.ModuleDict(
        {
            "weight": torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(2, 3)),
            "spectral": torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(2, 3)),
            "conv": torch.nn.Conv2d(3, 4, 3),
            "prelu": torch.nn.PReLU(),
            "softmax": torch.nn.Softmax(-1),
        }
    )
    assert list(interop.describe_torch(model)) == []


def test_norms_inside_a_module_are_listed_instead_of_the_module():
    class PreNorm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = torch.nn.Sequential(torch.nn.LayerNorm(3), torch.nn.Linear(3, 3))

    class LayerNorm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.LayerNorm(3)

    model = torch.nn.ModuleDict({"a": PreNorm(), "b": LayerNorm()})
    assert [row.name for row in interop.describe_torch(model)] == ["a.inside.0", "b.norm"]


def test_a_norm_with_two_names_has_two_rows():
    norm = torch.nn.LayerNorm(3)
    first, second = interop.describe_torch(torch.nn.ModuleDict({"a": norm, "b": norm}))
    assert (first.name, first.note) == ("a", "")
    assert (second.name, second.note) == ("b", "the same module as 'a'")


def test_a_scripted_model():
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        model = torch.jit.script(torch.nn.Sequential(torch.nn.BatchNorm2d(3, eps=1e-3)))
    (row,) = interop.describe_torch(model)
    assert (row.torch_class, row.layer, row.epsilon) == ("BatchNorm2d", "BatchNorm", 1e-3)
    assert row.note == ""


def test_a_norm_may_be_the_whole_model():
    (row,) = interop.describe_torch(torch.nn.BatchNorm2d(3))
    assert (row.name, row.code) == ("", "BatchNorm(epsilon=1e-05)")


def test_a_state_dict_is_no_model():
    with pytest.raises(ValueError, match=r"describe_torch: module should be a torch\.nn\.Module"):
        interop.describe_torch(torch.nn.BatchNorm2d(3).state_dict())


# ---- The table ----


def test_the_table_is_aligned():
    model = torch.nn.Sequential(
        torch.nn.BatchNorm2d(8, momentum=None),
        torch.nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
        torch.nn.LayerNorm((4, 4)),
        torch.nn.LocalResponseNorm(2),
    )
    assert str(interop.describe_torch(model)).splitlines() == [
        "name  PyTorch            epsilon  momentum  tracks  jaxnorm",
        "0     BatchNorm2d        1e-05    None      yes     "
        "BatchNorm(epsilon=1e-05, momentum=None)",
        "1     InstanceNorm2d     1e-05    0.1       yes     "
        "InstanceNorm(epsilon=1e-05, track_running_stats=True)",
        "2     LayerNorm          1e-05    -         -       "
        "LayerNorm(epsilon=1e-05, reduction_axes=(-2, -1), feature_axes=(-2, -1))"
        "  # its axes are in PyTorch's order",
        "3     LocalResponseNorm  -        -         -       unknown",
    ]


def test_nnx_takes_the_same_arguments():
    modules = torch.nn.Sequential(
        torch.nn.BatchNorm2d(8, eps=1e-3),
        torch.nn.InstanceNorm2d(8, track_running_stats=True),
        torch.nn.GroupNorm(4, 8),
        torch.nn.LayerNorm(8, bias=False),
        torch.nn.RMSNorm(8),
    )
    for row in interop.describe_torch(modules):
        layer = getattr(jaxnorm.nnx, row.layer)(8, **row.arguments, rngs=nnx.Rngs(0))
        assert layer.epsilon == row.epsilon
