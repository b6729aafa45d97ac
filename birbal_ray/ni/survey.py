"""Look at task files: survey, description, findings, label comparison."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from birbal_ray.ni import catalog, labels, prompt, reader
from birbal_ray.ni.schema import Task, TaskError, read_text


def survey(path: Path | None) -> list[dict[str, Any]]:
    """One record per task file, by name; a file that can't be used has null fields and its reason."""
    overrides, selected = labels.default_overrides(), set(catalog.selected_names())
    rows = []
    for file, task in _tasks(path):
        name = file.name
        if isinstance(task, TaskError):
            rows.append(dict.fromkeys(_SURVEY_KEYS) | {"task": name, "label reason": str(task)})
            continue
        label = labels.label_task(task, overrides)
        rows.append(
            {
                "task": name,
                "label": label.value,
                "label reason": label.reason,
                "instances": len(task.instances),
                "shots": len(task.positive_examples),
                "category": ", ".join(task.categories),
                "selected": name in selected,
                "excluded": catalog.excluded_by(task, catalog.FAMILIES),
            }
        )
    return sorted(rows, key=lambda row: str(row["task"]))


def describe(path: Path | None, name: str, num_shots: int) -> str:
    """A page about one task. Raises TaskError with the nearest name when it isn't there."""
    root = path or catalog.sample_tasks_folder()
    files = {file.name: file for file in reader.find_task_files(root)}
    if name not in files:
        raise TaskError(catalog.unknown_task(name, list(files), root))
    _, task = next(reader.read_tasks([files[name]]))
    if isinstance(task, TaskError):
        raise task
    label = labels.label_task(task, labels.default_overrides())
    instance = next((instance for instance in task.instances if instance.error is None), task.instances[0])
    repairs = "; ".join(f"{count} × {kind}" for kind, count in task.repairs.items()) or "none"
    return "\n".join(
        [
            f"{task.name}",
            f"label       {label.value} ({label.reason})",
            f"categories  {', '.join(task.categories) or '-'}",
            f"sources     {', '.join(task.sources) or '-'}",
            f"instances   {len(task.instances)}, positive examples {len(task.positive_examples)}",
            f"mended      {repairs}",
            "",
            f"--- few-shot prompt of {instance.row_id}, {min(num_shots, len(task.positive_examples))} shots ---",
            prompt.few_shot_prompt(task, instance.input, num_shots),
            "--- references ---",
            *instance.references,
        ]
    )


def findings(path: Path | None) -> tuple[list[dict[str, Any]], int, int]:
    """(rows of file, kind, count, finding; files read; files that can't be used)."""
    rows: list[dict[str, Any]] = []
    num_files = num_bad = 0
    for file, task in _tasks(path):
        name = file.name
        num_files += 1
        if isinstance(task, TaskError):
            num_bad += 1
            rows.append({"file": f"{name}.json", "kind": "unusable file", "count": 1, "finding": str(task)})
            continue
        for kind, count in task.repairs.items():
            rows.append({"file": f"{name}.json", "kind": "mended", "count": count, "finding": kind})
        for instance in task.instances:
            if instance.error:
                finding = f"{instance.row_id}: {instance.error}"
                rows.append({"file": f"{name}.json", "kind": "unusable instance", "count": 1, "finding": finding})
    return rows, num_files, num_bad


def compare_labels(rows: list[dict[str, Any]], file: Path) -> tuple[int, list[dict[str, Any]]]:
    """(labels that agree, rows that differ with both labels) over the tasks that both sides have."""
    try:
        with io.StringIO(read_text(file), newline="") as handle:
            others = {row["name"]: row["label"] for row in csv.DictReader(handle)}
    except (OSError, KeyError) as error:
        raise TaskError(f"{file}: can't be read as a CSV with the columns name,label ({error!r})") from None
    common = [row for row in rows if row["name"] in others]
    differing = [row | {"other label": others[row["name"]]} for row in common if others[row["name"]] != row["label"]]
    return len(common) - len(differing), differing


_SURVEY_KEYS = ("task", "label", "label reason", "instances", "shots", "category", "selected", "excluded")


def _tasks(path: Path | None) -> Iterator[tuple[reader.TaskFile, Task | TaskError]]:
    return reader.read_tasks(reader.find_task_files(path or catalog.sample_tasks_folder()))
