"""A Ray cluster for the tests of this folder, and `birbal` as a process beside it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.dataset as pads
import pytest

# Before Ray is imported anywhere in this process, so that its daemons inherit it.
from birbal_ray.cli.main import main
from birbal_ray.cluster import AUTH_MODE, QUIET_ENVIRONMENT
from birbal_ray.score.config import ScoreConfig
from birbal_ray.score.run import score
from birbal_ray.settings import load_config
from tests.conftest import task_values
from tests.fixtures.inline_scoring import score_without_ray

# Without a token, told so: a local ray.init would switch to tokens in the middle, and what is started from here
# after that would refuse calls from the head of a cluster that was started before.
os.environ.update(QUIET_ENVIRONMENT | {AUTH_MODE: "disabled"})
# Nobody looks at a dashboard here: its agents need not measure every process every five seconds.
os.environ["REPORTER_UPDATE_INTERVAL_MS"] = "60000"
NUM_TASKS, NUM_INSTANCES, SHARD_ROWS = 5, 40, 4
NUM_ROWS = NUM_TASKS * NUM_INSTANCES
NUM_SHARDS = NUM_ROWS // SHARD_ROWS


def start_cluster(**head: Any) -> Any:
    """A ray.cluster_utils.Cluster with this head. Ray gives a node 30 s to start; a busy machine may need longer."""
    from ray.cluster_utils import Cluster

    head = {"include_dashboard": False, "include_log_monitor": False, **head}
    for _ in range(2):
        try:
            return Cluster(initialize_head=True, head_node_args=head)
        except Exception as error:  # Ray raises a bare Exception here
            if "timed out during startup" not in str(error):
                raise
    return Cluster(initialize_head=True, head_node_args=head)


@pytest.fixture(scope="session")
def cluster_address() -> Iterator[str]:
    """One node with 5 logical CPUs that outlives the drivers the tests kill."""
    folder = Path(tempfile.mkdtemp(prefix="bt-"))
    (folder / "ray").mkdir()
    os.environ["RAY_TMPDIR"] = str(folder)
    cluster = start_cluster(num_cpus=5, object_store_memory=1 << 29)
    try:
        yield cluster.address
    finally:
        cluster.shutdown()
        del os.environ["RAY_TMPDIR"]
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def birbal(cluster_address: str) -> Callable[..., subprocess.Popen[str]]:
    """birbal(*arguments, local, env) → the started process; local=True gives it a cluster of its own."""

    def start(*arguments: object, local: bool = False, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        given = {"RAY_ADDRESS": cluster_address} if not local else {}
        environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_TMPDIR")} | given
        if local:
            del environment[AUTH_MODE]  # as a user's
        environment |= env or {}
        return subprocess.Popen(
            [sys.executable, "-m", "birbal_ray", *map(str, arguments)],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # Tests that run in the background inherit an ignored SIGINT; the command is to have it as in a terminal.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )

    return start


@pytest.fixture(scope="session")
def here(cluster_address: str) -> Callable[..., tuple[int, str, str]]:
    """here(*arguments) → (exit code, stdout, stderr) of the command in this process, on the cluster.

    For what nobody kills: a process of its own would load Ray Data once more.
    """

    def run(*arguments: object) -> tuple[int, str, str]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(pytest.MonkeyPatch.context()).setenv("RAY_ADDRESS", cluster_address)
            out, err = (stack.enter_context(_file_as(descriptor)) for descriptor in (1, 2))
            code = main.main(list(map(str, arguments)), "birbal", standalone_mode=False)
            sys.stdout.flush(), sys.stderr.flush()
            return (code or 0, *(Path(file.name).read_text() for file in (out, err)))

    return run


@contextlib.contextmanager
def _file_as(descriptor: int) -> Iterator[Any]:
    """A file that takes what is written to the descriptor, and to Python's stream of that number."""
    name = {1: "stdout", 2: "stderr"}[descriptor]
    with tempfile.NamedTemporaryFile("w", encoding="utf-8") as file, pytest.MonkeyPatch.context() as patch:
        before = os.dup(descriptor)
        os.dup2(file.fileno(), descriptor)
        patch.setattr(sys, name, file)
        try:
            yield file
        finally:
            os.dup2(before, descriptor)
            os.close(before)


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of NUM_TASKS task files with NUM_INSTANCES instances each."""
    folder = tmp_path_factory.mktemp("tasks")
    for number in range(NUM_TASKS):
        values = task_values(NUM_INSTANCES, Definition=[f"Definition {number}."])
        (folder / f"task{number}.json").write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="session")
def undisturbed(tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that scored the tasks on a disk, shard after shard in this process: nothing could happen to it."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    settings = {"engine.backend": "simulated", "engine.device": "cpu", "shard_rows": SHARD_ROWS}
    with pytest.MonkeyPatch.context() as patch:
        score_without_ray(patch)
        score(load_config(ScoreConfig, None, [], {**settings, "tasks.path": str(tasks), "output": str(run)}))
    return run


def scored_rows(run: Path) -> list[dict]:
    """All rows of a score run, by row id, without how many tokens came from the cache: that depends on timing."""
    rows = pads.dataset(run / "rows", format="parquet").to_table().sort_by("row_id")
    return rows.drop_columns(["num_cached_tokens"]).to_pylist()
