"""One ledger of a running score pipeline: what is given out, what is written, which engines died and of what."""

from __future__ import annotations

import math
import pickle
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from birbal_ray.progress import ProgressLine, counted, duration
from birbal_ray.run import LOG_FOLDER, RunFailedError
from birbal_ray.schemas import ROWS_FOLDER
from birbal_ray.score.config import ResourceSettings
from birbal_ray.score.shards import WrittenFile
from birbal_ray.storage import Folder

if TYPE_CHECKING:
    from birbal_ray.score.adaptive import Decision, Schedule

KILLED = "its process was killed (out of memory?)"
DEATHS_OF_A_SUSPECT = 2  # a shard that was in flight at so many deaths runs alone
MAX_FATAL_INSTANCES = 16  # beyond that the engine is broken, not the prompts
SHARED_SECONDS = 120.0  # a network file system's attribute caches are older than a minute at times
COUNTED = ("rows", "errors", "prompt_tokens", "cached_tokens", "completion_tokens")

Part = tuple[int, int]  # rows of a shard: [first, last)


@dataclass(slots=True)
class Suspect:
    """A shard that was in flight when engines died. `parts`: what is sent to the engine one after the other."""

    name: str
    parts: list[Part]
    at_deaths: list[str] = field(default_factory=list)  # replicas that died with this shard among others in flight
    fatal: dict[int, str] = field(default_factory=dict)  # row → the engine's last words

    @property
    def alone(self) -> bool:
        """Whether nothing else may be in the engine beside it."""
        return len(self.at_deaths) >= DEATHS_OF_A_SUSPECT or bool(self.fatal) or len(self.parts) > 1

    def blame(self, part: Part, reason: str) -> bool:
        """The engine died of this part: halve it, or, where it is one row, name the row. True when it was one."""
        first, last = part
        position = self.parts.index(part)
        if last - first == 1:
            del self.parts[position]
            self.fatal[first] = reason
            return True
        middle = (first + last) // 2
        self.parts[position : position + 1] = [(first, middle), (middle, last)]
        return False


@dataclass
class Snapshot:
    """State of a session. `counts`: COUNTED and `work`, of what engines completed; the clock is time.monotonic()."""

    started_at: float
    ready_at: float | None = None  # when the first engine took requests
    written_at: float | None = None  # when the last file was written
    num_started: int = 0
    num_ready: int = 0
    num_unstartable: int = 0  # replicas that were tried too often and take no part
    most_restarts: int = 0  # of one replica, on the node it died on, beside those that `fatal` rows explain
    num_moves: int = 0  # engines that came back elsewhere: their node was lost
    counts: Counter[str] = field(default_factory=Counter)
    rows_total: int = 0  # that this session is to write, at most
    work_total: int = 0
    rows_written: int = 0
    errors_written: int = 0
    running: list[str] = field(default_factory=list)  # shards in engines
    deaths: list[str] = field(default_factory=list)
    fatal: list[str] = field(default_factory=list)  # instances that ended engines
    version: int = 0  # grows with every sign of life
    files: list[WrittenFile] = field(default_factory=list)  # written since the last snapshot
    decisions: list[Decision] = field(default_factory=list)  # made since the last snapshot


class EngineMonitor:
    """A Ray actor (zero CPUs) beside the driver, that replicas, writers and the source of shards talk to.

    Ray restarts a dead replica under the same actor id: the second `started` of an id is a restart, unless it
    comes from another node, which is a preemption and not counted. `limit` bounds the shards that are given out
    and not written yet. Same calls, same answers: a source that Ray starts again gets the same shards. After
    `seconds` nothing more is given out, where the schedule allows that.
    """

    def __init__(
        self,
        schedule: Schedule,
        limit: int,
        max_start_retries: int,
        seconds: float = math.inf,
    ) -> None:
        self._schedule, self._limit = schedule, limit
        self._deadline = time.monotonic() + seconds
        self._max_start_retries = max_start_retries
        self._issued: list[bytes] = []
        self._written: set[str] = set()
        self._state = Snapshot(time.monotonic())
        self._nodes: dict[str, str] = {}
        self._ready: set[str] = set()
        self._was_ready: set[str] = set()
        self._failed_starts: Counter[str] = Counter()
        self._restarts: Counter[str] = Counter()
        self._dead: set[str] = set()  # replicas that said so and have not come back
        self._in_flight: dict[str, dict[str, int]] = {}  # replica → shard → its number of rows
        self._trying: dict[str, tuple[str, Part]] = {}  # replica → the part that has its engine alone
        self._suspects: dict[str, Suspect] = {}
        self._meters: dict[str, Any] = {}

    def take(self, position: int) -> list[bytes] | None:
        """Pickled shards from `position` on: none for now when the list is empty, none ever again when it is None."""
        if time.monotonic() > self._deadline and self._issued:
            self._deadline = math.inf
            self._schedule.end()
        while len(self._issued) - len(self._written) < self._limit:
            shard = self._schedule.next()
            if shard is None:
                break
            self._issued.append(pickle.dumps(shard))
        return None if position == len(self._issued) and self._schedule.finished else self._issued[position:]

    def started(self, replica: str, node: str) -> bool:
        """A replica's process runs, before it loads its model; False: it was tried too often and is to wait."""
        before = self._nodes.get(replica)
        self._nodes[replica] = node
        if before is None:
            self._state.num_started += 1
        elif before != node:
            self._state.num_moves += 1
            self._in_flight.pop(replica, None)
            self._trying.pop(replica, None)
        elif replica in self._was_ready:
            self._restarts[replica] += 1
            if replica not in self._dead:
                self._bury(replica, KILLED)
        elif replica not in self._dead:
            self.start_failed(replica, KILLED)
        self._ready.discard(replica)
        self._dead.discard(replica)
        self._touch()
        return self._failed_starts[replica] <= self._max_start_retries

    def start_failed(self, replica: str, reason: str) -> None:
        """A replica could not load its engine; its process ends now."""
        self._failed_starts[replica] += 1
        self._state.deaths.append(f"replica {replica[:12]} did not start: {reason}")
        self._dead.add(replica)
        self._touch()

    def ready(self, replica: str) -> None:
        """A replica takes requests."""
        self._ready.add(replica)
        self._was_ready.add(replica)
        self._failed_starts[replica] = 0
        self._state.ready_at = self._state.ready_at or time.monotonic()
        self._touch()

    def begin(self, replica: str, shard: str, num_rows: int) -> tuple[bool, list[Part], dict[int, str]]:
        """(whether the shard must have the engine alone, its parts, rows that must not be sent, with the reason).

        A shard that is not alone counts as in flight from now on.
        """
        suspect = self._suspects.get(shard) or Suspect(shard, [(0, num_rows)])
        if not suspect.alone:
            self._in_flight.setdefault(replica, {})[shard] = num_rows
        return suspect.alone, suspect.parts, suspect.fatal

    def trying(self, replica: str, shard: str, part: Part) -> None:
        """A suspect's part is about to have the replica's engine alone."""
        self._trying[replica] = (shard, part)

    def completed(self, replica: str, shard: str) -> None:
        """A shard has left a replica's engine."""
        self._trying.pop(replica, None)
        self._in_flight.get(replica, {}).pop(shard, None)

    def died(self, replica: str, reason: str) -> None:
        """A replica's engine failed; its process ends now. Every shard in flight says so: it counts once."""
        if replica not in self._dead:
            self._dead.add(replica)
            self._bury(replica, reason)
            self._touch()

    def add(self, replica: str, counts: dict[str, int]) -> None:
        """What a replica completed since its last report; also to be had from Ray's metrics (Prometheus)."""
        self._state.counts.update(counts)
        if not self._meters:
            from ray.util.metrics import Counter as Meter

            self._meters = {
                name: Meter(f"birbal_{name}", f"{name.replace('_', ' ')} of a scoring replica", ("replica",))
                for name in COUNTED
            }
        for name in COUNTED:
            if counts.get(name):  # a Meter refuses 0
                self._meters[name].inc(counts[name], {"replica": replica[:12]})
        self._touch()

    def written(self, file: WrittenFile) -> None:
        """A writer published a file. A retried shard may say so twice."""
        if file.name in self._written:
            return
        self._written.add(file.name)
        self._state.rows_written += file.num_rows
        self._state.errors_written += file.num_errors
        self._state.written_at = time.monotonic()
        self._state.files.append(file)
        self._schedule.record(file)
        self._touch()

    def snapshot(self) -> Snapshot:
        """The state now; files and decisions since the last call."""
        state = self._state
        state.rows_total, state.work_total = self._schedule.size()
        state.decisions = self._schedule.decided()
        state.running = sorted({shard for shards in self._in_flight.values() for shard in shards})
        state.running += [shard for shard, _ in self._trying.values()]
        given, state.files = replace(state), []
        return given

    def _bury(self, replica: str, reason: str) -> None:
        """Find out who was in the engine when it died."""
        shards = self._in_flight.pop(replica, {})
        if replica in self._trying:
            shard, part = self._trying.pop(replica)
            suspect = self._suspects[shard]
            self._state.deaths.append(f"replica {replica[:12]} at {shard}, rows {part[0]} to {part[1]} alone: {reason}")
            self._restarts[replica] -= 1  # it finds out; the restart that follows is no one's fault
            # Another replica may have died of it, too: one that Ray lost sight of, with the same shard.
            if part in suspect.parts and suspect.blame(part, reason):
                self._state.fatal.append(f"{shard}, row {part[0]}: {reason}")
                for other in suspect.at_deaths:  # the row explains them
                    self._restarts[other] -= 1
                suspect.at_deaths.clear()
            return
        self._state.deaths.append(f"replica {replica[:12]} at {', '.join(sorted(shards)) or 'no shard'}: {reason}")
        for shard, num_rows in shards.items():
            self._suspects.setdefault(shard, Suspect(shard, [(0, num_rows)])).at_deaths.append(replica)

    def _touch(self) -> None:
        state = self._state
        state.num_ready = len(self._ready - self._dead)
        state.num_unstartable = sum(count > self._max_start_retries for count in self._failed_starts.values())
        state.most_restarts = max(self._restarts.values(), default=0)
        state.version += 1


class Watchdog:
    """Fails the run when no engine can start, engines keep dying, nothing moves, or written files never show here."""

    def __init__(self, resources: ResourceSettings, folder: Folder) -> None:
        self._resources, self._folder, self._logs = resources, folder, folder.at(LOG_FOLDER)
        self._version, self._moved_at = -1, time.monotonic()
        self._unseen: list[str] | None = []  # files that writers published, until one is seen
        self._written_at: float | None = None  # when they published the first

    def check(self, seen: Snapshot) -> None:
        """Raise RunFailedError if it is time to stop."""
        asked, last = self._resources, seen.deaths[-1] if seen.deaths else KILLED
        if seen.num_unstartable >= asked.num_replicas:
            raise RunFailedError(f"no engine could start; {last} (logs: {self._logs})")
        if seen.most_restarts > asked.max_engine_restarts:
            raise RunFailedError(
                f"an engine died {seen.most_restarts} times, resources.max_engine_restarts is "
                f"{asked.max_engine_restarts}; the last time: {last} (logs: {self._logs})"
            )
        if len(seen.fatal) > MAX_FATAL_INSTANCES:
            raise RunFailedError(
                f"engines died of {len(seen.fatal)} different instances, so the engine is broken rather than the "
                f"prompts; the last one: {seen.fatal[-1]} (logs: {self._logs})"
            )
        if seen.version != self._version:
            self._version, self._moved_at = seen.version, time.monotonic()
        elif time.monotonic() - self._moved_at > asked.no_progress_minutes * 60:
            state = "loading its model" if seen.num_ready == 0 else "at work"
            raise RunFailedError(
                f"no progress for {asked.no_progress_minutes:g} minutes (resources.no_progress_minutes); "
                f"{seen.num_started} engine(s) started, last seen {state} (logs: {self._logs})"
            )
        if self._unseen is not None:
            self._unseen += [f"{ROWS_FOLDER}/{file.name}" for file in seen.files]
        if self._unseen:
            self._written_at = self._written_at or time.monotonic()
            if any(self._folder.is_file(name) for name in self._unseen[:3]):
                self._unseen = None
            elif time.monotonic() - self._written_at > SHARED_SECONDS:
                raise RunFailedError(
                    f"{self._folder.at(self._unseen[0])}: written on another node and not seen here; --output must be "
                    "on storage that all nodes see, or an s3:// or gs:// URL"
                )


class Session:
    """What one session sees of its pipeline: files, rates, deaths. Feeds the progress line and progress.json.

    `report` takes the fields of progress.json (Run.progress); `name` goes in front of the line.
    """

    def __init__(
        self, progress: ProgressLine, rows_before: int, report: Callable[..., None] | None = None, name: str = ""
    ) -> None:
        self.files: dict[str, WrittenFile] = {}
        self.last = Snapshot(time.monotonic())
        self._progress, self._rows_before, self._report, self._name = progress, rows_before, report, name

    def see(self, snapshot: Snapshot) -> None:
        """Take a snapshot in."""
        for death in snapshot.deaths[len(self.last.deaths) :]:
            self._progress.message(f"{self._name}an engine died: {death}")
        for fatal in snapshot.fatal[len(self.last.fatal) :]:
            self._progress.message(f"{self._name}an error row, because engines died of it: {fatal}")
        self.files |= {file.name: file for file in snapshot.files}
        self.last = snapshot
        text = self._name + progress_text(snapshot, self._rows_before)
        self._progress.update(text)
        if self._report:
            self._report(text=text, **rates(snapshot, self._rows_before))

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


def progress_text(seen: Snapshot, rows_before: int) -> str:
    """The progress line."""
    if seen.ready_at is None:
        waited = duration(time.monotonic() - seen.started_at)
        return f"loading the model ({seen.num_started} engine(s) started, {waited})"
    now = rates(seen, rows_before)
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
