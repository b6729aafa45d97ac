"""Folders on a disk or in object storage, read and written through one interface.

`open_folder` gives a `Folder` for a path or an `s3://`, `gs://` URL. Every process on every node opens it for itself
and reads and writes its own files straight there; nothing is mirrored. pyarrow's filesystem lists and reads (so that
`pyarrow.dataset` and Ray Data can use the same one), obstore writes objects.

A file appears under its name complete or not at all: on a disk it is written under a temporary name, fsynced and
renamed; in object storage it is one PUT or one completed multipart upload. An exception in between publishes nothing.

Names are relative, with `/` between their parts. Names of which a part begins with a dot (locks, temporary files) are
left out of listings. Nothing here deletes anything but the names it is given.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, Protocol

import filelock
from pyarrow import fs

from birbal_ray.settings import canonical_hash, one_line, sha256_of
from birbal_ray.stores import RunError, connect, is_url, named_errors, open_filesystem

if TYPE_CHECKING:
    import pyarrow as pa

CHUNK_BYTES = 8 << 20

Version = dict[str, str]  # what a store calls one state of an object: its etag or generation


class DamagedFileError(RunError):
    """A file is there and is not what birbal writes. A store that can't be reached is another RunError."""


class FileRecord(NamedTuple):
    """What a manifest says of a file."""

    sha256: str
    size: int  # bytes


class FileStat(NamedTuple):
    """What a listing says of a file. `modified`: seconds since the epoch, whole seconds in some stores."""

    size: int
    modified: float


class Guard(Protocol):
    """What a Folder asks before it publishes or deletes an object. Travels to other processes with the folder."""

    def check(self) -> None:
        """Raise RunError unless this run still holds the folder."""


def absolute(path: str | os.PathLike[str]) -> str:
    """A path that means the same from any folder; a URL already does."""
    if not is_url(path):
        return str(_expanded(path).resolve())
    scheme, _, rest = str(path).partition("://")
    return f"{scheme}://{rest.rstrip('/')}"


def absolute_link(path: str | os.PathLike[str]) -> str:
    """`absolute`, where a link that `path` names stays one: its name has the suffix, the Hub's files behind it none."""
    return absolute(path) if is_url(path) else join(absolute(Path(path).parent), Path(path).name)


def _expanded(path: str | os.PathLike[str]) -> Path:
    """A path with the user's folder for a leading `~`, which no shell replaces in a file of settings."""
    return Path(path).expanduser() if str(path).partition("/")[0] == "~" else Path(path)


def base_name(path: str | os.PathLike[str]) -> str:
    """The last name of a path or URL: what it is called, also where that is a link."""
    if is_url(path):
        return str(path).rstrip("/").rpartition("/")[2]
    return Path(os.path.normpath(_expanded(path).absolute())).name


def join(path: str | os.PathLike[str], name: str) -> str:
    """`name` below a path or URL."""
    return f"{str(path).rstrip('/')}/{name}" if is_url(path) else str(Path(path) / name)


def cache_folder() -> Path:
    """Where this machine keeps copies: $BIRBAL_CACHE, else birbal_ray in the user's cache folder."""
    given = os.environ.get("BIRBAL_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "birbal_ray"


def make_cache_folder(name: str) -> Path:
    """A folder in the cache. Raises RunError where it can't be written."""
    folder = cache_folder() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError("no permission to write")
    except OSError as error:
        raise RunError(
            f"the cache {folder} can't be written ({error.strerror or error}); set BIRBAL_CACHE to a folder that can"
        ) from None
    return folder


def open_folder(path: str | os.PathLike[str] | Folder, guard: Guard | None = None) -> Folder:
    """The folder at a path or URL, whether or not something is there. Makes no request (but one for a bucket's region).

    Credentials are the environment's; an S3-compatible server is named by AWS_ENDPOINT_URL (or AWS_ENDPOINT_URL_S3), a
    region by AWS_REGION, as for the AWS tools. Raises RunError for other URLs, and those without a bucket or with `..`.
    """
    if isinstance(path, Folder):
        return path
    place = absolute(path)
    if not is_url(place):
        if "://" in str(path):
            raise RunError(f"{path}: expected a path, or a URL that begins with s3:// or gs://")
        return Folder(place, fs.LocalFileSystem(), place)
    scheme, _, root = place.partition("://")
    if not root or {"", ".", ".."}.intersection(root.split("/")):
        raise RunError(f"{path}: expected {scheme}://bucket/folder")
    return Folder(place, open_filesystem(place), root, guard)


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder at `place`, an absolute path or a URL. Travels to other processes by its place and guard.

    Reading raises FileNotFoundError for an absent file, DamagedFileError for a damaged one, and RunError for a store
    that can't be reached; both name the place. On a disk, OSErrors (disk full, permissions) stay what they are.
    """

    place: str
    filesystem: fs.FileSystem = field(compare=False, repr=False)
    root: str = field(compare=False, repr=False)  # of this folder inside `filesystem`
    guard: Guard | None = field(default=None, compare=False, repr=False)  # of a run at a URL

    def __str__(self) -> str:
        return self.place

    def __reduce__(self) -> tuple[Any, ...]:
        return open_folder, (self.place, self.guard)

    @property
    def is_local(self) -> bool:
        """Whether it is on a disk that this process sees."""
        return not is_url(self.place)

    @property
    def local(self) -> Path:
        """Its path. Raises RunError where it is in object storage."""
        if not self.is_local:
            raise RunError(f"{self.place}: a folder on this machine is needed here, not a URL")
        return Path(self.place)

    def at(self, name: str) -> str:
        """The place of a file, for messages and for other commands' arguments."""
        return join(self.place, name)

    def path(self, name: str = "") -> str:
        """The path of a file inside `filesystem`, for pyarrow and Ray Data."""
        return f"{self.root}/{name}" if name else self.root

    def subfolder(self, name: str) -> Folder:
        """The folder `name` below this one."""
        return Folder(self.at(name), self.filesystem, self.path(name), self.guard)

    def files(self, under: str = "", *, hidden: bool = False) -> dict[str, FileStat]:
        """Every file below the folder (or below `under` in it), by its name from this folder, in one listing, sorted.

        Empty where there is no such folder. `hidden`: with names that begin with a dot, too.
        """
        selector = fs.FileSelector(self.path(under), recursive=True, allow_not_found=True)
        with named_errors(self.place):
            infos = self.filesystem.get_file_info(selector)
        found = {
            info.path[len(self.root) + 1 :]: FileStat(info.size, (info.mtime_ns or 0) / 1e9)
            for info in infos
            if info.type == fs.FileType.File
        }
        if not self.is_local and (odd := [name for name in found if {"", ".", ".."}.intersection(name.split("/"))]):
            raise RunError(f"{self.place}: the object {odd[0]!r} has a name that no file can have; remove it")
        return {name: found[name] for name in sorted(found) if hidden or not f"/{name}".count("/.")}

    def folders(self) -> list[str]:
        """The names of the folders directly below, sorted; without those that begin with a dot."""
        with named_errors(self.place):
            infos = self.filesystem.get_file_info(fs.FileSelector(self.root, allow_not_found=True))
        names = (info.base_name for info in infos if info.type == fs.FileType.Directory)
        return sorted(name for name in names if not name.startswith("."))

    def stat(self, name: str) -> FileStat | None:
        """Size and time of one file; None when it is absent."""
        with named_errors(self.place):
            info = self.filesystem.get_file_info(self.path(name))
        return FileStat(info.size, (info.mtime_ns or 0) / 1e9) if info.type == fs.FileType.File else None

    def is_file(self, name: str) -> bool:
        """Whether there is such a file."""
        return self.stat(name) is not None

    def open_input(self, name: str) -> Any:
        """A seekable pyarrow file to read from."""
        with named_errors(self.at(name)):
            return self.filesystem.open_input_file(self.path(name))

    def read_bytes(self, name: str) -> bytes:
        """The content of a file."""
        with named_errors(self.at(name)), self.filesystem.open_input_stream(self.path(name)) as stream:
            return stream.read()

    def read_text(self, name: str) -> str:
        """The content of a UTF-8 file."""
        try:
            return self.read_bytes(name).decode("utf-8")
        except UnicodeDecodeError as error:
            raise DamagedFileError(
                f"{self.at(name)}: not UTF-8 ({error}); birbal did not write it, or it is damaged"
            ) from None

    def read_json(self, name: str) -> Any:
        """Parsed JSON."""
        try:
            return json.loads(self.read_text(name))
        except json.JSONDecodeError as error:
            raise DamagedFileError(
                f"{self.at(name)}: not valid JSON ({error}); birbal did not write it, or it is damaged"
            ) from None

    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """A Parquet file as a table; only some `columns` where they are named."""
        import pyarrow as pa
        import pyarrow.parquet as pq  # not pq.read_table, which imports pyarrow.dataset and pandas: a second

        with self.open_input(name) as source, contextlib.suppress(pa.ArrowInvalid, OSError):
            return pq.ParquetFile(source).read(columns)
        data = self.read_bytes(name)  # a store that fails while it sends a file is not taken for a damaged one
        try:
            return pq.ParquetFile(pa.BufferReader(data)).read(columns)
        except (pa.ArrowInvalid, OSError) as error:
            reason = one_line(error)
            raise DamagedFileError(f"{self.at(name)}: not a Parquet file, or a damaged one ({reason})") from None

    def record_of(self, name: str) -> FileRecord:
        """Hash and size of a file, read once in pieces."""
        with named_errors(self.at(name)), self.open_input(name) as source:
            buffered = io.BufferedReader(source, CHUNK_BYTES)
            return FileRecord(hashlib.file_digest(buffered, "sha256").hexdigest(), source.size())

    @contextlib.contextmanager
    def writer(self, name: str) -> Iterator[Sink]:
        """A binary file to write to in pieces. It appears when the block ends, unless an exception leaves it.

        `sink.record` is its FileRecord. At a URL the content waits in a temporary file on this machine.
        """
        if self.is_local:
            with _replacing(self.local / name) as file:
                yield Sink(file)
            return
        with tempfile.NamedTemporaryFile(prefix="birbal-upload-") as temporary:
            yield Sink(temporary)
            temporary.flush()
            self._put(name, Path(temporary.name))

    def write_bytes(self, name: str, data: bytes) -> FileRecord:
        """Write a file."""
        if self.is_local:
            write_atomic(self.local / name, data)
        else:
            self._put(name, data)
        return FileRecord(sha256_of(data), len(data))

    def write_json(self, name: str, value: Any) -> FileRecord:
        """Write JSON: indented, UTF-8, a line break at its end."""
        return self.write_bytes(name, _json_bytes(value))

    def write_parquet(self, name: str, table: pa.Table) -> FileRecord:
        """Write a table as one zstd Parquet file."""
        import pyarrow.parquet as pq

        with self.writer(name) as sink:
            pq.write_table(table, sink, compression="zstd")
        return sink.record

    def upload(self, file: Path, name: str) -> FileRecord:
        """Copy a file of this machine into the folder."""
        if not self.is_local:
            self._put(name, file)
        elif file != self.local / name:
            with _replacing(self.local / name) as target, file.open("rb") as source:
                shutil.copyfileobj(source, target, CHUNK_BYTES)
        return FileRecord(sha256_of(file), file.stat().st_size)

    def download(self, name: str, target: Path) -> None:
        """Copy a file of the folder to this machine."""
        with (
            named_errors(self.at(name)),
            self.filesystem.open_input_stream(self.path(name)) as source,
            _replacing(target) as file,
        ):
            shutil.copyfileobj(source, file, CHUNK_BYTES)

    def delete(self, names: Iterable[str]) -> None:
        """Delete these files (those that are there), and on a disk the folders below this one that it leaves empty."""
        names = list(names)
        if not self.is_local and names:
            import obstore

            if self.guard:
                self.guard.check()
            keys = [self._key(name) for name in names]
            with named_errors(self.place):
                store = connect(self.place)
                try:
                    obstore.delete(store, keys)
                except FileNotFoundError:  # Google's store ends at the first absent one
                    for key in keys:
                        with contextlib.suppress(FileNotFoundError):
                            obstore.delete(store, key)
        elif names:
            for name in names:
                (self.local / name).unlink(missing_ok=True)
            parents = {parent for name in names for parent in Path(name).parents if parent != Path()}
            for parent in sorted(parents, key=lambda path: -len(path.parts)):
                with contextlib.suppress(OSError):  # not empty
                    (self.local / parent).rmdir()

    def read_version(self, name: str, *, patient: bool = False) -> tuple[bytes, Version]:
        """The content of an object and the version it has; `patient`: through an outage. At URLs only."""
        import obstore

        with named_errors(self.at(name)):
            result = obstore.get(connect(self.place, patient=patient), self._key(name))
            return bytes(result.bytes()), _version(result.meta)

    def write_version(self, name: str, data: bytes, expected: Version | None) -> Version | None:
        """Write an object only where it has the version `expected` (None: where there is none). At URLs only.

        Gives the new version; None when the object is another one, and then nothing was written. The store
        decides (If-None-Match, If-Match), so that of two writers only one succeeds.
        """
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        try:
            with named_errors(self.at(name)):
                mode: Any = expected or "create"
                return _version(obstore.put(connect(self.place, patient=False), self._key(name), data, mode=mode))
        except (AlreadyExistsError, PreconditionError):
            return None
        except FileNotFoundError:
            if expected:
                return None
            raise RunError(f"{self.place}: no such bucket; create it, or check the URL") from None

    def _put(self, name: str, content: bytes | Path) -> None:
        import obstore

        if self.guard:
            self.guard.check()
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        try:
            with named_errors(self.at(name)):
                # At most 10,000 parts make an object.
                obstore.put(connect(self.place), self._key(name), content, chunk_size=max(CHUNK_BYTES, size // 9_000))
        except FileNotFoundError:
            raise RunError(f"{self.at(name)}: no such bucket; create it, or check the URL") from None

    def _key(self, name: str) -> str:
        return self.path(name).partition("/")[2]


class Sink(io.RawIOBase):
    """A file being written, which counts and hashes its bytes. Closing it publishes nothing: its block's end does."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._hash, self._size = file, hashlib.sha256(), 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._size

    def write(self, data: Any) -> int:
        """Append bytes."""
        view = memoryview(data)
        self._file.write(view)
        self._hash.update(view)
        self._size += view.nbytes
        return view.nbytes

    @property
    def record(self) -> FileRecord:
        """Hash and size of what was written so far."""
        return FileRecord(self._hash.hexdigest(), self._size)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file on a disk so that `path` is either absent, its old content, or all of `data`."""
    with _replacing(path) as file:
        file.write(data)


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write JSON on a disk, as `Folder.write_json` does."""
    write_atomic(path, _json_bytes(value))


def read_json(path: Path) -> Any:
    """Parsed JSON of a file on a disk. Raises RunError naming it when it is damaged."""
    return open_folder(path.parent).read_json(path.name)


def input_folder(path: str | os.PathLike[str], needed: Callable[[str], bool] | None = None) -> Path:
    """An input on this machine, for libraries that want a path: the path itself, or a copy of a URL's folder or file.

    The copy lies in the cache; only files whose size or time has changed at the URL are fetched, of a folder only
    those whose names `needed` says yes to. Raises RunError when nothing is there. Never writes to the URL.
    """
    if not is_url(path):
        return _expanded(path)
    folder = open_folder(path)
    copies = make_cache_folder(f"inputs/{canonical_hash(folder.place)[:16]}")
    target = copies / folder.root.rpartition("/")[2]
    with filelock.FileLock(copies / ".lock"):
        files = folder.files()
        if not files and (stat := folder.stat("")):
            files = {"": stat}
        if not files:
            raise RunError(f"{path}: nothing there")
        for name, stat in files.items():
            file = target / name
            if needed is not None and name and not needed(name):
                continue
            here = file.stat() if file.is_file() else None  # the copy gets the object's time
            if here is None or (here.st_size, int(here.st_mtime)) != (stat.size, int(stat.modified)):
                folder.download(name, file)
                os.utime(file, (stat.modified, stat.modified))
        if "" not in files:
            copy = open_folder(target)
            copy.delete(copy.files(hidden=True).keys() - files.keys())
    return target


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def _version(result: Any) -> Version:
    return {key: result[key] for key in ("e_tag", "version") if result[key]}


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A temporary file beside `path`, which takes its name when the block ends; it goes when an exception leaves it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".tmp-{os.getpid()}-{time.monotonic_ns()}-{path.name}"
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)
