"""Progress on stderr: one live line in a terminal, plain lines now and then when piped. Speeds kept for estimates."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TextIO

from birbal_ray.settings import Settings, canonical_hash
from birbal_ray.storage import RunError, cache_folder, write_atomic

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
    except (OSError, ValueError):
        return {}


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
