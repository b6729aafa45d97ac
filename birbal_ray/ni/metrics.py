"""Which metric a task gets, by a rule with overrides above it: exact match, or ROUGE-L on tokens of every script.

English words stand between spaces. Chinese, Japanese, Thai, Khmer, Lao and Burmese are written without
spaces, so here each of their characters is a token and counts as a word.
"""

from __future__ import annotations

import csv
import io
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import regex
from rapidfuzz.distance import LCSseq

from birbal_ray.ni.schema import Task, TaskError, read_text

EXACT_MATCH, GENERATION = "exact_match", "generation"
ROUGE_L = "rouge_l"
METRIC_OF_LABEL = {EXACT_MATCH: EXACT_MATCH, GENERATION: ROUGE_L}
# Part of a score's identity: raised whenever an answer may get another score. 1 saw only [a-z0-9] in ROUGE-L.
METRIC_VERSION = 2
# A task gets no error-driven share of a mix when no answer can score 1 on more than this part of its instances.
MAX_UNREACHABLE_FRACTION = 0.05

_ASCII_TOKEN = re.compile(r"[a-z0-9]+")
# A letter or digit of a script without spaces, with the marks on it. ー, 々, 〆 are shared by several scripts.
_CHARACTER = r"[\p{L}\p{N}&&[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Khmer}\p{Lao}\p{Myanmar}ー々〆〇]]\p{M}*"
# Emoji and other pictures, which may be a whole answer; not the signs that decorate a word.
_SYMBOL = r"[[\p{So}🏻-🏿]--[©®°\uFFFC\uFFFD]]"
_WORD = rf"(?:(?!{_CHARACTER})[\p{{L}}\p{{M}}\p{{N}}])+"
_TOKEN = regex.compile(rf"(?V1){_CHARACTER}|{_SYMBOL}|{_WORD}")
_SPACELESS = regex.compile(rf"(?V1){_CHARACTER}")
_INVISIBLE = regex.compile(r"\p{Default_Ignorable_Code_Point}+")  # zero-width, joiners, soft hyphen, variants
_EDGES = regex.compile(r"^[\s\p{Default_Ignorable_Code_Point}]+|[\s\p{Default_Ignorable_Code_Point}]+$")


def tokens(text: str) -> list[str]:
    """The text's tokens, in order; those of rouge-score (without stemmer) where the text is ASCII.

    Other text is NFKC and case-folded, invisible characters are removed; a token is a run of letters,
    marks and digits, one character of a script without spaces, or one symbol such as an emoji.
    """
    if text.isascii():
        return _ASCII_TOKEN.findall(text.lower())
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return _TOKEN.findall(_INVISIBLE.sub("", folded))


def has_token(text: str) -> bool:
    """Whether `tokens` finds any."""
    return bool(_ASCII_TOKEN.search(text.lower()) if text.isascii() else tokens(text))


def count_words(text: str) -> int:
    """Words between white space; a word of a script without spaces counts its characters."""
    if text.isascii():
        return len(text.split())
    return sum(len(_TOKEN.findall(word)) if _SPACELESS.search(word) else 1 for word in text.split())


def canonical(text: str) -> str:
    """The text for a comparison character by character: NFC, without white space or invisible characters around it."""
    return text.strip() if text.isascii() else _EDGES.sub("", unicodedata.normalize("NFC", text))


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1.0 if the answer equals any reference, else 0.0; NFC, white and invisible space around them aside."""
    return float(canonical(answer) in {canonical(reference) for reference in references})


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """Largest ROUGE-L F1 in [0, 1] over the references, on `tokens`.

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


MAX_SHORT_WORDS = 5
OPEN_ENDED_CATEGORIES = frozenset({"Title Generation", "Question Generation", "Wrong Candidate Generation"})


@dataclass(frozen=True, slots=True)
class Label:
    """exact_match or generation, and why."""

    value: str
    reason: str


def label_task(task: Task, overrides: dict[str, Label] | None = None) -> Label:
    """The override for this task, else the rule's label.

    Rule: exact match for Program Execution, and where the 95th percentile of reference length is at
    most 5 words and the category is not an open-ended one; generation otherwise.
    """
    if overrides and task.name in overrides:
        return overrides[task.name]
    if "Program Execution" in task.categories:
        return Label(EXACT_MATCH, "Program Execution: one computed answer")
    references = Counter(reference for instance in task.instances for reference in instance.references)
    lengths = sorted(words for reference, number in references.items() for words in [count_words(reference)] * number)
    words = lengths[math.ceil(0.95 * len(lengths)) - 1] if lengths else 0  # 95th percentile, nearest rank
    open_ended = sorted(OPEN_ENDED_CATEGORIES.intersection(task.categories))
    if words > MAX_SHORT_WORDS:
        return Label(GENERATION, f"p95 of reference length is {words} words > {MAX_SHORT_WORDS}")
    if open_ended:
        return Label(GENERATION, f"p95 {words} words, but open-ended category {open_ended[0]}")
    return Label(EXACT_MATCH, f"p95 of reference length is {words} words <= {MAX_SHORT_WORDS}")


def default_overrides() -> dict[str, Label]:
    """The overrides that come with the package."""
    return read_overrides(Path(str(resources.files("birbal_ray.ni"))) / "data" / "label_overrides.csv")


def read_overrides(file: Path) -> dict[str, Label]:
    """Overrides from a CSV with the columns name,label,reason.

    Raises TaskError naming the file and line when the columns or a label are others, or a name comes twice.
    """
    if not file.exists():
        raise TaskError(f"{file}: no such file (label overrides)")
    with io.StringIO(read_text(file), newline="") as handle:
        reader = csv.DictReader(handle)
        if not {"name", "label"} <= set(reader.fieldnames or []):
            raise TaskError(f"{file}: columns are {reader.fieldnames}, expected name,label,reason")
        overrides = {}
        for row in reader:
            if row["label"] not in (EXACT_MATCH, GENERATION):
                raise TaskError(
                    f"{file} line {reader.line_num}: label is {row['label']!r}, expected {EXACT_MATCH} or {GENERATION}"
                )
            if row["name"] in overrides:
                raise TaskError(f"{file} line {reader.line_num}: {row['name']!r} is given twice; remove one")
            overrides[row["name"]] = Label(row["label"], f"override: {row.get('reason') or 'no reason given'}")
    return overrides
