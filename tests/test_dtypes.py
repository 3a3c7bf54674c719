"""Tests every cell of the table in docs/dtypes.md."""

import itertools
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jaxnorm
import jaxnorm.linen
import jaxnorm.nnx

PAGE = (pathlib.Path(__file__).parent.parent / "docs" / "dtypes.md").read_text()
DTYPES = ("float16", "bfloat16", "float32", "float64")
SHAPE = (2, 3, 4)
TRACKED = {"batch_norm": jaxnorm.batch_norm, "instance_norm": jaxnorm.instance_norm}
UNTRACKED = {
    "group_norm": lambda x, params, **options: jaxnorm.group_norm(
        x, params, num_groups=2, **options
    ),
    "layer_norm": jaxnorm.layer_norm,
    "rms_norm": jaxnorm.rms_norm,
}
OPTIONS = {
    "BatchNorm": {"use_running_average": False},
    "InstanceNorm": {"use_running_average": False, "track_running_stats": True},
    "GroupNorm": {"num_groups": 2},
    "LayerNorm": {},
    "RMSNorm": {},
}

pytestmark = pytest.mark.usefixtures("x64")


def read_tables():
    """Returns the tables of the page; each maps the first cell of a row to its other cells."""
    blocks = re.findall(r"(?:^\|.*\n)+", PAGE, re.M)
    rows = [[re.findall(r"[^|]+", line) for line in block.splitlines()[2:]] for block in blocks]
    cells = [[[cell.strip() for cell in row if cell.strip()] for row in block] for block in rows]
    return [{row[0]: tuple(row[1:]) for row in block} for block in cells]


Y, STATE, LAYER = read_tables()


def test_the_page_has_every_dtype_in_every_table():
    columns = [7, 2, 3]
    for table, number in zip((Y, STATE, LAYER), columns, strict=True):
        assert tuple(table) == DTYPES
        assert {len(row) + 1 for row in table.values()} == {number}


def cells_of_y(x):
    """Yields the dtype argument and the dtype of y."""
    return list(zip((None, *DTYPES), Y[x][1:], strict=True))


def of(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype)


def affine(dtype):
    return {"scale": of(dtype, SHAPE[-1]), "bias": of(dtype, SHAPE[-1])}


def batch_stats(dtype):
    return {"mean": of(dtype, 4), "var": of(dtype, 4), "count": of("int32")}


def dtypes(tree):
    return jax.tree.map(lambda a: str(a.dtype), tree)


@pytest.mark.parametrize("x", DTYPES)
def test_statistics(x):
    m = jax.eval_shape(lambda x: jaxnorm.moments(x, 0), of(x, *SHAPE))
    assert set(jax.tree.leaves(dtypes(m))) == {Y[x][0]}


@pytest.mark.parametrize("x", DTYPES)
@pytest.mark.parametrize("norm", UNTRACKED)
def test_y_of_a_norm_without_a_state(norm, x):
    for params, (dtype, expected) in itertools.product(DTYPES, cells_of_y(x)):
        y = jax.eval_shape(
            lambda x, params: UNTRACKED[norm](x, params, dtype=dtype),  # noqa: B023
            of(x, *SHAPE),
            affine(params),
        )
        assert (params, dtype, str(y.dtype)) == (params, dtype, expected)


@pytest.mark.parametrize("use_running_average", [False, True])
@pytest.mark.parametrize("x", DTYPES)
@pytest.mark.parametrize("norm", TRACKED)
def test_y_and_the_new_state(norm, x, use_running_average):
    for params, state, (dtype, expected) in itertools.product(DTYPES, DTYPES, cells_of_y(x)):
        y, new = jax.eval_shape(
            lambda *arrays: TRACKED[norm](
                *arrays,
                use_running_average=use_running_average,
                update_stats=True,
                dtype=dtype,  # noqa: B023
            ),
            of(x, *SHAPE),
            affine(params),
            batch_stats(state),
        )
        (moved,) = STATE[state]
        assert (params, state, dtype, str(y.dtype)) == (params, state, dtype, expected)
        assert dtypes(new) == {"mean": moved, "var": moved, "count": "int32"}


def test_evaluation_by_a_float64_state_computes_in_float64():
    x, mean = jnp.ones((1, 1), jnp.float32), jnp.ones(1, jnp.float64) - 1e-12
    state = {"mean": mean, "var": jnp.zeros(1, jnp.float32), "count": jnp.int32(1)}
    y, _ = jaxnorm.batch_norm(x, None, state, use_running_average=True, epsilon=1.0)
    # 1 - 1e-12 is 1 in float32; in float64 the difference is kept, with a rounding of 1e-16.
    assert y.dtype == jnp.float32
    assert float(y[0, 0]) == pytest.approx(1e-12, rel=1e-3)


@pytest.mark.parametrize("norm", TRACKED | UNTRACKED)
def test_a_gradient_has_the_dtype_of_what_it_is_the_gradient_of(norm):
    def loss(x, params):
        y = (TRACKED | UNTRACKED)[norm](x, params)
        return jnp.sum(y[0] if norm in TRACKED else y).astype("float32")

    for x, params in itertools.product(DTYPES, DTYPES):
        of_x, of_params = jax.eval_shape(jax.grad(loss, (0, 1)), of(x, *SHAPE), affine(params))
        assert (of_x.dtype, dtypes(of_params)) == (x, {"scale": params, "bias": params})


def test_without_x64_float64_is_float32_and_jax_warns():
    with jax.enable_x64(False):
        with pytest.warns(UserWarning, match="will be truncated to dtype float32"):
            y, _ = jaxnorm.batch_norm(jnp.ones((2, 3)), dtype="float64")
        assert y.dtype == jnp.float32


# ---- The layers ----


def linen_layer(name, x, **options):
    """Returns y, the parameters and the state of a layer."""
    layer = getattr(jaxnorm.linen, name)(**OPTIONS[name], **options)
    y, variables = layer.init_with_output(jax.random.key(0), x)
    return y, variables["params"], variables.get("batch_stats")


def nnx_layer(name, x, **options):
    layer = getattr(jaxnorm.nnx, name)(4, **OPTIONS[name], **options, rngs=nnx.Rngs(0))
    params, batch_stats = (
        nnx.to_pure_dict(nnx.state(layer, k)) for k in (nnx.Param, nnx.BatchStat)
    )
    return layer(x), params, batch_stats or None


layers = pytest.mark.parametrize("layer", [linen_layer, nnx_layer], ids=["linen", "nnx"])


@layers
@pytest.mark.parametrize("name", OPTIONS)
def test_a_layer_hands_dtype_on(layer, name):
    for x in DTYPES:
        for dtype, expected in cells_of_y(x):
            y, *_ = jax.eval_shape(
                lambda x: layer(name, x, dtype=dtype),  # noqa: B023
                of(x, *SHAPE),
            )
            assert (x, dtype, str(y.dtype)) == (x, dtype, expected)


@layers
@pytest.mark.parametrize("name", OPTIONS)
def test_a_layer_makes_its_variables_by_param_dtype(layer, name):
    for param_dtype, (affine_dtype, state_dtype) in LAYER.items():
        y, params, batch_stats = jax.eval_shape(
            lambda x: layer(name, x, param_dtype=param_dtype),  # noqa: B023
            of("float16", *SHAPE),
        )
        assert set(dtypes(params).values()) == {affine_dtype}
        if batch_stats is not None:
            moved = {"mean": state_dtype, "var": state_dtype, "count": "int32"}
            assert dtypes(batch_stats) == moved
        assert y.dtype == "float16"


def test_a_dtype_of_none_is_the_default_float(x64):
    made = jaxnorm.init_params(3, dtype=None), jaxnorm.init_batch_stats(3, dtype=None)
    assert made[0]["scale"].dtype == made[1]["mean"].dtype == made[1]["var"].dtype == jnp.float64
