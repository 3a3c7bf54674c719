"""Converts a file of arrays from the command line, and prints a table of the converted arrays.

python -m jaxnorm.interop convert IN OUT.safetensors [--names MAP.json]
"""

import argparse
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from jaxnorm.interop._convert import convert_file
from jaxnorm.interop._from_torch import MAX_COUNT

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line and converts."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", UserWarning)
            print(convert_file(options))
        for warning in caught:
            print(f"note: {warning.message}", file=sys.stderr)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"{parser.prog}: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jaxnorm.interop", description=__doc__)
    convert = parser.add_subparsers(required=True).add_parser(
        "convert",
        help="convert a file of arrays",
        description="A PyTorch state dict becomes variables, with names such as "
        "params/layer1/0/bn1/scale; a file of such names becomes a state dict again.",
    )
    convert.add_argument(
        "source",
        type=Path,
        metavar="IN",
        help=".safetensors, .index.json of shards, .pt, .pth, .bin or .ckpt",
    )
    convert.add_argument(
        "target", type=Path, metavar="OUT", help=".safetensors, or .safetensors.index.json"
    )
    _add_options(convert)
    return parser


def _add_options(convert: argparse.ArgumentParser) -> None:
    convert.add_argument(
        "--names",
        "--map",
        type=Path,
        metavar="MAP.json",
        help='new names of modules, {"layer1.0": "Block_0"}; the same map in both directions',
    )
    convert.add_argument(
        "--norm",
        action="append",
        metavar="NAME",
        help="the name of a norm; repeat the option for all norms",
    )
    convert.add_argument("--count", type=_count, help="count of norms without num_batches_tracked")
    convert.add_argument(
        "--no-running-stats", action="store_true", help="leave the running statistics out"
    )
    convert.add_argument("--key", help="key of the state dict in a checkpoint, such as state_dict")
    convert.add_argument("--prefix", help="prefix to remove from every name, such as module.")
    convert.add_argument(
        "--leave-out",
        action="append",
        default=[],
        metavar="NAME",
        help="a name in the file to leave out; * matches any text",
    )
    convert.add_argument("--force", action="store_true", help="replace files that exist")
    convert.add_argument(
        "--shard-size", type=_size, metavar="2GB", help="write shards of at most this size"
    )


def _count(text: str) -> int:
    count = int(text)
    if not 0 <= count <= MAX_COUNT:
        raise argparse.ArgumentTypeError(f"it should be from 0 to {MAX_COUNT}, but is {count}")
    return count


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) *([KMG]I?|)B?", text.upper(), re.ASCII)
    size = int(float(found[1]) * UNITS[found[2]]) if found else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"it should be a size such as 2GB, but is {text!r}")
    return size


if __name__ == "__main__":
    main()
