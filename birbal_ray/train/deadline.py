"""A wall-clock budget as a learning-rate schedule and a time to stop."""

from __future__ import annotations

import contextlib
import json
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from birbal_ray.progress import repeating
from birbal_ray.storage import write_json

HEARTBEAT_SECONDS = 2.0
STEPS_REMEMBERED = 8  # the next step is expected to take as long as the longest of these
MARGIN = 1.1  # on measured evaluation and saving times
WARMUP_AT_MOST = 0.1  # of the run
CLOSING_SECONDS = 1.0  # what ending takes beside evaluating and saving


class Clock:
    """Seconds that a run's worker has been up, over all sessions; a killed one loses a heartbeat at most.

    `setup_seconds` of them passed before a session's first step. Kept in `file`, with what an evaluation, a
    checkpoint and a step last took: a session that begins near the deadline has no time to measure them.
    `started`: when the session began, by `now`; importing torch and the like may lie before this object.
    """

    def __init__(self, file: Path, now: Callable[[], float] = time.monotonic, started: float | None = None) -> None:
        self._file, self._now = file, now
        earlier = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        self._before, self._setup_before = earlier.get("elapsed_seconds", 0.0), earlier.get("setup_seconds", 0.0)
        self.eval_seconds: float = earlier.get("eval_seconds", 0.0)
        self.save_seconds: float = earlier.get("save_seconds", 0.0)
        self.best_seconds: float = earlier.get("best_seconds", 0.0)  # to keep the adapter of the lowest eval loss
        self.step_seconds: float = earlier.get("step_seconds", 0.0)  # the longest of the latest
        self._lock = threading.Lock()
        self._started = now() if started is None else started
        self._stepping_since: float | None = None

    @property
    def elapsed_seconds(self) -> float:
        """Of all sessions."""
        return self._before + self._now() - self._started

    @property
    def setup_seconds(self) -> float:
        """Spent loading, over all sessions."""
        return self._setup_before + (self._stepping_since or self._now()) - self._started

    def start_stepping(self) -> None:
        """The session's set-up is over."""
        self._stepping_since = self._now()

    def save(self) -> None:
        """Write the time down."""
        names = ("elapsed_seconds", "setup_seconds", "eval_seconds", "save_seconds", "best_seconds", "step_seconds")
        with self._lock:
            write_json(self._file, {name: getattr(self, name) for name in names})

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Save every two seconds while the block runs, also while a model loads or a checkpoint is written."""
        with repeating(HEARTBEAT_SECONDS, self.save):
            self.save()
            yield
            self.save()


def budget_by_clock(budget_seconds: float | None, end_by: float | None, clock: Clock) -> float | None:
    """The budget by a run's own clock, cut so that the session that has it ends by `end_by` (as time.time() counts)."""
    if end_by is None:
        return budget_seconds
    return min(max(1.0, clock.elapsed_seconds + end_by - time.time()), budget_seconds or math.inf)


class Deadline:
    """Says how far a run is (0 to 1), whether another step fits, how many will.

    Progress is the larger of steps done / steps wanted and training time used / training time there
    is, where the reserve (a final evaluation and a checkpoint) is not training time. Without a
    budget only the steps count, so that a run repeats exactly.
    """

    def __init__(self, budget_seconds: float | None, total_steps: int, clock: Clock) -> None:
        self.budget_seconds, self.total_steps, self.clock = budget_seconds, total_steps, clock
        self._steps: deque[float] = deque(maxlen=STEPS_REMEMBERED)

    def step_took(self, seconds: float) -> None:
        """Remember a step's time, evaluation and saving left out."""
        self._steps.append(seconds)
        self.clock.step_seconds = max(self._steps)

    @property
    def reserve_seconds(self) -> float:
        """Kept for the final evaluation, its adapter if it is the best, and the checkpoint."""
        clock = self.clock
        return MARGIN * (clock.eval_seconds + clock.best_seconds + clock.save_seconds) + CLOSING_SECONDS

    def remaining_seconds(self) -> float:
        """Training time left; infinite without a budget."""
        if self.budget_seconds is None:
            return math.inf
        return self.budget_seconds - self.reserve_seconds - self.clock.elapsed_seconds

    def evaluation_fits(self) -> bool:
        """Whether an evaluation that begins now ends within the budget."""
        return self.budget_seconds is None or (
            self.clock.elapsed_seconds + MARGIN * (self.clock.eval_seconds + self.clock.best_seconds)
            <= self.budget_seconds
        )

    def progress(self, steps_done: int, due_seconds: float = 0.0) -> float:
        """How far the run is at the end of its next step, in [0, 1]; 1 says that no other step fits.

        `due_seconds` go to an evaluation or checkpoint before that step.
        """
        by_steps = steps_done / self.total_steps
        if self.budget_seconds is None:
            return min(1.0, by_steps)
        left = self.remaining_seconds() - due_seconds - self.clock.step_seconds
        if left <= 0:
            return 1.0
        used = self.clock.elapsed_seconds - self.clock.setup_seconds + due_seconds + self.clock.step_seconds
        return min(1.0, max(by_steps, used / (used + left)))

    def least_budget_seconds(self) -> float:
        """The shortest budget that trains a step: loading with the first evaluation, the step, the reserve."""
        return self.clock.setup_seconds + self.clock.step_seconds + self.reserve_seconds

    def forecast(
        self, steps_done: int, steps_per_epoch: float, steps_per_eval: int, steps_per_save: int
    ) -> dict[str, Any] | None:
        """What will fit, evaluations and checkpoints counted; None before any step was timed.

        `num_steps` in all, those done included; `epochs`; `by_budget`: the deadline comes before the last epoch's end.
        """
        if not self._steps:
            return None
        mean = sum(self._steps) / len(self._steps)
        mean += self.clock.eval_seconds / steps_per_eval + self.clock.save_seconds / steps_per_save
        fitting = steps_done + self.remaining_seconds() / mean if self.budget_seconds is not None else math.inf
        num_steps = int(max(steps_done, min(self.total_steps, fitting)))
        return {
            "num_steps": num_steps,
            "epochs": num_steps / steps_per_epoch,
            "by_budget": fitting < self.total_steps,
        }


def learning_rate_factor(step: int, progress: float, warmup_steps: int, floor_fraction: float) -> float:
    """What the learning rate is multiplied by for the step after `step` done ones: warm-up times cosine.

    The warm-up ends after `warmup_steps`, or with the first tenth of the run where that is shorter.
    """
    warm = min(1.0, max((step + 1) / warmup_steps, progress / WARMUP_AT_MOST)) if warmup_steps else 1.0
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return max(floor_fraction, warm * (floor_fraction + (1 - floor_fraction) * cosine))
