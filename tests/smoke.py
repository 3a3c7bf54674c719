"""Tests the installed package in an environment with nothing else, outside the checkout.

python smoke.py FOLDER checks that no module is imported from this folder.
"""

import sys
from importlib.metadata import version
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import jaxnorm
import jaxnorm.inspect
import jaxnorm.interop
import jaxnorm.linen
import jaxnorm.nnx


class Net(nn.Module):
    """A layer with running statistics."""

    @nn.compact
    def __call__(self, x, train):
        """Applies the layer."""
        return jaxnorm.linen.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))


def main(checkout: Path) -> None:
    """Trains one step with functions, Linen and NNX, without an optimizer."""
    where = Path(jaxnorm.__file__).resolve()
    assert checkout.resolve() not in where.parents, where
    assert (where.parent / "py.typed").exists()
    x = jax.random.normal(jax.random.key(0), (8, 3)) + 1e4
    y, state = jaxnorm.batch_norm(x, jaxnorm.init_params(3), jaxnorm.init_batch_stats(3))
    assert abs(y.mean()) < 1e-5
    assert state["count"] == 1
    variables = Net().init(jax.random.key(0), x, train=False)
    _, updates = Net().apply(variables, x, train=True, mutable=["batch_stats"])
    assert jaxnorm.inspect.scalars(updates)["BatchNorm_0/count"] == 1
    layer = jaxnorm.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    layer(x)
    assert layer.count[...] == 1
    assert jnp.isfinite(layer(x)).all()
    print(f"jaxnorm {version('jaxnorm')} works in {where.parent}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
