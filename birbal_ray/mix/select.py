"""Which candidates make the mix: one reason for each, from compact columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from birbal_ray.mix import allocation
from birbal_ray.mix.allocation import Allocation, TaskDemand
from birbal_ray.mix.config import MixConfig
from birbal_ray.mix.features import Flags
from birbal_ray.ni.metrics import EXACT_MATCH, GENERATION
from birbal_ray.settings import ConfigError

# Name of the part of a task or source a candidate was looked for in; the index is what arrays hold.
BUCKETS = (
    "none",
    "all",
    "failed",
    "rest",
    *(f"accuracy_{decile}" for decile in range(10)),
    *(allocation.band_name(number) for number in range(len(allocation.BAND_EDGES) + 1)),
)
BUCKET_OF = {name: number for number, name in enumerate(BUCKETS)}

UNDECIDED = 255
NO_DUPLICATE = -1
ANY_LABEL = "any label"

NearDuplicates = Callable[[NDArray[np.int64]], dict[int, int]]


class Reason(IntEnum):
    """Why a candidate is in the mix or not; the first that applies. `text` says it in words."""

    text: str

    def __new__(cls, value: int, text: str) -> Reason:
        reason = int.__new__(cls, value)
        reason._value_, reason.text = value, text
        return reason

    KEPT = 0, "in the mix"
    ERROR = 1, "scoring it failed"
    LLM_WRITTEN = 2, "written by a language model (include_llm_written is false)"
    CONTAMINATED_FAMILY = 3, "its task or source belongs to an evaluation"
    CONTAMINATED_NGRAM = 4, "shares a run of words with an evaluation text"
    ANSWERED_CORRECTLY = 5, "the model answered it correctly"
    ANSWERED_WELL = 6, "the model's answer has ROUGE-L 0.8 or more"
    NOT_DRAWN = 7, "beyond the share drawn from its ROUGE-L band"
    SEVERAL_REFERENCES = 8, "has more than one reference"
    TOO_LONG = 9, "instruction and input have too many words"
    SHORT_INPUT = 10, "the input has too few words"
    EMPTY_OUTPUT = 11, "the output is empty"
    OVER_CAP = 12, "beyond the cap of its task's accuracy decile"
    DUPLICATE = 13, "repeats another row"
    NEAR_DUPLICATE = 14, "nearly repeats another row's input under the same instruction"
    OVER_ALLOCATION = 15, "beyond what its task was allocated"
    OVER_SOURCE_LIMIT = 16, "beyond its source's max_rows"
    VALIDATION = 17, "kept out to judge mixes by (validation_rows_per_task)"

    @property
    def word(self) -> str:
        """As written in files: lower case."""
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class Group:
    """A task of the score run, or an outside source (`label` None). `unfit`: why no error-driven share is due to it."""

    name: str
    source: str
    label: str | None = None
    task_score: float | None = None
    max_rows: int | None = None
    families: tuple[str, ...] = ()
    unfit: str | None = None


@dataclass(frozen=True, slots=True)
class Candidates:
    """All candidates as columns, each of shape (candidates,); 46 bytes a row, texts stay on disk."""

    group: NDArray[np.int32]  # index into the groups
    row_hash: NDArray[np.uint64]  # order inside a task
    shuffle_hash: NDArray[np.uint64]  # order of the mix
    key: NDArray[np.uint64]  # equal for repeats
    score: NDArray[np.float64]  # NaN where there is none
    published: NDArray[np.float64]  # birbal_2023's view of the answer; NaN where there is none
    flags: NDArray[np.uint16]  # Flags

    def __len__(self) -> int:
        return len(self.group)


def decide(
    candidates: Candidates, groups: Sequence[Group], config: MixConfig, near: NearDuplicates | None = None
) -> Decisions:
    """Apply filters, repeats and the policy; the same for any order of the candidates.

    `near` maps candidate indices (best first) to `{dropped: the row it resembles}`. Raises ConfigError
    when a budget can't be met and task_score.allow_shortfall is false.
    """
    decisions = Decisions(candidates, groups, config)
    decisions.drop_unusable()
    if config.policy == allocation.BIRBAL_2023:
        decisions.keep_out_validation()
        decisions.take_published_exact_match()
        decisions.take_published_generation()
        decisions.limit_sources()
        decisions.drop_texts()
        decisions.drop_repeats(near)
    else:
        decisions.drop_texts()
        decisions.keep_out_validation()
        decisions.drop_repeats(near)
        decisions.take_by_budget()
        decisions.limit_sources()
    decisions.close()
    return decisions


class Decisions:
    """What is decided of each candidate, as it falls; a decided row is never touched again.

    Public arrays have shape (candidates,), in the candidates' order, or (groups,). Index arrays hold candidate indices.
    """

    def __init__(self, candidates: Candidates, groups: Sequence[Group], config: MixConfig) -> None:
        self.rows, self.groups, self.config = candidates, groups, config
        count = len(candidates)
        self.reason = np.full(count, UNDECIDED, np.uint8)  # Reason
        self.bucket = np.zeros(count, np.uint8)  # index into BUCKETS
        self.duplicate_of = np.full(count, NO_DUPLICATE, np.int64)  # candidate index
        self.usable = np.zeros(len(groups), np.int64)  # rows of the group that the policy could draw from
        self.allocated = np.zeros(len(groups), np.int64)  # rows that it asked for
        self.allocations: dict[str, Allocation] = {}  # by label
        self.is_label = {  # label → (groups,)
            label: np.array([group.label == label for group in groups], bool)
            for label in (EXACT_MATCH, GENERATION, None)
        }
        self.is_label[ANY_LABEL] = ~self.is_label[None]

    def drop_unusable(self) -> None:
        """Rows that no policy may use."""
        self._drop_among(self._alive(), Flags.ERROR, Reason.ERROR)
        if not self.config.include_llm_written:
            self._drop_among(self._alive(), Flags.LLM_WRITTEN, Reason.LLM_WRITTEN)
        if self.config.contamination.action == "drop":
            self._drop_among(self._alive(), Flags.FAMILY, Reason.CONTAMINATED_FAMILY)
            self._drop_among(self._alive(), Flags.NGRAM, Reason.CONTAMINATED_NGRAM)

    def drop_texts(self) -> None:
        """Rows whose text is too long, too short, or empty."""
        self._drop_among(self._alive(), Flags.TOO_LONG, Reason.TOO_LONG)
        self._drop_among(self._alive(), Flags.SHORT_INPUT, Reason.SHORT_INPUT)
        if not self.config.compat:  # the published filter asks for fewer than 1 word, which no text has
            self._drop_among(self._alive(), Flags.EMPTY_OUTPUT, Reason.EMPTY_OUTPUT)

    def keep_out_validation(self) -> None:
        """The first rows of each group by text hash that no other candidate repeats.

        Whatever the seed, the policy or its ratios: the same rows.
        """
        per_group = self.config.validation_rows_per_task
        if not per_group:
            return
        texts = Flags.TOO_LONG | Flags.SHORT_INPUT | Flags.EMPTY_OUTPUT
        _, number, counts = np.unique(self.rows.key, return_inverse=True, return_counts=True)
        is_unique = counts[number] == 1
        alive = self._alive()
        usable = alive[is_unique[alive] & ((self.rows.flags[alive] & np.uint16(texts)) == 0)]
        order = np.lexsort((self.rows.key[usable], self.rows.group[usable]))
        group = self.rows.group[usable][order]
        place = np.arange(len(order)) - np.searchsorted(group, group, side="left")
        self._drop(usable[order[place < per_group]], Reason.VALIDATION)

    def drop_repeats(self, near: NearDuplicates | None) -> None:
        """All but the first row, in the mix's order, of each key."""
        alive = self._alive()
        order = alive[np.lexsort((self.rows.shuffle_hash[alive], self.rows.key[alive]))]
        keys = self.rows.key[order]
        first = order[np.searchsorted(keys, keys)]  # of the rows with the same key
        repeats = first != order
        self._drop(order[repeats], Reason.DUPLICATE)
        self.duplicate_of[order[repeats]] = first[repeats]
        if near is not None:
            alive = self._alive()
            found = near(alive[np.argsort(self.rows.shuffle_hash[alive], kind="stable")])
            for row, other in found.items():
                self.reason[row], self.duplicate_of[row] = Reason.NEAR_DUPLICATE, other

    def take_by_budget(self) -> None:
        """Fill the budgets; under task_score one for each label, and inside a task failed rows come first."""
        settings, rows = self.config.task_score, self.rows
        alive = self._of_label(ANY_LABEL)
        self._count(alive, self.usable)
        by_score = self.config.policy == allocation.TASK_SCORE
        budgets = {EXACT_MATCH: settings.exact_match_budget, GENERATION: settings.generation_budget}
        if not by_score:
            budgets = {ANY_LABEL: sum(budgets.values())}
        for label, budget in budgets.items():
            self._allocate(label, budget)
        is_later = None
        if by_score:
            score, is_exact = rows.score[alive], self.is_label[EXACT_MATCH][rows.group[alive]]
            is_failed = np.where(is_exact, score == 0, score < settings.failed_below)
            self.bucket[alive] = np.where(is_failed, BUCKET_OF["failed"], BUCKET_OF["rest"])
            is_later = ~is_failed if settings.failed_first else None
        else:
            self.bucket[alive] = BUCKET_OF["all"]
        self._drop(self._beyond(alive, rows.group[alive], self.allocated, is_later), Reason.OVER_ALLOCATION)

    def take_published_exact_match(self) -> None:
        """The published caps by accuracy decile."""
        rows, num_groups = self.rows, len(self.groups)
        mine = self._of_label(EXACT_MATCH)
        is_right = rows.published[mine] == 1.0
        scored = np.bincount(rows.group[mine], minlength=num_groups)
        correct = np.bincount(rows.group[mine[is_right]], minlength=num_groups)
        decile = np.zeros(num_groups, np.int64)
        for number in np.flatnonzero(scored):
            accuracy = int(correct[number]) / int(scored[number])
            decile[number] = allocation.ladder_decile(accuracy)
            self.allocated[number] = allocation.ladder_cap(accuracy, self.config.birbal_2023.factor)
        self.bucket[mine] = decile[rows.group[mine]] + BUCKET_OF["accuracy_0"]
        self._drop(mine[is_right], Reason.ANSWERED_CORRECTLY)
        wrong = self._drop_among(mine[~is_right], Flags.PUBLISHED_TOO_LONG, Reason.TOO_LONG)
        self._count(wrong, self.usable)
        self._drop(self._beyond(wrong, rows.group[wrong], self.allocated), Reason.OVER_CAP)

    def take_published_generation(self) -> None:
        """The published shares by ROUGE-L band; rows are drawn first, then filtered."""
        rows, num_bands = self.rows, len(allocation.BAND_EDGES)
        mine = self._of_label(GENERATION)
        band = np.searchsorted(np.array(allocation.BAND_EDGES), rows.published[mine], side="right")
        self.bucket[mine] = band + BUCKET_OF["rouge_0.0"]
        self._drop(mine[band == num_bands], Reason.ANSWERED_WELL)
        mine, band = mine[band < num_bands], band[band < num_bands]
        self._count(mine, self.usable)
        cell = rows.group[mine].astype(np.int64) * num_bands + band  # a task's band: index into `quotas`
        sizes = np.bincount(cell, minlength=len(self.groups) * num_bands)
        quotas = np.array([allocation.band_quota(i % num_bands, int(size)) for i, size in enumerate(sizes)], np.int64)
        self.allocated += quotas.reshape(len(self.groups), num_bands).sum(axis=1)
        self._drop(self._beyond(mine, cell, quotas), Reason.NOT_DRAWN)
        mine = self._drop_among(self._of_label(GENERATION), Flags.SEVERAL_REFERENCES, Reason.SEVERAL_REFERENCES)
        self._drop_among(mine, Flags.PUBLISHED_LONG_INPUT | Flags.PUBLISHED_TOO_LONG, Reason.TOO_LONG)

    def limit_sources(self) -> None:
        """At most max_rows of each outside source, the first in hash order."""
        alive = self._of_label(None)
        if self.config.policy == allocation.BIRBAL_2023:
            # Published: each source drops its long rows before it is sampled.
            alive = self._drop_among(alive, Flags.TOO_LONG, Reason.TOO_LONG)
        self.bucket[alive] = BUCKET_OF["all"]
        self._count(alive, self.usable)
        limits = np.array([g.max_rows if g.max_rows is not None else len(self.rows) for g in self.groups], np.int64)
        outside = self.is_label[None]
        self.allocated[outside] = np.minimum(limits, self.usable)[outside]
        self._drop(self._beyond(alive, self.rows.group[alive], self.allocated), Reason.OVER_SOURCE_LIMIT)

    def close(self) -> None:
        """Everything still undecided is kept.

        `rank` is a row's place in the audit: kept rows first, in the mix's order, then validation rows.
        """
        self.reason[self.reason == UNDECIDED] = Reason.KEPT
        is_validation = self.reason == Reason.VALIDATION
        place = np.where(is_validation, self.rows.key, self.rows.shuffle_hash)  # whatever the seed, the same order
        part = np.where(self.reason == Reason.KEPT, 0, np.where(is_validation, 1, 2)).astype(np.uint8)
        order = np.lexsort((place, part))
        self.rank = np.empty(len(order), np.int64)
        self.rank[order] = np.arange(len(order))
        self.num_kept, self.num_validation, _ = np.bincount(part, minlength=3).tolist()

    def _allocate(self, label: str, budget: int) -> None:
        policy, settings, members = self.config.policy, self.config.task_score, np.flatnonzero(self.is_label[label])
        demands = []
        for number in members[self.usable[members] > 0]:
            group, usable = self.groups[number], int(self.usable[number])
            weight = {allocation.UNIFORM: 1, allocation.PROPORTIONAL: usable}.get(policy, 0 if group.unfit else None)
            demands.append(TaskDemand(group.name, usable, group.task_score or 0.0, weight))
        even = settings.even_fraction if policy == allocation.TASK_SCORE else 0.0
        result = allocation.allocate(budget, demands, settings.gamma, even)
        if result.shortfall and not settings.allow_shortfall:
            there = budget - result.shortfall
            what, kind = f"{label}_budget", label
            if label == ANY_LABEL:
                what, kind = "exact_match_budget + task_score.generation_budget", "scored"
            of = int(np.isin(self.rows.group, members).sum())
            raise ConfigError(
                f"task_score.{what} = {budget}: only {there} {kind} candidates can be drawn (of {of} scored; the rest "
                "are filtered, repeats, or of tasks that are due no share: score 1, or a metric that can't reach it); "
                f"lower it to at most {there}, or set task_score.allow_shortfall=true"
            )
        self.allocations[label] = result
        for number in members:
            self.allocated[number] = result.counts.get(self.groups[number].name, 0)

    def _beyond(
        self,
        rows: NDArray[np.int64],
        cell: NDArray[np.integer],
        limits: NDArray[np.int64],
        is_later: NDArray[np.bool_] | None = None,
    ) -> NDArray[np.int64]:
        """The rows past the first `limits[cell]` of their cell, `is_later` rows last, else in hash order."""
        last = np.zeros(len(rows), bool) if is_later is None else is_later
        order = np.lexsort((self.rows.row_hash[rows], last, cell))
        cells = cell[order]
        place = np.arange(len(order)) - np.searchsorted(cells, cells, side="left")
        beyond: NDArray[np.int64] = rows[order[place >= limits[cells]]]
        return beyond

    def _alive(self) -> NDArray[np.int64]:
        return np.flatnonzero(self.reason == UNDECIDED)

    def _of_label(self, label: str | None) -> NDArray[np.int64]:
        alive = self._alive()
        mine: NDArray[np.int64] = alive[self.is_label[label][self.rows.group[alive]]]
        return mine

    def _count(self, rows: NDArray[np.int64], into: NDArray[np.int64]) -> None:
        into += np.bincount(self.rows.group[rows], minlength=len(self.groups))

    def _drop_among(self, rows: NDArray[np.int64], flags: Flags, reason: Reason) -> NDArray[np.int64]:
        """Drop those of `rows` that have any of the flags; the others."""
        has = (self.rows.flags[rows] & np.uint16(flags)) != 0
        self._drop(rows[has], reason)
        return rows[~has]

    def _drop(self, rows: NDArray[np.int64], reason: Reason) -> None:
        self.reason[rows[self.reason[rows] == UNDECIDED]] = reason
