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
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxnorm/jaxnorm/blob/main/notebooks/instance_vs_batch.ipynb)
#
# # Instance norm and batch norm
#
# This notebook runs small examples that answer common questions about the two norms: what they
# count, what they learn, what they only track, and when the running statistics of instance norm
# reduce quality.

# %% tags=["skip-execution"]
# %pip install --quiet "jaxnorm[examples] @ git+https://github.com/jaxnorm/jaxnorm" scikit-image

# %%
import importlib.util

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import skimage.data
import skimage.transform

import jaxnorm
import jaxnorm.inspect

# %% [markdown]
# ## The same formula over different entries
#
# Both compute $y = \gamma\,(x - \mu) / \sqrt{\sigma^2 + \epsilon} + \beta$ with a scale $\gamma$ and a
# bias $\beta$ for each channel. Batch norm computes $\mu$ and $\sigma^2$ for each channel over all
# samples; instance norm computes them for each channel of each sample.

# %%
x = jax.random.normal(jax.random.key(0), (8, 6, 6, 3)) * 2 + 5  # N, H, W, C
params = jaxnorm.init_params(3)

batch, _ = jaxnorm.batch_norm(x, params)
instance, _ = jaxnorm.instance_norm(x, params)
print("mean of each channel of the first two samples")
print("  batch norm   ", np.float64(batch[:2].mean((1, 2))).round(3).tolist())
print("  instance norm", (np.float64(instance[:2].mean((1, 2))).round(3) + 0.0).tolist())

# %% [markdown]
# So instance norm is batch norm in which every sample is a separate batch. In JAX, `vmap` expresses
# this:

# %%
by_vmap, _ = jax.vmap(lambda sample: jaxnorm.batch_norm(sample[None], params))(x)
np.testing.assert_allclose(by_vmap[:, 0], instance, atol=1e-6)

# %% [markdown]
# PyTorch's implementation has no vmap, and folds the samples into the channels: N samples of C
# channels become one sample of N x C channels, to which it applies batch norm. The result is the
# same.

# %%
n, h, w, c = x.shape
folded = x.transpose(1, 2, 0, 3).reshape(1, h, w, n * c)
y, _ = jaxnorm.batch_norm(folded)
by_folding = y.reshape(h, w, n, c).transpose(2, 0, 1, 3)
np.testing.assert_allclose(by_folding, instance, atol=1e-6)

# %% [markdown]
# ## The count of batches
#
# PyTorch's batch norm updates `num_batches_tracked`, and its instance norm does not. The reason is
# the folding: PyTorch's instance norm calls the batch norm kernel on the folded input, without the
# lines that count. The counter is saved with the model, and stays 0. `momentum=None` should give
# the plain average over all batches and needs the count, so PyTorch's instance norm then uses a
# momentum of 0: its running statistics stay at 0 and 1.

# %%
if importlib.util.find_spec("torch"):
    import torch

    images = torch.tensor(np.array(x)).permute(0, 3, 1, 2)
    norms = {
        "BatchNorm2d": torch.nn.BatchNorm2d(3),
        "InstanceNorm2d": torch.nn.InstanceNorm2d(3, track_running_stats=True),
        "InstanceNorm2d, momentum=None": torch.nn.InstanceNorm2d(
            3, track_running_stats=True, momentum=None
        ),
    }
    print(f"{'PyTorch, after three batches':32}{'count':>7}  running mean")
    for name, norm in norms.items():
        for _ in range(3):
            norm(images)
        mean = np.float64(norm.running_mean).round(2).tolist()
        print(f"{name:32}{int(norm.num_batches_tracked):7}  {mean}")
else:
    print("PyTorch is not installed: skipped")

# %% [markdown]
# In jaxnorm both norms count, and `momentum=None` gives the average over all batches.

# %%
calls = {
    "batch_norm": (jaxnorm.batch_norm, 0.1),
    "instance_norm": (jaxnorm.instance_norm, 0.1),
    "instance_norm, momentum=None": (jaxnorm.instance_norm, None),
}
print(f"{'jaxnorm, after three batches':32}{'count':>7}  running mean")
for name, (norm, momentum) in calls.items():
    state = jaxnorm.init_batch_stats(3)
    for _ in range(3):
        _, state = norm(x, params, state, momentum=momentum)
    print(f"{name:32}{int(state['count']):7}  {np.float64(state['mean']).round(2).tolist()}")
    assert state["count"] == 3

# %% [markdown]
# ## Learned and tracked values
#
# A norm over C channels learns 2C numbers, the scale and the bias, which have gradients and are
# updated by the optimizer. It tracks 2C + 1 more: the running mean, the running variance and the
# count. These have no gradients, and are updated by the forward pass.

# %%
channels = 8
params = jaxnorm.init_params(channels)
state = jaxnorm.init_batch_stats(channels)
learned, tracked = (sum(map(np.size, jax.tree.leaves(tree))) for tree in (params, state))
print(f"learned: {learned} = 2C    tracked: {tracked} = 2C + 1    for C = {channels}")
assert (learned, tracked) == (2 * channels, 2 * channels + 1)


def loss(params, mean, var, use_running_average):
    state = {"mean": mean, "var": var, "count": jnp.int32(0)}
    data = jax.random.normal(jax.random.key(1), (32, 5, 5, channels)) * jnp.arange(1, channels + 1)
    target = jnp.tanh(data)
    y, _ = jaxnorm.batch_norm(data, params, state, use_running_average=use_running_average)
    return jnp.mean((y - target) ** 2)


figure, panels = plt.subplots(1, 2, figsize=(10, 3), layout="constrained", sharey=True)
for axes, (title, evaluate) in zip(
    panels, {"training": False, "evaluation": True}.items(), strict=True
):
    grads = jax.grad(loss, argnums=(0, 1, 2))(params, state["mean"], state["var"], evaluate)
    bars = {"scale": grads[0]["scale"], "bias": grads[0]["bias"]}
    bars |= {"running mean": grads[1], "running var": grads[2]}
    for i, (name, values) in enumerate(bars.items()):
        axes.bar(np.arange(channels) + 0.2 * i - 0.3, np.abs(values), 0.2, label=name)
    axes.set(title=title, xlabel="channel")
    axes.set_yscale("symlog", linthresh=1e-3)
    axes.spines[["top", "right"]].set_visible(False)
    assert not grads[1].any()
    assert not grads[2].any()
panels[0].set_ylabel("|gradient of the loss|")
figure.legend(*panels[1].get_legend_handles_labels(), loc="outside right", frameon=False)
plt.show()

# %% [markdown]
# The gradients of the running statistics are exactly 0, so they have no bars. The derivative treats
# the state as a constant in training, where y does not depend on it, and also in evaluation, where
# y does.

# %% [markdown]
# ## Running statistics of instance norm
#
# Running statistics are off by default in instance norm. If they are enabled, the output in
# training does not change, to the last bit: each image is still normalized by its own statistics,
# and the running statistics are only tracked. In evaluation, the running statistics are used
# instead.

# %%
photos = np.stack(
    [
        skimage.transform.resize(photo, (96, 96), anti_aliasing=True)
        for photo in (skimage.data.astronaut(), skimage.data.coffee(), skimage.data.chelsea())
    ]
).astype(np.float32)

state = jaxnorm.init_batch_stats(3)
without, _ = jaxnorm.instance_norm(photos)
# After 60 updates, the initial value has a weight of 0.2 % in the running average.
for _ in range(60):
    with_state, state = jaxnorm.instance_norm(photos, None, state)
assert (with_state == without).all()

running, _ = jaxnorm.instance_norm(photos, None, state, use_running_average=True)
print("training:   largest difference", float(abs(with_state - without).max()))
print("evaluation: largest difference", float(abs(running - without).max()))

# %% [markdown]
# ## When running statistics change the output
#
# Running statistics change the output if an image differs from the average image. Here each photo
# gets half the contrast and more brightness. Normalizing by its own statistics removes the change;
# normalizing by running statistics does not.

# %%
changed = 0.5 * photos + 0.4
columns = {
    "photo": photos,
    "changed": changed,
    "photo,\nown statistics": jaxnorm.instance_norm(photos)[0],
    "changed,\nown statistics": jaxnorm.instance_norm(changed)[0],
    "photo,\nrunning statistics": running,
    "changed,\nrunning statistics": jaxnorm.instance_norm(
        changed, None, state, use_running_average=True
    )[0],
}
figure, grid = plt.subplots(3, 6, figsize=(8.4, 4.8), layout="constrained")
for column, (title, images) in enumerate(columns.items()):
    grid[0, column].set_title(title, size=9)
    for axes, image in zip(grid[:, column], images, strict=True):
        shown = image if column < 2 else 0.5 + np.asarray(image) / 5  # -2.5 is black, 2.5 is white
        axes.imshow(np.clip(shown, 0, 1))
        axes.axis("off")
plt.show()

# %%
apart = {
    name: float(
        jnp.sqrt(jnp.mean((columns[f"photo,\n{name}"] - columns[f"changed,\n{name}"]) ** 2))
    )
    for name in ("own statistics", "running statistics")
}
print("root mean square difference that the change makes in y:", apart)
assert apart["own statistics"] < 0.01 < 0.5 < apart["running statistics"]

# %% [markdown]
# This plot shows how far each photo is from the running statistics, channel by channel. The band is
# the running statistics that evaluation uses, and the points are the statistics of the changed
# photos.

# %%
of_photos = jaxnorm.moments(changed, (1, 2))
jaxnorm.inspect.plot_layers(
    dict.fromkeys(("astronaut", "coffee", "cat"), state),
    {
        name: {"mean": of_photos.mean[i], "var": of_photos.var[i]}
        for i, name in enumerate(("astronaut", "coffee", "cat"))
    },
    names=("running", "changed photo"),
)

# %% [markdown]
# In summary:
#
# - If style, contrast or exposure vary from image to image, use instance norm without running
#   statistics, which is the default.
# - A model that was trained and evaluated with running statistics, as the StarGAN generator was,
#   should keep them: the same weights with other statistics are a different function (see
#   `from_pytorch.ipynb`).
# - Batch norm needs its running statistics in evaluation: without them, the output for one image
#   depends on the other images in the batch.
