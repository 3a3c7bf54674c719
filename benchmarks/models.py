"""Defines whole training steps in plain JAX, in which only the norm differs.

A library's norm enters a model as the pair of functions of `libraries.py`. Parameters are float32;
convolutions and matrix products are in bfloat16. The steps are made to be compiled, and not to be
run, so everything is described by shapes and dtypes only.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from libraries import LIBRARIES

Shape = jax.ShapeDtypeStruct
Step = tuple[Callable[..., Any], tuple[Any, ...], int]
NONE = "none"


# ---- Parameters and norms ----


@functools.cache
def make_norm(library: str, norm: str, channels: int, ndim: int) -> Any:
    """Returns the parameters, the state and the function of a norm. "none" is the identity."""
    if library == NONE:
        return None, None, lambda params, state, x, training: (x, state)
    return LIBRARIES[library](norm, (2,) * (ndim - 1) + (channels,), "last")


class Net:
    """Collects the shapes of the parameters while a model is traced, or returns the parameters.

    Args:
      library: the library of the norm.
      norm: which norm, by its name in `libraries.NORMS`.
      given: the parameters and the norms' states. None collects their shapes.
    """

    def __init__(self, library: str, norm: str, given: tuple[Any, Any] | None = None) -> None:
        self.library, self.norm_name = library, norm
        self.weights: list[Shape] = []
        self.norms: list[tuple[int, int]] = []  # the channels and the number of axes
        self.scanned: list[tuple[Net, int]] = []
        self.new_states: dict[str, list[Any]] = {"norms": [], "scanned": []}
        self.given: dict[str, Iterator[Any]] | None = None
        if given is not None:
            params, states = given
            self.given = {
                "weights": iter(params["weights"]),
                "norms": iter(zip(params["norms"], states["norms"], strict=True)),
                "scanned": iter(zip(params["scanned"], states["scanned"], strict=True)),
            }

    def weight(self, *shape: int) -> jax.Array:
        """Returns the next weight, in bfloat16."""
        if self.given is None:
            self.weights.append(Shape(shape, jnp.float32))
            return jnp.zeros(shape, jnp.bfloat16)
        return next(self.given["weights"]).astype(jnp.bfloat16)

    def norm(self, x: jax.Array) -> jax.Array:
        """Applies the next norm to x, in training and in the dtype of x."""
        if self.given is None:
            self.norms.append((x.shape[-1], x.ndim))
            return x
        params, state = next(self.given["norms"])
        apply = make_norm(self.library, self.norm_name, x.shape[-1], x.ndim)[2]
        y, state = apply(params, state, x, True)
        self.new_states["norms"].append(state)
        return y.astype(x.dtype)

    def scan(self, block: Callable[..., jax.Array], x: jax.Array, depth: int) -> jax.Array:
        """Applies `depth` blocks under `lax.scan`, over stacked parameters."""
        if self.given is None:
            inner = Net(self.library, self.norm_name)
            self.scanned.append((inner, depth))
            return block(inner, x)

        def body(x: jax.Array, given: tuple[Any, Any]) -> tuple[jax.Array, Any]:
            inner = Net(self.library, self.norm_name, given)
            return block(inner, x), inner.new_states

        x, states = lax.scan(body, x, next(self.given["scanned"]))
        self.new_states["scanned"].append(states)
        return x

    def variables(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns the shapes of all parameters, and of the states of the norms."""
        made = [make_norm(self.library, self.norm_name, *norm) for norm in self.norms]
        inner = [stack(net.variables(), depth) for net, depth in self.scanned]
        params = {
            "weights": self.weights,
            "norms": [shapes(params) for params, _, _ in made],
            "scanned": [params for params, _ in inner],
        }
        states = {
            "norms": [shapes(state) for _, state, _ in made],
            "scanned": [state for _, state in inner],
        }
        return params, states

    def number_of_norms(self) -> int:
        """Returns how many norms one pass through the model applies."""
        return len(self.norms) + sum(depth * net.number_of_norms() for net, depth in self.scanned)


def shapes(tree: Any) -> Any:
    """Returns the shapes and dtypes of the arrays of a tree."""
    return jax.tree.map(lambda a: Shape(jnp.shape(a), jnp.result_type(a)), tree)


def stack(tree: Any, depth: int) -> Any:
    """Returns the shapes of `depth` trees that are stacked on a leading axis."""
    return jax.tree.map(lambda a: Shape((depth, *a.shape), a.dtype), tree)


# ---- Convolutional networks ----


def conv(net: Net, x: jax.Array, features: int, size: int = 3, strides: int = 1) -> jax.Array:
    """Applies a convolution without bias."""
    kernel = net.weight(size, size, x.shape[-1], features)
    return lax.conv_general_dilated(
        x, kernel, (strides, strides), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def bottleneck(net: Net, x: jax.Array, features: int, strides: int) -> jax.Array:
    """Applies the block of He et al., 2015, with the stride in the 3x3 convolution."""
    y = jax.nn.relu(net.norm(conv(net, x, features, 1)))
    y = jax.nn.relu(net.norm(conv(net, y, features, 3, strides)))
    y = net.norm(conv(net, y, 4 * features, 1))
    if x.shape != y.shape:
        x = net.norm(conv(net, x, 4 * features, 1, strides))
    return jax.nn.relu(x + y)


def resnet50(net: Net, x: jax.Array, labels: jax.Array, depth: int | None) -> jax.Array:
    """Returns the loss of a ResNet-50; `depth` is the number of bottlenecks of each stage."""
    x = jax.nn.relu(net.norm(conv(net, x, 64, 7, 2)))
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
    for stage, blocks in enumerate((3, 4, 6, 3) if depth is None else (depth,) * 4):
        for block in range(blocks):
            x = bottleneck(net, x, 64 * 2**stage, 2 if stage and not block else 1)
    return cross_entropy(x.mean((1, 2)) @ net.weight(x.shape[-1], 1000), labels)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the mean of -log p(label)."""
    logits = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.take_along_axis(logits, labels[:, None], axis=1).mean()


def stargan(net: Net, x: jax.Array, target: jax.Array, depth: int | None) -> jax.Array:
    """Returns the reconstruction loss of the StarGAN generator (Choi et al., 2018, table 4)."""

    def normalized(x: jax.Array) -> jax.Array:
        return jax.nn.relu(net.norm(x))

    x = normalized(conv(net, x, 64, 7))
    x = normalized(conv(net, x, 128, 4, 2))
    x = normalized(conv(net, x, 256, 4, 2))
    for _ in range(6 if depth is None else depth):
        x += net.norm(conv(net, normalized(conv(net, x, 256)), 256))
    for features in (128, 64):
        kernel = net.weight(4, 4, x.shape[-1], features)
        x = normalized(
            lax.conv_transpose(
                x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        )
    y = jnp.tanh(conv(net, x, 3, 7).astype(jnp.float32))
    return jnp.abs(y - target).mean()


# ---- Transformers ----


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Applies causal attention to (batch, length, heads, features), with a float32 softmax."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
    length = q.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    scores = jnp.where(causal, scores / q.shape[-1] ** 0.5, -1e30)
    weights = jax.nn.softmax(scores).astype(v.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def heads_of(net: Net, x: jax.Array, heads: int) -> jax.Array:
    """Returns a projection of x of shape (batch, length, heads, features)."""
    features = x.shape[-1]
    return (x @ net.weight(features, features)).reshape(*x.shape[:2], heads, features // heads)


def gpt2_block(net: Net, x: jax.Array) -> jax.Array:
    """Applies the block of Radford et al., GPT-2, 2019."""
    features = x.shape[-1]
    h = net.norm(x)
    q, k, v = (heads_of(net, h, 12) for _ in range(3))
    x += attention(q, k, v).reshape(x.shape) @ net.weight(features, features)
    h = jax.nn.gelu(net.norm(x) @ net.weight(features, 4 * features))
    return x + h @ net.weight(4 * features, features)


def rotate(x: jax.Array) -> jax.Array:
    """Applies the rotary embedding (Su et al., RoFormer, 2021) to (batch, length, heads, k)."""
    half = x.shape[-1] // 2
    frequencies = 1e4 ** (-jnp.arange(half) / half)
    angles = jnp.arange(x.shape[1])[:, None, None] * frequencies
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def llama_block(net: Net, x: jax.Array) -> jax.Array:
    """Applies a block of Touvron et al., LLaMA, 2023."""
    features = x.shape[-1]
    h = net.norm(x)
    q, k, v = (heads_of(net, h, 16) for _ in range(3))
    y = attention(rotate(q), rotate(k), v).reshape(x.shape)
    x += y @ net.weight(features, features)
    h = net.norm(x)
    gate, up = (h @ net.weight(features, 2816) for _ in range(2))
    return x + (jax.nn.silu(gate) * up) @ net.weight(2816, features)


def transformer(
    block: Callable[..., jax.Array],
    scanned: bool,
    net: Net,
    x: jax.Array,
    target: jax.Array,
    depth: int | None,
) -> jax.Array:
    """Returns the mean-square loss of a stack of blocks and a last norm, without embeddings."""
    depth = 12 if depth is None else depth
    if scanned:
        x = net.scan(block, x, depth)
    else:
        for _ in range(depth):
            x = block(net, x)
    return jnp.square(net.norm(x).astype(jnp.float32) - target).mean()


# ---- Training steps ----

IMAGES = Shape((64, 224, 224, 3), jnp.bfloat16), Shape((64,), jnp.int32)
# The published generator also has three colors and five labels.
PICTURES = Shape((16, 128, 128, 8), jnp.bfloat16), Shape((16, 128, 128, 3), jnp.float32)
TOKENS = Shape((8, 1024, 768), jnp.bfloat16), Shape((8, 1024, 768), jnp.float32)
WIDE_TOKENS = Shape((8, 1024, 1024), jnp.bfloat16), Shape((8, 1024, 1024), jnp.float32)
gpt2, llama = (functools.partial(transformer, block) for block in (gpt2_block, llama_block))
# The body, its norm, its input and target, and the depth of the default run (None: the full depth).
BODIES: dict[str, tuple[Callable[..., jax.Array], str, tuple[Shape, Shape], int | None]] = {
    "ResNet-50, batch norm": (resnet50, "batch", IMAGES, 1),
    "ResNet-50, instance norm": (resnet50, "instance", IMAGES, 1),
    "ResNet-50, group norm": (resnet50, "group32", IMAGES, 1),
    "StarGAN, instance norm": (stargan, "instance", PICTURES, 2),
    "GPT-2, layer norm": (functools.partial(gpt2, False), "layer", TOKENS, 3),
    "GPT-2 under scan, layer norm": (functools.partial(gpt2, True), "layer", TOKENS, None),
    "Llama, RMS norm": (functools.partial(llama, False), "rms", WIDE_TOKENS, 3),
    "Llama under scan, RMS norm": (functools.partial(llama, True), "rms", WIDE_TOKENS, None),
}
LINEN, NNX = "ResNet-50 in Linen, batch norm", "ResNet-50 in NNX, batch norm"
MODELS = (*BODIES, LINEN, NNX)


def training_step(loss: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a step of gradient descent on `loss(params, state, x, target)`, with a new state."""

    def step(params: Any, state: Any, x: jax.Array, target: jax.Array) -> Any:
        grads, state = jax.grad(loss, has_aux=True)(params, state, x, target)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), state

    return step


def make_step(model: str, library: str, full: bool) -> Step:
    """Returns a training step, the shapes of its arguments, and its number of norms."""
    if model in (LINEN, NNX):
        import modules

        made = modules.linen_step if model == LINEN else modules.nnx_step
        return made(library, (3, 4, 6, 3) if full else (1, 1, 1, 1))
    body, norm, data, depth = BODIES[model]
    depth = None if full else depth
    collected = Net(library, norm)
    jax.eval_shape(lambda x, target: body(collected, x, target, depth), *data)

    def loss(params: Any, state: Any, x: jax.Array, target: jax.Array) -> tuple[jax.Array, Any]:
        net = Net(library, norm, (params, state))
        return body(net, x, target, depth), net.new_states

    arguments = (*collected.variables(), *data)
    return training_step(loss), arguments, collected.number_of_norms()
