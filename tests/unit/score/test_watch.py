"""The driver's watch over its engines: bounded restarts, no silence for ever."""

from __future__ import annotations

import io
import re

import pytest

from birbal_ray.cluster import can_place
from birbal_ray.progress import ProgressLine
from birbal_ray.run import RunError
from birbal_ray.score import pipeline
from birbal_ray.score.config import ScoreConfig
from birbal_ray.score.monitor import EngineMonitor
from birbal_ray.score.throughput import Meter
from birbal_ray.settings import load_config


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def watch(tmp_path, **resources):
    flags = {f"resources.{key}": value for key, value in resources.items()}
    return pipeline._Watch(load_config(ScoreConfig, None, [], flags), tmp_path)


def test_no_progress_is_reported_after_the_given_minutes(clock, tmp_path):
    board, seen = EngineMonitor(), watch(tmp_path, no_progress_minutes=5)
    board.started("r1", "n1")
    seen.look(board.snapshot())
    clock[0] += 299
    seen.look(board.snapshot())
    board.add("r1", {"rows": 1})
    clock[0] += 299
    seen.look(board.snapshot())
    clock[0] += 301
    with pytest.raises(RunError, match="no progress for 5 minutes"):
        seen.look(board.snapshot())


def test_restarts_are_bounded_but_moves_to_another_node_are_not(clock, tmp_path):
    board, seen = EngineMonitor(), watch(tmp_path, max_engine_restarts=1)
    for node in ("n1", "n2", "n3", "n4"):
        board.started("r1", node)
    assert board.snapshot().num_moves == 3
    seen.look(board.snapshot())
    board.started("r1", "n4")
    seen.look(board.snapshot())
    board.died("r1", "task_a chunk 3: CUDA error")
    board.started("r1", "n4")
    with pytest.raises(RunError, match=re.escape("an engine died 2 times")) as caught:
        seen.look(board.snapshot())
    assert "task_a chunk 3: CUDA error" in str(caught.value)


def test_a_death_that_every_shard_in_flight_reports_counts_once(clock, tmp_path):
    board = EngineMonitor()
    board.started("r1", "n1")
    for shard in range(3):
        board.died("r1", f"shard {shard}")
    assert len(board.snapshot().deaths) == 1
    board.started("r1", "n1")
    board.died("r1", "again")
    assert len(board.snapshot().deaths) == 2


def test_an_output_that_this_node_does_not_see_is_reported(clock, tmp_path):
    seen = watch(tmp_path)
    seen.see(tmp_path / "a.parquet")  # a network file system may show it later
    clock[0] += 121
    with pytest.raises(RunError, match=r"b\.parquet: written on another node and not seen here"):
        seen.see(tmp_path / "b.parquet")
    (tmp_path / "c.parquet").touch()
    for name in ("c.parquet", "d.parquet"):
        seen.see(tmp_path / name)


@pytest.mark.parametrize(
    ("nodes", "settings", "lacks"),
    [
        ([{"CPU": 8}], {"engine.device": "cpu"}, None),
        ([{"CPU": 8}], {"engine.device": "gpu"}, "0 of 1 replicas"),
        ([{"CPU": 16, "GPU": 1}] * 2, {"engine.device": "gpu", "resources.num_replicas": 2}, None),
        ([{"CPU": 16, "GPU": 0.5}] * 2, {"engine.device": "gpu"}, "0 of 1 replicas"),
        ([{"CPU": 8}] * 4, {"engine.device": "cpu", "resources.cpus_per_replica": 16}, "0 of 1 replicas"),
        (
            [{"CPU": 16, "GPU": 1, "accelerator_type:A10G": 1}, {"CPU": 16, "GPU": 1}],
            {"engine.device": "gpu", "resources.num_replicas": 2, "resources.accelerator_type": "A10G"},
            "1 of 2 replicas (it has 2 nodes, 32 CPUs of 4.25 needed, 2 GPUs, cards: A10G)",
        ),
    ],
)
def test_what_a_cluster_lacks(nodes, settings, lacks):
    missing = can_place(pipeline.replica_request(load_config(ScoreConfig, None, [], settings)), nodes)
    assert missing is None if lacks is None else lacks in (missing or "")


def test_progress_line_shows_rates_from_the_moment_the_engine_was_ready(clock):
    board, meter = EngineMonitor(), Meter(rows_before=100, rows_total=400)
    clock[0] += 30
    assert meter.line(board.snapshot()).startswith("loading the model (0 engine(s) started, 30 s)")
    board.started("r1", "n1")
    board.ready("r1")
    meter.line(board.snapshot())
    clock[0] += 10
    counts = {"rows": 50, "errors": 1, "prompt_tokens": 4000, "cached_tokens": 3000, "completion_tokens": 100}
    board.add("r1", counts)
    line = meter.line(board.snapshot())
    assert line == "150/400 rows · 5.0 rows/s · 400 prompt tokens/s · 75% from cache · 1 errors · ETA 50 s"


def test_a_live_line_never_wraps(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("COLUMNS", "40")
    terminal = Terminal()
    ProgressLine(terminal).update("x" * 100)
    assert terminal.getvalue() == "\r\x1b[2K" + "x" * 39
