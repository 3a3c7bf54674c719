"""What is public? Normalization for JAX: pure functions over params and batch_stats."""

from jaxnorm._accumulation import begin_accumulation as begin_accumulation
from jaxnorm._accumulation import end_accumulation as end_accumulation
from jaxnorm._findings import Finding as Finding
from jaxnorm._findings import check_batch_stats as check_batch_stats
from jaxnorm._fold import fold_into as fold_into
from jaxnorm._fold import fold_scale_shift as fold_scale_shift
from jaxnorm._fold import fold_variables as fold_variables
from jaxnorm._moments import Moments as Moments
from jaxnorm._moments import merge_moments as merge_moments
from jaxnorm._moments import moments as moments
from jaxnorm._recalibrate import recalibrate as recalibrate
from jaxnorm._running import merge_batch_stats as merge_batch_stats
from jaxnorm._running import update_batch_stats as update_batch_stats
from jaxnorm.functional import batch_norm as batch_norm
from jaxnorm.functional import batch_renorm as batch_renorm
from jaxnorm.functional import group_norm as group_norm
from jaxnorm.functional import instance_norm as instance_norm
from jaxnorm.functional import layer_norm as layer_norm
from jaxnorm.functional import rms_norm as rms_norm
from jaxnorm.variables import Affine as Affine
from jaxnorm.variables import BatchStats as BatchStats
from jaxnorm.variables import init_batch_stats as init_batch_stats
from jaxnorm.variables import init_params as init_params
