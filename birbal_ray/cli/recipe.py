"""The recipe as a whole: what is here (doctor), what it takes (plan), all its steps (pipeline, demo), what is done."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from birbal_ray.cli.main import EXIT_FAILED
from birbal_ray.cli.models import print_train
from birbal_ray.cli.options import (
    Columns,
    dry_run_option,
    find_config,
    format_option,
    note,
    overwrite_option,
    print_table,
    settings_options,
)
from birbal_ray.cli.results import print_evaluate, refuse_loss
from birbal_ray.cli.steps import print_mix, print_score, print_tune
from birbal_ray.recipe import PipelineConfig, join_steps, refuse_small_budget
from birbal_ray.settings import load_config

if TYPE_CHECKING:
    from birbal_ray.cluster import Node
    from birbal_ray.doctor import Placement
    from birbal_ray.evaluate.run import EvaluateResult
    from birbal_ray.status import Row

NOT_GIVEN = ""  # an address, after --cluster
WATCH_SECONDS, IDLE_LOOKS = 5.0, 4  # a pipeline pauses between two steps
PLANNED_OUTPUT = "runs"  # of a plan without --output: nothing is written there


@click.command()
@click.option(
    "--model", metavar="NAME", help="A model whose reachability to check; by default the recipe's, or smollm2-135m."
)
@click.option("--config", metavar="FILE", help="A pipeline's settings, whose model, cards and datasets to check.")
@click.option("--output", default=".", show_default=True, help="A folder whose disk to check.")
@click.option(
    "--cluster",
    is_flag=False,
    flag_value=NOT_GIVEN,
    metavar="[ADDRESS]",
    help="Look at a Ray cluster instead: host:port; without one RAY_ADDRESS, else the Ray of this machine.",
)
@click.option("--score-config", metavar="FILE", help="With --cluster: the scoring to place (default settings).")
@click.option("--train-config", metavar="FILE", help="With --cluster: the training to place (default settings).")
@format_option
def doctor(
    model: str | None, config: str | None, output: str, cluster: str | None, output_format: str, **steps: str | None
) -> None:
    """Check this machine: versions, CPUs, GPUs and Ray's names for them, memory, disk, model.

    With --cluster: the nodes of a Ray cluster, and which of them could take a scoring replica or the
    training worker. Exits 1 when something would keep the recipe from running, and says what.

    \b
    Examples:
      birbal doctor --model mistralai/Mistral-7B-v0.1 --output /data/runs
      birbal doctor --config one-day-mistral-7b
      birbal doctor --cluster 10.0.0.2:6379 --train-config configs/train/mistral-7b-qlora.yaml
    """
    if cluster is not None and config is not None:
        raise click.UsageError("--config is for this machine; with --cluster, give --score-config and --train-config")
    if cluster is not None:
        problems = _show_cluster(cluster or None, output_format, **steps)
    elif any(steps.values()):
        raise click.UsageError("--score-config and --train-config go with --cluster")
    else:
        from birbal_ray.doctor import examine

        file = find_config("pipeline", config) if config else None
        recipe = load_config(PipelineConfig, file, flags={"model": model})
        checks = examine(recipe.model or recipe.train.model.name, output, recipe if config else None)
        print_table([{"check": c.name, "state": c.state, "found": c.found} for c in checks], output_format)
        problems = [f"{check.name}: {check.advice}" for check in checks if check.advice]
    for problem in problems:
        note(problem)
    if problems:
        raise click.exceptions.Exit(EXIT_FAILED)


def _show_cluster(
    address: str | None, output_format: str, score_config: str | None, train_config: str | None
) -> list[str]:
    from birbal_ray.cluster import nodes_of
    from birbal_ray.doctor import cluster_nodes, placements
    from birbal_ray.score.config import ScoreConfig
    from birbal_ray.train.config import TrainConfig

    score = load_config(ScoreConfig, score_config and find_config("score", score_config))
    train = load_config(TrainConfig, train_config and find_config("train", train_config))
    listing = cluster_nodes(address)
    print_cluster(nodes_of(listing), found := placements(listing, score, train), output_format)
    return [f"{one.work}: {one.missing}" for one in found if not one.fits]


def print_cluster(nodes: list[Node], found: list[Placement], output_format: str) -> None:
    """The nodes, and what each can run, as one table; in JSON one object with `nodes` and `work`."""
    if output_format == "json":
        work = [{**asdict(one), "nodes": [node.name for node in one.nodes]} for one in found]
        click.echo(json.dumps({"nodes": [asdict(node) for node in nodes], "work": work}, indent=1))
        return
    rows = [
        {
            "node": node.name,
            "ip": node.ip,
            "alive": "yes" if node.alive else "no",
            "head": "yes" if node.head else "no",
            "CPUs": f"{node.num_cpus:g}",
            "GPUs": f"{node.num_gpus:g}",
            "cards": " ".join(node.cards),
            "memory": f"{node.memory_bytes / 2**30:.1f} GiB",
            **{one.work: "yes" if node in one.nodes else "no" for one in found},
            "labels": " ".join(f"{name.removeprefix('ray.io/')}={value}" for name, value in node.labels.items()),
        }
        for node in nodes
    ]
    print_table(rows, output_format)
    for one in found:
        note(f"{one.work} wants {one.wanted}{': it fits' if one.fits else ''}")


@click.command()
@click.option("--output", default="runs/demo", show_default=True, help="Where the runs go.")
@overwrite_option
def demo(output: str, overwrite: bool) -> None:
    """Run the recipe small, for real: vLLM, SmolLM2-135M and QLoRA on the sample tasks that come with birbal.

    About six minutes on two idle CPU cores. Called again it continues, or says that it is up to date. It is
    `birbal pipeline --config demo`.

    \b
    Example:
      birbal demo --output /tmp/demo
    """
    config = load_config(PipelineConfig, find_config("pipeline", "demo"), flags={"output": output})
    run_recipe(config, overwrite)


PIPELINE_FLAGS = (
    "--tasks PATH",
    "--model NAME",
    "--output DIR",
    "--held-out-task NAME = held_out_tasks",
    "--budget TIME",
    "--tune = search",
    "--device",
)


@click.command()
@settings_options(
    PipelineConfig, PIPELINE_FLAGS, step="pipeline", sections=("score", "mix", "tune", "train", "evaluate")
)
@overwrite_option
@dry_run_option("Print the plan, and check budget and outside datasets; run nothing.")
@format_option
def pipeline(config: PipelineConfig, overwrite: bool, dry_run: bool, output_format: str) -> None:
    """Score, tune, mix, train, evaluate, report: in one budget, each step resumable, skipped where it is up to date.

    With --budget each step ends in time: scoring stops where it is and says what it knows, the search ends, training
    gets all that the others leave; its learning rate falls to 0 by the deadline. Killed at any moment, the same
    command continues, and so does its clock. `birbal plan` says beforehand what fits.

    \b
    Examples:
      birbal pipeline --config one-day-mistral-7b --tasks natural-instructions/ --budget 24h --output runs/mistral
      birbal pipeline --config tiny --budget 15m --output runs/tiny
      birbal pipeline --tasks my-tasks/ --train-config tiny --no-tune --output runs/mine \\
          --set mix.task_score.allow_shortfall=true   # a tenth of each task is left over for the evaluation
    """
    if dry_run:
        from birbal_ray.cluster import missing_cards
        from birbal_ray.pipeline import check_recipe

        print_plan(config, (None,), (), output_format)
        joined = join_steps(config.replace({"output": config.output or PLANNED_OUTPUT}))
        check_recipe(joined)
        if missing := missing_cards(config.cards):
            note(f"the recipe can't run here: {missing}")
        note("nothing was started (--dry-run)")
    elif output_format != "text":
        raise click.UsageError("--format is for the plan that --dry-run prints")
    else:
        run_recipe(config, overwrite)


def run_recipe(config: PipelineConfig, overwrite: bool) -> None:
    """Run every step, print what each one found, and how to ask why a row is in the mix."""
    from birbal_ray.pipeline import run_pipeline
    from birbal_ray.storage import join

    evaluated: list[EvaluateResult] = []

    def show_evaluation(result: EvaluateResult) -> None:
        print_evaluate(result)
        evaluated.append(result)

    page = run_pipeline(
        config,
        overwrite=overwrite,
        announce=lambda text: note(f"\n{text}"),
        show={
            **{"score": print_score, "tune": print_tune, "mix": print_mix, "train": print_train},
            "evaluate": show_evaluation,
        },
    )
    note(f"\nthe adapter is in {join(config.output or '', 'train/adapter')}, everything else on one page: {page}")
    on_path = "" if shutil.which("birbal") else f" (birbal is in {Path(sys.argv[0]).parent}, which is not on the PATH)"
    note(f"ask why a row is in the mix{on_path}:\n  {explain_command(join(config.output or '', 'mix'))}")
    for result in evaluated:
        refuse_loss(result, config.evaluate.gate)


@click.command()
@settings_options(PipelineConfig, PIPELINE_FLAGS, step="pipeline")
@click.option("--gpu", "cards", multiple=True, metavar="CARD", help="Ray's name, e.g. GeForce-RTX-4090. Repeatable.")
@click.option(
    "--gpu-price",
    "prices",
    type=click.FloatRange(min=0),
    multiple=True,
    metavar="PRICE",
    help="What the card costs an hour; one for each --gpu, in the same order.",
)
@format_option
def plan(config: PipelineConfig, cards: tuple[str, ...], prices: tuple[float, ...], output_format: str) -> None:
    """What the recipe will take before it starts: work, hours and money of each step, as ranges with their source.

    For this machine, from its own earlier runs where there are any, or for one --gpu after the other, from their
    data sheets. Reads the task files and the model's config; loads no weights.

    Columns: `alone` is what the step takes without a limit, `gets` the most that the budget allows it, `planned` the
    middle of `alone` or all that it gets, whichever is less, `from` the source of the speed. "2 to 3 fit" are the
    epochs that training has time for.

    \b
    Examples:
      birbal plan --config one-day-mistral-7b --tasks natural-instructions/ --budget 24h --gpu GeForce-RTX-4090
      birbal plan --config one-day-mistral-7b --tasks natural-instructions/ \\
          --gpu GeForce-RTX-4090 --gpu-price 0.40 --gpu H100 --gpu-price 2.50
    """
    shown = cards or (None,)
    if prices and len(prices) != len(shown):
        raise click.UsageError(f"--gpu-price: {len(prices)} given for {len(shown)} cards; give one for each --gpu")
    print_plan(config, shown, prices, output_format)
    from birbal_ray.plan import least_seconds

    joined = join_steps(config.replace({"output": config.output or PLANNED_OUTPUT}))
    for card in shown:
        refuse_small_budget(joined, least_seconds(joined, card))


def print_plan(
    config: PipelineConfig, cards: Sequence[str | None], prices: Sequence[float], output_format: str
) -> None:
    """The plan of a recipe for each card (None: this machine) on stdout, its sums on stderr.

    `prices`: of an hour, for each card, or none.
    """
    from birbal_ray.plan import money, plan_recipe, records_of
    from birbal_ray.progress import duration

    joined = join_steps(config.replace({"output": config.output or PLANNED_OUTPUT}))
    found = {card: plan_recipe(joined, card) for card in cards}
    columns: Columns = {
        **({"card": "card"} if len(found) > 1 else {}),
        **{"step": "step", "work": "work"},
        "alone": lambda row: f"{duration(row['low_seconds'])} to {duration(row['high_seconds'])}",
        "gets": lambda row: "all it takes" if row["limit_seconds"] is None else duration(row["limit_seconds"]),
        "planned": lambda row: duration(row["planned_seconds"]),
        "from": "source",
    }
    rows = [{"card": card, **record} for card, steps in found.items() for record in records_of(steps)]
    print_table(rows, output_format, columns)
    price_of = dict(zip(cards, prices, strict=False))
    for card, steps in found.items():
        here = ", ".join(sorted({one for one in joined.cards.values() if one})) or "this machine"
        total = f"{card or here}: {duration(sum(one.planned_seconds for one in steps))} planned"
        if config.budget:
            total += f" of a budget of {duration(config.budget)}"
        if card in price_of:
            total += ", cost {:.2f} to {:.2f}".format(*money(steps, price_of[card]))
        note(total)


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
    from birbal_ray.progress import read_times
    from birbal_ray.status import RUNNING, describe_times, read_status
    from birbal_ray.storage import open_folder

    if watch and output_format != "text":
        raise click.UsageError("--watch shows a screen of text; leave out --format or --watch")
    rows = read_status(run)
    if output_format != "text":
        touches = [
            row.touched and datetime.fromtimestamp(row.touched, UTC).isoformat(timespec="seconds") for row in rows
        ]
        records = [asdict(row) | {"touched": touched} for row, touched in zip(rows, touches, strict=True)]
        print_table(records, output_format)
        return
    idle = 0
    # Whole lines for a pipe: a path that breaks in the middle can't be copied.
    width = shutil.get_terminal_size().columns if watch or sys.stdout.isatty() else sys.maxsize
    while True:
        if watch:
            click.clear()
        times = read_times(open_folder(run))
        planned = {step: one["planned_seconds"] for step, one in times.plans.items()}
        click.echo("\n".join(screen(rows, planned, width)))
        if text := describe_times(times):
            click.echo(text)
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


def explain_command(mix_folder: str) -> str:
    """The command that explains the first training row of a mix."""
    from birbal_ray.storage import open_folder

    row_id = open_folder(mix_folder).read_table("train.parquet", ["row_id"])["row_id"][0].as_py()
    return shlex.join(["birbal", "mix", "explain", row_id, "--mix", mix_folder])
