"""Tests that the models of the examples agree with those of torchvision and transformers."""

import sys
from pathlib import Path

import jax
import models
import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
MOST = 1e-5  # the largest error, relative to the largest output


@pytest.fixture(scope="module", autouse=True)
def _folders():
    folders = [str(ROOT / "examples"), str(ROOT / "tests")]
    sys.path[:0] = folders
    yield
    for folder in folders:
        sys.path.remove(folder)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def difference(found, expected):
    """Returns the largest difference, relative to the largest output."""
    found, expected = np.asarray(found), expected.detach().numpy()
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    return np.abs(found - expected).max() / np.abs(expected).max()


def a_resnet(name, dtype):
    """Returns the largest difference of a ResNet, with arrays and images of the dtype."""
    import resnet
    import torch_models

    x = np.random.default_rng(0).normal(0.5, 1, (4, 64, 64, 3)).astype(dtype)
    x_torch = torch.from_numpy(np.moveaxis(x, -1, 1).copy())
    torch_model = dict(models.zoo())[f"torchvision {name}"]().to(x_torch.dtype)
    torch_model = torch_models.moved(torch_model, x_torch)
    variables = resnet.from_pytorch(torch_model.state_dict())
    model = resnet.model_of(variables)
    resnet.from_pytorch(torch_model.state_dict(), model)  # this also checks the shapes
    y = jax.jit(lambda x: model.apply(variables, x, train=False))(x)
    return difference(y, torch_model(x_torch))


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
def test_a_resnet_of_torchvision_in_float64(name):
    """Compares in float64, because PyTorch's ResNet-152 in float32 has an error of 2e-5 itself."""
    with jax.enable_x64(True):
        assert a_resnet(name, np.float64) < 1e-12


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_resnet_of_torchvision(name):
    assert a_resnet(name, np.float32) < MOST


@pytest.mark.parametrize("head", [True, False])
def test_a_gpt2_of_transformers(head, tmp_path):
    import gpt2
    import torch_models
    import transformers

    sizes = {"n_layer": 3, "n_head": 4, "n_embd": 64, "vocab_size": 100, "n_positions": 32}
    sizes["initializer_range"] = 0.2  # large enough that the activation is not almost linear
    ids = np.random.default_rng(0).integers(100, size=(2, 16), dtype=np.int32)
    torch_model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    ids_torch = torch.from_numpy(ids).long()
    torch_model = torch_models.moved(torch_model, ids_torch)
    (torch_model if head else torch_model.transformer).save_pretrained(tmp_path)
    variables = gpt2.from_pytorch(tmp_path / "model.safetensors")
    y = jax.jit(gpt2.model_of(variables, heads=4).apply)(variables, ids)
    assert difference(y, torch_model(ids_torch).logits) < MOST
