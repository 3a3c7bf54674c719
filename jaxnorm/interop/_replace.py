"""Replaces files atomically: a new file is either complete or does not exist.

Files are written to temporary files in the same folder, flushed, and renamed when all are complete.
"""

import contextlib
import os
import platform
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

SUFFIX = ".jaxnorm-tmp"
_ONE = threading.Lock()  # two threads would give their temporary files the same names


def check_place(function: str, file: Path, *, replace: bool) -> None:
    """Checks that a file may be written to this path."""
    if not file.parent.is_dir():
        raise ValueError(
            f"{function}: {file} should be in a folder, but {str(file.parent)!r} is none; make it"
        )
    if file.is_dir():
        raise ValueError(f"{function}: {file} should be a file, but is a folder; add a file's name")
    if file.exists() and not file.is_file():
        raise ValueError(f"{function}: {file} should be a regular file, but is a device or a pipe")
    if file.exists() and not replace:
        raise ValueError(
            f"{function}: {file} should be a new file, but exists; write another name, or --force "
            f"to replace it"
        )


@contextlib.contextmanager
def put(files: Sequence[Path]) -> Iterator[list[Path]]:
    """Yields a temporary path for each file, and renames the files when the block ends."""
    places = [Path(os.path.realpath(file)) for file in files]  # replaces the target of a link
    written = [_temporary(place) for place in places]
    with _ONE:
        for folder in {place.parent for place in places}:
            _remove_leftovers(folder)
        try:
            yield written
            for path in written:
                with path.open("r+b") as file:
                    os.fsync(file.fileno())
            for path, place in zip(written, places, strict=True):
                os.replace(path, place)
        finally:
            for path in written:
                path.unlink(missing_ok=True)


def _temporary(place: Path) -> Path:
    return place.with_name(f".{place.name}.{platform.node()}.{os.getpid()}{SUFFIX}")


def _remove_leftovers(folder: Path) -> None:
    """Removes the temporary files of processes on this machine that have ended."""
    for path in folder.glob(f".*{SUFFIX}"):
        rest, _, process = path.name.removesuffix(SUFFIX).rpartition(".")
        if rest.endswith(f".{platform.node()}") and process.isdecimal() and _ended(int(process)):
            path.unlink(missing_ok=True)


def _ended(process: int) -> bool:
    if os.name != "posix":  # on other systems, os.kill would end the process
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        pass
    return False
