"""One look at each candidate's text: what the selection needs, in 46 bytes a row."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from birbal_ray.mix import near
from birbal_ray.mix.allocation import BIRBAL_2023, LADDER_MAX_INPUT_WORDS, LADDER_MAX_WORDS
from birbal_ray.mix.config import MixConfig
from birbal_ray.mix.contamination import NgramIndex
from birbal_ray.mix.ladder_score import ladder_score
from birbal_ray.mix.rows import NATURAL_INSTRUCTIONS, OUTSIDE_ROWS, Bits, num_words
from birbal_ray.mix.scores import check_columns, check_score_file
from birbal_ray.ni.schema import hash_order
from birbal_ray.run import RunError

BATCH_ROWS = 4096
SCORE_COLUMNS = ["orig_input", "answer", "prediction", "row_id", "task", "label", "score", "error"]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Files that one Ray task reads, in order; row groups None means all. `source` None: scored rows."""

    number: int
    source: str | None
    files: tuple[tuple[str, tuple[int, ...] | None], ...]


@dataclass(frozen=True, slots=True)
class TaskText:
    """What a scored row takes from its task."""

    group: int
    definition: str
    license: str
    label: str | None
    in_family: bool


@dataclass(frozen=True, slots=True)
class Lookup:
    """Everything a look needs besides the rows. `tasks` by task name, `sources` by outside source name."""

    config: MixConfig
    tasks: Mapping[str, TaskText]
    sources: Mapping[str, TaskText]
    ngrams: NgramIndex | None


@dataclass(frozen=True, slots=True)
class Candidate:
    """One candidate's text, whichever kind of file it came from."""

    row_id: str
    source: str
    task: str
    text: TaskText
    instruction: str
    input: str
    output: str
    references: Sequence[str]
    prediction: str
    score: float | None
    license: str
    bits: int  # Bits, or-ed


FEATURES = pa.schema(
    [
        pa.field("chunk", pa.int32()),
        pa.field("row", pa.int32()),
        pa.field("group", pa.int32()),
        pa.field("row_hash", pa.uint64()),
        pa.field("shuffle_hash", pa.uint64()),
        pa.field("key", pa.uint64()),
        pa.field("score", pa.float64()),
        pa.field("ladder", pa.float64()),
        pa.field("bits", pa.uint16()),
    ]
)
NEAR_FEATURES = pa.schema(
    [*FEATURES, pa.field("instruction_hash", pa.uint64()), pa.field("signature", pa.binary(4 * near.NUM_HASHES))]
)


def features(chunk: Chunk, lookup: Lookup) -> Iterator[pa.Table]:
    """FEATURES tables (NEAR_FEATURES when near-duplicates are sought) of a chunk, rows in file order."""
    start = 0
    for batch in candidates(chunk, lookup):
        yield _features(chunk.number, start, batch, lookup)
        start += len(batch)


def candidates(chunk: Chunk, lookup: Lookup) -> Iterator[list[Candidate]]:
    """The chunk's rows, a batch at a time. Raises RunError for a damaged file or an unknown task."""
    columns = SCORE_COLUMNS if chunk.source is None else OUTSIDE_ROWS.names
    for path, batch in read_batches(chunk, columns):
        if chunk.source is None:
            yield [_scored(row, lookup, path) for row in batch.to_pylist()]
        else:
            text = lookup.sources[chunk.source]
            yield [_outside(row, text, chunk.source, lookup.config) for row in batch.to_pylist()]


def read_batches(chunk: Chunk, columns: list[str]) -> Iterator[tuple[Path, pa.RecordBatch]]:
    """Batches of the chunk's files, always cut alike. Raises RunError for a damaged file or another layout."""
    for name, row_groups in chunk.files:
        path = Path(name)
        try:
            with pq.ParquetFile(path) as file:
                if chunk.source is None:
                    check_score_file(path, file.schema_arrow, columns)
                else:
                    check_columns(path, file.schema_arrow, OUTSIDE_ROWS)
                for batch in file.iter_batches(BATCH_ROWS, row_groups=row_groups, columns=columns):
                    yield path, batch
        except (pa.ArrowInvalid, OSError) as error:
            reason = " ".join(str(error).split())
            raise RunError(f"{path}: not a readable Parquet file ({reason}); rerun the step that wrote it") from None


def hash64(text: str) -> int:
    """The first 64 bits of the text's BLAKE2b; two texts of a million agree by accident once in 4·10^7 runs."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def row_hash(row_id: str, seed: int) -> int:
    """The order inside a task: the project's hash order of (seed, row_id)."""
    return int.from_bytes(hash_order(row_id, seed), "big")


def shuffle_hash(row_id: str, seed: int) -> int:
    """The order of the mix. Apart from `row_hash`, or the rows of the most thinned-out tasks would come first."""
    return int.from_bytes(hash_order(f"shuffle\x1f{row_id}", seed), "big")


def repeat_key(instruction: str, text: str, key: str) -> int:
    """Equal for rows that repeat each other under the dedup key."""
    return hash64(text if key == "input" else f"{instruction}\x1f{text}")


def _features(number: int, start: int, batch: list[Candidate], lookup: Lookup) -> pa.Table:
    config, count = lookup.config, len(batch)
    seed, key = config.seed, config.dedup_key
    bits = np.array([c.bits for c in batch], np.uint16)
    if lookup.ngrams is not None:
        bits[lookup.ngrams.overlaps([(c.input, c.output) for c in batch])] |= np.uint16(Bits.NGRAM)
    columns: dict[str, Any] = {
        "chunk": np.full(count, number, np.int32),
        "row": np.arange(start, start + count, dtype=np.int32),
        "group": np.array([c.text.group for c in batch], np.int32),
        "row_hash": np.array([row_hash(c.row_id, seed) for c in batch], np.uint64),
        "shuffle_hash": np.array([shuffle_hash(c.row_id, seed) for c in batch], np.uint64),
        "key": np.array([repeat_key(c.instruction, c.input, key) for c in batch], np.uint64),
        "score": np.array([math.nan if c.score is None else c.score for c in batch], np.float64),
        "ladder": np.array([_ladder(c, config) for c in batch], np.float64),
        "bits": bits,
    }
    if not config.dedup.near:
        return pa.table(columns, schema=FEATURES)
    columns["instruction_hash"] = np.array([hash64(c.instruction) for c in batch], np.uint64)
    table = near.signatures([c.input for c in batch])
    columns["signature"] = pa.array([row.tobytes() for row in table], pa.binary(4 * near.NUM_HASHES))
    return pa.table(columns, schema=NEAR_FEATURES)


def _ladder(candidate: Candidate, config: MixConfig) -> float:
    if config.policy != BIRBAL_2023 or candidate.text.label is None or candidate.bits & Bits.ERROR:
        return math.nan
    return ladder_score(candidate.text.label, candidate.prediction, candidate.references, config.compat)


def _scored(row: Mapping[str, Any], lookup: Lookup, path: Path) -> Candidate:
    text = lookup.tasks.get(row["task"])
    if text is None:
        raise RunError(f"{path}: task {row['task']!r} is not in the run's tasks.parquet; rerun `birbal score`")
    references = row["answer"]
    bits = _text_bits(text.definition, row["orig_input"], references[0] if references else "", lookup.config)
    if row["error"] is not None or not references or row["score"] is None:
        bits |= Bits.ERROR
    if len(references) > 1:
        bits |= Bits.SEVERAL_REFERENCES
    return Candidate(
        row["row_id"],
        NATURAL_INSTRUCTIONS,
        row["task"],
        text,
        text.definition,
        row["orig_input"],
        references[0] if references else "",
        references,
        row["prediction"],
        row["score"],
        text.license,
        bits | (Bits.FAMILY if text.in_family else 0),
    )


def _outside(row: Mapping[str, Any], text: TaskText, source: str, config: MixConfig) -> Candidate:
    bits = _text_bits(row["instruction"], row["input"], row["output"], config)
    if row["llm_written"]:
        bits |= Bits.LLM_WRITTEN
    if row["unwanted"]:
        bits |= Bits.SOURCE_FILTER
    return Candidate(
        row["row_id"],
        source,
        row["task"],
        text,
        row["instruction"],
        row["input"],
        row["output"],
        (),
        "",
        None,
        row["license"],
        bits | (Bits.FAMILY if text.in_family else 0),
    )


def _text_bits(instruction: str, text: str, output: str, config: MixConfig) -> int:
    bits = 0
    input_words = num_words(text)
    words = num_words(instruction) + input_words
    if words >= config.filters.max_words:
        bits |= Bits.TOO_LONG
    if words >= LADDER_MAX_WORDS:
        bits |= Bits.LADDER_TOO_LONG
    if input_words > LADDER_MAX_INPUT_WORDS:
        bits |= Bits.LADDER_LONG_INPUT
    if input_words <= config.filters.max_short_input_words:
        bits |= Bits.SHORT_INPUT
    if not output.strip():
        bits |= Bits.EMPTY_OUTPUT
    return bits
