"""The Ray Data pipeline that scores shards, watched from the driver."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from birbal_ray.config.score import ScoreConfig
from birbal_ray.inference.board import ProgressBoard, Snapshot
from birbal_ray.inference.plan import Shard
from birbal_ray.inference.stages import Generate, Prepare, write_scored
from birbal_ray.run import RunError

WRITE_CPUS = 0.25  # logical: scoring and writing a shard takes milliseconds
POLL_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class ShardDone:
    """A shard's file stands under its final name."""

    file: str
    rows: int
    errors: int


def logical_cpus(config: ScoreConfig) -> float:
    """Logical CPUs that the pipeline needs at once, with one to spare."""
    replicas = config.resources.num_replicas * config.resources.cpus_per_replica
    return replicas + config.resources.num_prepare_workers + 2


def check_cluster(config: ScoreConfig) -> None:
    """Raise RunError when the connected cluster can never place the replicas (Ray would wait for ever)."""
    import ray

    have = ray.cluster_resources()
    wanted = {"CPU": logical_cpus(config)}
    if config.engine.device == "gpu":
        wanted["GPU"] = config.resources.num_replicas * config.resources.gpus_per_replica
        if config.resources.accelerator_type:
            wanted[f"accelerator_type:{config.resources.accelerator_type}"] = 0.001
    for name, amount in wanted.items():
        if have.get(name, 0.0) < amount:
            cards = sorted(key.split(":", 1)[1] for key in have if key.startswith("accelerator_type:"))
            raise RunError(
                f"the cluster has {have.get(name, 0.0):g} {name}, the run needs {amount:g} "
                f"(CPUs {have.get('CPU', 0):g}, GPUs {have.get('GPU', 0):g}, cards {', '.join(cards) or 'none'}); "
                "lower resources.num_replicas or add nodes"
            )


def run_shards(
    shards: Sequence[Shard],
    config: ScoreConfig,
    rows_folder: Path,
    log_folder: Path,
    on_poll: Callable[[Snapshot], None],
) -> Iterator[ShardDone]:
    """Score the shards on the connected cluster; yields each one whose file is written.

    Calls `on_poll` about twice a second in between. Raises RunError when engines died more often
    than `resources.max_engine_restarts`, or nothing moved for `resources.no_progress_minutes`.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = ray.remote(ProgressBoard).options(num_cpus=0, scheduling_strategy=here).remote()
    events: queue.SimpleQueue[ShardDone | BaseException | None] = queue.SimpleQueue()

    def consume() -> None:
        try:
            for row in _dataset(shards, config, board, rows_folder, log_folder).iter_rows():
                events.put(ShardDone(row["file"], row["rows"], row["errors"]))
            events.put(None)
        except BaseException as error:  # handed to the main thread, which raises it
            events.put(error)

    threading.Thread(target=consume, name="ray-data", daemon=True).start()
    watch = _Watch(config, log_folder)
    while True:
        try:
            event = events.get(timeout=POLL_SECONDS)
        except queue.Empty:
            snapshot = ray.get(board.snapshot.remote())
            watch.look(snapshot)
            on_poll(snapshot)
            continue
        if event is None:
            on_poll(ray.get(board.snapshot.remote()))
            return
        if isinstance(event, BaseException):
            watch.look(ray.get(board.snapshot.remote()))
            raise RunError(f"{_root_reason(event)} (logs: {log_folder})") from event
        yield event


def _dataset(shards: Sequence[Shard], config: ScoreConfig, board: Any, rows_folder: Path, log_folder: Path) -> Any:
    import ray
    from ray.data import ActorPoolStrategy, TaskPoolStrategy

    resources = config.resources
    gpu = config.engine.device == "gpu"
    threads = resources.threads_per_replica or max(1, (psutil.cpu_count(logical=False) or 1) // resources.num_replicas)
    config = config.model_copy(update={"resources": resources.model_copy(update={"threads_per_replica": threads})})
    # Ray derives OMP_NUM_THREADS from num_cpus: one logical CPU would mean one core (2.5, not 4.7 requests/s).
    environment = {} if gpu else {"OMP_NUM_THREADS": str(threads)}
    return (
        ray.data.from_items([asdict(shard) for shard in shards], override_num_blocks=len(shards))
        .map(
            Prepare,
            fn_constructor_args=(config,),
            compute=ActorPoolStrategy(size=resources.num_prepare_workers),
            num_cpus=1,
        )
        .map(
            Generate,
            fn_constructor_args=(config, board, str(log_folder)),
            compute=ActorPoolStrategy(
                size=resources.num_replicas,
                max_concurrent_calls_per_actor=resources.shards_in_flight,
                max_tasks_in_flight_per_actor=resources.shards_in_flight + 1,
                enable_true_multi_threading=True,
            ),
            num_cpus=resources.cpus_per_replica,
            num_gpus=resources.gpus_per_replica if gpu else 0,
            **({"accelerator_type": resources.accelerator_type} if gpu and resources.accelerator_type else {}),
            runtime_env={"env_vars": environment},
        )
        .map(
            write_scored,
            fn_kwargs={"rows_folder": str(rows_folder)},
            # Unbounded, the first shards would wait for one new process each, unwritten, for seconds.
            compute=TaskPoolStrategy(size=max(2, resources.num_replicas)),
            num_cpus=WRITE_CPUS,
        )
    )


class _Watch:
    """Fails the run when engines keep dying or nothing moves."""

    def __init__(self, config: ScoreConfig, log_folder: Path) -> None:
        self._limit = config.resources.max_engine_restarts
        self._patience = config.resources.no_progress_minutes * 60
        self._log_folder = log_folder
        self._version, self._moved = -1, time.monotonic()

    def look(self, snapshot: Snapshot) -> None:
        """Raise RunError if it is time to stop."""
        if max(snapshot.num_restarts, len(snapshot.deaths)) > self._limit:
            last = snapshot.deaths[-1] if snapshot.deaths else "its process was killed (out of memory?)"
            raise RunError(
                f"an engine died {max(snapshot.num_restarts, len(snapshot.deaths))} times, "
                f"resources.max_engine_restarts is {self._limit}; the last time: {last} (logs: {self._log_folder})"
            )
        if snapshot.version != self._version:
            self._version, self._moved = snapshot.version, time.monotonic()
        elif time.monotonic() - self._moved > self._patience:
            state = "loading its model" if snapshot.num_ready == 0 else "at work"
            raise RunError(
                f"no progress for {self._patience / 60:g} minutes (resources.no_progress_minutes); "
                f"{snapshot.num_started} engine(s) started, last seen {state} (logs: {self._log_folder})"
            )


def _root_reason(error: BaseException) -> str:
    """The last line of the deepest cause: Ray wraps the reason in a page of traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
