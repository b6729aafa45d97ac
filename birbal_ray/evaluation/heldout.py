"""Which instances a mix never had in its hands."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from birbal_ray.mix.rows import NATURAL_INSTRUCTIONS
from birbal_ray.mix.write import AUDIT_FILE
from birbal_ray.ni.schema import text_key
from birbal_ray.run import read_manifest


@dataclass(frozen=True, slots=True)
class HeldOut:
    """`keys`: row ids and text keys to leave out. `sampled`: tasks of which the mix holds rows."""

    keys: frozenset[str]
    sampled: frozenset[str]

    def kind(self, task: str) -> str:
        """`instances` where other rows of the task were trained on, else `task`."""
        return "instances" if task in self.sampled else "task"


def held_out(mix: Path) -> HeldOut:
    """What the finished mix in `mix` leaves for an honest test. Raises RunError when it is none.

    Of a task that was sampled, every candidate is left out, not only the chosen rows: what was not
    chosen is what the base model got right, which would favour it (docs/decisions/0032). Rows of any
    task whose text was trained on under another id are left out too.
    """
    read_manifest(mix, "mix")
    sampled: set[str] = set()
    candidates: dict[str, list[str]] = {}
    for batch in _batches(mix / AUDIT_FILE, ["row_id", "source", "task", "kept"]):
        ours = batch.filter(pc.equal(batch["source"], NATURAL_INSTRUCTIONS))
        sampled |= set(ours.filter(ours["kept"])["task"].to_pylist())
        for task, row_id in zip(ours["task"].to_pylist(), ours["row_id"].to_pylist(), strict=True):
            candidates.setdefault(task, []).append(row_id)
    keys = {row_id for task in sampled for row_id in candidates[task]}
    for split in ("train", "eval"):
        for batch in _batches(mix / f"{split}.parquet", ["instruction", "input"]):
            texts = zip(batch["instruction"].to_pylist(), batch["input"].to_pylist(), strict=True)
            keys.update(text_key(instruction, text) for instruction, text in texts)
    return HeldOut(frozenset(keys), frozenset(sampled))


def _batches(file: Path, columns: list[str]) -> Iterator[pa.Table]:
    with pq.ParquetFile(file) as parquet:
        for batch in parquet.iter_batches(columns=columns):
            yield pa.Table.from_batches([batch])
