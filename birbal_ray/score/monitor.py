"""Where replicas say how far they are, for the driver to read."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Snapshot:
    """State of all replicas. `counts`: rows, errors, prompt/cached/completion tokens since the start."""

    num_started: int = 0
    num_ready: int = 0
    first_ready_at: float | None = None  # time.time() when the first engine took requests
    num_restarts: int = 0  # engines that came back on the node they died on
    num_moves: int = 0  # engines that came back elsewhere: their node was lost
    counts: Counter[str] = field(default_factory=Counter)
    deaths: list[str] = field(default_factory=list)
    version: int = 0  # grows with every sign of life


class EngineMonitor:
    """A Ray actor (zero CPUs) beside the driver.

    Ray restarts a dead replica under the same actor id: the second `started` of an id is a restart,
    unless it comes from another node, which is a preemption and not counted against the limit.
    """

    def __init__(self) -> None:
        self._snapshot = Snapshot()
        self._nodes: dict[str, str] = {}
        self._ready: set[str] = set()
        self._dead: set[str] = set()  # replicas that said so and have not come back

    def started(self, replica: str, node: str) -> None:
        """A replica's process runs (before it loads its model)."""
        if replica not in self._nodes:
            self._snapshot.num_started += 1
        elif self._nodes[replica] == node:
            self._snapshot.num_restarts += 1
        else:
            self._snapshot.num_moves += 1
        self._nodes[replica] = node
        self._ready.discard(replica)
        self._dead.discard(replica)
        self._touch()

    def ready(self, replica: str) -> None:
        """A replica takes requests."""
        self._ready.add(replica)
        if self._snapshot.first_ready_at is None:
            self._snapshot.first_ready_at = time.time()
        self._touch()

    def died(self, replica: str, reason: str) -> None:
        """A replica's engine failed; its process ends now. Every shard in flight says so: it counts once."""
        if replica not in self._dead:
            self._dead.add(replica)
            self._ready.discard(replica)
            self._snapshot.deaths.append(reason)
            self._touch()

    def add(self, replica: str, counts: dict[str, int]) -> None:
        """What a replica finished since its last word."""
        self._snapshot.counts.update(counts)
        self._touch()

    def snapshot(self) -> Snapshot:
        """The state now."""
        return self._snapshot

    def _touch(self) -> None:
        self._snapshot.num_ready = len(self._ready)
        self._snapshot.version += 1
