"""Tests that the AdaIN example transfers the colors and writes its picture."""

import importlib.util
import struct
from pathlib import Path

import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

SOURCE = Path(__file__).parents[1] / "examples" / "adain.py"


def load_example():
    spec = importlib.util.spec_from_file_location("adain_example", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


adain = load_example()


@pytest.fixture(scope="module")
def photographs():
    return adain.load_photographs()


def statistics(images):
    """Returns the mean and the variance of the channels of each image, in float64."""
    images = np.asarray(images, np.float64)
    return images.mean((1, 2)), images.var((1, 2))


def test_the_photographs_are_two_in_color(photographs):
    assert photographs.shape == (2, 427, 640, 3)
    assert photographs.min() == 0
    assert photographs.max() == 1
    assert not np.array_equal(*photographs)


def test_each_photograph_gets_the_other_s_statistics(photographs):
    y = adain.adain(photographs, adain.exchange(adain.colors(photographs)))
    (mean, var), (own_mean, own_var) = statistics(y), statistics(photographs)
    # A few float32 roundings of values near 1.
    np.testing.assert_allclose(mean, own_mean[::-1], rtol=0, atol=2e-6)
    # The variance after instance norm is var / (var + epsilon), slightly less than 1.
    np.testing.assert_allclose(var, own_var[::-1] * own_var / (own_var + 1e-5), rtol=1e-5)
    assert np.abs(own_mean[0] - own_mean[1]).min() > 0.2  # the colors of the images differ


def test_its_own_colors_reproduce_a_photograph(photographs):
    y = adain.adain(photographs, adain.colors(photographs))
    # epsilon reduces the distance to the mean, at most 0.9, by 1e-5 / 2 var, which is 3e-4.
    np.testing.assert_allclose(y, photographs, rtol=0, atol=4e-4)


def test_sliding_begins_with_the_one_and_ends_with_the_other(photographs):
    own = adain.colors(photographs)
    other = adain.exchange(own)
    sliding = adain.slide(own, other, photographs.shape[2])
    y = adain.adain(photographs, sliding)
    ends = [adain.adain(photographs, params) for params in (own, other)]
    np.testing.assert_allclose(y[:, :, 0], ends[0][:, :, 0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(y[:, :, -1], ends[1][:, :, -1], rtol=0, atol=1e-6)
    steps = jnp.diff(sliding["bias"], axis=2)
    step = np.broadcast_to((other["bias"] - own["bias"]) / 639, steps.shape)
    np.testing.assert_allclose(steps, step, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_main_prints_six_rows_and_writes_a_picture(tmp_path, capsys):
    adain.main(["--out", str(tmp_path / "new" / "folder")])
    lines = capsys.readouterr().out.splitlines()
    rows = {line[:45].strip(): line[45:].split() for line in lines[2:8]}
    assert rows["the temple in the flower's colors"] == rows["the flower"]
    assert rows["the flower in the temple's colors"] == rows["the temple"]
    assert len(set(map(tuple, rows.values()))) == 4
    assert max(map(len, lines[:8])) <= 100
    path = tmp_path / "new" / "folder" / "adain.png"
    assert lines[-1] == f"wrote {path}"
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">2I", content[16:24])
    picture = matplotlib.image.imread(path)
    assert picture.shape[:2] == (height, width)
    assert picture[..., :3].std() > 0.2  # the picture is not empty: the measured value is 0.32


def test_what_is_clipped_is_said_below_the_picture(tmp_path, monkeypatch):
    notes = []
    text = "matplotlib.axes.Axes.text"
    monkeypatch.setattr(text, lambda self, x, y, note, **style: notes.append(note))
    inside = jnp.full((2, 2, 3), 0.5)
    adain.draw({"half": inside.at[0].set(1.5), "none": inside}, tmp_path / "picture.png")
    assert notes == ["50.0% of the values are clipped to [0, 1]"]


def test_a_folder_that_cannot_be_made_ends_the_program(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"^adain\.py: .*file") as error:
        adain.main(["--out", str(tmp_path / "file" / "folder")])
    assert error.value.code != 0


def test_an_unknown_argument_is_an_error(capsys):
    with pytest.raises(SystemExit):
        adain.main(["--style", "cubism"])
    assert "unrecognized arguments: --style cubism" in capsys.readouterr().err
