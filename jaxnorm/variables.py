"""The types of parameters and running statistics, their initial values, and their dtype."""

from jaxnorm._core.variables import Affine as Affine
from jaxnorm._core.variables import BatchStats as BatchStats
from jaxnorm._core.variables import init_batch_stats as init_batch_stats
from jaxnorm._core.variables import init_params as init_params
from jaxnorm._core.variables import statistics_dtype as statistics_dtype
