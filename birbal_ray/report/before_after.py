"""Figures that hold the contenders against the base model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from birbal_ray.report.conclusions import words
from birbal_ray.report.numbers import BASE, Evaluated, Row
from birbal_ray.report.pictures import ADAPTER_COLOUR, BASE_COLOUR, MID, new_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CONTENDER_COLOURS = (ADAPTER_COLOUR, "#7a6fd0", "#c9a227", "#56b4e9", "#d1495b")
CONTENDER_MARKERS = "oDs^v"
MOST_TASKS = 30  # in a plot with a line per task


def differences(evaluated: Evaluated) -> Figure | None:
    """One line per prompt format and scope; on it, each contender's difference and interval."""
    sizes = {(row["prompt_format"], row["scope"]): row["num_tasks"] for row in evaluated.comparisons}
    if not sizes:
        return None
    places = {line: place for place, line in enumerate(sizes)}
    several = len(evaluated.contenders) > 1
    spread = min(0.22, 0.6 / max(1, len(evaluated.contenders)))
    with style():
        figure = new_figure((0.34 if several else 0.23) * len(sizes) + (0.9 if several else 0.6))
        axes = figure.add_subplot()
        for number, name in enumerate(evaluated.contenders):
            colour, marker = _look(evaluated, name)
            shift = spread * (number - (len(evaluated.contenders) - 1) / 2)
            for row in (row for row in evaluated.comparisons if row["model"] == name):
                place = places[row["prompt_format"], row["scope"]] + shift
                axes.plot([row["difference_low"], row["difference_high"]], [place] * 2, color=colour, linewidth=1.8)
                axes.plot(row["difference"], place, color=colour, marker=marker, markersize=5.5)
            axes.plot([], [], color=colour, marker=marker, markersize=5.5, label=_short(name))
        names = [f"{words(how)}, {scope.replace('_', ' ')} ({size})" for (how, scope), size in sizes.items()]
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.4, -0.6)
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
        figure, axes = _lines(len(chosen))
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


def _gain(rows: dict[str, Row]) -> float | None:
    base = rows[BASE]["task_score"]
    values = [row["task_score"] for name, row in rows.items() if name != BASE and row["task_score"] is not None]
    if base is None or not values:
        return None
    return max((value - base for value in values), key=abs)


def _lines(count: int) -> tuple[Figure, Axes]:
    # The name of a line stands above it, not left of it: tasks have long names, phones are narrow.
    figure = new_figure(0.36 * count + 1.0)
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


def _short(text: str, length: int = 50) -> str:
    printable = "".join(letter if letter.isprintable() else "\u00b7" for letter in text)
    return printable if len(printable) <= length else printable[: length - 1] + "\u2026"
