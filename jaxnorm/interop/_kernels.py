"""Creates the `convert` of `from_torch` and `to_torch` from the kinds of a model's modules."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from jaxnorm.interop._layouts import Kind, Rule, rule_of
from jaxnorm.interop._leaves import Convert
from jaxnorm.interop._trees import inverted, join, renamed, split

WEIGHT_NAMES = ("weight", "kernel", "embedding")


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The result of `kernels` and `kernels_of`: a `convert` for `from_torch`, and its inverse.

    Attributes:
      kinds: the kinds of modules that do not use the default, by the module's name in PyTorch.
      names: maps names of modules in PyTorch to the new names, as given to `from_torch`.

    Example:
      >>> import numpy as np
      >>> from jaxnorm import interop
      >>> convert = interop.kernels({"embed": "embedding"})
      >>> convert("embed.weight", np.ones((5, 2)))[0], convert("fc.weight", np.ones((5, 2)))[0]
      ('embed.embedding', 'fc.kernel')
      >>> convert.inverse("embed.embedding", np.ones((5, 2)))[0]
      'embed.weight'

    References:
      torch.nn.Conv2d, PyTorch 2.13; flax.linen.Conv, flax 0.12.
    """

    kinds: Mapping[str, Kind]
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks the kinds, and that their keys are PyTorch's names."""
        torch_names = inverted("kernels", self.names)
        for module, kind in self.kinds.items():
            _check_key(module, self.names, torch_names)
            if kind is not None:
                rule_of(module, kind)
        for field in ("kinds", "names"):  # copies, because later changes would not be checked
            object.__setattr__(self, field, MappingProxyType(dict(getattr(self, field))))

    def __call__(self, name: str, value: Any) -> tuple[str, Any] | None:
        """Converts one array from PyTorch's layout to Flax's, given its new name."""
        module, leaf = split(name)
        torch_module = renamed(module, inverted("kernels", self.names))
        _check_array(name, value)
        kind = self._kind(torch_module, value)
        if kind is None or kind == "unchanged":
            return None if kind is None else (name, value)
        rule = rule_of(name, kind)
        if leaf == "weight":
            _check_axes(name, value, kind, rule)
            return join(module, rule.leaf), rule.to_flax(value)
        if leaf in WEIGHT_NAMES:
            raise ValueError(_ambiguous(name, torch_module, leaf, "weight"))
        return name, rule.bias_to_flax(value) if leaf == "bias" else value

    @property
    def inverse(self) -> Convert:
        """The `convert` for `to_torch`, which is given names in PyTorch. It restores every bit."""
        return self._to_torch

    def _to_torch(self, name: str, value: Any) -> tuple[str, Any] | None:
        module, leaf = split(name)
        _check_array(name, value)
        kind = self._kind(module, value)
        if leaf == "embedding" and value.ndim == 2 and module not in self.kinds:
            kind = "embedding"  # known from the name of the array
        if kind is None or kind == "unchanged":
            return None if kind is None else (name, value)
        rule = rule_of(name, kind)
        if leaf == rule.leaf:
            _check_axes(name, value, kind, rule)
            return join(module, "weight"), rule.to_torch(value)
        if leaf in WEIGHT_NAMES:
            raise ValueError(_ambiguous(name, module, leaf, rule.leaf))
        return name, rule.bias_to_torch(value) if leaf == "bias" else value

    def _kind(self, module: str, value: Any) -> Kind:
        """Returns the kind that the user specified, or else the default for the number of axes."""
        if module in self.kinds:
            return self.kinds[module]
        return "unchanged" if value.ndim < 2 else "linear" if value.ndim == 2 else "conv"


def kernels(
    kinds: Mapping[str, Kind] | None = None, *, names: Mapping[str, str] | None = None
) -> Kernels:
    r"""Creates a `convert` for `from_torch`: weights become Flax's kernels and embeddings.

    An array named `weight` becomes `kernel`, with its axes in the order of Flax's layers (the same
    in Linen and NNX). `bias` and all other arrays do not change. A state dict does not say what
    type of layer a weight belongs to. By default, a weight with 2 axes belongs to a Linear and one
    with 3 to 5 axes to a convolution; weights with one axis or none do not change. Specify all
    other kinds in `kinds`:

    - "conv_transpose": a ConvTranspose of Flax with `transpose_kernel=False`, the default. With
      `transpose_kernel=True`, use "conv". Flax has no groups in transposed convolutions.
    - "embedding": the weight becomes `embedding`, for nn.Embed.
    - "transposed_linear": the weight is (I, O) in PyTorch, as in Conv1D of Hugging Face's GPT-2.
    - `Flattened(C, H, W)`: a Linear after a flatten of (C, H, W).
    - `Unflattened(C, H, W)`: a Linear whose outputs are unflattened to (C, H, W).
    - "norm": a layer norm over several axes, which `from_torch` does not find by default.
    - "unchanged": neither the names nor the arrays change.
    - None: the module's arrays are left out, for a weight that is shared with another module. The
      inverse cannot restore it.

    `kernels_of` finds the kinds of a PyTorch model.

    Args:
      kinds: the kinds of modules, by their names in PyTorch, such as {"encoder.up":
        "conv_transpose"}; "linear" and "conv" are allowed too.
      names: the same map as for `from_torch`, if it is given there.

    Returns:
      A `convert` for `from_torch`; its `inverse` is the `convert` for `to_torch`.

    Raises:
      ValueError: if a kind does not exist, or a key is not a name in PyTorch. The `convert` raises
        it if an array does not have the number of axes of its kind, or if its `inverse` could not
        restore the name of the array.

    Example:
      >>> import numpy as np
      >>> from jaxnorm import interop
      >>> state_dict = {"conv.weight": np.ones((8, 3, 5, 5)), "embed.weight": np.ones((100, 16)),
      ...               "head.weight": np.ones((10, 8 * 4 * 4))}
      >>> convert = interop.kernels(
      ...     {"embed": "embedding", "head": interop.Flattened(8, 4, 4)}, names={"conv": "Conv_0"})
      >>> variables = interop.from_torch(state_dict, names={"conv": "Conv_0"}, convert=convert)
      >>> variables["params"]["Conv_0"]["kernel"].shape
      (5, 5, 3, 8)
      >>> variables["params"]["embed"]["embedding"].shape
      (100, 16)
      >>> back = interop.to_torch(variables, names={"conv": "Conv_0"}, convert=convert.inverse)
      >>> sorted(back)
      ['conv.weight', 'embed.weight', 'head.weight']

    References:
      torch.nn.ConvTranspose2d, PyTorch 2.13; flax.linen.ConvTranspose, flax 0.12.
    """
    return Kernels(kinds or {}, names or {})


# ---- Checks ----


def check_names_of_kernels(
    function: str, convert: Convert | None, names: Mapping[str, str] | None
) -> None:
    """Checks that `Kernels` with kinds were given the same map, by which they find the kinds."""
    convert = getattr(convert, "__self__", convert)  # an inverse is a bound method
    if isinstance(convert, Kernels) and convert.kinds and dict(convert.names) != dict(names or {}):
        raise ValueError(
            f"{function}: names should be the map that kernels was given, because the kinds are "
            f"found by it, but is {dict(names or {})!r}, and not {dict(convert.names)!r}; "
            f"write kernels(..., names=names) and {function}(..., names=names)"
        )


def _check_key(module: Any, names: Mapping[str, str], torch_names: Mapping[str, str]) -> None:
    if not isinstance(module, str) or split(module)[1] in ("weight", "bias"):
        raise ValueError(
            f"kernels: the keys of kinds should be names of modules, but one is {module!r}; write "
            f"'encoder.up' for 'encoder.up.weight'"
        )
    torch_module = renamed(module, torch_names)
    if torch_module != module and renamed(module, names) == module:
        raise ValueError(
            f"kernels: the keys of kinds should be names in PyTorch, but {module!r} is the new "
            f"name of {torch_module!r} in names; write {torch_module!r}"
        )


def _check_array(name: str, value: Any) -> None:
    if not isinstance(value, np.ndarray | jax.Array) or value.dtype == object:
        found = getattr(value, "dtype", type(value).__name__)
        raise ValueError(
            f"kernels: {name!r} should be an array of numbers, but is {found}; give from_torch "
            f"only the state dict of a checkpoint"
        )


def _check_axes(name: str, value: Any, kind: Kind, rule: Rule) -> None:
    if rule.ndims and value.ndim not in rule.ndims:
        expected = " to ".join(str(n) for n in sorted({rule.ndims[0], rule.ndims[-1]}))
        raise ValueError(
            f"kernels: {name!r} should have {expected} axes, because the kind of its module is "
            f"{kind!r}, but has shape {value.shape}; write kinds= with the kind of the module, or "
            f"with 'unchanged'"
        )


def _ambiguous(name: str, module: str, leaf: str, expected: str) -> str:
    return (
        f"kernels: {name!r} should be called {expected!r}, because {leaf!r} could not be restored "
        f"by the inverse, but is not; write kernels({{{module!r}: 'unchanged'}}) to leave the "
        f"module's arrays and their names as they are"
    )
