"""Compares the models of the examples with the same models in PyTorch, in evaluation.

The maps of names in this file are written by hand, and compared with those of `interop.match`.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import channels_first
from flax import nnx

from jaxnorm import interop

torch = pytest.importorskip("torch")
torch_models = pytest.importorskip("torch_models")
pytestmark = pytest.mark.usefixtures("torch_seed")

EXAMPLES = Path(__file__).parents[1] / "examples"
MOST = 1e-5  # relative to the largest output


@pytest.fixture(scope="module", autouse=True)
def _examples():
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))


def photographs(number, size):
    """Returns noise about a mean that is not 0, as in photographs."""
    x = np.random.default_rng(0).normal(0.5, 1, (number, size, size, 3))
    return x.astype(np.float32)


def difference(found, expected):
    """Returns the largest difference, relative to the largest output."""
    found, expected = np.asarray(found), expected.detach().numpy()
    assert found.dtype == expected.dtype == np.float32
    assert found.shape == expected.shape
    return np.abs(found - expected).max() / np.abs(expected).max()


def assert_matched(names, *models, **options):
    """Checks that the order of the calls gives the map, and that the outputs agree with it."""
    proposal = interop.match(*models, **options, allow_order=True)
    assert not proposal.only_torch
    assert not proposal.only_flax
    assert proposal.names == names
    assert not any(pair.note for pair in proposal.pairs)
    assert proposal.verify(tolerance=MOST) < MOST


# ---- ResNets ----


def a_resnet(block, blocks, **options):
    """Returns the largest difference of a ResNet, whose names are PyTorch's."""
    import resnet

    x = photographs(4, 64)
    module = torch_models.moved(
        torch_models.ResNet(getattr(torch_models, block), blocks, **options), channels_first(x)
    )
    model = resnet.ResNet(getattr(resnet, block), blocks, **options)
    variables = resnet.from_pytorch(module.state_dict(), model)
    assert resnet.model_of(variables) == model
    by_class = interop.from_torch(module.state_dict(), convert=interop.kernels_of(module))
    jax.tree.map(np.testing.assert_array_equal, by_class, variables)
    assert_matched({}, model, x, module, channels_first(x), kwargs={"train": False})
    y = jax.jit(lambda x: model.apply(variables, x, train=False))(x)
    return difference(y, module(channels_first(x)))


@pytest.mark.parametrize("block", ["BasicBlock", "Bottleneck"])
def test_a_small_resnet(block):
    assert a_resnet(block, (1, 2, 1, 1), classes=10, features=8) < MOST


@pytest.mark.slow
@pytest.mark.parametrize(
    ("block", "blocks"), [("BasicBlock", (2, 2, 2, 2)), ("Bottleneck", (3, 4, 6, 3))]
)
def test_a_resnet(block, blocks):
    assert a_resnet(block, blocks) < MOST


def test_the_resnet_of_a_file_is_found(tmp_path, capsys):
    import resnet

    module = torch_models.ResNet(torch_models.Bottleneck, (1, 1, 2, 1), classes=7, features=4)
    path = tmp_path / "resnet.pth"
    torch.save(module.state_dict(), path)
    resnet.main([str(path)])
    assert "the five likeliest of 7 classes" in capsys.readouterr().out
    module.layer2[0].conv2 = torch.nn.Conv2d(8, 8, 5)
    torch.save(module.state_dict(), path)
    with pytest.raises(SystemExit, match=r"(?s)resnet\.py: .*layer2\.0\.conv2"):
        resnet.main([str(path)])
    torch.save(torch.nn.Linear(2, 3).state_dict(), path)
    with pytest.raises(SystemExit, match=r"resnet\.py: .*names of a ResNet.*'layer1'"):
        resnet.main([str(path)])


# ---- StarGAN's generator, in NNX ----


def a_generator(features, labels, blocks):
    import stargan_nnx

    x = photographs(2, 64)
    label = np.eye(labels, dtype=np.float32)[:2]
    given = channels_first(x), torch.from_numpy(label)
    module = torch_models.moved(torch_models.Generator(features, labels, blocks), *given)
    model = stargan_nnx.Generator(features, labels, blocks, rngs=nnx.Rngs(0))
    stargan_nnx.load(model, module.state_dict())
    names = stargan_nnx.module_names(blocks)
    by_class = interop.from_torch(
        module.state_dict(), names=names, convert=interop.kernels_of(module, names=names)
    )
    held = interop.from_nnx(nnx.to_pure_dict(nnx.state(model)))
    jax.tree.map(np.testing.assert_array_equal, by_class, jax.tree.map(np.asarray, held))
    assert_matched(names, model, (x, label), module, given)
    model.eval()
    y = nnx.jit(stargan_nnx.Generator.__call__)(model, x, label)
    return difference(jnp.moveaxis(y, -1, 1), module(*given))


def test_a_small_generator():
    assert a_generator(features=8, labels=3, blocks=2) < MOST


@pytest.mark.slow
def test_the_generator():
    assert a_generator(features=64, labels=5, blocks=6) < MOST


def test_the_generator_draws_each_label(tmp_path, capsys):
    import stargan_nnx

    weights, picture = tmp_path / "G.ckpt", tmp_path / "picture.png"
    torch.save(torch_models.Generator(2, 3, 1).state_dict(), weights)
    options = ["--features", "2", "--labels", "3", "--out", str(picture)]
    stargan_nnx.main([str(weights), *options, "--blocks", "1"])
    assert picture.stat().st_size > 10_000
    assert str(picture) in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"stargan_nnx\.py: .*names.*main\.10"):
        stargan_nnx.main([str(weights), *options, "--blocks", "2"])


# ---- GPT-2 ----


GPT2_NAMES = {"transformer.wte": "token_embedding", "transformer.wpe": "position_embedding"}
GPT2_NAMES |= {"transformer.ln_f": "norm"}
GPT2_INSIDE = {
    "ln_1": "norm_0",
    "attn.c_attn": "attention_in",
    "attn.c_proj": "attention_out",
    "ln_2": "norm_1",
    "mlp.c_fc": "mlp_in",
    "mlp.c_proj": "mlp_out",
}
SMALL = {"layers": 2, "heads": 4, "width": 32, "vocabulary": 50, "positions": 20}


def a_gpt2(**sizes):
    import gpt2

    model = gpt2.GPT2(**sizes)
    ids = np.random.default_rng(0).integers(model.vocabulary, size=(2, 16), dtype=np.int32)
    module = torch_models.moved(torch_models.GPT2(**sizes), torch.from_numpy(ids))
    variables = gpt2.from_pytorch(module.state_dict())
    assert gpt2.model_of(variables, model.heads) == model
    names = GPT2_NAMES | {
        f"transformer.h.{k}.{torch_name}": f"block_{k}.{name}"
        for k in range(model.layers)
        for torch_name, name in GPT2_INSIDE.items()
    }
    by_class = interop.from_torch(
        module.state_dict(),
        names=names,
        convert=interop.kernels_of(module, names=names, kinds={"lm_head": None}),
        like=jax.eval_shape(lambda: model.init(jax.random.key(0), ids)),
    )
    jax.tree.map(np.testing.assert_array_equal, by_class, variables)
    ids_torch = torch.from_numpy(ids)
    assert_matched(names, model, ids, module, ids_torch, kinds={"lm_head": None})
    return difference(jax.jit(model.apply)(variables, ids), module(ids_torch))


def test_a_small_gpt2():
    assert a_gpt2(**SMALL) < MOST


@pytest.mark.slow
def test_gpt2():
    assert a_gpt2() < MOST


def test_gpt2_says_what_follows(tmp_path, capsys):
    """Checks published files: of a GPT2LMHeadModel, and of a GPT2Model with its masks."""
    import gpt2

    ids = torch.tensor([[3, 1, 4, 1, 5]])
    module = torch_models.moved(torch_models.GPT2(**SMALL), ids)
    expected = module(ids)[0, -1].softmax(0)
    best = int(expected.argmax())
    masks = {f"h.{k}.attn.bias": torch.ones(1, 1, 20, 20) for k in range(2)}
    path, given = tmp_path / "model.bin", ["3", "1", "4", "1", "5", "--heads", "4"]
    for state_dict in (module.state_dict(), module.transformer.state_dict() | masks):
        torch.save(state_dict, path)
        read, held = gpt2.from_pytorch(path), gpt2.from_pytorch(module.state_dict())
        jax.tree.map(np.testing.assert_array_equal, read, held)
        gpt2.main([str(path), *given])
        out = capsys.readouterr().out
        assert out.splitlines()[1].split() == [str(best), f"{expected[best]:.1%}"]
    for wrong, match in (
        (["50", "--heads", "4"], r"ids should be those of 50 tokens"),
        (["1", "--heads", "5"], r"heads should divide the width, 32"),
        (["1"], r"heads should divide the width, 32"),  # fewer than 64 channels
        (["1"] * 21 + ["--heads", "4"], r"at most 20 tokens"),
    ):
        with pytest.raises(SystemExit, match=rf"gpt2\.py: .*{match}"):
            gpt2.main([str(path), *wrong])
