"""The demo: the recipe on the sample tasks, minutes on two CPU cores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from birbal_ray.config import load_config
from birbal_ray.config.mix import MixConfig
from birbal_ray.config.score import ScoreConfig
from birbal_ray.config.train import TrainConfig
from birbal_ray.ni.catalog import sample_tasks_folder
from birbal_ray.steps.mix import MixResult, mix
from birbal_ray.steps.score import ScoreResult, score
from birbal_ray.steps.train import TrainResult, train

SCORE_FOLDER, MIX_FOLDER, TRAIN_FOLDER = "score", "mix", "train"
SCORE_SETTINGS: dict[str, Any] = {
    "tasks.instances_per_task": 24,
    "completion.max_completion_tokens": 48,
    "engine.max_model_len": 1024,
    "shard_rows": 12,
}
MIX_SETTINGS: dict[str, Any] = {
    "task_score.exact_match_budget": 48,
    "task_score.generation_budget": 48,
    "task_score.allow_shortfall": True,
    "eval_fraction": 0.1,
}
# configs/train/tiny.yaml, smaller still: on a CPU a step takes seconds however few tokens it has.
TRAIN_SETTINGS: dict[str, Any] = {
    "epochs": 1,
    "lora.r": 16,
    "lora.alpha": 32,
    "batch.sequence_length": 1024,
    "batch.micro": 1,
    "batch.accumulation": 1,
    "optimizer.learning_rate": 4e-4,
    "evaluation.every_steps": 3,
    "checkpoint.every_steps": 3,
    "checkpoint.keep": 2,
}


def run_demo(
    output: Path,
    *,
    overwrite: bool,
    announce: Callable[[str], None],
    on_score: Callable[[ScoreResult], None],
    on_mix: Callable[[MixResult], None],
    on_train: Callable[[TrainResult], None],
) -> None:
    """Run every step into `output`, one folder each; finished steps are skipped. Raises as the steps do."""
    announce("demo 1/3, score: what does SmolLM2-135M get wrong on the sample tasks?")
    flags = {**SCORE_SETTINGS, "tasks.path": str(sample_tasks_folder()), "output": str(output / SCORE_FOLDER)}
    on_score(score(load_config(ScoreConfig, flags=flags), overwrite=overwrite))
    announce("demo 2/3, mix: half of the rows, more from the tasks that went wrong")
    flags = {**MIX_SETTINGS, "scores": str(output / SCORE_FOLDER), "output": str(output / MIX_FOLDER)}
    on_mix(mix(load_config(MixConfig, flags=flags), overwrite=overwrite))
    announce("demo 3/3, train: QLoRA on them, 4-bit weights and a LoRA adapter")
    flags = {**TRAIN_SETTINGS, "mix": str(output / MIX_FOLDER), "output": str(output / TRAIN_FOLDER)}
    on_train(train(load_config(TrainConfig, flags=flags), overwrite=overwrite))
