"""One writer at a time: who holds a run folder, on a disk or in object storage."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock
import psutil

from birbal_ray.storage import Folder, Version, open_folder
from birbal_ray.stores import RETRY_SECONDS, RunError

LOCK_FILE = ".lock"
LOCK_RECORD = ".lock.json"  # who holds the folder; at a URL it is the lock itself
LEASE_SECONDS = 60.0  # a remote lock that nobody renewed for so long may be taken over
RENEW_SECONDS = 10.0
LEASE_MARGIN_SECONDS = 5.0
CHECK_SECONDS = 5.0  # for so long a worker believes what the store said of the lock


def this_process() -> dict[str, Any]:
    """Who writes into a folder: process, host, the host's boot and pid namespace, and when the process started."""
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "boot": _boot(),
        "started": psutil.Process().create_time(),
    }


def is_alive(process: Mapping[str, Any]) -> bool | None:
    """Whether a process that `this_process` described still runs; None when it can't be told from here."""
    if (process["host"], process["boot"]) != (socket.gethostname(), _boot()):
        return None
    try:
        found = psutil.Process(process["pid"])
        # The number may belong to another process by now.
        return abs(found.create_time() - process["started"]) < 1 and found.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _boot() -> str:
    parts = []
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip())
    with contextlib.suppress(OSError):
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)


@contextlib.contextmanager
def hold_lock(folder: Folder) -> Iterator[RemoteLock | None]:
    """Be the only process that writes into the folder. Raises RunError at once when another live process does.

    On a disk a file lock, which the kernel keeps until the process ends, however it ends. A folder at a URL gives its
    RemoteLock; where that is lost, whatever ends the block becomes the RunError that says so.
    """
    if not folder.is_local:
        remote = RemoteLock(folder)
        remote.acquire()
        try:
            yield remote
        except BaseException:
            if remote.lost:
                raise RunError(remote.lost) from None
            raise
        finally:
            remote.release()
        return
    folder.local.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder.local / LOCK_FILE, blocking=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise _held(folder, lock_holder(folder) or {}) from None
    try:
        folder.write_json(LOCK_RECORD, this_process())
        yield None
    finally:
        folder.delete([LOCK_RECORD])
        lock.release()


def lock_holder(folder: Folder) -> dict[str, Any] | None:
    """The record of the process that holds the folder, as `this_process` gives it; None when none does, or it died.

    Only reads: a run that starts just then is not disturbed. `is_alive` of the record is None for a process elsewhere.
    """
    try:
        holder = folder.read_json(LOCK_RECORD)
        return None if holder.get("released") or is_alive(holder) is False else holder
    except (FileNotFoundError, RunError, AttributeError, KeyError, TypeError):
        return None


class RemoteLock:
    """A lock object in the folder's store, renewed by a thread; two processes never hold it at once.

    The object is created only if there is none (If-None-Match) and replaced only in the version last seen (If-Match).
    It is never deleted: a holder that leaves marks it as released. A process takes it over from a holder that is dead
    on this machine, or whose version has not changed for LEASE_SECONDS. A holder believes in its lock only for
    LEASE_SECONDS from the start of its last successful renewal, by its own clock, and so stops believing before another
    can take over; after that, `check` renews first. A thread that finds the lock lost interrupts the main thread.

    Pickled, it becomes a LockView.
    """

    def __init__(self, folder: Folder) -> None:
        self.lost = ""  # why, once another process has taken the lock
        self._folder = folder
        self._me = {**this_process(), "token": uuid.uuid4().hex}
        self._beat = 0
        self._version: Version | None = None
        self._valid_until = 0.0  # on the monotonic clock
        self._mutex, self._done = threading.Lock(), threading.Event()
        self._from_main = threading.current_thread() is threading.main_thread()
        self._thread = threading.Thread(target=self._keep, name="lock", daemon=True)

    def acquire(self) -> None:
        """Take the lock. Raises RunError when a living process holds it, after at most LEASE_SECONDS."""
        deadline, seen = time.monotonic() + LEASE_SECONDS, None
        while not self._write(seen):
            holder, version = _read(self._folder)
            if seen is not None and version != seen:
                raise _held(self._folder, holder)
            seen = version
            while not (holder.get("released") or is_alive(holder) is False or time.monotonic() > deadline):
                self._done.wait(min(1.0, RENEW_SECONDS / 4))
                holder, version = _read(self._folder)
                if version != seen:
                    raise _held(self._folder, holder)
        self._thread.start()

    def __reduce__(self) -> tuple[Any, ...]:
        return LockView, (self._folder.place, self._me["token"])

    def check(self) -> None:
        """Raise RunError unless this process surely holds the lock now. Waits through an outage of the store."""
        start = time.monotonic()
        with self._mutex:
            while not self.lost and time.monotonic() > self._valid_until:
                try:
                    self._renew()
                    break
                except RunError:
                    if time.monotonic() - start > RETRY_SECONDS:
                        raise
                    self._done.wait(1.0)
            if self.lost:
                raise RunError(self.lost)
            if time.monotonic() > self._valid_until:
                raise RunError(
                    f"{self._folder}: one small write takes the store over {LEASE_SECONDS:.0f} s, too slow to know "
                    "that no other run writes there; run the same command again when it is faster"
                )

    def release(self) -> None:
        self._done.set()
        self._thread.join()
        with self._mutex, contextlib.suppress(RunError):
            if not self.lost:
                self._write(self._version, released=True)

    def _keep(self) -> None:
        while not self._done.wait(RENEW_SECONDS):
            with self._mutex, contextlib.suppress(RunError):  # an outage: tried again, and `check` will say so
                self._renew()
            if self.lost:
                if self._from_main:
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                return

    def _renew(self) -> None:
        if not self._write(self._version):
            holder, _ = _read(self._folder)
            self.lost = _lost(self._folder, holder)

    def _write(self, expected: Version | None, **fields: Any) -> bool:
        self._beat += 1
        record = {**self._me, "beat": self._beat, **fields}
        start = time.monotonic()
        version = self._folder.write_version(LOCK_RECORD, json.dumps(record).encode(), expected)
        if version is None:  # by another process, or by this request's first try, whose answer was lost
            with contextlib.suppress(FileNotFoundError):
                found, version = _read(self._folder)
                version = version if found == record else None
        if version is not None:
            self._version, self._valid_until = version, start + LEASE_SECONDS - LEASE_MARGIN_SECONDS
        return version is not None


class LockView:
    """A RemoteLock as the run's other processes see it, on any node: they only read it."""

    def __init__(self, place: str, token: str) -> None:
        self._folder, self._token = open_folder(place), token
        self._asked = -CHECK_SECONDS

    def __reduce__(self) -> tuple[Any, ...]:
        return LockView, (self._folder.place, self._token)

    def check(self) -> None:
        """Raise RunError when another run took the lock, or this one gave it back. A request every CHECK_SECONDS."""
        now = time.monotonic()
        if now - self._asked < CHECK_SECONDS:
            return
        holder, _ = _read(self._folder, patient=True)
        if holder.get("token") != self._token or holder.get("released"):
            raise RunError(_lost(self._folder, holder))
        self._asked = now


def _read(folder: Folder, *, patient: bool = False) -> tuple[dict[str, Any], Version]:
    """A remote lock's record, and its version; made-up values, which are no one's, where another program wrote it."""
    data, version = folder.read_version(LOCK_RECORD, patient=patient)
    try:
        return dict(json.loads(data)), version
    except (ValueError, TypeError):
        return {"host": "?", "boot": "?", "pid": "?"}, version


def _lost(folder: Folder, holder: Mapping[str, Any]) -> str:
    if holder.get("released"):
        return f"{folder}: the run that this process works for has ended; nothing more is written"
    return (
        f"{folder}: another run (pid {holder.get('pid', '?')} on {holder.get('host', '?')}) took this "
        "folder over while this one could not renew its lock; this run stops, what it finished is kept"
    )


def _held(folder: Folder, holder: Mapping[str, Any]) -> RunError:
    return RunError(
        f"{folder}: another run is writing here (pid {holder.get('pid', '?')} on {holder.get('host', '?')}); "
        "wait for it or stop it"
    )
