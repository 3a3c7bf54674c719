"""Tests with mypy --strict which code type checkers accept and reject."""

import os
import pathlib
import re
import subprocess
import sys

import pytest
import typing_user

pytest.importorskip("mypy")

TESTS = pathlib.Path(__file__).parent
ROOT = TESTS.parent
CONFIG = TESTS / "typing_user.ini"
ACCEPTED, REJECTED = TESTS / "typing_user.py", TESTS / "typing_rejected.py"


@pytest.fixture(scope="module")
def reported():
    """Returns the error codes that mypy reports, by file and line."""
    options = ["--config-file", CONFIG, "--cache-dir", ROOT / "build" / "mypy"]
    found = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-error-summary", *options, ACCEPTED, REJECTED],
        capture_output=True,
        text=True,
        check=False,
        cwd=TESTS,
        env={**os.environ, "MYPYPATH": str(ROOT)},
    )
    assert not found.stderr, found.stderr
    errors = re.findall(r"^(\S+\.py):(\d+): error: .*\[([\w-]+)\]$", found.stdout, re.M)
    return {(file, int(line), code) for file, line, code in errors}


def test_correct_code_is_accepted(reported):
    assert {error for error in reported if error[0] == ACCEPTED.name} == set()


def test_mistakes_are_rejected(reported):
    expected = {
        (REJECTED.name, number, code)
        for number, line in enumerate(REJECTED.read_text().splitlines(), 1)
        if "# rejected: " in line
        for code in line.partition("# rejected: ")[2].split(", ")
    }
    assert len(expected) > 20
    assert {error for error in reported if error[0] == REJECTED.name} == expected


def test_the_correct_code_runs():
    typing_user.main()
