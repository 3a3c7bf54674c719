"""Finds errors in the running statistics of a whole model, for example of a loaded checkpoint."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr

from jaxnorm._stats.trees import arrays, find, names

KEYS = ("mean", "var", "count")

Find = Callable[..., None]


class Finding(NamedTuple):
    """A problem with one leaf of a model's variables.

    Attributes:
      path: the path of the leaf, such as `['batch_stats']['BatchNorm_0']['var']`.
      problem: the problem and its consequence.

    Example:
      >>> import jaxnorm
      >>> print(jaxnorm.Finding("['bn']['count']", "is missing"))
      ['bn']['count'] is missing

    References:
      jax.tree_util.keystr, whose notation the paths have.
    """

    path: str
    problem: str

    def __str__(self) -> str:
        """Returns the path and the problem as a sentence."""
        return f"{self.path} {self.problem}"


def check_batch_stats(variables: Any, like: Any = None) -> list[Finding]:
    """Finds problems in a model's running statistics before they are used.

    Use this for a state that was restored, converted or merged. Checkpoint formats do not check
    everything: flax.serialization accepts arrays of any shape, and orbax casts to the dtypes of its
    target.

    Args:
      variables: {"params": ..., "batch_stats": ...}, one of the collections, the state of one norm,
        `nnx.state(model)`, a train state, or any other tree of states. The values must be concrete,
        so do not call this under jit. If a norm has a scale or a bias, their shapes are compared
        with those of the statistics.
      like: the same tree for a new model, or its `jax.eval_shape`, to compare with. Defaults to
        None, which skips the comparison.

    Returns:
      A list of findings. The function finds: no state at all; a missing key; a state with its
      initial values (count 0, mean 0 and variance 1), which evaluation would use unchanged; NaN or
      Inf; a negative variance or count; shapes that disagree; statistics in half precision, in
      which an average stalls, or in a dtype that is not a float dtype; a count that is not an
      integer; NaN or Inf in accumulated batches; and, given `like`, any difference in shape, dtype
      or structure.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxnorm
      >>> state = {"mean": jnp.array([0.5, jnp.nan]), "var": jnp.array([1.0, -1.0]),
      ...          "count": jnp.int32(3)}
      >>> for finding in jaxnorm.check_batch_stats({"batch_stats": {"bn": state}}):
      ...     print(finding)
      ['batch_stats']['bn']['mean'] is not finite in 1 of 2 channels
      ['batch_stats']['bn']['var'] is negative in 1 of 2 channels

    References:
      flax.serialization.from_bytes, flax 0.12; orbax.checkpoint, 0.12.
    """
    found = {keystr(path): (path, node) for path, node in find(variables, _is_like_state)}
    if not found:
        return [Finding("", "holds no running statistics: no dict with the keys 'mean' and 'var'")]
    params = {names(path): node for path, node in find(variables, _has_params)}
    findings: list[Finding] = []
    for where, (path, node) in found.items():
        beside = {**params.get(_in_params(names(path)), {}), **node}
        findings += _state(where, node, beside)
    if like is None:
        return findings
    expected = {keystr(path): node for path, node in find(like, _is_like_state)}
    return findings + _differences({where: node for where, (_, node) in found.items()}, expected)


def _is_like_state(node: Any) -> bool:
    """Returns whether this is a state, or a state in which a key is missing."""
    if arrays(node, ("mean", "var")):
        return True
    return bool(arrays(node, ("count",))) and {*KEYS, "accumulation"}.issuperset(node)


def _has_params(node: Any) -> bool:
    return bool(arrays(node, ("scale", "bias")))


def _in_params(path: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the path of the parameters of the norm whose state has this path."""
    if "batch_stats" not in path:
        return path
    i = path.index("batch_stats")
    return (*path[:i], "params", *path[i + 1 :])


def _state(path: str, node: Any, beside: Any) -> list[Finding]:
    """Returns the findings in one state; `beside` contains the parameters of the same norm."""
    findings = []

    def find(key: str, problem: str, below: str = "") -> None:
        findings.append(Finding(f"{path}[{key!r}]{below}", problem))

    leaves = {k: a if hasattr(a, "shape") else np.asarray(a) for k, a in arrays(node, KEYS).items()}
    for key in KEYS:
        if key not in leaves:
            find(key, "is missing")
    if leaves.keys() <= {"count"}:
        return findings
    shape = jnp.shape(leaves["mean"] if "mean" in leaves else leaves["var"])
    if "var" in leaves and jnp.shape(leaves["var"]) != shape:
        find("var", f"has shape {jnp.shape(leaves['var'])}, and the mean {shape}")
    for key, a in arrays(beside, ("scale", "bias")).items():
        if jnp.shape(a) != shape:
            find("mean", f"has shape {shape}, and the {key} {jnp.shape(a)}")
    for key in ("mean", "var"):
        if key in leaves:
            _values(key, np.asarray(leaves[key]), find)
    if "count" in leaves:
        _count(np.asarray(leaves["count"]), leaves, shape, find)
    if node.get("accumulation") is not None:
        _accumulation(node["accumulation"], find)
    return findings


def _accumulation(accumulation: Any, find: Find) -> None:
    """Reports errors in the start of an accumulation and in the moments since then."""
    for part, keys in (("start", KEYS), ("moments", ("count", "mean", "var"))):
        held = accumulation.get(part) if isinstance(accumulation, Mapping) else None
        found = arrays(held, keys)
        if found.keys() != set(keys):
            find("accumulation", f"should have {part!r} with {', '.join(keys)}; end it first")
            continue
        for key, a in found.items():
            if not np.all(np.isfinite(np.asarray(a, np.float64))):
                what = {
                    "start": "the next update would start from it",
                    "moments": "the update that these batches make skips those channels",
                }
                find("accumulation", f"is not finite: {what[part]}", f"[{part!r}][{key!r}]")


def _values(key: str, a: np.ndarray, find: Find) -> None:
    if not jnp.issubdtype(a.dtype, jnp.floating):
        find(key, f"has dtype {a.dtype}, and should have floats")
        return
    if jnp.finfo(a.dtype).bits < 32:
        find(key, f"has dtype {a.dtype}, in which a running average stalls; widen it to float32")
    a = a.astype(np.float64)
    for bad, what in ((~np.isfinite(a), "not finite"), (a < 0, "negative")):
        if np.any(bad) and (what == "not finite" or key == "var"):
            find(key, f"is {what} in {np.sum(bad)} of {bad.size} channels")


def _count(count: np.ndarray, leaves: Mapping[str, Any], shape: Sequence[int], find: Find) -> None:
    if not jnp.issubdtype(count.dtype, jnp.integer):
        find("count", f"has dtype {count.dtype}, and should have integers: it counts updates")
    if count.shape != shape[: count.ndim] or (count.ndim and count.ndim == len(shape)):
        find("count", f"has shape {count.shape}, and should have one number for a state of {shape}")
    if np.any(count < 0):
        find("count", "is negative")
    # A count of 0 with other statistics is valid: PyTorch's instance norm does not count.
    first = (("mean", 0), ("var", 1))
    if np.any(count == 0) and all(
        np.all(np.asarray(leaves[key]) == value) for key, value in first if key in leaves
    ):
        use = "evaluation would use a mean of 0 and a variance of 1"
        find("count", f"is 0: never trained, so {use}")


def _differences(found: Any, expected: Any) -> list[Finding]:
    """Returns the differences from the expected states in structure, shape or dtype."""
    findings = []
    expected = {path: node for path, node in expected.items() if arrays(node, ("mean", "var"))}
    for path in expected.keys() - found.keys():
        findings.append(Finding(path, "is missing"))
    for path in found.keys() - expected.keys():
        findings.append(Finding(path, "is not expected"))
    for path in found.keys() & expected.keys():
        wanted = arrays(expected[path], KEYS)
        for key, a in arrays(found[path], KEYS).items():
            is_, expected_ = _described(a), _described(wanted.get(key, a))
            if is_ != expected_:
                problem = f"is {is_}, and {expected_} was expected"
                findings.append(Finding(f"{path}[{key!r}]", problem))
    return sorted(findings)


def _described(a: Any) -> str:
    """Returns the dtype and shape of an array, a ShapeDtypeStruct or a list of numbers."""
    a = a if hasattr(a, "dtype") else np.asarray(a)
    return f"{a.dtype}{list(a.shape)}"
