"""What a training run's folder holds: names of its files, metrics, checkpoints (no torch here).

A checkpoint `step-000064` is complete or absent: `files.json` in it lists its files with their sizes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"  # one line for each step or evaluation
STATUS_FILE = "status.json"  # the worker's state, rewritten every second
BEST_FILE = "best.json"  # the step and folder of the adapter with the lowest eval loss
STOP_FILE = "stop"  # asks the worker to save a checkpoint and end
SESSION_FILE = "session.json"  # the worker's last session: its outcome, or why it cannot go on
OUTCOME_FILE = "outcome.json"  # in the checkpoint that a run ended with
SELF_CHECK_FILE = "self_check.json"  # that packing and adapter work on this model, with this kernel
EASED_FILE = "eased.json"  # the smaller micro batch that the run continues with after the card ran out of memory
REFERENCE_FILE = "reference.json"  # beside an adapter: what PEFT computes with it, for `evaluate` to compare with
NOT_NEEDED = ("checkpoints", "best", "packed", "tensorboard")  # of a training run, to use its adapter
CHECKPOINTS_FOLDER, WORK_FOLDER = "checkpoints", ".work"  # in a run folder; in it, what is being written
FILES_FILE = "files.json"  # {name: size in bytes} of all others in the checkpoint
_NAME = re.compile(r"step-(\d+)")


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl; a half-written last line is left out."""
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the highest step, or None."""
    found = all_checkpoints(folder)
    return found[-1] if found else None


def all_checkpoints(folder: Path) -> list[Path]:
    """Those that are whole, by step."""
    if not folder.is_dir():
        return []
    found = (p for p in folder.iterdir() if _NAME.fullmatch(p.name) and _is_whole(p))
    return sorted(found, key=lambda p: int(p.name[5:]))


def finish_checkpoint(written: Path, folder: Path) -> Path:
    """Give a checkpoint that was written elsewhere on the same disk its name, once its bytes are on the disk."""
    files = [file for file in sorted(written.rglob("*")) if file.is_file()]
    sizes = {file.relative_to(written).as_posix(): file.stat().st_size for file in files}
    (written / FILES_FILE).write_text(json.dumps(sizes, indent=1) + "\n", encoding="utf-8")
    for file in (*files, written / FILES_FILE):
        _sync(file)
    _sync(written)
    target = folder / f"step-{int(written.name.rpartition('-')[2]):06d}"
    shutil.rmtree(target, ignore_errors=True)  # of the same step, before a restart
    written.rename(target)
    _sync(folder)
    return target


def remove_old(folder: Path, keep: int) -> None:
    """Leave the latest `keep`. Renamed first: a half-removed one is not taken for a checkpoint."""
    for old in all_checkpoints(folder)[:-keep]:
        doomed = old.with_name(f".old-{old.name}")
        old.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _is_whole(checkpoint: Path) -> bool:
    try:
        sizes = json.loads((checkpoint / FILES_FILE).read_text(encoding="utf-8"))
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (FileNotFoundError, json.JSONDecodeError):
        return False


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
