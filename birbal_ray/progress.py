"""How far work is, how fast it goes, and how long it takes.

A live line on stderr; the times of a pipeline's steps; the figures that steps keep on this machine for the next
estimate, and until there are any, arithmetic on the cards' data sheets.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TextIO

from birbal_ray.settings import Settings, canonical_hash
from birbal_ray.storage import Folder, RunError, cache_folder, write_atomic

FIGURES_FILE = "throughput.json"
CLOCK_FILE, PLAN_FILE = "clock.json", "plan.json"  # of a pipeline: time taken and time planned, by step
# Of a step's settings: what doesn't change how fast it works here.
NOT_IN_KEYS = {
    *("output", "budget", "resources", "shard_rows", "scores", "mix", "adapters", "merged", "gate", "primary"),
    *("num_trials", "num_initial", "predicted", "baselines", "mixes", "repeats", "transfer", "search"),
    *("policy", "task_score"),
}
PLAIN_INTERVAL_SECONDS = 15.0
LIVE_INTERVAL_SECONDS = 0.5

# Of the dense bf16 peak: QLoRA fine-tunes reach 0.47 on one RTX 4090 (torchtune's README, Llama-3.1-8B, 2k packs).
TRAIN_UTILISATION = (0.35, 0.50)
# A step with checkpointing passes the frozen weights three times (forward, again, backward): 2 flop a weight each.
TRAIN_FLOP_PER_WEIGHT = 6
PREFILL_UTILISATION = (0.40, 0.75)
DECODED_TOGETHER = (25, 60)  # sequences per reading of the weights; Mistral-7B on 24 GB holds about 40
WEIGHT_BYTES = 2  # bf16
MEASURED = "measured on this machine"
LOAD_SECONDS = {"cpu": (20.0, 60.0), "gpu": (40.0, 180.0)}  # an engine, or a model to train, until it works


class ProgressLine:
    """Shows the latest text of a long piece of work."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._given = stream
        self._live = (stream or sys.stderr).isatty()
        self._interval = LIVE_INTERVAL_SECONDS if self._live else PLAIN_INTERVAL_SECONDS
        self._last_time = -self._interval
        self._last_text = ""
        self._open = False

    def _write(self, text: str) -> None:
        # sys.stderr is looked up each time: it is exchanged while Ray is kept quiet.
        print(text, end="", file=self._given or sys.stderr, flush=True)

    def update(self, text: str) -> None:
        """Show `text`, unless one was shown a moment ago or it says the same."""
        now = time.monotonic()
        if text == self._last_text or now - self._last_time < self._interval:
            return
        self._last_time, self._last_text = now, text
        if self._live:
            shown = text[: shutil.get_terminal_size().columns - 1]  # a line that wraps can't be taken back
            self._write(f"\r\x1b[2K{shown}")
            self._open = True
        else:
            self._write(f"{text}\n")

    def message(self, text: str) -> None:
        """Print a line that stays, above the live one."""
        self.close()
        self._write(f"{text}\n")
        self._last_time, self._last_text = time.monotonic(), ""

    def close(self) -> None:
        """End the live line."""
        if self._open:
            self._write("\r\x1b[2K")
            self._open = False


@contextlib.contextmanager
def repeating(seconds: float, work: Callable[[], None]) -> Iterator[None]:
    """Call `work` every so many seconds, in a thread, while the block runs.

    A full disk or an outage is no error here: the work comes again, and the block itself will meet it.
    """
    done = threading.Event()

    def run() -> None:
        while not done.wait(seconds):
            with contextlib.suppress(OSError, RunError):
                work()

    thread = threading.Thread(target=run, name="repeating", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class Times(NamedTuple):
    """Of a pipeline, in seconds: its budget, what its steps have taken, and what plan.json says of each, by step."""

    budget: float | None
    spent: Mapping[str, float]
    plans: Mapping[str, Mapping[str, Any]]


def read_times(run: Folder) -> Times:
    """The times of the pipeline in `run`; empty where there is none (other tools call files clock.json, too)."""
    budget, spent, plans = None, {}, {}
    with contextlib.suppress(FileNotFoundError, RunError, KeyError, TypeError, ValueError, AttributeError):
        clock = run.read_json(CLOCK_FILE)
        spent = {step: float(seconds) for step, seconds in clock["spent_seconds"].items()}
        budget = clock.get("budget_seconds")
    with contextlib.suppress(FileNotFoundError, RunError, KeyError, TypeError, ValueError):
        steps = run.read_json(PLAN_FILE)["steps"]
        plans = {one["step"]: {**one, "planned_seconds": float(one["planned_seconds"])} for one in steps}
    return Times(budget, spent, plans)


def figures_key(step: str, config: Settings) -> str:
    """Under which a step's figures are kept: equal for settings that do the same work.

    Resources, places, the budget, and how much of its kind of work a step is asked for are left out.
    """
    asked = config.model_dump(mode="json", exclude=NOT_IN_KEYS)
    if step == "evaluate":
        del asked["tasks"]["instances_per_task"]
    return f"{step} {canonical_hash(asked)[:16]}"


def save_figures(key: str, **figures: float) -> None:
    """Keep what a step's parts took on this machine (load_seconds, rows_per_second, …), for the next run's estimate."""
    content = {**_kept_figures(), **{f"{key} {name}": value for name, value in figures.items()}}
    with contextlib.suppress(OSError):  # an estimate isn't worth a failed run
        write_atomic(cache_folder() / FIGURES_FILE, json.dumps(content, indent=1).encode())


def last_figures(key: str) -> dict[str, float]:
    """What `save_figures` kept under this key on this machine, by name; empty before the first run."""
    kept = _kept_figures()
    return {name.removeprefix(f"{key} "): value for name, value in kept.items() if name.startswith(f"{key} ")}


def _kept_figures() -> dict[str, float]:
    try:
        return dict(json.loads((cache_folder() / FIGURES_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU's figures. `memory_gib` is what its driver reports, less than the data sheet's."""

    memory_gib: float
    tflops: float  # dense bf16 with float32 sums
    bandwidth_gb: float  # GB/s


# By Ray's names; NVIDIA's data sheets.
CARDS = {
    "T4": Card(14.7, 65, 320),
    "V100": Card(15.8, 125, 900),
    "A10G": Card(22.5, 70, 600),
    "L4": Card(22.5, 121, 300),
    "GeForce-RTX-3090": Card(23.6, 71, 936),
    "GeForce-RTX-4090": Card(23.6, 165, 1008),
    "GeForce-RTX-5090": Card(31.4, 209, 1792),
    "A100": Card(39.4, 312, 1555),  # Ray's name for both sizes; planned as the smaller one
    "A100-40G": Card(39.4, 312, 1555),
    "L40S": Card(44.4, 362, 864),
    "A100-80G": Card(79.3, 312, 2039),
    "H100": Card(79.2, 989, 3350),
    "H200": Card(139.8, 989, 4800),
}


class Speed(NamedTuple):
    """A rate per second as a range. `source` says where it comes from."""

    low: float
    high: float
    source: str


def measured_speed(rate: float) -> Speed:
    """A rate that was seen, give or take a tenth."""
    return Speed(rate * 0.9, rate * 1.1, MEASURED)


def estimate_tokens(card: str, flop_per_token: float) -> Speed:
    """Tokens a second of a QLoRA fine-tune on one card. Raises KeyError for a card that isn't in CARDS."""
    low, high = (CARDS[card].tflops * 1e12 * share / flop_per_token for share in TRAIN_UTILISATION)
    shares = " to ".join(f"{share:.0%}" for share in TRAIN_UTILISATION)
    return Speed(low, high, f"arithmetic: {shares} of {CARDS[card].tflops:g} TFLOP/s ({card}'s data sheet)")


def estimate_prompts(card: str, num_weights: int, own_tokens: float, completion_tokens: float) -> Speed:
    """Prompts a second of one vLLM engine in bf16 whose shared prefixes are cached.

    `own_tokens`, `completion_tokens`: of one prompt, on average. Raises KeyError for a card that isn't in CARDS.
    """
    figures = CARDS[card]

    def rate(utilisation: float, together: int) -> float:
        prefill = own_tokens * 2 * num_weights / (figures.tflops * 1e12 * utilisation)
        decode = completion_tokens * WEIGHT_BYTES * num_weights / (figures.bandwidth_gb * 1e9 * together)
        return 1 / (prefill + decode)

    low, high = (rate(*pair) for pair in zip(PREFILL_UTILISATION, DECODED_TOGETHER, strict=True))
    source = f"arithmetic: {own_tokens:.0f} own and {completion_tokens:.0f} new tokens a prompt, {card}'s data sheet"
    return Speed(low, high, source)


def counted(number: int, noun: str) -> str:
    """`1 task`, `2,000 tasks`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """`42 s`, `3 min 05 s`, `2 h 07 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
