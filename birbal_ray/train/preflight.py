"""What a fine-tune will need, before anything is loaded: memory part by part, steps, time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from birbal_ray.models import Model
from birbal_ray.progress import duration, last_throughput
from birbal_ray.settings import ConfigError
from birbal_ray.train.config import TrainConfig
from birbal_ray.train.data import Packing

GIB = 1 << 30
# NF4 with double quantisation: half a byte a weight, one byte a block of 64 weights for its absmax,
# four bytes for each 256 of those (Dettmers et al. 2023, QLoRA, section 3).
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
MASTER_BYTES = 4  # adapter weights and gradients are float32
OPTIMIZER_BYTES = {"paged_adamw_32bit": 8.0, "adamw_torch": 8.0, "adamw_8bit": 2.03}
LOGIT_CHUNK_TOKENS = 256  # TRL's fused LM head computes the loss in chunks
# What a card keeps for itself: CUDA context, workspaces of cuBLAS; and memory lost between blocks.
CONTEXT_BYTES, FRAGMENTATION = int(0.8 * GIB), 0.05
# From the makers' data sheets, by Ray's names.
CARD_GIB = {
    **{"GeForce-RTX-4090": 24, "GeForce-RTX-3090": 24, "A10G": 24, "L4": 24, "L40S": 48, "T4": 16, "V100": 16},
    **{"A100-40G": 40, "A100-80G": 80, "H100": 80, "H200": 141, "GeForce-RTX-5090": 32},
}


@dataclass(frozen=True, slots=True)
class Shapes:
    """A model's sizes in elements. `linear`: (out, in) of each quantised layer; `targets`: of each adapted one."""

    linear: tuple[tuple[int, int], ...]
    targets: tuple[tuple[int, int], ...]
    num_other: int  # embeddings, output head, norms
    num_layers: int
    hidden: int
    num_heads: int
    vocabulary: int


@dataclass(frozen=True, slots=True)
class Part:
    """One use of memory."""

    part: str
    num_bytes: int
    how: str


def shapes_of(model_path: Path, target_modules: list[str] | str) -> Shapes:
    """Sizes from the model's config.json; no weight is read."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model_path, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    head = model.get_output_embeddings()
    linear = {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    if isinstance(target_modules, list):
        targets = [shape for name, shape in linear.items() if name.rpartition(".")[2] in target_modules]
    else:
        targets = list(linear.values())
    text = config.get_text_config()
    num_all = sum(parameter.numel() for parameter in model.parameters())
    return Shapes(
        linear=tuple(linear.values()),
        targets=tuple(targets),
        num_other=num_all - sum(out * into for out, into in linear.values()),
        num_layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        num_heads=text.num_attention_heads,
        vocabulary=text.vocab_size,
    )


def num_trainable(shapes: Shapes, r: int) -> int:
    """LoRA parameters: r x (in + out) for each adapted layer."""
    return sum(r * (out + into) for out, into in shapes.targets)


def estimate(shapes: Shapes, config: TrainConfig, *, gpu: bool, attention: str) -> list[Part]:
    """Peak memory of a training step by part, in bytes. Tokens in flight: micro x sequence length."""
    batch = config.batch
    half = 2 if (config.model.dtype == "bfloat16" or (config.model.dtype == "auto" and gpu)) else 4
    tokens = batch.micro * batch.sequence_length
    num_linear = sum(out * into for out, into in shapes.linear)
    weight_bytes = NF4_BYTES if config.model.quantization == "nf4" else half
    trainable = num_trainable(shapes, config.lora.r)
    optimizer = config.optimizer.name if config.optimizer.name != "auto" else "paged_adamw_32bit"
    # Of one layer, per token: what every linear layer takes and gives, once more for the adapter's dropout.
    per_layer = tokens * sum(out + 2 * into for out, into in shapes.linear) // shapes.num_layers * half
    kept = tokens * shapes.hidden * half * shapes.num_layers
    largest = max((out * into for out, into in shapes.linear), default=0)
    parts = [
        Part("base weights", int(num_linear * weight_bytes), f"{num_linear:,} x {weight_bytes:.3f} B"),
        Part("embeddings, head, norms", shapes.num_other * half, f"{shapes.num_other:,} x {half} B"),
        Part("LoRA weights", trainable * MASTER_BYTES, f"{trainable:,} x {MASTER_BYTES} B"),
        Part("gradients", trainable * MASTER_BYTES, f"{trainable:,} x {MASTER_BYTES} B"),
        Part(
            "optimizer", int(trainable * OPTIMIZER_BYTES[optimizer]), f"{optimizer}, {OPTIMIZER_BYTES[optimizer]:g} B"
        ),
    ]
    if config.gradient_checkpointing:
        parts.append(Part("activations", kept + 2 * per_layer, f"{shapes.num_layers} layer inputs, one layer twice"))
    else:
        parts.append(Part("activations", per_layer * shapes.num_layers, f"{shapes.num_layers} whole layers"))
    if attention == "sdpa":
        parts.append(Part("attention mask", tokens * tokens * half, f"{tokens:,} x {tokens:,}, {half} B"))
    elif attention == "eager":
        parts.append(Part("attention scores", tokens * tokens * shapes.num_heads * (half + 4), "all heads, eager"))
    if config.model.quantization == "nf4":
        parts.append(Part("dequantised layer", largest * half, "the largest, one at a time"))
    chunk = min(tokens, LOGIT_CHUNK_TOKENS) * shapes.vocabulary * 4 * 3
    head = shapes.vocabulary * shapes.hidden * half if not gpu else 0
    parts.append(Part("logits", chunk + head, f"{LOGIT_CHUNK_TOKENS} tokens at a time"))
    used = sum(part.num_bytes for part in parts)
    if gpu:
        parts.append(Part("CUDA and fragments", CONTEXT_BYTES + int(used * FRAGMENTATION), "0.8 GiB and 5 %"))
    else:
        parts.append(Part("Python, torch", int(1.2 * GIB), "libraries and their buffers"))
    return parts


def total_bytes(parts: list[Part]) -> int:
    """Sum of the parts."""
    return sum(part.num_bytes for part in parts)


def smaller(config: TrainConfig) -> Iterator[tuple[str, TrainConfig]]:
    """Ever smaller configurations with what to set for them; the first ones change no result but the time."""
    changes: list[str] = []

    def changed(section: str | None, **values: Any) -> None:
        nonlocal config
        if section is None:
            config = config.model_copy(update=values)
        else:
            config = config.model_copy(update={section: getattr(config, section).model_copy(update=values)})
        for key, value in values.items():
            path = f"{section}.{key}" if section else key
            changes[:] = [one for one in changes if not one.startswith(f"{path}=")] + [f"{path}={value}".lower()]

    if not config.gradient_checkpointing:
        changed(None, gradient_checkpointing=True)
        yield " ".join(changes), config
    while config.batch.micro > 1:
        micro = config.batch.micro // 2
        changed("batch", micro=micro, accumulation=config.batch.accumulation * config.batch.micro // micro)
        yield " ".join(changes), config
    if config.model.quantization == "none":
        changed("model", quantization="nf4")
        yield " ".join(changes), config
    while config.batch.sequence_length > 512:
        changed("batch", sequence_length=config.batch.sequence_length // 2)
        yield " ".join(changes), config
    while config.lora.r > 8:
        changed("lora", r=config.lora.r // 2)
        yield " ".join(changes), config


def change_that_fits(shapes: Shapes, config: TrainConfig, limit_bytes: int, *, gpu: bool, attention: str) -> str | None:
    """`key=value …` of the first smaller configuration whose estimate is within the limit, or None."""
    for change, candidate in smaller(config):
        if total_bytes(estimate(shapes, candidate, gpu=gpu, attention=attention)) <= limit_bytes:
            return change
    return None


def device_memory_bytes(config: TrainConfig) -> int | None:
    """Memory of the device that will train: as configured, by the card's name, or of this machine; None unknown."""
    resources = config.resources
    if resources.memory_gib:
        return int(resources.memory_gib * GIB)
    if resources.device == "cpu":
        import psutil

        return int(psutil.virtual_memory().total * 0.9)
    if resources.accelerator_type:
        known = CARD_GIB.get(resources.accelerator_type)
        return known * GIB if known else None
    import torch

    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


@dataclass(frozen=True, slots=True)
class Preflight:
    """What a dry run found out. Bytes; tokens; `steps` are optimizer steps."""

    parts: list[Part]
    memory_bytes: int | None
    change: str | None  # `key=value …` that would make it fit; None when it fits or nothing helps
    fits: bool
    num_trainable: int
    packing: dict[str, Packing]
    steps_per_epoch: float
    tokens_per_second: float | None
    steps_in_budget: int | None
    epochs_in_budget: float | None


def run_preflight(config: TrainConfig, model: Model, packing: dict[str, Packing]) -> Preflight:
    """Memory and steps; nothing is loaded."""
    gpu = config.resources.device == "gpu"
    attention = config.model.attention
    shapes = shapes_of(model.path, config.lora.target_modules)
    parts = estimate(shapes, config, gpu=gpu, attention=attention)
    memory = device_memory_bytes(config)
    fits = memory is None or total_bytes(parts) <= memory
    change = None
    if memory is not None and not fits:
        change = change_that_fits(shapes, config, memory, gpu=gpu, attention=attention)
    per_step = config.batch.micro * config.batch.accumulation
    steps_per_epoch = packing["train"].num_packs / per_step
    rate = last_throughput(rate_key(config))
    steps = None
    if rate and config.budget:
        tokens_per_step = packing["train"].num_tokens / steps_per_epoch
        steps = int(config.budget * rate / tokens_per_step)
    return Preflight(
        parts=parts,
        memory_bytes=memory,
        change=change,
        fits=fits,
        num_trainable=num_trainable(shapes, config.lora.r),
        packing=packing,
        steps_per_epoch=steps_per_epoch,
        tokens_per_second=rate,
        steps_in_budget=steps,
        epochs_in_budget=steps / steps_per_epoch if steps is not None else None,
    )


def describe_preflight(found: Preflight, config: TrainConfig) -> list[str]:
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
    need = total_bytes(found.parts) / GIB
    have = f" of {found.memory_bytes / GIB:.1f}" if found.memory_bytes else ""
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
    need, have = total_bytes(found.parts) / GIB, found.memory_bytes / GIB
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
