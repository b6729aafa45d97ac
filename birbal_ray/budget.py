"""The time that a recipe's steps have taken of its budget, and what was decided within it: clock.json."""

from __future__ import annotations

import contextlib
import functools
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from birbal_ray.progress import CLOCK_FILE, repeating
from birbal_ray.recipe import STEPS, ShareSettings
from birbal_ray.run import progress_seconds
from birbal_ray.settings import ConfigError
from birbal_ray.storage import Folder, RunError


class BudgetClock:
    """Seconds that each step of a recipe has taken, over all sessions; a killed one loses a beat at most.

    Kept in clock.json of the recipe's folder, with what was decided once for a step, so that a continuation asks it
    for the same. Without a budget it only counts. `is_new`: no earlier session had this budget. `least`: seconds
    that each step works in, at least. `overwrite`: steps that start from scratch; where an earlier session began to
    overwrite and did not come to its end, only those that it has not made.
    """

    def __init__(
        self,
        folder: Folder,
        budget: float | None,
        shares: ShareSettings,
        least: Mapping[str, float],
        *,
        overwrite: Sequence[str] = (),
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.budget, self._shares, self.least = budget, shares.model_dump(), least
        self._folder, self._now = folder, now
        earlier: dict[str, Any] = {}
        with contextlib.suppress(FileNotFoundError):
            earlier = folder.read_json(CLOCK_FILE)
        self._overwrites = bool(overwrite)
        self._to_overwrite: set[str] = set(earlier.get("to_overwrite", []))
        if overwrite:  # not of a step that an earlier command had and this one has not
            self._to_overwrite &= set(overwrite)
        self._replaced: dict[str, Any] | None = None  # clock.json, until the first step has taken its folder
        if overwrite and not self._to_overwrite:
            self._replaced, earlier, self._to_overwrite = earlier, {}, set(overwrite)
        self.spent: dict[str, float] = dict(earlier.get("spent_seconds", {}))
        # Another budget is another plan: what was decided for the old one does not bind it.
        same = earlier.get("budget_seconds") == budget
        self.decided: dict[str, Any] = dict(earlier.get("decided", {})) if same else {}
        self.search_failed = bool(earlier.get("search_failed"))  # in an earlier session, or in this one
        self.is_new = not earlier or not same
        self.has_ended = False
        self._lock = threading.Lock()

    @property
    def total(self) -> float:
        """Seconds of all steps so far."""
        return sum(self.spent.values())

    @contextlib.contextmanager
    def running(self, step: str) -> Iterator[None]:
        """Count the block for `step`, and write the count down every few seconds; not once the recipe `has_ended`."""
        if self.has_ended:
            yield
            return
        last = self._now()

        def count() -> None:
            nonlocal last
            with self._lock:
                now = self._now()
                self.spent[step], last = self.spent.get(step, 0.0) + now - last, now
                self._save()

        save: Callable[[], object] = count
        try:
            with repeating(progress_seconds(self._folder), count):
                yield
        except ConfigError:
            if self._replaced and step == STEPS[0]:  # nothing was deleted, and the time that was spent counts as before
                save = functools.partial(self._folder.write_json, CLOCK_FILE, self._replaced)
            raise
        finally:
            with contextlib.suppress(OSError, RunError):  # a full disk, an outage: the step itself will say so
                save()

    def left(self, step: str) -> float:
        """Seconds from now that `step` may take; infinite without a budget, and for the mix, which has no share.

        Training gets what the others' shares do not hold back. A step that has used up its share in earlier sessions
        still gets the least that it works in.
        """
        if self.budget is None or step == "mix":
            return math.inf
        later = STEPS[STEPS.index(step) + 1 :]
        held_back = sum(max(0.0, self._share(one) - self.spent.get(one, 0.0)) for one in later)
        rest = self.budget - self.total - held_back
        if step == "train":
            return rest
        return max(self.least.get(step, 0.0), self._share(step) - self.spent.get(step, 0.0))

    def overrun(self, step: str) -> float:
        """Seconds that `step` took beyond its share; 0 where it has none."""
        has_share = self.budget is not None and step in self._shares
        return self.spent.get(step, 0.0) - self._share(step) if has_share else 0.0

    def starts_over(self, step: str) -> bool:
        """Whether a command that overwrites has yet to make `step` from scratch."""
        return self._overwrites and step in self._to_overwrite

    def restart(self, step: str) -> bool:
        """Let a command that overwrites start `step`, which it has not yet, from scratch; whether it does."""
        if not self._overwrites or step in self._to_overwrite:
            return False
        with self._lock:
            self._to_overwrite.add(step)
            self.spent[step] = 0.0
            self.decided = {key: value for key, value in self.decided.items() if not key.startswith(f"{step}.")}
        return True

    def keep(self, step: str) -> None:
        """Take what is in a step's folder for this recipe's: a command that overwrites does not start it over."""
        if step in self._to_overwrite:
            with self._lock:
                self._to_overwrite.discard(step)
                self._save()

    def decide(self, key: str, make: Callable[[], Any]) -> Any:
        """What was decided for `key` in an earlier session, else `make()`, which is kept."""
        if key not in self.decided:
            with self._lock:
                self.decided[key] = make()
                self._save()
        return self.decided[key]

    def _share(self, step: str) -> float:
        return (self.budget or 0.0) * self._shares.get(step, 0.0)

    def _save(self) -> None:
        record = {
            "budget_seconds": self.budget,
            "spent_seconds": {step: round(seconds, 2) for step, seconds in self.spent.items()},
            "decided": self.decided,
            "search_failed": self.search_failed,
            "to_overwrite": sorted(self._to_overwrite),
        }
        self._folder.write_json(CLOCK_FILE, record)
