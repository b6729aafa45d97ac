"""Which trial comes next: baselines, the search, the predicted best, fresh seeds, longer ones. No Ray in here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from birbal_ray.mix.sources import absolute_paths
from birbal_ray.tune.config import BASE_MODEL, TuneConfig, changed_mix
from birbal_ray.tune.space import baseline_mix, mix_of, predicted_best, ratios_of, searched_ratios

BASE, BASELINE, MIX, SEARCH, PREDICTED = "base", "baseline", "mix", "search", "predicted"
REPEAT, TRANSFER = "repeat", "transfer"
FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"


@dataclass(frozen=True, slots=True)
class TrialSpec:
    """One trial to run. `key` names it and its folder; trials of one `name` differ by seed or tokens only."""

    key: str
    kind: str
    name: str
    seed: int
    mix: dict[str, Any]  # settings of `birbal mix`, the seed's included; empty for the base model
    values: dict[str, float] = field(default_factory=dict)  # ratios; empty where they can't describe the mix
    tokens: int = 0  # training tokens


@dataclass(frozen=True, slots=True)
class TrialResult:
    """How a trial ended. `rungs`: [optimizer step, objective] in order; the objective is the last one's."""

    spec: TrialSpec
    status: str
    objective: float | None
    rungs: list[list[float]] = field(default_factory=list)
    groups: dict[str, float] = field(default_factory=dict)  # group → held-out loss at the last rung
    tasks: dict[str, float] = field(default_factory=dict)  # the same of each task, source and file
    num_tokens: int = 0
    num_rows: int = 0
    num_unfilled: int = 0  # rows that the mix was to have and the scores did not hold
    mix_sha256: str = ""  # of train.parquet
    validation_sha256: str = ""
    seconds: float = 0.0
    node: str = ""
    error: str = ""

    @property
    def loss(self) -> float:
        """The objective; NaN where there is none."""
        return math.nan if self.objective is None else self.objective

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrialResult:
        """What `asdict` gave."""
        return cls(**{**values, "spec": TrialSpec(**values["spec"])})


def mark_diverged(result: TrialResult) -> TrialResult:
    """The result; a FAILED one where the objective is no finite number, which nothing can be ranked by."""
    if result.objective is None or math.isfinite(result.objective):
        return result
    step = int(result.rungs[-1][0]) if result.rungs else 0
    error = f"its loss is {result.objective} after optimizer step {step}: it diverged (train.optimizer.learning_rate)"
    return replace(result, status=FAILED, objective=None, error=error)


class TrialScheduler:
    """Hands out specs and takes their results, in any order that the results come in.

    `next` gives a spec, or None: while results are missing that decide what comes next, and, with nothing
    `running`, at the end. `earlier`: results of an interrupted run, none of which is run again, and `started`: specs
    of its that have no result, which are run first, as they were. `remember` gets every new spec before it is handed
    out. `seconds_left` is what the budget leaves. Objectives are losses: lower is better. What is proposed depends on
    the seed and on the results so far, not on the session that they came from.
    """

    def __init__(
        self,
        config: TuneConfig,
        earlier: Iterable[TrialResult] = (),
        started: Iterable[TrialSpec] = (),
        remember: Callable[[TrialSpec], None] = lambda spec: None,
        seconds_left: Callable[[], float] = lambda: math.inf,
    ) -> None:
        self.config, self._remember, self.seconds_left = config, remember, seconds_left
        self.results: dict[str, TrialResult] = {result.spec.key: mark_diverged(result) for result in earlier}
        self._again = [spec for spec in started if spec.key not in self.results]
        self._specs = {key: result.spec for key, result in self.results.items()}
        self._specs |= {spec.key: spec for spec in self._again}
        self.left_out = ""  # why there is no predicted trial, once that is known
        self.cut_short = ""  # what the budget left no time for
        self._ratios = searched_ratios(config.search)
        self._start = ratios_of(config.mix)
        base = TrialSpec(BASE_MODEL, BASE, BASE_MODEL, config.seed, {})
        self._named: dict[str, TrialSpec] = {}  # what the settings name: baselines, then mixes
        for name in config.baselines:
            values = self._start if name == "task_score" else {}
            self._named[name] = self._spec(BASELINE, name, baseline_mix(name, config.mix), values)
        for mine, changes in config.mixes.items():
            changed = absolute_paths(changed_mix(config.mix, changes))
            mix = changed.model_dump(mode="json", exclude={"scores", "output", "resources"})
            mix["task_score"]["allow_shortfall"] = True
            self._named[mine] = self._spec(MIX, mine, mix, {})
        # Without a search, trials at its seed would decide nothing.
        self._first = {BASE_MODEL: base} | (self._named if config.num_trials else {})

    @property
    def num_trials(self) -> int:
        """All that will have been run in the end; an estimate while it depends on trials that have not ended."""
        config = self.config
        others = [key for key, spec in self._specs.items() if spec.kind not in (REPEAT, TRANSFER)]
        expected = len(self._first) + config.num_trials + bool(self.config.predicts and not self.left_out)
        if len(others) == expected and all(key in self.results for key in others):
            repeats = len(self._repeats())
            return expected + repeats + (self.config.num_transfers if repeats else 0)
        return expected + self.config.num_repeats + self.config.num_transfers

    @property
    def running(self) -> list[str]:
        """Keys of specs handed out, or to be handed out again, whose result has not come."""
        return [key for key in self._specs if key not in self.results]

    def next(self) -> TrialSpec | None:
        """The next spec, or None."""
        if self._again:
            return self._again.pop(0)
        spec = None if self.cut_short else self._fresh()
        if spec is not None and spec.kind in (PREDICTED, REPEAT, TRANSFER) and not self._fits([spec]):
            self.cut_short = f"the budget ended before {spec.key} and what follows it"
            return None
        if spec is not None:
            self._specs[spec.key] = spec
            self._remember(spec)
        return spec

    def start_again(self, spec: TrialSpec) -> None:
        """Hand this one out once more; what it was doing is lost."""
        self._again.append(spec)

    def tell(self, result: TrialResult) -> None:
        """Take a result in."""
        self.results[result.spec.key] = mark_diverged(result)

    def finalists(self) -> list[str]:
        """What fresh seeds compare with the baselines: `mixes`, the predicted best, the best of the search by loss."""
        found = [r for r in self.of_kind(SEARCH, PREDICTED) if r.status == FINISHED and r.objective is not None]
        found.sort(key=lambda result: (result.spec.kind != PREDICTED, result.objective, result.spec.name))
        return [*self.config.mixes, *(result.spec.name for result in found[: self.config.repeats.top])]

    def of_kind(self, *kinds: str) -> list[TrialResult]:
        """Results of these kinds, by key."""
        return [result for _, result in sorted(self.results.items()) if result.spec.kind in kinds]

    def points(self) -> list[tuple[dict[str, float], float]]:
        """(ratios, loss at the end) of all trials at the search's seed.

        A trial that was stopped early counts with its loss at its last rung, less what trials that went on from there
        lost until their end, on average; losses at different rungs don't compare.
        """
        ended = [r for r in self.of_kind(SEARCH, BASELINE) if r.spec.values and r.objective is not None]
        complete = [result.rungs for result in ended if result.status == FINISHED]
        points = []
        for result in ended:  # an objective of one that failed is None
            place = len(result.rungs) - 1
            falls = [rungs[place][1] - rungs[-1][1] for rungs in complete if len(rungs) > place]
            if result.status == FINISHED:
                points.append((result.spec.values, result.loss))
            elif falls:
                points.append((result.spec.values, result.loss - math.fsum(falls) / len(falls)))
        return points

    def _fresh(self) -> TrialSpec | None:
        config = self.config
        for spec in self._first.values():
            if spec.key not in self._specs:
                return spec
        kinds = {spec.kind for spec in self._specs.values()}
        if not kinds & {PREDICTED, REPEAT, TRANSFER}:
            # Stand-ins, for its time, of a further trial and of what follows the search.
            one = self._first[BASE_MODEL]
            longer = replace(one, tokens=config.transfer.factor * config.proxy.tokens)
            rest = [one] * (1 + config.predicts + config.num_repeats) + [longer] * config.num_transfers
            for number in range(config.num_trials):
                if f"search-{number:03d}" not in self._specs:
                    if self._fits(rest):
                        return self._propose(number)
                    break  # the rest of the budget is for what proves something
        if any(self._specs[key].kind not in (REPEAT, TRANSFER) for key in self.running):
            return None  # what follows depends on all of them
        if self.config.predicts and PREDICTED not in self._specs:
            points, needed = self.points(), len(self._ratios) + 2
            if len(points) >= needed:
                places = [[ratio.place(values[ratio.name]) for ratio in self._ratios] for values, _ in points]
                binary = np.array([ratio.is_binary for ratio in self._ratios])
                best = predicted_best(places, [loss for _, loss in points], binary, config.seed)
                return self._at(PREDICTED, PREDICTED, best)
            self.left_out = (
                f"the predicted mix is left out: {len(points)} trials with ratios have a loss, "
                f"a Gaussian process on {len(self._ratios)} ratios needs {needed}; raise num_trials"
            )
        for spec in self._repeats():
            if spec.key not in self._specs:
                return spec
        if any(self._specs[key].kind == REPEAT for key in self.running):
            return None
        return next((spec for spec in self._transfers() if spec.key not in self._specs), None)

    def _fits(self, specs: Sequence[TrialSpec]) -> bool:
        """Whether the budget has time for these trials, side by side as they run; yes while no trial has ended."""
        ended = [(r.seconds, r.num_tokens) for r in self.results.values() if r.status == FINISHED and r.num_tokens]
        if not ended:
            return self.seconds_left() > 0
        longest = max(seconds * max(1.0, self.config.proxy.tokens / tokens) for seconds, tokens in ended)
        work = sum(longest * max(1.0, spec.tokens / self.config.proxy.tokens) for spec in specs)
        rounds = max(1.0, len(specs) / self.config.resources.max_concurrent)
        return self.seconds_left() > work / len(specs) * math.ceil(rounds)

    def _propose(self, number: int) -> TrialSpec:
        """Sobol points first (Optuna's own quasi-random start is random), then Optuna's Gaussian process."""
        from scipy.stats import qmc

        d, num_initial = len(self._ratios), self.config.num_initial
        if number < num_initial:
            sobol = qmc.Sobol(d, seed=np.random.default_rng(self.config.seed))
            place = sobol.random_base2(max(1, math.ceil(math.log2(num_initial))))[number]
        else:
            place = self._ask_optuna(number)
        return self._at(SEARCH, f"search-{number:03d}", place)

    def _ask_optuna(self, number: int) -> list[float]:
        """A place in the unit cube, from a study made of all results and of what is running."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        axes = {
            ratio.name: optuna.distributions.IntDistribution(0, 1)
            if ratio.is_binary
            else optuna.distributions.FloatDistribution(0, 1)
            for ratio in self._ratios
        }
        sampler = optuna.samplers.GPSampler(seed=self.config.seed * 1000 + number, n_startup_trials=0)
        study = optuna.create_study(sampler=sampler)
        running = [(self._specs[key].values, None) for key in self.running if self._specs[key].kind == SEARCH]
        for values, loss in [*self.points(), *running]:
            place = {ratio.name: ratio.place(values[ratio.name]) for ratio in self._ratios}
            if all(0 <= at <= 1 for at in place.values()):
                params = {name: round(at) if name == "failed_first" else at for name, at in place.items()}
                state = optuna.trial.TrialState.RUNNING if loss is None else optuna.trial.TrialState.COMPLETE
                study.add_trial(optuna.trial.create_trial(state=state, params=params, distributions=axes, value=loss))
        asked = study.ask(axes).params
        return [float(asked[ratio.name]) for ratio in self._ratios]

    def _at(self, kind: str, name: str, place: Sequence[float] | np.ndarray) -> TrialSpec:
        moved = {ratio.name: ratio.at(float(at)) for ratio, at in zip(self._ratios, place, strict=True)}
        values = self._start | moved
        return self._spec(kind, name, mix_of(self.config.mix, values), values)

    def _repeats(self) -> list[TrialSpec]:
        names, config = self.finalists(), self.config
        return self._with_seeds(REPEAT, [*config.baselines, *names], config.repeats.seeds) if names else []

    def _transfers(self) -> list[TrialSpec]:
        """The best of the finalists by its fresh seeds, and all baselines, at `factor` times the tokens."""
        from birbal_ray.tune.stats import by_name, winner

        config = self.config
        best = winner(self.finalists(), [], by_name(self.of_kind(REPEAT)))
        if not config.transfer.factor or best is None:
            return []
        return self._with_seeds(TRANSFER, [best, *config.baselines], config.transfer.seeds, config.transfer.factor)

    def _with_seeds(self, kind: str, names: Sequence[str], num_seeds: int, factor: int = 1) -> list[TrialSpec]:
        """These mixes at every fresh seed, at `factor` times the tokens."""
        found = {spec.name: spec for spec in self._specs.values() if spec.kind in (SEARCH, PREDICTED)}
        first = self._named | found  # of every mix, by its name, one spec
        longer = f"-x{factor}" * (kind == TRANSFER)
        return [
            self._spec(kind, name, first[name].mix, first[name].values, f"{name}{longer}-seed{seed}", seed, factor)
            for seed in range(self.config.seed + 1, self.config.seed + 1 + num_seeds)
            for name in names
        ]

    def _spec(
        self,
        kind: str,
        name: str,
        mix: dict[str, Any],
        values: dict[str, float],
        key: str = "",
        seed: int | None = None,
        factor: int = 1,
    ) -> TrialSpec:
        """A trial of a mix, at the search's seed unless another is given, on `factor` times the proxy's tokens."""
        seed = self.config.seed if seed is None else seed
        mix = {**mix, "seed": seed, "validation_rows_per_task": self.config.validation.rows_per_task}
        return TrialSpec(key or name, kind, name, seed, mix, values, factor * self.config.proxy.tokens)


def best_so_far(results: Sequence[TrialResult]) -> list[float]:
    """The lowest objective of finished trials up to each result, NaN before the first."""
    losses = [result.loss if result.status == FINISHED else math.nan for result in results]
    return [float(best) for best in np.fmin.accumulate(losses)]
