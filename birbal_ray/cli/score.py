"""`birbal score`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from birbal_ray.cli.common import config_options, format_option, note, overwrite_option, print_table

if TYPE_CHECKING:
    from birbal_ray.score.config import ScoreConfig
    from birbal_ray.score.run import ScoreResult


@click.command(short_help="Few-shot inference over task files, scored.")
@click.option("--tasks", metavar="PATH", help="Folder of task files, one .json file, or a .tar.gz archive.")
@click.option("--model", metavar="NAME", help="smollm2-135m (comes with us), a local folder, or a Hub id.")
@click.option("--output", metavar="DIR", help="Run folder; the same command on it continues where it stopped.")
@click.option("--instances-per-task", type=click.IntRange(min=1), help="Take the first N of each task, in hash order.")
@click.option("--select", metavar="WHICH", help="all, selected (the 462 of Birbal), or a file of task names.")
@click.option("--num-shots", type=click.IntRange(min=0), help="Positive examples in the prompt, at most (4).")
@click.option("--replicas", type=click.IntRange(min=1), help="Engine copies, one GPU each by default.")
@click.option("--device", type=click.Choice(["auto", "cpu", "gpu"]), help="Where the engines run.")
@click.option("--strict", is_flag=True, help="Stop at the first task file that can't be used.")
@overwrite_option
@click.option("--dry-run", is_flag=True, help="Say what would run: tasks, prompts, tokens, time. Starts no engine.")
@config_options
@format_option
def score(
    tasks: str | None,
    model: str | None,
    output: str | None,
    instances_per_task: int | None,
    select: str | None,
    num_shots: int | None,
    replicas: int | None,
    device: str | None,
    strict: bool,
    overwrite: bool,
    dry_run: bool,
    config_file: str | None,
    assignments: tuple[str, ...],
    output_format: str,
) -> None:
    """Run few-shot inference over task files and score every completion.

    Writes rows/*.parquet (one row per instance), task_scores.parquet and manifest.json. Stopped at
    any moment, it continues when called again; settings under `resources` may change in between.

    \b
    Examples:
      birbal score --tasks my-tasks/ --model smollm2-135m --output runs/score --instances-per-task 20
      birbal score --config configs/score/mistral-7b.yaml --tasks natural-instructions/ --output runs/score
      birbal score --tasks my-tasks/ --output runs/score --set engine.max_model_len=1024 --dry-run
    """
    from birbal_ray.progress import ProgressLine
    from birbal_ray.score import run as step
    from birbal_ray.score.config import ScoreConfig
    from birbal_ray.settings import load_config

    flags = {
        "tasks.path": tasks,
        "tasks.select": select,
        "tasks.instances_per_task": instances_per_task,
        "tasks.strict": strict or None,
        "model.name": model,
        "output": output,
        "prompt.num_shots": num_shots,
        "resources.num_replicas": replicas,
        "engine.device": device,
    }
    config = load_config(ScoreConfig, config_file, assignments, flags)
    if dry_run:
        _print_dry_run(step.resolve_config(config), output_format, ProgressLine())
    else:
        print_result(step.score(config, overwrite=overwrite), output_format)


def print_result(result: ScoreResult, output_format: str) -> None:
    """The table per task on stdout, totals on stderr."""
    columns = ["task", "label", "n", "task score", "95 % interval", "errors"]
    if output_format == "text":
        rows: list[dict[str, Any]] = [
            {
                "task": row["task"],
                "label": row["label"],
                "n": row["num_scored"],
                "task score": row["task_score"],
                "95 % interval": _interval(row),
                "errors": row["num_errors"],
            }
            for row in result.task_scores
        ]
        print_table(rows, output_format, columns)
    else:
        print_table(result.task_scores, output_format)
    rows_of, tokens = result.manifest["rows"], result.manifest["tokens"]
    for label in ("exact_match", "generation"):
        scores = [
            row["task_score"] for row in result.task_scores if row["label"] == label and row["task_score"] is not None
        ]
        if scores:
            note(f"mean {label} task score: {sum(scores) / len(scores):.3f} over {len(scores)} tasks")
    errors = ", ".join(f"{count} {kind}" for kind, count in rows_of["errors"].items()) or "no errors"
    note(f"{rows_of['scored']} rows scored of {rows_of['planned']}, {errors}")
    if tokens["cached"]:
        note(f"{tokens['prompt']:,} prompt tokens, {tokens['cached_fraction']:.0%} of them from the prefix cache")
    session = result.manifest["last_session"]
    if session.get("rows_per_second"):
        note(
            f"the last session: {session['rows']} rows in {session['wall_seconds']:.0f} s, "
            f"{session['rows_per_second']:.1f} rows/s once the model was loaded ({session['load_seconds']:.0f} s)"
        )
    note(f"scored rows and task scores: {result.folder}")


def _interval(row: dict[str, Any]) -> str:
    return "-" if row["task_score"] is None else f"{row['task_score_low']:.3f} to {row['task_score_high']:.3f}"


def _print_dry_run(config: ScoreConfig, output_format: str, progress: Any) -> None:
    from birbal_ray.progress import duration
    from birbal_ray.rates import recall
    from birbal_ray.score import throughput
    from birbal_ray.score.run import describe_plan, plan_run

    plan = plan_run(config, progress, count_tokens=True)
    describe_plan(plan, config, progress)
    rows = [
        {
            "task": task.name,
            "label": task.label.value,
            "instances": task.num_instances,
            "shots": task.num_shots,
            "shared tokens": task.num_shared_tokens,
            "own tokens": task.num_own_tokens,
            "max completion": task.max_completion_tokens,
            "too long": task.num_too_long,
        }
        for task in plan.tasks
    ]
    print_table(rows, output_format)
    fitting = [(task, task.num_prompts or 0) for task in plan.tasks]
    shared_once = sum(task.num_shared_tokens or 0 for task, _ in fitting)
    shared_all = sum((task.num_shared_tokens or 0) * count for task, count in fitting)
    own = sum(task.num_own_tokens or 0 for task, _ in fitting)
    completion = sum(task.max_completion_tokens * count for task, count in fitting)
    prompts, total = sum(count for _, count in fitting), shared_all + own
    note(f"prompts {prompts:,} in {len(plan.shards(config.shard_rows)):,} shards")
    note(f"prompt tokens {total:,}: {shared_all:,} shared ({shared_all / max(1, total):.0%}), {own:,} own")
    note(f"to compute with the prefix cache: {shared_once + own:,} prompt, at most {completion:,} completion tokens")
    rate = recall(throughput.rate_key(config))
    if rate:
        rate *= config.resources.num_replicas
        note(f"about {duration((total + completion / 4) / rate)} at the {rate:,.0f} tokens/s last seen here")
    else:
        note("no run of this model on this machine yet, so no estimate of time")
    note("nothing was started (--dry-run)")
