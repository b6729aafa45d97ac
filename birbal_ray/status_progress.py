"""How far the step in a folder is, told by its files alone."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from birbal_ray.progress import duration
from birbal_ray.run import RunError, read_json
from birbal_ray.schemas import ROWS_FOLDER, TASKS_FILE
from birbal_ray.train.checkpoints import METRICS_FILE, SESSION_FILE, STATUS_FILE, read_metrics
from birbal_ray.train.deadline import CLOCK_FILE
from birbal_ray.tune.records import JOB_FILE, TRIALS_FOLDER
from birbal_ray.tune.records import RESULT_FILE as TRIAL_FILE

_SHARD = re.compile(r"(?P<task>.+)-(?P<chunk>\d{5,})-of-\d{5,}\.parquet")
# What reading damaged files, or files of another content than ours, ends in; pyarrow's errors are among them.
UNREADABLE = (RunError, OSError, ValueError, TypeError, KeyError, AttributeError)


@dataclass(frozen=True, slots=True)
class Progress:
    """In words, and done of planned where something is counted."""

    text: str = ""
    done: int | None = None
    planned: int | None = None


@dataclass(frozen=True, slots=True)
class Found:
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


def _scored(folder: Found) -> Progress:
    """By the shards' names: a file has its name when it is whole, so that 10,000 need not be opened."""
    path = folder.path
    if not (path / TASKS_FILE).exists():
        return Progress("planning")
    # Not pq.read_table, which imports all of pyarrow.dataset and pandas: a second.
    table = pq.ParquetFile(path / TASKS_FILE).read(["task", "num_instances"])
    tasks = dict(zip(*(table[name].to_pylist() for name in ("task", "num_instances")), strict=True))
    identity = folder.identity
    shard_rows = identity["config"]["shard_rows"]
    variants = len(identity["models"]) * len(identity["prompt_formats"]) if "models" in identity else 1
    done = 0
    for _, _, names in os.walk(path / ROWS_FOLDER):
        for shard in filter(None, map(_SHARD.fullmatch, names)):
            done += max(0, min(shard_rows, tasks.get(shard["task"], 0) - int(shard["chunk"]) * shard_rows))
    planned = sum(tasks.values()) * variants
    return Progress(f"{done:,} of {planned:,} rows", done, planned)


def _trained(folder: Found) -> Progress:
    path, parts = folder.path, []
    seen = mapping(path / STATUS_FILE)
    if seen:
        parts += [f"step {seen['step']:,} of {seen['max_steps']:,}", f"epoch {seen['epoch']:.2f}"]
        metrics = read_metrics(path / METRICS_FILE)
        for key, name in (("loss", "loss"), ("eval_loss", "eval loss")):
            parts += [f"{name} {line[key]:.4f}" for line in reversed(metrics) if key in line][:1]
        if (forecast := seen["forecast"]) and forecast["by_budget"]:
            parts.append(f"{forecast['num_steps']:,} steps ({forecast['epochs']:.2g} epochs) will fit")
    budget = folder.identity["settings"]["budget"]
    if elapsed := number(mapping(path / CLOCK_FILE), "elapsed_seconds"):
        parts.append(f"{duration(elapsed)} of {duration(budget)}" if budget else duration(elapsed))
    error = mapping(path / SESSION_FILE).get("error")
    if error and folder.holder is None:
        parts.append(f"failed: {error}")
    return Progress(", ".join(parts) or "no step yet", seen.get("step"), seen.get("max_steps"))


def _tuned(folder: Found) -> Progress:
    settings = folder.identity["settings"]
    baselines, repeats = len(settings["baselines"]), settings["repeats"]
    again = (repeats["top"] + baselines) * repeats["seeds"] if repeats["top"] else 0
    planned = 1 + baselines + settings["num_trials"] + settings["surrogate"] + again  # as tuning.plan counts them
    jobs = list((folder.path / TRIALS_FOLDER).glob(f"*/{JOB_FILE}"))
    ended = [result for job in jobs if (result := mapping(job.with_name(TRIAL_FILE)))]
    parts = [f"{len(ended):,} of {planned:,} trials{_counts(Counter(one['status'] for one in ended))}"]
    if len(jobs) > len(ended):
        parts.append(f"{len(jobs) - len(ended)} begun")
    losses = [one["objective"] for one in ended if one["objective"] is not None]
    parts += [f"lowest loss {min(losses):.4f}"] if losses else []
    return Progress(", ".join(parts), len(ended), planned)


def _finished(step: str, manifest: Mapping[str, Any]) -> Progress:
    if step in ("score", "evaluate"):
        rows = manifest["rows"]
        errors = rows["errors"] if isinstance(rows["errors"], int) else sum(rows["errors"].values())
        text = f"{rows['planned']:,} rows{f', {errors:,} with errors' if errors else ''}"
        return Progress(text, rows["planned"], rows["planned"])
    if step == "mix":
        rows = manifest["rows"]
        return Progress(f"{rows['kept']:,} rows ({rows['train']:,} train, {rows['eval']:,} eval)")
    if step == "train":
        result = manifest["result"]
        text = f"{result['num_steps']:,} steps, epoch {result['epochs']:.2f}, ended by {result['ended_by']}"
        text += f", best eval loss {result['best_eval_loss']:.4f}"
        return Progress(text, result["num_steps"], result["num_steps"])
    if step == "tune":
        num = sum(manifest["trials"].values())
        return Progress(f"{num:,} trials{_counts(manifest['trials'])}, best mix {manifest['best']['mix']}", num, num)
    return Progress()


def measured(folder: Found) -> Progress:
    """How far it is; files that are not as birbal writes them are said to be so."""
    try:
        if folder.manifest is not None:
            return _finished(folder.step, folder.manifest)
        measure = {"score": _scored, "evaluate": _scored, "train": _trained, "tune": _tuned}.get(folder.step)
        return measure(folder) if measure else Progress()
    except RunError as error:  # names the file
        return Progress(one_line(error))
    except UNREADABLE as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        return Progress(f"a file in {folder.path} is not as birbal writes it ({reason})")


def mapping(file: Path) -> Mapping[str, Any]:
    """What a JSON file says; nothing when it is not there."""
    if not file.exists():
        return {}
    content = read_json(file)
    if not isinstance(content, dict):
        raise RunError(f"{file}: expected a JSON object, found {type(content).__name__}")
    return content


def dig(content: Any, *keys: str) -> Any:
    """What stands in nested mappings under these keys, or None."""
    for key in keys:
        content = content.get(key) if isinstance(content, Mapping) else None
    return content


def number(content: Mapping[str, Any], *keys: str) -> float | None:
    """The same where it is a number."""
    value = dig(content, *keys)
    return float(value) if isinstance(value, (int, float)) else None


def _counts(counts: Mapping[str, int]) -> str:
    return f" ({', '.join(f'{count} {name}' for name, count in sorted(counts.items()))})" if counts else ""


def one_line(error: Exception) -> str:
    """An error's text without its line breaks."""
    return " ".join(str(error).split())


def time_of(file: Path) -> float:
    """Its time; 0 when it is not there (any more)."""
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0
