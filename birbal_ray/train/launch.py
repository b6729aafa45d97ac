"""The training worker: started on a node of the cluster and watched by the driver; what it does there."""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import math
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from birbal_ray.cluster import WorkerRequest, can_place, job_metadata, log_to, ray_log_file, ray_session
from birbal_ray.models import Model, ModelError, quiet_libraries, resolve_model
from birbal_ray.progress import ProgressLine, duration, save_figures
from birbal_ray.run import LOG_FOLDER, Run, RunFailedError
from birbal_ray.settings import ConfigError, one_line
from birbal_ray.storage import Folder, RunError, read_json, write_json
from birbal_ray.train.checkpoints import (
    CHECKPOINTS_FOLDER,
    EASED_FILE,
    METRICS_FILE,
    SESSION_FILE,
    STATE_FILES,
    STATUS_FILE,
    STOP_FILE,
    TENSORBOARD_FOLDER,
    WORK_FOLDER,
    Remote,
    download_state,
    read_metrics,
    working_folder,
)
from birbal_ray.train.config import TrainConfig
from birbal_ray.train.deadline import CLOCK_FILE
from birbal_ray.train.preflight import rate_key

RAY_FOLDER = "ray"
POLL_SECONDS = 1.0
NODES_SECONDS = 5.0  # between two checks of the cluster's nodes
REPORT_SECONDS = 5.0
FULL_BYTES = 1 << 20  # a disk with less room than this is full
# What libraries say of memory besides torch's own error: of the card's, and of the machine's (the last: Ray's monitor).
_CARD_IS_FULL = "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED"
_HOST_MEMORY = re.compile("(can't|cannot) allocate memory|memory usage threshold", re.IGNORECASE)
# accelerate would wrap the model in DDP for a world of one, and take Ray's word for the device.
_WORLD = (
    *("ACCELERATE_TORCH_DEVICE", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK"),
    *("MASTER_ADDR", "MASTER_PORT"),
)

# ---- on the driver


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
    if not folder.is_file(EASED_FILE):
        return config
    micro = min(config.batch.micro, folder.read_json(EASED_FILE)["micro"])
    product = config.batch.micro * config.batch.accumulation
    while product % micro:
        micro -= 1
    return config.replace({"batch.micro": micro, "batch.accumulation": product // micro})


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
        if reason:
            raise  # no worker is there that could save anything
        folder.write_bytes(STOP_FILE, b"")  # refused where another run took the folder over, which must not be stopped
        grace = config.resources.stop_grace
        progress.message(f"stopping: the worker saves a checkpoint first (at most {grace:.0f} s)")
        concurrent.futures.wait([done], grace)
        if not done.done() or done.exception():
            raise
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
            stat = self._folder.stat(STATUS_FILE)
            status = self._folder.read_json(STATUS_FILE) if stat and stat.modified >= self._wall_start else None
        except (OSError, RunError):  # an outage of the store: the worker goes on, and so does the run
            return self._text
        if status is None:
            self._text = f"loading the model ({duration(time.monotonic() - self._started)})"
            if self._run:
                self._run.progress(None, None, text=self._text)
            return self._text
        forecast, step = status["forecast"], status["step"]
        if forecast and forecast["by_budget"] and step >= 3 and not self._warned:
            self._warned = True
            wanted = self._config.epochs
            progress.message(f"{forecast['epochs']:.2g} epochs will fit in the budget; {wanted:g} were asked for")
        parts = [f"step {step}/{status['max_steps']}", f"epoch {status['epoch']:.2f}"]
        figures: dict[str, Any] = {}
        if train := status["train"]:
            parts += [f"loss {train['loss']:.4f}", f"lr {train['learning_rate']:.2e}"]
            if train.get("step_seconds"):
                figures["rate_per_second"] = train["tokens"] / train["step_seconds"]
                parts.append(f"{figures['rate_per_second']:.0f} tokens/s")
        if status["evaluation"]:
            parts.append(f"eval loss {status['evaluation']['eval_loss']:.4f}")
        total = forecast["num_steps"] if forecast else status["max_steps"]
        if forecast:
            figures["eta_seconds"] = (total - step) * status["step_seconds"]
            ends = duration(figures["eta_seconds"])
            parts.append(f"ends in {ends}{' (budget)' if forecast['by_budget'] else ''}")
        self._text = " · ".join(parts)
        if self._run:
            self._run.progress(step, total, text=self._text, **figures)
        return self._text


def _fit(config: TrainConfig, model: Model, folder: Folder, done: concurrent.futures.Future[dict[str, Any]]) -> None:
    """`_run_ray_train` in a thread of its own; sets `done` to its result, or to what it raised."""
    try:
        done.set_result(_run_ray_train(config, model, folder))
    except BaseException as error:  # raised in the main thread
        done.set_exception(error)


def _run_ray_train(config: TrainConfig, model: Model, folder: Folder) -> dict[str, Any]:
    """One worker under Ray Train, which replaces it when it dies; its outcome. Raises RunError for what ended it."""
    os.environ["RAY_TRAIN_V2_ENABLED"] = "1"
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    gpu = config.resources.device == "gpu"
    folder.delete([SESSION_FILE])
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
        ),
    )
    try:
        result: dict[str, Any] | None = trainer.fit().return_value
    except TrainingFailedError as error:
        if reason := lasting_reason(error, folder.local if folder.is_local else Path.cwd()):  # of Ray's own files
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


# ---- on the worker


def train_on_worker(options: dict[str, Any]) -> dict[str, Any]:
    """What the worker does: `fine_tune` in the run folder, with its log there.

    Its outcome; or `error`: why it can't go on; or `eased`: why it should start again with a smaller micro batch.
    For a run at a URL it works in a folder of its own machine, which starts with what is at the URL, and uploads what
    it has finished. session.json holds the result, unless the disk is full.
    """
    import ray

    started = time.monotonic()
    config = TrainConfig.model_validate(options["config"])
    folder: Folder = options["folder"]
    node = ray.get_runtime_context().get_node_id()
    working = working_folder(folder)
    download_state(folder, working)
    with Remote(folder, working) as remote:
        result = run_session(config, options["fingerprint"], remote, node, started)
    if not folder.is_local and result.get("ended_by", "stop") != "stop":
        shutil.rmtree(working, ignore_errors=True)  # all of it is at the URL
    return result


def run_session(config: TrainConfig, fingerprint: str, remote: Remote, node: str, started: float) -> dict[str, Any]:
    """One worker's session; see `train_on_worker`. Raises what a new worker may get past."""
    folder = remote.working
    remote.add_leftovers()
    for name in _WORLD:
        os.environ.pop(name, None)
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # packs vary in shape
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL reports every training to its makers otherwise
    try:
        log_to(folder / "logs" / "worker.log")
        os.write(1, f"worker pid {os.getpid()}\n".encode())
        write_json(folder / "worker.json", {"pid": os.getpid(), "node": node})
        result = fine_tune_here(config, fingerprint, remote, started)
    except (ModelError, RunError, ConfigError) as error:
        result = {"error": str(error)}
    except Exception as error:
        if out_of_memory(error) and config.batch.micro > 1:
            # A new process starts with an empty card; the driver starts it with what eased.json says.
            smaller = {"micro": config.batch.micro // 2, "reason": one_line(error)[:300]}
            write_json(folder / EASED_FILE, smaller)
            remote.add(EASED_FILE)
            return {"eased": f"the card ran out of memory at batch.micro={config.batch.micro}"}
        reason = lasting_reason(error, folder)
        if reason is None:
            raise
        result = {"error": reason}
        # An unfinished checkpoint: on a full disk its room is what the reason is written to.
        shutil.rmtree(folder / CHECKPOINTS_FOLDER / WORK_FOLDER, ignore_errors=True)
    with contextlib.suppress(OSError):  # still full: Ray gives the result to the driver
        write_json(folder / SESSION_FILE, result)
        remote.add(SESSION_FILE, *STATE_FILES, "logs", TENSORBOARD_FOLDER)
    return result


def fine_tune_here(config: TrainConfig, fingerprint: str, remote: Remote, started: float) -> dict[str, Any]:
    """Check the node's model and device, then fine-tune; each line of metrics also goes to Ray."""
    import ray.train
    import torch

    model = resolve_model(config.model.name, config.model.revision)
    if model.fingerprint != fingerprint:
        raise ModelError(f"{model.path}: not the model that the run was started with, on this node")
    needs_card = config.resources.device == "gpu" and not config.resources.simulated_card
    if needs_card and not torch.cuda.is_available():
        raise RunError("Ray placed the worker on a node with a GPU, but torch sees none there; check its driver")
    if not torch.cuda.is_available():
        torch.set_num_threads(config.resources.num_threads or len(os.sched_getaffinity(0)))
    quiet_libraries()
    from birbal_ray.train.sft import fine_tune

    reported = -math.inf

    def report(line: dict[str, Any]) -> None:
        # Ray takes one report every two seconds; a second one would hold the training up until then.
        nonlocal reported
        if reason := why_diverged(line):
            raise RunError(reason)
        if time.monotonic() - reported > REPORT_SECONDS:
            ray.train.report({name: value for name, value in line.items() if value is not None})
            reported = time.monotonic()

    outcome = fine_tune(config, model.path, remote.working, report, started=started, remote=remote)
    return asdict(outcome) | {"speeds": measured_speeds(remote.working)}


def measured_speeds(folder: Path) -> dict[str, float]:
    """What a later run is planned with: tokens per second of training time, and the seconds of everything else."""
    steps = [line for line in read_metrics(folder / METRICS_FILE) if "loss" in line and line.get("step_seconds")]
    seconds = sum(line["step_seconds"] for line in steps[1:])  # the first step warms up
    if not seconds or not (folder / CLOCK_FILE).exists():
        return {}
    clock = read_json(folder / CLOCK_FILE)
    rate = sum(line["tokens"] for line in steps[1:]) / seconds
    names = ("setup_seconds", "eval_seconds", "save_seconds", "best_seconds")
    return {"tokens_per_second": rate, **{name: clock[name] for name in names}}


def why_diverged(line: Mapping[str, Any]) -> str | None:
    """Why a run can't go on after this line of metrics.jsonl, with the way out; None where its losses are numbers."""
    for name, what in (("eval_loss", "eval loss"), ("loss", "training loss"), ("grad_norm", "gradient's norm")):
        if math.isfinite(line.get(name, 0.0)):
            continue
        if line["step"] == 0:
            return "the base model's eval loss is not a number; check the model, or set model.dtype=float32"
        return (
            f"the {what} is not a number since step {line['step']}: the adapter diverged; "
            "lower optimizer.learning_rate and train into another --output; this run's best adapter so far stays here"
        )
    return None


def lasting_reason(error: BaseException, folder: Path) -> str | None:
    """Why trying again would fail again, with the way out; None for what a restart may repair."""
    text = one_line(error)
    full = (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)) or "No space left" in text
    if "inline_container" in text:  # torch.save says where it stopped writing, not why
        full = shutil.disk_usage(folder).free < FULL_BYTES
    if full:
        return (
            f"{folder}: no space left on the disk; the last checkpoint is complete. "
            "Free some space and run the same command again"
        )
    if out_of_memory(error):
        return (
            f"the card ran out of memory at batch.micro=1 ({text[:160]}); the last checkpoint is kept. "
            "The run continues with gradient_checkpointing=true or on a larger card"
        )
    if isinstance(error, MemoryError) or _HOST_MEMORY.search(text):
        return (
            f"the worker's machine ran out of memory ({text[:160]}); the last checkpoint is kept. The run continues "
            "with half the batch.micro and twice the batch.accumulation, or on a machine with more memory"
        )
    return None


def out_of_memory(error: BaseException) -> bool:
    """Whether the card, not the machine, ran out of memory."""
    text = str(error)
    return type(error).__name__ == "OutOfMemoryError" or any(sign in text for sign in _CARD_IS_FULL)
