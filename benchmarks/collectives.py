"""Counts the collectives of norms whose batch is distributed over devices, and their bytes.

    python benchmarks/collectives.py

prints the first two tables of docs/distributed.md: as read from programs compiled for 2, 4 and 8
devices (forced host devices: nothing else is needed), and by the formulas that the first table
is checked against, for more devices. In an environment with libtpu

    python benchmarks/collectives.py --pod v5e:16x16

prints the third: the training step of a small ResNet, compiled for a TPU topology. What a loop that
measures again would send is counted apart, since it mostly runs no round.
"""

import collections
import functools
import os
import sys
from typing import Any

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import compilers  # isort: skip  # before anything else uses JAX
import jax
import jax.numpy as jnp
from count import Computation, nbytes, parse
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from libraries import LIBRARIES
from models import Net, resnet50, training_step

import jaxnorm
from jaxnorm._core import platforms

# (layers, channels, devices): only one of the three grows at a time.
MEASURED = [(1, 64, 2), (1, 64, 4), (1, 64, 8), (1, 256, 8), (3, 64, 8)]
LAYERS, CHANNELS, ON_PAPER = 50, 256, (8, 64, 512)

# The optimization level of the machine code does not change the collectives.
QUICK = {"xla_backend_optimization_level": 0}
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute")
GPU = ", on GPU"  # appended to the name of a kind


def programs(kind, layers, channels, devices):
    """Returns the forward pass and an SGD step of a stack of norms, with a distributed batch."""
    by_name = "axis_name" in kind
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
    with platforms.formulated_for("cuda" if kind.endswith(GPU) else "cpu"):
        return [jax.jit(f).lower(*args).compile(QUICK).as_text() for f in both]


def payloads(text: str) -> list[int]:
    """Returns the bytes that each device sends in each all-reduce of the program, sorted."""
    computations, entry = parse(text)
    found = sent(computations[entry])
    assert {op for op, _ in found} <= {"all-reduce"}, "a collective other than an all-reduce"
    return sorted(size for _, size in found)


def sent(computation: Computation) -> list[tuple[str, int]]:
    """Returns the kind and the bytes of each collective of a computation, without its loops."""
    ops = ((i, i.op.removesuffix("-start")) for i in computation.values())
    return [
        (op, sum(nbytes(computation[name].type) for name in i.operands))
        for i, op in ops
        if op in COLLECTIVES
    ]


# ---- The formulas: the bytes of each all-reduce, forward and in a step ----


def batch_norm(layers, channels, devices):
    """Sends the sums of x - shift and of its square forward, and two sums backward."""
    sums = 4 * 2 * channels
    return [sums] * layers, [sums] * 2 * layers


def batch_norm_on_gpu(layers, channels, devices):
    """Sends the shift, which is computed from a part of x, before the sums of `batch_norm`."""
    sums, shift = 4 * 2 * channels, 4 * channels
    return [shift, sums] * layers, [shift, sums, sums] * layers


def instance_norm(layers, channels, devices):
    """Sends three sums for the state, and those of scale and bias in the same all-reduce."""
    return [4 * 3 * channels * layers], [4 * (3 + 2) * channels * layers]


KINDS = {
    "batch norm, axis_name": batch_norm,
    "batch norm, jit": batch_norm,
    f"batch norm, axis_name{GPU}": batch_norm_on_gpu,
    "instance norm, axis_name": instance_norm,
}

# ---- The tables ----


def measure(kind, *case):
    """Returns the collectives of the compiled programs, and checks them against the formula."""
    found = [payloads(text) for text in programs(kind, *case)]
    expected = [sorted(sizes) for sizes in KINDS[kind](*case)]
    assert found == expected, f"{kind} {case}: {found} in the program, {expected} by formula"
    return found


def grouped(sizes):
    """Formats counts as in "2 of 512, 1 of 8,192"."""
    counts = sorted(collections.Counter(sizes).items())
    return ", ".join(f"{count} of {size:,}" for size, count in counts)


def table(head, rows):
    """Returns a Markdown table."""
    cells = [head, ["---"] * len(head), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def pod(topology: str) -> list[list[Any]]:
    """Compiles a ResNet's training step for a topology, with and without its batch norms."""
    mesh = Mesh(compilers.devices("TPU v5e", topology), ("d",))
    data = (
        jax.ShapeDtypeStruct((16 * mesh.size, 64, 64, 3), jnp.bfloat16),
        jax.ShapeDtypeStruct((16 * mesh.size,), jnp.int32),
    )
    LIBRARIES["by name"] = make_by_name
    rows = []
    ways = {"none": "no norm, jit", "jaxnorm": "jit", "by name": "shard_map and axis_name"}
    for library, way in ways.items():
        net = Net(library, "batch")
        jax.eval_shape(lambda x, labels, net=net: resnet50(net, x, labels, 1), *data)
        params, state = net.variables()

        def loss(params, state, x, labels, library=library):
            net = Net(library, "batch", (params, state))
            value = resnet50(net, x, labels, 1)
            value = jax.lax.pmean(value, "d") if library == "by name" else value
            return value, net.new_states

        step = training_step(loss)
        if library == "by name":
            specs = (P(), P(), P("d"), P("d"))
            step = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=P())
        whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("d"))
        jitted = jax.jit(step, in_shardings=(whole, whole, split, split), out_shardings=whole)
        computations, entry = parse(jitted.lower(params, state, *data).compile().as_text())
        found = [size for _, size in sent(computations[entry])]
        norms = 0 if library == "none" else net.number_of_norms()
        rows.append([way, mesh.size, len(found), f"{sum(found):,}", norms])
    return rows


def make_by_name(norm: str, shape: tuple[int, ...], layout: str) -> Any:
    """Returns jaxnorm's batch norm over the devices of a mapped axis."""
    params, state, _ = LIBRARIES["jaxnorm"](norm, shape, layout)
    return params, state, lambda p, s, x, training: jaxnorm.batch_norm(x, p, s, axis_name="d")


def main():
    """Prints both tables, or the table of a TPU topology."""
    if sys.argv[1:2] == ["--pod"]:
        head = ["norm", "devices", "collectives", "bytes", "norms"]
        print(table(head, pod(sys.argv[2])))
        return
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
