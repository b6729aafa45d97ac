"""Run folders in object storage: a working copy on this machine, uploaded file by file as it grows.

A step writes to a local folder whatever its output is. At an `s3://` or `gs://` URL that folder is a
working copy: what is there is fetched first, what the step finishes is uploaded every few seconds
(run.json first, manifest.json last), what it removes is removed. Object stores show an object whole
or not at all, so the rules of a run folder (see `run`) hold at the URL too.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
from pyarrow import fs

from birbal_ray.lease import LEASE_FILE, leased
from birbal_ray.object_store import filesystem_of, named_errors
from birbal_ray.run import LOCK_FILE, LOG_FOLDER, MANIFEST_FILE, RUN_FILE, RunError, locked, read_json, write_json

SCHEMES = ("s3", "gs")
NOT_MIRRORED = ("ray", "ray_tune")  # Ray's own records of a run: Ray writes them to the URL itself
INTERVAL_SECONDS = 2.0
TRANSFERS = 8  # files on the way at once
CHUNK_BYTES = 8 << 20
TASKS_FILE = "tasks.parquet"  # what `birbal status` reads beside JSON

Stamp = tuple[int, int]  # size in bytes, time of change in ns


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether a path names a place in object storage."""
    return str(path).partition("://")[0] in SCHEMES and "://" in str(path)


def absolute(path: str) -> str:
    """A path that means the same from any folder; URLs do already."""
    return path.rstrip("/") if is_url(path) else str(Path(path).resolve())


def child(path: str | os.PathLike[str], name: str) -> str:
    """`name` below a path or URL."""
    return f"{str(path).rstrip('/')}/{name}" if is_url(path) else str(Path(path) / name)


def cache_folder() -> Path:
    """Where this machine keeps copies: $BIRBAL_CACHE, else birbal_ray in the user's cache folder."""
    given = os.environ.get("BIRBAL_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "birbal_ray"


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
            _fetch_file(system, base, folder, _stamp_of(info))
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
                    _fetch_file(system, info.path, file, _stamp_of(info))
            else:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.touch()
                os.utime(file, ns=(info.mtime_ns or 0, info.mtime_ns or 0))
        yield top


class Mirror:
    """Makes a folder and a URL the same. One process writes a given file; the other side's copy follows.

    Names that begin with a dot are neither uploaded nor fetched: temporary files, locks.
    """

    def __init__(self, url: str, folder: Path, skip: Collection[str] = ()) -> None:
        self.url, self.folder = url, folder
        self._system, self._base = filesystem_of(url)
        self._skip = {*NOT_MIRRORED, *skip}
        self._known: dict[str, tuple[Stamp, Stamp]] = {}  # file → what it was here and there when last the same
        self._record = folder.with_name(f".{folder.name}.mirror.json")
        self._lock = threading.Lock()

    def open(self) -> None:
        """Begin with the URL's content, unless nobody wrote there since this machine's copy was made from it."""
        self.recall()
        there = self._there()
        if self._known and {name: stamps[1] for name, stamps in self._known.items()} == there:
            return  # what is here and not there was finished and not uploaded: it is ahead
        with self._lock:
            self._take(there, [name for name, stamp in there.items() if not self._same(name, stamp)])
            for name in self._here().keys() - there.keys():
                (self.folder / name).unlink(missing_ok=True)
            self._known = {name: stamps for name, stamps in self._known.items() if name in there}
            self._remember()

    def push(self, *, logs: bool = False) -> None:
        """Upload what changed here, remove there what is gone here."""
        with self._lock, named_errors(self.url):
            here = self._here()
            changed = [name for name, stamp in here.items() if self._known.get(name, (None,))[0] != stamp]
            if not logs:
                changed = [name for name in changed if LOG_FOLDER not in name.split("/")[:-1]]
            first = [name for name in changed if name.endswith(RUN_FILE)]
            last = [name for name in changed if name.endswith(MANIFEST_FILE)]
            rest = [name for name in changed if name not in {*first, *last}]
            nested = [name for name in rest if "/" in name]
            flat = sorted((name for name in rest if "/" not in name), key=lambda name: here[name][1])
            with ThreadPoolExecutor(TRANSFERS) as pool:
                for group in (first, nested, *([name] for name in flat), last):
                    list(pool.map(lambda name: self._upload(name, here[name]), group))
            gone = self._known.keys() - here.keys()
            for name in gone:
                with contextlib.suppress(FileNotFoundError):
                    self._system.delete_file(f"{self._base}/{name}")
                del self._known[name]
            if changed or gone:
                self._remember()

    def fetch(self) -> None:
        """Take over what others changed there; what changed here too stays."""
        with self._lock, named_errors(self.url):
            there, here = self._there(), self._here()
            news = []
            for name, stamp in there.items():
                known = self._known.get(name)
                untouched = here.get(name) == (known[0] if known else None)
                if (known is None or known[1] != stamp) and untouched:
                    news.append(name)
            self._take(there, news)
            gone = [name for name in self._known if name not in there]
            for name in gone:
                (self.folder / name).unlink(missing_ok=True)
                del self._known[name]
            if news or gone:
                self._remember()

    def recall(self) -> None:
        """What was the same when this machine last looked."""
        if self._record.exists():
            with contextlib.suppress(RunError, ValueError, TypeError):
                record = read_json(self._record)
                self._known = {name: (tuple(a), tuple(b)) for name, (a, b) in record.items()}

    def _remember(self) -> None:
        write_json(self._record, self._known)

    def _same(self, name: str, there: Stamp) -> bool:
        file = self.folder / name
        return file.is_file() and self._known.get(name) == (_stamp(file), there)

    def _here(self) -> dict[str, Stamp]:
        found: dict[str, Stamp] = {}
        for top, folders, files in os.walk(self.folder):
            folders[:] = [name for name in folders if not name.startswith(".") and name not in self._skip]
            for name in files:
                if not name.startswith("."):
                    file = Path(top) / name
                    with contextlib.suppress(FileNotFoundError):  # renamed or removed in between
                        found[file.relative_to(self.folder).as_posix()] = _stamp(file)
        return found

    def _there(self) -> dict[str, Stamp]:
        with named_errors(self.url):
            infos = self._system.get_file_info(fs.FileSelector(self._base, recursive=True, allow_not_found=True))
        found = {}
        for info in infos:
            parts = info.path[len(self._base) :].strip("/").split("/")
            hidden = any(part.startswith(".") for part in parts) or self._skip.intersection(parts[:-1])
            if info.type == fs.FileType.File and not hidden:
                found["/".join(parts)] = _stamp_of(info)
        return found

    def _upload(self, name: str, stamp: Stamp) -> None:
        target = f"{self._base}/{name}"
        with contextlib.suppress(FileNotFoundError):
            try:
                with (self.folder / name).open("rb") as source, self._system.open_output_stream(target) as sink:
                    shutil.copyfileobj(source, sink, CHUNK_BYTES)
            except FileNotFoundError:
                raise
            except OSError:  # closing the stream made a whole object of what had been read
                with contextlib.suppress(OSError):
                    self._system.delete_file(target)
                raise
            self._known[name] = (stamp, _stamp_of(self._system.get_file_info(target)))

    def _take(self, there: dict[str, Stamp], names: Collection[str]) -> None:
        def take(name: str) -> None:
            file = self.folder / name
            _fetch_file(self._system, f"{self._base}/{name}", file, there[name])
            self._known[name] = (_stamp(file), there[name])

        with ThreadPoolExecutor(TRANSFERS) as pool:
            list(pool.map(take, names))


_ACTIVE: dict[Path, Mirror] = {}


@contextlib.contextmanager
def _mirrored(url: str, folder: Path, *, follow: bool, wait: bool) -> Iterator[None]:
    """Keep the folder and the URL the same while the block runs, and once more at its end, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    mirror = Mirror(url, folder)
    mirror.open()
    done = threading.Event()

    def work() -> None:
        while not done.wait(INTERVAL_SECONDS):
            with contextlib.suppress(RunError):  # tried again; what never went up is said at the end
                mirror.push()
                if follow:
                    mirror.fetch()

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


def _fetch_file(system: fs.FileSystem, path: str, target: Path, stamp: Stamp) -> None:
    """Download one object, under a temporary name until it is whole; its time of change is the object's."""
    if target.is_file() and _stamp(target) == stamp:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".tmp-{os.getpid()}-{threading.get_ident()}-{target.name}")
    try:
        with named_errors(path), system.open_input_stream(path) as source, temporary.open("wb") as sink:
            shutil.copyfileobj(source, sink, CHUNK_BYTES)
        os.utime(temporary, ns=(stamp[1], stamp[1]))
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _stamp(file: Path) -> Stamp:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def _stamp_of(info: fs.FileInfo) -> Stamp:
    # Whole seconds: a listing may tell more of the same object's time than a look at it.
    return info.size, (info.mtime_ns or 0) // 10**9 * 10**9
