"""A contender against the base model, task by task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

TIE = 1e-12
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class TaskPair:
    """Mean scores in [0, 1] of base and contender over the same rows of one task."""

    task: str
    label: str
    held_out: str  # task | instances | unknown
    base: float
    contender: float


def pair_tasks(
    base: Mapping[str, Mapping[str, float]],
    contender: Mapping[str, Mapping[str, float]],
    about: Mapping[str, tuple[str, str]],
) -> list[TaskPair]:
    """Task means over the rows that both scored; a task without such a row is left out.

    `base` and `contender`: task → row id → score. `about`: task → (label, held_out).
    """
    pairs = []
    for name, (label, held_out) in sorted(about.items()):
        one, other = base.get(name, {}), contender.get(name, {})
        shared = sorted(one.keys() & other.keys())
        if shared:
            means = (sum(scores[row_id] for row_id in shared) / len(shared) for scores in (one, other))
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


def compare(pairs: Sequence[TaskPair], num_resamples: int, seed: int) -> dict[str, Any]:
    """The figures of one COMPARISONS row, over at least one task.

    The interval is the percentile interval of a paired bootstrap: tasks are drawn with replacement,
    base and contender together (Efron and Tibshirani 1993, chapter 13). One task gives no spread, so its
    interval is all of [-1, 1].
    """
    base = np.array([pair.base for pair in pairs])
    score = np.array([pair.contender for pair in pairs])
    differences = score - base
    low, high = -1.0, 1.0
    if len(pairs) > 1:
        random = np.random.default_rng(seed)
        # In chunks: 10,000 resamples of 1,600 tasks at once would take 128 MB.
        means = np.concatenate(
            [
                differences[random.integers(0, len(pairs), (min(1000, num_resamples - done), len(pairs)))].mean(axis=1)
                for done in range(0, num_resamples, 1000)
            ]
        )
        tail = (1 - CONFIDENCE) / 2
        low, high = (float(value) for value in np.quantile(means, [tail, 1 - tail]))
    return {
        "num_tasks": len(pairs),
        "base_score": float(base.mean()),
        "score": float(score.mean()),
        "difference": float(differences.mean()),
        "difference_low": low,
        "difference_high": high,
        "num_wins": int((differences > TIE).sum()),
        "num_losses": int((differences < -TIE).sum()),
        "num_ties": int((abs(differences) <= TIE).sum()),
    }
