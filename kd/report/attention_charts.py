"""The charts of `kd attention`, each as SVG and PNG, the same bytes each time; told apart without colour as well."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.config import Config
from kd.report.charts import COLOURS, LINES, MARKERS

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

LAYER_CHARTS = {
    "entropy": ("Entropy of attention", "entropy (nats)"),
    "focus": ("Attention of a token to itself", "mean weight on the diagonal"),
    "sparsity": ("Sparsity of attention", "share of weights below 0.1"),
    "similarity": ("Likeness of a layer to the next", "cosine similarity of the maps"),
}
STUDENTS, TEACHER = "confidence", "teacher-confidence"
TITLES = {name: title for name, (title, _) in LAYER_CHARTS.items()} | {
    STUDENTS: "How sure the students are of the next token",
    TEACHER: "How sure the teacher is behind each prompt",
}


def folder(config: Config) -> Path:
    """Where the analysis lies."""
    return config.artifacts / "attention"


def heads_folder(config: Config) -> Path:
    """Where the images of single heads lie, which no stage makes."""
    return config.artifacts / "attention-heads"


def layer_chart(metric: str, students: Mapping[str, NDArray[np.float64]], work: Path) -> None:
    """One line for each student over the layers; below, how far each is from the first, the bare student."""
    title, label = LAYER_CHARTS[metric]
    figure = _figure(8, 6.5)
    values, differences = figure.subplots(2, sharex=True, height_ratios=(3, 2))
    first = next(iter(students.values()))
    for i, (name, line) in enumerate(students.items()):
        style = {
            "color": COLOURS[i % len(COLOURS)],
            "linestyle": LINES[i % len(LINES)],
            "marker": MARKERS[i % len(MARKERS)],
            "markersize": 4,
            "linewidth": 1.2,
        }
        values.plot(line, label=name, **style)
        differences.plot(line - first, **style)
    values.set_title(title)
    values.set_ylabel(label)
    differences.set_ylabel(f"difference from\n{next(iter(students))}")
    differences.set_xlabel("layer")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    _save(figure, work / metric)


def student_chart(students: Mapping[str, tuple[float, float]], work: Path) -> None:
    """Two bars for each student: its confidence over the positions of the questions and of its own answers."""
    figure = _figure(8, 4.5)
    axes = figure.subplots()
    for side, (label, colour, hatch) in enumerate((("question", COLOURS[2], ""), ("own answer", COLOURS[4], "//"))):
        places = [place + (side - 0.5) * 0.4 for place in range(len(students))]
        bars = axes.bar(
            places, [pair[side] for pair in students.values()], 0.4, label=label, color=colour, hatch=hatch, ec="white"
        )
        axes.bar_label(bars, fmt="%.3f", fontsize=8)
    axes.set_xticks(range(len(students)), list(students), rotation=20, ha="right", rotation_mode="anchor")
    _finish(axes, STUDENTS)
    _save(figure, work / STUDENTS)


def teacher_chart(prompts: Mapping[str, dict[str, Any]], work: Path) -> None:
    """A bar for each prompt, with the published figure as a mark where there is one."""
    figure = _figure(8, 4.5)
    axes = figure.subplots()
    bars = axes.bar(
        list(prompts),
        [one["mean_max_probability"] for one in prompts.values()],
        0.5,
        color=COLOURS[2],
        label="measured",
    )
    axes.bar_label(bars, fmt="%.3f", fontsize=8)
    marks = [(prompt, one["published"]) for prompt, one in prompts.items() if one["published"] is not None]
    for i, (prompt, published) in enumerate(marks):
        axes.plot(prompt, published, "D", color=COLOURS[0], label=None if i else "published")
        axes.annotate(f"{published}", (prompt, published), (8, -3), textcoords="offset points", fontsize=8)
    _finish(axes, TEACHER)
    _save(figure, work / TEACHER)


def head_chart(layer: int, head: int, students: Mapping[str, NDArray[np.float32]], work: Path) -> Path:
    """One head's attention on one question, a panel for each student on one scale; returns the PNG's path."""
    from matplotlib.colors import PowerNorm

    columns = min(3, len(students))
    rows = -(-len(students) // columns)
    figure = _figure(3.2 * columns + 1, 3.2 * rows + 0.6)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat
    for panel, (name, weights) in zip(panels, students.items(), strict=False):
        # A square root's scale: few weights are near 1, and what tells heads apart is among the small ones.
        image = panel.imshow(weights, cmap="cividis", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
        panel.set_title(name, fontsize=9)
    for panel in panels:
        panel.set_axis_off()
    figure.suptitle(f"Layer {layer}, head {head}")
    figure.supxlabel("position attended to")
    figure.supylabel("position that attends")
    figure.colorbar(image, ax=figure.axes, label="weight", shrink=0.8)
    path = work / f"layer-{layer:02}-head-{head:02}.png"
    figure.savefig(path, dpi=150, metadata={"Software": None})
    return path


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _finish(axes: Any, chart: str) -> None:
    axes.set_title(TITLES[chart])
    axes.set_ylabel("mean largest probability")
    axes.set_ylim(0, 1)
    axes.legend(frameon=False)


def _save(figure: Figure, stem: Path) -> None:
    """SVG with its text as text, and PNG; neither tells when or by which version it was made."""
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": "kd", "svg.fonttype": "none"}):
        figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None, "Creator": None})
    figure.savefig(stem.with_suffix(".png"), dpi=150, metadata={"Software": None})
