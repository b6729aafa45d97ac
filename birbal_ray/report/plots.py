"""The report's plots: figures from the sections' rows, as SVG for the page and as SVG and PNG files.

The same rows give the same bytes.
"""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from birbal_ray.progress import counted
from birbal_ray.report.load import LABELS, Row, words
from birbal_ray.schemas import BASE
from birbal_ray.train.card import ADAPTER_COLOUR, INK, MID, plot_losses

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMES = ("scores", "mix", "training", "differences")  # and tasks-{prompt format}
MOST_CANDIDATES = 80  # tasks whose candidates are drawn beside what was kept
MOST_TASKS = 30  # in a plot with a line per task
# INK: of every text; becomes currentColor on the page. MID: grid and axes; reads on white and on black.
LABEL_COLOURS = {"exact_match": "#2b83ba", "generation": "#e07b1a"}
BASE_COLOUR = MID
MODEL_COLOURS, MODEL_MARKERS = (ADAPTER_COLOUR, "#7a6fd0", "#c9a227", "#56b4e9", "#d1495b"), "oDs^v"
WIDTH_INCHES = 4.4  # narrow, so that text keeps its size on a phone
SMALL = dict.fromkeys(("legend.fontsize", "xtick.labelsize", "ytick.labelsize"), 8)
INKED = dict.fromkeys(("axes.labelcolor", "axes.titlecolor", "text.color", "xtick.labelcolor", "ytick.labelcolor"), INK)
STYLE = {
    **{"font.size": 9, "axes.titlesize": 9, "font.family": "sans-serif", **SMALL, **INKED},
    **dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), MID),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **{"axes.titlelocation": "left", "axes.axisbelow": True, "grid.alpha": 0.25, "grid.linewidth": 0.6},
    "text.parse_math": False,  # a task may be called $x$
    "svg.fonttype": "none",
}
_REFERENCE = re.compile(r'(?:href="#|url\(#)([^")]+)')
_STYLE_ELEMENT = re.compile(r"<defs>\s*<style.*?</style>\s*</defs>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Plot:
    """`inline` goes into the page, the other two are files `{name}.svg` and `{name}.png`."""

    name: str
    caption: str
    inline: str
    svg: str
    png: bytes


def draw(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Plot]:
    """Plots by name, those that the finished steps have something for. `sections`: step → what load's readers give."""
    with _style():
        return {name: _plot(name, caption, figure) for name, caption, figure in _figures(sections) if figure}


def _figures(sections: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str, Figure | None]]:
    """(name, caption, figure); no figure where there is nothing to draw."""
    if scored := sections.get("score"):
        yield "scores", "How many tasks got which task score; the dashed line is the mean.", scores(scored)
    if mixed := sections.get("mix"):
        yield "mix", "Rows of each task in the mix against its task score.", mix(mixed["tasks"])
    if trained := sections.get("train"):
        yield "training", "Loss over optimizer steps, the best adapter marked.", training(trained)
    if evaluated := sections.get("evaluate"):
        caption = "Differences from the base model, their 95 % intervals, the number of tasks; right of 0 is better."
        yield "differences", caption, differences(evaluated["comparisons"], evaluated["names"])
        for prompt_format, rows in evaluated["formats"].items():
            most = f"; the {MOST_TASKS} tasks that changed most" if len(rows) > MOST_TASKS else ""
            caption = f"Task scores {words(prompt_format)}, base model and evaluated models, largest gain first{most}."
            yield tasks_name(prompt_format), caption, tasks(rows, evaluated["names"], prompt_format)


def tasks_name(prompt_format: str) -> str:
    """The name of the plot and the table of one prompt format."""
    return f"tasks-{re.sub(r'[^a-z0-9_-]', '_', prompt_format.lower())}"


def scores(scored: Mapping[str, Any]) -> Figure | None:
    """A histogram of task scores per label, ten bins."""
    labels = scored["labels"]
    if not labels:
        return None
    figure = _figure(1.35 * len(labels) + 0.5)
    panels = figure.subplots(len(labels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, label in zip(panels, labels, strict=True):
        name, mean = label["label"], label["mean_task_score"]
        values = [r["task_score"] for r in scored["tasks"] if r["label"] == name and r["task_score"] is not None]
        axes.hist(values, bins=[edge / 10 for edge in range(11)], color=LABEL_COLOURS[name], rwidth=0.92)
        axes.axvline(mean, color=INK, linestyle="--", linewidth=1)
        axes.set_title(f"{name.replace('_', ' ')}: {counted(len(values), 'task')}, mean {mean:.3f}")
        axes.set(ylabel="tasks", xlim=(0, 1))
        _whole_numbers(axes.yaxis)
    panels[-1].set_xlabel("task score of the base model")
    return figure


def mix(tasks: Sequence[Row]) -> Figure | None:
    """Kept rows (filled) and candidates (open) of each task against its task score."""
    rows = [row for row in tasks if row["task_score"] is not None]
    if not rows:
        return None
    figure = _figure(3.1)
    axes = figure.add_subplot()
    with_candidates = len(rows) <= MOST_CANDIDATES
    open_circle: dict[str, Any] = {"s": 26, "facecolors": "none", "linewidths": 1.1}
    for label in LABELS:
        mine = [row for row in rows if row["label"] == label]
        x, kept, candidates = _columns(mine, "task_score", "num_kept", "num_candidates")
        colour = LABEL_COLOURS[label]
        if mine and with_candidates:
            axes.vlines(x, kept, candidates, color=colour, alpha=0.35, linewidth=1)
            axes.scatter(x, candidates, edgecolors=colour, **open_circle)
        if mine:
            axes.scatter(x, kept, s=30, color=colour, linewidths=0, label=f"{label.replace('_', ' ')}, kept")
    if with_candidates:
        axes.scatter([], [], edgecolors=INK, label="candidates", **open_circle)
    axes.set(xlabel="task score of the base model", ylabel="rows", xlim=(-0.02, 1.02))
    axes.set_ylim(bottom=0)
    axes.grid(axis="y")
    _whole_numbers(axes.yaxis)
    figure.legend(loc="outside upper left", ncols=3, handletextpad=0.2, columnspacing=1.0)
    return figure


def training(trained: Mapping[str, Any]) -> Figure | None:
    """Train and eval loss, below them the learning rate."""
    steps, evaluations, result = trained["steps"], trained["evaluations"], trained["result"]
    if not steps and not evaluations:
        return None
    figure = _figure(3.7)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3.2, 1])
    plot_losses(top, steps, evaluations, (result["best_step"], result["best_eval_loss"]))
    top.grid(axis="y")
    rated = [line for line in steps if "learning_rate" in line]
    bottom.plot(*_columns(rated, "step", "learning_rate"), color=INK, linewidth=1.2)
    bottom.set_ylim(bottom=0)
    bottom.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    bottom.set(xlabel="optimizer step", ylabel="learning rate")
    _whole_numbers(bottom.xaxis)
    figure.legend(loc="outside upper left", ncols=4, handletextpad=0.4, columnspacing=1.0, handlelength=1.4)
    return figure


def differences(comparisons: Sequence[Row], names: Sequence[str]) -> Figure | None:
    """One line per prompt format and scope; on it, each model's difference from the base model and its interval."""
    sizes = {(row["prompt_format"], row["scope"]): row["num_tasks"] for row in comparisons}
    if not sizes:
        return None
    places = {line: place for place, line in enumerate(sizes)}
    several = len(names) > 1
    spread = min(0.22, 0.6 / max(1, len(names)))
    figure = _figure((0.34 if several else 0.23) * len(sizes) + (0.9 if several else 0.6))
    axes = figure.add_subplot()
    for number, name in enumerate(names):
        colour, marker = _colour_and_marker(names, name)
        shift = spread * (number - (len(names) - 1) / 2)
        for row in (row for row in comparisons if row["model"] == name):
            place = places[row["prompt_format"], row["scope"]] + shift
            axes.plot([row["difference_low"], row["difference_high"]], [place] * 2, color=colour, linewidth=1.8)
            axes.plot(row["difference"], place, color=colour, marker=marker, markersize=5.5)
        axes.plot([], [], color=colour, marker=marker, markersize=5.5, label=_short(name))
    lines = [f"{words(how)}, {scope.replace('_', ' ')} ({size})" for (how, scope), size in sizes.items()]
    axes.set_yticks(range(len(lines)), lines)
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.axvline(0, color=BASE_COLOUR, linewidth=1.2, zorder=1)
    axes.grid(axis="x")
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel("difference in mean task score", loc="right")
    axes.margins(x=0.06)
    if several:
        figure.legend(loc="outside upper left", ncols=2, handletextpad=0.4, columnspacing=1.2)
    return figure


def tasks(rows: Sequence[Row], names: Sequence[str], prompt_format: str) -> Figure | None:
    """One line per task: the base model's score joined to the other models'; largest gain on top.

    `rows`: those of read_evaluation's `formats`.
    """
    gains = {}
    for row in rows:
        if found := [row[f"{name}:difference"] for name in names if f"{name}:difference" in row]:
            gains[row["task"]] = max(found, key=abs)
    if not gains:
        return None
    most = sorted(gains, key=lambda task: (-abs(gains[task]), task))[:MOST_TASKS]
    chosen = sorted((row for row in rows if row["task"] in most), key=lambda row: (-gains[row["task"]], row["task"]))
    figure = _figure(0.36 * len(chosen) + 1.0)
    axes: Axes = figure.add_subplot()
    axes.set_ylim(len(chosen) - 0.55, -0.85)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    for place, row in enumerate(chosen):
        points = {n: row[f"{n}:task_score"] for n in (BASE, *names) if row.get(f"{n}:task_score") is not None}
        span = min(points.values()), max(points.values())
        axes.plot(span, [place] * 2, color=MID, linewidth=2, alpha=0.5, zorder=1)
        for name, value in points.items():
            colour, marker = _colour_and_marker(names, name)
            size = 9 if name == BASE else 6.5  # equal scores: the base model's shows behind
            axes.plot(value, place, color=colour, marker=marker, markersize=size, linestyle="none", zorder=2)
        # The name of a line stands above it, not left of it: tasks have long names, phones are narrow.
        text = _short(row["task"]) + (" \u00b7 held out" if row["held_out"] == "task" else "")
        above: dict[str, Any] = {
            "transform": axes.get_yaxis_transform(),
            "fontsize": 8,
            "verticalalignment": "bottom",
        }
        axes.text(0, place - 0.28, text, **above)
    for name in (BASE, *names):
        colour, marker = _colour_and_marker(names, name)
        label = "base model" if name == BASE else _short(name)
        axes.plot([], [], color=colour, marker=marker, markersize=7, linestyle="none", label=label)
    axes.set(xlim=(-0.02, 1.02), xlabel=f"task score, {words(prompt_format)}")
    figure.legend(loc="outside upper left", ncols=3, handletextpad=0.2, columnspacing=1.2)
    return figure


@contextmanager
def _style(name: str = "birbal") -> Iterator[None]:
    """Set the style of every plot inside the block; `name` keeps the ids of one figure's SVG apart from another's."""
    import matplotlib

    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def _figure(height_inches: float) -> Figure:
    from matplotlib.figure import Figure  # no pyplot, so no global state

    return Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")


def _plot(name: str, caption: str, figure: Figure) -> Plot:
    """The figure in its three forms: SVG 1.1 with texts as text, transparent, without a date; PNG on white, 160 dpi."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    text, data = io.StringIO(), io.BytesIO()
    with _style(name):
        FigureCanvasSVG(figure)
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    FigureCanvasAgg(figure)
    figure.savefig(data, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    drawing = text.getvalue()
    # A file of its own: ink that reads on a light and on a dark page.
    alone = _in_tags(drawing, lambda tag: tag.replace(INK, "#747c85"))
    # Part of the page: as wide as its place, ink in the text's colour, no names of XML spaces.
    body = _STYLE_ELEMENT.sub("", drawing[drawing.index("<svg") :], count=1)
    used = set(_REFERENCE.findall(body))

    def page_tag(tag: str) -> str:
        tag = re.sub(r' (?:xmlns(?::\w+)?|version)="[^"]*"', "", tag).replace("xlink:href=", "href=")
        tag = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", tag)  # the rest repeat
        tag = re.sub(r"font-family: [^;\"]*", "font-family: inherit", tag)
        if tag.startswith("<svg"):
            tag = re.sub(r' (?:width|height)="[^"]*"', "", tag)
        return tag.replace(INK, "currentColor")

    head = f'<svg role="img" aria-label="{html.escape(caption)}" stroke-linejoin="round" '
    return Plot(name, caption, _in_tags(body, page_tag).replace("<svg ", head, 1), alone, data.getvalue())


def _in_tags(drawing: str, change: Callable[[str], str]) -> str:
    # Never in the texts: they come from data, and have < and > escaped.
    return re.sub(r"<[^>]*>", lambda match: change(match[0]), drawing)


def _columns(rows: Sequence[Row], *names: str) -> tuple[list[Any], ...]:
    return tuple([row[name] for row in rows] for name in names)


def _whole_numbers(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, nbins=6))


def _colour_and_marker(names: Sequence[str], name: str) -> tuple[str, str]:
    if name not in names:
        return BASE_COLOUR, "o"
    place = names.index(name) % len(MODEL_COLOURS)
    return MODEL_COLOURS[place], MODEL_MARKERS[place]


def _short(text: str) -> str:
    printable = "".join(letter if letter.isprintable() else "\u00b7" for letter in text)
    return printable if len(printable) <= 50 else printable[:49] + "\u2026"
