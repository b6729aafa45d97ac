"""A Ray cluster's nodes, and which of them could take a scoring replica or the training worker."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from birbal_ray.score import pipeline
from birbal_ray.score.config import ScoreConfig
from birbal_ray.train import launch
from birbal_ray.train.config import TrainConfig

HEAD = "node:__internal_head__"
CARD = "accelerator_type:"
NODE_ID_LABEL = "ray.io/node-id"  # in every node's labels, and said already


@dataclass(frozen=True, slots=True)
class Node:
    """One node. Totals, not what is free; `cards` as Ray calls them."""

    name: str  # its id's first eight digits
    ip: str
    alive: bool
    head: bool
    num_cpus: float
    num_gpus: float
    cards: tuple[str, ...]
    memory_bytes: float
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Placement:
    """Whether the cluster can run a step. `nodes`: those that could take one of its workers; `missing` says why not."""

    work: str
    wanted: str
    fits: bool
    nodes: tuple[Node, ...]
    missing: str


def nodes_of(listing: Sequence[Mapping[str, Any]]) -> list[Node]:
    """What `ray.nodes()` gave: living ones first, the head before the others, then by address."""
    nodes = [_node(entry) for entry in listing]
    return sorted(nodes, key=lambda node: (not node.alive, not node.head, node.ip, node.name))


def placements(listing: Sequence[Mapping[str, Any]], score: ScoreConfig, train: TrainConfig) -> list[Placement]:
    """Scoring, then training, on the cluster whose `ray.nodes()` is given; a device `auto` is what the cluster has.

    The rules are the steps' own (`missing_resources`); what else runs there is not looked at.
    """
    living = sorted((entry for entry in listing if entry["Alive"]), key=lambda entry: str(entry["NodeManagerAddress"]))
    resources = [entry["Resources"] for entry in living]
    device = "gpu" if any(node.get("GPU", 0.0) > 0 for node in resources) else "cpu"
    if score.engine.device == "auto":
        score = score.model_copy(update={"engine": score.engine.model_copy(update={"device": device})})
    if train.resources.device == "auto":
        decided = "gpu" if train.resources.accelerator_type else device
        train = train.model_copy(update={"resources": train.resources.model_copy(update={"device": decided})})
    one = score.model_copy(update={"resources": score.resources.model_copy(update={"num_replicas": 1})})
    # A replica's helpers may run on any node: CPUs in pieces too small for a replica stand for these.
    piece = {"CPU": score.resources.cpus_per_replica / 2}
    elsewhere = [piece] * math.ceil(pipeline.logical_cpus(one) / piece["CPU"])
    scoring = [entry for entry in living if not pipeline.missing_resources(one, [entry["Resources"], *elsewhere])]
    training = [entry for entry in living if not launch.missing_resources(train, [entry["Resources"]])]
    return [
        _placement("score", _score_wants(score), scoring, pipeline.missing_resources(score, resources)),
        _placement("train", _train_wants(train), training, launch.missing_resources(train, resources)),
    ]


def _placement(work: str, wanted: str, entries: Sequence[Mapping[str, Any]], missing: str | None) -> Placement:
    return Placement(work, wanted, missing is None, tuple(_node(entry) for entry in entries), missing or "")


def _node(entry: Mapping[str, Any]) -> Node:
    resources = entry["Resources"]
    return Node(
        name=entry["NodeID"][:8],
        ip=entry["NodeManagerAddress"],
        alive=bool(entry["Alive"]),
        head=HEAD in resources,
        num_cpus=resources.get("CPU", 0.0),
        num_gpus=resources.get("GPU", 0.0),
        cards=tuple(sorted(name.removeprefix(CARD) for name in resources if name.startswith(CARD))),
        memory_bytes=resources.get("memory", 0.0),
        labels={name: value for name, value in sorted(entry.get("Labels", {}).items()) if name != NODE_ID_LABEL},
    )


def _score_wants(config: ScoreConfig) -> str:
    asked = config.resources
    each = f"{asked.cpus_per_replica:g} CPUs"
    if config.engine.device == "gpu":
        each += f" and {asked.gpus_per_replica:g} GPUs"
        each += f" on {asked.accelerator_type}" if asked.accelerator_type else ""
        each += f", not on {', '.join(asked.avoid_accelerator_types)}" if asked.avoid_accelerator_types else ""
    return f"{asked.num_replicas} replica(s) of {each}"


def _train_wants(config: TrainConfig) -> str:
    asked = config.resources
    wanted = f"a worker of {asked.num_cpus:g} CPUs"
    if asked.device == "gpu":
        wanted += f" and a GPU{f' on {asked.accelerator_type}' if asked.accelerator_type else ''}"
    return wanted
