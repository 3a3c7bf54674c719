"""Writes a table for each kind of measurement, and a plot."""

import json
from pathlib import Path
from typing import Any

import matplotlib.figure

COLORS = {
    "jaxnorm": "#d62728",
    "flax.linen": "#1f77b4",
    "flax.nnx": "#7fb2d9",
    "dm-haiku": "#2ca02c",
    "equinox": "#9467bd",
    "keras": "#8c564b",
    "torch": "#ff7f0e",
    "torch.compile": "#ffbb78",
}
LIMIT = "scaling"


def write_report(path: Path) -> str:
    """Writes the page and the plot next to the results, and returns the text of the page."""
    results = json.loads(path.read_text())
    cells = list(results["cells"].values())
    page = [f"# Benchmarks: {path.stem}", "", about(results), ""]
    for cores in sorted({cell["cores"] for cell in cells}):
        for mode in ("forward+backward", "forward"):
            for training in (True, False):
                chosen = [
                    c
                    for c in cells
                    if c["cores"] == cores
                    and c["job"].get("mode") == mode
                    and c["job"].get("training") is training
                ]
                if chosen:
                    kind = mode if training else "evaluation, forward"
                    page += [f"## {kind}, {cores} core(s)", "", norm_table(chosen), ""]
        steps = [c for c in cells if c["cores"] == cores and c["job"]["kind"] == "step"]
        if steps:
            page += [f"## One training step, {cores} core(s)", "", step_table(steps), ""]
    kept = [c for c in cells if c["job"].get("mode") == "forward+backward" and c["cores"] == 1]
    page += ["## Memory", "", memory_table(kept), ""]
    text = "\n".join(page)
    path.with_suffix(".md").write_text(text)
    plot(cells, path.with_suffix(".png"))
    return text


def about(results: dict[str, Any]) -> str:
    """Describes the machine, the versions and the table."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return (
        f"{results['machine']['processor']}, {results['machine']['cores']} cores. {versions}.\n\n"
        "Times are minima, in milliseconds. jaxnorm's time divided by the time in the cell is in "
        "parentheses. The column scaling is the time of y = 1.0001 x, which reads x and writes y "
        "once; no norm can be faster. A dash means that the library has no such norm, or not in "
        "this layout."
    )


def name_of(job: dict[str, Any]) -> str:
    """Returns the name of the cell in a table."""
    shape = "x".join(map(str, job["shape"]))
    more = "" if job["layout"] == "last" else ", channels first"
    return f"{job['norm']} | {shape}{more} | {job['dtype']}"


def norm_table(cells: list[dict[str, Any]]) -> str:
    """Returns a table with a row for each cell and a column for each library."""
    libraries = [
        "jaxnorm",
        *[k for k in cells[0]["libraries"] if k not in ("jaxnorm", LIMIT)],
        LIMIT,
    ]
    lines = ["| norm | x | dtype | " + " | ".join(libraries) + " |"]
    lines.append("|---" * (3 + len(libraries)) + "|")
    for cell in cells:
        row = [f"| {name_of(cell['job'])}"]
        jaxnorm = cell["libraries"].get("jaxnorm", {}).get("minimum")
        row += [
            time_cell(cell["libraries"].get(library, {}), library, jaxnorm) for library in libraries
        ]
        lines.append(" | ".join(row) + " |")
    return "\n".join(lines)


def time_cell(answer: dict[str, Any], library: str, jaxnorm: float | None) -> str:
    """Returns the time of a library, and jaxnorm's as a ratio to it."""
    if "minimum" not in answer:
        return "–"  # noqa: RUF001
    text = f"{answer['minimum'] * 1e3:.2f}"
    if library == "jaxnorm" or not jaxnorm:
        return text
    return f"{text} ({jaxnorm / answer['minimum']:.2f})"


def step_table(cells: list[dict[str, Any]]) -> str:
    """Returns a table of milliseconds for a step, and of seconds to compile it."""
    libraries = [
        library
        for library in cells[0]["libraries"]
        if library != LIMIT and any("minimum" in c["libraries"][library] for c in cells)
    ]
    lines = ["| model | " + " | ".join(libraries) + " |", "|---" * (1 + len(libraries)) + "|"]
    for cell in cells:
        answers = cell["libraries"]
        jaxnorm = answers.get("jaxnorm", {}).get("minimum")
        row = [time_cell(answers[library], library, jaxnorm) for library in libraries]
        lines.append(f"| {cell['job']['model']} | " + " | ".join(row) + " |")
        compiled = compile_cells(answers, libraries)
        lines.append(f"| {cell['job']['model']}, compile time | {compiled} |")
    return "\n".join(lines)


def compile_cells(answers: dict[str, Any], libraries: list[str]) -> str:
    """Returns the seconds to trace, lower and compile, and jaxnorm's as a ratio to them."""
    jaxnorm, row = answers.get("jaxnorm", {}).get("compile_seconds"), []
    for library in libraries:
        seconds = answers[library].get("compile_seconds")
        ratio = (
            f" ({jaxnorm / seconds:.2f})" if seconds and jaxnorm and library != "jaxnorm" else ""
        )
        row.append(f"{seconds:.1f} s{ratio}" if seconds else "–")  # noqa: RUF001
    return " | ".join(row)


def memory_table(cells: list[dict[str, Any]]) -> str:
    """Returns a table of residuals, temporaries and bytes accessed, as multiples of x."""
    libraries = [k for k in cells[0]["libraries"] if k != LIMIT and not k.startswith("torch")]
    lines = [
        "Each cell has the bytes kept for the backward pass, the bytes of temporaries, and the "
        "bytes accessed, as multiples of the bytes of x.",
        "",
    ]
    lines += ["| norm | x | dtype | " + " | ".join(libraries) + " |"]
    lines.append("|---" * (3 + len(libraries)) + "|")
    for cell in cells:
        row = [f"| {name_of(cell['job'])}"]
        for library in libraries:
            answer = cell["libraries"].get(library, {})
            if "x_bytes" not in answer:
                row.append("–")  # noqa: RUF001
                continue
            keys = ("kept", "temporaries", "accessed")
            row.append(" / ".join(f"{(answer[k] or 0) / answer['x_bytes']:.1f}" for k in keys))
        lines.append(" | ".join(row) + " |")
    return "\n".join(lines)


def plot(cells: list[dict[str, Any]], path: Path) -> None:
    """Plots forward+backward in float32 on one core, as multiples of the limit, for each norm."""
    chosen = [
        c
        for c in cells
        if c["cores"] == 1
        and c["job"].get("mode") == "forward+backward"
        and c["job"]["dtype"] == "float32"
        and c["job"]["layout"] == "last"
    ]
    norms = list(dict.fromkeys(c["job"]["norm"] for c in chosen))
    figure = matplotlib.figure.Figure(figsize=(12, 6.4), layout="constrained")
    panels = figure.subplots(2, (len(norms) + 1) // 2, squeeze=False).ravel()
    for axes, norm in zip(panels, norms, strict=False):
        of_norm = [c for c in chosen if c["job"]["norm"] == norm]
        for i, cell in enumerate(of_norm):
            limit = cell["libraries"].get(LIMIT, {}).get("minimum")
            for k, (library, color) in enumerate(COLORS.items()):
                seconds = cell["libraries"].get(library, {}).get("minimum")
                if seconds and limit:
                    label = library if i == 0 else None
                    axes.bar(i + 0.1 * (k - 3.5), seconds / limit, 0.1, color=color, label=label)
        labels = ["x".join(map(str, c["job"]["shape"])) for c in of_norm]
        axes.set_xticks(range(len(labels)), labels, size=7)
        axes.set_title(norm, size=10)
        axes.grid(axis="y", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("time / time of y = 1.0001 x")
    handles, names = {}, []
    for axes in panels:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    names = [name for name in COLORS if name in handles]
    figure.legend([handles[n] for n in names], names, loc="outside lower center", ncols=len(names))
    figure.suptitle("Forward and backward pass, float32, one core: lower is better")
    figure.savefig(path, dpi=130)
