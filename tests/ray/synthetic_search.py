"""A search whose trials cost nothing but time: synthetic, for tests of how trials are run; one of them diverges."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from birbal_ray.progress import ProgressLine
from birbal_ray.storage import open_folder
from birbal_ray.tune.config import TuneConfig
from birbal_ray.tune.records import read_results, write_spec
from birbal_ray.tune.run import search
from birbal_ray.tune.scheduler import TrialScheduler, TrialSpec

RUNGS = 2
STARTS_FILE = "starts.jsonl"
DIED_FILE = "died"
DIVERGING = "search-001"


def synthetic_trial(config: dict[str, Any]) -> None:
    """Sleeps between its rungs; writes down where and when it started. Its loss follows gamma.

    It takes `linger` seconds to end when it is stopped, as one that frees a card's memory on a busy machine; below 0
    the process of the first one that is stopped dies, while Tune hands it the next trial.
    """
    import ray

    from birbal_ray.tune.records import RungReporter

    spec, run = TrialSpec(**config["spec"]), config["run"].local
    start = {"key": spec.key, "node": ray.get_runtime_context().get_node_id(), "pid": os.getpid(), "at": time.time()}
    with (run / STARTS_FILE).open("a") as file:
        file.write(json.dumps(start) + "\n")
    reporter = RungReporter(open_folder(run), spec, RUNGS)
    try:
        for number in range(1, RUNGS + 1):
            time.sleep(config["seconds"])
            loss = 1.0 + spec.values.get("gamma", 4.0) + 0.01 * spec.seed
            reporter.report(number, math.nan if spec.key == DIVERGING else loss, mix_sha256=spec.key)
    except SystemExit:
        if config["linger"] < 0 and not (run / DIED_FILE).exists():
            (run / DIED_FILE).touch()
            os._exit(1)
        time.sleep(config["linger"])
        raise


def synthetic_search(run: Path, seconds: float, linger: float = 0.0) -> TrialScheduler:
    """Search to the end, or go on with an interrupted one in `run`."""
    config = TuneConfig(
        num_trials=6,
        num_initial=6,
        baselines=["uniform", "task_score"],
        predicted=False,
        validation={"num_rungs": RUNGS},
        stopping={"reduction_factor": 2},
        repeats={"top": 1, "seeds": 2},
        resources={"num_cpus": 1, "max_concurrent": 2, "max_failures": 2},
    )
    folder = open_folder(run)
    results, started = read_results(folder)
    scheduler = TrialScheduler(config, results, started, lambda spec: write_spec(folder, spec, "nowhere"))
    search(scheduler, folder, synthetic_trial, {"seconds": seconds, "linger": linger}, ProgressLine())
    return scheduler


def starts_of(run: Path) -> list[dict[str, Any]]:
    """Every start of a trial, in order."""
    file = run / STARTS_FILE
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


if __name__ == "__main__":
    synthetic_search(Path(sys.argv[1]), *map(float, sys.argv[2:]))
