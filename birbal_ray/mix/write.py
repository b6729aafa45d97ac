"""The files of a mix, written row by row in the mix's order."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from birbal_ray.mix.config import MixConfig
from birbal_ray.mix.rows import AUDIT, MIX_ROWS, NATURAL_INSTRUCTIONS, question_of
from birbal_ray.run import RunError, write_json

SPLITS = ("train", "eval")
VALIDATION = "validation"
AUDIT_FILE = "audit.parquet"
TASKS_FILE = "tasks.parquet"
ALPACA_FOLDER = "alpaca"
WORK_FOLDER = ".work"
BATCH_ROWS = 8192  # rows a Parquet row group; fixed, so that files don't depend on how rows arrive


def splits_of(config: MixConfig) -> tuple[str, ...]:
    """The splits that a mix has."""
    return (*SPLITS, VALIDATION) if config.validation_rows_per_task else SPLITS


def mix_files(splits: Sequence[str] = SPLITS) -> list[str]:
    """Relative paths of everything written here besides the card and the manifest."""
    names = [AUDIT_FILE]
    for split in splits:
        names += [f"{split}.parquet", f"{split}.jsonl", f"{ALPACA_FOLDER}/{split}.json"]
    return names


class MixWriter:
    """Takes OUTCOMES tables in rank order; `close` makes all files appear, an exception leaves none.

    Tables must have BATCH_ROWS rows (the last may have fewer). Memory: one table.
    """

    def __init__(self, folder: Path, policy: str, splits: Sequence[str] = SPLITS) -> None:
        self.folder, self.policy, self.splits = folder, policy, splits
        self.num_rows = 0
        self.reasons: Counter[str] = Counter()
        self.split_rows: Counter[str] = Counter()
        self.licenses: dict[str, set[str]] = {}

    @contextmanager
    def writing(self) -> Iterator[MixWriter]:
        """Open the files under temporary names; rename them all at the end of a successful block."""
        work = self.folder / WORK_FOLDER / "out"
        (work / ALPACA_FOLDER).mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            self._audit = stack.enter_context(pq.ParquetWriter(work / AUDIT_FILE, AUDIT, compression="zstd"))
            self._parquet = {
                s: stack.enter_context(pq.ParquetWriter(work / f"{s}.parquet", MIX_ROWS, compression="zstd"))
                for s in self.splits
            }
            self._jsonl = {s: stack.enter_context(_text_file(work / f"{s}.jsonl")) for s in self.splits}
            self._alpaca = {s: stack.enter_context(_text_file(work / ALPACA_FOLDER / f"{s}.json")) for s in self.splits}
            for file in self._alpaca.values():
                file.write("[")
            yield self
            for file in self._alpaca.values():
                file.write("\n]\n")
        (self.folder / ALPACA_FOLDER).mkdir(exist_ok=True)
        for name in mix_files(self.splits):
            _sync(work / name)
            (work / name).replace(self.folder / name)
        write_json(self.folder / ALPACA_FOLDER / "dataset_info.json", _llama_factory_info(self.splits))

    def add(self, table: pa.Table) -> None:
        """Write one table. Raises RunError when its rows are not the next ones by rank."""
        ranks = table["rank"].to_numpy()
        if len(ranks) and (ranks[0] != self.num_rows or ranks[-1] != self.num_rows + len(ranks) - 1):
            raise RunError(
                f"{self.folder}: rows {ranks[0]} to {ranks[-1]} arrived where row {self.num_rows} was due; "
                "rerun the command (nothing was written)"
            )
        self.num_rows += len(ranks)
        self._audit.write_table(table.select(AUDIT.names).cast(AUDIT), row_group_size=BATCH_ROWS)
        self.reasons.update(table["reason"].to_pylist())
        for split in self.splits:
            rows = table.filter(pc.fill_null(pc.equal(table["split"], split), False)).to_pylist()
            if rows:
                self._write_split(split, rows)

    def _write_split(self, split: str, rows: list[dict[str, Any]]) -> None:
        full = [_mix_row(row, VALIDATION if split == VALIDATION else self.policy) for row in rows]
        self._parquet[split].write_table(pa.Table.from_pylist(full, schema=MIX_ROWS), row_group_size=BATCH_ROWS)
        self._jsonl[split].writelines(_line({"question": r["question"], "answer": r["answer"]}) + "\n" for r in full)
        for number, row in enumerate(full, self.split_rows[split]):
            record = {name: row[name] for name in ("instruction", "input", "output")}
            self._alpaca[split].write(("," if number else "") + "\n" + _line(record))
        self.split_rows[split] += len(full)
        for row in full:
            self.licenses.setdefault(row["source"], set()).add(row["license"])


def _mix_row(row: Mapping[str, Any], policy: str) -> dict[str, Any]:
    chooser = policy if row["source"] == NATURAL_INSTRUCTIONS or policy == VALIDATION else row["source"]
    return {
        "instruction": row["instruction"],
        "input": row["input"],
        "output": row["output"],
        "question": question_of(row["instruction"], row["input"]),
        "answer": row["output"],
        "source": row["source"],
        "task": row["task"],
        "row_id": row["row_id"],
        "score": row["score"],
        "selected_by": f"{chooser}:{row['bucket']}",
        "license": row["license"],
    }


def _line(record: Mapping[str, str]) -> str:
    return json.dumps(record, ensure_ascii=False)


def _text_file(path: Path) -> IO[str]:
    return path.open("w", encoding="utf-8", newline="\n")


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _llama_factory_info(splits: Sequence[str]) -> dict[str, Any]:
    # LLaMA-Factory finds datasets through this file; its default column names are the alpaca ones.
    return {f"birbal_mix_{split}": {"file_name": f"{split}.json"} for split in splits}
