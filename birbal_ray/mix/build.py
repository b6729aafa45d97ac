"""The two readings of the candidates: first to decide, then to write.

On Ray Data, so that candidates may outgrow memory; a little input is read in this process, with the
same functions and the same result, because starting Ray's workers takes longer than reading it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from birbal_ray.mix import near
from birbal_ray.mix.candidates import Candidates
from birbal_ray.mix.look import Chunk, Lookup, features
from birbal_ray.mix.outcome import Places, texts
from birbal_ray.mix.write import BATCH_ROWS
from birbal_ray.run import RunError

if TYPE_CHECKING:
    import ray.data

SORT_INPUT_BYTES = 16 << 20
SORT_ROWS = 4 * BATCH_ROWS  # rows of one range of the sort; what one reducing task holds


@dataclass(frozen=True, slots=True)
class NearTable:
    """MinHash signatures: candidate i has row place[i] of `signatures` (mapped from a file)."""

    instruction_hash: NDArray[np.uint64]
    signatures: NDArray[np.uint32]
    place: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Gathered:
    """All candidates' features on the driver, in file order; `offsets` as in Places."""

    candidates: Candidates
    offsets: NDArray[np.int64]
    near: NearTable | None = None


def plan_chunks(source: str | None, files: Sequence[Path], chunk_bytes: int, first_number: int = 0) -> list[Chunk]:
    """Cut files into chunks of about `chunk_bytes`: small files together, large ones by row groups."""
    pieces: list[tuple[str, tuple[int, ...] | None, int]] = []
    for file in files:
        size = file.stat().st_size
        if size <= 2 * chunk_bytes:
            pieces.append((str(file), None, size))
        else:
            pieces += [(str(file), (group,), num_bytes) for group, num_bytes in _row_groups(file)]
    chunks: list[list[tuple[str, tuple[int, ...] | None]]] = [[]]
    filled = 0
    for name, groups, size in pieces:
        if chunks[-1] and filled + size > chunk_bytes:
            chunks.append([])
            filled = 0
        chunks[-1].append((name, groups))
        filled += size
    return [Chunk(first_number + i, source, tuple(chunk)) for i, chunk in enumerate(c for c in chunks if c)]


def fits_process(chunks: Sequence[Chunk], limit_bytes: int) -> bool:
    """Whether the chunks' files together are small enough to be read without Ray."""
    return sum(Path(name).stat().st_size for name in {name for c in chunks for name, _ in c.files}) <= limit_bytes


def read_features(
    chunks: Sequence[Chunk],
    lookup: Lookup,
    work: Path,
    report: Callable[[int], None] = lambda rows: None,
    *,
    in_process: bool = False,
) -> Gathered:
    """First reading: every chunk's features, on all of Ray's CPUs (which must run) or in this process."""
    near_too = lookup.config.dedup.near
    if in_process:
        return gather((t for chunk in chunks for t in features(chunk, lookup)), len(chunks), near_too, work)
    import ray

    shared = ray.put((list(chunks), lookup))

    def look(batch: pa.Table) -> Iterator[pa.Table]:
        all_chunks, context = ray.get(shared)
        for number in batch["number"].to_pylist():
            yield from features(all_chunks[number], context)

    tables = _tables(_numbers(len(chunks)).map_batches(look, batch_size=1, batch_format="pyarrow"), report)
    return gather(tables, len(chunks), near_too, work)


def gather(tables: Iterator[pa.Table], num_chunks: int, with_near: bool, work: Path) -> Gathered:
    """Bring feature tables, in any order, into file order.

    Signatures go to a file that is mapped into memory (512 bytes a row), the rest stays in memory.
    """
    columns: dict[str, list[NDArray[Any]]] = {}
    spill = _SignatureFile(work) if with_near else None
    for table in tables:
        for name in table.column_names:
            if name == "signature":
                assert spill is not None
                spill.append(table["signature"])
            else:
                columns.setdefault(name, []).append(table[name].to_numpy())
    if not columns:
        raise RunError("no candidates: the score folder and the sources hold no rows")
    joined = {name: np.concatenate(parts) for name, parts in columns.items()}
    order = np.lexsort((joined.pop("row"), joined["chunk"]))
    sizes = np.bincount(joined.pop("chunk"), minlength=num_chunks)
    joined = {name: values[order] for name, values in joined.items()}
    table = NearTable(joined.pop("instruction_hash"), spill.table(), order) if spill is not None else None
    return Gathered(Candidates(**joined), np.r_[0, np.cumsum(sizes)], table)


def read_texts(
    chunks: Sequence[Chunk],
    places: Places,
    report: Callable[[int], None] = lambda rows: None,
    *,
    in_process: bool = False,
) -> Iterator[pa.Table]:
    """Second reading: TEXTS tables of BATCH_ROWS rows in rank order.

    Ray Data sorts by rank in its object store, which spills to disk, so texts never pile up in memory.
    """
    if in_process:
        table = pa.concat_tables(t for chunk in chunks for t in texts(chunk, places)).sort_by("rank")
        yield from (table.slice(start, BATCH_ROWS) for start in range(0, len(table), BATCH_ROWS))
        return
    import ray

    shared = ray.put((list(chunks), places))

    def look(batch: pa.Table) -> Iterator[pa.Table]:
        all_chunks, all_places = ray.get(shared)
        for number in batch["number"].to_pylist():
            yield from texts(all_chunks[number], all_places)

    rows = _numbers(len(chunks)).map_batches(look, batch_size=1, batch_format="pyarrow")
    boundaries: list[int | float] = list(range(SORT_ROWS, len(places.rank) + SORT_ROWS, SORT_ROWS))
    rows = rows.sort("rank", boundaries=boundaries)
    yield from _tables(rows, report, BATCH_ROWS)


def _numbers(count: int) -> ray.data.Dataset:
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    # By default the sort gathers so much in one task that its memory grows with the data (583 MiB
    # at a million rows, see benchmarks/mixing.py).
    context.shuffle_input_batch_bytes = SORT_INPUT_BYTES
    # One chunk a block, so that each is a task of its own.
    return ray.data.from_items([{"number": i} for i in range(count)], override_num_blocks=count)


def _tables(
    dataset: ray.data.Dataset, report: Callable[[int], None], batch_size: int | None = None
) -> Iterator[pa.Table]:
    from ray.exceptions import RayTaskError

    done = 0
    try:
        table: Any
        for table in dataset.iter_batches(batch_format="pyarrow", batch_size=batch_size, prefetch_batches=1):
            done += table.num_rows
            report(done)
            yield table
    except RayTaskError as error:
        cause: BaseException = error
        while isinstance(cause, RayTaskError) and isinstance(cause.cause, Exception):
            cause = cause.cause
        if isinstance(cause, RunError):
            # Ray adds lines about retries to the message; ours is the first.
            raise RunError(str(cause).splitlines()[0]) from None
        raise


def _row_groups(file: Path) -> list[tuple[int, int]]:
    try:
        metadata = pq.read_metadata(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise RunError(f"{file}: not a readable Parquet file ({' '.join(str(error).split())})") from None
    return [(i, metadata.row_group(i).total_byte_size) for i in range(metadata.num_row_groups)]


class _SignatureFile:
    def __init__(self, work: Path) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self.path = work / "signatures.bin"
        self.path.unlink(missing_ok=True)
        self.rows = 0

    def append(self, column: pa.ChunkedArray) -> None:
        with self.path.open("ab") as file:
            for chunk in column.chunks:
                file.write(b"".join(chunk.to_pylist()))
                self.rows += len(chunk)

    def table(self) -> NDArray[np.uint32]:
        return np.memmap(self.path, np.uint32, "r", shape=(self.rows, near.NUM_HASHES))
