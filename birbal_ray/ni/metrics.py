"""Exact match and ROUGE-L of one answer against its references."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rapidfuzz.distance import LCSseq

from birbal_ray.ni.schema import Task
from birbal_ray.ni.text import canonical, has_token, tokens

EXACT_MATCH, GENERATION = "exact_match", "generation"
ROUGE_L = "rouge_l"
METRIC_OF_LABEL = {EXACT_MATCH: EXACT_MATCH, GENERATION: ROUGE_L}
# Part of a score's identity: raised whenever an answer may get another score. 1 saw only [a-z0-9] in ROUGE-L.
METRIC_VERSION = 2
# A task gets no error-driven share of a mix when no answer can score 1 on more than this part of its instances.
MAX_UNREACHABLE_FRACTION = 0.05


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1.0 if the answer equals any reference, else 0.0; NFC, white and invisible space around them aside."""
    return float(canonical(answer) in {canonical(reference) for reference in references})


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """Largest ROUGE-L F1 in [0, 1] over the references, on the tokens of `ni.text`.

    Equal to rouge-score's (no stemmer) for ASCII text. A text without any token scores 0. The longest
    common subsequence is rapidfuzz's.
    """
    found, best = tokens(answer), 0.0
    for reference in references if found else ():
        wanted = tokens(reference)
        if common := LCSseq.similarity(found, wanted):
            precision, recall = common / len(found), common / len(wanted)
            best = max(best, 2 * precision * recall / (precision + recall))
    return best


def score_answer(label: str, answer: str, references: Sequence[str]) -> float:
    """Score in [0, 1] by the metric that belongs to the task's label."""
    return exact_match(answer, references) if label == EXACT_MATCH else rouge_l(answer, references)


@dataclass(frozen=True, slots=True)
class Unreachable:
    """The instances on which not even a reference scores 1, as a fraction of the usable ones; the commonest cause."""

    num_instances: int
    fraction: float
    reason: str | None


def find_unreachable(
    task: Task, label: str, extract: Callable[[str], str], fits: Callable[[str], bool] = lambda reference: True
) -> Unreachable:
    """Score the references of a task against themselves, as completions that `extract` takes the answer from.

    `fits` says whether a completion may be as long as the reference.
    """
    causes: Counter[str] = Counter()
    usable = [instance.references for instance in task.instances if instance.error is None]
    for references in usable:
        cause = None
        for reference in references:
            cause = _why_below_one(label, reference, references, extract, fits)
            if cause is None:
                break
        if cause is not None:
            causes[cause] += 1
    count = causes.total()
    return Unreachable(count, count / len(usable) if count else 0.0, causes.most_common(1)[0][0] if count else None)


def _why_below_one(
    label: str,
    reference: str,
    references: Sequence[str],
    extract: Callable[[str], str],
    fits: Callable[[str], bool],
) -> str | None:
    if not fits(reference):
        return "the references have more tokens than a completion may have"
    # Without a comparison where the answer is the reference itself: a plan reads millions of them.
    if extract(reference) == reference.strip():
        reachable = label == EXACT_MATCH or has_token(reference)
        return None if reachable else "the references hold no letter, digit or symbol that ROUGE-L counts"
    if score_answer(label, extract(reference), references) == 1.0:
        return None
    return "a blank line in the references: a completion ends there"
