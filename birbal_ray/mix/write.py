"""The files of a mix, its card among them, written batch by batch in the mix's order, straight to the run folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from json.encoder import encode_basestring as quoted
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from birbal_ray.manifest import fill_template
from birbal_ray.mix.rows import AUDIT, AUDIT_FILE, BUCKETS, MIX_ROWS, NATURAL_INSTRUCTIONS, Flags, Reason, question_of
from birbal_ray.mix.select import NO_DUPLICATE
from birbal_ray.schemas import TASKS_FILE
from birbal_ray.storage import FileRecord, Folder

if TYPE_CHECKING:
    from birbal_ray.mix.plan import MixPlan

SPLITS = ("train", "eval")
VALIDATION = "validation"
CARD_FILE = "README.md"
ALPACA_FOLDER = "alpaca"
ALPACA_INFO, ALPACA_CARD = f"{ALPACA_FOLDER}/dataset_info.json", f"{ALPACA_FOLDER}/README.md"
# The Hub's names for sizes: rows below the number.
SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M", float("inf"): "1M<n<10M"}
BATCH_ROWS = 8192  # rows a Parquet row group; fixed, so that files don't depend on how rows arrive


def mix_files(splits: Sequence[str] = SPLITS) -> list[str]:
    """Relative paths of everything written here besides the small tables, cards and the manifest."""
    return [AUDIT_FILE, *(name for s in splits for name in (f"{s}.parquet", f"{s}.jsonl", f"{ALPACA_FOLDER}/{s}.json"))]


# Everything that a mix may hold beside the standard files of a run.
OWN_FILES = (*mix_files((*SPLITS, VALIDATION)), TASKS_FILE, CARD_FILE, ALPACA_INFO, ALPACA_CARD, ".work/*")


def write_mix(
    plan: MixPlan, texts: Iterator[pa.Table], folder: Folder, report: Callable[[str], None] = lambda text: None
) -> tuple[dict[str, FileRecord], dict[str, set[str]]]:
    """Write the audit, and the rows of `texts` (TEXTS in rank order, BATCH_ROWS at a time) to their splits.

    All files appear together at the end, none after an exception. Returns the files with their hashes, and
    source → the licences of its rows.
    """
    licenses: dict[str, set[str]] = {}
    config, view = plan.context.config, _View(plan)
    splits = (*SPLITS, VALIDATION) if config.validation_rows_per_task else SPLITS
    with ExitStack() as stack:
        sinks = {name: stack.enter_context(folder.writer(name)) for name in mix_files(splits)}

        def parquet(name: str, schema: pa.Schema) -> pq.ParquetWriter:
            return stack.enter_context(pq.ParquetWriter(sinks[name], schema, compression="zstd"))

        audit = parquet(AUDIT_FILE, AUDIT)
        files = {s: parquet(f"{s}.parquet", MIX_ROWS) for s in splits}
        lines = {s: sinks[f"{s}.jsonl"] for s in splits}
        alpaca = {s: sinks[f"{ALPACA_FOLDER}/{s}.json"] for s in splits}
        for sink in alpaca.values():
            sink.write(b"[")
        for table in texts:
            rank = table["rank"].to_numpy()
            for split, first, end in view.split_ranges:
                start, stop = np.searchsorted(rank, [first, end]).tolist()  # the ranks of [first, end) in this table
                part = table.slice(start, stop - start)
                if len(part):
                    rows = _mix_rows(part, view, VALIDATION if split == VALIDATION else config.policy)
                    files[split].write_table(rows, row_group_size=BATCH_ROWS)
                    text = (rows[name].to_pylist() for name in ("instruction", "input", "output", "question"))
                    quadruples = [tuple(map(quoted, one)) for one in zip(*text, strict=True)]
                    pairs = [f'{{"question": {q}, "answer": {o}}}\n' for _, _, o, q in quadruples]
                    lines[split].write("".join(pairs).encode())
                    records = [f'{{"instruction": {i}, "input": {x}, "output": {o}}}' for i, x, o, _ in quadruples]
                    separator = "\n" if part["rank"][0].as_py() == first else ",\n"
                    alpaca[split].write((separator + ",\n".join(records)).encode())
                    for source, license in set(
                        zip(rows["source"].to_pylist(), rows["license"].to_pylist(), strict=True)
                    ):
                        licenses.setdefault(source, set()).add(license)
        for sink in alpaca.values():
            sink.write(b"\n]\n")
        for start in range(0, len(plan.candidates), BATCH_ROWS):
            audit.write_table(view.audit(start, start + BATCH_ROWS), row_group_size=BATCH_ROWS)
            report(f"wrote {start:,} of {len(plan.candidates):,} audit rows")
    written = {name: sink.record for name, sink in sinks.items()}
    # LLaMA-Factory finds datasets through this file; its default column names are the alpaca ones.
    columns = {"prompt": "question", "response": "answer"}
    info: dict[str, Any] = {f"birbal_mix_{s}": {"file_name": f"{s}.json"} for s in splits}
    info |= {f"birbal_text_{s}": {"file_name": f"../{s}.jsonl", "columns": columns} for s in splits}
    written[ALPACA_INFO] = folder.write_json(ALPACA_INFO, info)
    # Checked against axolotl's user_defined.py and LLaMA-Factory's template.py; see docs/decisions.
    written[ALPACA_CARD] = folder.write_bytes(ALPACA_CARD, Path(__file__).with_name("alpaca.md").read_bytes())
    return written, licenses


def dataset_card(manifest: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """README.md: front matter that `datasets.load_dataset` reads, then what the mix is made of.

    Holds nothing that differs between two runs on the same inputs.
    """
    rows = manifest["rows"]
    values = {
        **manifest,
        "size": next(name for limit, name in SIZES.items() if rows["kept"] < limit),
        "left_out": [
            {"reason": name, "rows": count, "meaning": Reason[name.upper()].text}
            for name, count in rows["dropped"].items()
        ],
        "columns": MIX_ROWS.names,
        "settings": settings,
        "settings_json": json.dumps(settings, indent=1, ensure_ascii=False),
    }
    return fill_template(Path(__file__).with_name("card.md.j2"), values, cell=_cell)


class _View:
    """The plan by rank: a row's rank is its place in the audit, its candidate index its place in the plan's arrays."""

    def __init__(self, plan: MixPlan) -> None:
        self.plan, decided, groups = plan, plan.decisions, plan.context.groups
        self.order = np.empty(len(plan.candidates), np.int64)  # rank → candidate index
        self.order[decided.rank] = np.arange(len(self.order))
        self.split_ranges = (
            ("train", 0, plan.num_train),
            ("eval", plan.num_train, decided.num_kept),
            (VALIDATION, decided.num_kept, plan.num_texts),
        )
        self.sources = pa.array([group.source for group in groups], pa.string())
        self.labels = pa.array([group.label for group in groups], pa.string())
        self.names = pa.array([group.name for group in groups], pa.string())
        self.families = [",".join(group.families) for group in groups]

    def audit(self, start: int, end: int) -> pa.Table:
        """The AUDIT rows of ranks start to end."""
        plan, decided = self.plan, self.plan.decisions
        row = self.order[start:end]
        rank = np.arange(start, start + len(row))
        other = decided.duplicate_of[row]
        split = np.searchsorted([last for *_, last in self.split_ranges], rank, side="right")
        return (
            pa.table(
                {
                    **self.columns(row),
                    "label": self.labels.take(pa.array(plan.candidates.group[row])),
                    "kept": decided.reason[row] == Reason.KEPT,
                    "reason": _named([reason.word for reason in Reason], decided.reason[row]),
                    "bucket": _named(BUCKETS, decided.bucket[row]),
                    "split": _named([name for name, *_ in self.split_ranges], split, split == len(self.split_ranges)),
                    "contamination": self._contamination(row),
                    "duplicate_of": plan.row_ids.take(pa.array(other, mask=other == NO_DUPLICATE)).cast(pa.string()),
                }
            )
            .select(AUDIT.names)
            .cast(AUDIT)
        )

    def columns(self, row: NDArray[np.int64]) -> dict[str, Any]:
        """What the audit and the mix both say of candidates `row`."""
        plan = self.plan
        group, score = pa.array(plan.candidates.group[row]), plan.candidates.score[row]
        return {
            "row_id": plan.row_ids.take(pa.array(row)).cast(pa.string()),
            "source": self.sources.take(group),
            "task": pc.coalesce(plan.subtasks.take(pa.array(row)).cast(pa.string()), self.names.take(group)),
            "score": pa.array(score, mask=np.isnan(score)),
        }

    def _contamination(self, rows: NDArray[np.int64]) -> pa.Array:
        flags, group = self.plan.candidates.flags[rows], self.plan.candidates.group[rows]
        found: list[str | None] = [None] * len(rows)
        for place in np.flatnonzero((flags & np.uint16(Flags.FAMILY | Flags.NGRAM)) != 0):
            parts = [f"family:{self.families[group[place]]}"] if flags[place] & Flags.FAMILY else []
            found[place] = ";".join([*parts, *(["ngram"] if flags[place] & Flags.NGRAM else [])])
        return pa.array(found, pa.string())


def _mix_rows(texts: pa.Table, view: _View, policy: str) -> pa.Table:
    row = view.order[texts["rank"].to_numpy()]
    columns = view.columns(row)
    pairs = zip(texts["instruction"].to_pylist(), texts["input"].to_pylist(), strict=True)
    is_ours = pc.or_(pc.equal(columns["source"], NATURAL_INSTRUCTIONS), policy == VALIDATION)
    chooser = pc.if_else(is_ours, policy, columns["source"])
    buckets = _named(BUCKETS, view.plan.decisions.bucket[row])
    return (
        pa.table(
            {
                **columns,
                **{name: texts[name] for name in ("instruction", "input", "output", "license")},
                "question": pa.array([question_of(*pair) for pair in pairs], pa.string()),
                "answer": texts["output"],
                "selected_by": pc.binary_join_element_wise(chooser, buckets, ":"),
            }
        )
        .select(MIX_ROWS.names)
        .cast(MIX_ROWS)
    )


def _named(names: Sequence[str], codes: NDArray[Any], is_missing: NDArray[np.bool_] | None = None) -> pa.Array:
    return pa.array(list(names), pa.string()).take(pa.array(codes, mask=is_missing))


def _cell(value: Any) -> str:
    """A value in a Markdown table, which can't hold every sign."""
    if value is None:
        return ""
    text = f"{value:,}" if isinstance(value, int) else f"{value:.1%}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
