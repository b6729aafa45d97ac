"""Runs whose output is an s3:// URL, against an S3 server on this machine (moto): kills, outages, machines, nodes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.dataset as pads
import pytest

from birbal_ray.storage import Folder, open_folder
from tests.conftest import slow
from tests.e2e.processes import birbal, finish, here, kill_whole, wait_for
from tests.fixtures.s3_server import BUCKET, s3_proxy
from tests.ray.conftest import NUM_ROWS, SHARD_ROWS, scored_rows, start_cluster

pytestmark = pytest.mark.timeout(600)


def score(tasks: Path, output: object, row_seconds: float = 0.0, **settings: object) -> list[object]:
    given = {"engine.backend": "simulated", "shard_rows": SHARD_ROWS, "resources.simulated_row_seconds": row_seconds}
    sets = [part for key, value in {**given, **settings}.items() for part in ("--set", f"{key}={value}")]
    return ["score", "--tasks", tasks, "--device", "cpu", *sets, "--output", output]


def row_files(folder: Folder) -> list[str]:
    return list(folder.files("rows"))


def rows_at(folder: Folder) -> list[dict]:
    """All rows of a score run at a URL, as `scored_rows` gives them."""
    dataset = pads.dataset(folder.path("rows"), filesystem=folder.filesystem, format="parquet")
    return dataset.to_table().sort_by("row_id").drop_columns(["num_cached_tokens"]).to_pylist()


def machine(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """Go on as a machine whose disk is empty."""
    monkeypatch.setenv("BIRBAL_CACHE", str(path))


def test_score_killed_and_continued_on_another_machine_then_mix(s3, tasks, undisturbed, tmp_path, monkeypatch):
    machine(monkeypatch, tmp_path / "first")
    url = f"s3://{BUCKET}/runs/score"
    there = open_folder(url)
    first = birbal(*score(tasks, url, 0.1))
    wait_for(lambda: len(row_files(there)) >= 4, first)
    kill_whole(first)
    kept = {name: there.read_bytes(name) for name in row_files(there)}
    assert len(kept) >= 4 and "manifest.json" not in there.files()
    (row,) = json.loads(here("status", url, "--format", "json")[0])
    assert (row["step"], row["state"], row["folder"]) == ("score", "stopped", url), "its lock's process is gone"

    machine(monkeypatch, tmp_path / "second")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)  # in this process, on a Ray of its own, which knows the bucket
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    here(*score(tasks, url))
    assert kept.items() <= {name: there.read_bytes(name) for name in row_files(there)}.items(), "not scored again"
    assert rows_at(there) == scored_rows(undisturbed), "each row once, as on a disk"
    (row,) = json.loads(here("status", url, "--format", "json")[0])
    assert (row["state"], row["done"], row["planned"]) == ("done", NUM_ROWS, NUM_ROWS)
    _, errors = here(*score(tasks, url))
    assert "up to date" in errors

    machine(monkeypatch, tmp_path / "third")
    mixed = open_folder(f"s3://{BUCKET}/runs/mix")
    budgets = ["task_score.exact_match_budget=20", "task_score.allow_shortfall=true", "filters.max_short_input_words=0"]
    sets = [part for one in budgets for part in ("--set", one)]
    for scores, output in ((url, mixed), (undisturbed, tmp_path / "mix")):
        here("mix", "--scores", scores, "--output", output, *sets)
    assert mixed.read_json("manifest.json")["scores"]["path"] == url
    assert mixed.read_bytes("train.parquet") == (tmp_path / "mix" / "train.parquet").read_bytes()


def test_an_outage_of_the_bucket_costs_no_finished_row(s3, tasks, undisturbed, tmp_path, monkeypatch):
    """PUTs are refused for some seconds in the middle; the run goes on, and every row is there once."""
    machine(monkeypatch, tmp_path / "cache")
    there, away = open_folder(f"s3://{BUCKET}/outage/score"), threading.Event()
    with s3_proxy(s3, lambda method, path: None if method == "PUT" and away.is_set() else 0.0) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server["AWS_ENDPOINT_URL"])
        process = birbal(*score(tasks, there, 0.06))
        wait_for(lambda: len(row_files(there)) >= 3, process)
        away.set()
        time.sleep(4)
        before = row_files(there)
        assert "manifest.json" not in there.files()
        away.clear()
        finish(process)
    assert set(before) < set(row_files(there))
    assert rows_at(there) == scored_rows(undisturbed)


def on_cluster(environment: dict[str, str], *arguments: object) -> subprocess.Popen[str]:
    """The command as a driver of the cluster that RAY_ADDRESS names."""
    command = [sys.executable, "-m", "birbal_ray", *map(str, arguments)]
    return subprocess.Popen(
        command, env={**os.environ, **environment}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@slow
def test_two_nodes_write_one_run_and_one_of_them_and_the_driver_are_killed(
    s3, tasks, undisturbed, tmp_path, monkeypatch
):
    """Every node writes its own rows and logs straight to the URL, here through a proxy of its own, which sees them."""
    machine(monkeypatch, tmp_path / "cache")
    there = open_folder(f"s3://{BUCKET}/nodes/score")
    written: dict[str, list[str]] = {"driver": [], "first": [], "second": [], "third": []}

    def counting(name: str) -> Callable[[str, str], float]:
        def rule(method: str, path: str) -> float:
            if method in ("PUT", "POST") and ("/rows/" in path or "/logs/replica-" in path):
                written[name].append(path)
            return 0.0

        return rule

    # More than a node of 5 CPUs takes, and two processes that write.
    split = {"resources.num_replicas": 6, "resources.shards_in_flight": 1}
    cluster = start_cluster(num_cpus=0)
    try:
        with (
            s3_proxy(s3, counting("driver")) as driver,
            s3_proxy(s3, counting("first")) as first,
            s3_proxy(s3, counting("second")) as second,
            s3_proxy(s3, counting("third")) as third,
        ):
            nodes = [cluster.add_node(num_cpus=5, env_vars=one) for one in (first, second)]
            environment = {"RAY_ADDRESS": cluster.address, **driver}
            command = score(tasks, there, 1.5, **split)
            process = on_cluster(environment, *command)
            wait_for(lambda: written["first"] and written["second"] and row_files(there), process)
            cluster.remove_node(nodes[0], allow_graceful=False)
            cluster.add_node(num_cpus=5, env_vars=third)  # as a spot provider does, sooner or later
            so_far = len(row_files(there))
            wait_for(lambda: len(row_files(there)) >= so_far + 2, process)
            kill_whole(process)
            assert "manifest.json" not in there.files()
            kept = {name: there.read_bytes(name) for name in row_files(there)}
            assert 0 < len(kept) < NUM_ROWS // SHARD_ROWS
            finish(on_cluster(environment, *score(tasks, there, **split)))
    finally:
        cluster.shutdown()
    assert not written["driver"], "nodes write rows, not the driver"
    assert kept.items() <= {name: there.read_bytes(name) for name in row_files(there)}.items(), "not scored again"
    assert rows_at(there) == scored_rows(undisturbed), "no row lost, none doubled, none different"
    assert len([name for name in there.files("logs") if "replica-" in name]) >= 2, "logs of both nodes"
    assert os.environ["AWS_ENDPOINT_URL"] == s3["AWS_ENDPOINT_URL"]
