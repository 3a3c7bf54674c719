"""Converts the variables of whole models from and to PyTorch, Flax and NNX, and from Haiku.

The variables of a model are {"params": ..., "batch_stats": ...}, as in Linen. The conversions read
mappings of arrays, and import neither PyTorch nor Flax nor Haiku. Only `tensors`, `match` and files
of torch.save need PyTorch, and only `match` needs Flax.
"""

from jaxnorm.interop._describe import NormRows as NormRows
from jaxnorm.interop._describe import describe_torch as describe_torch
from jaxnorm.interop._flax import from_flax as from_flax
from jaxnorm.interop._flax import to_flax as to_flax
from jaxnorm.interop._from_torch import from_torch as from_torch
from jaxnorm.interop._haiku import from_haiku as from_haiku
from jaxnorm.interop._kernels import Kernels as Kernels
from jaxnorm.interop._kernels import kernels as kernels
from jaxnorm.interop._kernels_of import kernels_of as kernels_of
from jaxnorm.interop._layouts import Flattened as Flattened
from jaxnorm.interop._layouts import Unflattened as Unflattened
from jaxnorm.interop._match import Proposal as Proposal
from jaxnorm.interop._match import match as match
from jaxnorm.interop._match import match_variables as match_variables
from jaxnorm.interop._nnx import from_nnx as from_nnx
from jaxnorm.interop._nnx import to_nnx as to_nnx
from jaxnorm.interop._pairs import Pair as Pair
from jaxnorm.interop._to_torch import tensors as tensors
from jaxnorm.interop._to_torch import to_torch as to_torch
from jaxnorm.interop._torch_norms import NormRow as NormRow
