"""Tests that the state dict of every model is restored bit for bit.

A run writes its results to docs/interop_zoo.md. One model is in memory at a time.
"""

import math
import pathlib
import warnings
from importlib import metadata

import models
import numpy as np
import pytest
import torch

from jaxnorm import interop

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "interop_zoo.md"
LIBRARIES = ("torch", "torchvision", "timm", "monai", "segmentation-models-pytorch", "transformers")
ZOO = dict(models.zoo())
ROWS: dict[str, tuple[str, ...]] = {}


def built(make):
    """Builds a model without memory for its arrays, unless its constructor computes them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # libraries warn about their own defaults
        try:
            with torch.device("meta"):
                return make()
        except (RuntimeError, NotImplementedError):
            return make()


def filled(state_dict):
    """Returns tensors of the same names, shapes and dtypes with random bits, including NaN."""
    rng = np.random.default_rng(0)
    given = {}
    for name, a in state_dict.items():
        if a.dtype.is_floating_point or a.dtype.is_complex:
            random = torch.from_numpy(rng.integers(0, 256, a.numel() * a.element_size(), np.uint8))
            given[name] = random.view(a.dtype).reshape(a.shape)
        else:
            most = 2 if a.dtype == torch.bool else 100
            given[name] = torch.from_numpy(rng.integers(0, most, tuple(a.shape))).to(a.dtype)
    return given


def bits(tensor):
    """Returns the dtype, the shape and the bits of a tensor."""
    tensor = tensor.contiguous()
    return tensor.dtype, tensor.shape, tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.fixture(scope="module", autouse=True)
def page():
    """Writes the table when all models have been tested."""
    yield
    if len(ROWS) == len(ZOO):
        PAGE.write_text(table())


@pytest.mark.parametrize("name", ZOO)
def test_a_state_dict_comes_and_goes_bit_for_bit(name):
    ROWS[name] = ("", "", "", "not built")
    try:
        model = built(ZOO[name])
    except Exception as error:
        ROWS[name] = ("", "", "", f"not built: {type(error).__name__}")
        pytest.skip(f"{type(error).__name__}: {error}")
    shapes = model.state_dict()
    size = sum(a.numel() * a.element_size() for a in shapes.values())
    if size > models.MOST:
        ROWS[name] = (str(len(shapes)), "", "", f"left out: {size / 1e9:.1f} GB")
        pytest.skip(f"{size / 1e9:.1f} GB")
    norms = interop.describe_torch(model)
    unknown = sum(row.layer == "unknown" for row in norms)
    ROWS[name] = (str(len(shapes)), str(len(norms) - unknown), str(unknown), "**no**")
    given = filled(shapes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        variables = interop.from_torch(given)
    back = interop.tensors(interop.to_torch(variables, like=given))
    assert back.keys() == given.keys()
    for key, tensor in given.items():
        assert bits(back[key]) == bits(tensor), key
    ROWS[name] = (*ROWS[name][:3], "bit for bit")


def test_at_most_a_tenth_was_not_built():
    failed = [name for name, row in ROWS.items() if row[3].startswith("not built")]
    assert len(failed) <= math.ceil(len(ROWS) / 10), failed


def table():
    """Returns the page, with a table of one row per model."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in LIBRARIES)
    good = sum(row[3] == "bit for bit" for row in ROWS.values())
    lines = [
        "# Converted models",
        "",
        "`make test-zoo` builds models of other libraries, fills their state dicts with random",
        "bits, and converts each with `from_torch` and `to_torch(like=...)`. The columns count the",
        "norms that `describe_torch` recognizes and those that it does not recognize.",
        "",
        f"{good} of {len(ROWS)} models were restored bit for bit, with {versions}.",
        "",
        "| model | arrays | norms | not recognized | round trip |",
        "|---|---|---|---|---|",
        *(f"| {name} | {' | '.join(row)} |" for name, row in ROWS.items()),
        "",
    ]
    return "\n".join(lines)
