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
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxnorm/jaxnorm/blob/main/notebooks/migrating.ipynb)
#
# # Migrating two models
#
# This notebook moves two models to jaxnorm, from start to end:
#
# 1. A ResNet in Flax, built like the one in Flax's ImageNet example. It is trained with Flax's batch
#    norm and saved. Then the import is changed, the checkpoint is restored, and training continues
#    with the same losses.
# 2. A convolutional network in PyTorch, with batch norm and instance norm. It is converted to Flax,
#    compared, trained for one more step in JAX, and written back to PyTorch.
#
# [Migrating from Flax or PyTorch](../docs/migration.md) lists every argument that differs.

# %% tags=["skip-execution"]
# %pip install --quiet "jaxnorm[examples] @ git+https://github.com/jaxnorm/jaxnorm" torch

# %%
import collections
import functools
import tempfile
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import torch
from flax import serialization
from flax.training import train_state
from sklearn.datasets import load_digits

import jaxnorm
import jaxnorm.linen
from jaxnorm import interop

plt.rcParams |= {
    "figure.dpi": 100,
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}

# %% [markdown]
# The data are scikit-learn's scanned digits, 1,797 images of 8 x 8 pixels. The last 297 are kept
# for testing.

# %%
images, labels = load_digits(return_X_y=True)
images = (images / 16).astype(np.float32).reshape(-1, 8, 8, 1)
train_x, test_x = images[:1500], images[1500:]
train_y, test_y = labels[:1500], labels[1500:]
BATCH = 64


def batches(steps, seed):
    """Yields random batches; a seed always gives the same ones."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        chosen = rng.choice(len(train_x), BATCH, replace=False)
        yield train_x[chosen], train_y[chosen]


# %% [markdown]
# ## From Flax
#
# ### The model and the training step
#
# As in Flax's ImageNet example, the class of the norm is an argument of the model, so the norm is
# chosen in a single place. The blocks get it with its options already filled in by
# `functools.partial`, and the last norm of each block starts with a scale of 0.


# %%
class Block(nn.Module):
    """Two convolutions, and a shortcut that is projected where the shape changes."""

    features: int
    strides: int
    norm: Any

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(nn.Conv, self.features, use_bias=False)
        y = conv((3, 3), strides=self.strides)(x)
        y = nn.relu(self.norm()(y))
        y = conv((3, 3))(y)
        y = self.norm(scale_init=nn.initializers.zeros)(y)
        if y.shape != x.shape:
            x = conv((1, 1), strides=self.strides, name="conv_proj")(x)
            x = self.norm(name="norm_proj")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Three blocks of 16, 32 and 64 channels."""

    norm: Any

    @nn.compact
    def __call__(self, x, train):
        norm = functools.partial(self.norm, use_running_average=not train, epsilon=1e-5)
        x = nn.Conv(16, (3, 3), use_bias=False, name="conv_init")(x)
        x = nn.relu(norm(name="bn_init")(x))
        for features, strides in ((16, 1), (32, 2), (64, 2)):
            x = Block(features, strides, norm)(x)
        return nn.Dense(10)(x.mean((1, 2)))


class TrainState(train_state.TrainState):
    batch_stats: Any


def create(model):
    """Returns the state before the first step."""
    variables = model.init(jax.random.key(0), train_x[:1], train=False)
    optimizer = optax.sgd(0.05, momentum=0.9, nesterov=True)
    return TrainState.create(apply_fn=model.apply, tx=optimizer, **variables)


@jax.jit
def train_step(state, x, y):
    def loss_of(params):
        logits, updates = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            x,
            train=True,
            mutable=["batch_stats"],
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        return loss, updates["batch_stats"]

    (loss, batch_stats), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, batch_stats=batch_stats), loss


@jax.jit
def predict(state, x):
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return state.apply_fn(variables, x, train=False)


def train(state, steps, seed):
    """Returns the new state and the loss of each step."""
    losses = []
    for x, y in batches(steps, seed):
        state, loss = train_step(state, x, y)
        losses.append(float(loss))
    return state, np.array(losses)


# %% [markdown]
# ### Training with Flax's norm, and a checkpoint

# %%
before = ResNet(norm=functools.partial(nn.BatchNorm, momentum=0.9))

STEPS = 40
flax_state, first_losses = train(create(before), STEPS, seed=0)
folder = Path(tempfile.mkdtemp())
(folder / "checkpoint").write_bytes(serialization.to_bytes(flax_state))
print(f"loss {first_losses[0]:.3f} -> {first_losses[-1]:.3f} after {STEPS} steps")

# %% [markdown]
# ### Changing the import
#
# The only line of the model that changes is the one that names the norm. If `momentum` is left as
# it is, the constructor raises an error, because in jaxnorm, as in PyTorch, `momentum` is the
# weight of the new value:

# %%
try:
    create(ResNet(norm=functools.partial(jaxnorm.linen.BatchNorm, momentum=0.9)))
except ValueError as error:
    print(error)

# %% [markdown]
# The error says what to write. `decay` is the weight of the old value, as `momentum` in Flax:

# %%
after = ResNet(norm=functools.partial(jaxnorm.linen.BatchNorm, decay=0.9))

# %% [markdown]
# ### Restoring the checkpoint
#
# The parameters have the same names and shapes as before, and so does the state of the optimizer.
# The state of each norm has one more entry: `count`, the number of batches that the running
# statistics represent. `check_batch_stats` compares the checkpoint with the new model, and reports
# what is missing:

# %%
checkpoint = serialization.msgpack_restore((folder / "checkpoint").read_bytes())
new = create(after)
like = {"params": new.params, "batch_stats": new.batch_stats}
findings = jaxnorm.check_batch_stats(checkpoint, like=like)
for finding in findings:
    print(finding)
assert findings

# %% [markdown]
# `interop.from_flax` adds the count to every norm. Here it is the number of steps, which is part of
# the checkpoint. The count matters only with `momentum=None` and where states are merged.

# %%
variables = {name: checkpoint[name] for name in ("params", "batch_stats")}
variables = interop.from_flax(variables, count=checkpoint["step"])
assert jaxnorm.check_batch_stats(variables, like=like) == []

state = serialization.from_state_dict(new, {**checkpoint, **variables})
print(jax.tree.map(lambda leaf: leaf.ravel()[:3], state.batch_stats["bn_init"]))

# %% [markdown]
# The restored model computes the same function as the one that was saved. The logits may differ in
# the last digits, because the two libraries add the same numbers in a different order.

# %%
difference = float(jnp.abs(predict(state, test_x) - predict(flax_state, test_x)).max())
print(f"largest difference of the logits in evaluation: {difference:.0e}")
assert difference < 1e-4

# %% [markdown]
# ### The next steps
#
# Both models now continue from the same checkpoint, on the same batches.

# %%
flax_state, flax_losses = train(flax_state, 10, seed=1)
state, losses = train(state, 10, seed=1)

print("step   Flax        jaxnorm     difference")
for step, (a, b) in enumerate(zip(flax_losses, losses, strict=True), start=STEPS):
    print(f"{step:4}   {a:.7f}   {b:.7f}   {abs(a - b):.0e}")
assert abs(flax_losses[0] - losses[0]) < 5e-6  # only rounding
assert np.abs(flax_losses - losses).max() < 1e-3  # each step multiplies the rounding of the last

# %% [markdown]
# The losses agree because the loss in training does not depend on the running statistics. Of these,
# the means agree as well, and the variances have one intended difference. Flax averages the biased
# variance of each batch, which divides by the number of values $n$. jaxnorm averages the unbiased
# variance, which divides by $n - 1$ and which PyTorch uses. So the running variance becomes larger
# by up to a factor of $n / (n - 1)$, where $n$ is the number of images times the number of pixels.
# After 10 steps from the checkpoint with a decay of 0.9, $1 - 0.9^{10}$ = 65 % of the difference
# is there.

# %%
PIXELS = {"bn_init": 64, "Block_0": 64, "Block_1": 16, "Block_2": 4}


def states(batch_stats):
    """Yields the name, the number of values per channel, and the state of each norm."""
    for name, tree in batch_stats.items():
        inner = {name: tree} if "mean" in tree else {f"{name}/{k}": v for k, v in tree.items()}
        for path, leaf in inner.items():
            yield path, BATCH * PIXELS[name], leaf


flax_stats = {path: leaf for path, _, leaf in states(flax_state.batch_stats)}
ratios = {
    path: (n, np.asarray(stats["var"] / flax_stats[path]["var"]) - 1)
    for path, n, stats in states(state.batch_stats)
}
for n, ratio in ratios.values():
    np.testing.assert_allclose(np.median(ratio), (1 - 0.9**10) / (n - 1), rtol=0.2)

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), width_ratios=(3, 2))
left.plot(first_losses, color="#1f77b4")
next_steps = np.arange(STEPS, STEPS + len(losses))
left.plot(next_steps, flax_losses, color="#1f77b4", lw=4, alpha=0.4, label="flax.linen.BatchNorm")
left.plot(next_steps, losses, color="#d62728", lw=1.3, label="jaxnorm.linen.BatchNorm")
left.axvline(STEPS - 0.5, color="black", lw=0.6, ls=":")
left.text(STEPS - 1, first_losses.max(), "checkpoint", ha="right", va="top", size=9)
left.set(title="Loss before and after the migration", xlabel="step", ylabel="cross-entropy")
left.legend()
for row, (n, ratio) in enumerate(ratios.values()):
    right.scatter(1e3 * ratio, np.full(ratio.size, row), s=10, alpha=0.5, color="#d62728", lw=0)
    right.plot([1e3 * (1 - 0.9**10) / (n - 1)] * 2, [row - 0.35, row + 0.35], color="black", lw=1)
right.plot([], [], color="black", lw=1, label="0.65 / (n - 1)")
right.set_yticks(range(len(ratios)), ratios)
right.set_ylim(len(ratios) - 0.5, -0.5)
right.set(title="Running variance after ten steps", xlabel="jaxnorm / Flax - 1, in thousandths")
right.legend(loc="upper right")
plt.show()

# %% [markdown]
# ## From PyTorch
#
# ### The model in PyTorch
#
# This small network has a batch norm with an epsilon that is not the default, and an instance norm
# with running statistics. It is trained for some steps. Its accuracy is not high, because the
# instance norm normalizes each image by its own statistics in training, but by running statistics
# in evaluation; [another notebook](instance_vs_batch.ipynb) explains the difference.

# %%
torch.manual_seed(0)
torch_model = torch.nn.Sequential(
    collections.OrderedDict(
        conv1=torch.nn.Conv2d(1, 16, 3, padding=1),
        norm1=torch.nn.BatchNorm2d(16, eps=1e-3, momentum=0.03),
        relu1=torch.nn.ReLU(),
        conv2=torch.nn.Conv2d(16, 32, 3, stride=2, padding=1),
        norm2=torch.nn.InstanceNorm2d(32, affine=True, track_running_stats=True),
        relu2=torch.nn.ReLU(),
        pool=torch.nn.AvgPool2d(2),
        flatten=torch.nn.Flatten(),
        head=torch.nn.Linear(32 * 2 * 2, 10),
    )
)


def to_torch_layout(x):
    """Moves the channels to the second axis, as in PyTorch."""
    return torch.from_numpy(np.moveaxis(np.asarray(x), -1, 1).copy())


def torch_logits(x):
    """Returns the logits in evaluation mode."""
    with torch.no_grad():
        return torch_model.eval()(to_torch_layout(x)).numpy()


def accuracy(logits):
    return np.mean(np.argmax(logits, -1) == test_y)


optimizer = torch.optim.Adam(torch_model.parameters(), lr=3e-3)
for x, y in batches(100, seed=2):
    loss = torch.nn.functional.cross_entropy(
        torch_model.train()(to_torch_layout(x)), torch.from_numpy(y)
    )
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
expected = torch_logits(test_x)
print(f"test accuracy in PyTorch {accuracy(expected):.1%}")

# %% [markdown]
# ### The arguments of the norms
#
# A state dict contains the arrays of a model, but not the epsilon and the momentum of its norms,
# and some defaults differ. `describe_torch` reads them from the modules, and returns the layers of
# jaxnorm that compute the same:

# %%
rows = interop.describe_torch(torch_model)
print(rows)
assert [row.arguments["epsilon"] for row in rows] == [1e-3, 1e-5]

# %% [markdown]
# ### The model in Flax
#
# The arguments of the norms are copied from this table. Only the flatten before the dense layer
# differs: PyTorch flattens (channels, height, width), and this model flattens (height, width,
# channels). So the conversion has to reorder the rows of the dense layer's kernel.


# %%
class Net(nn.Module):
    epsilon: float = 1e-3  # of the batch norm

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(16, (3, 3), padding=1)(x)
        norm = jaxnorm.linen.BatchNorm(
            epsilon=self.epsilon, momentum=0.03, use_running_average=not train
        )
        x = nn.relu(norm(x))
        x = nn.Conv(32, (3, 3), strides=2, padding=1)(x)
        norm = jaxnorm.linen.InstanceNorm(
            epsilon=1e-5, momentum=0.1, track_running_stats=True, use_running_average=not train
        )
        x = nn.relu(norm(x))
        x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        return nn.Dense(10)(x.reshape(len(x), -1))


# %% [markdown]
# ### Matching and converting
#
# `match` calls both models on an example, and proposes which modules correspond. Here the shapes of
# the arrays are sufficient. `Flattened` gives the sizes of the flattened axes, so that the rows are
# reordered. `verify` compares the outputs of the two models, with their current values and with
# random ones. If they differ, it raises an error that names the first module that differs.

# %%
example = test_x[:4]
proposal = interop.match(
    Net(),
    example,
    torch_model,
    to_torch_layout(example),
    kwargs={"train": False},
    kinds={"head": interop.Flattened(32, 2, 2)},
)
print(proposal)
print(f"\nlargest difference that verify found: {proposal.verify():.0e}")

# %%
torch_arrays = {name: array.numpy().copy() for name, array in torch_model.state_dict().items()}
variables = proposal.variables()
logits = np.asarray(Net().apply(variables, test_x, train=False))
error = np.abs(logits - expected).max()
print(f"test accuracy in Flax {accuracy(logits):.1%}")
print(f"largest difference of the logits {error:.0e}, of logits up to {np.abs(expected).max():.0f}")
assert error < 1e-4

# %% [markdown]
# `check_batch_stats` finds no problems. The count of the instance norm is 0, which is valid: PyTorch
# saves this count, but never updates it for instance norm. Nothing here depends on it.

# %%
assert jaxnorm.check_batch_stats(variables) == []
for name in ("BatchNorm_0", "InstanceNorm_0"):
    print(f"{name}: {variables['batch_stats'][name]['count']} batches")

# %% [markdown]
# ### One step in JAX
#
# The converted variables can be trained like those of any other Flax model.


# %%
@jax.jit
def fine_tune(variables, x, y):
    """Makes one step of gradient descent, which also updates the running statistics."""

    def loss_of(params):
        logits, updates = Net().apply(
            {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), updates

    (loss, updates), grads = jax.value_and_grad(loss_of, has_aux=True)(variables["params"])
    params = jax.tree.map(lambda p, g: p - 0.05 * g, variables["params"], grads)
    return {"params": params, **updates}, loss


x, y = next(batches(1, seed=3))
tuned, loss = fine_tune(variables, x, y)
tuned_logits = np.asarray(Net().apply(tuned, test_x, train=False))
print(f"loss {float(loss):.4f}, test accuracy after the step {accuracy(tuned_logits):.1%}")

# %% [markdown]
# ### Back to PyTorch
#
# The same map of names and kernels works in the other direction. `strict=True` makes PyTorch check
# that no array is missing.

# %%
state_dict = interop.to_torch(
    jax.device_get(tuned),
    names=proposal.names,
    convert=proposal.kernels.inverse,
    like=torch_model.state_dict(),
)
torch_model.load_state_dict(interop.tensors(state_dict), strict=True)
returned = torch_logits(test_x)
print(f"largest difference of the logits {np.abs(returned - tuned_logits).max():.0e}")
print("batches that norm1 has counted:", int(torch_model.norm1.num_batches_tracked))
assert np.abs(returned - tuned_logits).max() < 1e-4
assert torch_model.norm1.num_batches_tracked == 101  # 100 in PyTorch, 1 in JAX

# %% [markdown]
# This plot shows the differences between the logits in JAX and in PyTorch. Each point is a test
# image. The two upper rows are the models above: after the conversion, and after the step in JAX
# and the way back. The two lower rows show mistakes. With the default epsilon instead of that in
# the table, all logits are slightly wrong. If the rows of the dense layer are not reordered, the
# logits have no relation to PyTorch's. The shapes are correct in both cases, so that only a
# comparison of the outputs shows these mistakes.

# %%
unordered = interop.kernels(names=proposal.names)  # the dense layer as if there were no flatten
wrong = interop.from_torch(torch_arrays, names=proposal.names, convert=unordered)
cases = {
    "converted": (logits, expected),
    "fine-tuned and written back": (tuned_logits, returned),
    "default epsilon": (Net(epsilon=1e-5).apply(variables, test_x, train=False), expected),
    "rows not reordered": (Net().apply(wrong, test_x, train=False), expected),
}
figure, axes = plt.subplots(figsize=(9, 2.8))
for row, (name, (found, reference)) in enumerate(cases.items()):
    distances = np.abs(np.asarray(found) - reference).max(-1)
    heights = row + np.random.default_rng(0).uniform(-0.25, 0.25, len(distances))
    color = "#1b7f4b" if row < 2 else "#d62728"
    axes.scatter(distances, heights, s=9, alpha=0.5, color=color, lw=0)
    print(f"{name:28} largest difference {distances.max():.0e}")
axes.set_yticks(range(len(cases)), cases)
axes.set_ylim(len(cases) - 0.5, -0.5)
axes.set(xscale="log", xlabel="largest difference of an image's ten logits from PyTorch's")
axes.grid(axis="x", alpha=0.25)
plt.show()
