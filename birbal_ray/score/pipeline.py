"""The Ray Data pipeline that scores shards, watched from the driver."""

from __future__ import annotations

import math
import os
import queue
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from birbal_ray.cluster import AUTH_MODE, WorkerRequest, can_place
from birbal_ray.run import RunError, RunFailedError
from birbal_ray.score.config import ResourceSettings, ScoreConfig
from birbal_ray.score.engine import Adapter
from birbal_ray.score.monitor import EngineMonitor, Snapshot
from birbal_ray.score.plan import Shard
from birbal_ray.score.stages import BuildPrompts, Generate, ScoreAndWrite

WRITE_CPUS = 0.25  # logical: scoring and writing a shard takes milliseconds
REPLICAS_PER_WRITER = 4
BOARD_ATTEMPTS, BOARD_PAUSE_SECONDS = 3, 2.0
ACCELERATOR_LABEL = "ray.io/accelerator-type"  # of a node, set by Ray
SHARED_SECONDS = 120.0  # a network file system's attribute caches are older than a minute at times
POLL_SECONDS = 1.0  # each look costs the cores that may be the engine's a few milliseconds


@dataclass(frozen=True, slots=True)
class ShardDone:
    """A shard's file stands under its final name."""

    file: str
    rows: int
    errors: int


def logical_cpus(config: ScoreConfig) -> float:
    """Logical CPUs that the pipeline needs at once, with one to spare."""
    resources = config.resources
    engines = resources.num_replicas * resources.cpus_per_replica
    return engines + resources.num_prepare_workers + num_writers(config) * WRITE_CPUS + 1


def num_writers(config: ScoreConfig) -> int:
    """Processes that score and write."""
    return math.ceil(config.resources.num_replicas / REPLICAS_PER_WRITER)


def replica_request(config: ScoreConfig) -> WorkerRequest:
    """What must be placed: every replica on one node, with helpers anywhere."""
    resources = config.resources
    return WorkerRequest(
        "replica",
        resources.num_replicas,
        resources.cpus_per_replica,
        resources.gpus_per_replica if config.engine.device == "gpu" else 0.0,
        resources.accelerator_type,
        tuple(resources.avoid_accelerator_types),
        logical_cpus(config),
    )


def check_cluster(config: ScoreConfig) -> str | None:
    """What the connected cluster lacks; raises RunError where nothing can join later (a local one)."""
    import ray

    missing = can_place(replica_request(config), [node["Resources"] for node in ray.nodes() if node["Alive"]])
    if missing and not os.environ.get("RAY_ADDRESS"):
        raise RunError(f"{missing}; lower resources.num_replicas or what each asks for")
    return missing


def run_shards(
    shards: Sequence[Shard],
    config: ScoreConfig,
    model_fingerprint: str,
    rows_folder: Path,
    log_folder: Path,
    on_poll: Callable[[Snapshot], None],
    adapters: Sequence[Adapter] = (),
    excluded: Collection[str] = frozenset(),
    files_here: bool = False,
) -> Iterator[ShardDone]:
    """Score the shards on the connected cluster; yields each one whose file is written.

    `adapters`: what the shards' variants name. `excluded`: instances that no shard counts.
    `files_here`: only this node sees the task files and the rows folder, so reading and writing stay on it.
    Calls `on_poll` about once a second in between. `config.model` must name the model as
    workers find it, `model_fingerprint` what they must find. Raises RunFailedError when engines died more often
    than `resources.max_engine_restarts`, or nothing moved for `resources.no_progress_minutes`.
    """
    import ray

    here = _this_node() if files_here else None
    board = _board()
    events: queue.SimpleQueue[ShardDone | BaseException | None] = queue.SimpleQueue()

    def consume() -> None:
        try:
            engine_arguments = (config, model_fingerprint, tuple(adapters), board, str(log_folder))
            for row in _dataset(shards, config, engine_arguments, rows_folder, excluded, here).iter_rows():
                events.put(ShardDone(row["file"], row["rows"], row["errors"]))
            events.put(None)
        except BaseException as error:  # handed to the main thread, which raises it
            events.put(error)

    consumer = threading.Thread(target=consume, name="ray-data", daemon=True)
    consumer.start()
    watch = _Watch(config, log_folder)

    def look() -> None:
        snapshot = ray.get(board.snapshot.remote())
        watch.look(snapshot)
        on_poll(snapshot)

    polled = time.monotonic()
    while True:
        try:
            event = events.get(timeout=POLL_SECONDS)
        except queue.Empty:
            look()
            continue
        if event is None:
            look()
            consumer.join(timeout=30)  # Ray must not be shut down under its feet
            return
        if isinstance(event, BaseException):
            look()  # it may know the reason behind
            raise RunFailedError(f"{_root_reason(event)} (logs: {log_folder})") from event
        watch.see(rows_folder / event.file)
        yield event
        if time.monotonic() - polled > POLL_SECONDS:
            look()
            polled = time.monotonic()


def _board() -> Any:
    """A EngineMonitor that answers.

    A head that can't call this process back takes it for gone, and cancels every actor that it asks for
    (https://github.com/ray-project/ray/issues/53797). A lost call passes; another RAY_AUTH_MODE or a firewall
    does not.
    """
    import ray

    for attempt in range(1, BOARD_ATTEMPTS + 1):
        board = ray.remote(EngineMonitor).options(num_cpus=0, scheduling_strategy=_this_node()).remote()
        try:
            ray.get(board.snapshot.remote())
            break
        except ray.exceptions.ActorDiedError:
            if attempt == BOARD_ATTEMPTS:
                raise RunError(
                    "the cluster's head can't call this process back, so it cancels whatever is started from here; "
                    f"RAY_AUTH_MODE must be the same here (now: {os.environ.get(AUTH_MODE, 'not set')}) and on the "
                    "cluster, and the head must reach this machine's ports"
                ) from None
            time.sleep(BOARD_PAUSE_SECONDS)
    return board


def _this_node() -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def _dataset(
    shards: Sequence[Shard],
    config: ScoreConfig,
    engine_arguments: tuple[Any, ...],
    rows_folder: Path,
    excluded: Collection[str],
    here: Any,
) -> Any:
    import ray
    from ray.data import ActorPoolStrategy

    resources = config.resources
    gpu = config.engine.device == "gpu"
    # A cluster's head often offers no CPUs: what must run beside the driver asks for none.
    placed = {"scheduling_strategy": here} if here else {}
    per_node = math.ceil(resources.num_replicas / max(1, sum(node["Alive"] for node in ray.nodes())))
    return (
        ray.data.from_items([asdict(shard) for shard in shards], override_num_blocks=len(shards))
        .map(
            BuildPrompts,
            fn_constructor_args=(config, excluded),
            compute=ActorPoolStrategy(size=resources.num_prepare_workers),
            num_cpus=0 if here else 1,
            **placed,
        )
        .map(
            Generate,
            fn_constructor_args=(*engine_arguments, per_node),
            compute=ActorPoolStrategy(
                size=resources.num_replicas,
                max_concurrent_calls_per_actor=resources.shards_in_flight,
                max_tasks_in_flight_per_actor=resources.shards_in_flight + 1,
                enable_true_multi_threading=True,
            ),
            num_cpus=resources.cpus_per_replica,
            num_gpus=resources.gpus_per_replica if gpu else 0,
            **_card(resources, gpu),
        )
        .map(
            ScoreAndWrite,
            fn_constructor_args=(str(rows_folder),),
            # Actors, not tasks: they start beside the engines. A task's process starts when the first shard
            # is there, and until it stands (12 s on a busy machine) nothing would be written.
            compute=ActorPoolStrategy(size=num_writers(config)),
            num_cpus=0 if here else WRITE_CPUS,
            **placed,
        )
    )


def _card(resources: ResourceSettings, gpu: bool) -> dict[str, Any]:
    """Ray's options that tie a replica to a card or keep it off others."""
    if not gpu:
        return {}
    if resources.accelerator_type:
        return {"accelerator_type": resources.accelerator_type}
    if resources.avoid_accelerator_types:
        return {"label_selector": {ACCELERATOR_LABEL: f"!in({','.join(resources.avoid_accelerator_types)})"}}
    return {}


class _Watch:
    """Fails the run when engines keep dying or nothing moves."""

    def __init__(self, config: ScoreConfig, log_folder: Path) -> None:
        self._limit = config.resources.max_engine_restarts
        self._patience = config.resources.no_progress_minutes * 60
        self._log_folder = log_folder
        self._version, self._moved = -1, time.monotonic()
        self._seen = False
        self._first_at: float | None = None

    def see(self, file: Path) -> None:
        """A writer says that `file` stands; raise RunFailedError if none such ever shows here."""
        self._seen = self._seen or file.exists()
        self._first_at = self._first_at or time.monotonic()
        if not self._seen and time.monotonic() - self._first_at > SHARED_SECONDS:
            raise RunFailedError(
                f"{file}: written on another node and not seen here; --output must be on storage that all nodes see, "
                "or an s3:// or gs:// URL"
            )

    def look(self, snapshot: Snapshot) -> None:
        """Raise RunFailedError if it is time to stop."""
        if max(snapshot.num_restarts, len(snapshot.deaths)) > self._limit:
            last = snapshot.deaths[-1] if snapshot.deaths else "its process was killed (out of memory?)"
            raise RunFailedError(
                f"an engine died {max(snapshot.num_restarts, len(snapshot.deaths))} times, "
                f"resources.max_engine_restarts is {self._limit}; the last time: {last} (logs: {self._log_folder})"
            )
        if snapshot.version != self._version:
            self._version, self._moved = snapshot.version, time.monotonic()
        elif time.monotonic() - self._moved > self._patience:
            state = "loading its model" if snapshot.num_ready == 0 else "at work"
            raise RunFailedError(
                f"no progress for {self._patience / 60:g} minutes (resources.no_progress_minutes); "
                f"{snapshot.num_started} engine(s) started, last seen {state} (logs: {self._log_folder})"
            )


def _root_reason(error: BaseException) -> str:
    """The last telling line of the deepest cause: Ray wraps the reason in a page of traceback."""
    first, *_ = str(error).partition("The above exception was the direct cause of")
    lines = [line.strip() for line in first.splitlines() if line.strip()]
    # Advice that pydantic and Ray Data end with.
    lines = [line for line in lines if not line.startswith(("For further information visit", "To change retry"))]
    return lines[-1] if lines else type(error).__name__
