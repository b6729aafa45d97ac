"""What is done, running and next in a run folder, told by its files alone."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq

from birbal_ray.config import ConfigError
from birbal_ray.contracts import ROWS_FOLDER, TASKS_FILE
from birbal_ray.progress import duration
from birbal_ray.run import LOCK_FILE, LOG_FOLDER, MANIFEST_FILE, RUN_FILE, RunError, read_json
from birbal_ray.steps.train import METRICS_FILE, STATUS_FILE
from birbal_ray.training.curve import read_metrics
from birbal_ray.training.deadline import CLOCK_FILE
from birbal_ray.training.worker import RESULT_FILE as SESSION_FILE
from birbal_ray.tuning.records import JOB_FILE, TRIALS_FOLDER
from birbal_ray.tuning.records import RESULT_FILE as TRIAL_FILE

DONE, RUNNING, STOPPED, NOT_BEGUN, DAMAGED = "done", "running", "stopped", "not begun", "damaged"
CHAIN = ("score", "tune", "mix", "train", "evaluate")  # each reads what an earlier one wrote
OPTIONAL = ("tune",)
REPORT, REPORT_FILE = "report", "report.html"
SESSIONS_FILE = "sessions.jsonl"
SILENT_SECONDS = 20 * 60.0  # a score run gives itself up after so long without a row
CLOCK_SLACK_SECONDS = 10.0
_SHARD = re.compile(r"(?P<task>.+)-(?P<chunk>\d{5,})-of-\d{5,}\.parquet")
# What reading damaged files, or files of another content than ours, ends in; pyarrow's errors are among them.
_UNREADABLE = (RunError, OSError, ValueError, TypeError, KeyError, AttributeError)


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


@dataclass(frozen=True, slots=True)
class _Progress:
    text: str = ""
    done: int | None = None
    planned: int | None = None


@dataclass(frozen=True, slots=True)
class _Folder:
    """A step's folder as it was found; `damage` says which of its records can't be read."""

    path: Path
    holder: tuple[int, str] | None
    record: Mapping[str, Any] | None
    manifest: Mapping[str, Any] | None
    damage: str = ""

    @property
    def step(self) -> str:
        """? where no record can be read."""
        return str((self.record or self.manifest or {}).get("step", "?"))

    @property
    def identity(self) -> Any:
        """What the run is made from, as `start_run` was told."""
        return (self.record or {})["identity"]


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
    if not (written := _written(report)):
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
    except (*_UNREADABLE, psutil.NoSuchProcess):
        return None


def _look(path: Path) -> _Folder | None:
    """The step in a folder; None when it is none of ours (other tools call files manifest.json, too)."""
    holder = holder_of(path)  # before the manifest: a run lets go when that is written
    records: list[Mapping[str, Any] | None] = []
    damage = ""
    for name in (RUN_FILE, MANIFEST_FILE):
        try:
            content = read_json(path / name) if (path / name).is_file() else None
        except (RunError, OSError) as error:
            content, damage = None, damage or _one_line(error)
        is_ours = isinstance(content, dict) and isinstance(content.get("step"), str)
        records.append(content if is_ours else None)
    return _Folder(path, holder, records[0], records[1], damage) if any(records) or damage else None


def _row(folder: _Folder, now: float) -> Row:
    path, step = folder.path, folder.step
    if folder.damage:
        return Row(step, path, DAMAGED, progress=folder.damage, touched=_touched(path))
    if folder.manifest is not None:
        seen = _measured(folder)
        wall = _number(folder.manifest, "wall_seconds") or _number(folder.manifest, "result", "elapsed_seconds")
        return Row(step, path, DONE, "", seen.text, seen.done, seen.planned, _written(path / MANIFEST_FILE), wall)
    touched = _touched(path)
    state, detail = _state(folder.holder, now - touched)
    seen = _measured(folder)
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


def _scored(folder: _Folder) -> _Progress:
    """By the shards' names: a file has its name when it is whole, so that 10,000 need not be opened."""
    path = folder.path
    if not (path / TASKS_FILE).exists():
        return _Progress("planning")
    # Not pq.read_table, which imports all of pyarrow.dataset and pandas: a second.
    table = pq.ParquetFile(path / TASKS_FILE).read(["task", "num_instances"])
    tasks = dict(zip(*(table[name].to_pylist() for name in ("task", "num_instances")), strict=True))
    identity = folder.identity
    shard_rows = identity["config"]["shard_rows"]
    variants = len(identity["contenders"]) * len(identity["prompt_formats"]) if "contenders" in identity else 1
    done = 0
    for _, _, names in os.walk(path / ROWS_FOLDER):
        for shard in filter(None, map(_SHARD.fullmatch, names)):
            done += max(0, min(shard_rows, tasks.get(shard["task"], 0) - int(shard["chunk"]) * shard_rows))
    planned = sum(tasks.values()) * variants
    return _Progress(f"{done:,} of {planned:,} rows", done, planned)


def _trained(folder: _Folder) -> _Progress:
    path, parts = folder.path, []
    seen = _mapping(path / STATUS_FILE)
    if seen:
        parts += [f"step {seen['step']:,} of {seen['max_steps']:,}", f"epoch {seen['epoch']:.2f}"]
        metrics = read_metrics(path / METRICS_FILE)
        for key, name in (("loss", "loss"), ("eval_loss", "eval loss")):
            parts += [f"{name} {line[key]:.4f}" for line in reversed(metrics) if key in line][:1]
        if (forecast := seen["forecast"]) and forecast["by_budget"]:
            parts.append(f"{forecast['num_steps']:,} steps ({forecast['epochs']:.2g} epochs) will fit")
    budget = folder.identity["settings"]["budget"]
    if elapsed := _number(_mapping(path / CLOCK_FILE), "elapsed_seconds"):
        parts.append(f"{duration(elapsed)} of {duration(budget)}" if budget else duration(elapsed))
    error = _mapping(path / SESSION_FILE).get("error")
    if error and folder.holder is None:
        parts.append(f"failed: {error}")
    return _Progress(", ".join(parts) or "no step yet", seen.get("step"), seen.get("max_steps"))


def _tuned(folder: _Folder) -> _Progress:
    settings = folder.identity["settings"]
    baselines, repeats = len(settings["baselines"]), settings["repeats"]
    again = (repeats["top"] + baselines) * repeats["seeds"] if repeats["top"] else 0
    planned = 1 + baselines + settings["num_trials"] + settings["surrogate"] + again  # as tuning.plan counts them
    jobs = list((folder.path / TRIALS_FOLDER).glob(f"*/{JOB_FILE}"))
    ended = [result for job in jobs if (result := _mapping(job.with_name(TRIAL_FILE)))]
    parts = [f"{len(ended):,} of {planned:,} trials{_counts(Counter(one['status'] for one in ended))}"]
    if len(jobs) > len(ended):
        parts.append(f"{len(jobs) - len(ended)} begun")
    losses = [one["objective"] for one in ended if one["objective"] is not None]
    parts += [f"lowest loss {min(losses):.4f}"] if losses else []
    return _Progress(", ".join(parts), len(ended), planned)


def _finished(step: str, manifest: Mapping[str, Any]) -> _Progress:
    if step in ("score", "evaluate"):
        rows = manifest["rows"]
        errors = rows["errors"] if isinstance(rows["errors"], int) else sum(rows["errors"].values())
        text = f"{rows['planned']:,} rows{f', {errors:,} with errors' if errors else ''}"
        return _Progress(text, rows["planned"], rows["planned"])
    if step == "mix":
        rows = manifest["rows"]
        return _Progress(f"{rows['kept']:,} rows ({rows['train']:,} train, {rows['eval']:,} eval)")
    if step == "train":
        result = manifest["result"]
        text = f"{result['num_steps']:,} steps, epoch {result['epochs']:.2f}, ended by {result['ended_by']}"
        text += f", best eval loss {result['best_eval_loss']:.4f}"
        return _Progress(text, result["num_steps"], result["num_steps"])
    if step == "tune":
        num = sum(manifest["trials"].values())
        return _Progress(f"{num:,} trials{_counts(manifest['trials'])}, best mix {manifest['best']['mix']}", num, num)
    return _Progress()


def _measured(folder: _Folder) -> _Progress:
    try:
        if folder.manifest is not None:
            return _finished(folder.step, folder.manifest)
        measure = {"score": _scored, "evaluate": _scored, "train": _trained, "tune": _tuned}.get(folder.step)
        return measure(folder) if measure else _Progress()
    except RunError as error:  # names the file
        return _Progress(_one_line(error))
    except _UNREADABLE as error:
        reason = f"{type(error).__name__}: {_one_line(error)}"
        return _Progress(f"a file in {folder.path} is not as birbal writes it ({reason})")


def _next(row: Row, folder: _Folder, home: Path, last: int | None) -> str:
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
        return "" if _written(home / REPORT_FILE) >= (row.touched or 0.0) else f"birbal report {_quoted(home)}"
    return again if piped else _following(row, folder.manifest or {}, home)


def _following(row: Row, manifest: Mapping[str, Any], home: Path) -> str:
    here = _quoted(row.folder)
    if row.step == "score":
        return f"birbal mix --scores {here} --output {_quoted(home / 'mix')}"
    if row.step == "tune":
        return f"birbal mix --config {_quoted(row.folder / 'best_mix.yaml')} --output {_quoted(home / 'mix')}"
    name = _dig(manifest, "scores", "model") if row.step == "mix" else _dig(manifest, "model", "name")
    model = f" --model {_quoted(name)}" if name else ""
    if row.step == "mix":
        return f"birbal train --mix {here}{model} --output {_quoted(home / 'train')}"
    scores = _look(home / "score")
    tasks = _quoted(_dig(scores.manifest if scores else None, "settings", "tasks", "path") or "DIR")
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
        newest = max([newest, *(_written(here / name) for name in folders_and_files)])
    return newest


def _wall_seconds(path: Path, until: float | None) -> float | None:
    """Of the sessions that could say, and of the one that runs `until` now."""
    try:
        if (path / CLOCK_FILE).exists():
            return _number(_mapping(path / CLOCK_FILE), "elapsed_seconds")
        file = path / SESSIONS_FILE
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        seconds = sum(float(json.loads(line)["wall_seconds"]) for line in lines)
    except _UNREADABLE:
        return None
    if until is not None:
        seconds += max(0.0, until - (_written(path / f"{LOCK_FILE}.json") or until))
    return round(seconds, 3) or None


def _subfolders(path: Path) -> list[Path]:
    entries = path.iterdir() if path.is_dir() else ()
    return [entry for entry in entries if not entry.name.startswith(".") and entry.is_dir()]


def _mapping(file: Path) -> Mapping[str, Any]:
    """What a JSON file says; nothing when it is not there."""
    if not file.exists():
        return {}
    content = read_json(file)
    if not isinstance(content, dict):
        raise RunError(f"{file}: expected a JSON object, found {type(content).__name__}")
    return content


def _dig(content: Any, *keys: str) -> Any:
    for key in keys:
        content = content.get(key) if isinstance(content, Mapping) else None
    return content


def _number(content: Mapping[str, Any], *keys: str) -> float | None:
    value = _dig(content, *keys)
    return float(value) if isinstance(value, (int, float)) else None


def _written(file: Path) -> float:
    """Its time; 0 when it is not there (any more)."""
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0


def _counts(counts: Mapping[str, int]) -> str:
    return f" ({', '.join(f'{count} {name}' for name, count in sorted(counts.items()))})" if counts else ""


def _place(step: str) -> int:
    return CHAIN.index(step) if step in CHAIN else len(CHAIN)


def _quoted(path: object) -> str:
    return shlex.quote(str(path))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
