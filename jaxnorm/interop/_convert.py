"""Converts a file of a state dict to a file of variables, or back, for the command line."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxnorm.interop import _files
from jaxnorm.interop._from_torch import read_torch, variables_of, warn_of_scales
from jaxnorm.interop._leaves import Entry
from jaxnorm.interop._state_dict import state_dict_of
from jaxnorm.interop._table import table_lines
from jaxnorm.interop._to_torch import write_torch
from jaxnorm.interop._trees import nest, split

NORM_LEAVES = ("scale", "mean")  # each norm has one of these
COLLECTIONS = ("params/", "batch_stats/")


def convert_file(options: Any) -> str:
    """Reads, converts and writes a file, and returns a table of the conversion."""
    _files.check_target("convert", options.target, replace=options.force)
    names = _names(options.names) if options.names else None
    source = _files.read("convert", options.source)
    arrays = state_dict_of(
        "convert", source.arrays, options.key, prefix=options.prefix, leave_out=options.leave_out
    )
    track = False if options.no_running_stats else None
    if any(name.startswith(COLLECTIONS) for name in arrays):
        entries, renamings = _to_torch(arrays, options, names, track)
    else:
        entries, renamings = _from_torch(arrays, options, names, track)
    converted = _converted(arrays, renamings)
    shards = None
    if options.shard_size is not None:
        shards = _files.shards_of(converted, options.shard_size)
    elif source.shards is not None:
        shards = _same_shards(source.shards, options.prefix or "", renamings)
    contents = source._replace(arrays=converted, shards=shards)
    written = _files.write("convert", options.target, contents, replace=options.force)
    lines = [table(entries), f"written: {', '.join(file.name for file in written)}"]
    if options.leave_out:
        lines.insert(1, f"left out: {', '.join(options.leave_out)}")
    return "\n".join(lines)


# For each array: its name in the source and in the target, None if it is not there, and its value.
Renaming = tuple[str | None, str | None, Any]


def _from_torch(
    arrays: Mapping[str, Any], options: Any, names: Any, track: bool | None
) -> tuple[list[Entry], list[Renaming]]:
    entries = read_torch(
        arrays,
        names=names,
        norms=options.norm,
        convert=None,
        track_running_stats=track,
        count=options.count,
    )
    warn_of_scales(entries)
    variables_of(entries)  # raises if two arrays get the same name, or one is inside another
    return entries, [(e.torch_name, _file_name(e), e.value) for e in entries]


def _to_torch(
    arrays: Mapping[str, Any], options: Any, names: Any, track: bool | None
) -> tuple[list[Entry], list[Renaming]]:
    others = [name for name in arrays if not name.startswith(COLLECTIONS)]
    if others:
        raise ValueError(
            f"convert: all names should begin with params/ or batch_stats/, because some do, but "
            f"{others} do not; write --leave-out for each of them"
        )
    if options.count is not None:
        raise ValueError(
            "convert: --count should be given for a state dict only, because variables have their "
            "counts, but the source has variables; leave it out"
        )
    origin: dict[str, str] = {}
    for name in arrays:
        parts = [_decoded(part) for part in name.split("/")]
        dotted = ".".join(parts)
        if any("." in part or not part for part in parts):
            raise ValueError(
                f"convert: the parts of {name!r} should not be empty nor contain dots, because "
                f"PyTorch joins them by dots; rename them"
            )
        if dotted in origin:
            raise ValueError(
                f"convert: {origin[dotted]!r} and {name!r} should become different names, but "
                f"both become {dotted!r}; rename one of them"
            )
        origin[dotted] = name
    variables = nest("convert", {dotted: arrays[name] for dotted, name in origin.items()})
    entries = write_torch(
        variables, names=names, norms=options.norm, convert=None, track_running_stats=track
    )
    return entries, [
        (None if e.name is None else origin[f"{e.collection}.{e.name}"], e.torch_name, e.value)
        for e in entries
    ]


def _converted(arrays: Iterable[str], renamings: list[Renaming]) -> dict[str, Any]:
    """Returns the arrays to write by name, in the source's order; raises if one would be lost."""
    order = {name: i for i, name in enumerate(arrays)}
    lost = sorted(order.keys() - {source for source, _, _ in renamings})
    if lost:
        raise ValueError(
            f"convert: all arrays should be converted, but {lost} have no name in PyTorch; write "
            f"--leave-out for each of them"
        )
    origin: dict[str, str | None] = {}
    for source, target, _ in renamings:
        if target is not None and target in origin:
            raise ValueError(
                f"convert: {origin[target]!r} and {source!r} should become different names, but "
                f"both become {target!r}; write --names"
            )
        if target is not None:
            origin[target] = source
    renamings = sorted(renamings, key=lambda renaming: order.get(renaming[0] or "", len(order)))
    return {target: value for _, target, value in renamings if target is not None}


def _same_shards(shards: Any, prefix: str, renamings: list[Renaming]) -> list[list[str]]:
    """Returns the source's shards, with the new names; new arrays, like counts, go to the last."""
    shard_of = {name.removeprefix(prefix): i for i, names in enumerate(shards) for name in names}
    new: list[list[str]] = [[] for _ in shards] or [[]]
    for source, target, _ in renamings:
        if target is not None:
            new[shard_of.get(source or "", -1)].append(target)
    return [names for names in new if names] or [[]]


def _names(path: Path) -> dict[str, str]:
    names = _files.read_json("convert", path)
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(
            f'convert: {path} should map names to names, such as {{"layer1.0": "Block_0"}}, but '
            f"does not"
        )
    return names


def _file_name(entry: Entry) -> str | None:
    """Returns the name of a variable in a file: its parts, encoded and joined by slashes."""
    if entry.name is None:
        return None
    parts = [entry.collection, *entry.name.split(".")]
    return "/".join(part.replace("%", "%25").replace("/", "%2F") for part in parts)


def _decoded(part: str) -> str:
    return part.replace("%2F", "/").replace("%25", "%")


def table(entries: list[Entry]) -> str:
    """Returns a table with a row for each array: both names, the shape, the dtype and a note."""
    rows = [("PyTorch", "Flax", "shape", "dtype", "")]
    for entry in entries:
        shape = "x".join(map(str, entry.value.shape)) or "()"
        row = (entry.torch_name or "-", _file_name(entry) or "-", shape, str(entry.value.dtype))
        rows.append((*row, entry.note))
    lines = table_lines(rows)
    lines.insert(1, "-" * max(map(len, lines)))
    modules = {split(e.name)[0] for e in entries if e.name and split(e.name)[1] in NORM_LEAVES}
    return "\n".join(
        [*lines, "", f"{len(entries)} arrays, among them those of {len(modules)} norm(s)"]
    )
