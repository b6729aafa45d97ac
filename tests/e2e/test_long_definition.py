"""A task whose shared prefix no engine takes, beside a normal one, all defaults: its rows are error rows."""

from __future__ import annotations

import shutil

import pytest

from birbal_ray.manifest import read_manifest
from tests.e2e.processes import birbal, finish, rows_of

pytestmark = pytest.mark.vllm
LONG = "task9001_long_definition"


def test_a_definition_beyond_the_models_length_costs_its_own_rows_alone(shared_data, write_task, tmp_path):
    tasks = write_task("task_colours", num_instances=12)
    shutil.copy(shared_data / "cases" / "tasks" / f"{LONG}.json", tasks)
    run = tmp_path / "run"
    finish(birbal("score", "--tasks", tasks, "--output", run, "--device", "cpu"))
    rows = rows_of(run)
    failed = [row for row in rows if row["task"] == LONG]
    scored = [row for row in rows if row["task"] != LONG]
    assert len(failed) == 40 and len(scored) == 12
    assert all(row["error"].startswith("prompt too long: ") and row["score"] is None for row in failed)
    assert all(row["error"] is None and row["score"] is not None for row in scored)
    assert read_manifest(run, "score")["rows"]["scored"] == 12
