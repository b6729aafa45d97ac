"""Report: one page, with plots, on what a run folder's steps did."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from birbal_ray.evaluate.leaderboard import place_models, zeroed_scores
from birbal_ray.manifest import fill_template
from birbal_ray.progress import duration
from birbal_ray.report.load import (
    READERS,
    Conclusion,
    compare_times,
    conclude,
    find_finished,
    mismatches,
    model_name,
    signed,
    words,
)
from birbal_ray.report.plots import NAMES, Plot, draw, tasks_name
from birbal_ray.settings import ConfigError
from birbal_ray.storage import input_folder, open_folder

REPORT_FILE, PLOTS_FOLDER, RESULTS_FILE = "report.html", "report", "results.json"


@dataclass(frozen=True, slots=True)
class ReportResult:
    """The page and the folder of its plots (paths or URLs), what it says first, the steps it lacks."""

    file: str
    plots: str
    conclusions: Sequence[Conclusion]
    missing: dict[str, str]


def report(
    run: str | os.PathLike[str], output: str | os.PathLike[str] | None = None, added: Sequence[Path] = ()
) -> ReportResult:
    """Write `run`/report.html and its plots in `run`/report; with `output`, there and in {name}-plots beside it.

    `run` and `output` are paths or URLs. `added`: results files of models to be placed on the leaderboard;
    those of `birbal harness` runs in `run` (--helm, too) are placed as well. The same inputs give the same bytes.
    Raises RunError (no finished step, a damaged file), ConfigError (options, results files).
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError('the plots need matplotlib, which is not installed: pip install "birbal_ray[train]"')
    folder, slash, name = os.fspath(output).rpartition("/") if output is not None else (os.fspath(run), "", REPORT_FILE)
    target = open_folder(folder or slash or ".")
    if not name.endswith((".html", ".htm")):
        raise ConfigError(f"--output {output}: expected a file name that ends in .html")
    if target.is_local and (target.local / name).is_dir():
        raise ConfigError(f"--output {output}: is a folder, expected a file name")
    found = find_finished(open_folder(run))
    sections = {step: READERS[step](one) for step, one in found.finished.items()}
    conclusions = conclude(sections)
    measured = {
        input_folder(one.folder.at(RESULTS_FILE)).resolve(): one.name
        for one in found.others
        if one.step in ("harness", "helm") and one.folder.is_file(RESULTS_FILE)
        if one.folder.read_json(RESULTS_FILE).get("metrics")
    }
    _, board, notes = place_models(dict.fromkeys([*measured, *(file.resolve() for file in added)]), measured)
    placed = {one.team for one in board if one.added}
    plots = draw(sections)
    page = render(
        plots,
        run=found,
        conclusions=conclusions,
        warnings=mismatches(found),
        board=[{**asdict(one), **{f"win_rate:{name}": rate for name, rate in one.win_rates.items()}} for one in board],
        board_notes=[f"{team}: {what}." for team, what in [*notes, *zeroed_scores(board)] if team in placed],
        times=compare_times(open_folder(run)),
        **{step: sections.get(step) for step in READERS},
    )
    pictures = PLOTS_FOLDER if output is None else f"{name.rpartition('.')[0]}-plots"
    files = {f"{pictures}/{plot.name}.svg": plot.svg.encode() for plot in plots.values()}
    files |= {f"{pictures}/{plot.name}.png": plot.png for plot in plots.values()}
    ours = re.compile(rf"{re.escape(pictures)}/({'|'.join(NAMES)}|{tasks_name('')}[a-z0-9_-]+)\.(svg|png)")
    target.delete([file for file in target.files(pictures) if ours.fullmatch(file) and file not in files])
    for file, data in {**files, name: page.encode()}.items():
        target.write_bytes(file, data)
    return ReportResult(target.at(name), target.at(pictures), conclusions, dict(found.missing))


def render(plots: Mapping[str, Plot], **values: Any) -> str:
    """The page: no script, nothing from outside, every text from data escaped; the same for the same values."""
    drawings = {name: {"drawing": Markup(plot.inline), "caption": plot.caption} for name, plot in plots.items()}  # noqa: S704 (our own SVG)
    return fill_template(
        Path(__file__).with_name("report.html.j2"),
        {"plots": drawings, "tasks_name": tasks_name, **values},
        shown=shown,
        exact=repr,
        words=words,
        # A browser may break the line after these; the cell's text stays what it is.
        breakable=lambda text: Markup("_<wbr>").join(text.split("_")),
        duration=duration,
        percent=lambda fraction: f"{100 * fraction:.1f} %",
        model_name=model_name,
        # Whether a column's values are numbers, where there are any.
        has_numbers=lambda rows, key: any(isinstance(row.get(key), (int, float)) for row in rows),
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
