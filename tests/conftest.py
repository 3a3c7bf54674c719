"""Sets up four devices, a compilation cache, and fixtures for number formats."""

import contextlib
import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
)

import jax
import pytest

from jaxnorm._core import platforms


def pytest_addoption(parser):
    """Adds an option that runs the formulations of another platform on a CPU."""
    parser.addoption("--formulation", choices=["cpu", "tpu", "cuda"])


def pytest_configure(config):
    """Caches compiled programs for the other workers and the next run.

    Compiling takes most of the time. `pytest --cache-clear` removes the cache, and
    JAX_COMPILATION_CACHE_DIR names another folder for it.
    """
    if jax.config.jax_compilation_cache_dir is None and hasattr(config, "cache"):
        jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@pytest.fixture(scope="session", autouse=True)
def _formulation(request):
    platform = request.config.getoption("--formulation")
    with platforms.formulated_for(platform) if platform else contextlib.nullcontext():
        yield


@pytest.fixture
def x64():
    """Enables float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def strict():
    """Disables implicit dtype promotion, because every conversion in the library is explicit."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="module", autouse=True)
def _forget():
    """Clears the compiled programs of a file, which the next file rarely needs."""
    yield
    jax.clear_caches()
