"""Recognizes PyTorch modules as norms, and finds the arguments of the corresponding layers."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from jaxnorm.interop._torch_modules import class_names, is_uninitialized, own_arrays

UNKNOWN = "unknown"


@dataclasses.dataclass(frozen=True)
class NormRow:
    """A norm of a PyTorch model, and the layer of jaxnorm that computes the same.

    Attributes:
      name: the dotted name of the module in PyTorch, the prefix of its keys in the state dict.
      torch_class: the name of its class.
      layer: the name of the layer in `jaxnorm.linen` and `jaxnorm.nnx`, or "unknown".
      arguments: epsilon, and the arguments of the layer that differ from the defaults. NNX also
        needs `num_features` and `rngs`.
      epsilon: the number that PyTorch adds to the variance; None if the module does not define it.
      momentum: weight of the new batch in the running statistics, the same in PyTorch and jaxnorm.
        None for a cumulative average, and for norms that do not update running statistics.
      tracks: whether the norm has running statistics, which it uses in evaluation.
      note: information that the arguments do not contain.

    Example:
      >>> from jaxnorm import interop
      >>> row = interop.NormRow("bn1", "BatchNorm2d", "BatchNorm", {"epsilon": 0.001}, 0.001)
      >>> row.code
      'BatchNorm(epsilon=0.001)'

    References:
      torch.nn.BatchNorm2d, PyTorch 2.13.
    """

    name: str
    torch_class: str
    layer: str
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    epsilon: float | None = None
    momentum: float | None = None
    tracks: bool = False
    note: str = ""

    @property
    def code(self) -> str:
        """The call that creates the layer in Linen."""
        if self.layer == UNKNOWN:
            return UNKNOWN
        arguments = (f"{name}={value!r}" for name, value in self.arguments.items())
        return f"{self.layer}({', '.join(arguments)})"

    def with_note(self, note: str) -> "NormRow":
        """Returns the row with a further note, if it is not empty."""
        return dataclasses.replace(self, note="; ".join(filter(None, (self.note, note))))


def norm_row(name: str, module: Any) -> NormRow | None:
    """Returns the row of one module; None if it is not a norm."""
    for class_name in class_names(module):
        if class_name in OTHER_NORMS:
            return _unknown(name, module, OTHER_NORMS[class_name])
        if class_name in CLASSES:
            return _known(name, module, CLASSES[class_name])
    return _unknown(name, module) if _looks_like_a_norm(module) else None


def _known(name: str, module: Any, create: Callable[[str, Any], NormRow]) -> NormRow | None:
    """Returns the row of a module whose class has the name of a norm."""
    try:
        row = create(name, module)
    except AttributeError as error:  # another class of the same name
        if _contains_norms(module):
            return None
        return _unknown(name, module, str(error))
    others = sorted(own_arrays(module).keys() - ARRAYS_OF.get(row.layer, AFFINE))
    if others:
        return _unknown(name, module, f"also has {', '.join(others)}")
    return row.with_note(_lazy_note(module)).with_note(_forward_note(module))


def _unknown(name: str, module: Any, note: str = "") -> NormRow:
    epsilon = next((getattr(module, e) for e in EPSILONS if hasattr(module, e)), None)
    return NormRow(name, class_names(module)[0], UNKNOWN, epsilon=epsilon, note=note)


# ---- One function for each kind of norm ----


def _batch_norm(name: str, module: Any) -> NormRow:
    # In evaluation, PyTorch uses running statistics if there are any, whatever the attribute is.
    tracks = module.running_mean is not None
    updates = tracks and bool(module.track_running_stats)
    arguments = {"epsilon": _epsilon(module), **_affine(module)}
    if not tracks:
        arguments["track_running_stats"] = False
    elif not updates:
        arguments["update_stats"] = False
    else:
        arguments |= _momentum(module.momentum)
    momentum = module.momentum if updates else None
    return _row(name, module, "BatchNorm", arguments, momentum=momentum, tracks=tracks)


def _sync_batch_norm(name: str, module: Any) -> NormRow:
    row = _batch_norm(name, module)
    note = (
        "write the axis of your own shard_map or pmap for 'batch'; under jit alone leave axis_name "
        "out"
    )
    if getattr(module, "process_group", None) is not None:
        note += "; write the ranks of process_group as axis_index_groups"
    arguments = {**row.arguments, "axis_name": "batch"}
    return dataclasses.replace(row, arguments=arguments, note=note)


def _frozen_batch_norm(name: str, module: Any) -> NormRow:
    arguments = {"use_running_average": True, "epsilon": _epsilon(module), **_affine(module)}
    return _row(name, module, "BatchNorm", arguments, tracks=True)


def _instance_norm(name: str, module: Any) -> NormRow:
    tracks = bool(module.track_running_stats)
    arguments = {"epsilon": _epsilon(module), **_affine(module)}
    # For PyTorch's instance norm, None means 0, not a cumulative average.
    momentum = 0.0 if module.momentum is None else module.momentum
    if tracks:
        arguments |= {"track_running_stats": True, **_momentum(momentum)}
    return _row(
        name,
        module,
        "InstanceNorm",
        arguments,
        momentum=momentum if tracks else None,
        tracks=tracks,
    )


def _group_norm(name: str, module: Any) -> NormRow:
    arguments = {"num_groups": module.num_groups, "epsilon": _epsilon(module), **_affine(module)}
    return _row(name, module, "GroupNorm", arguments)


def _layer_norm(name: str, module: Any) -> NormRow:
    arguments = {"epsilon": _epsilon(module), **_affine(module), **_axes(module)}
    note = "its axes are in PyTorch's order" if len(_shape(module)) > 1 else ""
    return _row(name, module, "LayerNorm", arguments, note=note)


def _rms_norm(name: str, module: Any) -> NormRow:
    epsilon, note = _epsilon(module), ""
    if epsilon is None:
        # The precision of the dtype that PyTorch computes in: float32 for half precision too.
        double = str(getattr(getattr(module, "weight", None), "dtype", "")) == "torch.float64"
        epsilon = 2.0**-52 if double else 2.0**-23
        note = f"eps=None is the precision of {'float64' if double else 'float32'}"
    affine = {} if getattr(module, "weight", None) is not None else {"use_scale": False}
    arguments = {"epsilon": epsilon, **affine, **_axes(module)}
    return _row(name, module, "RMSNorm", arguments, note=note)


def _row(name: str, module: Any, layer: str, arguments: dict[str, Any], **others: Any) -> NormRow:
    epsilon = arguments["epsilon"]
    return NormRow(name, class_names(module)[0], layer, arguments, epsilon, **others)


# By the name of the class. The private names are the base classes of all of PyTorch's batch norms
# and instance norms; scripted modules only have the public names.
CLASSES: dict[str, Callable[[str, Any], NormRow]] = {
    "SyncBatchNorm": _sync_batch_norm,
    **dict.fromkeys(("_BatchNorm", *(f"BatchNorm{n}d" for n in (1, 2, 3))), _batch_norm),
    **dict.fromkeys(("_InstanceNorm", *(f"InstanceNorm{n}d" for n in (1, 2, 3))), _instance_norm),
    **dict.fromkeys(("FrozenBatchNorm2d", "FrozenBatchNorm3d"), _frozen_batch_norm),
    "GroupNorm": _group_norm,
    **dict.fromkeys(("LayerNorm", "LayerNorm2d", "FusedLayerNorm"), _layer_norm),
    **dict.fromkeys(("RMSNorm", "RmsNorm", "FusedRMSNorm"), _rms_norm),
}
# Classes of Hugging Face's transformers with the forward of LlamaRMSNorm or T5LayerNorm.
RMS_NORMS = (
    *("T5LayerNorm", "MT5LayerNorm", "UMT5LayerNorm", "LongT5LayerNorm", "Pix2StructLayerNorm"),
    *("LlamaRMSNorm", "MistralRMSNorm", "MixtralRMSNorm", "Phi3RMSNorm", "Qwen2RMSNorm"),
    *("Qwen2MoeRMSNorm", "Qwen3RMSNorm", "DeepseekV2RMSNorm", "DeepseekV3RMSNorm"),
    *("GraniteRMSNorm", "OlmoeRMSNorm"),
)
CLASSES |= dict.fromkeys(RMS_NORMS, _rms_norm)
# Norms whose names and parameters are similar, but which compute something else.
ONE_ADDED = "an RMSNorm that multiplies by 1 + weight: add 1 to the scale"
OTHER_NORMS = dict.fromkeys(("GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm"), ONE_ADDED)

# ---- Reading the attributes ----

EPSILONS = ("eps", "epsilon", "variance_epsilon")


def _epsilon(module: Any) -> Any:
    """Returns the epsilon of the module; raises AttributeError if it does not define one."""
    name = next((name for name in EPSILONS if hasattr(module, name)), "eps")
    return getattr(module, name)


def _affine(module: Any) -> dict[str, Any]:
    """Returns which of the parameters the layer should not have."""
    leaves = {"use_scale": "weight", "use_bias": "bias"}
    return {flag: False for flag, leaf in leaves.items() if getattr(module, leaf, None) is None}


def _momentum(momentum: float | None) -> dict[str, Any]:
    """Returns the momentum argument, or decay for values that jaxnorm's layers reject."""
    if momentum is None or not 0.5 < momentum < 1:
        return {} if momentum == 0.1 else {"momentum": momentum}
    return {"decay": round(1 - momentum, 12)}


def _shape(module: Any) -> tuple[int, ...]:
    """Returns the shape of the axes that a layer norm normalizes over."""
    shape = getattr(module, "normalized_shape", None)
    if shape is None:
        shape = module.weight.shape
    return (shape,) if isinstance(shape, int) else tuple(shape)


def _axes(module: Any) -> dict[str, Any]:
    """Returns the last axes, counted from the end."""
    axes = tuple(range(-len(_shape(module)), 0))
    return {} if axes == (-1,) else {"reduction_axes": axes, "feature_axes": axes}


# ---- Recognizing norms, and modules that look like norms ----

AFFINE = {"weight", "bias"}
TRACKED = AFFINE | {"running_mean", "running_var", "num_batches_tracked"}
ARRAYS_OF = {"BatchNorm": TRACKED, "InstanceNorm": TRACKED, "RMSNorm": {"weight"}}
# Norms of weights, such as those of torch.nn.utils.parametrizations.
WEIGHT_NORMS = re.compile(r"(weight|spectral)_?norm", re.IGNORECASE)
NORM_NAMES = re.compile(r"(?i:norm)|Abn|ABN|LRN")
# In these packages, the classes in CLASSES compute the norm of their name.
PACKAGES = ("torch", "torchvision", "transformers", "apex")


def _lazy_note(module: Any) -> str:
    lazy = any(is_uninitialized(array) for array in own_arrays(module).values())
    return "not initialized yet" if lazy else ""


def _forward_note(module: Any) -> str:
    """Returns a note if the forward is from another package, which may compute something else."""
    defined_in = getattr(getattr(type(module), "forward", None), "__module__", "torch")
    known = defined_in.partition(".")[0] in PACKAGES
    return "" if known else "has its own forward: compare the outputs"


def _looks_like_a_norm(module: Any) -> bool:
    """Returns whether the class or the buffers suggest a norm; not if it contains norms."""
    names = class_names(module)
    if any(WEIGHT_NORMS.search(name) for name in names):
        return False
    if "running_mean" in own_arrays(module):
        return True
    return any(NORM_NAMES.search(name) for name in names) and not _contains_norms(module)


def _contains_norms(module: Any) -> bool:
    inside = list(module.modules())[1:]
    return any(norm_row("", child) is not None for child in inside)
