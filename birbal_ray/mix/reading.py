"""The two readings: features of all candidates, to decide with, then the texts of the rows that were kept.

A candidate's index is its place in this order: the files of the score run by name, then the outside sources
as configured, rows in file order. Ray computes on chunks of score files where they are many; the results come
back in the chunks' order, so any number of workers gives the same bytes. Outside sources are read here.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from birbal_ray.mix.allocation import BIRBAL_2023
from birbal_ray.mix.config import MixConfig
from birbal_ray.mix.features import Block, Flags, NgramIndex, extract_features
from birbal_ray.mix.scores import AGAIN, ScoreFolder, check_rows, read_scored
from birbal_ray.mix.select import Group
from birbal_ray.schemas import MIX_ROWS, OUTSIDE_ROWS
from birbal_ray.storage import FileRecord, RunError

CHECKED_COLUMNS = ("orig_input", "answer", "prediction", "row_id", "task", "label", "score", "error")
TEXT_COLUMNS = ("orig_input", "answer", "task")
BUCKET_ROWS = 1 << 15  # texts sorted at a time; a multiple of the writer's BATCH_ROWS

# The text of a row that the mix takes, with its place in the mix's order.
TEXTS = pa.schema(
    [
        pa.field("rank", pa.int32(), nullable=False),
        *(MIX_ROWS.field(name) for name in ("instruction", "input", "output", "license")),
    ]
)

Chunk = tuple[str, ...]  # names of files
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Context:
    """What both readings need beside the rows. Group i is `scores.tasks[i]`; outside sources' groups follow."""

    config: MixConfig
    scores: ScoreFolder
    groups: tuple[Group, ...]
    ngrams: NgramIndex | None
    tasks: pa.RecordBatch  # name, label, license, definition: row i is of `scores.tasks[i]`

    @property
    def in_process(self) -> bool:
        """Whether there is so little to read that this process does it, without Ray."""
        return self.scores.num_bytes <= self.config.resources.in_process_mib << 20


def plan_chunks(files: Mapping[str, FileRecord], chunk_bytes: int) -> list[Chunk]:
    """Neighbouring files together: one chunk for each `chunk_bytes` of all files, ended by the file that fills it."""
    starts = itertools.accumulate((record.size for record in files.values()), initial=0)
    numbered = itertools.groupby(zip(starts, files, strict=False), lambda one: one[0] // chunk_bytes)
    return [tuple(file for _, file in chunk) for _, chunk in numbered]


def run_in_order(
    function: Callable[[Item, Context], Result], items: Sequence[Item], context: Context
) -> Iterator[Result]:
    """function(item, context) of each item, in the items' order; in this process, or on Ray's CPUs (which must run)."""
    if context.in_process:
        yield from (function(item, context) for item in items)
        return
    import ray
    from ray.exceptions import RayTaskError

    shared, task = ray.put(context), ray.remote(function)
    # Results wait for their turn: no more of them than keep the CPUs busy.
    window = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
    pending: deque[Any] = deque()
    try:
        for item in items:
            pending.append(task.remote(item, shared))
            if len(pending) >= window:
                yield ray.get(pending.popleft())
        while pending:
            yield ray.get(pending.popleft())
    except RayTaskError as error:
        raise error.cause if isinstance(error.cause, RunError) else error from None


def read_chunk_features(chunk: Chunk, context: Context) -> pa.Table:
    """Features of a chunk's rows. Raises RunError for a damaged file, an unknown task, a value no run writes."""
    tables = []
    for name in chunk:
        rows, place = read_scored(context.scores, name, CHECKED_COLUMNS), context.scores.folder.at(name)
        check_rows(place, rows)
        tables.append(extract_features(_scored_block(rows, place, context), context.config, context.ngrams))
    return pa.concat_tables(tables)


def read_chunk_texts(wanted: tuple[Chunk, NDArray[np.int32]], context: Context) -> pa.Table:
    """TEXTS of a chunk's rows that have a rank; `wanted` holds the chunk and, for each of its rows, a rank or -1."""
    chunk, ranks = wanted
    start, tables = 0, []
    for name in chunk:
        rows = read_scored(context.scores, name, TEXT_COLUMNS)
        rank = ranks[start : start + len(rows)]
        start += len(rows)
        rows = rows.take(pa.array(np.flatnonzero(rank >= 0)))
        number = pc.index_in(rows["task"], context.tasks["name"]).combine_chunks()
        columns = {
            "rank": rank[rank >= 0],
            "instruction": context.tasks["definition"].take(number),
            "input": rows["orig_input"],
            "output": first_references(rows["answer"].combine_chunks()),
            "license": context.tasks["license"].take(number),
        }
        tables.append(pa.table(columns, schema=TEXTS))
    return pa.concat_tables(tables)


def keep_outside_rows(tables: Iterator[pa.Table], group: int, context: Context, file: Path) -> Iterator[pa.Table]:
    """Features of OUTSIDE_ROWS tables, which are kept in `file` for the second reading."""
    file.parent.mkdir(parents=True, exist_ok=True)
    family = Flags.FAMILY if context.groups[group].families else 0
    with pq.ParquetWriter(file, OUTSIDE_ROWS, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table)
            rows = table.combine_chunks()
            flags = np.full(len(rows), family, np.uint16)
            flags[rows["llm_written"].to_numpy()] |= np.uint16(Flags.LLM_WRITTEN)
            texts = {name: rows[name].combine_chunks() for name in ("row_id", "instruction", "input", "output", "task")}
            block = Block(np.full(len(rows), group, np.int32), flags, np.full(len(rows), np.nan), **texts)
            yield extract_features(block, context.config, context.ngrams)


def read_outside_texts(file: Path, ranks: NDArray[np.int32]) -> Iterator[pa.Table]:
    """TEXTS of the rows kept in `file` that have a rank; `ranks` holds one, or -1, for each."""
    start = 0
    with pq.ParquetFile(file) as parquet:
        for batch in parquet.iter_batches():
            rank = ranks[start : start + len(batch)]
            start += len(batch)
            rows = batch.take(pa.array(np.flatnonzero(rank >= 0)))
            columns = {name: rows[name] for name in TEXTS.names if name != "rank"}
            yield pa.table({"rank": rank[rank >= 0], **columns}, schema=TEXTS)


def sort_texts(tables: Iterator[pa.Table], num_texts: int, folder: Path, batch_rows: int) -> Iterator[pa.Table]:
    """The rows of TEXTS tables in rank order, `batch_rows` at a time.

    Goes through files in `folder`, of BUCKET_ROWS ranks each; memory: one of them. Raises RunError unless each of the
    `num_texts` ranks comes once.
    """
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, num_texts, BUCKET_ROWS)
    files = [os.fspath(folder / f"{start}.arrow") for start in starts]
    writers = [pa.ipc.new_stream(file, TEXTS) for file in files]
    for table in tables:
        bucket = table["rank"].to_numpy() // BUCKET_ROWS
        for number in np.unique(bucket):
            writers[number].write_table(table.filter(pa.array(bucket == number)))
    for writer in writers:
        writer.close()
    for first, file in zip(starts, files, strict=True):
        with pa.ipc.open_stream(pa.memory_map(file)) as stream:
            table = stream.read_all().sort_by("rank")
        due = np.arange(first, min(first + BUCKET_ROWS, num_texts))
        if not np.array_equal(table["rank"].to_numpy(), due):
            raise RunError(
                f"{len(due):,} rows were to be written from rank {first:,} on, {len(table):,} arrived; "
                "the inputs changed while they were read; run the command again (nothing was written)"
            )
        yield from (table.slice(start, batch_rows) for start in range(0, len(table), batch_rows))


def _scored_block(rows: pa.Table, place: str, context: Context) -> Block:
    group = pc.index_in(rows["task"], context.tasks["name"]).combine_chunks()
    if group.null_count:
        unknown = rows["task"].filter(pc.is_null(group))[0].as_py()
        raise RunError(f"{place}: task {unknown!r} is not in the run's tasks.parquet; {AGAIN}")
    if not pc.all(pc.equal(rows["label"], context.tasks["label"].take(group))).as_py():
        raise RunError(f"{place}: its rows have another label than tasks.parquet gives their task; {AGAIN}")
    answer = rows["answer"].combine_chunks()
    has_error = rows["error"].is_valid().to_numpy() | (pc.list_value_length(answer).to_numpy() == 0)
    flags = np.where(has_error, np.uint16(Flags.ERROR), np.uint16(0))
    flags[pc.list_value_length(answer).to_numpy() > 1] |= np.uint16(Flags.SEVERAL_REFERENCES)
    number = group.to_numpy()
    in_family = np.array([bool(one.families) for one in context.groups], bool)
    flags[in_family[number]] |= np.uint16(Flags.FAMILY)
    answers = []
    if context.config.policy == BIRBAL_2023:
        given = zip(rows["label"].to_pylist(), rows["prediction"].to_pylist(), answer.to_pylist(), strict=True)
        answers = [None if wrong else one for one, wrong in zip(given, has_error.tolist(), strict=True)]
    return Block(
        group=number,
        flags=flags,
        score=np.where(has_error, np.nan, rows["score"].to_numpy()),
        row_id=rows["row_id"].combine_chunks(),
        instruction=context.tasks["definition"].take(group),
        input=rows["orig_input"].combine_chunks(),
        output=pc.fill_null(first_references(answer), ""),
        answers=answers,
    )


def first_references(lists: pa.ListArray) -> pa.Array:
    """The first reference of each row, null where there is none (pc.list_element raises there)."""
    offsets = lists.offsets.to_numpy()
    return lists.values.take(pa.array(offsets[:-1], mask=offsets[1:] == offsets[:-1]))
