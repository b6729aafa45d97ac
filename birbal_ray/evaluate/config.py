"""Settings of `birbal evaluate`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

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


class BootstrapSettings(Settings):
    """The intervals of the comparisons."""

    num_resamples: int = Field(10_000, ge=100, description="more: smoother ends of the intervals")


class EvaluateConfig(Settings):
    """Everything `birbal evaluate` can be told."""

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
    prompt: PromptSettings = PromptSettings()
    completion: CompletionSettings = CompletionSettings()
    engine: EngineSettings = EngineSettings()
    resources: ResourceSettings = ResourceSettings()
    bootstrap: BootstrapSettings = BootstrapSettings()
    output: str | None = Field(None, description="run folder; the same command on it continues where it stopped")
    seed: int = Field(0, ge=0, description="another seed takes other instances of each task")
    shard_rows: int = Field(64, ge=1, le=4096, description="instances of one task per output file")

    def scoring(self) -> ScoreConfig:
        """The same settings as those of a score run of the base model."""
        shared = {name: getattr(self, name) for name in ScoreConfig.model_fields if name in type(self).model_fields}
        return ScoreConfig(**shared)
