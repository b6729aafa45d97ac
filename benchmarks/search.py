"""Does the search come closer to a known optimum than random trials? python benchmarks/search.py --seeds 20

Four ratios, an interior optimum, 24 trials, noise with a standard deviation of 0.05 on the loss. The search's answer is
the point that a Gaussian process over its trials predicts best; random's is its best trial.
"""

from __future__ import annotations

import argparse

import numpy as np
from tabulate import tabulate

from birbal_ray.tune.config import TuneConfig
from birbal_ray.tune.scheduler import FINISHED, PREDICTED, SEARCH, TrialResult, TrialScheduler

SOURCES = [{"name": name, "max_rows": 20} for name in ("lima", "quac")]
OPTIMUM = {"gamma": 1.6, "exact_match_fraction": 0.34, "source:lima": 0.18, "source:quac": 0.075}
RANGES = {"gamma": (0, 4), "exact_match_fraction": (0.1, 0.9), "source:lima": (0, 0.3), "source:quac": (0, 0.3)}


def distance(values: dict[str, float]) -> float:
    """Euclidean, in the unit cube of the ranges."""
    return float(np.linalg.norm([(values[key] - OPTIMUM[key]) / (high - low) for key, (low, high) in RANGES.items()]))


def compare(seed: int, num_trials: int = 24, noise: float = 0.05) -> tuple[float, float]:
    """(distance of the search's answer, of random's)."""
    fractions = {name: {"low": 0, "high": 0.3} for name in ("lima", "quac")}
    config = TuneConfig(
        seed=seed,
        num_trials=num_trials,
        baselines=[],
        repeats={"top": 0},
        search={"failed_first": False, "source_fractions": fractions},
        mix={"task_score": {"exact_match_budget": 60, "generation_budget": 60}, "sources": SOURCES},
    )
    scheduler, chance = TrialScheduler(config), np.random.default_rng(1000 + seed)
    while (spec := scheduler.next()) is not None:
        loss = 1 + distance(spec.values) ** 2 + noise * chance.normal() if spec.values else 2.0
        scheduler.tell(TrialResult(spec, FINISHED, loss, [[1, loss]]))
    (found,) = scheduler.of_kind(PREDICTED)
    assert len(scheduler.of_kind(SEARCH)) == num_trials
    points = [{key: chance.uniform(*range_) for key, range_ in RANGES.items()} for _ in range(num_trials)]
    losses = [distance(point) ** 2 + noise * chance.normal() for point in points]
    return distance(found.spec.values), distance(points[int(np.argmin(losses))])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    rows = [(seed, *compare(seed)) for seed in range(parser.parse_args().seeds)]
    print(tabulate(rows, headers=["seed", "search", "random"], floatfmt=".3f"))
    print(f"search is closer in {sum(search < random for _, search, random in rows)} of {len(rows)} seeds")
