"""The plan under Ray Tune: trials side by side, bad ones stopped early, dead ones started again."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler
from ray.tune.search import Searcher

from birbal_ray.object_store import filesystem_of
from birbal_ray.progress import ProgressLine
from birbal_ray.storage import child, refresh
from birbal_ray.tune.config import TuneConfig
from birbal_ray.tune.records import RESULT_FILE, one_line, trial_folder, write_record
from birbal_ray.tune.scheduler import FAILED, FINISHED, SEARCH, STOPPED, Job, Plan, Record

RAY_FOLDER = "ray_tune"
OBJECTIVE, LOOK = "objective", "look"
# Read by Tune when it starts.
ENVIRONMENT = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C and SIGTERM end the command at once; trials that ended are kept
    "TUNE_GLOBAL_CHECKPOINT_S": "600",  # our own records say what is done
    "RAY_AIR_NEW_OUTPUT": "0",
}


class Looks:
    """A trial's side: tells Tune each objective as it is measured, and writes the result at the end."""

    def __init__(self, run: Path, job: Job, num_looks: int) -> None:
        self._run, self._job, self._num_looks = run, job, num_looks
        self._begun = time.monotonic()
        self._looks: list[list[float]] = []

    def look(self, step: int, objective: float, **figures: Any) -> None:
        """One objective after `step` optimizer steps; the last one, with the record's `figures`, ends the trial."""
        import ray

        self._looks.append([step, objective])
        if len(self._looks) == self._num_looks:
            seconds, node = time.monotonic() - self._begun, ray.get_runtime_context().get_node_id()
            record = Record(self._job, FINISHED, objective, self._looks, seconds=seconds, node=node, **figures)
            write_record(self._run, record)
            refresh(self._run)
        tune.report({OBJECTIVE: objective, LOOK: len(self._looks), "step": step})


class PlanSearcher(Searcher):
    """Asks the plan; tells it how trials ended."""

    def __init__(self, plan: Plan, run: Path, options: dict[str, Any]) -> None:
        super().__init__(metric=OBJECTIVE, mode="min")
        self._plan, self._run, self._options = plan, run, options
        self._jobs: dict[str, Job] = {}
        self._looks: dict[str, dict[int, list[float]]] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next job as a trial's config."""
        job = self._plan.next()
        if job is None:
            return None if self._plan.running else Searcher.FINISHED
        self._jobs[trial_id] = job
        return {"job": job.to_dict(), "run": str(self._run), **self._options}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Note a look."""
        self._looks.setdefault(trial_id, {})[result[LOOK]] = [result["step"], result[OBJECTIVE]]

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Finished by itself, stopped early, diverged (a failure, kept), or failed otherwise (not kept)."""
        import json

        if result and LOOK in result:  # the one that it was stopped at comes here only
            self.on_trial_result(trial_id, result)
        job = self._jobs.pop(trial_id)
        looks = [look for _, look in sorted(self._looks.pop(trial_id, {}).items())]
        refresh(self._run)  # a trial on another node writes its result to the run's URL
        file = trial_folder(self._run, job) / RESULT_FILE
        if file.exists():
            record = Record.from_dict(json.loads(file.read_text(encoding="utf-8")))
        elif error or not looks:
            errors = sorted((self._run / RAY_FOLDER).glob(f"*/{job.key}*/error.txt"))
            reason = one_line(errors[-1].read_text(encoding="utf-8")) if errors else "its process died"
            record = Record(job, FAILED, None, looks, error=reason)
        else:
            record = Record(job, STOPPED, looks[-1][1], looks)
            write_record(self._run, record)
        self._plan.tell(record)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the trials' own records are what a continuation reads."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing."""


class SearchOnlyAsha(AsyncHyperBandScheduler):
    """ASHA for trials of the search; all others are wanted whole."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Whether to go on."""
        if trial.config["job"]["kind"] != SEARCH:
            return str(TrialScheduler.CONTINUE)
        return str(super().on_trial_result(tune_controller, trial, result))

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Others must not set the search's marks."""
        if trial.config["job"]["kind"] == SEARCH:
            super().on_trial_complete(tune_controller, trial, result)


class Told(tune.Callback):
    """The progress line."""

    def __init__(self, plan: Plan, progress: ProgressLine) -> None:
        self._plan, self._progress = plan, progress

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Show where the search is."""
        plan = self._plan
        running = [t for t in trials if t.status == "RUNNING"]
        found = [r for r in plan.records.values() if r.objective is not None and r.status == FINISHED and r.job.mix]
        best = min(found, key=lambda record: record.objective or 0.0, default=None)
        parts = [f"{len(plan.records)} of {plan.num_trials} trials ended", f"{len(running)} running"]
        names = [trial.config["job"]["key"] for trial in running]
        parts += [", ".join(names)] if names else []
        parts += [f"best loss {best.objective:.4f} ({best.job.key})"] if best else []
        self._progress.update(" · ".join(parts))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial's process died; Tune may start it again."""
        self._progress.message(f"trial {trial.config['job']['key']} broke off (failure {trial.num_failures})")


def run_plan(
    plan: Plan,
    config: TuneConfig,
    run: Path,
    trainable: Callable[[dict[str, Any]], None],
    options: dict[str, Any],
    progress: ProgressLine,
) -> None:
    """Run the plan to its end on the connected cluster.

    `trainable` gets `{"job", "run", **options}` in a worker process and uses `Looks`. Trials that end
    are on disk before anything else happens.
    """
    os.environ.update(ENVIRONMENT)
    storage: dict[str, Any] = {"storage_path": str(run / RAY_FOLDER)}
    if options["url"]:
        system, path = filesystem_of(child(options["url"], RAY_FOLDER))
        storage = {"storage_path": path, "storage_filesystem": system}
    resources = config.resources
    wanted = {"cpu": resources.num_cpus, "gpu": resources.num_gpus}
    if resources.accelerator_type:
        wanted[f"accelerator_type:{resources.accelerator_type}"] = 0.001
    scheduler = None
    if config.stopping.enabled and config.validation.looks > config.stopping.grace_looks:
        scheduler = SearchOnlyAsha(
            time_attr=LOOK,
            max_t=config.validation.looks,
            grace_period=config.stopping.grace_looks,
            reduction_factor=config.stopping.reduction_factor,
        )
    tune.Tuner(
        tune.with_resources(trainable, wanted),
        tune_config=tune.TuneConfig(
            metric=OBJECTIVE,
            mode="min",
            search_alg=PlanSearcher(plan, run, options),
            scheduler=scheduler,
            num_samples=-1,
            max_concurrent_trials=resources.max_concurrent,
            reuse_actors=True,
            trial_name_creator=_name,
            trial_dirname_creator=_name,
        ),
        run_config=tune.RunConfig(
            name=f"session-{int(time.time())}",
            **storage,
            stop=_diverged,
            failure_config=tune.FailureConfig(max_failures=resources.max_failures),
            callbacks=[Told(plan, progress)],
            verbose=0,
        ),
    ).fit()
    progress.close()


def _diverged(trial_id: str, result: dict[str, Any]) -> bool:
    """Whether the trial's loss is no number any more, at whatever look: training on changes nothing."""
    return not math.isfinite(result.get(OBJECTIVE, 0.0))


def _name(trial: Any) -> str:
    return str(trial.config["job"]["key"])
