"""Tests names, arguments and docstrings of the public functions and layers."""

import dataclasses
import inspect
import pathlib
import re
import subprocess
import sys
import typing

import pytest

import jaxnorm
import jaxnorm.inspect
import jaxnorm.interop
import jaxnorm.linen
import jaxnorm.nnx

ROOT = pathlib.Path(__file__).parent.parent
FUNCTIONS = [
    f
    for module in (jaxnorm, jaxnorm.interop, jaxnorm.inspect)
    for name, f in inspect.getmembers(module, inspect.isfunction)
    if not name.startswith("_") and f.__module__.startswith(module.__name__)
]
LAYERS, NNX_LAYERS = (
    [
        c
        for name, c in inspect.getmembers(module, inspect.isclass)
        if c.__module__ == module.__name__ and name[0] != "_"
    ]
    for module in (jaxnorm.linen, jaxnorm.nnx)
)
TRACKED = [jaxnorm.batch_norm, jaxnorm.instance_norm]
NORMS = [*TRACKED, jaxnorm.batch_renorm, jaxnorm.group_norm, jaxnorm.layer_norm, jaxnorm.rms_norm]


def python(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )


def test_the_functions_import_jax_alone():
    code = "import jaxnorm, sys; print([m for m in ('flax', 'torch', 'optax') if m in sys.modules])"
    assert python(code).stdout == "[]\n"


def test_the_modules_are_imported_when_they_are_first_used():
    code = """
import inspect, sys
import jaxnorm
others = {"inspect", "interop", "linen", "nnx"}
assert others <= set(dir(jaxnorm))
imported = {name for name in (*others, "onnx") if f"jaxnorm.{name}" in sys.modules}
assert not imported, imported
jaxnorm.linen.BatchNorm, jaxnorm.nnx.BatchNorm, jaxnorm.interop.to_torch, jaxnorm.inspect.flat
assert "matplotlib" not in sys.modules
assert jaxnorm.linen is sys.modules["jaxnorm.linen"]
inspect.getmembers(jaxnorm)
try:
    jaxnorm.onxx
except AttributeError as error:
    print(error)
sys.modules["jax2onnx"] = None  # as if it were not installed
try:
    jaxnorm.onnx
except ModuleNotFoundError as error:
    print(error.name)
"""
    run = python(code)
    assert run.stdout == "module 'jaxnorm' has no attribute 'onxx'\njax2onnx\n", run.stderr


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_every_function_documents_its_arguments_its_result_an_example_and_its_source(function):
    doc = inspect.getdoc(function)
    sections = re.findall(r"^(Args|Returns|Raises|Example|References):$", doc, re.M)
    assert sections == [
        s for s in ("Args", "Returns", "Raises", "Example", "References") if s in sections
    ]
    assert {"Args", "Returns", "Example", "References"} <= set(sections)
    documented = re.findall(r"^  \**(\w+): ", doc[doc.index("Args:") : doc.index("Returns:")], re.M)
    assert documented == list(inspect.signature(function).parameters)


# Their docstrings are one sentence, which refers to the class of any rank.
OF_ONE_RANK = [c for c in LAYERS + NNX_LAYERS if c.__name__[-1] == "d"]
CLASSES = [
    c
    for c in [*(c for _, c in inspect.getmembers(jaxnorm, inspect.isclass)), *LAYERS, *NNX_LAYERS]
    if c not in OF_ONE_RANK
]
CLASSES += [jaxnorm.nnx.FrozenParam]
OF_FLAX = [
    f
    for frontend in (jaxnorm.linen, jaxnorm.nnx)
    for _, f in inspect.getmembers(frontend, inspect.isfunction)
    if f.__module__.startswith("jaxnorm.") and not f.__name__.startswith("_")
]


@pytest.mark.parametrize("public", CLASSES + OF_FLAX, ids=lambda c: f"{c.__module__}.{c.__name__}")
def test_every_class_has_an_example_that_runs_and_its_source(public):
    doc = inspect.getdoc(public)
    assert re.search(r"^Example:\n  >>> ", doc, re.M)
    assert re.search(r"^References:\n  \w", doc, re.M)


@pytest.mark.parametrize(
    "layer", [c for c in LAYERS if c not in OF_ONE_RANK], ids=lambda c: c.__name__
)
def test_every_layer_documents_its_attributes(layer):
    doc = inspect.getdoc(layer)
    documented = re.findall(
        r"^  (\w+): ", doc[doc.index("Attributes:") : doc.index("Raises:")], re.M
    )
    inherited = {name for base in layer.__bases__ for name in inspect.signature(base).parameters}
    fields = [f.name for f in dataclasses.fields(layer) if f.name not in inherited]
    assert documented == [name for name in fields if name not in ("parent", "name")]


def constructor(layer):
    return list(inspect.signature(layer.__init__).parameters)[1:]


@pytest.mark.parametrize("layer", OF_ONE_RANK, ids=lambda c: f"{c.__module__}.{c.__name__}")
def test_a_layer_of_one_rank_has_the_arguments_of_the_class_that_it_names(layer):
    (base,) = layer.__bases__
    assert inspect.getdoc(layer).startswith(f"`{base.__name__}` for ")
    assert inspect.getdoc(layer).endswith("with the same arguments.")
    assert inspect.signature(layer.__init__) == inspect.signature(base.__init__)


@pytest.mark.parametrize(
    "layer", [c for c in NNX_LAYERS if c not in OF_ONE_RANK], ids=lambda c: c.__name__
)
def test_every_layer_of_nnx_documents_its_arguments(layer):
    doc = inspect.getdoc(layer)
    if "__init__" not in vars(layer):
        (base,) = layer.__bases__
        assert base.__name__ in doc
        assert inspect.signature(layer) == inspect.signature(base)
        return
    documented = re.findall(r"^  (\w+): ", doc[doc.index("Args:") : doc.index("Raises:")], re.M)
    assert documented == constructor(layer)


@pytest.mark.parametrize("layer", NNX_LAYERS, ids=lambda c: c.__name__)
def test_every_layer_of_nnx_declares_its_arguments(layer):
    making = {"rngs", "scale_init", "bias_init", "scale_metadata", "bias_metadata"}
    declared = {name for c in layer.__mro__ for name in vars(c).get("__annotations__", {})}
    assert set(constructor(layer)) - making <= declared


def test_batch_renorm_of_nnx_takes_the_arguments_of_batch_norm_and_its_limits():
    """Also checks the defaults, which are written twice."""
    batch, renorm = (
        inspect.signature(layer.__init__).parameters
        for layer in (jaxnorm.nnx.BatchNorm, jaxnorm.nnx.BatchRenorm)
    )
    assert {n: p for n, p in renorm.items() if n not in ("r_max", "d_max")} == dict(batch)


def test_the_overloads_of_batch_renorm_take_its_options():
    first, *_ = typing.get_overloads(jaxnorm.batch_renorm)
    options = inspect.signature(first).parameters["options"].annotation.__args__[0]
    parameters = inspect.signature(jaxnorm.batch_renorm).parameters
    expected = {n: p.annotation for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert typing.get_type_hints(options) == expected


def test_one_argument_has_one_default_everywhere():
    defaults = {}
    for norm in NORMS:
        for name, parameter in inspect.signature(norm).parameters.items():
            defaults.setdefault(name, set()).add((parameter.kind, parameter.default))
    assert {name for name, found in defaults.items() if len(found) > 1} == set()


def test_batch_and_instance_norm_take_the_same_arguments():
    batch, instance = (set(inspect.signature(norm).parameters) for norm in TRACKED)
    assert instance - batch == {"batch_axis"}
    assert batch - instance == {"virtual_batch_size"}


def test_batch_renorm_takes_the_arguments_of_batch_norm_and_its_limits():
    batch, renorm = (
        inspect.signature(f).parameters for f in (jaxnorm.batch_norm, jaxnorm.batch_renorm)
    )
    assert list(renorm) == [*list(batch)[:3], "r_max", "d_max", *list(batch)[3:]]


def test_arrays_are_positional_and_options_keywords():
    for norm in NORMS:
        parameters = inspect.signature(norm).parameters.values()
        positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert (
            positional
            == ["x", "params", "batch_stats"][
                : 3 if inspect.signature(norm).parameters.get("batch_stats") else 2
            ]
        )
        assert all(p.kind is p.KEYWORD_ONLY for p in list(parameters)[len(positional) :])


def test_both_faces_have_the_same_layers_with_the_same_call():
    assert {c.__name__ for c in LAYERS} == {c.__name__ for c in NNX_LAYERS}
    for layer in NNX_LAYERS:
        linen = getattr(jaxnorm.linen, layer.__name__)
        # As in Flax, only nnx.RMSNorm accepts its mask by position.
        if not issubclass(layer, jaxnorm.nnx.RMSNorm):
            assert inspect.signature(layer.__call__) == inspect.signature(linen.__call__)


def test_the_readme_s_code_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


@pytest.mark.parametrize(
    ("page", "module"),
    {
        "functions": jaxnorm,
        "linen": jaxnorm.linen,
        "nnx": jaxnorm.nnx,
        "interop": jaxnorm.interop,
        "inspect": jaxnorm.inspect,
        "onnx": None,  # jax2onnx is not installed
    }.items(),
)
def test_every_public_name_is_on_its_page_of_the_reference(page, module):
    public = ["jaxnorm.onnx.to_onnx"]
    if module is not None:
        public = [
            f"{module.__name__}.{name}"
            for name, value in vars(module).items()
            if not name.startswith("_") and (inspect.isclass(value) or inspect.isfunction(value))
            if value.__module__.startswith("jaxnorm")
        ]
    text = (ROOT / "docs" / "api" / f"{page}.md").read_text()
    assert sorted(re.findall(r"^::: (\S+)$", text, re.M)) == sorted(public)


def test_every_document_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert pages == set(re.findall(r"[\w/-]+\.md", navigation))
