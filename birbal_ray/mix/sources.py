"""Outside datasets as OUTSIDE_ROWS files, from the Hub at a recorded revision or from a local file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from birbal_ray.mix.config import ColumnMapping, SourceSettings
from birbal_ray.mix.look import hash64
from birbal_ray.mix.rows import OUTSIDE_ROWS
from birbal_ray.mix.upstreams import UPSTREAMS, Record, Row
from birbal_ray.settings import ConfigError, nearest

if TYPE_CHECKING:
    import datasets

BATCH_ROWS = 2048
FILE_ROWS = 50_000
_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a source's rows come from: a Hub repository at a commit, or a file with its SHA-256."""

    name: str
    location: str
    revision: str
    license: str

    def record(self) -> dict[str, str]:
        """For the manifest and the run's identity."""
        return {"name": self.name, "location": self.location, "revision": self.revision, "license": self.license}


def origin_of(source: SourceSettings) -> Origin:
    """Resolve where `source` comes from, without reading its rows.

    A branch on the Hub is resolved to its commit. Raises ConfigError when the file isn't there or the
    Hub can't be reached.
    """
    if source.path is not None:
        return Origin(source.name, source.path, f"sha256:{_sha256(Path(source.path), source.name)}", _license(source))
    upstream = UPSTREAMS[source.name]
    revision = _commit_of(source.name, upstream.repository, source.revision or upstream.revision)
    return Origin(source.name, upstream.repository, revision, _license(source))


def write_source(
    source: SourceSettings, origin: Origin, folder: Path, report: Callable[[int], None] = lambda rows: None
) -> list[Path]:
    """Turn a source into OUTSIDE_ROWS Parquet files under `folder`; memory: one batch.

    Row ids are `{source}:{hash of the text}` (`#2`, `#3` on repeats), so they don't depend on the
    rows' order. Raises ConfigError naming the source and the columns when its layout differs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    dataset = _load(source, origin, folder / "cache")
    adapt = _adapter(source, dataset.column_names)
    files: list[Path] = []
    writer: pq.ParquetWriter | None = None
    seen: dict[int, int] = {}
    in_file = total = 0
    try:
        for batch in dataset.iter(batch_size=BATCH_ROWS):
            rows = list(_rows(batch, adapt, source, origin, seen))
            if writer is None or in_file >= FILE_ROWS:
                if writer is not None:
                    writer.close()
                files.append(folder / f"{source.name}-{len(files):05d}.parquet")
                writer, in_file = pq.ParquetWriter(files[-1], OUTSIDE_ROWS, compression="zstd"), 0
            writer.write_table(pa.Table.from_pylist(rows, schema=OUTSIDE_ROWS))
            in_file += len(rows)
            total += len(rows)
            report(total)
    finally:
        if writer is not None:
            writer.close()
    return files


def _load(source: SourceSettings, origin: Origin, cache: Path) -> datasets.Dataset:
    import datasets
    from datasets.exceptions import DatasetGenerationError

    datasets.disable_progress_bars()
    try:
        if source.path is not None:
            kind = _FORMATS[Path(source.path).suffix]
            return datasets.load_dataset(kind, data_files=source.path, split="train", cache_dir=str(cache))
        return datasets.load_dataset(
            origin.location,
            data_files=UPSTREAMS[source.name].data_files,
            revision=origin.revision,
            split="train",
        )
    except DatasetGenerationError as error:
        detail = " ".join(str(error.__cause__ or error).split())[:200]
        raise ConfigError(f"source {source.name}: {origin.location} can't be read ({detail})") from None
    except (OSError, ValueError) as error:
        if source.path is not None:
            detail = " ".join(str(error).split())[:200]
            raise ConfigError(f"source {source.name}: {source.path} can't be read ({detail})") from None
        raise _unreachable(source.name, origin.location, error) from None


def _adapter(source: SourceSettings, columns: list[str]) -> Callable[[Record], Iterator[Row]]:
    if source.columns is None:
        upstream = UPSTREAMS[source.name]
        _need(source, upstream.columns, columns, f"the layout of {upstream.repository}: {upstream.layout}")
        return upstream.adapt
    mapping = source.columns
    wanted = tuple(column for column in mapping.model_dump().values() if column is not None)
    _need(source, wanted, columns, "what its `columns` name")
    return lambda record: iter([_mapped(record, mapping)])


def _need(source: SourceSettings, wanted: tuple[str, ...], found: list[str], expected: str) -> None:
    for column in wanted:
        if column not in found:
            raise ConfigError(
                f"source {source.name}: column {column!r} is missing{nearest(column, found)}; found "
                f"{', '.join(found)}; expected {expected}"
            )


def _mapped(record: Record, mapping: ColumnMapping) -> Row:
    row: Row = {"output": record[mapping.output]}
    for name in ("instruction", "input", "task", "license", "llm_written"):
        column = getattr(mapping, name)
        if column is not None:
            row[name] = record[column]
    return row


def _rows(
    batch: Mapping[str, list[Any]],
    adapt: Callable[[Record], Iterator[Row]],
    source: SourceSettings,
    origin: Origin,
    seen: dict[int, int],
) -> Iterator[Row]:
    names = list(batch)
    for values in zip(*batch.values(), strict=True):
        try:
            adapted = list(adapt(dict(zip(names, values, strict=True))))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise ConfigError(
                f"source {source.name}: a record of {origin.location} is not in the expected layout "
                f"({type(error).__name__}: {error}); its columns hold other types than the adapter knows"
            ) from None
        for row in adapted:
            yield _complete(row, source, origin, seen)


def _complete(row: Row, source: SourceSettings, origin: Origin, seen: dict[int, int]) -> Row:
    instruction, text, output = (_text(row.get(name), name, source) for name in ("instruction", "input", "output"))
    if source.instruction is not None:
        instruction = source.instruction
    digest = hash64(f"{instruction}\x1f{text}\x1f{output}")
    seen[digest] = seen.get(digest, 0) + 1
    repeat = f"#{seen[digest]}" if seen[digest] > 1 else ""
    return {
        "instruction": instruction,
        "input": text,
        "output": output,
        "task": str(row.get("task") or source.name),
        "row_id": f"{source.name}:{digest:016x}{repeat}",
        "license": source.license or str(row.get("license") or origin.license),
        "llm_written": source.llm_written or bool(row.get("llm_written")),
        "unwanted": bool(row.get("unwanted")),
    }


def _text(value: Any, name: str, source: SourceSettings) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ConfigError(f"source {source.name}: {name} is {type(value).__name__}, expected text ({value!r:.60})")
    return value


def _license(source: SourceSettings) -> str:
    if source.license is not None:
        return source.license
    return UPSTREAMS[source.name].license if source.name in UPSTREAMS else "unknown"


def _sha256(path: Path, name: str) -> str:
    if not path.is_file():
        raise ConfigError(f"source {name}: {path}: no such file")
    if path.suffix not in _FORMATS:
        raise ConfigError(f"source {name}: {path}: expected {', '.join(_FORMATS)}")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_commit(revision: str) -> bool:
    return len(revision) == 40 and all(c in "0123456789abcdef" for c in revision)


def _commit_of(name: str, repository: str, revision: str) -> str:
    # Asked even for a commit: where the Hub can't be reached this says so at once, while `datasets`
    # retries for half a minute. With HF_HUB_OFFLINE=1 a commit may be in the local cache.
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    try:
        commit = HfApi().dataset_info(repository, revision=revision, timeout=20).sha
    except OfflineModeIsEnabled as error:
        if not _is_commit(revision):
            raise _unreachable(name, repository, error) from None
        commit = revision
    except (OSError, HTTPError) as error:
        raise _unreachable(name, repository, error) from None
    if commit is None:
        raise ConfigError(f"source {name}: the Hub names no commit for {repository} at {revision}; set revision")
    return commit


def _unreachable(name: str, repository: str, error: Exception) -> ConfigError:
    detail = (" ".join(str(error).split()) or type(error).__name__)[:160]
    return ConfigError(
        f"source {name}: {repository} can't be had from the Hub ({detail}); a gated dataset needs HF_TOKEN; without "
        f"a network, download it elsewhere and give the file: sources: [{{name: {name}, path: FILE}}]"
    )
