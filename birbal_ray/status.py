"""What is done, running and next in a run folder, told by its files alone."""

from __future__ import annotations

import json
import os
import shlex
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from birbal_ray.progress import duration
from birbal_ray.run import LOCK_FILE, LOG_FOLDER, MANIFEST_FILE, RUN_FILE, RunError, read_json
from birbal_ray.settings import ConfigError
from birbal_ray.status_progress import UNREADABLE, Found, dig, mapping, measured, number, one_line, time_of
from birbal_ray.train.deadline import CLOCK_FILE

DONE, RUNNING, STOPPED, NOT_BEGUN, DAMAGED = "done", "running", "stopped", "not begun", "damaged"
CHAIN = ("score", "tune", "mix", "train", "evaluate")  # each reads what an earlier one wrote
OPTIONAL = ("tune",)
REPORT, REPORT_FILE = "report", "report.html"
SESSIONS_FILE = "sessions.jsonl"
SILENT_SECONDS = 20 * 60.0  # a score run gives itself up after so long without a row
CLOCK_SLACK_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Row:
    """One step's folder. `done` of `planned`: score rows, optimizer steps or trials; None where nothing is counted."""

    step: str  # ? where its run.json can't be read
    folder: Path
    state: str  # done | running | stopped | not begun | damaged
    detail: str = ""  # the state in more words
    progress: str = ""
    done: int | None = None
    planned: int | None = None
    touched: float | None = None  # seconds since the epoch
    wall_seconds: float | None = None
    next: str = ""  # a command, or what to do


def status(run: Path, now: float | None = None) -> list[Row]:
    """The steps in the folders of `run`, or the one whose folder `run` is: in the order they run, then by name.

    A folder of steps also gets rows of what has not begun after the last one. Only reads, and never
    waits: a run that works there or starts just then is not disturbed. Damaged files become rows
    that say so. Raises ConfigError when `run` is no run folder.
    """
    now = time.time() if now is None else now
    run = run if run.name not in ("", "..") else run.resolve()  # what lies beside it is asked for
    alone = _look(run)
    found = [alone] if alone else [folder for path in _subfolders(run) if (folder := _look(path))]
    if not found:
        raise ConfigError(_no_run(run))
    home = run.parent if alone else run
    found.sort(key=lambda folder: (_place(folder.step), folder.path.name))
    begun = {folder.step for folder in found}
    if alone:  # what follows lies beside it
        begun |= {step for step in CHAIN if (home / step / RUN_FILE).exists()}
    last = max((_place(step) for step in begun if step in CHAIN), default=None)
    rows = [_row(folder, now) for folder in found]
    rows = [replace(row, next=_next(row, folder, home, last)) for row, folder in zip(rows, found, strict=True)]
    if alone or last is None:
        return rows
    rest = [Row(step, home / step, NOT_BEGUN) for step in CHAIN[last + 1 :] if step not in OPTIONAL]
    report = home / REPORT_FILE
    if not (written := time_of(report)):
        return [*rows, *rest, Row(REPORT, report, NOT_BEGUN)]
    older = [row.step for row in rows if row.step in CHAIN and (row.touched or 0.0) > written]
    progress = f"older than {', '.join(older)}" if older else ""
    return [*rows, *rest, Row(REPORT, report, DONE, progress=progress, touched=written)]


def holder_of(folder: Path) -> tuple[int, str] | None:
    """(pid, host) of the run that writes in `folder`; None if there is none, or it died on this machine.

    Reads what the lock's holder wrote down and leaves the lock alone: a run that starts just then
    must get it. Whether a process of another host lives can't be told from here.
    """
    file = folder / f"{LOCK_FILE}.json"
    try:
        who, written = read_json(file), file.stat().st_mtime
        pid, host = int(who["pid"]), str(who["host"])
        if host != socket.gethostname():
            return pid, host
        process = psutil.Process(pid)
        # The number may have been given to another process since.
        same = process.create_time() <= written + CLOCK_SLACK_SECONDS
        return (pid, host) if same and process.status() != psutil.STATUS_ZOMBIE else None
    except (*UNREADABLE, psutil.NoSuchProcess):
        return None


def _look(path: Path) -> Found | None:
    """The step in a folder; None when it is none of ours (other tools call files manifest.json, too)."""
    holder = holder_of(path)  # before the manifest: a run lets go when that is written
    records: list[Mapping[str, Any] | None] = []
    damage = ""
    for name in (RUN_FILE, MANIFEST_FILE):
        try:
            content = read_json(path / name) if (path / name).is_file() else None
        except (RunError, OSError) as error:
            content, damage = None, damage or one_line(error)
        is_ours = isinstance(content, dict) and isinstance(content.get("step"), str)
        records.append(content if is_ours else None)
    return Found(path, holder, records[0], records[1], damage) if any(records) or damage else None


def _row(folder: Found, now: float) -> Row:
    path, step = folder.path, folder.step
    if folder.damage:
        return Row(step, path, DAMAGED, progress=folder.damage, touched=_touched(path))
    if folder.manifest is not None:
        seen = measured(folder)
        wall = number(folder.manifest, "wall_seconds") or number(folder.manifest, "result", "elapsed_seconds")
        return Row(step, path, DONE, "", seen.text, seen.done, seen.planned, time_of(path / MANIFEST_FILE), wall)
    touched = _touched(path)
    state, detail = _state(folder.holder, now - touched)
    seen = measured(folder)
    wall = _wall_seconds(path, now if state == RUNNING else None)
    return Row(step, path, state, detail, seen.text, seen.done, seen.planned, touched, wall)


def _state(holder: tuple[int, str] | None, silent_seconds: float) -> tuple[str, str]:
    if holder is None:
        return STOPPED, ""
    pid, host = holder
    if host == socket.gethostname():
        return RUNNING, f"running as pid {pid}"
    if silent_seconds <= SILENT_SECONDS:
        return RUNNING, f"running on {host}, unless it was killed"
    return STOPPED, f"stopped, it seems: {host} has written nothing for {duration(silent_seconds)}"


def _next(row: Row, folder: Found, home: Path, last: int | None) -> str:
    # A pipeline's log lies beside its steps; their settings are in its command.
    piped = (home / LOG_FOLDER / "ray.log").exists() and row.folder == home / row.step
    maker = "birbal demo or birbal pipeline" if piped else f"birbal {row.step}".removesuffix(" ?")
    again = f"run the same {maker} command again"
    if row.state == DAMAGED and folder.record is None:
        return f"{again}, with --overwrite"
    if row.state == DAMAGED:
        return f"remove {row.folder / MANIFEST_FILE}, then {again}"
    if row.state == STOPPED:
        return again
    if row.state != DONE or row.step not in CHAIN or _place(row.step) != last:
        return ""
    if row.step == "evaluate":
        return "" if time_of(home / REPORT_FILE) >= (row.touched or 0.0) else f"birbal report {_quoted(home)}"
    return again if piped else _following(row, folder.manifest or {}, home)


def _following(row: Row, manifest: Mapping[str, Any], home: Path) -> str:
    here = _quoted(row.folder)
    if row.step == "score":
        return f"birbal mix --scores {here} --output {_quoted(home / 'mix')}"
    if row.step == "tune":
        return f"birbal mix --config {_quoted(row.folder / 'best_mix.yaml')} --output {_quoted(home / 'mix')}"
    name = dig(manifest, "scores", "model") if row.step == "mix" else dig(manifest, "model", "name")
    model = f" --model {_quoted(name)}" if name else ""
    if row.step == "mix":
        return f"birbal train --mix {here}{model} --output {_quoted(home / 'train')}"
    scores = _look(home / "score")
    tasks = _quoted(dig(scores.manifest if scores else None, "settings", "tasks", "path") or "DIR")
    return f"birbal evaluate --tasks {tasks}{model} --adapter {here} --output {_quoted(home / 'evaluate')}"


def _no_run(run: Path) -> str:
    if not run.exists():
        return f"{run}: no such folder; expected a step's output, or a folder that holds steps' outputs"
    inside = sorted({file.parent.parent.name for file in run.glob(f"*/*/{RUN_FILE}")})
    hint = f"; there are some in {', '.join(inside[:5])}" if inside else ""
    return f"{run}: no run folder: neither a step's output nor a folder that holds steps' outputs{hint}"


def _touched(path: Path) -> float:
    """The newest file on top or among the logs, or folder below: a file that is renamed into one changes its time."""
    newest = 0.0
    for place, folders, names in os.walk(path):
        here = Path(place)
        if here in (path, path / LOG_FOLDER):
            folders_and_files = [*folders, *(name for name in names if not name.startswith(LOCK_FILE))]
        else:
            folders_and_files = folders
        newest = max([newest, *(time_of(here / name) for name in folders_and_files)])
    return newest


def _wall_seconds(path: Path, until: float | None) -> float | None:
    """Of the sessions that could say, and of the one that runs `until` now."""
    try:
        if (path / CLOCK_FILE).exists():
            return number(mapping(path / CLOCK_FILE), "elapsed_seconds")
        file = path / SESSIONS_FILE
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        seconds = sum(float(json.loads(line)["wall_seconds"]) for line in lines)
    except UNREADABLE:
        return None
    if until is not None:
        seconds += max(0.0, until - (time_of(path / f"{LOCK_FILE}.json") or until))
    return round(seconds, 3) or None


def _subfolders(path: Path) -> list[Path]:
    entries = path.iterdir() if path.is_dir() else ()
    return [entry for entry in entries if not entry.name.startswith(".") and entry.is_dir()]


def _place(step: str) -> int:
    return CHAIN.index(step) if step in CHAIN else len(CHAIN)


def _quoted(path: object) -> str:
    return shlex.quote(str(path))
