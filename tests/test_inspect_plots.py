"""Tests that plots of running statistics stay readable for any number of norms."""

import jax
import numpy as np
import pytest
from matplotlib.colors import to_hex

import jaxnorm
from jaxnorm import inspect

GRAY = "#b5b5b5"


def state(seed=0, channels=3, spread=1.0):
    rng = np.random.default_rng(seed)
    return {
        "mean": (spread * rng.normal(size=channels)).astype(np.float32),
        "var": rng.uniform(0.5, 2, channels).astype(np.float32),
        "count": np.int32(seed + 1),
    }


def model(norms, step=0):
    """Norms of which those with the numbers 3 and 7 move most."""
    return {
        "backbone": {
            f"block_{i}": {"bn": state(100 * step + i, 3, {3: 9.0, 7: 5.0}.get(i, 1.0))}
            for i in range(norms)
        }
    }


def history(norms):
    return {10 * step: model(norms, step) for step in range(4)}


def overlaps(figure):
    """Whether the legend or the panels lie over one another, or the figure cuts text off."""
    figure.draw_without_rendering()
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    boxes += [legend.get_window_extent() for legend in figure.legends]
    inside = all(
        box.x0 >= -1
        and box.y0 >= -1
        and box.x1 <= figure.bbox.x1 + 1
        and box.y1 <= figure.bbox.y1 + 1
        for box in boxes
    )
    pairs = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i]]
    # Neighbors may touch by a pixel, to which matplotlib rounds.
    apart = all(
        min(a.x1, b.x1) - max(a.x0, b.x0) < 2 or min(a.y1, b.y1) - max(a.y0, b.y0) < 2
        for a, b in pairs
    )
    return not (inside and apart)


@pytest.mark.parametrize("norms", [1, 5, 53, pytest.param(300, marks=pytest.mark.slow)])
def test_the_panels_keep_their_size_and_nothing_overlaps(norms):
    for figure in (
        inspect.plot_drift(history(norms)),
        inspect.plot_layers(model(norms), model(norms, 1)),
        inspect.plot_layers(model(norms)),
    ):
        assert not overlaps(figure)
        width, height = figure.get_size_inches()
        assert width < 13
        assert height < 13
        for axes in figure.axes:
            box = axes.get_position()
            assert box.width * width > 1.8  # inches
            assert box.height * height > 1.3


@pytest.mark.parametrize("name", ["a_module_with_a_long_name", "name_of_70_characters_" * 4])
def test_the_names_in_the_legend_fit_the_figure(name):
    long = {
        step: {f"block_{i}_{name}": tree["backbone"][f"block_{i}"] for i in range(12)}
        for step, tree in history(12).items()
    }
    figure = inspect.plot_drift(long)
    assert not overlaps(figure)
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert all(len(text) <= 42 for text in texts)
    assert len(texts) == 9


def test_drift_names_the_worst_norms_and_draws_the_others_gray():
    found = inspect.plot_drift(history(12), worst=2)
    texts = [text.get_text() for text in found.legends[0].get_texts()]
    assert texts == ["backbone/block_3/bn", "backbone/block_7/bn", "10 other norms"]
    for axes in found.axes:
        colors = [to_hex(line.get_color()) for line in axes.lines]
        assert len(colors) == 12
        assert [i for i, color in enumerate(colors) if color != GRAY] == [3, 7]
        assert all(
            line.get_linewidth() < 1
            for line, color in zip(axes.lines, colors, strict=True)
            if color == GRAY
        )
    handles = [to_hex(line.get_color()) for line in found.legends[0].get_lines()]
    assert handles == [colors[3], colors[7], GRAY]


@pytest.mark.parametrize("worst", [8, 9, 10, 40, None])
def test_no_two_named_norms_have_one_color(worst):
    found = inspect.plot_drift(history(40), worst=worst)
    colors = [to_hex(line.get_color()) for line in found.axes[0].lines]
    named = [color for color in colors if color != GRAY]
    assert len(named) == len(set(named)) == (40 if worst is None else worst)
    assert not overlaps(found)
    heights = [axes.get_position().height * found.get_size_inches()[1] for axes in found.axes]
    assert min(heights) > 2.4  # inches, whatever the number of rows in the legend


def test_a_norm_that_is_not_finite_is_the_worst_and_the_legend_says_so():
    given = history(12)
    given[10]["backbone"]["block_5"]["bn"]["mean"][0] = np.nan
    given[30]["backbone"]["block_6"]["bn"]["var"][0] = 0  # the reference
    figure = inspect.plot_drift(given, worst=2)
    first, second, _ = [text.get_text() for text in figure.legends[0].get_texts()]
    assert first == "backbone/block_5/bn (not finite)"
    assert second.startswith("backbone/block_6/bn (up to 1e+")
    assert figure.axes[0].get_ylim() == (0, 1e4)
    assert figure.axes[0].get_yscale() == "symlog"
    assert inspect.plot_drift(history(2)).axes[0].get_yscale() == "linear"


@pytest.mark.parametrize(("mean", "scale"), [(5, "linear"), (500, "symlog"), (np.nan, "linear")])
def test_the_scale_of_the_overview_shows_large_and_small_drifts(mean, scale):
    batch = model(12, 1)
    batch["backbone"]["block_5"]["bn"]["mean"][0] = mean
    *_, overview = inspect.plot_layers(model(12), batch, worst=2).axes
    assert overview.get_yscale() == scale
    tops = [line[1, 1] for line in overview.collections[0].get_segments()]
    assert np.all(np.isfinite(tops))
    if mean != 5:
        assert np.argmax(tops) == 5


def test_layers_draws_the_worst_norms_and_an_overview_of_all():
    figure = inspect.plot_layers(model(12), model(12, 1), worst=2)
    *panels, overview = figure.axes
    titles = [axes.get_title() for axes in panels]
    assert titles == ["1. backbone/block_3/bn", "2. backbone/block_7/bn"]
    assert "the worst 2 of 12 norms" in overview.get_title()
    drift = inspect.drift(model(12), model(12, 1))
    tops = [line[1, 1] for line in overview.collections[0].get_segments()]
    names = [f"backbone/block_{i}/bn" for i in range(12)]
    sums = [drift[f"{name}/mean_drift"] + drift[f"{name}/std_drift"] for name in names]
    np.testing.assert_allclose(tops, sums, rtol=1e-6)
    assert [(text.get_text(), text.xy[0]) for text in overview.texts] == [("1", 3), ("2", 7)]
    everything = inspect.plot_layers(model(12), model(12, 1), worst=None)
    assert [axes.get_title() for axes in everything.axes] == names


def test_layers_of_one_state_alone_are_ordered_as_in_the_summary():
    tree = model(12)
    tree["backbone"]["block_4"]["bn"]["var"][:2] = 0
    tree["backbone"]["block_9"]["bn"]["mean"][1] = np.inf
    figure = inspect.plot_layers(tree, worst=3)
    *panels, overview = figure.axes
    rows = inspect.summary(tree, worst=3).rows
    assert [axes.get_title() for axes in panels] == [
        f"{i + 1}. {r.path}" for i, r in enumerate(rows)
    ]
    assert [axes.texts[0].get_text() for axes in panels] == ["1 not finite", "2 dead", ""]
    low, high = overview.collections[0].get_segments()[0][:, 1]
    first, *_ = inspect.summary(tree).norms
    np.testing.assert_allclose([low, high], [first.std_min, first.std_max], rtol=1e-6)
    assert overview.get_yscale() == "log"


@pytest.mark.parametrize("tree", [state(), {"norm": state()}], ids=["bare", "tree"])
def test_one_norm_is_drawn_without_a_second_state(tree):
    (axes,) = inspect.plot_layers(tree).axes
    assert axes.get_title() == "norm"
    (line,) = axes.lines
    np.testing.assert_array_equal(line.get_ydata(), np.sort(state()["mean"]))
    figure = inspect.plot_drift({0: tree, 1: tree})
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["norm"]


def test_one_channel_is_visible():
    axes = inspect.plot_layers(state(channels=1)).axes[0]
    (bar,) = axes.containers
    (segment,) = bar.lines[2][0].get_segments()
    std = np.sqrt(state(channels=1)["var"][0])
    np.testing.assert_allclose(segment[1, 1] - segment[0, 1], 2 * std, rtol=1e-6)


def test_bands_replace_the_bars_of_many_channels():
    few, many = (inspect.plot_layers(state(0, n), state(1, n)).axes[0] for n in (64, 65))
    assert (len(few.containers), len(few.collections)) == (1, 2)  # the bars are a collection, too
    assert (len(many.containers), len(many.collections)) == (0, 2)
    np.testing.assert_array_equal(
        many.lines[1].get_ydata(), state(1, 65)["mean"][np.argsort(state(0, 65)["mean"])]
    )


def test_long_names_are_cut_to_what_tells_them_apart():
    long = "a_module_with_a_long_name"
    tree = {"net": {long: {"stage_1": {"bn": state()}}, "other": {"stage_1": {"bn": state()}}}}
    tree["net"][long]["stage_2"] = {"bn": state()}
    titles = [axes.get_title() for axes in inspect.plot_layers(tree).axes]
    assert titles == [f"…{f'{long}/stage_1/bn'[-34:]}", "…/stage_2/bn", "net/other/stage_1/bn"]


@pytest.mark.parametrize(
    "plot",
    [
        lambda s: inspect.plot_layers(s),
        lambda s: inspect.plot_layers(state(), s),
        lambda s: inspect.plot_drift({0: s, 1: s}),
        lambda s: inspect.plot_drift({0: state(), 1: state()}, s),
    ],
)
def test_traced_values_are_errors(plot):
    with pytest.raises(ValueError, match=r"plot_\w+: batch_stats should hold concrete values"):
        jax.jit(lambda s: plot(s) and None)(jaxnorm.init_batch_stats(3))


@pytest.mark.parametrize("worst", [0, 1.5])
def test_worst_is_a_positive_int(worst):
    with pytest.raises(ValueError, match="plot_layers: worst should be a positive int"):
        inspect.plot_layers(state(), worst=worst)
    with pytest.raises(ValueError, match="plot_drift: worst should be a positive int"):
        inspect.plot_drift({0: state(), 1: state()}, worst=worst)
