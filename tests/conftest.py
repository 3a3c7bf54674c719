"""What every test runs under: four host devices, and fixtures for the number formats."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
)

import jax
import pytest


@pytest.fixture
def x64():
    """Float64 exists, as in NumPy."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def strict():
    """No implicit change of dtype: each one in the library is on purpose."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="module", autouse=True)
def _forget():
    """What a file has compiled is of no use to the next, and stays in memory."""
    yield
    jax.clear_caches()
