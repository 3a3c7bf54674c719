"""Runs the code blocks of the documents."""

import pathlib
import re

import pytest

DOCS = pathlib.Path(__file__).parent.parent / "docs"
# tests_onnx runs this page, because it needs jax2onnx.
PAGES = [page for page in sorted(DOCS.glob("*.md")) if page.name != "onnx.md"]
# `make test` runs the pages that new users read first.
FIRST_PAGES = ("index.md", "training.md", "masks.md", "dtypes.md", "watching.md")
BLOCKS = [
    (page.name, heading, code)
    for page in PAGES
    for heading, code in re.findall(
        r"^## ([^\n]*)\n.*?^```python\n(.*?)^```", page.read_text(), re.S | re.M
    )
]


def test_every_block_is_under_a_heading_of_its_own():
    written = sum(page.read_text().count("```python") for page in PAGES)
    assert len(BLOCKS) == len({block[:2] for block in BLOCKS}) == written > 20


@pytest.mark.parametrize(
    ("page", "heading", "code"),
    [
        pytest.param(
            *block,
            id=": ".join(block[:2]),
            marks=() if block[0] in FIRST_PAGES else pytest.mark.slow,
        )
        for block in BLOCKS
    ],
)
def test_the_code_of_the_page_runs(page, heading, code):
    assert "assert " in code  # each block checks its results
    if "import SummaryWriter" in code:
        pytest.importorskip("tensorboardX")
    exec(compile(code, f"docs/{page}: {heading}", "exec"), {})
