"""Tests that models go from PyTorch to Flax to onnxruntime with the same outputs."""

import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import jaxnorm.onnx

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def models():
    """Returns the examples, and the PyTorch models of the main tests."""
    folders = [str(ROOT / "examples"), str(ROOT / "tests")]
    sys.path[:0] = folders
    try:
        import resnet
        import stargan
        import torch_models

        yield resnet, stargan, torch_models
    finally:
        for folder in folders:
            sys.path.remove(folder)


def run(exported, *arrays):
    onnx.checker.check_model(exported, full_check=True)
    session = onnxruntime.InferenceSession(exported.SerializeToString())
    names = [given.name for given in session.get_inputs()]
    return session.run(None, dict(zip(names, arrays, strict=True)))[0]


def assert_agree(found, expected):
    """Compares within 1e-4 of the largest value: float32 through twenty convolutions and norms."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def channels_first(x):
    return torch.from_numpy(np.moveaxis(x, -1, 1).copy())


def operators(exported):
    return [node.op_type for node in exported.graph.node]


def initializers(exported):
    return [onnx.numpy_helper.to_array(a) for a in exported.graph.initializer]


def test_the_generator_takes_its_running_statistics_along(models):
    _, stargan, torch_models = models
    torch.manual_seed(0)
    torch_model = torch_models.Generator(features=16)
    images = stargan.photographs()[:3]
    labels = np.eye(5, dtype=np.float32)[:3]
    given = channels_first(images), torch.from_numpy(labels)
    with torch.no_grad():
        for _ in range(3):
            torch_model(*given)
        expected = np.moveaxis(torch_model.eval()(*given).numpy(), 1, -1)
    variables = stargan.from_pytorch(torch_model.state_dict())
    model = stargan.Generator(features=16)

    def evaluate(x, labels):
        return model.apply(variables, x, labels, use_running_average=True)

    exported = jaxnorm.onnx.to_onnx(evaluate, [("B", 128, 128, 3), ("B", 5)])
    norms = len([key for key in torch_model.state_dict() if key.endswith("running_mean")])
    assert operators(exported).count("BatchNormalization") == norms == 17
    held = initializers(exported)
    for key, value in torch_model.state_dict().items():
        if "running" in key:
            assert any(a.shape == value.shape and (a == value.numpy()).all() for a in held), key
    for some in (slice(0, 3), slice(1, 2)):  # "B" may be any number
        found = run(exported, images[some], labels[some])
        assert_agree(found, np.asarray(evaluate(images[some], labels[some])))
        assert_agree(found, expected[some])


@pytest.mark.parametrize("mutable", [False, ["batch_stats"]])
def test_the_generator_by_each_image_s_own_statistics(models, mutable):
    _, stargan, torch_models = models
    torch.manual_seed(0)
    torch_model = torch_models.Generator(features=8)
    images, labels = stargan.photographs()[:3], np.eye(5, dtype=np.float32)[:3]
    given = channels_first(images), torch.from_numpy(labels)
    with torch.no_grad():
        for _ in range(3):
            torch_model(*given)
        variables = stargan.from_pytorch(torch_model.state_dict())
        expected = np.moveaxis(torch_model.train()(*given).numpy(), 1, -1)
    model = stargan.Generator(features=8)

    def evaluate(x, labels):
        call = {"use_running_average": False, "mutable": mutable}
        y = model.apply(variables, x, labels, **call)
        return y[0] if mutable else y

    inputs = [("B", 128, 128, 3), ("B", 5)]
    with pytest.raises(ValueError, match=r"to_onnx\(\.\.\., update_stats=False\)"):
        jaxnorm.onnx.to_onnx(evaluate, inputs)
    exported = jaxnorm.onnx.to_onnx(evaluate, inputs, update_stats=False)
    assert operators(exported).count("InstanceNormalization") == 17
    assert "BatchNormalization" not in operators(exported)
    for some in (slice(0, 3), slice(1, 2)):  # images do not affect each other
        assert_agree(run(exported, images[some], labels[some]), expected[some])


def test_a_resnet_keeps_a_norm_for_a_norm(models):
    resnet, _, torch_models = models
    torch.manual_seed(0)
    torch_model = torch_models.ResNet18(classes=10, features=16)
    x = np.random.default_rng(0).normal(0.5, 1, (4, 64, 64, 3)).astype(np.float32)
    with torch.no_grad():
        for _ in range(3):
            torch_model(channels_first(x))
        expected = torch_model.eval()(channels_first(x)).numpy()
    variables = resnet.from_pytorch(torch_model.state_dict())
    model = resnet.ResNet18(classes=10, features=16)

    def evaluate(x):
        return model.apply(variables, x, train=False)

    exported = jaxnorm.onnx.to_onnx(evaluate, [("B", 64, 64, 3)])
    norms = len([key for key in torch_model.state_dict() if key.endswith("running_mean")])
    assert operators(exported).count("BatchNormalization") == norms == 20
    for some in (x, x[:1]):
        found = run(exported, some)
        assert_agree(found, np.asarray(evaluate(some)))
        assert_agree(found, expected[: len(some)])
