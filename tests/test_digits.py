"""Tests that the digits example reads its data, trains and writes its pictures."""

import gzip
import importlib.util
import re
import struct
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

SOURCE = Path(__file__).parents[1] / "examples" / "digits.py"
RUNNING = "InstanceNorm, running"
PNG = b"\x89PNG\r\n\x1a\n"


def load_example():
    spec = importlib.util.spec_from_file_location("digits_example", SOURCE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # Flax looks up annotations there
    spec.loader.exec_module(module)
    return module


digits = load_example()


def idx(array):
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def mnist(tmp_path):
    """Writes the four files: 20 training images and 10 test images, with labels 0 to 9 in turn."""
    rng = np.random.default_rng(0)
    for part, number in (("train", 20), ("t10k", 10)):
        images = rng.integers(0, 256, (number, 28, 28), np.uint8)
        labels = np.arange(number, dtype=np.uint8) % 10
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
    return tmp_path


@pytest.fixture(scope="module")
def batch():
    train, _ = digits.load_sklearn()
    return digits.Images(train.images[:64], train.labels[:64])


def state_of(name, batch):
    return digits.create_state(digits.NORMS[name], batch.images, seed=0)


def same(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [("", bytes), (".gz", gzip.compress), ("", gzip.compress), (".gz", bytes)],
    ids=["plain", "gzipped", "gzipped without .gz", "unpacked with .gz"],
)
def test_read_idx_returns_what_was_written(tmp_path, suffix, pack):
    array = np.arange(3 * 5 * 7, dtype=np.uint8).reshape(3, 5, 7)
    (tmp_path / f"some-images{suffix}").write_bytes(pack(idx(array)))
    np.testing.assert_array_equal(digits.read_idx(tmp_path, "some-images", ndim=3), array)


def test_load_mnist_scales_the_images_and_keeps_their_order(mnist):
    train, test = digits.load_mnist(mnist)
    assert train.images.shape == (20, 28, 28, 1)
    assert test.images.shape == (10, 28, 28, 1)
    assert train.images.dtype == np.float32
    raw = np.frombuffer((mnist / "train-images-idx3-ubyte").read_bytes()[16:], np.uint8)
    np.testing.assert_allclose(train.images.ravel(), raw / 255, rtol=1e-6)  # one rounding
    np.testing.assert_array_equal(test.labels, np.arange(10))


VALUES = np.zeros((3, 4), np.uint8)
DAMAGES = {
    "cut off": (idx(VALUES)[:-5], "it should hold 3 x 4 values, but there are 7; replace it"),
    "too long": (idx(VALUES) + b"more", "it should hold 3 x 4 values, but there are 16; replace"),
    "other content": (b"<html>", "an IDX header, 00 00 08 02 first, but it begins with 3c 68 74"),
    "other rank": (idx(VALUES[0]), "00 00 08 02 first, but it begins with 00 00 08 01; replace it"),
    "header cut off": (idx(VALUES)[:7], "it should begin with the 12 bytes of an IDX header"),
    "empty": (b"", "but it begins with nothing; replace it by an intact copy"),
    "gzip cut off": (gzip.compress(idx(VALUES))[:-9], "it should be a whole gzip file, but"),
    "gzip overwritten": (
        gzip.compress(b"")[:10] + b"\xff" * 30,
        "be a whole gzip file, but Error -3",
    ),
    "gzip with a wrong checksum": (
        gzip.compress(idx(VALUES))[:-8] + b"\0" * 8,
        "it should be a whole gzip file, but CRC check failed",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_with_what_was_expected(tmp_path, damage):
    content, message = DAMAGES[damage]
    (tmp_path / "data").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        digits.read_idx(tmp_path, "data", ndim=2)
    assert str(error.value).startswith(f"{tmp_path / 'data'}: it should ")


def test_a_missing_file_ends_the_program_with_what_to_do(mnist, tmp_path):
    missing = mnist / "t10k-labels-idx1-ubyte"
    missing.unlink()
    expected = f"digits.py: {missing}: there should be this file, or t10k-labels-idx1-ubyte.gz, but"
    with pytest.raises(SystemExit, match=re.escape(expected)) as error:
        digits.main(["--mnist", str(mnist), "--out", str(tmp_path)])
    assert "give --mnist the folder that holds MNIST's four files" in str(error.value)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros(19, np.uint8), "hold 20 images and 19 labels up to 0; take both from the same"),
        (np.full(20, 26, np.uint8), "hold 20 images and 20 labels up to 26; take both from the"),
    ],
    ids=["number", "letters"],
)
def test_labels_that_do_not_fit_the_images_are_refused(mnist, labels, message):
    (mnist / "train-labels-idx1-ubyte").write_bytes(idx(labels))
    with pytest.raises(ValueError, match=re.escape(message)):
        digits.load_mnist(mnist)


def test_the_split_is_fixed_stratified_and_of_all_digits():
    (train, test), again = digits.load_sklearn(), digits.load_sklearn()
    assert same((train, test), again)
    assert len(train.labels) + len(test.labels) == 1797
    assert train.images.min() == 0
    assert train.images.max() == 1
    shares = np.bincount(test.labels) / np.bincount(train.labels)
    np.testing.assert_allclose(shares, 1 / 3, atol=0.01)  # 45 and 135 of each, plus or minus one


def test_change_contrast_halves_it_and_brightens():
    changed = digits.change_contrast(np.array([0, 0.5, 1], np.float32))
    np.testing.assert_allclose(changed, [0.4, 0.65, 0.9], rtol=1e-6)
    assert changed.dtype == np.float32


def test_batches_are_shuffled_by_the_seed_and_keep_images_with_labels():
    labels = np.arange(100)
    data = digits.Images(labels[:, None, None, None].astype(np.float32), labels)
    first, again = (list(digits.batches(data, 32, np.random.default_rng(1))) for _ in range(2))
    assert same(first, again)
    assert [len(batch.labels) for batch in first] == [32, 32, 32]
    seen = np.concatenate([batch.labels for batch in first])
    assert len(set(seen)) == 96
    assert not np.array_equal(seen, np.sort(seen))
    for batch in first:
        np.testing.assert_array_equal(batch.images.ravel(), batch.labels)


@pytest.mark.parametrize("name", ["BatchNorm", RUNNING])
def test_a_step_updates_params_and_batch_stats(batch, name):
    before = state_of(name, batch)
    after, _ = digits.train_step(before, *batch)
    for moved in ("params", "batch_stats"):
        equal = jax.tree.map(np.array_equal, getattr(before, moved), getattr(after, moved))
        # The bias of the convolutions is excluded, because the norm removes it, up to rounding.
        unmoved = {jax.tree_util.keystr(k) for k, e in jax.tree.leaves_with_path(equal) if e}
        assert unmoved <= {"['Conv_0']['bias']", "['Conv_1']['bias']"}
    assert after.step == 1
    counts = [layer["count"] for layer in after.batch_stats.values()]
    assert [int(count) for count in counts] == [1, 1]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "BatchNorm" else pytest.mark.slow)
        for name in digits.NORMS
    ],
)
def test_twenty_steps_lower_the_loss(batch, name):
    state = state_of(name, batch)
    losses = []
    for _ in range(20):
        state, loss = digits.train_step(state, *batch)
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]  # the measured ratios are 0.49 without and 0.01 with a norm


def test_prediction_uses_the_state_and_does_not_change_it(batch):
    state, _ = digits.train_step(state_of("BatchNorm", batch), *batch)
    before = jax.tree.map(np.array, state)
    running = digits.predict(state, batch.images)
    own = digits.predict(state, batch.images, use_running_average=False)
    assert same(before, state)
    # After one step, the running statistics are far from those of this batch.
    assert not np.array_equal(running, own)
    alone = [digits.predict(state, batch.images[i : i + 1])[0] for i in range(8)]
    np.testing.assert_array_equal(alone, running[:8])


def test_instance_statistics_see_no_contrast(batch):
    state, _ = digits.train_step(state_of(RUNNING, batch), *batch)
    images = (batch.images, digits.change_contrast(batch.images))
    plain, changed = (digits.predict(state, i, use_running_average=False) for i in images)
    np.testing.assert_array_equal(plain, changed)


@pytest.mark.slow
def test_main_prints_four_rows_and_writes_both_pictures(tmp_path, capsys):
    digits.main(["--epochs", "1", "--out", str(tmp_path / "new")])
    out = capsys.readouterr().out
    cells = {name: re.search(rf"^{name}  +(.*)$", out, re.MULTILINE) for name in digits.NORMS}
    rows = {name: found[1].split() for name, found in cells.items()}
    assert [len(row) for row in rows.values()] == [7] * 4
    dashes = {name: [i for i, cell in enumerate(row) if cell == "-"] for name, row in rows.items()}
    assert dashes == {
        "no norm": [2, 3, 4, 5],
        "BatchNorm": [],
        "InstanceNorm": [2, 3],
        RUNNING: [],
    }
    assert rows["InstanceNorm"][4:6] == rows["InstanceNorm"][:2]
    assert rows[RUNNING][2:4] == rows[RUNNING][:2]
    assert all(float(row[0].rstrip("%")) > 60 for row in rows.values())  # chance: 10; measured: 81
    assert max(map(len, out.splitlines()[1:8])) <= 100
    for picture in ("curves.png", "mistakes.png"):
        assert (tmp_path / "new" / picture).read_bytes().startswith(PNG)


def test_a_model_without_mistakes_has_its_row_too(batch, tmp_path):
    state = state_of("BatchNorm", batch)
    right = batch._replace(labels=np.asarray(digits.predict(state, batch.images)))
    runs = dict.fromkeys(digits.NORMS, digits.Run(state, [1.0], [1.0], 0.0))
    digits.draw_mistakes(runs, right, tmp_path / "mistakes.png")
    assert (tmp_path / "mistakes.png").read_bytes().startswith(PNG)


def test_no_epochs_are_refused(capsys):
    with pytest.raises(SystemExit):
        digits.main(["--epochs", "0"])
    assert "--epochs should be at least 1, but is 0" in capsys.readouterr().err
