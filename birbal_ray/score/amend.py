"""A run that is asked for something else: which of its rows stay, which are set aside, which get new scores."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from birbal_ray.ni.metrics import METRIC_VERSION
from birbal_ray.run import Run
from birbal_ray.schemas import ROWS_FOLDER, TASKS_FILE
from birbal_ray.score.shards import METADATA_KEY, DamagedRowsError, RowFiles, ScorePlan, row_folder
from birbal_ray.storage import DamagedFileError, FileRecord, RunError

SET_ASIDE_FOLDER = "set_aside"


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
    planned = {row_folder(task.name): task for task in plan.tasks}
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
