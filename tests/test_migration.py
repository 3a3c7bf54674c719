"""Tests that docs/migration.md lists every argument, and describes each one correctly."""

import inspect
import pathlib
import re
import types

import flax.linen
import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnorm.linen
import jaxnorm.nnx

PAGE = (pathlib.Path(__file__).parent.parent / "docs" / "migration.md").read_text()
LAYERS = ("BatchNorm", "InstanceNorm", "GroupNorm", "LayerNorm", "RMSNorm")
COLUMNS = {
    "Linen": [flax.linen],
    "NNX": [flax.nnx],
    "jaxnorm": [jaxnorm.linen, jaxnorm.nnx],
}
ABSENT = "\N{EN DASH}"
KEY = jax.random.key(0)
X = jax.random.normal(KEY, (4, 5, 6)) + 1

linen = pytest.mark.parametrize("linen", [flax.linen, jaxnorm.linen], ids=["flax", "jaxnorm"])
nnx = pytest.mark.parametrize("nnx", [flax.nnx, jaxnorm.nnx], ids=["flax", "jaxnorm"])


# ---- A row for every argument ----


def read_rows():
    """Returns a map from (layer, argument, in the call) to the other cells of the row."""
    rows = []
    for section in PAGE.split("\n## ")[1:]:
        named = [name for name in LAYERS if name in section.splitlines()[0]]
        if section.startswith("Every layer"):
            named = [name for name in LAYERS if name not in named]
        for line in re.findall(r"^\| `.*", section, re.M) if named else ():
            argument, *cells = (cell.strip() for cell in line.strip("|").split(" | "))
            name = re.match(r"`(\w+)`", argument)[1]
            rows.append((named, name, argument.endswith("in the call"), cells))
    return rows


ROWS = read_rows()


def arguments(module, layer, in_call):
    """Returns the arguments of the constructor or the call, with defaults as on the page."""
    method = getattr(module, layer).__call__ if in_call else getattr(module, layer).__init__
    parameters = list(inspect.signature(method).parameters.values())[1:]
    return {p.name: written(p.default) for p in parameters if p.name not in ("parent", "name")}


def written(default):
    if default is inspect.Parameter.empty:
        return "required"
    if isinstance(default, types.MappingProxyType):
        return repr(dict(default))
    return getattr(default, "__name__", repr(default).replace("e-0", "e-"))


@pytest.mark.parametrize("layer", LAYERS)
def test_every_argument_has_one_row_and_every_row_an_argument(layer):
    for in_call in (False, True):
        rows = [name for layers, name, call, _ in ROWS if layer in layers and call == in_call]
        modules = [module for column in COLUMNS.values() for module in column]
        names = {name for module in modules for name in arguments(module, layer, in_call)}
        assert sorted(rows) == sorted(names)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: " ".join((*row[0], row[1])))
def test_a_row_holds_the_defaults_and_says_what_becomes_of_them(row):
    layers, name, in_call, (*cells, text) = row
    defaults = {
        module: {layer: arguments(module, layer, in_call).get(name) for layer in layers}
        for column in COLUMNS.values()
        for module in column
    }
    for cell, modules in zip(cells, COLUMNS.values(), strict=True):
        found = {d for module in modules for d in defaults[module].values()} - {None}
        assert set(cell.replace("`", "").replace(ABSENT, "").split(", ")) == (found or {""})
    verdict = re.match(r"\*\*(same|different|no effect|new)\*\*", text)[1]
    flax_defaults = defaults[flax.linen], defaults[flax.nnx]
    assert (verdict == "new") == (
        not any(d for frontend in flax_defaults for d in frontend.values())
    )
    if verdict in ("same", "no effect"):
        jaxnorm_defaults = defaults[jaxnorm.linen], defaults[jaxnorm.nnx]
        for defaults_of, flax_defaults_of in zip(jaxnorm_defaults, flax_defaults, strict=True):
            assert all(
                defaults_of[layer] == d for layer, d in flax_defaults_of.items() if d is not None
            )


# ---- Differences between Flax and jaxnorm; test_linen.py has the others ----


def make(linen, layer, **options):
    """Makes a layer of Flax or jaxnorm that can be trained on X."""
    options |= {"BatchNorm": {"use_running_average": False}, "GroupNorm": {"num_groups": 2}}.get(
        layer, {}
    )
    return getattr(linen, layer)(**options)


def make_nnx(nnx, layer, *args, **options):
    options |= {"num_groups": 2} if layer == "GroupNorm" else {}
    return getattr(nnx, layer)(*(args or (6,)), rngs=flax.nnx.Rngs(0), **options)


def run(layer, x=X, **call):
    """Returns y and the updated state of a batch norm."""
    y, updates = layer.apply(layer.init(KEY, X), x, mutable=["batch_stats"], **call)
    return y, updates.get("batch_stats")


def is_jaxnorm(module):
    return module.__name__.startswith("jaxnorm")


@pytest.mark.parametrize("layer", LAYERS)
def test_dtype_none_is_x_s_and_promotes_in_flax(layer):
    x = X.astype(jnp.bfloat16)
    for linen, nnx, expected in (
        (flax.linen, flax.nnx, jnp.float32),
        (jaxnorm.linen, jaxnorm.nnx, jnp.bfloat16),
    ):
        assert run(make(linen, layer), x)[0].dtype == expected
        assert make_nnx(nnx, layer)(x).dtype == expected


@nnx
def test_dtype_rounds_x_before_it_is_measured_in_flax_s_nnx(nnx):
    y = make_nnx(nnx, "LayerNorm", dtype=jnp.bfloat16)(1 + 1e-3 * X)  # all equal in bfloat16
    assert bool(jnp.any(y)) == is_jaxnorm(nnx)


@linen
def test_dtype_rounds_float64_before_it_is_measured_in_flax_s_linen(x64, linen):
    layer = make(linen, "LayerNorm", dtype=jnp.float32, use_fast_variance=False, epsilon=0.0)
    x = 1 + 1e-9 * X.astype(jnp.float64)  # all entries are equal in float32
    assert bool(jnp.isfinite(run(layer, x)[0]).all()) == is_jaxnorm(linen)


@linen
def test_param_dtype_float64_is_the_state_s_too(x64, linen):
    _, state = run(make(linen, "BatchNorm", param_dtype=jnp.float64))
    assert state["mean"].dtype == (jnp.float64 if is_jaxnorm(linen) else jnp.float32)


@linen
def test_the_state_keeps_its_dtype_for_float64_x(x64, linen):
    _, state = run(make(linen, "BatchNorm"), X.astype(jnp.float64))
    assert state["mean"].dtype == (jnp.float32 if is_jaxnorm(linen) else jnp.float64)


@nnx
def test_several_channel_axes_in_nnx(nnx):
    axes = {"reduction_axes": (1, 2), "feature_axes": (1, 2)}
    shape, product = (5, 6), 30
    if is_jaxnorm(nnx):
        assert make_nnx(nnx, "LayerNorm", shape, **axes)(X).shape == X.shape
        assert make_nnx(nnx, "BatchNorm", shape, axis=(1, 2))(X).shape == X.shape
        with pytest.raises(ValueError, match=r"channels' shape \(5, 6\).* has shape \(30,\)"):
            make_nnx(nnx, "LayerNorm", product, **axes)(X)
    else:
        layer = make_nnx(nnx, "LayerNorm", product, **axes)
        assert layer(X).shape == X.shape
        assert layer.scale.shape == (30,)
        with pytest.raises(TypeError):
            make_nnx(nnx, "LayerNorm", shape, **axes)
        with pytest.raises(ValueError, match="broadcast"):
            make_nnx(nnx, "BatchNorm", product, axis=(1, 2))(X)


@linen
def test_an_axis_named_twice(linen):
    layer = make(linen, "BatchNorm", axis=(2, -1))
    if is_jaxnorm(linen):
        with pytest.raises(ValueError, match="axis should name each axis once"):
            run(layer)
    else:
        run(layer)


VARIABLES = {"params": jaxnorm.init_params(6), "batch_stats": jaxnorm.init_batch_stats(6)}


def spread(layer, x, **call):
    """Returns y of a layer, with x on two devices along its first axis."""

    def on_one(x, call):
        y, _ = layer.apply(VARIABLES, x, mutable=["batch_stats"], **call)
        return y

    halves = jax.tree.map(lambda a: a.reshape(2, -1, *a.shape[1:]), (x, call))
    return jax.vmap(on_one, axis_name="devices")(*halves).reshape(x.shape)


@linen
def test_axis_name_weighs_the_devices_by_what_their_masks_leave(linen):
    mask = jnp.arange(20).reshape(4, 5, 1) < 13  # 10 and 3 entries
    layer = make(linen, "BatchNorm", axis_name="devices")
    whole, _ = run(make(linen, "BatchNorm"), mask=mask)
    y = spread(layer, X, mask=mask)
    worst = np.abs(np.where(mask, y - whole, 0)).max()
    assert (worst < 2e-6) == is_jaxnorm(linen)  # float32 sums in another order; otherwise 0.3


@linen
def test_axis_name_need_not_be_bound_at_init(linen):
    make(linen, "BatchNorm", axis_name="devices").init(KEY, X)
    layer = make(linen, "LayerNorm", axis_name="devices")
    if is_jaxnorm(linen):
        layer.init(KEY, X)
    else:
        with pytest.raises(NameError, match="unbound axis name: devices"):
            layer.init(KEY, X)


@linen
def test_axis_name_of_instance_norm_spreads_samples_here_and_entries_in_flax(linen):
    x = X.reshape(4, 1, 5, 6)
    y = spread(make(linen, "InstanceNorm", axis_name="devices"), x)
    alone, _ = run(make(linen, "InstanceNorm"), x)
    assert np.allclose(y, alone, atol=1e-5) == is_jaxnorm(linen)


@linen
def test_axis_index_groups_under_vmap(linen):
    groups = [[0], [1]]
    layer = make(linen, "BatchNorm", axis_name="devices", axis_index_groups=groups)
    if is_jaxnorm(linen):
        alone, _ = run(make(linen, "BatchNorm"), X[:2])
        np.testing.assert_allclose(spread(layer, X)[:2], alone, rtol=0, atol=2e-6)
    else:
        with pytest.raises(NotImplementedError, match="axis_index_groups"):
            spread(layer, X)


@pytest.mark.parametrize("layer", LAYERS)
def test_arguments_without_effect(layer):
    y, _ = run(make(jaxnorm.linen, layer))
    other = {"use_fast_variance": False, "force_float32_reductions": False}
    np.testing.assert_array_equal(y, run(make(jaxnorm.linen, layer, **other))[0])
    make_nnx(jaxnorm.nnx, layer, promote_dtype=None, use_fast_variance=False)(X)


@pytest.mark.parametrize("dtype", [int, complex])
@pytest.mark.parametrize("layer", LAYERS)
def test_x_of_no_float_dtype(layer, dtype):
    x = X.astype(dtype)
    assert run(make(flax.linen, layer), x)[0].dtype in (jnp.float32, jnp.complex64)
    with pytest.raises(ValueError, match="x should have a float dtype"):
        run(make(jaxnorm.linen, layer), x)


MASK = jnp.arange(4)[:, None, None] < 3


@linen
def test_what_is_masked_out_is_0_and_normalized_in_flax(linen):
    layer = make(linen, "BatchNorm")
    x = X.at[3].set(jnp.nan)
    y, _ = run(layer, x, mask=MASK)
    gradient = jax.grad(lambda x: jnp.sum(run(layer, x, mask=MASK)[0][:3] ** 2))(x)
    assert bool(jnp.isfinite(y[:3]).all())
    assert bool((y[3] == 0).all()) == is_jaxnorm(linen)
    assert bool(jnp.isnan(y[3]).all()) != is_jaxnorm(linen)
    assert bool(jnp.isfinite(gradient).all()) == is_jaxnorm(linen)
    assert bool(jnp.any(run(layer, mask=MASK)[0][3])) != is_jaxnorm(linen)


def test_masks_that_flax_takes_and_that_are_refused():
    x, mask = X[:, 0, :4], jnp.arange(4) < 3
    layers = [make(module, "BatchNorm") for module in (flax.linen, jaxnorm.linen)]
    for wrong, message in (
        (mask, r"mask should have x's rank.* mask\[..., None\]"),
        (mask[:, None].astype(int), "mask should be bool"),
    ):
        flax_norm, norm = layers
        flax_norm.init(KEY, x, mask=wrong)
        with pytest.raises(ValueError, match=message):
            norm.init(KEY, x, mask=wrong)


@linen
def test_a_group_norm_s_mask_may_broadcast_along_the_channels(linen):
    layer = make(linen, "GroupNorm")
    if is_jaxnorm(linen):
        run(layer, mask=MASK)
    else:
        with pytest.raises(TypeError, match="cannot reshape"):
            run(layer, mask=MASK)


@linen
def test_a_nan_or_no_values_at_all_leave_the_state(linen):
    layer = make(linen, "BatchNorm")
    for x, mask in (
        (X.at[0, 0].set(jnp.nan), None),
        (X[:0], None),
        (X, jnp.zeros((1, 1, 1), bool)),
    ):
        _, state = run(layer, x, mask=mask)
        for key, first in (("mean", 0), ("var", 1)):
            assert bool((state[key] == first).all()) == is_jaxnorm(linen)
            assert bool(jnp.isnan(state[key]).all()) != is_jaxnorm(linen)


@nnx
def test_group_norm_s_reduction_axes_in_nnx(nnx):
    x = jax.random.normal(KEY, (2, 3, 4, 6))
    layer = make(flax.linen, "GroupNorm", reduction_axes=(2, 3))
    expected = layer.apply({"params": jaxnorm.init_params(6)}, x)
    y = make_nnx(nnx, "GroupNorm", reduction_axes=(2, 3))(x)
    assert np.allclose(y, expected, atol=1e-5) == is_jaxnorm(nnx)
    layer = make_nnx(nnx, "GroupNorm", reduction_axes=(1,))
    if is_jaxnorm(nnx):
        with pytest.raises(ValueError, match="reduction_axes should hold the last axis"):
            layer(X)
    else:
        assert layer(X).shape == X.shape


@linen
def test_both_num_groups_and_group_size(linen):
    if is_jaxnorm(linen):
        with pytest.raises(ValueError, match="one of num_groups and group_size"):
            linen.GroupNorm(num_groups=2, group_size=3)
    else:
        with pytest.raises(ValueError, match="Either `num_groups` or `group_size`"):
            linen.GroupNorm(num_groups=2, group_size=3).init(KEY, X)


@pytest.mark.parametrize("layer", ["BatchNorm", "InstanceNorm"])
def test_one_value_per_channel(layer):
    x = X[:1, :1]
    flax_norm, norm = (make(module, layer) for module in (flax.linen, jaxnorm.linen))
    assert not jnp.any(run(flax_norm, x)[0])
    norm.init(KEY, x)
    with pytest.raises(ValueError, match="Expected more than 1"):
        run(norm, x)


@linen
@pytest.mark.parametrize("layer", ["BatchNorm", "InstanceNorm", "GroupNorm", "LayerNorm"])
def test_data_far_from_0(linen, layer):
    far = X + 10_000
    expected, _ = run(make(flax.linen, layer), np.asarray(far) - np.float32(10_000))
    worst = np.abs(run(make(linen, layer), far)[0] - expected).max()
    # The reference also contains the rounding of `far`, so 1e-6 remains; Flax's error is above 0.1.
    assert (worst < 1e-4) == is_jaxnorm(linen)


def test_a_forgotten_state_is_an_error_in_flax_only_sometimes():
    layer = make(flax.linen, "BatchNorm")
    variables = layer.init(KEY, X)
    with pytest.raises(flax.errors.ModifyScopeVariableError):
        layer.apply(variables, X)
    _, updates = layer.apply({"params": variables["params"]}, X, mutable=["batch_stats"])
    assert set(updates["batch_stats"]) == {"mean", "var"}
