"""Trials on Ray: side by side, on a node that vanishes, under a driver that is killed."""

from __future__ import annotations

import copy
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from birbal_ray.progress import ProgressLine
from birbal_ray.run import RunError, RunFailedError
from birbal_ray.storage import Folder, open_folder
from birbal_ray.tune.config import TuneConfig
from birbal_ray.tune.records import RESULT_FILE, TRIALS_FOLDER, read_results, write_result, write_spec
from birbal_ray.tune.scheduler import FAILED, FINISHED, SEARCH, STOPPED, TrialResult, TrialScheduler, TrialSpec
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
        while len({start["node"] for start in starts_of(tmp_path)}) < 2:
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
    searcher.settle()
    (result,) = scheduler.results.values()
    assert (result.spec.key, result.status, result.objective, result.rungs) == ("search-000", STOPPED, 2.5, [[5, 2.5]])
    searcher.on_trial_complete("e", {})
    searcher.on_trial_complete("d", {"rung": 1, "step": 5, "objective": math.nan})
    assert searcher.settle() == []
    assert scheduler.results["birbal_2023"].status == FAILED
    assert scheduler.results["task_score"].status == FAILED
    (kept, diverged), started = read_results(open_folder(tmp_path))
    assert kept == result, "what failed may work the next time"
    assert (diverged.spec.key, diverged.status, diverged.objective) == ("task_score", FAILED, None), "this can't"
    assert len(started) == 4


def failed_trial(trial_id: str, num_failures: int, error_file: Path | None = None) -> Any:
    return SimpleNamespace(trial_id=trial_id, num_failures=num_failures, error_file=error_file and str(error_file))


def test_a_trial_that_failed_starts_again_as_often_as_is_allowed(tmp_path):
    from birbal_ray.tune.searcher import SpecSearcher

    scheduler = TrialScheduler(TuneConfig(num_trials=1, resources={"max_failures": 1}))
    searcher = SpecSearcher(scheduler, open_folder(tmp_path), {})
    error_file = tmp_path / "error.txt"
    error_file.write_text("Failure # 1\nTraceback …\nValueError: no such card\n")

    def fails(trial: str, num_failures: int) -> tuple[str, list[str]]:
        """Which spec it had, and what is said."""
        searcher.suggest(trial)
        searcher.on_trial_complete(trial, error=True)
        for _ in range(2):  # Tune calls twice where two tasks of a process die with it
            searcher.failed(failed_trial(trial, num_failures, error_file))
        return searcher._specs[trial].key, searcher.settle()

    said = ["trial base_model starts again (failure 1, 1 allowed): ValueError: no such card"]
    assert fails("a", 1) == fails("a preempted node is no failure", 0) == ("base_model", said)
    assert fails("b", 1) == ("base_model", [])
    found = scheduler.results["base_model"]
    assert (found.status, found.error) == (FAILED, "ValueError: no such card")


def test_a_result_that_is_written_counts_whatever_becomes_of_its_process(tmp_path, monkeypatch):
    from birbal_ray.tune.searcher import SpecSearcher

    folder = open_folder(tmp_path)
    scheduler = TrialScheduler(TuneConfig(num_trials=1))
    searcher = SpecSearcher(scheduler, folder, {})
    searcher.suggest("a")
    spec = searcher._specs["a"]
    write_result(folder, TrialResult(spec, FINISHED, 1.5, [[5, 1.5]]))
    searcher.failed(failed_trial("a", 1))
    with monkeypatch.context() as patch, pytest.raises(RunError, match="no answer"):
        patch.setattr(Folder, "is_file", lambda self, name: (_ for _ in ()).throw(RunError("the store: no answer")))
        searcher.settle()
    assert scheduler.running == ["base_model"], "an outage loses nothing"
    assert searcher.settle() == []
    assert scheduler.results["base_model"].objective == 1.5


def test_a_trial_that_starts_again_is_not_measured_by_the_rungs_of_its_first_start():
    from birbal_ray.tune.searcher import SearchOnlyAsha

    asha = SearchOnlyAsha(metric="objective", mode="min", time_attr="rung", max_t=4, grace_period=1, reduction_factor=2)
    config = {"spec": {"kind": SEARCH}}
    first, again, worse = (SimpleNamespace(trial_id=name, config=config) for name in ("first", "again", "worse"))
    for trial in (first, again, worse):
        asha.on_trial_add(None, trial)
    assert asha.on_trial_result(None, first, {"rung": 1, "objective": 1.0}) == "CONTINUE"
    asha.on_trial_error(None, first)
    assert asha.on_trial_result(None, again, {"rung": 1, "objective": 1.0001}) == "CONTINUE"
    assert asha.on_trial_result(None, worse, {"rung": 1, "objective": 2.0}) == "STOP"


@pytest.fixture
def fit_as(monkeypatch, tmp_path):
    """fit_as(fit) → run_trials with this in place of Tuner.fit, a scheduler and its folder; without Ray."""
    from ray import tune

    from birbal_ray.tune.searcher import ShowProgress, run_trials

    def run(fit: Callable[[], None], scheduler: TrialScheduler) -> None:
        monkeypatch.setattr(tune, "Tuner", lambda *arguments, **options: SimpleNamespace(fit=fit))
        show = ShowProgress(scheduler, None, ProgressLine())
        run_trials(scheduler, open_folder(tmp_path), lambda trial: None, {}, show)

    return run


def test_a_failure_of_tune_itself_says_that_the_command_continues(fit_as):
    from ray.exceptions import OutOfMemoryError

    def fit() -> None:
        try:
            raise OutOfMemoryError("memory on node 3 ran out")
        except OutOfMemoryError as error:
            raise RuntimeError("Caught unexpected exception") from error  # as Tune does

    with pytest.raises(
        RunFailedError, match=r"Ray Tune failed: .*memory on node 3 ran out.*trials that ended are kept"
    ):
        fit_as(fit, TrialScheduler(TuneConfig(num_trials=1)))


def test_an_error_of_the_run_folder_is_no_failed_search(fit_as):
    def fit() -> None:
        raise RunError("the store: no answer")

    with pytest.raises(RunError, match=r"^the store: no answer$") as caught:
        fit_as(fit, TrialScheduler(TuneConfig(num_trials=1)))
    assert type(caught.value) is RunError, "a pipeline goes on without a search only where that failed"


def test_a_search_that_sigusr1_stops_is_not_finished(fit_as):
    scheduler = TrialScheduler(TuneConfig(num_trials=1))
    before = signal.getsignal(signal.SIGUSR1)

    def fit() -> None:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # Tune sets one, keeps it, and returns when the signal comes
        scheduler.next()

    with pytest.raises(RunFailedError, match="ended the search early"):
        fit_as(fit, scheduler)
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_result_that_the_budget_s_end_overtakes_counts(fit_as, tmp_path):
    scheduler = TrialScheduler(TuneConfig(num_trials=1), seconds_left=lambda: 0.0)
    folder = open_folder(tmp_path)

    def fit() -> None:
        spec = TrialSpec("base_model", "base", "base_model", 0, {})
        write_spec(folder, spec, "nowhere")
        write_result(folder, TrialResult(spec, FINISHED, 1.5, [[0, 1.5]]))

    fit_as(fit, scheduler)
    assert scheduler.results["base_model"].objective == 1.5


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
