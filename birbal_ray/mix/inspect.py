"""Questions to a finished mix: why is this row in or out, how do two mixes differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from birbal_ray.mix.allocation import BIRBAL_2023
from birbal_ray.mix.rows import AUDIT, DESCRIPTIONS, MIX_TASKS, NATURAL_INSTRUCTIONS, Reason
from birbal_ray.mix.scores import read_table
from birbal_ray.mix.write import AUDIT_FILE, BATCH_ROWS, TASKS_FILE
from birbal_ray.run import RUN_FILE, RunError, differences, read_json, read_manifest
from birbal_ray.settings import ConfigError, nearest


def explain(folder: Path, row_id: str) -> dict[str, Any]:
    """Why a candidate is in the mix or not: its audit record, the reason in words, its task's counts.

    Raises RunError when the folder is no finished mix, ConfigError when the row was no candidate.
    """
    manifest = read_manifest(folder, "mix")
    record = _find(folder, "row_id", row_id)
    if record is None:
        raise ConfigError(f"{folder}: no candidate {row_id!r}{_like(folder, row_id)}")
    settings = manifest["identity"]["settings"]
    task = _task_counts(folder, record)
    twin = _find(folder, "row_hash", record["twin_hash"]) if record["twin_hash"] is not None else None
    answer: dict[str, Any] = {
        "row_id": row_id,
        "kept": record["kept"],
        "split": record["split"],
        "reason": record["reason"],
        "why": _why(record, task, settings, twin),
        "source": record["source"],
        "task": record["task"],
        "label": record["label"],
        "score": record["score"],
        "task_score": task["task_score"],
        "bucket": record["bucket"],
        "policy": settings["policy"],
        "task_candidates": task["num_candidates"],
        "task_kept": task["num_kept"],
        "contamination": record["contamination"],
    }
    if twin is not None:
        answer["repeats"] = twin["row_id"]
    return answer


def kept_by_task(folder: Path) -> dict[tuple[str, str], int]:
    """(source, task) → rows kept; outside rows under the task their source names."""
    counts: dict[tuple[str, str], int] = {}
    for table in _audit(folder, ["source", "task", "kept"]):
        for row in _kept(table).group_by(["source", "task"]).aggregate([([], "count_all")]).to_pylist():
            key = (row["source"], row["task"])
            counts[key] = counts.get(key, 0) + row["count_all"]
    return counts


def diff(first: Path, second: Path) -> dict[str, Any]:
    """How two finished mixes differ: settings, rows in both and in one only, per source, per task.

    `tasks` holds only the tasks whose counts differ, largest difference first.
    """
    for folder in (first, second):
        read_manifest(folder, "mix")
    ours, theirs = kept_by_task(first), kept_by_task(second)
    both = _rows_in_both(first, second)
    a, b = sum(ours.values()), sum(theirs.values())
    tasks: list[dict[str, Any]] = [
        {"source": source, "task": task, "a": ours.get((source, task), 0), "b": theirs.get((source, task), 0)}
        for source, task in sorted(ours.keys() | theirs.keys())
    ]
    changed = [{**row, "difference": row["b"] - row["a"]} for row in tasks if row["a"] != row["b"]]
    return {
        "settings": differences(read_json(first / RUN_FILE), read_json(second / RUN_FILE)),
        "rows": {"a": a, "b": b, "in_both": both, "only_a": a - both, "only_b": b - both},
        "sources": _per_source(tasks),
        "tasks": sorted(changed, key=lambda row: (-abs(row["difference"]), row["source"], row["task"])),
    }


def _why(
    record: Mapping[str, Any], task: Mapping[str, Any], settings: Mapping[str, Any], twin: Mapping[str, Any] | None
) -> str:
    reason = Reason[record["reason"].upper()]
    text = DESCRIPTIONS[reason]
    outside = record["source"] != NATURAL_INSTRUCTIONS
    share = f"{task['num_allocated']:,} of {task['num_usable']:,} usable rows"
    if reason is Reason.KEPT and outside:
        return f"{text}: one of the first {share} of its source in hash order"
    if reason is Reason.KEPT and settings["policy"] == BIRBAL_2023:
        return f"{text}: drawn from {record['bucket']} of its task ({share})"
    if reason is Reason.KEPT:
        return f"{text}: its task (score {task['task_score']:.3f}) was allocated {share}, {record['bucket']} rows first"
    if reason in (Reason.OVER_ALLOCATION, Reason.OVER_CAP, Reason.NOT_DRAWN, Reason.OVER_SOURCE_LIMIT):
        return f"{text}: {share} of {task['task']}"
    if twin is not None:
        return f"{text}: {twin['row_id']} ({'kept' if twin['kept'] else 'dropped: ' + twin['reason']})"
    return text


def _task_counts(folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    # Outside sources have one line each, under the source's name.
    name = record["task"] if record["source"] == NATURAL_INSTRUCTIONS else record["source"]
    for row in read_table(folder / TASKS_FILE, MIX_TASKS).to_pylist():
        if (row["source"], row["task"]) == (record["source"], name):
            return dict(row)
    raise RunError(f"{folder / TASKS_FILE}: no line for {name!r}; the folder is damaged, rerun `birbal mix`")


def _find(folder: Path, column: str, value: Any) -> dict[str, Any] | None:
    wanted = pa.scalar(value, AUDIT.field(column).type)
    for table in _audit(folder, AUDIT.names):
        found = table.filter(pc.equal(table[column], wanted))
        if len(found):
            return dict(found.slice(0, 1).to_pylist()[0])
    return None


def _like(folder: Path, row_id: str) -> str:
    names = [row["task"] for row in read_table(folder / TASKS_FILE, MIX_TASKS).to_pylist()]
    task = row_id.rsplit(":", 1)[0]
    if task not in names:
        return f", and no task or source {task!r}{nearest(task, names)}"
    return "; row ids are {task}:{instance id}, see audit.parquet"


def _audit(folder: Path, columns: list[str]) -> Iterator[pa.Table]:
    path = folder / AUDIT_FILE
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(BATCH_ROWS, columns=columns):
                yield pa.Table.from_batches([batch])
    except (pa.ArrowInvalid, OSError) as error:
        raise RunError(f"{path}: can't be read ({' '.join(str(error).split())}); rerun `birbal mix`") from None


def _kept(table: pa.Table) -> pa.Table:
    return table.filter(table["kept"])


def _kept_ids(folder: Path) -> pa.ChunkedArray:
    # By id, not by row_hash: that depends on the seed.
    ids = [_kept(table)["row_id"].combine_chunks() for table in _audit(folder, ["row_id", "kept"])]
    return pa.chunked_array(ids, pa.string())


def _rows_in_both(first: Path, second: Path) -> int:
    return int(pc.sum(pc.is_in(_kept_ids(first), value_set=_kept_ids(second))).as_py() or 0)


def _per_source(tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    sources: dict[str, dict[str, Any]] = {}
    for row in tasks:
        total = sources.setdefault(row["source"], {"source": row["source"], "a": 0, "b": 0})
        total["a"] += row["a"]
        total["b"] += row["b"]
    return [{**row, "difference": row["b"] - row["a"]} for row in sources.values()]
