"""`birbal demo`."""

from __future__ import annotations

from pathlib import Path

import click

from birbal_ray.cli.common import note


@click.command(short_help="The whole recipe, small, on this machine.")
@click.option(
    "--output", default="runs/demo", show_default=True, type=click.Path(path_type=Path), help="Where the runs go."
)
@click.option("--overwrite", is_flag=True, help="Start anew instead of continuing.")
def demo(output: Path, overwrite: bool) -> None:
    """Run the recipe small, for real: vLLM, SmolLM2-135M and QLoRA on the sample tasks that come with us.

    A few minutes on two CPU cores. Called again it continues, or says that it is up to date.

    \b
    Example:
      birbal demo --output /tmp/demo
    """
    from birbal_ray.cli.mix import print_result as print_mix
    from birbal_ray.cli.score import print_result as print_score
    from birbal_ray.cli.train import print_result as print_train
    from birbal_ray.steps.demo import run_demo

    run_demo(
        output,
        overwrite=overwrite,
        announce=lambda text: note(f"\n{text}"),
        on_score=lambda result: print_score(result, "text"),
        on_mix=lambda result: print_mix(result, "text"),
        on_train=lambda result: print_train(result, "text"),
    )
    note(f"\nthe runs are in {output}: the adapter in {output}/train/adapter, its curve {output}/train/loss_curve.png")
    note("ask why a row is in the mix:")
    note(f"  birbal mix explain sample005_news_headline:sample005-001 --mix {output}/mix")
