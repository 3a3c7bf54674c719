"""What does the command line do? It converts a file of weights, and shows what became of each.

python -m jaxnorm.interop convert IN.safetensors OUT.safetensors [--names MAP.json]
"""

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxnorm.interop import _leaves
from jaxnorm.interop._from_torch import read_torch, variables_of
from jaxnorm.interop._leaves import Entry
from jaxnorm.interop._to_torch import write_torch
from jaxnorm.interop._trees import flatten, nest, split

NORMS_HAVE = ("scale", "mean")
COLLECTIONS = ("params", "batch_stats")


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line and converts."""
    parser = argparse.ArgumentParser(prog="python -m jaxnorm.interop", description=__doc__)
    commands = parser.add_subparsers(required=True)
    convert = commands.add_parser(
        "convert",
        help="convert a .safetensors file",
        description="A PyTorch state dict becomes variables, with names such as "
        "params/layer1/0/bn1/scale; a file of such names becomes a state dict again.",
    )
    convert.add_argument("source", type=Path, metavar="IN.safetensors")
    convert.add_argument("target", type=Path, metavar="OUT.safetensors")
    convert.add_argument(
        "--names",
        "--map",
        type=Path,
        metavar="MAP.json",
        help='what modules are called here: {"layer1.0": "Block_0"}, from PyTorch, either way',
    )
    convert.add_argument(
        "--norm", action="append", metavar="NAME", help="a module that is a norm; all, if given"
    )
    convert.add_argument("--count", type=int, help="of norms without num_batches_tracked")
    convert.add_argument(
        "--no-running-stats", action="store_true", help="leave the running statistics out"
    )
    options = parser.parse_args(arguments)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            print(convert_file(options))
        for warning in caught:
            print(f"note: {warning.message}", file=sys.stderr)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"{parser.prog}: {error}")


def convert_file(options: Any) -> str:
    """Reads, converts and writes; the table of what was done."""
    safetensors = _leaves.safetensors("convert")
    try:
        arrays = safetensors.load_file(options.source)
    except Exception as error:  # the library's own type of error is not public
        raise ValueError(
            f"{options.source}: it should be a .safetensors file, but {error}"
        ) from error
    names = json.loads(options.names.read_text()) if options.names else None
    track = False if options.no_running_stats else None
    if any(name.startswith(tuple(f"{c}/" for c in COLLECTIONS)) for name in arrays):
        dotted = {name.replace("/", "."): value for name, value in arrays.items()}
        variables: dict[str, Any] = nest("convert", dotted)
        entries = write_torch(variables, names=names, convert=None, track_running_stats=track)
        result = {e.theirs: e.value for e in entries if e.theirs is not None}
    else:
        entries = read_torch(
            arrays,
            names=names,
            norms=options.norm,
            convert=None,
            track_running_stats=track,
            count=options.count,
        )
        flat = flatten("convert", variables_of(entries))
        result = {name.replace(".", "/"): np.array(a, order="C") for name, a in flat.items()}
    safetensors.save_file(result, options.target)
    return table(entries)


def table(entries: list[Entry]) -> str:
    """A row for each array: its names there and here, its shape and dtype, what became of it."""
    rows = [("PyTorch", "here", "shape", "dtype", "")]
    for entry in entries:
        ours = None if entry.ours is None else f"{entry.collection}.{entry.ours}".replace(".", "/")
        shape = "x".join(map(str, entry.value.shape)) or "()"
        rows.append((entry.theirs or "-", ours or "-", shape, str(entry.value.dtype), entry.note))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4]]).rstrip()
        for row in rows
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    modules = {split(e.ours)[0] for e in entries if e.ours and split(e.ours)[1] in NORMS_HAVE}
    return "\n".join(
        [*lines, "", f"{len(entries)} arrays, among them those of {len(modules)} norm(s)"]
    )


if __name__ == "__main__":
    main()
