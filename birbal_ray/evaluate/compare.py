"""A model against the base model, task by task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from birbal_ray.statistics import holm, paired_difference

TIE = 1e-12


@dataclass(frozen=True, slots=True)
class TaskPair:
    """Mean scores in [0, 1] of the base model and another one over the same rows of one task."""

    task: str
    label: str
    held_out: str  # task | instances | unknown
    base: float
    score: float


def pair_tasks(
    base: Mapping[str, Mapping[str, float]],
    other: Mapping[str, Mapping[str, float]],
    about: Mapping[str, tuple[str, str]],
) -> list[TaskPair]:
    """Task means over the rows that both scored; a task without such a row is left out.

    `base` and `other`: task → row id → score. `about`: task → (label, held_out).
    """
    pairs = []
    for name, (label, held_out) in sorted(about.items()):
        one, two = base.get(name, {}), other.get(name, {})
        if shared := sorted(one.keys() & two.keys()):
            means = (sum(scores[row_id] for row_id in shared) / len(shared) for scores in (one, two))
            pairs.append(TaskPair(name, label, held_out, *means))
    return pairs


def scopes(pairs: Sequence[TaskPair]) -> dict[str, list[TaskPair]]:
    """The sets of tasks that are compared: all, per label, and per kind of being held out (where both exist)."""
    found = {"all": list(pairs)}
    for label in sorted({pair.label for pair in pairs}):
        found[label] = [pair for pair in pairs if pair.label == label]
    if len({pair.held_out for pair in pairs}) > 1:
        for kind in sorted({pair.held_out for pair in pairs}):
            found[f"held-out {'tasks' if kind == 'task' else kind}"] = [p for p in pairs if p.held_out == kind]
    return found


def compare(pairs: Sequence[TaskPair]) -> dict[str, Any]:
    """The figures of one COMPARISONS row, over at least one task. One task gives no spread: its interval is [-1, 1]."""
    differences = [pair.score - pair.base for pair in pairs]
    found = paired_difference(differences)
    return {
        "num_tasks": len(pairs),
        "base_score": math.fsum(pair.base for pair in pairs) / len(pairs),
        "score": math.fsum(pair.score for pair in pairs) / len(pairs),
        "difference": found.mean,
        "difference_low": max(-1.0, found.low),
        "difference_high": min(1.0, found.high),
        "p_value": found.p_value,
        "detectable_difference": found.detectable if math.isfinite(found.detectable) else None,
        "num_wins": sum(difference > TIE for difference in differences),
        "num_losses": sum(difference < -TIE for difference in differences),
        "num_ties": sum(abs(difference) <= TIE for difference in differences),
    }


def adjust(rows: Sequence[Mapping[str, Any]], primary: Mapping[str, str]) -> list[dict[str, Any]]:
    """COMPARISONS rows with `is_primary` and `p_adjusted`.

    The row that has all values of `primary` (model, prompt_format, scope) was named beforehand and keeps its p-value;
    those of all others are adjusted together by Holm's method.
    """
    chosen = [all(row[key] == value for key, value in primary.items()) for row in rows]
    others = iter(holm([row["p_value"] for row, is_primary in zip(rows, chosen, strict=True) if not is_primary]))
    return [
        {**row, "is_primary": is_primary, "p_adjusted": row["p_value"] if is_primary else next(others)}
        for row, is_primary in zip(rows, chosen, strict=True)
    ]


def gate_failures(comparisons: Sequence[Mapping[str, Any]], delta: float) -> list[str]:
    """One line for each comparison whose mean lies more than `delta` under the base model's, whatever its interval."""
    return [
        f"{row['model']} is {-row['difference']:.3f} worse than the base model, {row['prompt_format']}, {row['scope']} "
        f"({row['num_tasks']} tasks; --gate allows {delta:g})"
        for row in comparisons
        if row["difference"] < -delta
    ]
