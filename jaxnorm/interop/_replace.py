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
_LOCK = threading.Lock()  # the temporary files of two threads would have the same names


def check_path(function: str, file: Path, *, replace: bool) -> None:
    """Checks that a file may be written to this path."""
    if not file.parent.is_dir():
        raise ValueError(
            f"{function}: {file} should be in a folder that exists, but {str(file.parent)!r} does "
            f"not; create it"
        )
    if file.is_dir():
        raise ValueError(
            f"{function}: {file} should be a file, but is a folder; add the name of a file"
        )
    if file.exists() and not file.is_file():
        raise ValueError(f"{function}: {file} should be a regular file, but is a device or a pipe")
    if file.exists() and not replace:
        raise ValueError(
            f"{function}: {file} should be a new file, but exists; write another name, or --force "
            f"to replace it"
        )


@contextlib.contextmanager
def replacing(files: Sequence[Path]) -> Iterator[list[Path]]:
    """Yields a temporary path for each file, and renames the files when the block ends."""
    targets = [Path(os.path.realpath(file)) for file in files]  # follows links
    temporaries = [_temporary(target) for target in targets]
    with _LOCK:
        for folder in {target.parent for target in targets}:
            _remove_leftovers(folder)
        try:
            yield temporaries
            for path in temporaries:
                with path.open("r+b") as file:
                    os.fsync(file.fileno())
            for path, target in zip(temporaries, targets, strict=True):
                os.replace(path, target)
        finally:
            for path in temporaries:
                path.unlink(missing_ok=True)


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.{platform.node()}.{os.getpid()}{SUFFIX}")


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
