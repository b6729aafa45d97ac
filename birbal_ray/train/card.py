"""What a finished run shows: the adapter's model card and the loss curve."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import yaml

from birbal_ray.run import write_atomic


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


def smoothed(values: list[float], weight: float = 0.8) -> list[float]:
    """Exponential moving average, corrected for its start."""
    average, correction, result = 0.0, 0.0, []
    for value in values:
        average, correction = weight * average + (1 - weight) * value, weight * correction + (1 - weight)
        result.append(average / correction)
    return result


def draw_loss_curve(metrics: list[dict[str, Any]], best_step: int | None, file: Path) -> None:
    """PNG of train and eval loss over steps, the best adapter's evaluation marked."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    train = [(line["step"], line["loss"]) for line in metrics if "loss" in line]
    evaluations = [(line["step"], line["eval_loss"]) for line in metrics if "eval_loss" in line]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    if train:
        steps, losses = [step for step, _ in train], [loss for _, loss in train]
        axes.plot(steps, losses, color="#9db8d9", linewidth=1, label="train loss, each step")
        axes.plot(steps, smoothed(losses), color="#1f5fa8", linewidth=1.8, label="train loss, smoothed")
    if evaluations:
        axes.plot(*zip(*evaluations, strict=True), color="#d0661b", marker="o", markersize=4, label="eval loss")
    for step, loss in evaluations:
        if step == best_step:
            axes.plot(step, loss, marker="*", markersize=15, color="#2e8b3d", linestyle="none", label="best adapter")
            axes.annotate(f"{loss:.4f}", (step, loss), textcoords="offset points", xytext=(0, 10), ha="center")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per token (nats)")
    axes.grid(alpha=0.3)
    axes.legend()
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture)
    write_atomic(file, picture.getvalue())
