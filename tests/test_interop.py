"""Tests that whole models are converted bit for bit, and continue training as before."""

import json
import re
import subprocess
import sys
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from cases import assert_same_bits
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxnorm.linen
import jaxnorm.nnx
from jaxnorm import interop

torch = pytest.importorskip("torch")

RNG = np.random.default_rng(0)


def bn(channels=3, dtype=np.float32, count=7):
    """Returns the state dict of a norm whose values all differ."""
    arrays = {
        "weight": RNG.standard_normal(channels).astype(dtype),
        "bias": RNG.standard_normal(channels).astype(dtype),
        "running_mean": RNG.standard_normal(channels).astype(dtype),
        "running_var": RNG.random(channels).astype(dtype),
    }
    return arrays | {"num_batches_tracked": np.asarray(count, np.int64)}


def under(module, arrays):
    return {f"{module}.{leaf}" if module else leaf: a for leaf, a in arrays.items()}


# ---- Names ----


def test_names_are_split_at_the_dots():
    variables = interop.from_torch(under("layer1.0.bn1", bn()) | {"fc.weight": np.ones((2, 3))})
    assert sorted(variables["params"]) == ["fc", "layer1"]
    assert sorted(variables["params"]["layer1"]["0"]["bn1"]) == ["bias", "scale"]
    assert sorted(variables["batch_stats"]["layer1"]["0"]["bn1"]) == ["count", "mean", "var"]
    assert variables["params"]["fc"]["weight"].shape == (2, 3)  # not of a norm, so unchanged


def test_each_leaf_is_converted_to_its_counterpart():
    arrays = bn()
    variables = interop.from_torch(under("n", arrays))
    params, stats = variables["params"]["n"], variables["batch_stats"]["n"]
    for found, name in (
        (params["scale"], "weight"),
        (params["bias"], "bias"),
        (stats["mean"], "running_mean"),
        (stats["var"], "running_var"),
    ):
        np.testing.assert_array_equal(found, arrays[name])
    assert (stats["count"], stats["count"].dtype) == (7, np.int32)


def test_a_norm_may_be_the_whole_model():
    variables = interop.from_torch(bn())
    assert sorted(variables["params"]) == ["bias", "scale"]
    assert sorted(interop.to_torch(variables)) == sorted(bn())


NAMES = {"layer1.0": "Block_0", "layer1.0.bn1": "Block_0.Norm_0", "stem": "Net.Stem"}


def test_the_longest_front_that_the_map_knows_is_replaced_either_way():
    arrays = (
        under("layer1.0.bn1", bn())
        | under("layer1.0.bn2", bn())
        | under("layer1.1.bn1", bn())
        | {"stem.weight": np.ones((2, 2)), "stem2.weight": np.ones((2, 2))}
    )
    variables = interop.from_torch(arrays, names=NAMES)
    assert sorted(variables["params"]) == ["Block_0", "Net", "layer1", "stem2"]
    assert sorted(variables["params"]["Block_0"]) == ["Norm_0", "bn2"]
    assert list(variables["params"]["layer1"]) == ["1"]
    assert list(variables["params"]["Net"]) == ["Stem"]
    assert_same_bits(interop.to_torch(variables, names=NAMES), arrays)


def test_a_map_that_calls_two_modules_the_same_is_an_error():
    names = {"a": "x", "b": "x"}
    for convert in (interop.from_torch, interop.to_torch):
        with pytest.raises(
            ValueError, match=r"names should give each .* \['x'\] stand for several"
        ):
            convert({}, names=names)


def test_two_arrays_of_one_name_are_an_error():
    arrays = under("a", bn()) | {"b.weight": np.ones((2, 2))}
    with pytest.raises(ValueError, match=r"'a\.scale' should be one array, but 'b\.weight' and"):
        interop.from_torch(arrays, convert=lambda name, a: ("a.scale", a))
    with pytest.raises(ValueError, match=r"'a\.scale\.x' should be inside 'scale', but that is an"):
        interop.from_torch(arrays, convert=lambda name, a: ("a.scale.x", a))
    with pytest.raises(ValueError, match="'a' should be one array or module, but is two"):
        interop.from_torch(arrays, convert=lambda name, a: ("a", a))
    variables = interop.from_torch(arrays)
    with pytest.raises(ValueError, match=r"to_torch: 'a\.weight' should be one array, but is two"):
        interop.to_torch(variables, convert=lambda name, a: ("a.weight", a))


# ---- Recognizing norms ----


def test_a_norm_has_a_running_mean_or_a_weight_of_one_axis():
    arrays = {
        "layer.weight": np.ones(3),
        "untracked.weight": np.ones(3),
        "untracked.bias": np.ones(3),
        "plain.running_mean": np.zeros(3),
        "plain.running_var": np.ones(3),
        "plain.num_batches_tracked": np.int64(2),
        "linear.weight": np.ones((3, 3)),
        "linear.bias": np.ones(3),
    }
    params = interop.from_torch(arrays)["params"]
    assert params["layer"].keys() == {"scale"}
    assert params["untracked"].keys() == {"scale", "bias"}
    assert params["linear"].keys() == {"weight", "bias"}
    assert "plain" not in params


def test_norms_names_those_that_are_and_no_others():
    arrays = {
        "layer.weight": np.ones((2, 3)),
        "layer.bias": np.ones((2, 3)),
        "prelu.weight": np.ones(1),
    }
    params = interop.from_torch(arrays, norms=["layer"])["params"]
    assert params["layer"].keys() == {"scale", "bias"}
    assert params["prelu"].keys() == {"weight"}
    with pytest.raises(ValueError, match=r"it has no \['x'\]; it has \['layer', 'prelu'\]"):
        interop.from_torch(arrays, norms=["layer", "x"])


def test_convert_serves_what_is_no_norm_s():
    arrays = under("bn", bn()) | {"conv.weight": RNG.random((2, 3, 5, 5)), "step": np.ones(())}

    def convert(name, a):
        return ("conv.kernel", a.transpose(2, 3, 1, 0)) if name == "conv.weight" else None

    def back(name, a):
        return "conv.weight", a.transpose(3, 2, 0, 1)

    variables = interop.from_torch(arrays, convert=convert)
    assert variables["params"].keys() == {"bn", "conv"}
    del arrays["step"]
    assert_same_bits(interop.to_torch(variables, convert=back), arrays)
    assert interop.to_torch(variables, convert=back)["conv.weight"].flags["C_CONTIGUOUS"]


# ---- Rules and errors ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"running_var": None}, "'n.running_var' should be there, because 'n.running_mean' is"),
        ({"running_mean": None}, "'n.running_mean' should be there, because 'n.running_var' is"),
        (
            {"bias": np.ones(4)},
            r"'n.bias' should have shape \(3,\), as 'n.weight' has, but .* \(4,\)",
        ),
        ({"running_var": np.ones((3, 1))}, r"'n.running_var' should have shape \(3,\), as 'n.weig"),
        (
            {"running_mean": np.ones(3, int)},
            "'n.running_mean' should have a float dtype, .* but has i",
        ),
        ({"num_batches_tracked": np.ones(3, int)}, r"should be one whole number, .* int64\[3\]"),
        ({"num_batches_tracked": np.float32(3)}, r"should be one whole number, .* float32\[\] 3.0"),
        ({"num_batches_tracked": np.int64(-1)}, r"should be one whole number, .* int64\[\] -1"),
    ],
)
def test_an_incomplete_norm_is_an_error_that_names_the_key(change, message):
    arrays = {k: a for k, a in (bn() | change).items() if a is not None}
    with pytest.raises(ValueError, match=f"from_torch: .*{message}"):
        interop.from_torch(under("n", arrays))


def test_a_missing_count_is_0_with_a_warning_or_what_is_said():
    arrays = {k: a for k, a in bn().items() if k != "num_batches_tracked"}
    with pytest.warns(
        UserWarning, match=r"num_batches_tracked of \['n'\] is missing .* momentum=None"
    ):
        assert interop.from_torch(under("n", arrays))["batch_stats"]["n"]["count"] == 0
    for count in (0, 500):
        state = interop.from_torch(under("n", arrays), count=count)["batch_stats"]["n"]
        assert (state["count"], state["count"].dtype) == (count, np.int32)
    # With momentum=None, the next batch has weight 1 / 501, so the loaded statistics remain.
    _, new = jaxnorm.batch_norm(jnp.ones((2, 3)), None, state, momentum=None)
    np.testing.assert_allclose(new["var"], arrays["running_var"], rtol=3e-3)


def test_a_count_beyond_int32_becomes_the_largest_with_a_warning():
    with pytest.warns(UserWarning, match=r"'n\.num_batches_tracked' is 2147483648, and becomes"):
        state = interop.from_torch(under("n", bn(count=2**31)))["batch_stats"]["n"]
    assert state["count"] == 2**31 - 1
    assert interop.from_torch(bn(count=2**31 - 1))["batch_stats"]["count"] == 2**31 - 1


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_statistics_widen_and_go_back_bit_for_bit(dtype):
    arrays = under("n", bn(dtype=dtype))
    variables = interop.from_torch(arrays)
    assert variables["batch_stats"]["n"]["mean"].dtype == np.float32
    assert variables["params"]["n"]["scale"].dtype == dtype
    assert interop.to_torch(variables)["n.running_var"].dtype == np.float32
    assert_same_bits(interop.to_torch(variables, like=arrays), arrays)


def test_running_statistics_are_left_out_or_begun():
    tracked = under("n", bn())
    variables = interop.from_torch(tracked, track_running_stats=False)
    assert variables["batch_stats"] == {}
    untracked = interop.to_torch(variables)
    assert untracked.keys() == {"n.weight", "n.bias"}
    begun = interop.from_torch(untracked, track_running_stats=True)["batch_stats"]["n"]
    jax.tree.map(np.testing.assert_array_equal, begun, dict(jaxnorm.init_batch_stats(3)))
    assert interop.to_torch(variables, track_running_stats=True).keys() == tracked.keys()
    whole = interop.from_torch(tracked)
    assert interop.to_torch(whole, track_running_stats=False).keys() == untracked.keys()
    assert_same_bits(
        interop.to_torch(interop.from_torch(tracked, track_running_stats=True)), tracked
    )


def test_a_state_that_lacks_a_part_does_not_go_out():
    with pytest.raises(ValueError, match=r"batch_stats of 'n' should have .* but has \['mean'\]"):
        interop.to_torch({"batch_stats": {"n": {"mean": np.ones(2)}}})


def test_what_accumulates_stays_behind():
    arrays = under("n", bn())
    variables = interop.from_torch(arrays)
    variables["batch_stats"] = jaxnorm.begin_accumulation(variables["batch_stats"])
    assert_same_bits(interop.to_torch(variables), arrays)


def test_a_statistic_that_pytorch_does_not_have_is_an_error_that_names_it():
    stats = interop.from_torch(under("n", bn()))["batch_stats"] | {"s": {"sigma": np.ones(3)}}
    with pytest.raises(ValueError, match=r"to_torch: batch_stats .* but contains \['s\.sigma'\]"):
        interop.to_torch({"params": {}, "batch_stats": stats})


def test_converted_variables_are_compared_with_the_new_model():
    layer = jaxnorm.linen.BatchNorm(use_running_average=True)
    like = jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((1, 3)))
    assert interop.from_torch(bn(), like=like)["params"].keys() == {"scale", "bias"}
    with pytest.raises(ValueError, match="from_torch: the result should") as error:
        interop.from_torch(under("n", bn(4)) | bn(5), like=like)
    for line in (
        r"'params\.n\.scale' \(from 'n\.weight'\) is not expected",
        r"'params\.scale' \(from 'weight'\) should have shape \(3,\), but has \(5,\)",
    ):
        assert re.search(line, str(error.value))
    with pytest.raises(ValueError, match=r"'batch_stats\.mean' is missing"):
        interop.from_torch(bn(), like=like, track_running_stats=False)


def test_the_state_dict_is_compared_with_the_pytorch_model():
    variables = interop.from_torch(bn())
    with pytest.raises(ValueError, match="to_torch: the result should") as error:
        interop.to_torch(variables, like=bn(4) | {"x": np.ones(1)})
    assert "'x' is missing" in str(error.value)
    assert "'weight' should have shape (4,), but has (3,)" in str(error.value)


def test_what_is_no_array_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"'n\.weight' should be an array .* tensor\.cpu\(\)"):
        interop.from_torch({"n.weight": OnAnotherDevice()})


class OnAnotherDevice:
    def __array__(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")


def test_torch_s_own_tensors_are_read_bfloat16_and_parameters_too():
    module = torch.nn.BatchNorm1d(3).to(torch.bfloat16)
    given = dict(module.named_parameters()) | dict(module.named_buffers())
    variables = interop.from_torch(given)
    assert variables["params"]["scale"].dtype == ml_dtypes.bfloat16


def test_interop_imports_no_other_framework():
    code = (
        "import jaxnorm.interop, sys; "
        "print([m for m in ('torch', 'flax', 'haiku', 'safetensors') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "[]\n"


# ---- Random round trips ----

names = st.from_regex(r"[a-z0-9_]{1,4}", fullmatch=True)
paths = st.lists(names, min_size=1, max_size=3).map(".".join)
FLOATS = (np.float16, np.float32, np.float64, ml_dtypes.bfloat16)


@st.composite
def state_dicts(draw):
    """Draws norms and other arrays with random names, shapes, dtypes, flags and bits."""
    modules = draw(st.lists(paths, min_size=1, max_size=4, unique=True))
    modules = [
        m for m in modules if not any(o != m and f"{o}.".startswith(f"{m}.") for o in modules)
    ]
    arrays = {}
    for module in modules:
        bits = np.random.default_rng(draw(st.integers(0, 2**32)))
        shape = (draw(st.integers(0, 4)),)

        def leaf(dtype, shape, bits=bits):
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            return np.frombuffer(bits.bytes(size), dtype).reshape(shape)

        dtype = draw(st.sampled_from(FLOATS))
        affine, tracked = draw(st.booleans()), draw(st.booleans())
        if not affine and not tracked:
            arrays[f"{module}.weight"] = leaf(dtype, draw(st.sampled_from([(2, 3), (1, 2, 2)])))
            continue
        if affine:
            arrays[f"{module}.weight"] = leaf(dtype, shape)
            if draw(st.booleans()):
                arrays[f"{module}.bias"] = leaf(dtype, shape)
        if tracked:
            wide = draw(st.sampled_from([np.float32, np.float64]))
            arrays[f"{module}.running_mean"] = leaf(wide, shape)
            arrays[f"{module}.running_var"] = leaf(wide, shape)
            count = draw(st.integers(0, 2**31 - 1))
            arrays[f"{module}.num_batches_tracked"] = np.asarray(count, np.int64)
    return arrays


@given(state_dicts())
@settings(deadline=None, max_examples=200)  # times vary, and the first call imports
def test_a_round_trip_is_bit_for_bit(arrays):
    variables = interop.from_torch(arrays)
    back = interop.to_torch(variables)
    assert_same_bits({k: back[k] for k in arrays}, arrays)
    assert back.keys() == arrays.keys()
    again = interop.to_torch(interop.from_nnx(interop.to_nnx(variables)))
    assert_same_bits({k: again[k] for k in arrays}, arrays)


@given(state_dicts())
@settings(deadline=None, max_examples=50)
def test_a_round_trip_through_a_file_is_bit_for_bit(tmp_path_factory, arrays):
    path = tmp_path_factory.mktemp("files") / "model.safetensors"
    interop.to_torch(interop.from_torch(arrays), file=path)
    assert_same_bits(interop.to_torch(interop.from_torch(path), like=arrays), arrays)


# ---- PyTorch loads the result, and continues equally ----


def torch_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(4, 5),
        torch.nn.BatchNorm1d(5),
        torch.nn.Tanh(),
        torch.nn.Unflatten(1, (5, 1)),
        torch.nn.Upsample(size=3),
        torch.nn.InstanceNorm1d(5, affine=True, track_running_stats=True),
        torch.nn.Flatten(),
        torch.nn.Linear(15, 1),
    ).double()


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(5, param_dtype=jnp.float64, name="0")(x)
        options = {"use_running_average": False, "param_dtype": jnp.float64}
        x = jnp.tanh(jaxnorm.linen.BatchNorm(name="1", **options)(x))
        x = jnp.repeat(x[:, None], 3, axis=1)
        norm = jaxnorm.linen.InstanceNorm(
            epsilon=1e-5, track_running_stats=True, name="5", **options
        )
        x = jnp.moveaxis(norm(x), 1, 2).reshape(len(x), -1)
        return nn.Dense(1, param_dtype=jnp.float64, name="7")(x)


def kernels(name, a):
    return (name.replace("weight", "kernel"), a.T) if name.endswith("weight") else (name, a)


def weights(name, a):
    return (name.replace("kernel", "weight"), a.T) if name.endswith("kernel") else (name, a)


@pytest.mark.slow
def test_pytorch_and_jaxnorm_go_on_alike_for_20_steps_and_back_again(x64):
    module, model = torch_model(), Model()
    xs = np.random.default_rng(1).normal(3, 2, (20, 8, 4))
    for x in xs[:3]:
        module(torch.from_numpy(x))
    shapes = jax.eval_shape(model.init, jax.random.key(0), xs[0])
    variables = interop.from_torch(module.state_dict(), convert=kernels, like=shapes)
    again = torch_model()
    with torch.no_grad():
        for p in again.parameters():
            p.zero_()
    given = interop.to_torch(variables, convert=weights, like=module.state_dict())
    again.load_state_dict({k: torch.from_numpy(v) for k, v in given.items()}, strict=True)

    @jax.jit
    def step(variables, x):
        def loss(params):
            variables_ = {**variables, "params": params}
            y, updates = model.apply(variables_, x, mutable=["batch_stats"])
            return jnp.mean((y - x[:, :1]) ** 2), updates

        grads, updates = jax.grad(loss, has_aux=True)(variables["params"])
        params = jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], grads)
        return {"params": params, **updates}

    optimizer = torch.optim.SGD(again.parameters(), lr=0.1)
    for x in xs:
        x_torch = torch.from_numpy(x)
        optimizer.zero_grad()
        torch.mean((again(x_torch) - x_torch[:, :1]) ** 2).backward()
        optimizer.step()
        variables = step(variables, x)
    state_dict = interop.to_torch(variables, convert=weights)
    for key, expected in again.state_dict().items():
        if key == "5.num_batches_tracked":  # PyTorch never updates it
            assert (state_dict[key], expected) == (20, 0)
        else:  # float64 rounding through 20 steps
            np.testing.assert_allclose(state_dict[key], expected.numpy(), rtol=1e-9, atol=1e-11)


# ---- NNX, Flax, Haiku ----


def test_an_nnx_model_accepts_the_converted_tree():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.norms = nnx.List([jaxnorm.nnx.BatchNorm(3, rngs=rngs) for _ in range(2)])

    model = Net(nnx.Rngs(0))
    arrays = under("norms.0", bn()) | under("norms.1", bn())
    state = nnx.state(model)
    nnx.replace_by_pure_dict(state, interop.to_nnx(interop.from_torch(arrays)))
    nnx.update(model, state)
    np.testing.assert_array_equal(model.norms[1].var[...], arrays["norms.1.running_var"])
    jaxnorm.nnx.begin_accumulation(model)
    tree = nnx.to_pure_dict(nnx.state(model))
    assert_same_bits(interop.to_torch(interop.from_nnx(tree)), arrays)
    with pytest.raises(ValueError, match=r"\['n\.mean'\] should be in one collection"):
        interop.to_nnx({"params": {"n": {"mean": 1}}, "batch_stats": {"n": {"mean": 1}}})


def test_a_flax_checkpoint_is_converted_in_both_directions():
    x = RNG.normal(10, 5, (8, 3)).astype(np.float32)
    flax_layer = nn.BatchNorm(use_running_average=False, momentum=0.9)
    variables = flax_layer.init(jax.random.key(0), x)
    fresh = interop.from_flax(variables)  # an initial state, whose count of 0 is right
    assert fresh["batch_stats"]["count"] == 0
    variables = {**variables, **flax_layer.apply(variables, x, mutable=["batch_stats"])[1]}
    with pytest.warns(UserWarning, match="have no count, and get 0; with momentum=None"):
        interop.from_flax({"batch_stats": {"bn": variables["batch_stats"]}})
    converted = interop.from_flax(variables, count=1)
    layer = jaxnorm.linen.BatchNorm(use_running_average=True)
    expected = flax_layer.clone(use_running_average=True).apply(variables, x)
    # Flax first multiplies scale by 1 / std, which rounds differently in float32.
    np.testing.assert_allclose(layer.apply(converted, x), expected, rtol=1e-6, atol=1e-6)
    back = interop.to_flax(converted)
    jax.tree.map(np.testing.assert_array_equal, back, variables)
    counted = interop.from_flax(converted)
    assert counted["batch_stats"]["count"] == 1  # kept, without a warning


def test_layers_under_nn_scan_get_a_count_each():
    stacked = {"mean": np.ones((4, 3)), "var": np.ones((4, 3))}
    variables = interop.from_flax({"batch_stats": {"bn": stacked}}, count=np.full(4, 9))
    assert variables["batch_stats"]["bn"]["count"].shape == (4,)
    assert jaxnorm.check_batch_stats(variables) == []


@pytest.mark.parametrize("convert", [interop.from_flax, interop.to_flax])
def test_a_flax_model_without_running_statistics_is_an_error(convert):
    with pytest.raises(
        ValueError,
        match=rf"{convert.__name__}: variables should have .* but is \['params'\]; write",
    ):
        convert({"params": {}})


def test_haiku_s_averages_become_the_statistics():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Haiku warns when it is imported
        import haiku as hk

    def net(x, is_training):
        x = hk.Linear(3)(x)
        x = hk.BatchNorm(True, True, decay_rate=0.9)(x, is_training)
        return hk.LayerNorm(-1, True, True)(x)

    model = hk.without_apply_rng(hk.transform_with_state(net))
    x = jnp.asarray(RNG.normal(10, 5, (8, 4)), jnp.float32)
    params, state = model.init(jax.random.key(0), x, True)
    params["batch_norm"]["scale"] = jnp.array([[1.0, 2.0, 3.0]])
    for k in range(3):
        _, state = model.apply(params, state, x + k, True)
    variables = interop.from_haiku(params, state, names={"linear": "dense"})
    assert variables["params"].keys() == {"dense", "batch_norm", "layer_norm"}
    assert variables["params"]["dense"].keys() == {"w", "b"}
    assert variables["batch_stats"]["batch_norm"]["count"] == 3
    expected, _ = model.apply(params, state, x, False)
    h = x @ params["linear"]["w"] + params["linear"]["b"]
    norm, stats = variables["params"]["batch_norm"], variables["batch_stats"]["batch_norm"]
    y, _ = jaxnorm.batch_norm(h, norm, stats, use_running_average=True)
    y = jaxnorm.layer_norm(y, variables["params"]["layer_norm"])
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)  # float32, with 1 / std


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            {"n/~/mean_ema": {"average": np.ones((1, 3)), "counter": 1}},
            "'n/~/var_ema' should be in",
        ),
        ({"n/~/mean_ema": {"average": np.ones((2, 3)), "counter": 1}}, r"one axis of .* \(2, 3\)"),
    ],
)
def test_incomplete_haiku_states_are_errors(state, message):
    with pytest.raises(ValueError, match=message):
        interop.from_haiku({}, state)


# ---- The command line ----


def convert(*arguments):
    command = [sys.executable, "-m", "jaxnorm.interop", "convert", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_file_is_converted_listed_and_converted_back(tmp_path):
    import safetensors.numpy

    arrays = under("layer1.0.bn1", bn()) | {"fc.weight": RNG.random((2, 3))}
    source, target, back = (tmp_path / f"{name}.safetensors" for name in ("in", "out", "back"))
    safetensors.numpy.save_file(arrays, source)
    names = tmp_path / "names.json"
    names.write_text(json.dumps({"layer1.0": "Block_0"}))
    shown = convert(source, target, "--names", names)
    assert shown.returncode == 0, shown.stderr
    rows = [line.split() for line in shown.stdout.splitlines()]
    assert ["layer1.0.bn1.weight", "params/Block_0/bn1/scale", "3", "float32"] in rows
    assert ["fc.weight", "params/fc/weight", "2x3", "float64"] in rows
    assert shown.stdout.splitlines()[-2] == "6 arrays, among them those of 1 norm(s)"
    assert "batch_stats/Block_0/bn1/count" in safetensors.numpy.load_file(target)
    assert convert(target, back, "--names", names).returncode == 0
    assert_same_bits(safetensors.numpy.load_file(back), arrays)


@pytest.mark.slow
def test_what_cannot_be_converted_is_said_in_a_line(tmp_path):
    import safetensors.numpy

    target = tmp_path / "out.safetensors"
    missing = convert(tmp_path / "none.safetensors", target)
    assert (missing.returncode, "Traceback" in missing.stderr) == (1, False)
    assert "none.safetensors" in missing.stderr
    source = tmp_path / "in.safetensors"
    source.write_bytes(b"no safetensors at all")
    broken = convert(source, target)
    assert "in.safetensors should be a .safetensors file" in broken.stderr
    arrays = bn()
    del arrays["num_batches_tracked"]
    safetensors.numpy.save_file(under("n", arrays), source)
    noted = convert(source, target)
    assert noted.returncode == 0
    assert "note: from_torch: num_batches_tracked of ['n'] is missing" in noted.stderr
    assert convert(source, target, "--force", "--count", "5").stderr == ""
    left_out = convert(source, target, "--force", "--no-running-stats")
    assert "left out" in left_out.stdout
    assert safetensors.numpy.load_file(target).keys() == {"params/n/scale", "params/n/bias"}
    del arrays["running_var"]
    safetensors.numpy.save_file(under("n", arrays), source)
    assert "'n.running_var' should be there" in convert(source, target, "--force").stderr
