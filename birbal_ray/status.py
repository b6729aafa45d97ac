"""What is done, running and next in a run folder or a folder of them, by run.json, progress.json and manifest.json."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from birbal_ray.lock import LOCK_RECORD, is_alive, lock_holder
from birbal_ray.manifest import StepFolder, command_of, find_steps, read_step
from birbal_ray.ni.prompt import CHAT
from birbal_ray.progress import CLOCK_FILE, Times, duration
from birbal_ray.run import LOG_FOLDER, MANIFEST_FILE, RUN_FILE
from birbal_ray.settings import ConfigError
from birbal_ray.storage import Folder, open_folder

DONE, RUNNING, STOPPED, NOT_STARTED = "done", "running", "stopped", "not started"
CHAIN = ("score", "tune", "mix", "train", "evaluate")  # each reads what an earlier one wrote
OPTIONAL = ("tune",)
REPORT, REPORT_FILE = "report", "report.html"
SILENT_SECONDS = 20 * 60.0  # a score run gives itself up after so long without a row


@dataclass(frozen=True, slots=True)
class Row:
    """One step's folder. `done` of `planned`: rows, optimizer steps or trials; None where nothing is counted."""

    step: str
    folder: str  # path or URL
    state: str  # done | running | stopped | not started
    detail: str = ""  # the state in more words
    done: int | None = None
    planned: int | None = None
    progress: str = ""
    touched: float | None = None  # seconds since the epoch
    wall_seconds: float | None = None
    next: str = ""  # a command, or what to do


def read_status(run: str | os.PathLike[str], now: float | None = None) -> list[Row]:
    """The steps in the folders of `run`, or the one whose folder `run` is: in the order they run, then by name.

    A folder of steps also gets rows of what has not started after the last one. Only reads a few small files of each
    and never waits: a run that works there or starts just then is not disturbed. Raises ConfigError when `run` holds
    no run, RunError for a damaged record.
    """
    now = time.time() if now is None else now
    folder = open_folder(run)
    found = find_steps(folder)
    if not found and not folder.is_file(CLOCK_FILE):  # a pipeline has it before its first step starts
        raise ConfigError(_no_run(run, folder))
    alone = bool(found) and found[0].name == "."
    home = open_folder(folder.place.rpartition("/")[0]) if alone else folder
    found.sort(key=lambda one: (_order(one.step), one.folder.place))
    started = {one.step for one in found}
    if alone:  # what follows lies beside it
        started |= {step for step in CHAIN if home.subfolder(step).is_file(RUN_FILE)}
    last = max((step for step in started if step in CHAIN), key=_order, default=None)
    rows = [_with_next(_row(one, now), one, home, last) for one in found]
    if alone or (found and last is None):
        return rows
    following = CHAIN[_order(last) + 1 :] if last else CHAIN
    rest = [Row(step, home.at(step), NOT_STARTED) for step in following if step not in OPTIONAL]
    report = home.stat(REPORT_FILE)
    if not report:
        return [*rows, *rest, Row(REPORT, home.at(REPORT_FILE), NOT_STARTED)]
    older = [row.step for row in rows if row.step in CHAIN and (row.touched or 0.0) > report.modified]
    progress = f"older than {', '.join(older)}" if older else ""
    return [*rows, *rest, Row(REPORT, home.at(REPORT_FILE), DONE, progress=progress, touched=report.modified)]


def describe_times(times: Times) -> str:
    """What a pipeline has used of its time, by step, and what is to come; "" where there is no pipeline."""
    spent = times.spent
    if not spent:
        return ""
    used = ", ".join(f"{step} {duration(spent[step])}" for step in sorted(spent, key=_order))
    of = f" of {duration(times.budget)}" if times.budget else ""
    text = f"time: {duration(sum(spent.values()))}{of} ({used})"
    left = sum(one["planned_seconds"] for step, one in times.plans.items() if step not in spent)
    return f"{text}; {duration(left)} planned for what has not started" if left else text


def _row(found: StepFolder, now: float) -> Row:
    folder, seen = found.folder, found.progress
    done, planned = (value if isinstance(value := seen.get(key), int) else None for key in ("done", "total"))
    if found.manifest:
        written = folder.stat(MANIFEST_FILE)
        wall = _number(found.manifest, "wall_seconds")
        summary = str(found.manifest.get("summary", ""))
        return Row(found.step, folder.place, DONE, "", done, planned, summary, written and written.modified, wall)
    started, lock = folder.stat(RUN_FILE), folder.stat(LOCK_RECORD)
    updated = _number(seen, "updated_at") or 0.0
    touched = max(updated, started.modified if started else 0.0) or None
    # At a URL its holder renews the lock.
    state, detail = _state(folder, now - max(touched or 0.0, lock.modified if lock else 0.0))
    text = str(seen.get("text", ""))
    if state != RUNNING and (error := seen.get("error")):
        text = f"{text}{', ' if text else ''}failed: {error}"
    wall = _number(seen, "wall_seconds")
    if wall is not None and state == RUNNING:
        wall += max(0.0, now - updated)
    return Row(found.step, folder.place, state, detail, done, planned, text, touched, wall)


def _state(folder: Folder, silent_seconds: float) -> tuple[str, str]:
    holder = lock_holder(folder)
    if holder is None:
        return STOPPED, ""
    if is_alive(holder):
        return RUNNING, f"running as pid {holder['pid']}"
    if silent_seconds <= SILENT_SECONDS:
        return RUNNING, f"running on {holder['host']}, unless it was killed"
    return STOPPED, f"stopped, it seems: {holder['host']} has written nothing for {duration(silent_seconds)}"


def _with_next(row: Row, found: StepFolder, home: Folder, last: str | None) -> Row:
    # A pipeline's log lies beside its steps; their settings are in its command.
    piped = row.folder == home.at(row.step) and home.is_file(f"{LOG_FOLDER}/ray.log")
    maker = "birbal demo or birbal pipeline" if piped else command_of(row.step)
    again = f"run the same {maker} command again"
    text = ""
    if row.state == STOPPED:
        text = again
    elif row.state == DONE and row.step == last:
        report = home.stat(REPORT_FILE) if row.step == "evaluate" else None
        is_reported = report is not None and report.modified >= (row.touched or 0.0)
        text = again if piped and row.step != "evaluate" else "" if is_reported else _following(row, found, home)
    return replace(row, next=text)


def _following(row: Row, found: StepFolder, home: Folder) -> str:
    """The command of the step after a finished one."""
    name = _dig(found.manifest, "scores", "model") if row.step == "mix" else _dig(found.manifest, "model", "name")
    model = ["--model", str(name)] if name else []
    if row.step == "train":
        scores = read_step(home.subfolder("score"))
        tasks = _dig(scores.manifest if scores else {}, "settings", "tasks", "path") or "DIR"
        words = ["evaluate", "--tasks", str(tasks), *model, "--adapter", row.folder, "--output", home.at("evaluate")]
        asked = _dig(found.manifest, "settings", "prompt") or {}
        if asked.get("format") == CHAT:
            given = json.dumps(asked["chat_template_arguments"])
            words += ["--set", "prompt.format=chat", "--set", f"prompt.chat_template_arguments={given}"]
    else:
        words = {
            "score": ["mix", "--scores", row.folder, "--output", home.at("mix")],
            "tune": ["mix", "--config", found.folder.at("best_mix.yaml"), "--output", home.at("mix")],
            "mix": ["train", "--mix", row.folder, *model, "--output", home.at("train")],
            "evaluate": ["report", home.place],
        }[row.step]
    return shlex.join(["birbal", *words])


def _no_run(run: object, folder: Folder) -> str:
    if folder.is_local and not folder.local.exists():
        return f"{run}: no such folder; expected a step's output, or a folder that holds steps' outputs"
    return f"{run}: no run folder: neither a step's output nor a folder that holds steps' outputs"


def _order(step: str) -> int:
    return CHAIN.index(step) if step in CHAIN else len(CHAIN)


def _dig(content: Any, *keys: str) -> Any:
    """The value at these keys in nested mappings, or None."""
    for key in keys:
        content = content.get(key) if isinstance(content, Mapping) else None
    return content


def _number(content: Mapping[str, Any], key: str) -> float | None:
    value = content.get(key)
    return float(value) if isinstance(value, (int, float)) else None
