"""One trial of a search, in a worker process: its mix, its proxy fine-tune, its objective."""

from __future__ import annotations

import gc
import math
import shutil
from pathlib import Path
from typing import Any

from birbal_ray.cluster import log_to
from birbal_ray.mix.config import MixConfig
from birbal_ray.mix.run import ANY_SIZE_MIB, mix
from birbal_ray.models import Model, load_tokenizer, resolve_model
from birbal_ray.run import LOG_FOLDER, RunError
from birbal_ray.settings import ConfigError
from birbal_ray.storage import elsewhere
from birbal_ray.tune.config import TuneConfig
from birbal_ray.tune.records import TRIALS_FOLDER, trial_folder
from birbal_ray.tune.scheduler import BASE, Job

NUM_EVAL_ROWS = 8  # validation rows that the fine-tune's own evaluation is made on; trials are judged on all


def run_trial(config: dict[str, Any]) -> None:
    """One trial, in a worker process: its mix, its proxy fine-tune, its objective."""
    import ray

    job, settings = Job.from_dict(config["job"]), TuneConfig.model_validate(config["settings"])
    part, here = f"{TRIALS_FOLDER}/{job.key}", ray.get_runtime_context().get_node_id()
    with elsewhere(config["url"], Path(config["run"]), part, config["node"], here) as run:
        _run_trial(job, settings, config["fingerprint"], run)


def _run_trial(job: Job, settings: TuneConfig, fingerprint: str, run: Path) -> None:
    from birbal_ray.tune.searcher import Looks

    folder = trial_folder(run, job)
    log_to(folder / LOG_FOLDER / "trial.log")
    model = resolve_model(settings.train.model.name, settings.train.model.revision)
    if model.fingerprint != fingerprint:
        raise RunError(f"{model.path}: not the model that the search was started with, on this node")
    # An earlier process may have died half-way: what it left is not trusted.
    for name in ("mix", "train"):
        shutil.rmtree(folder / name, ignore_errors=True)
    made = make_mix(job, settings, folder / "mix")
    num_looks = 1 if job.kind == BASE else settings.validation.looks
    try:
        judge(job, settings, model, folder, made, Looks(run, job, num_looks))
    finally:
        shutil.rmtree(folder / "mix", ignore_errors=True)
        for name in ("packed", "checkpoints", "best"):
            shutil.rmtree(folder / "train" / name, ignore_errors=True)
        gc.collect()


def make_mix(job: Job, config: TuneConfig, folder: Path) -> dict[str, Any]:
    """Make a trial's mix, as `birbal mix` does from the trial's mix.yaml; its manifest.

    The base model, which trains on none, gets the mix of the settings, for its validation rows.
    """
    default = config.mix.model_dump(mode="json") | {
        "validation_rows_per_task": config.validation.rows_per_task,
        "task_score": config.mix.task_score.model_dump() | {"allow_shortfall": True},
    }
    values = {**(job.mix or default), "scores": config.scores, "output": str(folder)}
    values["resources"] = {"in_process_mib": ANY_SIZE_MIB}  # by itself, without further Ray tasks
    return mix(MixConfig.model_validate(values)).manifest


def judge(job: Job, config: TuneConfig, model: Model, folder: Path, made: dict[str, Any], looks: Any) -> None:
    """Train on the mix in `folder`, and tell the objective at every look."""
    import torch

    from birbal_ray.train.data import PACKED_FOLDER, prepare
    from birbal_ray.train.sft import fine_tune, load_base
    from birbal_ray.train.task_loss import AtSteps, mean_over_tasks, read_samples, task_losses

    train = config.train
    if not torch.cuda.is_available():
        torch.set_num_threads(train.resources.num_threads or 1)
    tokenizer = load_tokenizer(model.path)
    samples = read_samples(folder / "mix" / "validation.parquet", tokenizer, train.batch.sequence_length)
    if not samples:
        raise ConfigError(
            f"validation.rows_per_task={config.validation.rows_per_task}: no row of any task fits "
            f"train.batch.sequence_length={train.batch.sequence_length}, or none is left over"
        )
    figures = {
        "num_rows": made["rows"]["train"],
        "mix_sha256": made["files"]["train.parquet"]["sha256"],
        "validation_sha256": made["files"]["validation.parquet"]["sha256"],
    }
    if job.kind == BASE:
        base = load_base(model.path, train)
        figures |= {"num_rows": 0, "mix_sha256": ""}
        looks.look(0, mean_over_tasks(task_losses(base, samples)), **figures)
        return
    packing = prepare(
        folder / "mix",
        folder / "train" / PACKED_FOLDER,
        tokenizer,
        train.batch.sequence_length,
        train.batch.long_samples,
        NUM_EVAL_ROWS,
        eval_split="validation",
    )["train"]
    per_step = train.batch.micro * train.batch.accumulation * packing.num_tokens / packing.num_packs
    num_steps = max(config.validation.looks, round(config.proxy.tokens / per_step))
    epochs = math.ceil(num_steps * train.batch.micro * train.batch.accumulation / packing.num_packs) + 1
    never = num_steps + 1
    short = train.model_copy(
        update={
            "seed": job.seed,
            "max_steps": num_steps,
            "epochs": float(epochs),
            "evaluation": train.evaluation.model_copy(update={"every_steps": never}),
            "checkpoint": train.checkpoint.model_copy(update={"every_steps": never, "every_minutes": math.inf}),
        }
    )
    at = {round(num_steps * (k + 1) / config.validation.looks) for k in range(config.validation.looks)}

    def look(step: int, trained: Any) -> None:
        tokens = round(num_steps * per_step)
        looks.look(step, mean_over_tasks(task_losses(trained, samples)), num_tokens=tokens, **figures)

    fine_tune(short, model.path, folder / "train", callbacks=[AtSteps(at, look)])
