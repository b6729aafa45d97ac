"""A fine-tune's time: what it takes before it starts, a budget as a learning-rate schedule, and when to stop."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from birbal_ray.progress import (
    CARDS,
    LOAD_SECONDS,
    MEASURED,
    Speed,
    estimate_tokens,
    last_figures,
    measured_speed,
    repeating,
)
from birbal_ray.storage import read_json, write_json
from birbal_ray.train.config import TrainConfig

WRITE_BYTES_PER_SECOND = 200e6  # of a slow disk
HEARTBEAT_SECONDS = 2.0
STEPS_REMEMBERED = 8  # the next step is expected to take as long as the longest of these
MARGIN = 1.1  # on measured evaluation and saving times
WARMUP_AT_MOST = 0.1  # of the run
CLOSING_SECONDS = 1.0  # what ending takes beside evaluating and saving


@dataclass(frozen=True, slots=True)
class Forecast:
    """The likeliest seconds of a fine-tune's parts; each, like the rate, may be off by the fraction `spread`."""

    tokens_per_second: float
    spread: float
    source: str  # where the rate comes from
    start_seconds: float  # of the command, before its worker's clock runs and after it has ended
    once_seconds: float  # of the worker: loading, the first evaluation, the last one and its checkpoint
    step_seconds: float  # of an optimizer step, with its part of the evaluations and checkpoints between steps

    @property
    def is_measured(self) -> bool:
        """Whether such a run was here before."""
        return self.source == MEASURED

    @property
    def least_budget_seconds(self) -> float:
        """Of the worker, for one step."""
        return self.once_seconds + self.step_seconds

    def seconds(self, num_steps: float) -> tuple[float, float]:
        """Of the command, low and high."""
        likeliest = self.start_seconds + self.once_seconds + num_steps * self.step_seconds
        return likeliest / (1 + self.spread), likeliest / (1 - self.spread)

    def steps_within(self, seconds: float) -> float:
        """Optimizer steps that the worker has time for."""
        return max(0.0, seconds - self.once_seconds) / self.step_seconds


def forecast_training(
    config: TrainConfig,
    tokens_per_step: float,
    eval_tokens: float,
    speed: Speed,
    kept: Mapping[str, float],
    adapter_bytes: float = 0.0,
) -> Forecast:
    """What a fine-tune takes; the device must be decided.

    `eval_tokens`: of one evaluation. `kept`: what the last run of this kind took here (`last_figures` of `rate_key`).
    """
    rate = (speed.low + speed.high) / 2
    write = adapter_bytes / WRITE_BYTES_PER_SECOND
    guessed = {
        "overhead": 0.0,
        "setup": sum(LOAD_SECONDS[config.resources.device]) / 2,
        "eval": eval_tokens / (rate * num_passes(config)),  # forward only
        "best": write,
        "save": 3 * write,  # with two states of Adam
    }
    start, setup, evaluation, best, save = (kept.get(f"{name}_seconds", guess) for name, guess in guessed.items())
    beside = (evaluation + best) / config.evaluation.every_steps + save / config.checkpoint.every_steps
    return Forecast(
        tokens_per_second=rate,
        spread=(speed.high - speed.low) / (speed.high + speed.low),
        source=speed.source,
        start_seconds=start,
        once_seconds=setup + evaluation + best + save,
        step_seconds=tokens_per_step / rate + beside,
    )


def training_speed(config: TrainConfig, flop_per_token: Callable[[], float], gpu: str | None = None) -> Speed | None:
    """Tokens a second: as measured here, else of the card `gpu` or that of the settings; None where neither is known.

    With `gpu` it is of that card, whatever this machine has measured.
    """
    if gpu is None and (rate := last_figures(rate_key(config)).get("tokens_per_second")):
        return measured_speed(rate)
    card = gpu or config.resources.accelerator_type
    return estimate_tokens(card, flop_per_token()) if card in CARDS else None


def num_passes(config: TrainConfig) -> int:
    """Passes through the layers in a training step: forward, backward, and forward again to recompute activations."""
    return 3 if config.gradient_checkpointing else 2


def rate_key(config: TrainConfig) -> str:
    """Under which the tokens per second of such a run are kept."""
    settings = config.batch
    where = config.resources.accelerator_type or config.resources.device
    shape = f"{settings.sequence_length} {settings.micro} r{config.lora.r} {config.model.quantization}"
    kernel = "" if config.model.attention == "auto" else f" {config.model.attention}"
    return f"train {config.model.name} {where} {shape}{kernel}"


class Clock:
    """Seconds that a run's worker has been up, over all sessions; a killed one loses a heartbeat at most.

    `setup_seconds` of them passed before a session's first step. Kept in `file`, with what an evaluation, a
    checkpoint and a step last took: a session that begins near the deadline has no time to measure them.
    `started`: when the session began, by `now`; importing torch and the like may lie before this object.
    """

    def __init__(self, file: Path, now: Callable[[], float] = time.monotonic, started: float | None = None) -> None:
        self._file, self._now = file, now
        earlier = read_json(file) if file.exists() else {}
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
