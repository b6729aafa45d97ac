"""Evaluate: base model, adapters, merged models on instances that were never sampled, compared in pairs."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from birbal_ray.adapters import load_with_adapter, measure_reference, merge_adapter
from birbal_ray.cluster import job_metadata, ray_log_file, ray_session
from birbal_ray.evaluate.compare import adjust, compare, pair_tasks, scopes
from birbal_ray.evaluate.config import EvaluateConfig
from birbal_ray.evaluate.heldout import EvaluatedModel, HeldOut, check_names, find_mixes, held_out, resolve_models
from birbal_ray.models import Model, pin_model, resolve_model
from birbal_ray.progress import ProgressLine, counted, figures_key
from birbal_ray.run import LOG_FOLDER, Run, RunError, RunMismatchError, Step, StepResult, open_run
from birbal_ray.schemas import (
    ADAPTER,
    BASE,
    COMPARISONS,
    COMPARISONS_FILE,
    EVALUATION,
    EVALUATION_FILE,
    REFERENCE_FILE,
    ROWS_FOLDER,
)
from birbal_ray.score.adaptive import FixedSchedule
from birbal_ray.score.config import CPU_SHARD_ROWS, ScoreConfig
from birbal_ray.score.engine import Adapter
from birbal_ray.score.pipeline import Session, check_cluster, logical_cpus, score_shards
from birbal_ray.score.plan import describe_plan, plan_run, publish_inputs
from birbal_ray.score.results import summarise
from birbal_ray.score.run import identity_of, keep_figures, plan_hash, resolve_config, write_plan
from birbal_ray.score.shards import DamagedRowsError, PromptVariant, RowFiles, ScorePlan
from birbal_ray.score.stages import find_model
from birbal_ray.settings import ConfigError, canonical_hash
from birbal_ray.statistics import MIN_TASKS, detectable_difference
from birbal_ray.storage import FileRecord, Folder, is_url, make_cache_folder, read_json, write_json

OWNS = ("rows/*.parquet", "inputs/*", "tasks.parquet", "quarantine.jsonl", EVALUATION_FILE, COMPARISONS_FILE)
STEP = Step("evaluate", OWNS)


@dataclass(frozen=True, slots=True)
class EvaluateResult(StepResult):
    """What a run left: its folder, its manifest, EVALUATION and COMPARISONS rows."""

    evaluation: list[dict[str, Any]]
    comparisons: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Setup:
    """What is decided before a task is read."""

    config: EvaluateConfig
    scoring: ScoreConfig  # of the base model
    models: list[EvaluatedModel]  # the base model first
    mixes: list[str]
    held_out: HeldOut
    model: Model

    @property
    def lora(self) -> bool:
        """Whether one engine serves the base model and its adapters."""
        how = self.config.serve_adapters
        # vLLM's LoRA layers cost little on a GPU; on two CPU cores they took 4.5 to 1.1 rows/s.
        simulated = self.scoring.engine.backend == "simulated"
        return how == "lora" or (how == "auto" and (simulated or self.scoring.engine.device == "gpu"))

    def engines(self) -> list[list[EvaluatedModel]]:
        """The models by the engine that serves them."""
        shared = [one for one in self.models if one.kind == BASE or (one.kind == ADAPTER and self.lora)]
        return [shared, *([one] for one in self.models if one not in shared)]

    def variants(self, one: EvaluatedModel) -> list[PromptVariant]:
        """How a model is asked. The folder of its rows says which weights answered."""
        adapter = one.name if one.kind == ADAPTER and self.lora else ""
        folder = f"{one.name}-{one.fingerprint[:12]}"
        return [PromptVariant(folder, how, adapter) for how in self.config.prompt_formats]

    @property
    def asked(self) -> dict[str, str]:
        """`{model}/{prompt format}` → what its weights are."""
        return {f"{one.name}/{how}": one.fingerprint for one in self.models for how in self.config.prompt_formats}

    @property
    def inputs(self) -> list[str]:
        """The paths, URLs and Hub's names that it reads."""
        given = self.config.tasks.path, self.config.tasks.label_overrides, self.config.model.name
        compared = [one.origin for one in self.models[1:]]
        return [path for path in (*given, *self.mixes, *compared) if path]

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
        return self.scoring.replace({"model.name": path, "model.revision": None})


def evaluate(config: EvaluateConfig, *, overwrite: bool = False) -> EvaluateResult:
    """Run or continue an evaluation in `config.output`.

    Raises ConfigError (settings, adapters, another run's folder), TaskError, ModelError, RunError (the
    run broke off; finished shards are kept and the same command continues).
    """
    progress, started = ProgressLine(), time.monotonic()
    setup = prepare_evaluation(config)
    plan = plan_run(setup.scoring, progress, excluded=setup.held_out.keys)
    identity = identify_evaluation(setup, plan)
    with open_run(config.output or "", STEP, identity, inputs=setup.inputs, overwrite=overwrite) as run:
        if run.manifest:
            before, asked = run.manifest["asked"], setup.asked
            lost = [key for key in before if asked.get(key) != before[key]]  # a result that is known stays in the table
            if lost:
                lines = [f"models.{key}: {before[key]} → {asked.get(key, '(none)')}" for key in lost]
                raise RunMismatchError(run.folder, lines)
            if before == asked:
                progress.message(f"{run.folder} is up to date; nothing to do")
                return _read(run)  # else only what is asked beyond it costs anything
        everything = is_url(config.tasks.path) or not run.folder.is_local
        plan = publish_inputs(plan, run.folder, everything=everything)
        write_plan(run.folder, plan)
        describe_evaluation(setup, plan, progress)
        num_earlier = len(run.sessions())
        _score(setup, plan, run, progress)
        result = _finish(setup, plan, run)
        if config.engine.backend == "vllm":
            sessions, fraction = run.sessions()[num_earlier:], asked_fraction(plan, config.tasks.instances_per_task)
            seconds = time.monotonic() - started
            keep_figures(figures_key(STEP.name, config), sessions, seconds, asked_fraction=fraction)
        return result


def asked_fraction(plan: ScorePlan, most: int | None) -> float:
    """Rows that are asked / rows that would be, `most` of each task, had no mix considered any of them."""
    return plan.num_rows / sum(min(task.num_available, most or task.num_available) for task in plan.tasks)


def prepare_evaluation(config: EvaluateConfig) -> Setup:
    """Everything decided that can be without reading a task. Raises ConfigError, ModelError, RunError."""
    scoring = resolve_config(config.scoring())
    model, *_ = find_model(scoring)
    found = resolve_models(model, config.adapters, config.merged)
    check_names([one.name for one in found])
    names = [one.name for one in found[1:]]
    if config.primary.model is not None and config.primary.model not in names:
        raise ConfigError(f"primary.model={config.primary.model}: is none of {', '.join(names) or 'the models given'}")
    mixes = find_mixes(found, config.mix)
    if scoring.engine.backend == "vllm":
        scoring = scoring.replace({"model": scoring.model.replace(pin_model(model))})
    return Setup(config, scoring, found, mixes, held_out(*mixes), model)


def describe_evaluation(setup: Setup, plan: ScorePlan, progress: ProgressLine) -> None:
    """Say on stderr who is compared on what."""
    describe_plan(plan, setup.scoring, progress)
    if not setup.mixes:
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
        else f"{counted(len(plan.tasks), 'task')}: too few for a verdict, which needs {MIN_TASKS}"
    )
    names = ", ".join(f"{one.name} ({one.kind})" if one.kind != BASE else one.name for one in setup.models)
    progress.message(f"{names}: {' and '.join(setup.config.prompt_formats)}")


def identify_evaluation(setup: Setup, plan: ScorePlan) -> dict[str, Any]:
    """Everything that decides the rows; `Setup.asked` says whose they are."""
    identity = identity_of(setup.scoring, setup.model.fingerprint)
    identity["plan"] = plan_hash(setup.scoring, plan)
    identity["tasks"] = {task.name: task.sha256 for task in plan.tasks}
    identity["adapters_served_as"] = "lora" if setup.lora else "merged"
    identity["primary"] = setup.primary()  # named before its result is known
    identity["excluded"] = canonical_hash(sorted(setup.held_out.keys))
    return identity


def _score(setup: Setup, plan: ScorePlan, run: Run, progress: ProgressLine) -> None:
    """Score what is missing, one engine after the other. Finished files stay whatever happens."""
    found = RowFiles(run.folder.subfolder(ROWS_FOLDER).files())
    todo = []
    for served in setup.engines():
        variants = [variant for one in served for variant in setup.variants(one)]
        if missing := plan.shards(setup.scoring.shard_rows or CPU_SHARD_ROWS, found, variants):
            todo.append((served, missing))
    if found.all_names():
        progress.message(f"continuing: {found.total_rows} rows are done and skipped")
    if not todo:
        return
    log_file = ray_log_file(run.folder)
    with ray_session(logical_cpus(setup.scoring), log_file, about=job_metadata(STEP.name, setup.config.output)):
        if waiting := check_cluster(setup.scoring):
            progress.message(waiting)
        for served, shards in todo:
            names = ", ".join(one.name for one in served)
            session = Session(progress, 0, run.progress, f"{names}: ")
            with _model_of(setup, served, run.folder, progress) as (config, fingerprint):
                logs = run.folder.at(LOG_FOLDER)
                progress.update(f"{names}: starting {config.resources.num_replicas} engine(s); logs in {logs}")
                adapters = [Adapter(one.name, one.origin, one.rank or 0, one.modules) for one in served[1:]]
                schedule, excluded = FixedSchedule(shards), setup.held_out.keys
                try:
                    score_shards(schedule, config, fingerprint, run.folder, session.see, adapters, excluded)
                finally:
                    progress.close()
                    run.session(session.record())


@contextlib.contextmanager
def _model_of(
    setup: Setup, served: Sequence[EvaluatedModel], folder: Folder, progress: ProgressLine
) -> Iterator[tuple[ScoreConfig, str]]:
    """(settings, fingerprint) of the model that an engine loads; an adapter's is made for the time."""
    first = served[0]
    if first.kind != ADAPTER:
        yield setup.scoring if first.kind == BASE else setup.scoring_of(first.origin), first.fingerprint
        return
    dtype = setup.scoring.engine.dtype
    if dtype == "auto":
        dtype = "float32" if setup.scoring.engine.device == "cpu" else "bfloat16"
    progress.update(f"{first.name}: folding the adapter into {dtype} weights")
    # Where all nodes see it, if they see the run folder; at a URL only this one does. This process holds the run.
    own = f"evaluate/{canonical_hash(folder.place)[:16]}"
    place = folder.local if folder.is_local else make_cache_folder(own)
    for leftover in place.glob(".folded-*"):  # of a session that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".folded-", dir=place) as temporary:
        whole = Path(temporary) / first.name
        model = load_with_adapter(setup.model.path, Path(first.path), dtype)
        reference = None
        if (kept := Path(first.path) / REFERENCE_FILE).is_file():
            reference = measure_reference(model, [prompt["token_ids"] for prompt in read_json(kept)["prompts"]])
        merge_adapter(model, setup.model.path, whole)
        if reference:  # the engine is checked against it
            write_json(whole / REFERENCE_FILE, reference)
        yield setup.scoring_of(str(whole)), resolve_model(str(whole)).fingerprint


def _finish(setup: Setup, plan: ScorePlan, run: Run) -> EvaluateResult:
    evaluation, scores, counts, tokens = [], {}, Counter[str](), Counter[str]()
    folder, rows_folder = run.folder, run.folder.subfolder(ROWS_FOLDER)
    found = RowFiles(rows_folder.files())
    files: dict[str, FileRecord] = {}
    for one in setup.models:
        for variant in setup.variants(one):
            try:
                results = summarise(rows_folder, found, plan.tasks, None, variant.folder, keep_scores=True)
            except DamagedRowsError as error:
                folder.delete(f"{ROWS_FOLDER}/{name}" for name in error.names)
                raise RunError(f"{error}; run the same command again, which scores these rows again") from None
            for row in results.task_scores:
                where = {"held_out": setup.held_out.kind(row["task"]), "model": one.name, "kind": one.kind}
                evaluation.append({**row, **where, "prompt_format": variant.prompt_format})
            scores[one.name, variant.prompt_format] = results.scores
            files |= {f"{ROWS_FOLDER}/{name}": record for name, record in results.files.items()}
            counts.update({name: results.rows[name] for name in ("planned", "scored")})
            tokens.update(results.tokens)
    rows = {**counts, "errors": counts["planned"] - counts["scored"]}
    prompt, cached = tokens["prompt"], tokens["cached"]
    comparisons = compare_models(setup, plan, scores)
    run.withdraw()  # of fewer models, which until now said what must stay in the tables
    tables = (EVALUATION_FILE, evaluation, EVALUATION), (COMPARISONS_FILE, comparisons, COMPARISONS)
    for name, content, schema in tables:
        files[name] = folder.write_parquet(name, pa.Table.from_pylist(content, schema=schema))
    files |= write_plan(folder, plan)
    run.progress(rows["planned"], rows["planned"], final=True)
    run.finish(
        {
            "settings": setup.config.model_dump(),
            "seed": setup.config.seed,
            "model": {"name": setup.config.model.name, "revision": setup.model.revision},
            "models": [asdict(one) for one in setup.models],
            "asked": setup.asked,
            "mix": " and ".join(setup.mixes) or None,
            "rows": {**rows, "left_out": sum(task.num_excluded for task in plan.tasks)},
            "tokens": {"prompt": prompt, "cached": cached, "cached_fraction": cached / prompt if prompt else None},
            "sessions": run.sessions(),
        },
        files,
        summary=f"{counted(len(setup.models) - 1, 'model')} compared on {counted(len(plan.tasks), 'task')}",
    )
    return _read(run)


def compare_models(
    setup: Setup, plan: ScorePlan, scores: Mapping[tuple[str, str], Mapping[str, Mapping[str, float]]]
) -> list[dict[str, Any]]:
    """COMPARISONS rows. `scores`: (model, prompt format) → task → row id → score."""
    rows: list[dict[str, Any]] = []
    about = {task.name: (task.label.value, setup.held_out.kind(task.name)) for task in plan.tasks}
    for one in setup.models[1:]:
        for prompt_format in setup.config.prompt_formats:
            pairs = pair_tasks(scores[BASE, prompt_format], scores[one.name, prompt_format], about)
            for scope, members in scopes(pairs).items():
                if members:
                    rows.append({"model": one.name, "prompt_format": prompt_format, "scope": scope, **compare(members)})
    return adjust(rows, setup.primary())


def _read(run: Run) -> EvaluateResult:
    tables = [run.folder.read_table(file).to_pylist() for file in (EVALUATION_FILE, COMPARISONS_FILE)]
    return EvaluateResult(run.folder, run.manifest or {}, *tables)
