"""Checkpoints in a run folder: `step-000064`, written whole or absent."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

_NAME = re.compile(r"step-(\d+)")


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the highest step, or None."""
    found = all_checkpoints(folder)
    return found[-1] if found else None


def all_checkpoints(folder: Path) -> list[Path]:
    """By step."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if _NAME.fullmatch(p.name)), key=lambda p: int(p.name[5:]))


def finish_checkpoint(written: Path, folder: Path) -> Path:
    """Give a checkpoint that was written elsewhere on the same disk its name, once its bytes are on the disk."""
    for file in written.rglob("*"):
        if file.is_file():
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


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
