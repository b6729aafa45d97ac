"""The recipe's settings in one place: the budget, and the settings of every step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from birbal_ray.evaluate.config import EvaluateConfig
from birbal_ray.mix.allocation import TASK_SCORE
from birbal_ray.mix.config import MixConfig, SourceSettings
from birbal_ray.score.config import ScoreConfig
from birbal_ray.settings import ConfigError, Duration, Settings, require, write_duration
from birbal_ray.train.config import TrainConfig
from birbal_ray.tune.config import TuneConfig

HELD_OUT_FRACTION = 0.1  # of each scored task, where no complete tasks are held out
STEPS = ("score", "tune", "mix", "train", "evaluate", "report")


class ShareSettings(Settings):
    """Shares of the budget, at most. What a step leaves over, and all the rest, goes to training."""

    score: float = Field(0.10, gt=0, lt=1, description="of the budget, for scoring")
    tune: float = Field(0.10, gt=0, lt=1, description="of the budget, for the search")
    evaluate: float = Field(0.05, gt=0, lt=1, description="of the budget, for the evaluation")
    report: float = Field(0.01, gt=0, lt=1, description="of the budget, for the report")

    @model_validator(mode="after")
    def _leave_some(self) -> ShareSettings:
        if (total := self.score + self.tune + self.evaluate + self.report) >= 1:
            raise ValueError(f"the shares sum to {total:g}; below 1, so that training gets the rest")
        return self


class PipelineConfig(Settings):
    """Everything `birbal pipeline` and `birbal plan` can be told: the recipe's budget, and each step's settings."""

    output: str | None = Field(None, description="folder or URL; each step gets a folder in it")
    tasks: str | None = Field(None, description="folder of task files, or a .tar.gz archive; the steps' tasks.path")
    model: str | None = Field(
        None, description="the base model of all steps but tune: smollm2-135m, a folder, or a Hub id"
    )
    device: Literal["cpu", "gpu"] | None = Field(None, description="where engines and training run")
    held_out_tasks: list[str] = Field([], description="tasks that are evaluated and never scored or trained on")
    budget: Duration | None = Field(
        None,
        gt=0,
        description="wall-clock time of all steps together: 24h, 90m, or seconds; null: each takes what it takes",
    )
    shares: ShareSettings = ShareSettings()
    search: bool = Field(True, description="search the sampling ratios (tune) before the mix is made")
    score: ScoreConfig = ScoreConfig()
    tune: TuneConfig = TuneConfig()
    mix: MixConfig = MixConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @property
    def steps(self) -> tuple[str, ...]:
        """Those that run, in their order."""
        return tuple(step for step in STEPS if step != "tune" or self.search)

    @property
    def cards(self) -> dict[str, str | None]:
        """Step → the card that it needs, as Ray calls it, or None for any; without those that need no GPU."""
        devices = {
            "score": self.device or self.score.engine.device,
            "tune": "gpu" if self.tune.resources.num_gpus else "cpu",
            "train": self.device or ("gpu" if self.train.resources.accelerator_type else self.train.resources.device),
            "evaluate": self.device or self.evaluate.engine.device,
        }
        on_gpu = (step for step in self.steps if devices.get(step) == "gpu")
        return {step: getattr(self, step).resources.accelerator_type for step in on_gpu}

    @property
    def sources(self) -> list[SourceSettings]:
        """The outside datasets of the mix and of the search's trials, each once."""
        searched = self.tune.mix.sources if self.search else []
        return list({source.model_dump_json(): source for source in [*self.mix.sources, *searched]}.values())


def join_steps(config: PipelineConfig) -> PipelineConfig:
    """The settings with each step's folder, and what it reads of the others, filled in. Raises ConfigError."""
    output = require(config.output, "--output")
    folder = {step: f"{output.rstrip('/')}/{step}" for step in STEPS}

    def with_shared(step: Any, **more: Any) -> Any:
        changes = dict(more)
        if hasattr(step, "tasks"):
            path = config.tasks or step.tasks.path or config.score.tasks.path
            values = {**step.tasks.model_dump(), "path": path, **changes.pop("tasks", {})}
            changes["tasks"] = type(step.tasks).model_validate(values)
        if config.model:
            changes["model.name"] = config.model
        if config.device:
            changes[f"{'engine' if hasattr(step, 'engine') else 'resources'}.device"] = config.device
        return step.replace(changes)

    shares = config.shares if config.search else config.shares.replace({"tune": 0.0})
    score = config.score
    of_tasks: dict[str, Any] = {"exclude": sorted({*score.tasks.exclude, *config.held_out_tasks})}
    if not config.held_out_tasks and "held_out_fraction" not in score.tasks.model_fields_set:
        of_tasks["held_out_fraction"] = HELD_OUT_FRACTION  # else small tasks are scored whole, and nothing is left
    if config.budget:  # only an adaptive run may stop where it is
        score = score.replace({"adaptive.enabled": True})
    # Adaptive scoring fills the shares of this recipe's mixes, unless it was given others.
    mixes = [config.mix, *([config.tune.mix] if config.search else [])]
    if asking := [one.task_score for one in mixes if one.policy == TASK_SCORE]:
        wanted = {
            "exact_match_budget": max(one.exact_match_budget for one in asking),
            "generation_budget": max(one.generation_budget for one in asking),
            **{name: getattr(asking[0], name) for name in ("gamma", "even_fraction", "failed_below")},
        }
        changes = {f"adaptive.{name}": wanted[name] for name in wanted.keys() - score.adaptive.model_fields_set}
        score = score.replace(changes)
    joined = {
        "shares": shares,
        "score": with_shared(score, output=folder["score"], tasks=of_tasks),
        "tune": config.tune.replace({"scores": folder["score"], "output": folder["tune"]}),
        "mix": config.mix.replace({"scores": folder["score"], "output": folder["mix"]}),
        "train": with_shared(config.train, mix=folder["mix"], output=folder["train"]),
        "evaluate": with_shared(
            config.evaluate,
            adapters=config.evaluate.adapters or [f"adapter={folder['train']}"],
            mix=folder["mix"],
            output=folder["evaluate"],
        ),
    }
    return config.replace(joined)


def refuse_small_budget(config: PipelineConfig, least: Mapping[str, float]) -> None:
    """Raise ConfigError, with the least that works, when any step's share is too short for it to do anything."""
    from birbal_ray.progress import duration  # not for --help: its storage loads pyarrow

    if config.budget is None:
        return
    shares = config.shares.model_dump()
    shares["train"] = 1 - sum(shares.values())
    wanted = {step: least[step] / shares[step] for step in shares if step in least and shares[step]}
    step = max(wanted, key=lambda one: wanted[one])
    if config.budget < wanted[step]:
        name = "the rest, for training," if step == "train" else f"shares.{step} ({shares[step]:.0%})"
        does = "run its baselines, one mix and their fresh seeds" if step == "tune" else "load and do anything"
        raise ConfigError(
            f"budget {duration(config.budget)} is too small: {name} is {duration(config.budget * shares[step])}, and "
            f"{step} needs {duration(least[step])} to {does}; the least that works is "
            f"{write_duration(wanted[step])}, with these shares"
        )
