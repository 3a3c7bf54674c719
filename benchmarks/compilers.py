"""Compiles programs for TPUs and NVIDIA GPUs on a machine that has neither.

The environment needs `libtpu` for a TPU, or JAX's CUDA plugin for a GPU; `make` builds one for
each.
Import this module before anything else uses JAX: it sets the variables that the compilers read.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ |= {
    # Without these variables, libtpu asks a metadata server for the type of its machine.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # Neither a driver nor cuDNN is present, and kernels cannot be timed without a device.
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0",
}

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

TPUS = {"TPU v5e": "v5e:2x2", "TPU v6e": "v6e:2x2"}
# From openxla/xla, xla/backends/gpu/target_config/specs, and NVIDIA's data sheets.
GPUS = {
    "NVIDIA H100": {
        "fields": {
            "shared_memory_per_core": 233472,
            "core_count": 132,
            "fpus_per_core": 128,
            "memory_bandwidth": 3352320000000,
            "l2_cache_size": 52428800,
            "clock_rate_ghz": 1.98,
            "device_memory_size": 84942979072,
            "shared_memory_per_block_optin": 232448,
        },
        "capability": "major: 9",
        "name": "NVIDIA H100 80GB HBM3",
    },
    "NVIDIA A100": {
        "fields": {
            "shared_memory_per_core": 167936,
            "core_count": 108,
            "fpus_per_core": 64,
            "memory_bandwidth": 2039000000000,
            "l2_cache_size": 41943040,
            "clock_rate_ghz": 1.41,
            "device_memory_size": 84987740160,
            "shared_memory_per_block_optin": 166912,
        },
        "capability": "major: 8",
        "name": "NVIDIA A100-SXM4-80GB",
    },
}
ALIKE = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "shared_memory_per_block": 49152,
    "threads_per_core_limit": 2048,
    "block_dim_limit_x": 2147483647,
    "block_dim_limit_y": 65535,
    "block_dim_limit_z": 65535,
    "registers_per_core_limit": 65536,
    "registers_per_block_limit": 65536,
}
TARGETS = (*TPUS, *GPUS)


def gpu_target(name: str) -> str:
    """Returns the text form of XLA's GpuTargetConfig."""
    gpu: dict[str, Any] = GPUS[name]
    fields = " ".join(f"{key}: {value}" for key, value in {**ALIKE, **gpu["fields"]}.items())
    return (
        f"gpu_device_info {{ {fields} cuda_compute_capability {{ {gpu['capability']} }} }} "
        f'platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} '
        f'device_description_str: "{gpu["name"]}"'
    )


def _name_cuda_without_a_device() -> None:
    """Lets JAX lower for CUDA where no device is present (jax-ml/jax#23971)."""
    from jax._src import xla_bridge

    canonicalize = xla_bridge.canonicalize_platform

    def canonicalize_or_cuda(platform: str) -> str:
        try:
            return canonicalize(platform)
        except RuntimeError:
            return "cuda"

    xla_bridge.canonicalize_platform = canonicalize_or_cuda


@functools.cache
def devices(target: str, topology: str | None = None) -> np.ndarray:
    """Returns the devices of a target, or of a larger TPU topology such as "v5e:16x16"."""
    if target in TPUS:
        name = topology or TPUS[target]
        return np.array(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    _name_cuda_without_a_device()
    found = topologies.get_topology_desc(
        platform="cuda",
        topology_name=target.split()[-1].lower(),
        topology="1x1x1",
        target_config=gpu_target(target),
    )
    return np.array(found.devices)


def compile_for(target: str, function: Callable[..., Any], *shapes: Any) -> Any:
    """Compiles a function for one device of the target, without running it."""
    one = NamedSharding(Mesh(devices(target)[:1], ("d",)), PartitionSpec())
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), shapes)
    return jax.jit(function, in_shardings=one, out_shardings=one).lower(*shapes).compile()
