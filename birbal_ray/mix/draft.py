"""A mix that is decided but not written: inputs, candidates, decisions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from birbal_ray.mix import near, sources
from birbal_ray.mix.allocation import train_size
from birbal_ray.mix.build import Gathered, fits_process, plan_chunks, read_features
from birbal_ray.mix.candidates import Candidates, Decisions, Group
from birbal_ray.mix.config import MixConfig
from birbal_ray.mix.contamination import build_index, chosen_families, families_of
from birbal_ray.mix.look import Chunk, Lookup, TaskText
from birbal_ray.mix.outcome import Outcomes, Places
from birbal_ray.mix.rows import NATURAL_INSTRUCTIONS, Bits, Reason
from birbal_ray.mix.scores import ScoreFolder
from birbal_ray.mix.select import decide
from birbal_ray.run import RunError

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Draft:
    """Everything the second reading needs, and what a dry run prints."""

    chunks: tuple[Chunk, ...]
    lookup: Lookup
    groups: tuple[Group, ...]
    gathered: Gathered
    decisions: Decisions
    num_train: int
    in_process: bool

    def places(self) -> Places:
        """For the second reading."""
        decided = self.decisions
        return Places(self.gathered.offsets, decided.rank.astype(np.int32), decided.num_kept + decided.num_validation)

    def outcomes(self) -> Outcomes:
        """Completes what the second reading brings."""
        return Outcomes(self.decisions, self.gathered.candidates, self.groups, self.lookup, self.num_train)

    def dropped(self) -> dict[str, int]:
        """Candidates not kept, by reason, most first."""
        counts = np.bincount(self.decisions.reason, minlength=len(Reason))
        found = {Reason(i).word: int(n) for i, n in enumerate(counts) if n and i != Reason.KEPT}
        return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))

    def task_table(self) -> list[dict[str, Any]]:
        """MIX_TASKS rows: every task, then every outside source."""
        candidates = self._per_group(np.ones(len(self.decisions.reason), bool))
        kept = self._per_group(self.decisions.reason == Reason.KEPT)
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
            }
            for i, group in enumerate(self.groups)
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
        sizes = self._per_group(np.ones(len(self.decisions.reason), bool))
        for number, group in enumerate(self.groups):
            for family in group.families:
                found[f"family:{family}"] = found.get(f"family:{family}", 0) + int(sizes[number])
        ngram = int(((self.gathered.candidates.bits & Bits.NGRAM) != 0).sum())
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

    def _per_group(self, chosen: NDArray[np.bool_]) -> NDArray[np.int64]:
        return np.bincount(self.gathered.candidates.group[chosen], minlength=len(self.groups))


def draft_mix(
    config: MixConfig,
    scores: ScoreFolder,
    origins: Sequence[sources.Origin],
    work: Path,
    report: Report = lambda text: None,
    start_ray: Callable[[], object] = lambda: None,
) -> Draft:
    """Read every candidate once and decide; `work` holds files while it lasts.

    `start_ray` is called before the reading, unless there is so little input that none is needed.
    Raises ConfigError (a source's columns, a budget that can't be met), RunError (damaged scores).
    """
    families = chosen_families(config.contamination.evaluations, config.contamination.families)
    groups = _groups(config, scores, families)
    lookup = _lookup(config, scores, groups, origins)
    chunk_bytes = config.resources.chunk_mib << 20
    chunks = plan_chunks(None, scores.files, chunk_bytes)
    for source, origin in zip(config.sources, origins, strict=True):
        report(f"reading source {source.name} ({origin.location})")
        files = sources.write_source(source, origin, work / "sources" / source.name)
        chunks += plan_chunks(source.name, files, chunk_bytes, len(chunks))
    in_process = fits_process(chunks, config.resources.in_process_mib << 20)
    if not in_process:
        start_ray()
    gathered = read_features(
        chunks, lookup, work, lambda rows: report(f"looked at {rows:,} candidates"), in_process=in_process
    )
    _check_complete(gathered.candidates, groups, scores)
    decisions = decide(gathered.candidates, groups, config, _near(config, gathered))
    num_train = train_size(decisions.num_kept, config.eval_fraction)
    return Draft(tuple(chunks), lookup, tuple(groups), gathered, decisions, num_train, in_process)


def _groups(config: MixConfig, scores: ScoreFolder, families: Mapping[str, Sequence[str]]) -> list[Group]:
    tasks = [
        Group(
            task.name,
            NATURAL_INSTRUCTIONS,
            task.label,
            task.task_score,
            families=families_of([task.name, *task.sources], families),
        )
        for task in scores.tasks
    ]
    outside = [
        Group(s.name, s.name, max_rows=s.max_rows, families=families_of([s.name], families)) for s in config.sources
    ]
    return tasks + outside


def _lookup(
    config: MixConfig, scores: ScoreFolder, groups: Sequence[Group], origins: Sequence[sources.Origin]
) -> Lookup:
    number_of = {(group.source, group.name): number for number, group in enumerate(groups)}
    tasks = {}
    for task in scores.tasks:
        number = number_of[NATURAL_INSTRUCTIONS, task.name]
        tasks[task.name] = TaskText(number, task.definition, task.license, task.label, bool(groups[number].families))
    outside = {}
    for source, origin in zip(config.sources, origins, strict=True):
        number = number_of[source.name, source.name]
        outside[source.name] = TaskText(number, "", origin.license, None, bool(groups[number].families))
    files = config.contamination.files
    return Lookup(config, tasks, outside, build_index(files, config.contamination.ngram) if files else None)


def _check_complete(rows: Candidates, groups: Sequence[Group], scores: ScoreFolder) -> None:
    found = np.bincount(rows.group, minlength=len(groups))
    for number, task in enumerate(scores.tasks):
        if found[number] != task.num_instances:
            raise RunError(
                f"{scores.path}: {found[number]} rows of task {task.name!r}, its task_scores.parquet says "
                f"{task.num_instances}; the folder is damaged or half copied, rerun `birbal score` or copy it again"
            )
    order = np.lexsort((rows.shuffle_hash, rows.row_hash))
    ids, others = rows.row_hash[order], rows.shuffle_hash[order]
    twice = np.flatnonzero((ids[1:] == ids[:-1]) & (others[1:] == others[:-1]))
    if len(twice):
        group = groups[int(rows.group[order[twice[0]]])]
        raise RunError(
            f"{scores.path}: {len(twice)} row ids occur twice, one of them in {group.name!r}; rerun `birbal score`"
        )


def _near(config: MixConfig, gathered: Gathered) -> Callable[[NDArray[np.int64]], dict[int, int]] | None:
    table = gathered.near
    if table is None:
        return None
    threshold = config.dedup.near_threshold
    return lambda order: near.near_duplicates(order, table.instruction_hash, table.signatures, table.place, threshold)
