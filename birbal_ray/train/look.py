"""What a training run will cost, from the settings, the model's shapes and the packed mix."""

from __future__ import annotations

from dataclasses import dataclass

from birbal_ray.models import Model
from birbal_ray.progress import duration
from birbal_ray.rates import recall
from birbal_ray.settings import ConfigError
from birbal_ray.train import preflight
from birbal_ray.train.config import TrainConfig
from birbal_ray.train.data import Packing


@dataclass(frozen=True, slots=True)
class Preflight:
    """What a dry run found out. Bytes; tokens; `steps` are optimizer steps."""

    parts: list[preflight.Part]
    memory_bytes: int | None
    change: str | None  # `key=value …` that would make it fit; None when it fits or nothing helps
    fits: bool
    num_trainable: int
    packing: dict[str, Packing]
    steps_per_epoch: float
    tokens_per_second: float | None
    steps_in_budget: int | None
    epochs_in_budget: float | None


def look(config: TrainConfig, model: Model, packing: dict[str, Packing]) -> Preflight:
    """Memory and steps; nothing is loaded."""
    gpu = config.resources.device == "gpu"
    attention = config.model.attention if config.model.attention != "auto" else "sdpa"
    shapes = preflight.shapes_of(model.path, config.lora.target_modules)
    parts = preflight.estimate(shapes, config, gpu=gpu, attention=attention)
    memory = preflight.device_memory_bytes(config)
    fits = memory is None or preflight.total_bytes(parts) <= memory
    change = None
    if memory is not None and not fits:
        change = preflight.change_that_fits(shapes, config, memory, gpu=gpu, attention=attention)
    per_step = config.batch.micro * config.batch.accumulation
    steps_per_epoch = packing["train"].num_packs / per_step
    rate = recall(rate_key(config))
    steps = None
    if rate and config.budget:
        tokens_per_step = packing["train"].num_tokens / steps_per_epoch
        steps = int(config.budget * rate / tokens_per_step)
    return Preflight(
        parts=parts,
        memory_bytes=memory,
        change=change,
        fits=fits,
        num_trainable=preflight.num_trainable(shapes, config.lora.r),
        packing=packing,
        steps_per_epoch=steps_per_epoch,
        tokens_per_second=rate,
        steps_in_budget=steps,
        epochs_in_budget=steps / steps_per_epoch if steps is not None else None,
    )


def described(found: Preflight, config: TrainConfig) -> list[str]:
    """Lines that say what will be trained on what, and how much of it will fit in the budget."""
    lines = []
    for split, packing in found.packing.items():
        lines.append(
            f"{split}: {packing.num_samples:,} samples, {packing.num_tokens:,} tokens ({packing.num_loss_tokens:,} "
            f"with loss) in {packing.num_packs:,} sequences of {config.batch.sequence_length:,}, "
            f"{packing.packing_efficiency_fraction:.1%} full"
        )
        if packing.num_long:
            done = "dropped" if config.batch.long_samples == "drop" else "cut at the end"
            lines.append(f"{split}: {packing.num_long:,} samples over batch.sequence_length were {done}")
    need = preflight.total_bytes(found.parts) / preflight.GIB
    have = f" of {found.memory_bytes / preflight.GIB:.1f}" if found.memory_bytes else ""
    lines.append(f"{found.num_trainable:,} trainable parameters; about {need:.1f} GiB needed{have}")
    lines.append(f"{found.steps_per_epoch:,.1f} optimizer steps an epoch, {config.epochs:g} epochs asked for")
    if found.tokens_per_second:
        seconds = config.epochs * found.packing["train"].num_tokens / found.tokens_per_second
        lines.append(f"at the {found.tokens_per_second:,.0f} tokens/s last seen here that takes {duration(seconds)}")
    if found.epochs_in_budget is not None and found.epochs_in_budget < config.epochs:
        fit = f"{found.epochs_in_budget:.2g} epochs ({found.steps_in_budget:,} steps)"
        lines.append(f"{fit} will fit in the budget; {config.epochs:g} were asked for")
    return lines


def refuse_if_too_large(found: Preflight) -> None:
    """Raise ConfigError with the change that would make it fit."""
    if found.fits or found.memory_bytes is None:
        return
    need, have = preflight.total_bytes(found.parts) / preflight.GIB, found.memory_bytes / preflight.GIB
    advice = (
        f"it would fit with --set {found.change.replace(' ', ' --set ')}" if found.change else "no smaller setting fits"
    )
    raise ConfigError(f"about {need:.1f} GiB are needed, the device has {have:.1f}; {advice}")


def rate_key(config: TrainConfig) -> str:
    """Under which `rates` keeps the tokens per second of such a run."""
    settings = config.batch
    where = config.resources.accelerator_type or config.resources.device
    shape = f"{settings.sequence_length} {settings.micro} r{config.lora.r} {config.model.quantization}"
    return f"train {config.model.name} {where} {shape}"
