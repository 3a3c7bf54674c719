"""How does a model go to PyTorch? Its variables, norm by norm, as a state dict."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxnorm.interop._files import Contents, write
from jaxnorm.interop._leaves import RUNNING, THEIRS, Convert, Entry, check
from jaxnorm.interop._trees import array, flatten, inverted, join, renamed, settled, split


def to_torch(
    variables: Mapping[str, Any],
    *,
    names: Mapping[str, str] | None = None,
    convert: Convert | None = None,
    track_running_stats: bool | None = None,
    like: Mapping[str, Any] | None = None,
    file: str | os.PathLike[str] | None = None,
) -> dict[str, np.ndarray]:
    """Turns variables into a PyTorch state dict: the inverse of `from_torch`.

    A norm is a module with a scale, or with running statistics. For PyTorch, write
    `model.load_state_dict({k: torch.from_numpy(v) for k, v in state_dict.items()})`.

    Args:
      variables: {"params": ..., "batch_stats": ...}; the second may be missing.
      names: the same map as for `from_torch`, from PyTorch's names to those here.
      convert: `convert(name, array)` for each array that is no norm's, after `names`: its new
        dotted name in PyTorch and array; or None to leave it out.
      track_running_stats: None: as they are. False leaves the running statistics out. True gives
        the norms that have none first ones.
      like: the state dict of the PyTorch model: the same names and shapes are to come out, and its
        dtypes do; half-precision statistics, say, that `from_torch` had widened.
      file: the path of a .safetensors file that is written too, or replaced; an
        .safetensors.index.json writes it in shards of at most 5 GB.

    Returns:
      A dict of NumPy arrays, writable copies, by dotted names; counts are int64.

    Raises:
      ValueError: naming the keys, if a state lacks a part or two arrays get one name; if
        anything is missing, unexpected or of another shape than in `like`.

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
        variables, names=names, convert=convert, track_running_stats=track_running_stats
    )
    state_dict: dict[str, np.ndarray] = {}
    for entry in entries:
        if entry.theirs is None:
            continue
        if entry.theirs in state_dict:
            raise ValueError(f"to_torch: {entry.theirs!r} should be one array, but is two")
        state_dict[entry.theirs] = np.array(entry.value, order="C")
    if like is not None:
        shapes = {key: tuple(np.shape(value)) for key, value in like.items()}
        check("to_torch", {k: v.shape for k, v in state_dict.items()}, shapes, {})
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
    convert: Convert | None,
    track_running_stats: bool | None,
) -> list[Entry]:
    """Every array of the variables, with what it is in PyTorch: no copies, where none is needed."""
    theirs = inverted("to_torch", names or {})
    params, stats = (
        {k: array("to_torch", k, v) for k, v in settled(flatten(variables.get(name, {}))).items()}
        for name in ("params", "batch_stats")
    )
    unknown = sorted(name for name in stats if ("batch_stats", split(name)[1]) not in THEIRS)
    if unknown:
        raise ValueError(
            f"to_torch: batch_stats should hold mean, var and count of norms, which PyTorch has "
            f"too, but hold {unknown}; leave them out"
        )
    norms = dict.fromkeys(split(name)[0] for name in (*params, *stats) if _of_a_norm(name, stats))
    entries = []
    for module in norms:
        entries += _write_norm(module, renamed(module, theirs), params, stats, track_running_stats)
    for name, value in params.items():
        module, leaf = split(name)
        if module in norms and leaf in ("scale", "bias"):
            continue
        known = join(renamed(module, theirs), leaf)
        new_name, new = (
            (known, value) if convert is None else convert(known, value) or (None, value)
        )
        note = "left out" if new_name is None else "" if new is value else "converted"
        entries.append(Entry(new_name, "params", name, np.asarray(new), note))
    return entries


def _of_a_norm(name, stats):
    module, leaf = split(name)
    return leaf == "scale" or join(module, "mean") in stats or join(module, "var") in stats


def _write_norm(module, theirs, params, stats, track_running_stats):
    leaves = {
        ours: (params if ours[0] == "params" else stats)[join(module, ours[1])]
        for ours in THEIRS
        if join(module, ours[1]) in (params if ours[0] == "params" else stats)
    }
    tracked = [ours for ours in leaves if ours[0] == "batch_stats"]
    if 0 < len(tracked) < len(RUNNING):
        raise ValueError(
            f"to_torch: batch_stats of {module!r} should have mean, var and count, but has "
            f"{[leaf for _, leaf in tracked]}"
        )
    notes = dict.fromkeys(leaves, "")
    if track_running_stats is False:
        notes |= dict.fromkeys(tracked, "left out")
    elif track_running_stats and not tracked:
        shape = next(iter(leaves.values())).shape
        for leaf, value in (("mean", np.zeros), ("var", np.ones)):
            leaves["batch_stats", leaf] = value(shape, np.float32)
        leaves["batch_stats", "count"] = np.zeros((), np.int32)
        notes |= dict.fromkeys([o for o in leaves if o[0] == "batch_stats"], "a first one")
    if ("batch_stats", "count") in leaves:
        leaves["batch_stats", "count"] = leaves["batch_stats", "count"].astype(np.int64)
    return [
        Entry(
            None if notes[ours] == "left out" else join(theirs, THEIRS[ours]),
            ours[0],
            None if notes[ours] == "a first one" else join(module, ours[1]),
            value,
            notes[ours],
        )
        for ours, value in leaves.items()
    ]
