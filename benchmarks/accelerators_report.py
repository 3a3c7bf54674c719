"""Writes the page and the plot of the estimates of the compilers for TPUs and NVIDIA GPUs."""

import json
import math
from pathlib import Path
from typing import Any

import matplotlib.figure
import matplotlib.patches
from report import COLORS

DASH = "–"  # noqa: RUF001
JAXNORM, NONE = "jaxnorm", "none"
Row = dict[str, Any]
Answer = dict[str, Any]

INTRODUCTION = """\
These numbers are estimates and counts of the compilers. No program was run. Only the compile times
are measured.

- **Cycles** (TPU) are the sum of the estimates that XLA's TPU compiler attaches to its
  instructions. A program with an instruction without an estimate cannot be compared (n/c).
- **Bytes** are those of the operands and results of the instructions: on a GPU, the bytes that its
  kernels read and write.
- **Kernels** (GPU) are listed in addition to bytes, because even a small kernel takes microseconds.
  The number of kernels per norm is the number of kernels minus that of the same model without
  norms, divided by the number of norms.
- **Temporaries** are the peak memory that the program allocates in addition to its arguments and
  results.
- **Compile time** is the time to trace, lower and compile. It is the only number that depends on
  the load of the compiling machine.
- On a TPU, jaxnorm computes the moments again in a loop, of at most two rounds, if the first result
  is not accurate enough. The compiler does not know the number of rounds, and counts none. The cost
  with one round of every such loop is in square brackets. On a GPU there is no loop.
- A ratio is jaxnorm's number divided by the other library's: below 1, jaxnorm is better. A dash
  means that the library has no such norm, or not in this layout. An empty cell means that the
  program was not compiled. "Out of memory" means that the program needs more than the 16 GB of a
  TPU v5e. "Compiler crash" means that the compiler crashed, twice."""


def write_report(path: Path) -> str:
    """Writes the page and the plot next to the results, and returns the text of the page."""
    results = json.loads(path.read_text())
    rows = list(results["rows"].values())
    steps = [row for row in rows if row["job"]["kind"] == "step"]
    cells = [row for row in rows if row["job"]["kind"] == "cell"]
    found = list(
        dict.fromkeys(t for row in rows for t, answers in row["targets"].items() if answers)
    )
    found.sort(key=is_tpu, reverse=True)
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    page = ["# TPU and GPU: estimates of the compilers", "", INTRODUCTION]
    page += ["", f"Versions: {versions}."]
    page += ["", "## Summary", "", summary(cells, steps, found)]
    page += ["", f"![The norms' share of a training step]({path.stem}.png)"]
    for title, chosen, table in (
        ("Training steps", steps, step_table),
        ("Single norms", cells, cell_table),
    ):
        for target in found:
            if any(row["targets"].get(target) for row in chosen):
                page += ["", f"## {title}, {target}", "", table(chosen, target)]
    text = "\n".join(page) + "\n"
    path.with_suffix(".md").write_text(text)
    if steps:
        plot(steps, found, path.with_suffix(".png"))
    if steps and not any(row["job"]["full"] for row in steps):  # the figure of the README
        plot_ratios(steps, found, path.with_name(f"{path.stem}-ratios.png"))
    return text


# ---- Figures ----


def is_tpu(target: str) -> bool:
    """Returns whether the compiler of the target estimates cycles."""
    return target.startswith("TPU")


def figure(answer: Answer | None, target: str) -> float | None:
    """Returns the cost of a program: cycles on a TPU, bytes on a GPU."""
    return (answer or {}).get("cycles" if is_tpu(target) else "bytes")


def ratio(jaxnorm: float | None, other: float | None) -> float | None:
    """Returns jaxnorm's number divided by the other one, or None if one of them is unknown."""
    return jaxnorm / other if jaxnorm is not None and other else None


def written(number: float | None, form: str = ".2f") -> str:
    """Formats a number, or returns a dash."""
    return DASH if number is None else f"{number:{form}}"


def twin(job: dict[str, Any]) -> str:
    """Returns the library that a model is compared with."""
    return "flax.nnx" if "NNX" in job["model"] else "flax.linen"


def name_of_step(job: dict[str, Any]) -> str:
    """Returns the name of the model, which says if it has full depth."""
    return job["model"] + (", full depth" if job["full"] else "")


def name_of_cell(job: dict[str, Any]) -> str:
    """Returns the norm, the array and the mode, as cells of a table."""
    shape = "x".join(map(str, job["shape"]))
    first = ", channels first" if job["layout"] == "first" else ""
    mode = job["mode"] if job["training"] else f"evaluation, {job['mode']}"
    return f"{job['norm']} | {shape}{first} | {job['dtype']} | {mode}"


# ---- Summary ----


def summary(cells: list[Row], steps: list[Row], targets: list[str]) -> str:
    """Summarizes, for each target, the norms' ratios to the best library and the steps' to Flax."""
    lines = [
        "Single norms, channels last: jaxnorm's number divided by that of the best other library.",
        "",
        "| target | number | cells | geometric mean | worst | above 1.03 |",
        "|---|---|---|---|---|---|",
    ]
    for target in targets:
        found = {}
        for row in cells:
            value = ratio_to_best(row, target)
            if row["job"]["layout"] == "last" and value is not None:
                found[name_of_cell(row["job"]).replace(" | ", ", ")] = value
        if found:
            mean = math.exp(sum(map(math.log, found.values())) / len(found))
            worst = max(found, key=lambda name: found[name])
            above = sum(value > 1.03 for value in found.values())
            unit = "cycles" if is_tpu(target) else "bytes"
            lines.append(
                f"| {target} | {unit} | {len(found)} | {mean:.2f} "
                f"| {found[worst]:.2f} ({worst}) | {above} |"
            )
    lines += ["", "Training steps: jaxnorm's number divided by that of Flax.", ""]
    lines += ["| model | " + " | ".join(targets) + " |", "|---" * (1 + len(targets)) + "|"]
    for row in steps:
        name, other = name_of_step(row["job"]), twin(row["job"])
        values = (ratio_to(row, target, other) for target in targets)
        lines.append(f"| {name} | " + " | ".join(written(v, ".3f") for v in values) + " |")
    return "\n".join(lines)


def ratio_to(row: Row, target: str, library: str) -> float | None:
    """Returns jaxnorm's number divided by that of a library."""
    answers = row["targets"].get(target, {})
    return ratio(figure(answers.get(JAXNORM), target), figure(answers.get(library), target))


def ratio_to_best(row: Row, target: str) -> float | None:
    """Returns jaxnorm's number divided by that of the best other library."""
    others = [library for library in row["targets"].get(target, {}) if library != JAXNORM]
    ratios = [ratio_to(row, target, library) for library in others]
    return max((value for value in ratios if value is not None), default=None)


def missing(answer: Answer) -> str | None:
    """Returns why there is no program, if the reason is in the target and not in the library."""
    said = answer.get("missing", "")
    if said.startswith("the process has ended"):
        return "compiler crash"
    return "out of memory" if "Ran out of memory" in said else None


# ---- Steps ----


def step_table(steps: list[Row], target: str) -> str:
    """Returns a table with a row for each model and library, and ratios to Flax."""
    tpu = is_tpu(target)
    head = ["model", "library", *(["million cycles", "ratio"] if tpu else []), "GB", "ratio"]
    head += ["" if tpu else "kernels per norm", "temporaries, MB", "ratio", "compile time, ratio"]
    head = [title for title in head if title]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in steps:
        answers = row["targets"].get(target, {})
        for library, answer in answers.items():
            if "missing" in answer:
                text = [missing(answer) or DASH] * (len(head) - 2)
            else:
                text = step_cells(answers, library, twin(row["job"]), tpu)
            lines.append(f"| {name_of_step(row['job'])} | {library} | " + " | ".join(text) + " |")
    lines += ["", "Ratios in this table are the number of the row divided by that of Flax."]
    return "\n".join(lines)


def step_cells(answers: dict[str, Answer], library: str, other: str, tpu: bool) -> list[str]:
    """Returns the columns of one library."""
    answer, flax = answers[library], answers.get(other, {})

    def column(key: str, unit: float, form: str) -> list[str]:
        once = (answer["once"] or {}).get(key) if key != "temporaries" else None
        text = "n/c" if answer[key] is None else f"{answer[key] / unit:{form}}"
        text += f" [{once / unit:{form}}]" if once is not None else ""
        return [text, written(ratio(answer[key], flax.get(key)))]

    columns = column("cycles", 1e6, ".2f") if tpu else []
    columns += column("bytes", 1e9, ".2f")
    if not tpu:
        without = answers.get(NONE, {}).get("kernels")
        more = None if without is None else (answer["kernels"] - without) / answer["norms"]
        columns.append(written(more, ".1f"))
    columns += column("temporaries", 1e6, ".0f")
    return [*columns, written(ratio(answer["seconds"], flax.get("seconds")))]


# ---- Cells ----


def cell_table(cells: list[Row], target: str) -> str:
    """Returns a table with a row for each cell and a column for each library."""
    libraries = list(
        dict.fromkeys(library for row in cells for library in row["targets"].get(target, {}))
    )
    unit = "cycles" if is_tpu(target) else "bytes"
    numbers = "Each cell has the bytes, as a multiple of the bytes of x, and the number of kernels."
    if is_tpu(target):
        numbers = (
            "Each cell has the cycles in millions. If the program has a loop, the cycles with one "
            "round of every loop are in square brackets."
        )
    ratios = f"jaxnorm's {unit} divided by those of the library are in parentheses."
    lines = [f"{numbers} {ratios}", ""]
    lines += ["| norm | x | dtype | mode | " + " | ".join(libraries) + " |"]
    lines.append("|---" * (4 + len(libraries)) + "|")
    for row in cells:
        if row["targets"].get(target):
            texts = [cell_text(row, target, library) for library in libraries]
            lines.append(f"| {name_of_cell(row['job'])} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def cell_text(row: Row, target: str, library: str) -> str:
    """Returns a library's number, the one with one round of each loop, and the ratio."""
    answer = row["targets"][target].get(library)
    if answer is None:
        return ""
    if "missing" in answer:
        return DASH
    key, unit = ("cycles", 1e6) if is_tpu(target) else ("bytes", bytes_of_x(row["job"]))
    if answer[key] is None:
        return "n/c"
    text = f"{answer[key] / unit:.2f}"
    if answer["once"] and answer["once"][key] is not None:
        text += f" [{answer['once'][key] / unit:.2f}]"
    text += "" if is_tpu(target) else f"; {answer['kernels']}"
    value = None if library == JAXNORM else ratio_to(row, target, library)
    return text if value is None else f"{text} ({value:.2f})"


def bytes_of_x(job: dict[str, Any]) -> int:
    """Returns the number of bytes of x."""
    return math.prod(job["shape"]) * {"float32": 4, "bfloat16": 2}[job["dtype"]]


# ---- Plot ----


def plot(steps: list[Row], targets: list[str], path: Path) -> None:
    """Plots the share of the norms in a step: a column for each model, a row for each target."""
    steps = [row for row in steps if not row["job"]["full"]]
    libraries = [
        library
        for library in COLORS
        if any(library in answers for row in steps for answers in row["targets"].values())
    ]
    size = (1.3 * len(steps) + 1, 2.6 * len(targets) + 0.9)
    drawing = matplotlib.figure.Figure(figsize=size, layout="constrained")
    grid = drawing.subplots(len(targets), len(steps), squeeze=False)
    for target, panels in zip(targets, grid, strict=True):
        for row, axes in zip(steps, panels, strict=True):
            draw_panel(axes, row["targets"].get(target, {}), target, libraries)
        unit = "cycles" if is_tpu(target) else "bytes"
        panels[0].set_ylabel(f"{target}\n% of the {unit} without norms", size=9)
    for row, axes in zip(steps, grid[0], strict=True):
        model, norm = row["job"]["model"].rsplit(", ", 1)
        parts = model.replace(" in ", "\nin ").replace(" under ", "\nunder ").split("\n")
        axes.set_title("\n".join([*parts, norm] if len(parts) > 1 else ["", model, norm]), size=8)
    handles = [matplotlib.patches.Patch(color=COLORS[library]) for library in libraries]
    drawing.legend(handles, libraries, loc="outside lower center", ncols=len(libraries))
    drawing.suptitle(
        "What the norms add to a training step, as compiled: lower is better. "
        "Each panel has its own scale.",
        size=11,
    )
    drawing.savefig(path, dpi=130)


def plot_ratios(steps: list[Row], targets: list[str], path: Path) -> None:
    """The figures and the peak temporaries of each step, divided by those with Flax's norms."""
    steps = [row for row in steps if not row["job"]["full"]]
    units = (f"{'cycles' if is_tpu(target) else 'bytes moved'} on {target}" for target in targets)
    drawing = matplotlib.figure.Figure(figsize=(9, 0.4 * len(steps) + 1.3), layout="constrained")
    panels = drawing.subplots(1, 2, sharex=True, sharey=True)
    for axes, title, of in (
        (
            panels[0],
            " or ".join(units),
            lambda row, target: ratio_to(row, target, twin(row["job"])),
        ),
        (panels[1], "peak of temporary memory", ratio_of_temporaries),
    ):
        for k, target in enumerate(targets):
            for i, row in enumerate(steps):
                y = i + 0.3 * (k - (len(targets) - 1) / 2)
                value = of(row, target)
                if value is None:
                    reason = missing(row["targets"].get(target, {}).get(twin(row["job"]), {}))
                    axes.text(1.005, y, f"Flax: {reason or 'no number'}", size=7, va="center")
                    continue
                axes.plot([1, value], [y, y], color=f"C{k}", linewidth=3, solid_capstyle="butt")
                axes.plot(value, y, "osD^"[k], color=f"C{k}", label="" if i else target)
                offset, side = (6, "left") if value >= 1 else (-6, "right")
                axes.annotate(
                    f"{value:.2f}",
                    (value, y),
                    (offset, 0),
                    textcoords="offset points",
                    ha=side,
                    va="center",
                    size=7,
                )
        axes.set_title(title, size=9)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.margins(x=0.12)
    panels[0].set_yticks(range(len(steps)), [row["job"]["model"] for row in steps])
    panels[0].invert_yaxis()
    panels[0].legend(loc="upper left", fontsize=8)
    drawing.suptitle(
        "A training step with jaxnorm, relative to Flax's norms: lower is better", size=11
    )
    drawing.savefig(path, dpi=130)


def ratio_of_temporaries(row: Row, target: str) -> float | None:
    """jaxnorm's peak of temporary memory divided by Flax's."""
    answers = row["targets"].get(target, {})
    jaxnorm, other = (answers.get(name, {}) for name in (JAXNORM, twin(row["job"])))
    return ratio(jaxnorm.get("temporaries"), other.get("temporaries"))


def draw_panel(axes: Any, answers: dict[str, Answer], target: str, libraries: list[str]) -> None:
    """Draws the percentage that the norms of each library add to the model without norms."""
    without = figure(answers.get(NONE), target)
    shown = [library for library in libraries if library in answers]
    if not shown or not without:  # the step is not compiled for this target
        axes.set_axis_off()
        return
    for k, library in enumerate(shown):
        value = figure(answers[library], target)
        if value is None:
            absent = "no such norm" if "missing" in answers[library] else "not comparable"
            reason = missing(answers[library]) or absent
            axes.annotate(
                reason, (k, 0), (0, 4), textcoords="offset points", ha="center", rotation=90, size=7
            )
            axes.bar(k, 0, 0.85)
            continue
        share = 100 * (value / without - 1)
        axes.bar(k, share, 0.85, color=COLORS[library])
        axes.annotate(
            f"{share:.0f}" if abs(share) >= 10 else f"{share:.1f}",
            (k, share),
            (0, 2 if share >= 0 else -2),
            textcoords="offset points",
            ha="center",
            va="bottom" if share >= 0 else "top",
            size=7,
        )
    axes.set_xticks([])
    axes.tick_params(axis="y", labelsize=7)
    axes.margins(y=0.12)
    axes.axhline(0, color="black", linewidth=0.6)
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
