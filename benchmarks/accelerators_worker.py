"""Compiles programs for one target, and answers with their costs in JSON.

Each line of standard input is a job, and each line of standard output is its result. It runs in
the environment of a compiler, as `python benchmarks/accelerators_worker.py`.
"""

import functools
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

import compilers  # isort: skip  # before anything else uses JAX
import count
import jax
import jax.numpy as jnp
from libraries import LIBRARIES
from models import NONE, make_step

# Models that are the same program without norms, which is compiled once.
SAME = dict.fromkeys(("ResNet-50, instance norm", "ResNet-50, group norm"), "ResNet-50, batch norm")


def make_cell(job: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    """Returns one norm, forward or forward and backward, and the shapes of its arguments."""
    shape, training = tuple(job["shape"]), job["training"]
    space = (2,) * (len(shape) - 2)  # parameters only depend on the channels
    small = (2, shape[1], *space) if job["layout"] == "first" else (2, *space, shape[-1])
    params, state, apply = LIBRARIES[job["library"]](job["norm"], small, job["layout"])
    x = jax.ShapeDtypeStruct(shape, jnp.dtype(job["dtype"]))

    def cast(params: Any, x: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        y, state = apply(params, state, x, training)
        return y.astype(x.dtype), state

    def forward(params: Any, state: Any, x: jax.Array, g: jax.Array) -> Any:
        return cast(params, x, state)

    def both(params: Any, state: Any, x: jax.Array, g: jax.Array) -> Any:
        y, vjp, new = jax.vjp(lambda p, x: cast(p, x, state), params, x, has_aux=True)
        # In a model, other layers separate the two passes.
        y, g = jax.lax.optimization_barrier((y, g))
        return y, new, vjp(g)

    return forward if job["mode"] == "forward" else both, (params, state, x, x)


@functools.cache
def facts(text: str) -> dict[str, Any]:
    """Returns the cost of a program; `once` has one round of every loop of unknown length."""
    job = json.loads(text)
    number = 1
    if job["kind"] == "cell":
        function, arguments = make_cell(job)
    else:
        function, arguments, number = make_step(job["model"], job["library"], job["full"])
    start = time.perf_counter()
    compiled = compilers.compile_for(job["target"], function, *arguments)
    seconds = time.perf_counter() - start
    program = count.Program(compiled.as_text())
    cost, once = program.cost(), program.cost(rounds=1)
    known, unknown = program.loops()
    return {
        **vars(cost),
        "once": vars(once) if unknown else None,
        "loops": [known, unknown],
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        "seconds": seconds,
        "norms": number,
    }


def main() -> None:
    """Answers jobs until standard input ends."""
    for line in sys.stdin:
        job = json.loads(line)
        if job["library"] == NONE:
            job["model"] = SAME.get(job["model"], job["model"])
        try:
            answer = facts(json.dumps(job, sort_keys=True))
        except Exception as error:
            answer = {"missing": f"{type(error).__name__}: {error}".strip(": ")[:200]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
