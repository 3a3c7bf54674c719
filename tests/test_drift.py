"""Tests that the rounding error of running statistics does not grow with the number of steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.signal import lfilter

import jaxnorm
import jaxnorm.linen
from jaxnorm import Moments

CHANNELS = 8
MOST = 1_000_000  # different batches; longer runs repeat them
STEPS = [100_000, *(pytest.param(10**k, marks=pytest.mark.slow) for k in (6, 7))]
MEANS = [300.0, 1e4, 1e6]


def batches(mean, noise, steps):
    """Returns the means and biased variances of batches with a standard deviation of about 1."""
    rng, shape = np.random.default_rng(7), (min(steps, MOST), CHANNELS)
    means = (mean + 0.123 + noise * rng.normal(size=shape)).astype(np.float32)
    variances = (1 + noise * rng.normal(size=shape)).astype(np.float32)
    return means, variances


@functools.partial(jax.jit, static_argnames=("steps", "momentum"))
def run(means, variances, steps, momentum):
    """Returns the state after this number of updates."""

    def step(state, i):
        count = jnp.full(CHANNELS, 1e9, jnp.float32)  # the unbiased and biased variance are equal
        batch = Moments(count, means[i % len(means)], variances[i % len(means)])
        return jaxnorm.update_batch_stats(state, batch, momentum=momentum), None

    return jax.lax.scan(step, jaxnorm.init_batch_stats(CHANNELS), jnp.arange(steps))[0]


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.2])  # as for batches of 10,000 and of 25 entries
@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("steps", STEPS)
def test_the_cumulative_average_does_not_drift(mean, steps, noise):
    means, variances = batches(mean, noise, steps)
    state = run(means, variances, steps, None)
    spacing = np.spacing(np.float32(mean))
    # The average stops changing when a batch would change it by less than half the spacing, which
    # is after 2 noise / spacing batches. The average of these has an error of noise / sqrt(number).
    # The bound is four times that, for the worst channel and for batches that deviate more.
    stalled = 4 * np.sqrt(noise * spacing / 2)
    bound = max(1e-4, 2 * spacing) + stalled
    # After whole rounds through the batches, the float64 recursion is the mean, up to rounding.
    np.testing.assert_allclose(state["mean"], means.mean(0, np.float64), rtol=0, atol=bound)
    bound = 2e-7 + 4 * np.sqrt(noise * np.spacing(np.float32(1)) / 2)
    np.testing.assert_allclose(state["var"], variances.mean(0, np.float64), rtol=0, atol=bound)
    assert state["count"] == steps


@pytest.mark.parametrize("momentum", [0.1, 1e-3])
@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("steps", STEPS)
def test_a_fixed_momentum_stalls_within_a_spacing_over_the_momentum(mean, steps, momentum):
    means, variances = batches(mean, 0.01, steps)
    state = run(means, variances, steps, momentum)
    # A batch 30 / momentum steps ago only has the weight exp(-30).
    last = np.arange(max(0, steps - int(30 / momentum)), steps) % len(means)
    exact = lfilter([momentum], [1, momentum - 1], means[last].astype(np.float64), axis=0)[-1]
    bound = np.spacing(np.float32(mean)) / momentum
    np.testing.assert_allclose(state["mean"], exact, rtol=0, atol=bound)


@pytest.mark.parametrize("mean", MEANS)
def test_micro_batches_merge_without_drift(mean):
    means, variances = batches(mean, 0.0, 1)

    @jax.jit
    def many(state):
        def step(state, i):
            count = jnp.full(CHANNELS, 64.0)
            batch = Moments(count, jnp.asarray(means[0]), jnp.asarray(variances[0]))
            return jaxnorm.update_batch_stats(state, batch, momentum=1.0), None

        return jax.lax.scan(step, jaxnorm.begin_accumulation(state), jnp.arange(100_000))[0]

    state = jaxnorm.end_accumulation(many(jaxnorm.init_batch_stats(CHANNELS)))
    # All means are equal, and so is their average; the variance is that of 6.4 million entries.
    np.testing.assert_array_equal(state["mean"], means[0])
    np.testing.assert_allclose(state["var"], variances[0], rtol=3e-7)
    assert state["count"] == 1


def test_merging_moments_over_and_over_does_not_drift():
    rng = np.random.default_rng(3)
    means = rng.normal(300, 0.01, (100_000, CHANNELS)).astype(np.float32)

    @jax.jit
    def many():
        def step(total, i):
            batch = Moments(*(jnp.full(CHANNELS, n) for n in (64.0, 0.0, 1.0)))
            batch = Moments(batch.count, jnp.asarray(means)[i], batch.var)
            return jaxnorm.merge_moments(total, batch), None

        empty = Moments(*(jnp.zeros(CHANNELS) for _ in range(3)))
        return jax.lax.scan(step, empty, jnp.arange(100_000))[0]

    total = many()
    spacing = np.spacing(np.float32(300))
    stalled = 4 * np.sqrt(0.01 * spacing / 2)  # as for the cumulative average
    np.testing.assert_allclose(total.mean, means.mean(0, np.float64), rtol=0, atol=stalled)
    # The variance is 1 within the batches and 1e-4 between them; of the latter, small squares are
    # below the spacing.
    np.testing.assert_allclose(total.var, 1 + means.var(0, dtype=np.float64), rtol=1e-4)


def test_a_layer_in_evaluation_after_many_steps_is_exact():
    x = (300 + np.random.default_rng(5).normal(size=(512, CHANNELS))).astype(np.float32)
    layer = jaxnorm.linen.BatchNorm(momentum=None, use_running_average=False)
    variables = layer.init(jax.random.key(0), x)

    @jax.jit
    def many(batch_stats):
        def step(batch_stats, _):
            given = {**variables, "batch_stats": batch_stats}
            _, updates = layer.apply(given, x, mutable=["batch_stats"])
            return updates["batch_stats"], None

        return jax.lax.scan(step, batch_stats, jnp.arange(20_000))[0]

    state = many(variables["batch_stats"])
    wide = x.astype(np.float64)
    spacing = np.spacing(np.float32(300))
    np.testing.assert_allclose(state["mean"], wide.mean(0), rtol=0, atol=2 * spacing)
    np.testing.assert_allclose(state["var"], wide.var(0, ddof=1), rtol=1e-6)
