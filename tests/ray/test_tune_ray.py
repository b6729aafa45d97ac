"""Trials on Ray: side by side, on a node that vanishes, under a driver that is killed."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from birbal_ray.progress import ProgressLine
from birbal_ray.storage import open_folder
from birbal_ray.tune.config import TuneConfig
from birbal_ray.tune.records import RESULT_FILE, TRIALS_FOLDER, read_results, write_result, write_spec
from birbal_ray.tune.scheduler import FAILED, FINISHED, STOPPED, TrialResult, TrialScheduler
from tests.e2e.processes import kill_whole, wait_for
from tests.ray.conftest import start_cluster
from tests.ray.synthetic_search import DIED_FILE, DIVERGING, starts_of, synthetic_search

pytestmark = pytest.mark.timeout(600)


def ended(run: Path) -> dict[str, int]:
    """Trials that ended, with the time of their result."""
    files = (run / TRIALS_FOLDER).glob(f"*/{RESULT_FILE}")
    return {file.parent.name: file.stat().st_mtime_ns for file in files}


@pytest.fixture
def two_nodes(monkeypatch):
    """A head without CPUs and two nodes with one each, all on this machine."""
    import ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cluster = start_cluster(num_cpus=0)
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster, nodes
    ray.shutdown()
    cluster.shutdown()


def test_a_node_lost_in_the_middle_costs_its_trial_a_retry(two_nodes, tmp_path):
    cluster, nodes = two_nodes
    lost = []

    def take_a_node_away():
        while len(starts_of(tmp_path)) < 5:
            time.sleep(0.1)
        cluster.remove_node(nodes[0])
        latest = {start["node"]: start["key"] for start in starts_of(tmp_path)}  # now that no more can start there
        lost.append((nodes[0].node_id, latest[nodes[0].node_id]))

    killer = threading.Thread(target=take_a_node_away)
    killer.start()
    scheduler = synthetic_search(tmp_path, seconds=1.0)
    killer.join()
    ((node, key),) = lost
    assert len(scheduler.results) == scheduler.num_trials == 1 + 2 + 6 + 3 * 2
    assert {name for name, result in scheduler.results.items() if result.status == FAILED} == {DIVERGING}
    starts = Counter(start["key"] for start in starts_of(tmp_path))
    assert {name for name, count in starts.items() if count > 1} <= {key}, "others were not touched"
    assert sum(starts.values()) <= scheduler.num_trials + 1
    where = [start["node"] for start in starts_of(tmp_path)]
    assert len(set(where[:5])) == 2, "both nodes worked at the same time"
    assert scheduler.results[key].node != node or starts[key] == 1


def test_a_process_that_dies_as_it_takes_a_trial_costs_that_trial_a_retry(cluster_address, monkeypatch, tmp_path):
    """Tune counts that death twice, once for the process and once for its task."""
    monkeypatch.setenv("RAY_ADDRESS", cluster_address)
    results = synthetic_search(tmp_path, seconds=0.2, linger=-1.0).results
    assert [name for name, result in results.items() if result.status == FAILED] == [DIVERGING]
    assert (tmp_path / DIED_FILE).exists()
    assert len(results) == 15


def test_killed_and_called_again_repeats_no_finished_trial(tmp_path):
    from birbal_ray.tune.searcher import THREAD_TIMEOUT

    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    # A stopped trial takes 3 s to end. Tune gives the next one up after 2 s, in the first session at once, and tells
    # nobody.
    command = [sys.executable, "-m", "tests.ray.synthetic_search", str(tmp_path), "0.5", "3"]
    impatient = {**environment, THREAD_TIMEOUT: "0"}
    process = subprocess.Popen(
        command, env=impatient, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=Path.cwd()
    )
    wait_for(lambda: len(ended(tmp_path)) >= 5, process, 240)
    kill_whole(process)
    before = ended(tmp_path)
    again = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=300, cwd=Path.cwd())
    assert again.returncode == 0, again.stderr
    after = ended(tmp_path)
    assert len(after) == 15
    assert {name: after[name] for name in before} == before
    starts = Counter(start["key"] for start in starts_of(tmp_path))
    assert {starts[name] for name in before} == {1}
    assert set(starts) == set(after)
    assert max(starts.values()) <= 2, "a trial that was running is run once more"
    results = {result.spec.key: result for result in read_results(open_folder(tmp_path))[0]}
    diverged = results[DIVERGING]
    assert [key for key, result in results.items() if result.status == FAILED] == [DIVERGING]
    assert STOPPED in {result.status for result in results.values()}
    assert "it diverged" in diverged.error
    assert len(diverged.rungs) == 1, "it ended at the rung at which it showed"


def test_a_trial_stopped_or_diverged_at_its_first_rung_is_kept_as_that(tmp_path):
    from birbal_ray.tune.searcher import SpecSearcher

    scheduler = TrialScheduler(
        TuneConfig(num_trials=1), remember=lambda spec: write_spec(open_folder(tmp_path), spec, "nowhere")
    )
    searcher = SpecSearcher(scheduler, open_folder(tmp_path), {})
    for trial in "abcdef":
        searcher.suggest(trial)
    # Tune tells of the result at which its scheduler stopped a trial only here.
    searcher.on_trial_complete("f", {"rung": 1, "step": 5, "objective": 2.5})
    (result,) = scheduler.results.values()
    assert (result.spec.key, result.status, result.objective, result.rungs) == ("search-000", STOPPED, 2.5, [[5, 2.5]])
    searcher.on_trial_complete("e", {})
    assert scheduler.results["birbal_2023"].status == FAILED
    searcher.on_trial_complete("d", {"rung": 1, "step": 5, "objective": math.nan})
    assert scheduler.results["task_score"].status == FAILED
    (kept, diverged), started = read_results(open_folder(tmp_path))
    assert kept == result, "what failed may work the next time"
    assert (diverged.spec.key, diverged.status, diverged.objective) == ("task_score", FAILED, None), "this can't"
    assert len(started) == 4


def test_a_trial_that_failed_starts_again_as_often_as_is_allowed(tmp_path):
    from birbal_ray.tune.searcher import SpecSearcher

    scheduler = TrialScheduler(TuneConfig(num_trials=1, resources={"max_failures": 1}))
    searcher = SpecSearcher(scheduler, open_folder(tmp_path), {})
    error_file = tmp_path / "error.txt"
    error_file.write_text("Failure # 1\nTraceback …\nValueError: no such card\n")

    def fails(trial: str, num_failures: int) -> tuple[str, str]:
        """Which spec it had, and what is said."""
        searcher.suggest(trial)
        key = searcher._specs[trial].key
        searcher.on_trial_complete(trial, error=True)
        failed = SimpleNamespace(trial_id=trial, error_file=str(error_file), num_failures=num_failures)
        return key, searcher.failed(failed)

    said = "trial base_model starts again (failure 1, 1 allowed): ValueError: no such card"
    assert fails("a", 1) == fails("a preempted node is no failure", 0) == ("base_model", said)
    assert fails("b", 1) == ("base_model", "")
    found = scheduler.results["base_model"]
    assert (found.status, found.error) == (FAILED, "ValueError: no such card")
    searcher.suggest("its process died after its result")
    (spec,) = searcher._specs.values()
    write_result(open_folder(tmp_path), TrialResult(spec, FINISHED, 1.5, [[5, 1.5]]))
    ended = SimpleNamespace(trial_id="its process died after its result", error_file=None, num_failures=1)
    assert searcher.failed(ended) == ""
    assert scheduler.results[spec.key].objective == 1.5


def test_tune_may_pickle_what_holds_the_run(tmp_path):
    """Tune pickles searcher and callbacks when it starts; a run's locks and threads can't be."""
    from ray import cloudpickle

    from birbal_ray.run import Step, open_run
    from birbal_ray.tune.searcher import ShowProgress, SpecSearcher

    with open_run(tmp_path, Step("tune", ["*"]), {}) as run:
        scheduler = TrialScheduler(TuneConfig(num_trials=1), remember=lambda spec: run.withdraw())
        for one in (SpecSearcher(scheduler, run.folder, {}), ShowProgress(scheduler, run, ProgressLine())):
            assert cloudpickle.loads(cloudpickle.dumps(one)) is not None
            assert copy.deepcopy(one) is one
