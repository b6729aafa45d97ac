"""Points of the search as mixes: ratios in, settings of `birbal mix` out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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


@dataclass(frozen=True, slots=True)
class Point:
    """Sampling ratios. Fractions in [0, 1]: of the rows from tasks, and, per source, of the whole mix."""

    gamma: float
    exact_match_fraction: float
    failed_first: bool
    source_fractions: dict[str, float] = field(default_factory=dict)

    def values(self) -> dict[str, float]:
        """One number per ratio, as tables, plots and the Gaussian process take them."""
        sources = {f"{SOURCE_PREFIX}{name}": value for name, value in sorted(self.source_fractions.items())}
        return {
            "gamma": self.gamma,
            "exact_match_fraction": self.exact_match_fraction,
            "failed_first": float(self.failed_first),
        } | sources

    def moved(self, values: Mapping[str, float]) -> Point:
        """This point with the ratios that `values` names."""
        sources = {
            name.removeprefix(SOURCE_PREFIX): float(value)
            for name, value in values.items()
            if name.startswith(SOURCE_PREFIX)
        }
        return Point(
            float(values.get("gamma", self.gamma)),
            float(values.get("exact_match_fraction", self.exact_match_fraction)),
            bool(values.get("failed_first", self.failed_first)),
            self.source_fractions | sources,
        )


def searched_ratios(search: SearchSettings) -> list[Ratio]:
    """The ratios that a search moves, by the names that `Point.values` uses; sources by name, last."""
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


def point_of(mix: MixConfig) -> Point:
    """The ratios that a configuration has."""
    settings = mix.task_score
    from_tasks = settings.exact_match_budget + settings.generation_budget
    if not from_tasks:
        raise ConfigError("mix.task_score: both budgets are 0; they say how many rows a trial's mix has")
    return Point(
        settings.gamma,
        settings.exact_match_budget / from_tasks,
        settings.failed_first,
        {source.name: source.max_rows / num_rows(mix) for source in mix.sources if source.max_rows},
    )


def mix_of(base: MixConfig, point: Point) -> dict[str, Any]:
    """`base` with the point's ratios and as many rows, as what a YAML file would say."""
    total = num_rows(base)
    rows = {name: round(fraction * total) for name, fraction in point.source_fractions.items()}
    from_tasks = total - sum(rows.values())
    exact_match = round(point.exact_match_fraction * from_tasks)
    settings = base.model_dump(mode="json", exclude={"scores", "output", "resources"})
    settings["task_score"] |= {
        "gamma": point.gamma,
        "failed_first": point.failed_first,
        "exact_match_budget": exact_match,
        "generation_budget": from_tasks - exact_match,
        "allow_shortfall": True,
    }
    for source in settings["sources"]:
        source["max_rows"] = rows.get(source["name"], source["max_rows"])
    return settings


def baseline_mix(name: str, base: MixConfig) -> dict[str, Any]:
    """A mix nobody searched for, with the rows and outside sources of `base`: that policy, with the settings of `base`.

    task_score is `base` itself; birbal_2023 decides its number of rows alone.
    """
    return mix_of(base, point_of(base)) | {"policy": name}
