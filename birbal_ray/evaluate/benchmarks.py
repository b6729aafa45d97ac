"""Which task of lm-evaluation-harness measures which leaderboard metric, and from its results to these metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from birbal_ray.evaluate.leaderboard import METRICS
from birbal_ray.run import RunError
from birbal_ray.settings import ConfigError, nearest

# Why a benchmark needs a task file of its own.
SCRIPT = "its data is a loading script, which datasets 5 refuses: needs a task file of this name"
FILE = "no such task in the harness: needs a task file of this name that generates text"
SAMPLES = "samples"  # in place of a filter: computed here from the harness's samples

Raw = Mapping[str, Mapping[str, Any]]  # benchmark or task name → what the harness returned for it

COMPARABLE_NOTE = (
    "measured through lm-evaluation-harness, whose prompts, splits and scoring are not HELM's, by which the "
    "published figures were made: an indication, not the published measurement"
)


@dataclass(frozen=True, slots=True)
class Benchmark:
    """How one leaderboard metric is measured.

    `tasks`: tasks or groups of the harness; the value is the plain mean of `measure` over them.
    `measure`: `metric,filter` as in the harness's results, in [0, 1].
    `num_fewshot`: None leaves it to the harness's task.
    `lacks`: SCRIPT or FILE, where the harness alone can't run it.
    """

    name: str
    metric: str
    tasks: tuple[str, ...]
    measure: str
    num_fewshot: int | None = None
    lacks: str = ""
    remark: str = ""


@dataclass(frozen=True, slots=True)
class BenchmarkRun:
    """One call of the harness; it is finished when `file` exists in the run's folder."""

    name: str
    tasks: tuple[str, ...]
    file: str
    num_fewshot: int | None
    benchmark: Benchmark | None = None


# The organisers' preliminary list, run_specs_full_coarse_600_budget.conf at commit 2f4ffcd, names 18 tasks.
# lm-eval has these as multiple choice; of the other four it has only free text, whose answers it compares as a whole.
BIG_BENCH = (
    *("code_line_description", "conceptual_combinations", "emoji_movie", "formal_fallacies_syllogisms_negation"),
    *("known_unknowns", "logic_grid_puzzle", "logical_deduction", "novel_concepts", "play_dialog_same_or_different"),
    *("strange_stories", "strategyqa", "symbol_interpretation", "vitaminc_fact_verification", "winowhy"),
)
BIG_BENCH_LEFT_OUT = ("auto_debugging", "linguistics_puzzles", "operators", "repeat_copy_logic")
_ETHICS = ("justice", "commonsense", "virtue", "deontology", "utilitarianism")

BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("mmlu", "MMLU - EM", ("mmlu",), "acc,none", 5, remark="likeliest letter, all 57 subjects"),
        Benchmark(
            "truthfulqa",
            "TruthfulQA - EM",
            ("truthfulqa_mc1",),
            "acc,none",
            remark="likeliest of the answers in full, after six fixed examples",
        ),
        Benchmark(
            "bigbench",
            "BIG-bench - EM",
            tuple(f"bigbench_{name}_multiple_choice" for name in BIG_BENCH),
            "acc,none",
            remark=f"likeliest choice, no examples; {len(BIG_BENCH)} of the organisers' 18 tasks, the harness has no "
            f"choices for {', '.join(BIG_BENCH_LEFT_OUT)}",
        ),
        Benchmark("gsm8k", "GSM8K - EM", ("gsm8k",), "exact_match,strict-match", remark="the number after ####"),
        Benchmark("bbq", "BBQ - EM", ("bbq",), "acc,none", remark="likeliest of the answers in full, no examples"),
        Benchmark("sam_sum", "sam_sum - ROUGE-2", ("sam_sum",), f"rouge_2,{SAMPLES}", lacks=FILE),
        Benchmark("corr2cause", "corr2cause - EM", ("corr2cause",), f"exact_match,{SAMPLES}", lacks=FILE),
        Benchmark(
            "math",
            "MATH (chain-of-thoughts) - Equivalent (chain of thought)",
            ("minerva_math",),
            "exact_match,none",
            remark="four fixed examples; answers compared by sympy",
        ),
        *(
            Benchmark(f"ethics_{subset}", f"ethics_{subset} - EM", (f"ethics_{task}",), "acc,none", lacks=SCRIPT)
            for subset in _ETHICS
            for task in ("cm" if subset == "commonsense" else subset,)
        ),
    )
}


def not_measured() -> dict[str, str]:
    """The leaderboard's metrics that no benchmark measures, each with the reason, in published order."""
    measured = {benchmark.metric for benchmark in BENCHMARKS.values()}
    perturbed = "the harness has no perturbed prompts"
    counted = "the harness does not count words beside groups of people"
    return {
        name: perturbed if name.endswith(("(Robustness)", "(Fairness)")) else counted
        for name in METRICS
        if name not in measured
    }


def listing() -> list[dict[str, Any]]:
    """One row per metric of the leaderboard, in published order: what measures it, or why nothing does."""
    rows: dict[str, dict[str, Any]] = {
        one.metric: {
            "metric": one.metric,
            "benchmark": one.name,
            "tasks": " ".join(one.tasks),
            "measure": one.measure,
            "needs": "a task file" if one.lacks else "",
            "remark": one.lacks or one.remark,
        }
        for one in BENCHMARKS.values()
    }
    empty = dict.fromkeys(("benchmark", "tasks", "measure", "needs"))
    rows |= {name: {"metric": name, **empty, "remark": f"not measured: {why}"} for name, why in not_measured().items()}
    return [rows[metric] for metric in METRICS]


def choose(names: Sequence[str]) -> list[Benchmark]:
    """The benchmarks of these names, each once. Raises ConfigError for an unknown one."""
    for name in names:
        if name not in BENCHMARKS:
            raise ConfigError(f"unknown benchmark {name!r}{nearest(name, BENCHMARKS)}; see birbal harness --list")
    return [BENCHMARKS[name] for name in dict.fromkeys(names)]


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


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1.0 if the answer equals a reference, outer white space aside; else 0.0. An empty answer scores 0.0."""
    stripped = answer.strip()
    return float(bool(stripped) and stripped in {reference.strip() for reference in references})


def rouge_2(answer: str, references: Sequence[str]) -> float:
    """Largest ROUGE-2 F1 in [0, 1] over the references: shared pairs of neighbouring words, stemmed (as in HELM).

    A text of fewer than two words has no pair and scores 0.0.
    """
    from rouge_score.rouge_scorer import RougeScorer  # imports nltk: 1 s

    scorer = RougeScorer(["rouge2"], use_stemmer=True)
    return max((float(scorer.score(reference, answer)["rouge2"].fmeasure) for reference in references), default=0.0)


_SAMPLE_MEASURES = {"exact_match": exact_match, "rouge_2": rouge_2}
