"""Tune: the sampling ratios that a short proxy fine-tune learns most from, and whether they beat hand-made ones."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from birbal_ray.cluster import WorkerRequest, can_place, job_metadata, ray_log_file, ray_session
from birbal_ray.mix.run import inputs_of
from birbal_ray.mix.scores import ScoreFolder, open_scores
from birbal_ray.mix.sources import absolute_paths, sha256_of_file
from birbal_ray.models import Model, pin_model, resolve_model
from birbal_ray.progress import ProgressLine, counted, duration, figures_key, save_figures
from birbal_ray.run import Run, RunError, RunFailedError, Step, StepResult, open_run
from birbal_ray.settings import ConfigError, require
from birbal_ray.storage import Folder, absolute, absolute_link
from birbal_ray.train.config import TrainResources
from birbal_ray.tune.config import TuneConfig, changed_mix, file_group, num_rows
from birbal_ray.tune.records import TRIALS_FOLDER, mix_yaml, read_results, table_of, trial_file, write_spec
from birbal_ray.tune.scheduler import BASE, BASE_MODEL, FAILED, FINISHED, TRANSFER, TrialScheduler
from birbal_ray.tune.space import searched_ratios
from birbal_ray.tune.stats import (
    by_name,
    compare_seeds,
    describe_comparisons,
    draw_search,
    rank_agreement,
    summarise,
    winner,
)
from birbal_ray.tune.trial import LOG_FILE, run_trial

TRIALS_FILE, BEST_FILE, PICTURE = "trials.parquet", "best_mix.yaml", "search.png"
OWNS = (TRIALS_FILE, BEST_FILE, PICTURE, f"{TRIALS_FOLDER}/*", "ray_tune/*")
STEP = Step("tune", OWNS)


class TuneResult(StepResult):
    """What a search left: its folder and its manifest."""


def tune(config: TuneConfig, *, overwrite: bool = False) -> TuneResult:
    """Search, or go on with a search, in `config.output`.

    Raises ConfigError (settings, scores, another run's folder), ModelError, RunError (the search broke
    off or every trial failed; trials that ended are kept and the same command goes on).
    """
    progress, kept_under = ProgressLine(), figures_key(STEP.name, config)
    config, scores, model = resolve_config(config)
    inputs = _inputs(config, model)
    identity = _identity(config, scores, model)
    output = require(config.output, "--output")
    with open_run(output, STEP, identity, inputs=inputs, overwrite=overwrite) as run:
        if before := run.manifest:
            has_more = (config.budget or math.inf) > (before.get("budget") or math.inf)
            if not (before.get("cut_short") and has_more):
                progress.message(f"{run.folder} is up to date; nothing to do")
                return TuneResult(run.folder, before)
            run.withdraw()
        results, started = read_results(run.folder)
        scheduler = TrialScheduler(
            config,
            results,
            started,
            remember=lambda spec: write_spec(run.folder, spec, config.scores or ""),
            seconds_left=lambda: math.inf if config.budget is None else config.budget - run.wall_seconds,
        )
        if results or started:
            progress.message(f"continuing: {len(results)} trials have ended and are kept")
        options: dict[str, Any] = {"settings": config.model_dump(mode="json"), "fingerprint": model.fingerprint}
        options["labels"] = {task.name: task.label for task in scores.tasks}
        if scheduler.seconds_left() > 0:
            search(scheduler, run.folder, run_trial, options, progress, run=run)
        elif len(results) < scheduler.num_trials:
            scheduler.cut_short = "the budget had ended before the last trials"
        result = _finish(scheduler, run, progress)
        if not run.resumed:
            save_figures(kept_under, **figures_of(scheduler, result.manifest["wall_seconds"]))
        return result


def figures_of(scheduler: TrialScheduler, wall_seconds: float) -> dict[str, float]:
    """What a search took: seconds of a trial of `proxy.tokens`, and of all else; nothing where no trial ended."""
    ended = [one for one in scheduler.results.values() if one.status == FINISHED]
    trained = [one.seconds / one.spec.tokens for one in ended if one.spec.tokens]
    if not trained:
        return {}
    together = min(scheduler.config.resources.max_concurrent, len(ended))
    rest = max(0.0, wall_seconds - math.fsum(one.seconds for one in ended) / together)
    return {
        "trial_seconds": math.fsum(trained) / len(trained) * scheduler.config.proxy.tokens,
        "overhead_seconds": rest,
    }


def estimate(config: TuneConfig) -> list[dict[str, Any]]:
    """One row per kind of trial: how many, and the training tokens of each; the last row is the sum. Reads nothing."""
    searched = config.num_trials > 0
    compared = ", ".join([*config.baselines, *config.mixes, *([f"the best {config.repeats.top}"] if searched else [])])
    ratios = ", ".join(ratio.name for ratio in searched_ratios(config.search))
    long_tokens = config.transfer.factor * config.proxy.tokens
    kinds: list[tuple[str, int, int]] = [
        ("base model, not trained", 1, 0),
        (f"baselines: {', '.join(config.baselines)}", len(config.baselines) * searched, config.proxy.tokens),
        (f"mixes: {', '.join(config.mixes)}", len(config.mixes) * searched, config.proxy.tokens),
        (f"search of {ratios}", config.num_trials, config.proxy.tokens),
        ("predicted best", int(config.predicts), config.proxy.tokens),
        (f"fresh seeds of {compared}", config.num_repeats, config.proxy.tokens),
        (f"baselines and the best at {config.transfer.factor} × the tokens", config.num_transfers, long_tokens),
    ]
    total = sum(number for _, number, _ in kinds), sum(number * tokens for _, number, tokens in kinds)
    rows = [*((name, number, tokens) for name, number, tokens in kinds if number), ("in all", *total)]
    return [dict(zip(("trials", "number", "tokens each"), row, strict=True)) for row in rows]


def dry_run(config: TuneConfig) -> list[dict[str, Any]]:
    """`estimate`, with settings, scores and model checked, and on stderr what mixes are judged by. Writes nothing."""
    progress = ProgressLine()
    config, scores, _ = resolve_config(config)
    weights = config.validation.weights
    groups = [
        *sorted({task.label for task in scores.tasks}),
        *(f"source:{source.name}" for source in config.mix.sources),
    ]
    groups += [file_group(file) for file in config.validation.files]
    shown = ", ".join(f"{group} × {weights.get(group, 1.0):g}" for group in groups)
    progress.message(f"objective: held-out loss, mean over groups: {shown}")
    if config.budget is not None:
        progress.message(f"budget {duration(config.budget)}: the search ends early enough for the fresh seeds")
    return estimate(config)


def resolve_config(config: TuneConfig) -> tuple[TuneConfig, ScoreFolder, Model]:
    """(configuration with paths absolute and the device decided, its scores, its model)."""
    path = absolute(require(config.scores, "--scores"))
    scores = open_scores(path, config.mix.model)
    model = resolve_model(config.train.model.name, config.train.model.revision)
    resources = config.resources
    if resources.accelerator_type and not resources.num_gpus:
        raise ConfigError(
            f"resources.accelerator_type={resources.accelerator_type} with resources.num_gpus=0: no node ever suits "
            "a trial; give it a card (num_gpus), or leave the type out"
        )
    train_resources = TrainResources(
        device="gpu" if resources.num_gpus else "cpu",
        accelerator_type=resources.accelerator_type,
        num_cpus=resources.num_cpus,
        num_threads=resources.num_threads or max(1, (os.cpu_count() or 1) // resources.max_concurrent),
    )
    pinned = config.train.model.replace(pin_model(model))
    changes = {"scores": path, "train.resources": train_resources, "train.model": pinned}
    # Tune runs a trial in a folder of its own.
    changes["validation.files"] = list(map(absolute_link, config.validation.files))
    changes["mix"] = absolute_paths(config.mix)
    if config.train.lora.from_adapter:
        changes["train.lora.from_adapter"] = absolute(config.train.lora.from_adapter)
    return config.replace(changes), scores, model


def _inputs(config: TuneConfig, model: Model) -> list[str]:
    """The paths and URLs that a search reads."""
    mixes = [config.mix, *(changed_mix(config.mix, changes) for changes in config.mixes.values())]
    files = [config.scores or "", str(model.path), *config.validation.files]
    files += filter(None, [config.train.lora.from_adapter])
    return files + [path for one in mixes for path in inputs_of(one) if path]


def _identity(config: TuneConfig, scores: ScoreFolder, model: Model) -> dict[str, Any]:
    """Everything that decides the trials; paths, resources and the budget don't."""
    settings = config.model_dump(mode="json", exclude={"scores", "output", "resources", "budget"})
    settings["train"].pop("resources")
    for undecisive in ("resources", "model"):  # `scores` say the model
        settings["mix"].pop(undecisive)
    settings["train"]["model"].pop("name")
    files = config.validation.files
    settings["validation"]["files"] = {file_group(file): sha256_of_file(file, "validation.files") for file in files}
    return {
        "settings": settings,
        "scores": {"run": scores.identity_hash, "files": scores.content_hash},
        "model_fingerprint": model.fingerprint,
    }


def search(
    scheduler: TrialScheduler,
    folder: Folder,
    trainable: Callable[[dict[str, Any]], None],
    options: dict[str, Any],
    progress: ProgressLine,
    *,
    run: Run | None = None,
) -> None:
    """Run what the scheduler hands out on the connected cluster, or on a local one made for it."""
    resources = scheduler.config.resources
    trial = WorkerRequest("worker", 1, resources.num_cpus, resources.num_gpus, resources.accelerator_type)
    about = job_metadata(STEP.name, folder)
    logical = resources.num_cpus * resources.max_concurrent + 1
    with ray_session(logical, ray_log_file(folder), dashboard=True, about=about) as dashboard:
        import ray

        from birbal_ray.tune.searcher import RAY_FOLDER, ShowProgress, run_trials

        if missing := can_place(trial, [node["Resources"] for node in ray.nodes() if node["Alive"]]):
            raise RunError(missing)
        progress.message(f"trials: tensorboard --logdir {folder.at(RAY_FOLDER)}")
        if dashboard:
            progress.message(f"Ray dashboard: http://{dashboard}")
        try:
            run_trials(scheduler, folder, trainable, options, ShowProgress(scheduler, run, progress))
        finally:
            progress.close()


def _finish(scheduler: TrialScheduler, run: Run, progress: ProgressLine) -> TuneResult:
    config, folder, results = (
        scheduler.config,
        run.folder,
        [scheduler.results[key] for key in sorted(scheduler.results)],
    )
    failed = [result for result in results if result.status == FAILED]
    for result in failed:
        log = folder.at(trial_file(result.spec, LOG_FILE))
        progress.message(f"trial {result.spec.key} failed: {result.error} (log: {log})")
    good = [r for r in results if r.status == FINISHED and r.spec.kind != BASE]
    if not good and not failed and config.budget is not None:
        raise RunFailedError(
            f"{folder}: the budget of {duration(config.budget)} was over before any trial had ended; give the same "
            "command a larger --budget"
        )
    if not good:
        raise RunFailedError(f"{folder}: no trial came to its end; repair what the logs name and run the command again")
    suites = {result.validation_sha256 for result in results if result.validation_sha256}
    if len(suites) > 1:
        raise RunError(
            f"{folder}: trials were judged on {len(suites)} different sets of validation rows, so they don't compare: "
            "the scores changed in between; choose another --output"
        )
    cut_short = scheduler.cut_short or (
        f"the budget ended while {', '.join(scheduler.running)} ran" if scheduler.running else ""
    )
    objectives = by_name(results)
    finalists = scheduler.finalists()
    chosen = winner(finalists, config.baselines, objectives) or min(good, key=lambda r: (r.loss, r.spec.key)).spec.name
    # What was found is compared with every baseline, also where one of these is the best of all; mixes of the user's,
    # and the other baselines, with the primary one.
    searched = winner([name for name in finalists if name not in config.mixes], [], objectives)
    primary = config.repeats.primary or (config.baselines[0] if config.baselines else "")
    pairs: list[tuple[str, str]] = [(searched, name) for name in config.baselines] if searched else []
    others = [*config.mixes, *(name for name in config.baselines if name != primary)] if config.mixes else []
    pairs += [(name, primary) for name in others]
    found = [one for name, baseline in pairs if (one := compare_seeds(name, baseline, objectives))]
    comparisons = describe_comparisons(found, (searched or next(iter(config.mixes), ""), primary))
    transfer = rank_agreement(objectives, by_name(results, TRANSFER))
    # Any of its trials has its ratios; a baseline's first may have failed where its fresh seeds did not.
    spec = next(r.spec for r in good if r.spec.name == chosen)
    spec = replace(spec, seed=config.seed, mix={**spec.mix, "seed": config.seed})
    about = [
        f"Mix {chosen!r}, the lowest mean held-out loss over fresh seeds, of {config.num_trials} searched, "
        f"{len(config.baselines)} baselines ({folder.place.rpartition('/')[2]}).",
        *[one["sentence"] for one in comparisons],
    ]
    files = {
        BEST_FILE: folder.write_bytes(BEST_FILE, mix_yaml(spec.mix, config.scores or "", about).encode()),
        TRIALS_FILE: folder.write_parquet(TRIALS_FILE, table_of(results)),
    }
    if config.num_trials:
        files[PICTURE] = folder.write_bytes(PICTURE, draw_search(results, config.baselines))
    base = scheduler.results.get(BASE_MODEL)
    unfilled = [result for result in good if result.num_unfilled]
    manifest = {
        "seed": config.seed,
        "model": {"name": config.train.model.name},
        "scores": {"path": config.scores},
        "best": {"mix": chosen, "is_baseline": chosen in config.baselines, "ratios": spec.values},
        "comparisons": comparisons,
        "transfer": transfer and {"factor": config.transfer.factor, **transfer},
        "weights": {group: config.validation.weights.get(group, 1.0) for group in (base.groups if base else {})},
        "base_objective": base.objective if base else None,
        "left_out": scheduler.left_out or None,
        "cut_short": cut_short or None,
        "failed": [result.spec.key for result in failed],
        "budget": config.budget,
        "unfilled": {"trials": len(unfilled), "most_rows": max((r.num_unfilled for r in unfilled), default=0)},
        "summary_rows": summarise(results, config),
        "trials": dict(Counter(result.status for result in results)),
        "rows": {"per_mix": num_rows(config.mix)},
    }
    run.progress(len(results), scheduler.num_trials, final=True)
    summary = f"{counted(len(results), 'trial')}; best mix: {chosen}"
    return TuneResult(folder, run.finish(manifest, files, summary=summary))
