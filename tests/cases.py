"""Shared shapes, dtypes and data, and a reference in float64 NumPy with plain loops."""

import numpy as np

# Maps the number of space axes to (N, *space, C). N, C and the sizes of a sample all differ.
SHAPES = {1: (4, 7, 3), 2: (4, 5, 2, 3), 3: (4, 5, 1, 2, 3)}
DTYPES = ("float16", "bfloat16", "float32", "float64")

# (N, L, C) = (2, 3, 2), small enough to check by hand.
SMALL = np.moveaxis(np.array([[[1.0, 2, 3], [0, 0, 6]], [[5, 7, 9], [1, 2, 3]]]), 1, -1)


def normal(shape, seed=0, offset=1.0, spread=2.0):
    """Returns normal float64 values around the offset."""
    return np.random.default_rng(seed).normal(offset, spread, shape)


def first_state(channels):
    """Returns the initial state: mean 0, variance 1, count 0."""
    return {"mean": np.zeros(channels), "var": np.ones(channels), "count": 0}


def later_state(channels=3):
    """Returns a state after five batches."""
    mean, var = normal((2, channels), seed=7)
    return {"mean": mean, "var": 1 + var**2, "count": 5}


def some_params(channels=3):
    """Returns a scale and a bias whose entries all differ."""
    scale, bias = normal((2, channels), seed=8)
    return {"scale": scale, "bias": bias}


@np.errstate(invalid="ignore")  # Inf - Inf
def reference_norm(
    x,
    params=None,
    batch_stats=None,
    *,
    instance=False,
    use_running_average=False,
    momentum=0.1,
    epsilon=1e-5,
    mask=None,
):
    """Computes y and the new state of batch or instance norm of x, (N, *space, C)."""
    x = np.asarray(x, np.float64)
    counts = np.broadcast_to(True if mask is None else mask, x.shape)
    samples = range(x.shape[0]) if instance else [slice(None)]
    scale, bias = ((params or {}).get(name) for name in ("scale", "bias"))
    y, rows = np.zeros(x.shape), []
    for c in range(x.shape[-1]):
        moments = []
        for i in samples:
            chosen = counts[i, ..., c]
            entries = x[i, ..., c][chosen]
            mean, var = (entries.mean(), entries.var()) if entries.size else (0.0, 0.0)
            if entries.size > 1:
                moments.append((mean, entries.var(ddof=1)))
            if use_running_average:
                mean, var = batch_stats["mean"][c], batch_stats["var"][c]
            x_hat = (entries - mean) / np.sqrt(var + epsilon)
            w, b = 1 if scale is None else scale[c], 0 if bias is None else bias[c]
            y[i, ..., c][chosen] = w * x_hat + b
        rows.append(np.mean(moments, axis=0) if moments else (np.nan, np.nan))
    if use_running_average or batch_stats is None:
        return y, batch_stats
    return y, reference_update(batch_stats, *np.transpose(rows), momentum=momentum)


def reference_update(batch_stats, mean, var, *, momentum=0.1):
    """Updates the state by a batch's means and unbiased variances, except for NaN and Inf."""
    moves = np.isfinite(mean) & np.isfinite(var)
    count = batch_stats["count"]
    if momentum is None:
        momentum = 1 / (count + 1)
        moves = moves & moves.all()
    m = np.where(moves, momentum, 0.0)
    new = {"mean": np.where(moves, mean, 0.0), "var": np.where(moves, var, 0.0)}
    state = {key: (1 - m) * batch_stats[key] + m * new[key] for key in new}
    return {**state, "count": count + int(moves.any())}


# ---- With PyTorch ----


def channels_first(x):
    """Returns a tensor of x, which has its channels last, in PyTorch's order."""
    import torch

    return torch.from_numpy(np.moveaxis(x, -1, 1).copy())


def images(*shape):
    """Returns an input with channels last, and the same input for PyTorch."""
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return x, channels_first(x)


def assert_same_bits(found, expected):
    """Checks that names, dtypes, shapes and bits are equal."""
    assert found.keys() == expected.keys()
    for key, a in expected.items():
        a, b = np.asarray(a), found[key]
        assert (b.dtype, b.shape) == (a.dtype, a.shape), key
        assert b.tobytes() == a.tobytes(), key
