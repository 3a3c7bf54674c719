"""Tests norms on meshes with explicit axes, and under JAX's strict flags."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnorm
import jaxnorm.nnx

X = jnp.asarray(np.random.default_rng(0).normal(2, 1, (8, 3, 4)), jnp.float32)
PARAMS, STATE = jaxnorm.init_params(4), jaxnorm.init_batch_stats(4)
TRACKED = {
    "batch": jaxnorm.batch_norm,
    "ghost batch": functools.partial(jaxnorm.batch_norm, virtual_batch_size=2),
    "batch renorm": jaxnorm.batch_renorm,
    "instance": jaxnorm.instance_norm,
    "cumulative": functools.partial(jaxnorm.batch_norm, momentum=None),
}
PLAIN = {
    "group": functools.partial(jaxnorm.group_norm, num_groups=2),
    "layer": jaxnorm.layer_norm,
    "rms": jaxnorm.rms_norm,
}


def close(found, wanted):
    # Sums over two devices have another order than those on one device.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, wanted)


@pytest.fixture
def mesh():
    mesh = jax.make_mesh((2, 2), ("data", "model"))
    with jax.set_mesh(mesh):
        yield mesh


BOTH = P("data", None, "model")


@pytest.mark.parametrize(
    ("spec", "accumulates"),
    [(P(None, None, "model"), False), (BOTH, False), (BOTH, True)],
    ids=str,
)
@pytest.mark.parametrize("name", TRACKED)
def test_channels_are_sharded_and_the_state_is_not(name, spec, accumulates, mesh):
    state = jaxnorm.begin_accumulation(STATE) if accumulates else STATE

    def step(x, state):
        def loss(x, params):
            y, new = TRACKED[name](x, params, state)
            return jnp.sum(jnp.sin(y)), (y, new)

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(x, PARAMS)

    wanted = jax.jit(step)(X, state)
    found = jax.jit(step)(jax.device_put(X, NamedSharding(mesh, spec)), state)
    close(found, wanted)
    assert all(a.sharding.is_fully_replicated for a in jax.tree.leaves(found[0][1][1]))


def test_a_state_that_is_sharded_as_the_channels_are_stays_so(mesh):
    sharding = NamedSharding(mesh, P("model"))
    state = {k: a if a.ndim == 0 else jax.device_put(a, sharding) for k, a in STATE.items()}
    x = jax.device_put(X, NamedSharding(mesh, P("data", None, "model")))
    y, new = jax.jit(jaxnorm.batch_norm)(x, None, state)
    assert new["mean"].sharding.spec == new["var"].sharding.spec == P("model")
    close((y, new), jaxnorm.batch_norm(X, None, STATE))


@pytest.mark.parametrize("name", ["batch", "instance"])
def test_shard_map_over_one_axis_with_the_channels_on_the_other(name, mesh):
    def step(x, state):
        return TRACKED[name](x, None, state, axis_name="data")

    specs = {"in_specs": (P("data"), P()), "out_specs": (P("data"), P()), "axis_names": {"data"}}
    x = jax.device_put(X, NamedSharding(mesh, P("data", None, "model")))
    close(jax.jit(jax.shard_map(step, **specs))(x, STATE), TRACKED[name](X, None, STATE))


def every(masked):
    """Returns every norm as a function of x and parameters of shape (C,)."""
    mask = {"mask": X[:1] > 1} if masked else {}
    tracked = {n: lambda x, p, f=f: f(x, p, STATE, **mask)[0] for n, f in TRACKED.items()}
    plain = {n: lambda x, p, f=f: f(x, p, **mask) for n, f in PLAIN.items()}
    return tracked | plain


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", [*TRACKED, *PLAIN])
def test_no_rank_is_promoted_implicitly(name, masked):
    def loss(x, params):
        return jnp.sum(jnp.sin(every(masked)[name](x, params)))

    gradient = jax.grad(loss, (0, 1))

    @jax.jit
    def gradient_and_hessian_s_product(x, params):
        return jax.jvp(lambda x: gradient(x, params), (x,), (x,))

    wanted = jax.jit(gradient)(X, PARAMS)
    with jax.numpy_rank_promotion("raise"):
        found, _ = gradient_and_hessian_s_product(X, PARAMS)
    close(found, wanted)


def test_nnx_describes_the_views_of_a_model():
    model = nnx.Sequential(
        jaxnorm.nnx.BatchNorm(3, rngs=nnx.Rngs(0)), jaxnorm.nnx.InstanceNorm(3, rngs=nnx.Rngs(0))
    )
    assert "use_running_average" in nnx.view_info(model)
