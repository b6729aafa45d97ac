"""Settings of `birbal evaluate` and `birbal harness`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from birbal_ray.score.config import (
    CompletionSettings,
    EngineSettings,
    ModelSettings,
    PromptSettings,
    ResourceSettings,
    ScoreConfig,
    TaskSettings,
)
from birbal_ray.settings import Settings

PromptFormat = Literal["zero_shot", "few_shot"]


class HeldOutTasks(TaskSettings):
    """Which task files, and how much of what is held out."""

    instances_per_task: int | None = Field(
        50, ge=1, description="take the first N held-out ones of each task, in hash order; null takes all"
    )


class PrimaryComparison(Settings):
    """The one comparison that is named before the run; all others are description."""

    model: str | None = Field(None, description="name of an adapter or merged model; null: the first one given")
    prompt_format: PromptFormat | None = Field(None, description="null: the first of prompt_formats")
    scope: Literal["all", "exact_match", "generation", "held-out tasks", "held-out instances"] = "all"


class EvaluateConfig(Settings):
    """All settings of `birbal evaluate`."""

    tasks: HeldOutTasks = HeldOutTasks()
    model: ModelSettings = ModelSettings()
    adapters: list[str] = Field([], description="adapter folder, or output folder of `birbal train`; NAME=DIR names it")
    merged: list[str] = Field([], description="complete model to compare with the base model; NAME=DIR names it")
    mix: str | None = Field(
        None, description="mix whose candidates are left out, besides those of the adapters' own mixes"
    )
    serve_adapters: Literal["auto", "lora", "merged"] = Field(
        "auto",
        description="lora: all in one engine; merged: folded into the weights, an engine each; auto: merged on a CPU",
    )
    prompt_formats: list[PromptFormat] = Field(["zero_shot", "few_shot"], min_length=1)
    primary: PrimaryComparison = PrimaryComparison()
    gate: float | None = Field(
        None, ge=0, le=1, description="exit 1 where a model's mean score is lower than the base's by more, on any scope"
    )
    expected_deviation: float = Field(
        0.1, gt=0, le=1, description="of the differences between tasks, for --dry-run's smallest detectable difference"
    )
    prompt: PromptSettings = PromptSettings()
    completion: CompletionSettings = CompletionSettings()
    engine: EngineSettings = EngineSettings()
    resources: ResourceSettings = ResourceSettings()
    output: str | None = Field(None, description="run folder; the same command on it continues where it stopped")
    seed: int = Field(0, ge=0, description="another seed takes other instances of each task")
    shard_rows: int = Field(64, ge=1, le=4096, description="instances of one task per output file")

    @model_validator(mode="after")
    def _primary_is_asked(self) -> EvaluateConfig:
        if self.primary.prompt_format not in (None, *self.prompt_formats):
            raise ValueError(f"primary.prompt_format={self.primary.prompt_format} is not among prompt_formats")
        return self

    def scoring(self) -> ScoreConfig:
        """The same settings as those of a score run of the base model."""
        shared = {name: getattr(self, name) for name in ScoreConfig.model_fields if name in type(self).model_fields}
        return ScoreConfig(**{**shared, "model": self.model.model_dump()})


class HarnessConfig(Settings):
    """All settings of `birbal harness`. No `benchmarks` and no `tasks`: every benchmark whose data can be had."""

    model: str | None = Field(None, description="a Hub id, a local folder, or smollm2-135m")
    adapter: str | None = Field(None, description="LoRA adapter on it: a PEFT folder, or the output of `birbal train`")
    output: str | None = Field(None, description="the run's folder")
    benchmarks: list[str] = Field([], description="one of --list; default: all of them")
    tasks: list[str] = Field([], description="any task of the harness, beside the benchmarks")
    include_path: Path | None = Field(
        None, description="task files (YAML) that add to the harness's, or replace them by name"
    )
    limit: int | None = Field(None, ge=1, description="only the first N documents of every task")
    num_fewshot: int | None = Field(None, ge=0, description="examples in the prompt, for every task")
    batch_size: Annotated[str, BeforeValidator(str)] | None = Field(
        None, description="requests computed together; null: 8 with transformers, auto with vLLM"
    )
    device: str | None = Field(None, description="for example cuda:0 or cpu; default: a GPU where there is one")
    backend: Literal["hf", "vllm"] = Field("hf", description="transformers, or vLLM (on GPUs)")
    team: str | None = Field(None, description="the model's name in results.json; default: the model's and adapter's")
