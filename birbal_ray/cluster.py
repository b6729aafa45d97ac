"""A Ray cluster for one command: the one it is told of, else a quiet local one."""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from birbal_ray.run import RunError

FOLDER_PREFIX = "birbal-ray-"
MIN_LOGICAL_CPUS = 4  # on 2, a reader, an engine and a writer wait for each other for ever
OBJECT_STORE_BYTES = 1 << 30
START_ATTEMPTS = 3
AUTH_MODE = "RAY_AUTH_MODE"  # a local ray.init sets it to token, for this process and its children, for good

# Set before Ray starts, so that its processes inherit them.
QUIET_ENVIRONMENT = {
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DATA_PARQUET_FOOTER_NUM_ACTORS": "1",  # 32 actors by default
    "RAY_worker_niceness": "0",  # workers run at nice 15 by default
    "RAY_DEDUP_LOGS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_prestart_worker_first_driver": "0",  # one process per logical CPU, most of them never used
}


@contextlib.contextmanager
def ray_session(
    logical_cpus: float,
    log_file: Path | None = None,
    *,
    dashboard: bool = False,
    about: Mapping[str, str] | None = None,
) -> Iterator[str | None]:
    """Ray for the block: one that is already initialised, else RAY_ADDRESS's, else a local one.

    `about` becomes the metadata of the Ray job (dashboard, `ray list jobs`): which step, which output.

    Gives the dashboard's host:port where there is one; a local cluster has it, on 127.0.0.1, if asked for.

    A local cluster gets `logical_cpus`, never fewer than 4 (logical CPUs may exceed real ones: they
    are tickets, not cores), keeps its files in a short folder under the temporary directory and
    removes it at the end. With a `log_file`, what Ray says in this process goes there.
    """
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield None
        return
    with _quiet(log_file):
        if os.environ.get("RAY_ADDRESS"):
            _check_answers(os.environ["RAY_ADDRESS"])
            job = importlib.import_module("ray.job_config").JobConfig(metadata=dict(about or {}))
            url = _init(log_to_driver=False, logging_level=logging.ERROR, job_config=job)
            try:
                yield url
            finally:
                ray.shutdown()
            return
        remove_stale_folders()
        folder = Path(tempfile.mkdtemp(prefix=f"{FOLDER_PREFIX}{os.getpid()}-"))
        try:
            url = _init(
                address="local",
                num_cpus=max(MIN_LOGICAL_CPUS, math.ceil(logical_cpus)),
                include_dashboard=dashboard,
                dashboard_host="127.0.0.1",
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=str(folder),
            )
            yield url if dashboard else None
        finally:
            ray.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


def told(step: str, output: object) -> dict[str, str]:
    """Metadata of a step's Ray job."""
    return {"birbal_step": step, "birbal_output": str(output or "")}


def _init(**options: Any) -> str | None:
    """ray.init, which replaces the SIGTERM handler by one that exits with 15: put the caller's back.

    Gives the dashboard's host:port.
    """
    import ray

    previous = signal.getsignal(signal.SIGTERM)
    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            context = ray.init(**options)
            break
        except Exception as error:  # Ray raises a bare Exception here
            if "timed out during startup" not in str(error):
                raise
            ray.shutdown()
            if attempt == START_ATTEMPTS:
                raise RunError(
                    f"Ray did not start within its 30 s, {START_ATTEMPTS} times: the machine is very busy; "
                    "run the command again"
                ) from None
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, previous)
    return context.dashboard_url or None


def _check_answers(address: str) -> None:
    """Raise RunError when nothing listens at host:port; ray.init would try for over a minute, then abort."""
    host, _, port = address.rpartition(":")
    if not port.isdigit() or "//" in address:
        return  # auto, local, ray://…: Ray's to judge
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise RunError(
            f"RAY_ADDRESS={address}: no Ray cluster answers there ({error}); unset it to use this machine"
        ) from None


def remove_stale_folders() -> None:
    """Remove local clusters' folders whose driver is gone (it was killed and could not)."""
    for folder in Path(tempfile.gettempdir()).glob(f"{FOLDER_PREFIX}*"):
        pid = folder.name.removeprefix(FOLDER_PREFIX).split("-")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def log_to(file: Path) -> None:
    """Send this process's stdout and stderr, libraries' included, to a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)


@contextlib.contextmanager
def _quiet(log_file: Path | None) -> Iterator[None]:
    """Ray's Python loggers and its native code (which writes to descriptor 2) go to the file."""
    if log_file is None:
        yield
        return
    importlib.import_module("ray.data")  # sets its own log handlers up when imported; ours come after

    log_file.parent.mkdir(parents=True, exist_ok=True)
    stream = log_file.open("a", encoding="utf-8", buffering=1)
    handler = logging.StreamHandler(stream)
    handler.setLevel(logging.INFO)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name in ("ray", "ray.data"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
    terminal, python_stderr = os.dup(2), sys.stderr
    try:
        sys.stderr.flush()
        os.dup2(stream.fileno(), 2)
        sys.stderr = os.fdopen(terminal, "w", buffering=1, encoding="utf-8", errors="replace", closefd=False)
        yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
        handler.close()
        sys.stderr = python_stderr
