"""Evaluate: base model, adapters, merged models on instances that were never sampled, compared in pairs."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from birbal_ray.cluster import job_metadata, ray_session
from birbal_ray.evaluate.compare import adjust, compare, gate_failures, pair_tasks, scopes
from birbal_ray.evaluate.config import EvaluateConfig
from birbal_ray.evaluate.heldout import HeldOut, find_mixes, held_out, union
from birbal_ray.evaluate.models import ADAPTER, BASE, EvaluatedModel, resolve_models
from birbal_ray.models import Model, load_with_adapter, merge_adapter, pin_model, resolve_model
from birbal_ray.progress import ProgressLine
from birbal_ray.run import (
    LOG_FOLDER,
    MANIFEST_FILE,
    RunError,
    finish_run,
    read_json,
    start_run,
    stoppable,
    write_parquet,
)
from birbal_ray.schemas import COMPARISONS, COMPARISONS_FILE, EVALUATION, EVALUATION_FILE, ROWS_FOLDER
from birbal_ray.score import throughput
from birbal_ray.score.config import ScoreConfig
from birbal_ray.score.engine import Adapter
from birbal_ray.score.monitor import Snapshot
from birbal_ray.score.pipeline import check_cluster, logical_cpus, run_shards
from birbal_ray.score.plan import PromptVariant, ScorePlan, unpack_archives
from birbal_ray.score.results import read_scores, summarise, unfinished
from birbal_ray.score.run import INPUTS_FOLDER, describe_plan, identity_of, plan_run, resolve_config, write_plan
from birbal_ray.settings import ConfigError, canonical_hash
from birbal_ray.statistics import MIN_TASKS, detectable_difference
from birbal_ray.storage import is_url, local_copy, run_folder

STEP = "evaluate"
FOLDED_FOLDER = "folded"
SIMULATED = Model("simulated", Path("simulated"), None, "simulated")


@dataclass(frozen=True, slots=True)
class EvaluateResult:
    """What a run left: its folder, its manifest, EVALUATION and COMPARISONS rows."""

    folder: Path
    manifest: dict[str, Any]
    evaluation: list[dict[str, Any]]
    comparisons: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Setup:
    """What is decided before a task is read."""

    config: EvaluateConfig
    scoring: ScoreConfig  # of the base model
    models: list[EvaluatedModel]  # the base model first
    mixes: list[str]
    held_out: HeldOut | None  # None: no mix is known
    model: Model

    @property
    def lora(self) -> bool:
        """Whether one engine serves the base model and its adapters."""
        how = self.config.serve_adapters
        # vLLM's LoRA layers cost little on a GPU; on two CPU cores they took 4.5 to 1.1 rows/s.
        simulated = self.scoring.engine.backend == "simulated"
        return how == "lora" or (how == "auto" and (simulated or self.scoring.engine.device == "gpu"))

    @property
    def excluded(self) -> frozenset[str]:
        """Row ids and text keys that are left out."""
        return self.held_out.keys if self.held_out else frozenset()

    def kind(self, task: str) -> str:
        """How a task is held out."""
        return self.held_out.kind(task) if self.held_out else "unknown"

    def engines(self) -> list[list[EvaluatedModel]]:
        """The models by the engine that serves them."""
        shared = [one for one in self.models if one.kind == BASE or (one.kind == ADAPTER and self.lora)]
        return [shared, *([one] for one in self.models if one not in shared)]

    def variants(self, one: EvaluatedModel) -> list[PromptVariant]:
        """How a model is asked."""
        adapter = one.name if one.kind == ADAPTER and self.lora else ""
        return [PromptVariant(one.name, how, adapter) for how in self.config.prompt_formats]

    def primary(self) -> dict[str, str]:
        """The comparison that was named beforehand, as COMPARISONS names it."""
        chosen = self.config.primary
        return {
            "model": chosen.model or next((one.name for one in self.models[1:]), ""),
            "prompt_format": chosen.prompt_format or self.config.prompt_formats[0],
            "scope": chosen.scope,
        }

    def scoring_of(self, path: str) -> ScoreConfig:
        """The settings of an engine that serves another model than the base model."""
        model = self.scoring.model.model_copy(update={"name": path, "revision": None})
        return self.scoring.model_copy(update={"model": model})


def evaluate(
    config: EvaluateConfig, *, overwrite: bool = False, progress: ProgressLine | None = None
) -> EvaluateResult:
    """Run or continue an evaluation in `config.output`.

    Raises ConfigError (settings, adapters, another run's folder), TaskError, ModelError, RunError (the
    run broke off; finished shards are kept and the same command continues).
    """
    progress = progress or ProgressLine()
    setup = prepare_evaluation(config)
    started = time.monotonic()
    plan = plan_run(setup.scoring, progress, excluded=setup.excluded)
    with run_folder(setup.config.output or "") as folder, stoppable():
        resumed = start_run(folder, STEP, _identity(setup, plan), overwrite=overwrite)
        if resumed and (folder / MANIFEST_FILE).exists():
            progress.message(f"{folder} is up to date; nothing to do")
            return _read(folder)
        plan = unpack_archives(plan, folder / INPUTS_FOLDER)
        write_plan(folder, plan)
        describe_evaluation(setup, plan, progress)
        meters = _score(setup, plan, folder, progress)
        return _finish(setup, plan, folder, meters, round(time.monotonic() - started, 3))


def prepare_evaluation(config: EvaluateConfig) -> Setup:
    """Everything decided that can be without reading a task. Raises ConfigError, ModelError, RunError."""
    scoring = resolve_config(config.scoring())
    model = resolve_model(config.model.name, config.model.revision) if scoring.engine.backend == "vllm" else SIMULATED
    found = resolve_models(model, config.adapters, config.merged)
    names = [one.name for one in found[1:]]
    if config.primary.model is not None and config.primary.model not in names:
        raise ConfigError(f"primary.model={config.primary.model}: is none of {', '.join(names) or 'the models given'}")
    mixes = find_mixes(found, config.mix)
    if scoring.engine.backend == "vllm":
        scoring = scoring.model_copy(update={"model": scoring.model.model_copy(update=pin_model(model))})
    return Setup(config, scoring, found, mixes, union([held_out(local_copy(mix)) for mix in mixes]), model)


def describe_evaluation(setup: Setup, plan: ScorePlan, progress: ProgressLine) -> None:
    """Say on stderr who is compared on what."""
    describe_plan(plan, setup.scoring, progress)
    if setup.held_out is None:
        progress.message("no mix is known (--mix DIR): nothing is left out, an adapter may have seen these instances")
    else:
        left_out = sum(task.num_excluded for task in plan.tasks)
        unsampled = sum(setup.held_out.kind(task.name) == "task" for task in plan.tasks)
        progress.message(
            f"Evaluation skips every instance the mix considered: {left_out:,} of {' and '.join(setup.mixes)}; "
            f"{unsampled} of {len(plan.tasks)} tasks were never sampled"
        )
        for one in setup.models[1:]:
            if one.mix is None:
                progress.message(
                    f"{one.name}: its folder names no mix; trained on another, it may have seen these instances"
                )
    expected = setup.config.expected_deviation
    smallest = detectable_difference(len(plan.tasks), expected)
    progress.message(
        f"the smallest difference that {len(plan.tasks)} tasks show with 80 % power is {smallest:.3f} "
        f"if the differences between tasks deviate by {expected:g} (expected_deviation)"
        if len(plan.tasks) >= MIN_TASKS
        else f"{len(plan.tasks)} tasks are too few for a verdict, which needs {MIN_TASKS}"
    )
    names = ", ".join(f"{one.name} ({one.kind})" if one.kind != BASE else one.name for one in setup.models)
    progress.message(f"{names}: {' and '.join(setup.config.prompt_formats)}")


def _identity(setup: Setup, plan: ScorePlan) -> dict[str, Any]:
    identity = identity_of(setup.scoring, plan, setup.model.fingerprint)
    identity["adapters_served_as"] = "lora" if setup.lora else "merged"
    identity["prompt_formats"] = sorted(setup.config.prompt_formats)
    identity["models"] = {one.name: f"{one.kind} {one.fingerprint}" for one in setup.models}
    identity["excluded"] = canonical_hash(sorted(setup.excluded))
    return identity


def _score(setup: Setup, plan: ScorePlan, folder: Path, progress: ProgressLine) -> list[throughput.Meter]:
    """Score what is missing, one engine after the other. Finished files stay whatever happens."""
    rows_folder, logs = folder / ROWS_FOLDER, folder / LOG_FOLDER
    todo, num_done = [], 0
    for served in setup.engines():
        variants = [variant for one in served for variant in setup.variants(one)]
        shards = plan.shards(setup.scoring.shard_rows, variants)
        missing = unfinished(rows_folder, shards)
        num_done += sum(shard.num_rows for shard in shards) - sum(shard.num_rows for shard in missing)
        if missing:
            todo.append((served, missing))
    if num_done:
        progress.message(f"continuing: {num_done} rows are done and skipped")
    if not todo:
        return []
    meters = []
    with ray_session(logical_cpus(setup.scoring), logs / "ray.log", about=job_metadata(STEP, setup.config.output)):
        lacking = check_cluster(setup.scoring)
        if lacking:
            progress.message(
                f"waiting, {lacking}; gives up after {setup.scoring.resources.no_progress_minutes:g} minutes"
            )
        for served, shards in todo:
            names = ", ".join(one.name for one in served)
            meters.append(meter := throughput.Meter(0, sum(shard.num_rows for shard in shards)))
            with _model_of(setup, served, folder, progress) as (config, fingerprint):
                progress.update(f"{names}: starting {config.resources.num_replicas} engine(s); logs in {logs}")
                adapters = [Adapter(one.name, one.origin, one.rank or 0) for one in served[1:]]
                show = partial(_show, progress, names, meter)
                here = is_url(setup.config.output or "") or is_url(setup.config.tasks.path or "")
                work = run_shards(
                    shards, config, fingerprint, rows_folder, logs, show, adapters, setup.excluded, files_here=here
                )
                try:
                    for shard in work:
                        meter.written(shard.rows, shard.errors)
                finally:
                    progress.close()
    return meters


@contextlib.contextmanager
def _model_of(
    setup: Setup, served: Sequence[EvaluatedModel], folder: Path, progress: ProgressLine
) -> Iterator[tuple[ScoreConfig, str]]:
    """(settings, fingerprint) of the model that an engine loads; an adapter's is made for the time."""
    first = served[0]
    if first.kind == BASE:
        yield setup.scoring, first.fingerprint
        return
    if first.kind != ADAPTER:
        yield setup.scoring_of(first.origin), first.fingerprint
        return
    dtype = setup.scoring.engine.dtype
    if dtype == "auto":
        dtype = "float32" if setup.scoring.engine.device == "cpu" else "bfloat16"
    progress.update(f"{first.name}: folding the adapter into {dtype} weights")
    whole = folder / FOLDED_FOLDER / first.name
    whole.parent.mkdir(exist_ok=True)
    merge_adapter(load_with_adapter(setup.model.path, Path(first.path), dtype), setup.model.path, whole)
    try:
        yield setup.scoring_of(str(whole)), resolve_model(str(whole)).fingerprint
    finally:
        shutil.rmtree(folder / FOLDED_FOLDER)


def _show(progress: ProgressLine, name: str, meter: throughput.Meter, seen: Snapshot) -> None:
    progress.update(f"{name}: {meter.line(seen)}")


def _finish(
    setup: Setup, plan: ScorePlan, folder: Path, meters: Sequence[throughput.Meter], wall_seconds: float
) -> EvaluateResult:
    evaluation, scores, rows = [], {}, {"planned": 0, "scored": 0, "errors": 0}
    cached = prompt = 0
    for one in setup.models:
        for variant in setup.variants(one):
            files = [
                folder / ROWS_FOLDER / shard.file_name for shard in plan.shards(setup.scoring.shard_rows, [variant])
            ]
            results = summarise(files, plan.tasks)
            for row in results.task_scores:
                where = {"held_out": setup.kind(row["task"]), "model": one.name, "kind": one.kind}
                evaluation.append({**row, **where, "prompt_format": variant.prompt_format})
            scores[one.name, variant.prompt_format] = read_scores(files)
            rows["planned"] += results.rows["planned"]
            rows["scored"] += results.rows["scored"]
            prompt, cached = prompt + results.tokens["prompt"], cached + results.tokens["cached"]
    rows["errors"] = rows["planned"] - rows["scored"]
    comparisons = compare_models(setup, plan, scores)
    write_parquet(folder / EVALUATION_FILE, pa.Table.from_pylist(evaluation, schema=EVALUATION))
    write_parquet(folder / COMPARISONS_FILE, pa.Table.from_pylist(comparisons, schema=COMPARISONS))
    finish_run(
        folder,
        {
            "settings": setup.config.model_dump(),
            "seed": setup.config.seed,
            "model": {"name": setup.config.model.name, "revision": setup.model.revision},
            "models": [asdict(one) for one in setup.models],
            "mix": " and ".join(setup.mixes) or None,
            "rows": {**rows, "left_out": sum(task.num_excluded for task in plan.tasks)},
            "tokens": {"prompt": prompt, "cached": cached, "cached_fraction": cached / prompt if prompt else None},
            "sessions": [meter.session() for meter in meters],
            "wall_seconds": wall_seconds,
        },
    )
    return _read(folder)


def compare_models(
    setup: Setup, plan: ScorePlan, scores: Mapping[tuple[str, str], Mapping[str, Mapping[str, float]]]
) -> list[dict[str, Any]]:
    """COMPARISONS rows. `scores`: (model, prompt format) → task → row id → score."""
    rows: list[dict[str, Any]] = []
    about = {task.name: (task.label.value, setup.kind(task.name)) for task in plan.tasks}
    for one in setup.models[1:]:
        for prompt_format in setup.config.prompt_formats:
            pairs = pair_tasks(scores[BASE, prompt_format], scores[one.name, prompt_format], about)
            for scope, members in scopes(pairs).items():
                if members:
                    rows.append({"model": one.name, "prompt_format": prompt_format, "scope": scope, **compare(members)})
    return adjust(rows, setup.primary())


def check_gate(result: EvaluateResult, delta: float | None) -> None:
    """Raise RunError where a model is worse than the base model by more than `delta` on any scope."""
    failures = [] if delta is None else gate_failures(result.comparisons, delta)
    if failures:
        raise RunError("; ".join(failures))


def _read(folder: Path) -> EvaluateResult:
    tables = [pq.read_table(folder / file).to_pylist() for file in (EVALUATION_FILE, COMPARISONS_FILE)]
    return EvaluateResult(folder, read_json(folder / MANIFEST_FILE), *tables)
