"""`birbal` as a process, and how to end one for good."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pyarrow.dataset as pads
from click.testing import CliRunner

from birbal_ray.cli.main import main
from birbal_ray.cluster import AUTH_MODE

NUM_THREADS = 1  # of an engine or a training: two workers run tests on two cores


def birbal(*arguments: object) -> subprocess.Popen[str]:
    """Start the command, on a Ray of its own."""
    environment = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", AUTH_MODE)}
    command = [sys.executable, "-m", "birbal_ray", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Its stdout and stderr; it must succeed."""
    output, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    return output, errors


def here(*arguments: object) -> tuple[str, str]:
    """stdout and stderr of the command in this process, where it starts no Ray; it must succeed."""
    done = CliRunner().invoke(main, list(map(str, arguments)))
    assert done.exit_code == 0, done.stderr
    return done.stdout, done.stderr


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 400) -> None:
    """Until it is true; the process must live until then."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        if time.monotonic() > end:
            kill_whole(process)
            raise AssertionError(f"nothing for {seconds} s")
        time.sleep(0.1)


def kill_whole(process: subprocess.Popen[str]) -> None:
    """SIGKILL to the command and everything it started."""
    for victim in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        victim.kill()
    process.communicate()


def rows_of(run: Path) -> list[dict]:
    """All rows of a score run, by row id."""
    return pads.dataset(run / "rows", format="parquet").to_table().sort_by("row_id").to_pylist()
