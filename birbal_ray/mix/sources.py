"""Outside sources: where their rows come from, a dataset on the Hub or a file, and each row in one schema."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from birbal_ray.mix.config import SourceSettings
from birbal_ray.mix.datasets import HUB_DATASETS, HubDataset, Record, Row
from birbal_ray.mix.features import hash_all
from birbal_ray.mix.files import BATCH_ROWS, SUFFIXES, read_records, sha256_of_file
from birbal_ray.mix.rows import OUTSIDE_ROWS
from birbal_ray.settings import ConfigError, nearest, one_line
from birbal_ray.storage import absolute

if TYPE_CHECKING:
    from huggingface_hub import HfApi

PEEK_ROWS = 1000  # columns that none of the first so many records has are missing


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
    Raises ConfigError when the file isn't there, or the Hub can't be reached and its cache holds none of the dataset.
    """
    known = HUB_DATASETS.get(source.name)
    license = source.license or (known.license if known else "unknown")
    if source.path is not None:
        if not source.path.endswith(SUFFIXES):
            raise ConfigError(f"source {source.name}: {source.path}: expected {', '.join(SUFFIXES)}")
        place = absolute(source.path)
        return Origin(source.name, place, f"sha256:{sha256_of_file(place, f'source {source.name}')}", license)
    assert known is not None  # by SourceSettings
    revision = _commit_of(source.name, known, source.revision or known.revision)
    return Origin(source.name, known.repository, revision, license)


def source_problem(source: SourceSettings) -> str:
    """Why a source's rows can't be had: no such file, no network, a gated dataset without a token for it. Else "".

    Asks the Hub, and downloads nothing.
    """
    from huggingface_hub import constants

    try:
        origin = origin_of(source)
        if source.path is None and constants.HF_HUB_OFFLINE:
            _hub_files(source.name, origin)  # from the local cache
        elif source.path is None and _cached_commit(HUB_DATASETS[source.name], origin.revision) is None:
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


def _hub_files(name: str, origin: Origin) -> list[str]:
    from huggingface_hub import snapshot_download

    pattern = HUB_DATASETS[name].data_files
    with _hub(name, origin.location):
        folder = snapshot_download(
            origin.location, repo_type="dataset", revision=origin.revision, allow_patterns=[pattern]
        )
    files = sorted(str(file) for file in Path(folder).glob(pattern))
    if not files:
        raise ConfigError(f"source {name}: {origin.location} at {origin.revision} holds no {pattern}; set revision")
    return files


def _commit_of(name: str, known: HubDataset, revision: str) -> str:
    # Asked even for a commit: where the Hub can't be reached this says so at once, while a download
    # retries for half a minute.
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    repository, is_short = known.repository, re.fullmatch("[0-9a-f]{7,39}", revision) is not None
    with _hub(name, repository) as hub:
        try:
            commit = hub.dataset_info(repository, revision=None if is_short else revision, timeout=20).sha
            if is_short:  # downloads take full hashes only
                commits = (one.commit_id for one in hub.list_repo_commits(repository, repo_type="dataset"))
                commit = next((one for one in commits if one.startswith(revision)), None)
        except (OSError, HTTPError) as error:
            commit = _cached_commit(known, revision)
            if commit is None or isinstance(error, HfHubHTTPError):  # the latter is the Hub's own answer
                raise
    if commit is None:
        raise ConfigError(f"source {name}: the Hub names no commit for {repository} at {revision}; set revision")
    return commit


def _cached_commit(known: HubDataset, revision: str) -> str | None:
    """The commit of a revision of which the Hub's local cache holds data files; None where it holds none.

    Downloads name commits, so the cache may not know which one a branch was at: for "main" the last that came counts.
    """
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    cache = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=known.repository, repo_type="dataset")
    branch = cache / "refs" / revision
    start = branch.read_text().strip() if branch.is_file() else "" if revision == "main" else revision
    there = [one for one in cache.glob("snapshots/*") if one.name.startswith(start) and any(one.glob(known.data_files))]
    return max(there, key=lambda one: one.stat().st_mtime).name if there else None


@contextmanager
def _hub(name: str, repository: str) -> Iterator[HfApi]:
    """The Hub's client for a block; what goes wrong there is a ConfigError that says what to do about the source."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HTTPError

    try:
        yield HfApi()
    except GatedRepoError:
        raise ConfigError(
            f"source {name}: {repository} is gated: accept its terms at https://huggingface.co/datasets/{repository} "
            "and set HF_TOKEN, or leave it out of mix.sources"
        ) from None
    except (OSError, HTTPError) as error:
        detail = (one_line(error) or type(error).__name__)[:160]
        raise ConfigError(
            f"source {name}: {repository} can't be had from the Hub ({detail}); a gated dataset needs HF_TOKEN; "
            f"without a network, download it elsewhere and give the file: sources: [{{name: {name}, path: FILE}}]"
        ) from None
