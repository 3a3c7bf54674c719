"""Tests that the benchmarks measure the same norm in every library, and the reports."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

COMPARE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import end_to_end, jax, jax.numpy as jnp, libraries
found = {}
for layout, shape in (("last", (4, 5, 6, 32)), ("first", (4, 32, 5, 6))):
    x = 2 * jax.random.normal(jax.random.key(0), shape) + 3
    for norm in libraries.NORMS:
        for training in (True, False):
            if norm == "batch" and not training:
                continue  # first states differ from library to library
            for library, make in libraries.LIBRARIES.items():
                try:
                    params, state, apply = make(norm, shape, layout)
                except libraries.MissingError:
                    continue
                if library == "jaxnorm":
                    expected, _ = apply(params, state, x, training)
                elif library != "scaling":
                    y, _ = apply(params, state, x, training)
                    key = f"{library} {norm} {layout} {training}"
                    found[key] = float(jnp.abs(y - expected).max())
print(json.dumps(found))
"""


@pytest.mark.slow
def test_every_library_computes_the_norm_that_is_measured():
    if not all(map(importlib.util.find_spec, ("equinox", "haiku", "keras", "torch"))):
        pytest.skip("not all libraries are there")
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPARE, str(BENCHMARKS)],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(result.stdout.splitlines()[-1])
    assert len(found) > 80
    # The epsilons differ, for example 1e-3 in Keras, while the variance is 4.
    assert {key: error for key, error in found.items() if error > 2e-3} == {}


def test_a_worker_answers_job_by_job():
    job = {
        "kind": "norm",
        "norm": "layer",
        "shape": [64, 32],
        "dtype": "float32",
        "layout": "last",
        "mode": "forward+backward",
        "training": True,
    }
    jobs = "\n".join(json.dumps(j) for j in (job, {**job, "norm": "none of them"})) + "\n"
    result = subprocess.run(
        [sys.executable, "-W", "ignore", str(BENCHMARKS / "worker.py"), "jaxnorm", "1"],
        input=jobs,
        capture_output=True,
        text=True,
        check=True,
    )
    answer, refused = (json.loads(line) for line in result.stdout.splitlines())
    assert min(answer["seconds"]) > 0
    assert answer["x_bytes"] == 64 * 32 * 4
    assert answer["kept"] < 1.3 * answer["x_bytes"]  # x and three numbers for each row
    assert "missing" in refused


@pytest.fixture
def report():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import report

        yield report
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_the_report_shows_ours_as_a_ratio(report, tmp_path):
    job = {"kind": "norm", "norm": "rms", "shape": [8, 4], "dtype": "float32", "layout": "last"}
    facts = {"x_bytes": 128, "kept": 128, "temporaries": 256, "accessed": 640.0}
    libraries = {
        "jaxnorm": {"minimum": 0.001, "median": 0.002, **facts},
        "flax.linen": {"minimum": 0.004, "median": 0.004, **facts},
        "equinox": {"missing": "MissingError"},
        "scaling": {"minimum": 0.0005, "median": 0.0005, **facts},
    }
    cells = {
        mode: {"job": {**job, "mode": mode, "training": True}, "cores": 1, "libraries": libraries}
        for mode in ("forward", "forward+backward")
    }
    step = {
        name: {"minimum": 0.1, "compile_seconds": seconds}
        for name, seconds in (("jaxnorm", 1.5), ("flax.linen", 3.0))
    }
    cells["step"] = {"job": {"kind": "step", "model": "net"}, "cores": 1, "libraries": step}
    results = {"cells": cells, "machine": {"processor": "a", "cores": 2}, "versions": {"jax": "1"}}
    path = tmp_path / "norms.json"
    path.write_text(json.dumps(results))
    page = report.write_report(path)
    assert "| rms | 8x4 | float32 | 1.00 | 4.00 (0.25) | – | 0.50 (2.00) |" in page  # noqa: RUF001
    assert "1.0 / 2.0 / 5.0" in page
    assert "| net | 100.00 | 100.00 (1.00) |" in page
    assert "| net, compile time | 1.5 s | 3.0 s (0.50) |" in page
    assert path.with_suffix(".png").stat().st_size > 10_000
