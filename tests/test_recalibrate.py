"""Tests that recalibrated statistics equal those of all data as one batch."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxnorm
import jaxnorm.linen
import jaxnorm.nnx

RNG = np.random.default_rng(0)
X = RNG.normal(300, 2, (12, 5, 3)).astype(np.float32)
X[6:] += 3
UNEVEN = np.split(X, [1, 4])  # 1, 3 and 8 samples
# The mean of a batch is rounded to float32, by up to 1.5e-5 at 300; the variances are about 6.
CLOSE = {"rtol": 1e-5}


def batch_step(batch_stats, x):
    return jaxnorm.batch_norm(x, None, batch_stats)[1]


def instance_step(batch_stats, x):
    return jaxnorm.instance_norm(x, None, batch_stats)[1]


@pytest.mark.parametrize("offset", [0, 1e4])
def test_batch_norm_gets_the_moments_of_every_entry(offset):
    batches = [x + np.float32(offset) for x in UNEVEN]
    new = jaxnorm.recalibrate(batch_step, jaxnorm.init_batch_stats(3), batches)
    entries = np.concatenate(batches).astype(np.float64).reshape(-1, 3)
    np.testing.assert_allclose(new["mean"], entries.mean(0), rtol=1e-6)
    # At 1e4, a mean has an error of up to 5e-4, and its distance to the others is about 3.
    np.testing.assert_allclose(
        new["var"], entries.var(0, ddof=1), rtol=1e-5 if offset == 0 else 1e-3
    )
    assert new["count"] == 3


def test_instance_norm_gets_the_average_over_all_samples():
    new = jaxnorm.recalibrate(instance_step, jaxnorm.init_batch_stats(3), UNEVEN)
    np.testing.assert_allclose(new["mean"], X.mean((0, 1), dtype=np.float64), rtol=1e-6)
    expected = X.astype(np.float64).var(1, ddof=1).mean(0)
    np.testing.assert_allclose(new["var"], expected, **CLOSE)


def test_masks_weigh_the_entries_that_count():
    mask = RNG.random(X.shape) < 0.5

    def step(batch_stats, batch):
        x, mask = batch
        return jaxnorm.batch_norm(x, None, batch_stats, mask=mask)[1]

    batches = list(zip(UNEVEN, np.split(mask, [1, 4]), strict=True))
    new = jaxnorm.recalibrate(step, jaxnorm.init_batch_stats(3), batches)
    for c in range(3):
        entries = X[..., c][mask[..., c]].astype(np.float64)
        np.testing.assert_allclose(new["var"][c], entries.var(ddof=1), **CLOSE)


@pytest.mark.parametrize("bad", [np.nan, 7.0])
def test_what_the_state_was_does_not_matter(bad):
    state = {"mean": jnp.full(3, bad), "var": jnp.full(3, bad), "count": jnp.int32(2**31 - 1)}
    found = jaxnorm.recalibrate(batch_step, state, UNEVEN)
    expected = jaxnorm.recalibrate(batch_step, jaxnorm.init_batch_stats(3), UNEVEN)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_states_keep_their_dtypes_and_halves_widen(x64):
    for given, kept in (("bfloat16", "float32"), ("float64", "float64")):
        state = {key: jnp.ones(3, given) for key in ("mean", "var")} | {"count": jnp.int32(1)}
        new = jaxnorm.recalibrate(batch_step, state, UNEVEN)
        assert (new["mean"].dtype, new["var"].dtype, new["count"].dtype) == (kept, kept, "int32")


def test_progress_is_told_after_each_batch():
    seen = []
    batches = (seen.append("batch") or x for x in UNEVEN)
    jaxnorm.recalibrate(batch_step, jaxnorm.init_batch_stats(3), batches, progress=seen.append)
    assert seen == ["batch", 1, "batch", 2, "batch", 3]


def test_further_arguments_go_to_step_and_batches_of_one_size_share_one_program():
    traced = []

    def step(batch_stats, x, factor):
        traced.append(x.shape)
        return jaxnorm.batch_norm(factor * x, None, batch_stats)[1]

    new = jaxnorm.recalibrate(step, jaxnorm.init_batch_stats(3), np.split(X, 4), jnp.float32(2.0))
    np.testing.assert_allclose(new["mean"], 2 * X.mean((0, 1)), rtol=1e-6)
    assert traced == [(3, 5, 3)]


# ---- Errors, which do not change the input state ----


def one_nan(x):
    x = x.copy()
    x[0, 0, 1] = np.nan
    return x


@pytest.mark.parametrize(
    ("step", "batches", "message"),
    [
        (batch_step, [], "batches should hold at least one batch, but are empty"),
        (batch_step, [X, one_nan(X)], r"batch 2 \(counted from 1\) makes \['a'\] not finite"),
        (
            lambda s, x: s,
            [X],
            r"should update every channel of every state, but did not update \['a'\]",
        ),
        (lambda s, x: batch_step(s["a"], x), [X], "step should return the new batch_stats"),
        (lambda s, x: None, [X], "step should return the new batch_stats"),
    ],
    ids=["empty", "not finite", "evaluation", "another tree", "nothing"],
)
def test_what_cannot_be_is_an_error_and_the_state_stays(step, batches, message):
    tree = {"a": {key: np.array(v) for key, v in jaxnorm.init_batch_stats(3).items()}}
    before = jax.tree.map(np.copy, tree)
    if step is batch_step:
        step = lambda s, x: {"a": batch_step(s["a"], x)}  # noqa: E731
    with pytest.raises(ValueError, match=message):
        jaxnorm.recalibrate(step, tree, batches)
    jax.tree.map(np.testing.assert_array_equal, tree, before)


def test_a_channel_that_is_never_seen_is_an_error():
    mask = np.ones((1, 1, 3), bool)
    mask[..., 2] = False

    def step(batch_stats, x):
        return jaxnorm.batch_norm(x, None, batch_stats, mask=mask)[1]

    with pytest.raises(ValueError, match="did not update the state; run"):
        jaxnorm.recalibrate(step, jaxnorm.init_batch_stats(3), UNEVEN)


def test_no_state_is_an_error():
    with pytest.raises(ValueError, match=r"recalibrate: batch_stats should .* holds none"):
        jaxnorm.recalibrate(batch_step, {"params": {}}, UNEVEN)


# ---- Models ----


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = jaxnorm.linen.BatchNorm(use_running_average=not train)(x)
        x = nn.Dense(4)(nn.Dropout(0.5, deterministic=True)(x))
        return jaxnorm.linen.InstanceNorm(use_running_average=not train, track_running_stats=True)(
            x
        )


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.bn = jaxnorm.nnx.BatchNorm(3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.dense = nnx.Linear(3, 4, rngs=rngs)
        self.norm = jaxnorm.nnx.InstanceNorm(4, track_running_stats=True, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.dense(self.dropout(self.bn(x))))


def assert_recalibrated(first, second, hidden):
    """Checks that the statistics of both norms are those of their inputs."""
    np.testing.assert_allclose(first["mean"], X.mean((0, 1)), rtol=1e-6)
    np.testing.assert_allclose(first["var"], X.reshape(-1, 3).astype(float).var(0, ddof=1), **CLOSE)
    rows = np.concatenate([np.asarray(h, np.float64) for h in hidden])
    # The hidden values are about 1, and rounded differently in the compiled program.
    np.testing.assert_allclose(second["mean"], rows.mean((0, 1)), atol=1e-5)
    np.testing.assert_allclose(second["var"], rows.var(1, ddof=1).mean(0), rtol=1e-4)
    assert first["count"] == second["count"] == 3


def test_a_linen_model_is_recalibrated():
    model = Linen()
    variables = model.init(jax.random.key(0), X, train=False)
    before = jax.tree.map(np.array, variables)
    new = jaxnorm.linen.recalibrate(model, variables, UNEVEN, train=True)
    jax.tree.map(np.testing.assert_array_equal, variables, before)
    jax.tree.map(np.testing.assert_array_equal, new["params"], before["params"])
    kernel, bias = (new["params"]["Dense_0"][name] for name in ("kernel", "bias"))
    hidden = [jaxnorm.batch_norm(x)[0] @ kernel + bias for x in UNEVEN]
    stats = new["batch_stats"]
    assert_recalibrated(stats["BatchNorm_0"], stats["InstanceNorm_0"], hidden)
    with pytest.raises(
        ValueError, match="step should update every channel of every state, but did not"
    ):
        jaxnorm.linen.recalibrate(model, variables, UNEVEN, train=False)
    with pytest.raises(ValueError, match="holds none"):
        jaxnorm.linen.recalibrate(model, {"params": variables["params"]}, UNEVEN, train=True)


def test_an_nnx_model_is_recalibrated_in_its_mode():
    model = Nnx(nnx.Rngs(0))
    model.eval()
    jaxnorm.nnx.begin_accumulation(model)
    jaxnorm.nnx.recalibrate(model, UNEVEN)
    hidden = [model.dense(jaxnorm.batch_norm(x)[0]) for x in UNEVEN]
    first, second = (
        {key: getattr(layer, key)[...] for key in ("mean", "var", "count")}
        for layer in (model.bn, model.norm)
    )
    assert_recalibrated(first, second, hidden)
    assert model.bn.use_running_average
    assert model.bn.accumulation is None


def test_an_nnx_model_stays_as_it_was_where_that_fails():
    model = Nnx(nnx.Rngs(0))
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))
    for batches, message in (([], "empty"), ([X, one_nan(X)], r"\['bn'\], \['norm'\] not finite")):
        with pytest.raises(ValueError, match=message):
            jaxnorm.nnx.recalibrate(model, batches)
    after = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    jax.tree.map(np.testing.assert_array_equal, after, before)
