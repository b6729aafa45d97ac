"""The report's tables: rows as the files have them, under readable headings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from birbal_ray.evaluate.leaderboard import Standing
from birbal_ray.report.conclusions import words
from birbal_ray.report.numbers import BASE, Evaluated, Mixed, Row, Scored, Trained


@dataclass(frozen=True, slots=True)
class Column:
    """`key` is the file's column; `signed` numbers are printed with their sign, `long` texts wrap."""

    key: str
    title: str
    signed: bool = False
    long: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """`id` is unique on a page; a cell is its row's value under its column's key. Rows with `_mark` stand out."""

    id: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]

    def is_numeric(self, column: Column) -> bool:
        """Whether the column's values are numbers, where there are any."""
        values = [row.get(column.key) for row in self.rows]
        return any(isinstance(value, (int, float)) for value in values if value is not None)


def scores(scored: Scored) -> Table:
    """TASK_SCORES."""
    columns = (
        Column("task", "task", long=True),
        Column("task_score", "task score"),
        Column("task_score_low", "low"),
        Column("task_score_high", "high"),
        Column("num_instances", "n"),
        Column("num_errors", "errors"),
        Column("label", "label"),
    )
    return Table("scores", "Scored tasks; low and high bound the 95 % interval", columns, scored.tasks)


def composition(mixed: Mixed) -> Table:
    """One row per source and label."""
    columns = (
        Column("source", "source"),
        Column("label", "label"),
        Column("tasks", "tasks"),
        Column("candidates", "candidates"),
        Column("kept", "kept"),
        Column("train", "train"),
        Column("eval", "eval"),
        Column("share", "share of the mix"),
    )
    return Table("composition", "What the mix is made of", columns, mixed.composition)


def mix_tasks(mixed: Mixed) -> Table:
    """MIX_TASKS."""
    columns = (
        Column("task", "task or source", long=True),
        Column("task_score", "task score"),
        Column("num_candidates", "candidates"),
        Column("num_usable", "usable"),
        Column("num_allocated", "allocated"),
        Column("num_kept", "kept"),
        Column("label", "label"),
    )
    return Table("mix-tasks", "Candidates and rows kept per task, and per outside source", columns, mixed.tasks)


def dropped(mixed: Mixed) -> Table:
    """Candidates that are not in the mix, by reason and source."""
    columns = [Column("reason", "reason"), Column("meaning", "meaning", long=True), Column("rows", "rows")]
    if len(mixed.sources) > 1:
        columns += [Column(f"source:{source}", source) for source in mixed.sources]
    return Table("dropped", "Candidates left out, by the one reason that each has", tuple(columns), mixed.dropped)


def licenses(mixed: Mixed) -> Table:
    """One row per source."""
    columns = (
        Column("source", "source"),
        Column("licences", "licences", long=True),
        Column("origin", "origin", long=True),
        Column("revision", "revision", long=True),
    )
    # Of a local file only its name: a report is sent to others, and the revision is the file's hash.
    rows = tuple(
        {**row, "origin": Path(row["origin"]).name if row["origin"].startswith("/") else row["origin"]}
        for row in mixed.licenses
    )
    return Table("licenses", "Licences of the rows in the mix", columns, rows)


def evaluations(trained: Trained) -> Table:
    """The evaluations of a training run; step 0 is the base model."""
    columns = (Column("step", "step"), Column("epoch", "epoch"), Column("eval_loss", "eval loss"))
    best = trained.result["best_step"]
    rows = tuple({**line, "_mark": line["step"] == best} for line in trained.evaluations)
    return Table("evaluations", "Eval loss; step 0 is the base model, the best step is marked", columns, rows)


def comparisons(evaluated: Evaluated) -> Table:
    """COMPARISONS."""
    columns = (
        *([Column("model", "model", long=True)] if len(evaluated.contenders) > 1 else []),
        Column("prompt_format", "prompts"),
        Column("scope", "tasks"),
        Column("difference", "difference", signed=True),
        Column("difference_low", "low", signed=True),
        Column("difference_high", "high", signed=True),
        Column("base_score", BASE),
        Column("score", evaluated.contenders[0] if len(evaluated.contenders) == 1 else "score"),
        Column("num_wins", "better"),
        Column("num_losses", "worse"),
        Column("num_ties", "same"),
        Column("num_tasks", "number of tasks"),
    )
    caption = "Means over tasks; low and high: 95 % interval of the difference, too narrow where tasks are few"
    return Table("comparisons", caption, columns, evaluated.comparisons)


def tasks(evaluated: Evaluated, prompt_format: str, identifier: str) -> Table:
    """One row per task: for each contender `{name}:{EVALUATION column}`, and `{name}:difference` from the base."""
    names = (BASE, *evaluated.contenders)
    columns = [Column("task", "task", long=True)]
    for name in names:
        columns += [
            Column(f"{name}:task_score", name),
            Column(f"{name}:task_score_low", "low"),
            Column(f"{name}:task_score_high", "high"),
        ]
        if name != BASE:
            columns.append(Column(f"{name}:difference", "difference", signed=True))
    columns += [Column(f"{BASE}:num_instances", "n"), Column("held_out", "held out"), Column("label", "label")]
    columns += [Column(f"{name}:num_errors", f"errors, {name}") for name in names]
    rows = [_task(task, rows) for task, rows in evaluated.of(prompt_format).items()]
    caption = f"Task scores {words(prompt_format)}; low and high bound the 95 % interval"
    return Table(identifier, caption, tuple(columns), tuple(rows))


def leaderboard(places: Sequence[Standing], *, win_rates: bool) -> Table:
    """Standings; added models are marked."""
    scenarios = tuple(places[0].win_rates) if win_rates and places else ()
    columns = (
        Column("rank", "rank"),
        Column("team", "team"),
        Column("score_full", "Score_full"),
        Column("score_open", "Score_open"),
        Column("score_hidden", "Score_hidden"),
        *(Column(f"win_rate:{name}", name) for name in scenarios),
    )
    rows = tuple(
        {
            "rank": place.rank,
            "team": place.team,
            "score_full": place.score_full,
            "score_open": place.score_open,
            "score_hidden": place.score_hidden,
            **{f"win_rate:{name}": place.win_rates[name] for name in scenarios},
            "_mark": place.added,
        }
        for place in places
    )
    caption = "Scores, and win rates per scenario" if win_rates else "Scores"
    return Table("leaderboard", f"{caption}, computed from the teams' raw metrics", columns, rows)


def _task(task: str, rows: dict[str, Row]) -> Row:
    base = rows[BASE]
    found: dict[str, Any] = {"task": task, "label": base["label"], "held_out": base["held_out"]}
    for name, row in rows.items():
        found |= {f"{name}:{key}": row[key] for key in ("num_instances", "num_errors", "task_score")}
        found |= {f"{name}:task_score_{end}": row[f"task_score_{end}"] for end in ("low", "high")}
        if name != BASE and None not in (row["task_score"], base["task_score"]):
            found[f"{name}:difference"] = row["task_score"] - base["task_score"]
    return {**found, "_mark": base["held_out"] == "task"}


def by_name(tables: Iterable[Table]) -> dict[str, Table]:
    """id → table."""
    return {table.id: table for table in tables}
