"""`birbal harness`: public benchmarks through lm-evaluation-harness."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from birbal_ray.cli.common import format_option, note, print_table


@click.command(short_help="Measure a model on public benchmarks.")
@click.option("--model", metavar="NAME", help="Local folder, Hub id, or embedded model.")
@click.option(
    "--adapter", metavar="DIR", help="LoRA adapter on the model: a PEFT folder, or the output of `birbal train`."
)
@click.option("--output", metavar="DIR", help="The run's folder.")
@click.option(
    "--benchmark", "benchmarks", multiple=True, metavar="NAME", help="One of --list; repeatable. Default: all of them."
)
@click.option(
    "--task", "tasks", multiple=True, metavar="NAME", help="Any task of the harness, beside the leaderboard's metrics."
)
@click.option(
    "--include-path",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of further task files (YAML), which also replace the harness's of the same name.",
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the first N documents of every task.")
@click.option("--num-fewshot", type=click.IntRange(min=0), metavar="N", help="Examples in the prompt, for every task.")
@click.option("--batch-size", default="8", show_default=True, metavar="N|auto", help="Requests computed together.")
@click.option("--device", metavar="NAME", help="For example cuda:0 or cpu; default: a GPU where there is one.")
@click.option(
    "--backend",
    type=click.Choice(["hf", "vllm"]),
    default="hf",
    show_default=True,
    help="What computes: transformers, or vLLM (on GPUs).",
)
@click.option("--team", metavar="NAME", help="The model's name in results.json; default: the model's and adapter's.")
@click.option("--overwrite", is_flag=True, help="Start anew where the folder holds another run.")
@click.option("--list", "list_only", is_flag=True, help="Show the leaderboard's metrics and how each is measured.")
@click.option("--dry-run", is_flag=True, help="Check names and show what would run; load no model, write nothing.")
@format_option
def harness(list_only: bool, dry_run: bool, overwrite: bool, output_format: str, **settings: Any) -> None:
    """Measure a model with lm-evaluation-harness on the benchmarks of the challenge's leaderboard.

    A finished benchmark stands in the output folder and is not run again: the same command continues,
    further --benchmark add to it. results.json there goes to `birbal leaderboard --add`. The harness's
    definitions are not HELM's, by which the published figures were made: an indication, not the same.

    \b
    Example:
      birbal harness --model mistralai/Mistral-7B-v0.1 --adapter runs/train/adapter --output runs/harness
      birbal harness --list
    """
    if list_only:
        _print_benchmarks(output_format)
        return
    from birbal_ray.evaluate import harness as step
    from birbal_ray.evaluate.harness_results import COMPARABLE_NOTE
    from birbal_ray.evaluate.leaderboard import METRICS

    request = step.Request(**settings)
    if dry_run:
        print_table(step.dry_run(request), output_format)
        return
    result = step.run(request, overwrite=overwrite)
    print_table(result.rows, output_format)
    if any(row["metric"] in METRICS for row in result.rows):
        note(f"not comparable: {COMPARABLE_NOTE}")
        note(f"place it: birbal leaderboard --add {result.folder / step.RESULTS_FILE}")


def _print_benchmarks(output_format: str) -> None:
    from birbal_ray.evaluate.benchmarks import listing

    rows = listing()
    if output_format == "text":  # narrow
        for row in rows:
            first, *others = (row["tasks"] or "-").split()
            row["tasks"] = f"{first} and {len(others)} more" if others else first
    columns = [name for name in rows[0] if output_format != "text" or name != "needs"]
    print_table(rows, output_format, columns)
