"""Tests that docs/distributed.md has the communication costs of the compiled programs."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
TABLE = re.compile(r"(?:^\|.*\n)+", re.M)


@pytest.mark.slow
def test_the_page_has_the_benchmark_s_tables():
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "collectives.py"],
        env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    page = (ROOT / "docs" / "distributed.md").read_text()
    _, cost = page.split("\n## Communication cost\n")
    assert TABLE.findall(cost)[:2] == TABLE.findall(done.stdout)
    assert len(TABLE.findall(cost)) == 3  # only the third needs libtpu
