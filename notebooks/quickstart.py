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
# A small network with batch norm, trained on scanned digits: once in Flax Linen, once in NNX. Where
# do the running statistics live, who moves them, and what happens if you forget one of the steps?

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
# 1,797 digits of 8 x 8 pixels, which ship with scikit-learn. A quarter is kept for testing.

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
    """Shuffled batches; the few images left over at an epoch's end wait for the next."""
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(len(train_x))
        for first in range(0, len(order) - size + 1, size):
            chosen = order[first : first + size]
            yield train_x[chosen], train_y[chosen]


# %% [markdown]
# ## Flax Linen
#
# The layer takes the place of `flax.linen.BatchNorm`. In the call, `use_running_average=False`
# trains: the batch's own statistics normalize, and the running statistics move.


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
# Two collections: `params`, which the optimizer moves, and `batch_stats`, which the forward pass
# moves. Both are plain dicts of arrays. A layer never holds its state, and so a step has to hand
# the new one on: `mutable=["batch_stats"]` makes `apply` return it.

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
# Where the statistics went, from step to step. Each line is a layer, and zero is where it ended. In
# the first tens of steps they leave their start (mean 0, variance 1) for what the data has; from then
# on they follow the weights, which move until the end.

# %%
jaxnorm.inspect.plot_drift(history)

# %%
for name, value in jaxnorm.inspect.scalars(batch_stats).items():
    print(f"{name:24}{float(value):8.3f}")

# %% [markdown]
# ## The same in NNX
#
# Here the layer holds its state, in a variable of the kind `nnx.BatchStat`; `nnx.jit` carries it
# through. `model.train()` and `model.eval()` switch.


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
axes.legend(frameon=False)
axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## The classical mistakes, and what each one gets
#
# The state cannot be lost by accident: each of these is an error while tracing, before any number
# is computed.


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
# **Training, and the new state has nowhere to go:** `mutable` forgotten.

# %%
error_of(lambda: model.apply(state, train_x[:8], train=True))

# %% [markdown]
# **Evaluation without the statistics:** only the params were saved.

# %%
error_of(lambda: model.apply({"params": params}, test_x[:8], train=False))

# %% [markdown]
# **Flax's momentum.** Flax counts how much of the old value stays, PyTorch and jaxnorm how much of
# the new one comes in. 0.99 would take the last batch for everything.

# %%
error_of(lambda: jaxnorm.linen.BatchNorm(momentum=0.99))

# %% [markdown]
# **Neither training nor evaluation said.**

# %%
norm = jaxnorm.linen.BatchNorm()
error_of(lambda: norm.init(jax.random.key(0), train_x[:8]))

# %% [markdown]
# **One value per channel:** a batch of one, at the end of an epoch, has no variance.

# %%
error_of(lambda: jaxnorm.batch_norm(jnp.ones((1, 16))))

# %% [markdown]
# **Integers:** uint8 images straight from a file.

# %%
error_of(lambda: jaxnorm.batch_norm(jnp.ones((8, 8, 8, 3), jnp.uint8)))

# %% [markdown]
# **The wrong number of channels:** a state of another model.

# %%
error_of(lambda: jaxnorm.batch_norm(jnp.ones((8, 4, 4, 32)), None, jaxnorm.init_batch_stats(16)))

# %% [markdown]
# **A batch that holds NaN** cannot be seen while tracing. It does not ruin the running statistics,
# where peers keep NaN for ever: that channel's update is skipped, and the output and the gradients
# of that batch still show it.

# %%
x = jnp.asarray(train_x[:32]).at[0, 0, 0, 0].set(jnp.nan)
before = jaxnorm.init_batch_stats(1)
y, after = jaxnorm.batch_norm(x, None, before)
print("in the output:", bool(jnp.isnan(y).any()), "  in the state:", after)
assert jnp.isnan(y).any()
assert after["mean"] == before["mean"]

# %% [markdown]
# ## Where next
#
# - `instance_vs_batch.ipynb`: what batch and instance norm count, learn and track.
# - `choosing_a_norm.ipynb`: the norms beside each other, over batch sizes and learning rates.
# - `from_pytorch.ipynb`: models that come from PyTorch, and leave for ONNX.
# - `numerics.ipynb`: why the same formula is right here and off by a thousand elsewhere.
# - `many_devices.ipynb`: one batch over several devices.
