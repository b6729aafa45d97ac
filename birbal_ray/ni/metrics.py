"""Exact match and ROUGE-L of one answer against its references."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from rapidfuzz.distance import LCSseq

EXACT_MATCH, GENERATION = "exact_match", "generation"
ROUGE_L = "rouge_l"
METRIC_OF_LABEL = {EXACT_MATCH: EXACT_MATCH, GENERATION: ROUGE_L}

_TOKEN = re.compile(r"[a-z0-9]+")


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1.0 if the answer equals any reference, outer white space aside; else 0.0."""
    return float(answer.strip() in {reference.strip() for reference in references})


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """Largest ROUGE-L F1 in [0, 1] over the references, equal to rouge-score's without stemmer.

    Tokens are the [a-z0-9]+ runs of the lower-cased text (rouge_score.tokenize); a text without any
    scores 0. The longest common subsequence is rapidfuzz's.
    """
    tokens = _TOKEN.findall(answer.lower())
    if not tokens:
        return 0.0
    return max((_f1(tokens, _TOKEN.findall(reference.lower())) for reference in references), default=0.0)


def score_answer(label: str, answer: str, references: Sequence[str]) -> float:
    """Score in [0, 1] by the metric that belongs to the task's label."""
    return exact_match(answer, references) if label == EXACT_MATCH else rouge_l(answer, references)


def mean_interval(label: str, scores: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high): a 95 % interval for a task's mean score.

    Wilson's interval for exact match (0/1 scores), the normal one clipped to [0, 1] for ROUGE-L;
    NaNs when there are no scores.
    """
    count = len(scores)
    if count == 0:
        return math.nan, math.nan, math.nan
    mean, z = sum(scores) / count, 1.959963984540054
    if label == EXACT_MATCH:
        centre = (mean + z * z / (2 * count)) / (1 + z * z / count)
        half = z * math.sqrt(mean * (1 - mean) / count + z * z / (4 * count * count)) / (1 + z * z / count)
        return mean, max(0.0, min(centre - half, mean)), min(1.0, max(centre + half, mean))
    variance = sum((score - mean) ** 2 for score in scores) / (count - 1) if count > 1 else 0.0
    half = z * math.sqrt(variance / count)
    return mean, max(0.0, mean - half), min(1.0, mean + half)


def _f1(answer: list[str], reference: list[str]) -> float:
    if not reference:
        return 0.0
    common = LCSseq.similarity(answer, reference)
    precision, recall = common / len(answer), common / len(reference)
    return 2 * precision * recall / (precision + recall) if common else 0.0
