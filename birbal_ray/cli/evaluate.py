"""`birbal evaluate`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from birbal_ray.cli.common import config_options, format_option, note, overwrite_option, print_table

if TYPE_CHECKING:
    from birbal_ray.evaluate.run import EvaluateResult


@click.command(short_help="Held-out scores of base model, adapters, merged models.")
@click.option("--tasks", metavar="PATH", help="Folder of task files, one .json file, or a .tar.gz archive.")
@click.option("--model", metavar="NAME", help="The base model: smollm2-135m, a local folder, or a Hub id.")
@click.option("--adapter", "adapters", metavar="DIR", multiple=True, help="Adapter, or train run; NAME=DIR names it.")
@click.option("--merged", metavar="DIR", multiple=True, help="Whole model to compare with the base; NAME=DIR names it.")
@click.option("--mix", metavar="DIR", help="Leave out what this mix had in its hands; adapters' own mixes always are.")
@click.option("--output", metavar="DIR", help="Run folder; the same command on it continues where it stopped.")
@click.option("--instances-per-task", type=click.IntRange(min=1), help="Held-out instances of each task, at most (50).")
@click.option("--select", metavar="WHICH", help="all, selected (the 462 of Birbal), or a file of task names.")
@click.option("--replicas", type=click.IntRange(min=1), help="Engine copies, one GPU each by default.")
@click.option("--device", type=click.Choice(["auto", "cpu", "gpu"]), help="Where the engines run.")
@click.option("--per-task", is_flag=True, help="Print every task's scores, not only the comparisons.")
@overwrite_option
@click.option("--dry-run", is_flag=True, help="Say who would be compared on what. Starts no engine.")
@config_options
@format_option
def evaluate(
    tasks: str | None,
    model: str | None,
    adapters: tuple[str, ...],
    merged: tuple[str, ...],
    mix: str | None,
    output: str | None,
    instances_per_task: int | None,
    select: str | None,
    replicas: int | None,
    device: str | None,
    per_task: bool,
    overwrite: bool,
    dry_run: bool,
    config_file: str | None,
    assignments: tuple[str, ...],
    output_format: str,
) -> None:
    """Does the adapter beat its base model on instances and tasks that were never sampled?

    Prompts as in training (zero-shot) and few-shot, on the engines that `birbal score` uses. Differences
    come with a 95 % interval (paired bootstrap over tasks). Stopped at any moment, it continues when
    called again.

    \b
    Examples:
      birbal evaluate --tasks my-tasks/ --model smollm2-135m --adapter runs/train --output runs/evaluate
      birbal evaluate --config configs/evaluate/mistral-7b.yaml --tasks natural-instructions/ \\
          --adapter mine=runs/train --adapter theirs=adapters/other --mix runs/mix --output runs/evaluate
    """
    from birbal_ray.evaluate import run as step
    from birbal_ray.evaluate.config import EvaluateConfig
    from birbal_ray.progress import ProgressLine
    from birbal_ray.score.run import plan_run
    from birbal_ray.settings import load_config

    flags = {
        "tasks.path": tasks,
        "tasks.select": select,
        "tasks.instances_per_task": instances_per_task,
        "model.name": model,
        "adapters": list(adapters) or None,
        "merged": list(merged) or None,
        "mix": mix,
        "output": output,
        "resources.num_replicas": replicas,
        "engine.device": device,
    }
    config = load_config(EvaluateConfig, config_file, assignments, flags)
    if not dry_run:
        print_result(step.evaluate(config, overwrite=overwrite), output_format, per_task=per_task)
        return
    progress = ProgressLine()
    setup = step.prepared(config)
    plan = plan_run(setup.scoring, progress, excluded=setup.excluded)
    step.tell(setup, plan, progress)
    rows = [
        {
            "task": task.name,
            "label": task.label.value,
            "held out": setup.kind(task.name),
            "instances": task.num_instances,
            "left out": task.num_excluded,
        }
        for task in plan.tasks
    ]
    print_table(rows, output_format)
    prompts = plan.num_rows * len(setup.contenders) * len(config.prompt_formats)
    note(f"{prompts:,} prompts; nothing was started (--dry-run)")


def print_result(result: EvaluateResult, output_format: str, *, per_task: bool = False) -> None:
    """Comparisons (or every task's scores) on stdout, the verdicts on stderr."""
    from birbal_ray.report.conclusions import verdict

    if output_format != "text":
        print_table(result.evaluation if per_task else result.comparisons, output_format)
    else:
        if per_task or not result.comparisons:
            print_table(_per_task(result.evaluation), output_format)
        if result.comparisons:
            print_table([_shown(row) for row in result.comparisons], output_format)
    for row in result.comparisons:
        if row["scope"] == "all":
            found = verdict(row)
            note(f"{found.title}. {found.text}")
    rows = result.manifest["rows"]
    note(f"{rows['scored']} rows scored of {rows['planned']}, {rows['errors']} errors; results: {result.folder}")


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "contender": row["contender"],
        "prompts": row["prompt_format"],
        "scope": row["scope"],
        "tasks": row["num_tasks"],
        "base": row["base_score"],
        "score": row["score"],
        "difference": f"{row['difference']:+.3f}",
        "95 % interval": f"{row['difference_low']:+.3f} to {row['difference_high']:+.3f}",
        "won": row["num_wins"],
        "lost": row["num_losses"],
        "tied": row["num_ties"],
    }


def _per_task(evaluation: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for row in evaluation:
        about = {"task": row["task"], "label": row["label"], "held out": row["held_out"]}
        shown = rows.setdefault((row["prompt_format"], row["task"]), {"prompts": row["prompt_format"], **about})
        shown["n"] = min(shown.get("n", row["num_scored"]), row["num_scored"])
        shown[row["contender"]] = row["task_score"]
    return list(rows.values())
