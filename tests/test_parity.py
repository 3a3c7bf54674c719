"""PyTorch beside jaxnorm's pure functions and float64 NumPy, which is the reference of record.

jaxnorm's channels are last here, and PyTorch's second, unless a test is about the layout.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cases import SHAPES, SMALL, first_state, later_state, normal, reference_norm, some_params
from torch.utils.checkpoint import checkpoint

import jaxnorm

pytestmark = pytest.mark.usefixtures("x64")

STATIC = ("use_running_average", "skip_nonfinite", "channel_axis", "batch_axis")
NORMS = {
    "batch": jax.jit(jaxnorm.batch_norm, static_argnames=STATIC[:-1]),
    "instance": jax.jit(jaxnorm.instance_norm, static_argnames=STATIC),
}
STATE = {"mean": "running_mean", "var": "running_var", "count": "num_batches_tracked"}

each_norm = pytest.mark.parametrize("norm", NORMS)
each_space = pytest.mark.parametrize("space", SHAPES)


def assert_close(found, wanted):
    """Equal but for the last bits, leaf by leaf.

    rtol: both sum in float64, in another order. atol: an entry near zero is a difference of terms
    of order 1 to 10, whose own rounding, up to some 1e-14, it inherits.
    """
    close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-13)
    jax.tree.map(close, found, wanted)


# ---- one norm, three systems ----


def module_for(norm, space, channels, **options):
    """torch.nn.BatchNorm1d and its kin, in float64, tracking unless told otherwise."""
    make = getattr(torch.nn, f"{norm.capitalize()}Norm{max(space, 1)}d")
    options = {"affine": False, "track_running_stats": True, "dtype": torch.float64, **options}
    return make(channels, **options)


def state_of(module):
    """The module's running statistics, as jaxnorm's dict of NumPy arrays."""
    if module.running_mean is None:
        return None
    return {key: getattr(module, name).numpy().copy() for key, name in STATE.items()}


def channels_second(x):
    return torch.from_numpy(np.moveaxis(np.array(x), -1, 1).copy())


def channels_last(x):
    return np.moveaxis(x.detach().numpy(), 1, -1)


def run_torch(norm, batches, momenta):
    module, results = module_for(norm, batches[0].ndim - 2, batches[0].shape[-1]), []
    for x, module.momentum in zip(batches, momenta, strict=True):
        results.append((channels_last(module(channels_second(x))), state_of(module)))
    return results


def run_in_turn(step, batches, momenta):
    state, results = first_state(batches[0].shape[-1]), []
    for x, momentum in zip(batches, momenta, strict=True):
        y, state = step(x, batch_stats=state, momentum=momentum)
        results.append((y, state))
    return results


def run_numpy(norm, batches, momenta):
    step = functools.partial(reference_norm, instance=norm == "instance")
    return run_in_turn(step, batches, momenta)


def run_jaxnorm(norm, batches, momenta):
    return run_in_turn(NORMS[norm], batches, momenta)


SYSTEMS = {"jaxnorm": run_jaxnorm, "torch": run_torch, "numpy": run_numpy}
each_system = pytest.mark.parametrize("run", SYSTEMS.values(), ids=SYSTEMS)
ours = pytest.mark.parametrize("run", [run_jaxnorm, run_numpy], ids=["jaxnorm", "numpy"])


def means_and_vars(results):
    return [(state["mean"], state["var"]) for _, state in results]


@each_system
def test_batch_norm_divides_by_the_biased_and_remembers_the_unbiased_variance(run):
    ((y, state),) = run("batch", [SMALL], [0.1])
    assert_close(y, (SMALL - [4.5, 2.0]) / np.sqrt([47.5 / 6 + 1e-5, 26 / 6 + 1e-5]))
    assert_close([state["mean"], state["var"]], [np.array([0.45, 0.2]), np.array([1.85, 1.42])])
    assert state["count"] == 1  # batches, not samples


@each_system
def test_instance_norm_remembers_the_mean_over_samples_without_the_variance_between_them(run):
    ((y, state),) = run("instance", [SMALL], [0.1])
    means, variances = [[[2, 2]], [[7, 2]]], np.array([[[2 / 3, 8]], [[8 / 3, 2 / 3]]])
    assert_close(y, (SMALL - means) / np.sqrt(variances + 1e-5))
    assert_close([state["mean"], state["var"]], [np.array([0.45, 0.2]), np.array([1.15, 1.55])])


@each_system
def test_momentum_none_weighs_all_batches_alike(run):
    results = run("batch", [SMALL, 2 * SMALL + 1, 3 * SMALL + 2], [None] * 3)
    wanted = [[4.5, 2, 9.5, 5.2], [7.25, 3.5, 23.75, 13], [10, 5, 133 / 3, 364 / 15]]
    assert_close(np.reshape(means_and_vars(results), (3, 4)), np.array(wanted))


@each_system
@pytest.mark.parametrize(("steps", "momentum"), [(4, 0.1), (9, 0.3)])
def test_a_switch_to_momentum_none_midway_uses_the_whole_count(run, steps, momentum):
    results = run("batch", [SMALL] * steps + [2 * SMALL + 1], [momentum] * steps + [None])
    before, after = (np.array(pair) for pair in means_and_vars(results)[-2:])
    batch = np.array([[10, 5], [38, 20.8]])  # means and unbiased variances of the last
    assert_close(after, before + (batch - before) / (steps + 1))


@each_norm
@each_space
def test_an_entry_that_is_masked_out_might_as_well_not_be_there(norm, space):
    x, keep = normal(SHAPES[space]), np.random.default_rng(1).random(SHAPES[space][:-1]) < 0.6
    state, channels = first_state(x.shape[-1]), x.shape[-1]
    y, new = NORMS[norm](x, batch_stats=state, mask=keep[..., None])
    reference = reference_norm(
        x, batch_stats=state, instance=norm == "instance", mask=keep[..., None]
    )
    assert_close((y, new), reference)
    # PyTorch has no masks: it is given the entries that count, in turn those of each sample.
    samples = [(x, keep)] if norm == "batch" else zip(x, keep, strict=True)
    parts = [run_torch("batch", [x[keep]], [0.1])[0] for x, keep in samples]
    assert_close(y[keep], np.concatenate([y for y, _ in parts]))
    moments = np.mean(means_and_vars(parts), axis=0).reshape(2, channels)
    assert_close([new["mean"], new["var"]], list(moments))
    np.testing.assert_array_equal(y[~keep], 0)


# ---- which norm is which ----


@each_space
def test_instance_norm_is_batch_norm_vmapped_over_the_samples_with_averaged_states(space):
    x, params, state = normal(SHAPES[space]), some_params(), later_state()
    each = jax.vmap(lambda x: jaxnorm.batch_norm(x, params, state))(x)
    y, new = jaxnorm.instance_norm(x, params, state)
    assert_close((y, new), (each[0], jax.tree.map(lambda a: jnp.mean(a, axis=0), each[1])))


@each_space
def test_group_norm_of_one_channel_a_group_is_instance_norm(space):
    x, params = normal(SHAPES[space]), some_params()
    weight, bias = (torch.from_numpy(params[name]) for name in ("scale", "bias"))
    wanted = torch.nn.functional.group_norm(channels_second(x), x.shape[-1], weight, bias)
    assert_close(jaxnorm.instance_norm(x, params)[0], channels_last(wanted))


def test_group_norm_of_one_group_is_instance_norm_of_a_sample_as_one_channel():
    x = normal(SHAPES[2])
    wanted = torch.nn.functional.group_norm(channels_second(x), 1)
    y, _ = jaxnorm.instance_norm(x.reshape(len(x), -1, 1))
    assert_close(y.reshape(x.shape), channels_last(wanted))


def test_instance_norm_in_evaluation_is_batch_norm_in_evaluation():
    arguments = normal(SHAPES[2]), some_params(), later_state()
    y, same = jaxnorm.instance_norm(*arguments, use_running_average=True)
    assert_close(y, jaxnorm.batch_norm(*arguments, use_running_average=True)[0])
    assert_close(y, reference_norm(*arguments, use_running_average=True)[0])
    assert_close(same, arguments[-1])


@each_norm
def test_tracking_does_not_change_the_output_of_training(norm):
    x = normal(SHAPES[2])
    tracked, untracked = NORMS[norm](x, batch_stats=later_state()), NORMS[norm](x)
    np.testing.assert_array_equal(tracked[0], untracked[0])
    assert untracked[1] is None


@each_space
def test_an_unbatched_input_is_one_sample(space):
    x = normal(SHAPES[space][1:])
    y, new = jaxnorm.instance_norm(x, batch_stats=first_state(3), batch_axis=None)
    module = module_for("instance", space, 3)
    wanted = module(torch.from_numpy(np.moveaxis(x, -1, 0).copy()))
    assert_close(y, np.moveaxis(wanted.numpy(), 0, -1))
    assert_close(new, {**state_of(module), "count": 1})


# ---- too few values ----


@pytest.mark.parametrize(
    ("norm", "shape", "text"),
    [
        ("batch", (1, 3), "Expected more than 1 value per channel when training, got input size"),
        ("batch", (1, 1, 1, 3), "Expected more than 1 value per channel when training"),
        ("instance", (4, 1, 3), "Expected more than 1 spatial element when training, got input"),
        ("instance", (4, 1, 1, 3), "Expected more than 1 spatial element when training"),
    ],
)
def test_one_value_is_refused_in_pytorchs_words_except_in_evaluation(norm, shape, text):
    x, state, module = np.ones(shape), later_state(), module_for(norm, len(shape) - 2, 3)
    with pytest.raises(ValueError, match=text):
        module(channels_second(x))
    with pytest.raises(ValueError, match=text):
        NORMS[norm](x, batch_stats=state)
    wanted = reference_norm(x, None, state, use_running_average=True)[0]
    assert_close(NORMS[norm](x, batch_stats=state, use_running_average=True)[0], wanted)


@pytest.mark.parametrize(
    ("norm", "shape"),
    [("batch", (0, 3)), ("batch", (4, 0, 3)), ("instance", (0, 7, 3)), ("instance", (4, 0, 3))],
)
@each_system
def test_no_values_at_all_are_not_refused(run, norm, shape):
    assert run(norm, [np.zeros(shape)], [0.1])[0][0].shape == shape


# ---- gradients and dtypes ----


@each_norm
@pytest.mark.parametrize("evaluating", [True, False])
def test_running_statistics_carry_no_gradient(norm, evaluating):
    def total(floats, x):
        state = {**floats, "count": jnp.int32(5)}
        y, new = NORMS[norm](x, None, state, use_running_average=evaluating)
        return jnp.sum(y**3), jnp.sum(new["mean"] + new["var"])

    x, state = normal(SHAPES[2]), later_state()
    floats = {key: state[key] for key in ("mean", "var")}
    of_floats, of_x = jax.jacobian(total, (0, 1))(floats, x)[0]
    np.testing.assert_array_equal([of_floats["mean"], of_floats["var"]], 0)
    assert np.abs(of_x).max() > 1e-3
    if not evaluating:  # then the state is a new one
        for leaf in jax.tree.leaves(jax.jacobian(total, (0, 1))(floats, x)[1]):
            np.testing.assert_array_equal(leaf, 0)


@each_norm
@pytest.mark.parametrize(("dtype", "bits"), [("float16", 11), ("bfloat16", 8)])
def test_half_precision_input_keeps_float32_statistics_and_half_precision_output(norm, dtype, bits):
    x = jnp.asarray(normal(SHAPES[2]), dtype)
    y, new = NORMS[norm](x, batch_stats=jaxnorm.init_batch_stats(3))
    module = module_for(norm, 2, 3, affine=True, dtype=torch.float32)
    torch_y = module(channels_second(x.astype("float64")).to(getattr(torch, dtype)))
    assert (y.dtype, str(torch_y.dtype)) == (dtype, f"torch.{dtype}")
    # affine, because without it PyTorch's instance norm has statistics of half precision.
    for key in ("mean", "var"):
        assert new[key].dtype == state_of(module)[key].dtype == "float32"
        np.testing.assert_allclose(new[key], state_of(module)[key], rtol=1e-6)  # float32's rounding
    # PyTorch's y is off by several units in the last place, NumPy's is the reference: ours is one
    # rounding away from it, half a unit, but for float32's errors beneath.
    wanted, _ = reference_norm(x, instance=norm == "instance")
    np.testing.assert_allclose(y.astype("float64"), wanted, rtol=1.01 * 2.0**-bits, atol=1e-6)


# ---- where jaxnorm decides otherwise, on purpose: a test for each row of that table ----


def test_instance_norm_the_count_goes_up_as_for_batch_norm():
    results = {name: run("instance", [SMALL] * 3, [0.1] * 3) for name, run in SYSTEMS.items()}
    counts = {name: result[-1][1]["count"] for name, result in results.items()}
    assert counts == {"jaxnorm": 3, "numpy": 3, "torch": 0}


def test_instance_norm_momentum_none_is_the_true_cumulative_average():
    batches = [SMALL, 2 * SMALL + 1, 3 * SMALL + 2]
    for run in (run_jaxnorm, run_numpy):
        state = run("instance", batches, [None] * 3)[-1][1]
        assert_close(state["mean"], np.array([10.0, 5.0]))
        assert_close(state["var"], np.array([2.5, 6.5]) * (1 + 4 + 9) / 3)
    state = run_torch("instance", batches, [None] * 3)[-1][1]
    assert (state["mean"].tolist(), state["var"].tolist()) == ([0, 0], [1, 1])


@ours
@pytest.mark.parametrize("momentum", [0.1, None])
def test_instance_norm_empty_batch_in_training_leaves_the_state(run, momentum):
    empty = [np.zeros((0, 7, 3))]
    assert_close(run("instance", empty, [momentum])[0][1], first_state(3))
    assert np.isnan(run_torch("instance", empty, [0.1])[0][1]["mean"]).all()


@each_norm
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize(
    ("shape", "mask"),
    [((0, 7, 3), None), ((4, 0, 3), None), ((4, 7, 3), np.zeros((1, 1, 1), bool))],
    ids=["no samples", "no space", "masked"],
)
def test_empty_or_fully_masked_batch_leaves_the_state_and_its_count(norm, momentum, shape, mask):
    x, state, options = normal(shape), later_state(), {"momentum": momentum, "mask": mask}
    y, new = NORMS[norm](x, batch_stats=state, **options)
    assert_close(new, state)
    np.testing.assert_array_equal(y, np.zeros(shape))
    assert_close((y, new), reference_norm(x, None, state, instance=norm == "instance", **options))
    ((_, torch_state),) = run_torch("batch", [np.zeros((0, 7, 3))], [0.1])
    assert_close(torch_state, {**first_state(3), "count": 1})


@each_norm
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize("evaluating", [True, False])
def test_wrong_channel_count_is_a_value_error_that_names_both(norm, affine, tracked, evaluating):
    x, evaluating = normal(SHAPES[2]), evaluating and tracked
    params, state = some_params(4) if affine else None, later_state(4) if tracked else None
    if affine or tracked:
        with pytest.raises(ValueError, match=r"shape \(3,\).*shape \(4,\)"):
            NORMS[norm](x, params, state, use_running_average=evaluating)
    # PyTorch: an error of one kind or another, a warning, or nothing.
    module = module_for(norm, 2, 4, affine=affine, track_running_stats=tracked)
    if norm == "batch" and not affine and not tracked:
        module(channels_second(x))
    else:
        with pytest.raises((ValueError, RuntimeError, UserWarning), match=r"features|elements"):
            module(channels_second(x))


@each_norm
def test_half_precision_running_statistics_are_widened_and_do_not_stall(norm):
    x = jnp.full((4, 5, 1), 1.005, "bfloat16")
    module = module_for(norm, 1, 1, momentum=0.01, dtype=torch.bfloat16)
    state = {**first_state(1), "mean": jnp.zeros(1, "bfloat16"), "var": jnp.ones(1, "bfloat16")}
    for _ in range(500):
        module(torch.full((4, 1, 5), 1.005, dtype=torch.bfloat16))
        _, state = NORMS[norm](x, batch_stats=state, momentum=0.01)
    assert module.running_mean.item() == pytest.approx(0.836, abs=1e-3)
    assert state["mean"].dtype == state["var"].dtype == "float32"
    rest = 0.99**500
    rtol = 500 * 2.0**-23  # 500 steps of float32
    np.testing.assert_allclose(state["mean"], (1 - rest) * x[0, 0].astype("float32"), rtol=rtol)
    np.testing.assert_allclose(state["var"], rest, rtol=rtol)


@each_norm
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_a_nan_or_inf_in_a_batch_skips_that_channel_by_default(norm, poison):
    x, good = normal(SHAPES[1], seed=1), normal(SHAPES[1], seed=2)
    x[1, 2, 0] = poison
    ((_, clean),) = run_numpy(norm, [np.nan_to_num(x, posinf=0, neginf=0)], [0.1])
    y, state = NORMS[norm](x, batch_stats=first_state(3))
    assert state["count"] == 1
    assert_close(state["mean"], np.array([0.0, *clean["mean"][1:]]))
    assert_close(state["var"], np.array([1.0, *clean["var"][1:]]))
    _, cumulative = NORMS[norm](x, batch_stats=first_state(3), momentum=None)
    assert_close(cumulative, first_state(3))  # the one count cannot weigh channels differently
    _, unprotected = NORMS[norm](x, batch_stats=first_state(3), skip_nonfinite=False)
    theirs = run_torch(norm, [x, good], [0.1, 0.1])
    for key in ("mean", "var"):
        np.testing.assert_array_equal(np.isfinite(theirs[-1][1][key]), [False, True, True])
        np.testing.assert_array_equal(np.isfinite(unprotected[key]), [False, True, True])
        assert_close(unprotected[key][1:], theirs[0][1][key][1:])
    np.testing.assert_array_equal(np.isnan(y), np.isnan(theirs[0][0]))  # only the state is saved


@each_norm
def test_one_value_per_channel_only_known_at_run_time_gives_the_bias_and_no_update(norm):
    x, params, state = normal(SHAPES[1]), some_params(), later_state()
    mask = np.zeros((4, 7, 1), bool)
    mask[0, 3] = True
    y, new = jax.jit(lambda mask: NORMS[norm](x, params, state, mask=mask))(mask)
    assert_close(new, state)
    np.testing.assert_array_equal(y, np.where(mask, params["bias"], 0))


@each_norm
def test_activation_checkpointing_moves_the_state_once(norm):
    x, state = normal(SHAPES[1]), later_state()

    def loss(x):
        y, new = NORMS[norm](x, batch_stats=state)
        return jnp.sum(y**3), new

    gradient, new = jax.jit(jax.grad(jax.checkpoint(loss), has_aux=True))(x)
    assert_close((gradient, new), jax.grad(loss, has_aux=True)(x))
    assert new["count"] == state["count"] + 1
    module = module_for("batch", 1, 3)
    checkpoint(module, channels_second(x).requires_grad_(), use_reentrant=False).sum().backward()
    assert module.num_batches_tracked == 2


# ---- fifty steps of training, then evaluation ----

STEPS, RATE = 50, 0.01


@functools.partial(jax.jit, static_argnames=("norm", "channel_axis"))
def train_jaxnorm(norm, channel_axis, params, state, momentum, xs, dys):
    """Trains on all batches but the last, and evaluates on that; results stacked by step."""

    def step(params, state, x, dy, **options):
        def apply(params, x):
            return NORMS[norm](x, params, state, channel_axis=channel_axis, **options)

        y, pull, state = jax.vjp(apply, params, x, has_aux=True)
        of_params, of_x = pull(dy)
        params = jax.tree.map(lambda p, g: p - RATE * g, params, of_params)
        return (params, state), {"y": y, "x": of_x, "params": of_params, "state": state}

    carry, training = jax.lax.scan(
        lambda carry, batch: step(*carry, *batch, momentum=momentum),
        (params, state),
        (xs[:-1], dys[:-1]),
    )
    _, evaluation = step(*carry, xs[-1], dys[-1], use_running_average=state is not None)
    return training, evaluation


def train_torch(module, xs, dys, states=None):
    """The same, a list of results. Given states take the place of the module's own."""
    results = []
    for k, (x, dy) in enumerate(zip(xs, dys, strict=True)):
        module.train(k < STEPS)
        x_ = torch.from_numpy(x).requires_grad_()
        y = module(x_)
        y.backward(torch.from_numpy(dy))
        of_params = None
        if module.affine:
            of_params = {"scale": module.weight.grad.numpy(), "bias": module.bias.grad.numpy()}
            torch.optim.SGD(module.parameters(), RATE).step()
            module.zero_grad()
        if states and module.training:
            module.load_state_dict(
                {STATE[key]: torch.tensor(states[key][k]) for key in states}, strict=False
            )
        result = {"y": y.detach().numpy(), "x": x_.grad.numpy(), "params": of_params}
        results.append({**result, "state": state_of(module)})
    return results


def cumulative_states(xs):
    """Instance norm's states by hand, momentum None: after each step, the average of all so far."""
    space, steps = tuple(range(3, xs.ndim)), np.arange(1, len(xs) + 1)
    moments = {"mean": xs.mean(space), "var": xs.var(space, ddof=1)}
    averages = {k: v.mean(1).cumsum(0) / steps[:, None] for k, v in moments.items()}
    return {**averages, "count": steps}


STATES = ["untracked", 0.1, 0.0, 1.0, None]
SPACES = [("batch", (9, 3)), *((norm, SHAPES[space]) for norm in NORMS for space in SHAPES)]


@pytest.mark.parametrize("channels", ["first", "last"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("momentum", STATES)
@pytest.mark.parametrize(("norm", "shape"), SPACES)
def test_fifty_steps_of_training_and_then_evaluation_are_pytorchs(
    norm, shape, momentum, affine, channels
):
    n, *space, c = shape
    xs, dys = (normal((STEPS + 1, n, c, *space), seed) for seed in (1, 2))
    tracked, params, state = momentum != "untracked", None, None
    module = module_for(norm, len(space), c, affine=affine, track_running_stats=tracked)
    if affine:
        params = some_params(c)
        module.load_state_dict(
            {"weight": torch.tensor(params["scale"]), "bias": torch.tensor(params["bias"])},
            strict=False,
        )
    if tracked:
        state, module.momentum = first_state(c), momentum
    by_hand = cumulative_states(xs[:-1]) if norm == "instance" and momentum is None else None
    *training, evaluation = train_torch(module, xs, dys, by_hand)
    training = jax.tree.map(lambda *leaves: np.stack(leaves), *training)
    if tracked and norm == "instance":  # PyTorch does not count
        training["state"]["count"], evaluation["state"]["count"] = np.arange(1, STEPS + 1), STEPS

    axis, momentum = (1, -1)[channels == "last"], None if not tracked else momentum
    batches = (xs, dys) if channels == "first" else (np.moveaxis(a, 2, -1) for a in (xs, dys))
    found = train_jaxnorm(norm, axis, params, state, momentum, *batches)
    if channels == "last":
        for result, second in zip(found, (2, 1), strict=True):
            result.update({key: np.moveaxis(result[key], -1, second) for key in ("y", "x")})
    assert_close(found, (training, evaluation))
