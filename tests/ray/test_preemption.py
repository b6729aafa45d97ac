"""Nodes that vanish in the middle of a run: replicas move, the fine-tune goes on, nothing is lost or doubled."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest

from birbal_ray.score.simulated import START_FAILURE
from birbal_ray.storage import read_json
from tests.conftest import slow
from tests.ray.conftest import NUM_ROWS, SHARD_ROWS, scored_rows, start_cluster
from tests.ray.test_score_kills import finished_files, wait_for
from tests.ray.test_train_ray import losses, start, wait_for_step

pytestmark = pytest.mark.timeout(600)
CARD = "GeForce-RTX-4090"
IN_FLIGHT = 2
NUM_STEPS = 300
LABEL = "ray.io/accelerator-type"
SETTINGS = {
    "engine.backend": "simulated",
    "engine.device": "cpu",
    "shard_rows": SHARD_ROWS,
    "resources.simulated_row_seconds": 0.15,
    "resources.shards_in_flight": IN_FLIGHT,
    "resources.num_replicas": 2,
    "resources.cpus_per_replica": 2,
    "resources.max_engine_restarts": 0,  # a lost node is no engine death
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head that takes no work."""
    made = start_cluster(num_cpus=0)
    yield made
    made.shutdown()


@pytest.fixture(scope="module")
def nodes(cluster) -> dict[str, Any]:
    """Three nodes that each hold one replica: the one with the training card, where no engine starts, and two more."""
    training = {"resources": {f"accelerator_type:{CARD}": 1}, "labels": {LABEL: CARD}, "env_vars": {START_FAILURE: "1"}}
    scoring = {"resources": {"accelerator_type:A10G": 1}, "labels": {LABEL: "A10G"}}
    kinds = {"training": training, "first": scoring, "second": scoring}
    return {name: cluster.add_node(num_cpus=3, num_gpus=1, **about) for name, about in kinds.items()}


def sets(settings: dict[str, Any]) -> list[str]:
    return [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]


def test_scoring_keeps_off_the_training_card(birbal, cluster, nodes, write_task, tmp_path):
    """Two replicas and three GPUs, one of them in the card that trains."""
    settings = SETTINGS | {
        "engine.device": "gpu",
        "resources.simulated_row_seconds": 0.0,
        "resources.avoid_accelerator_types": f"[{CARD}]",
    }
    run = tmp_path / "run"
    address = {"RAY_ADDRESS": cluster.address}
    tasks = write_task("task_a", 40)
    process = birbal("score", "--tasks", tasks, *sets(settings), "--output", run, env=address)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    replicas = [file.read_text().split() for file in (run / "logs").glob("replica-*.log")]
    assert len(replicas) == 2
    assert {words[words.index("node") + 1] for words in replicas} == {nodes["first"].node_id, nodes["second"].node_id}


def test_of_three_replicas_one_never_starts(birbal, cluster, nodes, write_task, tmp_path):
    """The two others do all the work; the reason is in the log, the summary and the manifest."""
    settings = SETTINGS | {"resources.num_replicas": 3, "resources.max_start_retries": 1}
    run, address = tmp_path / "run", {"RAY_ADDRESS": cluster.address}
    process = birbal("score", "--tasks", write_task("task_a", 300), *sets(settings), "--output", run, env=address)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert len(scored_rows(run)) == 300
    manifest = read_json(run / "manifest.json")
    assert manifest["rows"]["scored"] == 300
    assert len(manifest["deaths"]) == 2, "the first try and one more"
    assert all("did not start: RuntimeError: simulated start failure" in death for death in manifest["deaths"])
    assert f"an engine died: {manifest['deaths'][0]}" in errors
    replicas = [file.read_text().split() for file in (run / "logs").glob("replica-*.log")]
    assert {words[words.index("node") + 1] for words in replicas} == {node.node_id for node in nodes.values()}


def test_nodes_lost_while_scoring(birbal, cluster, nodes, tasks, undisturbed, tmp_path):
    chance, run = random.Random(7), tmp_path / "run"
    if training := nodes.pop("training", None):  # this is the last test of these nodes
        cluster.remove_node(training)
    # The spare ones are there before they are needed: a busy machine takes long to start a node.
    spare = [cluster.add_node(num_cpus=3) for _ in range(2)]
    alive = {node.node_id: node for node in (*nodes.values(), *spare)}
    process = birbal("score", "--tasks", tasks, *sets(SETTINGS), "--output", run, env={"RAY_ADDRESS": cluster.address})
    kills = 0
    for _ in range(2):
        target = len(finished_files(run)) + chance.randint(3, 8)
        if not wait_for(lambda target=target: len(finished_files(run)) >= target, process):
            break
        logs = [file.read_text() for file in (run / "logs").glob("replica-*.log")]
        latest = [re.findall(r"^replica .* node (\w+)$", log, re.MULTILINE)[-1:] for log in logs]
        lost = next(node for (node,) in filter(None, latest) if node in alive)
        cluster.remove_node(alive.pop(lost), allow_graceful=False)
        kills += 1
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert kills == 2
    assert scored_rows(run) == scored_rows(undisturbed), "no row lost, none doubled, none different"
    session = read_json(run / "manifest.json")["last_session"]
    started = "".join(file.read_text() for file in (run / "logs").glob("replica-*.log")).count("begins ")
    redone = started * SHARD_ROWS / NUM_ROWS - 1
    print(f"{kills} nodes lost, 0 of {NUM_ROWS} rows lost or doubled, {redone:.1%} of the work done again")
    assert session["engine_restarts"] >= 1, "a replica came back on another node"
    assert redone <= kills * (IN_FLIGHT + 2) * SHARD_ROWS / NUM_ROWS, "no more than the shards in flight"


@slow
def test_the_card_is_lost_while_training(tiny_model, tiny_mix, tmp_path, request):
    """On the pinned card only; restarted from a checkpoint on the next such card; a message while there is none."""
    cluster = start_cluster(num_cpus=0)
    request.addfinalizer(cluster.shutdown)

    def add_card() -> Any:
        return cluster.add_node(num_cpus=2, num_gpus=1, resources={f"accelerator_type:{CARD}": 1})

    card, folder = {"resources.accelerator_type": CARD, "resources.simulated_card": True}, tmp_path / "run"
    cluster.add_node(num_cpus=2, num_gpus=1, resources={"accelerator_type:A10G": 1})  # must not take it
    # Many: when the node is taken away after step 15, a quick machine must not be done.
    steps = {"max_steps": NUM_STEPS, "evaluation.every_steps": 50, "checkpoint.every_steps": 10}
    process = start(tiny_model, tiny_mix, folder, device="gpu", address=cluster.address, **card, **steps)
    said = follow(process)
    wait_until(lambda: f"no node has a {CARD}" in said(), 120)
    assert "cards: A10G" in said()
    first = add_card()
    wait_for_step(folder, 15, process)
    assert read_json(folder / "worker.json")["node"] == first.node_id

    cluster.remove_node(first, allow_graceful=False)
    wait_until(lambda: said().count(f"waiting: no node has a {CARD}") > 0, 120)
    second = add_card()
    assert process.wait(timeout=400) == 0, said()[-3000:]
    assert read_json(folder / "worker.json")["node"] == second.node_id
    manifest = read_json(folder / "manifest.json")
    assert [step for step, _ in losses(folder)] == list(range(1, NUM_STEPS + 1)), "every step once"
    assert manifest["result"]["num_steps"] == NUM_STEPS

    undisturbed = tmp_path / "undisturbed"
    alone = start(tiny_model, tiny_mix, undisturbed, device="gpu", address=cluster.address, **card, **steps)
    assert alone.wait(timeout=300) == 0, alone.communicate()[1][-3000:]
    assert losses(folder) == losses(undisturbed), "the same losses as if nothing had happened"


def follow(process: Any) -> Any:
    """said() → what the process has written to stderr so far."""
    import threading

    lines: list[str] = []
    threading.Thread(target=lambda: lines.extend(process.stderr), daemon=True).start()
    threading.Thread(target=process.stdout.read, daemon=True).start()
    return lambda: "".join(lines)


def wait_until(condition: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"nothing for {seconds} s"
        time.sleep(0.2)
