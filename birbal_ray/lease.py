"""One run at a URL: a small object there that its run keeps writing anew."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil

from birbal_ray.object_store import filesystem_of, named_errors
from birbal_ray.run import RunError

LEASE_FILE = ".lease.json"
BEAT_SECONDS = 3.0
LEASE_SECONDS = 12.0  # a lease that was not renewed for so long belongs to a dead run


@contextlib.contextmanager
def leased(url: str) -> Iterator[None]:
    """Be the only run at a URL: a small object that is written anew every few seconds.

    A lease that stands still for LEASE_SECONDS belongs to a run that died. Two that start in the same second
    see each other's writing; the one that wrote first gives way.
    """
    system, base = filesystem_of(url)
    path = f"{base}/{LEASE_FILE}"
    me = {"host": socket.gethostname(), "pid": os.getpid()}

    def read() -> dict[str, Any] | None:
        try:
            with system.open_input_stream(path) as stream:
                return json.loads(stream.read())
        except (FileNotFoundError, json.JSONDecodeError):
            return None

    def write(beat: int) -> None:
        with system.open_output_stream(path) as stream:
            stream.write(json.dumps({**me, "beat": beat}).encode())

    with named_errors(url):
        if (found := read()) and not _is_dead(found):
            _wait_until(lambda: read() != found, LEASE_SECONDS)
            if (now := read()) is not None and now != found:
                raise _held(url, now)
        write(0)
        time.sleep(0.5)
        if (now := read()) is not None and (now["host"], now["pid"]) != (me["host"], me["pid"]):
            raise _held(url, now)
    done = threading.Event()

    def renew() -> None:
        beat = 0
        while not done.wait(BEAT_SECONDS):
            beat += 1
            with contextlib.suppress(OSError):
                write(beat)

    keeper = threading.Thread(target=renew, name="lease", daemon=True)
    keeper.start()
    try:
        yield
    finally:
        done.set()
        keeper.join(timeout=60)
        with contextlib.suppress(OSError):
            system.delete_file(path)


def _is_dead(lease: dict[str, Any]) -> bool:
    return lease["host"] == socket.gethostname() and not psutil.pid_exists(lease["pid"])


def _held(url: str, lease: dict[str, Any]) -> RunError:
    return RunError(
        f"{url}: another run is writing there (pid {lease['pid']} on {lease['host']}); wait for it or stop it"
    )


def _wait_until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not condition():
        time.sleep(0.5)
