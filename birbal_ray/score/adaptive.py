"""Which shards are scored, in which order, and when a task has been scored enough. Pure: no clock, no Ray.

A task is scored in growing ranges of its hash order and looked at when 100, 200, 400, … of its rows are there. It is
finished when its score is known to within `score_margin`, the rows that the model failed fill the share that the mix
would give the task for its failures, and all its rows that share and its even part (`mix.allocation` computes both).
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from birbal_ray.mix.allocation import TaskDemand, allocate
from birbal_ray.ni.metrics import EXACT_MATCH, MAX_UNREACHABLE_FRACTION
from birbal_ray.score.config import AdaptiveSettings
from birbal_ray.score.shards import PlannedTask, RowFiles, Shard, Tally, WrittenFile, shards_of

GROW, STOP = "grow", "stop"
USED_UP = "all instances that the run takes are scored"
TIME_UP = "the budget of time ended"


@dataclass(frozen=True, slots=True)
class Decision:
    """What was decided about a task when `size` of its rows were there, and why."""

    task: str
    size: int
    action: str  # GROW or STOP
    reason: str


class FixedSchedule:
    """A list of shards in its order."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._left = deque(shards)
        self._size = sum(shard.num_rows for shard in shards), sum(shard.work for shard in shards)

    @property
    def finished(self) -> bool:
        """Whether `next` will never give a shard again."""
        return not self._left

    def next(self) -> Shard | None:
        """The next shard of the list."""
        return self._left.popleft() if self._left else None

    def record(self, file: WrittenFile) -> None:
        """Changes nothing."""

    def decided(self) -> list[Decision]:
        """None: the list was decided before."""
        return []

    def size(self) -> tuple[int, int]:
        """(rows, work) of the whole list."""
        return self._size

    def end(self) -> None:
        """Changes nothing: every row of the list is wanted."""


class AdaptiveSchedule:
    """Tasks in growing ranges, breadth first, long completions first within one size.

    `found` are the rows that are there already, `tallies` their scores by task. `retries` go first. `log` holds the
    decisions of earlier sessions in order; they are taken as they are, and only what follows them is decided here.
    Which rows are scored may depend on the order of `record` calls (a share depends on all
    tasks' scores so far); the end is checked against all scores, and a task whose share turned out larger is scored
    further.
    """

    def __init__(
        self,
        tasks: Sequence[PlannedTask],
        settings: AdaptiveSettings,
        shard_rows: int,
        found: RowFiles,
        tallies: Mapping[str, Tally],
        log: Iterable[Decision] = (),
        retries: Sequence[Shard] = (),
    ) -> None:
        self._settings, self._shard_rows = settings, shard_rows
        self._found = RowFiles(found.all_names())  # and what is decided on
        self._tasks = {task.name: task for task in tasks}
        self._tallies = {task.name: tallies.get(task.name, Tally()) for task in tasks}
        self._covered = {task.name: found.num_rows(task.name) for task in tasks}
        self._outstanding: dict[str, int] = dict.fromkeys(self._tasks, 0)
        self._queue: list[tuple[int, int, str, int, Shard]] = []
        self._rows = self._work = 0
        self._new: list[Decision] = []
        self._ended = False
        self.stops: dict[str, Decision] = {}
        self._retries = {shard.name for shard in retries}  # count for no size
        for shard in retries:
            self._push(0, shard)
        target = {task.name: min(settings.first_instances, task.num_instances) for task in tasks}
        for decision in log:
            task = self._tasks.get(decision.task)
            if task is None or decision.size > self._covered[task.name] or decision.reason == TIME_UP:
                continue  # there is time again
            self.stops.pop(task.name, None)
            if decision.action == GROW:
                target[task.name] = self._next_size(task, decision.size)
            elif decision.reason != USED_UP or decision.size >= task.num_instances:
                self.stops[task.name] = decision
        for task in tasks:
            if task.name not in self.stops:
                self._plan(task, target[task.name])
        for task in tasks:
            if task.name not in self.stops and not self._outstanding[task.name]:
                self._decide(task)
        self._check_end()

    @property
    def finished(self) -> bool:
        """Whether every task is finished, with all scores known."""
        return len(self.stops) == len(self._tasks) and not self._queue

    def next(self) -> Shard | None:
        """The next range of the task that has the fewest rows, or None while nothing is decided."""
        return heapq.heappop(self._queue)[-1] if self._queue else None

    def record(self, file: WrittenFile) -> None:
        """Count a shard's rows; look at its task when the size is reached."""
        if file.name in self._retries:
            return
        task = self._tasks[file.task]
        self._tallies[task.name] += file.tally
        self._covered[task.name] += file.num_rows
        self._outstanding[task.name] -= 1
        if not self._outstanding[task.name]:
            self._decide(task)
        self._check_end()

    def decided(self) -> list[Decision]:
        """Decisions made since the last call."""
        given, self._new = self._new, []
        return given

    def size(self) -> tuple[int, int]:
        """(rows, work) of the ranges decided on so far, given out or not."""
        return self._rows, self._work

    def end(self) -> None:
        """Time is up: every task stops where it is once the shards that were given out are written; retries stay."""
        self._ended = True
        queue, self._queue = self._queue, []
        for entry in sorted(queue):
            shard = entry[-1]
            if shard.name in self._retries:
                self._queue.append(entry)
            else:
                self._outstanding[shard.task] -= 1
                self._rows, self._work = self._rows - shard.num_rows, self._work - shard.work
        for task in self._tasks.values():
            if task.name not in self.stops and not self._outstanding[task.name]:
                self._decide(task)

    def _plan(self, task: PlannedTask, target: int) -> None:
        shards = shards_of(task, self._shard_rows, self._found.gaps(task.name, target))
        self._found.add(task.name, [(shard.first, shard.last) for shard in shards])
        for shard in shards:
            self._push(target, shard)
        self._outstanding[task.name] += len(shards)

    def _push(self, size: int, shard: Shard) -> None:
        heapq.heappush(self._queue, (size, -shard.max_completion_tokens, shard.task, shard.first, shard))
        self._rows, self._work = self._rows + shard.num_rows, self._work + shard.work

    def _decide(self, task: PlannedTask) -> None:
        """Stop a task or give it its next range; several sizes in turn where rows are there already."""
        while not self._outstanding[task.name]:
            size = self._covered[task.name]
            reason, enough = self._judge(task)
            decision = Decision(task.name, size, STOP if enough else GROW, reason)
            self._new.append(decision)
            if enough:
                self.stops[task.name] = decision
                return
            self._plan(task, self._next_size(task, size))

    def _judge(self, task: PlannedTask) -> tuple[str, bool]:
        if self._covered[task.name] >= task.num_instances:
            return USED_UP, True
        if self._ended:
            return TIME_UP, True
        asked, tally = self._settings, self._tallies[task.name]
        half = tally.half_width(task.label.value)
        if half > asked.score_margin:
            return f"score known to ±{half:.3f}, wanted ±{asked.score_margin:g}", False
        share, rows = (math.ceil(count * asked.failed_rows_factor) for count in self._shares(task))
        if tally.num_failed < share:
            return f"{tally.num_failed} failed rows, a share of {share} is possible", False
        if tally.num_scored < rows:
            return f"{tally.num_scored} rows, a share of {rows} with its even part is possible", False
        return f"score known to ±{half:.3f}, {tally.num_failed} failed rows fill a share of {share}", True

    def _shares(self, task: PlannedTask) -> tuple[int, int]:
        """Rows that the mix would take from the task, with its score at its interval's lower end: (failed ones, all).

        Error rows are none of the mix's candidates.
        """
        asked, label = self._settings, task.label.value
        budget = asked.exact_match_budget if label == EXACT_MATCH else asked.generation_budget
        peers = [(other, self._tallies[name]) for name, other in self._tasks.items() if other.label.value == label]
        known = [tally.mean for _, tally in peers if tally.num_scored]
        typical = sum(known) / len(known) if known else 0.0
        demands = []
        for other, tally in peers:
            score = min(1.0, tally.mean) if tally.num_scored else typical
            if other is task:
                score, _ = tally.interval(label)
            # A task whose references can't score 1 gets no share by its errors, as in the mix.
            unfit = 0 if other.unreachable_fraction > MAX_UNREACHABLE_FRACTION else None
            candidates = other.num_instances - (self._covered[other.name] - tally.num_scored)
            if candidates:
                demands.append(TaskDemand(other.name, candidates, score, unfit))
        even = asked.even_fraction
        failed = allocate(round(budget * (1 - even)), demands, asked.gamma).counts[task.name]
        return failed, allocate(budget, demands, asked.gamma, even).counts[task.name] if even else failed

    def _check_end(self) -> None:
        """With all scores known: a task that was stopped with too few failed rows for its share goes on."""
        if self._ended or len(self.stops) < len(self._tasks):
            return
        for name, stop in list(self.stops.items()):  # an allocation each: half a second for 462 tasks
            task = self._tasks[name]
            reason, enough = self._judge(task)
            if not enough:
                del self.stops[name]
                self._new.append(Decision(name, stop.size, GROW, f"with all scores known: {reason}"))
                self._plan(task, self._next_size(task, self._covered[name]))

    def _next_size(self, task: PlannedTask, size: int) -> int:
        doubled = (self._settings.first_instances << k for k in itertools.count())
        return min(task.num_instances, next(one for one in doubled if one > size))


Schedule = FixedSchedule | AdaptiveSchedule  # decides what is scored next; calls come one at a time
