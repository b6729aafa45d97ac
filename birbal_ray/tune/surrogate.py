"""A regression of the objective on the ratios: its minimum is worth a trial."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

NUM_GUESSES = 8192
RIDGE = 1e-2  # on standardised features


def num_needed(ranges: Mapping[str, Any]) -> int:
    """Points for a regression on these ratios: one more than a linear one has coefficients."""
    return len(ranges) + 2


def predicted_best(
    points: Sequence[tuple[Mapping[str, float], float]], ranges: Mapping[str, Any], seed: int
) -> dict[str, float]:
    """The ratios with the lowest predicted objective, from at least `num_needed` points.

    Quadratic ridge regression (squares and products of the ratios) where there are at least twice as
    many points as coefficients, else a linear one. `ranges`: Optuna distributions by ratio.
    """
    from optuna.distributions import CategoricalDistribution
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import PolynomialFeatures, StandardScaler

    names = sorted(ranges)
    x = np.array([[values[name] for name in names] for values, _ in points])
    y = np.array([objective for _, objective in points])
    num_quadratic = (len(names) + 1) * (len(names) + 2) // 2
    degree = 2 if len(points) >= 2 * num_quadratic else 1
    model = make_pipeline(
        StandardScaler(), PolynomialFeatures(degree, include_bias=False), StandardScaler(), Ridge(RIDGE)
    )
    model.fit(x, y)
    random = np.random.default_rng(seed)
    guesses = np.column_stack(
        [
            random.integers(0, 2, NUM_GUESSES).astype(float)
            if isinstance(ranges[name], CategoricalDistribution)
            else random.uniform(ranges[name].low, ranges[name].high, NUM_GUESSES)
            for name in names
        ]
    )
    best = guesses[int(np.argmin(model.predict(guesses)))]
    return {name: float(value) for name, value in zip(names, best, strict=True)}
