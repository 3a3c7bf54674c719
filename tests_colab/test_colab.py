"""Tests that the first cells of the notebooks replace nothing that a notebook service has.

Colab and similar services come with versions of JAX, NumPy and matplotlib that fit their
accelerators and each other, and that are seldom the newest.
"""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))
# What Colab had, except JAX and Flax: these are the lowest that jaxnorm works with.
SERVICE = [
    *("jax==0.10.2", "jaxlib==0.10.2", "flax==0.12.7", "optax==0.2.5"),
    *("numpy==2.0.2", "matplotlib==3.10.0", "scikit-learn==1.6.1", "tqdm==4.67.1"),
]
# jax2onnx needs an older one, which the service does not import by itself.
REPLACED = {"orbax-checkpoint"}


def run(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout


def wanted(notebook):
    """Returns what the first cell installs, from this checkout; services have PyTorch already."""
    lines = re.findall(r"^# %pip install --quiet (.*)$", notebook.read_text(), re.M)
    assert lines
    found = [requirement for line in lines for requirement in shlex.split(line)]
    here = [re.sub(r"git\+https\S+", f"file://{ROOT}", requirement) for requirement in found]
    assert here != found
    return [requirement for requirement in here if requirement != "torch"]


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The Python of an environment like the service's."""
    folder = tmp_path_factory.mktemp("service")
    run(sys.executable, "-m", "venv", folder)
    run(folder / "bin" / "pip", "install", "--no-compile", *SERVICE)
    return folder / "bin" / "python"


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def versions(python):
    """Returns the installed packages and their versions."""
    lines = run(python, "-m", "pip", "list", "--format", "freeze").splitlines()
    pairs = [re.match(r"(\S+?)(?:==| @ )(.*)", line).groups() for line in lines]
    return {canonical(name): version for name, version in pairs}


def test_the_first_cells_of_all_notebooks_would_replace_nothing(python):
    # Together, since more requirements can only replace more.
    requirements = {requirement for notebook in NOTEBOOKS for requirement in wanted(notebook)}
    command = ("-m", "pip", "install", "--quiet", "--dry-run", "--report", "-", *requirements)
    report = json.loads(run(python, *command))
    new = {canonical(package["metadata"]["name"]) for package in report["install"]}
    assert {"jaxnorm", "jax2onnx", "keras"} <= new
    assert not (new & set(versions(python))) - REPLACED


def test_after_the_first_cell_the_versions_are_the_same_and_jaxnorm_works(python):
    before = versions(python)
    (quickstart,) = wanted(ROOT / "notebooks" / "quickstart.py")
    run(python, "-m", "pip", "install", "--quiet", "--no-compile", quickstart)
    after = versions(python)
    assert {name: after.get(name) for name in before} == before
    assert set(after) - set(before) == {"jaxnorm"}
    used = run(
        python,
        "-I",  # not this checkout
        "-c",
        "import jax.numpy as jnp, jaxnorm, jaxnorm.linen, jaxnorm.nnx, jaxnorm.inspect\n"
        "print(jaxnorm.__file__, jaxnorm.batch_norm(jnp.ones((2, 3)))[0].shape)",
    )
    assert "site-packages" in used
    assert "(2, 3)" in used
