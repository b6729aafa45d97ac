"""The Ray Train worker, placed on the card the configuration names."""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from birbal_ray.config.train import TrainConfig
from birbal_ray.models import ModelError, resolve
from birbal_ray.ray_session import log_to
from birbal_ray.run import RunError, write_json
from birbal_ray.storage import child, elsewhere, filesystem_of, refresh

RESULT_FILE = "session.json"  # of the worker's last session: an outcome, or why it can't go on
RAY_FOLDER = "ray"
REPORT_SECONDS = 5.0
# accelerate would wrap the model in DDP for a world of one.
_WORLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")


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
    times. Errors that would only come again end the run at once. Raises RunError for either.
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
        trainer.fit()
    except TrainingFailedError as error:
        raise RunError(
            f"the training worker failed {config.resources.max_failures + 1} times; {_last_line(error)}"
        ) from error
    refresh(folder)
    return _result(folder)


def train_on_worker(options: dict[str, Any]) -> None:
    """What the worker does: `fine_tune`, with its log in the run folder."""
    import ray

    config = TrainConfig.model_validate(options["config"])
    here = ray.get_runtime_context().get_node_id()
    with elsewhere(options["url"], Path(options["folder"]), "", options["node"], here) as folder:
        _train(config, options["fingerprint"], folder, here)


def _train(config: TrainConfig, fingerprint: str, folder: Path, node: str) -> None:
    log_to(folder / "logs" / "worker.log")
    os.write(1, f"worker pid {os.getpid()}\n".encode())
    write_json(folder / "worker.json", {"pid": os.getpid(), "node": node})
    for name in _WORLD:
        os.environ.pop(name, None)
    try:
        outcome = _fine_tune(config, fingerprint, folder)
    except (ModelError, RunError) as error:
        write_json(folder / RESULT_FILE, {"error": str(error)})
    except Exception as error:
        reason = lasting_reason(error, folder)
        if reason is None:
            raise
        write_json(folder / RESULT_FILE, {"error": reason})
    else:
        write_json(folder / RESULT_FILE, outcome)


def _fine_tune(config: TrainConfig, fingerprint: str, folder: Path) -> dict[str, Any]:
    import ray.train
    import torch

    model = resolve(config.model.name, config.model.revision)
    if model.fingerprint != fingerprint:
        raise ModelError(f"{model.path}: not the model that the run was started with, on this node")
    if config.resources.device == "gpu" and not torch.cuda.is_available():
        raise RunError("Ray placed the worker on a node with a GPU, but torch sees none there; check its driver")
    if not torch.cuda.is_available():
        torch.set_num_threads(config.resources.num_threads or len(os.sched_getaffinity(0)))
    from birbal_ray.training.finetune import fine_tune

    reported = -math.inf

    def report(line: dict[str, Any]) -> None:
        # Ray takes one every two seconds; a second one would hold the training up until then.
        nonlocal reported
        if time.monotonic() - reported > REPORT_SECONDS:
            ray.train.report({name: value for name, value in line.items() if value is not None})
            reported = time.monotonic()

    return asdict(fine_tune(config, model.path, folder, report))


def lasting_reason(error: BaseException, folder: Path) -> str | None:
    """Why trying again would fail again, with the way out; None for what a restart may mend."""
    text = " ".join(str(error).split())
    if (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)) or "No space left" in text:
        return f"{folder}: no space left on the disk; the last checkpoint is whole. Make room and run the command again"
    if type(error).__name__ == "OutOfMemoryError":
        return (
            f"the card ran out of memory ({text[:160]}); lower batch.micro (and raise batch.accumulation by as much) "
            "or batch.sequence_length, and start anew with --overwrite; `birbal train --dry-run` estimates the need"
        )
    return None


def _result(folder: Path) -> dict[str, Any]:
    file = folder / RESULT_FILE
    if not file.exists():
        raise RunError(f"{folder}: the worker ended without a word (log: {folder / 'logs' / 'worker.log'})")
    result = json.loads(file.read_text(encoding="utf-8"))
    if "error" in result:
        raise RunError(result["error"])
    return result


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"the last time: {lines[-1]}" if lines else type(error).__name__
