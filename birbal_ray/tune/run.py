"""Tune: the sampling ratios that a short proxy fine-tune learns most from, and whether they beat hand-made ones."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from birbal_ray.cluster import MIN_LOGICAL_CPUS, can_place, job_metadata, ray_session
from birbal_ray.mix.scores import ScoreFolder, open_scores
from birbal_ray.models import Model, pin_model, resolve_model
from birbal_ray.progress import ProgressLine
from birbal_ray.run import (
    LOG_FOLDER,
    MANIFEST_FILE,
    RunError,
    RunFailedError,
    finish_run,
    read_json,
    start_run,
    stoppable,
    write_atomic,
    write_parquet,
)
from birbal_ray.settings import require
from birbal_ray.storage import absolute, is_url, refresh, run_folder
from birbal_ray.train.config import TrainResources
from birbal_ray.tune.config import TuneConfig
from birbal_ray.tune.plots import draw_search, draw_verdict
from birbal_ray.tune.records import (
    TRIALS_FOLDER,
    mix_yaml,
    read_records,
    remember_job,
    table_of,
)
from birbal_ray.tune.scheduler import BASE, BASE_MODEL, FAILED, FINISHED, REPEAT, STOPPED, Job, Plan, Record
from birbal_ray.tune.space import TaskCounts, num_rows
from birbal_ray.tune.stats import Verdict, by_name, verdict, winner
from birbal_ray.tune.trial import run_trial

STEP = "tune"
TRIALS_FILE, BEST_FILE = "trials.parquet", "best_mix.yaml"
SEARCH_PICTURE, VERDICT_PICTURE = "search.png", "verdict.png"


@dataclass(frozen=True, slots=True)
class TuneResult:
    """What a search left. `summary`: one row a mix that was run again or is a baseline, best first."""

    folder: Path
    manifest: dict[str, Any]


def tune(config: TuneConfig, *, overwrite: bool = False, progress: ProgressLine | None = None) -> TuneResult:
    """Search, or go on with a search, in `config.output`.

    Raises ConfigError (settings, scores, another run's folder), ModelError, RunError (the search broke
    off or every trial failed; trials that ended are kept and the same command goes on).
    """
    progress = progress or ProgressLine()
    config, scores, model = resolved(config)
    output = require(config.output, "--output")
    with run_folder(output, follow=True) as folder, stoppable():
        resumed = start_run(folder, STEP, _identity(config, scores, model), overwrite=overwrite)
        if resumed and (folder / MANIFEST_FILE).exists():
            progress.message(f"{folder} is up to date; nothing to do")
            return TuneResult(folder, read_json(folder / MANIFEST_FILE))
        plan = _plan(config, scores, folder)
        if plan.records or plan.running:
            progress.message(f"continuing: {len(plan.records)} trials have ended and are kept")
        url = absolute(output) if is_url(output) else None
        options: dict[str, Any] = {"settings": config.model_dump(mode="json"), "fingerprint": model.fingerprint}
        options["url"] = url
        search(config, plan, folder, run_trial, options, progress)
        return _finish(config, scores, plan, folder, progress)


def dry_run(config: TuneConfig) -> list[dict[str, Any]]:
    """What would be run: one row per kind of trial. Reads the scores, writes nothing."""
    config, scores, _ = resolved(config)
    plan = Plan(config, task_counts(scores))
    repeats = config.repeats.seeds if config.repeats.top else 0
    return [
        {"trials": "base model, not trained", "number": 1, "tokens each": 0},
        {"trials": f"baselines: {', '.join(config.baselines)}", "number": len(config.baselines)}
        | {"tokens each": config.proxy.tokens},
        {"trials": "search", "number": config.num_trials, "tokens each": config.proxy.tokens},
        {"trials": "surrogate's best", "number": int(config.surrogate), "tokens each": config.proxy.tokens},
        {
            "trials": f"fresh seeds of baselines and the best {config.repeats.top}",
            "number": repeats * (len(config.baselines) + config.repeats.top),
            "tokens each": config.proxy.tokens,
        },
        {"trials": "in all", "number": plan.num_trials, "tokens each": None},
    ]


def resolved(config: TuneConfig) -> tuple[TuneConfig, ScoreFolder, Model]:
    """(configuration with paths absolute and the device decided, its scores, its model)."""
    path = absolute(require(config.scores, "--scores"))
    scores = open_scores(path, config.mix.model)
    model = resolve_model(config.train.model.name, config.train.model.revision)
    resources = config.resources
    threads = resources.num_threads or max(1, (os.cpu_count() or 1) // resources.max_concurrent)
    train_resources = TrainResources(
        device="gpu" if resources.num_gpus else "cpu",
        accelerator_type=resources.accelerator_type,
        num_cpus=resources.num_cpus,
        num_threads=threads,
    )
    settings = config.train.model.model_copy(update=pin_model(model))
    train = config.train.model_copy(update={"resources": train_resources, "model": settings})
    return config.model_copy(update={"scores": path, "train": train}), scores, model


def task_counts(scores: ScoreFolder) -> TaskCounts:
    """Tasks and rows of each label."""
    tasks: Counter[str] = Counter()
    rows: Counter[str] = Counter()
    for task in scores.tasks:
        tasks[task.label] += 1
        rows[task.label] += task.num_instances - task.num_errors
    return TaskCounts(tasks, rows)


def _identity(config: TuneConfig, scores: ScoreFolder, model: Model) -> dict[str, Any]:
    """Everything that decides the trials; paths and resources don't."""
    settings = config.model_dump(mode="json", exclude={"scores", "output", "resources"})
    settings["train"].pop("resources")
    settings["mix"].pop("resources")
    settings["train"]["model"].pop("name")
    return {
        "settings": settings,
        "scores": {"run": scores.identity_hash, "files": scores.content_hash},
        "model_fingerprint": model.fingerprint,
    }


def _plan(config: TuneConfig, scores: ScoreFolder, folder: Path) -> Plan:
    records, begun = read_records(folder)

    def remember(job: Job) -> None:
        remember_job(folder, job, config.scores or "")
        refresh(folder)

    return Plan(config, task_counts(scores), records, begun, remember=remember)


def search(
    config: TuneConfig,
    plan: Plan,
    folder: Path,
    trainable: Callable[[dict[str, Any]], None],
    options: dict[str, Any],
    progress: ProgressLine,
) -> None:
    """Run what is left of the plan on the connected cluster, or on a local one made for it."""
    logical = max(MIN_LOGICAL_CPUS, config.resources.num_cpus * config.resources.max_concurrent + 1)
    with ray_session(
        logical, folder / LOG_FOLDER / "ray.log", dashboard=True, about=job_metadata(STEP, folder)
    ) as dashboard:
        import ray

        from birbal_ray.train.launch import worker_request
        from birbal_ray.tune.searcher import RAY_FOLDER, run_plan

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        missing = can_place(worker_request(config.train), nodes)
        if missing:
            raise RunError(missing)
        progress.message(f"trials: tensorboard --logdir {folder / RAY_FOLDER}")
        if dashboard:
            progress.message(f"Ray dashboard: http://{dashboard}")
        options = {"url": None, **options, "node": ray.get_runtime_context().get_node_id()}
        run_plan(plan, config, folder, trainable, options, progress)


def _finish(config: TuneConfig, scores: ScoreFolder, plan: Plan, folder: Path, progress: ProgressLine) -> TuneResult:
    records = [plan.records[key] for key in sorted(plan.records)]
    failed = [record for record in records if record.status == FAILED]
    for record in failed:
        log = folder / TRIALS_FOLDER / record.job.key / LOG_FOLDER / "trial.log"
        progress.message(f"trial {record.job.key} failed: {record.error} (log: {log})")
    good = [r for r in records if r.status == FINISHED and r.job.kind != BASE]
    if not good:
        raise RunFailedError(f"{folder}: no trial came to its end; mend what the logs name and run the command again")
    suites = {record.validation_sha256 for record in records if record.validation_sha256}
    if len(suites) > 1:
        raise RunError(
            f"{folder}: trials were judged on {len(suites)} different validation suites; "
            "remove the folder to start anew"
        )
    objectives = by_name(records)
    chosen = (
        winner(plan.finalists(), config.baselines, objectives)
        or min(good, key=lambda record: (record.objective or math.inf, record.job.key)).job.name
    )
    # What was found is compared with every baseline, also where one of these is the best of all.
    searched = winner(plan.finalists(), [], objectives)
    verdicts = [v for b in config.baselines if searched and (v := verdict(searched, b, objectives))]
    # Any of its trials has its ratios; a baseline's first may have failed where its fresh seeds did not.
    job = next(r.job for r in good if r.job.name == chosen)
    job = replace(job, seed=config.seed, mix={**job.mix, "seed": config.seed})
    about = [_about(job, config, folder), *[v.sentence() for v in verdicts]]
    write_atomic(folder / BEST_FILE, mix_yaml(job.mix, config.scores or "", about).encode())
    write_parquet(folder / TRIALS_FILE, table_of(records))
    write_atomic(folder / SEARCH_PICTURE, draw_search(records, config.baselines))
    if objectives:
        write_atomic(folder / VERDICT_PICTURE, draw_verdict(objectives, config.baselines, chosen))
    base = plan.records.get(BASE_MODEL)
    manifest = {
        "seed": config.seed,
        "model": {"name": config.train.model.name},
        "scores": {"path": config.scores},
        "best": {"mix": chosen, "is_baseline": chosen in config.baselines, "ratios": job.values},
        "verdicts": [_plain(v) for v in verdicts],
        "base_objective": base.objective if base else None,
        "left_out": plan.left_out or None,
        "summary": summary(records, config),
        "trials": dict(Counter(record.status for record in records)),
        "rows": {"per_mix": num_rows(config.mix)},
    }
    finish_run(folder, manifest)
    return TuneResult(folder, read_json(folder / MANIFEST_FILE))


def _about(job: Job, config: TuneConfig, folder: Path) -> str:
    of = f"of {config.num_trials} searched, {len(config.baselines)} baselines"
    return f"Mix {job.name!r}, the lowest mean held-out loss over fresh seeds, {of} ({folder.name})."


def _plain(found: Verdict) -> dict[str, Any]:
    return {
        "mix": found.name,
        "baseline": found.baseline,
        "outcome": found.outcome,
        "difference": found.difference,
        "margin": found.margin if math.isfinite(found.margin) else None,
        "num_seeds": found.num_seeds,
        "sentence": found.sentence(),
    }


def summary(records: list[Record], config: TuneConfig) -> list[dict[str, Any]]:
    """One row per mix at the search's seed, baselines first, then by objective, failed last; fresh seeds beside."""
    again = by_name(records)
    rows = []
    for record in records:
        if record.job.kind not in (BASE, REPEAT):
            fresh = list(again.get(record.job.name, {}).values())
            rows.append(
                {
                    "mix": record.job.name,
                    "kind": record.job.kind,
                    "status": record.status,
                    "loss": record.objective,
                    "fresh seeds": len(fresh) or None,
                    "mean loss": sum(fresh) / len(fresh) if fresh else None,
                    **{name: record.job.values.get(name) for name in ("gamma", "exact_match_fraction", "failed_first")},
                }
            )
    order = {name: place for place, name in enumerate(config.baselines)}
    statuses = [FINISHED, STOPPED, FAILED]
    return sorted(
        rows, key=lambda row: (order.get(row["mix"], len(order)), statuses.index(row["status"]), row["loss"] or 0.0)
    )
