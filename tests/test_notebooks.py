"""Tests that the notebooks are generated from their sources."""

import re
from pathlib import Path

import pytest

jupytext, nbformat = map(pytest.importorskip, ("jupytext", "nbformat"))

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "notebooks").glob("*.py"))


def cells(path):
    return [(cell.cell_type, cell.source) for cell in jupytext.read(path).cells]


def test_there_are_six():
    assert {path.stem for path in SCRIPTS} == {
        "quickstart",
        "instance_vs_batch",
        "choosing_a_norm",
        "from_pytorch",
        "numerics",
        "many_devices",
    }
    assert {p.stem for p in (ROOT / "notebooks").glob("*.ipynb")} == {p.stem for p in SCRIPTS}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_notebook_is_its_script_without_outputs(script):
    notebook = script.with_suffix(".ipynb")
    assert cells(notebook) == cells(script), "write: make notebooks"
    for cell in nbformat.read(notebook, as_version=4).cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_it_opens_with_a_badge_a_title_and_one_cell_that_installs(script):
    notebook = jupytext.read(script)
    opening, install = notebook.cells[:2]
    path = f"github/jaxnorm/jaxnorm/blob/main/notebooks/{script.stem}.ipynb"
    badge = r"\[!\[Open In Colab\]\(https://\S+\)\]\(https://colab.research.google.com/(\S+)\)"
    assert re.findall(rf"^{badge}\n\n# \w", opening.source) == [path]
    assert install.metadata["tags"] == ["skip-execution"]
    assert re.search(r'"jaxnorm\[[a-z,]+\] @ git\+https', install.source)
