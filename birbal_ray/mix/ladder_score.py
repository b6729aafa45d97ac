"""How well a row was answered, in the eyes of the published 2023 selection."""

from __future__ import annotations

from collections.abc import Sequence

from rapidfuzz.distance import LCSseq

from birbal_ray.ni.metrics import EXACT_MATCH, rouge_l
from birbal_ray.ni.prompt import STOP


def ladder_score(label: str, completion: str, references: Sequence[str], compat: bool) -> float:
    """Exact match: 1.0 if the raw answer equals a reference as a string, else 0.0. Generation: ROUGE-L in [0, 1].

    Generation texts are lower-cased with dots removed, as published. `compat` also reproduces two
    defects: an empty answer (or reference) counts as perfect, and ROUGE-L is that of the `rouge`
    package 1.0.1, which counts distinct words only.
    """
    answer = completion.split(STOP, 1)[0]
    if label == EXACT_MATCH:
        return float(answer in references)
    plain = [reference.replace(".", "").lower() for reference in references]
    answer = answer.strip().replace(".", "").lower()
    if not compat:
        return rouge_l(answer, plain)
    return max((_compat_rouge_l(answer, reference) for reference in plain), default=0.0)


def _compat_rouge_l(answer: str, reference: str) -> float:
    # Published: whichever side is empty is replaced by the other, so the pair scores 1 (less 5e-9).
    # That substitution also stays in force for the row's later references; as the maximum is taken,
    # and the first pair already scores 1, the row's score is the same.
    left, right = answer or reference or "dummy", reference or answer or "dummy"
    return distinct_word_rouge_l(left, right)


def distinct_word_rouge_l(answer: str, reference: str) -> float:
    """F1 of the `rouge` package 1.0.1 (rouge-l, no dots in the texts): over sets of distinct words."""
    hypothesis, target = " ".join(answer.split()).split(" "), " ".join(reference.split()).split(" ")
    common = _distinct_common(target, hypothesis)
    recall, precision = common / len(set(target)), common / len(set(hypothesis))
    return 2.0 * ((precision * recall) / (precision + recall + 1e-8))


def _distinct_common(target: list[str], hypothesis: list[str]) -> int:
    # A word can be in the subsequence twice only if it is twice in both; otherwise its length is the
    # number of distinct words, and the fast library gives it.
    if not _repeated(target) & _repeated(hypothesis):
        return int(LCSseq.similarity(target, hypothesis))
    return len(set(_subsequence(target, hypothesis)))


def _repeated(words: list[str]) -> set[str]:
    seen: set[str] = set()
    twice: set[str] = set()
    for word in words:
        (twice if word in seen else seen).add(word)
    return twice


def _subsequence(first: list[str], second: list[str]) -> list[str]:
    # Which of the longest subsequences is taken decides how many distinct words it has, so the way
    # back must turn as the package does: up only where that is strictly longer.
    width = len(second) + 1
    table = [[0] * width]
    for word in first:
        above, row = table[-1], [0] * width
        for column, other in enumerate(second, 1):
            row[column] = above[column - 1] + 1 if word == other else max(above[column], row[column - 1])
        table.append(row)
    i, j, found = len(first), len(second), []
    while i and j:
        if first[i - 1] == second[j - 1]:
            found.append(first[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found
