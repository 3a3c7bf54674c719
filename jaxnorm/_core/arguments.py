"""Checks arguments that are not arrays: numbers, bools, dtypes and axes.

All checks run at trace time. In each, `function` is the name of the public function, with which
errors begin, and `name` is that of the argument that is checked; all raise a ValueError.
"""

import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Shape = tuple[int, ...]


def number(
    function: str, name: str, value: Any, least: float = -math.inf, most: float = math.inf
) -> Any:
    """Checks a real number, or an array of shape (); returns a float, or a traced float array.

    A traced value is not checked; any other value must be finite and within the bounds.

    Args:
      function: the name of the public function.
      name: the name of the argument.
      value: what was given for it.
      least: the least number that is accepted.
      most: the largest number that is accepted.
    """
    kinds = (int, float, np.number, np.ndarray, jax.Array)
    if isinstance(value, kinds) and not isinstance(value, bool) and jnp.ndim(value) == 0:
        given: Any = value if hasattr(value, "dtype") else np.asarray(value)
        real = any(jnp.issubdtype(given.dtype, kind) for kind in (jnp.floating, jnp.integer))
        if real and isinstance(given, jax.core.Tracer):
            return given.astype(float)
        if real and math.isfinite(float(given)) and least <= float(given) <= most:
            return float(given)
    found = repr(value)
    if isinstance(value, np.ndarray | jax.Array):
        found = f"an array of shape {value.shape} and dtype {value.dtype}"
    if most < math.inf:
        wanted = f"a number between {least:g} and {most:g}"
    else:
        wanted = "a finite number" + (f" of at least {least:g}" if least > -math.inf else "")
    raise ValueError(f"{function}: {name} should be {wanted}, but is {found}")


def positive_int(function: str, name: str, value: Any, why: str) -> int:
    """Checks a positive Python or NumPy integer.

    Args:
      function: the name of the public function.
      name: the name of the argument.
      value: what was given for it.
      why: the reason, which the error gives.
    """
    try:
        if not isinstance(value, bool | np.bool_) and operator.index(value) >= 1:
            return operator.index(value)
    except TypeError:
        pass
    raise ValueError(
        f"{function}: {name} should be a positive int, because {why}, but is {value!r}"
    )


def boolean(function: str, name: str, value: Any) -> bool:
    """Checks a Python or NumPy bool, which has to be known at trace time.

    Args:
      function: the name of the public function.
      name: the name of the argument.
      value: what was given for it.
    """
    if isinstance(value, bool | np.bool_):
        return bool(value)
    raise ValueError(
        f"{function}: {name} should be a Python bool, because it chooses which program is "
        f"compiled, but is {_described(value)}; under jit, mark it static [not-a-python-bool]"
    )


def float_dtype(function: str, name: str, dtype: Any) -> Any:
    """Checks a float dtype, or None.

    Args:
      function: the name of the public function.
      name: the name of the argument.
      dtype: what was given for it.
    """
    try:
        if dtype is None or jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
            return dtype if dtype is None else jnp.dtype(dtype)
    except TypeError:
        pass
    raise ValueError(
        f"{function}: {name} should be a float dtype, such as jnp.bfloat16, but is {dtype!r}"
    )


def _described(value: Any) -> str:
    """Describes a value, or the type, dtype and shape of an array."""
    if isinstance(value, jax.Array | np.ndarray):
        return f"{type(value).__name__} of dtype {value.dtype} and shape {value.shape}"
    return f"{value!r} of type {type(value).__name__}"


def channels(function: str, num_features: Any) -> Shape:
    """Checks the number of channels, or the shape of x over the channel axes; returns a shape."""
    try:
        sizes = num_features if isinstance(num_features, Sequence) else (num_features,)
        found = tuple(operator.index(n) for n in sizes)
        if min(found, default=0) >= 0 and not any(isinstance(n, bool | np.bool_) for n in sizes):
            return found
    except TypeError:
        pass
    raise ValueError(
        f"{function}: num_features should be an int of at least 0, or a tuple of them, because it "
        f"is the number of channels, but is {num_features!r}"
    )


def axes(function: str, name: str, axis: int | Sequence[int], ndim: int) -> Shape:
    """Checks axes; returns them as non-negative integers, in the given order.

    Args:
      function: the name of the public function.
      name: the name of the argument.
      axis: the axis or axes, which may be negative.
      ndim: the rank of x.
    """
    try:
        given = tuple(axis) if isinstance(axis, Sequence) else (axis,)
        found = tuple(operator.index(a) for a in given)
    except TypeError:
        raise ValueError(
            f"{function}: {name} should be an int or a tuple of ints, but is {axis!r}"
        ) from None
    if not all(-ndim <= a < ndim for a in found):
        raise ValueError(
            f"{function}: {name} should lie between {-ndim} and {ndim - 1}, because x has {ndim} "
            f"axes, but is {axis}"
        )
    if any(isinstance(a, bool | np.bool_) for a in given):
        raise ValueError(f"{function}: {name} should be an int or a tuple of ints, but is {axis!r}")
    found = tuple(a % ndim for a in found)
    if len(set(found)) != len(found):
        raise ValueError(f"{function}: {name} should name each axis once, but is {axis}")
    return found


def features(function: str, name: str, axis: int | Sequence[int], ndim: int) -> Shape:
    """Checks the axes to reduce over, of which there is at least one.

    Args:
      function: the name of the public function.
      name: the name of the argument.
      axis: the axis or axes, which may be negative.
      ndim: the rank of x.
    """
    found = axes(function, name, axis, ndim)
    if not found:
        raise ValueError(
            f"{function}: {name} should name at least one axis, because each entry alone would be "
            f"its own mean, but is {axis!r}"
        )
    return found


def limits(function: str, r_max: Any, d_max: Any) -> None:
    """Checks the limits of batch renorm.

    A function of the count is called later. Its result must be a number, but it is not compared
    with the bounds.

    Args:
      function: the name of the public function.
      r_max: a number of at least 1, or a function of the count.
      d_max: a number of at least 0, or a function of the count.
    """
    for name, value, least in (("r_max", r_max, 1), ("d_max", d_max, 0)):
        if not callable(value):
            number(function, name, value, least=least)
