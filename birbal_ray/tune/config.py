"""Settings of `birbal tune`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, ValidationError, model_validator

from birbal_ray.mix.config import MixConfig
from birbal_ray.settings import Duration, Settings, explain
from birbal_ray.train.config import TrainConfig

Baseline = Literal["uniform", "proportional", "task_score", "birbal_2023"]
BASELINES: tuple[Baseline, ...] = get_args(Baseline)
BASE_MODEL = "base_model"


class Range(Settings):
    """A number to be found between two others: of gamma, as far as it goes."""

    low: float = Field(ge=0, le=16)
    high: float = Field(ge=0, le=16)

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if not self.low < self.high:
            raise ValueError(f"low ({self.low:g}) must be below high ({self.high:g})")
        return self


class Fraction(Range):
    """A range inside 0 to 1."""

    low: float = Field(ge=0, le=1)
    high: float = Field(ge=0, le=1)


class SearchSettings(Settings):
    """Which ratios are searched; what is left out keeps the value it has under `mix`."""

    gamma: Range | None = Field(Range(low=0, high=4), description="task_score.gamma")
    exact_match_fraction: Fraction | None = Field(
        Fraction(low=0.1, high=0.9), description="exact-match rows / all rows from tasks"
    )
    failed_first: bool = Field(True, description="try task_score.failed_first on and off")
    source_fractions: dict[str, Fraction] = Field({}, description="outside source → its share of the whole mix")


class ProxySettings(Settings):
    """The short fine-tune that stands for the long one; the rest of it is under `train`."""

    tokens: int = Field(2_000_000, ge=1, description="training tokens of a trial, whatever its mix")
    keep_adapters: bool = Field(False, description="keep what each fresh seed trained, as trials/KEY/adapter")


class ValidationSettings(Settings):
    """What mixes are judged on: rows of every task that no trial may train on, and files of yours."""

    RENAMED: ClassVar = {"looks": "num_rungs"}

    rows_per_task: int = Field(16, ge=1, description="also of each outside source")
    files: list[str] = Field(
        [], description=".parquet or .jsonl with question and answer; each is a group of its own, named file:STEM"
    )
    weights: dict[str, Annotated[float, Field(ge=0)]] = Field(
        {}, description="of the groups exact_match, generation, source:NAME, file:STEM; one not named weighs 1"
    )
    num_rungs: int = Field(
        4, ge=1, description="times a trial is judged, the last at its end; early ones let it be stopped"
    )


class StoppingSettings(Settings):
    """ASHA: a trial of the search that is behind at a rung ends there. Baselines and repeats never do."""

    RENAMED: ClassVar = {"grace_looks": "grace_rungs"}

    enabled: bool = True
    grace_rungs: int = Field(1, ge=1, description="rungs that every trial gets")
    reduction_factor: float = Field(3.0, gt=1, description="about one in so many goes on at each rung")


class RepeatSettings(Settings):
    """Fresh seeds, so that no verdict rests on one lucky trial."""

    top: int = Field(2, ge=0, description="mixes run again: the predicted best, then the best tried; 0 leaves them out")
    seeds: int = Field(4, ge=2, description="fresh seeds for each of them and each baseline")
    primary: Baseline | None = Field(
        None, description="the baseline that the one comparison named beforehand is with; null: the first of baselines"
    )


class TransferSettings(Settings):
    """Whether the order of the mixes holds in a longer fine-tune."""

    factor: int = Field(
        0, ge=0, description="run the best mix and all baselines again at so many times the tokens; 0: no"
    )
    seeds: int = Field(1, ge=1, description="seeds of each")


class TuneResources(Settings):
    """Who computes. May change between a run and its continuation."""

    num_cpus: float = Field(1.0, gt=0, description="logical CPUs of a trial")
    num_gpus: float = Field(0.0, ge=0, description="0.25 runs four trials on a card, if they fit in its memory")
    accelerator_type: str | None = Field(None, description="the card trials run on, as Ray calls it")
    max_concurrent: int = Field(1, ge=1, description="trials at a time")
    num_threads: int | None = Field(None, ge=1, description="CPU threads of a trial; null: cores / max_concurrent")
    max_failures: int = Field(2, ge=0, description="times a trial is started again after its process or node died")
    price_per_hour: float | None = Field(None, ge=0, description="of one trial's resources, for --dry-run's cost")


class TuneConfig(Settings):
    """All settings of `birbal tune`."""

    RENAMED: ClassVar = {"num_random": "num_initial", "surrogate": "predicted"}

    scores: str | None = Field(None, description="output folder of `birbal score`")
    output: str | None = Field(None, description="run folder; the same command goes on")
    seed: int = Field(0, ge=0, description="another seed is another search")
    budget: Duration | None = Field(
        None,
        gt=0,
        description="e.g. 2h, or seconds: the search ends early enough for the fresh seeds, and these with it",
    )
    num_trials: int = Field(
        24, ge=0, description="mixes that the search tries, besides baselines and repeats; 0: fresh seeds only"
    )
    num_initial: int = Field(
        8,
        ge=1,
        description="the first so many cover the ranges evenly (Sobol); then Optuna's Gaussian process proposes",
    )
    baselines: list[Baseline] = Field(list(BASELINES))
    mixes: dict[str, dict[str, Any]] = Field(
        {}, description="mixes of yours, compared as the best found are: name → what differs from `mix`"
    )
    predicted: bool = Field(True, description="also try the mix that a Gaussian process over all trials predicts best")
    search: SearchSettings = SearchSettings()
    mix: MixConfig = Field(MixConfig(), description="as for `birbal mix`: sources, filters, and how many rows in all")
    train: TrainConfig = Field(TrainConfig(), description="as for `birbal train`: model, LoRA, batch, optimizer")
    proxy: ProxySettings = ProxySettings()
    validation: ValidationSettings = ValidationSettings()
    stopping: StoppingSettings = StoppingSettings()
    repeats: RepeatSettings = RepeatSettings()
    transfer: TransferSettings = TransferSettings()
    resources: TuneResources = TuneResources()

    @model_validator(mode="after")
    def _consistent(self) -> TuneConfig:
        decided = {
            "mix": ("scores", "output", "validation_rows_per_task"),
            "train": ("mix", "output", "budget", "max_steps"),
        }
        for section, names in decided.items():
            settings = getattr(self, section)
            for name in names:
                if getattr(settings, name):
                    raise ValueError(f"{section}.{name} is decided by the search; leave it out")
        if self.mix.policy != "task_score":
            raise ValueError("mix.policy: the ratios that are searched are those of task_score")
        limits = {source.name: source.max_rows for source in self.mix.sources}
        for name in self.search.source_fractions:
            if not limits.get(name):
                raise ValueError(f"search.source_fractions.{name}: give mix.sources a source {name!r} with max_rows")
        searched = self.search.source_fractions
        kept = sum(rows or 0 for name, rows in limits.items() if name not in searched) / max(1, num_rows(self.mix))
        if sum(range_.high for range_ in searched.values()) + kept >= 1:
            others = f", beside the {kept:.3g} of the sources that are not searched" if kept else ""
            raise ValueError(f"search.source_fractions: the highs must sum to less than 1{others}; tasks need the rest")
        ratios = self.search.gamma, self.search.exact_match_fraction, self.search.failed_first, searched
        if self.num_trials and not any(ratios):
            raise ValueError("search: no ratio is searched; name a range, or set num_trials=0 and compare mixes")
        for name, changes in self.mixes.items():
            # Without "-", which all names of trials have that are made from others.
            if not re.fullmatch(r"\w+", name, re.ASCII) or name in (*BASELINES, BASE_MODEL, "predicted"):
                reserved = ", ".join((*BASELINES, BASE_MODEL, "predicted"))
                raise ValueError(f"mixes.{name}: a name has letters, digits and _, and is none of {reserved}")
            try:
                changed_mix(self.mix, changes)
            except ValidationError as error:
                raise ValueError(f"mixes.{name}: {explain(MixConfig, error)}") from None
        if not self.num_trials and not self.mixes:
            raise ValueError("num_trials=0 searches nothing, and mixes names none: there is nothing to compare")
        if (self.repeats.top or self.mixes) and not self.baselines:
            raise ValueError("baselines: at least one is needed to compare with; or repeats.top=0 and no mixes")
        if self.repeats.primary not in (None, *self.baselines):
            raise ValueError(f"repeats.primary={self.repeats.primary} is not among baselines")
        if self.transfer.factor and not (self.repeats.top or self.mixes):
            raise ValueError("transfer.factor needs repeats.top above 0: fresh seeds say which mix is the best")
        stems = [file_group(file) for file in self.validation.files]
        known = ["exact_match", "generation", *(f"source:{source.name}" for source in self.mix.sources), *stems]
        for group in sorted(self.validation.weights.keys() - set(known)):
            raise ValueError(f"validation.weights.{group}: no such group; there are {', '.join(known)}")
        if len(set(stems)) < len(stems):
            raise ValueError("validation.files: two files have the same name; a file's name is its group's")
        return self

    @property
    def num_named(self) -> int:
        """Mixes that the settings name: baselines and `mixes`. Without a search they have fresh seeds only."""
        return len(self.baselines) + len(self.mixes)

    @property
    def predicts(self) -> bool:
        """Whether a Gaussian process over the search's trials names one more."""
        return self.predicted and self.num_trials > 0

    @property
    def num_repeats(self) -> int:
        """Trials with fresh seeds, at most."""
        found = self.repeats.top if self.num_trials else 0
        return (self.num_named + found) * self.repeats.seeds if found or self.mixes else 0

    @property
    def num_transfers(self) -> int:
        """Longer trials, at most."""
        return (1 + len(self.baselines)) * self.transfer.seeds if self.transfer.factor else 0


def num_rows(mix: MixConfig) -> int:
    """Rows of every trial's mix: what `mix` asks for in all."""
    sources = sum(source.max_rows or 0 for source in mix.sources)
    return mix.task_score.exact_match_budget + mix.task_score.generation_budget + sources


def changed_mix(mix: MixConfig, changes: Mapping[str, Any]) -> MixConfig:
    """`mix` with what `changes` says, sections joined key by key. Raises ValueError."""
    values = mix.model_dump()
    for key, value in changes.items():
        inside = isinstance(value, dict) and isinstance(values.get(key), dict)
        values[key] = {**values[key], **value} if inside else value
    return MixConfig.model_validate(values)


def file_group(file: str) -> str:
    """The group of a file of `validation.files`."""
    return f"file:{PurePosixPath(file).stem}"
