"""The files of a mix: written, and asked why a row is in or out, or how two mixes differ."""

from __future__ import annotations

import json
import os
from collections import Counter
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

from birbal_ray.manifest import fill_template, identity_differences, read_manifest
from birbal_ray.mix.allocation import BIRBAL_2023, TASK_SCORE
from birbal_ray.mix.features import Flags
from birbal_ray.mix.scores import read_batches, read_small
from birbal_ray.mix.select import BUCKETS, NO_DUPLICATE, Reason
from birbal_ray.ni.prompt import render_prompt
from birbal_ray.schemas import AUDIT, AUDIT_FILE, MIX_ROWS, MIX_TASKS, NATURAL_INSTRUCTIONS, RUN_FILE, TASKS_FILE
from birbal_ray.settings import ConfigError, nearest
from birbal_ray.storage import FileRecord, Folder, open_folder

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
                "question": pa.array(
                    [render_prompt(one, (), text, preamble=False) for one, text in pairs], pa.string()
                ),
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


def explain(mix: str | os.PathLike[str] | Folder, row_id: str) -> dict[str, Any]:
    """Why a candidate is in the mix or not: its audit record, the reason in words, its task's counts.

    Raises ConfigError when the folder is no mix or the row was no candidate, RunError when the mix is unfinished.
    """
    folder = open_folder(mix)
    manifest = read_manifest(folder, "mix")
    settings = manifest["identity"]["settings"]
    record = _find(folder, manifest, row_id)
    table = read_small(folder, manifest, TASKS_FILE, MIX_TASKS)
    tasks = {(row["source"], row["task"]): row for row in table.to_pylist()}
    if record is None:
        names = [name for _, name in tasks]
        wanted = row_id.rsplit(":", 1)[0]
        hint = "; row ids are {task}:{instance id}, see audit.parquet"
        raise ConfigError(
            f"{folder}: no candidate {row_id!r}"
            + (hint if wanted in names else f", and no task or source {wanted!r}{nearest(wanted, names)}")
        )
    # Outside sources have one line each, under the source's name.
    name = record["task"] if record["source"] == NATURAL_INSTRUCTIONS else record["source"]
    task = tasks[record["source"], name]
    other = _find(folder, manifest, record["duplicate_of"]) if record["duplicate_of"] is not None else None
    answer: dict[str, Any] = {
        **{name: record[name] for name in ("row_id", "kept", "split", "reason")},
        "why": _why(record, task, settings, other),
        **{name: record[name] for name in ("source", "task", "label", "score")},
        "task_score": task["task_score"],
        "bucket": record["bucket"],
        "policy": settings["policy"],
        "task_candidates": task["num_candidates"],
        "task_kept": task["num_kept"],
        "contamination": record["contamination"],
    }
    return answer | ({"note": task["note"]} if task["note"] else {}) | ({"repeats": other["row_id"]} if other else {})


def diff(a: str | os.PathLike[str] | Folder, b: str | os.PathLike[str] | Folder) -> dict[str, Any]:
    """How two finished mixes differ: settings, rows in both and in one only, per source, per task.

    `tasks` holds only the tasks whose counts differ, largest difference first.
    """
    folders = [open_folder(place) for place in (a, b)]
    kept = []
    for folder in folders:
        tables = read_audit(folder, read_manifest(folder, "mix"), ["row_id", "source", "task", "kept"])
        kept.append(pa.concat_tables(table.filter(table["kept"]) for table in tables))
    both = pc.sum(pc.is_in(kept[0]["row_id"], kept[1]["row_id"])).as_py() or 0
    num_a, num_b = map(len, kept)
    changed = [row for row in _count_rows(kept, "source", "task") if row["difference"]]
    return {
        "settings": identity_differences(*(folder.read_json(RUN_FILE) for folder in folders)),
        "rows": {"a": num_a, "b": num_b, "in_both": both, "only_a": num_a - both, "only_b": num_b - both},
        "sources": _count_rows(kept, "source"),
        "tasks": sorted(changed, key=lambda row: (-abs(row["difference"]), row["source"], row["task"])),
    }


def read_audit(folder: Folder, manifest: Mapping[str, Any], columns: Sequence[str] = AUDIT.names) -> Iterator[pa.Table]:
    """Columns of a finished mix's audit, as `read_batches` reads them."""
    return read_batches(folder, AUDIT_FILE, AUDIT, columns, manifest["files"][AUDIT_FILE]["sha256"])


def _count_rows(kept: Sequence[pa.Table], *columns: str) -> list[dict[str, Any]]:
    """For each value of the columns: the rows of the first and of the second table, and how many more these are."""
    ours, theirs = (Counter(zip(*(table[name].to_pylist() for name in columns), strict=True)) for table in kept)
    return [
        dict(zip(columns, key, strict=True)) | {"a": ours[key], "b": theirs[key], "difference": theirs[key] - ours[key]}
        for key in sorted(ours.keys() | theirs.keys())
    ]


def _find(folder: Folder, manifest: Mapping[str, Any], row_id: str) -> dict[str, Any] | None:
    for table in read_audit(folder, manifest):
        for row in table.filter(pc.equal(table["row_id"], row_id)).to_pylist():
            return dict(row)
    return None


def _why(
    record: Mapping[str, Any], task: Mapping[str, Any], settings: Mapping[str, Any], other: Mapping[str, Any] | None
) -> str:
    reason = Reason[record["reason"].upper()]
    text = reason.text
    share = f"{task['num_allocated']:,} of {task['num_usable']:,} usable rows"
    if reason is Reason.KEPT and record["source"] != NATURAL_INSTRUCTIONS:
        return f"{text}: one of the first {share} of its source in hash order"
    if reason is Reason.KEPT and settings["policy"] == BIRBAL_2023:
        return f"{text}: drawn from {record['bucket']} of its task ({share})"
    if reason is Reason.KEPT and settings["policy"] == TASK_SCORE:
        order = "failed rows first" if settings["task_score"].get("failed_first", True) else "in hash order"
        answered = "the model failed this one" if record["bucket"] == "failed" else "the model did not fail this one"
        return f"{text}: its task (score {task['task_score']:.3f}) was allocated {share}, {order}; {answered}"
    if reason is Reason.KEPT:
        return f"{text}: its task was allocated {share} ({settings['policy']}), in hash order"
    if reason in (Reason.OVER_ALLOCATION, Reason.OVER_CAP, Reason.NOT_DRAWN, Reason.OVER_SOURCE_LIMIT):
        return f"{text}: {share} of {task['task']}" + (f" ({task['note']})" if task["note"] else "")
    if other is not None:
        return f"{text}: {other['row_id']} ({'kept' if other['kept'] else 'dropped: ' + other['reason']})"
    return text
