"""Which candidates make the mix: one reason for each, from compact columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from birbal_ray.mix import allocation
from birbal_ray.mix.allocation import Allocation, TaskDemand
from birbal_ray.mix.candidates import NO_TWIN, Candidates, Decisions, Group
from birbal_ray.mix.config import MixConfig
from birbal_ray.mix.rows import BUCKET_OF, Bits, Reason
from birbal_ray.ni.metrics import EXACT_MATCH, GENERATION
from birbal_ray.settings import ConfigError

UNDECIDED = 255

NearDuplicates = Callable[[NDArray[np.int64]], dict[int, int]]


def decide(
    candidates: Candidates, groups: Sequence[Group], config: MixConfig, near: NearDuplicates | None = None
) -> Decisions:
    """Apply filters, repeats and the policy; the same for any order of the candidates.

    `near` maps row numbers (best first) to `{dropped: the row it resembles}`. Raises ConfigError
    when a budget can't be met and task_score.allow_shortfall is false.
    """
    table = _Table(candidates, groups, config)
    table.drop_unusable()
    if config.policy == allocation.TASK_SCORE:
        table.drop_texts()
        table.keep_out_validation()
        table.drop_repeats(near)
        allocations = table.take_by_task_score()
        table.limit_sources()
    else:
        allocations = {}
        table.keep_out_validation()
        table.take_by_ladder()
        table.limit_sources()
        table.drop_texts()
        table.drop_repeats(near)
    return table.close(allocations)


class _Table:
    """Decisions as they fall; a decided row is never touched again."""

    def __init__(self, candidates: Candidates, groups: Sequence[Group], config: MixConfig) -> None:
        self.rows, self.groups, self.config = candidates, groups, config
        count = len(candidates)
        self.reason = np.full(count, UNDECIDED, np.uint8)
        self.bucket = np.zeros(count, np.uint8)
        self.twin = np.full(count, NO_TWIN, np.int64)
        self.usable = np.zeros(len(groups), np.int64)
        self.allocated = np.zeros(len(groups), np.int64)
        self.is_label = {
            label: np.array([group.label == label for group in groups], bool)
            for label in (EXACT_MATCH, GENERATION, None)
        }

    def drop_unusable(self) -> None:
        """Rows that no policy may use."""
        drop_contaminated = self.config.contamination.action == "drop"
        self._drop_bit(Bits.ERROR, Reason.ERROR)
        if not self.config.include_llm_written:
            self._drop_bit(Bits.LLM_WRITTEN, Reason.LLM_WRITTEN)
        self._drop_bit(Bits.SOURCE_FILTER, Reason.SOURCE_FILTER)
        if drop_contaminated:
            self._drop_bit(Bits.FAMILY, Reason.CONTAMINATED_FAMILY)
            self._drop_bit(Bits.NGRAM, Reason.CONTAMINATED_NGRAM)

    def drop_texts(self) -> None:
        """Rows whose text is too long, too short, or empty."""
        self._drop_bit(Bits.TOO_LONG, Reason.TOO_LONG)
        self._drop_bit(Bits.SHORT_INPUT, Reason.SHORT_INPUT)
        if not self.config.compat:  # the published filter asks for fewer than 1 word, which no text has
            self._drop_bit(Bits.EMPTY_OUTPUT, Reason.EMPTY_OUTPUT)

    def keep_out_validation(self) -> None:
        """The first rows of each group by text hash that no other candidate repeats.

        Whatever the seed, the policy or its ratios: the same rows.
        """
        per_group = self.config.validation_rows_per_task
        if not per_group:
            return
        texts = Bits.TOO_LONG | Bits.SHORT_INPUT | Bits.EMPTY_OUTPUT
        unique = np.ones(len(self.rows), bool)
        order = np.argsort(self.rows.key, kind="stable")
        same = self.rows.key[order[1:]] == self.rows.key[order[:-1]]
        unique[order[1:][same]] = unique[order[:-1][same]] = False
        alive = self._alive()
        usable = alive[unique[alive] & ((self.rows.bits[alive] & texts) == 0)]
        order = np.lexsort((self.rows.key[usable], self.rows.group[usable]))
        group = self.rows.group[usable][order]
        place = np.arange(len(order)) - np.searchsorted(group, group, side="left")
        self._drop(usable[order[place < per_group]], Reason.VALIDATION)

    def drop_repeats(self, near: NearDuplicates | None) -> None:
        """All but the first row, in the mix's order, of each key."""
        alive = self._alive()
        order = alive[np.lexsort((self.rows.row_hash[alive], self.rows.shuffle_hash[alive], self.rows.key[alive]))]
        if len(order):
            keys = self.rows.key[order]
            starts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]])
            first = np.repeat(order[starts], np.diff(np.r_[starts, len(order)]))
            repeats = first != order
            self._drop(order[repeats], Reason.DUPLICATE)
            self.twin[order[repeats]] = first[repeats]
        if near is not None:
            alive = self._alive()
            found = near(alive[np.lexsort((self.rows.row_hash[alive], self.rows.shuffle_hash[alive]))])
            for row, twin in found.items():
                self.reason[row], self.twin[row] = Reason.NEAR_DUPLICATE, twin

    def take_by_task_score(self) -> dict[str, Allocation]:
        """Fill each label's budget; inside a task what the model failed comes first."""
        settings, rows = self.config.task_score, self.rows
        alive = self._alive()
        alive = alive[~self.is_label[None][rows.group[alive]]]
        self._count(alive, self.usable)
        allocations = {}
        for label, budget in ((EXACT_MATCH, settings.exact_match_budget), (GENERATION, settings.generation_budget)):
            members = np.flatnonzero(self.is_label[label])
            allocations[label] = self._allocate(label, budget, members)
            for number in members:
                self.allocated[number] = allocations[label].counts.get(self.groups[number].name, 0)
        score = rows.score[alive]
        failed = np.where(self.is_label[EXACT_MATCH][rows.group[alive]], score == 0, score < settings.failed_below)
        self.bucket[alive] = np.where(failed, BUCKET_OF["failed"], BUCKET_OF["rest"])
        later = ~failed if settings.failed_first else None
        self._drop(self._beyond(alive, rows.group[alive], self.allocated, later), Reason.OVER_ALLOCATION)
        return allocations

    def take_by_ladder(self) -> None:
        """The published ladder: caps by accuracy decile, shares by ROUGE-L band."""
        self._ladder_exact_match()
        self._ladder_generation()

    def limit_sources(self) -> None:
        """At most max_rows of each outside source, the first in hash order."""
        alive = self._alive()
        alive = alive[self.is_label[None][self.rows.group[alive]]]
        if self.config.policy == allocation.BIRBAL_2023:
            # Published: each source drops its long rows before it is sampled.
            long = (self.rows.bits[alive] & Bits.TOO_LONG) != 0
            self._drop(alive[long], Reason.TOO_LONG)
            alive = alive[~long]
        self.bucket[alive] = BUCKET_OF["all"]
        self._count(alive, self.usable)
        limits = np.array([g.max_rows if g.max_rows is not None else len(self.rows) for g in self.groups], np.int64)
        outside = self.is_label[None]
        self.allocated[outside] = np.minimum(limits, self.usable)[outside]
        self._drop(self._beyond(alive, self.rows.group[alive], self.allocated), Reason.OVER_SOURCE_LIMIT)

    def close(self, allocations: dict[str, Allocation]) -> Decisions:
        """Everything still undecided is kept."""
        self.reason[self.reason == UNDECIDED] = Reason.KEPT
        kept, validation = self.reason == Reason.KEPT, self.reason == Reason.VALIDATION
        place = np.where(validation, self.rows.key, self.rows.shuffle_hash)  # whatever the seed, the same order
        order = np.lexsort((self.rows.row_hash, place, ~validation, ~kept))
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order))
        return Decisions(
            self.reason,
            self.bucket,
            self.twin,
            rank,
            int(kept.sum()),
            int(validation.sum()),
            self.usable,
            self.allocated,
            allocations,
        )

    def _ladder_exact_match(self) -> None:
        rows, groups = self.rows, self.groups
        mine = self._of_label(EXACT_MATCH)
        scored, correct = np.zeros(len(groups), np.int64), np.zeros(len(groups), np.int64)
        right = rows.ladder[mine] == 1.0
        self._count(mine, scored)
        self._count(mine[right], correct)
        decile = np.zeros(len(groups), np.int64)
        for number in np.flatnonzero(scored):
            accuracy = int(correct[number]) / int(scored[number])
            decile[number] = allocation.ladder_decile(accuracy)
            self.allocated[number] = allocation.ladder_cap(accuracy, self.config.birbal_2023.factor)
        self.bucket[mine] = decile[rows.group[mine]] + BUCKET_OF["accuracy_0"]
        self._drop(mine[right], Reason.ANSWERED_CORRECTLY)
        wrong = mine[~right]
        long = (rows.bits[wrong] & Bits.LADDER_TOO_LONG) != 0
        self._drop(wrong[long], Reason.TOO_LONG)
        self._count(wrong[~long], self.usable)
        self._drop(self._beyond(wrong[~long], rows.group[wrong[~long]], self.allocated), Reason.OVER_CAP)

    def _ladder_generation(self) -> None:
        rows = self.rows
        mine = self._of_label(GENERATION)
        band = np.searchsorted(np.array(allocation.BAND_EDGES), rows.ladder[mine], side="right")
        num_bands = len(allocation.BAND_EDGES)
        self.bucket[mine] = band + BUCKET_OF["rouge_0.0"]
        self._drop(mine[band == num_bands], Reason.ANSWERED_WELL)
        mine, band = mine[band < num_bands], band[band < num_bands]
        self._count(mine, self.usable)
        cell = rows.group[mine].astype(np.int64) * num_bands + band
        sizes = np.bincount(cell, minlength=len(self.groups) * num_bands)
        quotas = np.array([allocation.band_quota(i % num_bands, int(size)) for i, size in enumerate(sizes)], np.int64)
        if len(quotas):
            self.allocated += quotas.reshape(len(self.groups), num_bands).sum(axis=1)
        self._drop(self._beyond(mine, cell, quotas), Reason.NOT_DRAWN)
        mine = self._of_label(GENERATION)
        bits = rows.bits[mine]
        self._drop(mine[(bits & Bits.SEVERAL_REFERENCES) != 0], Reason.SEVERAL_REFERENCES)
        long = (bits & (Bits.LADDER_LONG_INPUT | Bits.LADDER_TOO_LONG)) != 0
        self._drop(mine[long], Reason.TOO_LONG)

    def _allocate(self, label: str, budget: int, members: NDArray[np.int64]) -> Allocation:
        settings = self.config.task_score
        demands = [
            TaskDemand(
                self.groups[number].name,
                int(self.usable[number]),
                self.groups[number].task_score or 0.0,
                int(self.usable[number]) if settings.weights == "size" else None,
            )
            for number in members
            if self.usable[number]
        ]
        result = allocation.allocate(budget, demands, settings.gamma)
        if result.shortfall and not settings.allow_shortfall:
            there = budget - result.shortfall
            raise ConfigError(
                f"task_score.{label}_budget = {budget}: only {there} {label} candidates can be drawn (of "
                f"{int(self.is_label[label][self.rows.group].sum())} scored; the rest are filtered, repeats, or of "
                f"tasks with score 1); lower it to at most {there}, or set task_score.allow_shortfall=true"
            )
        return result

    def _beyond(
        self,
        rows: NDArray[np.int64],
        cell: NDArray[np.integer],
        limits: NDArray[np.int64],
        later: NDArray[np.bool_] | None = None,
    ) -> NDArray[np.int64]:
        """The rows past the first `limits[cell]` of their cell, `later` rows last, else in hash order."""
        last = np.zeros(len(rows), bool) if later is None else later
        order = np.lexsort((self.rows.shuffle_hash[rows], self.rows.row_hash[rows], last, cell))
        cells = cell[order]
        place = np.arange(len(order)) - np.searchsorted(cells, cells, side="left")
        beyond: NDArray[np.int64] = rows[order[place >= limits[cells]]]
        return beyond

    def _alive(self) -> NDArray[np.int64]:
        return np.flatnonzero(self.reason == UNDECIDED)

    def _of_label(self, label: str) -> NDArray[np.int64]:
        alive = self._alive()
        mine: NDArray[np.int64] = alive[self.is_label[label][self.rows.group[alive]]]
        return mine

    def _count(self, rows: NDArray[np.int64], into: NDArray[np.int64]) -> None:
        into += np.bincount(self.rows.group[rows], minlength=len(self.groups))

    def _drop_bit(self, bit: Bits, reason: Reason) -> None:
        self._drop(np.flatnonzero((self.rows.bits & bit) != 0), reason)

    def _drop(self, rows: NDArray[np.int64], reason: Reason) -> None:
        open_rows = rows[self.reason[rows] == UNDECIDED]
        self.reason[open_rows] = reason
