"""The ledger of a running pipeline: who is at what, who died of what, and when the run must stop."""

from __future__ import annotations

import io
import pickle
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

from birbal_ray.cluster import can_place
from birbal_ray.progress import ProgressLine
from birbal_ray.run import RunError, RunFailedError
from birbal_ray.score import pipeline
from birbal_ray.score.adaptive import FixedSchedule
from birbal_ray.score.config import ScoreConfig
from birbal_ray.score.monitor import COUNTED, LOSSES_OF_A_SHARD, EngineMonitor
from birbal_ray.score.pipeline import MAX_FATAL_INSTANCES, Session, Watchdog
from birbal_ray.score.shards import Shard, Tally, WrittenFile
from birbal_ray.settings import load_config
from birbal_ray.storage import FileRecord, open_folder


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def resources(**values):
    return load_config(ScoreConfig, None, [], {f"resources.{key}": value for key, value in values.items()}).resources


def watch(folder="run", **values):
    return Watchdog(resources(**values), open_folder(folder))


def shards(count=4, rows=100):
    return [Shard("t", "", "", "exact_match", n * rows, (n + 1) * rows, 8) for n in range(count)]


def monitor(some=(), limit=100, retries=2, alive=("n1", "n2", "n3", "n4")):
    """`alive`: the cluster's nodes; a list may lose some later."""
    made = EngineMonitor(FixedSchedule(list(some)), limit, retries, alive_nodes=lambda: set(alive))
    made._meters = dict.fromkeys(COUNTED, SimpleNamespace(inc=lambda *arguments: None))  # Ray's need a cluster
    return made


def written(shard):
    return WrittenFile(shard.name, "t", shard.num_rows, 0, FileRecord("0" * 64, 1), Tally())


def test_no_progress_is_reported_after_the_given_minutes(clock):
    board, seen = monitor(), watch(no_progress_minutes=5)
    board.started("r1", "n1")
    seen.check(board.snapshot())
    clock[0] += 299
    seen.check(board.snapshot())
    board.add("r1", {"rows": 1})
    clock[0] += 299
    seen.check(board.snapshot())
    clock[0] += 301
    with pytest.raises(RunError, match="no progress for 5 minutes"):
        seen.check(board.snapshot())


def test_restarts_are_bounded_but_moves_from_lost_nodes_are_not(clock):
    alive = ["n1", "n2", "n3", "n4"]
    board, seen = monitor(alive=alive), watch(max_engine_restarts=1)
    for node in ("n1", "n2", "n3", "n4"):
        board.started("r1", node)
        board.ready("r1")
        board.begin("r1", f"shard on {node}", 100)
        alive.remove(node)
    alive.append("n4")
    assert board.snapshot().num_moves == 3
    seen.check(board.snapshot())
    board.started("r1", "n4")
    seen.check(board.snapshot())
    board.died("r1", "task_a chunk 3: CUDA error")
    board.started("r1", "n4")
    with pytest.raises(RunError, match=re.escape("an engine died 2 times")) as caught:
        seen.check(board.snapshot())
    assert "task_a chunk 3: CUDA error" in str(caught.value)


@pytest.mark.parametrize("has_spoken", [False, True])
def test_an_engine_that_dies_counts_wherever_it_comes_back(has_spoken):
    """Ray starts it again wherever there is room; it left a node that lives."""
    board, dog = monitor(), watch(max_engine_restarts=2)
    with pytest.raises(RunError, match="an engine died 3 times"):
        for node in ("n1", "n2") * 10:
            board.started("r1", node)
            dog.check(board.snapshot())
            board.ready("r1")
            board.begin("r1", "deadly", 100)
            if has_spoken:
                board.died("r1", "CUDA error")
    assert (board.snapshot().num_moves, len(board.snapshot().deaths)) == (0, 3)


def test_an_engine_that_never_starts_counts_wherever_it_is_tried_again():
    board, dog = monitor(retries=2), watch(num_replicas=1)
    for node in ("n1", "n2", "n1"):
        assert board.started("r1", node)
        dog.check(board.snapshot())
    assert not board.started("r1", "n2")
    with pytest.raises(RunError, match="no engine could start"):
        dog.check(board.snapshot())


def test_a_row_that_takes_its_node_with_it_is_found():
    """However many nodes a provider sends after it, and though the rows before it are completed each time."""
    alive = ["0"]
    board, dog = monitor(alive=alive), watch(max_engine_restarts=20)
    (shard,), deadly = shards(1), 37
    for number in range(100):
        node = str(number)
        board.started("r1", node)
        dog.check(board.snapshot())
        board.ready("r1")
        alone, parts, fatal = board.begin("r1", shard.name, shard.num_rows)
        if fatal:
            break
        for first, last in parts:
            if alone:
                board.trying("r1", shard.name, (first, last))
            if first <= deadly < last:
                break
            board.add("r1", {"rows": last - first})
        alive[:] = [str(number + 1)]
    assert fatal.keys() == {deadly}
    assert board.snapshot().num_moves == LOSSES_OF_A_SHARD


def test_starting_again_and_again_is_no_progress(clock):
    """Though no one is to blame: each time its node is lost before a row is finished."""
    board, dog = monitor(alive=[]), watch(no_progress_minutes=5)
    board.started("r1", "n1")
    board.ready("r1")
    board.add("r1", {"rows": 1})
    clock[0] += 299
    dog.check(board.snapshot())
    board.started("r1", "n2")  # it has worked, and now has as long for its first row as any
    for node in ("n3", "n4"):
        dog.check(board.snapshot())
        clock[0] += 149
        board.started("r1", node)
        board.ready("r1")
    dog.check(board.snapshot())
    clock[0] += 3
    with pytest.raises(RunError, match="no progress for 5 minutes"):
        dog.check(board.snapshot())


def test_looking_for_a_deadly_row_is_progress(clock):
    """Though every engine takes its time to load and none finishes a row."""
    board, dog = monitor(), watch(no_progress_minutes=5)
    (shard,) = shards(1)
    fatal: dict[int, str] = {}
    while not fatal:
        board.started("r1", "n1")
        clock[0] += 95
        dog.check(board.snapshot())
        board.ready("r1")
        alone, parts, fatal = board.begin("r1", shard.name, shard.num_rows)
        if alone and parts[0][0] == 0:
            board.trying("r1", shard.name, parts[0])
        board.died("r1", "CUDA error")
    assert fatal.keys() == {0}


def test_an_engine_that_dies_of_its_node_s_loss_is_no_restart():
    alive = ["n1", "n2"]
    board, dog = monitor(alive=alive), watch(max_engine_restarts=0)
    board.started("r1", "n1")
    board.ready("r1")
    board.begin("r1", "t", 100)
    board.died("r1", "a worker of vLLM's was killed")
    alive.remove("n1")
    board.started("r1", "n2")
    dog.check(board.snapshot())
    assert (board.snapshot().num_moves, board.snapshot().most_restarts) == (1, 0)


def test_a_death_that_every_shard_in_flight_reports_counts_once(clock):
    board = monitor()
    board.started("r1", "n1")
    for shard in range(3):
        board.died("r1", f"shard {shard}")
    assert len(board.snapshot().deaths) == 1
    board.started("r1", "n1")
    board.died("r1", "again")
    assert len(board.snapshot().deaths) == 2


@pytest.mark.parametrize("name", ["ActorDiedError", "OutOfMemoryError"])
def test_the_death_of_the_ledger_ends_the_run_in_one_line(monkeypatch, tmp_path, name):
    import ray

    def get(reference):
        raise getattr(ray.exceptions, name)(*(("the node's memory\nwas full",) if name == "OutOfMemoryError" else ()))

    snapshot = SimpleNamespace(remote=lambda: None)
    monkeypatch.setattr(pipeline, "_start_monitor", lambda *arguments: SimpleNamespace(snapshot=snapshot))
    monkeypatch.setattr(
        pipeline, "_dataset", lambda *arguments: SimpleNamespace(iter_internal_ref_bundles=lambda: iter(()))
    )
    monkeypatch.setattr(ray, "get", get)
    with pytest.raises(RunFailedError, match=r"keeps count of shards and engines died: [^\n]+$"):
        pipeline.score_shards(FixedSchedule([]), ScoreConfig(), "f", open_folder(tmp_path), lambda seen: None)


def test_an_output_that_this_node_does_not_see_is_reported(clock, tmp_path):
    seen, board = watch(tmp_path), monitor()
    first, second = shards(2)
    seen.check(board.snapshot())
    board.written(written(first))
    seen.check(board.snapshot())  # a network file system may show it later
    clock[0] += 121
    board.written(written(second))
    with pytest.raises(RunError, match=r"000000-000100\.parquet: written on another node and not seen here"):
        seen.check(board.snapshot())
    (tmp_path / "rows" / "t").mkdir(parents=True)
    (tmp_path / "rows" / second.name).touch()
    seen.check(board.snapshot())


@pytest.mark.parametrize(
    ("nodes", "settings", "lacks"),
    [
        ([{"CPU": 8}], {"engine.device": "cpu"}, None),
        ([{"CPU": 8}], {"engine.device": "gpu"}, "0 of 1 replicas"),
        ([{"CPU": 16, "GPU": 1}] * 2, {"engine.device": "gpu", "resources.num_replicas": 2}, None),
        ([{"CPU": 16, "GPU": 0.5}] * 2, {"engine.device": "gpu"}, "0 of 1 replicas"),
        ([{"CPU": 8}] * 4, {"engine.device": "cpu", "resources.cpus_per_replica": 16}, "0 of 1 replicas"),
        (
            [{"CPU": 16, "GPU": 1}],
            {"engine.device": "gpu", "resources.num_replicas": 5, "resources.gpus_per_replica": 0.2},
            None,
        ),
        (
            [{"CPU": 16, "GPU": 1}],
            {"engine.device": "gpu", "resources.num_replicas": 6, "resources.gpus_per_replica": 0.2},
            "5 of 6 replicas",
        ),
        ([{"CPU": 16, "GPU": 2}], {"engine.device": "gpu", "resources.gpus_per_replica": 2}, None),
        ([{"CPU": 16, "GPU": 1}] * 2, {"engine.device": "gpu", "resources.gpus_per_replica": 2}, "0 of 1 replicas"),
        (
            [{"CPU": 16, "GPU": 1, "accelerator_type:A10G": 1}, {"CPU": 16, "GPU": 1}],
            {"engine.device": "gpu", "resources.num_replicas": 2, "resources.accelerator_type": "A10G"},
            "1 of 2 replicas (it has 2 nodes, 32 CPUs of 4 needed, 2 GPUs, cards: A10G)",
        ),
    ],
)
def test_what_a_cluster_lacks(nodes, settings, lacks):
    missing = can_place(pipeline.replica_request(load_config(ScoreConfig, None, [], settings)), nodes)
    assert missing is None if lacks is None else lacks in (missing or "")


def test_progress_line_shows_rates_from_the_moment_the_engine_was_ready(clock):
    board = monitor(shards(3))
    fields = {}
    session = Session(ProgressLine(io.StringIO()), 100, lambda done, total, **more: fields.update(more, done=done))
    clock[0] += 30
    session.see(board.snapshot())
    assert fields["text"].startswith("loading the model (0 engine(s) started, 30 s)")
    board.started("r1", "n1")
    board.ready("r1")
    clock[0] += 10
    counts = {"rows": 50, "errors": 1, "prompt_tokens": 4000, "cached_tokens": 3000, "completion_tokens": 100}
    board.add("r1", {**counts, "work": 50 * 24})
    session.see(board.snapshot())
    assert fields["text"] == "150/400 rows · 5.0 rows/s · 400 prompt tokens/s · 75% from cache · 1 error · ETA 50 s"
    assert (fields["done"], fields["eta_seconds"], fields["num_engines"]) == (150, 50.0, 1)


def test_the_time_left_goes_by_tokens_not_rows(clock):
    """Long completions come first: half the rows are left, but a ninth of the work."""
    long, short = Shard("a", "", "", "generation", 0, 100, 184), Shard("b", "", "", "exact_match", 0, 100, 9)
    board = monitor([long, short])
    fields = {}
    session = Session(ProgressLine(io.StringIO()), 0, lambda done, total, **more: fields.update(more))
    board.started("r1", "n1")
    board.ready("r1")
    clock[0] += 80
    board.add("r1", {"rows": 100, "work": long.work})
    session.see(board.snapshot())
    assert fields["eta_seconds"] == pytest.approx(80 * short.work / long.work) == 10.0


def test_a_live_line_never_wraps(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("COLUMNS", "40")
    terminal = Terminal()
    ProgressLine(terminal).update("x" * 100)
    assert terminal.getvalue() == "\r\x1b[2K" + "x" * 39


def test_a_source_that_starts_again_gets_the_same_shards_and_no_more_than_the_limit():
    some = shards(5)
    board = monitor(some, limit=2)
    assert [pickle.loads(one) for one in board.take(0)] == some[:2]
    assert board.take(2) == []
    board.written(written(some[0]))
    again = replace(written(some[0]), record=FileRecord("other bytes", 7))
    board.written(again)  # a shard that is tried again after its engine died
    assert [pickle.loads(one) for one in board.take(2)] == [some[2]]
    assert [pickle.loads(one) for one in board.take(0)] == some[:3]
    for shard in some[1:]:
        board.written(written(shard))
    assert [pickle.loads(one) for one in board.take(3)] == some[3:]
    assert board.take(5) is None
    assert board.take(4) != []
    snapshot = board.snapshot()
    assert (snapshot.rows_written, len(snapshot.files), len(board.snapshot().files)) == (500, 5, 0)
    assert snapshot.files[some[0].name] == again.record, "of what is there now"


def run_engine(board, shard, deadly, replica="r1"):
    """What a replica does with one shard, until it is done: the rows that were never sent."""
    while True:
        alone, parts, fatal = board.begin(replica, shard.name, shard.num_rows)
        died = False
        for first, last in parts:
            if alone:
                board.trying(replica, shard.name, (first, last))
            if died := any(first <= row < last for row in deadly):
                board.died(replica, "poison")
                board.started(replica, "n1")
                board.ready(replica)
                break
        if not died:
            board.completed(replica, shard.name)
            return fatal


@pytest.mark.parametrize("deadly", [{0}, {99}, {37}, {3, 4}, {0, 50, 99}, set()])
def test_the_instances_that_engines_die_of_are_found_and_cost_no_restart(deadly):
    board, dog = monitor(), watch(max_engine_restarts=2)
    board.started("r1", "n1")
    board.ready("r1")
    (shard,) = shards(1)
    assert run_engine(board, shard, deadly).keys() == deadly
    seen = board.snapshot()
    dog.check(seen)
    assert len(seen.fatal) == len(deadly)
    assert seen.most_restarts == 0 and bool(seen.deaths) == bool(deadly)


def test_only_shards_that_were_in_flight_at_two_deaths_run_alone():
    board = monitor()
    board.started("r1", "n1")
    board.ready("r1")
    first, second, third = (shard.name for shard in shards(3))
    board.begin("r1", first, 100)
    board.begin("r1", second, 100)
    board.died("r1", "once")
    board.started("r1", "n1")
    assert not board.begin("r1", first, 100)[0] and not board.begin("r1", third, 100)[0]
    board.died("r1", "twice")
    board.started("r1", "n1")
    assert [board.begin("r1", name, 100)[0] for name in (first, second, third)] == [True, False, False]


def test_a_suspect_that_survives_alone_is_cleared_and_the_others_wait_unharmed():
    board = monitor()
    board.started("r1", "n1")
    board.ready("r1")
    first, second = (shard.name for shard in shards(2))
    for _ in range(2):
        board.begin("r1", first, 100)
        board.died("r1", "out of memory")
        board.started("r1", "n1")
    assert board.begin("r1", first, 100) == (True, [(0, 100)], {})
    board.begin("r1", second, 100)  # waits its turn
    board.trying("r1", first, (0, 100))
    board.completed("r1", first)
    assert board.snapshot().fatal == []
    board.died("r1", "again")
    board.started("r1", "n1")
    assert not board.begin("r1", second, 100)[0], "in flight at one death"


def test_two_replicas_that_die_of_the_same_part_halve_it_once():
    """Ray gave the shard to another replica, and the first one, which it lost sight of, was still at it."""
    board = monitor()
    (shard,) = shards(1)
    for replica in ("r1", "r2"):
        board.started(replica, "n1")
        board.ready(replica)
        board.begin(replica, shard.name, 100)
        board.died(replica, "poison")
        board.started(replica, "n1")
    for replica in ("r1", "r2"):
        assert board.begin(replica, shard.name, 100)[0]
        board.trying(replica, shard.name, (0, 100))
    for replica in ("r1", "r2"):
        board.died(replica, "poison")
    assert board.begin("r3", shard.name, 100) == (True, [(0, 50), (50, 100)], {})


def test_an_engine_that_dies_of_everything_ends_the_run():
    board, dog = monitor(), watch()
    board.started("r1", "n1")
    board.ready("r1")
    with pytest.raises(RunError, match="so the engine is broken rather than the prompts"):
        for shard in shards(2):
            for row in range(100):
                run_engine(board, shard, set(range(row + 1)))
                dog.check(board.snapshot())
    assert len(board.snapshot().fatal) == MAX_FATAL_INSTANCES + 1


def test_restarts_are_counted_per_replica():
    board, dog = monitor(), watch(max_engine_restarts=1, num_replicas=3)
    for replica in ("r1", "r2", "r3"):
        board.started(replica, "n1")
        board.ready(replica)
        board.died(replica, "a bit flipped")
        board.started(replica, "n1")
        board.ready(replica)
    dog.check(board.snapshot())
    board.died("r2", "another one")
    board.started("r2", "n1")
    with pytest.raises(RunError, match=r"an engine died 2 times, resources\.max_engine_restarts is 1"):
        dog.check(board.snapshot())


def test_a_replica_that_never_starts_is_tried_so_often_and_then_left_out():
    board, dog = monitor(retries=2), watch(num_replicas=2, max_engine_restarts=0)
    board.started("good", "n1")
    board.ready("good")
    for attempt in range(3):
        assert board.started("bad", "n2") is (attempt < 3)
        if attempt % 2:
            board.start_failed("bad", "ModelError: no such folder")  # else it is killed without a word
        dog.check(board.snapshot())
    assert board.started("bad", "n2") is False
    dog.check(board.snapshot())
    seen = board.snapshot()
    assert (seen.num_unstartable, seen.num_ready, seen.most_restarts) == (1, 1, 0)
    assert "replica bad did not start: ModelError: no such folder" in seen.deaths


def test_when_no_replica_can_start_the_run_ends_with_the_reason():
    board, dog = monitor(retries=1), watch(num_replicas=1)
    for _ in range(2):
        dog.check(board.snapshot())
        board.started("bad", "n1")
        board.start_failed("bad", "ValueError: not enough memory for the KV cache")
    with pytest.raises(RunError, match=r"no engine could start; .*not enough memory for the KV cache"):
        dog.check(board.snapshot())
