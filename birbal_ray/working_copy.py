"""Run folders in object storage: a working copy on this machine, uploaded file by file as it grows.

A step writes to a local folder whatever its output is. At an `s3://` or `gs://` URL that folder is a
working copy: what is there is fetched first, what the step finishes is uploaded every few seconds
(run.json first, manifest.json last), what it removes is removed. Object stores show an object whole
or not at all, so the rules of a run folder (see `run`) hold at the URL too.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import threading
from collections.abc import Collection, Iterator
from pathlib import Path

import filelock
from pyarrow import fs

from birbal_ray.lease import LEASE_FILE, leased
from birbal_ray.mirror import Mirror, fetch_file, stamp_of
from birbal_ray.object_store import filesystem_of, named_errors
from birbal_ray.run import LOCK_FILE, RunError, locked
from birbal_ray.storage import absolute, cache_folder, is_url
from birbal_ray.storage import join as child

INTERVAL_SECONDS = 2.0
TASKS_FILE = "tasks.parquet"  # what `birbal status` reads beside JSON


def working_copy(url: str) -> Path:
    """The folder on this machine that stands for a URL."""
    scheme, _, rest = url.rstrip("/").partition("://")
    parts = [part for part in rest.split("/") if part]
    if not parts or any(part in (".", "..") for part in parts):
        raise RunError(f"{url}: expected {scheme}://bucket/folder")
    return (cache_folder() / "remote" / scheme).joinpath(*parts)


@contextlib.contextmanager
def run_folder(output: str | os.PathLike[str], *, follow: bool = False) -> Iterator[Path]:
    """A run's folder on this machine, held for this process while the block runs.

    `follow`: others (workers on other nodes) write there too; their files are fetched. Raises RunError
    when another live run holds it, or its URL can't be reached; what could not be uploaded at the end
    stays in the working copy, and the same command uploads it.
    """
    if not is_url(output):
        folder = Path(output).resolve()
        with locked(folder):
            yield folder
        return
    url = absolute(str(output))
    folder = working_copy(url)
    with locked(folder), leased(url), _mirrored(url, folder, follow=follow, wait=True):
        yield folder
    print(f"{url}: up to date (working copy: {folder})", file=sys.stderr, flush=True)


@contextlib.contextmanager
def elsewhere(url: str | None, folder: Path, part: str, node: str, here: str) -> Iterator[Path]:
    """The driver's run folder as a process on node `here` has it.

    The same folder where there is no URL (storage that all nodes see) or the process runs on the driver's
    node; else a working copy of its own, of which only `part` (a folder below, or "" for all) is kept the same.
    """
    if url is None or node == here:
        yield folder
        return
    own = folder.with_name(f"{folder.name}@{here[:12]}")
    target = own / part if part else own
    with _mirrored(child(url, part) if part else url, target, follow=True, wait=False):
        yield own


def refresh(folder: Path) -> None:
    """Upload and fetch now what changed in a folder that this process keeps the same as a URL; else nothing."""
    for one, mirror in list(_ACTIVE.items()):
        if folder == one or folder.is_relative_to(one) or one.is_relative_to(folder):
            mirror.push()
            mirror.fetch()


def local_copy(path: str | os.PathLike[str], skip: Collection[str] = ()) -> Path:
    """A finished input on this machine: the path itself, or a URL's folder or file, fetched where it changed.

    `skip`: names of folders that are not needed. Raises RunError when there is nothing, or a run of this
    machine is writing there.
    """
    if not is_url(path):
        return Path(path)
    url = absolute(str(path))
    folder = working_copy(url)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder.with_name(f".{folder.name}.fetch")):
        system, base = filesystem_of(url)
        with named_errors(url):
            info = system.get_file_info(base)
        if info.type == fs.FileType.File:
            fetch_file(system, base, folder, stamp_of(info))
            return folder
        if info.type == fs.FileType.NotFound:
            raise RunError(f"{url}: nothing there")
        with locked(folder):
            Mirror(url, folder, skip).open()
    return folder


@contextlib.contextmanager
def added_to(path: str | os.PathLike[str], skip: Collection[str] = ()) -> Iterator[Path]:
    """A folder of finished runs on this machine; files that the block adds to it are uploaded to its URL."""
    folder = local_copy(path, skip)
    yield folder
    if is_url(path):
        mirror = Mirror(absolute(str(path)), folder, skip)
        mirror.recall()
        mirror.push()


@contextlib.contextmanager
def outline(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder of runs to look at: the path itself, or for a URL a sketch of it in a temporary folder.

    The sketch holds the records (JSON, tables of tasks) and, of all other files, an empty one of the same
    name and time. A lease there becomes the lock that it stands for. Raises RunError when nothing is there.
    """
    if not is_url(path):
        yield Path(path)
        return
    url = absolute(str(path))
    system, base = filesystem_of(url)
    with named_errors(url):
        infos = system.get_file_info(fs.FileSelector(base, recursive=True, allow_not_found=True))
    files = [info for info in infos if info.type == fs.FileType.File]
    if not files:
        raise RunError(f"{url}: nothing there")
    with tempfile.TemporaryDirectory(prefix="birbal-outline-") as name:
        top = Path(name) / base.rpartition("/")[2]
        for info in files:
            file = top / info.path[len(base) :].strip("/")
            if file.name == LEASE_FILE:
                file = file.with_name(f"{LOCK_FILE}.json")
            if file.suffix in (".json", ".jsonl") or file.name == TASKS_FILE:
                with contextlib.suppress(FileNotFoundError):  # written anew or removed in this moment
                    fetch_file(system, info.path, file, stamp_of(info))
            else:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.touch()
                os.utime(file, ns=(info.mtime_ns or 0, info.mtime_ns or 0))
        yield top


_ACTIVE: dict[Path, Mirror] = {}


@contextlib.contextmanager
def _mirrored(url: str, folder: Path, *, follow: bool, wait: bool) -> Iterator[None]:
    """Keep the folder and the URL the same while the block runs, and once more at its end, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    mirror = Mirror(url, folder)
    mirror.open()
    done = threading.Event()

    def work() -> None:
        said = False
        while not done.wait(INTERVAL_SECONDS):
            try:
                mirror.push()
                if follow:
                    mirror.fetch()
                said = False
            except RunError as error:  # tried again; what never went up is said at the end, too
                if not said:
                    print(f"{error}; the work goes on in {folder}, and so do the tries", file=sys.stderr, flush=True)
                said = True

    worker = threading.Thread(target=work, name="mirror", daemon=True)
    worker.start()
    _ACTIVE[folder] = mirror
    try:
        yield
    finally:
        _ACTIVE.pop(folder, None)
        done.set()
        worker.join(timeout=600 if wait else 60)
        mirror.push(logs=True)
