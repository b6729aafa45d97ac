"""Killed at any moment, a run ends after reruns with the rows of an uninterrupted one."""

from __future__ import annotations

import contextlib
import hashlib
import random
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from birbal_ray.cluster import FOLDER_PREFIX
from birbal_ray.storage import read_json
from tests.conftest import SLOW
from tests.ray.conftest import NUM_SHARDS, SHARD_ROWS, scored_rows

NUM_DRIVER_KILLS, NUM_ENGINE_KILLS = (6, 3) if SLOW else (3, 2)
Start = Callable[..., subprocess.Popen]


@pytest.fixture(scope="module")
def arguments(tasks):
    """arguments(run folder) of `birbal`: a run that takes about 4 s once its engine is up."""
    settings = {
        "engine.backend": "simulated",
        "engine.device": "cpu",
        "shard_rows": SHARD_ROWS,
        "resources.simulated_row_seconds": 0.02,
        "resources.max_engine_restarts": NUM_ENGINE_KILLS,
    }
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return lambda run, *more: ["score", "--tasks", tasks, *sets, *more, "--output", run]


def finished_files(run: Path) -> dict[str, tuple[int, int]]:
    """Shard file → (inode, time of change): both stay unless the file is written again."""
    files = (run / "rows").rglob("[!.]*.parquet") if (run / "rows").is_dir() else ()
    return {f"{file.parent.name}/{file.name}": (file.stat().st_ino, file.stat().st_mtime_ns) for file in files}


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, seconds: float = 90) -> bool:
    """True when the condition came true, False when the process ended before."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.02)
    raise AssertionError(f"nothing happened for {seconds} s")


def kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def test_killed_or_stopped_again_and_again_it_ends_with_the_same_rows(birbal: Start, arguments, undisturbed, tmp_path):
    """One run: its driver killed at random points, then everything at once, then asked to stop by either signal."""
    run, chance = tmp_path / "run", random.Random(20231215)

    def start_until_more(most: int, *more: str, local: bool = False) -> subprocess.Popen:
        target = len(finished_files(run)) + chance.randint(1, most)
        process = birbal(*arguments(run, *more), local=local)
        assert wait_for(lambda: len(finished_files(run)) >= target, process), process.communicate()
        return process

    redone_files = 0
    for _ in range(NUM_DRIVER_KILLS):
        before = finished_files(run)
        process = start_until_more(NUM_SHARDS // (3 * NUM_DRIVER_KILLS))
        time.sleep(chance.random() * 0.1)
        process.kill()
        process.communicate(timeout=120)
        after = finished_files(run)
        # What was written stays as it was; at most the shards in flight are done again, under their own names.
        redone_files += sum(after[name] != stamp for name, stamp in before.items())
    # A dead driver's last writes may still land while the next one starts: a few shards in flight, no more.
    assert redone_files <= NUM_DRIVER_KILLS

    process = start_until_more(5, local=True)
    kill([*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)])
    process.communicate(timeout=30)
    before = finished_files(run)
    assert 0 < len(before) < NUM_SHARDS
    for number in (signal.SIGTERM, signal.SIGINT):
        psutil.wait_procs(engines(run), timeout=60)  # of a driver that has left: they still publish what they finish
        done = len(finished_files(run))
        process = start_until_more(3, "--set", "resources.simulated_row_seconds=0.1")  # 20 s: not over by itself
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 1
        assert f"continuing: {done} of {NUM_SHARDS} shards ({done * SHARD_ROWS} rows) are done" in errors
        assert "what is finished is kept, the same command continues" in errors
        assert "Traceback" not in errors
    assert len(finished_files(run)) < NUM_SHARDS

    process = birbal(*arguments(run), local=True)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert scored_rows(run) == scored_rows(undisturbed)
    assert {name: stamp for name, stamp in finished_files(run).items() if name in before} == before
    assert not list(Path(tempfile.gettempdir()).glob(f"{FOLDER_PREFIX}{process.pid}-*"))


def engines(run: Path) -> list[psutil.Process]:
    """The run's living engine processes, by the pids in their logs."""
    text = "".join(file.read_text() for file in (run / "logs").glob("replica-*.log"))
    pids = {int(pid) for pid in re.findall(r"^replica \w+ pid (\d+)", text, re.MULTILINE)}
    processes = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    return [process for process in processes if process.status() != psutil.STATUS_ZOMBIE]


def test_engine_process_killed_is_replaced_by_itself(birbal: Start, arguments, undisturbed, tmp_path):
    run, chance = tmp_path / "engine-killed", random.Random(462)
    process = birbal(*arguments(run, "--set", "resources.simulated_row_seconds=0.06"))  # 12 s: not over by itself
    for _ in range(NUM_ENGINE_KILLS):
        written = len(finished_files(run))
        target = written + chance.randint(1, 6)
        assert wait_for(lambda target=target: engines(run) and len(finished_files(run)) >= target, process)
        time.sleep(chance.random() * 0.1)
        kill(engines(run))
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    assert scored_rows(run) == scored_rows(undisturbed)
    for name, record in read_json(run / "manifest.json")["files"].items():  # also of shards that were written twice
        assert hashlib.sha256((run / name).read_bytes()).hexdigest() == record["sha256"], name
