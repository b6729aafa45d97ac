"""One HTML page from a report's values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from birbal_ray.evaluate.leaderboard import Standing
from birbal_ray.progress import duration
from birbal_ray.report import facts, tables
from birbal_ray.report.conclusions import Verdict, signed, words
from birbal_ray.report.load import RunFolder
from birbal_ray.report.numbers import Evaluated, Mixed, Scored, Trained
from birbal_ray.report.origins import Origin
from birbal_ray.report.plots import Plot, tasks_name

TEMPLATE = "report.html.j2"
STEP_TITLES = {"score": "Score", "mix": "Mix", "train": "Train", "evaluate": "Evaluate"}


@dataclass(frozen=True, slots=True)
class Report:
    """Everything on the page. `board_notes`: what to know of the added models' places."""

    run: RunFolder
    verdicts: Sequence[Verdict]
    warnings: Sequence[str]
    scored: Scored | None
    mixed: Mixed | None
    trained: Trained | None
    evaluated: Evaluated | None
    origins: Sequence[Origin]
    board: Sequence[Standing]
    board_notes: Sequence[str]


def render(report: Report, plots: Mapping[str, Plot]) -> str:
    """The page: no script, nothing from outside, every text from data escaped; the same for the same report."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "shown": shown,
        "exact": repr,
        "words": words,
        "spaced": _spaced,
        "breakable": _breakable,
        "duration": duration,
    }
    environment.tests["numeric"] = lambda value: isinstance(value, (int, float))
    return environment.get_template(TEMPLATE).render(
        report=report,
        steps=STEP_TITLES,
        tables=_tables(report),
        facts=_facts(report),
        plots={name: {"drawing": Markup(plot.inline), "caption": plot.caption} for name, plot in plots.items()},  # noqa: S704 (our own SVG)
        added=[place for place in report.board if place.added],
        tasks_name=tasks_name,
    )


def shown(value: Any, with_sign: bool = False) -> str:
    """A cell's text: whole numbers with thousands separators, others with three decimals."""
    if value is None:
        return "\u2013"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return signed(value) if with_sign else f"{value:.3f}".replace("-", "\u2212")
    return str(value)


def _tables(report: Report) -> dict[str, tables.Table]:
    found = []
    if report.scored:
        found.append(tables.scores(report.scored))
    if mixed := report.mixed:
        found += [make(mixed) for make in (tables.composition, tables.mix_tasks, tables.dropped, tables.licenses)]
    if report.trained:
        found.append(tables.evaluations(report.trained))
    if evaluated := report.evaluated:
        found.append(tables.comparisons(evaluated))
        found += [tables.tasks(evaluated, name, tasks_name(name)) for name in evaluated.formats]
    found.append(tables.leaderboard(report.board, win_rates=any(place.added for place in report.board)))
    return tables.by_name(found)


def _facts(report: Report) -> dict[str, list[facts.Fact]]:
    found = {}
    if report.scored:
        found["score"] = facts.of_scores(report.scored)
    if report.mixed:
        found["mix"] = facts.of_mix(report.mixed)
    if report.trained:
        found["train"] = facts.of_training(report.trained)
    if report.evaluated:
        found["evaluate"] = facts.of_evaluation(report.evaluated)
    return found | {f"origin:{origin.name}": facts.of_origin(origin) for origin in report.origins}


def _breakable(text: str) -> Markup:
    # A browser may break the line after these; the cell's text stays what it is.
    return Markup("_<wbr>").join(text.split("_"))


def _spaced(name: str) -> str:
    return name.replace("_", " ")
