"""`birbal doctor`."""

from __future__ import annotations

import click

from birbal_ray.cli.common import EXIT_FAILED, format_option, note, print_table


@click.command(short_help="Check versions, CPUs, GPUs, disk, model.")
@click.option("--model", default="smollm2-135m", show_default=True, help="A model whose reachability to check.")
@click.option("--output", default=".", show_default=True, help="A folder whose disk to check.")
@format_option
@click.pass_context
def doctor(context: click.Context, model: str, output: str, output_format: str) -> None:
    """Check this machine: versions, CPUs, GPUs and Ray's names for them, memory, disk, model.

    Exits 1 when something would keep the recipe from running, and says what to do.

    \b
    Example:
      birbal doctor --model mistralai/Mistral-7B-v0.1 --output /data/runs
    """
    from birbal_ray.steps.doctor import examine

    checks = examine(model, output)
    print_table([{"check": c.name, "state": c.state, "found": c.found} for c in checks], output_format)
    problems = [check for check in checks if check.state == "problem"]
    for check in problems:
        note(f"{check.name}: {check.advice}")
    if problems:
        context.exit(EXIT_FAILED)
