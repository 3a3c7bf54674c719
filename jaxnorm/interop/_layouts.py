"""Reorders the axes of weights that belong to no norm, from PyTorch to Flax and back.

| kind | PyTorch's `weight` | in Flax |
|---|---|---|
| "conv", groups and depthwise too | (O, I / groups, *space) | `kernel`, (*space, I / groups, O) |
| "conv_transpose" | (I, O, *space) | `kernel`, (*space, I, O), its space reversed |
| "linear" | (O, I) | `kernel`, (I, O) |
| "transposed_linear" | (I, O) | `kernel`, (I, O) |
| "embedding" | (V, D) | `embedding`, (V, D) |
| Flattened(C, *space) | (O, C * space) | `kernel`, (space * C, O) |
| Unflattened(C, *space) | (C * space, I) | `kernel`, (I, space * C), and the bias likewise |
| "norm" | any | `scale`, as it is |
| "unchanged" | any | `weight`, as it is |

Linen and NNX have the same layouts. PyTorch's transposed convolution is the gradient of a
convolution, and that of Flax, with `transpose_kernel=False`, is a convolution of the dilated input:
hence the reversal. With `transpose_kernel=True` Flax reverses space and exchanges I and O itself,
so that the kernel is (*space, O, I), which is what "conv" makes of (I, O, *space).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


@dataclasses.dataclass(frozen=True, init=False)
class _Shape:
    """The channels and the sizes in space of one sample, as PyTorch orders them."""

    shape: tuple[int, ...]

    def __init__(self, *shape: int) -> None:
        _check_shape(type(self).__name__, shape)
        object.__setattr__(self, "shape", tuple(map(int, shape)))

    def __repr__(self) -> str:
        return f"{type(self).__name__}{self.shape}"


class Flattened(_Shape):
    """A Linear behind a flatten: its inputs in the order that channels last have.

    PyTorch flattens `(C, *space)`, and a model with channels last `(*space, C)`; the inputs of the
    Linear change their places accordingly.

    Args:
      *shape: of what PyTorch flattens, without the batch: the channels, then the space.

    Raises:
      ValueError: if the sizes are not positive whole numbers, or not two at least.

    Example:
      >>> import numpy as np
      >>> from jaxnorm import interop
      >>> weight = np.array([[1, 2, 3, 10, 20, 30]])  # two channels of three entries
      >>> name, kernel = interop.kernels({"head": interop.Flattened(2, 3)})("head.weight", weight)
      >>> print(name, kernel[:, 0])
      head.kernel [ 1 10  2 20  3 30]

    References:
      torch.nn.Flatten, PyTorch 2.13.
    """


class Unflattened(_Shape):
    """A Linear before an unflatten: its outputs in the order that channels last have.

    For decoders, whose first Linear makes all entries of `(C, *space)`; the bias changes its order
    too.

    Args:
      *shape: of what PyTorch makes of the outputs, without the batch: the channels, then the space.

    Raises:
      ValueError: if the sizes are not positive whole numbers, or not two at least.

    Example:
      >>> import numpy as np
      >>> from jaxnorm import interop
      >>> bias = np.array([1, 2, 3, 10, 20, 30])  # two channels of three entries
      >>> name, bias = interop.kernels({"up": interop.Unflattened(2, 3)})("up.bias", bias)
      >>> print(name, bias)
      up.bias [ 1 10  2 20  3 30]

    References:
      torch.nn.Unflatten, PyTorch 2.13.
    """


Kind = str | Flattened | Unflattened | None

# ---- One rule for each kind ----

Map = Callable[[Any], Any]


def _same(value: Any) -> Any:
    return value


def _transposed(value: Any) -> Any:
    return value.T


class Rule(NamedTuple):
    """How a weight and a bias go to Flax and come back, and how many axes the weight has."""

    leaf: str
    to_flax: Map
    to_torch: Map
    axes: tuple[int, ...] | None = None
    bias_to_flax: Map = _same
    bias_to_torch: Map = _same


def _conv_to_flax(weight: Any) -> Any:
    return np.moveaxis(weight, (0, 1), (-1, -2))


def _conv_to_torch(kernel: Any) -> Any:
    return np.moveaxis(kernel, (-1, -2), (0, 1))


def _conv_transpose_to_flax(weight: Any) -> Any:
    reversed_space = np.flip(weight, tuple(range(2, weight.ndim)))
    return np.moveaxis(reversed_space, (0, 1), (-2, -1))


def _conv_transpose_to_torch(kernel: Any) -> Any:
    weight = np.moveaxis(kernel, (-2, -1), (0, 1))
    return np.flip(weight, tuple(range(2, weight.ndim)))


SPATIAL = (3, 4, 5)
RULES = {
    "conv": Rule("kernel", _conv_to_flax, _conv_to_torch, SPATIAL),
    "conv_transpose": Rule("kernel", _conv_transpose_to_flax, _conv_transpose_to_torch, SPATIAL),
    "linear": Rule("kernel", _transposed, _transposed, (2,)),
    "transposed_linear": Rule("kernel", _same, _same, (2,)),
    "embedding": Rule("embedding", _same, _same, (2,)),
    "norm": Rule("scale", _same, _same),
    "unchanged": Rule("weight", _same, _same),
}


def rule_of(name: str, kind: Kind) -> Rule:
    """The rule of a kind, for the module or array of this name.

    Raises:
      ValueError: if there is no such kind.
    """
    if isinstance(kind, Flattened | Unflattened):
        last, first = _channels_last(name, kind.shape), _channels_first(name, kind.shape)
        if isinstance(kind, Flattened):
            return Rule("kernel", lambda w: last(w).T, lambda k: first(k.T), (2,))
        return Rule("kernel", lambda w: last(w.T), lambda k: first(k).T, (2,), last, first)
    if not isinstance(kind, str) or kind not in RULES:
        raise ValueError(
            f"kernels: {name!r} should be of one of the kinds {', '.join(map(repr, RULES))}, "
            f"Flattened(channels, height, width), Unflattened(channels, height, width) and None, "
            f"but is {kind!r}"
        )
    return RULES[kind]


def _channels_last(name: str, shape: tuple[int, ...]) -> Map:
    """Of what has the entries of (C, *space) along its last axis: those of (*space, C)."""

    def to_flax(value: Any) -> Any:
        _check_size(name, value, shape)
        before = value.shape[:-1]
        return np.moveaxis(value.reshape(*before, *shape), len(before), -1).reshape(value.shape)

    return to_flax


def _channels_first(name: str, shape: tuple[int, ...]) -> Map:
    """The inverse of `_channels_last`."""

    def to_torch(value: Any) -> Any:
        _check_size(name, value, shape)
        before, (channels, *space) = value.shape[:-1], shape
        entries = value.reshape(*before, *space, channels)
        return np.moveaxis(entries, -1, len(before)).reshape(value.shape)

    return to_torch


def _check_shape(function: str, shape: tuple[Any, ...]) -> None:
    whole = all(isinstance(n, int | np.integer) and not isinstance(n, bool) for n in shape)
    if len(shape) < 2 or not whole or min(shape) < 1:
        raise ValueError(
            f"{function}: shape should be the number of channels and the sizes in space, but is "
            f"{shape}; write {function}(channels, height, width)"
        )


def _check_size(name: str, value: Any, shape: tuple[int, ...]) -> None:
    if value.shape[-1] != math.prod(shape):
        raise ValueError(
            f"kernels: {name!r} should have an axis of {math.prod(shape)} features, because the "
            f"shape that was given is {shape}, but has {value.shape[-1]}; write the "
            f"channels first, and then the sizes in space"
        )
