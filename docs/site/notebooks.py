"""Writes notebooks/*.ipynb from notebooks/*.py, and runs those whose outputs are out of date.

The outputs depend on the code cells and on the version of the package, which each notebook's
metadata record. A change of the text keeps the outputs.

python docs/site/notebooks.py              # every notebook
python docs/site/notebooks.py quickstart   # this one, even if its outputs are current
"""

import base64
import hashlib
import os
import re
import sys
import tomllib
from pathlib import Path

import jupytext
import nbformat
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
SKIP = "skip-execution"  # the tag of cells that install packages
# Pictures of the documents, and the notebooks whose first picture they are.
PICTURES = {"docs/images/offset_sweep.png": "numerics"}


class OneKernel(KernelSpecManager):
    """Starts the kernel of one Python, whatever the name of the kernel is."""

    def __init__(self, python):
        super().__init__()
        self._python = python

    def get_kernel_spec(self, kernel_name):
        """Returns what starts the kernel."""
        command = [self._python, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=command, display_name="Python 3", language="python")


def code_cells(notebook):
    """Returns the cells with code."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def stamp(notebook):
    """Returns what the outputs depend on: a hash of the code, and the version of the package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    code = "\0".join(cell.source for cell in code_cells(notebook))
    return {"source": hashlib.sha256(code.encode()).hexdigest(), "version": project["version"]}


def read(script):
    """Returns the script as a notebook without outputs, which is the same each time."""
    notebook = jupytext.read(script)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # new cells get random ids
    notebook.metadata.pop("jupytext", None)
    notebook.metadata["jaxnorm"] = stamp(notebook)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    return notebook


def copy_outputs(old, new):
    """Takes the outputs from a notebook with the same code."""
    for source, cell in zip(code_cells(old), code_cells(new), strict=True):
        cell.outputs, cell.execution_count = source.outputs, source.execution_count


def execute(notebook, python):
    """Runs the cells with this Python, and raises the first error."""
    client = NotebookClient(
        notebook,
        km=AsyncKernelManager(kernel_spec_manager=OneKernel(python)),
        timeout=None,
        record_timing=False,
        skip_cells_with_tag=SKIP,
        resources={"metadata": {"path": str(ROOT / "notebooks")}},
    )
    client.execute(cleanup_kc=True)  # ends the kernel
    notebook.metadata.pop("language_info", None)  # has the version of Python


def clean(notebook):
    """Removes progress bars from the outputs, and folders from what is left."""
    folders = rf"{re.escape(str(ROOT))}/|/\S*/site-packages/"
    for cell in code_cells(notebook):
        cell.outputs = [
            o for o in cell.outputs if o.get("name") != "stderr" or "it/s" not in o.text
        ]
        for output in cell.outputs:
            if output.output_type == "stream":
                output.text = re.sub(folders, "", output.text)


def first_picture(notebook):
    """Returns the first picture of a notebook, in base64."""
    outputs = (output for cell in code_cells(notebook) for output in cell.outputs)
    return next(o.data["image/png"] for o in outputs if "image/png" in o.get("data", {}))


def main(names):
    """Writes the notebooks; those that are named are run again."""
    for script in sorted((ROOT / "notebooks").glob("*.py")):
        path = script.with_suffix(".ipynb")
        notebook = read(script)
        old = nbformat.read(path, as_version=4) if path.exists() else nbformat.v4.new_notebook()
        if script.stem in names or old.metadata.get("jaxnorm") != notebook.metadata["jaxnorm"]:
            print(f"running {path.name}", flush=True)
            # jax2onnx needs an environment of its own.
            onnx = "import jaxnorm.onnx" in script.read_text()
            execute(notebook, os.environ["ONNX_PYTHON"] if onnx else sys.executable)
            clean(notebook)
        else:
            copy_outputs(old, notebook)
        nbformat.write(notebook, path)
        for name, stem in PICTURES.items():
            if stem == script.stem:
                (ROOT / name).write_bytes(base64.b64decode(first_picture(notebook)))


if __name__ == "__main__":
    main(sys.argv[1:])
