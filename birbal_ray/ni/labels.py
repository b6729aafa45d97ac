"""Which metric a task gets: an explainable rule, with human overrides above it."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from birbal_ray.ni.metrics import EXACT_MATCH, GENERATION, count_words
from birbal_ray.ni.schema import Task, TaskError, read_text

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
    with resources.as_file(resources.files("birbal_ray.ni") / "data" / "label_overrides.csv") as file:
        return read_overrides(file)


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
