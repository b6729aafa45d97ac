"""Rows from outside: datasets of the Hub, and users' files, local or at a URL, in the encoding that they announce."""

from __future__ import annotations

import codecs
import io
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from birbal_ray.mix.config import MixConfig, SourceSettings
from birbal_ray.mix.datasets import HUB_DATASETS, Record, Row
from birbal_ray.mix.features import hash_all
from birbal_ray.schemas import OUTSIDE_ROWS
from birbal_ray.settings import ConfigError, nearest, one_line
from birbal_ray.storage import Folder, absolute, absolute_link, open_folder

if TYPE_CHECKING:
    from huggingface_hub import HfApi

PEEK_ROWS = 1000  # columns that none of the first so many records has are missing
SUFFIXES = (".json", ".jsonl", ".parquet")
BATCH_ROWS = 2048
_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a source's rows come from: a Hub repository at a commit, or a file with its SHA-256."""

    name: str
    location: str
    revision: str
    license: str


def origin_of(source: SourceSettings) -> Origin:
    """Resolve where `source` comes from, without reading its rows.

    A branch on the Hub is resolved to its commit; while the Hub can't be reached, to the one in its local cache.
    Raises ConfigError when the file isn't there, or neither the Hub nor its cache says which commit that is.
    """
    known = HUB_DATASETS.get(source.name)
    license = source.license or (known.license if known else "unknown")
    if source.path is not None:
        if not source.path.endswith(SUFFIXES):
            raise ConfigError(f"source {source.name}: {source.path}: expected {', '.join(SUFFIXES)}")
        place = absolute_link(source.path)
        return Origin(source.name, place, f"sha256:{sha256_of_file(place, f'source {source.name}')}", license)
    assert known is not None  # by SourceSettings
    with _hub(source.name, known.repository) as hub:
        wanted = source.revision or known.revision
        revision = hub.resolve_revision(known.repository, repo_type="dataset", revision=wanted).resolved
    return Origin(source.name, known.repository, revision, license)


def absolute_paths(config: MixConfig) -> MixConfig:
    """The settings with the paths of outside files as they are called from any folder."""
    sources = [one.replace({"path": absolute_link(one.path)}) if one.path else one for one in config.sources]
    files = list(map(absolute_link, config.contamination.files))
    return config.replace({"sources": sources, "contamination.files": files})


def source_problem(source: SourceSettings, *, download: bool = False) -> str:
    """Why a source's rows can't be had: no such file, no network, a gated dataset without a token for it. Else "".

    Only asks the Hub, unless it is to `download` them: then reading them needs no network.
    """
    try:
        origin = origin_of(source)
        if source.path is None:
            try:
                _hub_files(source.name, origin, local_files_only=not download)
            except ConfigError:
                if download:
                    raise
                with _hub(source.name, origin.location) as hub:
                    hub.auth_check(origin.location, repo_type="dataset")
    except ConfigError as error:
        return str(error)
    return ""


def read_source(source: SourceSettings, origin: Origin) -> Iterator[pa.Table]:
    """A source's rows as OUTSIDE_ROWS tables of at most BATCH_ROWS rows; memory: one table.

    Row ids are `{source}:{hash of the text}` (`#2`, `#3` on repeats), so they don't depend on the rows'
    order. Raises ConfigError naming source, file and row where one is not in the expected layout.
    """
    seen: dict[int, int] = {}  # text hash → rows with it so far
    rows = _rows(source, origin)
    while batch := list(itertools.islice(rows, BATCH_ROWS)):
        texts = (f"{row['instruction']}\x1f{row['input']}\x1f{row['output']}" for row in batch)
        digests = hash_all(text.encode("utf-8", "surrogatepass") for text in texts)
        for row, digest in zip(batch, digests.tolist(), strict=True):
            seen[digest] = count = seen.get(digest, 0) + 1
            row["row_id"] = f"{source.name}:{digest:016x}" + (f"#{count}" if count > 1 else "")
        yield pa.Table.from_pylist(batch, schema=OUTSIDE_ROWS)
    if not seen:
        raise ConfigError(
            f"source {source.name}: {origin.location} holds no rows; give another file or drop the source"
        )


def _rows(source: SourceSettings, origin: Origin) -> Iterator[Row]:
    known = HUB_DATASETS.get(source.name)
    mapping = source.columns.model_dump(exclude_none=True) if source.columns else {}

    def adapt(record: Record) -> list[Row]:
        if known:
            return list(known.adapt(record))
        return [{name: record.get(column) for name, column in mapping.items()}]

    files = [origin.location] if source.path is not None else _hub_files(source.name, origin)
    for file in files:
        records = read_records(file, f"source {source.name}")
        first = list(itertools.islice(records, PEEK_ROWS))
        found = dict.fromkeys(column for _, record in first if isinstance(record, Mapping) for column in record)
        for column in mapping.values() if found else ():
            if column not in found:
                raise ConfigError(
                    f"source {source.name}: {file}: column {column!r} is missing{nearest(column, found)}; found "
                    f"{', '.join(found)}"
                )
        for number, record in itertools.chain(first, records):
            where = f"source {source.name}: {file}, row {number}"
            if not isinstance(record, Mapping):
                raise ConfigError(f"{where}: expected an object with columns, found {type(record).__name__}")
            try:
                adapted = adapt(record)
            except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
                raise ConfigError(
                    f"{where} is not in the layout of the known dataset ({type(error).__name__}: {error}); found "
                    f"{', '.join(record)}; under a name of your own it takes `columns`"
                ) from None
            for row in adapted:
                yield _complete(row, source, origin, where)


def _complete(row: Row, source: SourceSettings, origin: Origin, where: str) -> Row:
    for name in ("instruction", "input", "output", "task", "license"):
        value = row.get(name)
        if value is not None and not isinstance(value, str):
            raise ConfigError(f"{where}: {name} is {type(value).__name__}, expected text ({value!r:.60}); quote it")
    if not isinstance(row.get("llm_written"), bool | None):
        raise ConfigError(f"{where}: llm_written is {row['llm_written']!r:.60}, expected true, false or null")
    return {
        "instruction": (row.get("instruction") or "") if source.instruction is None else source.instruction,
        "input": row.get("input") or "",
        "output": row.get("output") or "",
        "task": row.get("task") or source.name,
        "license": source.license or row.get("license") or origin.license,
        "llm_written": source.llm_written or bool(row.get("llm_written")),
    }


def _hub_files(name: str, origin: Origin, *, local_files_only: bool = False) -> list[str]:
    from huggingface_hub import snapshot_download

    pattern = HUB_DATASETS[name].data_files
    with _hub(name, origin.location):
        folder = snapshot_download(
            origin.location,
            repo_type="dataset",
            revision=origin.revision,
            allow_patterns=[pattern],
            local_files_only=local_files_only,
        )
    files = sorted(str(file) for file in Path(folder).glob(pattern))
    if not files:
        raise ConfigError(f"source {name}: {origin.location} at {origin.revision} holds no {pattern}; set revision")
    return files


@contextmanager
def _hub(name: str, repository: str) -> Iterator[HfApi]:
    """The Hub's client for a block; what goes wrong there is a ConfigError that says what to do about the source."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HTTPError, RevisionResolutionError

    try:
        yield HfApi()
    except GatedRepoError:
        raise ConfigError(
            f"source {name}: {repository} is gated: accept its terms at https://huggingface.co/datasets/{repository} "
            "and set HF_TOKEN, or leave it out of mix.sources"
        ) from None
    except (OSError, HTTPError, RevisionResolutionError, RuntimeError) as error:  # the last: of hf_xet, which downloads
        detail = (one_line(error) or type(error).__name__)[:160]
        raise ConfigError(
            f"source {name}: {repository} can't be had from the Hub ({detail}); check the network (a gated "
            f"dataset also needs HF_TOKEN), give a copy (`path: FILE` beside `name: {name}`), or leave it out"
        ) from None


def read_texts(files: Sequence[str], setting: str) -> Iterator[str]:
    """Every text in files: lines of .txt, every string inside the records of .json, .jsonl and .parquet.

    Raises ConfigError for a file that can't be used.
    """
    for file in map(str, files):
        lines = read_lines(file, setting) if file.endswith(".txt") else read_records(file, setting, also=".txt")
        for _, value in lines:
            yield from _strings(value)


def _strings(value: Any) -> Iterator[str]:
    """Every text inside a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(item)


def locate(place: str, setting: str) -> tuple[Folder, str]:
    """Folder and name of a file; `setting` is what error messages call it. A path is a path, never a pattern."""
    parent, _, name = absolute(place).rpartition("/")
    folder = open_folder(parent or "/")
    if not name or not folder.is_file(name):
        raise ConfigError(f"{setting}: {place}: no such file")
    return folder, name


def sha256_of_file(place: str, setting: str) -> str:
    """SHA-256 (hex) of a file, read in pieces."""
    folder, name = locate(place, setting)
    return folder.record_of(name).sha256


def read_lines(place: str, setting: str) -> Iterator[tuple[int, str]]:
    """(number from 1, text) of each line of a UTF-8 or UTF-16 file.

    Only \\n, \\r and \\r\\n end a line: U+2028, NEL and form feed are text. Raises ConfigError for another encoding.
    """
    number = 0
    with _open_text(place, setting) as file:
        try:
            for number, line in enumerate(file, 1):
                yield number, line.rstrip("\r\n")
        except UnicodeError:
            raise _not_unicode(place, setting, f"after line {number}") from None


def read_records(place: str, setting: str, also: str = "") -> Iterator[tuple[int, Any]]:
    """(number from 1, record) of a .jsonl, .json (an array, or one record a line) or .parquet file.

    Text stays text, dates included. Memory: a batch of rows, or the array. Raises ConfigError naming file and row.
    """
    if not place.endswith(SUFFIXES):
        raise ConfigError(f"{setting}: {place}: expected {also + ', ' if also else ''}{', '.join(SUFFIXES)}")
    if place.endswith(".parquet"):
        yield from _parquet_records(place, setting)
        return
    if place.endswith(".json"):
        with _open_text(place, setting) as file:
            try:
                text = file.read(4096)
                records = json.loads(text + file.read()) if text.lstrip().startswith("[") else None
            except UnicodeError:
                raise _not_unicode(place, setting, "in its text") from None
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{setting}: {place}: not JSON ({error})") from None
        if records is not None:
            yield from enumerate(records, 1)
            return
    for number, line in read_lines(place, setting):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = getattr(error, "msg", error)  # without its own line number
                raise ConfigError(f"{setting}: {place}, line {number}: not JSON ({reason})") from None


def _open_text(place: str, setting: str) -> io.TextIOWrapper:
    folder, name = locate(place, setting)
    file = folder.open_input(name)
    start = file.read(4)
    file.seek(0)
    encoding = next((encoding for mark, encoding in _MARKS if start.startswith(mark)), "utf-8")
    return io.TextIOWrapper(file, encoding=encoding, newline="")


def _not_unicode(place: str, setting: str, where: str) -> ConfigError:
    return ConfigError(f"{setting}: {place}, {where}: neither UTF-8 nor UTF-16; save the file as UTF-8")


def _parquet_records(place: str, setting: str) -> Iterator[tuple[int, Any]]:
    folder, name = locate(place, setting)
    number = 0
    try:
        with folder.open_input(name) as file:
            for batch in pq.ParquetFile(file).iter_batches(BATCH_ROWS):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
    except (pa.ArrowException, OSError) as error:
        reason = one_line(error)
        raise ConfigError(f"{setting}: {place}, after row {number}: not a Parquet file ({reason})") from None
