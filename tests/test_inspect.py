"""Tests the numbers and plots of running statistics."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxnorm
import jaxnorm.linen
import jaxnorm.nnx
from jaxnorm import inspect

RNG = np.random.default_rng(0)


def state(channels=3, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "mean": rng.normal(size=channels).astype(np.float32),
        "var": rng.uniform(0.5, 2, channels).astype(np.float32),
        "count": np.int32(seed + 1),
    }


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        for features in (4, 6):
            x = nn.Dense(features)(x)
            x = jaxnorm.linen.BatchNorm(use_running_average=False)(x)
        return x


@pytest.fixture
def variables():
    x = RNG.standard_normal((8, 3)).astype(np.float32)
    variables = Net().init(jax.random.key(0), x)
    return variables | Net().apply(variables, x, mutable=["batch_stats"])[1]


def test_flat_contains_every_statistic_of_a_model_and_nothing_else(variables):
    found = inspect.flat(variables)
    assert list(found) == [f"BatchNorm_{i}/{k}" for i in (0, 1) for k in ("mean", "var", "count")]
    for name, value in found.items():
        norm, key = name.split("/")
        assert value is variables["batch_stats"][norm][key]
    assert found == inspect.flat(variables["batch_stats"])


def test_an_nnx_model_s_statistics_go_by_the_same_names():
    model = nnx.Sequential(
        nnx.Linear(3, 4, rngs=nnx.Rngs(0)), jaxnorm.nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    )
    model(jnp.ones((2, 3)))
    found = inspect.flat(nnx.to_pure_dict(nnx.state(model)))
    assert list(found) == ["layers/1/mean", "layers/1/var", "layers/1/count"]
    assert found["layers/1/count"] == 1


def test_one_state_needs_no_name():
    assert list(inspect.flat(state())) == ["mean", "var", "count"]
    assert "mean_min" in inspect.scalars(state())
    assert set(inspect.drift(state(), state())) == {"mean_drift", "std_drift"}


def test_scalars_are_the_extremes_over_the_channels_and_work_under_jit(variables):
    found = jax.jit(inspect.scalars)(variables)
    for norm, s in variables["batch_stats"].items():
        assert found[f"{norm}/mean_min"] == np.min(s["mean"])
        assert found[f"{norm}/mean_max"] == np.max(s["mean"])
        np.testing.assert_allclose(found[f"{norm}/std_min"], np.sqrt(np.min(s["var"])), rtol=1e-6)
        np.testing.assert_allclose(found[f"{norm}/std_max"], np.sqrt(np.max(s["var"])), rtol=1e-6)
        assert found[f"{norm}/count"] == 1
    assert len(found) == 10
    assert all(value.shape == () for value in found.values())


def test_drift_is_in_standard_deviations_of_the_reference():
    a, b = state(seed=0), state(seed=1)
    found = inspect.drift({"n": a}, {"n": b})
    off = np.sqrt(np.mean((a["mean"] - b["mean"]) ** 2 / b["var"]))
    wide = np.sqrt(np.mean((np.sqrt(a["var"] / b["var"]) - 1) ** 2))
    np.testing.assert_allclose(found["n/mean_drift"], off, rtol=1e-5)
    np.testing.assert_allclose(found["n/std_drift"], wide, rtol=1e-5)


def test_a_channel_that_stays_dead_has_no_drift():
    dead = {"n": {"mean": np.float32([0, 1]), "var": np.float32([0, 1])}}
    assert inspect.drift(dead, dead) == {"n/mean_drift": 0, "n/std_drift": 0}


def test_layers_are_drawn_by_running_mean_and_the_other_beside_them():
    running, batch = {"a": state(5), "b": state(3)}, {"a": state(5, 1), "b": state(3, 1)}
    figure = inspect.plot_layers(running, batch, names=("then", "now"))
    assert [axes.get_title() for axes in figure.axes] == ["a", "b"]
    axes = figure.axes[0]
    order = np.argsort(running["a"]["mean"])
    line, points = axes.lines[:2]
    np.testing.assert_allclose(line.get_ydata(), running["a"]["mean"][order])
    np.testing.assert_allclose(points.get_ydata(), batch["a"]["mean"][order])
    bars = axes.containers[0].lines[2][0].get_segments()  # the standard deviations of the batch
    length = [segment[1, 1] - segment[0, 1] for segment in bars]
    np.testing.assert_allclose(length, 2 * np.sqrt(batch["a"]["var"][order]), rtol=1e-5)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["then", "now"]


def test_more_norms_than_fit_in_a_row_go_on_in_the_next():
    many = {f"n{i}": state() for i in range(6)}
    figure = inspect.plot_layers(many, many)
    assert [axes.get_title() for axes in figure.axes if axes.get_visible()] == list(many)
    assert len({axes.get_position().y0 for axes in figure.axes}) == 2


def test_drift_is_drawn_over_the_steps_from_the_last():
    history = {10 * i: {"n": state(seed=i), "m": state(seed=9 - i)} for i in (0, 1, 2)}
    figure = inspect.plot_drift(history)
    for axes, kind in zip(figure.axes, ("mean_drift", "std_drift"), strict=True):
        assert [line.get_label() for line in axes.lines] == ["n", "m"]
        for line in axes.lines:
            assert list(line.get_xdata()) == [0, 10, 20]
            expected = [
                inspect.drift(history[s], history[20])[f"{line.get_label()}/{kind}"]
                for s in (0, 10, 20)
            ]
            np.testing.assert_allclose(line.get_ydata(), expected)
    other = inspect.plot_drift(history, reference=history[0])
    assert other.axes[0].lines[0].get_ydata()[0] == 0


def test_no_statistics_other_norms_and_one_step_are_errors():
    with pytest.raises(ValueError, match="scalars: batch_stats should hold running statistics"):
        inspect.scalars({"params": {"Dense_0": {"kernel": np.ones(3)}}})
    with pytest.raises(ValueError, match=r"drift: both should hold the same norms.* holds b, c"):
        inspect.drift({"a": state(), "b": state()}, {"a": state(), "c": state()})
    with pytest.raises(ValueError, match=r"plot_drift: history should hold two steps.* holds 1"):
        inspect.plot_drift({0: state()})
