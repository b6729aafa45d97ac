"""A score run after any history: every row once, and in the end the rows of one undisturbed run."""

from __future__ import annotations

import random

import pyarrow.parquet as pq
import pytest

from birbal_ray.score.config import ScoreConfig
from birbal_ray.score.run import score
from birbal_ray.settings import load_config
from birbal_ray.storage import RunError
from tests.conftest import task_values
from tests.fixtures.inline_scoring import Interrupted, inline_scoring

__all__ = ["inline_scoring"]

SIZES = {"task_a": 37, "task_b": 12, "task_c": 64}
CHANGES = {  # what a user may do between two commands: settings, each with values to choose from
    "shard_rows": [3, 5, 8, 64],
    "tasks.instances_per_task": [4, 11, 30, None],
    "tasks.exclude": [[], ["task_a"], ["task_b"]],
    "adaptive.enabled": [True, False],
    "adaptive.score_margin": [0.1, 0.3, 0.45],
    "adaptive.exact_match_budget": [0, 10, 30],
    "adaptive.even_fraction": [0.0, 0.5],
    "resources.shards_in_flight": [1, 3],
}


def rows_of(folder):
    """Row id → row, without what depends on which prompt of a task came first in a session."""
    rows = {}
    for file in sorted((folder / "rows").rglob("*.parquet")):
        for row in pq.read_table(file, partitioning=None).to_pylist():
            assert row["row_id"] not in rows
            rows[row["row_id"]] = {**row, "num_cached_tokens": None}
    return rows


@pytest.mark.parametrize("seed", range(3))
def test_any_history_of_a_run_ends_with_every_row_once(seed, write_task, tmp_path, inline_scoring, monkeypatch):
    monkeypatch.setenv("BIRBAL_CACHE", str(tmp_path / "cache"))
    chance = random.Random(seed)
    settings = {"shard_rows": 5, "adaptive.first_instances": 10, "engine.max_model_len": 200}

    def write(name, version):
        entries = task_values(SIZES[name])["Instances"]
        entries[3]["input"], entries[5]["output"], entries[7]["input"] = "word " * 250, [], "SIMULATED-ROW-ERROR"
        write_task(name, Instances=entries, Definition=[f"{name}, version {version}."])

    def run(stop_after=None, output="run", **flags):
        inline_scoring(stop_after=stop_after)
        fixed = {"tasks.path": str(tmp_path / "tasks"), "output": str(tmp_path / output)}
        values = {**fixed, "engine.backend": "simulated", "engine.device": "cpu", **settings}
        return score(load_config(ScoreConfig, None, [], values), **flags)

    def damage(files):
        file = chance.choice(files)
        data = file.read_bytes()
        file.write_bytes(chance.choice([data[:-9], bytes(len(data))]))
        (tmp_path / "run" / "manifest.json").unlink(missing_ok=True)  # else nobody looks at what has its size

    for name in SIZES:
        write(name, 0)
    for step in range(5):
        setting = chance.choice(list(CHANGES))
        settings[setting] = chance.choice(CHANGES[setting])
        if chance.random() < 0.2:
            write(chance.choice(list(SIZES)), step)
        if (files := sorted((tmp_path / "run").rglob("rows/**/*.parquet"))) and chance.random() < 0.2:
            damage(files)
        stop_after = chance.choice([None, chance.randrange(9)])
        flags = {name: chance.random() < 0.2 for name in ("retry_errors", "rescore_all")}
        try:
            result = run(stop_after, **flags)
            assert result.manifest["rows"]["planned"] == len(rows_of(tmp_path / "run"))
            assert run(0).manifest == result.manifest, "up to date: no shard is given out"
        except (Interrupted, RunError) as error:
            assert isinstance(error, Interrupted) or "damaged" in str(error) or "no prediction yet" in str(error)
    settings |= {"adaptive.enabled": False, "tasks.exclude": [], "tasks.instances_per_task": None}
    for _ in range(2):  # the first may find a damaged file
        try:
            run(retry_errors=True)
            break
        except RunError as error:
            assert "run the same command again" in str(error)
    run(output="undisturbed")
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "undisturbed")
    assert len(rows_of(tmp_path / "run")) == sum(SIZES.values())
