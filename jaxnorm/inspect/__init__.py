"""Tools to inspect running statistics: numbers for loggers, and plots."""

from jaxnorm.inspect._numbers import drift as drift
from jaxnorm.inspect._numbers import flat as flat
from jaxnorm.inspect._numbers import scalars as scalars
from jaxnorm.inspect._plots import plot_drift as plot_drift
from jaxnorm.inspect._plots import plot_layers as plot_layers
