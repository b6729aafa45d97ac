"""A search as pictures."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from birbal_ray.tune.scheduler import BASELINE, FINISHED, PREDICTED, SEARCH, STOPPED, TrialResult, best_so_far

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEARCHED, STOPPED_COLOUR, BEST, LINE = "#1f5fa8", "#b8c4d0", "#2e8b3d", "#d0661b"
LINES = ("#d0661b", "#8a5fa8", "#a83232", "#7a6a1b")  # of the baselines, in their order
LOSS = "held-out loss, weighted mean over groups (nats a token)"


def draw_search(results: Sequence[TrialResult], baselines: Sequence[str]) -> bytes:
    """PNG: objective against each ratio, then the best so far over trials; baselines as dashed lines."""
    from matplotlib.ticker import MaxNLocator

    found = [r for r in results if r.spec.kind in (SEARCH, PREDICTED) and r.objective is not None]
    names = sorted({name for result in found for name in result.spec.values})
    names = [name for name in names if len({result.spec.values[name] for result in found}) > 1]
    lines = {r.spec.name: r.loss for r in results if r.spec.kind == BASELINE and r.status == FINISHED}
    columns = min(3, len(names) + 1)
    rows = -(-(len(names) + 1) // columns)
    figure = _figure(4.2 * columns, 3.4 * rows)
    for place, name in enumerate(names, 1):
        axes = figure.add_subplot(rows, columns, place)
        for status, colour, label in ((FINISHED, SEARCHED, "to its end"), (STOPPED, STOPPED_COLOUR, "stopped early")):
            mine = [r for r in found if r.status == status and r.spec.kind == SEARCH]
            if mine:
                axes.scatter([r.spec.values[name] for r in mine], [r.loss for r in mine], color=colour, label=label)
        for result in found:
            if result.spec.kind == PREDICTED:
                axes.scatter(result.spec.values[name], result.loss, marker="*", s=140, color=BEST, label="predicted")
        if name == "failed_first":
            axes.set_xticks([0, 1], ["off", "on"])
            axes.set_xlim(-0.5, 1.5)
        _baselines(axes, lines, baselines)
        axes.set_xlabel(name)
        axes.set_ylabel("held-out loss")
        if place == 1:
            axes.legend(handles=list(axes.collections), fontsize=7)
    axes = figure.add_subplot(rows, columns, len(names) + 1)
    searched = [r for r in found if r.spec.kind == SEARCH]
    axes.step(range(1, len(searched) + 1), best_so_far(searched), where="post", color=SEARCHED, marker="o")
    _baselines(axes, lines, baselines)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("trials of the search")
    axes.set_ylabel("best held-out loss so far")
    axes.legend(fontsize=7)
    return _png(figure)


def draw_seeds(objectives: Mapping[str, Mapping[int, float]], baselines: Sequence[str], chosen: str) -> bytes:
    """PNG: every fresh-seed trial as a dot, each mix's mean as a bar across it, best on top."""
    means = {name: sum(seeds.values()) / len(seeds) for name, seeds in objectives.items()}
    names = sorted(means, key=lambda name: -means[name])
    figure = _figure(7, 1.2 + 0.42 * len(names))
    axes = figure.add_subplot()
    for place, name in enumerate(names):
        colour = BEST if name == chosen else LINE if name in baselines else SEARCHED
        values = list(objectives[name].values())
        axes.scatter(values, [place] * len(values), color=colour, alpha=0.55, zorder=3)
        axes.plot([means[name]] * 2, [place - 0.28, place + 0.28], color=colour, linewidth=2.5)
    labels = [f"{name}{' (baseline)' if name in baselines else ''}" for name in names]
    axes.set_yticks(range(len(names)), labels)
    axes.set_xlabel(LOSS)
    axes.grid(axis="x", alpha=0.3)
    return _png(figure)


def _baselines(axes: object, lines: Mapping[str, float], baselines: Sequence[str]) -> None:
    for colour, name in zip(LINES, baselines, strict=False):
        if name in lines:
            axes.axhline(lines[name], color=colour, linewidth=1.2, linestyle="--", label=name)  # type: ignore[attr-defined]


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def _png(figure: Figure) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()
