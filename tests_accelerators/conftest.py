"""Selects the compiler of the environment: libtpu's, or that of JAX's CUDA plugin."""

import importlib.util
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parents[1] / "benchmarks")]

import compilers  # noqa: E402, F401  # before anything else uses JAX

TARGET = "TPU v5e" if importlib.util.find_spec("libtpu") else "NVIDIA H100"


@pytest.fixture(scope="session")
def target():
    """Returns the device for which programs are compiled."""
    return TARGET
