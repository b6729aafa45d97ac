"""What a fine-tune will need, before anything is loaded: memory part by part, steps, time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from birbal_ray.models import Model, quiet_libraries
from birbal_ray.progress import CARDS, duration, last_figures
from birbal_ray.settings import ConfigError, write_duration
from birbal_ray.train.budget import Forecast, forecast_training, num_passes, rate_key, training_speed
from birbal_ray.train.config import LoraSettings, TrainConfig
from birbal_ray.train.data import Packing

GIB = 1 << 30
# NF4 with double quantisation: half a byte a weight, one byte a block of 64 weights for its absmax,
# four bytes for each 256 of those (Dettmers et al. 2023, QLoRA, section 3).
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
MASTER_BYTES = 4  # adapter weights and gradients are float32
DENSE_WARNING_TOKENS = 4096
OPTIMIZER_BYTES = {"paged_adamw_32bit": 8.0, "adamw_torch": 8.0, "adamw_8bit": 2.03}
LOGIT_CHUNK_TOKENS = 256  # TRL's fused LM head computes the loss in chunks
# What a card keeps for itself: CUDA context, workspaces of cuBLAS; and memory lost between blocks.
CONTEXT_BYTES, FRAGMENTATION = int(0.8 * GIB), 0.03


@dataclass(frozen=True, slots=True)
class Shapes:
    """A model's sizes in elements. `linear`: (out, in) of each quantised layer; `targets`: of each adapted one."""

    linear: tuple[tuple[int, int], ...]
    targets: tuple[tuple[int, int], ...]
    into_residual: tuple[tuple[int, int], ...]  # of the linear layers whose outputs are added to the residual stream
    num_other: int  # embeddings, output head, norms
    norm_features: int  # what all norms normalise for one token
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
    quiet_libraries()
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model_path, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    head = model.get_output_embeddings()
    linear = {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    if isinstance(target_modules, list):
        targets = [shape for name, shape in linear.items() if name.rpartition(".")[2] in target_modules]
    else:
        targets = list(linear.values())
    text = model.config.get_text_config()
    heads, kv_heads = text.num_attention_heads, getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    per_token = {"q_norm": heads, "k_norm": kv_heads}  # norms of single heads
    norms = {n: m for n, m in model.named_modules() if type(m).__name__.endswith(("RMSNorm", "LayerNorm"))}
    return Shapes(
        linear=tuple(linear.values()),
        targets=tuple(targets),
        into_residual=tuple(shape for name, shape in linear.items() if name.endswith(("o_proj", "down_proj"))),
        num_other=sum(p.numel() for p in model.parameters()) - sum(out * into for out, into in linear.values()),
        norm_features=sum(
            sum(p.numel() for p in module.parameters()) * per_token.get(name.rpartition(".")[2], 1)
            for name, module in norms.items()
            if ".layers." in f".{name}"
        ),
        num_layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        num_heads=heads,
        vocabulary=text.vocab_size,
    )


def num_trainable(shapes: Shapes, lora: LoraSettings) -> int:
    """LoRA parameters: r x (in + out) for each adapted layer; DoRA has a size for each of its outputs, too."""
    return sum(lora.r * (out + into) + out * lora.use_dora for out, into in shapes.targets)


def estimate(shapes: Shapes, config: TrainConfig) -> list[Part]:
    """Peak memory of a training step by part, in bytes. Tokens in flight: micro x sequence length.

    The device must be decided. Attention by `sdpa` or `eager` takes memory that grows with the square of the tokens.
    """
    batch, lora, gpu = config.batch, config.lora, config.resources.device == "gpu"
    half = 2 if (config.model.dtype == "bfloat16" or (config.model.dtype == "auto" and gpu)) else 4
    tokens = batch.micro * batch.sequence_length
    num_linear = sum(out * into for out, into in shapes.linear)
    weight_bytes = NF4_BYTES if config.model.quantization == "nf4" else half
    trainable = num_trainable(shapes, lora)
    optimizer = config.optimizer.name if config.optimizer.name != "auto" else "paged_adamw_32bit"
    # What autograd keeps of all layers, per token: of each adapted layer its input after dropout, dropout's mask
    # (a byte) and the r features between its matrices; outputs that go on to attention or activation; what comes out
    # of these; the float32 inputs of the norms.
    saved = sum(into * (half + (lora.dropout > 0)) + lora.r * half for _, into in shapes.targets)
    saved += half * (sum(out for out, _ in shapes.linear) - sum(out for out, _ in shapes.into_residual))
    saved += half * sum(into for _, into in shapes.into_residual) + 4 * shapes.norm_features
    inputs = tokens * shapes.hidden * half * shapes.num_layers
    widest = max((into for _, into in shapes.targets), default=0)
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
        layer = f"{saved / shapes.num_layers / 1000:.0f} KB x {tokens:,} tokens"
        parts.append(Part("layer inputs", inputs, f"{shapes.num_layers} layers"))
        parts.append(Part("one recomputed layer", tokens * saved // shapes.num_layers, layer))
    else:
        parts.append(Part("activations", tokens * saved, f"{shapes.num_layers} complete layers"))
    if config.model.attention == "sdpa":
        parts.append(Part("attention mask", tokens * tokens * half, f"{tokens:,} x {tokens:,}, {half} B"))
    elif config.model.attention == "eager":
        parts.append(Part("attention scores", tokens * tokens * shapes.num_heads * (half + 4), "all heads, eager"))
    transient = tokens * widest * (half + 4 * (half == 2))  # the widest input's gradient and its float32 copy
    if config.model.quantization == "nf4":
        transient += max((out * into for out, into in shapes.linear), default=0) * half
    transient += min(tokens, LOGIT_CHUNK_TOKENS) * shapes.vocabulary * 4 * 3
    transient += shapes.vocabulary * shapes.hidden * half if not gpu else 0
    parts.append(Part("transients", transient, "gradient, float32 copy, one dequantised layer, a chunk of logits"))
    used = sum(part.num_bytes for part in parts)
    if gpu:
        parts.append(Part("CUDA context", CONTEXT_BYTES, "and cuBLAS's workspaces"))
        parts.append(Part("fragments", int(used * FRAGMENTATION), f"{FRAGMENTATION:.0%}"))
    else:
        parts.append(Part("Python, torch", int(1.2 * GIB), "libraries and their buffers"))
    return parts


def total_bytes(parts: list[Part]) -> int:
    """Sum of the parts."""
    return sum(part.num_bytes for part in parts)


def change_that_fits(shapes: Shapes, config: TrainConfig, limit_bytes: int) -> str | None:
    """`key=value …` of the first smaller configuration whose estimate is within the limit, or None.

    The first ones that are tried change no result but the time.
    """
    changes: dict[str, Any] = {}
    while total_bytes(estimate(shapes, config)) > limit_bytes:
        if not config.gradient_checkpointing:
            change: dict[str, Any] = {"gradient_checkpointing": True}
        elif config.batch.micro > 1:
            change = with_micro(config, config.batch.micro // 2)
        elif config.model.quantization == "none":
            change = {"model.quantization": "nf4"}
        elif config.batch.sequence_length > 512:
            change = {"batch.sequence_length": config.batch.sequence_length // 2}
        elif config.lora.r > 8:
            change = {"lora.r": config.lora.r // 2}
        else:
            return None
        config, changes = config.replace(change), {**changes, **change}
    return " ".join(f"{key}={value}".lower() for key, value in changes.items())


def with_micro(config: TrainConfig, most: int) -> dict[str, int]:
    """The settings that put at most `most` sequences into a micro batch, and as many as before into a step."""
    product = config.batch.micro * config.batch.accumulation
    micro = next(size for size in range(min(most, config.batch.micro), 0, -1) if product % size == 0)
    return {"batch.micro": micro, "batch.accumulation": product // micro}


def device_memory_bytes(config: TrainConfig) -> int | None:
    """Memory of the device that will train: as configured, by the card's name, or of this machine; None unknown."""
    resources = config.resources
    if resources.memory_gib:
        return int(resources.memory_gib * GIB)
    if resources.device == "cpu":
        import psutil

        return int(psutil.virtual_memory().total * 0.9)
    if resources.accelerator_type:
        card = CARDS.get(resources.accelerator_type)
        return int(card.memory_gib * GIB) if card else None
    import torch

    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


@dataclass(frozen=True, slots=True)
class Preflight:
    """What a dry run found out; the configuration's device is decided."""

    config: TrainConfig
    parts: list[Part]
    memory_bytes: int | None  # of the device; None: unknown
    change: str | None  # `key=value …` that would make it fit; None when it fits or nothing helps
    num_trainable: int
    packing: dict[str, Packing]
    forecast: Forecast | None  # None where the device's speed is unknown

    @property
    def fits(self) -> bool:
        """Whether the device holds it, as far as is known."""
        return self.memory_bytes is None or total_bytes(self.parts) <= self.memory_bytes

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps."""
        return self.packing["train"].num_packs / (self.config.batch.micro * self.config.batch.accumulation)


def run_preflight(config: TrainConfig, model: Model, packing: dict[str, Packing]) -> Preflight:
    """Memory, steps and time; nothing is loaded, the model's config is enough."""
    shapes = shapes_of(model.path, config.lora.target_modules)
    memory, trainable = device_memory_bytes(config), num_trainable(shapes, config.lora)
    change = None if memory is None else change_that_fits(shapes, config, memory) or None
    found = Preflight(config, estimate(shapes, config), memory, change, trainable, packing, None)
    if speed := training_speed(config, lambda: flops_per_token(shapes, config)):
        tokens = packing["train"].num_tokens / found.steps_per_epoch, packing["eval"].num_tokens
        kept = last_figures(rate_key(config))
        found = replace(found, forecast=forecast_training(config, *tokens, speed, kept, trainable * MASTER_BYTES))
    return found


def flops_per_token(shapes: Shapes, config: TrainConfig) -> float:
    """Floating-point operations of a training step for one token; attention inside short samples is left out.

    Two for each weight and pass; frozen weights get no gradient, the adapter's do (one more pass). With a dense mask,
    attention across all tokens of a micro batch comes on top.
    """
    passes = num_passes(config)
    weights = sum(out * into for out, into in shapes.linear) + shapes.vocabulary * shapes.hidden
    flops = 2.0 * passes * weights + 2.0 * (passes + 1) * num_trainable(shapes, config.lora)
    if config.model.attention in ("sdpa", "eager"):
        tokens = config.batch.micro * config.batch.sequence_length
        # Scores and sums of values, 4 x tokens a feature, in each forward pass; 2.5 times that backward.
        flops += (passes - 1 + 2.5) * 4.0 * tokens * shapes.hidden * shapes.num_layers
    return flops


def describe_preflight(found: Preflight) -> list[str]:
    """Lines that say what will be trained on what, and how much of it will fit in the budget."""
    config, lines = found.config, []
    for split, packing in found.packing.items():
        lines.append(
            f"{split}: {packing.num_samples:,} samples, {packing.num_tokens:,} tokens ({packing.num_loss_tokens:,} "
            f"with loss) in {packing.num_packs:,} sequences of {config.batch.sequence_length:,}, "
            f"{packing.packing_efficiency_fraction:.1%} full"
        )
        if packing.num_long:
            done = "dropped" if config.batch.long_samples == "drop" else "cut at the end"
            lines.append(f"{split}: {packing.num_long:,} samples over batch.sequence_length were {done}")
    lines.append(f"attention: {expected_kernel(config)}")
    if warning := dense_mask_warning(config.model.attention, config.batch.micro * config.batch.sequence_length):
        lines.append(f"warning: {warning}")
    have = f" of {found.memory_bytes / GIB:.1f}" if found.memory_bytes else ""
    need = total_bytes(found.parts) / GIB
    lines.append(f"{found.num_trainable:,} trainable parameters; about {need:.1f} GiB needed{have}")
    lines.append(f"{found.steps_per_epoch:,.1f} optimizer steps an epoch, {config.epochs:g} epochs asked for")
    if forecast := found.forecast:
        low, high = forecast.seconds(config.epochs * found.steps_per_epoch)
        rate, takes = f"{forecast.tokens_per_second:,.0f} tokens/s", f"that takes {duration(low)} to {duration(high)}"
        guess = f"estimate, not measured: {rate} ({forecast.source}); {takes}"
        lines.append(f"at the {rate} last seen here {takes}" if forecast.is_measured else guess)
        steps = forecast.steps_within(config.budget or 0.0)
        epochs = steps / found.steps_per_epoch
        if config.budget and (epochs < config.epochs or not forecast.is_measured):
            fit = f"{'will' if forecast.is_measured else 'would'} fit in the budget; {config.epochs:g} were asked for"
            lines.append(f"{epochs:.2g} epochs ({int(steps):,} steps) {fit}")
    return lines


def expected_kernel(config: TrainConfig) -> str:
    """What will compute attention on the device that the settings name, in words."""
    if config.model.attention != "auto":
        return config.model.attention
    if config.resources.device != "gpu" or config.model.dtype == "float32":
        return "sdpa sample by sample, without a mask (torch's varlen kernel needs CUDA and 16 bits)"
    if (card := config.resources.accelerator_type) in ("T4", "V100"):
        return f"sdpa sample by sample, without a mask (the varlen kernel does not run on a {card})"
    return "varlen FlashAttention of torch, without a mask"


def dense_mask_warning(attention: str, tokens: int) -> str | None:
    """What a dense mask over a micro batch's `tokens` costs, where one is built over more than 4,096; else None."""
    if attention not in ("sdpa", "eager") or tokens <= DENSE_WARNING_TOKENS:
        return None
    return (
        f"model.attention={attention} builds a mask of {tokens:,} x {tokens:,} ({tokens**2 / 2**20:,.0f} MiB at a byte "
        f"each) and computes attention across all samples of a batch; model.attention=auto needs no mask"
    )


def refuse_if_too_large(found: Preflight) -> None:
    """Raise ConfigError with the change that would make it fit the device."""
    if found.fits or found.memory_bytes is None:
        return
    need, have = total_bytes(found.parts) / GIB, found.memory_bytes / GIB
    advice = (
        f"it would fit with --set {found.change.replace(' ', ' --set ')}" if found.change else "no smaller setting fits"
    )
    raise ConfigError(
        f"about {need:.1f} GiB are needed, the device has {have:.1f}; {advice}; "
        "if it has more, set resources.memory_gib"
    )


def refuse_if_too_short(found: Preflight) -> None:
    """Raise ConfigError where the budget is shorter than loading, one step, two evaluations and saving took here."""
    budget, least = found.config.budget, found.forecast.least_budget_seconds if found.forecast else 0.0
    if budget and found.forecast and found.forecast.is_measured and budget < least:
        raise ConfigError(
            f"budget={budget:.0f} s is too short: loading, a step, the evaluations and saving took {least:.0f} s on "
            f"this device; set --budget to {write_duration(least)} or more"
        )
