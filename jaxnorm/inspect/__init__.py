"""Tools to inspect running statistics: numbers for loggers, tables and plots."""

from jaxnorm.inspect._numbers import drift as drift
from jaxnorm.inspect._numbers import flat as flat
from jaxnorm.inspect._numbers import scalars as scalars
from jaxnorm.inspect._plots import plot_drift as plot_drift
from jaxnorm.inspect._plots import plot_layers as plot_layers
from jaxnorm.inspect._summary import NormSummary as NormSummary
from jaxnorm.inspect._summary import Summary as Summary
from jaxnorm.inspect._summary import summary as summary
