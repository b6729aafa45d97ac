"""The demo: the recipe on the sample tasks, minutes on two CPU cores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from birbal_ray.config import load_config
from birbal_ray.config.mix import MixConfig
from birbal_ray.config.score import ScoreConfig
from birbal_ray.ni.catalog import sample_tasks_folder
from birbal_ray.steps.mix import MixResult, mix
from birbal_ray.steps.score import ScoreResult, score

SCORE_FOLDER, MIX_FOLDER = "score", "mix"
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


def run_demo(
    output: Path,
    *,
    overwrite: bool,
    announce: Callable[[str], None],
    on_score: Callable[[ScoreResult], None],
    on_mix: Callable[[MixResult], None],
) -> None:
    """Run every step into `output`, one folder each; finished steps are skipped. Raises as the steps do."""
    announce("demo 1/2, score: what does SmolLM2-135M get wrong on the sample tasks?")
    flags = {**SCORE_SETTINGS, "tasks.path": str(sample_tasks_folder()), "output": str(output / SCORE_FOLDER)}
    on_score(score(load_config(ScoreConfig, flags=flags), overwrite=overwrite))
    announce("demo 2/2, mix: half of the rows, more from the tasks that went wrong")
    flags = {**MIX_SETTINGS, "scores": str(output / SCORE_FOLDER), "output": str(output / MIX_FOLDER)}
    on_mix(mix(load_config(MixConfig, flags=flags), overwrite=overwrite))
