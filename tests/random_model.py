"""Models of any shape with random weights, written without ever holding them whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SHARD_BYTES = 1 << 30
INITIAL_SPREAD = 0.02


def write_random_model(folder: Path, config: Any, seed: int = 0) -> None:
    """A causal language model of `config` (transformers) as bfloat16 safetensors; 1 GiB in memory at a time."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    shard: dict[str, Any] = {}
    places: dict[str, str] = {}

    def flush() -> None:
        name = f"model-{len(set(places.values())) + 1:05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, parameter in model.state_dict().items():
        if name.endswith("norm.weight"):
            shard[name] = torch.ones(parameter.shape, dtype=torch.bfloat16)
        else:
            values = torch.empty(parameter.shape, dtype=torch.bfloat16)
            shard[name] = values.normal_(0, INITIAL_SPREAD, generator=generator)
        if sum(tensor.nbytes for tensor in shard.values()) >= SHARD_BYTES:
            flush()
    if shard:
        flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
