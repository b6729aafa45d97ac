"""The replay of benchmarks/adaptive.py, on scores that are made up and on those that are kept beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import adaptive
from birbal_ray.score.config import AdaptiveSettings


def table(**scores):
    rows = [
        {"task": task, "label": "exact_match", "order": order, "score": score, "is_fit": True}
        for task, values in scores.items()
        for order, score in enumerate(values)
    ]
    return pa.Table.from_pylist(rows[::-1], schema=adaptive.SCHEMA)


def test_scores_come_back_in_hash_order_with_errors_as_nan():
    (task,) = adaptive.read_tasks(table(a=[1.0, None, 0.0]))
    np.testing.assert_array_equal(task.scores, [1.0, np.nan, 0.0])


def test_a_replay_that_scores_everything_differs_in_nothing():
    tasks = adaptive.read_tasks(table(a=[1.0, 0.0] * 60, b=[0.0] * 90))
    figures = adaptive.compare(tasks, AdaptiveSettings(score_margin=0.001, exact_match_budget=50))
    assert (figures["prompts"], figures["full_prompts"]) == (210, 210)
    assert (figures["within_margin"], figures["largest_error"], figures["total_variation"]) == (1.0, 0.0, 0.0)


def test_a_replay_takes_the_first_rows_and_its_error_is_against_all():
    tasks = adaptive.read_tasks(table(a=[0.0] * 100 + [1.0] * 100, b=[0.0] * 200))
    asked = AdaptiveSettings(score_margin=0.05, exact_match_budget=150, generation_budget=0)
    assert adaptive.replay(tasks, asked).num_rows == 200
    figures = adaptive.compare(tasks, asked)
    assert (figures["prompts"], figures["full_prompts"]) == (200, 400)
    assert (figures["within_margin"], figures["largest_error"]) == (0.5, 0.5)
    assert figures["total_variation"] == pytest.approx(1 / 2 - 1 / 3), "75 of 150 each instead of 50 and 100"


def test_the_kept_scores_are_24_tasks_in_hash_order():
    kept = pq.read_table(Path(adaptive.__file__).parent / "data" / "adaptive_scores.parquet")
    assert kept.schema.equals(adaptive.SCHEMA)
    tasks = adaptive.read_tasks(kept)
    assert len(tasks) == 24 and sum(len(task.scores) for task in tasks) == kept.num_rows
    assert all(np.nanmin(task.scores) >= 0 and np.nanmax(task.scores) <= 1 for task in tasks)


def test_the_fewest_prompts_end_at_the_last_failed_row_of_each_share():
    first = AdaptiveSettings(first_instances=2)
    late, rare, none = [1.0] * 7 + [0.0] * 3, [1.0] * 9 + [0.0], [0.0] * 10
    tasks = adaptive.read_tasks(table(late=late, rare=rare, none=none))
    counts = {"late": 2, "rare": 2, "none": 0}
    assert adaptive.fewest_prompts(tasks, counts, first) == 9 + 10 + 2, "the second zero, all rows, the first look"
    half = first.model_copy(update={"failed_rows_factor": 0.5})
    assert adaptive.fewest_prompts(tasks, counts, half) == 8 + 10 + 2
