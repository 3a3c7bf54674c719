"""Promises that hold across files: names, arguments, documents."""

import dataclasses
import inspect
import pathlib
import re
import subprocess
import sys

import pytest

import jaxnorm
import jaxnorm.linen

ROOT = pathlib.Path(__file__).parent.parent
FUNCTIONS = [f for _, f in inspect.getmembers(jaxnorm, inspect.isfunction)]
LAYERS = [
    layer
    for _, layer in inspect.getmembers(jaxnorm.linen, inspect.isclass)
    if layer.__module__ == "jaxnorm.linen"
]
NORMS = [jaxnorm.batch_norm, jaxnorm.instance_norm]


def python(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )


def test_the_functions_import_jax_alone():
    code = "import jaxnorm, sys; print([m for m in ('flax', 'torch', 'optax') if m in sys.modules])"
    assert python(code).stdout == "[]\n"


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_every_function_documents_its_arguments_its_result_an_example_and_its_source(function):
    doc = inspect.getdoc(function)
    sections = re.findall(r"^(Args|Returns|Raises|Example|References):$", doc, re.M)
    assert sections == [
        s for s in ("Args", "Returns", "Raises", "Example", "References") if s in sections
    ]
    assert {"Args", "Returns", "Example", "References"} <= set(sections)
    documented = re.findall(r"^  (\w+): ", doc[doc.index("Args:") : doc.index("Returns:")], re.M)
    assert documented == list(inspect.signature(function).parameters)


@pytest.mark.parametrize(
    "layer", [c for c in LAYERS if c.__name__[-1] != "d"], ids=lambda c: c.__name__
)
def test_every_layer_documents_its_attributes(layer):
    doc = inspect.getdoc(layer)
    documented = re.findall(
        r"^  (\w+): ", doc[doc.index("Attributes:") : doc.index("Raises:")], re.M
    )
    fields = [field.name for field in dataclasses.fields(layer)]
    assert documented == [name for name in fields if name not in ("parent", "name")]


def test_one_argument_has_one_default_everywhere():
    defaults = {}
    for norm in NORMS:
        for name, parameter in inspect.signature(norm).parameters.items():
            defaults.setdefault(name, set()).add((parameter.kind, parameter.default))
    assert {name for name, found in defaults.items() if len(found) > 1} == set()


def test_batch_and_instance_norm_take_the_same_arguments():
    batch, instance = (set(inspect.signature(norm).parameters) for norm in NORMS)
    assert instance - batch == {"batch_axis"}
    assert batch - instance == set()


def test_arrays_are_positional_and_options_keywords():
    for norm in NORMS:
        kinds = [p.kind for p in inspect.signature(norm).parameters.values()]
        positional, keyword = (
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            inspect.Parameter.KEYWORD_ONLY,
        )
        assert kinds == [positional] * 3 + [keyword] * (len(kinds) - 3)


def test_every_file_says_which_question_it_answers():
    for path in (ROOT / "jaxnorm").glob("*.py"):
        assert re.match(r'"""[A-Z][^\n]*\?', path.read_text()), path.name


def test_the_readme_s_code_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_the_readme_names_every_room():
    readme = (ROOT / "README.md").read_text()
    rooms = {path.name for path in (ROOT / "jaxnorm").glob("*.py")}
    assert rooms <= set(re.findall(r"[_\w]+\.py", readme))
