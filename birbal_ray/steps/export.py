"""Scored rows in the JSON layout of the published recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from birbal_ray.contracts import ROWS_FOLDER, TASKS_FILE
from birbal_ray.run import read_manifest, write_atomic

PUBLISHED_COLUMNS = ["orig_input", "few_shot_prompt", "answer", "prediction"]


def export_published_json(run: Path, output: Path) -> tuple[int, int]:
    """Write `{task}.json` per task of a finished score run; (files, rows) written.

    Each holds a list of {orig_input, few_shot_prompt, answer, prediction} by row id. Rows with an
    error have an empty prediction. Raises RunError when `run` is no finished score run.
    """
    read_manifest(run, "score")
    # Listed by hand: of a folder, pyarrow leaves out files that begin with "_" or ".", as tasks' names may.
    files = [str(file) for file in sorted((run / ROWS_FOLDER).glob("*.parquet")) if not file.name.startswith(".tmp-")]
    rows = pads.dataset(files, format="parquet")
    names = pq.read_table(run / TASKS_FILE, columns=["task"])["task"].to_pylist()
    num_rows = 0
    for name in names:
        table = rows.to_table(columns=[*PUBLISHED_COLUMNS, "row_id"], filter=pc.field("task") == name).sort_by("row_id")
        records = table.select(PUBLISHED_COLUMNS).to_pylist()
        write_atomic(output / f"{name}.json", (json.dumps(records, indent=1, ensure_ascii=False) + "\n").encode())
        num_rows += len(records)
    return len(names), num_rows
