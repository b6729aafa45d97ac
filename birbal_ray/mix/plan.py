"""A mix that is decided but not written: inputs, candidates, decisions, and what is said about them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from birbal_ray.mix import dedup, reading
from birbal_ray.mix.allocation import TASK_SCORE, train_size
from birbal_ray.mix.config import MixConfig
from birbal_ray.mix.contamination import build_index, chosen_families, families_of
from birbal_ray.mix.datasets import Origin, read_source
from birbal_ray.mix.features import NEAR_FEATURES
from birbal_ray.mix.reading import Chunk, Context
from birbal_ray.mix.rows import NATURAL_INSTRUCTIONS, Flags, Reason
from birbal_ray.mix.scores import AGAIN, ScoreFolder
from birbal_ray.mix.select import Candidates, Decisions, Group, decide
from birbal_ray.settings import ConfigError
from birbal_ray.storage import RunError

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class MixPlan:
    """Everything that writing needs, and what a dry run prints. Chunk k holds candidates offsets[k] to offsets[k + 1].

    `row_ids` and `subtasks` (the task of an outside row, else null) have shape (candidates,). The
    `outside_files` hold the rows of one source each and follow the chunks in `offsets`.
    """

    context: Context
    chunks: tuple[Chunk, ...]
    outside_files: tuple[Path, ...]
    offsets: NDArray[np.int64]
    candidates: Candidates
    row_ids: pa.Array
    subtasks: pa.Array
    decisions: Decisions
    num_train: int

    def read_texts(self) -> Iterator[pa.Table]:
        """TEXTS of all rows of a split, in file order: the second reading, of the files that hold any."""
        num_texts = self.decisions.num_kept + self.decisions.num_validation
        ranks = np.where(self.decisions.rank < num_texts, self.decisions.rank, -1).astype(np.int32)
        parts = [ranks[start:end] for start, end in zip(self.offsets[:-1], self.offsets[1:], strict=True)]
        chunks = [(chunk, part) for chunk, part in zip(self.chunks, parts, strict=False) if (part >= 0).any()]
        yield from reading.run_in_order(reading.read_chunk_texts, chunks, self.context)
        for file, part in zip(self.outside_files, parts[len(self.chunks) :], strict=True):
            if (part >= 0).any():
                yield from reading.read_outside_texts(file, part)

    def dropped(self) -> dict[str, int]:
        """Candidates not kept, by reason, most first."""
        counts = np.bincount(self.decisions.reason, minlength=len(Reason))
        found = {reason.word: int(n) for reason, n in zip(Reason, counts, strict=True) if n and reason != Reason.KEPT}
        return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))

    def task_table(self) -> list[dict[str, Any]]:
        """MIX_TASKS rows: every task, then every outside source."""
        candidates = self._per_group(np.ones(len(self.candidates), bool))
        kept = self._per_group(self.decisions.reason == Reason.KEPT)
        notes = self.notes()
        return [
            {
                "source": group.source,
                "task": group.name,
                "label": group.label,
                "task_score": group.task_score,
                "num_candidates": int(candidates[i]),
                "num_usable": int(self.decisions.usable[i]),
                "num_allocated": int(self.decisions.allocated[i]),
                "num_kept": int(kept[i]),
                "note": notes.get(group.name) if group.source == NATURAL_INSTRUCTIONS else None,
            }
            for i, group in enumerate(self.context.groups)
        ]

    def composition(self) -> list[dict[str, Any]]:
        """One row per source and label: tasks, candidates, kept, train, eval, share of the mix."""
        kept = self.decisions.reason == Reason.KEPT
        train = self._per_group(kept & (self.decisions.rank < self.num_train))
        rows: dict[tuple[str, str], dict[str, Any]] = {}
        for number, task in enumerate(self.task_table()):
            row = rows.setdefault(
                (task["source"], task["label"] or ""),
                {"source": task["source"], "label": task["label"], "tasks": 0, "candidates": 0, "kept": 0, "train": 0},
            )
            row["tasks"] += 1
            row["candidates"] += task["num_candidates"]
            row["kept"] += task["num_kept"]
            row["train"] += int(train[number])
        total = max(1, self.decisions.num_kept)
        return [{**row, "eval": row["kept"] - row["train"], "share": row["kept"] / total} for row in rows.values()]

    def contaminated(self) -> dict[str, int]:
        """Candidates per finding: `family:{evaluation}` for each, `ngram`."""
        found: dict[str, int] = {}
        sizes = self._per_group(np.ones(len(self.candidates), bool))
        for number, group in enumerate(self.context.groups):
            for family in group.families:
                found[f"family:{family}"] = found.get(f"family:{family}", 0) + int(sizes[number])
        ngram = int(((self.candidates.flags & np.uint16(Flags.NGRAM)) != 0).sum())
        return dict(sorted(found.items())) | ({"ngram": ngram} if ngram else {})

    def shortfalls(self) -> dict[str, dict[str, Any]]:
        """Label → budget, rows given, and the tasks that could not give their share."""
        return {
            label: {
                "budget": a.budget,
                "allocated": a.budget - a.shortfall,
                "shortfall": a.shortfall,
                "short_tasks": [
                    {"task": t.name, "wanted": t.wanted, "candidates": t.num_candidates} for t in a.short_tasks
                ],
            }
            for label, a in self.decisions.allocations.items()
        }

    def notes(self) -> dict[str, str]:
        """Task → why the policy gave it less than its share: its metric, or scoring that stopped early."""
        notes = {}
        if self.context.config.policy == TASK_SCORE:
            notes = {g.name: f"no error-driven share: {g.unfit}" for g in self.context.groups if g.unfit}
        stopped = {task.name: task.stop_reason for task in self.context.scores.tasks if task.stop_reason}
        for allocation in self.decisions.allocations.values():
            for task in allocation.capped_tasks:
                if task.name in stopped:
                    notes[task.name] = (
                        f"its share was {task.wanted} rows, {task.num_candidates} can be drawn: scoring stopped "
                        f"({stopped[task.name]})"
                    )
        return dict(sorted(notes.items()))

    def _per_group(self, is_chosen: NDArray[np.bool_]) -> NDArray[np.int64]:
        return np.bincount(self.candidates.group[is_chosen], minlength=len(self.context.groups))


def plan_mix(context: Context, origins: Sequence[Origin], work: Path, report: Report = lambda text: None) -> MixPlan:
    """Read every candidate once and decide; `work` is a folder for files, needed until the mix is written.

    Ray must run, here and while the mix is written, unless `context.in_process`.
    Raises ConfigError (a source's columns, a budget that can't be met, nothing kept), RunError (damaged scores).
    """
    config, scores = context.config, context.scores
    chunks = reading.plan_chunks(scores.files, config.resources.chunk_mib << 20)
    collected = _Collected(work, config.dedup.near)
    for table in reading.run_in_order(reading.read_chunk_features, chunks, context):
        collected.add([table])
        report(f"read {collected.offsets[-1]:,} of {scores.num_rows:,} candidates")
    outside_files = []
    for number, (source, origin) in enumerate(zip(config.sources, origins, strict=True), len(scores.tasks)):
        report(f"reading source {source.name} ({origin.location})")
        outside_files.append(work / f"{source.name}.parquet")
        collected.add(reading.keep_outside_rows(read_source(source, origin), number, context, outside_files[-1]))
    candidates = Candidates(**{name: collected.take(name).to_numpy() for name in Candidates.__dataclass_fields__})
    # 64-bit offsets: the texts of all candidates together may be larger than 2 GiB.
    row_ids, subtasks = (collected.take(name).cast(pa.large_string()).combine_chunks() for name in ("row_id", "task"))
    _check_complete(candidates, row_ids, context)
    decisions = decide(candidates, context.groups, config, collected.near_duplicates(config.dedup.near_threshold))
    plan = MixPlan(
        context,
        tuple(chunks),
        tuple(outside_files),
        np.array(collected.offsets),
        candidates,
        row_ids,
        subtasks,
        decisions,
        train_size(decisions.num_kept, config.eval_fraction),
    )
    if not decisions.num_kept:
        dropped = ", ".join(f"{number:,} {reason}" for reason, number in plan.dropped().items())
        raise ConfigError(f"the mix would be empty: {len(candidates):,} candidates ({dropped}); raise the budgets")
    return plan


class _Collected:
    """Feature tables as they come, in the candidates' order; signatures go to a file (512 bytes a row)."""

    def __init__(self, work: Path, has_signatures: bool) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self.offsets = [0]
        self.tables: list[pa.Table] = []
        self.signatures = work / "signatures" if has_signatures else None
        if self.signatures:
            self.signatures.unlink(missing_ok=True)

    def add(self, tables: Iterator[pa.Table] | list[pa.Table]) -> None:
        """The tables of one chunk or source."""
        count = 0
        for table in tables:
            count += len(table)
            if self.signatures:
                with self.signatures.open("ab") as file:
                    for part in table["signature"].chunks:
                        file.write(part.buffers()[1].slice(4 * dedup.NUM_HASHES * part.offset)[: part.nbytes])
                table = table.drop_columns("signature")
            self.tables.append(table)
        self.offsets.append(self.offsets[-1] + count)

    def take(self, name: str) -> pa.ChunkedArray:
        """One column, shape (candidates,); it is dropped from the tables."""
        pieces = [piece for table in self.tables for piece in table[name].chunks]
        self.tables = [table.drop_columns(name) for table in self.tables]
        return pa.chunked_array(pieces, NEAR_FEATURES.field(name).type)

    def near_duplicates(self, threshold: float) -> Callable[[NDArray[np.int64]], dict[int, int]] | None:
        """`dedup.near_duplicates` of these candidates, None where none are sought."""
        if self.signatures is None:
            return None
        exact_key = self.take("exact_key").to_numpy()
        table = np.memmap(self.signatures, np.uint32, "r", shape=(len(exact_key), dedup.NUM_HASHES))
        return lambda order: dedup.near_duplicates(order, exact_key, table, threshold)


def make_context(config: MixConfig, scores: ScoreFolder) -> Context:
    """What both readings need. Raises ConfigError for an unknown evaluation or a file of evaluation texts."""
    families = chosen_families(config.contamination.evaluations, config.contamination.families)
    tasks = []
    for t in scores.tasks:
        found = families_of([t.name, *t.sources], families)
        tasks.append(Group(t.name, NATURAL_INSTRUCTIONS, t.label, t.task_score, families=found, unfit=t.unreachable))
    outside = [
        Group(s.name, s.name, max_rows=s.max_rows, families=families_of([s.name], families)) for s in config.sources
    ]
    files = config.contamination.files
    ngrams = build_index(files, config.contamination.ngram) if files else None
    per_task = [
        # The published scripts took the first letter of a definition that is a text.
        (t.name, t.label, t.license, t.definition[:1] if config.compat and t.definition_is_text else t.definition)
        for t in scores.tasks
    ]
    columns = [pa.array(list(column), pa.string()) for column in zip(*per_task, strict=True)]
    is_small = scores.num_bytes <= min(reading.KEPT_BYTES, config.resources.in_process_mib << 20)
    return Context(config, scores, (*tasks, *outside), ngrams, {} if is_small else None, *columns)


def _check_complete(rows: Candidates, row_ids: pa.Array, context: Context) -> None:
    scores = context.scores
    found = np.bincount(rows.group, minlength=len(context.groups))
    for number, task in enumerate(scores.tasks):
        if found[number] != task.num_instances:
            raise RunError(
                f"{scores.folder}: {found[number]} rows of task {task.name!r}, its task_scores.parquet says "
                f"{task.num_instances}; the folder is damaged or half copied, {AGAIN}"
            )
    order = np.argsort(rows.row_hash, kind="stable")
    same = np.flatnonzero(np.diff(rows.row_hash[order]) == 0)
    ids = row_ids.take(pa.array(order[same])).to_pylist(), row_ids.take(pa.array(order[same + 1])).to_pylist()
    repeated = [one for one, other in zip(*ids, strict=True) if one == other]
    if repeated:
        raise RunError(
            f"{scores.folder}: {len(repeated)} row ids occur twice, one of them in "
            f"{repeated[0].rpartition(':')[0]!r} ({repeated[0]}); {AGAIN}"
        )
