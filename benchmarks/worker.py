"""Measures one library in a separate process, with one job per line.

Each line of standard input is a job in JSON, and each line of standard output is its result. The
runner asks the workers of all libraries in turn, so that noise affects all of them equally.
"""

import functools
import json
import math
import sys
import time
from collections.abc import Callable
from typing import Any

SECONDS = 0.25  # the time for measuring each job in each round
REPEATS = 3, 200


def measure(run: Callable[[], Any]) -> list[float]:
    """Returns the seconds of single calls, after one call that is not counted."""
    run()
    times: list[float] = []
    while len(times) < REPEATS[0] or (sum(times) < SECONDS and len(times) < REPEATS[1]):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times


@functools.lru_cache(maxsize=1)  # the rounds of a job are consecutive
def prepare_jax(library: str, job: str) -> tuple[Callable[[], Any], dict[str, Any]]:
    """Returns the compiled program of a job on its data, and the compiler's analysis of it."""
    import end_to_end
    import jax
    import jax.numpy as jnp
    from libraries import LIBRARIES

    given = json.loads(job)
    if given["kind"] == "step":
        program, arguments = end_to_end.step(library, given["model"])
    else:
        shape, dtype = tuple(given["shape"]), jnp.dtype(given["dtype"])
        params, state, apply = LIBRARIES[library](given["norm"], shape, given["layout"])
        x, cotangent = (jax.random.normal(jax.random.key(k), shape, dtype) for k in range(2))
        training = given["training"]

        def forward(params, state, x, cotangent):
            return apply(params, state, x, training)

        def both(params, state, x, cotangent):
            y, vjp, new = jax.vjp(
                lambda p, x: apply(p, state, x, training), params, x, has_aux=True
            )
            return y, new, vjp(cotangent.astype(y.dtype))

        program = jax.jit(forward if given["mode"] == "forward" else both)
        arguments = params, state, x, cotangent
    start = time.perf_counter()
    compiled = program.lower(*arguments).compile()
    facts: dict[str, Any] = {"compile_seconds": time.perf_counter() - start}
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    facts |= {"temporaries": memory.temp_size_in_bytes, "accessed": cost.get("bytes accessed")}
    if given["kind"] == "norm":
        facts["x_bytes"] = math.prod(given["shape"]) * dtype.itemsize
        if given["mode"] != "forward":
            f = jax.jit(lambda p, x: apply(p, state, x, training)[0])
            _, vjp = jax.vjp(f, params, x)
            kept = {id(a): a.nbytes for a in jax.tree.leaves(vjp) if hasattr(a, "nbytes")}
            facts["kept"] = sum(kept.values())
    return lambda: jax.block_until_ready(compiled(*arguments)), facts


@functools.lru_cache(maxsize=1)
def prepare_torch(library: str, job: str) -> tuple[Callable[[], Any], dict[str, Any]]:
    """Returns PyTorch's layer on its data, in the memory layout of the job."""
    import torch
    from torch import nn

    given = json.loads(job)
    shape, dtype = tuple(given["shape"]), getattr(torch, given["dtype"])
    norm, space = given["norm"], len(shape) - 2
    c = shape[-1]
    x = torch.randn(shape, dtype=dtype)
    if norm in ("layer", "rms"):
        layer: Any = (nn.LayerNorm if norm == "layer" else nn.RMSNorm)(c)
    else:  # in PyTorch, channels are the second axis, also if they are last in memory
        x = x.movedim(-1, 1)
        x = x.contiguous() if given["layout"] == "first" else x
        names = {"batch": "BatchNorm", "instance": "InstanceNorm"}
        if norm in names:
            make = getattr(nn, f"{names[norm]}{max(space, 1)}d")
            layer = make(c, **({"affine": True} if norm == "instance" else {}))
        else:
            layer = nn.GroupNorm(int(norm[5:]), c)
    layer.train(given["training"])
    function = torch.compile(layer) if library == "torch.compile" else layer
    cotangent = torch.randn_like(x)

    def forward() -> Any:
        with torch.no_grad():
            return function(x)

    def both() -> Any:
        leaf = x.detach().requires_grad_()
        y = function(leaf)
        return torch.autograd.grad(y, [leaf, *layer.parameters()], cotangent.to(y.dtype))

    return forward if given["mode"] == "forward" else both, {}


def main(library: str) -> None:
    """Answers jobs until standard input ends."""
    prepare = prepare_jax
    if library.startswith("torch"):
        import torch

        torch.set_num_threads(int(sys.argv[2]))
        prepare = prepare_torch
    for line in sys.stdin:
        try:
            run, facts = prepare(library, line.strip())
            answer: dict[str, Any] = {"seconds": measure(run), **facts}
        except Exception as error:
            answer = {"missing": f"{type(error).__name__}: {error}".strip(": ")[:200]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
