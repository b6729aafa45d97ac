"""The whole recipe: score, mix, train, evaluate, report, each in a folder of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from birbal_ray.cluster import job_metadata, ray_session
from birbal_ray.evaluate.config import EvaluateConfig
from birbal_ray.evaluate.run import evaluate
from birbal_ray.mix.config import MixConfig
from birbal_ray.mix.run import mix
from birbal_ray.ni.catalog import sample_tasks_folder
from birbal_ray.report.run import report
from birbal_ray.run import LOG_FOLDER, MANIFEST_FILE, sigterm_as_interrupt
from birbal_ray.score.config import ScoreConfig
from birbal_ray.score.pipeline import logical_cpus
from birbal_ray.score.run import score
from birbal_ray.settings import Settings, load_config
from birbal_ray.storage import cache_folder, join, open_folder
from birbal_ray.train.config import TrainConfig
from birbal_ray.train.launch import logical_cpus as train_logical_cpus
from birbal_ray.train.run import train

ABOUT = {
    "score": "what does the model get wrong?",
    "mix": "a training set, more from the tasks that went wrong",
    "train": "QLoRA on it, 4-bit weights and a LoRA adapter",
    "evaluate": "base model against adapter on what was never sampled",
    "report": "everything on one page",
}
# The demo: the sample tasks, minutes on two CPU cores. One task of each label is kept out of training.
DEMO_HELD_OUT_TASKS = ("sample004_short_reading_question", "sample008_one_sentence_summary")
DEMO: dict[str, dict[str, Any]] = {
    "score": {
        "tasks.instances_per_task": 24,
        "completion.max_completion_tokens": 48,
        "engine.max_model_len": 1024,
        "shard_rows": 12,
    },
    "mix": {
        "task_score.exact_match_budget": 48,
        "task_score.generation_budget": 48,
        "task_score.allow_shortfall": True,
        "eval_fraction": 0.1,
    },
    # configs/train/tiny.yaml, smaller still: on a CPU a step takes seconds however few tokens it has.
    "train": {
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
    },
    "evaluate": {
        "tasks.instances_per_task": 16,
        "completion.max_completion_tokens": 48,
        "engine.max_model_len": 1024,
        "shard_rows": 16,
    },
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """The settings of every step, their folders filled in."""

    output: str
    score: ScoreConfig
    mix: MixConfig
    train: TrainConfig
    evaluate: EvaluateConfig


def demo_recipe(output: str) -> Recipe:
    """The demo's."""
    return make_recipe(output, str(sample_tasks_folder()), None, {}, DEMO, DEMO_HELD_OUT_TASKS)


def make_recipe(
    output: str,
    tasks: str | None,
    model: str | None,
    files: Mapping[str, str | None],
    settings: Mapping[str, Mapping[str, Any]],
    held_out_tasks: tuple[str, ...] = (),
) -> Recipe:
    """Settings from one file a step, `settings` over them; the steps' folders are joined up.

    `held_out_tasks` are evaluated, never scored or trained on. Raises ConfigError.
    """
    shared = {"tasks.path": tasks, "model.name": model}
    joined: dict[str, dict[str, Any]] = {
        "score": {**shared, "tasks.exclude": list(held_out_tasks) or None},
        "mix": {"scores": join(output, "score")},
        "train": {"mix": join(output, "mix"), "model.name": model},
        "evaluate": {**shared, "adapters": [f"adapter={join(output, 'train')}"], "mix": join(output, "mix")},
    }

    def config(step: str, schema: type[Settings]) -> Any:
        flags = {**joined[step], **settings.get(step, {}), "output": join(output, step)}
        return load_config(schema, files.get(step), flags=flags)

    return Recipe(
        output,
        score=config("score", ScoreConfig),
        mix=config("mix", MixConfig),
        train=config("train", TrainConfig),
        evaluate=config("evaluate", EvaluateConfig),
    )


def run_pipeline(
    recipe: Recipe,
    *,
    overwrite: bool,
    announce: Callable[[str], None],
    show: Mapping[str, Callable[[Any], None]],
) -> str:
    """Run every step, those that are up to date excepted; the report's path or URL. Raises as the steps do.

    `show` gets each step's result under its name. The steps share one Ray.
    """
    work: tuple[tuple[str, Callable[..., Any]], ...] = (
        *(("score", score), ("mix", mix), ("train", train)),
        ("evaluate", evaluate),
    )
    folder = open_folder(recipe.output)
    with ExitStack() as stack:
        if overwrite or not all(folder.is_file(f"{step}/{MANIFEST_FILE}") for step, _ in work):
            here = folder.local if folder.is_local else cache_folder() / "pipeline"
            stack.enter_context(sigterm_as_interrupt())
            stack.enter_context(
                ray_session(
                    _logical_cpus(recipe), here / LOG_FOLDER / "ray.log", about=job_metadata("pipeline", recipe.output)
                )
            )
        for number, (step, run) in enumerate(work, 1):
            announce(f"{number}/{len(work) + 1} {step}: {ABOUT[step]}")
            show[step](run(getattr(recipe, step), overwrite=overwrite))
    announce(f"{len(work) + 1}/{len(work) + 1} report: {ABOUT['report']}")
    return report(recipe.output).file


def _logical_cpus(recipe: Recipe) -> float:
    return max(logical_cpus(recipe.score), logical_cpus(recipe.evaluate.scoring()), train_logical_cpus(recipe.train))
