"""`birbal score` in this process, on the simulated engine: what it refuses, what it does again."""

from __future__ import annotations

import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from birbal_ray.cli.main import main
from tests.fixtures.inline_scoring import inline_scoring

__all__ = ["inline_scoring"]


@pytest.fixture
def run(inline_scoring, tmp_path, monkeypatch):
    """run(folder, *more) → (exit code, stderr, run folder)."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("BIRBAL_CACHE", str(tmp_path / "cache"))

    def score(folder, *more):
        command = ["score", "--tasks", folder, "--output", tmp_path / "run", "--device", "cpu", *more]
        done = CliRunner().invoke(main, [*map(str, command), "--set", "engine.backend=simulated"])
        return done.exit_code, done.stderr, tmp_path / "run"

    return score


def scored_rows(run):
    """All rows, by row id, without how many tokens came from the cache."""
    rows = pads.dataset(run / "rows", format="parquet").to_table().sort_by("row_id")
    return rows.drop_columns(["num_cached_tokens"]).to_pylist()


def test_changed_settings_are_refused_changed_resources_are_not(run, write_task):
    folder = write_task("task_a", 8)
    assert run(folder)[0] == 0
    code, errors, _ = run(folder, "--num-shots", "1", "--set", "seed=7")
    assert code == 2
    assert "prompt.num_shots: 4 → 1" in errors
    assert "seed: 0 → 7" in errors
    code, errors, _ = run(folder, "--set", "resources.shards_in_flight=1")
    assert code == 0
    assert "is up to date: 8 rows of 1 task" in errors
    code, errors, output = run(folder, "--num-shots", "1", "--overwrite")
    assert code == 0, errors
    assert pq.read_table(output / "tasks.parquet")["num_shots"].to_pylist() == [1]


def test_a_damaged_shard_is_scored_again(run, write_task):
    folder = write_task("task_a", 12)
    code, _, output = run(folder, "--set", "shard_rows=4")
    assert code == 0
    rows = scored_rows(output)
    damaged, *_ = sorted((output / "rows" / "task_a").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:-20])
    (output / "rows" / "task_a" / ".tmp-1-2-000000-000004.parquet").write_bytes(b"half")
    code, errors, _ = run(folder, "--set", "shard_rows=4")
    assert code == 0, errors
    assert "1 file(s) of the finished run are missing or have changed" in errors
    assert "continuing: 2 of 3 shards (8 rows) are done" in errors
    assert (output / "manifest.json").exists()
    assert scored_rows(output) == rows


def test_tasks_in_the_users_home_are_found(run, write_task, monkeypatch):
    folder = write_task("task_a", 4)
    monkeypatch.setenv("HOME", str(folder.parent))
    code, errors, _ = run(f"~/{folder.name}")
    assert code == 0, errors
