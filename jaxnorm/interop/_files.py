"""Reads and writes .safetensors files, also in shards, and reads files of torch.save.

The arrays are views of the memory-mapped file, so that only arrays that are changed need memory.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxnorm.interop import _safetensors
from jaxnorm.interop._replace import check_path, replacing

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
SUFFIX, INDEX_SUFFIX = ".safetensors", ".index.json"
SHARD_SIZE = 5 * 10**9  # the default of Hugging Face's libraries


class Contents(NamedTuple):
    """The arrays and the metadata of a file."""

    arrays: Any  # a dict of arrays by name, or any object if the file is one of torch.save
    metadata: Mapping[str, str] = {}  # in the headers of the .safetensors files
    index_metadata: Mapping[str, Any] = {}
    shards: Sequence[Sequence[str]] | None = None  # the names in each; None for a single file


# ---- Reading ----


def read(function: str, path: str | os.PathLike[str]) -> Contents:
    """Reads a .safetensors file, the shards of an index, or a file of torch.save."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(
            f"{function}: {path} should be a file of arrays, but is a folder; name a file in it"
        )
    if not path.is_file():
        raise ValueError(
            f"{function}: {path} should be a file of arrays, but there is none; check the path"
        )
    if path.name.endswith(INDEX_SUFFIX):
        return _read_shards(function, path)
    if path.suffix in TORCH_SUFFIXES:
        return Contents(_read_torch(function, path))
    return Contents(*_safetensors.read(function, path))


def read_json(function: str, path: Path) -> Any:
    """Reads a JSON file."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{function}: {path} should be a JSON file, but {error}") from error


def _read_shards(function: str, path: Path) -> Contents:
    """Reads the arrays of all files that an index names."""
    index = read_json(function, path)
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise ValueError(
            f'{function}: {path} should be an index of shards, with {{"weight_map": {{name: file}}'
            f"}}, but has none; save the model again, or read each shard"
        )
    arrays: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    shards = []
    for file in sorted({*files.values()}):  # an index may be in alphabetical order of the arrays
        if Path(file).name != file or file.endswith(INDEX_SUFFIX):  # only files in the same folder
            raise ValueError(
                f"{function}: {path} should name files in its folder, but names {file!r}"
            )
        shard = read(function, path.parent / file)
        found = shard.arrays if isinstance(shard.arrays, Mapping) else {}
        differ = {name for name in files if files[name] == file}.symmetric_difference(found)
        if differ:
            raise ValueError(
                f"{function}: {file} should hold the arrays that {path} lists, but they differ in "
                f"{sorted(map(str, differ))}"
            )
        arrays |= found
        metadata = {**shard.metadata, **metadata}
        shards.append(list(found))
    about = index.get("metadata")
    index_metadata = about if isinstance(about, dict) else {}
    return Contents(arrays, metadata, index_metadata, shards)


def _read_torch(function: str, path: Path) -> Any:
    """Reads a file of torch.save; only tensors and plain containers are unpickled."""
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"{function}: {path} needs PyTorch to be read; write pip install torch, or, where it "
            f"was saved, safetensors.torch.save_file(model.state_dict(), '{path.stem}.safetensors')"
        ) from error
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"  # files of PyTorch before 1.6 cannot be mapped
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:
        # PyTorch's message suggests running the code in the file, which is unsafe.
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(
            f"{function}: {path} should hold tensors in dicts, but "
            f"{f'has a pickled {found[1]}' if found else 'PyTorch cannot read it as such'}; where "
            f"it was saved, write torch.save(model.state_dict(), {path.name!r})"
        ) from error


# ---- Writing ----


def check_target(function: str, path: Path, *, replace: bool) -> None:
    """Checks that the path names a file that can be written, and replaced if it exists."""
    if path.suffix in TORCH_SUFFIXES:
        raise ValueError(
            f"{function}: {path} should be a .safetensors file, but is one of torch.save; write "
            f"{path.stem}.safetensors, which PyTorch loads by "
            f"model.load_state_dict(safetensors.torch.load_file('{path.stem}.safetensors'))"
        )
    check_path(function, path, replace=replace)
    if not path.name.removesuffix(INDEX_SUFFIX).endswith(SUFFIX):
        raise ValueError(
            f"{function}: {path} should end in .safetensors, or in .safetensors.index.json for "
            f"shards; write {path.name}.safetensors"
        )


def write(
    function: str, path: str | os.PathLike[str], contents: Contents, *, replace: bool = True
) -> list[Path]:
    """Writes a .safetensors file, or shards and their index.

    All files are complete before the first one is renamed, because the arrays may be views of
    files that are replaced.
    """
    path = Path(path)
    check_target(function, path, replace=replace)
    arrays = _safetensors.writable(function, path, contents.arrays)
    single = path.with_name(path.name.removesuffix(INDEX_SUFFIX))
    index = single.with_name(single.name + INDEX_SUFFIX)
    shards = contents.shards
    if shards is None and path == index:
        shards = shards_of(contents.arrays, SHARD_SIZE)
    parts = _shard_files(single, shards) if shards is not None else {single: list(arrays)}
    files = [single] if shards is None else [*parts, index]
    for file in files:
        check_path(function, file, replace=replace)
    other = index if shards is None else single
    if other.exists():
        raise ValueError(
            f"{function}: {other} should not be in the folder of {files[-1].name}, because "
            f"libraries would load either of them, but is; remove it, or write another name"
        )
    with replacing(files) as paths:
        for temporary, names in zip(paths, parts.values(), strict=False):
            _safetensors.write(temporary, {name: arrays[name] for name in names}, contents.metadata)
        if shards is not None:
            total = {"total_size": sum(a.nbytes for a in arrays.values())}
            files_of = {name: file.name for file, names in parts.items() for name in names}
            entries = {"metadata": {**contents.index_metadata, **total}, "weight_map": files_of}
            paths[-1].write_text(json.dumps(entries, indent=2))
    return files


def shards_of(arrays: Mapping[str, Any], max_bytes: int) -> list[list[str]]:
    """Divides the names, in order, into shards of at most max_bytes or of one larger array."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, a in arrays.items():
        if shards[-1] and size + a.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += a.nbytes
    return shards


def _shard_files(single: Path, shards: Sequence[Sequence[str]]) -> dict[Path, Sequence[str]]:
    """Returns the shards by file name, named as the transformers library names them."""
    stem = single.name.removesuffix(SUFFIX)
    return {
        single.with_name(f"{stem}-{i:05d}-of-{len(shards):05d}{SUFFIX}"): names
        for i, names in enumerate(shards, 1)
    }
