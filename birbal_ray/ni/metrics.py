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
    # Each answer once: a classification task has a few among its thousands of instances.
    usable = Counter(instance.references for instance in task.instances if instance.error is None)
    causes: Counter[str] = Counter()
    for references, number in usable.items():
        if reason := _why_below_one(label, references, extract, fits):
            causes[reason] += number
    count = causes.total()
    return Unreachable(count, count / usable.total() if count else 0.0, causes.most_common(1)[0][0] if count else None)


def _why_below_one(
    label: str, references: Sequence[str], extract: Callable[[str], str], fits: Callable[[str], bool]
) -> str | None:
    """Why none of an instance's references scores 1 (the last one's reason), or None."""
    reason = None
    for reference in references:
        if not fits(reference):
            reason = "the references have more tokens than a completion may have"
        # Without a comparison where the answer is the reference itself: a plan reads millions of them.
        elif extract(reference) == reference.strip():
            if label == EXACT_MATCH or has_token(reference):
                return None
            reason = "the references hold no letter, digit or symbol that ROUGE-L counts"
        elif score_answer(label, extract(reference), references) == 1.0:
            return None
        else:
            reason = "a blank line in the references: a completion ends there"
    return reason
