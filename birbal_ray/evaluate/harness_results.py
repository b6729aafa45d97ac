"""What the harness returns, as the leaderboard's metrics, as a results file, as rows of a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from birbal_ray.evaluate.benchmarks import BENCHMARKS, Benchmark, not_measured
from birbal_ray.evaluate.metrics import exact_match, quasi_exact_match, rouge_2
from birbal_ray.run import RunError

Raw = Mapping[str, Mapping[str, Any]]  # benchmark or task name → what the harness returned for it

COMPARABLE_NOTE = (
    "measured through lm-evaluation-harness, whose prompts, splits and scoring are not HELM's, by which the "
    "published figures were made: an indication, not the published measurement"
)
_SAMPLE_MEASURES = {"exact_match": exact_match, "quasi_exact_match": quasi_exact_match, "rouge_2": rouge_2}


def leaderboard_metrics(raw: Raw) -> dict[str, float]:
    """Benchmark name → what the harness returned, as metric of the leaderboard → value in [0, 1].

    Only benchmarks that are in `raw` get a value. Raises RunError when a result lacks its measure.
    """
    return {
        benchmark.metric: _value(benchmark, raw[name]["results"])
        for name, benchmark in BENCHMARKS.items()
        if name in raw
    }


def sample_measure(measure: str, samples: Sequence[Mapping[str, Any]]) -> float:
    """Mean of an own measure over the harness's samples (`filtered_resps`, `target`) of a generating task.

    Raises RunError for samples that hold no text.
    """
    score = _SAMPLE_MEASURES[measure]
    values = []
    for sample in samples:
        answer, target = sample["filtered_resps"][0], sample["target"]
        references = list(target) if isinstance(target, (list, tuple)) else [target]
        if not isinstance(answer, str) or not all(isinstance(reference, str) for reference in references):
            raise RunError(f"{measure} needs generated text (output_type: generate_until), found {answer!r:.40}")
        values.append(score(answer, references))
    if not values:
        raise RunError(f"{measure}: the task has no documents")
    return math.fsum(values) / len(values)


def results_file(
    team: str, benchmarks: Raw, tasks: Raw, *, limit: int | None, failures: Mapping[str, str]
) -> dict[str, Any]:
    """In the layout that `birbal leaderboard --add` reads; the keys beside team and metrics are for people.

    `failures`: benchmark name → why it could not be run.
    """
    metrics = leaderboard_metrics(benchmarks)
    not_run = {
        one.metric: f"not run: {failures.get(one.name, f'birbal harness --benchmark {one.name}')}"
        for one in BENCHMARKS.values()
        if one.metric not in metrics
    }
    sampled = "" if limit is None else f"only the first {limit} documents of every task; "
    return {
        "team": team,
        "metrics": metrics,
        "comparable": False,
        "note": sampled + COMPARABLE_NOTE,
        "not_measured": not_run | not_measured(),
        "tasks": {name: raw["results"] for name, raw in tasks.items()},
    }


def result_rows(benchmarks: Raw, tasks: Raw) -> list[dict[str, Any]]:
    """One row per benchmark, then one per measure of every other task. `stderr` is the harness's, where it has one."""
    rows = []
    for name, raw in benchmarks.items():
        one = BENCHMARKS[name]
        results = raw["results"][one.tasks[0]] if len(one.tasks) == 1 else {}
        rows.append(_row(name, one.metric, leaderboard_metrics({name: raw})[one.metric], results, one.measure, raw))
    for name, raw in tasks.items():
        for task, results in raw["results"].items():
            for measure, value in results.items():
                if "," in measure and "_stderr," not in measure:
                    rows.append(_row(name, f"{task}: {measure}", value, results, measure, raw))
    return rows


def _value(benchmark: Benchmark, results: Mapping[str, Mapping[str, Any]]) -> float:
    values = []
    for task in benchmark.tasks:
        value = results.get(task, {}).get(benchmark.measure)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:  # NaN too
            found = ", ".join(sorted(results.get(task, {}))) or "nothing"
            raise RunError(
                f"benchmark {benchmark.name}: task {task!r} gave {value!r} as {benchmark.measure!r}, expected a number "
                f"from 0 to 1 (the task's results: {found})"
            )
        values.append(float(value))
    return math.fsum(values) / len(values)


def _row(
    name: str, metric: str, value: Any, results: Mapping[str, Any], measure: str, raw: Mapping[str, Any]
) -> dict[str, Any]:
    stderr = results.get(measure.replace(",", "_stderr,"))
    shots = sorted(set(raw["n-shot"].values()))
    return {
        "benchmark": name,
        "metric": metric,
        "value": value,
        "stderr": stderr if isinstance(stderr, float) else None,
        "documents": sum(count["effective"] for count in raw["n-samples"].values()),
        "shots": shots[0] if len(shots) == 1 else " ".join(map(str, shots)),
    }
