"""The plots of a report, in the page's form and as files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from birbal_ray.report.before_after import MOST_TASKS, differences, tasks
from birbal_ray.report.conclusions import words
from birbal_ray.report.numbers import LABELS, Evaluated, Mixed, Row, Scored, Trained
from birbal_ray.report.pictures import (
    ADAPTER_COLOUR,
    EVAL_COLOUR,
    INK,
    LABEL_COLOURS,
    MID,
    inline,
    new_figure,
    png,
    standing_alone,
    style,
    svg,
)
from birbal_ray.train.card import smoothed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = ("scores", "mix", "training", "differences")  # and tasks-{prompt format}
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
        caption = "Differences from the base model, their 95 % intervals, the number of tasks; right of 0 is better."
        plots.append(_plot("differences", caption, differences(evaluated)))
        for prompt_format in evaluated.formats:
            caption = f"Task scores {words(prompt_format)}, base model and contenders, largest gain first"
            caption += (
                f"; the {MOST_TASKS} tasks that changed most." if len(evaluated.of(prompt_format)) > MOST_TASKS else "."
            )
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


def _plot(name: str, caption: str, figure: Figure | None) -> Plot | None:
    if figure is None:
        return None
    drawing = svg(figure, name)
    return Plot(name, caption, inline(drawing, caption), standing_alone(drawing), png(figure))


def _columns(rows: Sequence[Row], *names: str) -> tuple[list[Any], ...]:
    return tuple([row[name] for row in rows] for name in names)


def _whole_numbers(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, nbins=6))
