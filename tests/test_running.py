"""Tests the update of running statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnorm
from jaxnorm import Moments

pytestmark = pytest.mark.usefixtures("strict")


def moments(count, mean, var, dtype=np.float32):
    return Moments(*(jnp.asarray(np.asarray(a, dtype)) for a in (count, mean, var)))


def assert_state(state, mean, var, count):
    np.testing.assert_allclose(state["mean"], mean, rtol=1e-6)  # float32 rounding
    np.testing.assert_allclose(state["var"], var, rtol=1e-6)
    assert state["count"] == count


TRAINED = {"mean": jnp.array([1.0, 2.0]), "var": jnp.array([3.0, 4.0]), "count": jnp.int32(7)}
BATCH = moments([4, 4], [5, 6], [0.75, 1.5])  # the unbiased variances are 1 and 2


def test_momentum_weighs_the_new_value_and_the_unbiased_variance():
    new = jaxnorm.update_batch_stats(TRAINED, BATCH, momentum=0.25)
    assert_state(new, [2.0, 3.0], [2.5, 3.5], 8)


def test_momentum_none_weighs_every_batch_alike_from_the_whole_count():
    new = jaxnorm.update_batch_stats(TRAINED, BATCH, momentum=None)
    assert_state(new, [12 / 8, 20 / 8], [22 / 8, 30 / 8], 8)


@pytest.mark.parametrize("momentum", [0.0, 1.0, -0.5, 2.0, 1])
def test_any_momentum_is_taken_at_its_word(momentum):
    new = jaxnorm.update_batch_stats(TRAINED, BATCH, momentum=momentum)
    assert_state(new, [1 + 4 * momentum, 2 + 4 * momentum], [3 - 2 * momentum, 4 - 2 * momentum], 8)


def test_momentum_may_be_traced():
    update = jax.jit(lambda m: jaxnorm.update_batch_stats(TRAINED, BATCH, momentum=m))
    assert_state(update(jnp.float32(0.25)), [2.0, 3.0], [2.5, 3.5], 8)


def test_rows_are_averaged_before_one_update():
    rows = moments([[4, 4], [2, 4]], [[5, 6], [7, 8]], [[0.75, 1.5], [1.5, 3.0]])
    new = jaxnorm.update_batch_stats(TRAINED, rows, momentum=1.0)
    assert_state(new, [6, 7], [(1 + 3) / 2, (2 + 4) / 2], 8)


def test_rows_of_fewer_than_two_entries_do_not_count():
    rows = moments([[4, 1], [0, 1]], [[5, 6], [0, 8]], [[0.75, 0.0], [0.0, 0.0]])
    new = jaxnorm.update_batch_stats(TRAINED, rows, momentum=1.0)
    assert_state(new, [5, 2], [1, 4], 8)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("field", ["mean", "var"])
def test_a_channel_that_is_not_finite_keeps_its_state(poison, field):
    batch = {"mean": [5.0, 6.0], "var": [0.75, 1.5]}
    batch[field][0] = poison
    new = jaxnorm.update_batch_stats(TRAINED, moments([4, 4], **batch), momentum=0.25)
    assert_state(new, [1.0, 3.0], [3.0, 3.5], 8)


def test_one_row_that_is_not_finite_keeps_the_channel():
    rows = moments([[4, 4], [4, 4]], [[5, 6], [np.nan, 8]], [[0.75, 1.5], [1.5, 1.5]])
    new = jaxnorm.update_batch_stats(TRAINED, rows, momentum=1.0)
    assert_state(new, [1, 7], [3, 2], 8)


def test_skipping_can_be_switched_off():
    batch = moments([4, 4], [np.nan, 6], [0.75, 1.5])
    new = jaxnorm.update_batch_stats(TRAINED, batch, momentum=0.25, skip_nonfinite=False)
    assert_state(new, [np.nan, 3.0], [2.5, 3.5], 8)


@pytest.mark.parametrize("skip_nonfinite", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_an_empty_batch_moves_nothing(skip_nonfinite, momentum):
    new = jaxnorm.update_batch_stats(
        TRAINED,
        moments([0, 1], [0, 9], [0, 0]),
        momentum=momentum,
        skip_nonfinite=skip_nonfinite,
    )
    assert_state(new, TRAINED["mean"], TRAINED["var"], 7)


def test_the_cumulative_average_moves_every_channel_or_none():
    # If only the finite channel were updated, the count would be wrong for the other channel.
    poisoned = moments([4, 4], [np.nan, 6], [0.75, 1.5])
    new = jaxnorm.update_batch_stats(TRAINED, poisoned, momentum=None)
    assert_state(new, TRAINED["mean"], TRAINED["var"], 7)


def test_the_cumulative_average_of_good_batches_is_theirs_alone():
    state = jaxnorm.init_batch_stats(1)
    for mean in (10.0, np.nan, 10.0, 9.7):
        batch = moments([2], [mean], [0.5])
        state = jaxnorm.update_batch_stats(state, batch, momentum=None)
    assert_state(state, [9.9], [1.0], 3)


def test_the_count_stays_at_the_largest_int32():
    full = {**TRAINED, "count": jnp.int32(2**31 - 1)}
    new = jaxnorm.update_batch_stats(full, BATCH, momentum=0.25)
    assert_state(new, [2.0, 3.0], [2.5, 3.5], 2**31 - 1)


@pytest.mark.parametrize(
    ("given", "kept"),
    [("bfloat16", "float32"), ("float16", "float32"), ("float32", "float32")],
)
def test_the_state_keeps_its_dtype_and_halves_widen(given, kept):
    state = {**TRAINED, "mean": TRAINED["mean"].astype(given), "var": TRAINED["var"].astype(given)}
    new = jaxnorm.update_batch_stats(state, BATCH, momentum=0.25)
    assert (new["mean"].dtype, new["var"].dtype, new["count"].dtype) == (kept, kept, "int32")
    assert_state(new, [2.0, 3.0], [2.5, 3.5], 8)


@pytest.mark.parametrize("state_dtype", ["float32", "float64"])
@pytest.mark.parametrize("batch_dtype", ["float32", "float64"])
def test_the_dtypes_of_state_and_batch_may_differ(x64, state_dtype, batch_dtype):
    state = {**TRAINED, **{k: TRAINED[k].astype(state_dtype) for k in ("mean", "var")}}
    batch = jax.tree.map(lambda a: a.astype(batch_dtype), BATCH)
    new = jaxnorm.update_batch_stats(state, batch, momentum=0.25)
    assert (new["mean"].dtype, new["var"].dtype) == (state_dtype, state_dtype)
    assert_state(new, [2.0, 3.0], [2.5, 3.5], 8)


def test_nothing_remembered_has_a_gradient():
    def loss(state, batch):
        new = jaxnorm.update_batch_stats({**state, "count": jnp.int32(0)}, batch, momentum=0.5)
        return jnp.sum(new["mean"] + new["var"])

    floats = {k: TRAINED[k] for k in ("mean", "var")}
    for leaf in jax.tree.leaves(jax.grad(loss, (0, 1))(floats, BATCH)):
        np.testing.assert_array_equal(leaf, 0)


def test_the_given_state_is_left_as_it_was():
    state = {k: np.array(v) for k, v in TRAINED.items()}
    new = jaxnorm.update_batch_stats(state, BATCH)
    assert new is not state
    assert_state(state, [1.0, 2.0], [3.0, 4.0], 7)


# ---- Merging states ----


def stack(*states):
    return {
        "mean": jnp.array([[s[0]] for s in states]),
        "var": jnp.array([[s[1]] for s in states]),
        "count": jnp.array([s[2] for s in states], jnp.int32),
    }


def test_merging_adds_the_variance_between_the_replicas():
    x = np.random.default_rng(0).standard_normal((2, 50)) * 0.97 + [[0.0], [4.0]]
    stacked = stack(*((row.mean(), row.var(), 1) for row in x))
    assert_state(jaxnorm.merge_batch_stats(stacked), [x.mean()], [x.var()], 2)
    averaged = jaxnorm.merge_batch_stats(stacked, between=False)
    assert_state(averaged, [x.mean()], [x.var(1).mean()], 2)


def test_each_state_s_own_count_is_its_weight():
    merged = jaxnorm.merge_batch_stats(stack((0.0, 1.0, 3), (4.0, 2.0, 1)))
    assert_state(merged, [1.0], [1.25 + 3.0], 4)
    averaged = jaxnorm.merge_batch_stats(stack((0.0, 1.0, 3), (4.0, 2.0, 1)), between=False)
    assert_state(averaged, [1.0], [1.25], 4)


def test_counts_weigh_instead_and_the_counts_still_add_up():
    merged = jaxnorm.merge_batch_stats(stack((0.0, 1.0, 3), (4.0, 2.0, 1)), jnp.array([1, 3]))
    assert_state(merged, [3.0], [1.75 + 3.0], 4)


@pytest.mark.parametrize("factor", [1e-3, 0.1, 1.0, 1e3])
def test_only_the_proportions_of_the_counts_matter(factor):
    stacked, counts = stack((0.0, 1.0, 3), (4.0, 2.0, 1)), factor * jnp.array([1.0, 3.0])
    assert_state(jaxnorm.merge_batch_stats(stacked, counts), [3.0], [1.75 + 3.0], 4)
    assert_state(jaxnorm.merge_batch_stats(stacked, counts, between=False), [3.0], [1.75], 4)


def test_a_state_that_weighs_nothing_is_left_out_be_it_nan():
    merged = jaxnorm.merge_batch_stats(stack((np.nan, np.nan, 0), (4.0, 2.0, 3)))
    assert_state(merged, [4.0], [2.0], 3)


def test_states_that_all_weigh_nothing_weigh_the_same():
    merged = jaxnorm.merge_batch_stats(stack((0.0, 1.0, 0), (0.0, 1.0, 0)))
    assert_state(merged, [0.0], [1.0], 0)


def test_equal_states_merge_to_the_same_mean_and_variance():
    # Far from 0, a mean that was summed would be rounded, and its error squared would add to var.
    merged = jaxnorm.merge_batch_stats(stack(*[(1234567.0, 0.25, 1)] * 7))
    assert merged["mean"] == 1234567
    assert_state(merged, [1234567], [0.25], 7)


def test_a_merged_count_stays_at_the_largest_int32():
    merged = jaxnorm.merge_batch_stats(stack(*[(1.0, 2.0, 2**30)] * 3))
    assert_state(merged, [1.0], [2.0], 2**31 - 1)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"count": jnp.zeros((), jnp.int32)}, r"batch_stats\['count'\] should have shape \(2,\)"),
        ({"var": jnp.ones((2, 2))}, r"batch_stats\['var'\] should have shape \(2, 1\)"),
        ({"mean": jnp.ones(())}, r"batch_stats\['mean'\] should have a leading axis"),
        ({"mean": None}, "batch_stats should have the keys"),
    ],
)
def test_states_that_do_not_stack_are_refused(bad, message):
    stacked = stack((0.0, 1.0, 3), (4.0, 2.0, 1))
    with pytest.raises(ValueError, match=message):
        jaxnorm.merge_batch_stats({**stacked, **bad})


def test_counts_are_one_for_each_state():
    with pytest.raises(ValueError, match=r"counts should have shape \(2,\), one for each state"):
        jaxnorm.merge_batch_stats(stack((0.0, 1.0, 3), (4.0, 2.0, 1)), jnp.ones(3))
