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
    """Run the recipe small, for real: vLLM and SmolLM2-135M on the sample tasks that come with us.

    A few minutes on two CPU cores. Called again it continues, or says that it is up to date.

    \b
    Example:
      birbal demo --output /tmp/demo
    """
    from birbal_ray.cli.mix import print_result as print_mix
    from birbal_ray.cli.score import print_result as print_score
    from birbal_ray.steps.demo import run_demo

    run_demo(
        output,
        overwrite=overwrite,
        announce=lambda text: note(f"\n{text}"),
        on_score=lambda result: print_score(result, "text"),
        on_mix=lambda result: print_mix(result, "text"),
    )
    note(f"\nthe runs are in {output}; look at {output}/mix/README.md, or ask why a row is in:")
    note(f"  birbal mix explain sample005_news_headline:sample005-001 --mix {output}/mix")
