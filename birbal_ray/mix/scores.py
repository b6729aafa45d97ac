"""A finished score folder: its tasks, its model, its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from birbal_ray.run import RunError, read_manifest
from birbal_ray.schemas import ROWS_FOLDER, SCORE_ROWS, TASK_SCORES, TASK_SCORES_FILE, TASKS, TASKS_FILE
from birbal_ray.settings import ConfigError, canonical_hash


@dataclass(frozen=True, slots=True)
class ScoredTask:
    """One task of a score run; `task_score` is None when no row was scored."""

    name: str
    label: str
    definition: str
    license: str
    sources: tuple[str, ...]
    num_instances: int
    num_errors: int
    task_score: float | None


@dataclass(frozen=True, slots=True)
class ScoreFolder:
    """A finished score run. `tasks` by name, `files` by file name."""

    path: Path
    model: str | None
    identity_hash: str
    content_hash: str
    tasks: tuple[ScoredTask, ...]
    files: tuple[Path, ...]

    @property
    def num_rows(self) -> int:
        """Rows the run must hold, by its own task table."""
        return sum(task.num_instances for task in self.tasks)


def open_scores(folder: Path, model: str | None = None) -> ScoreFolder:
    """The finished score run in `folder`.

    Raises RunError when it is missing, unfinished, of another step, or lacks a table; ConfigError
    when `model` is given and another model made the scores.
    """
    manifest = read_manifest(folder, "score")
    made_by = model_of(manifest)
    if model is not None and made_by != model:
        raise ConfigError(
            f"{folder}: scored by {made_by or 'an unnamed model'}, the configuration says model = {model!r}; "
            "point --scores at that model's run, or correct model (null takes any)"
        )
    files = tuple(sorted(p for p in (folder / ROWS_FOLDER).glob("*.parquet") if not p.name.startswith(".tmp-")))
    if not files:
        raise RunError(f"{folder / ROWS_FOLDER}: no Parquet files; the score run's rows are gone, rerun `birbal score`")
    tasks = _tasks(folder)
    return ScoreFolder(
        folder,
        made_by,
        str(manifest.get("identity_hash", "")),
        canonical_hash([[p.name, p.stat().st_size] for p in files]),
        tasks,
        files,
    )


def model_of(manifest: Mapping[str, Any]) -> str | None:
    """The model's name in a score manifest, None where it has none."""
    return manifest.get("model", {}).get("name")


def read_table(path: Path, schema: pa.Schema) -> pa.Table:
    """A small Parquet table with at least the schema's columns. Raises RunError naming file and column."""
    if not path.is_file():
        raise RunError(f"{path}: no such file; the run before is incomplete, rerun it")
    try:
        table = pq.read_table(path, partitioning=None)
    except (pa.ArrowInvalid, OSError) as error:
        raise RunError(f"{path}: not a readable Parquet file ({' '.join(str(error).split())})") from None
    check_columns(path, table.schema, schema)
    return table


def check_columns(path: Path, found: pa.Schema, wanted: pa.Schema) -> None:
    """Raise RunError when a column of `wanted` is missing or of another type."""
    for field in wanted:
        if field.name not in found.names:
            raise RunError(f"{path}: column {field.name!r} is missing (found {', '.join(found.names)})")
        if found.field(field.name).type != field.type:
            raise RunError(f"{path}: column {field.name!r} is {found.field(field.name).type}, expected {field.type}")


def check_score_file(path: Path, found: pa.Schema, columns: list[str]) -> None:
    """Raise RunError unless a score shard has these columns of SCORE_ROWS."""
    check_columns(path, found, pa.schema([SCORE_ROWS.field(name) for name in columns]))


def _tasks(folder: Path) -> tuple[ScoredTask, ...]:
    scores = {row["task"]: row for row in read_table(folder / TASK_SCORES_FILE, TASK_SCORES).to_pylist()}
    tasks = []
    for row in read_table(folder / TASKS_FILE, TASKS).to_pylist():
        if row["task"] not in scores:
            raise RunError(f"{folder / TASK_SCORES_FILE}: no row for task {row['task']!r} of {TASKS_FILE}")
        score = scores[row["task"]]
        tasks.append(
            ScoredTask(
                row["task"],
                row["label"],
                row["definition"],
                ", ".join(row["licenses"]) or "unknown",
                tuple(row["sources"]),
                score["num_instances"],
                score["num_errors"],
                score["task_score"],
            )
        )
    return tuple(sorted(tasks, key=lambda task: task.name))
