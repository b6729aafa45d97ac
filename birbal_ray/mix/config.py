"""Settings of `birbal mix`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from birbal_ray.mix.datasets import HUB_DATASETS
from birbal_ray.settings import Settings, nearest

# Evaluation → names that its data goes by in task names, task sources and outside sources. The
# evaluations are those of the 2023 challenge (open: MMLU, TruthfulQA, BIG-bench, GSM8K, BBQ and BBH,
# OpenBookQA, CNN/DailyMail among its HELM scenarios; hidden: sam_sum, corr2cause, MATH, ethics).
FAMILIES: dict[str, tuple[str, ...]] = {
    "sam_sum": ("samsum", "sam_sum"),
    "openbookqa": ("openbookqa", "open_book_qa", "obqa"),
    "cnn_dailymail": ("cnn_dailymail", "cnn_daily_mail", "cnn_dm"),
    "bigbench": ("bigbench", "big_bench"),
    "ethics": ("hendrycks_ethics", "ethics", "ethics_justice", "ethics_commonsense", "ethics_deontology"),
    "mmlu": ("mmlu", "hendrycks_test"),
    "truthfulqa": ("truthfulqa", "truthful_qa"),
    "gsm8k": ("gsm8k", "gsm_8k"),
    "bbq": ("bbq",),
    "bbh": ("bbh", "big_bench_hard"),
    "math": ("hendrycks_math", "competition_math"),
    "corr2cause": ("corr2cause",),
}


class TaskScoreSettings(Settings):
    """Policy task_score: more from what the model gets wrong.

    `uniform` and `proportional` draw both budgets together at random, from whatever tasks; `proportional` by how many
    rows of a task were scored, which after adaptive scoring is about the same for all.
    """

    exact_match_budget: int = Field(50_000, ge=0, description="rows from exact-match tasks")
    generation_budget: int = Field(50_000, ge=0, description="rows from generation tasks")
    gamma: float = Field(1.0, ge=0, le=16, description="0 spreads evenly; larger leans towards badly answered tasks")
    even_fraction: float = Field(
        0.0,
        ge=0,
        le=1,
        description="of each budget, spread evenly over all tasks, solved ones included",
    )
    failed_first: bool = Field(True, description="inside a task, rows the model failed are drawn before others")
    failed_below: float = Field(0.2, ge=0, le=1, description="generation rows under this ROUGE-L count as failed")
    allow_shortfall: bool = Field(False, description="take what is there when the candidates don't fill a budget")


class Birbal2023Settings(Settings):
    """Policy birbal_2023: the published ladder."""

    factor: float = Field(1.0, gt=0, description="multiplies the caps of exact-match tasks")
    compat: bool = Field(False, description="also reproduce the published scripts' defects")


class FilterSettings(Settings):
    """Which rows can't be used at all."""

    max_words: int = Field(800, ge=1, description="instruction + input; this many or more are dropped")
    max_short_input_words: int = Field(4, ge=0, description="inputs of so few words or fewer are dropped")


class DedupSettings(Settings):
    """What counts as a repeat: the same instruction and input, and more on demand."""

    near: bool = Field(
        False, description="also drop near-duplicate inputs with the same instruction, numbers and signs (MinHash)"
    )
    near_threshold: float = Field(0.8, gt=0.5, lt=1, description="estimated Jaccard similarity of word 3-grams")


class ContaminationSettings(Settings):
    """What the evaluations must not have been trained on."""

    action: Literal["report", "drop"] = Field("report")
    files: list[str] = Field([], description="evaluation texts: .txt (one a line), .jsonl (all strings), .parquet")
    ngram: int = Field(13, ge=3, le=64, description="words that must agree in a row")
    families: dict[str, list[str]] = Field(
        {}, description="beside the challenge's: evaluation → words in task or source names; [] leaves one out"
    )

    @model_validator(mode="after")
    def _leaves_known_ones_out(self) -> ContaminationSettings:
        for name, words in self.families.items():
            if not words and name not in FAMILIES:
                known = f"{nearest(name, FAMILIES)}; known: {', '.join(FAMILIES)}"
                raise ValueError(f"families: no evaluation {name!r} to leave out{known}")
        return self

    @property
    def all_families(self) -> dict[str, Sequence[str]]:
        """Evaluation → names that its data goes by, of all evaluations that are looked for."""
        return {name: words for name, words in {**FAMILIES, **self.families}.items() if words}


class ColumnMapping(Settings):
    """Which columns of a local file become what. `output` alone is required."""

    instruction: str | None = None
    input: str | None = None
    output: str
    task: str | None = None
    llm_written: str | None = Field(None, description="boolean column")
    license: str | None = None


class SourceSettings(Settings):
    """One outside dataset: an upstream by name, or a local file with a column mapping."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$", description="a known dataset's name, or yours for a file")
    path: str | None = Field(
        None, description="a .jsonl, .json or .parquet file or its URL; for a known dataset: a copy in its layout"
    )
    columns: ColumnMapping | None = None
    revision: str | None = Field(None, description="Hub revision instead of the pinned one")
    max_rows: int | None = Field(None, ge=0, description="at most so many, the first in hash order")
    license: str | None = Field(None, description="overrides the dataset's")
    llm_written: bool = Field(False, description="every row was written by a language model")
    instruction: str | None = Field(None, description="fixed instruction of every row")

    @model_validator(mode="after")
    def _complete(self) -> SourceSettings:
        if self.name in HUB_DATASETS:
            if self.columns is not None:
                raise ValueError(f"{self.name} is a known dataset and takes no columns")
        elif self.path is None or self.columns is None:
            raise ValueError(f"{self.name!r} is no known dataset ({', '.join(HUB_DATASETS)}): give path and columns")
        return self


class MixResources(Settings):
    """Who computes; never changes a row."""

    num_cpus: int | None = Field(None, ge=1, description="logical CPUs of a local Ray; null: cores + 2, at least 4")
    chunk_mib: int = Field(16, ge=1, description="score files read by one Ray task")
    in_process_mib: int = Field(512, ge=0, description="up to so much of scores is read without Ray; 0 always uses Ray")


class MixConfig(Settings):
    """All settings of `birbal mix`."""

    scores: str | None = Field(None, description="output folder of `birbal score`")
    output: str | None = Field(None, description="run folder; the same command on a finished one does nothing")
    model: str | None = Field(None, description="refuse scores made by any other model; null takes any")
    seed: int = Field(0, ge=0, description="another seed gives another draw and another order")
    policy: Literal["task_score", "birbal_2023", "uniform", "proportional"] = Field(
        "task_score",
        description="how rows are chosen: by what the model gets wrong, by the published ladder, as many of every "
        "task, or in proportion to the rows scored of each",
    )
    task_score: TaskScoreSettings = TaskScoreSettings()
    birbal_2023: Birbal2023Settings = Birbal2023Settings()
    filters: FilterSettings = FilterSettings()
    dedup: DedupSettings = DedupSettings()
    contamination: ContaminationSettings = ContaminationSettings()
    sources: list[SourceSettings] = Field([])
    include_llm_written: bool = Field(False, description="the challenge's rule leaves LLM-written rows out")
    eval_fraction: float = Field(0.02, ge=0, lt=1)
    validation_rows_per_task: int = Field(
        0, ge=0, description="rows of each task and source kept out, for judging mixes: the same whatever is chosen"
    )
    resources: MixResources = MixResources()

    @model_validator(mode="after")
    def _distinct_sources(self) -> MixConfig:
        names = [source.name for source in self.sources]
        repeated = sorted({name for name in names if names.count(name) > 1} | ({"natural_instructions"} & set(names)))
        if repeated:
            raise ValueError(f"source name {repeated[0]!r} is taken; each source needs its own")
        return self

    @property
    def compat(self) -> bool:
        """Whether the published scripts' defects are reproduced."""
        return self.policy == "birbal_2023" and self.birbal_2023.compat
