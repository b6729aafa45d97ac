"""`birbal doctor`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from birbal_ray.cli.main import EXIT_FAILED
from birbal_ray.cli.options import find_config, format_option, note, print_table

if TYPE_CHECKING:
    from birbal_ray.cluster import Node
    from birbal_ray.doctor import Placement

NOT_GIVEN = ""  # an address, after --cluster
NUM_NAMED = 6  # nodes in a line of the text table


@click.command()
@click.option("--model", default="smollm2-135m", show_default=True, help="A model whose reachability to check.")
@click.option("--config", metavar="FILE", help="A pipeline's settings, whose model and outside datasets to check.")
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
@click.pass_context
def doctor(
    context: click.Context,
    model: str,
    config: str | None,
    output: str,
    cluster: str | None,
    score_config: str | None,
    train_config: str | None,
    output_format: str,
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
    if cluster is not None:
        problems = _show_cluster(cluster or None, score_config, train_config, output_format)
    elif score_config or train_config:
        raise click.UsageError("--score-config and --train-config go with --cluster")
    else:
        from birbal_ray.doctor import examine
        from birbal_ray.recipe import PipelineConfig
        from birbal_ray.settings import load_config

        recipe = load_config(PipelineConfig, find_config("pipeline", config)) if config else PipelineConfig()
        checks = examine(recipe.model or model, output, recipe.sources)
        print_table([{"check": c.name, "state": c.state, "found": c.found} for c in checks], output_format)
        problems = [f"{check.name}: {check.advice}" for check in checks if check.state == "problem"]
    for problem in problems:
        note(problem)
    if problems:
        context.exit(EXIT_FAILED)


def _show_cluster(
    address: str | None, score_config: str | None, train_config: str | None, output_format: str
) -> list[str]:
    from birbal_ray.cluster import nodes_of
    from birbal_ray.doctor import cluster_nodes, placements
    from birbal_ray.score.config import ScoreConfig
    from birbal_ray.settings import load_config
    from birbal_ray.train.config import TrainConfig

    score, train = load_config(ScoreConfig, score_config), load_config(TrainConfig, train_config)
    listing = cluster_nodes(address)
    print_cluster(nodes_of(listing), found := placements(listing, score, train), output_format)
    return [f"{one.work}: {one.missing}" for one in found if not one.fits]


def print_cluster(nodes: list[Node], found: list[Placement], output_format: str) -> None:
    """Two tables, an empty line between them; in JSON one object with `nodes` and `work`."""
    if output_format == "json":
        work = [{**asdict(one), "nodes": [node.name for node in one.nodes]} for one in found]
        click.echo(json.dumps({"nodes": [asdict(node) for node in nodes], "work": work}, indent=1))
        return
    print_table([_cells(node) for node in nodes], output_format)
    click.echo()
    rows = [{"work": one.work, "wanted": one.wanted, "fits": "yes" if one.fits else "no", "nodes": ""} for one in found]
    for row, one in zip(rows, found, strict=True):
        named = [f"{node.name} ({node.ip})" for node in one.nodes[:NUM_NAMED]]
        more = [f"and {len(one.nodes) - NUM_NAMED} more"] if len(one.nodes) > NUM_NAMED else []
        row["nodes"] = ", ".join([*named, *more]) or "none"
    print_table(rows, output_format)


def _cells(node: Node) -> dict[str, Any]:
    return {
        "node": node.name,
        "ip": node.ip,
        "alive": "yes" if node.alive else "no",
        "head": "yes" if node.head else "no",
        "CPUs": f"{node.num_cpus:g}",
        "GPUs": f"{node.num_gpus:g}",
        "cards": " ".join(node.cards),
        "memory": f"{node.memory_bytes / 2**30:.1f} GiB",
        "labels": " ".join(f"{name.removeprefix('ray.io/')}={value}" for name, value in node.labels.items()),
    }
