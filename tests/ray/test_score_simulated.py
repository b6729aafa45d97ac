"""The whole score pipeline on Ray with a simulated engine: errors, limits, silence, real task files."""

from __future__ import annotations

import json

import pytest

from birbal_ray.manifest import read_manifest
from birbal_ray.ni.reader import find_task_files
from tests.conftest import SLOW, slow, task_values
from tests.ray.conftest import scored_rows

SIMULATED = ["--set", "engine.backend=simulated", "--device", "cpu"]
PER_TASK = 2500 if SLOW else 500  # of the run that a prompt disturbs


@pytest.fixture
def run(here, tmp_path):
    """run(folder, *more) → (exit code, stdout, stderr, run folder)."""

    def score(folder, *more):
        output = tmp_path / "run"
        return *here("score", "--tasks", folder, "--output", output, *SIMULATED, *more), output

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
    assert manifest["inputs"]["quarantined"][0]["file"] == "broken.json"
    assert "quarantined broken.json" in errors
    assert json.loads((folder / "quarantine.jsonl").read_text())["file"] == "broken.json"


@pytest.mark.timeout(400)
def test_a_prompt_that_ends_engines_becomes_one_error_row_among_thousands(run, write_task):
    for number in range(4):
        folder = write_task(f"task_{number}", PER_TASK, Definition=[f"Definition {number}."])
    poison = [
        *task_values(PER_TASK - 1)["Instances"],
        {"id": "poison", "input": "SIMULATED-ENGINE-DEATH", "output": ["x"]},
    ]
    write_task("task_2", Instances=poison)
    settings = ["--set", f"shard_rows={PER_TASK // 20}", "--set", "resources.shards_in_flight=2"]
    code, _, errors, output = run(folder, *settings)
    assert code == 0, errors
    rows = scored_rows(output)
    assert len(rows) == len({row["row_id"] for row in rows}) == 4 * PER_TASK
    (failed,) = [row for row in rows if row["error"]]
    assert failed["instance_id"] == "poison"
    assert failed["error"] == "the engine died of it: RuntimeError: simulated engine death"
    manifest = read_manifest(output, "score")
    assert manifest["rows"]["errors"] == {"the engine died of it": 1}
    assert len(manifest["deaths"]) >= 2 and all("simulated engine death" in death for death in manifest["deaths"])
    assert f"an engine died: {manifest['deaths'][-1]}" in errors
    assert "Traceback" not in errors
    write_task("task_2", PER_TASK)  # another file: its rows, and only these, are scored again
    kept = {row["row_id"]: row for row in rows if row["task"] != "task_2"}
    code, _, errors, output = run(folder, *settings)
    assert code == 0, errors
    assert f"continuing: 60 of 80 shards ({3 * PER_TASK} rows) are done and skipped" in errors
    again = scored_rows(output)
    assert len(again) == 4 * PER_TASK and not any(row["error"] for row in again)
    assert kept.items() <= {row["row_id"]: row for row in again}.items()
    assert len(list((output / "set_aside" / "1" / "task_2").iterdir())) == 20


def test_silence_ends_the_run_instead_of_hanging(run, write_task):
    folder = write_task("task_a", 4)
    slow = ["--set", "resources.simulated_row_seconds=300", "--set", "resources.no_progress_minutes=0.3"]
    code, _, errors, _ = run(folder, *slow)
    assert code == 1
    assert "no progress for 0.3 minutes" in errors


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


@slow
def test_real_task_files_through_ray_data(run, shared_data):
    """All 179; tests/e2e scores some of them with a real model, tests/data reads all."""
    archive = shared_data / "natural-instructions-subset.tar.gz"
    names = [file.name for file in find_task_files(archive)]
    code, _, errors, folder = run(archive, "--instances-per-task", "3", "--set", "resources.shards_in_flight=8")
    assert code == 0, errors
    rows = scored_rows(folder)
    assert len(names) == 179 and {row["task"] for row in rows} == set(names)
    assert len(rows) == len({row["row_id"] for row in rows}) == len(names) * 3
    assert all(row["few_shot_prompt"].endswith(f"{row['orig_input']}\n\n### Response:\n") for row in rows)
    assert (folder / "quarantine.jsonl").read_text() == ""
