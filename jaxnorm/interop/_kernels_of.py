"""Finds the kinds of a PyTorch model's weights from the classes of its modules."""

import math
import warnings
from collections.abc import Mapping
from typing import Any

from jaxnorm.interop._kernels import Kernels
from jaxnorm.interop._layouts import Kind
from jaxnorm.interop._torch_modules import class_names, is_uninitialized, named_modules, own_arrays
from jaxnorm.interop._torch_norms import norm_row

# The kind by the name of the class or of a base class.
KINDS: dict[str, str] = {
    **dict.fromkeys(("Conv1d", "Conv2d", "Conv3d"), "conv"),
    **dict.fromkeys((f"ConvTranspose{n}d" for n in (1, 2, 3)), "conv_transpose"),
    "Linear": "linear",
    **dict.fromkeys(("Embedding", "EmbeddingBag"), "embedding"),
    "Conv1D": "transposed_linear",  # of Hugging Face's transformers
    "Bilinear": "unchanged",  # Flax has none
}


def kernels_of(
    module: Any,
    *,
    kinds: Mapping[str, Kind] | None = None,
    names: Mapping[str, str] | None = None,
) -> Kernels:
    """Creates a `convert` for `from_torch` from the classes of a PyTorch model's modules.

    The function recognizes convolutions, transposed convolutions, Linear, Embedding, Conv1D of
    Hugging Face's GPT-2, subclasses of these, and norms over several axes. Specify in `kinds` what
    the classes do not show: a Linear after a flatten (there is a warning if this seems likely),
    modules of other classes, and shared weights. The arrays of attention and of recurrent cells,
    which are not named `weight`, do not change.

    Args:
      module: a torch.nn.Module.
      kinds: as for `kernels`, by names in PyTorch; they take precedence over the classes.
      names: the same map as for `from_torch`, if it is given there.

    Returns:
      A `convert` for `from_torch`; its `inverse` is the `convert` for `to_torch`.

    Raises:
      ValueError: if a module is not initialized, or is a transposed convolution with groups; if
        `kinds` lacks modules that share a weight, or a module of an unknown class whose weight has
        several axes; if `kinds` contains a name that is not a module of the model. The errors name
        the modules.

    Example:
      >>> import torch
      >>> from jaxnorm import interop
      >>> model = torch.nn.Sequential(
      ...     torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.ConvTranspose2d(8, 3, 3))
      >>> convert = interop.kernels_of(model)
      >>> print(dict(convert.kinds))
      {'0': 'conv', '2': 'conv_transpose'}
      >>> variables = interop.from_torch(model.state_dict(), convert=convert)
      >>> variables["params"]["2"]["kernel"].shape
      (3, 3, 8, 3)

    References:
      torch.nn.Module.named_modules, PyTorch 2.13; flax.linen.ConvTranspose, flax 0.12.
    """
    modules = dict(named_modules("kernels_of", module))
    given = dict(kinds or {})
    absent = sorted(given.keys() - modules.keys())
    if absent:
        raise ValueError(
            f"kernels_of: kinds should name modules of the model, but it has no {absent}; it has "
            f"{sorted(name for name in modules if name)}"
        )
    kernels = Kernels(given, names or {})
    for name, kind in given.items():
        if kind is not None and kind != "unchanged":
            _check(name, modules[name], own_arrays(modules[name]))
    rest = {name: m for name, m in modules.items() if name not in given}
    found = {name: kind for name, m in rest.items() if (kind := _kind(name, m)) is not None}
    _check_shared(modules, {**found, **given}, given)
    _warn_of_flattened(modules, given)
    return Kernels({**found, **kernels.kinds}, kernels.names)


def _kind(name: str, module: Any) -> Kind:
    """Returns the kind of a module by its class; None if it has no weight to convert."""
    arrays = own_arrays(module)
    axes = getattr(arrays.get("weight"), "ndim", 0)
    if norm_row(name, module) is not None:
        return "norm" if axes > 1 else None
    kind = next((KINDS[c] for c in class_names(module) if c in KINDS), None)
    if kind is None:
        if axes > 1:
            raise ValueError(
                f"kernels_of: {name!r} should be of a known class, because its weight has "
                f"{axes} axes, but is a {type(module).__name__}; write kinds={{{name!r}: ...}} "
                f"with 'linear', 'conv', 'unchanged' or another kind"
            )
        return None
    if not arrays and not hasattr(module, "parametrizations"):
        return None  # another class of the same name, which contains modules
    _check(name, module, arrays)
    return kind


def _check(name: str, module: Any, arrays: dict[str, Any]) -> None:
    """Checks that the module has a weight, and that Flax has such a layer."""
    if "weight" not in arrays:
        raise ValueError(
            f"kernels_of: {name!r} should have a parameter weight, but it is computed from others; "
            f"write torch.nn.utils.parametrize.remove_parametrizations(module, 'weight') or "
            f"torch.nn.utils.remove_weight_norm(module) first"
        )
    if is_uninitialized(arrays["weight"]):
        raise ValueError(
            f"kernels_of: {name!r} should be initialized, but is lazy; call the model on a batch "
            f"first"
        )
    if any("ConvTranspose" in c for c in class_names(module)) and module.groups > 1:
        raise ValueError(
            f"kernels_of: {name!r} should have one group, because Flax's ConvTranspose has no "
            f"groups, but has {module.groups}; write kinds={{{name!r}: 'unchanged'}} and a custom "
            f"layer"
        )


def _check_shared(
    modules: Mapping[str, Any], kinds: Mapping[str, Kind], given: Mapping[str, Kind]
) -> None:
    """Raises if weights are shared: each would become two arrays, which differ after training."""
    first_names: dict[int, str] = {}
    shared = {}
    for name, kind in kinds.items():
        weight = own_arrays(modules[name]).get("weight")
        if weight is None or kind is None:
            continue
        other = first_names.setdefault(id(weight), name)
        if other != name and not {name, other} <= given.keys():
            shared[name] = other
    if shared:
        text = ", ".join(f"{name!r} has that of {other!r}" for name, other in shared.items())
        raise ValueError(
            f"kernels_of: the modules should not share weights, because each weight becomes a "
            f"separate array, but {text}; write kinds={dict.fromkeys(shared)!r} to leave them "
            f"out if the new model shares them too, or specify the kinds of both modules"
        )


def _warn_of_flattened(modules: Mapping[str, Any], given: Mapping[str, Kind]) -> None:
    """Warns if the first Linear after a convolution has several inputs for each channel."""
    convolution = None
    for name, m in modules.items():
        classes = class_names(m)
        if hasattr(m, "out_channels"):
            convolution = name
        elif "Linear" in classes and hasattr(m, "in_features") and convolution is not None:
            previous, convolution = convolution, None
            channels = modules[previous].out_channels
            entries, remainder = divmod(m.in_features, channels)
            if name in given or remainder or entries < 2:
                continue
            width = math.isqrt(entries)
            space = f"{width}, {width}" if width * width == entries else "height, width"
            warnings.warn(
                f"kernels_of: {name!r} has {m.in_features} inputs, {entries} for each of the "
                f"{channels} channels of {previous!r}, as if these were flattened; write "
                f"kinds={{{name!r}: Flattened({channels}, {space})}}, with the shape before the "
                f"flatten, or kinds={{{name!r}: 'linear'}} if there is no flatten",
                stacklevel=3,
            )
