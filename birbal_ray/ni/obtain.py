"""Task files that are not here yet: downloaded in an archive and unpacked safely, or made of a table of one's own."""

from __future__ import annotations

import csv
import datetime
import decimal
import errno
import hashlib
import http.client
import io
import itertools
import json
import math
import os
import re
import shutil
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from birbal_ray.ni import reader
from birbal_ray.ni.catalog import nearest
from birbal_ray.ni.reader import MAX_NAME_BYTES, clean_text
from birbal_ray.ni.schema import TaskError, hash_order, read_text

# The maintainers' main branch, which Birbal used too; what was fetched is recorded with its checksum.
DEFAULT_URL = "https://github.com/allenai/natural-instructions/archive/refs/heads/master.tar.gz"
CHUNK_BYTES = 1 << 20
TIMEOUT_SECONDS = 60
RECORD_FILE = "fetch.json"
CSV_DELIMITERS = (",", ";", "\t", "|")
MAX_CELL_CHARACTERS = 1 << 30


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
    except urllib.error.URLError as error:
        raise TaskError(f"{url}: can't be reached ({error.reason}); check the network") from None
    except (OSError, http.client.HTTPException) as error:
        raise TaskError(f"{url}: the download broke off ({error}); run the same command again") from None
    if total is not None and done != total:
        raise TaskError(f"{url}: the download broke off at {done} of {total} bytes; run the same command again")
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


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """What the columns of a table mean, and what the task files say."""

    name: str
    inputs: tuple[str, ...]  # several: lines of `column: text`
    outputs: tuple[str, ...]  # each is a reference, and each entry of a list, and an object's `text` (SQuAD)
    definition: str  # {group} stands for the group
    group_by: str | None = None  # one task for each value of this column
    num_examples: int = 4
    category: str = ""
    language: str = "English"
    license: str = "unknown"
    source: str = ""
    seed: int = 0

    @property
    def columns(self) -> list[str]:
        """Those that the table must have."""
        return [*self.inputs, *self.outputs, *filter(None, [self.group_by])]


def read_csv(file: Path, columns: Sequence[str]) -> tuple[list[str], list[dict[str, Any]]]:
    """(columns found, rows) of a .csv or .tsv file. Raises TaskError naming file and line.

    A CSV may be separated by another sign than the comma: the first of CSV_DELIMITERS is taken that gives all of
    `columns`.
    """
    text = read_text(file)
    if not text.strip():
        raise TaskError(f"{file}: the file is empty")
    csv.field_size_limit(MAX_CELL_CHARACTERS)
    delimiters = ("\t",) if file.suffix == ".tsv" else CSV_DELIMITERS
    headers = {one: next(csv.reader(io.StringIO(text, newline=""), delimiter=one), []) for one in delimiters}
    delimiter = next((one for one, header in headers.items() if set(columns) <= set(header)), delimiters[0])
    table = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    found = list(table.fieldnames or [])
    if repeated := {name for name in found if found.count(name) > 1}.intersection(columns):
        raise TaskError(f"{file}: two columns are named {sorted(repeated)[0]!r}; rename one")
    try:
        return found, list(table)
    except csv.Error as error:
        raise TaskError(f"{file} line {table.line_num}: not valid CSV ({error})") from None


def make_tasks(
    columns: Sequence[str], rows: Iterable[Mapping[str, Any]], options: ImportOptions
) -> tuple[dict[str, dict[str, Any]], dict[str, list[int]]]:
    """(task files by name, reason → numbers from 1 of rows that are in none).

    The same rows give the same files, whatever their order in time.

    Rows with the same input become one instance with the outputs of all. Examples are taken in hash
    order, at most half of a task's rows; they are no instances. Raises TaskError when a column is missing
    or no row is left.
    """
    for column in options.columns:
        if column not in columns:
            hint, found = nearest(column, columns), ", ".join(map(repr, columns))
            raise TaskError(f"{options.source}: no column {column!r}{hint}; it has {found or 'none'}")
    dropped: dict[str, list[int]] = defaultdict(list)
    groups: dict[str, dict[str, tuple[int, list[str]]]] = {}  # group → input → (row number, outputs)
    for number, row in enumerate(rows, 1):
        group = (_text(row.get(options.group_by)) or "") if options.group_by else ""
        inputs = {column: _text(row.get(column)) or "" for column in options.inputs}
        blank = [column for column, text in inputs.items() if not text.strip()]
        outputs = [text for column in options.outputs for text in _texts(row.get(column)) if text.strip()]
        if None in row:  # csv's key for what is beyond the header
            dropped["more cells than the header has"].append(number)
        elif options.group_by and not group.strip():
            dropped[f"no text in column {options.group_by!r}"].append(number)
        elif blank:
            dropped[f"no text in column {blank[0]!r}"].append(number)
        elif not outputs:
            dropped[f"no text in {' or '.join(f'column {name!r}' for name in options.outputs)}"].append(number)
        else:
            lines = [f"{column}: {text}" for column, text in inputs.items()]
            one = inputs[options.inputs[0]] if len(lines) == 1 else "\n".join(lines)
            known = groups.setdefault(group, {}).setdefault(one, (number, []))[1]
            if known:
                new = not set(outputs) <= set(known)
                what = ": its output became a reference" if new else ""
                dropped[f"same input as an earlier row{what}"].append(number)
            known += [text for text in dict.fromkeys(outputs) if text not in known]
    tasks: dict[str, dict[str, Any]] = {}
    for group, instances in sorted(groups.items()):
        if len(instances) == 1 and options.num_examples:
            ((number, _),) = instances.values()
            dropped["the only row of its task: nothing is left beside an example"].append(number)
            continue
        name = options.name
        if options.group_by:
            slug = re.sub(r"[^\w.-]+", "_", group).strip("_.") or "group"
            while slug and len(f"{name}_{slug}".encode()) > MAX_NAME_BYTES - 10:
                slug = slug[:-1]
            names = (f"{name}_{slug}" + (f"_{n}" if n > 1 else "") for n in itertools.count(1))
            name = next(one for one in names if one not in tasks)
        tasks[name] = _task_values(name, group, instances, options)
    if not tasks:
        reasons = (
            "; ".join(f"{len(numbers):,} rows: {reason}" for reason, numbers in dropped.items()) or "it has no rows"
        )
        raise TaskError(f"{options.source}: no task can be made ({reasons})")
    return tasks, dict(dropped)


def _task_values(
    name: str, group: str, instances: Mapping[str, tuple[int, list[str]]], options: ImportOptions
) -> dict[str, Any]:
    in_hash_order = sorted(instances, key=lambda text: hash_order(f"{name}:{text}", options.seed))
    examples = in_hash_order[: min(options.num_examples, len(instances) // 2)]
    return {
        "Contributors": [],
        "Source": [options.source],
        "Categories": [options.category] if options.category else [],
        "Domains": [],
        "Input_language": [options.language],
        "Output_language": [options.language],
        "Definition": [options.definition.replace("{group}", group)],
        "Positive Examples": [{"input": text, "output": instances[text][1][0], "explanation": ""} for text in examples],
        "Negative Examples": [],
        "Instances": [
            {"id": f"{name}-{number}", "input": text, "output": outputs}
            for text, (number, outputs) in instances.items()
            if text not in examples
        ],
        "Instance License": [options.license],
    }


def _texts(value: Any) -> Iterator[str]:
    """The texts of an output's cell: its own, those of a list's entries, those of an object's `text`."""
    if isinstance(value, (list, tuple)):
        for entry in value:
            yield from _texts(entry)
    elif isinstance(value, Mapping):
        yield from _texts(value.get("text"))
    elif (text := _text(value)) is not None:
        yield text


def _text(value: Any) -> str | None:
    """The cell as a text for UTF-8; None for what is none: a list, an object, nothing, not a finite number."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    kinds = (str, int, float, decimal.Decimal, datetime.date, datetime.time, datetime.datetime)
    return clean_text(str(value), Counter()) if isinstance(value, kinds) else None
