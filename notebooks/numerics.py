# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxnorm/jaxnorm/blob/main/notebooks/numerics.ipynb)
#
# # Numerics
#
# The formula $y = (x - \mu) / \sqrt{\sigma^2 + \epsilon}$ can lose digits in several ways: with
# data far from zero, with running statistics in half precision, and with padding. This notebook
# measures each loss against float64, for jaxnorm and for the other libraries that are installed.

# %% tags=["skip-execution"]
# %pip install --quiet "jaxnorm[examples] @ git+https://github.com/jaxnorm/jaxnorm"
# %pip install --quiet dm-haiku equinox keras

# %%
import importlib.util
import os

os.environ["KERAS_BACKEND"] = "jax"  # read when Keras is imported

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import jaxnorm
import jaxnorm.linen

EPSILON = 1e-5
PEERS = ("haiku", "equinox", "keras", "torch")
INSTALLED = [name for name in PEERS if importlib.util.find_spec(name)]
for name in PEERS:
    if name not in INSTALLED:
        print(f"{name} is not installed: the plots omit it")

# %% [markdown]
# ## Far from zero
#
# In many data sets, such as temperatures in kelvin, pressures, pixel values and timestamps, the
# mean is large compared with the standard deviation. The shortest formula for a variance,
# $E[x^2] - E[x]^2$, then subtracts two large numbers. In float32, with a mean of 1,000 and a
# standard deviation of 1, both are about 1,000,000, and the spacing of float32 numbers there is
# 0.06.
#
# jaxnorm computes the moments about a number near the mean, so that the difference loses few bits.
# Below, standard normal data are shifted by an offset, normalized by each library, and compared
# with float64 applied to the same float32 numbers.

# %%
rng = np.random.default_rng(0)
NOISE = rng.standard_normal((4096, 64))
TWO_PASS = "flax, use_fast_variance=False"
OFFSETS = np.concatenate([[0], 10.0 ** np.arange(0, 6.5, 0.5)])


def exact(x, axis):
    x = np.asarray(x, np.float64)
    return (x - x.mean(axis, keepdims=True)) / np.sqrt(x.var(axis, keepdims=True) + EPSILON)


def flax_norm(layer, **call):
    variables = layer.init(jax.random.key(0), jnp.ones((2, 64)), **call)
    apply = jax.jit(lambda x: layer.apply(variables, x, mutable=["batch_stats"], **call)[0])
    return lambda x: apply(x)


BATCH = {
    "jaxnorm": jax.jit(lambda x: jaxnorm.batch_norm(x, epsilon=EPSILON)[0]),
    "flax, default": flax_norm(nn.BatchNorm(epsilon=EPSILON), use_running_average=False),
    TWO_PASS: flax_norm(
        nn.BatchNorm(epsilon=EPSILON, use_fast_variance=False), use_running_average=False
    ),
}
LAYER = {
    "jaxnorm": jax.jit(lambda x: jaxnorm.layer_norm(x, epsilon=EPSILON)),
    "flax, default": flax_norm(nn.LayerNorm(epsilon=EPSILON)),
    TWO_PASS: flax_norm(nn.LayerNorm(epsilon=EPSILON, use_fast_variance=False)),
}

if "haiku" in INSTALLED:
    import haiku as hk

    def haiku_norm(make):
        net = hk.transform_with_state(make)
        params, state = net.init(None, jnp.ones((2, 64)))
        return jax.jit(lambda x: net.apply(params, state, None, x)[0])

    BATCH["haiku"] = haiku_norm(lambda x: hk.BatchNorm(True, True, 0.9, EPSILON)(x, True))
    LAYER["haiku"] = haiku_norm(lambda x: hk.LayerNorm(-1, True, True, EPSILON)(x))

if "equinox" in INSTALLED:
    import equinox as eqx

    def equinox_batch(x):
        norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
            64, axis_name="batch", eps=EPSILON, mode="batch"
        )
        y, _ = jax.vmap(norm, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)
        return y

    BATCH["equinox"] = jax.jit(equinox_batch)
    LAYER["equinox"] = jax.jit(jax.vmap(eqx.nn.LayerNorm(64, eps=EPSILON)))

if "keras" in INSTALLED:
    import keras

    keras_batch = keras.layers.BatchNormalization(epsilon=EPSILON)
    BATCH["keras"] = lambda x: np.asarray(keras_batch(x, training=True))
    keras_layer = keras.layers.LayerNormalization(epsilon=EPSILON)
    LAYER["keras"] = lambda x: np.asarray(keras_layer(x))

if "torch" in INSTALLED:
    import torch

    def in_torch(norm):
        return lambda x: norm(torch.from_numpy(np.array(x))).detach().numpy()

    BATCH["torch"] = in_torch(torch.nn.BatchNorm1d(64, eps=EPSILON))
    LAYER["torch"] = in_torch(torch.nn.LayerNorm(64, eps=EPSILON))

COLORS = {
    "jaxnorm": "#d62728",
    "flax, default": "#1f77b4",
    TWO_PASS: "black",
    "haiku": "#9467bd",
    "equinox": "#2ca02c",
    "keras": "#ff7f0e",
    "torch": "#7f7f7f",
}


# %%
def sweep(norms, axis):
    errors = {name: [] for name in norms}
    for offset in OFFSETS:
        x = (NOISE + offset).astype(np.float32)
        for name, norm in norms.items():
            y = np.asarray(norm(x), np.float64)
            errors[name].append(np.abs(y - exact(x, axis)).max())
    return errors


results = {"batch norm": sweep(BATCH, 0), "layer norm": sweep(LAYER, 1)}

figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
for axes, (title, errors) in zip(panels, results.items(), strict=True):
    for name, values in errors.items():
        style = {"lw": 1.3, "marker": "o", "ms": 3}
        if name == "jaxnorm":
            style |= {"lw": 2.5, "zorder": 3}
        if name == TWO_PASS:  # above the lines that coincide with it, which remain visible
            style |= {"marker": "", "ls": (0, (2, 3)), "zorder": 4}
        axes.plot(OFFSETS, values, color=COLORS[name], label=name, **style)
    axes.set(title=title, xlabel="mean of the data, in standard deviations", yscale="log")
    axes.axhline(1, color="black", lw=0.6, ls=":")
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(-0.1, 1.5e6)
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
panels[0].set_ylabel("largest error of y (y is about 1)")
figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
plt.show()

# %%
width = len("batch norm, " + TWO_PASS)
print(f"{'largest error of y':{width}}{'mean 0':>10}{'100':>10}{'1e4':>10}{'1e6':>10}")
for title, errors in results.items():
    for name, values in errors.items():
        at = [values[int(np.flatnonzero(o == OFFSETS)[0])] for o in (0, 1e2, 1e4, 1e6)]
        print(f"{title + ', ' + name:{width}}" + "".join(f"{v:10.1e}" for v in at))
    assert max(errors["jaxnorm"]) < 5e-6

# %% [markdown]
# Above the dotted line, the error is larger than y itself. Some lines coincide. Flax computes the
# variance in two passes with `use_fast_variance=False`; this line is dashed and drawn above those
# of Equinox and of Haiku's layer norm, which use the same formula. The line of Haiku's batch norm
# hides that of Flax's default, until Haiku's variance is negative and its y is NaN. Flax clips the
# variance to 0 there, so y is finite and wrong by more than a thousand, without a warning.
#
# Gradients are computed from the same moments, and are equally accurate:

# %%
x = (NOISE + 1e4).astype(np.float32)
weights = jnp.asarray(rng.standard_normal(x.shape), jnp.float32)


def exact_gradient(x, w):
    """Returns the textbook gradient of sum(w * y) in float64."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    y, r = exact(x, 0), 1 / np.sqrt(x.var(0) + EPSILON)
    return r * (w - w.mean(0) - y * (w * y).mean(0))


for name in ("jaxnorm", "flax, default", TWO_PASS):
    found = jax.grad(lambda x, norm=BATCH[name]: jnp.sum(weights * norm(x)))(x)
    error = np.abs(found - exact_gradient(x, weights)).max()
    print(f"{name:{len(TWO_PASS)}}  largest error of the gradient at a mean of 10,000: {error:.1e}")
    assert name != "jaxnorm" or error < 5e-6

# %% [markdown]
# ## bfloat16
#
# Activations in bfloat16 have about three digits, and the norm loses no further digits: the moments
# are computed in float32, and y is rounded once, at the end. Running statistics, however, must not
# be stored in bfloat16. An update of a tenth or a hundredth of the difference soon becomes less
# than half a unit in the last place and is rounded away, so that the average stops far from the
# correct value.

# %%
steps, target = 600, 3.0
data = jnp.asarray(target + rng.standard_normal((steps, 256, 1)), jnp.bfloat16)

state, curves = jaxnorm.init_batch_stats(1), {"jaxnorm: x bfloat16, state float32": []}
for x in data:
    y, state = jaxnorm.batch_norm(x, None, state, momentum=0.01)
    curves["jaxnorm: x bfloat16, state float32"].append(float(state["mean"][0]))
print(f"x {data.dtype}, y {y.dtype}, running mean {state['mean'].dtype}")
assert y.dtype == jnp.bfloat16
assert state["mean"].dtype == jnp.float32

if "torch" in INSTALLED:
    norm = torch.nn.BatchNorm1d(1, momentum=0.01).to(torch.bfloat16)
    name = "torch: the module in bfloat16"
    curves[name] = []
    for x in data:
        norm(torch.from_numpy(np.array(x, np.float32)).to(torch.bfloat16))
        curves[name].append(float(norm.running_mean))

figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
for (name, values), color in zip(curves.items(), ("#d62728", "#7f7f7f"), strict=False):
    axes.plot(values, color=color, lw=2)
    end = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
    axes.annotate(name, (steps, values[-1]), color=color, **end)
axes.plot((0, steps), (target, target), color="black", lw=0.6, ls=":")
axes.set(xlabel="step, momentum 0.01", ylabel="running mean", ylim=(0, 3.3))
axes.text(0, target + 0.05, "mean of the data", size=8)
axes.spines[["top", "right"]].set_visible(False)
assert abs(curves["jaxnorm: x bfloat16, state float32"][-1] - target) < 0.02
plt.show()

# %% [markdown]
# ## Masks, and NaN in the padding
#
# Sequences of different lengths are padded to the same length. The padding is not data: whatever
# its values are, even NaN, it must not affect the output, the statistics or the gradients.

# %%
lengths = rng.integers(8, 40, 24)
mask = np.arange(40) < lengths[:, None]  # (sequences, steps)
series = np.cumsum(rng.standard_normal((24, 40)), 1).astype(np.float32) + 5
padded = {"zeros in the padding": np.where(mask, series, 0), "NaN in the padding": series.copy()}
padded["NaN in the padding"][~mask] = np.nan

unmasked, _ = jaxnorm.batch_norm(padded["zeros in the padding"][..., None])
masked, _ = jaxnorm.batch_norm(padded["NaN in the padding"][..., None], mask=mask[..., None])
unmasked, masked = (np.where(mask, np.asarray(y)[..., 0], np.nan) for y in (unmasked, masked))

values = series[mask].astype(np.float64)  # without the padding, as one long list
expected = (values - values.mean()) / np.sqrt(values.var() + EPSILON)
print("mask:                error", np.abs(masked[mask] - expected).max())
print("zeros, no mask:      error", np.abs(unmasked[mask] - expected).max())
assert np.abs(masked[mask] - expected).max() < 2e-6

figure, panels = plt.subplots(1, 3, figsize=(10, 3), layout="constrained", sharey=True)
pictures = {
    "x, padded": (np.where(mask, series, np.nan), "viridis", None),
    "y, masked": (masked, "RdBu_r", 2.5),
    "y, zeros counted as data": (unmasked, "RdBu_r", 2.5),
}
for axes, (title, (values, colors, limit)) in zip(panels, pictures.items(), strict=True):
    axes.set_facecolor("0.85")
    image = axes.imshow(values, cmap=colors, vmin=limit and -limit, vmax=limit, aspect="auto")
    axes.set(title=title, xlabel="step")
    figure.colorbar(image, ax=axes)
panels[0].set_ylabel("sequence")
plt.show()


# %%
def loss(x):
    y, _ = jaxnorm.batch_norm(x[..., None], mask=mask[..., None])
    return jnp.sum(jnp.where(mask, y[..., 0], 0) ** 3)


gradient = jax.grad(loss)(jnp.asarray(padded["NaN in the padding"]))
print("largest gradient in the padding:", float(abs(gradient[~mask]).max()))
assert jnp.isfinite(gradient).all()
assert (gradient[~mask] == 0).all()

# %% [markdown]
# The docstring of `jaxnorm.moments` describes the method, and the test suite measures the error for
# every norm and dtype.
