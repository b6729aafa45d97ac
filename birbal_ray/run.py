"""A run folder: one step's output, at a path or a URL, written by one process at a time.

`open_run` locks the folder and writes `run.json` (the step, and its identity: everything that decides the output).
`Run.progress` writes `progress.json` every few seconds. `Run.finish` writes `manifest.json`, which names every file
with its size and sha256: a run with a manifest is complete, one without continues when its command is run again.

Nothing is deleted but by name, and only what the step itself made: see `open_run`.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import json
import os
import platform
import re
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from birbal_ray.lock import LOCK_RECORD, hold_lock
from birbal_ray.manifest import FORMAT, command_of, identity_differences, package_versions, wrong_files
from birbal_ray.schemas import MANIFEST_FILE, PROGRESS_FILE, RUN_FILE
from birbal_ray.settings import ConfigError, canonical_hash, one_line
from birbal_ray.storage import (
    DamagedFileError,
    FileRecord,
    FileStat,
    Folder,
    RunError,
    absolute,
    absolute_link,
    is_url,
    open_folder,
)

LOG_FOLDER = "logs"
# fnmatch: * spans folders.
STANDARD_FILES = (RUN_FILE, PROGRESS_FILE, MANIFEST_FILE, "sessions/*.json", f"{LOG_FOLDER}/*.log")


class RunFailedError(RunError):
    """A run broke off; what it finished is kept and the same command continues."""


class RunMismatchError(ConfigError):
    """The folder holds a run made from other settings or inputs; `differences` lists them."""

    def __init__(self, folder: object, differences: list[str], advice: str | None = None) -> None:
        self.folder, self.differences = folder, differences
        shown = "\n".join(f"  {line}" for line in differences[:20])
        more = f"\n  and {len(differences) - 20} more" if len(differences) > 20 else ""
        advice = advice or (
            "Choose another --output, restore the old settings to continue it, or pass --overwrite, which deletes it."
        )
        super().__init__(f"{folder} holds a run made from other settings or inputs:\n{shown}{more}\n{advice}")


@dataclass(frozen=True, slots=True)
class Step:
    """What is the same for all runs of a step.

    `owns`: patterns (fnmatch; in one with a `/`, `*` spans folders) of the files that it makes, besides STANDARD_FILES.
    `starts_over`: an unfinished run holds nothing worth keeping; one of another identity is replaced.
    """

    name: str
    owns: Sequence[str] = ()
    starts_over: bool = False


@dataclass
class Run:
    """A run folder that this process holds; `open_run` gives it."""

    folder: Folder
    resumed: bool = False  # an earlier session of the same identity was here
    manifest: dict[str, Any] | None = None  # of a complete run whose files are all there: there is nothing to do
    files: dict[str, FileStat] = field(default_factory=dict)  # what the folder held when it was opened, by name
    listed: dict[str, Any] = field(default_factory=dict)  # what a manifest said of them then, complete or not
    _started: float = field(default_factory=time.time)
    _clock_start: float = field(default_factory=time.monotonic)  # a machine's time of day may be set meanwhile
    _earlier_seconds: float = 0.0  # of the sessions before this one
    _last_progress: dict[str, Any] = field(default_factory=dict)
    _written: float = 0.0  # when progress.json was written last, on the monotonic clock
    _writing: Future[Any] | None = None
    _writer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "progress"))

    def progress(self, done: int | None, total: int | None, *, final: bool = False, **fields: Any) -> None:
        """Write progress.json, at most every 2 s (5 s at a URL) unless `final`.

        `fields`: `text`, the line that `birbal status` shows, and figures (rate_per_second, eta_seconds, running, …).
        Started_at, updated_at (seconds since the epoch) and wall_seconds (of all sessions) are added. A failed write is
        not an error: the next one comes soon.
        """
        now = time.time()
        times = {"started_at": self._started, "updated_at": now, "wall_seconds": round(self.wall_seconds, 3)}
        self._last_progress = {"done": done, "total": total, **times, **fields}
        is_early = time.monotonic() - self._written < progress_seconds(self.folder)
        if not final and (is_early or (self._writing and not self._writing.done())):
            return
        self._written = time.monotonic()
        self._writing = self._writer.submit(self.folder.write_json, PROGRESS_FILE, self._last_progress)
        if final or self.folder.is_local:
            with contextlib.suppress(OSError, RunError):
                self._writing.result()

    @property
    def wall_seconds(self) -> float:
        """Seconds that this and all earlier sessions have run."""
        return self._earlier_seconds + time.monotonic() - self._clock_start

    def withdraw(self) -> None:
        """Delete the manifest: the run is unfinished again. Call it before the files of a finished run change."""
        self.folder.delete([MANIFEST_FILE])
        self.manifest = None

    def finish(
        self, manifest: Mapping[str, Any], files: Mapping[str, FileRecord] | Iterable[str], *, summary: str
    ) -> dict[str, Any]:
        """Write the manifest, which makes the run complete, and give it.

        `files`: every file that the run consists of, with its record or (a list of names) to be read and hashed here.
        `summary`: one short line for `birbal status`. Raises RunError when a file isn't there or the folder isn't held.
        """
        records = files if isinstance(files, Mapping) else {name: self.folder.record_of(name) for name in files}
        content = {
            **self.folder.read_json(RUN_FILE),
            "wall_seconds": round(self.wall_seconds, 3),
            **manifest,
            "summary": summary,
            "files": {name: FileRecord(*records[name])._asdict() for name in sorted(records)},
            "packages": dict(package_versions()),
            "python": platform.python_version(),
        }
        self.folder.write_json(MANIFEST_FILE, content)
        self.manifest = content
        return content

    def session(self, record: Mapping[str, Any]) -> None:
        """Keep what one session of the run measured, as sessions/{n}.json; the first n is 1."""
        self.folder.write_json(f"sessions/{len(self.folder.files('sessions')) + 1}.json", dict(record))

    def sessions(self) -> list[dict[str, Any]]:
        """What `session` kept, oldest first."""
        names = self.folder.files("sessions")
        return [self.folder.read_json(name) for name in sorted(names, key=lambda name: (len(name), name))]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a finished run left, to be read by who called its step."""

    folder: Folder
    manifest: dict[str, Any]


@contextlib.contextmanager
def open_run(
    output: str | os.PathLike[str] | Folder,
    step: Step,
    identity: Mapping[str, Any],
    *,
    inputs: Sequence[str | os.PathLike[str]] = (),
    overwrite: bool = False,
) -> Iterator[Run]:
    """Hold a folder for a run of `step` made from `identity` while the block runs; the first session, or a later one.

    `identity`: everything that decides the output (settings, hashes of inputs, the model's fingerprint), as JSON.
    `inputs`: the paths and URLs that the step reads.

    With `overwrite`, a finished run or one of another identity is deleted, file by file; an unfinished one of the same
    identity continues, so that a command with --overwrite can be repeated, too. SIGTERM ends the block as Ctrl-C does.

    Raises RunError when another process holds the folder or it can't be reached, RunMismatchError when it holds a run
    of another identity. Raises ConfigError, whatever `overwrite` says, and leaves everything as it is, when the folder
    is or holds an input, holds another step's run, or files that no run of `step` makes and that would be deleted.
    """
    folder = _open_output(output, inputs)
    with sigterm_as_interrupt(), hold_lock(folder) as lock:
        folder = replace(folder, guard=lock)
        run = _claim(folder, step, json.loads(json.dumps(identity)), overwrite=overwrite)
        with contextlib.suppress(FileNotFoundError, DamagedFileError, KeyError, TypeError, ValueError, AttributeError):
            run._earlier_seconds = float(folder.read_json(PROGRESS_FILE)["wall_seconds"]) if run.resumed else 0.0
        try:
            yield run
        except Exception as error:
            if not isinstance(error, ConfigError):
                record = {"done": None, "total": None, **run._last_progress, "error": one_line(error)}
                with contextlib.suppress(OSError, RunError):
                    run._writer.submit(folder.write_json, PROGRESS_FILE, record).result()
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise RunError(
                    f"{folder}: {error}; make room on the disk: what is finished is kept; the same command continues"
                ) from None
            raise
        finally:
            run._writer.shutdown()


def _open_output(output: str | os.PathLike[str] | Folder, inputs: Sequence[str | os.PathLike[str]]) -> Folder:
    """The folder. Raises ConfigError for a file, and where it is or holds an input."""
    folder = open_folder(output)
    if folder.is_local and folder.local.is_file():
        raise ConfigError(f"--output {folder}: is a file, expected a folder")
    for path in inputs:
        # Where it is, and where the link to it is. A Hub's name is no path.
        for place in {absolute(path), absolute_link(path)}:
            if (is_url(place) or Path(place).exists()) and f"{place}/".startswith(f"{folder.place}/"):
                raise ConfigError(
                    f"--output {folder}: this folder {'is' if place == folder.place else 'holds'} an input "
                    f"({path}); choose another --output"
                )
    return folder


def _claim(folder: Folder, step: Step, identity: dict[str, Any], *, overwrite: bool) -> Run:
    """The run that continues in a folder, or a new one, which gets its run.json."""
    files = folder.files(hidden=True)
    visible = {name: stat for name, stat in files.items() if "/." not in f"/{name}"}
    record = {"format": FORMAT, "step": step.name, "identity": identity, "identity_hash": canonical_hash(identity)}
    names = "[^/]+" if RUN_FILE in files else f"{RUN_FILE}|{LOCK_RECORD}"
    leftover = re.compile(rf"(.+/)?\.tmp-\d+-\d+-({names})")  # of processes killed while they wrote
    leftovers = [name for name in files if leftover.fullmatch(name) and not _is_behind_link(folder, name)]
    if RUN_FILE not in files:
        strangers = {*visible, *(name for name in files if name.startswith(".tmp-"))}.difference(leftovers)
        if tops := sorted({name.partition("/")[0] for name in strangers} - {LOG_FOLDER}):
            raise ConfigError(
                f"{folder}: not empty and not a birbal run (no {RUN_FILE}; holds {', '.join(tops[:3])}); "
                "choose another --output"
            )
        folder.delete(leftovers)
        folder.write_json(RUN_FILE, record)
        return Run(folder)
    finished, wrong = _read_finished(folder, files)
    listed = dict(found) if isinstance(found := finished.get("files"), dict) else {}
    earlier = _earlier_record(folder, step, finished, overwrite)
    same = earlier.get("format") == FORMAT and earlier.get("identity") == identity
    if same and not (overwrite and MANIFEST_FILE in visible):
        run = Run(folder, True, finished or None, visible, listed)
        folder.delete(leftovers)
        if wrong:
            print(
                f"{folder}: {len(wrong)} file(s) of the finished run are missing or have changed (first: {wrong[0]}); "
                "they are made again",
                file=sys.stderr,
                flush=True,
            )
            run.withdraw()
        return run
    if not overwrite and not (step.starts_over and MANIFEST_FILE not in visible):
        raise RunMismatchError(folder, identity_differences(earlier, record))
    # A pattern without a `/` means files directly in the run folder. Of those, a finished run's manifest names all.
    patterns = [glob for glob in (*step.owns, *STANDARD_FILES) if "/" in glob or "*" not in glob or not listed]
    ours = {
        name
        for name in files
        if name in listed or any(fnmatch.fnmatchcase(name, glob) for glob in patterns if "/" in glob or "/" not in name)
        if not _is_behind_link(folder, name)
    }
    if overwrite and (unknown := sorted(visible.keys() - ours)):
        raise ConfigError(
            f"{folder}: --overwrite deletes nothing here, because the folder holds {len(unknown)} file(s) that "
            f"`{command_of(step.name)}` did not make (first: {unknown[0]}); move them away, or choose another --output"
        )
    # The manifest goes first and run.json is replaced last: a crash half-way leaves an unfinished run of ours.
    folder.delete(sorted(ours & {MANIFEST_FILE}))
    folder.delete(sorted(ours.union(leftovers) - {MANIFEST_FILE, RUN_FILE}))
    folder.write_json(RUN_FILE, record)
    return Run(folder)


def _is_behind_link(folder: Folder, name: str) -> bool:
    """Whether a file lies outside the folder, behind a symbolic link in it."""
    parents = [parent for parent in Path(name).parents if parent != Path()] if folder.is_local else []
    return any((folder.local / parent).is_symlink() for parent in parents)


def _earlier_record(folder: Folder, step: Step, finished: Mapping[str, Any], overwrite: bool) -> dict[str, Any]:
    """run.json; of a damaged one that may be deleted, the step that the manifest (`finished`) names."""
    try:
        record = folder.read_json(RUN_FILE)
        if not isinstance(record, dict) or not isinstance(record.get("identity"), dict):
            raise DamagedFileError(
                f"{folder.at(RUN_FILE)}: no record of a run; birbal did not write it, or it is damaged"
            )
    except DamagedFileError as error:
        record = {"step": finished.get("step", step.name)}
        if not overwrite and record["step"] == step.name:
            raise RunError(f"{error}; choose another --output, or pass --overwrite, which deletes this run") from None
    if record.get("step") != step.name:
        raise ConfigError(
            f"{folder}: holds the output of `{command_of(record.get('step'))}`, not of `{command_of(step.name)}`; "
            "choose another --output"
        )
    if record.get("format") != FORMAT and not overwrite:
        raise ConfigError(
            f"{folder}: another version of birbal_ray made this run, and this one can't continue it; choose another "
            "--output"
        )
    return record


def _read_finished(folder: Folder, files: Mapping[str, FileStat]) -> tuple[dict[str, Any], list[str]]:
    """(the manifest; of what it lists, what is missing or has changed): empty where there is no manifest."""
    manifest: dict[str, Any] = {}
    try:
        manifest = dict(folder.read_json(MANIFEST_FILE))
        return manifest, wrong_files(manifest, files)
    except FileNotFoundError:
        return manifest, []
    except (DamagedFileError, AttributeError, KeyError, TypeError, ValueError) as error:
        return manifest, [one_line(error)]


def progress_seconds(folder: Folder) -> float:
    """How often small records of progress are written into a folder, at most."""
    return 2.0 if folder.is_local else 5.0


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does: by KeyboardInterrupt, through the clean-up."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals: the caller does
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
