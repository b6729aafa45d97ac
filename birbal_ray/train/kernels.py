"""Liger's fused kernels for norms and MLPs, applied only where they compute what the model computes.

TRL's own option for them is deprecated, and Hub kernels run downloaded code. Rotary embeddings and the loss stay as
they are: the first would be patched for all models of the process, the second is TRL's.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from birbal_ray.settings import one_line
from birbal_ray.train.self_check import TOLERANCE_16, TOLERANCE_32, compare, measure_sample


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
