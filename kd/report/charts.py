"""Charts by matplotlib: one style, made without a display, and the same bytes each time.

Readable in grey and for colour-blind readers: Okabe and Ito's colours, each with a marker, line style or hatch of its
own. The SVG has a transparent background and takes its ink from the page around it (`currentColor`), so it suits a
light page and a dark one; it holds no `style`, which a strict content security policy would refuse.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from itertools import combinations, product
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from kd.io.files import write_text
from kd.report.signs import collapse

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 5.4  # inches: about as wide as a phone, so that the text is still to be read there
WIDE = 7.3  # the same for a picture of two panels, on a page for a screen
INK, PALE = "#1b1f24", "#8b929b"  # INK becomes the page's own text colour; PALE is seen on light and dark
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7", "#f0e442")  # Okabe and Ito
MARKERS = "osD^vPX"
LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 2)))
LEVELS = "cividis"  # evenly brighter from low to high in grey, and to colour-blind readers
POINTS = 24  # of a loss curve; a longer one is drawn as means of its parts

STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": False,
    "figure.constrained_layout.w_pad": 0.1,  # a file's background has an edge
    "figure.constrained_layout.h_pad": 0.1,
    "grid.color": PALE,
    "grid.alpha": 0.35,
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}

_SVG = "{http://www.w3.org/2000/svg}"
_LINK = "{http://www.w3.org/1999/xlink}href"
_FONT = re.compile(r"(?:(?P<weight>bold) )?(?P<size>[0-9.]+px) .*")
# In a file of its own, or in an <img>, which inherits nothing: a background and an ink that change together, so that
# it can be read on any page whatever that page's scheme.
_STANDALONE = (
    "svg{color:#1b1f24;background:#fff}@media(prefers-color-scheme:dark){svg{color:#e6e8eb;background:#14171a}}"
)
PIXELS = 96  # an inch, on a screen


@dataclass(frozen=True)
class Chart:
    """A chart: the name of its files, what it shows, how it is read, and the drawing."""

    name: str
    title: str
    caption: str
    figure: Figure


def accuracy_chart(experiments: Mapping[str, Mapping[str, Any]], control: str | None = None) -> Chart:
    """Measured accuracy as bars with 95 % intervals, the published figure as a mark on each that has one.

    Each experiment has `accuracy`, `interval` and `published_accuracy` (None: there is none to stand beside it), and
    may have `trained`, `runs` and `collapsed`. A line goes through the bar of the `control`.
    """
    marks = [
        (100 * one["published_accuracy"], i)
        for i, one in enumerate(experiments.values())
        if one["published_accuracy"] is not None
    ]
    with _axes(0.42 * len(experiments) + 1.1) as (figure, axes):
        _bars(axes, experiments, control)
        if marks:
            axes.plot(*zip(*marks, strict=True), "D", color=COLOURS[1], markeredgecolor=INK, label="published")
        highest = max(*(100 * one["interval"][1] for one in experiments.values()), *(x for x, _ in marks), 10)
        axes.set_xlim(0, (1.75 if _in_some_seeds(experiments) else 1.3) * highest)  # with room for what stands beside
        axes.set_xticks([tick for tick in axes.get_xticks() if tick <= min(100, axes.get_xlim()[1])])
        _name_rows(axes, experiments)
        axes.set_xlabel("accuracy on the test questions (%)")
        _legend(figure, axes)
    seeds = any(len(one.get("runs", ())) > 1 for one in experiments.values())
    over = (
        "the mean over the seeds, with its 95 % interval over seeds and questions"
        if seeds
        else "with its 95 % interval"
    )
    caption = f"Bars, and figures on the right: share of test questions that are right, {over}."
    if control:
        caption += f" The line: {control}."
    if marks:
        caption += " Diamonds: what the paper printed."
    return Chart("accuracy", "Accuracy", caption, figure)


def protocol_chart(panels: Mapping[str, Mapping[str, Any]], names: Mapping[str, str]) -> Chart:
    """The accuracies of several results documents side by side, with their headings, in one order of rows.

    `names` has the experiments in that order, each by what it is called. Each panel has a line through its control's
    bar, and all have one scale.
    """
    documents = panels.values()
    ends = [100 * document["experiments"][name]["interval"][1] for document in documents for name in names]
    room = 2.1 if any(_in_some_seeds(document["experiments"]) for document in documents) else 1.25
    with _figure(WIDE, 0.4 * len(names) + 1.35) as figure:
        row = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (heading, document) in zip(row, panels.items(), strict=True):
            _bars(axes, {name: document["experiments"][name] for name in names}, document["control"])
            axes.set_title(heading, loc="left", fontweight="bold", fontsize=11)
            axes.set_xlim(0, room * max(10, *ends))
            axes.set_xlabel("test questions right (%)")
        _name_rows(row[0], {called: name for name, called in names.items()})
        for axes in row[1:]:
            _name_rows(axes, names)
            axes.set_yticklabels([])
        _legend(figure, row[0])
    return Chart("protocols", f"Accuracy: {', '.join(panels)}", "", figure)


def loss_chart(curves: Mapping[str, Sequence[Sequence[tuple[int, float]]]]) -> Chart:
    """Training loss of each student over its steps, a line for each of its runs."""
    longest = max(len(curve) for student in curves.values() for curve in student)
    size = -(-longest // POINTS)
    several = any(len(student) > 1 for student in curves.values())
    with _axes(3.4) as (figure, axes):
        for i, (name, student) in enumerate(curves.items()):
            for j, curve in enumerate(student):
                parts = [curve[start : start + size] for start in range(0, len(curve), size)]
                steps = [part[-1][0] for part in parts]
                means = [sum(loss for _, loss in part) / len(part) for part in parts]
                axes.plot(
                    steps,
                    means,
                    linestyle=LINES[i % len(LINES)],
                    color=_colour(i),
                    marker=MARKERS[i % len(MARKERS)],
                    markersize=5,
                    label=None if j else name,
                )
        axes.grid(axis="y")
        axes.set_xlabel("step")
        axes.set_ylabel("training loss")
        _legend(figure, axes)
    averaged = f", each point the mean of {size} steps" if size > 1 else ""
    seeds = ", a line for each seed" if several else ""
    return Chart("loss", "Training loss", f"The loss of every student at each update{seeds}{averaged}.", figure)


def agreement_chart(
    answers: Mapping[str, Sequence[Sequence[str | None]]], right: Mapping[str, Sequence[Sequence[bool]]]
) -> Chart:
    """How far the experiments agree on the same questions: same answer above the diagonal, both right below it.

    Of each experiment it takes what every run answered, and where it was right. Pairs of runs are averaged.
    """
    import numpy as np

    names = list(answers)
    shares = np.diag([fmean(fmean(run) for run in right[name]) for name in names])
    for (i, a), (j, b) in combinations(enumerate(names), 2):
        shares[i, j] = fmean(_share_same(*pair) for pair in product(answers[a], answers[b]))
        shares[j, i] = fmean(_share_both(*pair) for pair in product(right[a], right[b]))
    with _axes(0.55 * len(names) + 1.7) as (figure, axes):
        # A mesh of rectangles: an image would be pixels inside the SVG.
        axes.pcolormesh(shares, cmap=LEVELS, vmin=0, vmax=1, edgecolors=PALE, linewidth=0.5)
        for (i, j), share in np.ndenumerate(shares):
            seen = "#000000" if share > 0.5 else "#ffffff"
            weight = "bold" if i == j else "normal"
            axes.text(j + 0.5, i + 0.5, f"{100 * share:.0f}", ha="center", va="center", color=seen, fontweight=weight)
        axes.spines[:].set_visible(False)
        axes.set_xticks([i + 0.5 for i in range(len(names))], names, rotation=40, ha="right")
        axes.set_yticks([i + 0.5 for i in range(len(names))], names)
        axes.tick_params(length=0)
        axes.invert_yaxis()
    return Chart(
        "agreement",
        "Agreement between experiments",
        "Per cent of the test questions. Above the diagonal: "
        "both give the same answer. Below: both are right. On it, in bold: the experiment's own accuracy.",
        figure,
    )


def rule_set_chart(accuracies: Mapping[str, Mapping[str, float]]) -> Chart:
    """Accuracy of each experiment (outer key) by each rule set (inner key), nothing decided by hand."""
    rule_sets = list(next(iter(accuracies.values())))
    with _axes(0.42 * len(accuracies) + 1.5) as (figure, axes):
        for i, rule_set in enumerate(rule_sets):
            shares = [100 * one[rule_set] for one in accuracies.values()]
            rows = [row + (i - (len(rule_sets) - 1) / 2) * 0.12 for row in range(len(shares))]  # none hides another
            axes.plot(
                shares,
                rows,
                MARKERS[i % len(MARKERS)],
                color=_colour(i),
                markeredgecolor=INK,
                markeredgewidth=0.7,
                markersize=7.5,
                label=rule_set,
                clip_on=False,
                zorder=3,
            )
        axes.set_xlim(left=0)
        axes.grid(axis="both")
        _name_rows(axes, accuracies)
        axes.set_xlabel("accuracy by the rules alone (%)")
        _legend(figure, axes)
    return Chart(
        "rule-sets",
        "Rule sets",
        "The same responses, read by each rule set; rows that it does not settle count as wrong.",
        figure,
    )


def length_chart(tokens: Mapping[str, Sequence[int]], cut: Mapping[str, Sequence[bool]]) -> Chart:
    """How long the responses of each experiment are, and how many of them its limit cut off."""
    with _axes(0.42 * len(tokens) + 1.1) as (figure, axes):
        axes.boxplot(
            list(tokens.values()),
            orientation="horizontal",
            whis=(5, 95),
            showfliers=False,
            widths=0.55,
            positions=range(len(tokens)),
            patch_artist=True,
            boxprops={"facecolor": COLOURS[4], "edgecolor": INK},
            medianprops={"color": INK, "linewidth": 2.4},
            whiskerprops={"color": INK},
            capprops={"color": INK},
        )
        longest = max(1, *(max(lengths) for lengths in tokens.values()))
        for row, name in enumerate(tokens):
            axes.annotate(f"{sum(cut[name]) / len(cut[name]):.0%} cut", (1.04 * longest, row), va="center")
        axes.set_xlim(0, 1.24 * longest)
        axes.grid(axis="x")
        _name_rows(axes, tokens)
        axes.set_xlabel("tokens in a response")
    return Chart(
        "length",
        "Length of the responses",
        "Boxes: the middle half, with the median; whiskers: 5 to 95 % of "
        "the responses. On the right: how many were cut off at the token limit.",
        figure,
    )


def difference_chart(questions: Mapping[str, Mapping[str, Mapping[str, Any]]], margin: float) -> Chart:
    """Differences in accuracy (`difference`) with their 95 % `interval`s, by what is asked and by pair, a colour and
    marker for each question; the band is the margin within which two students count as equal."""
    pairs = [(place, name) for place, found in enumerate(questions.values()) for name in found]
    with _figure(WIDE, 0.26 * len(pairs) + 1.4) as figure:
        axes = figure.subplots()
        axes.axvspan(-100 * margin, 100 * margin, color=PALE, alpha=0.25, linewidth=0, zorder=0)
        axes.axvline(0, color=INK, linewidth=1, zorder=0.5)
        for place, (question, found) in enumerate(questions.items()):
            middles = [100 * one["difference"] for one in found.values()]
            ends = [[100 * end for end in one["interval"]] for one in found.values()]
            arms = [
                [max(0.0, middle - low), max(0.0, high - middle)]
                for middle, (low, high) in zip(middles, ends, strict=True)
            ]
            axes.errorbar(
                middles,
                [row for row, (of, _) in enumerate(pairs) if of == place],
                xerr=list(zip(*arms, strict=True)),
                fmt=MARKERS[place % len(MARKERS)],
                color=_colour(place),
                markeredgecolor=INK,
                markeredgewidth=0.7,
                ecolor=INK,
                elinewidth=1.2,
                capsize=3,
                label=question,
            )
        axes.grid(axis="x")
        _name_rows(axes, {f"{name}{chr(8203) * of}": of for of, name in pairs})  # one pair may answer two questions
        axes.set_xlabel("points of accuracy more")
        _legend(figure, axes)
    caption = "First less second, with its 95 % interval; the band: what counts as equal."
    return Chart("differences", "Differences in accuracy", caption, figure)


def drawn(chart: Chart) -> tuple[Chart, str]:
    """The chart with its SVG."""
    return chart, svg(chart)


def svg(chart: Chart) -> str:
    """The chart as an SVG element for a page: no ids shared with other charts, no styles, ink in `currentColor`."""
    return ElementTree.tostring(_element(chart), encoding="unicode")


def standalone(chart: Chart, drawn: str) -> str:
    """The text of an SVG file of the chart, `drawn` as `svg` gave it."""
    width, height = (round(PIXELS * inches) for inches in chart.figure.get_size_inches())
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
    return drawn.replace("<svg", head, 1).replace(">", f"><style>{_STANDALONE}</style>", 1)


def write_chart(chart: Chart, drawn: str, folder: Path) -> None:
    """Write the chart, `drawn` as `svg` gave it, as <name>.svg and <name>.png."""
    write_text(folder / f"{chart.name}.svg", standalone(chart, drawn))
    with styled():
        chart.figure.savefig(folder / f"{chart.name}.png", dpi=150, facecolor="white", metadata={"Software": None})


def _bars(axes: Axes, experiments: Mapping[str, Mapping[str, Any]], control: str | None) -> None:
    """A row for each experiment: a bar, its 95 % interval, its accuracy on the right; a line through the control's."""
    found = list(experiments.values())
    measured = [100 * one["accuracy"] for one in found]
    ends = [[100 * end for end in one["interval"]] for one in found]
    # A rate of 0 or 1 can lie a rounding error outside its own interval; a bar's arm cannot be negative.
    arms = [[max(0.0, value - low), max(0.0, high - value)] for value, (low, high) in zip(measured, ends, strict=True)]
    trained = [one.get("trained", True) for one in found]
    for is_trained, colour, label in ((False, PALE, "not trained"), (True, COLOURS[0], "trained")):
        rows = [row for row, so in enumerate(trained) if so is is_trained]
        if rows:
            values = [measured[row] for row in rows]
            axes.barh(
                rows,
                values,
                0.62,
                color=colour,
                edgecolor=INK,
                linewidth=0.8,
                hatch="" if is_trained else "////",
                label="measured" if all(trained) else label,
            )
    axes.errorbar(
        measured,
        range(len(measured)),
        xerr=list(zip(*arms, strict=True)),
        fmt="none",
        ecolor=INK,
        elinewidth=1.4,
        capsize=4,
        label="95 % interval",
    )
    if control is not None:
        axes.axvline(100 * experiments[control]["accuracy"], color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=0.5)
    for row, (one, value) in enumerate(zip(found, measured, strict=True)):
        text, size = f"{value:.1f}%", 10.0
        if one.get("collapsed"):
            many = len(one["runs"]) > 1
            text, size = (f"{text}\n{collapse(one)}", 8.5) if many else (f"collapsed, {text}", size)
        axes.annotate(text, (1, row), xycoords=("axes fraction", "data"), ha="right", va="center", fontsize=size)


def _in_some_seeds(experiments: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a student of several seeds collapsed, which takes more words."""
    return any(one.get("collapsed") and len(one["runs"]) > 1 for one in experiments.values())


@contextmanager
def _axes(height: float) -> Iterator[tuple[Figure, Axes]]:
    """A figure of the style with one set of axes to draw on."""
    with _figure(WIDTH, height) as figure:
        yield figure, figure.subplots()


@contextmanager
def styled() -> Iterator[Any]:
    """The style, whatever a matplotlibrc or another library has set; yields what holds it."""
    from matplotlib import rcParams
    from matplotlib.style import context

    with context(STYLE, after_reset=True):
        yield rcParams


@contextmanager
def _figure(width: float, height: float) -> Iterator[Figure]:
    """An empty figure of the style, laid out when all is drawn."""
    from matplotlib.figure import Figure

    with styled():
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        layout = figure.get_layout_engine()
        assert layout is not None
        layout.execute(figure)  # once, not again for each format
        figure.set_layout_engine("none")


def _name_rows(axes: Axes, names: Mapping[str, object]) -> None:
    """Horizontal rows, from the top, one a name."""
    axes.set_yticks(range(len(names)), list(names))
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(names) - 0.5, -0.5)


def _legend(figure: Figure, axes: Axes) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=3, handlelength=2.6)


def _colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]


def _share_same(some: Sequence[str | None], others: Sequence[str | None]) -> float:
    return sum(a is not None and a == b for a, b in zip(some, others, strict=True)) / len(some)


def _share_both(some: Sequence[bool], others: Sequence[bool]) -> float:
    return sum(a and b for a, b in zip(some, others, strict=True)) / len(some)


def _element(chart: Chart) -> ElementTree.Element:
    text = StringIO()
    nothing_of_now = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with styled() as style:
        style["svg.hashsalt"] = chart.name
        chart.figure.savefig(text, format="svg", transparent=True, metadata=nothing_of_now)
    root = ElementTree.fromstring(text.getvalue())
    for parent in root.iter():
        parent.tag = parent.tag.removeprefix(_SVG)
        for child in [c for c in parent if c.tag in (f"{_SVG}metadata", f"{_SVG}style")]:
            parent.remove(child)
        parent.attrib.update(_without_style(parent.attrib.pop("style", "")))
        parent.attrib.update({"href": parent.attrib.pop(_LINK)} if _LINK in parent.attrib else {})
        for name, value in parent.attrib.items():
            parent.set(name, _own(chart.name, name, value))
    del root.attrib["width"], root.attrib["height"], root.attrib["version"]
    # What matplotlib puts into a style sheet for all elements.
    root.attrib |= {
        "role": "img",
        "aria-label": chart.title,
        "font-family": "system-ui, sans-serif",
        "stroke-linejoin": "round",
        "stroke-linecap": "butt",
    }
    return root


def _own(chart: str, attribute: str, value: str) -> str:
    """An attribute's value with ids that belong to one chart and INK replaced."""
    if attribute == "id":
        return f"{chart}-{value}"
    if attribute == "href":
        return value.replace("#", f"#{chart}-")
    return value.replace("url(#", f"url(#{chart}-").replace(INK, "currentColor")


def _without_style(style: str) -> dict[str, str]:
    """A `style` as the attributes that say the same."""
    attributes: dict[str, str] = {}
    for declaration in filter(None, (part.strip() for part in style.split(";"))):
        name, _, value = (part.strip() for part in declaration.partition(":"))
        if name == "font-family":
            continue  # the page's
        font = _FONT.fullmatch(value) if name == "font" else None
        if font:
            attributes |= {"font-size": font["size"]} | ({"font-weight": "bold"} if font["weight"] else {})
        else:
            attributes[name] = value
    return attributes
