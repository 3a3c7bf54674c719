"""Tests that modules of two models are paired, and that wrong pairs are found."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import images
from flax import nnx

import jaxnorm.linen
import jaxnorm.nnx
from jaxnorm import interop

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("torch_seed")


def rows(*shape):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return x, torch.from_numpy(x.copy())


def matched(proposal):
    return [(pair.torch, pair.flax, pair.by) for pair in proposal.pairs]


# ---- A block in PyTorch, and in Linen and NNX ----


class TheirBlock(torch.nn.Module):
    """A block of two branches, whose convolutions and norms have equal shapes."""

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.left = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 1), torch.nn.BatchNorm2d(8))
        self.right = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 1), torch.nn.BatchNorm2d(8))
        self.head = torch.nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        x = torch.tanh(self.left(x)) + self.right(x)
        return self.head(x.mean((2, 3)))


class Block(nn.Module):
    right_first: bool = False
    epsilon: float = 1e-5
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, train=False):
        def branch(x):
            x = nn.Conv(8, (1, 1))(x)
            return jaxnorm.linen.BatchNorm(not train, epsilon=self.epsilon)(x)

        x = nn.Conv(8, (3, 3))(x)
        if self.right_first:
            right = branch(x)
            x = jnp.tanh(branch(x)) + right
        else:
            x = jnp.tanh(branch(x)) + branch(x)
        return nn.Dense(5)(x.mean((1, 2)))


class NnxBlock(nnx.Module):
    def __init__(self, rngs, dropout=0.0):
        self.stem = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.convs = nnx.List([nnx.Conv(8, 8, (1, 1), rngs=rngs) for _ in range(2)])
        self.norms = nnx.List([jaxnorm.nnx.BatchNorm(8, rngs=rngs) for _ in range(2)])
        self.drop = nnx.Dropout(dropout, rngs=rngs)
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        x = self.drop(self.stem(x))
        left, right = (norm(conv(x)) for conv, norm in zip(self.convs, self.norms, strict=True))
        return self.head((jnp.tanh(left) + right).mean((1, 2)))


X, X_TORCH = images(2, 6, 5, 3)
BY_ORDER = {
    "left.0": "Conv_1",
    "left.1": "BatchNorm_0",
    "right.0": "Conv_2",
    "right.1": "BatchNorm_1",
}


def test_what_is_certain_is_matched_and_the_rest_is_not_guessed():
    proposal = interop.match(Block(), X, TheirBlock(), X_TORCH)
    assert matched(proposal) == [
        ("stem", "Conv_0", "unique shape"),
        ("head", "Dense_0", "unique shape"),
    ]
    assert [unit.name for unit in proposal.only_torch] == list(BY_ORDER)
    assert {unit.name for unit in proposal.only_flax} == set(BY_ORDER.values())
    assert "4 of these can be paired by their order: write allow_order=True" in str(proposal)
    with pytest.raises(ValueError, match=r"should be matched.*allow_order(.|\n)*right\.1"):
        proposal.variables()
    with pytest.raises(ValueError, match="should be matched"):
        proposal.verify()


def test_the_rest_is_matched_by_the_order_of_the_calls():
    proposal = interop.match(Block(), X, TheirBlock(), X_TORCH, allow_order=True)
    assert {pair.torch: pair.flax for pair in proposal.pairs if pair.by == "order"} == BY_ORDER
    assert proposal.names == {"stem": "Conv_0", "head": "Dense_0", **BY_ORDER}
    assert proposal.verify() < 1e-5
    assert "left.0   Conv_1       bias [8], kernel [1, 1, 8, 8]" in str(proposal)


def test_the_order_is_the_calls_and_not_the_names():
    class Reversed(nn.Module):
        def setup(self):
            self.z, self.a = nn.Dense(4), nn.Dense(4)

        def __call__(self, x):
            return self.a(jnp.tanh(self.z(x)))

    x, x_torch = rows(2, 4)
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 4))
    proposal = interop.match(Reversed(), x, module, x_torch, allow_order=True)
    assert proposal.names == {"0": "z", "2": "a"}
    assert proposal.verify() < 1e-5


def test_nnx_models_are_matched_in_evaluation():
    module, model = TheirBlock(), NnxBlock(nnx.Rngs(0), dropout=0.5)
    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngState))))
    proposal = interop.match(model, X, module, X_TORCH, allow_order=True)
    assert matched(proposal)[0] == ("stem", "stem", "name")
    assert proposal.names == {
        "left.0": "convs.0",
        "left.1": "norms.0",
        "right.0": "convs.1",
        "right.1": "norms.1",
    }
    assert proposal.verify() < 1e-5
    after = nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngState)))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    assert model.drop.deterministic is False


def test_the_map_works_in_both_directions():
    module = TheirBlock()
    proposal = interop.match(Block(), X, module, X_TORCH, allow_order=True)
    back = interop.to_torch(
        proposal.variables(),
        names=proposal.names,
        convert=proposal.kernels.inverse,
        like=module.state_dict(),
    )
    for name, a in module.state_dict().items():
        np.testing.assert_array_equal(back[name], a)


# ---- Wrong pairs are found ----


def test_two_equal_norms_that_are_exchanged_are_found_although_their_values_are_equal():
    """Checks two initial norms, with scale 1 and bias 0, with which the outputs agree."""
    x, x_torch = rows(3, 8)

    class Norms(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = jnp.tanh(jaxnorm.linen.LayerNorm(epsilon=1e-5, name="second")(x))
            return jaxnorm.linen.LayerNorm(epsilon=1e-5, name="first")(x)

    module = torch.nn.Sequential()
    module.add_module("first", torch.nn.LayerNorm(8))
    module.add_module("tanh", torch.nn.Tanh())
    module.add_module("second", torch.nn.LayerNorm(8))
    proposal = interop.match(Norms(), x, module, x_torch)
    assert matched(proposal) == [("first", "first", "name"), ("second", "second", "name")]
    assert "in different orders" in str(proposal)
    assert all("in different orders" in pair.note for pair in proposal.pairs)
    with pytest.raises(
        ValueError, match=r"no two.*same values.*'first', matched with 'first' by n"
    ):
        proposal.verify()
    proposal = interop.match(
        Norms(), x, module, x_torch, names={"first": "second", "second": "first"}
    )
    assert {pair.by for pair in proposal.pairs} == {"given"}
    assert not any(pair.note for pair in proposal.pairs)
    assert proposal.verify() < 1e-5


def test_branches_in_another_order_are_found_and_can_be_named():
    proposal = interop.match(Block(right_first=True), X, TheirBlock(), X_TORCH, allow_order=True)
    with pytest.raises(
        ValueError, match=r"differ by .*; the first module .* 'head', .* unique shape"
    ):
        proposal.verify()
    names = {"left.0": "Conv_2", "left.1": "BatchNorm_1"}
    proposal = interop.match(
        Block(right_first=True), X, TheirBlock(), X_TORCH, names=names, allow_order=True
    )
    assert proposal.names["right.0"] == "Conv_1"
    assert proposal.verify() < 1e-5


def test_a_square_kernel_that_is_transposed_is_found():
    x, x_torch = rows(3, 8)
    module = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 5))
    model = nn.Sequential([nn.Dense(8), nn.Dense(5)])
    assert interop.match(model, x, module, x_torch).verify() < 1e-5
    wrong = interop.match(model, x, module, x_torch, kinds={"0": "transposed_linear"})
    with pytest.raises(ValueError, match="'0', matched with 'layers_0' by unique shape"):
        wrong.verify()
    right = interop.match(model, x, module, x_torch)
    variables = right.variables()
    assert right.verify(variables) < 1e-5
    variables["params"]["layers_0"]["kernel"] = variables["params"]["layers_0"]["kernel"].T
    with pytest.raises(ValueError, match="'0', matched"):
        right.verify(variables)


def test_an_epsilon_that_differs_is_found_at_its_norm():
    with torch.no_grad():
        (module := TheirBlock()).left[1].running_var.fill_(1e-3)
    proposal = interop.match(Block(epsilon=1e-3), X, module, X_TORCH, allow_order=True)
    with pytest.raises(ValueError, match=r"'left\.1', matched with 'BatchNorm_0'.*epsilon"):
        proposal.verify()
    assert proposal.verify(tolerance=1) > 1e-3


def test_a_flatten_that_is_not_said_is_found():
    class Flat(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (3, 3), padding=0)(x)
            return nn.Dense(5)(x.reshape(len(x), -1))

    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(48, 5)
    )
    with pytest.warns(UserWarning, match="flattened"):
        proposal = interop.match(Flat(), X, module, X_TORCH)
    with pytest.raises(ValueError, match="'2', matched with 'Dense_0'"):
        proposal.verify()
    kinds = {"2": interop.Flattened(4, 4, 3)}
    assert interop.match(Flat(), X, module, X_TORCH, kinds=kinds).verify() < 1e-5


def test_nan_never_agrees():
    module = torch.nn.Linear(4, 4)
    with torch.no_grad():
        module.bias[0] = torch.nan
    proposal = interop.match(nn.Dense(4), *rows(2, 4)[:1], module, rows(2, 4)[1])
    with pytest.raises(ValueError, match="differ by nan"):
        proposal.verify()


def test_outputs_with_channels_first_and_last_are_compared():
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 5, 1))
    model = nn.Sequential([nn.Conv(4, (3, 3), padding=0), nn.Conv(5, (1, 1))])
    proposal = interop.match(model, X, module, X_TORCH)
    assert proposal.verify() < 1e-5
    variables = proposal.variables()
    variables["params"]["layers_1"]["kernel"] = variables["params"]["layers_1"]["kernel"][..., ::-1]
    with pytest.raises(ValueError, match="'1', matched with 'layers_1'"):
        proposal.verify(variables)


def test_an_output_that_pytorch_changes_in_place_is_compared_as_it_was():
    x, x_torch = rows(3, 8)
    module = torch.nn.Sequential(
        torch.nn.Linear(8, 6), torch.nn.ReLU(inplace=True), torch.nn.LayerNorm(6)
    )
    model = nn.Sequential([nn.Dense(6), nn.gelu, jaxnorm.linen.LayerNorm(epsilon=1e-5)])
    with pytest.raises(ValueError, match="'2', matched with 'layers_2'"):
        interop.match(model, x, module, x_torch).verify()


# ---- Tracing both models ----


def test_neither_model_is_changed():
    module = TheirBlock()
    module.left.eval()
    modes = [m.training for m in module.modules()]
    before = {k: a.clone() for k, a in module.state_dict().items()}
    interop.match(Block(), X, module, X_TORCH, allow_order=True).verify()
    assert [m.training for m in module.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    for name, a in module.state_dict().items():
        assert torch.equal(a, before[name]), name


@pytest.mark.parametrize("wrap", [nn.jit, nn.remat], ids=["jit", "remat"])
def test_calls_inside_other_functions_are_seen_in_their_order(wrap):
    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jnp.tanh(nn.Dense(4, name="b")(jnp.tanh(nn.Dense(4, name="z")(x))))

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = wrap(Inner)(name="y")(x)
            return wrap(Inner)(name="a")(x)

    x, x_torch = rows(2, 4)
    layers = [m for _ in range(4) for m in (torch.nn.Linear(4, 4), torch.nn.Tanh())]
    proposal = interop.match(Outer(), x, torch.nn.Sequential(*layers), x_torch, allow_order=True)
    assert proposal.names == {"0": "y.z", "2": "y.b", "4": "a.z", "6": "a.b"}
    assert proposal.verify() < 1e-5


def test_parameters_that_are_cast_before_the_first_call_keep_the_order_of_the_calls():
    class Cast(nnx.Module):
        def __init__(self, rngs):
            self.a, self.z = (nnx.Linear(4, 4, rngs=rngs) for _ in range(2))

        def __call__(self, x):
            kernels = [jnp.asarray(m.kernel[...], jnp.float16) for m in (self.a, self.z)]
            a, z = (k.astype(jnp.float32) for k in kernels)
            return (jnp.tanh(x @ z + self.z.bias[...])) @ a + self.a.bias[...]

    x, x_torch = rows(2, 4)
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 4))
    proposal = interop.match(Cast(nnx.Rngs(0)), x, module, x_torch, allow_order=True)
    assert proposal.names == {"0": "z", "2": "a"}
    assert proposal.verify(tolerance=1e-2) > 1e-5  # float16


def test_modules_that_pytorch_does_not_call_follow_the_one_that_they_belong_to():
    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.before = torch.nn.Linear(4, 4)
            self.out = torch.nn.Linear(4, 4)
            self.after = torch.nn.Linear(4, 4)
            self.inner = torch.nn.Module()
            self.inner.weights = self.out

        def forward(self, x):
            return self.after(torch.tanh(self.before(x)) @ self.out.weight.T + self.out.bias)

    from jaxnorm.interop._torch_calls import TorchCalls

    module = Attention()
    del module.inner
    order = TorchCalls(module, (rows(2, 4)[1],), {}, keep=set()).order
    assert sorted(order, key=order.__getitem__) == ["", "out", "before", "after"]


def test_shared_weights_are_left_out_as_said():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.wte = torch.nn.Embedding(11, 4)
            self.head = torch.nn.Linear(4, 11, bias=False)
            self.head.weight = self.wte.weight

        def forward(self, ids):
            return self.head(torch.tanh(self.wte(ids)))

    class Model(nn.Module):
        @nn.compact
        def __call__(self, ids):
            embed = nn.Embed(11, 4)
            return embed.attend(jnp.tanh(embed(ids)))

    ids = np.array([[1, 2, 3]])
    given = Model(), ids, Tied(), torch.from_numpy(ids)
    with pytest.raises(ValueError, match="'head' has that of 'wte'"):
        interop.match(*given)
    proposal = interop.match(*given, kinds={"head": None})
    assert proposal.names == {"wte": "Embed_0"}
    assert proposal.verify() < 1e-5


def test_keyword_arguments_and_several_outputs():
    class TorchModel(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(4, 3)

        def forward(self, x, *, scale):
            return {"y": self.fc(x), "more": (self.fc(x) * scale, None)}

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, *, train, scale):
            assert not train
            y = nn.Dense(3, name="fc")(x)
            return y, y * scale

    x, x_torch = rows(2, 4)
    proposal = interop.match(
        Model(),
        (x,),
        TorchModel(),
        (x_torch,),
        kwargs={"train": False, "scale": 2.0},
        torch_kwargs={"scale": 2.0},
    )
    assert proposal.verify() < 1e-6
    proposal = interop.match(
        Model(),
        x,
        TorchModel(),
        x_torch,
        kwargs={"train": 0, "scale": 3},
        torch_kwargs={"scale": 2},
    )
    with pytest.raises(ValueError, match=r"differ by 0\.5; compare"):
        proposal.verify()  # both modules are correct


# ---- Only arrays ----


def test_arrays_alone_are_matched_by_the_natural_order_of_their_names():
    state_dict = {f"h.{i}.weight": np.full(4, i) for i in (10, 9, 0)}
    variables = {"params": {f"Norm_{i}": {"scale": np.ones(4)} for i in (11, 2, 1)}}
    proposal = interop.match_variables(variables, state_dict)
    assert proposal.pairs == ()
    proposal = interop.match_variables(variables, state_dict, allow_order=True)
    assert matched(proposal) == [
        ("h.0", "Norm_1", "order"),
        ("h.9", "Norm_2", "order"),
        ("h.10", "Norm_11", "order"),
    ]
    with pytest.raises(ValueError, match=r"models should be known.*match\(model, example_input"):
        proposal.verify()


def test_groups_of_different_sizes_are_not_paired():
    state_dict = {f"{i}.weight": np.ones(4) for i in range(3)}
    variables = {"params": {f"Norm_{i}": {"scale": np.ones(4)} for i in range(2)}}
    proposal = interop.match_variables(variables, state_dict, allow_order=True)
    assert proposal.pairs == ()
    assert "allow_order" not in str(proposal)
    assert str(proposal).splitlines()[1:] == [
        "only in PyTorch:",
        *(f"  {i}  scale [4]" for i in range(3)),
        "only in Flax:",
        *(f"  Norm_{i}  scale [4]" for i in range(2)),
    ]


def test_what_is_left_over_when_a_name_is_known_is_still_a_matter_of_order():
    """Checks two modules of one shape: matching one by its name does not determine the other."""
    state_dict = {"a.weight": np.ones(4), "b.weight": np.ones(4)}
    variables = {"params": {"a": {"scale": np.ones(4)}, "c": {"scale": np.ones(4)}}}
    assert matched(interop.match_variables(variables, state_dict)) == [("a", "a", "name")]


def test_a_name_alone_does_not_pair_modules_of_different_shapes():
    state_dict = {"a.weight": np.ones(4), "b.weight": np.ones(3)}
    variables = {"params": {"b": {"scale": np.ones(4)}, "a": {"scale": np.ones(3)}}}
    proposal = interop.match_variables(variables, state_dict)
    assert matched(proposal) == [("a", "b", "unique shape"), ("b", "a", "unique shape")]
    assert proposal.names == {"a": "b", "b": "a"}


def test_a_name_that_stays_is_in_the_map_if_the_front_of_it_changes():
    state_dict = {"a.weight": np.ones(4), "a.b.weight": np.ones(3)}
    variables = {"params": {"x": {"scale": np.ones(4)}, "a": {"b": {"scale": np.ones(3)}}}}
    proposal = interop.match_variables(variables, state_dict)
    assert proposal.names == {"a": "x", "a.b": "a.b"}
    like = interop.from_torch(state_dict, names=proposal.names, like=variables)
    back = interop.to_torch(like, names=proposal.names)
    assert back.keys() == state_dict.keys()


# ---- Errors ----


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"stom": "Conv_0"}, "the PyTorch model .* no 'stom'; did you mean 'stem'"),
        (
            {"stem": "Conf_0"},
            "the Flax model that contain arrays.* no 'Conf_0'; did you mean 'Conv_0'",
        ),
        ({"stem": "Conv_1"}, "'Conv_1' should have the arrays of 'stem'.*3, 3, 3, 8.*1, 1, 8, 8"),
        ({"left.0": "Conv_1", "right.0": "Conv_1"}, "each module a different name"),
    ],
    ids=["torch name", "flax name", "shapes", "twice"],
)
def test_names_that_cannot_be(names, message):
    with pytest.raises(ValueError, match=message):
        interop.match(Block(), X, TheirBlock(), X_TORCH, names=names)


def test_models_that_are_none():
    with pytest.raises(TypeError, match=r"Module of flax\.linen or flax\.nnx, but is function"):
        interop.match(lambda x: x, X, TheirBlock(), X_TORCH)
    with pytest.raises(TypeError, match="but is the class Block"):
        interop.match(Block, X, TheirBlock(), X_TORCH)
    with pytest.raises(ValueError, match=r"should be a torch\.nn\.Module"):
        interop.match(Block(), X, TheirBlock().state_dict(), X_TORCH)


def test_outputs_that_cannot_be_compared():
    x, x_torch = rows(2, 4)

    class Model(nn.Module):
        several: bool

        @nn.compact
        def __call__(self, x):
            y = nn.Dense(3)(x)
            return (y, y) if self.several else y.T

    module = torch.nn.Linear(4, 3)
    with pytest.raises(ValueError, match="returns 1 and the Flax model 2"):
        interop.match(Model(several=True), x, module, x_torch, names={"": "Dense_0"}).verify()
    with pytest.raises(ValueError, match=r"\(2, 3\), and that of Flax \(3, 2\)"):
        interop.match(Model(several=False), x, module, x_torch, names={"": "Dense_0"}).verify()

    class Words(torch.nn.Linear):
        def forward(self, x):
            return "words"

    with pytest.raises(TypeError, match="returns str"):
        interop.match(Model(several=False), x, Words(4, 3), x_torch).verify()


def test_exchanged_models_are_an_error_of_match():
    model, module, x = nn.Dense(3), torch.nn.Linear(4, 3), np.ones((2, 4), np.float32)
    with pytest.raises(
        ValueError, match=r"^match: module should be a torch\.nn\.Module, but is Dense"
    ):
        interop.match(module, torch.from_numpy(x), model, x)
