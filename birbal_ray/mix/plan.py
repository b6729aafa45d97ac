"""A mix that is decided but not written: inputs, candidates, decisions, and what is said about them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from birbal_ray.mix import reading
from birbal_ray.mix.allocation import TASK_SCORE, train_size
from birbal_ray.mix.config import MixConfig
from birbal_ray.mix.features import NUM_HASHES, Flags, build_index, families_of, near_duplicates
from birbal_ray.mix.reading import Chunk, Context
from birbal_ray.mix.scores import ScoreFolder
from birbal_ray.mix.select import Candidates, Decisions, Group, Reason, decide
from birbal_ray.mix.sources import Origin, read_source, read_texts
from birbal_ray.schemas import NATURAL_INSTRUCTIONS
from birbal_ray.settings import ConfigError

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

    @property
    def num_train(self) -> int:
        """Kept rows of the train split, the first in the mix's order; the others are for evaluation."""
        return train_size(self.decisions.num_kept, self.context.config.eval_fraction)

    @property
    def num_texts(self) -> int:
        """Rows of all splits."""
        return self.decisions.num_kept + self.decisions.num_validation

    def read_texts(self) -> Iterator[pa.Table]:
        """TEXTS of all rows of a split, in file order: the second reading, of the files that hold any."""
        ranks = np.where(self.decisions.rank < self.num_texts, self.decisions.rank, -1).astype(np.int32)
        parts = [ranks[start:end] for start, end in zip(self.offsets[:-1], self.offsets[1:], strict=True)]
        chunks = [(chunk, part) for chunk, part in zip(self.chunks, parts, strict=False) if (part >= 0).any()]
        yield from reading.run_in_order(reading.read_chunk_texts, chunks, self.context)
        for file, part in zip(self.outside_files, parts[len(self.chunks) :], strict=True):
            if (part >= 0).any():
                yield from reading.read_outside_texts(file, part)

    def dropped(self, group: int | None = None) -> dict[str, int]:
        """Candidates not kept, of all or of one group, by reason, most first."""
        reasons = self.decisions.reason if group is None else self.decisions.reason[self.candidates.group == group]
        counts = np.bincount(reasons, minlength=len(Reason))
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
                "note": notes.get(group.name),
            }
            for i, group in enumerate(self.context.groups)
        ]

    def composition(self) -> list[dict[str, Any]]:
        """One row per source and label: tasks, candidates, kept, train, eval, share of the mix."""
        kept = self.decisions.reason == Reason.KEPT
        is_counted = {
            "candidates": np.ones(len(kept), bool),
            "kept": kept,
            "train": kept & (self.decisions.rank < self.num_train),
        }
        counts = {name: self._per_group(is_one) for name, is_one in is_counted.items()}
        rows: dict[tuple[str, str | None], Counter[str]] = {}
        for number, group in enumerate(self.context.groups):
            row = rows.setdefault((group.source, group.label), Counter())
            row.update({"tasks": 1, **{name: int(per_group[number]) for name, per_group in counts.items()}})
        total = max(1, self.decisions.num_kept)
        return [
            {"source": source, "label": label, **row, "eval": row["kept"] - row["train"], "share": row["kept"] / total}
            for (source, label), row in rows.items()
        ]

    def contaminated(self) -> dict[str, int]:
        """Candidates per finding: `family:{evaluation}` for each, `ngram`."""
        found: Counter[str] = Counter()
        for group, size in zip(self.context.groups, self._per_group(np.ones(len(self.candidates), bool)), strict=True):
            found.update({f"family:{family}": int(size) for family in group.families})
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
        """Task → why the policy gave it less than its share: its metric, or scoring that stopped early.

        Source → why none of its rows is in the mix.
        """
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
        is_kept = self._per_group(self.decisions.reason == Reason.KEPT)
        for number, group in enumerate(self.context.groups):
            if group.label is None and not is_kept[number]:
                why = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped(number).items())
                notes[group.name] = f"none of its rows is in the mix ({why or 'it has none'})"
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
    outside_files = [work / f"{source.name}.parquet" for source in config.sources]
    work.mkdir(parents=True, exist_ok=True)
    features: list[pa.Table] = []  # in the candidates' order
    offsets = [0]  # where each chunk, and then each outside file, ends
    with (work / "signatures").open("wb") as signatures:  # 512 bytes a row

        def add(tables: Iterable[pa.Table]) -> None:
            for table in tables:
                if config.dedup.near:
                    signatures.write(b"".join(table["signature"].to_pylist()))
                    table = table.drop_columns("signature")
                features.append(table)
            offsets.append(sum(map(len, features)))

        for table in reading.run_in_order(reading.read_chunk_features, chunks, context):
            add([table])
            report(f"read {offsets[-1]:,} of {scores.num_rows:,} candidates")
        outside = zip(config.sources, origins, outside_files, strict=True)
        for number, (source, origin, file) in enumerate(outside, len(scores.tasks)):
            report(f"reading source {source.name} ({origin.location})")
            add(reading.keep_outside_rows(read_source(source, origin), number, context, file))
    columns = pa.concat_tables(features)
    candidates = Candidates(**{name: columns[name].to_numpy() for name in Candidates.__dataclass_fields__})
    # 64-bit offsets: the texts of all candidates together may be larger than 2 GiB.
    row_ids, subtasks = (columns[name].cast(pa.large_string()).combine_chunks() for name in ("row_id", "task"))
    near = None
    if config.dedup.near:
        table = np.memmap(work / "signatures", np.uint32, "r", shape=(len(candidates), NUM_HASHES))
        exact_key, threshold = columns["exact_key"].to_numpy(), config.dedup.near_threshold
        near = partial(near_duplicates, exact_key=exact_key, table=table, threshold=threshold)
    decisions = decide(candidates, context.groups, config, near)
    plan = MixPlan(
        context, tuple(chunks), tuple(outside_files), np.array(offsets), candidates, row_ids, subtasks, decisions
    )
    if not decisions.num_kept:
        found = plan.dropped()
        dropped = ", ".join(f"{number:,} {reason}" for reason, number in found.items())
        cure = {"short_input": "lower filters.max_short_input_words", "too_long": "raise filters.max_words"}
        advice = cure.get(next(iter(found), ""), "raise the budgets")
        raise ConfigError(f"the mix would be empty: {len(candidates):,} candidates ({dropped}); {advice}")
    return plan


def make_context(config: MixConfig, scores: ScoreFolder) -> Context:
    """What both readings need. Raises ConfigError for a file of evaluation texts that can't be used."""
    families = config.contamination.all_families
    groups = []
    for t in scores.tasks:
        found = families_of([t.name, *t.sources], families)
        groups.append(Group(t.name, NATURAL_INSTRUCTIONS, t.label, t.task_score, families=found, unfit=t.unreachable))
    for s in config.sources:
        groups.append(Group(s.name, s.name, max_rows=s.max_rows, families=families_of([s.name], families)))
    files, size = config.contamination.files, config.contamination.ngram
    ngrams = build_index(read_texts(files, "contamination.files"), size) if files else None
    tasks = [
        # The published scripts took the first letter of a definition that is a text.
        (t.name, t.label, t.license, t.definition[:1] if config.compat and t.definition_is_text else t.definition)
        for t in scores.tasks
    ]
    columns = [pa.array(list(column), pa.string()) for column in zip(*tasks, strict=True)]
    about = pa.RecordBatch.from_arrays(columns, ["name", "label", "license", "definition"])
    return Context(config, scores, tuple(groups), ngrams, about)
