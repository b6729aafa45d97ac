"""The whole recipe inside one budget: score, tune, mix, train, evaluate, report, each in a folder of its own."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from birbal_ray.budget import BudgetClock
from birbal_ray.cluster import job_metadata, missing_cards, ray_log_file, ray_session
from birbal_ray.evaluate.run import evaluate
from birbal_ray.lock import hold_lock
from birbal_ray.mix.allocation import BIRBAL_2023, TASK_SCORE
from birbal_ray.mix.config import MixConfig
from birbal_ray.mix.run import mix
from birbal_ray.mix.sources import source_problem
from birbal_ray.models import ModelError
from birbal_ray.ni.metrics import EXACT_MATCH, GENERATION
from birbal_ray.plan import chosen, find_tasks, fitting_instances, least_seconds, plan_recipe, read_sizes, records_of
from birbal_ray.progress import (
    CLOCK_FILE,
    LOAD_SECONDS,
    PLAN_FILE,
    duration,
    figures_key,
    last_figures,
    save_figures,
)
from birbal_ray.recipe import PipelineConfig, join_steps, refuse_small_budget
from birbal_ray.report.run import report
from birbal_ray.run import RunFailedError, RunMismatchError, sigterm_as_interrupt
from birbal_ray.schemas import MANIFEST_FILE, RUN_FILE
from birbal_ray.score.pipeline import logical_cpus
from birbal_ray.score.run import score, speed_of
from birbal_ray.settings import ConfigError, one_line
from birbal_ray.storage import Folder, open_folder
from birbal_ray.train.launch import logical_cpus as train_logical_cpus
from birbal_ray.train.run import train
from birbal_ray.tune.config import changed_mix
from birbal_ray.tune.run import tune
from birbal_ray.tune.space import mix_of, ratios_of

ABOUT = {
    "score": "what does the model get wrong?",
    "tune": "which sampling ratios does a short fine-tune learn most from?",
    "mix": "a training set, more from the tasks that went wrong",
    "train": "QLoRA on it, 4-bit weights and a LoRA adapter",
    "evaluate": "base model against adapter on what was never sampled",
    "report": "everything on one page",
}
RUN: Mapping[str, Any] = {"score": score, "tune": tune, "mix": mix, "train": train, "evaluate": evaluate}
TRAIN_START_SECONDS = 15.0  # of the training step, before its worker's own clock runs and after it has ended


def run_pipeline(
    config: PipelineConfig,
    *,
    overwrite: bool = False,
    announce: Callable[[str], None] = lambda text: None,
    show: Mapping[str, Callable[[Any], None]] = {},
) -> str:
    """Run every step, those that are up to date excepted; the report's path or URL. Raises as the steps do.

    With a budget each step ends in time, and training gets what the others leave. The first session writes the plan
    down, and the report, which is written after every step, compares it with the time taken. `show` gets each step's
    result under its name. The steps share one Ray. With `overwrite`, each step starts from scratch, once: the call,
    repeated after an interruption, continues, and makes again what is of other settings. Raises ConfigError when the
    budget is too small for any step, RunError when another pipeline is at work in the folder.
    """
    config = join_steps(config)
    steps, folder = config.steps, open_folder(config.output or "")
    least = least_seconds(config)
    is_first = not folder.is_file(CLOCK_FILE)
    if is_first:
        check_recipe(config, download=True)  # before anything is made
        done = () if overwrite else [step for step in steps if folder.is_file(f"{step}/{MANIFEST_FILE}")]
        if missing := missing_cards({step: card for step, card in config.cards.items() if step not in done}):
            raise ConfigError(missing)
    with ExitStack() as stack:
        stack.enter_context(sigterm_as_interrupt())
        folder = replace(folder, guard=stack.enter_context(hold_lock(folder)))
        clock = BudgetClock(folder, config.budget, config.shares, least, overwrite=steps[:-1] if overwrite else ())
        if clock.is_new and not is_first:
            refuse_small_budget(config, least)
        is_done = not overwrite and all(folder.is_file(f"{step}/{MANIFEST_FILE}") for step in steps if step != "report")
        clock.has_ended = is_done  # a second call looks at what is there: it takes no time of the budget
        if not is_first and (clock.starts_over("mix") or not folder.is_file(f"mix/{MANIFEST_FILE}")):
            check_sources(config, download=True)
        if clock.is_new or not (is_done or folder.is_file(PLAN_FILE)):
            with clock.running(steps[0]):
                write_plan(config, folder, announce)
        reported = clock.spent.get("report", 0.0)
        if not is_done:
            resources = config.tune.resources
            cpus = max(
                logical_cpus(config.score),
                logical_cpus(config.evaluate.scoring()),
                train_logical_cpus(config.train),
                resources.num_cpus * resources.max_concurrent + 1 if config.search else 0.0,
            )
            stack.enter_context(ray_session(cpus, ray_log_file(folder), about=job_metadata("pipeline", folder)))
        for number, step in enumerate(steps, 1):
            left = clock.left(step)
            time_left = "" if math.isinf(left) else f" (at most {duration(max(0.0, left))})"
            announce(f"{number}/{len(steps)} {step}: {ABOUT[step]}{time_left}")
            if step != "report":
                with clock.running(step):
                    result = run_step(step, config, clock, announce)
                    clock.keep(step)
                    if step in show and result is not None:
                        show[step](result)
                if (over := clock.overrun(step)) > 1:
                    announce(f"{step} took {duration(over)} more than its share of the budget; training gets less")
                with clock.running("report"):
                    report(folder.place)
        # Not counted, so that it shows the times that a later call finds in clock.json, too.
        page = report(folder.place).file
    if clock.is_new and not is_done:
        save_figures("report", page_seconds=(clock.spent["report"] - reported) / (len(steps) - 1))
    return page


def run_step(step: str, config: PipelineConfig, clock: BudgetClock, announce: Callable[[str], None]) -> Any:
    """A step's result; None of a search that a budget does not wait for. Raises as the step does."""
    is_mixed = open_folder(config.mix.output or "").is_file(MANIFEST_FILE) and not clock.starts_over("mix")
    if step == "tune" and clock.search_failed and is_mixed:
        announce("the search failed before the mix was made, with the ratios of its settings; it is not tried again")
        return None
    try:
        result = RUN[step](settings_of(step, config, clock), overwrite=clock.starts_over(step))
    except RunFailedError as error:
        if step != "tune" or config.budget is None:
            raise
        # A search that found nothing in its time costs the recipe its ratios, not its adapter.
        announce(f"{one_line(error)}; the mix is made with the ratios of its settings")
        clock.search_failed = True
        return None
    except RunMismatchError as error:
        if clock.restart(step):
            announce(f"{error.folder} holds a run of other settings or inputs; --overwrite deletes it")
            return run_step(step, config, clock, announce)
        raise RunMismatchError(
            error.folder,
            error.differences,
            "Restore the old settings to continue it; or move this folder, and those of the steps after it, away, and "
            "the same command makes them again. --overwrite deletes the runs of all steps.",
        ) from None
    clock.search_failed = clock.search_failed and step != "tune"
    return result


def check_recipe(config: PipelineConfig, *, download: bool = False) -> None:
    """Raise ConfigError where a joined recipe can't work: a budget too small, an outside dataset that can't be had.

    Raises TaskError for a name that is no task's, among `held_out_tasks` for instance.
    """
    check_tasks(config)
    refuse_small_budget(config, least_seconds(config))
    check_sources(config, download=download)


def check_tasks(config: PipelineConfig) -> None:
    """Raise TaskError for a name that is no task's, ConfigError where no scoring of them could fill the mix."""
    for tasks in (config.score.tasks, config.evaluate.scoring().tasks):
        find_tasks(tasks)
    asked = config.mix.task_score
    if config.budget or config.search or asked.allow_shortfall or config.mix.policy == BIRBAL_2023:
        return  # in time, the shares may fall short; the search has its own idea of them
    num_instances: Counter[str] = Counter()
    for one in chosen(read_sizes(config.score.tasks, config.score.prompt.num_shots), config.score.tasks):
        num_instances[one.label] += one.num_instances
    budgets = [([EXACT_MATCH], asked.exact_match_budget), ([GENERATION], asked.generation_budget)]
    if config.mix.policy != TASK_SCORE:  # the others draw both together
        budgets = [([EXACT_MATCH, GENERATION], asked.exact_match_budget + asked.generation_budget)]
    for labels, budget in budgets:
        if budget > (there := sum(num_instances[label] for label in labels)):
            name = " + ".join(f"{label}_budget" for label in labels)
            raise ConfigError(
                f"mix.task_score.{name} = {budget}: the tasks that are scored have {there} instances labelled "
                f"{' or '.join(labels)}; lower it to at most {there}, or set mix.task_score.allow_shortfall=true"
            )


def check_sources(config: PipelineConfig, *, download: bool) -> None:
    """Raise ConfigError, with all that is wrong, where an outside dataset of the recipe can't be had.

    To `download` them now spares a mix in the middle of the night the network.
    """
    if problems := [problem for source in config.sources if (problem := source_problem(source, download=download))]:
        raise ConfigError("; ".join(problems))


def write_plan(config: PipelineConfig, folder: Folder, announce: Callable[[str], None]) -> None:
    """Write plan.json, what each step is planned to take; announce why where nothing can be planned."""
    try:
        steps = plan_recipe(config)
    except (ConfigError, ModelError) as error:  # a card without figures; what else is wrong, the step will say
        folder.delete([PLAN_FILE])
        announce(f"no plan: {one_line(error)}")
        return
    folder.write_json(PLAN_FILE, {"budget_seconds": config.budget, "steps": records_of(steps)})
    planned = ", ".join(f"{one.step} {duration(one.planned_seconds)}" for one in steps)
    announce(f"planned: {planned} (`birbal plan` says why)")


def settings_of(step: str, config: PipelineConfig, clock: BudgetClock) -> Any:
    """A step's settings within what the budget leaves it; `config` is joined."""
    if step == "mix":
        return _mix_settings(config)
    settings = getattr(config, step)
    if step in ("score", "tune") and not clock.starts_over(step):
        folder, following = open_folder(settings.output or ""), config.steps[config.steps.index(step) + 1]
        if folder.is_file(MANIFEST_FILE) and open_folder(getattr(config, following).output or "").is_file(RUN_FILE):
            # The next step was made from what this one ended with: a larger budget comes too late for it.
            ended = folder.read_json(MANIFEST_FILE)
            return settings.replace({"budget": {**ended.get("settings", {}), **ended}.get("budget")})
    left = clock.left(step)
    if math.isinf(left):
        return settings
    if step in ("score", "tune"):  # their budget is of all sessions
        budget = clock.decide(f"{step}.budget", lambda: round(clock.spent.get(step, 0.0) + left, 1))
        return settings.replace({"budget": budget})
    if step == "train":
        least = clock.least.get("train", 0.0)
        if "train.budget" not in clock.decided and left - TRAIN_START_SECONDS < least:
            raise ConfigError(
                f"the other steps have used {duration(clock.total)} of the budget, which leaves training "
                f"{duration(max(0.0, left))}; it needs {duration(least + TRAIN_START_SECONDS)}: give the same command "
                "a larger --budget"
            )
        # The budget is a part of what the run is made from; interruptions may have left less since it was set, and
        # packing or a wait for a node takes time that the worker's clock does not count.
        budget = clock.decide("train.budget", lambda: round(left - TRAIN_START_SECONDS, 1))
        return settings.replace({"budget": budget, "resources.end_by": time.time() + left - TRAIN_START_SECONDS})
    most = clock.decide("evaluate.instances_per_task", lambda: instances_that_fit(config, left))
    return settings.replace({"tasks.instances_per_task": most})


def instances_that_fit(config: PipelineConfig, seconds: float) -> int:
    """How many instances of each task an evaluation can ask in `seconds`, at the speed that scoring had; at least 2.

    The speed over all of the run's sessions; where these answered too few rows, what was last measured here.
    """
    scored = open_folder(config.score.output or "")
    device = scored.read_json(MANIFEST_FILE)["settings"]["engine"]["device"]
    speed = speed_of([scored.read_json(name) for name in scored.files("sessions")])
    speed = speed or last_figures(figures_key("score", config.score))
    load, rate = speed.get("load_seconds", LOAD_SECONDS[device][1]), speed.get("rows_per_second", 1.0)
    asked = config.evaluate.scoring().tasks
    tasks = chosen(read_sizes(asked, config.evaluate.prompt.num_shots), asked)
    return fitting_instances(config.evaluate, len(tasks), seconds, load, rate, device)


def _mix_settings(config: PipelineConfig) -> MixConfig:
    """The mix's settings with the ratios that the search found; within a budget, scoring may have left shares short."""
    settings = config.mix.model_dump()
    tuned = open_folder(config.tune.output or "")
    if config.search and tuned.is_file(MANIFEST_FILE):
        best = tuned.read_json(MANIFEST_FILE)["best"]
        if best["mix"] in config.tune.mixes:
            settings = changed_mix(config.mix, config.tune.mixes[best["mix"]]).model_dump()
        else:
            settings |= mix_of(config.mix, ratios_of(config.mix) | (best["ratios"] or {}))
        if best["is_baseline"]:
            settings["policy"] = best["mix"]
    if config.budget is not None:
        settings["task_score"]["allow_shortfall"] = True
    where = {name: getattr(config.mix, name) for name in ("scores", "output", "resources")}
    return MixConfig.model_validate({**settings, **where})
