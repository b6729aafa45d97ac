"""What a training run's folder holds: names, metrics, checkpoints, and their way to a URL (no torch here).

A checkpoint `step-000064` is complete or absent: `files.json` in it lists its files with their sizes.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from birbal_ray.progress import repeating
from birbal_ray.settings import canonical_hash, one_line
from birbal_ray.storage import Folder, RunError, absolute, cache_folder, read_json, sync

METRICS_FILE = "metrics.jsonl"  # one line for each step or evaluation
CLOCK_FILE = "clock.json"  # what of the budget is used, see `budget.Clock`
STATUS_FILE = "status.json"  # the worker's state, rewritten every second
BEST_FILE = "best.json"  # the step and folder of the adapter with the lowest eval loss
STOP_FILE = "stop"  # asks the worker to save a checkpoint and end
SESSION_FILE = "session.json"  # the worker's last session: its outcome, or why it cannot go on
OUTCOME_FILE = "outcome.json"  # in the checkpoint that a run ended with
SELF_CHECK_FILE = "self_check.json"  # that packing and adapter work on this model, with this kernel
EASED_FILE = "eased.json"  # the smaller micro batch that the run continues with after the card ran out of memory
WORKING_FILE = "working.json"  # of a run at a URL: names the folder in which each machine works for it
TENSORBOARD_FOLDER, BEST_FOLDER, PACKED_FOLDER = "tensorboard", "best", "packed"
STATE_FILES = (METRICS_FILE, BEST_FILE, CLOCK_FILE, SELF_CHECK_FILE, EASED_FILE)
# Every file that a run makes in its folder (fnmatch), beside those of every step.
OWNS = (
    *(*STATE_FILES, STATUS_FILE, SESSION_FILE, STOP_FILE, WORKING_FILE, "worker.json", "loss_curve.png"),
    *("packed/*", "checkpoints/*", "best/*", "adapter/*", "tensorboard/*", "ray/*"),
)
CHECKPOINTS_FOLDER, WORK_FOLDER = "checkpoints", ".work"  # in a run folder; in it, what is being written
FILES_FILE = "files.json"  # {name: size in bytes} of all others in the checkpoint
FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS = 2.0, 30.0  # between two tries to upload a file
STOP_POLL_SECONDS = 3.0  # between two questions to a URL whether the run shall stop
_NAME = re.compile(r"step-(\d+)")


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl, as `parse_metrics` gives them; none where there is no such file."""
    return parse_metrics(file.read_text(encoding="utf-8")) if file.exists() else []


def parse_metrics(text: str) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl; a half-written last line is left out."""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


class Remote:
    """Where a run's finished files go: the run folder. Where a run works in its own folder, nothing is copied.

    with Remote(folder, working) as remote:
        remote.add("checkpoints/step-000064", "metrics.jsonl")

    A thread uploads, one way, while the work goes on. A name may be a file or a folder, whose files go up in the order
    in which they were written (a marker that says "complete" is written last). An error is reported once and tried
    again. Leaving the block waits for what was added, and raises RunError naming what could not be uploaded. Nothing is
    deleted but by `prune`. Another thread asks whether the run shall stop. No method waits for the store.
    """

    def __init__(self, folder: Folder, working: Path) -> None:
        self.folder, self.working = folder, working
        self._is_here = folder.place == absolute(working)
        self.status_seconds = 1.0 if self._is_here else 5.0  # between two writes of status.json
        self._uploads = ThreadPoolExecutor(1, "upload")
        self._failed: dict[str, str] = {}  # name → why it could not be uploaded
        self._sent: dict[str, tuple[int, int]] = {}  # name → size and time of what was uploaded
        self._closing = threading.Event()
        self._asking = contextlib.ExitStack()
        self._asked_to_stop = False  # at the URL, when it was last looked at

    def __enter__(self) -> Remote:
        if not self._is_here:
            self._asking.enter_context(repeating(STOP_POLL_SECONDS, self._look_for_stop))
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._closing.set()  # what fails from now on is not tried again
        self._uploads.shutdown()
        self._asking.close()
        if not self._failed:
            return
        name, reason = next(iter(self._failed.items()))
        missing = (
            f"{self.folder}: {len(self._failed)} file(s) are not uploaded (first: {name}: {reason}); they are kept in "
            f"{self.working}, and the same command on this machine uploads them"
        )
        if kind is None:
            raise RunError(missing)
        print(missing, file=sys.stderr, flush=True)

    def add(self, *names: str) -> None:
        """Upload these files and folders, soon, in this order. A name may be given again when it has changed."""
        for name in () if self._is_here else names:
            # An error that nobody expects is logged with its traceback: the callback raises it.
            self._uploads.submit(self._upload_tree, name).add_done_callback(Future.result)

    def add_leftovers(self) -> None:
        """Upload what an earlier session on this machine could not: records, best adapter, latest checkpoint.

        Of the folders, files that the run folder has in the same size are left out. Raises RunError for a store that
        can't be reached.
        """
        if self._is_here:
            return
        latest = latest_checkpoint(self.working / CHECKPOINTS_FOLDER)
        folders = [BEST_FOLDER, *([f"{CHECKPOINTS_FOLDER}/{latest.name}"] if latest else [])]
        there = self.folder.files()
        here = [file for name in folders for file in (self.working / name).rglob("*") if file.is_file()]
        names = []  # as they are now: what this session writes beside them is added when it is complete
        for file in sorted(here, key=lambda file: file.stat().st_mtime_ns):
            name, status = file.relative_to(self.working).as_posix(), file.stat()
            stored = there.get(name)
            if stored and stored.size == status.st_size and stored.modified >= int(status.st_mtime):
                self._sent[name] = status.st_size, status.st_mtime_ns
            else:
                names.append(name)
        self.add(*names, *STATE_FILES)

    def prune(self, keep: int) -> None:
        """Delete what was uploaded and is superseded: complete checkpoints but the latest `keep`, older best adapters.

        It happens after the uploads that were added before. Only the run folder's own records count, never what is
        absent on this machine. An outage of the store is no error: the next call deletes what this one could not.
        """
        if not self._is_here:
            self._uploads.submit(self._prune, keep).add_done_callback(Future.result)

    def stop_requested(self) -> bool:
        """Whether the driver asks the worker to save and end; at a URL, STOP_POLL_SECONDS ago."""
        return (self.working / STOP_FILE).exists() if self._is_here else self._asked_to_stop

    def _look_for_stop(self) -> None:
        self._asked_to_stop = self.folder.is_file(STOP_FILE)

    def _prune(self, keep: int) -> None:
        with contextlib.suppress(RunError, OSError):
            names = self.folder.files(CHECKPOINTS_FOLDER)
            markers = sorted(name for name in names if name.endswith(f"/{FILES_FILE}"))[:-keep]
            self.folder.delete(markers)  # first: a checkpoint without its list is not complete
            old = tuple(marker.removesuffix(FILES_FILE) for marker in markers)
            self.folder.delete([name for name in names if name.startswith(old)] if old else [])
            current = self.folder.read_json(BEST_FILE)["folder"]  # uploaded after the files of its adapter
            best = self.folder.files(BEST_FOLDER)
            self.folder.delete([name for name in best if name.rpartition("/")[0] < current])

    def _upload_tree(self, name: str) -> None:
        top = self.working / name
        try:
            written = [file for file in top.rglob("*") if file.is_file()] if top.is_dir() else [top]
            for file in sorted(written, key=lambda file: file.stat().st_mtime_ns if file.is_file() else 0):
                self._upload(file.relative_to(self.working).as_posix())
        except Exception as error:
            self._failed[name] = one_line(error)
            raise

    def _upload(self, name: str) -> None:
        pause = FIRST_RETRY_SECONDS
        while True:
            if self._failed.keys() - {name} and self._closing.is_set():
                self._failed[name] = "not tried again"  # each try rides out an outage of minutes by itself
                return
            try:
                status = (self.working / name).stat()
                if self._sent.get(name) != (status.st_size, status.st_mtime_ns):
                    self.folder.upload(self.working / name, name)
                    self._sent[name] = status.st_size, status.st_mtime_ns
            except FileNotFoundError:
                pass  # pruned in between
            except (OSError, RunError) as error:
                if not self._failed:
                    print(f"{one_line(error)}; the work goes on, and the upload is tried again", file=sys.stderr)
                self._failed[name] = one_line(error)
                if not self._closing.wait(pause):
                    pause = min(2 * pause, LAST_RETRY_SECONDS)
                    continue
                return
            self._failed.pop(name, None)
            return


def working_folder(folder: Folder) -> Path:
    """Where a process of this machine works for a run: in its folder, or, for one at a URL, in one of this machine.

    That one belongs to this run alone: an overwritten run gets another.
    """
    if folder.is_local:
        return folder.local
    token = folder.read_json(WORKING_FILE)["token"]
    return cache_folder() / "train" / canonical_hash([folder.place, token])[:16]


def download_state(folder: Folder, working: Path) -> None:
    """Bring packs, metrics, the best adapter and the latest complete checkpoint of a run at a URL into `working`.

    What lies there of an earlier session stays where that got at least as far: an outage may have kept it from being
    uploaded. The later checkpoint counts, then the time on the run's clock. Does nothing for a run folder on this
    machine.
    """
    if folder.is_local:
        return
    stored = folder.files()
    markers = re.compile(rf"{CHECKPOINTS_FOLDER}/(step-\d+)/{re.escape(FILES_FILE)}")
    complete = sorted(found[1] for found in map(markers.fullmatch, stored) if found)
    mine, clock = latest_checkpoint(working / CHECKPOINTS_FOLDER), working / CLOCK_FILE
    clocks = (
        folder.read_json(CLOCK_FILE) if CLOCK_FILE in stored else {},
        read_json(clock) if clock.exists() else {},
    )
    latest = complete[-1] if complete else "", mine.name if mine else ""
    there, here = zip(latest, (one.get("elapsed_seconds", 0.0) for one in clocks), strict=True)
    wanted = [name for name in stored if name.startswith(f"{PACKED_FOLDER}/")]
    if there > here:
        for name in (BEST_FOLDER, *([CHECKPOINTS_FOLDER] if latest[0] != latest[1] else [])):
            shutil.rmtree(working / name, ignore_errors=True)
        folders = f"{BEST_FOLDER}/", f"{CHECKPOINTS_FOLDER}/{latest[0]}/"
        missing = [name for name in stored if name.startswith(folders) and not (working / name).exists()]
        wanted += [*missing, *(name for name in STATE_FILES if name in stored)]
    else:
        wanted += [name for name in STATE_FILES if name in stored and not (working / name).exists()]
    for name in wanted:
        target, is_pack = working / name, name.startswith(f"{PACKED_FOLDER}/")
        if not (is_pack and target.exists() and target.stat().st_size == stored[name].size):
            folder.download(name, target)


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the highest step, or None."""
    return next(reversed(all_checkpoints(folder)), None)


def all_checkpoints(folder: Path) -> list[Path]:
    """Those that are whole, by step."""
    if not folder.is_dir():
        return []
    found = (p for p in folder.iterdir() if _NAME.fullmatch(p.name) and _is_whole(p))
    return sorted(found, key=lambda p: int(p.name[5:]))


def finish_checkpoint(written: Path, folder: Path) -> Path:
    """Give a checkpoint that was written elsewhere on the same disk its name, once its bytes are on the disk."""
    parts = [file for file in sorted(written.rglob("*")) if file.is_file()]
    sizes = {file.relative_to(written).as_posix(): file.stat().st_size for file in parts}
    (written / FILES_FILE).write_text(json.dumps(sizes, indent=1) + "\n", encoding="utf-8")
    for file in (*parts, written / FILES_FILE):
        sync(file)
    sync(written)
    target = folder / f"step-{int(written.name.rpartition('-')[2]):06d}"
    shutil.rmtree(target, ignore_errors=True)  # of the same step, before a restart
    written.rename(target)
    sync(folder)
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
