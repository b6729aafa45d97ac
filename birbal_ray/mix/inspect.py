"""Questions to a finished mix: why is this row in or out, how do two mixes differ."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from birbal_ray.manifest import read_manifest
from birbal_ray.mix.allocation import BIRBAL_2023, TASK_SCORE
from birbal_ray.mix.rows import AUDIT, AUDIT_FILE, MIX_TASKS, NATURAL_INSTRUCTIONS, Reason
from birbal_ray.mix.scores import check_columns, read_table
from birbal_ray.mix.write import BATCH_ROWS
from birbal_ray.run import RUN_FILE, RunError, identity_differences, one_line
from birbal_ray.schemas import TASKS_FILE
from birbal_ray.settings import ConfigError, nearest
from birbal_ray.storage import Folder, open_folder


def explain(mix: str | os.PathLike[str] | Folder, row_id: str) -> dict[str, Any]:
    """Why a candidate is in the mix or not: its audit record, the reason in words, its task's counts.

    Raises RunError when the folder is no finished mix, ConfigError when the row was no candidate.
    """
    folder = open_folder(mix)
    settings = read_manifest(folder, "mix", oldest=2)["identity"]["settings"]
    record = _find(folder, row_id)
    tasks = {(row["source"], row["task"]): row for row in read_table(folder, TASKS_FILE, MIX_TASKS).to_pylist()}
    if record is None:
        names = [name for _, name in tasks]
        wanted = row_id.rsplit(":", 1)[0]
        hint = "; row ids are {task}:{instance id}, see audit.parquet"
        raise ConfigError(
            f"{folder}: no candidate {row_id!r}"
            + (hint if wanted in names else f", and no task or source {wanted!r}{nearest(wanted, names)}")
        )
    # Outside sources have one line each, under the source's name.
    name = record["task"] if record["source"] == NATURAL_INSTRUCTIONS else record["source"]
    task = tasks.get((record["source"], name))
    if task is None:
        raise RunError(f"{folder.at(TASKS_FILE)}: no line for {name!r}; the file was edited, run `birbal mix` again")
    other = _find(folder, record["duplicate_of"]) if record["duplicate_of"] is not None else None
    answer: dict[str, Any] = {
        "row_id": row_id,
        **{name: record[name] for name in ("kept", "split", "reason")},
        "why": _why(record, task, settings, other),
        **{name: record[name] for name in ("source", "task", "label", "score")},
        "task_score": task["task_score"],
        "bucket": record["bucket"],
        "policy": settings["policy"],
        "task_candidates": task["num_candidates"],
        "task_kept": task["num_kept"],
        "contamination": record["contamination"],
    }
    return answer | ({"note": task["note"]} if task["note"] else {}) | ({"repeats": other["row_id"]} if other else {})


def diff(a: str | os.PathLike[str] | Folder, b: str | os.PathLike[str] | Folder) -> dict[str, Any]:
    """How two finished mixes differ: settings, rows in both and in one only, per source, per task.

    `tasks` holds only the tasks whose counts differ, largest difference first.
    """
    first, second = open_folder(a), open_folder(b)
    for folder in (first, second):
        read_manifest(folder, "mix")
    kept = [_kept(folder) for folder in (first, second)]
    both = pc.sum(pc.is_in(kept[0]["row_id"], kept[1]["row_id"])).as_py()
    # (source, task) → rows kept; outside rows under the task their source names
    ours, theirs = (Counter(zip(one["source"].to_pylist(), one["task"].to_pylist(), strict=True)) for one in kept)
    tasks: list[dict[str, Any]] = [
        {"source": source, "task": task, "a": ours[source, task], "b": theirs[source, task]}
        for source, task in sorted(ours.keys() | theirs.keys())
    ]
    sources: dict[str, dict[str, Any]] = {}
    for row in tasks:
        total = sources.setdefault(row["source"], {"source": row["source"], "a": 0, "b": 0})
        total["a"] += row["a"]
        total["b"] += row["b"]
    changed = [{**row, "difference": row["b"] - row["a"]} for row in tasks if row["a"] != row["b"]]
    return {
        "settings": identity_differences(first.read_json(RUN_FILE), second.read_json(RUN_FILE)),
        "rows": {
            "a": ours.total(),
            "b": theirs.total(),
            "in_both": both,
            "only_a": ours.total() - both,
            "only_b": theirs.total() - both,
        },
        "sources": [{**row, "difference": row["b"] - row["a"]} for row in sources.values()],
        "tasks": sorted(changed, key=lambda row: (-abs(row["difference"]), row["source"], row["task"])),
    }


def _why(
    record: Mapping[str, Any], task: Mapping[str, Any], settings: Mapping[str, Any], other: Mapping[str, Any] | None
) -> str:
    reason = Reason[record["reason"].upper()]
    text = reason.text
    share = f"{task['num_allocated']:,} of {task['num_usable']:,} usable rows"
    if reason is Reason.KEPT and record["source"] != NATURAL_INSTRUCTIONS:
        return f"{text}: one of the first {share} of its source in hash order"
    if reason is Reason.KEPT and settings["policy"] == BIRBAL_2023:
        return f"{text}: drawn from {record['bucket']} of its task ({share})"
    if reason is Reason.KEPT and settings["policy"] == TASK_SCORE:
        order = "failed rows first" if settings["task_score"].get("failed_first", True) else "in hash order"
        answered = "the model failed this one" if record["bucket"] == "failed" else "the model did not fail this one"
        return f"{text}: its task (score {task['task_score']:.3f}) was allocated {share}, {order}; {answered}"
    if reason is Reason.KEPT:
        return f"{text}: its task was allocated {share} ({settings['policy']}), in hash order"
    if reason in (Reason.OVER_ALLOCATION, Reason.OVER_CAP, Reason.NOT_DRAWN, Reason.OVER_SOURCE_LIMIT):
        return f"{text}: {share} of {task['task']}" + (f" ({task['note']})" if task["note"] else "")
    if other is not None:
        return f"{text}: {other['row_id']} ({'kept' if other['kept'] else 'dropped: ' + other['reason']})"
    return text


def _find(folder: Folder, row_id: str) -> dict[str, Any] | None:
    for table in read_batches(folder, AUDIT_FILE, AUDIT, AUDIT.names):
        found = table.filter(pc.equal(table["row_id"], row_id))
        if len(found):
            return dict(found.slice(0, 1).to_pylist()[0])
    return None


def _kept(folder: Folder) -> pa.Table:
    tables = read_batches(folder, AUDIT_FILE, AUDIT, ["row_id", "source", "task", "kept"])
    return pa.concat_tables(table.filter(table["kept"]) for table in tables)


def read_batches(folder: Folder, name: str, schema: pa.Schema, columns: list[str]) -> Iterator[pa.Table]:
    """Columns of a mix's file, BATCH_ROWS rows at a time. Raises RunError where it is damaged or lacks one."""
    place = folder.at(name)
    try:
        with folder.open_input(name) as data, pq.ParquetFile(data) as file:
            check_columns(place, file.schema_arrow, pa.schema([schema.field(name) for name in columns]))
            for batch in file.iter_batches(BATCH_ROWS, columns=columns):
                yield pa.Table.from_batches([batch])
    except (pa.ArrowException, OSError) as error:
        raise RunError(f"{place}: can't be read ({one_line(error)}); run `birbal mix` again") from None
