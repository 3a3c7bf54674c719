"""Reorders the axes of weights that do not belong to norms, from PyTorch to Flax and back.

| kind | `weight` in PyTorch | in Flax |
|---|---|---|
| "conv", also grouped or depthwise | (O, I / groups, *space) | `kernel`, (*space, I / groups, O) |
| "conv_transpose" | (I, O, *space) | `kernel`, (*space, I, O), reversed along space |
| "linear" | (O, I) | `kernel`, (I, O) |
| "transposed_linear" | (I, O) | `kernel`, (I, O) |
| "embedding" | (V, D) | `embedding`, (V, D) |
| Flattened(C, *space) | (O, C * space) | `kernel`, (space * C, O) |
| Unflattened(C, *space) | (C * space, I) | `kernel`, (I, space * C); the bias is reordered too |
| "norm" | any | `scale`, unchanged |
| "unchanged" | any | `weight`, unchanged |

Linen and NNX have the same layouts. The spatial axes of "conv_transpose" are reversed because
PyTorch's transposed convolution is the gradient of a convolution, and Flax's, with
`transpose_kernel=False`, is a convolution of the dilated input. With `transpose_kernel=True`, Flax
itself reverses the spatial axes and exchanges I and O, so its kernel is (*space, O, I), which is
the result of "conv" for (I, O, *space).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


@dataclasses.dataclass(frozen=True, init=False)
class _Shape:
    """The number of channels and the spatial sizes of one sample, in PyTorch's order."""

    shape: tuple[int, ...]

    def __init__(self, *shape: int) -> None:
        _check_shape(type(self).__name__, shape)
        object.__setattr__(self, "shape", tuple(map(int, shape)))

    def __repr__(self) -> str:
        return f"{type(self).__name__}{self.shape}"


class Flattened(_Shape):
    """The kind of a Linear after a flatten, whose inputs are reordered for channels last.

    PyTorch flattens `(C, *space)`, and a model with channels last flattens `(*space, C)`. The
    inputs of the Linear are reordered accordingly.

    Args:
      *shape: the shape that PyTorch flattens, without the batch axis: channels, then spatial sizes.

    Raises:
      ValueError: if the sizes are not positive whole numbers, or there are fewer than two.

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
    """The kind of a Linear before an unflatten, whose outputs are reordered for channels last.

    Use it for decoders, whose first Linear computes all entries of `(C, *space)`. The bias is
    reordered too.

    Args:
      *shape: the unflattened shape in PyTorch, without the batch axis: channels, then space.

    Raises:
      ValueError: if the sizes are not positive whole numbers, or there are fewer than two.

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

Transformation = Callable[[Any], Any]


def _same(value: Any) -> Any:
    return value


def _transposed(value: Any) -> Any:
    return value.T


class Rule(NamedTuple):
    """The conversions of a weight and a bias to Flax and back.

    Attributes:
      leaf: the name of the weight in Flax.
      to_flax: converts the weight from PyTorch.
      to_torch: the inverse of to_flax.
      ndims: the numbers of axes that the weight may have; None allows any.
      bias_to_flax: converts the bias from PyTorch.
      bias_to_torch: the inverse of bias_to_flax.
    """

    leaf: str
    to_flax: Transformation
    to_torch: Transformation
    ndims: tuple[int, ...] | None = None
    bias_to_flax: Transformation = _same
    bias_to_torch: Transformation = _same


def _conv_to_flax(weight: Any) -> Any:
    return np.moveaxis(weight, (0, 1), (-1, -2))


def _conv_to_torch(kernel: Any) -> Any:
    return np.moveaxis(kernel, (-1, -2), (0, 1))


def _conv_transpose_to_flax(weight: Any) -> Any:
    flipped = np.flip(weight, tuple(range(2, weight.ndim)))
    return np.moveaxis(flipped, (0, 1), (-2, -1))


def _conv_transpose_to_torch(kernel: Any) -> Any:
    weight = np.moveaxis(kernel, (-2, -1), (0, 1))
    return np.flip(weight, tuple(range(2, weight.ndim)))


CONV_NDIMS = (3, 4, 5)
RULES = {
    "conv": Rule("kernel", _conv_to_flax, _conv_to_torch, CONV_NDIMS),
    "conv_transpose": Rule("kernel", _conv_transpose_to_flax, _conv_transpose_to_torch, CONV_NDIMS),
    "linear": Rule("kernel", _transposed, _transposed, (2,)),
    "transposed_linear": Rule("kernel", _same, _same, (2,)),
    "embedding": Rule("embedding", _same, _same, (2,)),
    "norm": Rule("scale", _same, _same),
    "unchanged": Rule("weight", _same, _same),
}


def rule_of(name: str, kind: Kind) -> Rule:
    """Returns the rule of a kind, for the module or array of this name.

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


def _channels_last(name: str, shape: tuple[int, ...]) -> Transformation:
    """Reorders the last axis from the entries of (C, *space) to those of (*space, C)."""

    def to_flax(value: Any) -> Any:
        _check_size(name, value, shape)
        before = value.shape[:-1]
        return np.moveaxis(value.reshape(*before, *shape), len(before), -1).reshape(value.shape)

    return to_flax


def _channels_first(name: str, shape: tuple[int, ...]) -> Transformation:
    """Returns the inverse of `_channels_last`."""

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
            f"{function}: shape should be the number of channels and the spatial sizes, but is "
            f"{shape}; write {function}(channels, height, width)"
        )


def _check_size(name: str, value: Any, shape: tuple[int, ...]) -> None:
    if value.shape[-1] != math.prod(shape):
        raise ValueError(
            f"kernels: {name!r} should have an axis of {math.prod(shape)} features, because the "
            f"shape that was given is {shape}, but has {value.shape[-1]}; write the "
            f"channels first, and then the spatial sizes"
        )
