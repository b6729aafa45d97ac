"""The training worker, on its node: checks, the fine-tune with its log in the run folder, and why it can't go on."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from birbal_ray.cluster import log_to
from birbal_ray.models import ModelError, quiet_libraries, resolve_model
from birbal_ray.settings import ConfigError, one_line
from birbal_ray.storage import Folder, RunError, read_json, write_json
from birbal_ray.train import files
from birbal_ray.train.config import TrainConfig
from birbal_ray.train.files import Remote, download_state, read_metrics, working_folder

REPORT_SECONDS = 5.0
FULL_BYTES = 1 << 20  # a disk with less room than this is full
# What libraries say of memory besides torch's own error: of the card's, and of the machine's (the last: Ray's monitor).
_CARD_IS_FULL = (
    *("CUDA error: out of memory", "CUDA driver error: out of memory", "Triton Error [CUDA]: out of memory"),
    "CUBLAS_STATUS_ALLOC_FAILED",
)
_HOST_MEMORY = re.compile("(can't|cannot) allocate memory|memory usage threshold", re.IGNORECASE)
# accelerate would wrap the model in DDP for a world of one, and take Ray's word for the device.
_WORLD = (
    *("ACCELERATE_TORCH_DEVICE", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK"),
    *("MASTER_ADDR", "MASTER_PORT"),
)


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
            write_json(folder / files.EASED_FILE, smaller)
            remote.add(files.EASED_FILE)
            return {"eased": f"the card ran out of memory at batch.micro={config.batch.micro}"}
        reason = lasting_reason(error, folder, config)
        if reason is None:
            raise
        result = {"error": reason}
        # An unfinished checkpoint: on a full disk its room is what the reason is written to.
        shutil.rmtree(folder / files.CHECKPOINTS_FOLDER / files.WORK_FOLDER, ignore_errors=True)
    with contextlib.suppress(OSError):  # still full: Ray gives the result to the driver
        write_json(folder / files.SESSION_FILE, result)
        remote.add(files.SESSION_FILE, *files.STATE_FILES, "logs", files.TENSORBOARD_FOLDER)
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
    steps = [line for line in read_metrics(folder / files.METRICS_FILE) if "loss" in line and line.get("step_seconds")]
    seconds = sum(line["step_seconds"] for line in steps[1:])  # the first step warms up
    if not seconds or not (folder / files.CLOCK_FILE).exists():
        return {}
    clock = read_json(folder / files.CLOCK_FILE)
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


def lasting_reason(error: BaseException, folder: Path, config: TrainConfig) -> str | None:
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
    # What needs less memory and changes nothing of the adapter.
    easier = "" if config.gradient_checkpointing else "with gradient_checkpointing=true, or "
    if config.batch.micro > 1:
        easier = "with half the batch.micro and twice the batch.accumulation, or "
    if out_of_memory(error):
        return (
            f"the card ran out of memory at batch.micro={config.batch.micro} ({text[:160]}); the last checkpoint is "
            f"kept. The run continues {easier}on a larger card"
        )
    if isinstance(error, MemoryError) or _HOST_MEMORY.search(text):
        return (
            f"the worker's machine ran out of memory ({text[:160]}); the last checkpoint is kept. "
            f"The run continues {easier}on a machine with more memory"
        )
    return None


def out_of_memory(error: BaseException) -> bool:
    """Whether the card, not the machine, ran out of memory."""
    text = str(error)
    return type(error).__name__ == "OutOfMemoryError" or any(sign in text for sign in _CARD_IS_FULL)
