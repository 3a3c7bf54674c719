"""Measures the norms of every library in one run, and writes the results.

    python benchmarks/norms.py                 # float32, three sizes, one core, end to end
    python benchmarks/norms.py --full          # every cell; continues where it was stopped
    python benchmarks/norms.py --report        # only writes the table and the plot again

Each library runs in a separate process. The libraries take turns for several rounds, so that only
ratios within one run are compared. The thresholds of the allocator are raised for all libraries;
otherwise page faults of new outputs dominate the times.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from libraries import LIBRARIES, NORMS, version
from report import write_report
from tqdm import tqdm

HERE = Path(__file__).parent
RESULTS = HERE.parent / "docs" / "benchmarks"
ALL = (*LIBRARIES, "torch", "torch.compile")
SHAPES = ((32, 56, 56, 64), (16, 28, 28, 256), (4096, 1024))
MORE_SHAPES = ((8, 14, 14, 1024), (8192, 768), (4, 8, 8, 32), (64, 112, 112, 64))
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(2**25),  # glibc ignores larger values
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "MALLOC_TOP_PAD_": str(2**28),
}


def cells(full: bool) -> list[dict[str, Any]]:
    """Returns every job: each norm, size, dtype, layout and mode, and the training steps."""
    jobs: list[dict[str, Any]] = []
    dtypes = ("float32", "bfloat16") if full else ("float32",)
    layouts = ("last", "first") if full else ("last",)
    shapes = SHAPES + MORE_SHAPES if full else SHAPES
    for layout, dtype, shape, norm in itertools.product(layouts, dtypes, shapes, NORMS):
        if len(shape) == 2 and (norm in ("instance", "group32", "group4") or layout == "first"):
            continue
        given = (shape[0], shape[-1], *shape[1:-1]) if layout == "first" else shape
        modes = [("forward", True), ("forward+backward", True)]
        modes += [("forward", False)] if norm == "batch" else []
        for mode, training in modes:
            jobs.append(
                {
                    "kind": "norm",
                    "norm": norm,
                    "shape": given,
                    "dtype": dtype,
                    "layout": layout,
                    "mode": mode,
                    "training": training,
                }
            )
    steps = ("conv net", "ResNet-18", "transformer", "50 dense layers")
    return jobs + [{"kind": "step", "model": model} for model in steps]


class Worker:
    """The process of one library."""

    def __init__(self, library: str, cores: int) -> None:
        environment = {**os.environ, **ALLOCATOR, "JAX_PLATFORMS": "cpu"}
        environment["XLA_FLAGS"] = f"--xla_cpu_multi_thread_eigen={str(cores > 1).lower()}"
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(HERE / "worker.py"), library, str(cores)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        if cores == 1:
            os.sched_setaffinity(self.process.pid, {min(os.sched_getaffinity(0))})

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        """Returns the result of the job, or the reason as `missing` if the job failed."""
        pipes = self.process.stdin, self.process.stdout
        assert pipes[0] is not None and pipes[1] is not None  # noqa: PT018
        if self.process.poll() is not None:
            return {"missing": "the process has ended"}
        pipes[0].write(json.dumps(job) + "\n")
        pipes[0].flush()
        line = pipes[1].readline()
        return json.loads(line) if line else {"missing": "the process has ended"}


def run(jobs: list[dict[str, Any]], libraries: list[str], rounds: int, path: Path) -> None:
    """Runs every job that has no result yet in every worker, and saves after each job."""
    results = json.loads(path.read_text()) if path.exists() else {"cells": {}}
    cores = {1: {}, os.cpu_count() or 1: {}} if "full" in path.stem else {1: {}}
    results |= {"machine": machine(), "versions": versions(libraries)}
    for number in cores:
        wanted = [(f"{number} core(s): {json.dumps(job)}", job) for job in jobs]
        wanted = [(key, job) for key, job in wanted if key not in results["cells"]]
        if not wanted:
            continue
        workers = {library: Worker(library, number) for library in libraries}
        for key, job in tqdm(wanted, unit="cell", desc=f"{number} core(s)"):
            answers: dict[str, Any] = {}
            for library in libraries * rounds:
                answer = workers[library].ask(job)
                if library in answers and "seconds" in answer:
                    answers[library]["seconds"] += answer["seconds"]
                    continue
                answers.setdefault(library, answer)
            for answer in answers.values():
                if "seconds" in answer:
                    seconds = answer.pop("seconds")
                    answer |= {"median": statistics.median(seconds), "minimum": min(seconds)}
            results["cells"][key] = {"job": job, "cores": number, "libraries": answers}
            path.write_text(json.dumps(results, indent=1))
        for worker in workers.values():
            worker.process.kill()
            worker.process.wait()


def machine() -> dict[str, Any]:
    """Describes the machine."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.split(":")[1].strip() for line in text.splitlines() if "model name" in line]
    return {"processor": (models or [platform.processor()])[0], "cores": os.cpu_count()}


def versions(libraries: list[str]) -> dict[str, str]:
    """Returns the versions of the libraries."""
    from importlib import metadata

    found = {"python": platform.python_version(), "jaxlib": metadata.version("jaxlib")}
    for library in libraries:
        found[library] = metadata.version("torch") if "torch" in library else version(library)
    return found


def main() -> None:
    """Parses the command line, measures and reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="every dtype, size and layout")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--fresh", action="store_true", help="forget an earlier run's cells")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--libraries", nargs="+", choices=ALL, default=list(ALL))
    options = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / ("full.json" if options.full else "norms.json")
    if options.fresh or not (options.full or options.report):
        path.unlink(missing_ok=True)
    if not options.report:
        run(cells(options.full), options.libraries, options.rounds, path)
    print(write_report(path))


if __name__ == "__main__":
    main()
