"""The model card of an adapter."""

from __future__ import annotations

from typing import Any

import yaml


def adapter_card(manifest: dict[str, Any], settings: dict[str, Any], mix: dict[str, Any]) -> str:
    """Markdown with the Hub's YAML head: base model, data, settings, losses, how to load."""
    model, result, packing = manifest["model"], manifest["result"], manifest["packing"]["train"]
    head = {
        "base_model": model["name"],
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "qlora", "sft", "trl", "birbal_ray"],
    }
    sources = "\n".join(
        f"| {row['source']} | {row.get('label') or '-'} | {row['train']:,} | {row['eval']:,} |"
        for row in mix["composition"]
    )
    licences = "\n".join(f"- {one['source']}: {one['licences']}" for one in mix["licenses"])
    lora, optimizer, batch = settings["lora"], settings["optimizer"], settings["batch"]
    best, base = f"{result['best_eval_loss']:.4f}", f"{result['base_eval_loss']:.4f}"
    tokens = f"{packing['num_samples']:,} samples, {packing['num_tokens']:,} tokens"
    full = f"{packing['packing_efficiency_fraction']:.1%} full"
    budget = f"{settings['budget']:.0f} s" if settings["budget"] else "none"
    return f"""---
{yaml.safe_dump(head, sort_keys=False).strip()}
---

# LoRA adapter for {model["name"]}

Fine-tuned on instances that the base model answered badly, with birbal_ray.
The adapter of step {result["best_step"]}: eval loss {best}, the base model's was {base} (mean per answer token,
{manifest["packing"]["eval"]["num_samples"]:,} held-back rows of the mix).

## Use

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({model["path"]!r})
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```

Prompts look as in training: `### Instruction:\\n…\\n\\n### Input:\\n…\\n\\n### Response:\\n`.
`birbal merge` folds the adapter into the base model's weights.

## Data

{tokens} ({packing["num_loss_tokens"]:,} of them with loss), in
{packing["num_packs"]:,} packed sequences of {batch["sequence_length"]:,} ({full});
{packing["num_long"]:,} samples were over that length ({batch["long_samples"]}).

| source | label | train | eval |
| --- | --- | --- | --- |
{sources}

Licences of the data:
{licences}

## Training

| | |
| --- | --- |
| quantisation | {settings["model"]["quantization"]} |
| LoRA | r {lora["r"]}, alpha {lora["alpha"]}, dropout {lora["dropout"]}, {lora["target_modules"]} |
| batch | {batch["micro"]} x {batch["accumulation"]} sequences |
| learning rate | {optimizer["learning_rate"]:g}, cosine, {optimizer["warmup_steps"]} warm-up steps at most |
| NEFTune alpha | {settings["neftune_alpha"]} |
| steps | {result["num_steps"]:,} (ended by: {result["ended_by"]}) |
| epochs | {result["epochs"]:.2f} of {settings["epochs"]:g} |
| budget, used | {budget}, {result["elapsed_seconds"]:.0f} s |
| seed | {settings["seed"]} |

`manifest.json` beside this folder has every setting, input hash and package version.
"""
