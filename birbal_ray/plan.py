"""What the recipe's steps will take, before any of them starts: work, hours, money."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from birbal_ray import speeds
from birbal_ray.evaluate.config import EvaluateConfig
from birbal_ray.mix.config import MixConfig
from birbal_ray.models import ModelError, resolve_model
from birbal_ray.ni import catalog, labels, prompt, reader
from birbal_ray.ni.metrics import EXACT_MATCH
from birbal_ray.ni.schema import TaskError
from birbal_ray.progress import last_throughput
from birbal_ray.recipe import STEPS, PipelineConfig
from birbal_ray.score.config import ScoreConfig
from birbal_ray.score.run import throughput_key
from birbal_ray.settings import ConfigError, require
from birbal_ray.speeds import Speed
from birbal_ray.storage import input_folder
from birbal_ray.train.config import TrainConfig
from birbal_ray.train.preflight import rate_key, shapes_of
from birbal_ray.tune.config import TuneConfig

CHARACTERS_PER_TOKEN = 4.0  # of English in the tokenizers of Llama, Mistral and Qwen, near enough for a range
SAMPLED_INSTANCES = 40  # of each task, to learn how long its prompts are
LOAD_SECONDS = {"cpu": (20.0, 60.0), "gpu": (40.0, 180.0)}  # an engine, or a model to train, until it works
MIX_ROWS_PER_SECOND = (5_000.0, 50_000.0)
REPORT_SECONDS = (3.0, 20.0)
CPU_PROMPTS, CPU_TOKENS = (2.0, 10.0), (40.0, 150.0)  # SmolLM2-135M on two cores, per second (docs/log.md)
SMOLLM2_WEIGHTS = 134_515_008


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step will take. Seconds as a range; `limit_seconds`: what the budget leaves it."""

    step: str
    work: str
    low_seconds: float
    high_seconds: float
    limit_seconds: float | None
    source: str

    @property
    def planned_seconds(self) -> float:
        """The middle of the range, or the limit where that is less."""
        return min((self.low_seconds + self.high_seconds) / 2, self.limit_seconds or math.inf)


@dataclass(frozen=True, slots=True)
class TaskSizes:
    """What planning reads of the task files: per task its label, instances, and mean tokens of a prompt's own part."""

    name: str
    label: str
    num_instances: int
    shared_tokens: float
    own_tokens: float
    completion_tokens: float


def plan_recipe(config: PipelineConfig, gpu: str | None = None) -> list[StepPlan]:
    """What each step will take on this machine, or on one card `gpu` (Ray's name), within the budget's shares.

    Rates are this machine's own where it has run such a step (only without `gpu`), else arithmetic. Reads the task
    files; loads no weights. Raises ConfigError, TaskError, ModelError.
    """
    if gpu is not None and gpu not in speeds.CARDS:
        raise ConfigError(f"--gpu {gpu}: no figures for this card; there are {', '.join(speeds.CARDS)}")
    sizes = read_sizes(config.score, config.held_out_tasks)
    weights = num_weights(config.score.model.name)
    budget = config.budget
    shares = config.shares.model_dump()
    if not config.search:
        shares["tune"] = 0.0
    limits = {step: budget * shares[step] for step in shares} if budget else {}
    plans = {
        "score": _plan_prompts("score", config.score, sizes, _adaptive_rows(config.score), 1, weights, gpu),
        "tune": _plan_tune(config.tune, gpu),
        "mix": _plan_mix(config.mix, sizes),
        "evaluate": _plan_evaluate(config.evaluate, sizes, weights, gpu),
        "report": StepPlan("report", "one page", *REPORT_SECONDS, None, "measured: docs/log.md"),
    }
    if not config.search:
        del plans["tune"]
    plans = {step: replace(one, limit_seconds=limits.get(step)) for step, one in plans.items()}
    rest = budget - sum(one.planned_seconds for one in plans.values()) if budget else None
    plans["train"] = _plan_train(config, sizes, rest, gpu)
    return [plans[step] for step in STEPS if step in plans]


def money(plans: Sequence[StepPlan], price_per_hour: float) -> tuple[float, float]:
    """(low, high) of the whole recipe on a card that costs `price_per_hour`."""
    low = sum(min(one.low_seconds, one.limit_seconds or math.inf) for one in plans)
    high = sum(min(one.high_seconds, one.limit_seconds or math.inf) for one in plans)
    return low / 3600 * price_per_hour, high / 3600 * price_per_hour


def records_of(plans: Sequence[StepPlan]) -> list[dict[str, Any]]:
    """For JSON."""
    return [{**asdict(one), "planned_seconds": round(one.planned_seconds, 1)} for one in plans]


def num_weights(model: str) -> int:
    """Weights of a model: from its config.json, or, where that can't be had, from the size in its name (`7B`)."""
    try:
        shapes = shapes_of(resolve_model(model, weights=False).path, "all-linear")
        return shapes.num_other + sum(out * into for out, into in shapes.linear)
    except ModelError:
        if found := re.search(r"(\d+(?:\.\d+)?)([bm])(?![a-z])", Path(model).name.lower()):
            return round(float(found[1]) * {"b": 1e9, "m": 1e6}[found[2]])
        raise


def read_sizes(config: ScoreConfig, held_out: Sequence[str]) -> list[TaskSizes]:
    """Label, instances and lengths of every task that a run takes; files that can't be used are left out."""
    root = input_folder(require(config.tasks.path, "--tasks"))
    files = reader.find_task_files(root)
    names, _ = catalog.choose_names([file.name for file in files], config.tasks.select, root)
    chosen = set(names) - set(config.tasks.exclude) - set(held_out)
    overrides = labels.default_overrides()
    sizes = []
    for _, task in reader.read_tasks([file for file in files if file.name in chosen]):
        if isinstance(task, TaskError) or catalog.excluded_by(task, config.tasks.exclude_families):
            continue
        sampled = [one for one in task.instances[:SAMPLED_INSTANCES] if one.error is None]
        if not sampled:
            continue
        count = min(len(task.instances), config.tasks.instances_per_task or len(task.instances))
        own = sum(len(one.input) for one in sampled) / len(sampled) / CHARACTERS_PER_TOKEN
        answer = sum(len(one.references[0]) for one in sampled) / len(sampled) / CHARACTERS_PER_TOKEN
        prefix = prompt.render_prefix(task.definition, prompt.examples_of(task, config.prompt.num_shots))
        label = labels.label_task(task, overrides).value
        sizes.append(TaskSizes(task.name, label, count, len(prefix) / CHARACTERS_PER_TOKEN, own + 8, answer + 2))
    if not sizes:
        raise TaskError(
            f"{root}: no usable task among its {len(files)} (tasks.select = {config.tasks.select!r} takes "
            f"{len(chosen)}; all takes every task but those held out)"
        )
    return sizes


def _adaptive_rows(config: ScoreConfig) -> Callable[[list[TaskSizes]], tuple[float, float]]:
    """How many rows an adaptive run scores, low and high; all of them where it isn't adaptive."""

    def rows(sizes: list[TaskSizes]) -> tuple[float, float]:
        asked = config.adaptive
        if not asked.enabled:
            return (float(sum(one.num_instances for one in sizes)),) * 2
        low = high = 0.0
        for one in sizes:
            peers = sum(other.label == one.label for other in sizes)
            budget = asked.exact_match_budget if one.label == EXACT_MATCH else asked.generation_budget
            share = budget / peers * asked.failed_rows_factor
            known = 0.96 / asked.score_margin**2  # Wilson at a score of one half
            low += min(one.num_instances, max(asked.first_instances, share))
            high += min(one.num_instances, max(2 * known, 4 * share))
        return low, high

    return rows


def _plan_prompts(
    step: str,
    config: ScoreConfig,
    sizes: list[TaskSizes],
    rows_of: Callable[[list[TaskSizes]], tuple[float, float]],
    num_engines: int,
    weights: int,
    gpu: str | None,
) -> StepPlan:
    low_rows, high_rows = rows_of(sizes)
    total = sum(one.num_instances for one in sizes)
    own = sum(one.own_tokens * one.num_instances for one in sizes) / total
    new = sum(one.completion_tokens * one.num_instances for one in sizes) / total
    shared = sum(one.shared_tokens for one in sizes)
    cached = sum(one.shared_tokens * one.num_instances for one in sizes) / total
    speed = _prompt_speed(config, weights, own, new, cached, gpu)
    load = LOAD_SECONDS["gpu" if gpu or config.engine.device == "gpu" else "cpu"]
    replicas = config.resources.num_replicas
    prefixes = shared / max(1.0, own)  # the shared part of each task is computed once
    count = f"{low_rows:,.0f}" if low_rows == high_rows else f"{low_rows:,.0f} to {high_rows:,.0f}"
    return StepPlan(
        step,
        f"{count} prompts of {len(sizes):,} tasks",
        num_engines * load[0] + (low_rows + prefixes) / speed.high / replicas,
        num_engines * load[1] + (high_rows + prefixes) / speed.low / replicas,
        None,
        speed.source,
    )


def _prompt_speed(config: ScoreConfig, weights: int, own: float, new: float, cached: float, gpu: str | None) -> Speed:
    """Prompts a second of one engine; tokens of one prompt: its own, new, from the prefix cache."""
    if gpu is None and (rate := last_throughput(throughput_key(config))):
        return speeds.measured(rate / (own + new + cached))  # the kept rate counts cached tokens, too
    card = gpu or config.resources.accelerator_type
    if card in speeds.CARDS:
        return speeds.prompts(card, weights, own, new)
    if config.engine.device == "gpu":
        raise ConfigError("the card is not known: --gpu NAME, or resources.accelerator_type (`birbal doctor` names it)")
    slower = SMOLLM2_WEIGHTS / weights
    return Speed(CPU_PROMPTS[0] * slower, CPU_PROMPTS[1] * slower, "two CPU cores, SmolLM2-135M, scaled by weights")


def _plan_evaluate(config: EvaluateConfig, sizes: list[TaskSizes], weights: int, gpu: str | None) -> StepPlan:
    scoring = config.scoring()
    if not scoring.tasks.path:
        own = sizes
    else:
        own = read_sizes(scoring.model_copy(update={"adaptive": ScoreConfig().adaptive}), [])
    num_models = 1 + len(config.adapters) + len(config.merged)
    asked = num_models * len(config.prompt_formats)
    on_gpu = bool(gpu) or scoring.engine.device == "gpu"
    engines = 1 + len(config.merged) if on_gpu else num_models
    return _plan_prompts(
        "evaluate",
        scoring,
        own,
        lambda sizes: (float(asked * sum(one.num_instances for one in sizes)),) * 2,
        engines,
        weights,
        gpu,
    )


def _training_speed(config: TrainConfig, gpu: str | None) -> Speed:
    """Tokens a second of the fine-tune."""
    if gpu is None and (rate := last_throughput(rate_key(config))):
        return speeds.measured(rate)
    weights, card = num_weights(config.model.name), gpu or config.resources.accelerator_type
    if card in speeds.CARDS:
        return speeds.training_tokens(card, weights)
    if config.resources.device == "gpu":
        raise ConfigError("the card is not known: --gpu NAME, or resources.accelerator_type (`birbal doctor` names it)")
    slower = SMOLLM2_WEIGHTS / weights
    return Speed(CPU_TOKENS[0] * slower, CPU_TOKENS[1] * slower, "two CPU cores, SmolLM2-135M, scaled by weights")


def _plan_tune(config: TuneConfig, gpu: str | None) -> StepPlan:
    gpu = gpu or config.resources.accelerator_type
    num_trained = (
        config.num_trials
        + config.predicted
        + len(config.baselines)
        + (config.repeats.top + len(config.baselines)) * (config.repeats.seeds if config.repeats.top else 0)
    )
    speed = _training_speed(config.train, gpu)
    tokens = num_trained * config.proxy.tokens
    load = LOAD_SECONDS["gpu" if gpu or config.resources.num_gpus else "cpu"]
    together = config.resources.max_concurrent
    return StepPlan(
        "tune",
        f"{num_trained} short fine-tunes of {config.proxy.tokens:,} tokens",
        (tokens / speed.high + num_trained * load[0] / 4) / (1 if gpu else together),
        tokens / speed.low + num_trained * load[1] / together,
        None,
        speed.source,
    )


def _plan_mix(config: MixConfig, sizes: list[TaskSizes]) -> StepPlan:
    candidates = sum(one.num_instances for one in sizes) + sum(source.max_rows or 0 for source in config.sources)
    slow, fast = MIX_ROWS_PER_SECOND
    return StepPlan(
        "mix",
        f"up to {candidates:,} candidates",
        1 + candidates / fast,
        10 + candidates / slow,
        None,
        "benchmarks/mixing.py",
    )


def _plan_train(config: PipelineConfig, sizes: list[TaskSizes], rest: float | None, gpu: str | None) -> StepPlan:
    train, speed = config.train, _training_speed(config.train, gpu)
    load = LOAD_SECONDS["gpu" if gpu or train.resources.device == "gpu" else "cpu"]
    asked = config.mix.task_score.exact_match_budget + config.mix.task_score.generation_budget
    rows = min(asked, sum(one.num_instances for one in sizes)) + sum(one.max_rows or 0 for one in config.mix.sources)
    per_row = sum(one.own_tokens + one.completion_tokens for one in sizes) / len(sizes) + 60  # the definition
    tokens = rows * per_row * train.epochs
    low, high = load[0] + tokens / speed.high, load[1] + tokens / speed.low
    work = f"{train.epochs:g} epochs of about {rows * per_row / 1e3:,.0f} thousand tokens"
    if rest is not None and high > rest:
        fits = [min(train.epochs, max(0.0, rest - load[1]) * rate / (rows * per_row)) for rate in speed[:2]]
        work += f"; {fits[0]:.2g} to {fits[1]:.2g} fit"
    return StepPlan("train", work, low, high, rest, speed.source)


def least_seconds(config: PipelineConfig) -> dict[str, float]:
    """The least that each step works in: its models loaded, and something done. Of the whole recipe: their sum."""
    device = "gpu" if config.score.engine.device == "gpu" else "cpu"
    load = LOAD_SECONDS[device][0]
    engines = 1 if device == "gpu" else 1 + len(config.evaluate.adapters) + len(config.evaluate.merged)
    least = {"score": load + 10, "mix": 3.0, "train": load + 20, "evaluate": engines * load + 10, "report": 5.0}
    return least | ({"tune": 2 * load} if config.search else {})
