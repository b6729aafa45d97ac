"""What a model is worth: held-out scores, public benchmarks, the leaderboard, the report."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from birbal_ray.cli.options import (
    ASKING_FLAGS,
    FILE,
    Columns,
    dry_run_option,
    format_option,
    note,
    overwrite_option,
    print_table,
    refuse_url,
    settings_options,
)
from birbal_ray.evaluate.config import EvaluateConfig, HarnessConfig

if TYPE_CHECKING:
    from birbal_ray.evaluate.leaderboard import Sensitivity
    from birbal_ray.evaluate.run import EvaluateResult


@click.command()
@settings_options(
    EvaluateConfig,
    ("--adapter DIR = adapters", "--merged DIR", "--mix DIR", *ASKING_FLAGS, "--gate DELTA"),
    step="evaluate",
)
@overwrite_option
@dry_run_option("Say who would be compared on what. Starts no engine.")
@format_option
def evaluate(config: EvaluateConfig, overwrite: bool, dry_run: bool, output_format: str) -> None:
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
    from birbal_ray.plan import describe_hours, plan_evaluate
    from birbal_ray.progress import ProgressLine
    from birbal_ray.score.run import plan_run

    if not dry_run:
        result = step.evaluate(config, overwrite=overwrite)
        print_evaluate(result, output_format)
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
        note(describe_hours(lambda: plan_evaluate(config, num_prompts=prompts)))
    note(f"{prompts:,} prompts; nothing was started (--dry-run)")


def print_evaluate(result: EvaluateResult, output_format: str = "text") -> None:
    """Comparisons on stdout, or where there are none the tasks' scores; the conclusions on stderr."""
    from birbal_ray.progress import counted
    from birbal_ray.report.load import conclusion_of

    if output_format == "text" and not result.comparisons:
        print_table(
            result.evaluation, output_format, ["model", "prompt_format", "task", "label", "num_scored", "task_score"]
        )
    else:
        columns: Columns = {
            **{"model": "model", "prompts": "prompt_format", "scope": "scope", "tasks": "num_tasks"},
            **{"base": "base_score", "score": "score"},
            "difference": lambda row: f"{row['difference']:+.3f}",
            "95 % interval": lambda row: f"{row['difference_low']:+.3f} to {row['difference_high']:+.3f}",
            "p": lambda row: f"{row['p_adjusted']:.3f}{' (primary)' if row['is_primary'] else ''}",
            "detectable": "detectable_difference",
            **{"won": "num_wins", "lost": "num_losses", "tied": "num_ties"},
        }
        print_table(result.comparisons, output_format, columns)
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


@click.command()
@settings_options(
    HarnessConfig,
    (
        "--model NAME",
        "--adapter DIR",
        "--output DIR",
        "--benchmark NAME = benchmarks",
        "--task NAME = tasks",
        "--include-path DIR",
        "--limit N",
        "--num-fewshot N",
        "--batch-size N|auto",
        "--device NAME",
        "--backend",
        "--team NAME",
    ),
    step="harness",
)
@overwrite_option
@click.option("--helm", is_flag=True, help="Ask by HELM, the challenge's client; --task is an entry for it.")
@click.option("--list", "list_only", is_flag=True, help="Show the leaderboard's metrics and how each is measured.")
@dry_run_option("Check names and show what would run; load no model, write nothing.")
@format_option
def harness(
    config: HarnessConfig, helm: bool, list_only: bool, dry_run: bool, overwrite: bool, output_format: str
) -> None:
    """Measure a model with lm-evaluation-harness on the benchmarks of the challenge's leaderboard.

    A finished benchmark is kept in the output folder and not run again: the same command continues,
    further --benchmark add to it. results.json there goes to `birbal leaderboard --add`. The harness's
    definitions are not HELM's, by which the published figures were made: an indication, not the same.
    --helm makes an environment for HELM (600 MB, once), starts `birbal serve` and measures through it;
    --include-path is a folder of plugins then.

    \b
    Example:
      birbal harness --model mistralai/Mistral-7B-v0.1 --adapter runs/train/adapter --output runs/harness
      birbal harness --helm --model smollm2-135m --limit 20 --output runs/helm
      birbal harness --list
    """
    from birbal_ray.evaluate import harness as step
    from birbal_ray.evaluate.benchmarks import COMPARABLE_NOTE, listing
    from birbal_ray.evaluate.leaderboard import METRICS

    if list_only:
        narrow = ["metric", "benchmark", "measure", "remark"] if output_format == "text" else ()
        print_table(listing(), output_format, narrow)
        return

    if helm:
        from birbal_ray.evaluate.helm import RESULTS_FILE, check_options, run_helm

        check_options(config, dry_run=dry_run)
        measured = run_helm(config, overwrite=overwrite)
        columns = ["entry", "metric", "measure", "value", "instances"]
        print_table(measured.rows, output_format, columns)
        note(f"place it: birbal leaderboard --add {shlex.quote(measured.folder.at(RESULTS_FILE))}")
        return
    if dry_run:
        print_table(step.dry_run(config), output_format)
        return
    result = step.run(config, overwrite=overwrite)
    print_table(result.rows, output_format)
    if any(row["metric"] in METRICS for row in result.rows):
        note(f"not comparable: {COMPARABLE_NOTE}")
        note(f"place it: birbal leaderboard --add {shlex.quote(result.folder.at(step.RESULTS_FILE))}")


@click.command()
@click.option(
    "--add", multiple=True, type=FILE, metavar="FILE", help="A model's results to place; all compete with all."
)
@click.option("--leave-one-out", is_flag=True, help="Show how ranks and scores change when one team is left out.")
@format_option
def leaderboard(add: tuple[Path, ...], leave_one_out: bool, output_format: str) -> None:
    """Rank teams by win rates over nine scenarios: open and hidden score, and the full score of both.

    Without options: the final leaderboard of the NeurIPS 2023 LLM Efficiency Challenge, RTX 4090
    track, computed from the teams' raw metrics. A metric that a model lacks counts as worst.

    \b
    Example:
      birbal leaderboard --add results.json
    where results.json holds raw metrics from 0 to 1:
      {"team": "my-model", "metrics": {"MMLU - EM": 0.6, "GSM8K - EM": 0.41}}
    """
    from birbal_ray.evaluate import leaderboard as board

    teams, places, notes = board.place_models(add)
    for name, what in notes:
        note(f"{name}: {what}")
    for name, what in board.zeroed_scores(places):
        note(f"warning: {name}: {what}")
    if leave_one_out:
        print_sensitivities(board.leave_one_out(teams), output_format)
        return
    rows = []
    for place in places:
        # On a screen, a column of "no" is noise; for programs the columns stay the same.
        marked = {"added": place.added} if add or output_format != "text" else {}
        scores = {name: getattr(place, name.lower()) for name in ("Score_open", "Score_hidden", "Score_full")}
        rows.append({"rank": place.rank, "team": place.team, **marked, **place.win_rates, **scores})
    print_table(rows, output_format)


def print_sensitivities(found: list[Sensitivity], output_format: str) -> None:
    """Each team's rank and score, the span of them, and those without each other team."""
    rows = []
    for entry in found:
        (best, worst), (lowest, highest) = entry.ranks, entry.scores
        row: dict[str, Any] = {"rank": entry.rank, "team": entry.team, "best rank": best, "worst rank": worst}
        row |= {"Score_full": entry.score_full, "lowest": lowest, "highest": highest}
        for other in found:
            rank, score = entry.without.get(other.team, (None, None))
            if output_format == "text":  # narrow: a heading of two lines, ranks alone
                row[f"rank without\n{other.team}"] = rank
            else:
                row |= {f"rank without {other.team}": rank, f"Score_full without {other.team}": score}
        rows.append(row)
    print_table(rows, output_format)


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

    RUN is a folder with score/, mix/, train/ and evaluate/ in it, or one of these. Steps that are not
    there are named as not run. The page needs nothing but itself: it can be mailed, printed, archived.

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


@click.command("export-predictions")
@click.argument("run")
@click.option("--output", required=True, type=FILE, callback=refuse_url, help="Folder for one JSON file per task.")
def export_predictions(run: str, output: Path) -> None:
    """Write a finished score run as JSON, one file per task: the layout of the published recipe.

    Each file is a list of {orig_input, few_shot_prompt, answer, prediction}, ordered by row id.

    \b
    Example:
      birbal export-predictions runs/score --output predictions/
    """
    from birbal_ray.progress import counted
    from birbal_ray.score.results import export_published_json
    from birbal_ray.storage import input_folder

    files, rows = export_published_json(input_folder(run), output)
    note(f"{counted(rows, 'row')} in {counted(files, 'file')}: {output}")
    if others := sum(1 for _ in output.glob("*.json")) - files:
        note(f"{others} more .json files are there, which this run did not write")
