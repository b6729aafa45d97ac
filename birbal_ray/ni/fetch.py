"""Download an archive of task files and unpack it safely."""

from __future__ import annotations

import errno
import hashlib
import http.client
import json
import os
import shutil
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from birbal_ray.ni import reader
from birbal_ray.ni.schema import TaskError

# The maintainers' main branch, which Birbal used too; what was fetched is recorded with its checksum.
DEFAULT_URL = "https://github.com/allenai/natural-instructions/archive/refs/heads/master.tar.gz"
CHUNK_BYTES = 1 << 20
TIMEOUT_SECONDS = 60
RECORD_FILE = "fetch.json"


def fetch_archive(
    url: str, output: Path, *, sha256: str | None = None, progress: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Fill `output/tasks` from the archive at `url`; the record {url, sha256, num_files, num_bytes}.

    https only, except from this machine. A download that was cut off continues where it stopped. An
    archive whose checksum is not `sha256` is deleted and refused. Only task files
    (`reader.find_task_files`) are unpacked, under their own base name; the folder appears complete or not at all.
    Raises TaskError saying what failed and what to do.
    """
    _check_url(url)
    record_file = output / RECORD_FILE
    sha256 = sha256.lower() if sha256 else None
    if record_file.exists():
        try:
            record = json.loads(record_file.read_text(encoding="utf-8"))
            same = record["url"] == url and sha256 in (None, record["sha256"])
        except (ValueError, KeyError, TypeError):
            raise TaskError(f"{record_file}: damaged; remove it and {output / 'tasks'}, then fetch again") from None
        if same and (output / "tasks").is_dir():
            progress(f"{output} is up to date")
            return record
    if (output / "tasks").exists():
        raise TaskError(f"{output / 'tasks'}: exists already; choose another --output or remove it")
    output.mkdir(parents=True, exist_ok=True)
    # Named after its address: what another address left behind is never taken for this one's.
    archive = output / f".download-{hashlib.sha256(url.encode()).hexdigest()[:12]}.tar.gz"
    _download(url, archive, progress)
    with archive.open("rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if sha256 is not None and found != sha256:
        archive.unlink()
        raise TaskError(f"{url}: sha256 is {found}, expected {sha256}; the download was deleted")
    unpacked, num_files = _unpack(archive, output, progress)
    record = {"url": url, "sha256": found, "num_files": num_files, "num_bytes": archive.stat().st_size}
    temporary = output / f".tmp-{RECORD_FILE}"
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    temporary.replace(record_file)
    unpacked.rename(output / "tasks")  # last: a record without tasks is an unfinished fetch
    archive.unlink()
    return record


def _check_url(url: str) -> None:
    parts = urllib.parse.urlsplit(url)
    local = parts.hostname in ("127.0.0.1", "localhost", "::1")
    if parts.scheme != "https" and not (parts.scheme == "http" and local):
        raise TaskError(f"{url}: only https:// is fetched (http:// from this machine alone)")


class _CheckedRedirects(urllib.request.HTTPRedirectHandler):
    """Follows a redirect only to where we would have gone ourselves."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        _check_url(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _download(url: str, target: Path, progress: Callable[[str], None]) -> None:
    part, tag_file = target.with_suffix(".part"), target.with_suffix(".etag")
    if target.exists():
        return
    have = part.stat().st_size if part.exists() else 0
    tag = tag_file.read_text(encoding="utf-8") if tag_file.exists() else ""
    request = urllib.request.Request(url, headers={"User-Agent": "birbal_ray"})
    if have and tag:  # without a tag the server's file may be another one by now
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", tag)
    try:
        with urllib.request.build_opener(_CheckedRedirects).open(request, timeout=TIMEOUT_SECONDS) as response:
            continued = response.status == http.HTTPStatus.PARTIAL_CONTENT
            length = response.headers.get("Content-Length")
            done = have if continued else 0
            total = done + int(length) if length else None
            tag_file.write_text(response.headers.get("ETag") or "", encoding="utf-8")
            with part.open("ab" if continued else "wb") as file:
                while block := response.read(CHUNK_BYTES):
                    file.write(block)
                    done += len(block)
                    share = f" of {total / 1e6:.0f}" if total else ""
                    progress(f"downloading {done / 1e6:.0f}{share} MB")
                file.flush()
                os.fsync(file.fileno())
    except urllib.error.HTTPError as error:
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and have:
            part.unlink()  # it was complete, or isn't the server's file any more: once more from the start
            _download(url, target, progress)
            return
        raise TaskError(f"{url}: the server answered {error.code} {error.reason}") from None
    except (OSError, http.client.HTTPException) as error:
        raise TaskError(f"{url}: the download broke off ({error}); the same command continues it") from None
    if total is not None and done != total:
        raise TaskError(f"{url}: the download broke off at {done} of {total} bytes; the same command continues it")
    part.replace(target)
    tag_file.unlink(missing_ok=True)


def _unpack(archive: Path, output: Path, progress: Callable[[str], None]) -> tuple[Path, int]:
    working = output / ".tmp-tasks"
    shutil.rmtree(working, ignore_errors=True)
    working.mkdir()
    num_files = 0
    try:
        for file, data in reader.read_files(reader.find_task_files(archive)):
            target = working / f"{file.name}.json"  # the base name alone: nothing leaves the folder
            if target.exists():
                raise TaskError(f"two files are named {target.name}")
            assert isinstance(data, bytes)  # archives raise as a whole
            target.write_bytes(data)
            num_files += 1
            progress(f"unpacking {num_files} task files")
    except TaskError as error:
        archive.unlink()
        raise TaskError(f"the archive can't be unpacked ({error}) and was deleted; fetch it again") from None
    except OSError as error:  # the disk's fault, not the archive's
        shutil.rmtree(working, ignore_errors=True)
        cause = "no space left on the disk" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error)
        raise TaskError(
            f"{archive}: unpacking broke off after {num_files} files ({cause}); the download is kept, "
            "the same command unpacks it"
        ) from None
    return working, num_files
