"""Compiles the norms of every library for TPUs and NVIDIA GPUs, and reports the estimated costs.

    python benchmarks/accelerators.py            # TPU v5e and H100; under an hour on two cores
    python benchmarks/accelerators.py --full     # every library and target, and full depth
    python benchmarks/accelerators.py --report   # only writes the page and the plot again

Nothing is run, and neither a TPU nor a GPU is needed. Each of the two compilers runs in a separate
process and environment, both at the same time. A run continues where it was stopped.
"""

import argparse
import collections
import itertools
import json
import os
import platform
import subprocess
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerators_report import write_report
from tqdm import tqdm

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS = ROOT / "docs" / "benchmarks"
PYTHONS = {
    "TPU": os.environ.get("TPU_PYTHON", str(ROOT / ".venv-tpu/bin/python")),
    "NVIDIA": os.environ.get("GPU_PYTHON", str(ROOT / ".venv-gpu/bin/python")),
}
TARGETS = ("TPU v5e", "NVIDIA H100")
MORE_TARGETS = ("TPU v6e", "NVIDIA A100")
LIBRARIES = ("jaxnorm", "flax.linen")
MORE_LIBRARIES = ("flax.nnx", "dm-haiku", "equinox", "keras")
NORMS = ("batch", "instance", "group32", "group4", "layer", "rms")
MODES = ("forward", "forward+backward")
# These exceed the 50 MB of the H100's cache: images, and tokens as rows.
SHAPES = ((256, 28, 28, 256), (65536, 1024))
MORE_SHAPES = ((64, 1024, 1024),)
RESNETS = tuple(f"ResNet-50, {norm} norm" for norm in ("batch", "instance", "group"))
TRANSFORMERS = ("GPT-2, layer norm", "Llama, RMS norm")
SCANS = ("GPT-2 under scan, layer norm", "Llama under scan, RMS norm")
MODULES = {
    "ResNet-50 in Linen, batch norm": "flax.linen",
    "ResNet-50 in NNX, batch norm": "flax.nnx",
}
UNROLLED = (*RESNETS, "StarGAN, instance norm", *TRANSFORMERS)
DEEP = (RESNETS[0], *UNROLLED[len(RESNETS) :])
PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "flax", "dm-haiku", "equinox", "keras")
# Reasons for a missing answer that are in the environment, and not in the library.
AGAIN = ("ModuleNotFoundError", "the process has ended")
MOST_PROCESSES = 8  # compiling a whole network takes a few gigabytes
Job = dict[str, Any]


# ---- Jobs ----


def jobs(full: bool, targets: list[str], only: str | None) -> Iterator[Job]:
    """Returns everything to compile: first the steps, and then the cells."""
    for job in itertools.chain(
        steps(full) if only != "cells" else (),
        cells(full) if only != "steps" else (),
    ):
        for target in targets:
            for library in libraries(job, target, full):
                yield {**job, "target": target, "library": library}


def libraries(job: Job, target: str, full: bool) -> tuple[str, ...]:
    """Returns the libraries that a job is compiled with.

    With `--full` every library is compiled for the first two targets, at reduced depth. The other
    two targets show whether the results for jaxnorm and Flax also hold on other devices.
    """
    first = target in TARGETS
    if job["kind"] == "cell":
        return LIBRARIES + MORE_LIBRARIES if full and first else LIBRARIES
    if job["full"] and not first:
        return ()
    if job["model"] in MODULES:
        return ("jaxnorm", MODULES[job["model"]], "none") if first else ()
    more = MORE_LIBRARIES if full and first and not job["full"] else ()
    return (*LIBRARIES, *more, "none")


def steps(full: bool) -> Iterator[Job]:
    """Returns the training steps at reduced depth, and each model at full depth with one norm."""
    for model in (*UNROLLED, *SCANS, *MODULES):
        yield {"kind": "step", "model": model, "full": False}
    for model in DEEP if full else ():
        yield {"kind": "step", "model": model, "full": True}


def cells(full: bool) -> Iterator[Job]:
    """Returns single norms in training, and batch norm with running statistics in evaluation."""
    shapes = SHAPES + MORE_SHAPES if full else SHAPES
    for layout, norm, shape in itertools.product(("last", "first"), NORMS, shapes):
        if len(shape) == 2 and (norm == "instance" or layout == "first"):
            continue
        given = (shape[0], shape[-1], *shape[1:-1]) if layout == "first" else shape
        trainings = (True, False) if norm == "batch" else (True,)
        for dtype, training, mode in itertools.product(("float32", "bfloat16"), trainings, MODES):
            yield {
                "kind": "cell",
                "norm": norm,
                "shape": list(given),
                "dtype": dtype,
                "layout": layout,
                "mode": mode,
                "training": training,
            }


# ---- Running ----


class Worker:
    """The process of one compiler."""

    def __init__(self, compiler: str, core: int) -> None:
        self.process = subprocess.Popen(
            [PYTHONS[compiler], "-W", "ignore", str(HERE / "accelerators_worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        os.sched_setaffinity(self.process.pid, {core})

    def ask(self, job: Job) -> dict[str, Any]:
        """Returns the result of the job, or the reason as `missing` if the job failed."""
        sent, received = self.process.stdin, self.process.stdout
        assert sent is not None
        assert received is not None
        try:
            sent.write(json.dumps(job) + "\n")
            sent.flush()
            return json.loads(received.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            return {"missing": f"the process has ended with {self.process.wait()}"}


class Results:
    """The results of the jobs so far, in a file that is written after each job."""

    def __init__(self, path: Path) -> None:
        self.path, self.lock = path, threading.Lock()
        self.all = json.loads(path.read_text()) if path.exists() else {"versions": {}, "rows": {}}

    def answers(self, job: Job) -> dict[str, Any]:
        """Returns the answers of all libraries to a job, for its target."""
        shared = {k: v for k, v in job.items() if k not in ("target", "library")}
        key = json.dumps(shared)
        row = self.all["rows"].setdefault(key, {"job": shared, "targets": {}})
        return row["targets"].setdefault(job["target"], {})

    def has(self, job: Job) -> bool:
        """Returns whether there is an answer that another attempt would not change."""
        answer = self.answers(job).get(job["library"])
        return answer is not None and not answer.get("missing", "").startswith(AGAIN)

    def save(self, job: Job, answer: dict[str, Any]) -> None:
        """Adds an answer."""
        with self.lock:
            self.answers(job)[job["library"]] = answer
            self.write()

    def write(self) -> None:
        """Writes the file atomically."""
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.all, indent=1) + "\n")
        new.replace(self.path)


def run(wanted: list[Job], results: Results) -> None:
    """Runs the remaining jobs with both compilers at the same time.

    Each core begins with one of the compilers, and takes jobs of the other when its own are done.
    """
    wanted = [job for job in wanted if not results.has(job)]
    queues = {
        compiler: collections.deque(j for j in wanted if j["target"].startswith(compiler))
        for compiler in PYTHONS
    }
    cores = sorted(os.sched_getaffinity(0))
    with tqdm(total=len(wanted), unit="program") as bar:

        def ask(compilers: list[str], core: int) -> None:
            for compiler in compilers:
                worker = None
                while queues[compiler]:
                    try:
                        job = queues[compiler].popleft()
                    except IndexError:  # another core has taken the last one
                        break
                    if worker is None or worker.process.poll() is not None:
                        worker = Worker(compiler, core)
                    results.save(job, worker.ask(job))
                    bar.update()
                if worker is not None:
                    worker.process.kill()
                    worker.process.wait()

        threads = []
        for i in range(max(len(PYTHONS), min(len(cores), MOST_PROCESSES))):
            compilers = list(PYTHONS) if i % 2 else list(reversed(PYTHONS))
            threads.append(threading.Thread(target=ask, args=(compilers, cores[i % len(cores)])))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def versions() -> dict[str, str]:
    """Returns the versions of the packages in both environments."""
    ask = (
        "import json; from importlib import metadata as m;"
        "print(json.dumps({d.metadata['Name'].lower(): d.version for d in m.distributions()}))"
    )
    found: dict[str, str] = {"python": platform.python_version()}
    for python in PYTHONS.values():
        if Path(python).exists():
            answer = subprocess.run([python, "-c", ask], capture_output=True, check=True).stdout
            installed = json.loads(answer)
            found |= {name: installed[name] for name in PACKAGES if name in installed}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, cwd=ROOT, text=True
    ).stdout.strip()
    return {"jaxnorm": f"{project['version']} ({commit})".replace(" ()", ""), **found}


def main() -> None:
    """Parses the command line, compiles and reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="every library, target and depth")
    parser.add_argument("--report", action="store_true", help="compile nothing")
    parser.add_argument("--fresh", action="store_true", help="forget an earlier run's answers")
    parser.add_argument("--only", choices=("cells", "steps"))
    parser.add_argument("--targets", nargs="+", choices=TARGETS + MORE_TARGETS)
    options = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / ("accelerators-full.json" if options.full else "accelerators.json")
    if options.fresh and not options.report:
        path.unlink(missing_ok=True)
    if not options.report:
        results = Results(path)
        results.all["versions"] = versions()
        targets = options.targets or [*TARGETS, *(MORE_TARGETS if options.full else ())]
        run(list(jobs(options.full, targets, options.only)), results)
    print(write_report(path))


if __name__ == "__main__":
    main()
