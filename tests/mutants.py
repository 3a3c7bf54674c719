"""Counts the small changes of the core, called mutants, that its tests do not detect.

python tests/mutants.py              # 200 of them; continues where it was stopped
python tests/mutants.py --count 10   # the first ten of the same sample
python tests/mutants.py --again      # runs the survivors again, after tests were added

A mutant is one module with one change, in a copy of the package. It is killed if a test fails, or
runs for too long, and survives otherwise. A survivor is a missing test, or code that is not needed,
or a change without an effect on the results, such as one that only takes time. A table explains
survivors of the last kind. The tests that have killed other mutants of the module run first.
"""

import argparse
import ast
import difflib
import hashlib
import json
import os
import queue
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
OUT = ROOT / "build" / "mutants"
SEVERAL_ROWS = [
    "tests/test_virtual_batches.py::test_one_channel_is_enough",
    "tests/test_virtual_batches.py::test_a_sharded_batch_keeps_its_sharding",
    "tests/test_virtual_batches.py::test_the_variance_of_virtual_batches_on_devices_keeps_its_digits",
    "tests/test_virtual_batches.py::test_micro_batches_of_one_entry_accumulate_over_devices",
    "tests/test_flags.py::test_channels_are_sharded_and_the_state_is_not",
]
# Each module, and the tests that should detect every change of it.
TESTS = {
    "jaxnorm/_core/moments.py": [
        "tests/test_running.py",
        *SEVERAL_ROWS,
        "tests/test_platforms.py::test_a_tpu_has_no_barrier_and_a_cpu_has_one",
        "tests/test_platforms.py::test_a_gpu_measures_a_part_of_a_row_only_with_a_backward_pass",
        "tests/test_arguments.py::test_the_update_takes_moments_and_numbers",
        "tests/test_moments.py",
    ],
    "jaxnorm/_core/normalize.py": [
        "tests/test_platforms.py::test_a_tpu_has_no_barrier_and_a_cpu_has_one",
        "tests/test_extremes.py::test_constants_give_0_with_an_epsilon_of_0",
        "tests/test_renorm.py",
        "tests/test_compiled.py::test_float32_needs_no_temporary_of_x_s_size",
        "tests/test_normalize.py",
    ],
    "jaxnorm/_stats/update.py": [
        "tests/test_running.py",
        "tests/test_arguments.py::test_the_update_takes_moments_and_numbers",
        "tests/test_arguments.py::test_merging_takes_weights",
        "tests/test_recalibrate.py::test_batch_norm_gets_the_moments_of_every_entry",
        *SEVERAL_ROWS,
        "tests/test_accumulation.py",
    ],
}
BROADCAST = "the next line broadcasts it to the shape of the count"
# The changed line of each survivor that needs no test, and the reason.
EXPLAINED = {
    "mean, var = (jnp.where(n > 0, widen(a), 1) for a in (mean, var))": (
        "any finite number does, because its weight is 0"
    ),
    "count, total = mapped_axes.sum(moments.count, moments.count * ((shift - moments.mean)))": (
        "the common shift may be any number near the mean"
    ),
    "shift = jnp.max(shifts, axis=0, where=rows.count > 0, initial=-jnp.inf)": BROADCAST,
    "shift = jnp.max(shifts, axis=0, keepdims=False, where=rows.count > 0, initial=-jnp.inf)": BROADCAST,  # noqa: E501
    "return jnp.where((weight <= 0.5), a + weight * (b - a), b - (1 - weight) * (b - a))": (
        "with a weight of 0.5, both steps have the same length"
    ),
    "@dataclasses.dataclass()": "a private class, whose fields nothing assigns",
    "@dataclasses.dataclass(frozen=False)": "a private class, whose fields nothing assigns",
}
PAIRS = [
    *[(ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.Is, ast.IsNot)],
    *[(ast.In, ast.NotIn), (ast.And, ast.Or), (ast.BitAnd, ast.BitOr)],
    *[(ast.Add, ast.Sub), (ast.Mult, ast.Div)],
]
OPERATORS = {ast.Pow: ast.Mult, **dict(PAIRS), **{b: a for a, b in PAIRS}}
FUNCTIONS = {"maximum": "minimum", "max": "min", "any": "all", "zeros_like": "ones_like"}
FUNCTIONS |= {other: name for name, other in FUNCTIONS.items()}


class Mutant(NamedTuple):
    """One change of one module.

    Attributes:
      path: the path of the module.
      line: the line at which the change begins.
      source: the source of the changed module.
      key: identifies the mutant; changes if the module changes.
    """

    path: str
    line: int
    source: str
    key: str

    @property
    def diff(self) -> list[str]:
        """Returns the lines that differ, without context."""
        files = (ROOT / self.path).read_text().splitlines(), self.source.splitlines()
        lines = difflib.unified_diff(*files, n=0)
        return [line for line in lines if not line.startswith(("---", "+++", "@@"))]


def changes(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Yields a part of the node, or the node itself, and the source that replaces it."""
    match node:
        case ast.BinOp(op=op) | ast.AugAssign(op=op) if type(op) in OPERATORS:
            yield node, _with(node, op=OPERATORS[type(op)]())
        case ast.Compare(ops=[op]) if type(op) in OPERATORS:
            yield node, _with(node, ops=[OPERATORS[type(op)]()])
        case ast.BoolOp(op=op):
            yield node, _with(node, op=OPERATORS[type(op)]())
        case ast.UnaryOp(op=ast.USub() | ast.Not(), operand=operand):
            yield node, f"({ast.unparse(operand)})"
        case ast.Constant(value=bool(value)):
            yield node, str(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield node, str(value + 1)
        case ast.IfExp(body=body, orelse=orelse):
            yield node, _with(node, body=orelse, orelse=body)
        case ast.If(test=test):
            yield test, f"not ({ast.unparse(test)})"
        case ast.Call(args=[condition, yes, no], func=ast.Attribute(attr="where")):
            yield node, _with(node, args=[condition, no, yes])
        case ast.Attribute(attr=name) if name in FUNCTIONS:
            yield node, _with(node, attr=FUNCTIONS[name])
    if isinstance(node, ast.Call):
        for i in range(len(node.keywords)):
            yield node, _with(node, keywords=node.keywords[:i] + node.keywords[i + 1 :])
    if isinstance(node, ast.AugAssign | ast.Raise) or _assigns_again(node):
        yield node, "pass"


def _with(node: Any, **fields: Any) -> str:
    """Returns the source of the node with other fields, and puts expressions in parentheses."""
    kept = {name: getattr(node, name) for name in node._fields}
    text = ast.unparse(type(node)(**{**kept, **fields}))
    return text if isinstance(node, ast.Call | ast.Attribute | ast.stmt) else f"({text})"


def _assigns_again(node: ast.AST) -> bool:
    """Returns whether a name is assigned from itself; without other lines every test would fail."""
    if not isinstance(node, ast.Assign):
        return False
    bound, used = (
        {n.id for root in roots for n in ast.walk(root) if isinstance(n, ast.Name)}
        for roots in (node.targets, [node.value])
    )
    return bound <= used


def parts(node: ast.AST) -> Iterator[ast.AST]:
    """Yields the node and its parts, except annotations and f-strings, which compute nothing."""
    yield node
    for name, value in ast.iter_fields(node):
        if name not in ("annotation", "returns"):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and not isinstance(child, ast.JoinedStr):
                    yield from parts(child)


def mutants(path: str) -> Iterator[Mutant]:
    """Returns all mutants of a module, in the order of the source."""
    source = (ROOT / path).read_bytes()  # columns are counted in bytes
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for node in parts(ast.parse(source)):
        for part, text in changes(node):
            begin = starts[part.lineno - 1] + part.col_offset
            end = starts[part.end_lineno - 1] + part.end_col_offset
            changed = source[:begin] + text.encode() + source[end:]
            key = hashlib.sha256(source + changed).hexdigest()[:16]
            yield Mutant(path, part.lineno, changed.decode(), key)


def copy_of_the_tree(name: str) -> Path:
    """Makes a folder with the files that the tests need."""
    tree = OUT / name
    shutil.rmtree(tree, ignore_errors=True)
    for part in ("jaxnorm", "tests"):
        shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tree)
    return tree


def run(tree: Path, mutant: Mutant, tests: list[str], limit: float | None) -> dict[str, Any]:
    """Runs tests of one mutant in a tree, which is restored afterwards."""
    settings = {
        "PYTHONPATH": str(tree),
        "PYTHONDONTWRITEBYTECODE": "1",  # two mutants may have the same size and timestamp
        "JAX_COMPILATION_CACHE_DIR": str(OUT / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow and not exhaustive"]
    command += ["-p", "no:cacheprovider", *tests]
    (tree / mutant.path).write_text(mutant.source)
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=tree,
        env={**os.environ, **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
        result = "killed" if process.returncode else "survived"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, result = process.communicate()[0], "timeout"
    (tree / mutant.path).write_text((ROOT / mutant.path).read_text())
    failed = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return {
        "key": mutant.key,
        "path": mutant.path,
        "line": mutant.line,
        "result": result,
        "seconds": round(time.monotonic() - start, 1),
        "diff": mutant.diff,
        "by": failed[0].split(" - ")[0] if failed else output[-500:] * (result == "killed"),
    }


def killers(records: Iterable[dict[str, Any]], path: str) -> list[str]:
    """Returns the tests that have killed mutants of the module, the most frequent first."""
    found = [r["by"] for r in records if r["path"] == path and r["by"].startswith("FAILED ")]
    return [by.removeprefix("FAILED ") for by, _ in Counter(found).most_common()]


def explanation(record: dict[str, Any]) -> str:
    """Returns why a survivor needs no test, or an empty string."""
    changed = [line[1:].strip() for line in record["diff"] if line.startswith("+")]
    return EXPLAINED.get(" ".join(changed), "")


def main() -> None:
    """Runs the mutants that have no record yet, and prints the summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200, help="how many mutants (200)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (0)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="how many at a time")
    parser.add_argument("--again", action="store_true", help="run the survivors again")
    options = parser.parse_args()
    sample = [mutant for path in TESTS for mutant in mutants(path)]
    random.Random(options.seed).shuffle(sample)
    print(f"{options.count} of {len(sample)} mutants")
    sample = sample[: options.count]

    OUT.mkdir(parents=True, exist_ok=True)
    file = OUT / "results.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    records = {record["key"]: record for record in map(json.loads, lines)}
    if options.again:
        records = {key: r for key, r in records.items() if r["result"] != "survived"}
    trees: queue.Queue[Path] = queue.Queue()
    for i in range(options.jobs):
        trees.put(copy_of_the_tree(f"tree{i}"))

    def run_in_a_tree(mutant: Mutant, limit: float | None = None) -> dict[str, Any]:
        first = killers(list(records.values()), mutant.path) if mutant.line else []
        tree = trees.get()
        try:
            record = run(tree, mutant, first, limit) if first else None
            # pytest also fails if a test of an earlier run does not exist any more.
            if record is None or not record["by"].startswith("FAILED"):
                record = run(tree, mutant, TESTS[mutant.path], limit)
        finally:
            trees.put(tree)
        where = f"{mutant.path}:{mutant.line}" if mutant.line else f"{mutant.path}, unchanged"
        print(f"{record['result']:8} {record['seconds']:6.1f} s {where}", flush=True)
        return record

    def record_of(mutant: Mutant) -> dict[str, Any]:
        if mutant.key not in records:
            record = run_in_a_tree(mutant, limits[mutant.path])
            with file.open("a") as out:
                out.write(json.dumps(record) + "\n")
            records[mutant.key] = record
        return records[mutant.key]

    limits = {}
    pending = {mutant.path for mutant in sample if mutant.key not in records}
    for path in sorted(pending):
        record = run_in_a_tree(Mutant(path, 0, (ROOT / path).read_text(), ""))
        if record["result"] != "survived":
            sys.exit(f"The tests of {path} fail without a change: {record['by']}")
        # Programs that a mutant compiles are cached for the unchanged module.
        limits[path] = 60 + 5 * record["seconds"]
    with ThreadPoolExecutor(options.jobs) as pool:
        found = list(pool.map(record_of, sample))

    for record in found:
        if record["result"] == "survived":
            record["result"] = "explained" if explanation(record) else "survived"
            where = f"{record['path']}:{record['line']} {explanation(record)}"
            print(f"\n{where}", *record["diff"], sep="\n")
    print()
    for path in TESTS:
        results = [record["result"] for record in found if record["path"] == path]
        counts = {n: results.count(n) for n in ("killed", "timeout", "explained", "survived")}
        print(f"{path}: {', '.join(f'{n} {name}' for name, n in counts.items())}")


if __name__ == "__main__":
    main()
