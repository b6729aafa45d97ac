"""The scheduler under Ray Tune: trials side by side, bad ones stopped early, dead ones started again."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ray import tune
from ray.exceptions import RayError
from ray.tune import TuneError
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler
from ray.tune.schedulers import TrialScheduler as RayScheduler
from ray.tune.search import ConcurrencyLimiter, Searcher

from birbal_ray.progress import ProgressLine
from birbal_ray.run import Run, RunError, RunFailedError, one_line
from birbal_ray.storage import Folder
from birbal_ray.tune.records import OBJECTIVE, RESULT_FILE, RUNG, read_results, trial_file, write_result
from birbal_ray.tune.scheduler import FAILED, FINISHED, SEARCH, STOPPED, TrialResult, TrialScheduler, TrialSpec

RAY_FOLDER = "ray_tune"
# Read by Tune when it starts.
ENVIRONMENT = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C and SIGTERM end the command at once; trials that ended are kept
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # our messages and results say what a trial failed of
    "TUNE_GLOBAL_CHECKPOINT_S": "600",  # our own records say what is done
    "RAY_AIR_NEW_OUTPUT": "0",
}
# Read in a trial's process, which takes the next trial once the thread of the last one has ended. After Tune's own 2 s
# a busy machine's next trial is an error.
THREAD_TIMEOUT, THREAD_TIMEOUT_SECONDS = "TUNE_FUNCTION_THREAD_TIMEOUT_S", "600"


class NotPickled:
    """Tune pickles what it is given, for a resume of its own that nobody uses: nothing of this is written down."""

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: Any) -> Any:
        return self


class SpecSearcher(NotPickled, Searcher):
    """Asks the scheduler what to run, and hands it how trials ended.

    A trial that failed is started again here, `resources.max_failures` times, and not by Tune: Tune counts the death of
    a process that was taking its next trial twice, and then gives that trial up. What ends is only noted in Tune's
    calls, which would take an error of the run folder's for the trial's, and dealt with in `settle`.
    """

    def __init__(self, scheduler: TrialScheduler, run: Folder, options: dict[str, Any]) -> None:
        super().__init__(metric=OBJECTIVE, mode="min")
        self._scheduler, self._run, self._options = scheduler, run, options
        self._failures: Counter[str] = Counter()
        self._ended: dict[str, Trial | None] = {}  # by trial id; the trial, where it failed
        self._specs: dict[str, TrialSpec] = {}
        self._rungs: dict[str, dict[int, list[float]]] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next spec as a trial's config."""
        spec = self._scheduler.next()
        if spec is None:
            return None if self._scheduler.running else Searcher.FINISHED
        self._specs[trial_id] = spec
        # With its guard: a trial of a driver that lost the run's lock writes nothing more.
        return {"spec": asdict(spec), "run": self._run, **self._options}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Note a rung."""
        self._rungs.setdefault(trial_id, {})[result[RUNG]] = [result["step"], result[OBJECTIVE]]

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Finished by itself, stopped early, or diverged; what failed otherwise comes to `failed`."""
        if result and RUNG in result:  # the one that it was stopped at comes here only
            self.on_trial_result(trial_id, result)
        if not error:
            self._ended[trial_id] = None

    def failed(self, trial: Trial) -> None:
        """It raised, or its process or node died; once it is settled, it may be named again."""
        if trial.trial_id in self._specs:
            self._ended[trial.trial_id] = trial

    def settle(self) -> list[str]:
        """Hand the scheduler what ended. Returns what a user is to know."""
        said = []
        while self._ended:
            trial_id, failed = next(iter(self._ended.items()))
            said += self._settle(trial_id, failed)
            del self._ended[trial_id], self._specs[trial_id]
        return said

    def _settle(self, trial_id: str, failed: Trial | None) -> list[str]:
        spec, rungs = self._specs[trial_id], [rung for _, rung in sorted(self._rungs.get(trial_id, {}).items())]
        allowed = self._scheduler.config.resources.max_failures
        written = trial_file(spec, RESULT_FILE)
        if self._run.is_file(written):  # whatever became of its process afterwards
            found = TrialResult.from_dict(self._run.read_json(written))
        elif failed:
            file = Path(failed.error_file or "")
            lines = file.read_text(errors="replace").split("\n") if file.is_file() else []
            reason = next((one_line(line) for line in reversed(lines) if line.strip()), "its process died")
            self._failures[spec.key] += min(failed.num_failures, 1)  # 0 where the node was preempted
            if self._failures[spec.key] <= allowed:
                self._scheduler.start_again(spec)
                return [
                    f"trial {spec.key} starts again (failure {self._failures[spec.key]}, {allowed} allowed): {reason}"
                ]
            found = TrialResult(spec, FAILED, None, rungs, error=reason)  # not kept: it may work the next time
        elif not rungs:
            found = TrialResult(spec, FAILED, None, rungs, error="it ended without a result")
        else:
            found = TrialResult(spec, STOPPED, rungs[-1][1], rungs)
            write_result(self._run, found)
        self._scheduler.tell(found)
        return []

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the trials' own records are what a continuation reads."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing."""


class SearchOnlyAsha(AsyncHyperBandScheduler):
    """ASHA for trials of the search; all others run to their end."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Whether to go on."""
        if trial.config["spec"]["kind"] != SEARCH:
            return str(RayScheduler.CONTINUE)
        return str(super().on_trial_result(tune_controller, trial, result))

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Others must not set the search's marks."""
        if trial.config["spec"]["kind"] == SEARCH:
            super().on_trial_complete(tune_controller, trial, result)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Forget its rungs: the trial that starts again in its place must not be measured by them."""
        for bracket in self._brackets:
            for _, recorded in bracket._rungs:
                recorded.pop(trial.trial_id, None)


class ShowProgress(NotPickled, tune.Callback):
    """The progress line, and progress.json."""

    def __init__(self, scheduler: TrialScheduler, run: Run | None, progress: ProgressLine) -> None:
        self._scheduler, self._run, self._progress = scheduler, run, progress
        self.limiter: ConcurrencyLimiter | None = None  # what Tune asks for trials

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Take in what ended; show where the search is."""
        if self.limiter:
            for trial in trials:
                if trial.status == Trial.ERROR:
                    # Tune says nothing of one for which a process could not be used again: its place would stay taken.
                    self.limiter.on_trial_complete(trial.trial_id, error=True)
                    self.limiter.searcher.failed(trial)
            for line in self.limiter.searcher.settle():
                self._progress.message(line)
        results, num_trials = self._scheduler.results, self._scheduler.num_trials
        names = [trial.config["spec"]["key"] for trial in trials if trial.status == "RUNNING"]
        found = [r for r in results.values() if r.objective is not None and r.status == FINISHED and r.spec.mix]
        best = min(found, key=lambda result: result.loss, default=None)
        parts = [f"{len(results)} of {num_trials} trials ended", f"{len(names)} running"]
        parts += [", ".join(names)] if names else []
        parts += [f"best loss {best.loss:.4f} ({best.spec.key})"] if best else []
        self._progress.update(" · ".join(parts))
        if self._run is not None:
            self._run.progress(len(results), num_trials, text=" · ".join(parts), running=names)


def run_trials(
    scheduler: TrialScheduler,
    run: Folder,
    trainable: Callable[[dict[str, Any]], None],
    options: dict[str, Any],
    show: ShowProgress,
) -> None:
    """Run what the scheduler hands out, on the connected cluster, until it has no more or the time is over.

    `trainable` gets `{"spec", "run", **options}` in a worker process and uses `RungReporter`. Trials that end
    are in the run's folder before anything else happens. Raises RunFailedError where Tune itself fails or stops.
    """
    os.environ.update(ENVIRONMENT)
    logging.getLogger("ray.tune.tune").setLevel(logging.CRITICAL)  # it calls a trial that started again incomplete
    config, left = scheduler.config, scheduler.seconds_left()
    resources, rungs = config.resources, config.validation.num_rungs
    wanted = {"cpu": resources.num_cpus, "gpu": resources.num_gpus}
    if resources.accelerator_type:
        wanted[f"accelerator_type:{resources.accelerator_type}"] = 0.001
    asha = None
    if config.stopping.enabled and rungs > config.stopping.grace_rungs:
        asha = SearchOnlyAsha(
            time_attr=RUNG,
            max_t=rungs,
            grace_period=config.stopping.grace_rungs,
            reduction_factor=config.stopping.reduction_factor,
        )

    def run_trial(trial: dict[str, Any]) -> None:
        os.environ.setdefault(THREAD_TIMEOUT, THREAD_TIMEOUT_SECONDS)
        trainable(trial)

    show.limiter = ConcurrencyLimiter(SpecSearcher(scheduler, run, options), resources.max_concurrent)
    tuner = tune.Tuner(
        tune.with_resources(run_trial, wanted),
        tune_config=tune.TuneConfig(
            metric=OBJECTIVE,
            mode="min",
            search_alg=show.limiter,
            scheduler=asha,
            num_samples=-1,
            time_budget_s=None if math.isinf(left) else max(1.0, left),
            reuse_actors=not resources.num_gpus,  # bitsandbytes frees no paged optimizer state while its process lives
            trial_name_creator=_key_of,
            trial_dirname_creator=_key_of,
        ),
        run_config=tune.RunConfig(
            name=f"session-{int(time.time())}",
            storage_path=run.path(RAY_FOLDER),
            storage_filesystem=None if run.is_local else run.filesystem,
            # A loss that is no number stays one: training on changes nothing.
            stop=lambda trial_id, result: not math.isfinite(result.get(OBJECTIVE, 0.0)),
            callbacks=[show],
            verbose=0,
        ),
    )
    before = signal.getsignal(signal.SIGUSR1)
    try:
        tuner.fit()
    except RunError:  # the run folder's, which is a RuntimeError
        raise
    except (TuneError, RayError, RuntimeError) as error:  # Tune knows a dead process, but none that lacked memory
        raise RunFailedError(
            f"Ray Tune failed: {one_line(error.__cause__ or error)}; trials that ended are kept"
        ) from error
    finally:
        with contextlib.suppress(ValueError):  # Tune sets its own in the main thread only
            signal.signal(signal.SIGUSR1, before)
    for found in read_results(run)[0]:  # the budget ended between its result and its end
        if found.spec.key not in scheduler.results:
            scheduler.tell(found)
    if scheduler.running and scheduler.seconds_left() > 1:
        raise RunFailedError("Ray Tune ended the search early (SIGUSR1 stops it); trials that ended are kept")


def _key_of(trial: Any) -> str:
    return str(trial.config["spec"]["key"])
