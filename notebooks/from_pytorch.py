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
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxnorm/jaxnorm/blob/main/notebooks/from_pytorch.ipynb)
#
# # From PyTorch to Flax to ONNX
#
# This notebook converts two PyTorch models to Flax, with their running statistics, and exports them
# to ONNX: the StarGAN generator (instance norm with running statistics) and a ResNet-18 (batch
# norm), at an eighth and a quarter of their published width. It compares the outputs of PyTorch,
# Flax and onnxruntime on photographs, and shows how evaluating instance norm with running
# statistics differs from normalizing each image by its own statistics.

# %% tags=["skip-execution"]
# %pip install --quiet "jaxnorm[examples,onnx] @ git+https://github.com/jaxnorm/jaxnorm" torch
# !git clone -q https://github.com/jaxnorm/jaxnorm

# %%
import collections
import sys

import jax
import matplotlib.pyplot as plt
import numpy as np
import onnxruntime
import torch

import jaxnorm
import jaxnorm.onnx
from jaxnorm import interop

# The folders with the models in Flax (examples) and PyTorch (tests): in this checkout or the clone.
sys.path += ["../examples", "../tests", "jaxnorm/examples", "jaxnorm/tests"]
import resnet
import stargan
import torch_models

plt.rcParams |= {
    "figure.dpi": 100,
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def to_torch_layout(x):
    """Moves the channels to the second axis, as in PyTorch."""
    return torch.from_numpy(np.moveaxis(x, -1, 1).copy())


def from_torch_layout(x):
    """Moves the channels to the last axis, as in Flax."""
    return np.moveaxis(x.detach().numpy(), 1, -1)


def apart(a, b):
    """Returns the largest difference."""
    return float(np.abs(np.asarray(a) - np.asarray(b)).max())


# %% [markdown]
# ## The photographs
#
# The images are square parts of the two photographs that come with scikit-learn, a temple and a
# flower. They have 64 x 64 pixels, from photographs at half the original size, with values from
# -1 to 1.

# %%
photographs = stargan.photographs(size=64)
print(photographs.shape, photographs.dtype, photographs.min(), photographs.max())

# %% [markdown]
# ## StarGAN's generator, trained in PyTorch
#
# Random weights would be enough to compare numbers, but would not give recognizable pictures. So
# the generator is trained for some seconds to reproduce its input for any label. As usual in
# training mode, each image is normalized by its own statistics, and the running statistics are
# updated.

# %%
FEATURES, STEPS = 8, 400
torch.manual_seed(0)
torch_model = torch_models.Generator(features=FEATURES)
optimizer = torch.optim.Adam(torch_model.parameters())
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=STEPS)
rng = np.random.default_rng(0)
for step in range(STEPS):
    chosen, label = rng.integers(len(photographs), size=4), rng.integers(stargan.LABELS, size=4)
    x = to_torch_layout(photographs[chosen])
    loss = (torch_model(x, torch.eye(stargan.LABELS)[label]) - x).abs().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    if step in (0, STEPS - 1):
        print(f"step {step:3}: mean error {loss.item():.3f}")
torch_model.eval()

state_dict = torch_model.state_dict()
for key in ("main.1.weight", "main.1.bias", "main.1.running_mean", "main.1.running_var"):
    print(f"{key:28} {tuple(state_dict[key].shape)}")
print(f"{'main.1.num_batches_tracked':28} {state_dict['main.1.num_batches_tracked'].item()}")

# %% [markdown]
# The count in the last line is 0 because PyTorch's instance norm saves a count and never updates
# it. Nothing here depends on the count as long as `momentum` is a number, and
# `jaxnorm.check_batch_stats` accepts a count of 0 beside statistics that were trained.
#
# ## To Flax
#
# `interop.from_torch` converts the state dict: the arrays of norms go to `params` and
# `batch_stats`, bit for bit, and all other arrays to `params`. `names` maps PyTorch's numbered
# modules to the names in Flax, and `convert`, which `interop.kernels` returns, transposes the
# kernels to Flax's order of axes. `like` compares the result with the model: an array that is
# missing, unexpected or of another shape is an error.

# %%
generator = stargan.Generator(features=FEATURES)
labels = np.eye(stargan.LABELS, dtype=np.float32)
like = jax.eval_shape(
    lambda: generator.init(
        jax.random.key(0), photographs[:1], labels[:1], use_running_average=False
    )
)
variables = interop.from_torch(
    state_dict, names=stargan.module_names(), convert=stargan.kernels, like=like
)
mean, var = (variables["batch_stats"]["enter_norm"][key] for key in ("mean", "var"))
assert (mean == state_dict["main.1.running_mean"].numpy()).all()
assert (var == state_dict["main.1.running_var"].numpy()).all()
assert jaxnorm.check_batch_stats(variables) == []

# %% [markdown]
# The models are compared in both modes, on one part of each photograph and on the same two parts
# with half the contrast.

# %%
clear = photographs[[20, 93]]
images = np.concatenate([clear, 0.5 * clear])
label = np.tile(labels[:1], (len(images), 1))


@jax.jit
def evaluate(x, label):
    """Normalizes by the running statistics."""
    return generator.apply(variables, x, label, use_running_average=True)


@jax.jit
def by_own(x, label):
    """Normalizes each image by its own statistics, and discards the new state."""
    y, _ = generator.apply(variables, x, label, use_running_average=False, mutable=["batch_stats"])
    return y


with torch.no_grad():
    given = to_torch_layout(images), torch.from_numpy(label)
    expected = from_torch_layout(torch_model.eval()(*given))
    expected_own = from_torch_layout(torch_model.train()(*given))
    torch_model.eval()
y, y_own = np.asarray(evaluate(images, label)), np.asarray(by_own(images, label))
print(f"largest difference from PyTorch: running statistics {apart(y, expected):.0e},", end=" ")
print(f"own {apart(y_own, expected_own):.0e}, of values from -1 to 1")
assert apart(y, expected) < 1e-4
assert apart(y_own, expected_own) < 1e-4

# %% [markdown]
# ## Two ways to evaluate
#
# The two modes are different functions, and only the one with each image's own statistics was
# trained.

# %%
columns = {
    "input": images,
    "running statistics": y,
    "each image's own statistics": y_own,
    "difference of the two": np.abs(y - y_own) - 1,
}
figure, grid = plt.subplots(len(images), len(columns), figsize=(8.6, 8.6))
for k, axes_of_row in enumerate(grid):
    for axes, (title, pictures) in zip(axes_of_row, columns.items(), strict=True):
        axes.imshow(np.clip((pictures[k] + 1) / 2, 0, 1))
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        if k == 0:
            axes.set_title(title, size=10)
    axes_of_row[0].set_ylabel("photograph" if k < len(clear) else "half the contrast")
plt.show()

# %%
half, ratios = len(clear), {}
for name, out in (("running statistics", y), ("own statistics", y_own)):
    wrong = np.abs(out[:half] - clear).mean()
    ratios[name] = out[half:].std((1, 2)).mean() / out[:half].std((1, 2)).mean()
    print(f"{name:19} mean error {wrong:.3f}, contrast of the changed images {ratios[name]:.0%}")
assert ratios["own statistics"] > 0.9
assert ratios["running statistics"] < 0.85

# %% [markdown]
# With each image's own statistics, halving the contrast makes no difference: each norm divides it
# out, and the output has its usual contrast. With running statistics, the output has less contrast,
# and its colors change. If you export one function where you need the other, there is no error,
# only different pictures.
#
# ## To ONNX
#
# `jaxnorm.onnx.to_onnx` exports the evaluation function. An instance norm with running statistics
# is exported as ONNX's BatchNormalization.


# %%
def run(exported, **inputs):
    """Returns the output that onnxruntime computes."""
    session = onnxruntime.InferenceSession(exported.SerializeToString())
    (out,) = session.run(None, inputs)
    return out


size = photographs.shape[1]
stargan_onnx = jaxnorm.onnx.to_onnx(
    evaluate.__wrapped__,
    [("B", size, size, 3), ("B", stargan.LABELS)],
    input_names=["images", "labels"],
)
y_onnx = run(stargan_onnx, images=images, labels=label)
print(f"onnxruntime: largest difference from Flax {apart(y_onnx, y):.0e},", end=" ")
print(f"from PyTorch {apart(y_onnx, expected):.0e}")
assert apart(y_onnx, expected) < 1e-4

# %% [markdown]
# ## ResNet-18
#
# This model has torchvision's layout and names, so that no map of names is needed. Its weights are
# random, because the notebook only compares outputs, and its running statistics are those of a few
# batches of photographs.

# %%
torch.manual_seed(0)
resnet_torch = torch_models.ResNet18(classes=10, features=16)
with torch.no_grad():
    for batch in np.array_split(photographs[rng.permutation(len(photographs))[:96]], 6):
        resnet_torch(to_torch_layout(batch))
    expected_logits = resnet_torch.eval()(to_torch_layout(images)).numpy()

resnet_variables = resnet.from_pytorch(resnet_torch.state_dict())
assert resnet_variables["batch_stats"]["bn1"]["count"] == 6
resnet_flax = resnet.ResNet18(classes=10, features=16)


def classify(x):
    """Returns the logits, normalized by the running statistics."""
    return resnet_flax.apply(resnet_variables, x, train=False)


logits = jax.jit(classify)(images)
resnet_onnx = jaxnorm.onnx.to_onnx(classify, [("B", size, size, 3)], input_names=["images"])
logits_onnx = run(resnet_onnx, images=images)
largest = np.abs(expected_logits).max()
print(f"logits up to {largest:.2f}; largest difference from PyTorch:", end=" ")
print(f"Flax {apart(logits, expected_logits):.0e}, ONNX {apart(logits_onnx, expected_logits):.0e}")
assert apart(logits, expected_logits) < 1e-4 * largest
assert apart(logits_onnx, expected_logits) < 1e-4 * largest

# %% [markdown]
# ## The operators of the graphs
#
# Every norm is one operator: 17 instance norms with running statistics and 20 batch norms become 37
# BatchNormalization nodes, with their statistics in the graph. There are transposes where Flax's
# channels-last layout meets ONNX's channels-first layout, but none between a convolution and its
# norm.

# %%
graphs = {"StarGAN's generator": stargan_onnx, "ResNet-18": resnet_onnx}
counts = {
    name: collections.Counter(node.op_type for node in exported.graph.node)
    for name, exported in graphs.items()
}
operators = sorted(
    set().union(*counts.values()), key=lambda op: -sum(c[op] for c in counts.values())
)
print(f"{'operator':22}", *(f"{name:>20}" for name in counts))
for op in operators:
    print(f"{op:22}", *(f"{c[op] or '-':>20}" for c in counts.values()))

# %%
norms = {"StarGAN's generator": variables, "ResNet-18": resnet_variables}
for name, model in norms.items():
    states = jax.tree.leaves(model["batch_stats"], is_leaf=lambda tree: "mean" in tree)
    assert counts[name]["BatchNormalization"] == len(states)
for exported in graphs.values():
    made_by = {name: node.op_type for node in exported.graph.node for name in node.output}
    before = {made_by[n.input[0]] for n in exported.graph.node if n.op_type == "BatchNormalization"}
    assert before <= {"Conv", "ConvTranspose"}
