"""Tests that the notebooks are generated from their sources, and that their outputs are current."""

import base64
import importlib.util
import re
from pathlib import Path

import pytest

jupytext, nbformat, _ = map(pytest.importorskip, ("jupytext", "nbformat", "nbclient"))

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "notebooks").glob("*.py"))
each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
SKIPPED = ["skip-execution"]

spec = importlib.util.spec_from_file_location("notebooks", ROOT / "docs" / "site" / "notebooks.py")
builder = importlib.util.module_from_spec(spec)
spec.loader.exec_module(builder)


def cells(path):
    return [(cell.cell_type, cell.source) for cell in jupytext.read(path).cells]


def code(script):
    """Returns the code cells of the script's notebook."""
    notebook = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(output):
    """Returns the parts of an output that are text."""
    parts = {"text/plain": output.get("text", ""), **output.get("data", {})}
    return "\n".join(part for kind, part in parts.items() if kind.startswith("text/"))


def test_there_are_seven():
    assert {path.stem for path in SCRIPTS} == {
        "quickstart",
        "instance_vs_batch",
        "choosing_a_norm",
        "migrating",
        "from_pytorch",
        "numerics",
        "many_devices",
    }
    assert {p.stem for p in (ROOT / "notebooks").glob("*.ipynb")} == {p.stem for p in SCRIPTS}


@each_script
def test_a_notebook_has_the_cells_of_its_script(script):
    assert cells(script.with_suffix(".ipynb")) == cells(script), "write: make notebooks"


@each_script
def test_its_outputs_are_those_of_this_code_and_this_version(script):
    notebook = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    assert notebook.metadata["jaxnorm"] == builder.stamp(jupytext.read(script)), (
        "write: make notebooks"
    )


@each_script
def test_every_cell_was_run_in_order_and_without_errors_except_the_one_that_installs(script):
    run = [cell for cell in code(script) if cell.metadata.get("tags") != SKIPPED]
    assert [cell.execution_count for cell in run] == list(range(1, len(run) + 1))
    assert len(code(script)) == len(run) + 1
    for cell in run:
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr"


@each_script
def test_every_plot_is_there_and_the_file_is_small(script):
    plots = [cell for cell in code(script) if "plt.show()" in cell.source]
    assert plots
    for cell in plots:
        assert any("image/png" in output.get("data", {}) for output in cell.outputs)
    assert script.with_suffix(".ipynb").stat().st_size < 1e6


@each_script
def test_no_output_has_a_path_or_an_address_of_the_machine(script):
    for cell in code(script):
        for output in cell.outputs:
            assert not re.search(r"(?<![\w.:/])/(home|root|tmp|usr|opt|var|Users)/", texts(output))
            assert not re.search(r"\b0x[0-9a-f]{9,}\b", texts(output))


@pytest.mark.parametrize("name", builder.PICTURES)
def test_a_picture_of_the_documents_is_that_of_the_notebook(name):
    notebook = nbformat.read(ROOT / "notebooks" / f"{builder.PICTURES[name]}.ipynb", as_version=4)
    picture = base64.b64decode(builder.first_picture(notebook))
    assert (ROOT / name).read_bytes() == picture, "write: make notebooks"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with one notebook. Running it is replaced by numbering its cells."""
    (tmp_path / "notebooks").mkdir()
    runs = []

    def execute(notebook, python):
        runs.append(python)
        for number, cell in enumerate(builder.code_cells(notebook), start=1):
            text = f"{tmp_path}/notebooks/a.py, run {len(runs)}"
            bar = {"name": "stderr", "text": "100%|####| 5/5 [00:01, 4.5it/s]"}
            outputs = [{"name": "stdout", "text": text}, bar]
            cell.outputs = [nbformat.v4.new_output("stream", **o) for o in outputs]
            cell.execution_count = number

    monkeypatch.setattr(builder, "ROOT", tmp_path)
    monkeypatch.setattr(builder, "execute", execute)
    monkeypatch.setenv("ONNX_PYTHON", "the python with ONNX")

    def build(source, *names, version="1.0"):
        """Writes the source and the version, and returns the text, its output and the runs."""
        (tmp_path / "notebooks" / "a.py").write_text(source)
        (tmp_path / "pyproject.toml").write_text(f"[project]\nversion = '{version}'")
        builder.main(names)
        text, run = nbformat.read(tmp_path / "notebooks" / "a.ipynb", as_version=4).cells
        return text.source, [output.text for output in run.outputs], len(runs)

    build.runs = runs
    return build


SOURCE = "# %% [markdown]\n# Text.\n\n# %%\nprint(1)\n"


def test_a_notebook_runs_again_when_its_code_or_the_version_changes(project):
    first = "Text.", ["notebooks/a.py, run 1"], 1  # without the folder and the progress bar
    assert project(SOURCE) == first
    assert project(SOURCE) == first
    assert project(SOURCE.replace("Text", "Other text")) == ("Other text.", *first[1:])
    assert project(SOURCE.replace("1", "2")) == ("Text.", ["notebooks/a.py, run 2"], 2)
    assert project(SOURCE, version="1.1")[2] == 3
    assert project(SOURCE, version="1.1")[2] == 3
    assert project(SOURCE, "a", version="1.1")[2] == 4
    assert "the python with ONNX" not in project.runs


def test_a_notebook_with_the_export_to_onnx_runs_in_its_environment(project):
    project(SOURCE.replace("print(1)", "import jaxnorm.onnx"))
    assert project.runs == ["the python with ONNX"]


@each_script
def test_it_opens_with_a_badge_a_title_and_one_cell_that_installs(script):
    notebook = jupytext.read(script)
    opening, install = notebook.cells[:2]
    path = f"github/jaxnorm/jaxnorm/blob/main/notebooks/{script.stem}.ipynb"
    badge = r"\[!\[Open In Colab\]\(https://\S+\)\]\(https://colab.research.google.com/(\S+)\)"
    assert re.findall(rf"^{badge}\n\n# \w", opening.source) == [path]
    assert install.metadata["tags"] == SKIPPED
    assert re.search(r'"jaxnorm\[[a-z,]+\] @ git\+https', install.source)
