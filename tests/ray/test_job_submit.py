"""`ray job submit` to a head on this machine: stopped or its head lost, submitted again, it goes on."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from birbal_ray.storage import read_json
from tests.conftest import REPOSITORY, slow, task_values
from tests.ray.conftest import scored_rows
from tests.ray.test_score_kills import finished_files
from tests.ray.test_train_ray import SETTINGS, losses

pytestmark = pytest.mark.timeout(900)
NUM_TASKS, NUM_INSTANCES, SHARD_ROWS, NUM_STEPS = 3, 40, 4, 400
NUM_SHARDS = NUM_TASKS * NUM_INSTANCES // SHARD_ROWS


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Head:
    """A head made by cluster/local.sh, and the commands of somebody who uses it."""

    def __init__(self) -> None:
        self.port, self.dashboard = free_port(), free_port()
        ports = {"PORT": str(self.port), "DASHBOARD_PORT": str(self.dashboard), "NUM_CPUS": "8"}
        ports["STOP_SECONDS"] = "10"  # Ray takes 30 s to drain a node that nobody uses
        inherited = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_TMPDIR")}
        self.environment = {**inherited, **ports, "RAY_AUTH_MODE": "token"}
        self.folder = Path(f"/tmp/birbal-head-{self.port}")

    def script(self, *arguments: str) -> str:
        command = [str(REPOSITORY / "cluster" / "local.sh"), *arguments]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def ray_job(self, verb: str, *arguments: object, ok: bool = True) -> str:
        address = ["--address", f"http://127.0.0.1:{self.dashboard}"]
        command = [str(REPOSITORY / ".venv" / "bin" / "ray"), "job", verb, *address, *map(str, arguments)]
        done = subprocess.run(
            command, env=self.environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=400
        )
        assert done.returncode == 0 or not ok, done.stdout + done.stderr
        return done.stdout + done.stderr

    def submit(self, name: str, *entrypoint: object, wait: bool, ok: bool = True) -> str:
        how = ["--submission-id", name, "--working-dir", ".", *([] if wait else ["--no-wait"])]
        return self.ray_job("submit", *how, "--", "python", *entrypoint, ok=ok)

    def processes(self) -> list[psutil.Process]:
        """All processes of this head, jobs and workers included."""
        found = []
        for process in psutil.process_iter(["pid", "cmdline", "environ"]):
            text = " ".join([*(process.info["cmdline"] or []), *(process.info["environ"] or {}).values()])
            if f"{self.folder}/" in text or f":{self.port}" in text:
                found.append(process)
        return [process for process in found if process.pid != os.getpid()]

    def lose(self) -> None:
        """SIGKILL to everything, as when the machine is taken away; also to what starts meanwhile."""
        while processes := self.processes():
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(processes, timeout=1)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    if not (REPOSITORY / ".venv" / "bin" / "ray").exists():
        pytest.skip("needs Ray's command in .venv/bin (make setup)")
    head = Head()
    head.script()
    yield head
    head.script("stop")
    assert not head.folder.exists()


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: nothing for {seconds} s"
        time.sleep(0.2)


def metrics(head: Head) -> str:
    """What Prometheus would read from this head."""
    found = ""
    for target in json.loads((head.folder / "ray" / "prom_metrics_service_discovery.json").read_text()):
        for address in target["targets"]:
            with contextlib.suppress(OSError):  # told of before it listens
                found += urllib.request.urlopen(f"http://{address}/metrics", timeout=10).read().decode()
    return found


def test_score_goes_on_after_the_head_is_lost(head, tmp_path):
    tasks, run = tmp_path / "tasks", tmp_path / "run"
    tasks.mkdir()
    for number in range(NUM_TASKS):
        values = task_values(NUM_INSTANCES, Definition=[f"Definition {number}."])
        (tasks / f"task{number}.json").write_text(json.dumps(values))
    settings = {"engine.backend": "simulated", "shard_rows": SHARD_ROWS, "resources.simulated_row_seconds": 1}
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    job = ["jobs/score.py", "--tasks", tasks, "--output", run, "--device", "cpu", *sets]
    head.submit("score-1", *job, wait=False)
    wait_until(lambda: len(finished_files(run)) >= 3, 200, "score-1")
    told = ("birbal_rows", "birbal_prompt_tokens")
    wait_until(lambda: all(name in metrics(head) for name in told), 60, "Ray's metrics")
    head.lose()
    kept = finished_files(run)
    assert 3 <= len(kept) < NUM_SHARDS

    head.script()  # a new head at the same place
    quick = [part.replace("_seconds=1", "_seconds=0") if isinstance(part, str) else part for part in job]
    said = head.submit("score-2", *quick, wait=True)
    assert f"continuing: {len(kept)} of {NUM_SHARDS} shards" in said
    assert "Job 'score-2' succeeded" in head.ray_job("status", "score-2")
    rows = scored_rows(run)
    assert len(rows) == len({row["row_id"] for row in rows}) == NUM_TASKS * NUM_INSTANCES
    assert {name: stamp for name, stamp in finished_files(run).items() if name in kept} == kept


@slow
def test_train_stopped_saves_and_goes_on(head, tiny_model, tiny_mix, tmp_path):
    run = tmp_path / "run"
    changes = SETTINGS | {"max_steps": NUM_STEPS, "evaluation.every_steps": 50, "checkpoint.every_steps": 50}
    sets = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    job = ["jobs/train.py", "--model", tiny_model, "--mix", tiny_mix, "--output", run, "--device", "cpu", *sets]
    head.submit("train-1", *job, wait=False)
    wait_until(lambda: len(losses(run)) >= 5, 300, "train-1")
    head.ray_job("stop", "train-1")
    assert "checkpoint saved; the same command continues" in head.ray_job("logs", "train-1")
    done = len(losses(run))
    assert 5 <= done < NUM_STEPS

    said = head.submit("train-2", *job, wait=True)
    assert "continuing from the last checkpoint" in said
    assert "Job 'train-2' succeeded" in head.ray_job("status", "train-2")
    assert [step for step, _ in losses(run)] == list(range(1, NUM_STEPS + 1)), "every step once"
    assert read_json(run / "manifest.json")["result"]["num_steps"] == NUM_STEPS
    assert (run / "adapter" / "adapter_model.safetensors").exists()
