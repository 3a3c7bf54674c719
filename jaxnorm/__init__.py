"""Normalization layers for JAX: pure functions over params and batch_stats."""

import typing as _typing
from importlib import import_module as _import_module

from jaxnorm._core.moments import Moments as Moments
from jaxnorm._core.moments import merge_moments as merge_moments
from jaxnorm._core.moments import moments as moments
from jaxnorm._core.variables import Affine as Affine
from jaxnorm._core.variables import BatchStats as BatchStats
from jaxnorm._core.variables import init_batch_stats as init_batch_stats
from jaxnorm._core.variables import init_params as init_params
from jaxnorm._stats.accumulate import begin_accumulation as begin_accumulation
from jaxnorm._stats.accumulate import end_accumulation as end_accumulation
from jaxnorm._stats.fold import fold_into as fold_into
from jaxnorm._stats.fold import fold_scale_shift as fold_scale_shift
from jaxnorm._stats.fold import fold_variables as fold_variables
from jaxnorm._stats.recalibrate import recalibrate as recalibrate
from jaxnorm._stats.update import merge_batch_stats as merge_batch_stats
from jaxnorm._stats.update import update_batch_stats as update_batch_stats
from jaxnorm._stats.validation import Finding as Finding
from jaxnorm._stats.validation import check_batch_stats as check_batch_stats
from jaxnorm.functional import batch_norm as batch_norm
from jaxnorm.functional import batch_renorm as batch_renorm
from jaxnorm.functional import group_norm as group_norm
from jaxnorm.functional import instance_norm as instance_norm
from jaxnorm.functional import layer_norm as layer_norm
from jaxnorm.functional import rms_norm as rms_norm

# These are imported when they are first used: the functions need neither Flax nor what the others
# need.
_MODULES = ("inspect", "interop", "linen", "nnx", "onnx")

if _typing.TYPE_CHECKING:
    from jaxnorm import inspect as inspect
    from jaxnorm import interop as interop
    from jaxnorm import linen as linen
    from jaxnorm import nnx as nnx
    from jaxnorm import onnx as onnx
else:  # with __getattr__, type checkers would assume that any attribute exists

    def __getattr__(name):
        if name in _MODULES:
            return _import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        # Tools such as inspect.getmembers get every attribute, and onnx needs an extra.
        return sorted({*globals(), *_MODULES} - ({"onnx"} - globals().keys()))
