"""What `birbal doctor --cluster` says of a cluster, from the node list that Ray gives."""

from __future__ import annotations

import csv
import io
import json

import pytest
from click.testing import CliRunner

from birbal_ray.cli.main import main
from birbal_ray.cli.recipe import print_cluster
from birbal_ray.cluster import can_place, nodes_of
from birbal_ray.doctor import placements
from birbal_ray.score.config import ScoreConfig
from birbal_ray.score.pipeline import replica_request
from birbal_ray.settings import load_config
from birbal_ray.train.config import TrainConfig

HEAD = {"node:__internal_head__": 1.0, "memory": 8.0 * 2**30, "node:10.0.0.1": 1.0}
RTX = {"CPU": 8.0, "GPU": 1.0, "accelerator_type:GeForce-RTX-4090": 1.0, "memory": 64.0 * 2**30}
SPOT = {"CPU": 4.0, "GPU": 1.0, "accelerator_type:A10G": 1.0, "memory": 16.0 * 2**30}
SPOT_LABELS = {"ray.io/accelerator-type": "A10G", "ray.io/market-type": "spot"}


def node(number, resources, labels=(), alive=True):
    name = f"{number:02d}" + "ab" * 27
    return {
        "NodeID": name,
        "Alive": alive,
        "NodeManagerAddress": f"10.0.0.{number}",
        "Resources": dict(resources),
        "Labels": {"ray.io/node-id": name, **dict(labels)},
    }


def cluster(num_spot=2):
    """A head without CPUs, last in the list as Ray may give it."""
    spot = [node(3 + n, SPOT, SPOT_LABELS) for n in range(num_spot)]
    return [*spot, node(2, RTX, {"ray.io/accelerator-type": "GeForce-RTX-4090"}), node(9, {}, (), False), node(1, HEAD)]


def places(listing, score=(), train=()):
    """{work: (fits, addresses)}"""
    configs = load_config(ScoreConfig, None, score), load_config(TrainConfig, None, train)
    return {one.work: (one.fits, [node.ip for node in one.nodes]) for one in placements(listing, *configs)}


def test_nodes_are_read_from_ray_s_list_the_head_first_the_dead_last():
    nodes = nodes_of(cluster())
    assert [(n.ip, n.alive, n.head) for n in nodes] == [
        *[("10.0.0.1", True, True), ("10.0.0.2", True, False)],
        *[("10.0.0.3", True, False), ("10.0.0.4", True, False), ("10.0.0.9", False, False)],
    ]
    head, rtx, spot = nodes[0], nodes[1], nodes[2]
    assert (head.num_cpus, head.num_gpus, head.cards) == (0, 0, ())
    assert (rtx.name, rtx.num_cpus, rtx.num_gpus, rtx.cards) == ("02ababab", 8, 1, ("GeForce-RTX-4090",))
    assert rtx.memory_bytes == 64 * 2**30
    assert spot.labels == SPOT_LABELS


def test_defaults_take_the_gpus_that_the_cluster_has():
    assert places(cluster()) == {
        "score": (True, ["10.0.0.2", "10.0.0.3", "10.0.0.4"]),
        "train": (True, ["10.0.0.2", "10.0.0.3", "10.0.0.4"]),
    }


def test_defaults_take_cpus_where_there_is_no_gpu():
    found = placements([node(1, {**HEAD, "CPU": 8.0})], ScoreConfig(), TrainConfig())
    assert [(one.fits, one.wanted) for one in found] == [
        (True, "1 replica(s) of 1 CPUs"),
        (True, "a worker of 1 CPUs"),
    ]


def test_the_published_split_trains_on_the_4090_and_scores_on_spot_nodes():
    score = ["engine.device=gpu", "resources.num_replicas=2", "resources.avoid_accelerator_types=[GeForce-RTX-4090]"]
    train = ["resources.accelerator_type=GeForce-RTX-4090"]
    assert places(cluster(), score, train) == {
        "score": (True, ["10.0.0.3", "10.0.0.4"]),
        "train": (True, ["10.0.0.2"]),
    }


def test_what_is_missing_is_said_in_the_steps_own_words():
    listing = cluster(num_spot=1)
    score = load_config(ScoreConfig, None, ["resources.num_replicas=3", "resources.accelerator_type=A10G"])
    train = load_config(TrainConfig, None, ["resources.accelerator_type=H100"])
    scoring, training = placements(listing, score, train)
    assert (scoring.fits, [n.ip for n in scoring.nodes]) == (False, ["10.0.0.3"])
    gpu = score.model_copy(update={"engine": score.engine.model_copy(update={"device": "gpu"})})
    assert scoring.missing == can_place(replica_request(gpu), [n["Resources"] for n in listing if n["Alive"]])
    assert "place 1 of 3 replicas" in scoring.missing
    assert (training.fits, training.nodes) == (False, ())
    assert "no node has a H100" in training.missing
    assert "A10G, GeForce-RTX-4090" in training.missing


def test_a_node_just_large_enough_for_a_replica_is_named_though_its_helpers_must_go_elsewhere():
    small = [node(1, HEAD), node(2, {"CPU": 2.0, "GPU": 1.0, "accelerator_type:A10G": 1.0}), node(3, {"CPU": 8.0})]
    asked = ["resources.cpus_per_replica=2", "engine.device=gpu"]
    assert places(small, asked)["score"] == (True, ["10.0.0.2"])
    assert places(small[:2], asked)["score"] == (False, ["10.0.0.2"])
    assert places(small, ["resources.cpus_per_replica=3", "engine.device=gpu"])["score"] == (False, [])


def test_dead_nodes_take_nothing():
    listing = [node(1, {**HEAD, "CPU": 8.0}), node(2, RTX, (), alive=False)]
    assert places(listing, ["engine.device=gpu"], ["resources.device=gpu"]) == {
        "score": (False, []),
        "train": (False, []),
    }


def test_the_tables_in_three_formats(capsys):
    nodes, found = nodes_of(cluster(8)), placements(cluster(8), ScoreConfig(), TrainConfig())
    print_cluster(nodes, found, "text")
    text, wanted = capsys.readouterr()
    assert "accelerator-type=A10G market-type=spot" in text
    assert "GeForce-RTX-4090" in text
    assert [line.partition(" wants ")[0] for line in wanted.splitlines()] == ["score", "train"]
    assert wanted.count(": it fits") == 2
    print_cluster(nodes, found, "json")
    values = json.loads(capsys.readouterr().out)
    assert [entry["ip"] for entry in values["nodes"]] == [n.ip for n in nodes]
    assert len(values["work"][0]["nodes"]) == 9
    print_cluster(nodes, found, "csv")
    table = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["ip"] for row in table] == [n.ip for n in nodes]
    for one in found:
        assert [row["node"] for row in table if row[one.work] == "yes"] == [n.name for n in nodes if n in one.nodes]


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["--cluster", "127.0.0.1:1"], 1, "no Ray cluster answers there"),
        (["--cluster", "ray://127.0.0.1:1"], 1, "no Ray cluster answers there"),
        (["--cluster", "[::1]:1"], 1, "no Ray cluster answers there ([Errno"),
        (["--cluster"], 1, "RAY_ADDRESS=127.0.0.1:2: no Ray cluster answers there"),
        (["--cluster", "local"], 2, "would start a Ray"),
        (["--cluster", "127.0.0.1:1", "--score-config", "nowhere.yaml"], 2, "nowhere.yaml: no such file"),
        (["--train-config", "x.yaml"], 2, "go with --cluster"),
    ],
)
def test_without_a_cluster_the_reason_is_one_line(monkeypatch, arguments, code, reason):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:2")
    result = CliRunner().invoke(main, ["doctor", *arguments])
    assert result.exit_code == code, result.output
    assert reason in result.stderr
    assert result.stdout == ""
    assert len([line for line in result.stderr.splitlines() if line.startswith("error:")]) <= 1
    import os

    import ray

    assert not ray.is_initialized()
    assert os.environ["RAY_ADDRESS"] == "127.0.0.1:2"
