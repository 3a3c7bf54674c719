"""Measures whole training steps of four models in which only the norms differ."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from libraries import LIBRARIES


class Net:
    """Collects parameters and norms while a model runs on an example, and then applies them."""

    def __init__(self, library: str) -> None:
        self.make, self.params, self.state = LIBRARIES[library], [], []
        self.norms: list[Any] = []
        self.running: tuple[Any, Any, list[Any]] | None = None

    def weight(self, *shape: int) -> jax.Array:
        """Returns the next weight, which is created in the first run."""
        if self.running is None:
            scale = (2 / max(jnp.prod(jnp.array(shape[:-1])), 1)) ** 0.5
            key = jax.random.key(len(self.params))
            self.params.append(scale * jax.random.normal(key, shape))
            return self.params[-1]
        return next(self.running[0])

    def norm(self, kind: str, x: jax.Array) -> jax.Array:
        """Applies a norm of the library, in training."""
        if self.running is None:
            shape = x.shape
            params, state, apply = self.make(kind, shape, "last")
            self.params.append(params)
            self.state.append(state)
            self.norms.append(apply)
            return x
        params, state, apply = next(self.running[0]), *next(self.running[1])
        y, new = apply(params, state, x, True)
        self.running[2].append(new)
        return y


def conv(net: Net, x: jax.Array, features: int, size: int = 3, strides: int = 1) -> jax.Array:
    """Applies a convolution without bias."""
    kernel = net.weight(size, size, x.shape[-1], features)
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, (strides, strides), "SAME", dimension_numbers=numbers
    )


def conv_net(net: Net, x: jax.Array) -> jax.Array:
    """Applies twelve convolutions of 64 features, each with batch norm."""
    for _ in range(12):
        x = jax.nn.relu(net.norm("batch", conv(net, x, 64)))
    return x.mean((1, 2))


def resnet18(net: Net, x: jax.Array) -> jax.Array:
    """Applies a ResNet-18 with four stages of two blocks, of 32 to 256 features."""
    x = jax.nn.relu(net.norm("batch", conv(net, x, 32)))
    for stage in range(4):
        for block in range(2):
            features, strides = 32 * 2**stage, 2 if stage and not block else 1
            y = jax.nn.relu(net.norm("batch", conv(net, x, features, strides=strides)))
            y = net.norm("batch", conv(net, y, features))
            if y.shape != x.shape:
                x = net.norm("batch", conv(net, x, features, 1, strides))
            x = jax.nn.relu(x + y)
    return x.mean((1, 2))


def transformer(net: Net, x: jax.Array) -> jax.Array:
    """Applies six pre-norm transformer layers of 256 features, with layer norm."""
    features, heads = x.shape[-1], 4
    for _ in range(6):
        h = net.norm("layer", x)
        q, k, v = (
            (h @ net.weight(features, features)).reshape(*x.shape[:2], heads, -1) for _ in range(3)
        )
        h = jax.nn.dot_product_attention(q, k, v).reshape(x.shape)
        x = x + h @ net.weight(features, features)
        h = net.norm("layer", x)
        h = jax.nn.gelu(h @ net.weight(features, 4 * features))
        x = x + h @ net.weight(4 * features, features)
    return net.norm("layer", x).mean(1)


def deep(net: Net, x: jax.Array) -> jax.Array:
    """Applies fifty dense layers with batch norm, which do little work and take long to compile."""
    for _ in range(50):
        x = jax.nn.relu(net.norm("batch", x @ net.weight(x.shape[-1], x.shape[-1])))
    return x


INPUTS = {
    "conv net": (conv_net, (16, 28, 28, 64)),
    "ResNet-18": (resnet18, (16, 32, 32, 3)),
    "transformer": (transformer, (8, 128, 256)),
    "50 dense layers": (deep, (64, 256)),
}


def step(library: str, name: str) -> tuple[Any, tuple[Any, ...]]:
    """Returns a step of gradient descent, and its arguments."""
    model, shape = INPUTS[name]
    net, x = Net(library), jax.random.normal(jax.random.key(0), shape)
    model(net, x)

    def loss(params: Any, state: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        new: list[Any] = []
        net.running = iter(params), iter(zip(state, net.norms, strict=True)), new
        return jnp.mean(model(net, x) ** 2), new

    def train(params: Any, state: Any, x: jax.Array) -> Any:
        grads, state = jax.grad(loss, has_aux=True)(params, state, x)
        return jax.tree.map(lambda p, g: p - 1e-3 * g, params, grads), state

    return jax.jit(train), (net.params, net.state, x)
