"""Tests every norm on random shapes, axes, dtypes, masks and parameters against float64 NumPy."""

import copy
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import jaxnorm

DTYPES = {
    "float32": 2**-24,
    "bfloat16": 2**-9,
    "float16": 2**-12,
}  # the values are half a unit in the last place
OFFSETS = {"float32": [0.0, 3.0, 300.0, 1e4, 1e6], "bfloat16": [0.0, 3.0, 300.0], "float16": [0, 3]}


class Case:
    """One call: its arguments, and its results in float64 NumPy."""

    def __init__(self, draw, norm):
        self.renorm = norm == "batch_renorm"  # batch norm, with limits of 1 and 0
        norm = self.norm = "batch_norm" if self.renorm else norm
        self.rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        self.tracked = norm in ("batch_norm", "instance_norm")
        self._shape(draw)
        self._x(draw)
        self._options(draw)

    def _shape(self, draw):
        ndim = draw(st.integers(3 if self.norm == "instance_norm" else 2, 4))
        self.shape = [draw(st.integers(2, 5)) for _ in range(ndim)]
        self.channel = draw(st.integers(0, ndim - 1)) if self.norm == "batch_norm" else ndim - 1
        every = range(ndim)
        if self.norm == "batch_norm":
            self.reduced = [a for a in every if a != self.channel]
        elif self.norm == "instance_norm":
            self.reduced = list(every)[1:-1]
        elif self.norm == "group_norm":
            self.groups = draw(st.integers(1, 3))
            self.shape[-1] = self.groups * draw(st.integers(2, 4))
            self.reduced = list(every)[1:]
        else:
            self.axes = tuple(draw(st.permutations(list(every)[1:])))[: draw(st.integers(1, 2))]
            self.reduced = list(self.axes)
        self.shape = tuple(self.shape)

    def _x(self, draw):
        dtype = draw(st.sampled_from(list(DTYPES)))
        offset = draw(st.sampled_from(OFFSETS[dtype])) * draw(st.sampled_from([-1, 1]))
        x = offset + draw(st.sampled_from([0.1, 1.0, 10.0])) * self.rng.normal(size=self.shape)
        self.dtype, self.x = dtype, np.asarray(jnp.asarray(x, dtype))
        self.mask = None
        if draw(st.booleans()):
            shape = tuple(draw(st.sampled_from([1, n])) for n in self.shape)
            self.mask = self.rng.random(shape) < draw(st.sampled_from([0.0, 0.5, 0.9]))
            poison = self.x.copy()
            poison[~np.broadcast_to(self.mask, self.shape)] = draw(
                st.sampled_from([0, np.nan, np.inf])
            )
            self.x = poison

    def _options(self, draw):
        self.epsilon = draw(st.sampled_from([0.0, 1e-5, 1e-3, 1, np.float32(0.1)]))
        own = self.shape[self.channel :][:1] if self.norm == "batch_norm" else self.shape[-1:]
        if self.norm in ("layer_norm", "rms_norm"):
            own = tuple(self.shape[a] for a in self.axes)
        self.channels = tuple(own)
        for_the_call = tuple(draw(st.sampled_from([1, n])) for n in self.shape)
        self.params = {}
        for name in ("scale", "bias"):
            kind = draw(st.sampled_from([None, self.channels, for_the_call]))
            if kind is not None:
                self.params[name] = self.rng.normal(size=kind).astype(np.float32)
        self.state = None
        if self.renorm or (self.tracked and draw(st.booleans())):
            self.state = {
                "mean": self.rng.normal(size=self.channels).astype(np.float32),
                "var": self.rng.uniform(0.5, 2, self.channels).astype(np.float32),
                "count": np.int32(draw(st.integers(0, 5))),
            }
        self.momentum = draw(st.sampled_from([None, 0.0, 0.1, 0.5, 1]))
        self.evaluates = self.state is not None and draw(st.booleans())

    # ---- The call ----

    def call(self, x, params, state):
        options = {"epsilon": self.epsilon, "mask": self.mask}
        if self.norm == "batch_norm":
            options["channel_axis"] = self.channel
        if self.norm == "group_norm":
            options["num_groups"] = self.groups
        if self.norm in ("layer_norm", "rms_norm"):
            options["axis"] = self.axes
        function = getattr(jaxnorm, self.norm)
        if self.renorm:
            function = functools.partial(jaxnorm.batch_renorm, r_max=1.0, d_max=0.0)
        if not self.tracked:
            return function(x, params, **options), None
        return function(
            x,
            params,
            state,
            momentum=self.momentum,
            use_running_average=self.evaluates,
            **options,
        )

    # ---- float64 ----

    def _spread(self, a):
        """Expands a parameter to the rank of x."""
        if a.ndim == len(self.shape) and a.shape != self.channels:
            return a
        shape = [1] * len(self.shape)
        if self.norm in ("layer_norm", "rms_norm"):
            order = np.argsort(self.axes)
            a = a.transpose(order)
            axes = sorted(self.axes)
        else:
            axes = [self.channel]
        for axis, n in zip(axes, a.shape, strict=True):
            shape[axis] = n
        return a.reshape(shape)

    def _total(self, a):
        """Returns the sum over each sample or group, in the shape of x."""
        if self.norm != "group_norm":
            return np.broadcast_to(a.sum(tuple(self.reduced), keepdims=True), self.shape)
        parts = a.reshape(*self.shape[:-1], self.groups, -1)
        axes = (*range(1, len(self.shape) - 1), len(self.shape))
        return np.broadcast_to(parts.sum(axes, keepdims=True), parts.shape).reshape(self.shape)

    def exact(self, g):
        """Computes y, the gradient of x for the upstream gradient g, and the new state."""
        mask = (
            np.ones(self.shape, bool)
            if self.mask is None
            else np.broadcast_to(self.mask, self.shape)
        )
        x = np.where(mask, self.x.astype(np.float64), 0)
        scale = self._spread(self.params.get("scale", np.ones(self.channels))).astype(np.float64)
        bias = self._spread(self.params.get("bias", np.zeros(self.channels))).astype(np.float64)
        n = np.maximum(self._total(mask.astype(np.float64)), 1)
        mean = self._total(x) / n * (self.norm != "rms_norm")
        var = self._total(np.where(mask, (x - mean) ** 2, 0)) / n
        used = mean, var
        if self.evaluates:
            used = (self._spread(self.state[k].astype(np.float64)) for k in ("mean", "var"))
            used = tuple(np.broadcast_to(a, self.shape) for a in used)
        total = used[1] + float(self.epsilon)
        r = np.where(total == 0, 0, 1 / np.sqrt(np.where(total == 0, 1, total)))
        d = np.where(mask, x - used[0], 0)
        y = np.where(mask, d * r * scale + bias, 0)
        h = np.where(mask, g * scale, 0)
        dx = r * h
        if not self.evaluates:
            if self.norm != "rms_norm":
                dx = dx - r * self._total(h) / n
            dx = dx - r * d * r * self._total(h * d * r) / n
        self.size = np.max(np.abs(r * np.sqrt(np.abs(scale) ** 2 + 0 * r)), initial=0.0)
        state = self._state(x, mask, mean, var, n) if self.state is not None else None
        return y, np.where(mask, dx, 0), state

    def _state(self, x, mask, mean, var, n):
        """Computes the state after the update."""
        old = {k: v.astype(np.float64) if k != "count" else int(v) for k, v in self.state.items()}
        if self.evaluates:
            return old
        unbiased = var * n / np.maximum(n - 1, 1)
        counts = self._total(mask.astype(np.float64))
        if self.norm == "batch_norm":
            first = tuple(slice(None) if a == self.channel else 0 for a in range(len(self.shape)))
            mean, unbiased, moves = mean[first], unbiased[first], counts[first] > 1
        else:
            one = (slice(None), *(0 for _ in self.reduced), slice(None))
            several = counts[one] > 1
            samples = several.sum(0)
            mean, unbiased = (
                np.where(several, a[one], 0).sum(0) / np.maximum(samples, 1)
                for a in (mean, unbiased)
            )
            moves = samples > 0
        m = 1 / (old["count"] + 1) if self.momentum is None else self.momentum
        if self.momentum is None:
            moves = np.full_like(moves, moves.all())
        new = {
            "mean": np.where(moves, (1 - m) * old["mean"] + m * mean, old["mean"]),
            "var": np.where(moves, (1 - m) * old["var"] + m * unbiased, old["var"]),
        }
        return {**new, "count": old["count"] + int(moves.any())}


def check(case):
    """Checks that every way to call the norm agrees with float64, and does not change its input."""
    g = case.rng.normal(size=case.shape)
    g = np.asarray(jnp.asarray(g, case.dtype))
    y, dx, state = case.exact(g.astype(np.float64))
    given = copy.deepcopy((case.x, case.params, case.state, case.mask))
    x = jnp.asarray(case.x)

    def compiled(x, params, state):
        """Calls the norm in every way in one program, because compiling takes most of the time."""
        y, vjp, new = jax.vjp(lambda x: case.call(x, params, state), x, has_aux=True)
        return y, new, vjp(jnp.asarray(g))[0], several_ways(case, x, params, state, new)

    eager_y, eager_new = case.call(case.x, case.params, case.state)
    state_given = jax.tree.map(jnp.asarray, case.state)
    found_y, found_new, found_dx, ways = jax.jit(compiled)(x, case.params, state_given)
    half = DTYPES[case.dtype]
    # 2e-6 for x_hat at any offset, times the scale; the rounding of the bias is relative.
    scale = np.max(np.abs(case.params.get("scale", 1)), initial=0.0)
    # If epsilon dominates the variance, y is (x - mean) * const, rounded like the mean.
    y_atol = 4e-6 * max(scale, 1) * max(1, case.size * 1e-3) + 1e-7
    for got in (eager_y, found_y):
        assert got.dtype == case.dtype
        # Four roundings in float32, and one to the dtype of y.
        rtol = 2.5e-7 + 2 * half
        np.testing.assert_allclose(np.asarray(got, np.float64), y, rtol=rtol, atol=y_atol)
    # The terms of dx are as large as r * scale * g, and their sum is rounded once.
    largest = case.size * np.max(np.abs(g.astype(np.float64)), initial=0.0)
    np.testing.assert_allclose(
        np.asarray(found_dx, np.float64), dx, rtol=2 * half, atol=1e-5 * largest + 1e-6
    )
    for new in (eager_new, found_new):
        if state is not None:
            # A mean is rounded to its spacing, and a variance in 24 bits.
            offset = np.max(np.abs(state["mean"]), initial=0.0)
            np.testing.assert_allclose(
                new["mean"], state["mean"], rtol=1e-6, atol=3e-7 * offset + 1e-7
            )
            np.testing.assert_allclose(new["var"], state["var"], rtol=2e-5)
            assert new["count"] == state["count"]
    largest_y = np.max(np.abs(y), initial=0.0)
    check_ways(ways, found_y, found_new, y_atol + 2 * half * largest_y)
    for before, after in zip(
        jax.tree.leaves(given),
        jax.tree.leaves((case.x, case.params, case.state, case.mask)),
        strict=True,
    ):
        assert np.asarray(before).tobytes() == np.asarray(after).tobytes()  # including NaN


def several_ways(case, x, params, state, new):
    """Applies vmap over two states, a second call after the first, and scan over two steps."""
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), (x, state))
    mapped = jax.vmap(lambda x, state: case.call(x, params, state))(*stacked)
    if state is None:
        return mapped, None, None
    _, after = case.call(x, params, new)
    carried, _ = jax.lax.scan(lambda s, x: case.call(x, params, s)[::-1], state, stacked[0])
    return mapped, after, carried


def check_ways(ways, y, new, atol):
    """Checks that vmap over two states and scan over two steps agree with separate calls."""
    (ys, news), after, carried = ways
    y = np.asarray(y, np.float32)
    for i in range(2):
        np.testing.assert_allclose(np.asarray(ys[i], np.float32), y, rtol=1e-5, atol=atol)
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-4), news, new)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), carried, after)


NORMS = ["batch_norm", "batch_renorm", "instance_norm", "group_norm", "layer_norm", "rms_norm"]


@pytest.mark.parametrize(
    "number",
    [3, pytest.param(100, marks=pytest.mark.exhaustive)],
    ids=["few", "many"],
)
@pytest.mark.parametrize("norm", NORMS)
def test_drawn_calls_are_float64_s_in_every_way(norm, number):
    # Failures are not shrunk, because each attempt compiles several programs.
    @settings(
        max_examples=number,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
    )
    @given(st.data())
    def run(data):
        check(Case(data.draw, norm))

    run()


def soaked(steps):
    """Returns a step to call repeatedly, its number of programs, and its memory."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 8)), jnp.float32)

    @jax.jit
    def step(x, params, state):
        def loss(params):
            y, new = jaxnorm.batch_norm(x, params, state)
            return jnp.sum(jnp.sin(y)), new

        grads, new = jax.grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 1e-4 * g, params, grads), new

    params, state = jaxnorm.init_params(8), jaxnorm.init_batch_stats(8)
    for _ in range(steps):
        params, state = step(x, params, state)
    return step, params, state


@pytest.mark.slow
def test_ten_thousand_steps_compile_once_and_keep_no_memory():
    resident = []

    def pages():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    for _ in range(2):
        step, params, state = soaked(10_000)
        resident.append(pages())
        assert step._cache_size() == 1
    assert state["count"] == 10_000
    assert all(math.isfinite(float(a)) for a in jax.tree.leaves(jax.tree.map(jnp.sum, params)))
    # The second 10,000 steps, and one more program, take less than 8 MiB.
    assert resident[1] - resident[0] < 2**23


@pytest.mark.slow
def test_eight_threads_step_at_the_same_time():
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(8) as pool:
        states = [state for _, _, state in pool.map(soaked, [300] * 8)]
    for state in states[1:]:
        jax.tree.map(np.testing.assert_array_equal, state, states[0])
