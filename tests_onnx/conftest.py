"""Sets up fast compilation and a cache for it, for the reasons given in `tests/conftest.py`."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
)

import jax


def pytest_configure(config):
    """Caches compiled programs for the other workers and the next run."""
    if jax.config.jax_compilation_cache_dir is None and hasattr(config, "cache"):
        jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
