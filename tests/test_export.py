"""Tests that a model in evaluation is exported as StableHLO, and agrees in another process."""

import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export

import jaxnorm.linen
import jaxnorm.nnx

LOAD = """
import sys, numpy as np, jax
from jax import export
folder = sys.argv[1]
model = export.deserialize(bytearray(open(f"{folder}/model.bin", "rb").read()))
for k in range(3):
    np.save(f"{folder}/y{k}.npy", model.call(np.load(f"{folder}/x{k}.npy")))
assert not [m for m in ("jaxnorm", "flax") if m in sys.modules]
"""


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3))(x)
        x = nn.relu(jaxnorm.linen.BatchNorm(use_running_average=True)(x))
        x = jaxnorm.linen.InstanceNorm(use_running_average=True, track_running_stats=True)(x)
        x = jaxnorm.linen.GroupNorm(num_groups=2)(jaxnorm.linen.InstanceNorm()(x))
        return jaxnorm.linen.RMSNorm()(jaxnorm.linen.LayerNorm()(x))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.batch = jaxnorm.nnx.BatchNorm(8, rngs=rngs)
        self.instance = jaxnorm.nnx.InstanceNorm(8, track_running_stats=True, rngs=rngs)
        self.layer = jaxnorm.nnx.LayerNorm(8, rngs=rngs)

    def __call__(self, x):
        return self.layer(self.instance(nnx.relu(self.batch(self.conv(x)))))


def trained_statistics(tree):
    """Returns a state that is not the initial one."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda a: jnp.asarray(rng.uniform(0.5, 2, a.shape), a.dtype) if a.ndim else a + 5, tree
    )


@pytest.mark.parametrize("frontend", [pytest.param("Linen", marks=pytest.mark.slow), "NNX"])
def test_an_exported_model_with_symbolic_sizes_runs_in_another_process(frontend, tmp_path):
    if frontend == "Linen":
        variables = Linen().init(jax.random.key(0), jnp.ones((1, 8, 8, 3)))
        variables = {**variables, "batch_stats": trained_statistics(variables["batch_stats"])}

        def model(x):
            return Linen().apply(variables, x)

    else:
        module = Nnx(nnx.Rngs(0))
        nnx.update(module, trained_statistics(nnx.state(module, nnx.BatchStat)))
        module.eval()

        def model(x):
            return module(x)

    n, h, w = export.symbolic_shape("n, h, w")
    exported = export.export(jax.jit(model))(jax.ShapeDtypeStruct((n, h, w, 3), jnp.float32))
    (tmp_path / "model.bin").write_bytes(exported.serialize())
    xs = [
        np.random.default_rng(k).normal(3, 2, (k + 1, 5 + k, 7, 3)).astype(np.float32)
        for k in range(3)
    ]
    for k, x in enumerate(xs):
        np.save(tmp_path / f"x{k}.npy", x)
    subprocess.run([sys.executable, "-c", LOAD, str(tmp_path)], check=True)
    for k, x in enumerate(xs):
        # The sizes of this program are known, which changes the fusions and the rounding.
        # If a channel is constant after the ReLU, a rounding of 1e-7 is divided by sqrt(epsilon),
        # which is 1e-3.
        np.testing.assert_allclose(np.load(tmp_path / f"y{k}.npy"), model(x), rtol=1e-4, atol=5e-4)
