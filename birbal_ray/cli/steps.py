"""From task files to a training set: score, mix, tune. Settings from options, the step's own function, its table."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING

import click

from birbal_ray.cli.options import (
    ASKING_FLAGS,
    Columns,
    dry_run_option,
    format_option,
    note,
    overwrite_option,
    print_table,
    settings_options,
    shown,
)
from birbal_ray.mix.config import MixConfig
from birbal_ray.score.config import ScoreConfig
from birbal_ray.tune.config import TuneConfig

if TYPE_CHECKING:
    from birbal_ray.mix.run import MixResult
    from birbal_ray.score.run import ScoreResult
    from birbal_ray.tune.run import TuneResult


@click.command()
@settings_options(
    ScoreConfig,
    (*ASKING_FLAGS, "--num-shots", "--strict", "--adaptive = adaptive.enabled"),
    step="score",
)
@overwrite_option
@click.option("--retry-errors", is_flag=True, help="Score error rows again; every other row stays as it is.")
@click.option("--rescore", is_flag=True, help="Compute all scores from the stored predictions; starts no engine.")
@dry_run_option("Say what would run: tasks, prompts, tokens, time. Starts no engine.")
@format_option
def score(
    config: ScoreConfig, overwrite: bool, retry_errors: bool, rescore: bool, dry_run: bool, output_format: str
) -> None:
    """Run few-shot inference over task files and score every completion.

    Writes rows/TASK/*.parquet (one row per instance), task_scores.parquet and manifest.json. Stopped at
    any moment, it continues when called again. A run can grow and shrink: tasks added, changed or left
    out, more or fewer instances; rows that are there and still asked for stay. Another model or prompt is
    another run.

    \b
    Examples:
      birbal score --tasks my-tasks/ --model smollm2-135m --output runs/score --instances-per-task 20
      birbal score --config mistral-7b --tasks natural-instructions/ --output runs/score
      birbal score --tasks my-tasks/ --output runs/score --set engine.max_model_len=1024 --dry-run
    """
    from birbal_ray.score import run as step

    if retry_errors and rescore:
        raise click.UsageError("--retry-errors asks the model again, --rescore starts no engine; give one of them")
    if dry_run:
        print_score_plan(config, output_format)
    else:
        result = step.score(config, overwrite=overwrite, retry_errors=retry_errors, rescore_all=rescore)
        print_score(result, output_format)


def print_score(result: ScoreResult, output_format: str = "text") -> None:
    """The table per task on stdout, totals on stderr."""
    from birbal_ray.progress import counted
    from birbal_ray.report.load import label_means

    columns: Columns = {
        **{"task": "task", "label": "label", "n": "num_scored", "task score": "task_score"},
        "95 % interval": lambda row: (
            None if row["task_score"] is None else f"{row['task_score_low']:.3f} to {row['task_score_high']:.3f}"
        ),
        "errors": "num_errors",
    }
    if stops := result.manifest.get("stops"):
        columns["stopped because"] = lambda row: stops.get(row["task"])
    print_table(result.task_scores, output_format, columns)
    counts, tokens, session = (result.manifest[key] for key in ("rows", "tokens", "last_session"))
    for mean in label_means(result.task_scores):
        over = counted(mean["num_tasks"], "task")
        note(f"mean {mean['label']} task score: {mean['mean_task_score']:.3f} over {over}")
    errors = ", ".join(f"{count} {kind}" for kind, count in counts["errors"].items()) or "no errors"
    note(f"{counted(counts['scored'], 'row')} scored of {counts['planned']:,}, {errors}")
    if tokens["cached"]:
        note(f"{tokens['prompt']:,} prompt tokens, {tokens['cached_fraction']:.0%} of them from the prefix cache")
    if session.get("rows_per_second"):
        note(
            f"the last session: {counted(session['rows'], 'row')} in {session['wall_seconds']:.0f} s, "
            f"{session['rows_per_second']:.1f} rows/s once the model was loaded ({session['load_seconds']:.0f} s)"
        )
    if deaths := result.manifest["deaths"]:
        note(f"engines died {counted(len(deaths), 'time')}; the last time: {deaths[-1]}")
    note(f"scored rows and task scores: {result.folder}")


def print_score_plan(config: ScoreConfig, output_format: str) -> None:
    """Prompts and tokens per task on stdout; sums and the time they take on stderr."""
    from birbal_ray.plan import describe_hours, plan_score
    from birbal_ray.progress import ProgressLine
    from birbal_ray.score.plan import describe_plan, plan_run
    from birbal_ray.score.run import resolve_config

    progress, resolved = ProgressLine(), resolve_config(config)
    plan = plan_run(resolved, progress, count_tokens=True)
    describe_plan(plan, resolved, progress)
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
    num_prompts = sum(task.num_prompts or 0 for task in plan.tasks)
    own = sum(task.num_own_tokens or 0 for task in plan.tasks)
    shared_once = sum(task.num_shared_tokens or 0 for task in plan.tasks)
    shared = sum((task.num_prompts or 0) * (task.num_shared_tokens or 0) for task in plan.tasks)
    completion = sum((task.num_prompts or 0) * task.max_completion_tokens for task in plan.tasks)
    total = shared + own
    note(f"prompts {num_prompts:,} in {len(plan.shards(resolved.shard_rows or 1)):,} shards")
    note(f"prompt tokens {total:,}: {shared:,} shared ({shared / max(1, total):.0%}), {own:,} own")
    note(f"to compute with the prefix cache: {shared_once + own:,} prompt, at most {completion:,} completion tokens")
    if config.engine.backend == "vllm":
        note(describe_hours(lambda: plan_score(config)))
    note("nothing was started (--dry-run)")


@click.group(invoke_without_command=True)
@settings_options(
    MixConfig,
    ("--scores DIR", "--output DIR", "--model NAME", "--policy", "--seed"),
    step="mix",
)
@overwrite_option
@dry_run_option("Decide and print the table; write nothing.")
@format_option
def mix(config: MixConfig, overwrite: bool, dry_run: bool, output_format: str) -> None:
    """Choose training rows from scores, more where the model fails, and join outside datasets.

    Writes train and eval as Parquet, JSONL (question/answer) and Alpaca JSON, a dataset card, and
    audit.parquet, which says of every candidate why it is in or out.

    \b
    Examples:
      birbal mix --scores runs/score --output runs/mix --config birbal-200k --dry-run
      birbal mix --scores runs/score --output runs/mix --set task_score.exact_match_budget=20000
      birbal mix explain task001_quoref_question_generation:task001-abc --mix runs/mix
      birbal mix diff runs/mix runs/mix-other-seed
    """
    from birbal_ray.mix import run as step

    if not dry_run:
        print_mix(step.mix(config, overwrite=overwrite), output_format)
        return
    from birbal_ray.plan import describe_hours, plan_mix

    result = step.dry_run(config)
    print_mix(result, output_format)
    note(describe_hours(lambda: plan_mix(config, result.manifest["rows"]["candidates"])))


@mix.command("explain")
@click.argument("row_id")
@click.option("--mix", "mix_folder", required=True, metavar="DIR", help="Output folder of `birbal mix`.")
@format_option
def explain_row(row_id: str, mix_folder: str, output_format: str) -> None:
    """Say why one candidate is in the mix or not.

    \b
    Example:
      birbal mix explain sample001_review_sentiment:sample001-007 --mix runs/mix
    """
    from birbal_ray.mix.files import explain

    answer = explain(mix_folder, row_id)
    text = output_format == "text"
    # Counts keep their plain digits here: beside them stand ids.
    cells = [{"": name, " ": str(value) if type(value) is int else shown(value)} for name, value in answer.items()]
    print_table(cells if text else [answer], output_format)


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

    from birbal_ray.mix.files import diff

    result = diff(first, second)
    if output_format == "json":
        click.echo(json.dumps(result, indent=1, ensure_ascii=False))
        return
    columns = ["source", "task", "a", "b", "difference"]
    if output_format == "csv":
        print_table(result["tasks"], output_format, columns)
        return
    for line in result["settings"]:
        note(f"differs: {line}")
    rows = result["rows"]
    print_table(result["sources"], output_format, ["source", "a", "b", "difference"])
    only = f"{rows['only_a']:,} only in {first}, {rows['only_b']:,} only in {second}"
    click.echo(f"\n{rows['in_both']:,} rows in both, {only}")
    if result["tasks"]:
        click.echo("")
        print_table(result["tasks"], output_format, columns)
    else:
        click.echo("every task has the same count in both")


def print_mix(result: MixResult, output_format: str = "text") -> None:
    """The composition on stdout; what was left out, and where the mix is, on stderr."""
    rows, counts = result.composition, result.manifest["rows"]
    if output_format == "text":
        rows = [{**row, "share": f"{row['share']:.1%}"} for row in rows]
    print_table(rows, output_format)
    note(
        f"{counts['kept']:,} rows kept ({counts['train']:,} train, {counts['eval']:,} eval) "
        f"of {counts['candidates']:,} candidates"
    )
    if counts["dropped"]:
        note("left out: " + ", ".join(f"{count:,} {reason}" for reason, count in counts["dropped"].items()))
    for label, entry in result.manifest["allocation"].items():
        if entry["shortfall"]:
            short = entry["short_tasks"]
            some = ", ".join(f"{one['task']} has {one['candidates']} of {one['wanted']}" for one in short[:3])
            more = f", and {len(short) - 3} more" if len(short) > 3 else ""
            why = f"too few candidates{f': {some}{more}' if short else ''}"
            note(f"{label}: {entry['allocated']:,} of {entry['budget']:,} rows; {why}")
    for task, text in result.manifest["notes"].items():
        note(f"{task}: {text}")
    for kind, count in result.manifest["contamination"]["found"].items():
        note(f"contamination: {count:,} candidates {kind} ({result.manifest['contamination']['action']})")
    note(f"mix: {result.folder}" if result.folder else "nothing was written (--dry-run)")


@click.command()
@settings_options(
    TuneConfig,
    (
        "--scores DIR",
        "--output DIR",
        "--model NAME = train.model.name: the proxy that is fine-tuned",
        "--num-trials",
        "--budget TIME",
        "--seed",
    ),
    step="tune",
)
@overwrite_option
@dry_run_option("Print trials, tokens, hours, cost; run nothing.")
@format_option
def tune(config: TuneConfig, overwrite: bool, dry_run: bool, output_format: str) -> None:
    """Search gamma, the exact-match share, the sources' shares and failed-first with Ray Tune.

    Each trial builds a mix from the same scores, fine-tunes a proxy on a fixed number of tokens, and
    is judged by its loss on rows that no trial trains on: a weighted mean over groups of tasks and
    sources. Hand-made mixes run beside the search; the best ones and these run again with fresh seeds,
    and only that decides.
    Writes best_mix.yaml (for `birbal mix --config`), trials.parquet, search.png.

    \b
    Examples:
      birbal tune --scores runs/score --output runs/tune --config tiny --dry-run
      birbal tune --scores runs/score --output runs/tune --config tiny
      birbal mix --config runs/tune/best_mix.yaml --output runs/mix
    """
    from birbal_ray.tune import run as step

    if dry_run:
        from birbal_ray.plan import describe_hours, plan_tune

        print_table(step.dry_run(config), output_format)
        price = config.resources.price_per_hour  # of one trial's resources
        together = None if price is None else price * config.resources.max_concurrent
        note(describe_hours(lambda: plan_tune(config, seconds=config.budget), together))
    else:
        print_tune(step.tune(config, overwrite=overwrite), output_format)


def print_tune(result: TuneResult, output_format: str = "text") -> None:
    """The table of mixes on stdout, the conclusion and the files on stderr."""
    from birbal_ray.tune.stats import describe_result

    print_table(result.manifest["summary_rows"], output_format)
    for line in describe_result(result.manifest):
        note(line)
    note(f"its mix: birbal mix --config {shlex.quote(result.folder.at('best_mix.yaml'))} --output DIR")
    searched = "search.png" in result.manifest["files"]
    pictures = f"; pictures: {result.folder.at('search.png')}" if searched else ""
    note(f"all trials: {result.folder.at('trials.parquet')}{pictures}")
