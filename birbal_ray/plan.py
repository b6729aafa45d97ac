"""What the recipe's steps will take, before any of them starts: work, hours, money.

Each `plan_*` function plans one step from what is known of its work. `plan_recipe` joins them within a budget; the
steps' dry runs print them one by one.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from birbal_ray.cluster import decide_device
from birbal_ray.evaluate.config import EvaluateConfig
from birbal_ray.mix.config import MixConfig
from birbal_ray.models import ModelError, resolve_model
from birbal_ray.ni import catalog, metrics, prompt, reader
from birbal_ray.ni.metrics import EXACT_MATCH
from birbal_ray.ni.schema import TaskError
from birbal_ray.progress import (
    CARDS,
    LOAD_SECONDS,
    MEASURED,
    TRAIN_FLOP_PER_WEIGHT,
    Speed,
    counted,
    duration,
    estimate_prompts,
    figures_key,
    last_figures,
    measured_speed,
)
from birbal_ray.recipe import PipelineConfig
from birbal_ray.score.config import ScoreConfig, TaskSettings
from birbal_ray.score.run import throughput_key
from birbal_ray.settings import ConfigError, require
from birbal_ray.storage import input_folder
from birbal_ray.train.budget import forecast_training, rate_key, training_speed
from birbal_ray.train.config import TrainConfig
from birbal_ray.train.preflight import flops_per_token, shapes_of
from birbal_ray.tune.config import TuneConfig

CHARACTERS_PER_TOKEN = 4.0  # of English in the tokenizers of Llama, Mistral and Qwen, near enough for a range
DEFINITION_TOKENS = 60  # of a training row, beside its input and output
SAMPLED_INSTANCES = 40  # of each task, to learn how long its prompts are
SEARCH_START_SECONDS = (5.0, 30.0)
SEARCH_HASTE = 0.8  # a trial took from 40 to 62 s in one search on two shared cores (docs/log.md)
MIX_ROWS_PER_SECOND = (5_000.0, 50_000.0)
PAGE_SECONDS = (0.5, 4.0)
CPU_PROMPTS, CPU_TOKENS = (2.0, 10.0), (40.0, 150.0)  # SmolLM2-135M on two cores, per second (docs/log.md)
SMOLLM2_WEIGHTS = 134_515_008
EVALUATE_MARGIN = 0.7  # of an evaluation's time: answers to shorter prompts and adapters take longer than scoring did


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step will take. Seconds as a range; `limit_seconds`: what the budget leaves it.

    `fitting_seconds`: of the part of the work that fits, where a step leaves out what would not end in time.
    """

    step: str
    work: str
    low_seconds: float
    high_seconds: float
    limit_seconds: float | None
    source: str
    fitting_seconds: float | None = None

    @property
    def planned_seconds(self) -> float:
        """The middle of the range, or of what fits, or the limit where that is less."""
        middle = self.fitting_seconds or (self.low_seconds + self.high_seconds) / 2
        return min(middle, math.inf if self.limit_seconds is None else max(0.0, self.limit_seconds))

    @property
    def hours(self) -> str:
        """The range in words, with its source."""
        return f"{duration(self.low_seconds)} to {duration(self.high_seconds)} ({self.source})"


@dataclass(frozen=True, slots=True)
class TaskSizes:
    """What planning reads of a task's file: its label, instances, and mean tokens of a prompt's parts."""

    name: str
    label: str
    num_instances: int
    shared_tokens: float
    own_tokens: float
    completion_tokens: float


def plan_recipe(config: PipelineConfig, gpu: str | None = None) -> list[StepPlan]:
    """What each step will take on this machine, or on one card `gpu` (Ray's name), within the budget's shares.

    `config` is joined. Figures are this machine's own where it has run such a step (only without `gpu`), else
    arithmetic. Reads the task files; loads no weights. Raises ConfigError, TaskError, ModelError.
    """
    if gpu is not None and gpu not in CARDS:
        raise ConfigError(f"--gpu {gpu}: no figures for this card; there are {', '.join(CARDS)}")
    budget, shares = config.budget, config.shares.model_dump()
    limits = {step: budget * share for step, share in shares.items()} if budget else {}
    sizes = read_sizes(config.score.tasks, config.score.prompt.num_shots)
    asked = config.evaluate.scoring().tasks
    same = {"exclude", "instances_per_task", "held_out_fraction"}
    if asked.model_dump(exclude=same) == config.score.tasks.model_dump(exclude=same):
        asked_sizes = sizes
    else:
        asked_sizes = read_sizes(asked, config.evaluate.prompt.num_shots)
    num_scored = sum(one.num_instances for one in chosen(sizes, config.score.tasks))
    limited = {
        "score": plan_score(config.score, gpu, sizes),
        "tune": plan_tune(config.tune, gpu, limits.get("tune")),
        "mix": plan_mix(config.mix, num_scored + sum(source.max_rows or 0 for source in config.mix.sources)),
        "evaluate": plan_evaluate(config.evaluate, gpu, asked_sizes, limits.get("evaluate"), config.score),
        "report": plan_report(config),
    }
    plans = {
        step: replace(one, limit_seconds=limits.get(step)) for step, one in limited.items() if step in config.steps
    }
    rest = None
    if budget:  # training gets what was not used before it, and leaves the later steps their shares
        used = sum(plans[step].planned_seconds for step in plans if step not in ("evaluate", "report"))
        rest = max(0.0, budget - used - limits["evaluate"] - limits["report"])
    rows, per_row = _mix_sizes(config, sizes)
    kept = {} if gpu else last_figures(rate_key(_on(config.train, gpu)))
    per_row = kept.get("tokens_per_row", per_row)
    held_back = rows * config.mix.eval_fraction
    tokens = (rows - held_back) * per_row, min(held_back, config.train.evaluation.num_rows) * per_row
    plans["train"] = plan_train(config.train, *tokens, gpu, rest)
    return [plans[step] for step in config.steps]


def money(plans: Sequence[StepPlan], price_per_hour: float) -> tuple[float, float]:
    """(low, high) of the whole recipe on a card that costs `price_per_hour`."""
    low, high = (
        sum(seconds if one.limit_seconds is None else min(seconds, one.limit_seconds) for one, seconds in taken)
        for taken in ([(one, one.low_seconds) for one in plans], [(one, one.high_seconds) for one in plans])
    )
    return low / 3600 * price_per_hour, high / 3600 * price_per_hour


def describe_hours(plan: Callable[[], StepPlan], price_per_hour: float | None = None) -> str:
    """How long a step takes, as `birbal plan` says, and what it costs, a line each; or why that is not known."""
    try:
        found = plan()
    except (ConfigError, ModelError) as error:
        return f"no estimate of time: {error}"
    text = f"takes {found.hours}: {found.work}"
    if price_per_hour is None:
        return text
    low, high = money([found], price_per_hour)
    return f"{text}\ncosts {low:.2f} to {high:.2f}, at {price_per_hour:g} an hour"


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


def find_tasks(tasks: TaskSettings) -> list[reader.TaskFile]:
    """The files that the settings choose, those left out by hand (`exclude`) among them.

    Raises TaskError, with the nearest name, where `select` or `exclude` names a task that isn't there.
    """
    root = input_folder(require(tasks.path, "--tasks"))
    files = reader.find_task_files(root)
    available = [file.name for file in files]
    catalog.choose_names(available, tasks.exclude, root)
    names = set(catalog.choose_names(available, tasks.select, root)[0])
    return [file for file in files if file.name in names]


def read_sizes(tasks: TaskSettings, num_shots: int) -> list[TaskSizes]:
    """The usable tasks of `find_tasks`. Raises TaskError where there is none."""
    files, overrides = find_tasks(tasks), metrics.default_overrides()
    if tasks.label_overrides:
        overrides |= metrics.read_overrides(input_folder(tasks.label_overrides))
    sizes = []
    for _, task in reader.read_tasks(files):
        if isinstance(task, TaskError) or catalog.excluded_by(task, tasks.exclude_families):
            continue
        sampled = [one for one in task.instances[:SAMPLED_INSTANCES] if one.error is None]
        if not sampled:
            continue
        own = sum(len(one.input) for one in sampled) / len(sampled) / CHARACTERS_PER_TOKEN
        answer = sum(len(one.references[0]) for one in sampled) / len(sampled) / CHARACTERS_PER_TOKEN
        shared = len(prompt.render_prefix(task.definition, prompt.examples_of(task, num_shots))) / CHARACTERS_PER_TOKEN
        label = metrics.label_task(task, overrides).value
        sizes.append(TaskSizes(task.name, label, len(task.instances), shared, own + 8, answer + 2))
    if not sizes:
        raise TaskError(
            f"{tasks.path}: no usable task among the {len(files)} that tasks.select = {tasks.select!r} takes; "
            "all takes every task (--select all; of a recipe --set score.tasks.select=all)"
        )
    return sizes


def chosen(sizes: Sequence[TaskSizes], tasks: TaskSettings) -> list[TaskSizes]:
    """The tasks that a step takes, with as many instances of each as it asks for. Raises TaskError where none is."""
    found = [
        replace(one, num_instances=tasks.num_taken(one.num_instances)) for one in sizes if one.name not in tasks.exclude
    ]
    if not found:
        raise TaskError(f"{tasks.path}: no task is left besides those held out or excluded")
    return found


def plan_score(config: ScoreConfig, gpu: str | None = None, sizes: Sequence[TaskSizes] | None = None) -> StepPlan:
    """Scoring: of an adaptive run a range of rows, unless these settings were run here before."""
    kept = {} if gpu else last_figures(figures_key("score", config))
    sizes = chosen(sizes or read_sizes(config.tasks, config.prompt.num_shots), config.tasks)
    low, high = _adaptive_rows(config, sizes)
    most = sum(one.num_instances for one in sizes)
    if rows := kept.get("rows"):
        low = high = min(rows, most)
    elif rows := kept.get("rows_at_least"):
        low, high = max(low, min(rows, most)), max(high, min(rows, most))
    seconds, source = _answering(config, sizes, (low, high), 1, kept, gpu)
    count = f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}"
    return StepPlan("score", f"{count} prompts of {counted(len(sizes), 'task')}", *seconds, None, source)


def plan_evaluate(
    config: EvaluateConfig,
    gpu: str | None = None,
    sizes: Sequence[TaskSizes] | None = None,
    seconds: float | None = None,
    scored: ScoreConfig | None = None,
    num_prompts: int | None = None,
) -> StepPlan:
    """An evaluation; one that gets `seconds` asks as many instances as fit, by the speed that `scored` had.

    `num_prompts`: where they have been counted.
    """
    scoring = config.scoring()
    kept = {} if gpu else last_figures(figures_key("evaluate", config))
    device = _device(scoring.engine.device, gpu)
    sizes = chosen(sizes or read_sizes(scoring.tasks, config.prompt.num_shots), scoring.tasks)
    if seconds is not None:
        before = scored or scoring
        figures = {} if gpu else last_figures(figures_key("score", before))
        load = figures.get("load_seconds", sum(LOAD_SECONDS[device]) / 2)
        rate = figures.get("rows_per_second") or sum(_prompt_speed(before, sizes, gpu)[:2]) / 2
        most = fitting_instances(config, len(sizes), seconds, load, rate, device)
        sizes = [replace(one, num_instances=min(one.num_instances, most)) for one in sizes]
    asked = num_answers(config) * sum(one.num_instances for one in sizes) * kept.get("asked_fraction", 1.0)
    asked = asked if num_prompts is None else num_prompts
    taken, source = _answering(scoring, sizes, (asked, asked), num_engines(config, device), kept, gpu)
    return StepPlan("evaluate", f"{asked:,.0f} prompts of {counted(len(sizes), 'task')}", *taken, None, source)


def num_answers(config: EvaluateConfig) -> int:
    """How often an evaluation asks each instance."""
    return (1 + len(config.adapters) + len(config.merged)) * len(config.prompt_formats)


def num_engines(config: EvaluateConfig, device: str) -> int:
    """How many engines an evaluation starts one after the other: on a card, one serves the adapters, too."""
    return 1 + len(config.merged) + (0 if device == "gpu" else len(config.adapters))


def fitting_instances(
    config: EvaluateConfig, num_tasks: int, seconds: float, load_seconds: float, rows_per_second: float, device: str
) -> int:
    """How many instances of each task an evaluation can ask in `seconds`, at most what its settings say; at least 2."""
    working = seconds * EVALUATE_MARGIN - num_engines(config, device) * load_seconds
    rows = max(0.0, working) * rows_per_second
    return max(2, min(config.tasks.instances_per_task or 10**9, int(rows / (num_tasks * num_answers(config)))))


def plan_tune(config: TuneConfig, gpu: str | None = None, seconds: float | None = None) -> StepPlan:
    """A search; one that gets `seconds` leaves out the trials that would keep its fresh seeds from ending in time."""
    parts, source = _trial_seconds(config, gpu)

    def taking(num_searched: int) -> tuple[float, float]:
        low, high = (start + _rounds(config, num_searched, gpu) * trial for start, trial in parts)
        return low, high

    number, fitting = config.num_trials, None
    while seconds is not None and number > 1 and sum(taking(number)) / 2 > seconds:
        number -= 1
        fitting = sum(taking(number)) / 2
    named = config.num_named if config.num_trials else 0
    num_trained = named + config.num_trials + config.predicts + config.num_repeats
    work = f"{num_trained} short fine-tunes of {config.proxy.tokens:,} tokens"
    if fitting is not None:
        work += f"; {num_trained - config.num_trials + number} fit"
    return StepPlan("tune", work, *taking(config.num_trials), None, source, fitting)


def plan_mix(config: MixConfig, candidates: int) -> StepPlan:
    """A mix from so many candidates, scored rows and those of outside sources."""
    work, (slow, fast) = f"up to {candidates:,} candidates", MIX_ROWS_PER_SECOND
    if kept := last_figures(figures_key("mix", config)):
        seconds = kept["seconds"] * max(1.0, candidates / max(1.0, kept["candidates"]))
        return StepPlan("mix", work, *_around(seconds), None, MEASURED)
    return StepPlan("mix", work, 1 + candidates / fast, 10 + candidates / slow, None, "benchmarks/mixing.py")


def plan_train(
    config: TrainConfig, train_tokens: float, eval_tokens: float, gpu: str | None = None, rest: float | None = None
) -> StepPlan:
    """A fine-tune; tokens: of an epoch, of an evaluation; `rest`: the seconds that the other steps leave it."""
    config = _on(config, gpu)
    per_step = config.batch.micro * config.batch.accumulation * config.batch.sequence_length
    kept = {} if gpu else last_figures(rate_key(config))
    found = forecast_training(config, per_step, eval_tokens, _training_speed(config, gpu), kept)
    low, high = found.seconds(config.epochs * train_tokens / per_step)
    work = f"{config.epochs:g} epochs of about {train_tokens / 1e3:,.0f} thousand tokens"
    if rest is not None and high > rest:
        epochs = found.steps_within(rest - found.start_seconds) * per_step / train_tokens
        fits = [min(config.epochs, epochs * (1 + sign * found.spread)) for sign in (-1, 1)]
        work += f"; {fits[0]:.2g} to {fits[1]:.2g} fit" if fits[1] else "; no step fits"
    return StepPlan("train", work, low, high, rest, found.source)


def plan_report(config: PipelineConfig) -> StepPlan:
    """The page, which is written after each step."""
    pages = len(config.steps)
    kept = last_figures("report")
    low, high = _around(kept["page_seconds"]) if kept else PAGE_SECONDS
    return StepPlan("report", "one page", pages * low, pages * high, None, MEASURED if kept else "docs/log.md")


def _training_speed(config: TrainConfig, gpu: str | None) -> Speed:
    """Tokens a second of a fine-tune."""
    found = training_speed(config, lambda: _flop_per_token(config), gpu)
    return found or _scale_speed(CPU_TOKENS, config.resources.device, config.model.name)


def _flop_per_token(config: TrainConfig) -> float:
    """Of a training step; where the model's config can't be had, from the weights that its name says."""
    try:
        model = resolve_model(config.model.name, config.model.revision, weights=False)
        return flops_per_token(shapes_of(model.path, config.lora.target_modules), config)
    except ModelError:
        return float(TRAIN_FLOP_PER_WEIGHT * num_weights(config.model.name))


def least_seconds(config: PipelineConfig, gpu: str | None = None) -> dict[str, float]:
    """The least that each step with a share of the budget, or its rest, works in: its models loaded, something done.

    A search needs its baselines, one mix to compare with them, and the fresh seeds of all of these. It ends in time
    with what it knows, so only a budget far below that is refused; on a card without figures, none.
    `gpu`: on one such card.
    """
    device = _device(config.score.engine.device, gpu)
    load = LOAD_SECONDS[device][0]
    engines = num_engines(config.evaluate, device)
    least = {"score": load + 10, "train": load + 20, "evaluate": engines * load + 10, "report": 5.0}
    if config.search:
        with contextlib.suppress(ConfigError):
            ((start, trial), _), _ = _trial_seconds(config.tune, gpu)
            rounds = _rounds(config.tune, min(1, config.tune.num_trials), gpu)
            least["tune"] = SEARCH_HASTE * (start + rounds * trial)
    return least


def _adaptive_rows(config: ScoreConfig, sizes: Sequence[TaskSizes]) -> tuple[float, float]:
    """How many rows a run scores, low and high; all of them where it isn't adaptive."""
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


def _answering(
    config: ScoreConfig,
    sizes: Sequence[TaskSizes],
    rows: tuple[float, float],
    engines: int,
    kept: dict[str, float],
    gpu: str | None,
) -> tuple[tuple[float, float], str]:
    """(seconds, low and high, of `engines` one after the other that answer `rows`; the source of the speed)."""
    load = LOAD_SECONDS[_device(config.engine.device, gpu)]
    if kept:
        load, start = _around(kept["load_seconds"]), _around(kept["overhead_seconds"])
        low, high = _around(1 / kept["rows_per_second"])
        return (engines * load[0] + start[0] + rows[0] * low, engines * load[1] + start[1] + rows[1] * high), MEASURED
    speed = _prompt_speed(config, sizes, gpu)
    # The shared part of each task is computed once.
    prefixes = sum(one.shared_tokens for one in sizes) / max(1.0, _mean(sizes, "own_tokens"))
    low, high = ((count + prefixes) / config.resources.num_replicas for count in rows)
    return (engines * load[0] + low / speed.high, engines * load[1] + high / speed.low), speed.source


def _prompt_speed(config: ScoreConfig, sizes: Sequence[TaskSizes], gpu: str | None) -> Speed:
    """Prompts a second of one engine."""
    own, new, cached = (_mean(sizes, name) for name in ("own_tokens", "completion_tokens", "shared_tokens"))
    device = _device(config.engine.device, gpu)
    here = config.replace({"engine.device": device})
    if gpu is None and (rate := last_figures(throughput_key(here)).get("tokens_per_second")):
        return measured_speed(rate / (own + new + cached))  # the kept rate counts cached tokens, too
    if (card := gpu or config.resources.accelerator_type) in CARDS:
        return estimate_prompts(card, num_weights(config.model.name), own, new)
    return _scale_speed(CPU_PROMPTS, device, config.model.name)


def _mean(sizes: Sequence[TaskSizes], name: str) -> float:
    """Of the instances' prompts."""
    total = sum(one.num_instances for one in sizes)
    return sum(getattr(one, name) * one.num_instances for one in sizes) / max(1, total)


def _trial_seconds(config: TuneConfig, gpu: str | None) -> tuple[list[tuple[float, float]], str]:
    """(low and high of: seconds of the search besides its trials, seconds of a trial; the source of these)."""
    if gpu is None and (kept := last_figures(figures_key("tune", config))):
        starts, trials = _around(kept["overhead_seconds"]), _around(kept["trial_seconds"])
        return list(zip(starts, trials, strict=True)), MEASURED
    device, card = "gpu" if gpu or config.resources.num_gpus else "cpu", config.resources.accelerator_type
    train = config.train.replace({"resources.device": device, "resources.accelerator_type": card})
    speed = _training_speed(train, gpu)
    load, tokens = LOAD_SECONDS[device], config.proxy.tokens
    trials = load[0] / 4 + tokens / speed.high, load[1] + tokens / speed.low
    return list(zip(SEARCH_START_SECONDS, trials, strict=True)), speed.source


def _rounds(config: TuneConfig, num_searched: int, gpu: str | None) -> float:
    """Trials one after the other, where as many as run at a time count as one; on one card they share its speed."""
    together = 1 if gpu or config.resources.num_gpus else config.resources.max_concurrent
    first = math.ceil((1 + (config.num_named if config.num_trials else 0) + num_searched) / together)
    longer = config.transfer.factor * math.ceil(config.num_transfers / together)
    return first + config.predicts + math.ceil(config.num_repeats / together) + longer


def _mix_sizes(config: PipelineConfig, sizes: Sequence[TaskSizes]) -> tuple[float, float]:
    """(rows of a recipe's mix, tokens of one)."""
    asked = config.mix.task_score.exact_match_budget + config.mix.task_score.generation_budget
    found = chosen(sizes, config.score.tasks)
    rows = min(asked, sum(one.num_instances for one in found)) + sum(one.max_rows or 0 for one in config.mix.sources)
    per_row = sum(one.own_tokens + one.completion_tokens for one in found) / len(found) + DEFINITION_TOKENS
    return rows, per_row


def _on(config: TrainConfig, gpu: str | None) -> TrainConfig:
    """The settings with the device decided."""
    device = "gpu" if config.resources.accelerator_type else _device(config.resources.device, gpu)
    return config.replace({"resources.device": device})


def _device(asked: str, gpu: str | None) -> str:
    """cpu or gpu: what --gpu or the settings say, else what this machine has."""
    return "gpu" if gpu else decide_device(asked)


def _scale_speed(of_smollm2: tuple[float, float], device: str, model: str) -> Speed:
    """What two CPU cores do per second, by the model's size. Raises ConfigError for a GPU: CARDS has no such card."""
    if device == "gpu":
        raise ConfigError(
            "resources.accelerator_type (or `birbal plan --gpu`) names no card of which figures are known: it takes "
            f"{', '.join(CARDS)}; `birbal doctor` names a machine's cards"
        )
    slower = SMOLLM2_WEIGHTS / num_weights(model)
    return Speed(of_smollm2[0] * slower, of_smollm2[1] * slower, "two CPU cores, SmolLM2-135M, scaled by weights")


def _around(seconds: float) -> tuple[float, float]:
    """What was measured, give or take a tenth."""
    return 0.9 * seconds, 1.1 * seconds
