"""Converts a PyTorch state dict to variables, bit for bit."""

import os
import warnings
from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxnorm._core.variables import statistics_dtype
from jaxnorm.interop._files import read
from jaxnorm.interop._kernels import check_names_of_kernels
from jaxnorm.interop._leaves import (
    COUNT,
    INITIAL,
    LEAVES,
    LEFT_OUT,
    RUNNING,
    Convert,
    Entry,
    check_names_and_shapes,
    converted,
    initial_statistics,
)
from jaxnorm.interop._state_dict import common_prefix, state_dict_of
from jaxnorm.interop._trees import (
    Arrays,
    Tree,
    array,
    check_names,
    flatten,
    inverted,
    join,
    nest,
    renamed,
    split,
)

MAX_COUNT = np.iinfo(np.int32).max
MISSING = "missing"  # the note of a count that the state dict does not contain


def from_torch(
    state_dict: Any,
    *,
    names: Mapping[str, str] | None = None,
    norms: Collection[str] | None = None,
    convert: Convert | None = None,
    track_running_stats: bool | None = None,
    count: int | None = None,
    like: Mapping[str, Any] | None = None,
    key: str | None = None,
    prefix: str | None = None,
    leave_out: Collection[str] = (),
) -> Tree:
    r"""Converts a PyTorch state dict to variables.

    For each norm, `weight` and `bias` become scale and bias in "params", and `running_mean`,
    `running_var` and `num_batches_tracked` become mean, var and count in "batch_stats". A norm is a
    module with any of the three running statistics, or with a `weight` of one axis. Names are split
    at the dots: `layer1.0.bn1.weight` becomes `params["layer1"]["0"]["bn1"]["scale"]`. All other
    arrays are copied to "params" unchanged, under their own names, unless `convert` changes them.

    Running statistics in half precision are widened to float32. A count that exceeds int32 becomes
    the largest int32, with a warning. Nothing else changes, so `to_torch` restores every bit. The
    arrays are copies, so that further training of the PyTorch model does not change them. Arrays of
    a file may be views of the file.

    A state dict does not contain epsilon, whose defaults differ between PyTorch and Flax.

    Args:
      state_dict: a mapping of arrays, such as model.state_dict(); a module; or the path of a file.
        The file is a .safetensors file, an .index.json of several, or a .pt, .pth, .bin or .ckpt
        file of torch.save, which needs PyTorch and is read with weights_only=True.
      names: maps the names of modules in PyTorch to the new names, as {"layer1.0": "Block_0",
        "layer1.0.bn1": "Block_0.BatchNorm_0"}; the longest matching prefix is replaced. Each key
        must be a module of the state dict; "" is the whole model.
      norms: the names in PyTorch of all modules that are norms. Use it for layer norms over several
        axes, or if a `weight` of one axis does not belong to a norm (PReLU). None finds the norms.
      convert: `convert(name, array)` is called, after `names` is applied, for each array that does
        not belong to a norm. It returns the new dotted name and array, such as a kernel in Flax's
        order, or None to leave the array out.
      track_running_stats: None keeps the running statistics of the state dict. False leaves them
        out. True adds initial running statistics (mean 0, variance 1, count 0) to norms that have
        none.
      count: the number of batches that the statistics represent, for norms without
        `num_batches_tracked` (state dicts from before PyTorch 0.4.1). None means 0, as in PyTorch,
        with a warning, because with momentum=None and count 0 the next batch replaces the
        statistics.
      like: the variables of the new model, or their `jax.eval_shape`. The result must have the same
        names and shapes.
      key: the key of the state dict in a checkpoint that contains more, such as "state_dict" or
        "ema.model". None means that the checkpoint is the state dict.
      prefix: a prefix that is removed from every name, such as "module." of DistributedDataParallel
        or "_orig_mod." of torch.compile. A name without it is an error.
      leave_out: the names, written with their prefix, of the arrays to leave out, such as
        "n_averaged" or "*_extra_state". * matches any text. A pattern that matches nothing is an
        error.

    Returns:
      {"params": ..., "batch_stats": ...}, nested dicts of NumPy arrays. Arrays of a file that did
      not have to be changed are read-only views of the memory-mapped file.

    Raises:
      ImportError: if a file needs PyTorch or safetensors, and the package is not installed.
      ValueError: if a file cannot be read, or contains anything but arrays by name; if count is not
        a whole number, or negative; if a norm lacks one of its statistics, its arrays have
        different shapes, or its statistics are not floats; if `names` or `norms` contains a name
        that does not exist, or `names` is not the map that was given to `kernels`; if two arrays
        get the same name; if an array is missing, unexpected or has another shape than in `like`.
        The errors name the keys.

    Example:
      >>> import numpy as np
      >>> from jaxnorm import interop
      >>> state_dict = {"conv.weight": np.ones((2, 3, 5, 5)), "bn.weight": np.ones(2),
      ...               "bn.running_mean": np.zeros(2), "bn.running_var": np.ones(2),
      ...               "bn.num_batches_tracked": np.int64(7)}
      >>> variables = interop.from_torch(state_dict, convert=lambda name, array: (
      ...     "conv.kernel", array.transpose(2, 3, 1, 0)))
      >>> variables["params"]["conv"]["kernel"].shape, variables["params"]["bn"]["scale"].shape
      ((5, 5, 3, 2), (2,))
      >>> print(variables["batch_stats"]["bn"]["count"])
      7

    References:
      torch.nn.Module.state_dict, PyTorch 2.13.
    """
    given: Any = state_dict
    is_file = isinstance(state_dict, str | os.PathLike)
    if is_file:
        given = read("from_torch", state_dict).arrays
    elif not isinstance(state_dict, Mapping) and hasattr(state_dict, "state_dict"):
        given = state_dict.state_dict()
    entries = read_torch(
        state_dict_of("from_torch", given, key, prefix=prefix, leave_out=leave_out),
        names=names,
        norms=norms,
        convert=convert,
        track_running_stats=track_running_stats,
        count=count,
    )
    if like is not None:
        _check_variables(entries, like)
    warn_of_scales(entries)
    if not is_file:  # the arrays of a model may change later
        entries = [entry._replace(value=_copied(entry.value)) for entry in entries]
    return variables_of(entries)


def _copied(value: Any) -> Any:
    return value.copy() if isinstance(value, np.ndarray) else value


def warn_of_scales(entries: list[Entry]) -> None:
    """Warns of names that `to_torch` would by default treat as those of norms."""
    kept = [e.name for e in entries if e.name is not None and e.name == e.torch_name]
    scales = [name for name in kept if split(name)[1] == "scale"]
    if scales:
        warnings.warn(
            f"from_torch: {scales} are named 'scale', but do not belong to norms; write norms= or "
            f"like= for to_torch, which otherwise renames them to 'weight'",
            stacklevel=3,
        )


def read_torch(
    state_dict: Mapping[str, Any],
    *,
    names: Mapping[str, str] | None,
    norms: Collection[str] | None,
    convert: Convert | None,
    track_running_stats: bool | None,
    count: int | None,
) -> list[Entry]:
    """Returns every array of the state dict, with its new name and value."""
    arrays = {name: array("from_torch", name, value) for name, value in state_dict.items()}
    names = names or {}
    found = _detected_norms(arrays) if norms is None else _given_norms(arrays, norms)
    _check_parts(arrays)
    _check_count(count)
    inverted("from_torch", names)
    check_names_of_kernels("from_torch", convert, names)
    check_names("from_torch", names, arrays, "the state dict")
    entries = []
    for module in dict.fromkeys(split(name)[0] for name in arrays):
        if module in found:
            entries += _read_norm(
                arrays, module, renamed(module, names), track_running_stats, count
            )
    if count is None:
        _warn_of_missing_counts(entries)
    for torch_name, value in arrays.items():
        module, leaf = split(torch_name)
        if module not in found or leaf not in LEAVES:
            new = converted(convert, join(renamed(module, names), leaf), value)
            entries.append(Entry(torch_name, "params", *new))
    return entries


def _warn_of_missing_counts(entries: list[Entry]) -> None:
    missing = [split(e.torch_name)[0] for e in entries if e.torch_name and e.note == MISSING]
    if missing:
        warnings.warn(
            f"from_torch: num_batches_tracked of {missing} is missing and taken as 0; with "
            f"momentum=None the next batch would replace the running statistics; write count= the "
            f"number of batches that they represent, or count=0",
            stacklevel=4,
        )


def _check_count(count: Any) -> None:
    whole = isinstance(count, int | np.integer) and not isinstance(count, bool)
    if count is not None and not (whole and 0 <= count <= MAX_COUNT):
        raise ValueError(
            f"from_torch: count should be an int from 0 to {MAX_COUNT}, because it is a number of "
            f"batches, but is {count!r}"
        )


def _check_parts(arrays: Arrays) -> None:
    empty = [name for name in arrays if "" in name.split(".")]
    if empty:
        raise ValueError(
            f"from_torch: names should be parts joined by dots, but {empty} have empty parts; "
            f"rename them"
        )


def _detected_norms(arrays: Arrays) -> set[str]:
    """Returns the modules with any of the running statistics, or with a weight of one axis."""
    return {
        module
        for module, leaf in map(split, arrays)
        if leaf in RUNNING or (leaf == "weight" and arrays[join(module, leaf)].ndim == 1)
    }


def _given_norms(arrays: Arrays, norms: Collection[str]) -> set[str]:
    """Returns the modules in `norms`; raises if one does not exist."""
    modules = {split(name)[0] for name in arrays if split(name)[1] in LEAVES}
    absent = sorted(set(norms) - modules)
    if absent:
        raise ValueError(
            f"from_torch: norms should name modules of the state dict, but it has no {absent}; it "
            f"has {sorted(modules)}"
        )
    return set(norms)


def _read_norm(
    arrays: Arrays,
    torch_module: str,
    module: str,
    track_running_stats: bool | None,
    count: int | None,
) -> list[Entry]:
    """Checks the arrays of one norm, and returns their entries."""
    torch_names = {leaf: join(torch_module, leaf) for leaf in LEAVES}
    leaves = {leaf: arrays[name] for leaf, name in torch_names.items() if name in arrays}
    _check_shapes({torch_names[leaf]: a for leaf, a in leaves.items() if leaf != COUNT})
    tracked = [leaf for leaf in RUNNING if leaf in leaves]
    values = {leaf: (value, "") for leaf, value in leaves.items()}
    if track_running_stats is False:
        values |= {leaf: (leaves[leaf], LEFT_OUT) for leaf in tracked}
    elif tracked:
        values |= _read_statistics(torch_module, leaves, count)
    elif track_running_stats:
        initial = initial_statistics(next(iter(leaves.values())).shape)
        values |= {leaf: (value, INITIAL) for leaf, value in initial.items()}
    return [
        Entry(
            None if note == INITIAL else torch_names[leaf],
            LEAVES[leaf][0],
            None if note == LEFT_OUT else join(module, LEAVES[leaf][1]),
            value,
            note,
        )
        for leaf, (value, note) in values.items()
    ]


def _check_shapes(arrays: Arrays) -> None:
    """Checks that the arrays of a norm have one shape."""
    first = next(iter(arrays), "")
    for name, a in arrays.items():
        if a.shape != arrays[first].shape:
            raise ValueError(
                f"from_torch: {name!r} should have shape {arrays[first].shape}, as {first!r} has, "
                f"but has {a.shape}"
            )


def _read_statistics(
    torch_module: str, leaves: Arrays, count: int | None
) -> dict[str, tuple[np.ndarray, str]]:
    """Returns the running statistics of one norm, with notes of what changed."""
    first = next(leaf for leaf in RUNNING if leaf in leaves)
    values = {}
    for leaf in ("running_mean", "running_var"):
        torch_name = join(torch_module, leaf)
        if leaf not in leaves:
            raise ValueError(
                f"from_torch: {torch_name!r} should be there, because "
                f"{join(torch_module, first)!r} is, but is missing; write "
                f"track_running_stats=False to leave both out"
            )
        values[leaf] = _statistic(torch_name, leaves[leaf])
    return values | {COUNT: _count(join(torch_module, COUNT), leaves.get(COUNT), count)}


def _statistic(torch_name: str, value: np.ndarray) -> tuple[np.ndarray, str]:
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(
            f"from_torch: {torch_name!r} should have a float dtype, because it is an average, "
            f"but has {value.dtype}"
        )
    wide = statistics_dtype(value.dtype)
    return value.astype(wide), "" if wide == value.dtype else f"widened from {value.dtype}"


def _count(torch_name: str, value: np.ndarray | None, count: int | None) -> tuple[np.ndarray, str]:
    if value is None:
        return np.asarray(count or 0, np.int32), MISSING
    if value.shape != () or not np.issubdtype(value.dtype, np.integer) or value < 0:
        raise ValueError(
            f"from_torch: {torch_name!r} should be one whole number, not negative, because it "
            f"counts batches, but is "
            f"{value.dtype}{list(value.shape)}{f' {value}' if value.size == 1 else ''}"
        )
    if value > MAX_COUNT:
        warnings.warn(
            f"from_torch: {torch_name!r} is {value}, and becomes the largest int32, {MAX_COUNT}",
            stacklevel=6,
        )
        return np.asarray(MAX_COUNT, np.int32), f"was {value}"
    return value.astype(np.int32), ""


def variables_of(entries: list[Entry]) -> Tree:
    """Returns the collections as nested dicts; raises if two arrays have the same name."""
    flat: dict[str, dict[str, Any]] = {"params": {}, "batch_stats": {}}
    for entry in entries:
        if entry.name is None:
            continue
        if entry.name in flat[entry.collection]:
            raise ValueError(
                f"from_torch: {entry.name!r} should be one array, but {entry.torch_name!r} and "
                f"another get this name"
            )
        flat[entry.collection][entry.name] = entry.value
    return {collection: nest("from_torch", leaves) for collection, leaves in flat.items()}


def _check_variables(entries: list[Entry], like: Mapping[str, Any]) -> None:
    named = {f"{e.collection}.{e.name}": e for e in entries if e.name is not None}
    found = {name: np.shape(e.value) for name, e in named.items()}
    origin = {name: e.torch_name for name, e in named.items() if e.torch_name}
    collections = {k: v for k, v in like.items() if k in ("params", "batch_stats")}
    expected = {name: a.shape for name, a in flatten("from_torch", collections).items()}
    prefix = common_prefix(origin.values())
    hint = f"; all names begin with {prefix!r}: write prefix= with what a wrapper has added"
    check_names_and_shapes("from_torch", found, expected, origin, hint if prefix else "")
