"""The whole score pipeline on Ray with a simulated engine: errors, limits, refusals, real task files."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest

from birbal_ray.run import read_manifest
from tests.conftest import task_values
from tests.ray.conftest import scored_rows

SIMULATED = ["--set", "engine.backend=simulated", "--device", "cpu"]


@pytest.fixture
def run(birbal, tmp_path):
    """run(folder, *more) → (exit code, stdout, stderr, run folder)."""

    def score(folder, *more, output="run"):
        process = birbal("score", "--tasks", folder, "--output", tmp_path / output, *SIMULATED, *more)
        out, errors = process.communicate(timeout=200)
        return process.returncode, out, errors, tmp_path / output

    return score


def test_failed_rows_are_rows_with_their_reason(run, write_task):
    instances = [
        *task_values(5)["Instances"],
        {"id": "refused", "input": "SIMULATED-ROW-ERROR", "output": ["x"]},
        {"id": "long", "input": "word " * 400_000, "output": ["x"]},
        {"id": "bare", "input": "no reference", "output": []},
    ]
    folder = write_task("task_a", Instances=instances)
    (folder / "broken.json").write_text("{")
    code, out, errors, folder = run(folder, "--format", "json")
    assert code == 0, errors
    (scores,) = json.loads(out)
    assert (scores["num_instances"], scores["num_scored"], scores["num_errors"]) == (8, 5, 3)
    reasons = {row["instance_id"]: row["error"] for row in scored_rows(folder) if row["error"]}
    assert reasons["refused"] == "refused by the engine: simulated row error"
    assert reasons["long"].startswith("prompt too long: 400")
    assert reasons["bare"].startswith("no reference")
    assert all(row["score"] is None for row in scored_rows(folder) if row["error"])
    manifest = read_manifest(folder, "score")
    assert manifest["rows"]["planned"] == 8 == manifest["rows"]["scored"] + sum(manifest["rows"]["errors"].values())
    assert manifest["files"]["quarantined"][0]["file"] == "broken.json"
    assert "quarantined broken.json" in errors
    assert json.loads((folder / "quarantine.jsonl").read_text())["file"] == "broken.json"


def test_an_engine_that_keeps_dying_fails_the_run_and_keeps_the_rest(run, write_task):
    folder = write_task("task_a", 80)
    deadly = [{"id": "1", "input": "SIMULATED-ENGINE-DEATH", "output": ["x"]}]
    write_task("task_b", Instances=deadly)
    few = ["--set", "shard_rows=4", "--set", "resources.max_engine_restarts=1", "--set", "resources.shards_in_flight=2"]
    few += ["--set", "resources.simulated_row_seconds=0.1"]  # 8 s until the deadly task's turn comes
    code, _, errors, output = run(folder, *few)
    assert code == 1
    assert "an engine died 2 times, resources.max_engine_restarts is 1" in errors
    assert "task_b chunk 0: RuntimeError: simulated engine death" in errors
    assert "the same command continues" in errors
    assert "Traceback" not in errors
    kept = len(list((output / "rows").glob("[!.]*.parquet")))
    assert kept >= 5
    write_task("task_b", 4)  # mended: another input, so another run
    code, _, errors, _ = run(folder, *few)
    assert code == 2
    assert "inputs.task_b: " in errors
    assert "--overwrite" in errors


def test_changed_settings_are_refused_changed_resources_are_not(run, write_task):
    folder = write_task("task_a", 8)
    assert run(folder)[0] == 0
    code, _, errors, _ = run(folder, "--num-shots", "1", "--set", "seed=7")
    assert code == 2
    assert "config.prompt.num_shots: 4 → 1" in errors
    assert "config.seed: 0 → 7" in errors
    code, _, errors, _ = run(folder, "--set", "resources.shards_in_flight=1")
    assert code == 0
    assert "is up to date: 8 rows of 1 tasks" in errors
    code, _, errors, output = run(folder, "--num-shots", "1", "--overwrite")
    assert code == 0, errors
    assert pq.read_table(output / "tasks.parquet")["num_shots"].to_pylist() == [1]


def test_a_damaged_shard_is_scored_again(run, write_task):
    folder = write_task("task_a", 12)
    code, _, _, output = run(folder, "--set", "shard_rows=4")
    assert code == 0
    rows = scored_rows(output)
    damaged, *_ = sorted((output / "rows").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:-20])
    (output / "rows" / ".tmp-1-2-left.parquet").write_bytes(b"half")
    code, _, errors, _ = run(folder, "--set", "shard_rows=4")
    assert code == 0, errors
    assert "1 files of a finished run are gone or damaged" in errors
    assert "continuing: 2 of 3 shards (8 rows) are done" in errors
    assert (output / "manifest.json").exists()
    assert scored_rows(output) == rows


def test_silence_ends_the_run_instead_of_hanging(run, write_task):
    folder = write_task("task_a", 4)
    slow = ["--set", "resources.simulated_row_seconds=300", "--set", "resources.no_progress_minutes=0.4"]
    code, _, errors, _ = run(folder, *slow)
    assert code == 1
    assert "no progress for 0.4 minutes" in errors


def test_a_cluster_that_is_not_there(write_task, birbal, tmp_path):
    nowhere = {"RAY_ADDRESS": "127.0.0.1:1"}
    process = birbal("score", "--tasks", write_task("task_a"), "--output", tmp_path / "r", *SIMULATED, env=nowhere)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "error: RAY_ADDRESS=127.0.0.1:1: no Ray cluster answers there" in errors
    assert "Traceback" not in errors


def test_a_cluster_that_can_not_call_back(write_task, birbal, tmp_path):
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}  # the cluster has none
    process = birbal("score", "--tasks", write_task("task_a"), "--output", tmp_path / "r", *SIMULATED, env=token)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "RAY_AUTH_MODE must be the same here (now: token) and on the cluster" in errors
    assert "Traceback" not in errors


def test_all_real_task_files_through_ray_data(run, shared_data):
    archive = shared_data / "natural-instructions-subset.tar.gz"
    code, _, errors, folder = run(archive, "--instances-per-task", "3", "--set", "resources.shards_in_flight=8")
    assert code == 0, errors
    rows = scored_rows(folder)
    assert len({row["task"] for row in rows}) == 179
    assert len(rows) == len({row["row_id"] for row in rows}) == 179 * 3
    assert all(row["few_shot_prompt"].endswith(f"{row['orig_input']}\n\n### Response:\n") for row in rows)
    assert (folder / "quarantine.jsonl").read_text() == ""
