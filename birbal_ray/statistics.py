"""What may be claimed from paired differences: interval, p-value, power. Every step that claims something uses this.

Tasks are the population that a claim is about: a row of `differences` holds one number a task, model minus base.
benchmarks/false_claims.py measures how often an interval excludes 0 although there is no difference.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

CONFIDENCE, SIGNIFICANCE, POWER = 0.95, 0.05, 0.8
MIN_TASKS = 6  # below, no interval keeps its promise on skewed differences
MOST_PAIRS = 1_000_000
BETTER, WORSE, NO_DIFFERENCE, TOO_FEW = "better", "worse", "no difference", "too few"


@dataclass(frozen=True, slots=True)
class Difference:
    """A mean paired difference with its 95 % interval. Unbounded ends and a p-value of 1 where there is one pair.

    `detectable`: the smallest true mean difference that so many pairs of this spread show with 80 % power;
    infinite where the spread is unknown.
    """

    num_pairs: int
    mean: float
    low: float
    high: float
    p_value: float
    detectable: float


def outcome(
    low: float, high: float, num_pairs: int, p_adjusted: float | None = None, *, min_pairs: int = MIN_TASKS
) -> str:
    """BETTER (the interval lies above 0), WORSE, NO_DIFFERENCE, or TOO_FEW pairs for a verdict.

    `p_adjusted`: of one comparison among several, by `holm`; then a verdict also needs it below 0.05. The wording is
    the caller's.
    """
    if num_pairs < min_pairs:
        return TOO_FEW
    if p_adjusted is not None and p_adjusted >= SIGNIFICANCE:
        return NO_DIFFERENCE
    return BETTER if low > 0 else WORSE if high < 0 else NO_DIFFERENCE


def paired_difference(differences: Sequence[float] | np.ndarray) -> Difference:
    """The mean of at least one difference, with what may be said about it."""
    values = np.asarray(differences, dtype=float)
    if len(values) < 2:
        return Difference(len(values), float(values.mean()), -math.inf, math.inf, 1.0, math.inf)
    mean, low, high = (float(figure) for figure in interval(values))
    spread = float(values.std(ddof=1))
    return Difference(len(values), mean, low, high, p_value(values), detectable_difference(len(values), spread))


def interval(differences: Any) -> tuple[Any, Any, Any]:
    """(mean, low, high) over the last axis of an array of shape (…, n), n ≥ 2; each of shape (…).

    Student's t interval, widened to hold Hall's interval, which corrects it for skewness by a monotone cubic
    (P. Hall, "On the removal of skewness by transformation", JRSS B 54, 1992). Alone, the t interval excludes
    the true mean of skewed differences too often, and Hall's that of symmetric ones with many zeros.
    """
    values = np.asarray(differences, dtype=float)
    n = values.shape[-1]
    mean, error, skewness = _moments(values)
    reach = _t_quantile(n - 1)
    a = skewness / 3
    safe = np.where(abs(a) < 1e-9, 1.0, a)  # the cubic is the identity where there is no skewness

    def hall(y: float) -> Any:  # inverse of the cubic, in standard errors
        return np.where(
            abs(a) < 1e-9,
            y,
            math.sqrt(n) / safe * (np.cbrt(1 + 3 * a * (y / math.sqrt(n) - skewness / (6 * n))) - 1),
        )

    low, high = mean - error * np.maximum(reach, hall(reach)), mean - error * np.minimum(-reach, hall(-reach))
    return mean, low, high


def p_value(differences: Any) -> float:
    """Two-sided, of the null hypothesis that the true mean is 0; below 0.05 exactly where `interval` excludes 0."""
    from scipy.special import stdtr

    values = np.asarray(differences, dtype=float)
    n = values.shape[-1]
    mean, error, skewness = _moments(values)
    if error == 0:
        return float(mean == 0)
    u = mean / error / math.sqrt(n)
    corrected = math.sqrt(n) * (u + skewness / 3 * u**2 + skewness**2 / 27 * u**3 + skewness / (6 * n))
    statistic = min(abs(mean / error), corrected if mean > 0 else -corrected)
    return float(min(1.0, 2 * stdtr(n - 1, -statistic)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values in the given order (Holm 1979): each below 0.05 bounds the chance of any false claim by 5 %."""
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def detectable_difference(num_pairs: int, deviation: float) -> float:
    """The smallest true mean difference that a two-sided t test finds with 80 % power.

    `deviation`: standard deviation of the paired differences. Infinite with one pair.
    """
    from scipy.special import nctdtrinc

    if num_pairs < 2:
        return math.inf
    # The noncentral t distribution whose lower tail ends at the critical value; the other tail's share is below 1e-4.
    reach = _t_quantile(num_pairs - 1)
    return deviation * float(nctdtrinc(num_pairs - 1, 1 - POWER, reach)) / math.sqrt(num_pairs)


def pairs_needed(difference: float, deviation: float) -> int | None:
    """How many pairs of this spread show a true mean of `difference`; None where no million of them does."""
    sizes = range(2, MOST_PAIRS + 1)
    enough = bisect.bisect_left(sizes, True, key=lambda size: detectable_difference(size, deviation) <= abs(difference))
    return sizes[enough] if enough < len(sizes) else None


def wilson(mean: float, count: int) -> tuple[float, float]:
    """(centre, half the width) of Wilson's interval for the mean of `count` 0/1 scores."""
    z = _t_quantile(math.inf)
    half = z * math.sqrt(mean * (1 - mean) / count + z * z / (4 * count * count))
    return (mean + z * z / (2 * count)) / (1 + z * z / count), half / (1 + z * z / count)


def t_half_width(deviation: float, count: int) -> float:
    """Half the width of the t interval for the mean of `count` scores; infinite with one."""
    return _t_quantile(count - 1) * deviation / math.sqrt(count) if count > 1 else math.inf


def _moments(values: Any) -> tuple[Any, Any, Any]:
    """Over the last axis: mean, standard error, skewness (0 where all values are equal)."""
    n = values.shape[-1]
    mean = values.mean(axis=-1)
    off = values - mean[..., None]
    deviation = values.std(axis=-1, ddof=1)
    flat = deviation <= 1e-12 * np.maximum(abs(mean), 1e-300)  # rounding is no spread
    skewness = np.where(flat, 0.0, (off**3).mean(axis=-1) / np.where(flat, 1.0, deviation) ** 3)
    return mean, np.where(flat, 0.0, deviation) / math.sqrt(n), skewness


def _t_quantile(degrees: float) -> float:
    """Where Student's t distribution has the upper tail of a two-sided 95 % interval; the normal one's for infinity."""
    from scipy.special import ndtri, stdtrit

    level = 0.5 + CONFIDENCE / 2
    return float(ndtri(level) if math.isinf(degrees) else stdtrit(degrees, level))
