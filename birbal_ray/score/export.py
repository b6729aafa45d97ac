"""Scored rows in the JSON layout of the published recipe."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from birbal_ray.run import RunError, read_manifest, write_atomic
from birbal_ray.schemas import ROWS_FOLDER, TASKS_FILE

PUBLISHED_COLUMNS = ["orig_input", "few_shot_prompt", "answer", "prediction"]


def export_published_json(run: Path, output: Path) -> tuple[int, int]:
    """Write `{task}.json` per task of a finished score run; (files, rows) written.

    Each holds a list of {orig_input, few_shot_prompt, answer, prediction} by row id. Rows with an
    error have an empty prediction. Raises RunError when `run` is no finished score run, or its files
    are not all there any more.
    """
    read_manifest(run, "score")
    files = defaultdict(list)
    for file in (run / ROWS_FOLDER).glob("*.parquet"):
        if not file.name.startswith(".tmp-"):
            files[file.name.rsplit("-", 3)[0]].append(file)  # TASK-CHUNK-of-CHUNKS.parquet
    tasks = pq.read_table(run / TASKS_FILE, columns=["task", "num_instances"]).to_pylist()
    num_rows = 0
    for task in tasks:
        name = task["task"]
        try:
            parts = [pq.read_table(file, columns=[*PUBLISHED_COLUMNS, "row_id"]) for file in files[name]]
        except (pa.ArrowInvalid, OSError) as error:
            raise RunError(
                f"{run}: the rows of {name} can't be read ({error}); run `birbal score` on it again"
            ) from None
        found = sum(part.num_rows for part in parts)
        if found != task["num_instances"]:
            raise RunError(
                f"{run}: {found} rows of {name} are there, {task['num_instances']} were scored; "
                "run `birbal score` on it again"
            )
        records = pa.concat_tables(parts).sort_by("row_id").select(PUBLISHED_COLUMNS).to_pylist()
        write_atomic(output / f"{name}.json", (json.dumps(records, indent=1, ensure_ascii=False) + "\n").encode())
        num_rows += found
    return len(tasks), num_rows
