"""The driver of a training: it starts the worker on a node, watches it, and eases it where its card is full."""

from __future__ import annotations

import concurrent.futures
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from birbal_ray.cluster import WorkerRequest, can_place, job_metadata, ray_log_file, ray_session
from birbal_ray.models import Model
from birbal_ray.progress import ProgressLine, duration, save_figures
from birbal_ray.run import LOG_FOLDER, Run, RunFailedError
from birbal_ray.settings import one_line
from birbal_ray.storage import Folder, RunError
from birbal_ray.train import files
from birbal_ray.train.budget import rate_key
from birbal_ray.train.config import TrainConfig
from birbal_ray.train.preflight import with_micro
from birbal_ray.train.worker import lasting_reason, train_on_worker

RAY_FOLDER = "ray"
ALLOCATOR = "PYTORCH_ALLOC_CONF"
POLL_SECONDS = 1.0
NODES_SECONDS = 5.0  # between two checks of the cluster's nodes


def logical_cpus(config: TrainConfig) -> float:
    """Logical CPUs that a run needs at once."""
    return config.resources.num_cpus + 2


def worker_request(config: TrainConfig) -> WorkerRequest:
    """What must be placed: one worker."""
    resources = config.resources
    gpu = resources.device == "gpu"
    return WorkerRequest("worker", 1, resources.num_cpus, float(gpu), resources.accelerator_type if gpu else None)


def train_on_cluster(
    config: TrainConfig, model: Model, folder: Folder, progress: ProgressLine, run: Run | None = None
) -> dict[str, Any]:
    """Run one worker, show its progress, return its outcome (see `Outcome`). SIGTERM and Ctrl-C let it save first.

    A worker that dies is replaced and continues from the latest checkpoint, `resources.max_failures`
    times; then RunFailedError is raised. Errors that would only come again end the run at once, by RunError. A worker
    whose card is full is replaced by one with a smaller micro batch. `run` gets progress.json.
    """
    with ray_session(logical_cpus(config), ray_log_file(folder), about=job_metadata("train", config.output)):
        import ray

        def missing() -> str | None:
            return can_place(worker_request(config), [node["Resources"] for node in ray.nodes() if node["Alive"]])

        # A cluster of our own gets no further nodes.
        end = time.monotonic() + (config.resources.wait if os.environ.get("RAY_ADDRESS") else 0.0)
        while reason := missing():
            left = end - time.monotonic()
            if left <= 0:
                raise RunError(reason)
            progress.update(f"waiting (at most {duration(left)} more, resources.wait): {reason}")
            time.sleep(min(POLL_SECONDS, left))
        progress.update(f"starting the worker; logs in {folder.at(LOG_FOLDER)}")
        config = ease(config, folder)
        while "eased" in (result := _run_worker(config, model, folder, progress, run, missing)):
            config = ease(config, folder)
            progress.message(
                f"{result['eased']}; continuing with batch.micro={config.batch.micro} "
                f"batch.accumulation={config.batch.accumulation}, from the last checkpoint"
            )
    save_figures(rate_key(config), **result.pop("speeds", {}))
    return result


def ease(config: TrainConfig, folder: Folder) -> TrainConfig:
    """The configuration with the smaller micro batch that eased.json asks for, if the run has one."""
    is_eased = folder.is_file(files.EASED_FILE)
    return config.replace(with_micro(config, folder.read_json(files.EASED_FILE)["micro"])) if is_eased else config


def _run_worker(
    config: TrainConfig,
    model: Model,
    folder: Folder,
    progress: ProgressLine,
    run: Run | None,
    missing: Callable[[], str | None],
) -> dict[str, Any]:
    """One worker until it ends, with its progress on the line; its result."""
    # A future, not Thread.join: interrupted, join takes a living thread for a dead one (gh-90882).
    done: concurrent.futures.Future[dict[str, Any]] = concurrent.futures.Future()
    threading.Thread(target=_fit, args=(config, model, folder, done), name="train", daemon=True).start()
    shown = _Status(folder, config, run)
    checked, reason = time.monotonic(), None
    progress.update(shown.text(progress))  # a run that ends before the first poll has a progress.json, too
    try:
        while not concurrent.futures.wait([done], POLL_SECONDS).done:
            if time.monotonic() - checked > NODES_SECONDS:
                checked, reason = time.monotonic(), missing()
            # Its node was taken away; Ray places the worker as soon as another one joins.
            progress.update(f"waiting: {reason}" if reason else shown.text(progress))
    except KeyboardInterrupt:
        if missing():
            raise  # no worker is there that could save anything
        folder.write_bytes(
            files.STOP_FILE, b""
        )  # refused where another run took the folder over, which must not be stopped
        grace = config.resources.stop_grace
        progress.message(f"stopping: the worker saves a checkpoint first (at most {grace:.0f} s)")
        concurrent.futures.wait([done], grace)
        if not done.done() or done.exception() or "eased" in done.result():
            raise  # eased: the next worker would load the model before it saw that it is to stop
    finally:
        progress.close()
    return done.result()


class _Status:
    """The progress line of a run, and its progress.json, from the status that its worker writes on its node."""

    def __init__(self, folder: Folder, config: TrainConfig, run: Run | None) -> None:
        self._folder, self._config, self._run = folder, config, run
        self._started, self._wall_start = time.monotonic(), int(time.time())
        self._read_at, self._text = -math.inf, ""
        self._warned = False

    def text(self, progress: ProgressLine) -> str:
        """The latest state; warns once when the budget is too short for the epochs asked for."""
        if time.monotonic() - self._read_at < (POLL_SECONDS if self._folder.is_local else NODES_SECONDS):
            return self._text
        self._read_at = time.monotonic()
        try:
            stat = self._folder.stat(files.STATUS_FILE)
            status = self._folder.read_json(files.STATUS_FILE) if stat and stat.modified >= self._wall_start else None
        except (OSError, RunError):  # an outage of the store: the worker goes on, and so does the run
            return self._text
        record: dict[str, Any] = {"done": None, "total": None}
        if status is None:
            record["text"] = f"loading the model ({duration(time.monotonic() - self._started)})"
        else:
            record = _describe_status(status)
            forecast = status["forecast"]
            if forecast and forecast["by_budget"] and status["step"] >= 3 and not self._warned:
                self._warned = True
                wanted = self._config.epochs
                progress.message(f"{forecast['epochs']:.2g} epochs will fit in the budget; {wanted:g} were asked for")
        self._text = record["text"]
        if self._run:
            self._run.progress(**record)
        return self._text


def _describe_status(status: Mapping[str, Any]) -> dict[str, Any]:
    """What progress.json says of a worker's status.json, `text` for the progress line."""
    step, forecast, train = status["step"], status["forecast"], status["train"]
    record = {"done": step, "total": forecast["num_steps"] if forecast else status["max_steps"]}
    parts = [f"step {step}/{status['max_steps']}", f"epoch {status['epoch']:.2f}"]
    if train:
        parts += [f"loss {train['loss']:.4f}", f"lr {train['learning_rate']:.2e}"]
        if train.get("step_seconds"):
            record["rate_per_second"] = train["tokens"] / train["step_seconds"]
            parts.append(f"{record['rate_per_second']:.0f} tokens/s")
    if status["evaluation"]:
        parts.append(f"eval loss {status['evaluation']['eval_loss']:.4f}")
    if forecast:
        record["eta_seconds"] = (record["total"] - step) * status["step_seconds"]
        parts.append(f"ends in {duration(record['eta_seconds'])}{' (budget)' if forecast['by_budget'] else ''}")
    return {**record, "text": " · ".join(parts)}


def _fit(config: TrainConfig, model: Model, folder: Folder, done: concurrent.futures.Future[dict[str, Any]]) -> None:
    """`_run_ray_train` in a thread of its own; sets `done` to its result, or to what it raised."""
    try:
        done.set_result(_run_ray_train(config, model, folder))
    except BaseException as error:  # raised in the main thread
        done.set_exception(error)


def _run_ray_train(config: TrainConfig, model: Model, folder: Folder) -> dict[str, Any]:
    """One worker under Ray Train, which replaces it when it dies; its outcome. Raises RunError for what ended it."""
    os.environ["RAY_TRAIN_V2_ENABLED"] = "1"
    from ray.exceptions import OutOfMemoryError, RayActorError
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    gpu = config.resources.device == "gpu"
    folder.delete([files.SESSION_FILE])
    trainer = TorchTrainer(
        train_on_worker,
        train_loop_config={
            "config": config.model_dump(mode="json"),
            "fingerprint": model.fingerprint,
            "folder": folder,  # with its guard: who loses the run's lock uploads nothing more
        },
        torch_config=TorchConfig(backend="gloo"),  # one worker has nobody to talk to
        scaling_config=ScalingConfig(
            num_workers=1,
            use_gpu=gpu,
            accelerator_type=config.resources.accelerator_type if gpu else None,
            resources_per_worker={"CPU": config.resources.num_cpus, **({"GPU": 1} if gpu else {})},
        ),
        run_config=RunConfig(
            name=f"session-{os.getpid()}-{os.urandom(3).hex()}",
            # Ray keeps its own record of sessions here; checkpoints are ours (docs/decisions/0021).
            storage_path=folder.path(RAY_FOLDER),
            storage_filesystem=None if folder.is_local else folder.filesystem,
            failure_config=FailureConfig(max_failures=config.resources.max_failures),
            # In the worker's environment, because Ray Train initialises CUDA before our code runs. Packs vary in shape.
            worker_runtime_env={"env_vars": {ALLOCATOR: os.environ.get(ALLOCATOR, "expandable_segments:True")}},
        ),
    )
    try:
        result: dict[str, Any] | None = trainer.fit().return_value
    except (RayActorError, OutOfMemoryError) as error:
        raise RunFailedError(f"Ray Train's controller of the worker died: {one_line(error)[:300]}") from None
    except TrainingFailedError as error:
        if reason := lasting_reason(error, folder.local if folder.is_local else Path.cwd(), config):  # of Ray's files
            raise RunError(reason) from None
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        last = f"the last time: {lines[-1]}" if lines else type(error).__name__
        times = config.resources.max_failures + 1
        raise RunFailedError(f"the training worker failed {times} times; {last}") from None
    if result is None:
        raise RunFailedError(f"{folder}: the worker ended without a result (log: {folder.at('logs/worker.log')})")
    if "error" in result:
        raise RunError(result["error"])
    return result
