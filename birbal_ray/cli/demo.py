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
    from birbal_ray.cli.score import print_result
    from birbal_ray.config import load_config
    from birbal_ray.config.score import ScoreConfig
    from birbal_ray.ni.catalog import sample_tasks_folder
    from birbal_ray.steps.demo import SCORE_SETTINGS
    from birbal_ray.steps.score import score

    note("demo 1/1: score the sample tasks with SmolLM2-135M")
    flags = {**SCORE_SETTINGS, "tasks.path": str(sample_tasks_folder()), "output": str(output / "score")}
    result = score(load_config(ScoreConfig, flags=flags), overwrite=overwrite)
    print_result(result, "text")
