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
from birbal_ray.tune.config import TuneConfig
from birbal_ray.tune.records import read_records, remember_job
from birbal_ray.tune.run import search
from birbal_ray.tune.scheduler import Job, Plan
from birbal_ray.tune.space import TaskCounts

COUNTS = TaskCounts({"exact_match": 6, "generation": 2}, {"exact_match": 300, "generation": 900})
LOOKS = 2
STARTS_FILE = "starts.jsonl"
DIVERGING = "search-001"


def synthetic_trial(config: dict[str, Any]) -> None:
    """Sleeps between its looks; writes down where and when it started. Its loss follows gamma."""
    import ray

    from birbal_ray.tune.searcher import Looks

    job, run = Job.from_dict(config["job"]), Path(config["run"])
    start = {"key": job.key, "node": ray.get_runtime_context().get_node_id(), "pid": os.getpid(), "at": time.time()}
    with (run / STARTS_FILE).open("a") as file:
        file.write(json.dumps(start) + "\n")
    looks = Looks(run, job, LOOKS)
    for number in range(1, LOOKS + 1):
        time.sleep(config["seconds"])
        loss = 1.0 + job.values.get("gamma", 4.0) + 0.01 * job.seed
        looks.look(number, math.nan if job.key == DIVERGING else loss, mix_sha256=job.key)


def synthetic_search(run: Path, seconds: float, num_trials: int = 6, max_failures: int = 2) -> Plan:
    """Search to the end, or go on with an interrupted one in `run`."""
    config = TuneConfig(
        num_trials=num_trials,
        num_random=3,
        baselines=["uniform", "task_score"],
        surrogate=False,
        validation={"looks": LOOKS},
        stopping={"reduction_factor": 2},
        repeats={"top": 1, "seeds": 2},
        resources={"num_cpus": 1, "max_concurrent": 2, "max_failures": max_failures},
    )
    records, begun = read_records(run)
    plan = Plan(config, COUNTS, records, begun, lambda job: remember_job(run, job, "nowhere"))
    search(config, plan, run, synthetic_trial, {"seconds": seconds}, ProgressLine())
    return plan


def starts_of(run: Path) -> list[dict[str, Any]]:
    """Every start of a trial, in order."""
    file = run / STARTS_FILE
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


if __name__ == "__main__":
    synthetic_search(Path(sys.argv[1]), float(sys.argv[2]))
