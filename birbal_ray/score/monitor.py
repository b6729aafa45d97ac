"""One ledger of a running score pipeline: what is given out, what is written, which engines died and of what."""

from __future__ import annotations

import math
import pickle
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from birbal_ray.score.shards import WrittenFile
from birbal_ray.storage import FileRecord

if TYPE_CHECKING:
    from birbal_ray.score.adaptive import Decision, Schedule

KILLED = "its process was killed (out of memory?)"
DEATHS_OF_A_SUSPECT = 2  # a shard that was in flight at so many deaths runs alone
LOSSES_OF_A_SHARD = 3  # a shard that was in flight when so many nodes were lost takes the blame for the next one
COUNTED = ("rows", "errors", "prompt_tokens", "cached_tokens", "completion_tokens")

Part = tuple[int, int]  # rows of a shard: [first, last)


@dataclass(slots=True)
class Suspect:
    """A shard that was in flight when engines died. `parts`: what is sent to the engine one after the other."""

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


@dataclass(slots=True)
class Replica:
    """What the ledger knows of one engine's process, which Ray starts again under the same id."""

    node: str = ""  # where it was started last
    takes_requests: bool = False
    was_ready: bool = False  # at any time
    is_dead: bool = False  # it said so and has not come back
    failed_starts: int = 0  # since it was ready
    restarts: int = 0  # beside those that `fatal` rows or the loss of its node explain
    has_worked: bool = True  # completed rows since it was started; also before its first start
    in_flight: dict[str, int] = field(default_factory=dict)  # shard → its number of rows
    trying: tuple[str, Part] | None = None  # a shard's part that has the engine alone


@dataclass
class Snapshot:
    """State of a session. `counts`: COUNTED and `work`, of what engines completed; the clock is time.monotonic()."""

    started_at: float
    ready_at: float | None = None  # when the first engine took requests
    written_at: float | None = None  # when the last file was written
    num_started: int = 0
    num_ready: int = 0
    num_unstartable: int = 0  # replicas that were tried too often and take no part
    most_restarts: int = 0  # of one replica, beside those that `fatal` rows or the loss of its node explain
    num_moves: int = 0  # engines that came back elsewhere because their node was lost
    counts: Counter[str] = field(default_factory=Counter)
    rows_total: int = 0  # that this session is to write, at most
    work_total: int = 0
    rows_written: int = 0
    errors_written: int = 0
    running: list[str] = field(default_factory=list)  # shards in engines
    deaths: list[str] = field(default_factory=list)
    fatal: list[str] = field(default_factory=list)  # instances that ended engines
    version: int = 0  # grows with finished rows and files, and with starts of engines that may lead to some
    files: dict[str, FileRecord] = field(default_factory=dict)  # written since the last snapshot, by name
    decisions: list[Decision] = field(default_factory=list)  # made since the last snapshot


def alive_nodes() -> set[str]:
    """Ids of the cluster's living nodes, by its head."""
    import ray

    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


class EngineMonitor:
    """A Ray actor (zero CPUs) beside the driver, that replicas and the source of shards talk to.

    Ray restarts a dead replica under the same actor id, wherever there is room: the second `started` of an id is a
    restart, unless its node was lost, which is a preemption and not counted. A node that dies without a word is
    known to be dead by then: it is why Ray starts the replica elsewhere. `limit` bounds the shards that are given out
    and not written yet. Same calls, same answers: a source that Ray starts again gets the same shards. After
    `seconds` nothing more is given out, where the schedule allows that.
    """

    def __init__(
        self,
        schedule: Schedule,
        limit: int,
        max_start_retries: int,
        seconds: float = math.inf,
        alive_nodes: Callable[[], set[str]] = alive_nodes,
    ) -> None:
        self._schedule, self._limit, self._max_start_retries = schedule, limit, max_start_retries
        self._alive_nodes = alive_nodes
        self._deadline = time.monotonic() + seconds
        self._issued: list[bytes] = []
        self._written: set[str] = set()
        self._state = Snapshot(time.monotonic())
        self._replicas: defaultdict[str, Replica] = defaultdict(Replica)  # by actor id
        self._suspects: dict[str, Suspect] = {}  # by shard
        self._losses = Counter[str]()  # by shard: lost nodes with a replica that had it in flight
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
        known = self._replicas[replica]
        if known.node not in ("", node) and self._is_lost(known):  # its engine may have died of that first
            self._state.num_moves += 1
            known.in_flight, known.trying = {}, None
        elif known.was_ready:
            known.restarts += 1
            self.died(replica, KILLED)
        elif known.node and not known.is_dead:
            self.start_failed(replica, KILLED)
        known.node, known.takes_requests, known.is_dead = node, False, False
        if known.has_worked:  # one that starts again and again without a row between makes no progress
            known.has_worked = False
            self._state.version += 1
        return known.failed_starts <= self._max_start_retries

    def _is_lost(self, known: Replica) -> bool:
        """Whether a replica's node is gone, and not time after time with one and the same shard."""
        shards = {*known.in_flight, *((known.trying[0],) if known.trying else ())}
        if known.node in self._alive_nodes() or any(self._losses[shard] >= LOSSES_OF_A_SHARD for shard in shards):
            return False
        self._losses.update(shards)
        return True

    def start_failed(self, replica: str, reason: str) -> None:
        """A replica could not load its engine; its process ends now."""
        self._replicas[replica].failed_starts += 1
        self._replicas[replica].is_dead = True
        self._state.deaths.append(f"replica {replica[:12]} did not start: {reason}")

    def ready(self, replica: str) -> None:
        """A replica takes requests."""
        known = self._replicas[replica]
        self._state.version += not known.was_ready
        known.takes_requests = known.was_ready = True
        known.failed_starts = 0
        self._state.ready_at = self._state.ready_at or time.monotonic()

    def begin(self, replica: str, shard: str, num_rows: int) -> tuple[bool, list[Part], dict[int, str]]:
        """(whether the shard must have the engine alone, its parts, rows that must not be sent, with the reason).

        A shard that is not alone counts as in flight from now on.
        """
        suspect = self._suspects.get(shard) or Suspect([(0, num_rows)])
        if not suspect.alone:
            self._replicas[replica].in_flight[shard] = num_rows
        return suspect.alone, suspect.parts, suspect.fatal

    def trying(self, replica: str, shard: str, part: Part) -> None:
        """A suspect's part is about to have the replica's engine alone."""
        self._replicas[replica].trying = (shard, part)

    def completed(self, replica: str, shard: str) -> None:
        """A shard has left a replica's engine."""
        self._replicas[replica].trying = None
        self._replicas[replica].in_flight.pop(shard, None)

    def died(self, replica: str, reason: str) -> None:
        """A replica's engine failed; its process ends now. Every shard in flight says so: it counts once.

        Who was in the engine is suspected; a part that had it alone is blamed.
        """
        known, deaths = self._replicas[replica], self._state.deaths
        if known.is_dead:
            return
        shards, trying = known.in_flight, known.trying
        known.is_dead, known.in_flight, known.trying = True, {}, None
        if trying is None:
            deaths.append(f"replica {replica[:12]} at {', '.join(sorted(shards)) or 'no shard'}: {reason}")
            for shard, num_rows in shards.items():
                self._suspects.setdefault(shard, Suspect([(0, num_rows)])).at_deaths.append(replica)
            return
        shard, part = trying
        deaths.append(f"replica {replica[:12]} at {shard}, rows {part[0]} to {part[1]} alone: {reason}")
        known.restarts -= 1  # it finds out; the restart that follows is no one's fault
        suspect = self._suspects[shard]
        if (
            part not in suspect.parts
        ):  # another replica died of it, too: one that Ray lost sight of, with the same shard
            return
        self._state.version += 1  # half as many rows are left to look through
        if suspect.blame(part, reason):
            self._state.fatal.append(f"{shard}, row {part[0]}: {reason}")
            for other in suspect.at_deaths:  # the row explains them
                self._replicas[other].restarts -= 1
            suspect.at_deaths.clear()

    def add(self, replica: str, counts: dict[str, int]) -> None:
        """What a replica completed since its last report; also to be had from Ray's metrics (Prometheus)."""
        self._replicas[replica].has_worked = True
        self._state.version += 1
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

    def written(self, file: WrittenFile) -> None:
        """A replica published a file; after a death it may do so again, and with other bytes."""
        self._state.files[file.name] = file.record
        self._state.version += 1
        if file.name in self._written:
            return
        self._written.add(file.name)
        self._state.rows_written += file.num_rows
        self._state.errors_written += file.num_errors
        self._state.written_at = time.monotonic()
        self._schedule.record(file)

    def snapshot(self) -> Snapshot:
        """The state now; files and decisions since the last call."""
        state, replicas = self._state, self._replicas.values()
        state.num_started = len(replicas)
        state.num_ready = sum(one.takes_requests and not one.is_dead for one in replicas)
        state.num_unstartable = sum(one.failed_starts > self._max_start_retries for one in replicas)
        state.most_restarts = max((one.restarts for one in replicas), default=0)
        state.rows_total, state.work_total = self._schedule.size()
        state.decisions = self._schedule.decided()
        state.running = sorted({shard for one in replicas for shard in one.in_flight})
        state.running += [one.trying[0] for one in replicas if one.trying]
        given, state.files = replace(state), {}
        return given
