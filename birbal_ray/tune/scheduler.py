"""Which trial comes next: baselines, the search, a surrogate's guess, then fresh seeds. No Ray in here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from birbal_ray.tune.config import TuneConfig
from birbal_ray.tune.space import TaskCounts, baseline_mix, distributions, mix_of, point_from, point_of
from birbal_ray.tune.surrogate import num_needed, predicted_best

BASE, BASELINE, SEARCH, SURROGATE, REPEAT = "base", "baseline", "search", "surrogate", "repeat"
FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"
BASE_MODEL = "base_model"


@dataclass(frozen=True, slots=True)
class Job:
    """One trial to run. `key` names it and its folder; trials of one `name` differ by seed only."""

    key: str
    kind: str
    name: str
    seed: int
    mix: dict[str, Any]  # settings of `birbal mix`, the seed's included; empty for the base model
    values: dict[str, float] = field(default_factory=dict)  # ratios; empty where the search has no words for them

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Job:
        """What `to_dict` gave."""
        return cls(**values)


@dataclass(frozen=True, slots=True)
class Record:
    """How a trial ended. `looks`: [optimizer step, objective] in order; the objective is the last one's."""

    job: Job
    status: str
    objective: float | None
    looks: list[list[float]] = field(default_factory=list)
    num_tokens: int = 0
    num_rows: int = 0
    mix_sha256: str = ""  # of train.parquet
    validation_sha256: str = ""
    seconds: float = 0.0
    node: str = ""
    error: str = ""

    @property
    def loss(self) -> float:
        """The objective; NaN where there is none."""
        return math.nan if self.objective is None else self.objective

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Record:
        """What `to_dict` gave."""
        return cls(**{**values, "job": Job.from_dict(values["job"])})


def settled(record: Record) -> Record:
    """The record; a FAILED one where the objective is no finite number, which nothing can be ranked by."""
    if record.objective is None or math.isfinite(record.objective):
        return record
    step = int(record.looks[-1][0]) if record.looks else 0
    error = f"its loss is {record.objective} after optimizer step {step}: it diverged (train.optimizer.learning_rate)"
    return replace(record, status=FAILED, objective=None, error=error)


class Plan:
    """Hands out jobs and takes their records, in any order that the records come in.

    `next` gives a job, or None: while records are missing that decide what comes next, and, with nothing
    `running`, at the end. `earlier`: records of an interrupted run, none of which is run again,
    and `begun`: jobs of its that have no record, which are run first, as they were. `remember` is
    told of every new job before it is handed out. Objectives are losses: lower is better.
    """

    def __init__(
        self,
        config: TuneConfig,
        counts: TaskCounts,
        earlier: Iterable[Record] = (),
        begun: Iterable[Job] = (),
        remember: Callable[[Job], None] = lambda job: None,
    ) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.config, self._remember = config, remember
        self.records: dict[str, Record] = {record.job.key: settled(record) for record in earlier}
        self._jobs: dict[str, Job] = {key: record.job for key, record in self.records.items()}
        self._start = point_of(config.mix)
        self._distributions = distributions(config.search)
        sampler = optuna.samplers.TPESampler(seed=config.seed, n_startup_trials=config.num_random, constant_liar=True)
        self._study = optuna.create_study(direction="minimize", sampler=sampler)
        self._asked: dict[str, Any] = {}
        self.left_out = ""  # why there is no surrogate's trial, once that is known
        for record in self.records.values():
            self._learn(record)
        self._again = [job for job in begun if job.key not in self.records]
        for job in self._again:
            self._jobs[job.key] = job
        settings = {name: baseline_mix(name, config.mix) for name in config.baselines}
        self._baselines: dict[str, Job] = {BASE_MODEL: Job(BASE_MODEL, BASE, BASE_MODEL, config.seed, {})}
        for name, mix in settings.items():
            values = self._start.values() if name == "task_score" else {}
            self._baselines[name] = self._job(BASELINE, name, mix, values)

    @property
    def num_trials(self) -> int:
        """All that will have been run in the end; an estimate while it hangs on trials that have not ended."""
        config = self.config
        others = [key for key, job in self._jobs.items() if job.kind != REPEAT]
        expected = len(self._baselines) + config.num_trials + bool(config.surrogate and not self.left_out)
        if len(others) == expected and all(key in self.records for key in others):
            return expected + len(self._repeats())
        repeated = (config.repeats.top + len(config.baselines)) * config.repeats.seeds if config.repeats.top else 0
        return expected + repeated

    @property
    def running(self) -> list[str]:
        """Keys of jobs handed out, or to be handed out again, whose record has not come."""
        return [key for key in self._jobs if key not in self.records]

    def next(self) -> Job | None:
        """The next job, or None."""
        if self._again:
            return self._again.pop(0)
        job = self._fresh()
        if job is not None:
            self._jobs[job.key] = job
            self._remember(job)
        return job

    def tell(self, record: Record) -> None:
        """Take a record in."""
        self.records[record.job.key] = settled(record)
        self._learn(self.records[record.job.key])

    def finalists(self) -> list[str]:
        """Names of the best mixes found, best first: what fresh seeds are spent on."""
        found = [r for r in self.of_kind(SEARCH, SURROGATE) if r.status == FINISHED and r.objective is not None]
        found.sort(key=lambda record: (record.objective, record.job.name))
        return [record.job.name for record in found[: self.config.repeats.top]]

    def of_kind(self, *kinds: str) -> list[Record]:
        """Records of these kinds, by key."""
        return [record for _, record in sorted(self.records.items()) if record.job.kind in kinds]

    def _fresh(self) -> Job | None:
        for job in self._baselines.values():
            if job.key not in self._jobs:
                return job
        for number in range(self.config.num_trials):
            if f"search-{number:03d}" not in self._jobs:
                return self._ask(f"search-{number:03d}")
        if any(self._jobs[key].kind != REPEAT for key in self.running):
            return None  # what follows depends on all of them
        if self.config.surrogate and SURROGATE not in self._jobs:
            points, needed = self._points(), num_needed(self._distributions)
            if len(points) >= needed:
                point = point_from(predicted_best(points, self._distributions, self.config.seed), self._start)
                return self._job(SURROGATE, SURROGATE, mix_of(self.config.mix, point), point.values())
            self.left_out = (
                f"the surrogate's trial is left out: {len(points)} trials with ratios have a loss, "
                f"a regression on {len(self._distributions)} ratios needs {needed}; raise num_trials"
            )
        return next((job for job in self._repeats() if job.key not in self._jobs), None)

    def _ask(self, name: str) -> Job:
        trial = self._study.ask(self._distributions)
        self._asked[name] = trial
        point = point_from(trial.params, self._start)
        return self._job(SEARCH, name, mix_of(self.config.mix, point), point.values())

    def _repeats(self) -> list[Job]:
        names = self.finalists()
        if not names:
            return []
        first = {r.job.name: r.job for r in self.of_kind(BASELINE, SEARCH, SURROGATE)}
        return [
            self._seeded(REPEAT, f"{name}-seed{seed}", name, seed, first[name].mix, first[name].values)
            for seed in range(self.config.seed + 1, self.config.seed + 1 + self.config.repeats.seeds)
            for name in [*self.config.baselines, *names]
            if name in first
        ]

    def _job(self, kind: str, name: str, mix: dict[str, Any], values: dict[str, float]) -> Job:
        return self._seeded(kind, name, name, self.config.seed, mix, values)

    def _seeded(
        self, kind: str, key: str, name: str, seed: int, mix: Mapping[str, Any], values: dict[str, float]
    ) -> Job:
        per_task = self.config.validation.rows_per_task
        return Job(key, kind, name, seed, {**mix, "seed": seed, "validation_rows_per_task": per_task}, values)

    def _points(self) -> list[tuple[dict[str, float], float]]:
        """Ratios and loss of the trials at the search's seed, at the last look that enough of them had.

        At a look all have seen the same share of their tokens. Losses at different looks don't compare:
        where stopping leaves too few at the end, all count with what they had at an earlier look.
        """
        judged = [r for r in self.of_kind(SEARCH, BASELINE) if r.status in (FINISHED, STOPPED) and r.job.values]
        points: list[tuple[dict[str, float], float]] = []
        for place in reversed(range(max((len(record.looks) for record in judged), default=0))):
            losses = [(r.job.values, r.looks[place][1]) for r in judged if len(r.looks) > place]
            points = [(values, loss) for values, loss in losses if math.isfinite(loss)]
            if len(points) >= num_needed(self._distributions):
                break
        return points

    def _learn(self, record: Record) -> None:
        """Tell Optuna; a stopped trial counts with the objective it was stopped at."""
        import optuna

        job = record.job
        if job.kind not in (SEARCH, BASELINE) or not job.values:
            return
        asked = self._asked.pop(job.name, None)
        state = {
            FINISHED: optuna.trial.TrialState.COMPLETE,
            STOPPED: optuna.trial.TrialState.PRUNED,
            FAILED: optuna.trial.TrialState.FAIL,
        }[record.status]
        value = record.objective if record.status == FINISHED else None
        looks = {int(step): objective for step, objective in record.looks if math.isfinite(objective)}
        if asked is not None:
            for step, objective in looks.items():
                asked.report(objective, step)
            self._study.tell(asked, value, state=state)
            return
        values = self._inside(job.values)
        if values is None:
            return
        self._study.add_trial(
            optuna.trial.create_trial(
                state=state,
                params=values,
                distributions=self._distributions,
                value=value,
                intermediate_values=looks,
            )
        )

    def _inside(self, values: Mapping[str, float]) -> dict[str, Any] | None:
        """The searched ratios as Optuna wants them, None for a baseline outside the ranges."""
        from optuna.distributions import CategoricalDistribution

        found: dict[str, Any] = {}
        for name, distribution in self._distributions.items():
            if isinstance(distribution, CategoricalDistribution):
                found[name] = bool(values[name])
            elif name not in values or not distribution.low <= values[name] <= distribution.high:
                return None
            else:
                found[name] = values[name]
        return found


def best_so_far(records: Sequence[Record]) -> list[float]:
    """The lowest objective of finished trials up to each record, NaN before the first."""
    best, found = math.nan, []
    for record in records:
        if record.status == FINISHED and record.objective is not None and not record.objective >= best:
            best = record.objective
        found.append(best)
    return found
