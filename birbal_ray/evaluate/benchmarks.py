"""Which leaderboard metric is measured by which task of lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from birbal_ray.evaluate.leaderboard import METRICS
from birbal_ray.settings import ConfigError, nearest

HARNESS, SCRIPT, FILE = "harness", "script", "file"
SCRIPT_REMARK = "its data is a loading script, which datasets 5 refuses: needs a task file of this name"
FILE_REMARK = "no such task in the harness: needs a task file of this name that generates text"
SAMPLES = "samples"  # in place of a filter: computed here from the harness's samples


@dataclass(frozen=True, slots=True)
class Benchmark:
    """How one leaderboard metric is measured.

    `tasks`: tasks or groups of the harness; the value is the plain mean of `measure` over them.
    `measure`: `metric,filter` as in the harness's results, in [0, 1].
    `num_fewshot`: None leaves it to the harness's task.
    `source`: HARNESS has the task; SCRIPT has it, but can't load its data set; FILE: to be given.
    """

    name: str
    metric: str
    tasks: tuple[str, ...]
    measure: str
    num_fewshot: int | None = None
    source: str = HARNESS
    remark: str = ""

    @property
    def row(self) -> dict[str, Any]:
        """For a table."""
        return {
            "metric": self.metric,
            "benchmark": self.name,
            "tasks": " ".join(self.tasks),
            "measure": self.measure,
            "needs": "" if self.source == HARNESS else "a task file",
            "remark": self.remark,
        }


# The nine that the challenge's sample specification lists.
BIG_BENCH = (
    *("analytic_entailment", "causal_judgment", "dark_humor_detection", "emoji_movie", "empirical_judgments"),
    *("known_unknowns", "logical_deduction", "snarks", "strange_stories"),
)
_ETHICS = {"justice": "justice", "commonsense": "cm", "virtue": "virtue", "deontology": "deontology"} | {
    "utilitarianism": "utilitarianism"
}

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
            remark="likeliest choice, no examples; the nine tasks of the challenge's sample specification",
        ),
        Benchmark("gsm8k", "GSM8K - EM", ("gsm8k",), "exact_match,strict-match", remark="the number after ####"),
        Benchmark("bbq", "BBQ - EM", ("bbq",), "acc,none", remark="likeliest of the answers in full, no examples"),
        Benchmark("sam_sum", "sam_sum - ROUGE-2", ("sam_sum",), f"rouge_2,{SAMPLES}", source=FILE, remark=FILE_REMARK),
        Benchmark(
            "corr2cause", "corr2cause - EM", ("corr2cause",), f"exact_match,{SAMPLES}", source=FILE, remark=FILE_REMARK
        ),
        Benchmark(
            "math",
            "MATH (chain-of-thoughts) - Equivalent (chain of thought)",
            ("minerva_math",),
            "exact_match,none",
            remark="four fixed examples; answers compared by sympy",
        ),
        *(
            Benchmark(
                f"ethics_{subset}",
                f"ethics_{subset} - EM",
                (f"ethics_{task}",),
                "acc,none",
                source=SCRIPT,
                remark=SCRIPT_REMARK,
            )
            for subset, task in _ETHICS.items()
        ),
    )
}


def not_measured() -> dict[str, str]:
    """The leaderboard's metrics that no benchmark measures, each with the reason, in published order."""
    measured = {benchmark.metric for benchmark in BENCHMARKS.values()}
    return {name: _reason(name) for name in METRICS if name not in measured}


def listing() -> list[dict[str, Any]]:
    """One row per metric of the leaderboard, in published order: what measures it, or why nothing does."""
    by_metric = {benchmark.metric: benchmark.row for benchmark in BENCHMARKS.values()}
    return [by_metric.get(metric) or _unmeasured_row(metric) for metric in METRICS]


def chosen(names: Sequence[str]) -> list[Benchmark]:
    """The benchmarks of these names, each once. Raises ConfigError for an unknown one."""
    for name in names:
        if name not in BENCHMARKS:
            raise ConfigError(f"unknown benchmark {name!r}{nearest(name, BENCHMARKS)}; see birbal harness --list")
    return [BENCHMARKS[name] for name in dict.fromkeys(names)]


def _reason(metric: str) -> str:
    if metric.endswith(("(Robustness)", "(Fairness)")):
        return "the harness has no perturbed prompts"
    return "the harness does not count words beside groups of people"


def _unmeasured_row(metric: str) -> dict[str, Any]:
    remark = f"not measured: {_reason(metric)}"
    return {"metric": metric, "benchmark": None, "tasks": None, "measure": None, "needs": None, "remark": remark}
