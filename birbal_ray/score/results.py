"""From the written rows of a run to its task scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from birbal_ray.ni.metrics import mean_interval
from birbal_ray.run import RunError
from birbal_ray.score.plan import PlannedTask, Shard

COLUMNS = ["task", "row_id", "score", "error", "num_prompt_tokens", "num_cached_tokens", "num_completion_tokens"]


@dataclass(frozen=True, slots=True)
class Results:
    """TASK_SCORES rows by task name, and the manifest's counts of rows and tokens."""

    task_scores: list[dict[str, Any]]
    rows: dict[str, Any]
    tokens: dict[str, Any]


def unfinished(rows_folder: Path, shards: Sequence[Shard]) -> list[Shard]:
    """The shards without a whole file under their name."""
    return [shard for shard in shards if not _is_whole(rows_folder / shard.file_name, shard.num_rows)]


def read_scores(files: Sequence[Path]) -> dict[str, dict[str, float]]:
    """Task → row id → score, of the rows that have one."""
    scores: dict[str, dict[str, float]] = {}
    rows = pads.dataset([str(file) for file in files], format="parquet").to_table(columns=["task", "row_id", "score"])
    for task, row_id, score in zip(*(rows[name].to_pylist() for name in rows.column_names), strict=True):
        if score is not None:
            scores.setdefault(task, {})[row_id] = score
    return scores


def summarise(files: Sequence[Path], tasks: Sequence[PlannedTask]) -> Results:
    """Read SCORE_ROWS files and add them up; `tasks` are those of the plan, by name.

    Raises RunError when the rows are not exactly the planned ones, each once.
    """
    rows = pads.dataset([str(file) for file in files], format="parquet").to_table(columns=COLUMNS).sort_by("task")
    num_planned, num_distinct = sum(task.num_instances for task in tasks), pc.count_distinct(rows["row_id"]).as_py()
    if rows.num_rows != num_planned or num_distinct != num_planned:
        raise RunError(
            f"{rows.num_rows} rows with {num_distinct} distinct ids were written, the plan has {num_planned}"
        )
    scores, start = [], 0
    for task in tasks:
        scores.append(_task_score(task, rows.slice(start, task.num_instances)))
        start += task.num_instances
    errors = Counter(error.split(":", 1)[0] for error in rows["error"].to_pylist() if error)
    ran = rows.filter(pc.is_valid(rows["num_completion_tokens"]))
    prompt, cached = _sum(ran, "num_prompt_tokens"), _sum(ran, "num_cached_tokens")
    return Results(
        scores,
        {"planned": num_planned, "scored": num_planned - errors.total(), "errors": dict(errors)},
        {
            "prompt": prompt,
            "cached": cached,
            "completion": _sum(ran, "num_completion_tokens"),
            "cached_fraction": cached / prompt if prompt else None,
        },
    )


def _task_score(task: PlannedTask, rows: pa.Table) -> dict[str, Any]:
    if set(rows["task"].unique().to_pylist()) != {task.name}:
        raise RunError(f"task {task.name}: the written rows are not the {task.num_instances} planned ones")
    scores = [value for value in rows["score"].to_pylist() if value is not None]
    mean, low, high = mean_interval(task.label.value, scores) if scores else (None, None, None)
    return {
        "task": task.name,
        "label": task.label.value,
        "num_instances": rows.num_rows,
        "num_scored": len(scores),
        "num_errors": rows.num_rows - len(scores),
        "task_score": mean,
        "task_score_low": low,
        "task_score_high": high,
    }


def _is_whole(file: Path, num_rows: int) -> bool:
    try:
        return file.exists() and pq.read_metadata(file).num_rows == num_rows
    except (pa.ArrowInvalid, OSError):  # damaged: pyarrow raises either
        return False


def _sum(rows: pa.Table, column: str) -> int:
    return pc.sum(rows[column]).as_py() or 0
