"""Compares the pure functions with PyTorch's modules and with float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import SHAPES, SMALL, first_state, later_state, normal, reference_norm, some_params

import jaxnorm

torch = pytest.importorskip("torch")
checkpoint = pytest.importorskip("torch.utils.checkpoint").checkpoint

pytestmark = pytest.mark.usefixtures("x64")
torch.set_num_threads(1)  # with more threads, most of the time is spent waiting

STATIC = ("use_running_average", "skip_nonfinite", "channel_axis", "batch_axis")
NORMS = {
    "batch": jax.jit(jaxnorm.batch_norm, static_argnames=STATIC[:-1]),
    "instance": jax.jit(jaxnorm.instance_norm, static_argnames=STATIC),
}
REFERENCES = {"batch": reference_norm, "instance": functools.partial(reference_norm, instance=True)}

each_norm = pytest.mark.parametrize("norm", NORMS)
each_space = pytest.mark.parametrize("space", SHAPES)


def assert_close(found, wanted):
    """Compares leaf by leaf, except for the last bits.

    rtol: both sum in float64, in a different order. atol: an entry near zero is a difference of
    terms of order 1 to 10, and has their rounding, about 1e-15.
    """
    close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-14)
    jax.tree.map(close, found, wanted)


# ---- PyTorch's modules with jaxnorm's arguments ----

STATE = {"mean": "running_mean", "var": "running_var", "count": "num_batches_tracked"}
PARAMS = {"scale": "weight", "bias": "bias"}


def module_for(norm, space, channels=3, **options):
    """Makes torch.nn.BatchNorm1d and similar modules, in float64, which track by default."""
    make = getattr(torch.nn, f"{norm.capitalize()}Norm{max(space, 1)}d")
    options = {"affine": False, "track_running_stats": True, "dtype": torch.float64, **options}
    return make(channels, **options)


def to_torch(x, axis=-1):
    return torch.from_numpy(np.moveaxis(np.array(x), axis, 1).copy())


def from_torch(x, axis=-1):
    return np.moveaxis(x.detach().numpy(), 1, axis)


def load(module, values):
    names = {**STATE, **PARAMS}
    values = {names[key]: torch.tensor(np.array(value)) for key, value in values.items()}
    module.load_state_dict(values, strict=False)


def state_of(module):
    if module.running_mean is None:
        return None
    return {key: getattr(module, name).numpy().copy() for key, name in STATE.items()}


# ---- One norm in three systems: y and the state after each step (x, momentum) ----


def run_in_turn(norms, norm, *steps):
    state, results = first_state(steps[0][0].shape[-1]), []
    for x, momentum in steps:
        y, state = norms[norm](x, batch_stats=state, momentum=momentum)
        results.append((y, state))
    return results


def run_torch(norm, *steps):
    x, _ = steps[0]
    module, results = module_for(norm, x.ndim - 2, x.shape[-1]), []
    for x, module.momentum in steps:
        results.append((from_torch(module(to_torch(x))), state_of(module)))
    return results


run_jaxnorm = functools.partial(run_in_turn, NORMS)
run_numpy = functools.partial(run_in_turn, REFERENCES)
each_system = pytest.mark.parametrize(
    "run", [run_jaxnorm, run_torch, run_numpy], ids=["jaxnorm", "torch", "numpy"]
)


def means_and_vars(results):
    return np.array([(state["mean"], state["var"]) for _, state in results])


@each_system
def test_batch_norm_divides_by_the_biased_and_remembers_the_unbiased_variance(run):
    results = run("batch", (SMALL, 0.1))
    ((y, state),) = results
    assert_close(y, (SMALL - [4.5, 2.0]) / np.sqrt([47.5 / 6 + 1e-5, 26 / 6 + 1e-5]))
    assert_close(means_and_vars(results), np.array([[[0.45, 0.2], [1.85, 1.42]]]))
    assert state["count"] == 1  # it counts batches, not samples


@each_system
def test_instance_norm_remembers_the_mean_over_samples_without_the_variance_between_them(run):
    results = run("instance", (SMALL, 0.1))
    means, variances = np.array([[[2, 2]], [[7, 2]]]), np.array([[[2 / 3, 8]], [[8 / 3, 2 / 3]]])
    assert_close(results[0][0], (SMALL - means) / np.sqrt(variances + 1e-5))
    assert_close(means_and_vars(results), np.array([[[0.45, 0.2], [1.15, 1.55]]]))


@each_system
def test_momentum_none_weighs_all_batches_alike(run):
    results = run("batch", (SMALL, None), (2 * SMALL + 1, None), (3 * SMALL + 2, None))
    wanted = [[4.5, 2, 9.5, 5.2], [7.25, 3.5, 23.75, 13], [10, 5, 133 / 3, 364 / 15]]
    assert_close(means_and_vars(results).reshape(3, 4), np.array(wanted))


@each_system
@pytest.mark.parametrize(("steps", "momentum"), [(4, 0.1), (9, 0.3)])
def test_a_switch_to_momentum_none_midway_uses_the_whole_count(run, steps, momentum):
    results = run("batch", *[(SMALL, momentum)] * steps, (2 * SMALL + 1, None))
    before, after = means_and_vars(results)[-2:]
    batch = np.array([[10, 5], [38, 20.8]])  # means and unbiased variances of the last batch
    assert_close(after, before + (batch - before) / (steps + 1))


@each_norm
@each_space
def test_an_entry_that_is_masked_out_might_as_well_not_be_there(norm, space):
    x, keep = normal(SHAPES[space]), np.random.default_rng(1).random(SHAPES[space][:-1]) < 0.6
    x[~keep] = np.nan
    options = {"batch_stats": first_state(3), "mask": keep[..., None]}
    y, new = NORMS[norm](x, **options)
    assert_close((y, new), REFERENCES[norm](x, **options))
    # PyTorch has no masks, so it gets the included entries only, one sample after the other.
    samples = [(x, keep)] if norm == "batch" else zip(x, keep, strict=True)
    parts = [run_torch("batch", (x[keep], 0.1))[0] for x, keep in samples]
    assert_close(y[keep], np.concatenate([y for y, _ in parts]))
    assert_close(means_and_vars([(y, new)])[0], means_and_vars(parts).mean(axis=0))
    np.testing.assert_array_equal(y[~keep], 0)


# ---- Relations between the norms ----


@each_space
def test_instance_norm_is_batch_norm_vmapped_over_the_samples_with_averaged_states(space):
    x, params, state = normal(SHAPES[space]), some_params(), later_state()
    y, states = jax.vmap(lambda x: NORMS["batch"](x, params, state))(x)
    average = jax.tree.map(lambda a: jnp.mean(a, axis=0), states)
    assert_close(NORMS["instance"](x, params, state), (y, average))


@each_space
def test_group_norm_of_one_channel_a_group_is_instance_norm(space):
    x, params = normal(SHAPES[space]), some_params()
    weight, bias = (torch.from_numpy(params[key]) for key in PARAMS)
    wanted = torch.nn.functional.group_norm(to_torch(x), x.shape[-1], weight, bias)
    assert_close(NORMS["instance"](x, params)[0], from_torch(wanted))


def test_group_norm_of_one_group_is_instance_norm_of_a_sample_as_one_channel():
    x = normal(SHAPES[2])
    y, _ = NORMS["instance"](x.reshape(len(x), -1, 1))
    wanted = torch.nn.functional.group_norm(to_torch(x), 1)
    assert_close(y.reshape(x.shape), from_torch(wanted))


def test_instance_norm_in_evaluation_is_batch_norm_in_evaluation():
    arguments = normal(SHAPES[2]), some_params(), later_state()
    wanted = reference_norm(*arguments, use_running_average=True)
    for norm in NORMS.values():
        assert_close(norm(*arguments, use_running_average=True), wanted)


@each_norm
def test_tracking_does_not_change_the_output_of_training(norm):
    x = normal(SHAPES[2])
    y, none = NORMS[norm](x)
    assert_close((y, none), (NORMS[norm](x, None, later_state())[0], None))
    assert_close(y, from_torch(module_for(norm, 2, track_running_stats=False).eval()(to_torch(x))))


@each_space
def test_an_unbatched_input_is_one_sample(space):
    x, module = normal(SHAPES[space][1:]), module_for("instance", space)
    y, new = NORMS["instance"](x, batch_stats=first_state(3), batch_axis=None)
    assert_close(y, from_torch(module(to_torch(x[None])[0])[None])[0])
    assert_close(new, {**state_of(module), "count": 1})


# ---- Too few values ----


@pytest.mark.parametrize(
    ("norm", "shape"),
    [("batch", (1, 3)), ("batch", (1, 1, 1, 3)), ("instance", (4, 1, 3)), ("instance", (1, 1, 3))],
)
def test_one_value_is_refused_in_pytorchs_words_except_in_evaluation(norm, shape):
    x, state, module = np.ones(shape), later_state(), module_for(norm, len(shape) - 2)
    what = {"batch": "value per channel", "instance": "spatial element"}[norm]
    text = f"Expected more than 1 {what} when training, got input size"
    with pytest.raises(ValueError, match=text):
        module(to_torch(x))
    with pytest.raises(ValueError, match=text):
        NORMS[norm](x, None, state)
    wanted = reference_norm(x, None, state, use_running_average=True)
    assert_close(NORMS[norm](x, None, state, use_running_average=True), wanted)


@pytest.mark.parametrize("shape", [(0, 7, 3), (4, 0, 3), (0, 5, 2, 3)])
@each_norm
@each_system
def test_no_values_at_all_are_not_refused(run, norm, shape):
    assert run(norm, (np.zeros(shape), 0.1))[0][0].shape == shape


# ---- Gradients and dtypes ----


@each_norm
@pytest.mark.parametrize("evaluating", [True, False])
def test_running_statistics_carry_no_gradient(norm, evaluating):
    def totals(floats, x):
        state = {**floats, "count": 5}
        y, new = NORMS[norm](x, None, state, use_running_average=evaluating)
        return jnp.sum(y**3), jnp.sum(new["mean"] + new["var"])

    floats = {key: value for key, value in later_state().items() if key != "count"}
    of_y, of_new = jax.jacobian(totals, (0, 1))(floats, normal(SHAPES[2]))
    zero = [of_y[0], of_new[1]] if evaluating else [of_y[0], of_new]
    for leaf in jax.tree.leaves(zero):  # in evaluation, the new state is the input state
        np.testing.assert_array_equal(leaf, 0)
    assert np.abs(of_y[1]).max() > 0.1


@each_norm
@pytest.mark.parametrize(("dtype", "bits"), [("float16", 11), ("bfloat16", 8)])
def test_half_precision_input_keeps_float32_statistics_and_half_precision_output(norm, dtype, bits):
    x = jnp.asarray(normal(SHAPES[2]), dtype)
    y, new = NORMS[norm](x, batch_stats=jaxnorm.init_batch_stats(3))
    # With affine=False, PyTorch's instance norm has half-precision statistics.
    module = module_for(norm, 2, affine=True, dtype=torch.float32)
    torch_y = module(to_torch(x.astype("float64")).to(getattr(torch, dtype)))
    assert (y.dtype, str(torch_y.dtype)) == (dtype, f"torch.{dtype}")
    for key in ("mean", "var"):
        assert new[key].dtype == state_of(module)[key].dtype == "float32"
        np.testing.assert_allclose(new[key], state_of(module)[key], rtol=1e-6)  # float32 rounding
    # PyTorch's y has an error of several units in the last place, so NumPy is the reference.
    # jaxnorm's y has one rounding, half a unit, in addition to smaller float32 errors.
    wanted, _ = REFERENCES[norm](x)
    np.testing.assert_allclose(y.astype("float64"), wanted, rtol=1.01 * 2.0**-bits, atol=1e-6)


# ---- Deliberate differences: a test for each row of the table in docs/decisions.md ----


def test_instance_norm_the_count_goes_up_as_for_batch_norm():
    steps = [(SMALL, 0.1)] * 3
    counts = [run("instance", *steps)[-1][1]["count"] for run in (run_jaxnorm, run_torch)]
    assert counts == [3, 0]


def test_instance_norm_momentum_none_is_the_true_cumulative_average():
    steps = (SMALL, None), (2 * SMALL + 1, None), (3 * SMALL + 2, None)
    wanted = np.array([[10.0, 5.0], [2.5 * (1 + 4 + 9) / 3, 6.5 * (1 + 4 + 9) / 3]])
    for run in (run_jaxnorm, run_numpy):
        assert_close(means_and_vars(run("instance", *steps))[-1], wanted)
    assert means_and_vars(run_torch("instance", *steps))[-1].tolist() == [[0, 0], [1, 1]]


@pytest.mark.parametrize("momentum", [0.1, None])
def test_instance_norm_empty_batch_in_training_leaves_the_state(momentum):
    step = np.zeros((0, 7, 3)), momentum
    assert_close(run_jaxnorm("instance", step)[0][1], first_state(3))
    assert np.isnan(means_and_vars(run_torch("instance", (step[0], 0.1)))).all()


@each_norm
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("shape", [(0, 7, 3), (4, 0, 3), (4, 7, 3)])
def test_empty_or_fully_masked_batch_leaves_the_state_and_its_count(norm, momentum, shape):
    mask = np.zeros((1, 1, 1), bool) if np.prod(shape) else None
    x, state, options = normal(shape), later_state(), {"momentum": momentum, "mask": mask}
    y, new = NORMS[norm](x, None, state, **options)
    assert_close((y, new), (np.zeros(shape), state))
    assert_close((y, new), REFERENCES[norm](x, None, state, **options))
    ((_, torch_state),) = run_torch("batch", (np.zeros((0, 7, 3)), 0.1))
    assert_close(torch_state, {**first_state(3), "count": 1})


@each_norm
@pytest.mark.parametrize(("affine", "tracked"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("evaluating", [True, False])
def test_wrong_channel_count_is_a_value_error_that_names_both(norm, affine, tracked, evaluating):
    params, state = some_params(4) if affine else None, later_state(4) if tracked else None
    with pytest.raises(ValueError, match=r"shape \(3,\).*shape \(4,\)|\(4,\).*\(3,\)"):
        NORMS[norm](normal(SHAPES[2]), params, state, use_running_average=evaluating and tracked)


@each_norm
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("tracked", [True, False])
def test_wrong_channel_count_is_many_things_to_pytorch(norm, affine, tracked):
    kind = {"batch": RuntimeError, "instance": ValueError if affine else UserWarning}[norm]
    module = module_for(norm, 2, 4, affine=affine, track_running_stats=tracked)
    if norm == "batch" and not affine and not tracked:
        module(to_torch(normal(SHAPES[2])))
    else:
        with pytest.raises(kind, match=r"num_features|elements"):
            module(to_torch(normal(SHAPES[2])))


@each_norm
def test_half_precision_running_statistics_are_widened_and_do_not_stall(norm):
    module = module_for(norm, 1, 1, momentum=0.01, dtype=torch.bfloat16)
    x = np.full((4, 5, 1), 1.005)
    state = jax.tree.map(lambda a: jnp.asarray(a, "bfloat16"), first_state(1)) | {"count": 0}
    for _ in range(500):
        module(to_torch(x).bfloat16())
        _, state = NORMS[norm](jnp.asarray(x, "bfloat16"), None, state, momentum=0.01)
    assert module.running_mean.item() == pytest.approx(0.836, abs=1e-3)
    assert state["mean"].dtype == state["var"].dtype == "float32"
    left, rtol = 0.99**500, 500 * 2.0**-23  # the remaining weight, and a float32 rounding per step
    np.testing.assert_allclose(state["mean"], 1.0078125 * (1 - left), rtol=rtol)  # 1.005 rounded
    np.testing.assert_allclose(state["var"], left, rtol=rtol)


@each_norm
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_a_nan_or_inf_in_a_batch_skips_that_channel_by_default(norm, poison):
    x, good = normal(SHAPES[1], seed=1), normal(SHAPES[1], seed=2)
    x[1, 2, 0] = poison
    (y, state), (_, later) = run_jaxnorm(norm, (x, 0.1), (good, 0.1))
    assert_close((y, state), run_numpy(norm, (x, 0.1))[0])
    assert (state["mean"][0], state["var"][0], state["count"]) == (0, 1, 1)
    assert np.isfinite(means_and_vars([(y, later)])).all()
    # y is always as in PyTorch, and so is the state with skip_nonfinite=False.
    (torch_y, torch_state), (_, torch_later) = run_torch(norm, (x, 0.1), (good, 0.1))
    np.testing.assert_array_equal(np.isnan(y), np.isnan(torch_y))
    _, state = NORMS[norm](x, None, first_state(3), skip_nonfinite=False)
    for key in ("mean", "var"):
        assert_close(state[key][1:], torch_state[key][1:])
        for spoilt in (state, torch_state, torch_later):
            assert not np.isfinite(spoilt[key][0])


@each_norm
def test_a_nan_in_a_batch_skips_all_channels_of_a_cumulative_average(norm):
    x = normal(SHAPES[1])
    x[1, 2, 0] = np.nan
    assert_close(run_jaxnorm(norm, (x, None))[0][1], first_state(3))


@each_norm
def test_one_value_per_channel_only_known_at_run_time_gives_the_bias_and_no_update(norm):
    params, state, mask = some_params(), later_state(), np.zeros((4, 7, 1), bool)
    mask[0, 3] = True
    y, new = NORMS[norm](normal(SHAPES[1]), params, state, mask=mask)
    assert_close(new, state)
    np.testing.assert_array_equal(y, np.where(mask, params["bias"], np.zeros(SHAPES[1])))


@each_norm
def test_activation_checkpointing_moves_the_state_once(norm):
    x, state = normal(SHAPES[1]), later_state()

    def loss(x):
        y, new = NORMS[norm](x, batch_stats=state)
        return jnp.sum(y**3), new

    gradient, new = jax.jit(jax.grad(jax.checkpoint(loss), has_aux=True))(x)
    assert_close((gradient, new), jax.grad(loss, has_aux=True)(x))
    assert new["count"] == state["count"] + 1
    module = module_for("batch", 1)
    checkpoint(module, to_torch(x).requires_grad_(), use_reentrant=False).sum().backward()
    assert module.num_batches_tracked == 2


# ---- Fifty steps of training, then evaluation ----

STEPS, RATE = 50, 0.01
SPACES = [("batch", (9, 3)), *((norm, SHAPES[space]) for norm in NORMS for space in SHAPES)]


@functools.partial(jax.jit, static_argnames=("norm", "axis"))
def train_jaxnorm(norm, axis, params, state, momentum, xs, dys):
    """Trains on all batches but the last, evaluates on the last, and stacks the results."""

    def step(carry, batch, **options):
        (params, state), (x, dy) = carry, batch
        apply = functools.partial(NORMS[norm], batch_stats=state, channel_axis=axis, **options)
        y, pull, state = jax.vjp(apply, x, params, has_aux=True)
        of_x, of_params = pull(dy)
        params = jax.tree.map(lambda p, g: p - RATE * g, params, of_params)
        return (params, state), {"y": y, "x": of_x, "params": of_params, "state": state}

    train = functools.partial(step, momentum=momentum)
    last, training = jax.lax.scan(train, (params, state), (xs[:-1], dys[:-1]))
    return training, step(last, (xs[-1], dys[-1]), use_running_average=state is not None)[1]


def step_torch(module, axis, x, dy):
    """Runs one such step in PyTorch."""
    x = to_torch(x, axis).requires_grad_()
    y = module(x)
    y.backward(to_torch(dy, axis))
    of_params = None
    if module.affine:
        of_params = {key: getattr(module, name).grad.numpy() for key, name in PARAMS.items()}
        torch.optim.SGD(module.parameters(), RATE).step()
        module.zero_grad()
    gradients = {"x": from_torch(x.grad, axis), "params": of_params}
    return {"y": from_torch(y, axis), **gradients, "state": state_of(module)}


def averages_so_far(xs, axis):
    """Computes the average of the means and unbiased variances of all samples after each step."""
    samples = np.moveaxis(xs, axis, 2).reshape(*xs.shape[:2], 3, -1)  # (step, N, C, space)
    rows = {"mean": samples.mean(-1), "var": samples.var(-1, ddof=1)}
    steps = np.arange(1, len(xs) + 1)[:, None]
    return {key: row.mean(axis=1).cumsum(axis=0) / steps for key, row in rows.items()}


@pytest.mark.parametrize(
    ("affine", "axis"),
    [
        (True, 1),
        pytest.param(True, -1, marks=pytest.mark.slow),
        pytest.param(False, -1, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("momentum", ["untracked", 0.1, 0.0, 1.0, None])
@pytest.mark.parametrize(("norm", "shape"), SPACES)
def test_fifty_steps_of_training_and_then_evaluation_are_pytorchs(
    norm, shape, momentum, affine, axis
):
    draws = (normal((STEPS + 1, *shape), seed) for seed in (1, 2))
    xs, dys = (np.moveaxis(a, -1, 2 if axis == 1 else -1) for a in draws)
    params, state = some_params() if affine else None, first_state(3)
    tracked = momentum != "untracked"
    module = module_for(norm, len(shape) - 2, affine=affine, track_running_stats=tracked)
    if tracked:
        module.momentum = momentum
    else:
        state = momentum = None
    load(module, params or {})

    results = [step_torch(module, axis, x, dy) for x, dy in zip(xs[:-1], dys[:-1], strict=True)]
    training = jax.tree.map(lambda *leaves: np.stack(leaves), *results)
    if norm == "instance" and tracked:  # deliberate differences: the count, and momentum=None
        if momentum is None:
            training["state"] = averages_so_far(xs[:-1], axis if axis < 0 else 2)
        training["state"]["count"] = np.arange(1, STEPS + 1)
        load(module, {key: value[-1] for key, value in training["state"].items()})
    evaluation = step_torch(module.eval(), axis, xs[-1], dys[-1])
    found = train_jaxnorm(norm, axis, params, state, momentum, xs, dys)
    assert_close(found, (training, evaluation))
