"""Points of the search as mixes: ratios in, settings of `birbal mix` out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from birbal_ray.mix.config import MixConfig
from birbal_ray.settings import ConfigError
from birbal_ray.tune.config import SearchSettings

SOURCE_PREFIX = "source:"


@dataclass(frozen=True, slots=True)
class Ratio:
    """One searched number, between `low` and `high`; a binary one is 0 or 1."""

    name: str
    low: float
    high: float
    is_binary: bool = False

    def at(self, place: float) -> float:
        """The value at a place in [0, 1]."""
        return float(place >= 0.5) if self.is_binary else self.low + place * (self.high - self.low)

    def place(self, value: float) -> float:
        """The inverse of `at`; outside [0, 1] for a value outside the range."""
        return (value - self.low) / (self.high - self.low)


def searched_ratios(search: SearchSettings) -> list[Ratio]:
    """The ratios that a search moves, by the names that `ratios_of` uses; sources by name, last."""
    found = []
    for name in ("gamma", "exact_match_fraction"):
        if range_ := getattr(search, name):
            found.append(Ratio(name, range_.low, range_.high))
    if search.failed_first:
        found.append(Ratio("failed_first", 0.0, 1.0, is_binary=True))
    return found + [
        Ratio(f"{SOURCE_PREFIX}{name}", range_.low, range_.high)
        for name, range_ in sorted(search.source_fractions.items())
    ]


def num_rows(mix: MixConfig) -> int:
    """Rows of every trial's mix: what `mix` asks for in all."""
    sources = sum(source.max_rows or 0 for source in mix.sources)
    return mix.task_score.exact_match_budget + mix.task_score.generation_budget + sources


def ratios_of(mix: MixConfig) -> dict[str, float]:
    """The ratios that a configuration has, by name: one number each, as tables, plots and the Gaussian process take it.

    Fractions in [0, 1]: of the rows from tasks, and, per source, of the whole mix. `failed_first` is 0 or 1.
    """
    settings = mix.task_score
    from_tasks = settings.exact_match_budget + settings.generation_budget
    if not from_tasks:
        raise ConfigError("mix.task_score: both budgets are 0; they say how many rows a trial's mix has")
    sources = {f"{SOURCE_PREFIX}{one.name}": one.max_rows / num_rows(mix) for one in mix.sources if one.max_rows}
    return {
        "gamma": settings.gamma,
        "exact_match_fraction": settings.exact_match_budget / from_tasks,
        "failed_first": float(settings.failed_first),
        **dict(sorted(sources.items())),
    }


def mix_of(base: MixConfig, ratios: Mapping[str, float]) -> dict[str, Any]:
    """`base` with these ratios (all that `ratios_of` names) and as many rows, as what a YAML file would say."""
    total = num_rows(base)
    rows = {name: round(at * total) for name, at in ratios.items() if name.startswith(SOURCE_PREFIX)}
    from_tasks = total - sum(rows.values())
    exact_match = round(ratios["exact_match_fraction"] * from_tasks)
    settings = base.model_dump(mode="json", exclude={"scores", "output", "resources"})
    settings["task_score"] |= {
        "gamma": ratios["gamma"],
        "failed_first": bool(ratios["failed_first"]),
        "exact_match_budget": exact_match,
        "generation_budget": from_tasks - exact_match,
        "allow_shortfall": True,
    }
    for source in settings["sources"]:
        source["max_rows"] = rows.get(f"{SOURCE_PREFIX}{source['name']}", source["max_rows"])
    return settings


def baseline_mix(name: str, base: MixConfig) -> dict[str, Any]:
    """A mix nobody searched for, with the rows and outside sources of `base`: that policy, with the settings of `base`.

    task_score is `base` itself; birbal_2023 decides its number of rows alone.
    """
    return mix_of(base, ratios_of(base)) | {"policy": name}
