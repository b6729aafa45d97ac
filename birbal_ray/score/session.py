"""What the driver makes of the ledger's snapshots: when the run must end, what it says meanwhile, what it records."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from birbal_ray.progress import ProgressLine, counted, duration
from birbal_ray.run import LOG_FOLDER, RunFailedError
from birbal_ray.schemas import ROWS_FOLDER
from birbal_ray.score.config import ResourceSettings
from birbal_ray.score.monitor import KILLED, Snapshot
from birbal_ray.storage import FileRecord, Folder

MAX_FATAL_INSTANCES = 16  # beyond that the engine is broken, not the prompts
SHARED_SECONDS = 120.0  # a network file system's attribute caches are older than a minute at times


class Watchdog:
    """Fails the run when no engine can start, engines keep dying, nothing moves, or written files never show here."""

    def __init__(self, resources: ResourceSettings, folder: Folder) -> None:
        self._resources, self._folder = resources, folder
        self._version, self._moved_at = -1, time.monotonic()
        self._unseen: list[str] | None = []  # files that writers published, until one is seen
        self._written_at: float | None = None  # when they published the first

    def check(self, seen: Snapshot) -> None:
        """Raise RunFailedError if it is time to stop."""
        if seen.version != self._version:
            self._version, self._moved_at = seen.version, time.monotonic()
        if reason := self._why_stop(seen):
            raise RunFailedError(f"{reason} (logs: {self._folder.at(LOG_FOLDER)})")
        if self._unseen is not None:
            self._unseen += [f"{ROWS_FOLDER}/{name}" for name in seen.files]
        if self._unseen:
            self._written_at = self._written_at or time.monotonic()
            if any(self._folder.is_file(name) for name in self._unseen[:3]):
                self._unseen = None
            elif time.monotonic() - self._written_at > SHARED_SECONDS:
                raise RunFailedError(
                    f"{self._folder.at(self._unseen[0])}: written on another node and not seen here; --output must be "
                    "on storage that all nodes see, or an s3:// or gs:// URL"
                )

    def _why_stop(self, seen: Snapshot) -> str | None:
        asked, last = self._resources, seen.deaths[-1] if seen.deaths else KILLED
        if seen.num_unstartable >= asked.num_replicas:
            return f"no engine could start; {last}"
        if seen.most_restarts > asked.max_engine_restarts:
            return (
                f"an engine died {seen.most_restarts} times, resources.max_engine_restarts is "
                f"{asked.max_engine_restarts}; the last time: {last}"
            )
        if len(seen.fatal) > MAX_FATAL_INSTANCES:
            return (
                f"engines died of {len(seen.fatal)} different instances, so the engine is broken rather than the "
                f"prompts; the last one: {seen.fatal[-1]}"
            )
        if time.monotonic() - self._moved_at > asked.no_progress_minutes * 60:
            state = "loading its model" if seen.num_ready == 0 else "at work"
            return (
                f"no progress for {asked.no_progress_minutes:g} minutes (resources.no_progress_minutes); "
                f"{seen.num_started} engine(s) started, last seen {state}"
            )
        return None


class Session:
    """What one session sees of its pipeline: files, rates, deaths. Feeds the progress line and progress.json.

    `report` takes the fields of progress.json (Run.progress); `name` goes in front of the line.
    """

    def __init__(
        self, progress: ProgressLine, rows_before: int, report: Callable[..., None] | None = None, name: str = ""
    ) -> None:
        self.files: dict[str, FileRecord] = {}  # written, by name
        self._started = time.monotonic()
        self.last = Snapshot(self._started)
        self._progress, self._rows_before, self._report, self._name = progress, rows_before, report, name

    def see(self, snapshot: Snapshot) -> None:
        """Take a snapshot in."""
        for death in snapshot.deaths[len(self.last.deaths) :]:
            self._progress.message(f"{self._name}an engine died: {death}")
        for fatal in snapshot.fatal[len(self.last.fatal) :]:
            self._progress.message(f"{self._name}an error row, because engines died of it: {fatal}")
        self.files |= snapshot.files
        self.last = snapshot
        now = rates(snapshot, self._rows_before)
        text = self._name + progress_text(snapshot, now)
        self._progress.update(text)
        if self._report:
            self._report(text=text, **now)

    def record(self) -> dict[str, Any]:
        """For sessions/ and the manifest: rows, seconds by phase, rates, every death with its reason.

        Steady state runs from the first engine's being ready to the last file's being written.
        """
        seen = self.last
        ready_at = seen.ready_at if seen.ready_at is not None else time.monotonic()
        steady = max(0.0, (seen.written_at or ready_at) - ready_at)
        computed = seen.counts["prompt_tokens"] + seen.counts["completion_tokens"]
        return {
            "rows": seen.rows_written,
            "load_seconds": round(ready_at - seen.started_at, 3),
            "steady_seconds": round(steady, 3),
            "rows_per_second": round(seen.rows_written / steady, 3) if steady else None,
            "tokens_per_second": round(computed / steady, 1) if steady else None,
            "engine_restarts": len(seen.deaths) + seen.num_moves,
            "deaths": list(seen.deaths),
            "fatal_instances": list(seen.fatal),
            "wall_seconds": round(time.monotonic() - self._started, 3),
        }


def rates(seen: Snapshot, rows_before: int) -> dict[str, Any]:
    """Fields of progress.json: rows done and to do, rates since the first engine was ready, the time left.

    The time left goes by expected tokens, not rows: tasks of long completions come first.
    """
    counts, now = seen.counts, time.monotonic()
    rows = max(seen.rows_written, counts["rows"])
    seconds = max(1e-9, now - seen.ready_at) if seen.ready_at is not None else None
    work_rate = counts["work"] / seconds if seconds else 0.0
    left = max(0, seen.work_total - counts["work"])
    total = rows_before + seen.rows_total
    return {
        "done": min(total, rows_before + rows),
        "total": total,
        "rate_per_second": round(rows / seconds, 3) if seconds else None,
        "prompt_tokens_per_second": round(counts["prompt_tokens"] / seconds, 1) if seconds else None,
        "cached_fraction": counts["cached_tokens"] / counts["prompt_tokens"] if counts["prompt_tokens"] else 0.0,
        "errors": max(seen.errors_written, counts["errors"]),
        "eta_seconds": round(left / work_rate, 1) if work_rate else None,
        "num_engines": seen.num_ready,
        "running": seen.running[:20],
    }


def progress_text(seen: Snapshot, now: Mapping[str, Any]) -> str:
    """The progress line; `now`: what `rates` gives."""
    if seen.ready_at is None:
        waited = duration(time.monotonic() - seen.started_at)
        return f"loading the model ({seen.num_started} engine(s) started, {waited})"
    eta = now["eta_seconds"]
    parts = [
        f"{now['done']}/{now['total']} rows",
        f"{now['rate_per_second']:.1f} rows/s",
        f"{now['prompt_tokens_per_second']:.0f} prompt tokens/s",
        f"{now['cached_fraction']:.0%} from cache",
        counted(now["errors"], "error"),
        f"ETA {duration(eta)}" if eta is not None else "ETA ?",
    ]
    if seen.deaths or seen.num_moves:
        parts.append(counted(len(seen.deaths) + seen.num_moves, "engine restart"))
    return " · ".join(parts)
