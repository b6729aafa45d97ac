"""The Ray Data pipeline that scores shards, watched from the driver."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, wait
from typing import Any

from birbal_ray.cluster import AUTH_MODE, WorkerRequest, can_place
from birbal_ray.run import LOG_FOLDER, RunError, RunFailedError
from birbal_ray.score.adaptive import Schedule
from birbal_ray.score.config import ResourceSettings, ScoreConfig
from birbal_ray.score.engine import Adapter
from birbal_ray.score.monitor import EngineMonitor, Snapshot
from birbal_ray.score.session import Watchdog
from birbal_ray.score.stages import BuildPrompts, ScorePrompts
from birbal_ray.settings import one_line
from birbal_ray.storage import Folder

MONITOR_ATTEMPTS, MONITOR_PAUSE_SECONDS = 3, 2.0
ACCELERATOR_LABEL = "ray.io/accelerator-type"  # of a node, set by Ray
POLL_SECONDS = 1.0  # each poll costs the cores that may be the engine's a few milliseconds
IDLE_SECONDS = 0.2  # the source waits so long when there is nothing to give out


def logical_cpus(config: ScoreConfig) -> float:
    """Logical CPUs that the pipeline needs at once, with one to spare."""
    resources = config.resources
    return resources.num_replicas * resources.cpus_per_replica + resources.num_prepare_workers + 1


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
    """What a cluster lacks and the run waits for. Raises RunError on a local one, which nothing can join."""
    import ray

    missing = can_place(replica_request(config), [node["Resources"] for node in ray.nodes() if node["Alive"]])
    if missing and not os.environ.get("RAY_ADDRESS"):
        raise RunError(f"{missing}; lower resources.num_replicas or what each asks for")
    minutes = config.resources.no_progress_minutes
    return missing and f"waiting, {missing}; gives up after {minutes:g} minutes"


def score_shards(
    schedule: Schedule,
    config: ScoreConfig,
    model_fingerprint: str,
    folder: Folder,
    on_poll: Callable[[Snapshot], None],
    adapters: Sequence[Adapter] = (),
    excluded: Collection[str] = frozenset(),
    seconds: float = math.inf,
) -> None:
    """Score what the schedule gives out on the connected cluster; returns when all of it is written.

    After `seconds` nothing more is given out, where the schedule allows that; what is in the engines is finished.

    Rows go to `rows/` of the run folder, replicas' logs to `logs/`. `adapters`: what the shards' variants name.
    `excluded`: instances that no shard counts. Calls `on_poll` about once a second, and once at the end, with what
    happened since. `config.model` must name the model as workers find it, `model_fingerprint` what they must find.
    Raises RunFailedError when no engine can start, one died more often than `resources.max_engine_restarts`, or
    nothing moved for `resources.no_progress_minutes`.
    """
    import ray

    resources = config.resources
    # Enough that every engine has its shards and the next one, and the stage before it its own.
    limit = resources.num_replicas * (resources.shards_in_flight + 2) + 2 * resources.num_prepare_workers + 2
    monitor = _start_monitor(schedule, limit, resources, seconds)
    ended: Future[None] = Future()

    def consume() -> None:
        try:
            dataset = _dataset(config, model_fingerprint, adapters, monitor, folder, excluded)
            for _ in dataset.iter_internal_ref_bundles():  # their content came through the monitor
                pass
            ended.set_result(None)
        except BaseException as error:  # handed to the main thread, which raises it
            ended.set_exception(error)

    threading.Thread(target=consume, name="ray-data", daemon=True).start()
    watchdog = Watchdog(resources, folder)
    while True:
        is_last = bool(wait([ended], POLL_SECONDS).done)
        try:
            snapshot = ray.get(monitor.snapshot.remote())
        except ray.exceptions.RayActorError as lost:
            reason = one_line(lost)[:300]
            raise RunFailedError(f"the process that keeps count of shards and engines died: {reason}") from lost
        on_poll(snapshot)
        watchdog.check(snapshot)
        if is_last:
            if error := ended.exception():
                # The last telling line of the deepest cause: Ray wraps the reason in a page of traceback.
                first, *_ = str(error).partition("The above exception was the direct cause of")
                lines = [line.strip() for line in first.splitlines() if line.strip()]
                advice = "For further information visit", "To change retry"  # of pydantic and of Ray Data
                reason = [type(error).__name__, *(line for line in lines if not line.startswith(advice))][-1]
                raise RunFailedError(f"{reason} (logs: {folder.at(LOG_FOLDER)})") from error
            return


def _start_monitor(schedule: Schedule, limit: int, resources: ResourceSettings, seconds: float) -> Any:
    """An EngineMonitor on this node that answers.

    A head that can't call this process back takes it for gone, and cancels every actor that it asks for
    (https://github.com/ray-project/ray/issues/53797). A lost call passes; another RAY_AUTH_MODE or a firewall
    does not.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    arguments = schedule, limit, resources.max_start_retries, seconds
    for attempt in range(1, MONITOR_ATTEMPTS + 1):
        monitor = ray.remote(EngineMonitor).options(num_cpus=0, scheduling_strategy=here).remote(*arguments)
        try:
            ray.get(monitor.take.remote(0))
            break
        except ray.exceptions.ActorDiedError:
            if attempt == MONITOR_ATTEMPTS:
                raise RunError(
                    "the cluster's head can't call this process back, so it cancels whatever is started from here; "
                    f"RAY_AUTH_MODE must be the same here (now: {os.environ.get(AUTH_MODE, 'not set')}) and on the "
                    "cluster, and the head must reach this machine's ports"
                ) from None
            time.sleep(MONITOR_PAUSE_SECONDS)
    return monitor


def _dataset(
    config: ScoreConfig,
    model_fingerprint: str,
    adapters: Sequence[Adapter],
    monitor: Any,
    folder: Folder,
    excluded: Collection[str],
) -> Any:
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    resources, gpu = config.resources, config.engine.device == "gpu"
    context = DataContext.get_current()
    context.target_max_block_size = 1  # else shards wait in the source until a block is full
    context.max_consecutive_actor_init_deaths = resources.num_replicas * (resources.max_start_retries + 1)
    per_node = math.ceil(resources.num_replicas / max(1, sum(node["Alive"] for node in ray.nodes())))
    card: dict[str, Any] = {}  # Ray's options that tie a replica to a card, or keep it off others
    if gpu and resources.accelerator_type:
        card = {"accelerator_type": resources.accelerator_type}
    elif gpu and resources.avoid_accelerator_types:
        card = {"label_selector": {ACCELERATOR_LABEL: f"!in({','.join(resources.avoid_accelerator_types)})"}}
    return (
        ray.data.range(1, override_num_blocks=1)
        # Without CPUs of its own, or Ray would fuse it with the next stage, and one worker would get every shard.
        .flat_map(_give_out, fn_args=(monitor,), num_cpus=0)
        .map(
            BuildPrompts,
            fn_constructor_args=(config, folder, excluded),
            compute=ActorPoolStrategy(size=resources.num_prepare_workers),
            num_cpus=1,
        )
        .map(
            ScorePrompts,
            fn_constructor_args=(config, model_fingerprint, tuple(adapters), monitor, folder, per_node),
            compute=ActorPoolStrategy(
                size=resources.num_replicas,
                # One more than the engine gets: while a shard is written, the next one takes its place there.
                max_concurrent_calls_per_actor=resources.shards_in_flight + 1,
                max_tasks_in_flight_per_actor=resources.shards_in_flight + 2,
                enable_true_multi_threading=True,
            ),
            num_cpus=resources.cpus_per_replica,
            num_gpus=resources.gpus_per_replica if gpu else 0,
            **card,
        )
    )


def _give_out(row: Any, monitor: Any) -> Iterator[dict[str, bytes]]:
    """Shards, pickled, a row each, as the monitor's schedule decides on them."""
    import ray

    position = 0
    while (shards := ray.get(monitor.take.remote(position))) is not None:
        yield from ({"shard": shard} for shard in shards)
        position += len(shards)
        if not shards:
            time.sleep(IDLE_SECONDS)
