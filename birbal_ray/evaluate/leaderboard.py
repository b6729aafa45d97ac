"""From raw metrics to win rates, scores, ranks: the maths of the LLM Efficiency Challenge, and its teams' files."""

from __future__ import annotations

import json
import math
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

from pydantic import ConfigDict, Field, ValidationError, field_validator

from birbal_ray.ni.reader import unique_keys
from birbal_ray.settings import ConfigError, Settings, explain, nearest

Metrics = Mapping[str, float | None]  # metric name → value in [0, 1]; None, or no entry: missing
Teams = Mapping[str, Metrics]

SMALLEST = math.ulp(0.0)  # 4.9e-324: what a win rate of zero counts as in a geometric mean


@dataclass(frozen=True, slots=True)
class Metric:
    """A raw metric: its name as published, the scenario whose win rate it is part of, its direction."""

    name: str
    scenario: str
    lower_is_better: bool


def _metrics() -> Iterable[Metric]:
    exact, thrice = ("EM",), ("EM", "EM (Robustness)", "EM (Fairness)")
    biases = tuple(f"{kind} ({group})" for kind in ("Stereotypes", "Representation") for group in ("race", "gender"))
    ethics = tuple(f"ethics_{part}" for part in ("justice", "commonsense", "virtue", "deontology", "utilitarianism"))
    for scenario, subsets, measures in (
        ("MMLU", ("MMLU",), thrice),
        ("TruthfulQA", ("TruthfulQA",), thrice),
        ("BIG-bench", ("BIG-bench",), exact),
        ("GSM8K", ("GSM8K",), exact),
        ("BBQ", ("BBQ",), exact),
        ("sam_sum", ("sam_sum",), ("ROUGE-2", *biases)),
        ("corr2cause", ("corr2cause",), exact),
        ("MATH", ("MATH (chain-of-thoughts)",), ("Equivalent (chain of thought)",)),
        ("ethics", ethics, thrice),
    ):
        for subset in subsets:
            for measure in measures:
                yield Metric(f"{subset} - {measure}", scenario, lower_is_better=measure in biases)


METRICS = {metric.name: metric for metric in _metrics()}  # 31, in published order
SCENARIOS = tuple(dict.fromkeys(metric.scenario for metric in METRICS.values()))  # nine
OPEN, HIDDEN = SCENARIOS[:5], SCENARIOS[5:]
SCORES = {"Score_open": OPEN, "Score_hidden": HIDDEN}
DERIVED = {"Score_full", *SCORES, *(f"{name} Mean Win Rate" for name in SCENARIOS)}  # in published tables, not read
PUBLISHED_FILE = "teams_4090.json"


@dataclass(frozen=True, slots=True)
class Standing:
    """A team's place. `win_rates`: scenario → [0, 1). Teams with the same Score_full share a rank."""

    rank: int
    team: str
    win_rates: Mapping[str, float]
    score_open: float
    score_hidden: float
    score_full: float
    added: bool = False


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """A team's place in the whole table, then with one other left out: its name → (rank among the rest, Score_full)."""

    rank: int
    team: str
    score_full: float
    without: Mapping[str, tuple[int, float]]

    @property
    def ranks(self) -> tuple[int, int]:
        """(best, worst) rank over the tables with one team left out."""
        ranks = [rank for rank, _ in self.without.values()]
        return min(ranks), max(ranks)

    @property
    def scores(self) -> tuple[float, float]:
        """(lowest, highest) Score_full over the tables with one team left out."""
        scores = [score for _, score in self.without.values()]
        return min(scores), max(scores)


def standings(teams: Teams, added: Collection[str] = ()) -> list[Standing]:
    """All teams by falling Score_full, then name; those in `added` are marked. The order of `teams` changes nothing.

    All of them count in every win rate. Only the names in METRICS are read; values must be finite.
    """
    rates = metric_win_rates(teams)
    places = []
    for team in teams:
        scenarios = {
            name: fmean(rates[team][metric.name] for metric in METRICS.values() if metric.scenario == name)
            for name in SCENARIOS
        }
        opened, hidden = (geometric_mean([scenarios[name] for name in names]) for names in SCORES.values())
        places.append(Standing(0, team, scenarios, opened, hidden, opened / 3 + 2 * hidden / 3, team in added))
    places.sort(key=lambda place: (-place.score_full, place.team))
    scores = [place.score_full for place in places]
    return [replace(place, rank=1 + scores.index(place.score_full)) for place in places]


def leave_one_out(teams: Teams) -> list[Sensitivity]:
    """How far the place of each of at least two teams depends on who else takes part, in the order of the standings."""
    reduced = {
        absent: {place.team: place for place in standings({team: teams[team] for team in teams if team != absent})}
        for absent in teams
    }
    found = []
    for place in standings(teams):
        others = {absent: table[place.team] for absent, table in reduced.items() if absent != place.team}
        without = {absent: (other.rank, other.score_full) for absent, other in others.items()}
        found.append(Sensitivity(place.rank, place.team, place.score_full, without))
    return found


def metric_win_rates(teams: Teams) -> dict[str, dict[str, float]]:
    """team → metric → (teams strictly worse + 1/k when k > 1 teams share the value) / all teams.

    A missing value is worse than any; teams that lack it share it. Values are shared when equal to
    the last bit, as in the published table (docs/decisions/0030).
    """
    rates: dict[str, dict[str, float]] = {team: {} for team in teams}
    for metric in METRICS.values():
        found = {team: values.get(metric.name) for team, values in teams.items()}
        sign = -1 if metric.lower_is_better else 1
        goodness = {team: -math.inf if value is None else sign * value for team, value in found.items()}
        ascending = sorted(goodness.values())
        for team, value in goodness.items():
            worse = bisect_left(ascending, value)
            sharing = bisect_right(ascending, value) - worse
            rates[team][metric.name] = (worse + (1 / sharing if sharing > 1 else 0)) / len(teams)
    return rates


def zeroed_scores(places: Sequence[Standing]) -> list[tuple[str, str]]:
    """(team, sentence) for each score that a win rate of zero brings down, whatever the team's other win rates are."""
    return [
        (place.team, f"win rate 0 on {' and '.join(zero)}, so {score} is next to 0 whatever the others are")
        for place in places
        for score, scenarios in SCORES.items()
        if (zero := [name for name in scenarios if place.win_rates[name] == 0])
    ]


def missing_metrics(teams: Teams) -> list[tuple[str, str]]:
    """(team, sentence) for each team that has no value for some metrics, which it names in published order."""
    return [
        (team, f"{len(missing)} of {len(METRICS)} metrics missing, counted as worst: {', '.join(missing)}")
        for team, values in teams.items()
        if (missing := [name for name in METRICS if values.get(name) is None])
    ]


def geometric_mean(rates: Sequence[float]) -> float:
    """Geometric mean; a zero counts as the smallest positive double. By logarithms: the product would underflow."""
    return math.exp(math.fsum(math.log(max(rate, SMALLEST)) for rate in rates) / len(rates))


def place_models(
    files: Iterable[Path], folders: Mapping[Path, str] = {}
) -> tuple[dict[str, Metrics], list[Standing], list[tuple[str, str]]]:
    """(teams, their standings, what to know): the published teams, and the models of results files among them.

    What to know: (team, sentence) of what the files say, and lack. Where a model's name is taken, what `folders` has
    for its file is appended. Raises ConfigError for a name that is taken otherwise, and a file that can't be used.
    """
    teams: dict[str, Metrics] = dict(load_published())
    added: dict[str, Metrics] = {}
    notes = []
    for file in files:
        name, values, remark = load_results(file)
        if name in teams and file in folders:
            name += f" ({folders[file]})"
        if name in teams:
            raise ConfigError(f"{file}: team {name!r} is in the table already; give the model another name")
        teams[name] = added[name] = values
        notes += [(name, remark)] if remark else []
    return teams, standings(teams, added), [*notes, *missing_metrics(added)]


def load_published() -> dict[str, Metrics]:
    """The eight teams on the final leaderboard of the challenge's RTX 4090 track; the file names its source."""
    content = resources.files("birbal_ray.evaluate") / PUBLISHED_FILE
    return {one["team"]: one["metrics"] for one in json.loads(content.read_text(encoding="utf-8"))["teams"]}


class Results(Settings):
    """What a results file says of one model; win rates and scores are left out."""

    model_config = ConfigDict(extra="ignore", strict=True)

    team: str = Field(pattern=r"\S")
    metrics: dict[str, Annotated[float, Field(ge=0, le=1)] | None]
    note: str | None = None
    comparable: bool | None = None

    @field_validator("metrics", mode="before")
    @classmethod
    def _known(cls, metrics: Any) -> Any:
        if not isinstance(metrics, dict):
            return metrics
        values = {name: value for name, value in metrics.items() if name not in DERIVED}
        for name in values.keys() - METRICS.keys():
            raise ValueError(f"unknown metric {name!r}{nearest(name, METRICS)}")
        return values


def load_results(file: Path) -> tuple[str, Metrics, str]:
    """One model, `{"team": …, "metrics": {…}}` → (name, values, what the file says of them: comparable or not, why).

    Raises ConfigError that names file and metric.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"), object_pairs_hook=unique_keys)
        found = Results.model_validate(content)
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file") from None
    except ValidationError as error:
        raise ConfigError(f"{file}: {explain(Results, error)}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: can't be read as JSON ({error})") from None
    if found.comparable is None:
        return found.team, found.metrics, found.note or ""
    words = "comparable" if found.comparable else "not comparable"
    return found.team, found.metrics, f"{words}: {found.note or 'no reason given'}"
