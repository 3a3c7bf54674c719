"""Tests the table of running statistics."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnorm
from jaxnorm import inspect


def norm(mean, var, count=5):
    return {"mean": np.float32(mean), "var": np.float32(var), "count": np.int32(count)}


TREE = {
    "plain": norm([1, -2, 3], [4, 9, 1]),
    "block": {
        "dead": norm([0, 1], [1e-5, 1.0], 6),
        "small": norm([0], [1e-4]),
        "large": norm([0], [1e6]),
        "nan": norm([np.nan, 1, 2, 3], [1, np.inf, -1, 4]),
    },
}


def test_a_row_holds_the_ranges_over_the_finite_channels_and_the_numbers_of_the_others():
    rows = {row.path: row for row in inspect.summary(TREE)}
    assert list(rows) == ["plain", "block/dead", "block/small", "block/large", "block/nan"]
    assert dataclasses.astuple(rows["plain"]) == ("plain", 3, 5, -2, 3, 1, 3, 0, 0)
    assert dataclasses.astuple(rows["block/nan"]) == ("block/nan", 4, 5, 3, 3, 2, 2, 3, 0)
    assert rows["block/dead"].dead == 1  # a variance of exactly epsilon, too
    assert rows["block/dead"].count == 6


def test_a_norm_with_no_finite_channel_has_no_ranges():
    (row,) = inspect.summary({"norm": norm([np.nan], [1])})
    assert row.nonfinite == row.channels == 1
    assert np.isnan([row.mean_min, row.mean_max, row.std_min, row.std_max]).all()


def test_the_ranges_are_those_of_scalars():
    rng = np.random.default_rng(0)
    tree = {"a": norm(rng.normal(size=7), rng.uniform(1, 2, 7))}
    (row,) = inspect.summary(tree)
    for key, value in inspect.scalars(tree).items():
        assert getattr(row, key.removeprefix("a/")) == value


def test_epsilon_decides_which_channels_are_dead():
    def dead(epsilon):
        return [row.dead for row in inspect.summary(TREE, epsilon=epsilon)]

    assert dead(0.0) == [0, 0, 0, 0, 0]
    assert dead(1e-3) == [0, 1, 1, 0, 0]
    assert dead(1) == [1, 2, 1, 0, 0]  # neither the infinite nor the negative variance
    with pytest.raises(
        ValueError, match="summary: epsilon should be a finite number of at least 0"
    ):
        inspect.summary(TREE, epsilon=-1)


def test_the_worst_norms_come_first_and_the_totals_are_those_of_all():
    found = inspect.summary(TREE, worst=3)
    assert [row.path for row in found] == ["block/nan", "block/dead", "block/large"]
    assert len(found) == 3
    assert [row.path for row in found.norms] == [row.path for row in inspect.summary(TREE)]
    *table, listed, total = str(found).splitlines()
    assert [line.split()[0] for line in table] == ["norm", "block/nan", "block/dead", "block/large"]
    assert listed == "Listed: the worst 3 of 5 norms."
    assert total == "Total: 5 norms, 11 channels, 3 not finite, 1 dead (variance <= 1e-05)."
    everything = inspect.summary(TREE, worst=99)
    assert [row.path for row in everything][3:] == ["block/small", "plain"]
    assert "Listed" not in str(everything)


@pytest.mark.parametrize("worst", [0, -1, 2.0, True])
def test_worst_is_a_positive_int(worst):
    with pytest.raises(ValueError, match="summary: worst should be a positive int"):
        inspect.summary(TREE, worst=worst)


def test_the_columns_of_the_table_are_aligned():
    tree = {f"layers/{i}": norm(np.full(10**i, 0.1**i), np.ones(10**i)) for i in range(4)}
    lines = repr(inspect.summary(tree)).splitlines()[:-1]
    assert len({len(line) for line in lines}) == 1
    edges = [{i for i in range(len(line)) if line[i : i + 2].strip() == ""} for line in lines]
    assert set.intersection(*edges)


def test_one_state_without_a_count():
    (row,) = inspect.summary({"mean": jnp.zeros(2), "var": jnp.ones(2)})
    assert (row.path, row.count, row.channels) == ("", None, 2)
    text = str(inspect.summary(jaxnorm.init_batch_stats(2)))
    assert text.splitlines()[1].startswith("norm ")
    assert "1 norm, 2 channels" in text


def test_several_counts_of_one_norm_show_the_largest():
    state = norm(np.zeros((2, 3)), np.ones((2, 3))) | {"count": np.int32([4, 7])}
    (row,) = inspect.summary(state)
    assert (row.count, row.channels) == (7, 6)


def test_numbers_in_names_are_sorted_as_numbers_only_if_jit_sorted_the_keys():
    tree = {f"norm_{i}": norm([i], [1]) for i in (0, 1, 2, 10)}
    paths = [row.path for row in inspect.summary(jax.jit(lambda tree: tree)(tree))]
    assert paths == list(tree)
    unsorted = {key: tree[key] for key in ("norm_10", "norm_2", "norm_1")}
    assert [row.path for row in inspect.summary(unsorted)] == list(unsorted)


def test_traced_values_are_an_error_that_names_the_way_out():
    message = (
        r"summary: batch_stats should hold concrete.*block/norm/mean is traced.*outside of jit"
    )
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda state: inspect.summary({"block": {"norm": state}}).rows[0].std_min)(
            jaxnorm.init_batch_stats(2)
        )
    with pytest.raises(ValueError, match="summary: batch_stats should hold running statistics"):
        inspect.summary({"params": {"Dense_0": {"kernel": np.ones(3)}}})
