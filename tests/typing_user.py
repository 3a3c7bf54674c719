"""User code that type checkers accept; test_types.py checks and runs it."""

from collections.abc import Mapping
from typing import Any, assert_type

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxnorm
from jaxnorm import Affine, BatchStats, interop

X = jnp.asarray(np.random.default_rng(0).standard_normal((4, 3, 2)), jnp.float32)


# ---- Functions: the returned state has the type of the given one ----


def functions(x: jax.Array) -> None:
    params, batch_stats = jaxnorm.init_params(2), jaxnorm.init_batch_stats(2)
    y, batch_stats = jaxnorm.batch_norm(x, params, batch_stats)
    y, batch_stats = jaxnorm.batch_norm(y, params, batch_stats, momentum=None, epsilon=1e-3)
    y, batch_stats = jaxnorm.batch_norm(x, batch_stats=batch_stats, use_running_average=True)
    y, batch_stats = jaxnorm.instance_norm(x, params, batch_stats, mask=x > 0)
    y, batch_stats = jaxnorm.batch_renorm(x, params, batch_stats, r_max=2.0)
    y, batch_stats = jaxnorm.batch_renorm(x, batch_stats=batch_stats, d_max=lambda count: 1.0)
    assert_type(y, jax.Array)
    assert_type(batch_stats, BatchStats)
    batch_stats["mean"].block_until_ready()

    y, nothing = jaxnorm.batch_norm(x, params)
    assert_type(nothing, None)
    y, nothing = jaxnorm.instance_norm(x)
    assert_type(jaxnorm.group_norm(x, num_groups=2), jax.Array)
    assert_type(jaxnorm.layer_norm(x, params, axis=(-1,)), jax.Array)
    assert_type(jaxnorm.rms_norm(np.ones((2, 3), np.float32)), jax.Array)


def layer_of_either_kind(
    x: jax.Array, params: Affine, batch_stats: BatchStats | None
) -> tuple[jax.Array, BatchStats | None]:
    y, batch_stats = jaxnorm.batch_norm(x, params, batch_stats)
    return jax.nn.relu(y), batch_stats


class Model:
    """A user's model, which stores its parameters and states in dicts."""

    def __init__(self) -> None:
        self.params: dict[str, Affine] = {"bn": jaxnorm.init_params(2)}
        self.states: dict[str, BatchStats] = {"bn": jaxnorm.init_batch_stats(2)}

    def __call__(self, x: jax.Array) -> jax.Array:
        y, self.states["bn"] = jaxnorm.batch_norm(x, self.params["bn"], self.states["bn"])
        return y


def train_step(
    params: Affine, batch_stats: BatchStats, x: jax.Array
) -> tuple[Affine, BatchStats, jax.Array]:
    def loss(params: Affine) -> tuple[jax.Array, BatchStats]:
        y, new = jaxnorm.batch_norm(x, params, batch_stats)
        return jnp.mean(y**2), new

    (value, batch_stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
    params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    return params, batch_stats, value


def statistics(x: jax.Array) -> None:
    states = {"block": {"bn": jaxnorm.init_batch_stats(2)}}
    states = jaxnorm.begin_accumulation(states)
    states = jaxnorm.end_accumulation(states)
    assert_type(states["block"]["bn"], BatchStats)

    def step(state: BatchStats, batch: jax.Array) -> BatchStats:
        return jaxnorm.batch_norm(batch, None, state)[1]

    state = jaxnorm.recalibrate(step, jaxnorm.init_batch_stats(2), [x, x + 1])
    assert_type(state, BatchStats)
    multiplier, _ = jaxnorm.fold_scale_shift(None, state)
    assert_type(multiplier, jax.Array)
    assert_type(jaxnorm.moments(x, axis=0), jaxnorm.Moments)
    for finding in jaxnorm.check_batch_stats({"batch_stats": {"bn": state}}):
        print(finding.path, finding.problem)


# ---- Linen ----


class Block(nn.Module):
    train: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = jaxnorm.linen.BatchNorm(
            use_running_average=not self.train, decay=0.9, axis_name=None, dtype=jnp.bfloat16
        )(x)
        x = jaxnorm.linen.BatchRenorm(use_running_average=not self.train, r_max=1.0, d_max=0.0)(x)
        x = jaxnorm.linen.InstanceNorm1d()(x, mask=x == x)
        x = jaxnorm.linen.GroupNorm(num_groups=None, group_size=1)(x)
        return jaxnorm.linen.LayerNorm()(jaxnorm.linen.RMSNorm(epsilon=1e-5)(x))


def linen_layers(x: jax.Array) -> None:
    model = Block()
    variables = model.init(jax.random.key(0), x)
    _, updates = model.apply(variables, x, mutable=["batch_stats"])
    new = jaxnorm.linen.recalibrate(model, {**variables, **updates}, [x, x + 1])
    assert_type(new, dict[str, Any])


# ---- NNX: the variables and the arguments are attributes ----


class Network(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.norm = jaxnorm.nnx.BatchNorm(2, momentum=0.01, rngs=rngs)
        self.renorm = jaxnorm.nnx.BatchRenorm(2, r_max=2.0, decay=0.99, rngs=rngs)
        self.other = jaxnorm.nnx.InstanceNorm1d(2, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.other(self.renorm(self.norm(x), update_stats=False))


def nnx_layers(x: jax.Array) -> None:
    model = Network(rngs=nnx.Rngs(0))
    assert_type(model(x), jax.Array)
    assert_type(model.norm.mean[...], jax.Array)
    assert_type(model.norm.var.get_value(), jax.Array)
    print(int(model.norm.count[...]), model.norm.num_features, model.norm.epsilon)
    print(model.norm.virtual_batch_size, model.renorm.r_max, model.other.feature_axes)
    assert_type(model.norm.momentum, float | None)
    assert_type(model.norm.scale, nnx.Param[jax.Array] | None)
    if model.norm.scale is not None:
        assert_type(model.norm.scale[...], jax.Array)
    assert model.other.bias is None
    model.norm.use_running_average = True
    group_norm = jaxnorm.nnx.GroupNorm(2, num_groups=1, rngs=nnx.Rngs(0))
    print(group_norm.group_size, group_norm.bias, group_norm.use_bias, group_norm(x))
    print(jaxnorm.nnx.LayerNorm(2, rngs=nnx.Rngs(0))(jaxnorm.nnx.RMSNorm(2, rngs=nnx.Rngs(0))(x)))
    jaxnorm.nnx.begin_accumulation(model)
    jaxnorm.nnx.end_accumulation(model)


# ---- Interop and inspect ----


def conversion(variables: Mapping[str, Any]) -> None:
    state_dict = interop.to_torch(variables, names={"layers.1": "bn"})
    assert_type(state_dict["layers.1.weight"], np.ndarray)
    back = interop.from_torch(state_dict, names={"layers.1": "bn"}, count=3)
    assert_type(jaxnorm.inspect.scalars(back["batch_stats"]), dict[str, jax.Array])
    for row in jaxnorm.inspect.summary(back["batch_stats"], worst=3):
        assert_type(row.path, str)
        assert_type(row.dead, int)


def main() -> None:
    functions(X)
    y, state = layer_of_either_kind(X, jaxnorm.init_params(2), None)
    assert state is None
    Model()(y)
    params, batch_stats, _ = train_step(jaxnorm.init_params(2), jaxnorm.init_batch_stats(2), X)
    statistics(X)
    linen_layers(X)
    nnx_layers(X)
    conversion({"params": {"bn": params}, "batch_stats": {"bn": batch_stats}})
