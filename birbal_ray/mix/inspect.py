"""Questions to a finished mix: why is this row in or out, how do two mixes differ."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from birbal_ray.manifest import identity_differences, read_manifest
from birbal_ray.mix.allocation import BIRBAL_2023, TASK_SCORE
from birbal_ray.mix.rows import AUDIT, AUDIT_FILE, MIX_TASKS, NATURAL_INSTRUCTIONS, Reason
from birbal_ray.mix.scores import read_batches, read_rows
from birbal_ray.schemas import RUN_FILE, TASKS_FILE
from birbal_ray.settings import ConfigError, nearest
from birbal_ray.storage import Folder, open_folder


def explain(mix: str | os.PathLike[str] | Folder, row_id: str) -> dict[str, Any]:
    """Why a candidate is in the mix or not: its audit record, the reason in words, its task's counts.

    Raises RunError when the folder is no finished mix, ConfigError when the row was no candidate.
    """
    folder = open_folder(mix)
    manifest = read_manifest(folder, "mix")
    settings = manifest["identity"]["settings"]
    record = _find(folder, manifest, row_id)
    tasks = {(row["source"], row["task"]): row for row in read_rows(folder, manifest, TASKS_FILE, MIX_TASKS)}
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
    task = tasks[record["source"], name]
    other = _find(folder, manifest, record["duplicate_of"]) if record["duplicate_of"] is not None else None
    answer: dict[str, Any] = {
        **{name: record[name] for name in ("row_id", "kept", "split", "reason")},
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
    folders = [open_folder(place) for place in (a, b)]
    kept = []
    for folder in folders:
        tables = read_audit(folder, read_manifest(folder, "mix"), ["row_id", "source", "task", "kept"])
        kept.append(pa.concat_tables(table.filter(table["kept"]) for table in tables))
    both = pc.sum(pc.is_in(kept[0]["row_id"], kept[1]["row_id"])).as_py() or 0
    num_a, num_b = map(len, kept)
    changed = [row for row in _count_rows(kept, "source", "task") if row["difference"]]
    return {
        "settings": identity_differences(*(folder.read_json(RUN_FILE) for folder in folders)),
        "rows": {"a": num_a, "b": num_b, "in_both": both, "only_a": num_a - both, "only_b": num_b - both},
        "sources": _count_rows(kept, "source"),
        "tasks": sorted(changed, key=lambda row: (-abs(row["difference"]), row["source"], row["task"])),
    }


def read_audit(folder: Folder, manifest: Mapping[str, Any], columns: Sequence[str] = AUDIT.names) -> Iterator[pa.Table]:
    """Columns of a finished mix's audit, as `read_batches` reads them."""
    return read_batches(folder, AUDIT_FILE, AUDIT, columns, manifest["files"][AUDIT_FILE]["sha256"])


def _count_rows(kept: Sequence[pa.Table], *columns: str) -> list[dict[str, Any]]:
    """For each value of the columns: the rows of the first and of the second table, and how many more these are."""
    ours, theirs = (Counter(zip(*(table[name].to_pylist() for name in columns), strict=True)) for table in kept)
    return [
        dict(zip(columns, key, strict=True)) | {"a": ours[key], "b": theirs[key], "difference": theirs[key] - ours[key]}
        for key in sorted(ours.keys() | theirs.keys())
    ]


def _find(folder: Folder, manifest: Mapping[str, Any], row_id: str) -> dict[str, Any] | None:
    for table in read_audit(folder, manifest):
        for row in table.filter(pc.equal(table["row_id"], row_id)).to_pylist():
            return dict(row)
    return None


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
