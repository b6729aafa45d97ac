"""How many rows each task gives to the mix, by each selection policy.

Pure functions on plain values. `task_score` spreads a budget by what the model gets wrong, `uniform` evenly,
`proportional` by the tasks' sizes; `birbal_2023` is the ladder of the published 2023 recipe
(data_prep/process_one_word_response_file.py and prepare_generation_tasks_dataset.py of
Upaya07/NeurIPS-llm-efficiency-challenge).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

TASK_SCORE, BIRBAL_2023, UNIFORM, PROPORTIONAL = "task_score", "birbal_2023", "uniform", "proportional"

LADDER_CAPS = (350, 350, 300, 300, 250, 250, 200, 150, 100, 50)  # by accuracy decile, 0..9
BAND_EDGES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)  # ROUGE-L; band 0 lies below the first edge
LOWEST_BAND_SHARE, OTHER_BAND_SHARE = 0.8, 0.2
LADDER_MAX_WORDS = 800  # instruction and input together; this many or more are left out
LADDER_MAX_INPUT_WORDS = 1100  # generation only, the input alone; more are left out


@dataclass(frozen=True, slots=True)
class TaskDemand:
    """One task that asks for a part of the budget; `task_score` in [0, 1] (1: the model solves it).

    `weight` is what allocate's formula makes of the score, unless it is given.
    """

    name: str
    num_candidates: int
    task_score: float
    weight: int | None = None


@dataclass(frozen=True, slots=True)
class TaskShortfall:
    """A task that has fewer candidates than its share of the budget."""

    name: str
    wanted: int
    num_candidates: int


@dataclass(frozen=True, slots=True)
class Allocation:
    """Rows per task (every task of the demand, zeros included).

    `shortfall` is budget − rows given. `capped_tasks` have fewer candidates than their proportional
    share, which went to other tasks as far as those have candidates.
    """

    budget: int
    counts: dict[str, int]
    shortfall: int
    capped_tasks: tuple[TaskShortfall, ...]

    @property
    def short_tasks(self) -> tuple[TaskShortfall, ...]:
        """The tasks that left the budget unmet; empty when it is met."""
        return self.capped_tasks if self.shortfall else ()


def allocate(budget: int, demands: Sequence[TaskDemand], gamma: float = 1.0, even_fraction: float = 0.0) -> Allocation:
    """Spread `budget` rows over tasks by weight, (1 − task_score)^gamma or given, no task above its candidates.

    `even_fraction` in [0, 1] of the weight goes to all tasks alike, those of weight 0 included.
    The real-valued shares min(candidates, λ·weight) sum to the budget exactly (water-filling);
    whole counts come from them by largest remainder, ties by task name. All in exact integers, to
    which the float weights are scaled, so no platform rounds differently. The order of `demands` doesn't matter.
    A task with weight 0 gets nothing. Each name comes once.
    """
    ordered = sorted(demands, key=lambda demand: demand.name)
    given = {d.name: (1.0 - d.task_score) ** gamma if d.weight is None else d.weight for d in ordered}
    # Times one power of two: exact, since a float's denominator is one.
    ratios = {name: weight.as_integer_ratio() for name, weight in given.items()}
    scale = max((denominator for _, denominator in ratios.values()), default=1)
    weights = {name: numerator * (scale // denominator) for name, (numerator, denominator) in ratios.items()}
    weights = _with_even_part(weights, even_fraction)
    limits = {d.name: d.num_candidates if weights[d.name] else 0 for d in ordered}
    capped, total = [], sum(weights.values())
    wanted = _spread(budget if total else 0, weights, total or 1)
    if budget:
        capped = [
            TaskShortfall(d.name, wanted[d.name], d.num_candidates)
            for d in ordered
            if wanted[d.name] > d.num_candidates or not total
        ]
    available = sum(limits.values())
    if available <= budget:
        return Allocation(budget, limits, budget - available, tuple(capped))
    return Allocation(budget, _water_fill(budget, limits, weights), 0, tuple(capped))


def ladder_cap(accuracy: float, factor: float = 1.0) -> int:
    """Rows an exact-match task may give at most, by its accuracy in [0, 1] (birbal_2023)."""
    return int(LADDER_CAPS[ladder_decile(accuracy)] * factor)


def ladder_decile(accuracy: float) -> int:
    """Accuracy decile 0..9; accuracy 1.0 belongs to 9."""
    return min(int(accuracy * 100) // 10, 9)


def band_quota(number: int, num_rows: int) -> int:
    """How many of a task's `num_rows` rows in a band are drawn: 80 % of the lowest, 20 % of others, rounded down."""
    return math.floor((LOWEST_BAND_SHARE if number == 0 else OTHER_BAND_SHARE) * num_rows)


def band_name(number: int) -> str:
    """`rouge_0.0` … `rouge_0.8`: the lower edge of the band."""
    return f"rouge_{0.0 if number == 0 else BAND_EDGES[number - 1]:.1f}"


def train_size(num_rows: int, eval_fraction: float) -> int:
    """Rows of the training side, at least one of any; the rest, in the same order, is the evaluation side."""
    return max(int((1 - eval_fraction) * num_rows), min(1, num_rows))


def _with_even_part(weights: dict[str, int], fraction: float) -> dict[str, int]:
    """fraction / n + (1 − fraction) · weight / total for n tasks, times n · total · the fraction's denominator."""
    part, of = fraction.as_integer_ratio()
    total, n = sum(weights.values()), len(weights)
    if not total:
        return dict.fromkeys(weights, part)
    return {name: part * total + (of - part) * n * weight for name, weight in weights.items()}


def _water_fill(budget: int, limits: dict[str, int], weights: dict[str, int]) -> dict[str, int]:
    # A task is full when λ·weight reaches its limit; by rising limit/weight they fill one after the other.
    # Two such fractions differ by more than 2^-bits, so whole numbers of 2^-bits order them as they are.
    bits = 2 * max(weights.values()).bit_length()
    counts = dict.fromkeys(limits, 0)
    open_tasks = sorted((n for n in limits if limits[n]), key=lambda n: ((limits[n] << bits) // weights[n], n))
    left, weight_left = budget, sum(weights[name] for name in open_tasks)
    for position, name in enumerate(open_tasks):
        if limits[name] * weight_left > left * weights[name]:
            return counts | _spread(left, {other: weights[other] for other in open_tasks[position:]}, weight_left)
        counts[name] = limits[name]
        left -= limits[name]
        weight_left -= weights[name]
    return counts


def _spread(budget: int, weights: dict[str, int], total: int) -> dict[str, int]:
    """Whole counts of budget·weight/total by largest remainder, ties by name."""
    counts = {name: budget * weight // total for name, weight in weights.items()}
    by_remainder = sorted(weights, key=lambda name: (-(budget * weights[name] % total), name))
    for name in by_remainder[: budget - sum(counts.values())]:
        counts[name] += 1
    return counts
