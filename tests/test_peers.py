"""Measures each cell of the comparison with other libraries."""

import json
import os
import re
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnorm

eqx, hk, keras, torch = map(pytest.importorskip, ("equinox", "haiku", "keras", "torch"))

ROOT = Path(__file__).parents[1]
TABLE = (ROOT / "docs" / "comparison.md").read_text()
PEERS = ("jaxnorm", "flax.linen", "Haiku", "Equinox", "Keras", "PyTorch")
# The libraries warn about deprecations.
pytestmark = pytest.mark.filterwarnings("ignore")


def row(title):
    """Returns the cells of a row of the table by library."""
    (line,) = re.findall(rf"^\| {re.escape(title)}.*$", TABLE, re.M)
    cells = [cell.strip() for cell in line.split("|")[2:-1]]
    return dict(zip(PEERS, cells, strict=False))


def test_the_table_s_columns():
    assert re.search(r"^\| +\|.*" + r" \| ".join(map(re.escape, PEERS)), TABLE, re.M)


def agree(peer, said, found):
    """Checks that the table states what was found.

    For another library, which may change, a difference is reported and is no error.
    """
    if said != found and peer != "jaxnorm":
        pytest.xfail(f"docs/comparison.md is out of date: {peer} has {found}, not {said}")
    assert said == found


def train(peer, x):
    """Returns y of batch norm, and the running statistics if the batch has all the weight."""
    c = x.shape[-1]
    if peer == "jaxnorm":
        y, state = jaxnorm.batch_norm(x, None, jaxnorm.init_batch_stats(c), momentum=1.0)
        return y, state["mean"], state["var"]
    if peer == "flax.linen":
        layer = nn.BatchNorm(use_running_average=False, momentum=0.0)
        y, updates = layer.init_with_output(jax.random.key(0), x)
        y, updates = layer.apply(updates, x, mutable=["batch_stats"])
        return y, updates["batch_stats"]["mean"], updates["batch_stats"]["var"]
    if peer == "Haiku":
        net = hk.transform_with_state(lambda x: hk.BatchNorm(True, True, 0.0)(x, is_training=True))
        y, state = net.apply(*net.init(None, x), None, x)
        means, variances = (state[f"batch_norm/~/{k}_ema"]["average"] for k in ("mean", "var"))
        return y, means.ravel(), variances.ravel()
    if peer == "Equinox":
        norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
            c, axis_name="batch", mode="batch", momentum=0.0
        )
        axes = {"in_axes": (0, None), "out_axes": (0, None)}
        y, state = jax.vmap(norm, axis_name="batch", **axes)(x, state)
        # The statistics follow from y in evaluation, (x - mean) / sqrt(var + eps), at 0 and 1.
        at, _ = jax.vmap(eqx.nn.inference_mode(norm), axis_name="batch", **axes)(
            jnp.stack([jnp.zeros(c), jnp.ones(c)]), state
        )
        slope = at[1] - at[0]
        return y, -at[0] / slope, 1 / slope**2 - norm.eps
    if peer == "Keras":
        layer = keras.layers.BatchNormalization(momentum=0.0)
        y = layer(x, training=True)
        return y, np.asarray(layer.moving_mean), np.asarray(layer.moving_variance)
    layer = torch.nn.BatchNorm1d(c, momentum=1.0)
    y = layer(torch.tensor(np.asarray(x))).detach().numpy()
    return y, layer.running_mean.numpy(), layer.running_var.numpy()


@pytest.mark.parametrize("peer", PEERS)
def test_the_error_of_y_far_from_zero(peer):
    x = np.random.default_rng(0).standard_normal((4096, 64)) + 1e4
    x = x.astype(np.float32)
    y = np.asarray(train(peer, x)[0], np.float64)
    epsilon = 1e-3 if peer == "Keras" else 1e-5
    exact = (x - x.mean(0, np.float64)) / np.sqrt(x.var(0, np.float64) + epsilon)
    error = np.abs(y - exact).max()
    said, *_ = row("largest error of y")[peer].split(" (")  # an option of Flax is in parentheses
    found = "NaN" if np.isnan(error) else f"{error:.1g}"
    if "NaN" not in (said, found):
        # Only the order of magnitude, because the worst entry depends on the machine.
        number = float(said.replace(",", ""))
        found = said if number / 3 < error < number * 3 else found
    agree(peer, said, found)


def test_the_error_of_y_with_the_option_of_flax():
    x = np.random.default_rng(0).standard_normal((4096, 64)).astype(np.float32) + np.float32(1e4)
    layer = nn.BatchNorm(use_running_average=False, use_fast_variance=False)
    y = np.asarray(layer.init_with_output(jax.random.key(0), x)[0], np.float64)
    exact = (x - x.mean(0, np.float64)) / np.sqrt(x.var(0, np.float64) + 1e-5)
    said = re.search(r"\((\S+) with `use_fast_variance=False`\)", TABLE)
    assert float(said[1]) / 3 < np.abs(y - exact).max() < float(said[1]) * 3


def test_the_readme_has_rows_of_the_table():
    readme = (ROOT / "README.md").read_text()
    rows = [line for line in readme.splitlines() if line.startswith("| ")]
    assert len(rows) >= 5
    assert set(rows) <= set(TABLE.splitlines())


@pytest.mark.parametrize("peer", PEERS)
def test_the_running_variance(peer):
    _, mean, var = train(peer, np.array([[1.0], [3.0]], np.float32))
    np.testing.assert_allclose(mean, 2, rtol=1e-4)
    unbiased = np.allclose(var, 2, rtol=1e-3)
    assert unbiased or np.allclose(var, 1, rtol=1e-3)
    agree(peer, row("running variance")[peer], "unbiased" if unbiased else "biased")


@pytest.mark.parametrize("peer", PEERS)
def test_the_running_statistics_after_a_batch_with_nan(peer):
    _, mean, var = train(peer, np.array([[1.0], [np.nan], [2.0]], np.float32))
    survives = bool(np.isfinite(mean).all() and np.isfinite(var).all())
    agree(peer, row("running statistics after a NaN")[peer], "kept" if survives else "NaN")


def masked(peer, x, mask):
    if peer == "jaxnorm":
        return jaxnorm.batch_norm(x, mask=mask)[0]
    if peer == "flax.linen":
        layer = nn.BatchNorm(use_running_average=False)
        return layer.init_with_output(jax.random.key(0), x, mask=mask)[0]
    layer = keras.layers.BatchNormalization()
    layer.build(x.shape)
    trained = [v.value for v in layer.trainable_variables]
    rest = [v.value for v in layer.non_trainable_variables]
    return layer.stateless_call(trained, rest, x, training=True, mask=mask[..., 0])[0]


@pytest.mark.parametrize("peer", PEERS)
def test_the_gradient_with_nan_under_the_mask(peer):
    said = row("gradient with NaN under the mask")[peer]
    if said == "no mask":
        call = {
            "Haiku": hk.BatchNorm.__call__,
            "Equinox": eqx.nn.BatchNorm.__call__,
            "PyTorch": torch.nn.BatchNorm1d.forward,
        }[peer]
        agree(peer, said, "mask" if "mask" in call.__code__.co_varnames else "no mask")
        return
    x = jnp.array([[[1.0, 2.0], [3.0, 1.0], [4.0, 4.0], [jnp.nan, jnp.nan]]])
    mask = np.array([[[True], [True], [True], [False]]])
    gradient = jax.grad(lambda x: jnp.sum(jnp.where(mask, masked(peer, x, mask), 0) ** 3))(x)
    agree(peer, said, "finite" if jnp.isfinite(gradient).all() else "NaN")


def tracks(peer):
    """Returns what the table should say of running statistics in the library's instance norm."""
    if peer == "PyTorch":
        layer = torch.nn.InstanceNorm1d(1, track_running_stats=True)
        layer(torch.ones(2, 1, 3))
        assert layer.running_mean != 0
        return "yes" if layer.num_batches_tracked else "yes, but `num_batches_tracked` stays 0"
    has = {
        "jaxnorm": lambda: "batch_stats" in jaxnorm.instance_norm.__code__.co_varnames,
        "flax.linen": lambda: hasattr(nn.InstanceNorm, "use_running_average"),
        "Haiku": lambda: "decay_rate" in hk.InstanceNorm.__init__.__code__.co_varnames,
        "Equinox": lambda: hasattr(eqx.nn, "InstanceNorm"),
        "Keras": lambda: hasattr(keras.layers, "InstanceNormalization"),
    }
    return "yes" if has[peer]() else "no"


@pytest.mark.parametrize("peer", PEERS)
def test_who_has_an_instance_norm_with_running_statistics(peer):
    said = row("instance norm with running statistics")[peer]
    agree(peer, said, tracks(peer))


BENCHMARK = json.loads((ROOT / "docs" / "benchmarks" / "norms.json").read_text())["cells"]


def measured(norm, mode):
    """Returns the last benchmark results of a norm in float32 on (32, 56, 56, 64)."""
    for cell in BENCHMARK.values():
        job = cell["job"]
        if (job.get("norm"), job.get("mode"), job.get("training")) == (norm, mode, True) and job[
            "shape"
        ] == [32, 56, 56, 64]:
            names = {
                "Haiku": "dm-haiku",
                "Equinox": "equinox",
                "Keras": "keras",
                "PyTorch": "torch",
            }
            return {peer: cell["libraries"][names.get(peer, peer)] for peer in PEERS}
    raise AssertionError(f"the benchmarks have no {norm}, {mode}")


@pytest.mark.parametrize("norm", ["batch", "layer", "rms"])
def test_the_benchmark_s_numbers(norm):
    answers = measured(norm, "forward+backward")
    own_time = answers["jaxnorm"]["minimum"]
    said = row(f"{norm} norm, forward and backward, time".replace("rms", "RMS"))
    kept = row(f"{norm} norm, kept for the backward pass".replace("rms", "RMS"))
    for peer, answer in answers.items():
        time = f"{answer['minimum'] / own_time:.1f}" if "minimum" in answer else "–"  # noqa: RUF001
        share = f"{answer['kept'] / answer['x_bytes']:.1f}" if "kept" in answer else "–"  # noqa: RUF001
        assert (peer, said[peer], kept[peer]) == (peer, time, share)
