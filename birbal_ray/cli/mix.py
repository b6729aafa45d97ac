"""`birbal mix`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from birbal_ray.cli.common import config_options, format_option, note, overwrite_option, print_table

if TYPE_CHECKING:
    from birbal_ray.mix.run import MixResult

COLUMNS = ["source", "label", "tasks", "candidates", "kept", "train", "eval", "share"]


@click.group(invoke_without_command=True, short_help="A training set from the scores and outside datasets.")
@click.option("--scores", metavar="DIR", help="Output folder of `birbal score`.")
@click.option("--output", metavar="DIR", help="Run folder; the same command on a finished one does nothing.")
@click.option("--model", metavar="NAME", help="Refuse scores made by any other model.")
@click.option("--policy", type=click.Choice(["task_score", "birbal_2023"]), help="How rows are chosen (task_score).")
@click.option("--seed", type=click.IntRange(min=0), help="Another draw and another order.")
@overwrite_option
@click.option("--dry-run", is_flag=True, help="Decide and print the table; write nothing.")
@config_options
@format_option
@click.pass_context
def mix(
    ctx: click.Context,
    scores: str | None,
    output: str | None,
    model: str | None,
    policy: str | None,
    seed: int | None,
    overwrite: bool,
    dry_run: bool,
    config_file: str | None,
    assignments: tuple[str, ...],
    output_format: str,
) -> None:
    """Choose training rows from scores, more where the model fails, and join outside datasets.

    Writes train and eval as Parquet, JSONL (question/answer) and Alpaca JSON, a dataset card, and
    audit.parquet, which says of every candidate why it is in or out.

    \b
    Examples:
      birbal mix --scores runs/score --output runs/mix --config configs/mix/birbal-200k.yaml --dry-run
      birbal mix --scores runs/score --output runs/mix --set task_score.exact_match_budget=20000
      birbal mix explain task001_quoref_question_generation:task001-abc --mix runs/mix
      birbal mix diff runs/mix runs/mix-other-seed
    """
    if ctx.invoked_subcommand is not None:
        return
    from birbal_ray.mix import run as step
    from birbal_ray.mix.config import MixConfig
    from birbal_ray.settings import load_config

    flags = {"scores": scores, "output": output, "model": model, "policy": policy, "seed": seed}
    config = load_config(MixConfig, config_file, assignments, flags)
    print_result(step.dry_run(config) if dry_run else step.mix(config, overwrite=overwrite), output_format)


@mix.command("explain")
@click.argument("row_id")
@click.option("--mix", "mix_folder", required=True, metavar="DIR", help="Output folder of `birbal mix`.")
@format_option
def explain_row(row_id: str, mix_folder: str, output_format: str) -> None:
    """Say why one candidate is in the mix or not.

    \b
    Example:
      birbal mix explain sample001_review_sentiment:sample001-7 --mix runs/mix
    """
    from birbal_ray.mix.inspect import explain
    from birbal_ray.storage import local_copy

    answer = explain(local_copy(mix_folder), row_id)
    if output_format == "text":
        print_table([{"": name, " ": _shown(value)} for name, value in answer.items()], output_format)
    else:
        print_table([answer], output_format)


@mix.command("diff")
@click.argument("first")
@click.argument("second")
@format_option
def diff_mixes(first: str, second: str, output_format: str) -> None:
    """Compare two mixes: settings, rows, sources, counts per task.

    \b
    Example:
      birbal mix diff runs/mix runs/mix-gamma-2
    """
    import json

    from birbal_ray.mix.inspect import diff
    from birbal_ray.storage import local_copy

    result = diff(local_copy(first), local_copy(second))
    if output_format == "json":
        click.echo(json.dumps(result, indent=1, ensure_ascii=False))
        return
    if output_format == "csv":
        print_table(result["tasks"], output_format, ["source", "task", "a", "b", "difference"])
        return
    for line in result["settings"]:
        note(f"differs: {line}")
    rows = result["rows"]
    print_table(result["sources"], output_format, ["source", "a", "b", "difference"])
    only = f"{rows['only_a']:,} only in {first}, {rows['only_b']:,} only in {second}"
    click.echo(f"\n{rows['in_both']:,} rows in both, {only}")
    if result["tasks"]:
        click.echo("")
        print_table(result["tasks"], output_format, ["source", "task", "a", "b", "difference"])
    else:
        click.echo("every task has the same count in both")


def print_result(result: MixResult, output_format: str) -> None:
    """The composition on stdout; what was left out, and where the mix is, on stderr."""
    rows = result.composition
    if output_format == "text":
        rows = [{**row, "share": f"{row['share']:.1%}"} for row in rows]
    print_table(rows, output_format, COLUMNS)
    counts = result.manifest["rows"]
    note(
        f"{counts['kept']:,} rows kept ({counts['train']:,} train, {counts['eval']:,} eval) "
        f"of {counts['candidates']:,} candidates"
    )
    if counts["dropped"]:
        note("left out: " + ", ".join(f"{count:,} {reason}" for reason, count in counts["dropped"].items()))
    for label, entry in result.manifest["allocation"].items():
        if entry["shortfall"]:
            note(f"{label}: {entry['allocated']:,} of {entry['budget']:,} rows; {_short(entry['short_tasks'])}")
    for kind, count in result.manifest["contamination"]["found"].items():
        note(f"contamination: {count:,} candidates {kind} ({result.manifest['contamination']['action']})")
    note(f"mix: {result.folder}" if result.folder else "nothing was written (--dry-run)")


def _short(tasks: list[dict[str, Any]]) -> str:
    shown = ", ".join(f"{task['task']} has {task['candidates']} of {task['wanted']}" for task in tasks[:3])
    more = f", and {len(tasks) - 3} more" if len(tasks) > 3 else ""
    return f"too few candidates: {shown}{more}" if tasks else "too few candidates"


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3f}"
    return "-" if value is None else str(value)
