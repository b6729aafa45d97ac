"""`birbal demo` and `birbal pipeline`: every step with one command."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from birbal_ray.cli.common import note

if TYPE_CHECKING:
    from birbal_ray.pipeline import Recipe


@click.command(short_help="The whole recipe, small, on this machine.")
@click.option("--output", default="runs/demo", show_default=True, help="Where the runs go.")
@click.option("--resume", is_flag=True, help="Continue (what happens anyway; for scripts that say so).")
@click.option("--overwrite", is_flag=True, help="Start anew instead of continuing.")
def demo(output: str, resume: bool, overwrite: bool) -> None:
    """Run the recipe small, for real: vLLM, SmolLM2-135M and QLoRA on the sample tasks that come with us.

    About ten minutes on two CPU cores. Called again it continues, or says that it is up to date.

    \b
    Example:
      birbal demo --output /tmp/demo
    """
    from birbal_ray.pipeline import demo_recipe

    if resume and overwrite:
        raise click.UsageError("--resume and --overwrite exclude each other")
    _run(demo_recipe(output), overwrite)
    note("ask why a row is in the mix:")
    note(f"  birbal mix explain sample005_news_headline:sample005-001 --mix {output}/mix")


@click.command(short_help="The whole recipe on your tasks and model.")
@click.option("--tasks", metavar="PATH", required=True, help="Folder of task files, or a .tar.gz archive.")
@click.option("--model", metavar="NAME", help="The base model: smollm2-135m, a local folder, or a Hub id.")
@click.option("--output", metavar="DIR", required=True, help="One folder a step, or a URL.")
@click.option("--held-out-task", "held_out", metavar="NAME", multiple=True, help="Evaluate it, never train on it.")
@click.option("--score-config", metavar="FILE", help="As `birbal score --config`.")
@click.option("--mix-config", metavar="FILE", help="As `birbal mix --config`.")
@click.option("--train-config", metavar="FILE", help="As `birbal train --config`.")
@click.option("--evaluate-config", metavar="FILE", help="As `birbal evaluate --config`.")
@click.option("--budget", metavar="TIME", help="Wall-clock time of the fine-tune: 24h, 90m.")
@click.option("--device", type=click.Choice(["cpu", "gpu"]), help="Where engines and training run.")
@click.option("--overwrite", is_flag=True, help="Start every step anew.")
def pipeline(
    tasks: str,
    model: str | None,
    output: str,
    held_out: tuple[str, ...],
    score_config: str | None,
    mix_config: str | None,
    train_config: str | None,
    evaluate_config: str | None,
    budget: str | None,
    device: str | None,
    overwrite: bool,
) -> None:
    """Score, mix, train, evaluate, report: each step resumable, skipped where it is up to date.

    Killed at any moment, the same command goes on. Steps can also be run one by one on the same folders.

    \b
    Example:
      birbal pipeline --tasks natural-instructions/ --model mistralai/Mistral-7B-v0.1 --budget 24h \\
          --score-config configs/score/mistral-7b.yaml --mix-config configs/mix/birbal-200k.yaml \\
          --train-config configs/train/mistral-7b-qlora.yaml --evaluate-config configs/evaluate/mistral-7b.yaml \\
          --output runs/mistral
    """
    from birbal_ray.pipeline import make_recipe

    files = {"score": score_config, "mix": mix_config, "train": train_config, "evaluate": evaluate_config}
    engines = {"engine.device": device}
    settings = {
        **{"score": engines, "evaluate": engines},
        "train": {"budget": budget, "resources.device": device},
    }
    _run(make_recipe(output, tasks, model, files, settings, held_out), overwrite)


def _run(recipe: Recipe, overwrite: bool) -> None:
    from birbal_ray.cli.evaluate import print_result as print_evaluate
    from birbal_ray.cli.mix import print_result as print_mix
    from birbal_ray.cli.score import print_result as print_score
    from birbal_ray.cli.train import print_result as print_train
    from birbal_ray.pipeline import run_pipeline

    page = run_pipeline(
        recipe,
        overwrite=overwrite,
        announce=lambda text: note(f"\n{text}"),
        show={
            "score": lambda result: print_score(result, "text"),
            "mix": lambda result: print_mix(result, "text"),
            "train": lambda result: print_train(result, "text"),
            "evaluate": lambda result: print_evaluate(result, "text", per_task=True),
        },
    )
    note(f"\nthe adapter is in {recipe.output}/train/adapter, everything else on one page: {page}")
