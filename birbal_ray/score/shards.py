"""A planned task and the ranges of its hash order: what is scored as one, its file, what its scores add up to."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any

import pyarrow as pa

from birbal_ray.ni.metrics import EXACT_MATCH, METRIC_VERSION, Label
from birbal_ray.schemas import TASKS
from birbal_ray.statistics import t_half_width, wilson
from birbal_ray.storage import FileRecord, Folder, RunError

METADATA_KEY = b"birbal"  # of a file of rows: what its rows were made from
FEW_SHOT, ZERO_SHOT = "few_shot", "zero_shot"
# What a prompt's own tokens cost, in decoded tokens. By the arithmetic of `birbal_ray.progress` the 58 of a mean prompt
# cost as much as 22 to 28 on an RTX 4090, 12 to 16 on an H100. Only the estimate of the time left depends on it.
PREFILL_WORK = 16


@dataclass(frozen=True, slots=True)
class PromptVariant:
    """One way to ask a task's instances.

    `model`: the folder of its rows, none in a score run. `adapter`: of the engine, or none.
    """

    model: str = ""
    prompt_format: str = FEW_SHOT  # zero_shot: the training text
    adapter: str = ""

    @property
    def folder(self) -> str:
        """Where its rows go, below the rows folder."""
        return f"{self.model}/{self.prompt_format}/" if self.model else ""


SCORED = PromptVariant()  # of a score run


@dataclass(frozen=True, slots=True)
class Shard:
    """A range of one task's hash order, `first` included, `last` not: the unit of work, of output, of resuming.

    `retry`: rows of the range that are scored again; the file's other rows stay as they are.
    """

    task: str
    path: str  # of the task file: on every node, or below the run folder
    sha256: str
    label: str
    first: int
    last: int
    max_completion_tokens: int
    variant: PromptVariant = SCORED
    retry: tuple[int, ...] | None = None

    @property
    def num_rows(self) -> int:
        """Rows of its file."""
        return self.last - self.first

    @property
    def name(self) -> str:
        """Its Parquet file, below the rows folder."""
        return row_file(f"{self.variant.folder}{self.task}", self.first, self.last)

    @property
    def work(self) -> int:
        """What it costs, in decoded tokens at most."""
        rows = self.num_rows if self.retry is None else len(self.retry)
        return rows * row_work(self.max_completion_tokens)


@dataclass(frozen=True, slots=True)
class Tally:
    """Sums over a task's scored rows; `num_failed` are those with score 0 (exact match) or below a limit."""

    num_scored: int = 0
    num_failed: int = 0
    total: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, scores: Collection[float], label: str, failed_below: float = 0.0) -> Tally:
        """Sums over these scores."""
        failed = (score == 0 if label == EXACT_MATCH else score < failed_below for score in scores)
        return cls(len(scores), sum(failed), math.fsum(scores), math.fsum(score * score for score in scores))

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    @property
    def mean(self) -> float:
        """Of at least one score."""
        return self.total / self.num_scored

    def half_width(self, label: str) -> float:
        """Half the width of the mean's 95 % interval: Wilson's for exact match, Student's t otherwise."""
        n = self.num_scored
        if n < 2:
            return math.inf
        if label == EXACT_MATCH:
            return wilson(self.mean, n)[1]
        return t_half_width(math.sqrt(max(0.0, self.squares - self.total**2 / n) / (n - 1)), n)

    def interval(self, label: str) -> tuple[float, float]:
        """The same interval, (low, high) in [0, 1], of at least one score. One ROUGE-L score tells nothing: (0, 1)."""
        exact = label == EXACT_MATCH
        centre, half = wilson(self.mean, self.num_scored) if exact else (self.mean, self.half_width(label))
        return max(0.0, min(centre - half, self.mean)), min(1.0, max(centre + half, self.mean))


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """What a writer published. `name` is below the rows folder."""

    name: str
    task: str
    num_rows: int
    num_errors: int
    record: FileRecord
    tally: Tally


def row_file(task: str, first: int, last: int) -> str:
    """The file of rows [first, last) of a task's hash order, below the rows folder.

    `task` may have a variant's folder in front.
    """
    return f"{task}/{first:06d}-{last:06d}.parquet"


class DamagedRowsError(RunError):
    """Files of rows (`names`, below the rows folder) are no Parquet files, or hold fewer or more rows than they say."""

    def __init__(self, folder: Folder, names: Sequence[str]) -> None:
        self.names = names
        super().__init__(f"{folder}: {len(names)} files of rows were damaged (first: {names[0]})")


class RowFiles:
    """Ranges of hash order that are on disk: `{variant folder}{task}` → [(first, last)], sorted, none overlapping.

    `overlapping` names files whose rows are in others too (two sessions cut a task differently at the same time).
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._ranges: dict[str, list[tuple[int, int]]] = {}
        self.overlapping: list[str] = []
        matches = (re.fullmatch(r"(.+)/([0-9]+)-([0-9]+)\.parquet", name) for name in names)
        found = ((match[1], int(match[2]), int(match[3]), match[0]) for match in matches if match)
        for task, first, last, name in sorted(found):  # by number: beyond a million rows names sort otherwise
            ranges = self._ranges.setdefault(task, [])
            if ranges and first < ranges[-1][1]:
                self.overlapping.append(name)
            else:
                ranges.append((first, last))

    @property
    def tasks(self) -> list[str]:
        """`{variant folder}{task}` of all that has rows."""
        return list(self._ranges)

    def names(self, task: str) -> list[str]:
        """The task's files below the rows folder, in hash order."""
        return [row_file(task, first, last) for first, last in self._ranges.get(task, ())]

    def num_rows(self, task: str) -> int:
        """Rows of a task."""
        return sum(last - first for first, last in self._ranges.get(task, ()))

    @property
    def total_rows(self) -> int:
        """Rows of all tasks."""
        return sum(self.num_rows(task) for task in self._ranges)

    def gaps(self, task: str, end: int) -> list[tuple[int, int]]:
        """The ranges below `end` that are in no file."""
        gaps, position = [], 0
        for first, last in [*self._ranges.get(task, ()), (end, end)]:
            if position < min(first, end):
                gaps.append((position, min(first, end)))
            position = max(position, last)
        return gaps

    def add(self, task: str, ranges: Iterable[tuple[int, int]]) -> None:
        """Count ranges as there."""
        self._ranges[task] = sorted([*self._ranges.get(task, ()), *ranges])

    def all_names(self) -> list[str]:
        """Every file, none that overlaps another."""
        return [name for task in self._ranges for name in self.names(task)]

    @staticmethod
    def range_of(name: str) -> tuple[int, int]:
        """[first, last) of a file."""
        first, last = name.removesuffix(".parquet").rpartition("/")[2].split("-")
        return int(first), int(last)


def row_work(max_completion_tokens: int) -> int:
    """What one row costs, in decoded tokens at most."""
    return max_completion_tokens + PREFILL_WORK


@dataclass(frozen=True, slots=True)
class PlannedTask:
    """One task of the run. Token counts are None unless the plan was asked to count."""

    name: str
    path: str
    member: str | None  # of the archive at `path`
    sha256: str
    label: Label
    num_available: int
    num_instances: int  # that the run takes, at most
    num_shots: int
    max_completion_tokens: int
    repairs: dict[str, int]
    definition: str
    categories: tuple[str, ...]
    sources: tuple[str, ...]
    licenses: tuple[str, ...]
    num_excluded: int = 0  # instances that the run may not take
    unreachable_fraction: float = 0.0  # of usable instances: not even a reference scores 1 there
    unreachable_reason: str | None = None
    definition_is_text: bool = False
    num_shared_tokens: int | None = None  # the prefix, once
    num_own_tokens: int | None = None  # what follows it, over all instances
    num_too_long: int | None = None
    num_prompts: int | None = None  # for the engine: neither too long nor without a reference

    @property
    def identity(self) -> dict[str, Any]:
        """What decides this task's predictions, beside what decides all rows of the run."""
        return {"sha256": self.sha256, "max_completion_tokens": self.max_completion_tokens}

    def shard(
        self, first: int, last: int, variant: PromptVariant = SCORED, retry: tuple[int, ...] | None = None
    ) -> Shard:
        """The range [first, last) of its hash order."""
        about = self.name, self.path, self.sha256, self.label.value
        return Shard(*about, first, last, self.max_completion_tokens, variant, retry)


@dataclass(frozen=True, slots=True)
class ScorePlan:
    """The tasks of a run by name, and the files that were left out: (file, reason)."""

    tasks: tuple[PlannedTask, ...]
    quarantined: tuple[tuple[str, str], ...]
    excluded: tuple[tuple[str, str], ...]
    absent: tuple[str, ...]
    unknown_overrides: tuple[str, ...] = ()  # tasks of tasks.label_overrides that have no file

    @property
    def num_rows(self) -> int:
        """Rows that the run will hold, at most."""
        return sum(task.num_instances for task in self.tasks)

    def shards(
        self, shard_rows: int, found: RowFiles | None = None, variants: Sequence[PromptVariant] = (SCORED,)
    ) -> list[Shard]:
        """Shards of all rows that are not `found`, those of one task and variant adjacent, long completions first.

        A task of long completions that comes last leaves the engines a handful of sequences to the end
        (docs/decisions/0002): started first, the short ones fill the batch beside it.
        """
        found = found or RowFiles(())
        longest_first = sorted(self.tasks, key=lambda task: (-task.max_completion_tokens, task.name))
        return [
            shard
            for variant, task in itertools.product(variants, longest_first)
            for shard in shards_of(
                task, shard_rows, found.gaps(f"{variant.folder}{task.name}", task.num_instances), variant
            )
        ]

    def table(self, stops: Mapping[str, str]) -> pa.Table:
        """The tasks as TASKS rows; `stops`: why a task was not scored further."""
        names = set(TASKS.names)
        return pa.Table.from_pylist(
            [
                {
                    **{key: value for key, value in asdict(task).items() if key in names},
                    "task": task.name,
                    "label": task.label.value,
                    "label_reason": task.label.reason,
                    "metric_version": METRIC_VERSION,
                    "stop_reason": stops.get(task.name),
                }
                for task in self.tasks
            ],
            schema=TASKS,
        )


def shards_of(
    task: PlannedTask,
    shard_rows: int,
    gaps: Iterable[tuple[int, int]],
    variant: PromptVariant = SCORED,
) -> list[Shard]:
    """Ranges of a task cut at multiples of `shard_rows`."""
    shards = []
    for first, last in gaps:
        cuts = [first, *range((first // shard_rows + 1) * shard_rows, last, shard_rows), last]
        shards += [task.shard(start, end, variant) for start, end in itertools.pairwise(cuts)]
    return shards
