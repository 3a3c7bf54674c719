"""Trains and saves after every step; `test_checkpoints` kills and restarts this program.

python killed_training.py FOLDER: resumes from the last complete checkpoint in FOLDER, if there is
one, prints the step at which it begins, and writes the state after the last step to FOLDER/end.
"""

import functools
import pathlib
import sys

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

import jaxnorm.linen

STEPS = 12
optimizer = optax.adam(0.01)
# Starting and compiling take most of the time.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(jaxnorm.linen.BatchNorm(use_running_average=False)(nn.Dense(16)(x)))
        return nn.Dense(1)(x)


@quick_jit
def first():
    variables = Net().init(jax.random.key(0), jnp.ones((2, 8)))
    return {**variables, "opt_state": optimizer.init(variables["params"]), "step": jnp.int32(0)}


@quick_jit
def train_step(state):
    x = jax.random.normal(jax.random.fold_in(jax.random.key(1), state["step"]), (32, 8))

    def loss(params):
        variables = {"params": params, "batch_stats": state["batch_stats"]}
        y, updates = Net().apply(variables, x, mutable=["batch_stats"])
        return jnp.mean((y[:, 0] - jnp.sin(x.sum(1))) ** 2), updates

    grads, updates = jax.grad(loss, has_aux=True)(state["params"])
    changes, opt_state = optimizer.update(grads, state["opt_state"])
    params = optax.apply_updates(state["params"], changes)
    return {"params": params, **updates, "opt_state": opt_state, "step": state["step"] + 1}


def main(folder):
    with ocp.CheckpointManager(folder / "checkpoints") as manager:
        last = manager.latest_step()
        if last is None:
            state = first()
        else:
            state = manager.restore(last, args=ocp.args.StandardRestore(jax.eval_shape(first)))
        print(int(state["step"]))
        while state["step"] < STEPS:
            state = train_step(state)
            manager.save(int(state["step"]), args=ocp.args.StandardSave(state))
    (folder / "end").write_bytes(flax.serialization.to_bytes(state))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]).absolute())
