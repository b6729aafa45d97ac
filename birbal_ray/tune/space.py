"""Points of the search as settings of `birbal mix`, and the point that a Gaussian process predicts to be the best."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from birbal_ray.mix.config import MixConfig
from birbal_ray.settings import ConfigError
from birbal_ray.tune.config import SearchSettings, num_rows

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


NUM_CANDIDATES = 4096
NUM_STARTS = 3
WIDTHS = (1.0, 0.2, 0.04, 0.008)


def predicted_best(points: Any, losses: Any, is_binary: Any, seed: int) -> np.ndarray:
    """The point with the lowest predicted mean loss: (d,) in the unit cube, from points (n, d) and losses (n,).

    `is_binary` (d,): coordinates that are 0 or 1. Matérn 5/2 kernel with a length scale for each coordinate, noise
    and amplitude fitted by maximum a posteriori (Rasmussen and Williams 2006, chapters 4 and 5). Deterministic.
    """
    from scipy.linalg import cho_solve
    from scipy.optimize import minimize
    from scipy.stats import qmc

    x, y = np.asarray(points, dtype=float), np.asarray(losses, dtype=float)
    d = x.shape[1]
    center, scale = y.mean(), y.std() or 1.0
    y = (y - center) / scale
    chance = np.random.default_rng(seed)

    def negative_log_posterior(theta: np.ndarray) -> float:  # theta: log length scales (d), log amplitude, log noise
        chol = _cholesky(x, theta)
        alpha = cho_solve((chol, True), y)
        fit = 0.5 * y @ alpha + np.log(np.diag(chol)).sum()
        # Priors: the loss changes on the scale of the cube, most of its spread is signal, some is noise.
        lengths, amplitude, noise = theta[:d], theta[d], theta[d + 1]
        return float(
            fit + 0.5 * (((lengths - math.log(0.7)) / 0.8) ** 2).sum() + 0.5 * amplitude**2 + 0.5 * (noise + 2) ** 2
        )

    starts = [np.r_[np.full(d, math.log(0.7)), 0.0, -2.0]]
    starts += [starts[0] + chance.normal(0, 0.7, d + 2) for _ in range(NUM_STARTS - 1)]
    bounds = [(-3.0, 3.0)] * d + [(-4.0, 4.0), (-9.0, 2.0)]
    fits = [minimize(negative_log_posterior, start, method="L-BFGS-B", bounds=bounds) for start in starts]
    theta = min(fits, key=lambda fit: fit.fun).x
    alpha = cho_solve((_cholesky(x, theta), True), y)

    best, cube = np.full(d, 0.5), qmc.Sobol(d, seed=chance).random(NUM_CANDIDATES) - 0.5
    for width in WIDTHS:  # all of the cube, then closer around the best
        candidates = np.vstack([(best + width * cube).clip(0, 1), x, best])
        candidates[:, is_binary] = candidates[:, is_binary].round()
        best = candidates[np.argmin(_kernel(candidates, x, theta) @ alpha)]
    return np.asarray(best)


def _kernel(a: np.ndarray, b: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """(m, d), (n, d) → (m, n)."""
    d = a.shape[1]
    off = (a[:, None] - b[None]) / np.exp(theta[:d])
    r = np.sqrt(5 * (off**2).sum(axis=-1))
    return np.exp(theta[d]) * (1 + r + r**2 / 3) * np.exp(-r)


def _cholesky(x: np.ndarray, theta: np.ndarray) -> np.ndarray:
    d = x.shape[1]
    return np.linalg.cholesky(_kernel(x, x, theta) + (np.exp(theta[d + 1]) + 1e-8) * np.eye(len(x)))
