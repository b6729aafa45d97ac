"""One trial of a search, in a worker process: its mix, its proxy fine-tune, its objective."""

from __future__ import annotations

import contextlib
import gc
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from birbal_ray.cluster import locked_folder, log_to, remove_stale_folders
from birbal_ray.mix.config import MixConfig
from birbal_ray.mix.run import ANY_SIZE_MIB, mix
from birbal_ray.mix.sources import read_records
from birbal_ray.models import Model, load_tokenizer, read_template, resolve_model
from birbal_ray.run import RunError
from birbal_ray.schemas import NATURAL_INSTRUCTIONS
from birbal_ray.settings import ConfigError
from birbal_ray.storage import open_folder
from birbal_ray.tune.config import TuneConfig, file_group
from birbal_ray.tune.records import ADAPTER_FOLDER, RungReporter, trial_file
from birbal_ray.tune.scheduler import BASE, REPEAT, TrialSpec

NUM_EVAL_ROWS = 8  # validation rows that the fine-tune's own evaluation uses; trials are judged on all
LOG_FILE = "logs/trial.log"


def run_trial(options: dict[str, Any]) -> None:
    """One trial, in a worker process. Only its log and its result go to the run's folder."""
    spec, settings = TrialSpec(**options["spec"]), TuneConfig.model_validate(options["settings"])
    run = open_folder(options["run"])
    remove_stale_folders()  # of trials that were killed here
    with locked_folder(Path(tempfile.gettempdir())) as work:
        log = run.local / trial_file(spec, LOG_FILE) if run.is_local else work / "trial.log"
        log_to(log)
        try:
            model = resolve_model(settings.train.model.name, settings.train.model.revision)
            if model.fingerprint != options["fingerprint"]:
                raise RunError(f"{model.path}: not the model that the search was started with, on this node")
            reporter = RungReporter(run, spec, 1 if spec.kind == BASE else settings.validation.num_rungs)
            made = make_mix(spec, settings, work / "mix")
            judge(spec, settings, model, work, made, options["labels"], reporter)
        finally:
            if not run.is_local:
                with contextlib.suppress(OSError, RunError):  # an outage, or a lost lock: the trial itself is over
                    run.upload(log, trial_file(spec, LOG_FILE))
            gc.collect()


def make_mix(spec: TrialSpec, config: TuneConfig, folder: Path) -> dict[str, Any]:
    """Make a trial's mix, as `birbal mix` does from the trial's mix.yaml; its manifest.

    The base model, which trains on none, gets the mix of the settings, for its validation rows.
    """
    default = config.mix.model_dump(mode="json") | {
        "validation_rows_per_task": config.validation.rows_per_task,
        "task_score": config.mix.task_score.model_dump() | {"allow_shortfall": True},
    }
    values = {**(spec.mix or default), "scores": config.scores, "output": str(folder)}
    values["resources"] = {"in_process_mib": ANY_SIZE_MIB}  # by itself, without further Ray tasks
    return mix(MixConfig.model_validate(values)).manifest


def judge(
    spec: TrialSpec,
    config: TuneConfig,
    model: Model,
    work: Path,
    made: Mapping[str, Any],
    labels: Mapping[str, str],
    reporter: Any,
) -> None:
    """Train on the mix in `work`/mix, and report the objective at every rung. `labels`: task → its label."""
    import torch

    from birbal_ray.train.data import encode_rows, prepare
    from birbal_ray.train.files import PACKED_FOLDER
    from birbal_ray.train.sft import fine_tune, load_base
    from birbal_ray.train.task_loss import AtSteps, Sample, read_samples, task_losses

    train = config.train
    if not torch.cuda.is_available():
        torch.set_num_threads(train.resources.num_threads or 1)
    tokenizer = load_tokenizer(model.path)
    chat = read_template(tokenizer, train.prompt.format, train.prompt.chat_template_arguments)
    validation = work / "mix" / "validation.parquet"
    samples = read_samples(validation, tokenizer, train.batch.sequence_length, chat)
    columns = pq.read_table(validation, columns=["task", "source"]).to_pydict()
    groups = {
        task or source: labels[task] if source == NATURAL_INSTRUCTIONS else f"source:{source}"
        for task, source in zip(columns["task"], columns["source"], strict=True)
    }
    for file in config.validation.files:
        group = groups[file_group(file)] = file_group(file)
        rows = read_questions(file)
        if chat is not None:  # a question is all that the user says
            rows = {"instruction": [""] * len(rows["answer"]), "input": rows["question"], "output": rows["answer"]}
        encoded = encode_rows(tokenizer, rows, chat)
        samples += [Sample(group, *one) for one in encoded if len(one[0]) <= train.batch.sequence_length]
    if not samples:
        raise ConfigError(
            f"validation.rows_per_task={config.validation.rows_per_task}: no row of any task fits "
            f"train.batch.sequence_length={train.batch.sequence_length}, or none is left over"
        )
    figures = {
        "num_rows": made["rows"]["train"],
        "num_unfilled": sum(int(entry["shortfall"]) for entry in made["allocation"].values()),
        "mix_sha256": made["files"]["train.parquet"]["sha256"],
        "validation_sha256": made["files"]["validation.parquet"]["sha256"],
    }

    def report(step: int, trained: Any, **more: Any) -> None:
        tasks = task_losses(trained, samples)
        losses = group_losses(tasks, groups)
        objective = weighted_mean(losses, config.validation.weights)
        reporter.report(step, objective, groups=losses, tasks=tasks, **{**figures, **more})

    if spec.kind == BASE:
        report(0, load_base(model.path, train), num_rows=0, num_unfilled=0, mix_sha256="")
        return
    once = train.replace({"seed": spec.seed, "epochs": 1.0})
    packed = work / "train" / PACKED_FOLDER
    packing = prepare(work / "mix", packed, tokenizer, once, num_eval_rows=NUM_EVAL_ROWS, eval_split="validation")[
        "train"
    ]
    per_step = train.batch.micro * train.batch.accumulation * packing.num_tokens / packing.num_packs
    num_rungs = config.validation.num_rungs
    num_steps = max(num_rungs, round(spec.tokens / per_step))
    epochs = math.ceil(num_steps * train.batch.micro * train.batch.accumulation / packing.num_packs) + 1
    lasting = {"seed": spec.seed, "max_steps": num_steps, "epochs": float(epochs)}
    never = dict.fromkeys(("evaluation.every_steps", "checkpoint.every_steps"), num_steps + 1)
    short = train.replace({**lasting, **never, "checkpoint.every_minutes": math.inf})
    rungs = {round(num_steps * (k + 1) / num_rungs) for k in range(num_rungs)}
    num_tokens = round(num_steps * per_step)

    def look(step: int, trained: Any) -> None:
        if config.proxy.keep_adapters and spec.kind == REPEAT and step == num_steps:
            trained.save_pretrained(work / ADAPTER_FOLDER, safe_serialization=True)
            reporter.keep(work / ADAPTER_FOLDER)
        report(step, trained, num_tokens=num_tokens)

    fine_tune(short, model.path, work / "train", callbacks=[AtSteps(rungs, look)])


def read_questions(file: str) -> dict[str, list[str]]:
    """The columns question and answer of a file of `validation.files`. Raises ConfigError naming file and row."""
    rows: dict[str, list[str]] = {"question": [], "answer": []}
    for number, record in read_records(file, "validation.files"):
        for name, texts in rows.items():
            if not isinstance(record, dict) or not isinstance(record.get(name), str):
                found = f"has the columns {', '.join(record)}" if isinstance(record, dict) else "is no record"
                raise ConfigError(
                    f"validation.files: {file}, row {number} {found}; "
                    f"expected texts in question and answer, and found no such {name}"
                )
            texts.append(record[name])
    if not rows["answer"]:
        raise ConfigError(f"validation.files: {file} has no rows; expected some with question and answer")
    return rows


def group_losses(losses: Mapping[str, float], groups: Mapping[str, str]) -> dict[str, float]:
    """Task → loss as group → the plain mean over its tasks, by name."""
    members: dict[str, list[float]] = {}
    for task, loss in losses.items():
        members.setdefault(groups[task], []).append(loss)
    return {group: math.fsum(values) / len(values) for group, values in sorted(members.items())}


def weighted_mean(losses: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """The objective: groups that `weights` doesn't name weigh 1. Raises ConfigError where all weigh 0."""
    total = math.fsum(weights.get(group, 1.0) for group in losses)
    if not total:
        raise ConfigError(f"validation.weights: {', '.join(losses)} all weigh 0; there is nothing to judge mixes by")
    return math.fsum(weights.get(group, 1.0) * loss for group, loss in losses.items()) / total
