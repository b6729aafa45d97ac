"""The Ray Train worker, placed on the card the configuration names."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from birbal_ray.cluster import log_to
from birbal_ray.models import ModelError, resolve
from birbal_ray.object_store import filesystem_of
from birbal_ray.run import RunError, RunFailedError, write_json
from birbal_ray.storage import child, elsewhere, refresh
from birbal_ray.train.checkpoints import CHECKPOINTS_FOLDER, WORK_FOLDER
from birbal_ray.train.config import TrainConfig

RESULT_FILE = "session.json"  # of the worker's last session: an outcome, or why it can't go on
RAY_FOLDER = "ray"
REPORT_SECONDS = 5.0
FULL_BYTES = 1 << 20  # a disk with less room than this is full
# accelerate would wrap the model in DDP for a world of one, and take Ray's word for the device.
_WORLD = (
    "ACCELERATE_TORCH_DEVICE",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "NODE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)


def missing_resources(config: TrainConfig, nodes: Sequence[dict[str, Any]]) -> str | None:
    """What the cluster lacks to place the worker, or None. `nodes`: each living node's total resources."""
    resources = config.resources
    card = f"accelerator_type:{resources.accelerator_type}"
    gpu = resources.device == "gpu"
    for node in nodes:
        fits = node.get("CPU", 0.0) >= resources.num_cpus and (not gpu or node.get("GPU", 0.0) >= 1)
        if fits and (not gpu or not resources.accelerator_type or card in node):
            return None
    cards = sorted({key.split(":", 1)[1] for node in nodes for key in node if key.startswith("accelerator_type:")})
    wanted = f"a {resources.accelerator_type}" if gpu and resources.accelerator_type else "a GPU" if gpu else ""
    wanted += f"{' with ' if wanted else ''}{resources.num_cpus:g} free CPUs on its node"
    gpus = sum(node.get("GPU", 0.0) for node in nodes)
    return (
        f"no node has {wanted}; the cluster has {len(nodes)} node(s), {gpus:g} GPUs, "
        f"cards: {', '.join(cards) or 'none'} (resources.accelerator_type takes one of these names)"
    )


def run_worker(config: TrainConfig, model_fingerprint: str, folder: Path, url: str | None = None) -> dict[str, Any]:
    """Train on one worker of the connected cluster; its outcome as a dict.

    `url`: what `folder` is a working copy of, where other nodes don't see it.

    A worker that dies is replaced and goes on from the latest checkpoint, `resources.max_failures`
    times; then RunFailedError is raised. Errors that would only come again end the run at once, by RunError.
    """
    os.environ["RAY_TRAIN_V2_ENABLED"] = "1"
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    gpu = config.resources.device == "gpu"
    (folder / RESULT_FILE).unlink(missing_ok=True)
    refresh(folder)
    # Ray keeps its own record of sessions here; checkpoints are ours (docs/decisions/0021).
    storage: dict[str, Any] = {"storage_path": str(folder / RAY_FOLDER)}
    if url:
        system, path = filesystem_of(child(url, RAY_FOLDER))
        storage = {"storage_path": path, "storage_filesystem": system}
    trainer = TorchTrainer(
        train_on_worker,
        train_loop_config={
            "config": config.model_dump(mode="json"),
            "fingerprint": model_fingerprint,
            "folder": str(folder),
            "url": url,
            "node": ray.get_runtime_context().get_node_id(),
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
            **storage,
            failure_config=FailureConfig(max_failures=config.resources.max_failures),
        ),
    )
    try:
        result = trainer.fit().return_value
    except TrainingFailedError as error:
        if reason := lasting_reason(error, folder):  # Ray's own files are on the same disk
            raise RunError(reason) from error
        raise RunFailedError(
            f"the training worker failed {config.resources.max_failures + 1} times; {_last_line(error)}"
        ) from error
    refresh(folder)
    if result is None:
        raise RunFailedError(f"{folder}: the worker ended without a word (log: {folder / 'logs' / 'worker.log'})")
    if "error" in result:
        raise RunError(result["error"])
    return result


def train_on_worker(options: dict[str, Any]) -> dict[str, Any]:
    """What the worker does: `fine_tune`, with its log in the run folder; its outcome, or `error`: why it can't go on.

    The same is in session.json, unless the disk is full.
    """
    import ray

    begun = time.monotonic()
    config = TrainConfig.model_validate(options["config"])
    here = ray.get_runtime_context().get_node_id()
    with elsewhere(options["url"], Path(options["folder"]), "", options["node"], here) as folder:
        return _train(config, options["fingerprint"], folder, here, begun)


def _train(config: TrainConfig, fingerprint: str, folder: Path, node: str, begun: float) -> dict[str, Any]:
    for name in _WORLD:
        os.environ.pop(name, None)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL tells its makers of every training otherwise
    try:
        log_to(folder / "logs" / "worker.log")
        os.write(1, f"worker pid {os.getpid()}\n".encode())
        write_json(folder / "worker.json", {"pid": os.getpid(), "node": node})
        result = _fine_tune(config, fingerprint, folder, begun)
    except (ModelError, RunError) as error:
        result = {"error": str(error)}
    except Exception as error:
        reason = lasting_reason(error, folder)
        if reason is None:
            raise
        result = {"error": reason}
        # A checkpoint that was not finished: on a full disk its room is what the reason is written to.
        shutil.rmtree(folder / CHECKPOINTS_FOLDER / WORK_FOLDER, ignore_errors=True)
    with contextlib.suppress(OSError):  # still full: the driver hears of it from Ray
        write_json(folder / RESULT_FILE, result)
    return result


def _fine_tune(config: TrainConfig, fingerprint: str, folder: Path, begun: float) -> dict[str, Any]:
    import ray.train
    import torch

    model = resolve(config.model.name, config.model.revision)
    if model.fingerprint != fingerprint:
        raise ModelError(f"{model.path}: not the model that the run was started with, on this node")
    pinned = config.resources.device == "gpu" and not config.resources.simulated_card
    if pinned and not torch.cuda.is_available():
        raise RunError("Ray placed the worker on a node with a GPU, but torch sees none there; check its driver")
    if not torch.cuda.is_available():
        torch.set_num_threads(config.resources.num_threads or len(os.sched_getaffinity(0)))
    from birbal_ray.train.sft import fine_tune

    reported = -math.inf

    def report(line: dict[str, Any]) -> None:
        # Ray takes one every two seconds; a second one would hold the training up until then.
        nonlocal reported
        if reason := diverged(line):
            raise RunError(reason)
        if time.monotonic() - reported > REPORT_SECONDS:
            ray.train.report({name: value for name, value in line.items() if value is not None})
            reported = time.monotonic()

    return asdict(fine_tune(config, model.path, folder, report, begun=begun))


def diverged(line: Mapping[str, Any]) -> str | None:
    """Why a run can't go on after this line of metrics.jsonl, with the way out; None where its losses are numbers."""
    for name, what in (("eval_loss", "eval loss"), ("loss", "training loss"), ("grad_norm", "gradient's norm")):
        if math.isfinite(line.get(name, 0.0)):
            continue
        if line["step"] == 0:
            return "the base model's eval loss is not a number; check the model, or set model.dtype=float32"
        return (
            f"the {what} is not a number since step {line['step']}: the adapter diverged; "
            "lower optimizer.learning_rate and start anew with --overwrite"
        )
    return None


def lasting_reason(error: BaseException, folder: Path) -> str | None:
    """Why trying again would fail again, with the way out; None for what a restart may mend."""
    text = " ".join(str(error).split())
    full = (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)) or "No space left" in text
    if "inline_container" in text:  # torch.save says where it stopped writing, not why
        full = shutil.disk_usage(folder).free < FULL_BYTES
    if full:
        return f"{folder}: no space left on the disk; the last checkpoint is whole. Make room and run the command again"
    if type(error).__name__ == "OutOfMemoryError":
        return (
            f"the card ran out of memory ({text[:160]}); lower batch.micro (and raise batch.accumulation by as much) "
            "or batch.sequence_length, and start anew with --overwrite; `birbal train --dry-run` estimates the need"
        )
    return None


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"the last time: {lines[-1]}" if lines else type(error).__name__
