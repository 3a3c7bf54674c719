"""What does a spread batch cost? Counts the collectives of compiled programs, and their bytes.

    python benchmarks/collectives.py

prints the tables of docs/distributed.md: first as read from programs compiled for 2, 4 and 8
devices (forced host devices: nothing else is needed), then by the formulas that the first table
is checked against, for more.
"""

import collections
import functools
import math
import os
import re

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnorm

# (layers, channels, devices): each of the three grows alone.
MEASURED = [(1, 64, 2), (1, 64, 4), (1, 64, 8), (1, 256, 8), (3, 64, 8)]
LAYERS, CHANNELS, ON_PAPER = 50, 256, (8, 64, 512)

# How well the machine code is optimized does not change the collectives.
QUICK = {"xla_backend_optimization_level": 0}
ALL_REDUCE = re.compile(r"= (.*?) all-reduce(?:-start)?\(")
OTHERS = re.compile(r" (?:all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(")


def programs(kind, layers, channels, devices):
    """Forward, and a step of SGD, through a stack of norms; the batch lies on the devices."""
    by_name = kind != "batch norm, jit"
    norm = jaxnorm.batch_norm if kind.startswith("batch") else jaxnorm.instance_norm
    norm = functools.partial(norm, axis_name="d" if by_name else None)

    def forward(params, states, x):
        new = []
        for p, state in zip(params, states, strict=True):
            x, state = norm(jnp.tanh(x), p, state)
            new.append(state)
        return x, new

    def step(params, states, x):
        def loss(params):
            y, new = forward(params, states, x)
            value = jnp.mean(jnp.sin(y))
            return (jax.lax.pmean(value, "d") if by_name else value), new

        grads, new = jax.grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), new

    mesh = jax.make_mesh(
        (devices,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )
    both = {forward: (P("d"), P()), step: P()}
    if by_name:
        spread = functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), P(), P("d")))
        both = [spread(f, out_specs=out_specs) for f, out_specs in both.items()]
    args = (
        [jaxnorm.init_params(channels)] * layers,
        [jaxnorm.init_batch_stats(channels)] * layers,
        jnp.ones((2 * devices, 3, channels)),
    )
    whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("d"))
    args = jax.device_put(args, (whole, whole, split))
    return [jax.jit(f).lower(*args).compile(QUICK).as_text() for f in both]


def payloads(text):
    """How many bytes each device puts into each all-reduce of the program, in rising order."""
    assert not OTHERS.search(text), "a collective other than an all-reduce"
    sizes = []
    for shapes in ALL_REDUCE.findall(text):
        arrays = re.findall(r"f32\[([\d,]*)\]", shapes)
        assert len(arrays) == shapes.count("["), "an array other than float32"
        sizes.append(sum(4 * math.prod(int(n) for n in a.split(",") if n) for a in arrays))
    return sorted(sizes)


# ---- The formulas: the bytes of each all-reduce, forward and in a step ----


def batch_norm_by_name(layers, channels, devices):
    """Forward, a table with four statistics from each device; backward, two sums."""
    table, sums = 4 * 4 * channels * devices, 4 * 2 * channels
    return [table] * layers, [table, sums] * layers


def batch_norm_under_jit(layers, channels, devices):
    """Forward, one sum and then two more; backward, two sums."""
    one, two = 4 * channels, 4 * 2 * channels
    return [one, two] * layers, [one, two, two] * layers


def instance_norm_by_name(layers, channels, devices):
    """Three sums for the state; backward, the two for scale and bias, in the same all-reduce."""
    return [4 * 3 * channels * layers], [4 * (3 + 2) * channels * layers]


KINDS = {
    "batch norm, axis_name": batch_norm_by_name,
    "batch norm, jit": batch_norm_under_jit,
    "instance norm, axis_name": instance_norm_by_name,
}

# ---- The tables ----


def measure(kind, *case):
    """What the compiled programs have, which is what the formula says."""
    found = [payloads(text) for text in programs(kind, *case)]
    expected = [sorted(sizes) for sizes in KINDS[kind](*case)]
    assert found == expected, f"{kind} {case}: {found} in the program, {expected} by formula"
    return found


def grouped(sizes):
    """As in "2 of 512, 1 of 8,192"."""
    counts = sorted(collections.Counter(sizes).items())
    return ", ".join(f"{count} of {size:,}" for size, count in counts)


def table(head, rows):
    """A table of Markdown."""
    cells = [head, ["---"] * len(head), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def main():
    """Prints both tables."""
    rows = []
    for kind in KINDS:
        for case in MEASURED:
            forward, step = measure(kind, *case)
            rows.append([kind, *case, len(forward), grouped(forward), len(step), grouped(step)])
    head = ["norm", "layers", "channels", "devices"]
    head += ["all-reduces forward", "bytes", "all-reduces in a step", "bytes"]
    print(table(head, rows), end="\n\n")

    rows = []
    for kind, formula in KINDS.items():
        steps = [formula(LAYERS, CHANNELS, devices)[1] for devices in ON_PAPER]
        rows.append([kind, len(steps[0]), *(f"{sum(step):,}" for step in steps)])
    head = ["norm", "all-reduces in a step", *(f"bytes, {n} devices" for n in ON_PAPER)]
    print(table(head, rows))


if __name__ == "__main__":
    main()
