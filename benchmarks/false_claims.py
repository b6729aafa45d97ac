"""How often an interval excludes 0 although there is no difference: python benchmarks/false_claims.py

Nominal 5 %. Three intervals: a percentile bootstrap over tasks, Student's t, and the one
that birbal_ray.statistics uses, which also holds Hall's skewness-corrected one.
"""

from __future__ import annotations

import argparse

import numpy as np
from scipy.special import stdtrit
from tabulate import tabulate

from birbal_ray.statistics import interval

SIZES = (6, 8, 12, 20, 40)
DRAWS = {  # mean 0 each; zero-inflated: 4 in 5 tasks don't change at all
    "normal": lambda chance, shape: chance.normal(size=shape),
    "exponential": lambda chance, shape: chance.exponential(size=shape) - 1,
    "lognormal": lambda chance, shape: chance.lognormal(size=shape) - np.exp(0.5),
    "zero-inflated, exponential": lambda chance, shape: (
        (chance.random(shape) < 0.2) * chance.exponential(size=shape) - 0.2
    ),
    "zero-inflated, normal": lambda chance, shape: (chance.random(shape) < 0.3) * chance.normal(size=shape),
}


def t_interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(low, high), each (trials,), of values (trials, tasks)."""
    n = values.shape[-1]
    reach = stdtrit(n - 1, 0.975) * values.std(axis=-1, ddof=1) / np.sqrt(n)
    return values.mean(axis=-1) - reach, values.mean(axis=-1) + reach


def bootstrap(values: np.ndarray, chance: np.random.Generator, resamples: int = 999) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) percentile interval; a loop over trials keeps memory flat."""
    n = values.shape[1]
    ends = [np.quantile(row[chance.integers(0, n, (resamples, n))].mean(axis=1), [0.025, 0.975]) for row in values]
    return tuple(np.array(ends).T)


def rate(low: np.ndarray, high: np.ndarray) -> float:
    """Share of trials whose interval excludes 0."""
    return float(((low > 0) | (high < 0)).mean())


def false_claims(num_trials: int, seed: int = 0, bootstrap_trials: int = 1000) -> list[dict[str, object]]:
    """One row per distribution and number of tasks."""
    chance, rows = np.random.default_rng(seed), []
    for name, draw in DRAWS.items():
        for size in SIZES:
            values = draw(chance, (num_trials, size))
            _, low, high = interval(values)
            t_low, t_high = t_interval(values)
            widening = float(np.median((high - low) / np.maximum(t_high - t_low, 1e-12)))
            row = {"differences": name, "tasks": size}
            if bootstrap_trials:
                row["bootstrap"] = rate(*bootstrap(values[:bootstrap_trials], chance))
            rows.append(row | {"t": rate(t_low, t_high), "ours": rate(low, high), "width / t's": widening})
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=20_000)
    print(tabulate(false_claims(parser.parse_args().trials), headers="keys", floatfmt=".3f"))
