"""An adapter folded into its base model's weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any


def load_with_adapter(base: Path, adapter: Path, dtype: str, device: str = "cpu") -> Any:
    """The base model in `dtype` (a torch dtype's name) with the adapter on top, for inference.

    Never the 4-bit weights that it was trained on: a delta added to them would be rounded away.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=getattr(torch, dtype), trust_remote_code=False, use_safetensors=True
    )
    return PeftModel.from_pretrained(model.to(device), adapter).eval()


def fold(model: Any, base: Path, folder: Path) -> None:
    """Fold the adapter of `load_with_adapter`'s model in; the whole model, tokenizer too, as `folder`.

    The folder appears under its name when it is whole; one that stands there is replaced. The model can't
    be used any more. Raises ValueError when a folded weight is not finite.
    """
    from transformers import AutoTokenizer

    merged = model.merge_and_unload(safe_merge=True)
    temporary = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    merged.save_pretrained(temporary, max_shard_size="5GB", safe_serialization=True)
    AutoTokenizer.from_pretrained(base, trust_remote_code=False).save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
