"""What became of each candidate: texts from the workers, decisions from the driver, joined by rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from birbal_ray.mix.candidates import NO_TWIN, Candidates, Decisions, Group
from birbal_ray.mix.look import Chunk, Lookup, read_batches
from birbal_ray.mix.rows import AUDIT, BUCKETS, NATURAL_INSTRUCTIONS, OUTSIDE_ROWS, Bits, Reason

SCORE_COLUMNS = ["orig_input", "answer", "row_id"]
SPLITS = ("train", "eval", "validation")

# What a worker reads for each candidate. Texts are null for rows of no split, and what follows from a
# scored row's task is left to the driver, so that little has to be sorted.
TEXTS = pa.schema(
    [
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("row_id", pa.string(), nullable=False),
        pa.field("task", pa.string()),  # this and the next: outside rows only
        pa.field("instruction", pa.string()),
        pa.field("license", pa.string()),
        pa.field("input", pa.string()),
        pa.field("output", pa.string()),
    ]
)

# The audit's columns, the row's place in it, and the text of rows of a split.
OUTCOMES = pa.schema(
    [
        pa.field("rank", pa.int64(), nullable=False),
        *AUDIT,
        pa.field("instruction", pa.string()),
        pa.field("input", pa.string()),
        pa.field("output", pa.string()),
        pa.field("license", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class Places:
    """Each candidate's rank, in the order of the files: chunk k holds rows offsets[k] to offsets[k + 1]."""

    offsets: NDArray[np.int64]
    rank: NDArray[np.int32]
    num_texts: int  # the first so many ranks need their texts


def texts(chunk: Chunk, places: Places) -> Iterator[pa.Table]:
    """TEXTS tables of a chunk, rows in file order."""
    start = int(places.offsets[chunk.number])
    scored = chunk.source is None
    for _, batch in read_batches(chunk, SCORE_COLUMNS if scored else OUTSIDE_ROWS.names):
        rank = places.rank[start : start + len(batch)]
        kept = pa.array(rank < places.num_texts)
        nothing = pa.nulls(len(batch), pa.string())
        columns = {
            "rank": pa.array(rank),
            "row_id": batch["row_id"],
            "task": nothing if scored else batch["task"],
            "instruction": nothing if scored else _where(kept, batch["instruction"]),
            "license": nothing if scored else _where(kept, batch["license"]),
            "input": _where(kept, batch["orig_input" if scored else "input"]),
            "output": _where(kept, _first(batch["answer"]) if scored else batch["output"]),
        }
        yield pa.table(columns, schema=TEXTS)
        start += len(batch)


class Outcomes:
    """Completes TEXTS tables, which come in rank order, to OUTCOMES tables."""

    def __init__(
        self, decisions: Decisions, rows: Candidates, groups: Sequence[Group], lookup: Lookup, num_train: int
    ) -> None:
        self.decisions, self.rows, self.num_train = decisions, rows, num_train
        self.order = np.empty(len(rows), np.int32)
        self.order[decisions.rank] = np.arange(len(rows), dtype=np.int32)
        self.families = [",".join(group.families) for group in groups]
        self.sources = pa.array([group.source for group in groups], pa.string())
        self.labels = pa.array([group.label for group in groups], pa.string())
        scored = [group.source == NATURAL_INSTRUCTIONS for group in groups]
        self.tasks = pa.array([g.name if s else None for g, s in zip(groups, scored, strict=True)], pa.string())
        known = {text.group: text for text in lookup.tasks.values()}
        known_texts = [known.get(number) for number in range(len(groups))]
        self.definitions = pa.array([t.definition if t else None for t in known_texts], pa.string())
        self.licenses = pa.array([t.license if t else None for t in known_texts], pa.string())

    def complete(self, table: pa.Table) -> pa.Table:
        """The OUTCOMES rows of one TEXTS table."""
        decided = self.decisions
        rank = table["rank"].to_numpy()
        row = self.order[rank]
        number = pa.array(self.rows.group[row])
        reason, score, twin = decided.reason[row], self.rows.score[row], decided.twin[row]
        kept = reason == Reason.KEPT
        split = np.where(kept, (rank >= self.num_train).astype(np.int8), SPLITS.index("validation"))
        in_split = kept | (reason == Reason.VALIDATION)
        has_text = pa.array(in_split)
        return pa.table(
            {
                "rank": rank.astype(np.int64),
                "row_id": table["row_id"],
                "source": self.sources.take(number),
                "task": pc.coalesce(table["task"], self.tasks.take(number)),
                "label": self.labels.take(number),
                "score": pa.array(score, mask=np.isnan(score)),
                "kept": kept,
                "reason": _named([reason.word for reason in Reason], reason),
                "bucket": _named(BUCKETS, decided.bucket[row]),
                "split": _named(SPLITS, split, ~in_split),
                "contamination": self._contamination(row),
                "row_hash": self.rows.row_hash[row],
                "twin_hash": pa.array(self.rows.row_hash[np.maximum(twin, 0)], mask=twin == NO_TWIN),
                "instruction": pc.coalesce(table["instruction"], _where(has_text, self.definitions.take(number))),
                "input": table["input"],
                "output": table["output"],
                "license": pc.coalesce(table["license"], _where(has_text, self.licenses.take(number))),
            }
        ).cast(OUTCOMES)

    def _contamination(self, rows: NDArray[np.int32]) -> pa.Array:
        bits, group = self.rows.bits[rows], self.rows.group[rows]
        found: list[str | None] = [None] * len(rows)
        for place in np.flatnonzero((bits & (Bits.FAMILY | Bits.NGRAM)) != 0):
            parts = [f"family:{self.families[group[place]]}"] if bits[place] & Bits.FAMILY else []
            found[place] = ";".join([*parts, *(["ngram"] if bits[place] & Bits.NGRAM else [])])
        return pa.array(found, pa.string())


def _where(kept: pa.Array, values: Any) -> Any:
    return pc.if_else(kept, values, pa.scalar(None, pa.string()))


def _named(names: Sequence[str], codes: NDArray[Any], missing: NDArray[np.bool_] | None = None) -> pa.Array:
    return pa.array(list(names), pa.string()).take(pa.array(codes, mask=missing))


def _first(lists: pa.ListArray) -> pa.Array:
    # The first reference; null where there is none (such a row is never kept).
    offsets = lists.offsets.to_numpy()
    return lists.values.take(pa.array(offsets[:-1], mask=offsets[1:] == offsets[:-1]))
