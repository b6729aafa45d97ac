"""From the written rows of a run to its task scores and to the published JSON, a task at a time."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from birbal_ray.manifest import read_manifest
from birbal_ray.schemas import ROWS_FOLDER, SCORE_ROWS, TASKS_FILE
from birbal_ray.score.config import ScoreConfig
from birbal_ray.score.plan import PlannedTask
from birbal_ray.score.shards import RowFiles, Shard, Tally, WrittenFile
from birbal_ray.score.stages import score_table, write_rows
from birbal_ray.storage import FileRecord, Folder, RunError, open_folder, write_atomic

PUBLISHED_COLUMNS = ["orig_input", "few_shot_prompt", "answer", "prediction"]
TOKENS = ("prompt", "cached", "completion")
COLUMNS = ["row_id", "score", "error", *(f"num_{kind}_tokens" for kind in TOKENS)]
READERS = 8  # at a URL most of the time is waiting


@dataclass
class Results:
    """TASK_SCORES rows by task name, the manifest's counts of rows and tokens, and a record of every file read.

    `damaged`: files that are no Parquet files or hold other rows than their names say; their tasks have no scores.
    """

    task_scores: list[dict[str, Any]] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)  # prompt, cached, completion; of the rows that ran
    files: dict[str, FileRecord] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)

    @property
    def rows(self) -> dict[str, Any]:
        """Counts that add up."""
        scored = sum(row["num_scored"] for row in self.task_scores)
        return {"planned": scored + self.errors.total(), "scored": scored, "errors": dict(self.errors)}


def read_scores(folder: Folder, names: Iterable[str]) -> dict[str, dict[str, float]]:
    """Task → row id → score, of the rows that have one. `names` are below `folder`, the rows folder."""
    scores: dict[str, dict[str, float]] = {}
    for name in names:
        rows = folder.read_table(name, ["task", "row_id", "score"])
        for task, row_id, score in zip(*(rows[column].to_pylist() for column in rows.column_names), strict=True):
            if score is not None:
                scores.setdefault(task, {})[row_id] = score
    return scores


def summarise(
    folder: Folder,
    found: RowFiles,
    tasks: Sequence[PlannedTask],
    known: Mapping[str, FileRecord] | None = None,
    variant_folder: str = "",
) -> Results:
    """Add up the rows of `tasks`, whose ranges are all `found` below `folder`, the rows folder.

    `known`: records of files whose hash need not be made again. Raises RunError when a task's rows are not the
    planned ones, each once.
    """
    results = Results()
    known = known or {}
    with ThreadPoolExecutor(READERS) as readers:
        for task in tasks:
            names = found.names(f"{variant_folder}{task.name}")
            parts = []
            for name, part in zip(
                names, readers.map(lambda name: _read_file(folder, name, known.get(name)), names), strict=True
            ):
                if part is None:
                    results.damaged.append(name)
                else:
                    parts.append(part[0])
                    results.files[name] = part[1]
            if len(parts) == len(names):  # none where time was up before the task's first row
                no_rows = pa.schema([SCORE_ROWS.field(one) for one in COLUMNS]).empty_table()
                rows = pa.concat_tables(parts) if parts else no_rows
                _add_task(results, task, rows)
    return results


def _add_task(results: Results, task: PlannedTask, rows: pa.Table) -> None:
    num_distinct = pc.count_distinct(rows["row_id"]).as_py()
    ours = pc.all(pc.starts_with(rows["row_id"], f"{task.name}:")).as_py()  # None of no rows
    if ours is False or not rows.num_rows == num_distinct == task.num_instances:
        raise RunError(
            f"task {task.name}: {rows.num_rows} rows with {num_distinct} distinct ids were written, "
            f"not its {task.num_instances} planned ones"
        )
    label = task.label.value
    scores = Tally.of(rows["score"].drop_null().to_pylist(), label)
    low, high = scores.interval(label) if scores.num_scored else (None, None)
    results.task_scores.append(
        {
            "task": task.name,
            "label": label,
            "num_instances": rows.num_rows,
            "num_scored": scores.num_scored,
            "num_errors": rows.num_rows - scores.num_scored,
            "task_score": scores.mean if scores.num_scored else None,
            "task_score_low": low,
            "task_score_high": high,
        }
    )
    results.errors.update(error.split(":", 1)[0] for error in rows["error"].drop_null().to_pylist())
    ran = rows.filter(pc.is_valid(rows["num_completion_tokens"]))
    results.tokens.update({kind: pc.sum(ran[f"num_{kind}_tokens"]).as_py() or 0 for kind in TOKENS})


def _read_file(folder: Folder, name: str, record: FileRecord | None) -> tuple[pa.Table, FileRecord] | None:
    """(COLUMNS, record) of a file, or None where it is damaged."""
    first, last = RowFiles.range_of(name)
    try:
        table = folder.read_table(name, COLUMNS)
        record = record or folder.record_of(name)
    except (pa.ArrowInvalid, OSError, RunError):  # pyarrow raises either
        return None
    return (table, record) if table.num_rows == last - first else None


def count_scores(
    folder: Folder, found: RowFiles, tasks: Sequence[PlannedTask], failed_below: float
) -> dict[str, Tally]:
    """Sums over the scores that are there already, by task."""
    tallies: dict[str, Tally] = {}
    for task in tasks:
        for name in found.names(task.name):
            scores = folder.read_table(name, ["score"])["score"].drop_null().to_pylist()
            tallies[task.name] = tallies.get(task.name, Tally()) + Tally.of(scores, task.label.value, failed_below)
    return tallies


def find_error_rows(folder: Folder, found: RowFiles, tasks: Sequence[PlannedTask]) -> list[Shard]:
    """Shards that score the error rows of `tasks` again, one for each file that holds any."""
    shards = []
    for task in tasks:
        for name in found.names(task.name):
            errors = folder.read_table(name, ["error"])["error"].to_pylist()
            if retry := tuple(position for position, error in enumerate(errors) if error is not None):
                shards.append(task.shard(*RowFiles.range_of(name), retry=retry))
    return shards


def rescore(folder: Folder, names: Iterable[str], task: PlannedTask, config: ScoreConfig) -> list[WrittenFile]:
    """Compute extracted answers and scores of a task's files from their predictions; the other columns stay.

    Files in which nothing changes are not written.
    """
    written = []
    for name in names:
        old = folder.read_table(name).select(SCORE_ROWS.names)
        new = score_table(task.name, task.label.value, old.to_pylist(), config.prompt.format)
        if not new.equals(old.cast(SCORE_ROWS)):
            shard = task.shard(*RowFiles.range_of(name))
            written.append(write_rows(folder, new, shard, config.adaptive.failed_below))
    return written


def export_published_json(run: str | Path, output: Path) -> tuple[int, int]:
    """Write `{task}.json` per task of a finished score run; (files, rows) written.

    Each holds a list of objects by row id: {orig_input, few_shot_prompt, answer, prediction}, and what the
    published scripts read beside these: ground_truth and orig_output (the references), task_file, id. Rows with an
    error have an empty prediction. Raises RunError when `run` is no finished score run, or its files are not all
    there any more.
    """
    folder = open_folder(run)
    read_manifest(folder, "score")
    rows_folder = folder.subfolder(ROWS_FOLDER)
    found = RowFiles(rows_folder.files())
    tasks = folder.read_table(TASKS_FILE, ["task", "num_instances"]).to_pylist()
    num_rows = 0
    for task in tasks:
        name = task["task"]
        if found.num_rows(name) != task["num_instances"]:
            raise RunError(
                f"{folder}: {found.num_rows(name)} rows of {name} are there, {task['num_instances']} were scored; "
                "run `birbal score` on it again"
            )
        columns = [*PUBLISHED_COLUMNS, "row_id", "instance_id"]
        parts = [rows_folder.read_table(file, columns) for file in found.names(name)]
        records = [
            {
                **{column: row[column] for column in PUBLISHED_COLUMNS},
                "ground_truth": row["answer"],
                "task_file": f"{name}.json",
                "id": row["instance_id"],
                "orig_output": row["answer"],
            }
            for row in (pa.concat_tables(parts).sort_by("row_id").to_pylist() if parts else [])
        ]
        write_atomic(output / f"{name}.json", (json.dumps(records, indent=1, ensure_ascii=False) + "\n").encode())
        num_rows += len(records)
    return len(tasks), num_rows
