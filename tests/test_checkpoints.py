"""Tests round trips through checkpoint formats, and resuming a training run after a kill."""

import glob
import os
import pathlib
import signal
import subprocess
import sys
import time

import flax.linen as nn
import flax.serialization
import flax.traverse_util
import jax
import jax.numpy as jnp
import killed_training
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.flax
from flax import nnx
from models import kernel_init, quick_jit

import jaxnorm.linen
import jaxnorm.nnx

ROOT = pathlib.Path(__file__).parent.parent
X = jax.random.normal(jax.random.key(5), (8, 6, 6, 3))
X4 = X[..., [0, 1, 2, 0]]
RATE = 0.1


def bits(tree):
    """Returns the dtype, the shape and the bytes at each path, which should be restored."""
    leaves = [
        (jax.tree_util.keystr(path), np.asarray(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
    return {path: (leaf.dtype.name, leaf.shape, leaf.tobytes()) for path, leaf in leaves}


# ---- Two frontends: variables after some steps, and a function for the next step ----


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        which = {"use_running_average": not train}
        x = nn.Conv(4, (3, 3), kernel_init=kernel_init)(x)
        x = nn.relu(jaxnorm.linen.BatchNorm(**which)(x))
        x = nn.relu(jaxnorm.linen.InstanceNorm(track_running_stats=True, **which)(x))
        return nn.Dense(3, kernel_init=kernel_init)(x.mean((1, 2)))


@quick_jit
def linen_step(variables):
    def loss(params):
        y, updates = Net().apply(
            {**variables, "params": params}, X, train=True, mutable=["batch_stats"]
        )
        return jnp.sum(jnp.sin(y)), updates

    grads, updates = jax.grad(loss, has_aux=True)(variables["params"])
    params = jax.tree.map(lambda p, g: p - RATE * g, variables["params"], grads)
    return {"params": params, **updates}


def linen_first():
    return Net().init(jax.random.key(0), X, train=False)


class NNXNet(nnx.Module):
    """The NNX version of `Net`; as for a list of blocks, some keys are integers."""

    def __init__(self, *, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), kernel_init=kernel_init, rngs=rngs)
        self.norms = nnx.List(
            [
                jaxnorm.nnx.BatchNorm(4, rngs=rngs),
                jaxnorm.nnx.InstanceNorm(4, track_running_stats=True, rngs=rngs),
            ]
        )
        self.head = nnx.Linear(4, 3, kernel_init=kernel_init, rngs=rngs)

    def __call__(self, x):
        x = self.conv(x)
        for norm in self.norms:
            x = nnx.relu(norm(x))
        return self.head(x.mean((1, 2)))


@nnx.jit
def nnx_train(model):
    grads = nnx.grad(lambda model: jnp.sum(jnp.sin(model(X))))(model)
    params = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda p, g: p - RATE * g, params, grads))


def nnx_step(variables):
    model = NNXNet(rngs=nnx.Rngs(7))  # another seed, so that values that are not restored differ
    for kind, values in ((nnx.Param, "params"), (nnx.BatchStat, "batch_stats")):
        state = nnx.state(model, kind)
        nnx.replace_by_pure_dict(state, variables[values])
        nnx.update(model, state)
    nnx_train(model)
    return variables_of(model)


def nnx_first():
    return variables_of(NNXNet(rngs=nnx.Rngs(0)))


def variables_of(model):
    """Returns the state of a model in the form of Linen's variables."""
    return {
        "params": nnx.to_pure_dict(nnx.state(model, nnx.Param)),
        "batch_stats": nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)),
    }


FRONTENDS = {"linen": (linen_first, linen_step), "nnx": (nnx_first, nnx_step)}


# ---- The formats: variables are saved in a folder, and restored ----


def shapes_of(variables):
    """Returns the shapes and dtypes of a target, without values."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(jnp.shape(a), a.dtype), variables)


def orbax_save(variables, folder):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", variables)


def orbax_restore(folder, *target):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder / "state", *target)


def by_checkpointer(variables, folder):
    orbax_save(variables, folder)
    return orbax_restore(folder, shapes_of(variables))


def by_checkpointer_without_target(variables, folder):
    orbax_save(variables, folder)
    return nnx.restore_int_paths(orbax_restore(folder))


def by_manager(variables, folder):
    with ocp.CheckpointManager(folder / "steps") as manager:
        manager.save(3, args=ocp.args.StandardSave(variables))
        manager.wait_until_finished()
        target = ocp.args.StandardRestore(shapes_of(variables))
        return manager.restore(manager.latest_step(), args=target)


def by_from_bytes(variables, folder):
    (folder / "state").write_bytes(flax.serialization.to_bytes(variables))
    target = shapes_of(variables)
    return flax.serialization.from_bytes(target, (folder / "state").read_bytes())


def by_msgpack_restore(variables, folder):
    (folder / "state").write_bytes(flax.serialization.to_bytes(variables))
    restored = flax.serialization.msgpack_restore((folder / "state").read_bytes())
    return nnx.restore_int_paths(restored)


def by_safetensors(variables, folder):
    flat = flax.traverse_util.flatten_dict(variables)
    flat = {"/".join(map(str, path)): value for path, value in flat.items()}
    safetensors.flax.save_file(flat, folder / "state")
    restored = safetensors.flax.load_file(folder / "state")
    return nnx.restore_int_paths(flax.traverse_util.unflatten_dict(restored, sep="/"))


FORMATS = [
    by_checkpointer,
    by_checkpointer_without_target,
    by_manager,
    by_from_bytes,
    by_msgpack_restore,
    by_safetensors,
]
each_format = pytest.mark.parametrize("round_trip", FORMATS)


# ---- Exact round trips ----


@pytest.fixture(scope="module", params=FRONTENDS)
def trained(request):
    """Returns the variables after three steps, and a function for the next step."""
    first, step = FRONTENDS[request.param]
    variables = first()
    for _ in range(3):
        variables = step(variables)
    return variables, step


@each_format
def test_a_restored_state_continues_training_bit_for_bit(trained, round_trip, tmp_path):
    variables, step = trained
    restored = round_trip(variables, tmp_path)
    kept = bits(restored)
    assert kept == bits(variables)
    counts = [leaf for path, leaf in kept.items() if path.endswith("['count']")]
    assert counts == [("int32", (), np.int32(3).tobytes())] * 2  # of batch norm and instance norm

    after = bits(step(restored))
    assert after == bits(step(variables))
    assert all(after[path] != leaf for path, leaf in kept.items() if "batch_stats" in path)


def from_bits(dtype, unsigned, *patterns):
    return jnp.asarray(np.array(patterns, unsigned).view(dtype))


@each_format
def test_no_value_is_changed(x64, round_trip, tmp_path):
    variables = {
        "params": {
            "scale": jnp.array([-0.0, 1e-45, -1e-40, np.inf], jnp.float32),
            # These are a quiet and a signaling NaN, each with a payload.
            "bias": from_bits(np.float32, np.uint32, 0xFFC12345, 0x7F812345),
            "half": from_bits(jnp.bfloat16, np.uint16, 0x8000, 0x0001, 0xFFC1, 0x7F81),
        },
        "batch_stats": {
            "mean": from_bits(np.float64, np.uint64, 1 << 63, 1, 0xFFF8000000012345),
            "count": jnp.int32(2**31 - 1),
        },
    }
    assert bits(variables)["['params']['bias']"][2].hex() == "4523c1ff4523817f"  # JAX kept them
    assert bits(round_trip(variables, tmp_path)) == bits(variables)


@pytest.mark.parametrize(
    ("round_trip", "dtype"),
    [
        (by_checkpointer, "float32"),
        (by_checkpointer_without_target, "float32"),
        (by_manager, "float32"),
        (by_from_bytes, "float64"),
        (by_msgpack_restore, "float64"),
        (by_safetensors, "float32"),
    ],
)
def test_float64_is_narrowed_where_jax_has_none(round_trip, dtype, tmp_path):
    with jax.enable_x64(True):
        variables = {"batch_stats": {"mean": jnp.array([1 / 3], jnp.float64)}}
    restored = round_trip(variables, tmp_path)
    assert restored["batch_stats"]["mean"].dtype == dtype


# ---- A whole NNX model, saved as in Flax's guide ----


def test_the_state_of_an_nnx_model_is_restored_without_pure_dicts(tmp_path):
    model = NNXNet(rngs=nnx.Rngs(0))
    nnx_train(model)
    model.eval()
    orbax_save(nnx.state(model), tmp_path)
    graph, target = nnx.split(nnx.eval_shape(lambda: NNXNet(rngs=nnx.Rngs(0))))
    restored = nnx.merge(graph, orbax_restore(tmp_path, target))
    assert bits(variables_of(restored)) == bits(variables_of(model))
    assert restored.norms[0].count[...] == restored.norms[1].count[...] == 1
    assert not restored.norms[0].use_running_average  # the mode is not part of the state

    model.train()
    for each in (model, restored):
        nnx_train(each)
    assert bits(variables_of(restored)) == bits(variables_of(model))


# ---- Changes that the formats do not detect; docs/checkpoints.md lists them ----

STATE = {"mean": jnp.full(4, 1 / 3), "var": jnp.ones(4), "count": jnp.int32(2**31 - 1)}


def without(key):
    return {k: v for k, v in STATE.items() if k != key}


def test_from_bytes_accepts_another_shape_and_dtype():
    data = flax.serialization.to_bytes(STATE)
    target = {"mean": jnp.zeros(7), "var": jnp.zeros((), jnp.bfloat16), "count": jnp.zeros(3)}
    assert bits(flax.serialization.from_bytes(target, data)) == bits(STATE)


def test_from_bytes_drops_what_the_target_lacks_and_refuses_the_other_way_around():
    data = flax.serialization.to_bytes(STATE)
    assert flax.serialization.from_bytes(without("count"), data).keys() == {"mean", "var"}
    with pytest.raises(ValueError, match=r"do not match.*\{'count'\}"):
        flax.serialization.from_bytes(STATE, flax.serialization.to_bytes(without("count")))


def test_orbax_casts_to_the_dtypes_of_the_target(tmp_path):
    orbax_save(STATE, tmp_path)
    target = {
        "mean": jax.ShapeDtypeStruct((4,), jnp.bfloat16),
        "var": jax.ShapeDtypeStruct((4,), jnp.int8),
        "count": jax.ShapeDtypeStruct((), jnp.float32),
    }
    restored = orbax_restore(tmp_path, target)
    assert {k: v.dtype.name for k, v in restored.items()} == {
        "mean": "bfloat16",
        "var": "int8",
        "count": "float32",
    }
    assert jnp.all(restored["mean"] == jnp.bfloat16(1 / 3))
    assert restored["count"] == 2.0**31  # one more than the saved value


def test_orbax_refuses_another_shape(tmp_path):
    orbax_save(STATE, tmp_path)
    code = """if True:
        import sys, jax, orbax.checkpoint as ocp
        target = {"mean": (7,), "var": (4,), "count": ()}
        target = {k: jax.ShapeDtypeStruct(v, "float32") for k, v in target.items()}
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.restore(sys.argv[1], target)
    """
    # This runs in a separate process, because orbax leaves coroutines that warn in later tests.
    command = [sys.executable, "-c", code, tmp_path / "state"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 1
    assert "ValueError: Requested shape: (7,) is not compatible with the stored" in result.stderr


def test_orbax_refuses_a_key_too_few_or_too_many(tmp_path):
    orbax_save(without("count"), tmp_path)
    for target in (STATE, {"mean": STATE["mean"]}):
        with pytest.raises(ValueError, match=r"[Ss]tructure"):
            orbax_restore(tmp_path, shapes_of(target))


def test_nnx_takes_another_shape_and_dtype_and_misses_nothing():
    layer = jaxnorm.nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    state = nnx.state(layer, nnx.BatchStat)
    nnx.replace_by_pure_dict(state, {"mean": jnp.zeros(7), "var": jnp.zeros(4, jnp.bfloat16)})
    nnx.update(layer, state)
    assert layer.mean.shape == (7,)
    assert layer.var.dtype == jnp.bfloat16
    assert layer.count[...] == 0  # unchanged
    with pytest.raises(ValueError, match="key in pure_dict not available"):
        nnx.replace_by_pure_dict(state, {"variance": jnp.zeros(4)})
    with pytest.raises(ValueError, match=r"batch_stats\['mean'\].*\(4,\).*\(7,\)"):
        layer(X4)


def test_the_errors_of_a_layer_for_restored_states():
    layer = jaxnorm.linen.BatchNorm(use_running_average=True)
    variables = layer.init(jax.random.key(0), X4)

    def evaluate(**changed):
        batch_stats = {**variables["batch_stats"], **changed}
        return layer.apply({**variables, "batch_stats": batch_stats}, X4)

    with pytest.raises(ValueError, match=r"batch_stats\['mean'\].*\(4,\).*\(7,\)"):
        evaluate(mean=jnp.zeros(7))
    with pytest.raises(ValueError, match=r"batch_stats\['count'\].*whole number.*is 2.5"):
        evaluate(count=jnp.float32(2.5))
    assert jnp.all(evaluate(count=jnp.float32(2)) == evaluate(count=jnp.int32(2)))  # an average
    rounded = jnp.full(4, 1 / 3, jnp.bfloat16)
    assert jnp.any(evaluate(mean=rounded) != evaluate(mean=jnp.full(4, 1 / 3)))  # without an error


# ---- A run that is killed while it saves ----


def start(folder):
    command = [sys.executable, killed_training.__file__, folder]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}  # the process uses this checkout
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)


def finish(child):
    """Runs to the end, and returns the step at which the run began."""
    out, _ = child.communicate(timeout=120)
    assert child.returncode == 0
    return int(out)


def unfinished(folder):
    """Returns the step, after the first three, whose save has begun but not ended, if any."""
    # This does not use pathlib's glob, which raises an error if a folder is renamed meanwhile.
    arrays = "*.orbax-checkpoint-tmp/*/ocdbt.process_0/d/*"
    steps = [int(p.split(".")[0]) for p in glob.glob(arrays, root_dir=folder / "checkpoints")]
    return max((step for step in steps if step > 3), default=None)


def kill_while_saving(folder):
    """Returns the step whose save was interrupted, or None if the run ended first."""
    child = start(folder)
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and child.poll() is None:
            if unfinished(folder) is None:
                time.sleep(0.001)
                continue
            # A stopped process cannot complete its save between the check and the kill.
            child.send_signal(signal.SIGSTOP)
            _, status = os.waitpid(child.pid, os.WUNTRACED)
            if not os.WIFSTOPPED(status):
                return None
            if unfinished(folder) is not None:
                return unfinished(folder)
            child.send_signal(signal.SIGCONT)
        assert child.returncode == 0
        return None
    finally:
        child.kill()  # SIGKILL, which cannot be handled
        child.wait()
        child.stdout.close()


@pytest.mark.slow
def test_a_run_killed_while_saving_resumes_to_the_state_of_an_undisturbed_run(tmp_path):
    with start(tmp_path / "undisturbed") as undisturbed:
        for attempt in range(5):  # a busy machine may miss every incomplete save
            folder = tmp_path / str(attempt)
            cut_off = kill_while_saving(folder)
            if cut_off is not None:
                break
        assert cut_off is not None
        assert unfinished(folder) == cut_off  # the incomplete save remains after the kill
        complete = [p.name for p in (folder / "checkpoints").iterdir() if p.name.isdigit()]
        assert sorted(map(int, complete)) == list(range(1, cut_off))
        assert not (folder / "end").exists()

        assert finish(start(folder)) == cut_off - 1
        assert finish(undisturbed) == 0
    end = (folder / "end").read_bytes()
    assert end == (tmp_path / "undisturbed" / "end").read_bytes()
    count = flax.serialization.msgpack_restore(end)["batch_stats"]["BatchNorm_0"]["count"]
    assert count == killed_training.STEPS
    assert unfinished(folder) is None  # the step was saved again


@pytest.mark.parametrize(
    ("save", "load", "error"),
    [
        (flax.serialization.to_bytes, flax.serialization.msgpack_restore, ValueError),
        (safetensors.flax.save, safetensors.flax.load, safetensors.SafetensorError),
    ],
)
def test_a_file_cut_short_anywhere_is_refused(save, load, error):
    data = save(dict(STATE))  # safetensors puts NumPy arrays into its input
    for length in range(len(data)):
        with pytest.raises(error):
            load(data[:length])
    assert bits(load(data)) == bits(STATE)
