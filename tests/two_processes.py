"""Trains in several processes over the loopback interface, each with a part of the batch.

`python two_processes.py INDEX NUMBER PORT FOLDER` is one process of NUMBER; it writes the variables
that it trains in each mode to FOLDER. test_multihost.py starts the processes, and calls `train`.
"""

import functools
import os
import pathlib
import sys
import traceback

if __name__ == "__main__":  # set before jax is imported: two devices per process; the last counts
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=2"

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from models import kernel_init, quick_jit

from jaxnorm.linen import BatchNorm, InstanceNorm

STEPS, SAMPLES, PROCESSES = 20, 4, 2  # SAMPLES per process and step
WAYS = ("jit", "shard_map")


def part(index):
    """Returns the images, targets and mask of each step for one process.

    The parts differ in their means, standard deviations and numbers of included pixels.
    """
    rng = np.random.default_rng(index)
    x = rng.normal(3 * index, 1 + index, (STEPS, SAMPLES, 6, 6, 2))
    target = rng.normal(0, 1, (STEPS, SAMPLES, 3))
    mask = rng.random((STEPS, SAMPLES, 6, 6, 1)) < (0.9, 0.5)[index]
    return x.astype(np.float32), target.astype(np.float32), mask


class Net(nn.Module):
    """A convolution and a dense layer, with a norm of each kind that has a state."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, mask):
        options = {"use_running_average": False, "axis_name": self.axis_name}
        conv = functools.partial(nn.Conv, use_bias=False, kernel_init=kernel_init)
        dense = functools.partial(nn.Dense, kernel_init=kernel_init)
        x = conv(4, (3, 3))(x)
        x = nn.relu(BatchNorm(**options)(x, mask=mask))
        x = conv(4, (3, 3))(x)
        x = nn.relu(InstanceNorm(track_running_stats=True, **options)(x, mask=mask))
        x = dense(8)(x.mean((1, 2)))
        return dense(3)(nn.relu(BatchNorm(**options)(x)))


def train(way=None):
    """Returns the variables after all steps; way None means one device and the whole batch."""
    axis_name = "batch" if way == "shard_map" else None
    model, optimizer = Net(axis_name), optax.sgd(0.05, momentum=0.9)
    variables = quick_jit(model.init)(
        jax.random.key(0), jnp.zeros((1, 6, 6, 2)), jnp.ones((1, 1, 1, 1), bool)
    )

    def step(carry, batch):
        variables, moments = carry
        x, target, mask = batch

        def loss(params):
            y, updates = model.apply(
                {**variables, "params": params}, x, mask, mutable=["batch_stats"]
            )
            error = jnp.mean((y - target) ** 2)
            return (error if axis_name is None else jax.lax.pmean(error, axis_name)), updates

        grads, updates = jax.grad(loss, has_aux=True)(variables["params"])
        updated, moments = optimizer.update(grads, moments)
        params = optax.apply_updates(variables["params"], updated)
        return {"params": params, **updates}, moments

    carry = variables, optimizer.init(variables["params"])
    if way is None:
        parts = [part(i) for i in range(PROCESSES)]
        batches, put = [np.concatenate(a, axis=1) for a in zip(*parts, strict=True)], jnp.asarray
    else:
        mesh = jax.make_mesh((jax.device_count(),), ("batch",), axis_types=(AxisType.Auto,))
        carry = jax.device_put(carry, NamedSharding(mesh, P()))
        batches = part(jax.process_index())
        put = functools.partial(
            jax.make_array_from_process_local_data, NamedSharding(mesh, P("batch"))
        )
    if way == "shard_map":
        step = jax.shard_map(step, mesh=mesh, in_specs=(P(), P("batch")), out_specs=P())
    step = quick_jit(step)
    for batch in zip(*batches, strict=True):
        carry = step(carry, tuple(map(put, batch)))
    return jax.tree.map(lambda a: np.asarray(a.addressable_data(0)), carry[0])


def main(index, number, port, folder):
    """Connects to the other processes, trains in each mode, and writes the leaves in order."""
    address = f"127.0.0.1:{port}"
    jax.distributed.initialize(
        address,
        int(number),
        int(index),
        coordinator_bind_address=address if index == "0" else None,
        initialization_timeout=60,
    )
    for way in WAYS:
        leaves = jax.tree.leaves(train(way))
        np.savez(pathlib.Path(folder) / f"{way}-{index}.npz", *leaves)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # a normal exit would wait for the other processes
