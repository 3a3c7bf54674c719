"""Prints the lowest versions that pyproject.toml allows, as requirements for pip.

python tests/lowest.py              # of an install
python tests/lowest.py examples     # and of an extra
"""

import sys
import tomllib
from pathlib import Path


def lowest(extras: list[str]) -> list[str]:
    """Returns each requirement that has a lower bound, at this bound."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    wanted = list(project["dependencies"])
    for extra in extras:
        wanted += project["optional-dependencies"][extra]
    return [requirement.replace(">=", "==") for requirement in wanted if ">=" in requirement]


if __name__ == "__main__":
    print(*lowest(sys.argv[1:]), sep="\n")
