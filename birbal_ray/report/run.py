"""Report: one page, with plots, on what a run folder's steps did."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from birbal_ray.evaluate import leaderboard as team_files
from birbal_ray.evaluate.leaderboard import METRICS, Standing, missing_metrics, rank_with, zeroed_scores
from birbal_ray.report import numbers
from birbal_ray.report.conclusions import Verdict, verdicts
from birbal_ray.report.load import RunFolder, find_steps, mismatches
from birbal_ray.report.origins import origins_of
from birbal_ray.report.plots import NAMES, Plot, draw
from birbal_ray.report.render import Report, render
from birbal_ray.run import read_json, write_atomic
from birbal_ray.settings import ConfigError

NOT_REPORTED = ("checkpoints", "best", "packed", "tensorboard", "inputs")  # of a run at a URL: not fetched
REPORT_FILE, PLOTS_FOLDER = "report.html", "report"


@dataclass(frozen=True, slots=True)
class ReportResult:
    """The page, the folder of its plots, what it says first, the steps it lacks."""

    file: Path
    plots: Path
    verdicts: Sequence[Verdict]
    missing: dict[str, str]


def report(run: Path, output: Path | None = None, added: Sequence[Path] = ()) -> ReportResult:
    """Write `run`/report.html and its plots in `run`/report; with `output`, there and in {name}-plots beside it.

    `added`: results files of models to be placed on the leaderboard; those of `birbal harness` runs in
    `run` are placed, too. The same inputs give the same
    bytes. Raises RunError (no finished step, a damaged file), ConfigError (options, results files).
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError('the plots need matplotlib, which is not installed: pip install "birbal_ray[train]"')
    file = output or run / REPORT_FILE
    if file.suffix not in (".html", ".htm"):
        raise ConfigError(f"--output {file}: expected a file name that ends in .html")
    if file.is_dir():
        raise ConfigError(f"--output {file}: is a folder, expected a file name")
    found = find_steps(run)
    steps = found.finished
    board, notes = _board([*_measured(found), *added])
    scored = numbers.scored_of(steps["score"]) if "score" in steps else None
    mixed = numbers.mixed_of(steps["mix"]) if "mix" in steps else None
    trained = numbers.trained_of(steps["train"]) if "train" in steps else None
    evaluated = numbers.evaluated_of(steps["evaluate"]) if "evaluate" in steps else None
    content = Report(
        run=found,
        verdicts=verdicts(evaluated, trained, scored),
        warnings=mismatches(found),
        scored=scored,
        mixed=mixed,
        trained=trained,
        evaluated=evaluated,
        origins=origins_of(found),
        board=board,
        board_notes=notes,
    )
    plots = draw(scored, mixed, trained, evaluated)
    page = render(content, plots)
    folder = run / PLOTS_FOLDER if output is None else file.with_name(f"{file.stem}-plots")
    _write_plots(folder, plots)
    write_atomic(file, page.encode())
    return ReportResult(file, folder, content.verdicts, dict(found.missing))


def _measured(run: RunFolder) -> list[Path]:
    """Results files of finished `birbal harness` runs in the folder that hold a metric."""
    files = [step.path / "results.json" for step in run.others if step.step == "harness"]
    return [file for file in files if file.exists() and read_json(file).get("metrics")]


def _board(added: Sequence[Path]) -> tuple[list[Standing], list[str]]:
    """The published teams with the added models among them, and what to know of these."""
    added = list({file.resolve(): file for file in added}.values())
    teams = team_files.load_published()
    models = team_files.load_added(added, teams)
    places = rank_with(teams, models)
    notes = []
    for name, file in zip(models, added, strict=True):
        if isinstance(remark := json.loads(file.read_text(encoding="utf-8-sig")).get("note"), str):
            notes.append(f"{name}: {remark}.")
    notes += [
        f"{name}: {len(missing)} of {len(METRICS)} metrics missing, counted as worst: {', '.join(missing)}."
        for name, values in models.items()
        if (missing := missing_metrics(values))
    ]
    notes += [
        f"{zeroed.team}: win rate 0 on {' and '.join(zeroed.scenarios)}, so {zeroed.score} is next to 0 whatever the "
        "others are."
        for zeroed in zeroed_scores(places)
        if zeroed.team in models
    ]
    return places, notes


def _write_plots(folder: Path, plots: dict[str, Plot]) -> None:
    for name in (*NAMES, "tasks-*"):  # an earlier report's, of steps that are gone
        for file in folder.glob(f"{name}.*"):
            if file.stem not in plots:
                file.unlink()
    for plot in plots.values():
        write_atomic(folder / f"{plot.name}.svg", plot.svg.encode())
        write_atomic(folder / f"{plot.name}.png", plot.png)
