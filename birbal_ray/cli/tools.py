"""Commands beside the steps: merge, serve, status, harness, leaderboard, models, export-predictions."""

from __future__ import annotations

import shlex
import shutil
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from birbal_ray.cli.options import format_option, note, overwrite_option, print_table, refuse_url, settings_options
from birbal_ray.evaluate.config import HarnessConfig
from birbal_ray.serve.config import ServeConfig

if TYPE_CHECKING:
    from birbal_ray.evaluate.leaderboard import Sensitivity
    from birbal_ray.status import Row

FILE: Any = click.Path(path_type=Path)
WATCH_SECONDS, IDLE_LOOKS = 5.0, 4  # a pipeline pauses between two steps


@click.command()
@click.option("--run", metavar="DIR", required=True, help="Output folder of `birbal train`.")
@click.option("--output", metavar="DIR", required=True, help="The merged model's folder.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", help="Of the merged weights.")
@click.option("--prompts", "num_prompts", type=click.IntRange(min=1), default=8, help="Eval rows to compare on.")
@click.option("--modelfile", is_flag=True, help="Also write a Modelfile, for `ollama create`.")
@click.option("--engine/--no-engine", default=True, help="Also compare vLLM on the merged model with PEFT.")
@click.option("--push", metavar="REPO", help="Then upload the model to this Hub repository (private; HF_TOKEN).")
@overwrite_option
@click.option("--dry-run", is_flag=True, help="List the files that it would make and --push upload; load no model.")
@format_option
def merge(run: str, output: str, push: str | None, dry_run: bool, output_format: str, **options: Any) -> None:
    """Merge the adapter of a training run into unquantised base weights, and compare before with after.

    The output is a model folder (safetensors) that `birbal score --model DIR`, vLLM and transformers load.

    \b
    Example:
      birbal merge --run runs/train --output models/mistral-7b-birbal
    """
    from birbal_ray.train import merge as step

    if dry_run:
        print_table([{"file": name} for name in step.plan_merge(run, modelfile=options["modelfile"])], output_format)
        return
    result = step.merge(run, output, **options)
    print_table([result.manifest["comparison"] | {"model": str(result.folder)}], output_format)
    if push:
        from birbal_ray.train.card import push_to_hub

        note(f"uploaded to {push_to_hub(result.folder, list(result.manifest['files']), push)}")


@click.command()
@settings_options(
    ServeConfig,
    (
        "--run DIR",
        "--model NAME = model.name",
        "--adapter DIR",
        "--merged DIR",
        "--host ADDRESS",
        "--port",
        "--token TEXT",
        "--allow-anyone",
        "--compat",
        "--device",
    ),
    step="serve",
)
@click.option("--openai", is_flag=True, help="Become vLLM's own OpenAI server, with model and adapter filled in.")
def serve(config: ServeConfig, openai: bool) -> None:
    """Answer prompts over HTTP as the LLM Efficiency Challenge asked its entrants to.

    POST /process completes a prompt, /tokenize and /decode count and cut it, GET /health and /metrics tell
    how it goes. Requests that come at once share the engine's batch. SIGTERM and Ctrl-C answer what is in
    flight, then end. Only this machine is answered unless there is a --token, or --allow-anyone.

    \b
    Examples:
      birbal serve --run runs/train
      birbal serve --model smollm2-135m --port 9000
      birbal serve --merged models/merged --host 0.0.0.0 --token "$TOKEN"
      curl -s http://127.0.0.1:8080/process -H 'Content-Type: application/json' -d '{"prompt": "2 + 2 ="}'
    """
    from birbal_ray.serve import run as step

    if openai:
        step.serve_openai(config)
    else:
        step.serve(config, note)


@click.command()
@click.argument("run")
@click.option("--watch", is_flag=True, help="Show it again every few seconds, until nothing runs. Ctrl-C ends it.")
@format_option
def status(run: str, watch: bool, output_format: str) -> None:
    """Say what the steps in RUN have done, which of them is at work, and how to go on.

    RUN is a folder that holds the steps' output folders, or one of these. It is only read: a run that
    works there is not disturbed. Whether one on another machine still lives is judged by its files.

    \b
    Examples:
      birbal status runs
      birbal status s3://bucket/runs
      birbal status runs/demo --watch
      birbal status runs/score --format json
    """
    from birbal_ray.status import RUNNING, read_budget, read_plan, read_status

    if watch and output_format != "text":
        raise click.UsageError("--watch shows a screen of text; leave out --format or --watch")
    rows = read_status(run)
    if output_format != "text":
        times = [row.touched and datetime.fromtimestamp(row.touched, UTC).isoformat(timespec="seconds") for row in rows]
        records = [asdict(row) | {"touched": touched} for row, touched in zip(rows, times, strict=True)]
        print_table(records, output_format)
        return
    idle = 0
    while True:
        if watch:
            click.clear()
        width = shutil.get_terminal_size().columns
        if watch or sys.stdout.isatty():
            click.echo("\n".join(screen(rows, read_plan(run), width)))
        else:
            print_table([_cells(row, time.time()) for row in rows], output_format)
        if budget := read_budget(run):
            click.echo(textwrap.fill(budget, width, subsequent_indent="  ") if sys.stdout.isatty() else budget)
        todo = [row for row in rows if row.next]
        for row in todo:
            click.echo(f"next: {row.next}" if len(todo) == 1 else f"next ({row.folder.rpartition('/')[2]}): {row.next}")
        idle = 0 if any(row.state == RUNNING for row in rows) else idle + 1
        if not watch or idle == IDLE_LOOKS:
            return
        time.sleep(WATCH_SECONDS)
        rows = read_status(run)


def screen(rows: Sequence[Row], planned: Mapping[str, float], width: int) -> list[str]:
    """The steps as lines of at most `width`: state and time of each, what it says of itself, where it has a budget.

    `planned`: step → seconds.
    """
    from birbal_ray.progress import duration

    lines = [rows[0].folder.rpartition("/")[0]]
    for row in rows:
        folder = row.folder.rpartition("/")[2]
        name = row.step if folder in (row.step, "report.html") else f"{row.step} ({folder})"
        taken = duration(row.wall_seconds) if row.wall_seconds else ""
        if seconds := planned.get(row.step):
            taken += f" ({duration(seconds)} planned)" if taken else f"{duration(seconds)} planned"
        head = f"{name:<9} {row.detail or row.state:<12} {taken}".rstrip()
        for text in (head, row.progress):
            indent = "" if text is head else " " * 10
            lines += textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=" " * 10)
    return lines


def _cells(row: Row, now: float) -> dict[str, Any]:
    from birbal_ray.progress import duration

    return {
        "step": row.step,
        "folder": row.folder,
        "state": row.detail or row.state,
        "progress": row.progress or "-",
        "last touched": f"{duration(max(0.0, now - row.touched))} ago" if row.touched else "-",
        "wall time": duration(row.wall_seconds) if row.wall_seconds else "-",
    }


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
@click.option("--dry-run", is_flag=True, help="Check names and show what would run; load no model, write nothing.")
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
        rows = listing()
        if output_format == "text":  # narrow
            for row in rows:
                first, *others = (row.pop("tasks") or "-").split()
                row |= {"tasks": f"{first} and {len(others)} more" if others else first}
                del row["needs"]
        print_table(rows, output_format)
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
@click.option("--raw", type=FILE, metavar="FILE", help="Another table of teams; default: the eight published ones.")
@click.option(
    "--add", multiple=True, type=FILE, metavar="FILE", help="A model's results to place; all compete with all."
)
@click.option("--leave-one-out", is_flag=True, help="Show how ranks and scores change when one team is left out.")
@format_option
def leaderboard(raw: Path | None, add: tuple[Path, ...], leave_one_out: bool, output_format: str) -> None:
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

    teams = board.load_published() if raw is None else board.load_teams(raw)
    added = board.load_added(add, teams)
    everybody = {**teams, **added}
    for file in add:
        if remark := board.load_remark(file):
            note(f"{file}: {remark}")
    for name, what in board.missing_metrics(added if raw is None else everybody):
        note(f"{name}: {what}")
    places = board.standings(everybody, added)
    for name, what in board.zeroed_scores(places):
        note(f"warning: {name}: {what}")
    if leave_one_out:
        print_sensitivities(board.leave_one_out(everybody), output_format)
        return
    rows = []
    for place in places:
        # On a screen, a column of "no" is noise; for programs the columns stay the same.
        marked = {"added": place.added} if added or output_format != "text" else {}
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


@click.group(invoke_without_command=True)
@format_option
@click.pass_context
def models(context: click.Context, output_format: str) -> None:
    """List the models that come with birbal; `fetch` makes one ready.

    Any local folder of safetensors and any Hub id works wherever a model is asked for.

    \b
    Examples:
      birbal models
      birbal models fetch smollm2-135m
      birbal models fetch mistralai/Mistral-7B-v0.1
    """
    if context.invoked_subcommand is not None:
        return
    from birbal_ray.models import EMBEDDED
    from birbal_ray.storage import cache_folder

    rows = []
    for model in EMBEDDED.values():
        is_ready = (cache_folder() / "models" / f"{model.name}-{model.sha256[:12]}").is_dir()
        rows.append({"model": model.name, "what": model.summary, "license": model.license, "ready": is_ready})
    print_table(rows, output_format)


@models.command()
@click.argument("name")
@click.option("--revision", help="Hub revision: branch, tag or commit.")
def fetch(name: str, revision: str | None) -> None:
    """Download or convert a model now, and print its folder.

    \b
    Example:
      birbal models fetch smollm2-135m
    """
    from birbal_ray.models import resolve_model

    click.echo(resolve_model(name, revision).path)


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
    from birbal_ray.score.results import export_published_json
    from birbal_ray.storage import input_folder

    files, rows = export_published_json(input_folder(run), output)
    note(f"{rows} rows in {files} files: {output}")
