"""How near one answer comes to its references, by the definitions that HELM and the leaderboard use."""

from __future__ import annotations

import functools
import re
import string
from collections.abc import Sequence
from typing import Any

_ARTICLE = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1.0 if the answer equals a reference, outer white space aside; else 0.0. An empty answer scores 0.0."""
    stripped = answer.strip()
    return float(bool(stripped) and stripped in {reference.strip() for reference in references})


def quasi_exact_match(answer: str, references: Sequence[str]) -> float:
    """1.0 if the answer equals a reference once both are `normalised`; else 0.0. An empty answer scores 0.0."""
    return float(
        bool(answer.strip()) and normalised(answer) in {normalised(reference) for reference in references},
    )


def normalised(text: str) -> str:
    """Lower case, without ASCII punctuation, then without the words a, an, the; white space is one blank.

    The order matters: "the-cat" becomes "thecat". The rule is HELM's, which has it from the QuAC scorer.
    """
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split())


def rouge_2(answer: str, references: Sequence[str]) -> float:
    """Largest ROUGE-2 F1 in [0, 1] over the references: shared pairs of neighbouring words, stemmed (as in HELM).

    A text of fewer than two words has no pair and scores 0.0.
    """
    scorer = _rouge_2_scorer()
    return max((float(scorer.score(reference, answer)["rouge2"].fmeasure) for reference in references), default=0.0)


@functools.cache
def _rouge_2_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # imports nltk: 1 s

    return RougeScorer(["rouge2"], use_stemmer=True)
