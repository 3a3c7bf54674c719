# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxnorm/jaxnorm/blob/main/notebooks/many_devices.ipynb)
#
# # Many devices
#
# This notebook distributes a batch over devices. It shows how to make batch norm use the statistics
# of the whole batch, what happens if it does not, and how to merge running statistics that were not
# synchronized. The last section shows why running statistics should be recomputed after averaging
# weights.

# %% tags=["skip-execution"]
# %pip install --quiet "jaxnorm[examples] @ git+https://github.com/jaxnorm/jaxnorm" scikit-image
# !git clone -q https://github.com/jaxnorm/jaxnorm

# %% [markdown]
# The notebook uses four devices on any machine: with these environment variables, which have to be
# set before JAX is imported, JAX splits the CPU into four.

# %%
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
os.environ["JAX_PLATFORMS"] = "cpu"

import functools
import sys

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import skimage.data
from IPython.display import display
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnorm
import jaxnorm.inspect
import jaxnorm.linen

sys.path += ["../examples", "jaxnorm/examples"]  # in this checkout or the clone
import averaging
import digits
import tqdm

plt.rcParams |= {
    "figure.dpi": 100,
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
devices = jax.device_count()
assert devices == 4
mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
print(mesh)

# %% [markdown]
# ## A batch with a quarter on each device
#
# The batch has 16 parts of 64 x 64 pixels from each of four photographs. Each device gets the parts
# of one photograph, as can happen with a data loader that does not shuffle.

# %%
PHOTOGRAPHS = {
    "astronaut": skimage.data.astronaut(),
    "coffee": skimage.data.coffee(),
    "cat": skimage.data.chelsea(),
    "rocket": skimage.data.rocket(),
}
SIZE, EACH = 64, 16
rng = np.random.default_rng(0)


def parts(photograph, number):
    """Returns square parts at random positions, at half the size, with values from 0 to 1."""
    image = photograph[::2, ::2] / np.float32(255)
    tops = rng.integers(image.shape[0] - SIZE, size=number)
    lefts = rng.integers(image.shape[1] - SIZE, size=number)
    return np.stack([image[t : t + SIZE, s : s + SIZE] for t, s in zip(tops, lefts, strict=True)])


x = np.concatenate([parts(photograph, EACH) for photograph in PHOTOGRAPHS.values()])
params, batch_stats = jaxnorm.init_params(3), jaxnorm.init_batch_stats(3)
spread = jax.device_put(x, NamedSharding(mesh, P("data")))
print(spread.shape, "as", [shard.data.shape for shard in spread.addressable_shards])

# %% [markdown]
# ## Under jit
#
# Under `jit`, no change is needed. The array is distributed and the program is the same: it
# normalizes by the whole batch on any number of devices.

# %%
train = jax.jit(jaxnorm.batch_norm)
y_one, stats_one = train(x, params, batch_stats)  # everything on one device
y_jit, stats_jit = train(spread, params, batch_stats)


def apart(a, b):
    """Returns the largest difference between two trees of arrays."""
    differences = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max(), a, b)
    return max(jax.tree.leaves(differences))


print("y is on", len(y_jit.sharding.device_set), "devices")
print(f"largest difference from one device: y {apart(y_jit, y_one):.0e},", end=" ")
print(f"state {apart(stats_jit, stats_one):.0e}")
assert apart((y_jit, stats_jit), (y_one, stats_one)) < 1e-5

# %% [markdown]
# ## Under shard_map
#
# In `shard_map`, a function sees only the part of the batch on its device. `axis_name` names the
# mesh axis over which the batch is distributed. `out_specs=P()` declares that the new state is the
# same on all devices, and JAX checks this.

# %%
synced = jax.jit(
    jax.shard_map(
        functools.partial(jaxnorm.batch_norm, axis_name="data"),
        mesh=mesh,
        in_specs=(P("data"), P(), P()),
        out_specs=(P("data"), P()),
    )
)
y_synced, stats_synced = synced(spread, params, batch_stats)
print(f"largest difference from one device: y {apart(y_synced, y_one):.0e},", end=" ")
print(f"state {apart(stats_synced, stats_one):.0e}")
assert apart((y_synced, stats_synced), (y_one, stats_one)) < 1e-5

# %% [markdown]
# ## Without axis_name
#
# Without `axis_name`, there are four different states. JAX raises an error for `out_specs=P()`, so
# they are returned as four rows.


# %%
def own(x, params, batch_stats):
    """Applies batch norm to this device's part, and returns the state as a row."""
    y, new = jaxnorm.batch_norm(x, params, batch_stats)
    return y, jax.tree.map(lambda leaf: leaf[None], new)


specs = {"mesh": mesh, "in_specs": (P("data"), P(), P())}
unsynced = jax.jit(jax.shard_map(own, out_specs=(P("data"), P("data")), **specs))
y_own, stats_own = unsynced(spread, params, batch_stats)
print("states:", jax.tree.map(jnp.shape, stats_own))

try:
    jax.jit(jax.shard_map(jaxnorm.batch_norm, out_specs=(P("data"), P()), **specs))(
        spread, params, batch_stats
    )
except ValueError as error:
    refused = str(error)
print("refused:", refused.splitlines()[0])

# %% [markdown]
# This plot shows the mean and the standard deviation of each color on every device and, in gray, of
# the whole batch.

# %%
by_device = x.reshape(devices, -1, 3)
COLORS = {"red": "#d62728", "green": "#1b7f4b", "blue": "#1f77b4"}
figure, panels = plt.subplots(1, 3, figsize=(9.6, 3.2), sharex=True)
for c, (axes, (name, color)) in enumerate(zip(panels, COLORS.items(), strict=True)):
    mean, std = x[..., c].mean(), x[..., c].std()
    axes.axvspan(mean - std, mean + std, color="#dddddd", lw=0)
    axes.axvline(mean, color="#666666", lw=1.2)
    values = by_device[..., c]
    axes.errorbar(
        values.mean(1), range(devices), xerr=values.std(1), fmt="o", color=color, capsize=3
    )
    axes.set_title(name, color=color, weight="bold", size=11)
    axes.set_xlabel("value (0: dark, 1: bright)")
    axes.set_yticks(range(devices), [f"device {k}: {n}" for k, n in enumerate(PHOTOGRAPHS)])
    axes.set_ylim(devices - 0.5, -0.5)
    if c:
        axes.set_yticklabels([])
    axes.text(mean, -0.44, " whole batch", color="#666666", size=8, va="top")
plt.show()

# %% [markdown]
# The next figure shows the effect on y. The two lower rows show y from -2 (black) to 2 (white) in
# each color. With the statistics of the whole batch, the coffee stays red, and the night sky behind
# the rocket stays dark and blue. With each device's own statistics, every photograph has mean 0 and
# variance 1 in each color: the night sky turns gray, and the differences between the devices are
# lost. The layers after such a norm cannot see that the sky was dark.

# %%
figure, grid = plt.subplots(3, 2 * devices, figsize=(10, 4.1))
rows = {
    "x": x,
    "whole\nbatch": (np.asarray(y_synced) + 2) / 4,
    "device's\nown": (np.asarray(y_own) + 2) / 4,
}
for axes_of_row, (title, pictures) in zip(grid, rows.items(), strict=True):
    for k, axes in enumerate(axes_of_row):
        axes.imshow(np.clip(pictures[EACH * (k // 2) + 3 * (k % 2)], 0, 1))
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        if title == "x":
            axes.set_title(f"device {k // 2}", size=9)
    axes_of_row[0].set_ylabel(title, rotation=0, ha="right", va="center")
plt.show()

# %%
device_means = np.asarray(y_own).reshape(devices, -1, 3).mean(1)
assert np.abs(device_means).max() < 1e-4  # every device: mean 0 in each color
print("mean of y by device, the whole batch's statistics:")
print(np.asarray(y_synced).reshape(devices, -1, 3).mean(1).round(2))

# %% [markdown]
# ## Merging replicas that were not synchronized
#
# Suppose that four replicas were trained on 12 batches each, of one photograph per replica, and
# have four states. The variance of all data is the mean of the variances plus the variance of the
# means. Averaging the states leaf by leaf omits the second term; `merge_batch_stats` includes it.

# %%
BATCHES = 12
epoch = np.stack(
    [
        np.concatenate([parts(photograph, EACH) for photograph in PHOTOGRAPHS.values()])
        for _ in range(BATCHES)
    ]
)


def over_all(x, batch_stats, axis_name):
    """Returns the state after all batches; with momentum=None, all batches weigh the same."""

    def step(batch_stats, x):
        return jaxnorm.batch_norm(x, None, batch_stats, momentum=None, axis_name=axis_name)[1], None

    return jax.lax.scan(step, batch_stats, x)[0]


replicas = epoch.reshape(BATCHES, devices, EACH, SIZE, SIZE, 3).swapaxes(0, 1)
run = jax.vmap(functools.partial(over_all, axis_name="data"), (0, None), axis_name="data")
with_sync = jax.tree.map(lambda leaf: leaf[0], jax.jit(run)(replicas, batch_stats))
run = jax.vmap(functools.partial(over_all, axis_name=None), (0, None))
without_sync = jax.jit(run)(replicas, batch_stats)  # four rows

merged = jaxnorm.merge_batch_stats(without_sync)
averaged = jax.tree.map(lambda leaf: leaf.mean(0), without_sync)
print("                      red   green    blue")
for key in ("mean", "var"):
    for name, state in {"synced": with_sync, "merged": merged, "averaged": averaged}.items():
        print(f"{key:5} {name:10}", *(f"{value:7.4f}" for value in np.asarray(state[key])))

assert apart(merged["mean"], with_sync["mean"]) < 1e-5
assert np.abs(merged["var"] / with_sync["var"] - 1).max() < 0.02
assert averaged["var"][0] < 0.75 * with_sync["var"][0]  # red
assert (averaged["var"] < 0.95 * with_sync["var"]).all()

# %%
once = jax.jit(run)(replicas[:, :1], batch_stats)  # after one batch each
expected = jaxnorm.batch_norm(epoch[0], None, batch_stats, momentum=None)[1]
assert apart(jaxnorm.merge_batch_stats(once)["mean"], expected["mean"]) < 1e-5
assert np.abs(jaxnorm.merge_batch_stats(once)["var"] / expected["var"] - 1).max() < 1e-4

# %% [markdown]
# After one batch, the merged state equals the state with synchronization. After many batches the
# mean still does, but the variance is slightly smaller, here by about one percent: no state stores
# how much each replica's mean varied from batch to batch. The averaged variance of the red channel,
# in which the photographs differ most, is too small by a third.

# %% [markdown]
# ## Averaged weights
#
# Averaging weights, over the last epochs or over replicas, gives a network that did not occur in
# training, so no running statistics from training match it. `jaxnorm.linen.recalibrate` recomputes
# them in one pass over the training images. Here this is shown for two networks that learn
# scikit-learn's scanned digits with a high learning rate
# ([averaging.py](../examples/averaging.py)).

# %%
averaging.tqdm = functools.partial(tqdm.tqdm, disable=True)  # no progress bars here
SEEDS, EPOCHS = 2, 6
images, test = digits.load_sklearn()
model = digits.Classifier(jaxnorm.linen.BatchNorm)
accuracies, states = {}, {}
for seed in range(SEEDS):
    state, weights = averaging.train(images, epochs=EPOCHS, warmup=2, decay=0.99, seed=seed)
    for name, params in weights.items():
        left = state.replace(params=params)
        variables = jaxnorm.linen.recalibrate(
            model,
            {"params": params, "batch_stats": state.batch_stats},
            np.array_split(images.images, 3),  # equal parts: compiled once
            use_running_average=False,
        )
        anew = left.replace(batch_stats=variables["batch_stats"])
        pair = [100 * digits.accuracy(s, test) for s in (left, anew)]
        accuracies.setdefault(name, []).append(pair)
        states[name] = (left, anew)
for name, pairs in accuracies.items():
    print(f"{name:24}", *(f"{a:5.1f} -> {b:.1f} %" for a, b in pairs), sep="   ")
for name in ("mean over epochs (SWA)", "moving average (0.99)"):
    before, after = np.mean(accuracies[name], axis=0)
    assert after > before

# %%
figure, axes = plt.subplots(figsize=(8.4, 2.9))
palette = ("#7f7f7f", "#1f77b4", "#e6842a")
for row, (pairs, color) in enumerate(zip(accuracies.values(), palette, strict=True)):
    for k, (before, after) in enumerate(pairs):
        height = row + 0.24 * (k - 0.5)
        axes.annotate(
            "",
            (after, height),
            (before, height),
            arrowprops={"arrowstyle": "->", "color": color, "shrinkA": 3, "shrinkB": 3},
        )
        axes.scatter(before, height, s=26, facecolors="white", edgecolors=color, zorder=3)
        axes.scatter(after, height, s=26, color=color, zorder=3)
axes.scatter([], [], s=26, facecolors="white", edgecolors="black", label="from training")
axes.scatter([], [], s=26, color="black", label="recalibrated")
axes.set_yticks(range(len(accuracies)), accuracies)
axes.set_ylim(len(accuracies) - 0.5, -0.5)
axes.set_xlabel("test images correct (%), two seeds")
axes.grid(axis="x", alpha=0.25)
axes.legend(loc="upper left", bbox_to_anchor=(1, 1), title="running statistics", alignment="left")
plt.show()

# %% [markdown]
# This plot shows the cause of the change, for the last seed's mean over epochs: the running
# statistics from training (line and band) and those of the averaged weights (points and bars),
# channel by channel.

# %%
left, anew = states["mean over epochs (SWA)"]
names = ("from training", "recalibrated")
display(jaxnorm.inspect.plot_layers(left.batch_stats, anew.batch_stats, names=names))
for name, value in jaxnorm.inspect.drift(left.batch_stats, anew.batch_stats).items():
    print(f"{name:28} {value:.2f}")

# %% [markdown]
# Differences of about a tenth of a standard deviation are hard to see. Their effect varies with the
# seed, from none to a few points of accuracy; on average over the seeds, recalibration improved
# both averages. So recalibrate averaged weights before you evaluate them.
