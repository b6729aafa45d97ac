"""A folder and a URL in object storage made the same, file by file."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pyarrow import fs

from birbal_ray.object_store import filesystem_of, named_errors
from birbal_ray.run import LOG_FOLDER, MANIFEST_FILE, RUN_FILE, RunError, read_json, write_json

NOT_MIRRORED = ("ray", "ray_tune")  # Ray's own records of a run: Ray writes them to the URL itself
TRANSFERS = 8  # files on the way at once
CHUNK_BYTES = 8 << 20

Stamp = tuple[int, int]  # size in bytes, time of change in ns


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
        """Begin with the URL's content, unless nobody else wrote there since this machine looked last."""
        recorded = self.recall()
        there = self._there()
        deleted = self._known and not self._here()  # with the cache, say: nothing that the URL should follow
        if recorded and not deleted and self._all_ours(there):
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
            gone = self._known.keys() - here.keys()
            try:
                with ThreadPoolExecutor(TRANSFERS) as pool:
                    for group in (first, nested, *([name] for name in flat), last):
                        list(pool.map(lambda name: self._upload(name, here[name]), group))
                for name in gone:
                    with contextlib.suppress(FileNotFoundError):
                        self._system.delete_file(f"{self._base}/{name}")
                    del self._known[name]
            finally:  # also of a push that broke off: what it did upload is ours
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

    def recall(self) -> bool:
        """Read what was the same when this machine last looked; False when it never did."""
        if self._record.exists():
            with contextlib.suppress(RunError, ValueError, TypeError):
                record = read_json(self._record)
                self._known = {name: (tuple(a), tuple(b)) for name, (a, b) in record.items()}
                return True
        return False

    def _all_ours(self, there: dict[str, Stamp]) -> bool:
        """Whether everything there is from here, and all of ours is there."""
        if any(name not in there and (self.folder / name).is_file() for name in self._known):
            return False
        for name, stamp in there.items():
            if self._known.get(name, (None, None))[1] != stamp:
                if not self._is_copy(name, stamp):
                    return False
                self._known[name] = (_stamp(self.folder / name), stamp)
        return True

    def _is_copy(self, name: str, there: Stamp) -> bool:
        """Whether the object holds what the file does: uploaded, and killed before that was written down."""
        file = self.folder / name
        if not file.is_file() or _stamp(file)[0] != there[0]:
            return False
        path = f"{self._base}/{name}"
        with named_errors(self.url), self._system.open_input_stream(path) as source, file.open("rb") as own:
            while block := own.read(CHUNK_BYTES):
                if source.read(len(block)) != block:
                    return False
        return True

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
                found["/".join(parts)] = stamp_of(info)
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
            self._known[name] = (stamp, stamp_of(self._system.get_file_info(target)))

    def _take(self, there: dict[str, Stamp], names: Collection[str]) -> None:
        def take(name: str) -> None:
            file = self.folder / name
            fetch_file(self._system, f"{self._base}/{name}", file, there[name])
            self._known[name] = (_stamp(file), there[name])

        with ThreadPoolExecutor(TRANSFERS) as pool:
            list(pool.map(take, names))


def fetch_file(system: fs.FileSystem, path: str, target: Path, stamp: Stamp) -> None:
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


def stamp_of(info: fs.FileInfo) -> Stamp:
    # Whole seconds: a listing may tell more of the same object's time than a look at it.
    return info.size, (info.mtime_ns or 0) // 10**9 * 10**9
