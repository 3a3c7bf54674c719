"""Tests the examples that convert PyTorch models against PyTorch's outputs."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import channels_first

from jaxnorm import interop

torch = pytest.importorskip("torch")
torch_models = pytest.importorskip("torch_models")

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def examples():
    sys.path.insert(0, str(EXAMPLES))
    try:
        import resnet
        import stargan

        yield {"stargan": stargan, "resnet": resnet}
    finally:
        sys.path.remove(str(EXAMPLES))


def channels_last(x):
    return np.moveaxis(x.detach().numpy(), 1, -1)


def assert_agree(found, expected):
    """Compares within 1e-4 of the largest value: float32 through twenty convolutions and norms."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.fixture(scope="module")
def generator(examples):
    """Returns PyTorch's generator after a few passes, its variables, images and labels."""
    torch.manual_seed(0)
    torch_model = torch_models.Generator(features=32)  # the published 64 take four times as long
    rng = np.random.default_rng(0)
    images = examples["stargan"].photographs()[:4]
    labels = np.eye(5, dtype=np.float32)[rng.integers(5, size=len(images))]
    with torch.no_grad():
        for module in torch_model.modules():  # the scales and biases are not 1 and 0
            if isinstance(module, torch.nn.InstanceNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
        for _ in range(3):
            torch_model(channels_first(images), torch.from_numpy(labels))
    return torch_model, images[:2], labels[:2]


def test_the_generator_agrees_in_both_modes(examples, generator):
    stargan = examples["stargan"]
    torch_model, images, labels = generator
    variables = stargan.from_pytorch(torch_model.state_dict())
    model = stargan.Generator(features=32)
    assert images.shape[1:] == (128, 128, 3)
    like = jax.eval_shape(
        lambda: model.init(jax.random.key(0), images, labels, use_running_average=True)
    )
    checked = interop.from_torch(
        torch_model.state_dict(), names=stargan.module_names(), convert=stargan.kernels, like=like
    )
    jax.tree.map(np.testing.assert_array_equal, checked, variables)
    given = channels_first(images), torch.from_numpy(labels)
    with torch.no_grad():
        torch_model.eval()
        evaluated = channels_last(torch_model(*given))
        torch_model.train()
        trained = channels_last(torch_model(*given))

    @jax.jit
    def both(x, labels):
        by_own, updates = model.apply(
            variables, x, labels, use_running_average=False, mutable=["batch_stats"]
        )
        return model.apply(variables, x, labels, use_running_average=True), by_own, updates

    by_state, by_own, updates = both(images, labels)
    assert_agree(by_state, evaluated)
    assert_agree(by_own, trained)
    assert np.abs(by_state - by_own).max() > 0.1  # the modes are two functions
    # Both states are updated equally: converted back, it equals PyTorch's state after its pass.
    back = interop.to_torch(
        {**variables, **updates}, names=stargan.module_names(), convert=stargan.kernels.inverse
    )
    for key, expected in torch_model.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            assert_agree(back[key], expected.numpy())


def test_the_generator_is_converted_back_bit_for_bit(examples, generator, tmp_path):
    stargan, (torch_model, _, _) = examples["stargan"], generator
    state_dict = torch_model.state_dict()
    path = tmp_path / "generator.safetensors"
    variables = stargan.from_pytorch(state_dict)
    interop.to_torch(
        variables, names=stargan.module_names(), convert=stargan.kernels.inverse, file=path
    )
    again = torch_models.Generator(features=32)
    import safetensors.torch

    again.load_state_dict(safetensors.torch.load_file(path), strict=True)
    for key, expected in state_dict.items():
        assert torch.equal(again.state_dict()[key], expected), key
    jax.tree.map(np.testing.assert_array_equal, stargan.from_pytorch(path), variables)


@pytest.mark.slow
def test_the_generator_s_picture_is_drawn(examples, tmp_path, capsys):
    path = tmp_path / "picture.png"
    examples["stargan"].main(["--features", "2", "--steps", "1", "--out", str(path)])
    assert path.stat().st_size > 10_000
    assert str(path) in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"stargan\.py: .*none\.safetensors"):
        examples["stargan"].main([str(tmp_path / "none.safetensors")])


@pytest.mark.slow
def test_a_resnet_agrees_in_both_modes(examples, tmp_path, capsys):
    resnet = examples["resnet"]
    torch.manual_seed(0)
    torch_model = torch_models.ResNet18(classes=10, features=16)
    x = np.random.default_rng(0).normal(0.5, 1, (4, 64, 64, 3)).astype(np.float32)
    with torch.no_grad():
        for _ in range(3):
            torch_model(channels_first(x))
    model = resnet.ResNet18(classes=10, features=16)
    like = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False))
    variables = resnet.from_pytorch(torch_model.state_dict())
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, like)
    with torch.no_grad():
        torch_model.eval()
        evaluated = torch_model(channels_first(x)).numpy()
        torch_model.train()
        trained = torch_model(channels_first(x)).numpy()
    by_state = jax.jit(lambda x: model.apply(variables, x, train=False))(x)
    by_batch, updates = jax.jit(
        lambda x: model.apply(variables, x, train=True, mutable=["batch_stats"])
    )(x)
    assert_agree(by_state, evaluated)
    assert_agree(by_batch, trained)
    back = interop.to_torch(
        {**variables, **updates}, convert=interop.kernels().inverse, like=torch_model.state_dict()
    )
    for key, expected in torch_model.state_dict().items():
        assert_agree(back[key], expected.numpy())
    path = tmp_path / "resnet18.safetensors"
    interop.to_torch(variables, convert=interop.kernels().inverse, file=path)
    resnet.main([str(path)])
    assert "the five likeliest of 10 classes" in capsys.readouterr().out
