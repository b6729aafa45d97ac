"""The recipe's steps as commands: settings from options, the step's own function, a table of what came out."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from birbal_ray.cli.options import (
    dry_run_option,
    format_option,
    note,
    overwrite_option,
    print_table,
    settings_options,
    shown,
)
from birbal_ray.evaluate.config import EvaluateConfig
from birbal_ray.mix.config import MixConfig
from birbal_ray.score.config import ScoreConfig
from birbal_ray.train.config import TrainConfig
from birbal_ray.tune.config import TuneConfig

if TYPE_CHECKING:
    from birbal_ray.evaluate.run import EvaluateResult
    from birbal_ray.mix.run import MixResult
    from birbal_ray.plan import StepPlan
    from birbal_ray.score.run import ScoreResult
    from birbal_ray.train.preflight import Preflight
    from birbal_ray.train.run import TrainResult
    from birbal_ray.tune.run import TuneResult

# Of the steps that ask a model about tasks.
ASKING_FLAGS = (
    "--tasks PATH = tasks.path",
    "--model NAME = model.name",
    "--output DIR",
    "--instances-per-task",
    "--select WHICH",
    "--replicas = resources.num_replicas",
    "--device",
)


def note_hours(plan: Callable[[], StepPlan], price_per_hour: float | None = None) -> None:
    """Say how long a step takes, as `birbal plan` does, and what it costs, or why that is not known."""
    from birbal_ray.models import ModelError
    from birbal_ray.plan import money
    from birbal_ray.settings import ConfigError

    try:
        found = plan()
        note(f"takes {found.hours}: {found.work}")
        if price_per_hour is not None:
            low, high = money([found], price_per_hour)
            note(f"costs {low:.2f} to {high:.2f}, at {price_per_hour:g} an hour")
    except (ConfigError, ModelError) as error:
        note(f"no estimate of time: {error}")


# --- score


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


def print_score(result: ScoreResult, output_format: str) -> None:
    """The table per task on stdout, totals on stderr."""
    from birbal_ray.progress import counted
    from birbal_ray.report.load import label_means

    rows: list[dict[str, Any]] = result.task_scores
    stops = result.manifest.get("stops") or {}
    if output_format == "text":
        rows = [
            {
                "task": row["task"],
                "label": row["label"],
                "n": row["num_scored"],
                "task score": row["task_score"],
                "95 % interval": "-"
                if row["task_score"] is None
                else f"{row['task_score_low']:.3f} to {row['task_score_high']:.3f}",
                "errors": row["num_errors"],
                **({"stopped because": stops.get(row["task"])} if stops else {}),
            }
            for row in rows
        ]
    print_table(rows, output_format)
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
    if result.manifest["deaths"]:
        deaths = result.manifest["deaths"]
        note(f"engines died {counted(len(deaths), 'time')}; the last time: {deaths[-1]}")
    note(f"scored rows and task scores: {result.folder}")


def print_score_plan(config: ScoreConfig, output_format: str) -> None:
    """Prompts and tokens per task on stdout; sums and the time they take on stderr."""
    from birbal_ray.plan import plan_score
    from birbal_ray.progress import ProgressLine
    from birbal_ray.score.run import describe_plan, plan_run, resolve_config

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
    counts = [(task, task.num_prompts or 0) for task in plan.tasks]
    shared_once = sum(task.num_shared_tokens or 0 for task, _ in counts)
    shared = sum((task.num_shared_tokens or 0) * count for task, count in counts)
    own = sum(task.num_own_tokens or 0 for task, _ in counts)
    completion = sum(task.max_completion_tokens * count for task, count in counts)
    total = shared + own
    note(f"prompts {sum(count for _, count in counts):,} in {len(plan.shards(resolved.shard_rows or 1)):,} shards")
    note(f"prompt tokens {total:,}: {shared:,} shared ({shared / max(1, total):.0%}), {own:,} own")
    note(f"to compute with the prefix cache: {shared_once + own:,} prompt, at most {completion:,} completion tokens")
    if config.engine.backend == "vllm":
        note_hours(lambda: plan_score(config))
    note("nothing was started (--dry-run)")


# --- mix


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
    from birbal_ray.plan import plan_mix

    result = step.dry_run(config)
    print_mix(result, output_format)
    note_hours(lambda: plan_mix(config, result.manifest["rows"]["candidates"]))


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
    from birbal_ray.mix.inspect import explain

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
    import json

    from birbal_ray.mix.inspect import diff

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


def print_mix(result: MixResult, output_format: str) -> None:
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


# --- tune


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
    Writes best_mix.yaml (for `birbal mix --config`), trials.parquet, search.png, verdict.png.

    \b
    Examples:
      birbal tune --scores runs/score --output runs/tune --config tiny --dry-run
      birbal tune --scores runs/score --output runs/tune --config tiny
      birbal mix --config runs/tune/best_mix.yaml --output runs/mix
    """
    from birbal_ray.tune import run as step

    if dry_run:
        from birbal_ray.plan import plan_tune

        print_table(step.dry_run(config), output_format)
        price = config.resources.price_per_hour  # of one trial's resources
        together = None if price is None else price * config.resources.max_concurrent
        note_hours(lambda: plan_tune(config, seconds=config.budget), together)
    else:
        print_tune(step.tune(config, overwrite=overwrite), output_format)


def print_tune(result: TuneResult, output_format: str) -> None:
    """The table of mixes on stdout, the conclusion and the files on stderr."""
    from birbal_ray.tune.stats import describe_result

    print_table(result.manifest["summary_rows"], output_format)
    for line in describe_result(result.manifest):
        note(line)
    note(f"its mix: birbal mix --config {shlex.quote(result.folder.at('best_mix.yaml'))} --output DIR")
    picture = "search.png" if "search.png" in result.manifest["files"] else "verdict.png"  # nothing was searched
    note(f"all trials: {result.folder.at('trials.parquet')}; pictures: {result.folder.at(picture)}")


# --- train


@click.command()
@settings_options(
    TrainConfig,
    (
        "--mix DIR",
        "--output DIR",
        "--model NAME = model.name",
        "--from-adapter DIR",
        "--budget TIME",
        "--device",
        "--seed",
    ),
    step="train",
)
@overwrite_option
@dry_run_option("Tokens, memory by part, steps in the budget; trains nothing.")
@click.option("--calibrate", is_flag=True, help="With --dry-run: run 4 steps to learn the speed.")
@click.option("--push", metavar="REPO", help="Then upload the adapter to this Hub repository (private; HF_TOKEN).")
@format_option
def train(
    config: TrainConfig, overwrite: bool, dry_run: bool, calibrate: bool, push: str | None, output_format: str
) -> None:
    """Fine-tune a 4-bit base model with LoRA on a mix; the adapter of the lowest eval loss is kept.

    One Ray Train worker, on the card that resources.accelerator_type names. The learning rate
    follows a cosine to the deadline, so that a run that can't do all epochs still ends annealed.
    Checkpoints go to OUTPUT/checkpoints; SIGTERM and Ctrl-C save one first; the same command goes on.

    \b
    Examples:
      birbal train --mix runs/mix --output runs/train --config tiny
      birbal train --mix runs/mix --output runs/train --config mistral-7b-qlora --dry-run
      birbal train --mix runs/mix --output runs/train --config mistral-7b-qlora --budget 23h
    """
    from birbal_ray.train import run as step
    from birbal_ray.train.preflight import refuse_if_too_large

    if calibrate and not dry_run:
        raise click.UsageError("--calibrate goes with --dry-run")
    if dry_run:
        found = step.dry_run(config, calibrate=calibrate)
        from birbal_ray.plan import plan_train

        print_preflight(found, output_format)
        refuse_if_too_large(found)
        train, held_back = (found.packing[split].num_tokens for split in ("train", "eval"))
        note_hours(lambda: plan_train(config, train, held_back, rest=config.budget))
        if push:
            from birbal_ray.train.card import ADAPTER_FILES, PUSHED_MANIFEST

            note(f"would upload to {push}: {', '.join([*ADAPTER_FILES, PUSHED_MANIFEST])}")
    else:
        result = step.train(config, overwrite=overwrite)
        print_train(result, output_format)
        if push:
            from birbal_ray.adapters import ADAPTER_FOLDER
            from birbal_ray.train.card import push_to_hub

            names = [name for name in result.manifest["files"] if name.startswith(f"{ADAPTER_FOLDER}/")]
            note(f"uploaded to {push_to_hub(result.folder, names, push)}")


def print_preflight(found: Preflight, output_format: str) -> None:
    """Memory by part on stdout, the rest on stderr."""
    from birbal_ray.train.preflight import GIB, describe_preflight, total_bytes

    rows = [{"part": part.part, "GiB": part.num_bytes / GIB, "how": part.how} for part in found.parts]
    rows.append({"part": "total", "GiB": total_bytes(found.parts) / GIB, "how": "estimate"})
    if found.memory_bytes:
        fits = "fits" if found.fits else "too little"
        rows.append({"part": "the device has", "GiB": found.memory_bytes / GIB, "how": fits})
    print_table(rows, output_format)
    for line in describe_preflight(found):
        note(line)
    if found.forecast is None:
        note("speed unknown on this device: add --calibrate, or train once")


def print_train(result: TrainResult, output_format: str) -> None:
    """Losses and where the adapter is."""
    outcome, folder = result.manifest["result"], result.folder
    names = ("epochs", "ended_by", "base_eval_loss", "best_eval_loss", "best_step")
    row = {"steps": outcome["num_steps"], **{name.replace("_", " "): outcome[name] for name in names}}
    print_table([{**row, "seconds": outcome["elapsed_seconds"], "adapter": folder.at("adapter")}], output_format)
    note(f"loss curve: {folder.at('loss_curve.png')}")
    note(f"TensorBoard: tensorboard --logdir {shlex.quote(folder.at('tensorboard'))}")


# --- evaluate


@click.command()
@settings_options(
    EvaluateConfig,
    ("--adapter DIR = adapters", "--merged DIR", "--mix DIR", *ASKING_FLAGS, "--gate DELTA"),
    step="evaluate",
)
@click.option("--per-task", is_flag=True, help="Print every task's scores, not only the comparisons.")
@overwrite_option
@dry_run_option("Say who would be compared on what. Starts no engine.")
@format_option
def evaluate(config: EvaluateConfig, per_task: bool, overwrite: bool, dry_run: bool, output_format: str) -> None:
    """Does the adapter beat its base model on instances and tasks that were never sampled?

    Prompts as in training (zero-shot) and few-shot, on the engines that `birbal score` uses. Differences
    come with a 95 % interval over tasks; one comparison (`primary`) is named beforehand. Stopped at any
    moment, it continues when called again.

    \b
    Examples:
      birbal evaluate --tasks my-tasks/ --model smollm2-135m --adapter runs/train --output runs/evaluate
      birbal evaluate --config mistral-7b --tasks natural-instructions/ \\
          --adapter mine=runs/train --adapter theirs=adapters/other --mix runs/mix --output runs/evaluate
    """
    from birbal_ray.evaluate import run as step
    from birbal_ray.plan import plan_evaluate
    from birbal_ray.progress import ProgressLine
    from birbal_ray.score.run import plan_run

    if not dry_run:
        result = step.evaluate(config, overwrite=overwrite)
        print_evaluate(result, output_format, per_task=per_task)
        refuse_loss(result, config.gate)
        return
    progress = ProgressLine()
    setup = step.prepare_evaluation(config)
    plan = plan_run(setup.scoring, progress, excluded=setup.held_out.keys)
    step.describe_evaluation(setup, plan, progress)
    rows = [
        {
            "task": task.name,
            "label": task.label.value,
            "held out": setup.held_out.kind(task.name),
            "instances": task.num_instances,
            "left out": task.num_excluded,
        }
        for task in plan.tasks
    ]
    print_table(rows, output_format)
    prompts = plan.num_rows * len(setup.models) * len(config.prompt_formats)
    if config.engine.backend == "vllm":
        note_hours(lambda: plan_evaluate(config, num_prompts=prompts))
    note(f"{prompts:,} prompts; nothing was started (--dry-run)")


def print_evaluate(result: EvaluateResult, output_format: str, *, per_task: bool = False) -> None:
    """Comparisons (or every task's scores) on stdout, the conclusions on stderr."""
    from birbal_ray.progress import counted
    from birbal_ray.report.conclusions import conclusion_of

    if output_format != "text":
        print_table(result.evaluation if per_task else result.comparisons, output_format)
    elif per_task or not result.comparisons:
        tasks: dict[tuple[str, str], dict[str, Any]] = {}
        for row in result.evaluation:
            about = {"prompts": row["prompt_format"], "task": row["task"], "label": row["label"]}
            cells = tasks.setdefault((row["prompt_format"], row["task"]), {**about, "held out": row["held_out"]})
            cells["n"] = min(cells.get("n", row["num_scored"]), row["num_scored"])
            cells[row["model"]] = row["task_score"]
        print_table(list(tasks.values()), output_format)
    if output_format == "text" and result.comparisons:
        rows = [
            {
                "model": row["model"],
                "prompts": row["prompt_format"],
                "scope": row["scope"],
                "tasks": row["num_tasks"],
                "base": row["base_score"],
                "score": row["score"],
                "difference": f"{row['difference']:+.3f}",
                "95 % interval": f"{row['difference_low']:+.3f} to {row['difference_high']:+.3f}",
                "p": f"{row['p_adjusted']:.3f}{' (primary)' if row['is_primary'] else ''}",
                "detectable": row["detectable_difference"],
                "won": row["num_wins"],
                "lost": row["num_losses"],
                "tied": row["num_ties"],
            }
            for row in result.comparisons
        ]
        print_table(rows, output_format)
    for row in result.comparisons:
        if row["scope"] == "all":
            found = conclusion_of(row)
            note(f"{found.title}. {found.text}")
    counts = result.manifest["rows"]
    scored, errors = counted(counts["scored"], "row"), counted(counts["errors"], "error")
    note(f"{scored} scored of {counts['planned']:,}, {errors}; results: {result.folder}")


def refuse_loss(result: EvaluateResult, gate: float | None) -> None:
    """Raise RunError where a model lost more than the gate allows."""
    from birbal_ray.evaluate.compare import gate_failures
    from birbal_ray.storage import RunError

    if gate is not None and (failures := gate_failures(result.comparisons, gate)):
        raise RunError("; ".join(failures))


# --- report


@click.command()
@click.argument("run")
@click.option("--output", metavar="FILE", help="The page, a path or a URL; default: RUN/report.html.")
@click.option(
    "--add",
    "added",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A model's results, placed on the leaderboard; see `birbal leaderboard`. Repeatable.",
)
def report(run: str, output: str | None, added: tuple[Path, ...]) -> None:
    """Write one HTML page on the score, mix, train and evaluate steps in RUN, with plots as PNG and SVG beside it.

    RUN is a folder that holds the steps' output folders, or one of these. Steps that are not there
    are named as not run. The page needs nothing but itself: it can be mailed, printed, archived.

    \b
    Examples:
      birbal report runs/demo
      birbal report runs/demo --output demo.html --add results.json
    """
    from birbal_ray.report.run import report as step

    result = step(run, output, added)
    for conclusion in result.conclusions:
        note(conclusion.title)
    for name, state in result.missing.items():
        note(f"{name}: {state}")
    note(f"plots: {result.plots}")
    click.echo(result.file)
