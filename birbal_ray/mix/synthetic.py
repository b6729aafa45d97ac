"""A made-up score folder in the real layout, for tests and benchmarks."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from birbal_ray.contracts import ROWS_FOLDER, SCORE_ROWS, TASK_SCORES, TASK_SCORES_FILE, TASKS, TASKS_FILE
from birbal_ray.ni.metrics import EXACT_MATCH, GENERATION, METRIC_OF_LABEL, score_answer
from birbal_ray.ni.prompt import extract_answer
from birbal_ray.run import finish_run, start_run, write_parquet

_SYLLABLES = ("ba", "ko", "ri", "mu", "te", "sol", "an", "der", "vi", "pa", "lo", "neth", "us", "gra", "fi", "el")
VOCABULARY = tuple(a + b + c for a in _SYLLABLES for b in _SYLLABLES for c in _SYLLABLES[:4])
_COMMON_WORDS = ("the", "of", "and", "a", "to", "in")


def write_score_folder(
    folder: Path,
    rows: Iterable[Mapping[str, Any]],
    *,
    model: str = "made-up-model",
    definitions: Mapping[str, str] | None = None,
    shard_rows: int = 64,
) -> Path:
    """A finished score run holding `rows`: each has task, label, instance_id, orig_input, answer, prediction, error.

    Scores follow from prediction and answer. Rows of a task must be adjacent; memory: one task.
    Returns `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    start_run(folder, "score", {"model": model})
    tasks, scores = [], []
    for task, group in itertools.groupby(rows, key=lambda row: row["task"]):
        members = list(group)
        full = [_score_row(row) for row in members]
        starts = range(0, len(full), shard_rows)
        for number, start in enumerate(starts):
            shard = pa.Table.from_pylist(full[start : start + shard_rows], schema=SCORE_ROWS)
            write_parquet(folder / ROWS_FOLDER / f"{task}-{number:05d}-of-{len(starts):05d}.parquet", shard)
        tasks.append(_task_row(task, members[0]["label"], (definitions or {}).get(task, f"Do what {task} asks."), full))
        scores.append(_task_score_row(task, members[0]["label"], full))
    write_parquet(folder / TASKS_FILE, pa.Table.from_pylist(tasks, schema=TASKS))
    write_parquet(folder / TASK_SCORES_FILE, pa.Table.from_pylist(scores, schema=TASK_SCORES))
    finish_run(folder, {"model": {"name": model}})
    return folder


def made_up_rows(
    num_tasks: int, rows_per_task: int, seed: int = 0, words: tuple[int, int] = (6, 40)
) -> list[dict[str, Any]]:
    """All rows of `stream_made_up_rows`."""
    return list(stream_made_up_rows(num_tasks, rows_per_task, seed, words))


def stream_made_up_rows(
    num_tasks: int, rows_per_task: int, seed: int = 0, words: tuple[int, int] = (6, 40)
) -> Iterator[dict[str, Any]]:
    """Rows of half exact-match, half generation tasks of every difficulty, with what real data has.

    Among them: repeated inputs inside and across tasks, empty predictions, empty outputs, several
    references, short and long inputs, a few errors. The same for a seed on any machine.
    """
    for task in range(num_tasks):
        yield from made_up_task(task, num_tasks, rows_per_task, seed, words)


def made_up_task(
    number: int, num_tasks: int, count: int, seed: int = 0, words: tuple[int, int] = (6, 40)
) -> list[dict[str, Any]]:
    """The rows of one made-up task; see `made_up_rows`."""
    rng = random.Random(f"{seed}/{number}")  # noqa: S311 (made-up text)
    label = EXACT_MATCH if number % 2 == 0 else GENERATION
    skill = (number + 0.5) / num_tasks
    name = f"task{number:04d}_made_up_{label}"
    rows = []
    for position in range(count):
        kind = rng.random()
        text = _text(rng, rng.randint(*words))
        if kind < 0.02:
            text = _text(rng, rng.randint(1, 4))
        elif kind < 0.03:
            text = _text(rng, rng.choice((780, 810, 1090, 1110)))
        elif kind < 0.08:
            # The same text turns up in other tasks.
            shared = random.Random(f"shared/{rng.randint(0, 49)}")  # noqa: S311
            text = _text(shared, 12)
        references = _references(rng, label)
        rows.append(
            {
                "task": name,
                "label": label,
                "instance_id": f"{name}-{position}",
                "orig_input": text,
                "answer": references,
                "prediction": _prediction(rng, label, references, skill),
                "error": "prompt too long" if kind > 0.995 else None,
            }
        )
    return rows


def _text(rng: random.Random, count: int) -> str:
    return " ".join(rng.choices(VOCABULARY, k=count))


def _references(rng: random.Random, label: str) -> list[str]:
    if rng.random() < 0.01:
        return [""]
    if label == EXACT_MATCH:
        return [rng.choice(("yes", "no", "maybe", VOCABULARY[rng.randint(0, 30)]))]
    words = rng.choices(VOCABULARY[:200] + _COMMON_WORDS * 15, k=rng.randint(4, 14))
    first = " ".join(words) + "."
    return [first, " ".join(words[::-1])] if rng.random() < 0.1 else [first]


def _prediction(rng: random.Random, label: str, references: Sequence[str], skill: float) -> str:
    if rng.random() < 0.02:
        return ""
    if label == EXACT_MATCH:
        return references[0] if rng.random() < skill else rng.choice(("yes", "no", "maybe", "neither"))
    words = references[0].replace(".", "").split()
    return " ".join(word if rng.random() < skill else rng.choice(VOCABULARY) for word in words) or "nothing"


def _score_row(row: Mapping[str, Any]) -> dict[str, Any]:
    extracted = extract_answer(row["prediction"])
    failed = row.get("error") is not None
    return {
        "orig_input": row["orig_input"],
        "few_shot_prompt": "",
        "answer": list(row["answer"]),
        "prediction": row["prediction"],
        "row_id": f"{row['task']}:{row['instance_id']}",
        "task": row["task"],
        "instance_id": row["instance_id"],
        "label": row["label"],
        "extracted": extracted,
        "score": None if failed else score_answer(row["label"], extracted, row["answer"]),
        "metric": METRIC_OF_LABEL[row["label"]],
        "num_prompt_tokens": None,
        "num_cached_tokens": None,
        "num_completion_tokens": None,
        "finish_reason": None,
        "error": row.get("error"),
    }


def _task_row(task: str, label: str, definition: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "task": task,
        "label": label,
        "label_reason": "made up",
        "definition": definition,
        "categories": ["Made Up"],
        "sources": ["made_up"],
        "domains": [],
        "licenses": ["Apache-2.0"],
        "sha256": "0" * 64,
        "num_shots": 0,
        "num_available": len(rows),
        "num_instances": len(rows),
        "max_completion_tokens": 16,
    }


def _task_score_row(task: str, label: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    scores = [row["score"] for row in rows if row["error"] is None]
    mean = math.fsum(scores) / len(scores) if scores else None
    return {
        "task": task,
        "label": label,
        "num_instances": len(rows),
        "num_scored": len(scores),
        "num_errors": len(rows) - len(scores),
        "task_score": mean,
        "task_score_low": mean,
        "task_score_high": mean,
    }
