"""Reads a .safetensors file as views of the memory-mapped file, and writes one array by array."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

# The names of the dtypes in the format. The library's NumPy functions cannot read 8-bit floats.
DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    **{f"{kind.upper()}{8 * n}": np.dtype(f"<{kind}{n}") for kind in "iu" for n in (1, 2, 4, 8)},
    **{f"F{8 * n}": np.dtype(f"<f{n}") for n in (2, 4, 8)},
    "C64": np.dtype("<c8"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}


def safetensors(function: str) -> ModuleType:
    """Returns the safetensors library, which is imported only to read and write files."""
    try:
        import safetensors
    except ImportError as error:
        raise ImportError(
            f"{function}: safetensors should be installed, because files need it, but is missing; "
            f"write pip install 'jaxnorm[interop]'"
        ) from error
    return safetensors


def read(function: str, path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns views of the mapped file, which the library has checked, and its metadata."""
    try:
        with safetensors(function).safe_open(path, framework="np"):
            pass
    except (OSError, ImportError):
        raise
    except Exception as error:  # the library's own type of error is not public
        raise ValueError(
            f"{function}: {path} should be a .safetensors file, but {error}"
        ) from error
    # Read-only, because a writable mapping must not be larger than the machine's memory.
    data = np.asarray(np.memmap(path, np.uint8, mode="r"))
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8:start].tobytes())
    metadata = header.pop("__metadata__", None) or {}
    unknown = {name: e["dtype"] for name, e in header.items() if e["dtype"] not in DTYPES}
    if unknown:
        raise ValueError(
            f"{function}: {path} should have arrays of the dtypes {list(DTYPES)}, but has {unknown}"
        )
    return {name: _view(data[start:], e) for name, e in header.items()}, metadata


def _view(data: np.ndarray, entry: Mapping[str, Any]) -> np.ndarray:
    begin, end = entry["data_offsets"]
    return data[begin:end].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])


def writable(function: str, path: Path, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the arrays in little-endian order; raises if the format lacks one of their dtypes."""
    found = {name: np.asarray(a, a.dtype.newbyteorder("<")) for name, a in arrays.items()}
    unknown = {name: str(a.dtype) for name, a in found.items() if a.dtype not in CODES}
    if unknown:
        raise ValueError(
            f"{function}: {path} should have arrays of the dtypes {list(DTYPES)}, but would have "
            f"{unknown}"
        )
    return found


def write(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes the arrays one by one; an array is copied only if it is not contiguous."""
    # As in the library, the widest dtypes come first, so that all arrays are aligned.
    order = sorted(arrays, key=lambda name: -arrays[name].itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        a = arrays[name]
        begin, end = end, end + a.nbytes
        header[name] = {
            "dtype": CODES[a.dtype],
            "shape": list(a.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8).data)
