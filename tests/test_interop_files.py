"""Tests that files of arrays are never lossy, changed or incomplete."""

import collections
import json
import os
import platform
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from cases import assert_same_bits

import jaxnorm.linen
from jaxnorm import interop
from jaxnorm.interop import _files, _replace, _safetensors
from jaxnorm.interop.__main__ import main

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")


def bn(module="bn", channels=3, count=7):
    """Returns the state dict of a norm whose values all differ."""
    rng = np.random.default_rng(channels)
    floats = ("weight", "bias", "running_mean", "running_var")
    arrays = {f"{module}.{k}": rng.random(channels).astype(np.float32) for k in floats}
    return arrays | {f"{module}.num_batches_tracked": np.asarray(count, np.int64)}


def tensors(arrays):
    return {name: torch.from_numpy(np.array(a)) for name, a in arrays.items()}


def load(path):
    return _files.read("test", path).arrays


def convert(*arguments):
    main(["convert", *map(str, arguments)])


def refused(capsys, *arguments):
    """Returns the error of the command line: one line, or argparse's usage and a line."""
    with pytest.raises(SystemExit) as stopped:
        convert(*arguments)
    assert stopped.value.code not in (None, 0)
    said = capsys.readouterr().err
    return said if stopped.value.code == 2 else str(stopped.value.code)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.safetensors"
    safetensors.numpy.save_file(bn(), path)
    return path


@pytest.fixture
def target(tmp_path):
    return tmp_path / "out.safetensors"


# ---- Reading ----


def of_every_dtype():
    """Returns one array of each dtype, with different shapes and random bits."""
    bits = np.random.default_rng(0)
    shapes = [(), (3,), (2, 3), (0, 2), (1,), (5, 1, 2)]
    arrays = {}
    for i, (code, dtype) in enumerate(_safetensors.DTYPES.items()):
        shape = shapes[i % len(shapes)]
        size = int(np.prod(shape)) * dtype.itemsize
        raw = np.frombuffer(bits.bytes(size), np.uint8)
        arrays[code] = (raw % 2 if code == "BOOL" else raw).view(dtype).reshape(shape)
    return arrays


def test_every_dtype_is_written_and_read_bit_for_bit(tmp_path):
    path, arrays = tmp_path / "a.safetensors", of_every_dtype()
    _files.write("test", path, _files.Contents(arrays, {"format": "pt"}))
    contents = _files.read("test", path)
    assert_same_bits(contents.arrays, arrays)
    assert contents.metadata == {"format": "pt"}


def test_the_library_reads_what_is_written(tmp_path):
    path, arrays = tmp_path / "a.safetensors", of_every_dtype()
    _files.write("test", path, _files.Contents(arrays, {"format": "pt"}))
    found = safetensors_torch.load_file(path)
    assert found.keys() == arrays.keys()
    for name, a in arrays.items():
        assert found[name].shape == a.shape
        assert bytes(found[name].contiguous().view(-1).view(torch.uint8).numpy()) == a.tobytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_narrow_floats_of_pytorch_keep_their_dtype(tmp_path, dtype, suffix):
    path = tmp_path / f"a.{suffix}"
    given = {"a.weight": torch.arange(6.0).reshape(2, 3).to(getattr(torch, dtype))}
    (safetensors_torch.save_file if suffix == "safetensors" else torch.save)(given, path)
    for read in (path, given):
        found = interop.from_torch(read)["params"]["a"]["weight"]
        assert found.dtype == getattr(ml_dtypes, dtype)
        np.testing.assert_array_equal(found.astype(np.float32), np.arange(6.0).reshape(2, 3))


def test_arrays_are_views_of_the_file_which_cannot_be_changed(source):
    found = interop.from_torch(source)["params"]["bn"]["scale"]
    assert not found.flags.owndata
    assert not found.flags.writeable
    # Replacing the file does not change the arrays that were read.
    kept = found.copy()
    interop.to_torch({"params": {"x": {"kernel": np.zeros((500, 500))}}}, file=source)
    np.testing.assert_array_equal(found, kept)


@pytest.mark.parametrize("suffix", ["pt", "pth", "bin", "ckpt"])
@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_torch_save_are_read(tmp_path, monkeypatch, suffix, zipped):
    path = tmp_path / f"a.{suffix}"
    torch.save(tensors(bn()), path, _use_new_zipfile_serialization=zipped)
    asked, load = [], torch.load
    monkeypatch.setattr(
        torch, "load", lambda *a, **options: asked.append(options) or load(*a, **options)
    )
    assert_same_bits(interop.to_torch(interop.from_torch(path)), bn())
    assert asked == [{"map_location": "cpu", "weights_only": True, "mmap": zipped}]


def test_a_pickled_module_is_an_error_that_says_how_to_save_its_state_dict(tmp_path):
    path = tmp_path / "net.pt"
    torch.save(torch.nn.Sequential(torch.nn.BatchNorm2d(3)), path)
    with pytest.raises(ValueError, match=r"pickled torch.nn.modules.container.Sequential") as error:
        interop.from_torch(path)
    assert "write torch.save(model.state_dict(), 'net.pt')" in str(error.value)
    assert "weights_only" not in str(error.value)
    with pytest.raises(ValueError, match="but is Sequential; for a module, write model"):
        interop.from_torch({"model": torch.nn.Sequential()}, key="model")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04broken", b"text", b"\x80\x02]q\x00."])
def test_a_broken_file_of_torch_save_is_an_error_that_names_it(tmp_path, content):
    path = tmp_path / "a.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.pt should hold tensors in dicts, but PyTorch cannot"):
        interop.from_torch(path)


def test_without_pytorch_its_files_are_an_error_that_says_what_to_do(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    torch.save(tensors(bn()), path)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"needs PyTorch .* pip install torch, or, .*'a\.safeten"):
        interop.from_torch(path)


def test_without_safetensors_its_files_are_an_error_that_says_what_to_do(source, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"write pip install 'jaxnorm\[interop\]'"):
        interop.from_torch(source)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"", "should be a .safetensors file"),
        (b"\xff" * 8, "should be a .safetensors file"),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', "should be a .safetensors"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,400]}}', "should be a .safetensors"),
        (b'{"a":{"dtype":"F8_E4M3FNUZ","shape":[4],"data_offsets":[0,4]}}', "E4M3FNUZ"),
        (b"[" * 100_000, "should be a .safetensors file"),
    ],
)
def test_a_malformed_header_is_an_error_that_names_the_file(tmp_path, header, message):
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ValueError, match=rf"a\.safetensors {message}|a\.safetensors .*{message}"):
        interop.from_torch(path)


# ---- Checkpoints with other contents ----


def checkpoint():
    return {
        "state_dict": tensors(bn()),
        "ema": {"model": tensors(bn(channels=4)), "decay": 0.9},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]},
        "epoch": 3,
        "a.dotted": {"bn.weight": torch.ones(3)},  # a dotted key does not select this entry
    }


def test_a_checkpoint_with_several_entries_is_an_error_that_names_the_key(tmp_path):
    path = tmp_path / "a.ckpt"
    torch.save(checkpoint(), path)
    for given in (path, checkpoint()):
        with pytest.raises(ValueError, match=r"but state_dict, ema\.model are mappings") as error:
            interop.from_torch(given)
        assert "write key='state_dict', or --key state_dict" in str(error.value)
        assert_same_bits(interop.to_torch(interop.from_torch(given, key="state_dict")), bn())
        found = interop.from_torch(given, key="ema.model")
        assert found["params"]["bn"]["scale"].shape == (4,)
        with pytest.raises(ValueError, match=r"'x' is not there; there is state_dict, ema\.model"):
            interop.from_torch(given, key="x")
        with pytest.raises(ValueError, match=r"'epoch\.x' is not there"):
            interop.from_torch(given, key="epoch.x")
        with pytest.raises(ValueError, match=r"write key='ema\.model'"):
            interop.from_torch(given, key="ema")
        with pytest.raises(ValueError, match=r"'epoch' should be a mapping of arrays, but is int"):
            interop.from_torch(given, key="epoch")


def test_extra_state_is_refused_by_name_unless_it_is_an_array():
    given = bn() | {"bn._extra_state": b"x"}
    with pytest.raises(ValueError, match=r"but bn\._extra_state are .*get_extra_state") as error:
        interop.from_torch(given)
    assert "leave_out=['*_extra_state']" in str(error.value)
    assert_same_bits(interop.to_torch(interop.from_torch(given, leave_out=["*_extra_state"])), bn())
    given["bn._extra_state"] = np.ones(2)
    assert "_extra_state" in interop.from_torch(given)["params"]["bn"]


@pytest.mark.parametrize(
    ("value", "kind"),
    [(3, "int"), ("x", "str"), (None, "NoneType"), (b"", "bytes"), ([1.0], "list")],
)
def test_what_is_no_array_is_named_with_its_type(value, kind):
    with pytest.raises(ValueError, match=rf"'bn\.x' is {kind}; write leave_out=\['bn\.x'\]"):
        interop.from_torch(bn() | {"bn.x": value})


def test_arrays_of_objects_and_of_text_are_no_arrays():
    for value in (np.array({"a": 1}), np.array(["a"])):
        with pytest.raises(ValueError, match=r"'x' is ndarray; write leave_out"):
            interop.from_torch({"x": value})


def test_names_that_are_no_text_are_refused():
    with pytest.raises(ValueError, match=r"should be arrays by name, but has 0, 1$"):
        interop.from_torch({0: np.ones(2), 1: np.ones(2)})


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "ema_model."])
def test_a_prefix_is_taken_off_every_name(prefix):
    given = {prefix + name: a for name, a in bn().items()}
    assert_same_bits(interop.to_torch(interop.from_torch(given, prefix=prefix)), bn())
    assert prefix.split(".")[0] in interop.from_torch(given)["params"]  # unless `prefix` is given
    with pytest.raises(ValueError, match=r"the prefix .* but step do not; write leave_out=\['step"):
        interop.from_torch(given | {"step": np.ones(2)}, prefix=prefix)


def test_an_averaged_model_is_converted_without_its_counter():
    model = torch.optim.swa_utils.AveragedModel(torch.nn.Sequential(torch.nn.BatchNorm1d(3)))
    found = interop.from_torch(model.state_dict(), prefix="module.", leave_out=["n_averaged"])
    assert found["params"].keys() == {"0"}
    with pytest.raises(ValueError, match=r"leave_out should match names, but \['n_averaged'\] mat"):
        interop.from_torch(bn(), leave_out=["n_averaged"])


def test_a_prefix_that_is_in_the_way_is_mentioned():
    layer = jaxnorm.linen.BatchNorm(use_running_average=True)
    like = jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((1, 3)))
    given = bn("module")
    with pytest.raises(ValueError, match=r"all names begin with 'module\.': write prefix="):
        interop.from_torch(given, like=like)
    assert interop.from_torch(given, like=like, prefix="module.")["params"].keys() == {
        "scale",
        "bias",
    }


# ---- Shards ----


def write_shards(folder, groups, name="model", metadata=None, about=None):
    """Writes a sharded checkpoint as Hugging Face's libraries do, with a sorted index."""
    weight_map = {}
    for i, arrays in enumerate(groups, 1):
        file = f"{name}-{i:05d}-of-{len(groups):05d}.safetensors"
        safetensors.numpy.save_file(arrays, folder / file, metadata=metadata)
        weight_map |= dict.fromkeys(arrays, file)
    index = folder / f"{name}.safetensors.index.json"
    total = sum(a.nbytes for arrays in groups for a in arrays.values())
    content = {"metadata": {"total_size": total, **(about or {})}, "weight_map": weight_map}
    index.write_text(json.dumps(content, sort_keys=True))
    return index


def groups():
    kernels = {"fc.weight": np.ones((2, 3), np.float16), "a.weight": np.ones((3, 4), np.float32)}
    return [bn("layer1.bn"), bn("a.bn", 5) | kernels, bn("layer2.bn", 4)]


def whole():
    return dict(collections.ChainMap(*groups()))


def test_shards_are_read_and_written_as_shards(tmp_path):
    index = write_shards(tmp_path, groups(), metadata={"format": "pt"}, about={"origin": "test"})
    assert_same_bits(interop.to_torch(interop.from_torch(index)), whole())
    convert(index, tmp_path / "v.safetensors")
    convert(tmp_path / "v.safetensors.index.json", tmp_path / "back.safetensors.index.json")
    assert_same_bits(load(tmp_path / "back.safetensors.index.json"), whole())
    for i, arrays in enumerate(groups(), 1):
        file = tmp_path / f"back-{i:05d}-of-00003.safetensors"
        assert_same_bits(safetensors.numpy.load_file(file), arrays)
        with safetensors.safe_open(file, "np") as opened:
            assert opened.metadata() == {"format": "pt"}
    about = json.loads((tmp_path / "back.safetensors.index.json").read_text())["metadata"]
    assert about == {"origin": "test", "total_size": sum(a.nbytes for a in whole().values())}


def test_shards_of_torch_save_are_read(tmp_path):
    files = {}
    for i, arrays in enumerate(groups(), 1):
        torch.save(tensors(arrays), tmp_path / f"pytorch_model-{i}.bin")
        files |= dict.fromkeys(arrays, f"pytorch_model-{i}.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    convert(index, tmp_path / "v.safetensors")
    convert(tmp_path / "v.safetensors.index.json", tmp_path / "back.safetensors")
    assert_same_bits(load(tmp_path / "back.safetensors.index.json"), whole())


def test_a_shard_size_bounds_the_shards(tmp_path, source):
    arrays = {f"a{i}.weight": np.full((2, 50), i, np.float32) for i in range(5)}
    arrays["large.weight"] = np.ones((10, 100), np.float32)
    safetensors.numpy.save_file(arrays, source)
    convert(source, tmp_path / "v.safetensors", "--shard-size", "1kB")
    files = json.loads((tmp_path / "v.safetensors.index.json").read_text())["weight_map"]
    sizes = collections.Counter()
    for name, file in files.items():
        sizes[file] += load(tmp_path / file)[name].nbytes
    assert sorted(sizes.values()) == [400, 800, 800, 4000]
    convert(tmp_path / "v.safetensors.index.json", tmp_path / "b.safetensors")
    assert_same_bits(load(tmp_path / "b.safetensors.index.json"), arrays)
    interop.to_torch(interop.from_torch(source), file=tmp_path / "t.safetensors.index.json")
    assert_same_bits(load(tmp_path / "t.safetensors.index.json"), arrays)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "should be an index of shards"),
        ('{"weight_map": 3}', "should be an index of shards"),
        ('{"weight_map": {"a": 3}}', "should be an index of shards"),
        ('{"weight_map": {"a": "../in.safetensors"}}', "should name files in its folder"),
        ('{"weight_map": {"a": "x.safetensors.index.json"}}', "should name files in its folder"),
        ('{"weight_map": {"a": "none.safetensors"}}', "none.safetensors should be a file"),
        ('{"weight_map": {"bn.weight": "in.safetensors"}}', r"differ in \['bn.bias', "),
        ('{"weight_map": {"x": "a.bin"}}', r"differ in \['x'\]"),
        ("{", "should be a JSON file"),
        ("[" * 100_000, "should be a JSON file"),
    ],
)
def test_an_index_that_is_wrong_is_an_error_that_names_it(tmp_path, source, content, message):
    torch.save([torch.ones(2)], tmp_path / "a.bin")
    path = source.with_name("x.safetensors.index.json")
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        interop.from_torch(path)


@pytest.mark.slow  # the test writes 400 MB
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is read from /proc")
def test_shards_are_converted_in_the_memory_of_one(tmp_path):
    size = 32 * 2**20
    shards = [{f"a{i}.weight": np.full((size // 4096, 1024), i, np.float32)} for i in range(4)]
    index = write_shards(tmp_path, [s | bn(f"bn{i}") for i, s in enumerate(shards)])
    code = """
import pathlib, sys, threading, time
import safetensors
from jaxnorm.interop.__main__ import main

def anonymous():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

def watch():
    while not done.is_set():
        peaks.append(anonymous())
        time.sleep(0.001)

done, start, peaks = threading.Event(), anonymous(), []
thread = threading.Thread(target=watch)
thread.start()
main(["convert", *sys.argv[1:]])
done.set()
thread.join()
print(max(peaks) - start)
"""
    for source, target in (("model", "v"), ("v", "back")):
        names = [
            str(index.with_name(f"{name}.safetensors.index.json")) for name in (source, target)
        ]
        command = [sys.executable, "-c", code, *names]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        assert int(result.stdout.splitlines()[-1]) < 1.2 * size
    assert_same_bits(load(names[1]), load(index))


# ---- Files are replaced atomically ----


def temporary(folder, process):
    return folder / f".out.safetensors.{platform.node()}.{process}{_replace.SUFFIX}"


def test_a_failure_keeps_the_old_files_and_leaves_no_others(tmp_path, source, target, monkeypatch):
    target.write_bytes(b"precious")
    for where, name in ((os, "replace"), (os, "fsync"), (_safetensors, "write")):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, lambda *_: (_ for _ in ()).throw(OSError("full")))
            with pytest.raises(SystemExit, match="full"):
                convert(source, target, "--force")
        assert sorted(tmp_path.iterdir()) == [source, target]
        assert target.read_bytes() == b"precious"


def test_all_shards_are_complete_before_the_first_is_renamed(tmp_path, monkeypatch):
    index = write_shards(tmp_path, groups())
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    written, write = [], _safetensors.write

    def fail_at_the_last(path, *rest):
        written.append(path)
        if len(written) == 3:
            raise OSError("full")
        write(path, *rest)

    monkeypatch.setattr(_safetensors, "write", fail_at_the_last)
    with pytest.raises(SystemExit, match="full"):
        convert(index, index, "--force")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_files_are_flushed_before_they_are_renamed(source, target, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda f: done.append("flushed") or fsync(f))
    monkeypatch.setattr(os, "replace", lambda a, b: done.append("moved") or replace(a, b))
    convert(source, target)
    assert done == ["flushed", "moved"]


def test_temporary_files_go_when_their_process_has_ended(tmp_path, source, target):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    running = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        old, current = temporary(tmp_path, ended.pid), temporary(tmp_path, running.pid)
        elsewhere = tmp_path / f".out.safetensors.another-machine.{ended.pid}{_replace.SUFFIX}"
        for path in (old, current, elsewhere):
            path.write_bytes(b"")
        convert(source, target)
        assert set(tmp_path.iterdir()) == {source, target, current, elsewhere}
    finally:
        running.communicate(b"\n")


def test_temporary_files_are_named_after_the_process(source, target, monkeypatch):
    seen, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: seen.append(a) or replace(a, b))
    convert(source, target)
    assert seen == [temporary(target.parent, os.getpid())]


def test_threads_that_write_the_same_file_leave_a_complete_one(target):
    given = [{"params": {"a": {"kernel": np.full((300, 300), i)}}} for i in range(8)]
    threads = [
        threading.Thread(target=interop.to_torch, args=(v,), kwargs={"file": target}) for v in given
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = load(target)["a.kernel"]
    assert len(np.unique(found)) == 1
    assert list(target.parent.iterdir()) == [target]


def test_a_link_stays_a_link(tmp_path, source):
    place, link = tmp_path / "place.safetensors", tmp_path / "link.safetensors"
    link.symlink_to(place)
    interop.to_torch(interop.from_torch(source), file=link)
    assert link.is_symlink()
    assert_same_bits(load(place), bn())


def test_to_torch_replaces_and_writes_safetensors_alone(tmp_path, source):
    interop.to_torch(interop.from_torch(source), file=source)
    assert_same_bits(load(source), bn())
    for name, message in (
        ("a.pt", r"model\.load_state_dict\(safetensors\.torch\.load_file\('a\.safetensors'\)\)"),
        ("a.txt", r"should end in \.safetensors"),
        ("none/a.safetensors", "does not; create it"),
    ):
        with pytest.raises(ValueError, match=f"to_torch: .*{message}"):
            interop.to_torch({}, file=tmp_path / name)
    with pytest.raises(ValueError, match=r"but would have \{'a\.kernel': 'complex128'\}"):
        interop.to_torch({"params": {"a": {"kernel": np.ones(2, complex)}}}, file=source)


def test_arrays_of_any_layout_are_written(target):
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    arrays = {"t": base.T, "strided": base[::2, 1::2], "big": base.astype(">f4"), "0": base[:0]}
    _files.write("test", target, _files.Contents(arrays))
    for name, a in arrays.items():
        np.testing.assert_array_equal(load(target)[name], a)


# ---- The command line ----


@pytest.mark.parametrize(
    "count", ["-5", "2147483648", str(10**30), "9" * 5000, "3.7", "x"], ids=lambda c: c[:12]
)
def test_a_count_that_does_not_fit_is_refused(capsys, source, target, count):
    assert "--count" in refused(capsys, source, target, "--count", count)
    assert not target.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"[1]",
        b"3",
        b"null",
        b'"bn"',
        b'{"bn": 3}',
        b'{"bn": ["x"]}',
        b"{",
        b"",
        b"\xff\xfe\x00binary",
        b"[" * 100_000,
        b"1" * 5000,
    ],
    ids=lambda content: repr(content[:12]),
)
def test_names_that_are_no_map_are_refused(capsys, tmp_path, source, target, content):
    path = tmp_path / "names.json"
    path.write_bytes(content)
    said = refused(capsys, source, target, "--names", path)
    assert "names.json should " in said
    assert said.count("\n") == 0
    assert not target.exists()


@pytest.mark.parametrize("size", ["0", "-1", "GB", "1XB", "1e9", "", "0.1B", "9" * 5000])
def test_a_shard_size_that_is_none_is_refused(capsys, source, target, size):
    assert "--shard-size" in refused(capsys, source, target, f"--shard-size={size}")


@pytest.mark.parametrize(("size", "most"), [("300", 300), ("0.5kB", 500), ("1KiB", 1024)])
def test_a_shard_size_has_units(source, target, size, most):
    arrays = {f"a{i:04d}.weight": np.zeros((1, 1), np.uint8) for i in range(2000)}
    safetensors.numpy.save_file(arrays, source)
    convert(source, target, "--shard-size", size)
    first = next(target.parent.glob("out-00001-of-*.safetensors"))
    assert len(load(first)) == most


def test_existing_files_are_replaced_by_force_alone(capsys, source, target):
    convert(source, target)
    once = target.read_bytes()
    target.write_bytes(b"other")
    assert "exists; write another name, or --force" in refused(capsys, source, target)
    assert target.read_bytes() == b"other"
    convert(source, target, "--force")
    assert target.read_bytes() == once


def test_a_file_may_replace_itself_by_force(capsys, source):
    assert "exists; write another name, or --force" in refused(capsys, source, source)
    convert(source, source, "--force")
    assert "params/bn/scale" in load(source)
    convert(source, source, "--force")
    assert_same_bits(load(source), bn())


def test_shards_may_replace_themselves_by_force(capsys, tmp_path):
    index = write_shards(tmp_path, groups())
    assert "exists; write another name, or --force" in refused(capsys, index, index)
    for _ in range(2):
        convert(index, index, "--force")
    assert_same_bits(load(index), whole())


def test_a_shard_that_exists_is_not_replaced(capsys, tmp_path):
    index = write_shards(tmp_path, groups())
    shard = tmp_path / "v-00002-of-00003.safetensors"
    shard.write_bytes(b"other")
    assert "v-00002-of-00003.safetensors should be a new file" in refused(
        capsys, index, tmp_path / "v.safetensors"
    )
    assert shard.read_bytes() == b"other"


def test_one_name_is_not_a_file_and_shards_at_once(capsys, tmp_path, source, target):
    convert(source, target)
    said = refused(capsys, source, target, "--force", "--shard-size", "1GB")
    assert "out.safetensors should not be in the folder of out.safetensors.index.json" in said
    target.unlink()
    convert(source, target, "--shard-size", "1GB")
    said = refused(capsys, source, target)
    assert "out.safetensors.index.json should not be in the folder of out.safetensors," in said


def test_places_that_cannot_be_written_are_said_in_a_line(capsys, tmp_path, source):
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    for name, message in (
        ("none/out.safetensors", "/none' does not; create it"),
        ("folder.safetensors", "but is a folder"),
        ("pipe.safetensors", "but is a device or a pipe"),
        ("in.safetensors/out.safetensors", "in.safetensors' does not; create it"),
        ("out.pt", "should be a .safetensors file, but is one of torch.save"),
        ("out", "write out.safetensors"),
        ("out.index.json", "should end in .safetensors"),
    ):
        for force in ((), ("--force",)):
            said = refused(capsys, source, tmp_path / name, *force)
            assert message in said
            assert "\n" not in said


def test_sources_that_cannot_be_read_are_said_in_a_line(capsys, tmp_path, source, target):
    torch.save(checkpoint(), tmp_path / "a.pt")
    torch.save(torch.nn.BatchNorm1d(3), tmp_path / "module.pt")
    torch.save([torch.ones(3)], tmp_path / "list.pt")
    (tmp_path / "binary.safetensors").write_bytes(bytes(range(256)))
    os.mkfifo(tmp_path / "pipe.safetensors")
    for name, message in (
        ("none.safetensors", "but there is none"),
        ("none.pt", "but there is none"),
        (".", "but is a folder"),
        ("pipe.safetensors", "but there is none"),
        ("binary.safetensors", "should be a .safetensors file"),
        ("a.pt", "--key state_dict"),
        ("module.pt", "torch.save(model.state_dict(), 'module.pt')"),
        ("list.pt", "should be a mapping of arrays, but is list"),
    ):
        said = refused(capsys, tmp_path / name, target)
        assert message in said
        assert "\n" not in said
    assert not target.exists()


def test_a_file_that_may_not_be_read_is_said_in_a_line(capsys, source, target, monkeypatch):
    def denied(path, **_):  # root may read all files
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(safetensors, "safe_open", denied)
    said = refused(capsys, source, target)
    assert said.endswith(f"[Errno 13] Permission denied: '{source}'")
    assert "should be a .safetensors file" not in said


def test_the_target_is_checked_before_the_source_is_read(capsys, source):
    said = refused(capsys, source.with_name("none.safetensors"), source)
    assert "exists; write another name" in said


def test_a_checkpoint_is_converted_by_its_key_prefix_and_what_is_left_out(tmp_path, target, capsys):
    given = {f"module.{name}": a for name, a in tensors(bn()).items()}
    given |= {"n_averaged": torch.tensor(3), "module.bn._extra_state": b"x"}
    torch.save({"state_dict": given, "epoch": 3}, tmp_path / "a.ckpt")
    options = ["--key", "state_dict", "--prefix", "module.", "--leave-out", "n_averaged"]
    assert "--leave-out '*_extra_state'" in refused(capsys, tmp_path / "a.ckpt", target, *options)
    convert(tmp_path / "a.ckpt", target, *options, "--leave-out", "*_extra_state")
    assert "\nleft out: n_averaged, *_extra_state\n" in capsys.readouterr().out
    convert(target, tmp_path / "back.safetensors")
    assert_same_bits(load(tmp_path / "back.safetensors"), bn())


def test_shards_behind_a_prefix_stay_as_they_are(tmp_path):
    named = [{f"module.{name}": a for name, a in arrays.items()} for arrays in groups()]
    index = write_shards(tmp_path, named)
    convert(index, tmp_path / "v.safetensors", "--prefix", "module.")
    convert(tmp_path / "v.safetensors.index.json", tmp_path / "b.safetensors")
    for i, arrays in enumerate(groups(), 1):
        assert_same_bits(load(tmp_path / f"b-{i:05d}-of-00003.safetensors"), arrays)


def test_metadata_stays_with_the_arrays(tmp_path, source, target):
    safetensors.numpy.save_file(bn(), source, metadata={"format": "pt", "license": "Apache-2.0"})
    convert(source, target)
    convert(target, tmp_path / "back.safetensors")
    for path in (target, tmp_path / "back.safetensors"):
        assert _files.read("test", path).metadata == {"format": "pt", "license": "Apache-2.0"}


@pytest.mark.parametrize(
    "modules",
    [
        ["a/b", "a.b"],
        ["a/b", "a%2Fb", "a%252Fb", "a%b", "a%25b", "%", "/", "a//b"],
    ],
    ids=str,
)
def test_names_are_restored(tmp_path, source, target, modules):
    arrays = {}
    for i, module in enumerate(modules):
        arrays |= bn(module, channels=i + 1)
    safetensors.numpy.save_file(arrays, source)
    convert(source, target)
    assert len(load(target)) == len(arrays)
    convert(target, tmp_path / "back.safetensors")
    assert_same_bits(load(tmp_path / "back.safetensors"), arrays)


def test_a_part_of_a_name_keeps_its_slash(source, target):
    safetensors.numpy.save_file(bn("a/b.n%"), source)
    convert(source, target)
    assert "params/a%2Fb/n%25/scale" in load(target)


@pytest.mark.parametrize("other", ["cache/y/z", "bn.weight", "paramsx/y"])
def test_variables_beside_others_are_refused_by_name(capsys, source, target, other):
    arrays = {"params/x/scale": np.ones(2), other: np.ones(2)}
    safetensors.numpy.save_file(arrays, source)
    said = refused(capsys, source, target)
    assert f"['{other}'] do not; write --leave-out" in said
    assert not target.exists()
    convert(source, target, "--leave-out", other)
    assert load(target).keys() == {"x.weight"}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["params/a%/kernel", "params/a%25/kernel"], "both become 'params.a%.kernel'"),
        (["params/a/scale", "params/a/weight"], "both become 'a.weight'"),
        (["params/a.b/kernel"], "should not be empty nor contain dots"),
        (["params/a//kernel"], "should not be empty nor contain dots"),
        (["params/a", "params/a/kernel"], "should be inside 'a', but that is an array"),
    ],
)
def test_arrays_that_get_one_name_are_refused_by_name(capsys, source, target, names, message):
    safetensors.numpy.save_file({name: np.ones(2) for name in names}, source)
    said = refused(capsys, source, target)
    assert message in said
    if "both" in message:
        assert all(repr(name) in said for name in names)
    assert not target.exists()


def test_a_scale_outside_norms_is_restored_if_the_norms_are_listed(tmp_path, source, target):
    arrays = bn() | {"affine.scale": np.ones(2), "affine.bias": np.ones(2)}
    safetensors.numpy.save_file(arrays, source)
    with pytest.warns(UserWarning, match=r"\['affine\.scale'\] are named 'scale'"):
        interop.from_torch(source)
    convert(source, target)
    convert(target, tmp_path / "back.safetensors", "--norm", "bn")
    assert_same_bits(load(tmp_path / "back.safetensors"), arrays)


def test_names_that_collide_on_the_way_in_are_refused(capsys, tmp_path, source, target):
    safetensors.numpy.save_file(bn("a") | bn("b", 4), source)
    names = tmp_path / "names.json"
    names.write_text('{"a": "b"}')
    assert "should be one array, but" in refused(capsys, source, target, "--names", names)


def test_what_a_state_accumulates_is_not_lost_silently(capsys, source, target):
    arrays = {"batch_stats/n/accumulation/start/mean": np.ones(2), "params/n/scale": np.ones(2)}
    safetensors.numpy.save_file(arrays, source)
    said = refused(capsys, source, target)
    assert "['batch_stats/n/accumulation/start/mean'] have no name in PyTorch" in said


def test_a_count_is_refused_for_variables(capsys, source, target, tmp_path):
    convert(source, target)
    said = refused(capsys, target, tmp_path / "back.safetensors", "--count", "3")
    assert "--count should be given for a state dict" in said


def test_every_array_is_the_source_s_bit_for_bit(tmp_path, source, target):
    arrays = {f"x.{name.lower()}": a for name, a in of_every_dtype().items()}
    arrays |= bn() | {"half.running_mean": np.ones(2, np.float16)}
    arrays |= {"half.running_var": np.ones(2, np.float16) / 3}
    arrays |= {"half.num_batches_tracked": np.asarray(2, np.int64)}
    _files.write("test", source, _files.Contents(arrays))
    convert(source, target)
    convert(target, tmp_path / "back.safetensors")
    for name in ("half.running_mean", "half.running_var"):
        arrays[name] = arrays[name].astype(np.float32)
    assert_same_bits(load(tmp_path / "back.safetensors"), arrays)
    assert load(target)["batch_stats/bn/count"].dtype == np.int32
