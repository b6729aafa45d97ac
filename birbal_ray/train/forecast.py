"""How long a fine-tune takes, before it starts: by what its parts took on this machine, else by arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from birbal_ray.progress import CARDS, LOAD_SECONDS, MEASURED, Speed, estimate_tokens, last_figures, measured_speed
from birbal_ray.train.config import TrainConfig

WRITE_BYTES_PER_SECOND = 200e6  # of a slow disk


@dataclass(frozen=True, slots=True)
class Forecast:
    """The likeliest seconds of a fine-tune's parts; each, like the rate, may be off by the fraction `spread`."""

    tokens_per_second: float
    spread: float
    source: str  # where the rate comes from
    start_seconds: float  # of the command, before its worker's clock runs and after it has ended
    once_seconds: float  # of the worker: loading, the first evaluation, the last one and its checkpoint
    step_seconds: float  # of an optimizer step, with its part of the evaluations and checkpoints between steps

    @property
    def is_measured(self) -> bool:
        """Whether such a run was here before."""
        return self.source == MEASURED

    @property
    def least_budget_seconds(self) -> float:
        """Of the worker, for one step."""
        return self.once_seconds + self.step_seconds

    def seconds(self, num_steps: float) -> tuple[float, float]:
        """Of the command, low and high."""
        likeliest = self.start_seconds + self.once_seconds + num_steps * self.step_seconds
        return likeliest / (1 + self.spread), likeliest / (1 - self.spread)

    def steps_within(self, seconds: float) -> float:
        """Optimizer steps that the worker has time for."""
        return max(0.0, seconds - self.once_seconds) / self.step_seconds


def forecast_training(
    config: TrainConfig,
    tokens_per_step: float,
    eval_tokens: float,
    speed: Speed,
    kept: Mapping[str, float],
    adapter_bytes: float = 0.0,
) -> Forecast:
    """What a fine-tune takes; the device must be decided.

    `eval_tokens`: of one evaluation. `kept`: what the last run of this kind took here (`last_figures` of `rate_key`).
    """
    rate = (speed.low + speed.high) / 2
    write = adapter_bytes / WRITE_BYTES_PER_SECOND
    guessed = {
        "overhead": 0.0,
        "setup": sum(LOAD_SECONDS[config.resources.device]) / 2,
        "eval": eval_tokens / (rate * num_passes(config)),  # forward only
        "best": write,
        "save": 3 * write,  # with two states of Adam
    }
    start, setup, evaluation, best, save = (kept.get(f"{name}_seconds", guess) for name, guess in guessed.items())
    beside = (evaluation + best) / config.evaluation.every_steps + save / config.checkpoint.every_steps
    return Forecast(
        tokens_per_second=rate,
        spread=(speed.high - speed.low) / (speed.high + speed.low),
        source=speed.source,
        start_seconds=start,
        once_seconds=setup + evaluation + best + save,
        step_seconds=tokens_per_step / rate + beside,
    )


def training_speed(config: TrainConfig, flop_per_token: Callable[[], float], gpu: str | None = None) -> Speed | None:
    """Tokens a second: as measured here, else of the card `gpu` or that of the settings; None where neither is known.

    With `gpu` it is of that card, whatever this machine has measured.
    """
    if gpu is None and (rate := last_figures(rate_key(config)).get("tokens_per_second")):
        return measured_speed(rate)
    card = gpu or config.resources.accelerator_type
    return estimate_tokens(card, flop_per_token()) if card in CARDS else None


def num_passes(config: TrainConfig) -> int:
    """Passes through the layers in a training step: forward, backward, and forward again to recompute activations."""
    return 3 if config.gradient_checkpointing else 2


def rate_key(config: TrainConfig) -> str:
    """Under which the tokens per second of such a run are kept."""
    settings = config.batch
    where = config.resources.accelerator_type or config.resources.device
    shape = f"{settings.sequence_length} {settings.micro} r{config.lora.r} {config.model.quantization}"
    kernel = "" if config.model.attention == "auto" else f" {config.model.attention}"
    return f"train {config.model.name} {where} {shape}{kernel}"
