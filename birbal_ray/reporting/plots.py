"""The figures of a report; a colour means the same in all of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from birbal_ray.reporting.numbers import BASE, LABELS, Evaluated, Mixed, Row, Scored, Trained
from birbal_ray.reporting.pictures import INK, MID, inline, new_figure, png, standing_alone, style, svg
from birbal_ray.reporting.verdict import words
from birbal_ray.training.curve import smoothed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Told apart with every common colour blindness (after Okabe and Ito), readable on white and on near-black.
LABEL_COLOURS = {"exact_match": "#2b83ba", "generation": "#e07b1a"}
BASE_COLOUR, ADAPTER_COLOUR, EVAL_COLOUR = MID, "#1b9e77", "#b5559c"
CONTENDER_COLOURS = (ADAPTER_COLOUR, "#7a6fd0", "#c9a227", "#56b4e9", "#d1495b")
CONTENDER_MARKERS = "oDs^v"
NAMES = ("scores", "mix", "training", "differences")  # and tasks-{prompt format}
MOST_TASKS = 40  # in a plot with a line per task
MOST_CANDIDATES = 80  # tasks whose candidates are drawn beside what was kept


@dataclass(frozen=True, slots=True)
class Plot:
    """`inline` goes into the page, the other two are files `{name}.svg` and `{name}.png`."""

    name: str
    caption: str
    inline: str
    svg: str
    png: bytes


def draw(
    scored: Scored | None, mixed: Mixed | None, trained: Trained | None, evaluated: Evaluated | None
) -> dict[str, Plot]:
    """Plots by name, those that the finished steps have something for."""
    plots: list[Plot | None] = []
    if scored:
        plots.append(
            _plot("scores", "How many tasks got which task score; the dashed line is the mean.", scores(scored))
        )
    if mixed:
        plots.append(_plot("mix", "Rows of each task in the mix against its task score.", mix(mixed)))
    if trained:
        plots.append(_plot("training", "Loss over optimizer steps, the best adapter marked.", training(trained)))
    if evaluated:
        caption = "Differences from the base model with their 95 % intervals; right of 0 is better."
        plots.append(_plot("differences", caption, differences(evaluated)))
        for prompt_format in evaluated.formats:
            caption = f"Task scores {words(prompt_format)}, base model and contenders, largest gain first"
            caption += f"; the {MOST_TASKS} tasks that changed most." if _too_many(evaluated, prompt_format) else "."
            plots.append(_plot(tasks_name(prompt_format), caption, tasks(evaluated, prompt_format)))
    return {plot.name: plot for plot in plots if plot}


def tasks_name(prompt_format: str) -> str:
    """The name of the plot of one prompt format."""
    return f"tasks-{re.sub(r'[^a-z0-9_-]', '_', prompt_format.lower())}"


def scores(scored: Scored) -> Figure | None:
    """A histogram of task scores per label, ten bins."""
    if not scored.labels:
        return None
    with style():
        figure = new_figure(1.35 * len(scored.labels) + 0.5)
        panels = figure.subplots(len(scored.labels), 1, sharex=True, squeeze=False)[:, 0]
        for axes, label in zip(panels, scored.labels, strict=True):
            name, mean = label["label"], label["mean_task_score"]
            values = [r["task_score"] for r in scored.tasks if r["label"] == name and r["task_score"] is not None]
            axes.hist(values, bins=[edge / 10 for edge in range(11)], color=LABEL_COLOURS[name], rwidth=0.92)
            axes.axvline(mean, color=INK, linestyle="--", linewidth=1)
            axes.set_title(f"{name.replace('_', ' ')}: {len(values)} tasks, mean {mean:.3f}")
            axes.set_ylabel("tasks")
            axes.set_xlim(0, 1)
            _whole_numbers(axes.yaxis)
        panels[-1].set_xlabel("task score of the base model")
    return figure


def mix(mixed: Mixed) -> Figure | None:
    """Kept rows (filled) and candidates (open) of each task against its task score."""
    rows = [row for row in mixed.tasks if row["task_score"] is not None]
    if not rows:
        return None
    with style():
        figure = new_figure(3.1)
        axes = figure.add_subplot()
        with_candidates = len(rows) <= MOST_CANDIDATES
        for label in LABELS:
            mine = [row for row in rows if row["label"] == label]
            x, kept = [row["task_score"] for row in mine], [row["num_kept"] for row in mine]
            colour = LABEL_COLOURS[label]
            if mine and with_candidates:
                candidates = [row["num_candidates"] for row in mine]
                axes.vlines(x, kept, candidates, color=colour, alpha=0.35, linewidth=1)
                axes.scatter(x, candidates, s=26, facecolors="none", edgecolors=colour, linewidths=1.1)
            if mine:
                axes.scatter(x, kept, s=30, color=colour, linewidths=0, label=f"{label.replace('_', ' ')}, kept")
        if with_candidates:
            axes.scatter([], [], s=26, facecolors="none", edgecolors=INK, linewidths=1.1, label="candidates")
        axes.set(xlabel="task score of the base model", ylabel="rows", xlim=(-0.02, 1.02))
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")
        _whole_numbers(axes.yaxis)
        figure.legend(loc="outside upper left", ncols=3, handletextpad=0.2, columnspacing=1.0)
    return figure


def training(trained: Trained) -> Figure | None:
    """Train and eval loss, below them the learning rate."""
    if not trained.steps and not trained.evaluations:
        return None
    with style():
        figure = new_figure(3.7)
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3.2, 1])
        steps, losses = _columns(trained.steps, "step", "loss")
        top.plot(steps, losses, color=MID, linewidth=0.8, alpha=0.6, label="train, each step")
        top.plot(steps, smoothed(losses), color=INK, linewidth=1.4, label="train, smoothed")
        at, eval_losses = _columns(trained.evaluations, "step", "eval_loss")
        top.plot(at, eval_losses, color=EVAL_COLOUR, marker="o", markersize=4, linewidth=1.4, label="eval")
        best = trained.result["best_step"], trained.result["best_eval_loss"]
        top.plot(*best, color=ADAPTER_COLOUR, marker="*", markersize=14, linestyle="none", label="best adapter")
        top.set_ylabel("loss (nats a token)")
        top.grid(axis="y")
        rated = [line for line in trained.steps if "learning_rate" in line]
        bottom.plot(*_columns(rated, "step", "learning_rate"), color=INK, linewidth=1.2)
        bottom.set_ylim(bottom=0)
        bottom.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        bottom.set(xlabel="optimizer step", ylabel="learning rate")
        _whole_numbers(bottom.xaxis)
        figure.legend(loc="outside upper left", ncols=4, handletextpad=0.4, columnspacing=1.0, handlelength=1.4)
    return figure


def differences(evaluated: Evaluated) -> Figure | None:
    """One line per comparison: contender, prompt format, scope."""
    rows = evaluated.comparisons
    if not rows:
        return None
    with style():
        figure, axes = _lines(len(rows))
        for place, row in enumerate(rows):
            colour, marker = _look(evaluated, row["contender"])
            axes.plot([row["difference_low"], row["difference_high"]], [place] * 2, color=colour, linewidth=2)
            axes.plot(row["difference"], place, color=colour, marker=marker, markersize=6)
            who = f"{row['contender']}, " if len(evaluated.contenders) > 1 else ""
            scope = row["scope"].replace("_", " ")
            _name(axes, place, f"{who}{words(row['prompt_format'])}, {scope} ({row['num_tasks']})")
        axes.axvline(0, color=BASE_COLOUR, linewidth=1.2, alpha=0.7)
        axes.set_xlabel("difference in mean task score (number of tasks in brackets)")
        axes.margins(x=0.06)
    return figure


def tasks(evaluated: Evaluated, prompt_format: str) -> Figure | None:
    """One line per task: the base model's score joined to the contenders'; largest gain on top."""
    found = evaluated.of(prompt_format)
    gains = {task: gain for task, rows in found.items() if (gain := _gain(rows)) is not None}
    if not gains:
        return None
    most = sorted(gains, key=lambda task: (-abs(gains[task]), task))[:MOST_TASKS]
    chosen = sorted(most, key=lambda task: (-gains[task], task))
    names = [BASE, *evaluated.contenders]
    with style():
        figure, axes = _lines(len(chosen), legend=True)
        for place, task in enumerate(chosen):
            points = {n: found[task][n]["task_score"] for n in names if n in found[task]}
            points = {name: value for name, value in points.items() if value is not None}
            span = min(points.values()), max(points.values())
            axes.plot(span, [place] * 2, color=MID, linewidth=2, alpha=0.5, zorder=1)
            for name, value in points.items():
                colour, marker = _look(evaluated, name)
                size = 9 if name == BASE else 6.5  # equal scores: the base model's shows behind
                axes.plot(value, place, color=colour, marker=marker, markersize=size, linestyle="none", zorder=2)
            held_out = " \u00b7 held out" if found[task][BASE]["held_out"] == "task" else ""
            _name(axes, place, f"{_short(task)}{held_out}")
        for name in names:
            colour, marker = _look(evaluated, name)
            label = "base model" if name == BASE else _short(name)
            axes.plot([], [], color=colour, marker=marker, markersize=7, linestyle="none", label=label)
        axes.set(xlim=(-0.02, 1.02), xlabel=f"task score, {words(prompt_format)}")
        figure.legend(loc="outside upper left", ncols=3, handletextpad=0.2, columnspacing=1.2)
    return figure


def _plot(name: str, caption: str, figure: Figure | None) -> Plot | None:
    if figure is None:
        return None
    drawing = svg(figure, name)
    return Plot(name, caption, inline(drawing, caption), standing_alone(drawing), png(figure))


def _gain(rows: dict[str, Row]) -> float | None:
    base = rows[BASE]["task_score"]
    values = [row["task_score"] for name, row in rows.items() if name != BASE and row["task_score"] is not None]
    if base is None or not values:
        return None
    return max((value - base for value in values), key=abs)


def _too_many(evaluated: Evaluated, prompt_format: str) -> bool:
    return len(evaluated.of(prompt_format)) > MOST_TASKS


def _lines(count: int, *, legend: bool = False) -> tuple[Figure, Axes]:
    # The name of a line stands above it, not left of it: names are long, phones narrow.
    figure = new_figure(0.36 * count + (1.0 if legend else 0.7))
    axes = figure.add_subplot()
    axes.set_ylim(count - 0.55, -0.85)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    return figure, axes


def _name(axes: Axes, place: int, text: str) -> None:
    axes.text(0, place - 0.28, text, transform=axes.get_yaxis_transform(), fontsize=8, verticalalignment="bottom")


def _look(evaluated: Evaluated, contender: str) -> tuple[str, str]:
    if contender == BASE or contender not in evaluated.contenders:
        return BASE_COLOUR, "o"
    place = evaluated.contenders.index(contender) % len(CONTENDER_COLOURS)
    return CONTENDER_COLOURS[place], CONTENDER_MARKERS[place]


def _columns(rows: Sequence[Row], *names: str) -> tuple[list[Any], ...]:
    return tuple([row[name] for row in rows] for name in names)


def _short(text: str, length: int = 50) -> str:
    printable = "".join(letter if letter.isprintable() else "\u00b7" for letter in text)
    return printable if len(printable) <= length else printable[: length - 1] + "\u2026"


def _whole_numbers(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, nbins=6))
