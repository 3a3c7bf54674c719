"""Compares jaxnorm and flax with PyTorch, and with a copy on the device, on an NVIDIA GPU.

    python benchmarks/gpu.py [--out gpu.json]

It needs jax and PyTorch with CUDA, and flax; it downloads nothing. The limit of a forward and
backward pass is given by the arrays that it has to read and write: x and y in the forward pass, and
x, the cotangent and the gradient of x in the backward pass, which is 2.5 copies of x. PyTorch is
timed by events on the device's stream, and JAX by a chain of calls, divided by its length.
"""

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch also needs memory

SHAPES = ((128, 56, 56, 64), (64, 28, 28, 256), (64, 14, 14, 1024), (32768, 1024), (16384, 4096))
NORMS = ("batch", "instance", "group32", "layer", "rms")
COPIES = 2.5  # a copy reads x and writes it
CHAIN = 20


def time_jax(library: str, norm: str, shape: tuple[int, ...], dtype: str) -> float:
    """Returns the seconds of a forward and backward pass."""
    import jax
    from libraries import LIBRARIES

    params, state, apply = LIBRARIES[library](norm, shape, "last")
    x, cotangent = (jax.random.normal(jax.random.key(k), shape, dtype) for k in range(2))

    @jax.jit
    def step(params: Any, state: Any, x: jax.Array, cotangent: jax.Array) -> Any:
        def f(p: Any, x: jax.Array) -> Any:
            return apply(p, state, x, True)

        y, vjp, _ = jax.vjp(f, params, x, has_aux=True)
        return y, vjp(cotangent.astype(y.dtype))

    jax.block_until_ready(step(params, state, x, cotangent))
    best = math.inf
    for _ in range(10):
        start = time.perf_counter()
        for _ in range(CHAIN):
            out = step(params, state, x, cotangent)
        jax.block_until_ready(out)
        best = min(best, (time.perf_counter() - start) / CHAIN)
    return best


def time_torch(norm: str, shape: tuple[int, ...], dtype: str, compiled: bool) -> float:
    """Returns the seconds of a forward and backward pass, with channels last in memory."""
    import torch
    from torch import nn

    c, space = shape[-1], len(shape) - 2
    x = torch.randn(shape, device="cuda", dtype=getattr(torch, dtype))
    if norm in ("layer", "rms"):
        layer: Any = (nn.LayerNorm if norm == "layer" else nn.RMSNorm)(c)
    else:
        x = x.movedim(-1, 1)
        if norm == "batch":
            layer = getattr(nn, f"BatchNorm{max(space, 1)}d")(c)
        elif norm == "instance":
            layer = getattr(nn, f"InstanceNorm{space}d")(c, affine=True)
        else:
            layer = nn.GroupNorm(int(norm[5:]), c)
    layer = layer.to("cuda", getattr(torch, dtype) if norm in ("layer", "rms") else None)
    function = torch.compile(layer) if compiled else layer
    leaf, cotangent = x.detach().requires_grad_(), torch.randn_like(x)

    def step() -> Any:
        return torch.autograd.grad(function(leaf), [leaf, *layer.parameters()], cotangent)

    for _ in range(3):
        step()
    return time_on_device(step)


def time_copy(shape: tuple[int, ...], dtype: str) -> float:
    """Returns the seconds of a copy on the device."""
    import torch

    x = torch.randn(shape, device="cuda", dtype=getattr(torch, dtype))
    y = torch.empty_like(x)
    return time_on_device(lambda: y.copy_(x))


def time_on_device(step: Any) -> float:
    """Returns the time per call in the shortest of ten chains of calls."""
    import torch

    best = math.inf
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(CHAIN):
            step()
        end.record()
        torch.cuda.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3 / CHAIN)
    return best


def measure(norm: str, shape: tuple[int, ...], dtype: str) -> dict[str, Any]:
    """Returns the time of every library, or the reason why it failed."""
    runs = {
        library: lambda k=library: time_jax(k, norm, shape, dtype)
        for library in ("jaxnorm", "flax.linen")
    }
    runs |= {
        "torch": lambda: time_torch(norm, shape, dtype, False),
        "torch.compile": lambda: time_torch(norm, shape, dtype, True),
        "copy": lambda: time_copy(shape, dtype),
    }
    found: dict[str, Any] = {}
    for name, run in runs.items():
        try:
            found[name] = run()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"[:200]
    return found


def main() -> None:
    """Measures every cell and prints a table of multiples of the limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    options = parser.parse_args()
    import jax

    device = jax.devices()[0]
    if device.platform != "gpu":
        raise SystemExit(f"gpu.py: JAX should see a GPU, but sees {device}")
    cells: list[dict[str, Any]] = []
    print(
        f"{device.device_kind}, jax {jax.__version__}; times as multiples of {COPIES} copies of x"
    )
    for dtype in ("float32", "bfloat16"):
        for shape in SHAPES:
            for norm in NORMS:
                if len(shape) == 2 and norm in ("instance", "group32"):
                    continue
                found = measure(norm, shape, dtype)
                cells.append({"norm": norm, "shape": shape, "dtype": dtype, "seconds": found})
                limit = found["copy"]
                ratios = (
                    f"{k} {v / (COPIES * limit):.2f}" if isinstance(v, float) else f"{k} -"
                    for k, v in found.items()
                )
                print(
                    f"{norm:9}{'x'.join(map(str, shape)):16}{dtype:9}",
                    *ratios,
                    sep="  ",
                    flush=True,
                )
                options.out.write_text(json.dumps({"device": device.device_kind, "cells": cells}))


if __name__ == "__main__":
    main()
