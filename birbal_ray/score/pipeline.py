"""The Ray Data pipeline that scores shards, and what its driver makes of it: when to end, what to say and record."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from typing import Any

from birbal_ray.cluster import AUTH_MODE, WorkerRequest, can_place
from birbal_ray.progress import ProgressLine, counted, duration
from birbal_ray.run import LOG_FOLDER, RunError, RunFailedError
from birbal_ray.schemas import ROWS_FOLDER
from birbal_ray.score.adaptive import Schedule
from birbal_ray.score.config import ResourceSettings, ScoreConfig
from birbal_ray.score.engine import Adapter
from birbal_ray.score.monitor import KILLED, EngineMonitor, Snapshot
from birbal_ray.score.stages import BuildPrompts, ScorePrompts
from birbal_ray.settings import one_line
from birbal_ray.storage import FileRecord, Folder

MONITOR_ATTEMPTS, MONITOR_PAUSE_SECONDS = 3, 2.0
ACCELERATOR_LABEL = "ray.io/accelerator-type"  # of a node, set by Ray
POLL_SECONDS = 1.0  # each poll costs the cores that may be the engine's a few milliseconds
IDLE_SECONDS = 0.2  # the source waits so long when there is nothing to give out
MAX_FATAL_INSTANCES = 16  # beyond that the engine is broken, not the prompts
SHARED_SECONDS = 120.0  # a network file system's attribute caches are older than a minute at times


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
        except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as lost:
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
