"""Recomputes running statistics in one pass over the data."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxnorm._stats.accumulate import end_accumulation, fresh_accumulation
from jaxnorm._stats.trees import Tree, map_states, states


def recalibrate(
    step: Callable[..., Tree],
    batch_stats: Tree,
    batches: Iterable[Any],
    *args: Any,
    progress: Callable[[int], Any] | None = None,
) -> Tree:
    """Recomputes the running statistics for fixed weights, exactly, over all batches of data.

    After the weights were averaged (stochastic weight averaging, an exponential moving average),
    pruned or quantized, the running statistics still describe the old weights. This function
    computes the statistics of all batches together. For batch norm, these are the mean and the
    unbiased variance of all entries of the data, as if it were one batch (an average of the
    variances of the batches would give a different result). For instance norm, they are the average
    over all samples. Each layer still normalizes by the statistics of the batch, so in a deep model
    the statistics of later layers depend on the batch size, as in training.

    `jaxnorm.linen.recalibrate` and `jaxnorm.nnx.recalibrate` create `step` from a model.

    Args:
      step: `step(batch_stats, batch, *args)` runs the model in training mode and returns the new
        batch_stats. This function compiles it.
      batch_stats: a state, or a tree of them: dicts, lists, dataclasses or any other pytree. The
        values are not used.
      batches: the data, in any number of batches. step is compiled once per shape of batch.
      *args: further arguments of step, such as the params.
      progress: a function that is called after each batch with the number of completed batches.

    Returns:
      The new batch_stats, whose counts are the number of batches.

    Raises:
      ValueError: if there are no batches, or no states; if step returns a different structure; if a
        batch makes a statistic NaN or infinite; if step does not update a state, or a channel of
        it. The input batch_stats are never modified.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxnorm
      >>> x = jnp.array([[1.0], [2.0], [3.0], [6.0], [8.0]])
      >>> step = lambda batch_stats, x: jaxnorm.batch_norm(x, None, batch_stats)[1]
      >>> stats = jaxnorm.recalibrate(step, jaxnorm.init_batch_stats(1), [x[:2], x[2:]])
      >>> print(stats["mean"], stats["var"], stats["count"], x.var(ddof=1))
      [4.] [8.5] 2 8.5

    References:
      Izmailov et al., Averaging Weights Leads to Wider Optima and Better Generalization, 2018,
      section 3.2. https://arxiv.org/abs/1803.05407
      torch.optim.swa_utils.update_bn, PyTorch 2.13, which averages the variances of the batches.
    """
    state = map_states("recalibrate", fresh_accumulation, batch_stats)

    @jax.jit
    def run(state: Any, batch: Any, args: tuple[Any, ...]) -> tuple[Any, dict[str, jax.Array]]:
        new = step(state, batch, *args)
        given: Any = jax.tree.structure(state)
        if jax.tree.structure(new) != given:
            raise ValueError(
                f"recalibrate: step should return the new batch_stats, with the same structure as "
                f"its input, but returned {jax.tree.structure(new)} for {given} "
                f"[recalibrate-structure]"
            )
        return new, {path: _finite(s["accumulation"]["moments"]) for path, s in states(new)}

    number = 0
    for number, batch in enumerate(batches, 1):
        state, finite = run(state, batch, args)
        bad = [path or "the state" for path, good in finite.items() if not good]
        if bad:
            raise ValueError(
                f"recalibrate: batches should be finite, because a statistic of NaN or Inf is of "
                f"no use, but batch {number} (counted from 1) makes {', '.join(bad)} not finite "
                f"[recalibrate-not-finite]"
            )
        if progress is not None:
            progress(number)
    if not number:
        raise ValueError(
            "recalibrate: batches should hold at least one batch, but are empty [recalibrate-empty]"
        )
    _check_updated(state)
    return map_states("recalibrate", lambda _, s: _counted(s, number), end_accumulation(state))


def _check_updated(tree: Any) -> None:
    """Checks that the batches have updated each channel of each state."""
    missed = [path or "the state" for path, s in states(tree) if not _updated_everywhere(s)]
    if missed:
        raise ValueError(
            f"recalibrate: step should update every channel of every state, but did not update "
            f"{', '.join(missed)}; run the model in training mode, on two or more values per "
            f"channel [recalibrate-unmoved]"
        )


def _finite(moments: Mapping[str, jax.Array]) -> jax.Array:
    return jnp.all(jnp.isfinite(moments["mean"]) & jnp.isfinite(moments["var"]))


def _updated_everywhere(state: Mapping[str, Any]) -> bool:
    """Returns whether each channel was updated; a channel with a single value is not."""
    seen = state["accumulation"]["moments"]
    return bool(jnp.all((seen["count"] > 0) & (state["mean"] == seen["mean"])))


def _counted(state: Mapping[str, Any], number: int) -> dict[str, Any]:
    most = jnp.iinfo(state["count"].dtype).max
    return {**state, "count": jnp.full_like(state["count"], min(number, most))}
