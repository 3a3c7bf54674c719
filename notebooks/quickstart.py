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
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxnorm/jaxnorm/blob/main/notebooks/quickstart.ipynb)
#
# # Quickstart
#
# This notebook trains a small network with batch norm on scanned digits, first in Flax Linen and
# then in NNX. It shows where the running statistics are stored, what updates them, and which errors
# you get if you forget a step.

# %% tags=["skip-execution"]
# %pip install --quiet "jaxnorm[examples] @ git+https://github.com/jaxnorm/jaxnorm"

# %%
import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jaxnorm.inspect
import jaxnorm.linen
import jaxnorm.nnx

# %% [markdown]
# ## The data
#
# The data are 1,797 digits of 8 x 8 pixels, which come with scikit-learn. A quarter of them is kept
# for testing.

# %%
images, labels = load_digits(return_X_y=True)
images = (images / 16).astype(np.float32).reshape(-1, 8, 8, 1)
train_x, test_x, train_y, test_y = train_test_split(
    images, labels, test_size=0.25, random_state=0, stratify=labels
)

figure, panels = plt.subplots(1, 12, figsize=(10, 1.2))
for axes, image, label in zip(panels, train_x, train_y, strict=False):
    axes.imshow(image[..., 0], cmap="gray_r")
    axes.set_title(label, size=9)
    axes.axis("off")
plt.show()


# %%
def batches(epochs, size=32, seed=0):
    """Yields shuffled batches, and drops the incomplete batch at the end of an epoch."""
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(len(train_x))
        for first in range(0, len(order) - size + 1, size):
            chosen = order[first : first + size]
            yield train_x[chosen], train_y[chosen]


# %% [markdown]
# ## Flax Linen
#
# The layer replaces `flax.linen.BatchNorm`. In training (`use_running_average=False`), it
# normalizes by the statistics of the batch, and updates the running statistics.


# %%
class Classifier(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        for features in (16, 32):
            x = nn.Conv(features, (3, 3), use_bias=False)(x)
            x = jaxnorm.linen.BatchNorm(use_running_average=not train)(x)
            x = nn.relu(x)
        return nn.Dense(10)(x.mean((1, 2)))


model = Classifier()
variables = model.init(jax.random.key(0), train_x[:1], train=False)
jax.tree.map(jnp.shape, variables)

# %% [markdown]
# There are two collections: `params`, which the optimizer updates, and `batch_stats`, which the
# forward pass updates. Both are plain dicts of arrays. A Linen layer does not store its state, so
# each step has to return the new state: `mutable=["batch_stats"]` makes `apply` return it.

# %%
optimizer = optax.adam(3e-3)


@jax.jit
def train_step(params, batch_stats, opt_state, x, y):
    def loss_of(params):
        logits, updates = model.apply(
            {"params": params, "batch_stats": batch_stats}, x, train=True, mutable=["batch_stats"]
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        return loss, updates["batch_stats"]

    (loss, batch_stats), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
    updates, opt_state = optimizer.update(grads, opt_state)
    return optax.apply_updates(params, updates), batch_stats, opt_state, loss


@jax.jit
def predict(params, batch_stats, x):
    return model.apply({"params": params, "batch_stats": batch_stats}, x, train=False).argmax(-1)


params, batch_stats = variables["params"], variables["batch_stats"]
opt_state, losses, history = optimizer.init(params), [], {}
for step, (x, y) in enumerate(batches(epochs=12)):
    params, batch_stats, opt_state, loss = train_step(params, batch_stats, opt_state, x, y)
    losses.append(float(loss))
    history[step + 1] = batch_stats

accuracy = np.mean(predict(params, batch_stats, test_x) == test_y)
print(f"{len(losses)} steps, test accuracy {accuracy:.1%}")
assert accuracy > 0.9

# %% [markdown]
# This plot shows how the statistics change from step to step. Each line is a layer, and zero is its
# final value. In the first tens of steps, the statistics move from their initial values (mean 0,
# variance 1) to those of the data; after that, they follow the weights, which change until the end.

# %%
jaxnorm.inspect.plot_drift(history)

# %%
for name, value in jaxnorm.inspect.scalars(batch_stats).items():
    print(f"{name:24}{float(value):8.3f}")

# %% [markdown]
# ## The same in NNX
#
# NNX layers store their state themselves, in variables of type `nnx.BatchStat`, and `nnx.jit`
# updates them. `model.train()` and `model.eval()` switch between the modes.


# %%
class NNXClassifier(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = nnx.Conv(1, 16, (3, 3), use_bias=False, rngs=rngs)
        self.norm1 = jaxnorm.nnx.BatchNorm(16, rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), use_bias=False, rngs=rngs)
        self.norm2 = jaxnorm.nnx.BatchNorm(32, rngs=rngs)
        self.dense = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm1(self.conv1(x)))
        x = nnx.relu(self.norm2(self.conv2(x)))
        return self.dense(x.mean((1, 2)))


@nnx.jit
def nnx_step(model, optimizer, x, y):
    def loss_of(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    loss, grads = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, grads)
    return loss


nnx_model = NNXClassifier(nnx.Rngs(0))
nnx_optimizer = nnx.Optimizer(nnx_model, optax.adam(3e-3), wrt=nnx.Param)
nnx_losses = [
    float(nnx_step(nnx_model, nnx_optimizer, x, jnp.asarray(y))) for x, y in batches(epochs=12)
]
nnx_model.eval()
nnx_accuracy = np.mean(nnx.jit(lambda m, x: m(x).argmax(-1))(nnx_model, test_x) == test_y)
print(f"test accuracy {nnx_accuracy:.1%}, {int(nnx_model.norm1.count[...])} updates")
assert nnx_accuracy > 0.9

# %%
figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
for name, values in (("Linen", losses), ("NNX", nnx_losses)):
    smooth = np.convolve(values, np.ones(20) / 20, "valid")
    axes.plot(np.arange(len(smooth)) + 20, smooth, label=name)
axes.set(xlabel="step", ylabel="cross-entropy, mean of 20 steps", yscale="log")
axes.set_yticks((0.2, 0.5, 1, 2), ("0.2", "0.5", "1", "2"))
axes.minorticks_off()
axes.legend(frameon=False)
axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## Errors for common mistakes
#
# Each mistake below, except the last, raises an error at trace time, before anything is computed.


# %%
def error_of(mistake):
    try:
        mistake()
    except Exception as error:
        print(f"{type(error).__name__}: {error}\n")
    else:
        raise AssertionError("this should have been an error")


state = {"params": params, "batch_stats": batch_stats}

# %% [markdown]
# **Training without `mutable`:** the new state would be lost.

# %%
error_of(lambda: model.apply(state, train_x[:8], train=True))

# %% [markdown]
# **Evaluation without `batch_stats`:** for example, only the params were saved.

# %%
error_of(lambda: model.apply({"params": params}, test_x[:8], train=False))

# %% [markdown]
# **Flax's momentum:** in Flax, the momentum is the weight of the old value; in PyTorch and jaxnorm,
# it is the weight of the new value. With 0.99, the running statistics would be almost those of the
# last batch.

# %%
error_of(lambda: jaxnorm.linen.BatchNorm(momentum=0.99))

# %% [markdown]
# **Neither training nor evaluation:** `use_running_average` is not set.

# %%
norm = jaxnorm.linen.BatchNorm()
error_of(lambda: norm.init(jax.random.key(0), train_x[:8]))

# %% [markdown]
# **One value per channel:** a batch of one sample without spatial axes, as can occur at the end of
# an epoch, has no variance.

# %%
error_of(lambda: jaxnorm.batch_norm(jnp.ones((1, 16))))

# %% [markdown]
# **Integers:** for example, uint8 images that were read from a file.

# %%
error_of(lambda: jaxnorm.batch_norm(jnp.ones((8, 8, 8, 3), jnp.uint8)))

# %% [markdown]
# **The wrong number of channels:** for example, the state of another model.

# %%
error_of(lambda: jaxnorm.batch_norm(jnp.ones((8, 4, 4, 32)), None, jaxnorm.init_batch_stats(16)))

# %% [markdown]
# **A batch with NaN** cannot be detected at trace time. The update of the affected channel is
# skipped, so the running statistics stay finite, while those of other libraries stay NaN. The
# output and the gradients of that batch still contain the NaN.

# %%
x = jnp.asarray(train_x[:32]).at[0, 0, 0, 0].set(jnp.nan)
before = jaxnorm.init_batch_stats(1)
y, after = jaxnorm.batch_norm(x, None, before)
print("in the output:", bool(jnp.isnan(y).any()), "  in the state:", after)
assert jnp.isnan(y).any()
assert after["mean"] == before["mean"]

# %% [markdown]
# ## Other notebooks
#
# - `instance_vs_batch.ipynb`: what batch norm and instance norm count, learn and track.
# - `choosing_a_norm.ipynb`: a comparison of the norms for several batch sizes and learning rates.
# - `migrating.ipynb`: a model in Flax and a model in PyTorch, moved to jaxnorm step by step.
# - `from_pytorch.ipynb`: conversion from PyTorch, and export to ONNX.
# - `numerics.ipynb`: the accuracy with large offsets, bfloat16 and padding.
# - `many_devices.ipynb`: a batch that is distributed over devices.
