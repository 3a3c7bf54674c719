"""Converts variables to a PyTorch state dict, bit for bit."""

import os
from collections.abc import Collection, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxnorm.interop._files import Contents, write
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
from jaxnorm.interop._trees import (
    Arrays,
    array,
    check_names,
    flatten,
    inverted,
    join,
    renamed,
    split,
    without_accumulation,
)


def to_torch(
    variables: Mapping[str, Any],
    *,
    names: Mapping[str, str] | None = None,
    norms: Collection[str] | None = None,
    convert: Convert | None = None,
    track_running_stats: bool | None = None,
    like: Mapping[str, Any] | None = None,
    file: str | os.PathLike[str] | None = None,
) -> dict[str, np.ndarray]:
    """Converts variables to a PyTorch state dict: the inverse of `from_torch`.

    A norm is a module with a scale, or with running statistics. For PyTorch, write
    `model.load_state_dict(interop.tensors(state_dict))`.

    Args:
      variables: {"params": ..., "batch_stats": ...}; the second may be missing.
      names: the same map as for `from_torch`, with names in PyTorch as keys.
      norms: the names in PyTorch of the modules that are norms. None selects every module with a
        scale or running statistics, except those that have a `scale` in `like`.
      convert: `convert(name, array)` is called, after `names` is applied, for each array that does
        not belong to a norm. It returns the dotted name in PyTorch and the array, or None to leave
        the array out.
      track_running_stats: None keeps the running statistics. False leaves them out. True adds
        initial running statistics to norms that have none.
      like: the state dict of the PyTorch model. The result must have its names and shapes, and is
        cast to its dtypes; this restores half-precision statistics, which `from_torch` widens. If a
        norm has no count there, as FrozenBatchNorm2d, the count is left out.
      file: the path of a .safetensors file to write, or to replace. If the path ends in
        .safetensors.index.json, the arrays are written in shards of at most 5 GB.

    Returns:
      A dict of NumPy arrays by dotted names, which are writable copies. Counts are int64.

    Raises:
      ValueError: if a state is incomplete, a count is not a whole number or two arrays get the same
        name; if `names` or `norms` contains a name that does not exist, or `names` is not the map
        that was given to `kernels`; if an array is missing, unexpected or has another shape than in
        `like`. The errors name the keys.

    Example:
      >>> import jaxnorm
      >>> from jaxnorm import interop
      >>> variables = {"params": {"bn": jaxnorm.init_params(2)},
      ...              "batch_stats": {"bn": jaxnorm.init_batch_stats(2)}}
      >>> list(interop.to_torch(variables))[:3]
      ['bn.weight', 'bn.bias', 'bn.running_mean']

    References:
      torch.nn.Module.load_state_dict, PyTorch 2.13.
    """
    entries = write_torch(
        variables,
        names=names,
        norms=norms,
        convert=convert,
        track_running_stats=track_running_stats,
        like=like,
    )
    state_dict: dict[str, np.ndarray] = {}
    for entry in entries:
        if entry.torch_name is None:
            continue
        if entry.torch_name in state_dict:
            raise ValueError(
                f"to_torch: {entry.torch_name!r} should be one array, but is two; give one of them "
                f"another name"
            )
        state_dict[entry.torch_name] = np.array(entry.value, order="C")
    if like is not None:
        shapes = {key: tuple(np.shape(value)) for key, value in like.items()}
        check_names_and_shapes("to_torch", {k: v.shape for k, v in state_dict.items()}, shapes, {})
        state_dict = {
            key: state_dict[key].astype(array("to_torch", key, like[key]).dtype) for key in like
        }
    if file is not None:
        write("to_torch", file, Contents(state_dict))
    return state_dict


def write_torch(
    variables: Mapping[str, Any],
    *,
    names: Mapping[str, str] | None,
    norms: Collection[str] | None = None,
    convert: Convert | None,
    track_running_stats: bool | None,
    like: Mapping[str, Any] | None = None,
) -> list[Entry]:
    """Returns every array of the variables, with its name in PyTorch; copied only if necessary."""
    check_names_of_kernels("to_torch", convert, names)
    torch_names = inverted("to_torch", names or {})
    params, stats = (
        {k: array("to_torch", k, v) for k, v in _flat(variables.get(name, {})).items()}
        for name in ("params", "batch_stats")
    )
    check_names("to_torch", torch_names, (*params, *stats), "the variables")
    unknown = sorted(
        name for name in stats if ("batch_stats", split(name)[1]) not in LEAVES.values()
    )
    if unknown:
        raise ValueError(
            f"to_torch: batch_stats should contain only mean, var and count, because PyTorch's "
            f"norms have no others, but contains {unknown}; leave them out"
        )
    torch_modules = _norms(params, stats, torch_names, norms, like)
    entries = []
    for module, torch_module in torch_modules.items():
        uncounted = like is not None and join(torch_module, COUNT) not in like
        entries += _write_norm(module, torch_module, params, stats, track_running_stats, uncounted)
    for name, value in params.items():
        module, leaf = split(name)
        if module not in torch_modules or leaf not in ("scale", "bias"):
            torch_name = join(renamed(module, torch_names), leaf)
            new_name, new, note = converted(convert, torch_name, value)
            entries.append(Entry(new_name, "params", name, np.asarray(new), note))
    return entries


def _flat(tree: Any) -> dict[str, Any]:
    return without_accumulation(flatten("to_torch", tree))


def _norms(
    params: Arrays,
    stats: Arrays,
    torch_names: Mapping[str, str],
    norms: Collection[str] | None,
    like: Mapping[str, Any] | None,
) -> dict[str, str]:
    """Returns the modules that are norms, with their names in PyTorch."""
    tracked = dict.fromkeys(split(name)[0] for name in stats)
    scaled = dict.fromkeys(split(name)[0] for name in params if split(name)[1] == "scale")
    found = {module: renamed(module, torch_names) for module in scaled | tracked}
    if norms is None:
        return {
            module: torch_module
            for module, torch_module in found.items()
            if module in tracked or not like or join(torch_module, "scale") not in like
        }
    absent = sorted(set(norms) - set(found.values()))
    unnamed = sorted(found[module] for module in tracked if found[module] not in norms)
    if unnamed:
        raise ValueError(
            f"to_torch: norms should name all modules with running statistics, but lacks {unnamed}"
        )
    if absent:
        raise ValueError(
            f"to_torch: norms should name modules with a scale, but {absent} have none"
        )
    return {module: torch_module for module, torch_module in found.items() if torch_module in norms}


def _write_norm(
    module: str,
    torch_module: str,
    params: Arrays,
    stats: Arrays,
    track_running_stats: bool | None,
    uncounted: bool,
) -> list[Entry]:
    """Returns the entries of one norm, without the count if PyTorch's norm has none."""
    variables = {"params": params, "batch_stats": stats}
    values = {
        torch_leaf: variables[collection][join(module, leaf)]
        for torch_leaf, (collection, leaf) in LEAVES.items()
        if join(module, leaf) in variables[collection]
    }
    tracked = [leaf for leaf in RUNNING if leaf in values]
    if 0 < len(tracked) < len(RUNNING):
        raise ValueError(
            f"to_torch: batch_stats of {module!r} should have mean, var and count, because "
            f"PyTorch's norm has all or none, but has {[LEAVES[leaf][1] for leaf in tracked]}"
        )
    notes = dict.fromkeys(values, "")
    if track_running_stats is False:
        notes |= dict.fromkeys(tracked, LEFT_OUT)
    elif track_running_stats and not tracked:
        values |= initial_statistics(next(iter(values.values())).shape)
        notes |= dict.fromkeys(RUNNING, INITIAL)
    if COUNT in values:
        values[COUNT] = _count(module, values[COUNT])
        if uncounted:
            notes[COUNT] = LEFT_OUT
    return [
        Entry(
            None if notes[leaf] == LEFT_OUT else join(torch_module, leaf),
            LEAVES[leaf][0],
            None if notes[leaf] == INITIAL else join(module, LEAVES[leaf][1]),
            value,
            notes[leaf],
        )
        for leaf, value in values.items()
    ]


def _count(module: str, count: np.ndarray) -> np.ndarray:
    """Returns the count in int64, as in PyTorch; it may be a whole number in float."""
    whole = np.issubdtype(count.dtype, np.number) and np.all(count == np.round(count))
    if not whole or np.any(count < 0):
        raise ValueError(
            f"to_torch: the count of {module!r} should be a whole number, not negative, but is "
            f"{count.dtype} {count}; write the number of batches that its statistics represent"
        )
    return count.astype(np.int64)


def tensors(state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Converts the arrays of a state dict to PyTorch tensors; requires PyTorch.

    Unlike torch.from_numpy, it supports bfloat16 and float8. The tensors share the memory of the
    arrays.

    Args:
      state_dict: NumPy arrays by name, as returned by `to_torch`.

    Returns:
      Tensors with the same names, shapes and dtypes, for `model.load_state_dict`.

    Example:
      >>> import torch
      >>> import jaxnorm
      >>> from jaxnorm import interop
      >>> variables = {"params": jaxnorm.init_params(2), "batch_stats": jaxnorm.init_batch_stats(2)}
      >>> state_dict = interop.to_torch(variables)
      >>> torch.nn.BatchNorm1d(2).load_state_dict(interop.tensors(state_dict))
      <All keys matched successfully>

    References:
      torch.from_numpy, PyTorch 2.13.
    """
    import torch

    def tensor(value: np.ndarray) -> Any:
        if value.dtype.kind != "V" and value.dtype.name not in dir(ml_dtypes):
            return torch.from_numpy(value)
        bits = value.view({1: np.uint8, 2: np.int16}[value.dtype.itemsize])
        return torch.from_numpy(bits).view(getattr(torch, value.dtype.name))

    return {name: tensor(np.asarray(value)) for name, value in state_dict.items()}
