"""Sets up four devices, fast compilation, a cache for it, and fixtures for number formats."""

import contextlib
import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
)

import jax
import pytest

from jaxnorm._core import platforms

# Compiling takes most of the time of the tests, and less than half as long with these flags. They
# change how machine code is made of a program. The passes that simplify and fuse it stay, so that
# tests that read compiled programs see what users get. A jaxlib that lacks one of the flags stops
# with "Unknown flags in XLA_FLAGS"; `pytest --optimized` does without them.
FAST_COMPILATION = " --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"


def pytest_addoption(parser):
    """Adds options for the platform whose formulations are used, and for the compiler."""
    parser.addoption(
        "--formulation",
        choices=["cpu", "tpu", "cuda"],
        help="use the formulations of this platform on a CPU",
    )
    parser.addoption(
        "--optimized",
        action="store_true",
        help="compile as XLA does by default, with optimized code, so that results have the bits "
        "that users get",
    )


def pytest_configure(config):
    """Sets the flags of the compiler, and caches compiled programs.

    The other workers and the next run use the cache. `pytest --cache-clear` removes it, and
    JAX_COMPILATION_CACHE_DIR names another folder for it.
    """
    if not config.getoption("--optimized"):
        # JAX reads the flags when it first uses a device, which is later than this.
        os.environ["XLA_FLAGS"] += FAST_COMPILATION
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


@pytest.fixture
def torch_seed():
    """Seeds PyTorch, so that each test draws the same weights."""
    pytest.importorskip("torch").manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def _forget():
    """Clears the compiled programs of a file, which the next file rarely needs."""
    yield
    jax.clear_caches()
