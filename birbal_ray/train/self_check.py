"""Proof on the chosen model, in seconds, that packing and adapter work, before hours are spent on it.

Two made-up samples a and b go through the model in one pack; b goes through it alone, with the kernel in force and with
eager attention. Where b's logits or the adapter's gradient differ by more than rounding, samples in a pack see each
other (a wrong mask, or layers that carry state along the sequence), and the run is refused.

The same measure decides whether Liger's fused kernels for norms and MLPs stay: only where they compute what the model
computes. TRL's own option for them is deprecated, and Hub kernels run downloaded code. Rotary embeddings and the loss
stay as they are: the first would be patched for all models of the process, the second is TRL's.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from birbal_ray.run import RunError
from birbal_ray.settings import ConfigError, one_line
from birbal_ray.train.attention import PACKED, choose_attention
from birbal_ray.train.config import TrainConfig

LENGTHS = (24, 33)  # tokens of a and b
# What rounding may change, relative: (b's logits at any token, the adapter's gradient), for float32 and for 16 bits.
TOLERANCE_32, TOLERANCE_16 = (1e-3, 1e-3), (3e-2, 0.1)
KERNEL_FACTOR = 4  # a pack may differ from its samples by so many times what the kernel differs from eager attention
KERNEL_TOLERANCE_32, KERNEL_TOLERANCE_16 = 1e-2, 0.15
MIN_QUANTISED = 0.5  # of the weights outside embeddings and head
SHRUNKEN = {"vocab_size": 512, "intermediate_size": 256, "moe_intermediate_size": 64}  # no attention depends on these


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """What was measured; differences are relative."""

    packed_difference: float  # b's logits in the pack and alone, the worst token
    packed_gradient_difference: float
    eager_difference: float  # b's logits alone, with the kernel in force and with eager attention
    seconds: float


def check_model(model: Any, dtype: torch.dtype, quantization: str = "none") -> SelfCheck:
    """Check a model with its adapter (PEFT) on the device where it is; `dtype` is that of computation.

    Raises RunError for samples that see each other, a kernel that differs from eager attention, an adapter without
    trainable parameters or without a gradient, a loss that is no number, 4-bit weights that stayed at 16 bits.
    Dropout and NEFTune are off; parameters and their `grad` are left as they were.
    """
    started = time.monotonic()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise RunError("the model has no trainable parameter: lora.target_modules matches none of its modules")
    if quantization == "nf4":
        _check_quantised(model)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    packed, alone = measure_sample(model, dtype, packed=True), measure_sample(model, dtype)
    implementation = base.config._attn_implementation
    base.set_attn_implementation("eager")
    try:
        eager = measure_sample(model, dtype)
    finally:
        base.set_attn_implementation(implementation)
    _check_gradients(alone[1], trainable)
    logits, gradient = compare(packed, alone)
    result = SelfCheck(logits, gradient, compare(alone, eager)[0], time.monotonic() - started)
    exact = dtype == torch.float32
    kernel_limit = KERNEL_TOLERANCE_32 if exact else KERNEL_TOLERANCE_16
    if not result.eager_difference <= kernel_limit:
        raise RunError(
            f"attention with model.attention={'auto' if implementation == PACKED else implementation} differs from "
            f"eager attention by {result.eager_difference:.1%} (rounding gives at most {kernel_limit:.0%}); "
            f"set model.attention=eager. {_layer_types(base)}"
        )
    for limit, found, what in zip(
        TOLERANCE_32 if exact else TOLERANCE_16,
        (result.packed_difference, result.packed_gradient_difference),
        ("logits", "gradient"),
        strict=True,
    ):
        limit = max(limit, KERNEL_FACTOR * result.eager_difference)
        if not found <= limit:
            raise RunError(
                f"samples in a pack see each other: the {what} of a packed sample differs by {found:.1%} from that of "
                f"the sample alone (rounding gives at most {limit:.1%}), so training would learn from a mixture. "
                f"{_layer_types(base)}; choose a model whose layers all attend"
            )
    return result


def measure_sample(
    model: Any, dtype: torch.dtype, *, packed: bool = False
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(logits of sample b: tokens x vocabulary, gradient of its loss by trainable parameter), b alone or behind a.

    Dropout and NEFTune are off; the parameters' own `grad` stays as it is.
    """
    embedding = model.get_input_embeddings()
    device = embedding.weight.device
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(0, embedding.num_embeddings, (n,), generator=generator).tolist() for n in LENGTHS)
    ids, lengths = (a + b, list(LENGTHS)) if packed else (b, [len(b)])
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    batch = collate([{"input_ids": ids, "labels": ids, "seq_lengths": lengths}])
    batch.pop("labels")
    inputs = {key: x.to(device) if torch.is_tensor(x) else x for key, x in batch.items()}
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sixteen = dtype in (torch.bfloat16, torch.float16)
    training = model.training
    model.eval()
    try:
        with torch.autocast(device.type, dtype=dtype if sixteen else torch.bfloat16, enabled=sixteen):
            logits = model(**inputs, use_cache=False).logits[0, -len(b) :].float()
    except ValueError as error:  # a layer that says itself what it cannot compute
        raise RunError(f"the model cannot compute packed samples: {one_line(error)} {_layer_types(model)}") from error
    finally:
        model.train(training)
    loss = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(b[1:], device=device))
    if not math.isfinite(float(loss.detach())):
        raise RunError("the model's loss is not a number on its first sample; set model.dtype=float32, or check it")
    found = torch.autograd.grad(loss, list(trainable.values()), allow_unused=True)
    gradients = {name: g.cpu() for name, g in zip(trainable, found, strict=True) if g is not None}
    return logits.detach().cpu(), gradients


def compare(
    found: tuple[torch.Tensor, dict[str, torch.Tensor]], wanted: tuple[torch.Tensor, dict[str, torch.Tensor]]
) -> tuple[float, float]:
    """Relative differences of two results of `measure_sample`: (logits at the worst token, gradient as a vector)."""
    x, y = (logits - logits.mean(dim=-1, keepdim=True) for logits in (found[0], wanted[0]))
    logits = float(((x - y).norm(dim=-1) / y.norm(dim=-1).clamp_min(1e-12)).max())
    apart = sum(float((found[1][name] - wanted[1][name]).double().square().sum()) for name in wanted[1])
    size = sum(float(g.double().square().sum()) for g in wanted[1].values())
    return logits, math.sqrt(apart / max(1e-30, size))


def check_architecture(path: Path, config: TrainConfig) -> SelfCheck:
    """`check_model` without weights: the fewest layers of the model's config that show each kind, random, on the CPU.

    Raises ConfigError where the adapter's modules are not in the model, RunError as `check_model`.
    """
    shape = AutoConfig.from_pretrained(path, trust_remote_code=False)
    text = shape.get_text_config()
    kinds = list(getattr(text, "layer_types", None) or [])
    num_layers = max([kinds.index(kind) + 1 for kind in set(kinds)] + [min(2, text.num_hidden_layers)])
    changes: dict[str, Any] = {"num_hidden_layers": num_layers, "pad_token_id": None}
    if kinds:
        changes["layer_types"] = kinds[:num_layers]
    changes |= {name: min(size, getattr(text, name)) for name, size in SHRUNKEN.items() if getattr(text, name, None)}
    for name, value in changes.items():
        setattr(text, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            shape, trust_remote_code=False, attn_implementation=choose_attention(config.model.attention)
        ).float()
        lora = LoraConfig(r=4, lora_alpha=8, target_modules=config.lora.target_modules, task_type="CAUSAL_LM")
        try:
            model = get_peft_model(model, lora)
        except ValueError as error:
            raise ConfigError(f"lora.target_modules={config.lora.target_modules}: {one_line(error)}") from None
    return check_model(model, torch.float32)


def apply_kernels(model: Any, dtype: torch.dtype, requested: str) -> str:
    """Apply Liger's kernels to a model with its adapter, if they are asked for, at hand and equal; what is in force."""
    if requested == "none":
        return "none"
    if next(model.parameters()).device.type != "cuda":
        return "none (Liger's kernels need CUDA)"
    if importlib.util.find_spec("liger_kernel") is None:
        return "none (liger-kernel is not installed)"
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    base = model.get_base_model()
    patch = MODEL_TYPE_TO_APPLY_LIGER_FN.get(base.config.model_type)
    if patch is None:
        return f"none (liger-kernel has none for {base.config.model_type})"
    parts = {"rope": False, "cross_entropy": False, "fused_linear_cross_entropy": False}
    refused = apply_if_equal(model, dtype, lambda: patch(model=base, **parts))
    return f"none ({refused})" if refused else "Liger: norms and MLP"


def apply_if_equal(model: Any, dtype: torch.dtype, patch: Callable[[], None]) -> str | None:
    """Run `patch`, which changes modules of `model`; undo it and say why where logits or gradient differ."""
    before = measure_sample(model, dtype)
    originals = {module: dict(vars(module)) for module in model.modules()}
    try:
        patch()
        logits, gradient = compare(measure_sample(model, dtype), before)
        limits = TOLERANCE_32 if dtype == torch.float32 else TOLERANCE_16
        reason = None
        if not (logits <= limits[0] and gradient <= limits[1]):
            reason = f"they change logits by {logits:.1%} and the gradient by {gradient:.1%}"
    except (RuntimeError, TypeError, ValueError, ImportError) as error:  # a kernel that this card does not run
        reason = one_line(error)[:200]
    if reason:
        for module, original in originals.items():
            vars(module).clear()
            vars(module).update(original)
    return reason


def _check_gradients(gradients: dict[str, torch.Tensor], trainable: dict[str, Any]) -> None:
    """Refuse an adapter whose second matrix gets no gradient; its first one has none while the second is zero."""
    wanted = [name for name in trainable if "lora_A" not in name]
    dead = [name for name in wanted if name not in gradients or not bool(gradients[name].any())]
    experts = [name for name in dead if "expert" in name]  # two samples don't reach every expert
    if len(experts) < len(dead) or len(dead) == len(wanted):
        modules = sorted({name.partition(".lora_")[0].rpartition(".")[2] for name in dead if name not in experts})
        raise RunError(
            f"the adapter of {len(dead):,} of {len(wanted):,} modules gets no gradient ({', '.join(modules[:5])}): it "
            "would stay as it is; name other lora.target_modules"
        )


def _check_quantised(model: Any) -> None:
    """Refuse a model whose weights mostly stayed at 16 bits, which bitsandbytes does not say (fused experts)."""
    from bitsandbytes.nn import Linear4bit

    outside = {id(module) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    small, rest = 0, {}
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit) and id(module) not in outside:
            small += module.in_features * module.out_features
        elif id(module) not in outside and "lora_" not in name:
            rest[name] = sum(p.numel() for p in module.parameters(recurse=False))
    if small < MIN_QUANTISED * (small + sum(rest.values())):
        largest = max(rest, key=lambda name: rest[name])
        raise RunError(
            f"model.quantization=nf4 left {1 - small / (small + sum(rest.values())):.0%} of the weights at 16 bits "
            f"(the largest: {largest}); bitsandbytes quantises linear layers only. Set model.quantization=none"
        )


def _layer_types(model: Any) -> str:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    kinds = sorted(set(getattr(base.config.get_text_config(), "layer_types", None) or []))
    words = ("attn", "attention", "mixer", "mamba", "ssm")
    classes = {type(m).__name__ for name, m in base.named_modules() if name.rpartition(".")[2].endswith(words)}
    return f"Its layer types: {', '.join(kinds + sorted(classes)) or type(base).__name__}"
