"""Scored rows in the JSON layout of the published recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa

from birbal_ray.manifest import read_manifest
from birbal_ray.run import RunError
from birbal_ray.schemas import ROWS_FOLDER, TASKS_FILE
from birbal_ray.score.plan import RowFiles
from birbal_ray.storage import open_folder, write_atomic

PUBLISHED_COLUMNS = ["orig_input", "few_shot_prompt", "answer", "prediction"]


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
