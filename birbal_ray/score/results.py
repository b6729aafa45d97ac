"""The written rows of a run: which of them stay when something else is asked for, their sums, the published JSON."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from birbal_ray.manifest import read_manifest
from birbal_ray.ni.metrics import METRIC_VERSION
from birbal_ray.run import Run
from birbal_ray.schemas import ROWS_FOLDER, SCORE_ROWS, TASKS_FILE
from birbal_ray.score.config import ScoreConfig
from birbal_ray.score.shards import (
    METADATA_KEY,
    DamagedRowsError,
    PlannedTask,
    RowFiles,
    ScorePlan,
    Shard,
    Tally,
    WrittenFile,
)
from birbal_ray.score.stages import score_table, write_rows
from birbal_ray.storage import DamagedFileError, FileRecord, Folder, RunError, open_folder, write_atomic

PUBLISHED_COLUMNS = ["orig_input", "few_shot_prompt", "answer", "prediction"]
TOKENS = ("prompt", "cached", "completion")
COLUMNS = ["row_id", "score", "error", *(f"num_{kind}_tokens" for kind in TOKENS)]
SET_ASIDE_FOLDER = "set_aside"
READERS = 8  # at a URL most of the time is waiting


@dataclass(frozen=True, slots=True)
class Amendment:
    """What must happen to the files that are there before anything is scored. Names are below the rows folder."""

    kept: RowFiles
    records: dict[str, FileRecord]  # of kept files, as the last manifest has them
    set_aside: list[str]  # of dropped and changed tasks, damaged, beyond the instances asked for
    rescored: list[str]  # tasks whose predictions stand and whose label or metric is another


def amend(run: Run, plan: ScorePlan) -> tuple[ScorePlan, Amendment]:
    """Compare the rows that are there with the plan. Reads tasks.parquet, and a row file only where that is missing.

    The plan that comes back takes the instances of a file that reaches beyond `instances_per_task`, too.
    """
    prefix = f"{ROWS_FOLDER}/"
    sizes = {name.removeprefix(prefix): stat.size for name, stat in run.files.items() if name.startswith(prefix)}
    known = {
        name.removeprefix(prefix): FileRecord(record.get("sha256", ""), record.get("size", -1))
        for name, record in run.listed.items()
        if name.startswith(prefix) and isinstance(record, Mapping)
    }
    wrong = sorted(name for name, size in sizes.items() if name in known and known[name].size != size)
    found = RowFiles(sizes.keys() - set(wrong))
    before: dict[str, dict[str, Any]] = {}  # what the rows that are there were made from, by task
    with contextlib.suppress(FileNotFoundError, DamagedFileError, KeyError):
        columns = ["task", "sha256", "max_completion_tokens", "label", "metric_version"]
        before = {row["task"]: row for row in run.folder.read_table(TASKS_FILE, columns).to_pylist()}
    planned = {task.name: task for task in plan.tasks}
    aside, rescored, limits = [*wrong, *found.overlapping], [], {}
    for name in found.tasks:
        task, files = planned.get(name), found.names(name)
        made_from = before.get(task.name) if task else None
        if task and made_from is None:
            with contextlib.suppress(DamagedFileError, KeyError, TypeError, ValueError):
                no_columns = run.folder.read_table(f"{prefix}{files[0]}", [])
                made_from = dict(json.loads(no_columns.schema.metadata[METADATA_KEY]))
        if task is None or made_from is None or any(made_from.get(key) != task.identity[key] for key in task.identity):
            aside += files
            continue
        if (made_from.get("label"), made_from.get("metric_version")) != (task.label.value, METRIC_VERSION):
            rescored.append(task.name)
        beyond = [file for file in files if RowFiles.range_of(file)[0] >= task.num_instances]
        aside += beyond
        ends = [RowFiles.range_of(file)[1] for file in files if file not in beyond]
        limits[task.name] = max([task.num_instances, *ends])
    kept = RowFiles(sizes.keys() - set(aside))
    records = {name: known[name] for name in kept.all_names() if name in known}
    tasks = (replace(task, num_instances=limits.get(task.name, task.num_instances)) for task in plan.tasks)
    return replace(plan, tasks=tuple(tasks)), Amendment(kept, records, aside, rescored)


@contextlib.contextmanager
def damaged_rows_set_aside(run: Run) -> Iterator[None]:
    """Whatever in the block finds damaged files: they are moved away, and RunError says how to go on."""
    try:
        yield
    except DamagedRowsError as error:
        set_aside(run, error.names)
        raise RunError(
            f"{error} and are moved aside; run the same command again, which scores these rows again"
        ) from None


def set_aside(run: Run, names: Sequence[str]) -> str | None:
    """Move files of rows that the run has no use for to a folder of their own, and name it."""
    if not names:
        return None
    used = [name.split("/")[1] for name in run.folder.files(SET_ASIDE_FOLDER)]
    target = f"{SET_ASIDE_FOLDER}/{1 + max((int(number) for number in used if number.isdigit()), default=0)}"
    for name in names:
        run.folder.write_bytes(f"{target}/{name}", run.folder.read_bytes(f"{ROWS_FOLDER}/{name}"))
    run.folder.delete([f"{ROWS_FOLDER}/{name}" for name in names])
    return run.folder.at(target)


@dataclass
class Results:
    """TASK_SCORES rows by task name, the manifest's counts of rows and tokens, and a record of every file read.

    `scores`, if they are kept: task → row id → score, of the rows that have one.
    """

    task_scores: list[dict[str, Any]] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)  # prompt, cached, completion; of the rows that ran
    files: dict[str, FileRecord] = field(default_factory=dict)
    scores: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def rows(self) -> dict[str, Any]:
        """Counts that add up."""
        scored = sum(row["num_scored"] for row in self.task_scores)
        return {"planned": scored + self.errors.total(), "scored": scored, "errors": dict(self.errors)}


def read_files(
    folder: Folder,
    found: RowFiles,
    tasks: Sequence[PlannedTask],
    columns: Sequence[str],
    variant_folder: str = "",
    records: dict[str, FileRecord] | None = None,
) -> Iterator[tuple[PlannedTask, dict[str, pa.Table]]]:
    """Each task's files, {name: columns of its rows}, in hash order: all `found` below `folder`, the rows folder.

    Puts the record of each file into `records`, if given, unless it is there. A task with a damaged file is passed
    over; after the last task DamagedRowsError names all of these files.
    """
    damaged: list[str] = []

    def read(name: str) -> pa.Table | None:
        first, last = RowFiles.range_of(name)
        with contextlib.suppress(DamagedFileError):
            table = folder.read_table(name, [*columns])
            if table.num_rows == last - first:
                if records is not None and name not in records:
                    records[name] = folder.record_of(name)
                return table
        damaged.append(name)
        return None

    with ThreadPoolExecutor(READERS) as readers:
        for task in tasks:
            names = found.names(f"{variant_folder}{task.name}")  # none where time was up before the task's first row
            tables = dict(zip(names, readers.map(read, names), strict=True))
            if not any(table is None for table in tables.values()):
                yield task, tables
    if damaged:
        raise DamagedRowsError(folder, sorted(damaged))


def summarise(
    folder: Folder,
    found: RowFiles,
    tasks: Sequence[PlannedTask],
    known: Mapping[str, FileRecord] | None = None,
    variant_folder: str = "",
    *,
    keep_scores: bool = False,
) -> Results:
    """Add up the rows of `tasks`, whose ranges are all `found` below `folder`, the rows folder.

    `known`: records of files whose hash need not be made again. `keep_scores`: fill `Results.scores`. Raises
    DamagedRowsError, and RunError when a task's rows are not the planned ones, each once.
    """
    results, records = Results(), dict(known or {})
    for task, files in read_files(folder, found, tasks, COLUMNS, variant_folder, records):
        no_rows = pa.schema([SCORE_ROWS.field(one) for one in COLUMNS]).empty_table()
        rows = pa.concat_tables([*files.values()] or [no_rows])
        _add_task(results, task, rows, folder.at(f"{variant_folder}{task.name}"))
        results.files |= {name: records[name] for name in files}
        if keep_scores:
            scored = rows.filter(pc.is_valid(rows["score"])).select(["row_id", "score"]).to_pydict()
            results.scores[task.name] = dict(zip(scored["row_id"], scored["score"], strict=True))
    return results


def _add_task(results: Results, task: PlannedTask, rows: pa.Table, place: str) -> None:
    num_distinct = pc.count_distinct(rows["row_id"]).as_py()
    ours = pc.all(pc.starts_with(rows["row_id"], f"{task.name}:")).as_py()  # None of no rows
    if ours is False or not rows.num_rows == num_distinct == task.num_instances:
        raise RunError(
            f"task {task.name}: {rows.num_rows} rows with {num_distinct} distinct ids were written, "
            f"not its {task.num_instances} planned ones; move {place} away and run the same command again, which "
            "scores the task again"
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


def count_scores(
    folder: Folder, found: RowFiles, tasks: Sequence[PlannedTask], failed_below: float
) -> dict[str, Tally]:
    """Sums over the scores that are there already, by task. Raises DamagedRowsError."""
    tallies = {}
    for task, files in read_files(folder, found, tasks, ["score"]):
        scores = [score for table in files.values() for score in table["score"].drop_null().to_pylist()]
        tallies[task.name] = Tally.of(scores, task.label.value, failed_below)
    return tallies


def find_error_rows(folder: Folder, found: RowFiles, tasks: Sequence[PlannedTask]) -> list[Shard]:
    """Shards that score the error rows of `tasks` again, one for each file that holds any. Raises DamagedRowsError."""
    shards = []
    for task, files in read_files(folder, found, tasks, ["error"]):
        for name, table in files.items():
            errors = table["error"].to_pylist()
            if retry := tuple(position for position, error in enumerate(errors) if error is not None):
                shards.append(task.shard(*RowFiles.range_of(name), retry=retry))
    return shards


def rescore(folder: Folder, task: PlannedTask, name: str, config: ScoreConfig) -> WrittenFile | None:
    """Compute extracted answers and scores of one of the task's files from its predictions; the other columns stay.

    A file in which nothing changes is not written: None. Raises DamagedRowsError.
    """
    [(_, files)] = read_files(folder, RowFiles([name]), [task], SCORE_ROWS.names)
    old = files[name].select(SCORE_ROWS.names)
    new = score_table(task.name, task.label.value, old.to_pylist(), config.prompt.format)
    if new.equals(old.cast(SCORE_ROWS)):
        return None
    return write_rows(folder, new, task.shard(*RowFiles.range_of(name)), config.adaptive.failed_below)


def export_published_json(run: str | Path, output: Path) -> tuple[int, int]:
    """Write `{task}.json` per task of a finished score run; (files, rows) written.

    Each holds a list of objects by row id: {orig_input, few_shot_prompt, answer, prediction}, and what the
    published scripts read beside these: ground_truth and orig_output (the references), task_file, id. Rows with an
    error have an empty prediction. Raises ConfigError when `run` is no score run, RunError when it is unfinished, or
    its files are not all there any more or damaged.
    """
    folder = open_folder(run)
    listed = read_manifest(folder, "score")["files"]
    rows_folder, prefix = folder.subfolder(ROWS_FOLDER), f"{ROWS_FOLDER}/"
    found = RowFiles(name.removeprefix(prefix) for name in listed if name.startswith(prefix))
    tasks = folder.read_table(TASKS_FILE, ["task"])["task"].to_pylist()
    num_rows = 0
    for name in tasks:
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
