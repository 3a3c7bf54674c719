"""Tests that training in two processes of jax.distributed agrees with one process."""

import os
import pathlib
import socket
import subprocess
import sys
import time

import chex
import jax
import numpy as np
import pytest
import two_processes

SCRIPT = pathlib.Path(two_processes.__file__)
pytestmark = pytest.mark.slow
LIMIT = 120  # seconds; the processes take about ten, and none outlives a failed test


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Returns the final variables of each process in each mode, and those of one process."""
    folder, port = tmp_path_factory.mktemp("trained"), free_port()
    number = two_processes.PROCESSES
    path = os.pathsep.join(filter(None, [str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH")]))
    logs = [folder / f"log-{i}" for i in range(number)]
    children = []
    for i, log in enumerate(logs):
        with log.open("w") as output:
            child = subprocess.Popen(
                [sys.executable, SCRIPT, str(i), str(number), str(port), folder],
                env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        children.append(child)
    try:
        alone = two_processes.train()  # the reference, which is computed meanwhile
        end = time.monotonic() + LIMIT
        # If one process fails, the others wait for it, so the first failure ends all of them.
        while {child.poll() for child in children} <= {None, 0} and time.monotonic() < end:
            if all(child.poll() == 0 for child in children):
                break
            time.sleep(0.05)
        codes = [child.poll() for child in children]
        assert codes == [0] * number, "\n".join(log.read_text()[-3000:] for log in logs)
    finally:
        for child in children:
            child.kill()
            child.wait()
    tree = jax.tree.structure(alone)

    def read(way, i):
        with np.load(folder / f"{way}-{i}.npz") as leaves:
            return jax.tree.unflatten(tree, [leaves[key] for key in leaves])

    return alone, {way: [read(way, i) for i in range(number)] for way in two_processes.WAYS}


@pytest.mark.parametrize("way", two_processes.WAYS)
def test_two_processes_train_as_one(trained, way):
    alone, found = trained
    chex.assert_trees_all_equal(*found[way])
    for norm, state in found[way][0]["batch_stats"].items():
        assert state["count"] == alone["batch_stats"][norm]["count"] == two_processes.STEPS
    # Sums have another order, through 20 steps in float32. The measured difference is 4e-6.
    chex.assert_trees_all_close(found[way][0], alone, rtol=2e-5, atol=2e-5)
