"""Tests that no array of a model is lost, and that the name of each is restored."""

import warnings
from types import MappingProxyType

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from cases import assert_same_bits
from flax import nnx
from test_interop import bn, under

import jaxnorm
import jaxnorm.nnx
from jaxnorm import interop

torch = pytest.importorskip("torch")


class Affine(torch.nn.Module):
    """A module with a scale that is not a norm, as in timm's HGNetV2."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.full((1,), 2.0))
        self.bias = torch.nn.Parameter(torch.full((1,), 3.0))


# ---- Names that could belong to a norm ----


@pytest.mark.parametrize("said", ["like", "norms"])
def test_a_scale_that_is_no_norm_s_goes_back_under_its_name(said):
    model = torch.nn.Sequential(Affine(), torch.nn.BatchNorm1d(3))
    with pytest.warns(UserWarning, match=r"\['0\.scale'\] are named 'scale', .* norms= or like="):
        variables = interop.from_torch(model)
    assert variables["params"]["0"].keys() == {"scale", "bias"}
    given = {"like": model.state_dict()} if said == "like" else {"norms": ["1"]}
    expected = {name: value.numpy() for name, value in model.state_dict().items()}
    assert_same_bits(interop.to_torch(variables, **given), expected)
    assert "0.weight" in interop.to_torch(variables)  # without `norms` or `like`


def test_norms_must_fit_the_variables():
    variables = interop.from_torch(under("a", bn()) | {"b.weight": np.ones(3)})
    with pytest.raises(ValueError, match=r"running statistics, but lacks \['a'\]"):
        interop.to_torch(variables, norms=["b", "c"])
    with pytest.raises(ValueError, match=r"modules with a scale, but \['c'\] have none"):
        interop.to_torch(variables, norms=["a", "b", "c"])


def test_a_mean_that_is_no_state_s_stays_a_parameter_in_nnx():
    tree = {"noise": {"mean": np.ones(2), "scale": np.ones(2)}, "count": np.ones(2)}
    variables = interop.from_nnx(tree | {"bn": {"mean": np.ones(2), "var": np.ones(2)}})
    assert variables["params"] == tree
    assert variables["batch_stats"]["bn"].keys() == {"mean", "var"}


def test_random_streams_are_neither_params_nor_batch_stats():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.bn = jaxnorm.nnx.BatchNorm(3, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)

    state = nnx.state(Net(nnx.Rngs(0)))
    variables = interop.from_nnx(nnx.to_pure_dict(state))
    assert variables["params"].keys() == variables["batch_stats"].keys() == {"bn"}
    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), variables)
    interop.from_torch(under("bn", bn()), like=like)


# ---- Names that could not be restored ----


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"a.b": {"kernel": np.ones(2)}}, r"nor contain dots, .* \['a\.b', 'kernel'\]"),
        ({"": {"kernel": np.ones(2)}}, r"should not be empty .* \['', 'kernel'\]"),
        (
            MappingProxyType({0: np.ones(2), "0": np.ones(2)}),
            r"'0' should be one array, but is two",
        ),
    ],
)
def test_variables_whose_names_would_not_come_back_are_refused(params, message):
    with pytest.raises(ValueError, match=f"to_torch: .*{message}"):
        interop.to_torch({"params": params})


def test_names_with_empty_parts_are_refused():
    with pytest.raises(ValueError, match=r"\['a\.\.b', '\.c'\] have empty parts"):
        interop.from_torch({"a..b": np.ones((2, 2)), ".c": np.ones((2, 2)), "d": np.ones((2, 2))})


def test_a_slash_in_a_name_stays():
    arrays = under("a/b", bn()) | under("a.b", bn())
    assert_same_bits(interop.to_torch(interop.from_torch(arrays)), arrays)


@pytest.mark.parametrize("unknown", ["layer1.bn1", "layer1.0.bn1.weight", "layer2"])
def test_a_name_that_is_no_module_s_is_an_error_that_says_what_is_close(unknown):
    arrays = under("layer1.0.bn1", bn())
    with pytest.raises(ValueError, match=r"from_torch: .* has no .*did you mean 'layer1"):
        interop.from_torch(arrays, names={unknown: "x"})
    with pytest.raises(ValueError, match=r"to_torch: .* of the variables .*did you mean 'layer1"):
        interop.to_torch(interop.from_torch(arrays), names={"x": unknown})


def test_the_empty_name_is_the_whole_model():
    arrays = under("bn", bn())
    variables = interop.from_torch(arrays, names={"": "backbone"})
    assert variables["params"]["backbone"]["bn"].keys() == {"scale", "bias"}
    assert_same_bits(interop.to_torch(variables, names={"": "backbone"}), arrays)


# ---- Counts ----


def test_norms_without_a_count_come_with_one_warning_and_go_back():
    frozen = {
        name: {k: a for k, a in bn().items() if k != "num_batches_tracked"} for name in ("a", "b")
    }
    arrays = under("a", frozen["a"]) | under("b", frozen["b"])
    with pytest.warns(UserWarning, match=r"of \['a', 'b'\] is missing") as caught:
        variables = interop.from_torch(arrays)
    assert len(caught) == 1
    assert_same_bits(interop.to_torch(variables, like=arrays), arrays)


@pytest.mark.parametrize("count", [3.7, np.float32(np.nan), -1])
def test_a_count_that_is_no_whole_number_does_not_go_out(count):
    variables = interop.from_torch(bn())
    variables["batch_stats"]["count"] = np.asarray(count)
    with pytest.raises(ValueError, match="count of '' should be a whole number, not negative"):
        interop.to_torch(variables)


@pytest.mark.parametrize("count", [3.7, -5, True, 2**31, "7"])
def test_a_count_that_is_given_is_a_whole_number(count):
    with pytest.raises(ValueError, match="from_torch: count should be an int from 0 to 2147483647"):
        interop.from_torch(bn(), count=count)


def test_a_count_in_float_that_is_a_whole_number_goes_out():
    variables = interop.from_torch(bn(count=7))
    variables["batch_stats"]["count"] = jnp.float32(7)
    assert interop.to_torch(variables)["num_batches_tracked"] == 7


def test_pytorch_s_instance_norm_counts_nothing_and_is_no_finding():
    model = torch.nn.InstanceNorm1d(3, affine=True, track_running_stats=True)
    model(torch.randn(2, 3, 5))
    assert jaxnorm.check_batch_stats(interop.from_torch(model)) == []


# ---- PyTorch's modules and tensors ----


def test_a_module_is_taken_for_its_state_dict_and_copied():
    model = torch.nn.BatchNorm1d(3)
    variables = interop.from_torch(model)
    with torch.no_grad():
        for a in (*model.parameters(), model.running_mean):
            a += 1
    np.testing.assert_array_equal(variables["params"]["scale"], np.ones(3))
    np.testing.assert_array_equal(variables["params"]["bias"], np.zeros(3))
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], np.zeros(3))


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_dtypes_that_numpy_lacks_come_and_go(name):
    dtype = getattr(torch, name)
    given = {"fc.weight": torch.tensor([[1.5, -2.0], [0.25, 448.0]]).to(dtype)}
    arrays = interop.to_torch(interop.from_torch(given))
    assert arrays["fc.weight"].dtype == getattr(ml_dtypes, name)
    back = interop.tensors(arrays)["fc.weight"]
    assert back.dtype == dtype
    assert torch.equal(back.float(), given["fc.weight"].float())


def test_tensors_load_into_a_module():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state_dict = interop.tensors(interop.to_torch(interop.from_torch(model)))
        model.load_state_dict(state_dict, strict=True)
