"""What every test runs under: four devices, kept programs, and fixtures for number formats."""

import contextlib
import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
)

import jax
import pytest

from jaxnorm._core import platforms


def pytest_addoption(parser):
    """The formulations of another platform may be run here, on a CPU."""
    parser.addoption("--formulation", choices=["cpu", "tpu", "cuda"])


def pytest_configure(config):
    """Keep what is compiled, for the other workers and the next run.

    Compiling takes most of the time. `pytest --cache-clear` removes what is kept, and
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
    """What a file has compiled is of little use to the next, and stays in memory."""
    yield
    jax.clear_caches()
