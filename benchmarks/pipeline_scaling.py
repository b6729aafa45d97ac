"""Prompts per second that the Ray Data pipeline feeds when engines cost nothing.

    python benchmarks/pipeline_scaling.py --json pipeline_scaling.json
    python benchmarks/pipeline_scaling.py --rows 10000 100000 --replicas 1 2

The engine is the simulated one (it makes an answer up from a hash of the prompt), all else is
`birbal score`: task files, prompts, Ray Data, scoring, Parquet files. Made-up tasks with prompts as long
as real ones (300 words that a task shares, 58 of an instance's own).

(a) rows/s at 1, 2, 4, 8 replicas: on a machine with few cores all of them share these.
(b) seconds per row at 10,000 to 1,000,000 rows, at two replicas: must stay flat.
(c) what the driver's own process costs per row. Prompts, engines and writers are processes that a cluster
    spreads over its nodes; the driver is one process, so it sets how many engines one run can feed. Real ones
    are taken to do 300 prompts/s each.
(d) prompts/s of one prepare worker with the small model's real tokenizer: how many of them a GPU needs.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from birbal_ray.score.config import ScoreConfig
from birbal_ray.settings import load_config

GPU_PROMPTS_PER_SECOND = 300
SHARED_WORDS, OWN_WORDS = 300, 58
INSTANCES_PER_TASK = 2_000
WORDS = (
    "amber",
    "basin",
    "cedar",
    "delta",
    "ember",
    "fjord",
    "grove",
    "harbor",
    "island",
    "jungle",
    "kernel",
    "lagoon",
)


def make_tasks(folder: Path, num_rows: int) -> None:
    """Task files with `num_rows` instances in all."""
    folder.mkdir(parents=True)
    chance = random.Random(0)

    def text(count: int) -> str:
        return " ".join(chance.choices(WORDS, k=count))

    for first in range(0, num_rows, INSTANCES_PER_TASK):
        count = min(INSTANCES_PER_TASK, num_rows - first)
        examples = [{"input": text(50), "output": "yes"} for _ in range(4)]
        values = {
            "Definition": [text(SHARED_WORDS - 200)],
            "Categories": ["Made Up"],
            "Positive Examples": examples,
            "Instances": [{"id": str(first + k), "input": text(OWN_WORDS), "output": ["yes"]} for k in range(count)],
        }
        (folder / f"made_up_{first:07d}.json").write_text(json.dumps(values))


def settings(folder: Path, output: Path, replicas: int) -> ScoreConfig:
    flags = {
        "tasks.path": str(folder),
        "output": str(output),
        "engine.backend": "simulated",
        "engine.device": "cpu",
        "shard_rows": 512,  # as on a GPU
        "resources.num_replicas": replicas,
        "resources.num_prepare_workers": max(1, replicas // 2),
    }
    return load_config(ScoreConfig, None, [], flags)


def run(folder: Path, output: Path, replicas: int) -> dict[str, Any]:
    """One run in this process: its figures."""
    from birbal_ray.score.run import score

    usage, start = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
    result = score(settings(folder, output, replicas))
    after = resource.getrusage(resource.RUSAGE_SELF)
    session = result.manifest["last_session"]
    return {
        "replicas": replicas,
        "rows": session["rows"],
        "rows_per_second": session["rows"] / session["steady_seconds"],
        "wall_seconds": time.monotonic() - start,
        "steady_seconds": session["steady_seconds"],
        "driver_cpu_seconds": after.ru_utime + after.ru_stime - usage.ru_utime - usage.ru_stime,
        "driver_peak_mib": after.ru_maxrss / 1024,
    }


def prepare_rate(folder: Path) -> float:
    """Prompts/s of one prepare worker with the small model's tokenizer, in this process."""
    from birbal_ray.score.plan import plan_run
    from birbal_ray.score.stages import BuildPrompts
    from birbal_ray.storage import open_folder

    config = load_config(ScoreConfig, None, [], {"tasks.path": str(folder), "tasks.instances_per_task": 1000})
    shards = plan_run(config).shards(64)
    build = BuildPrompts(config, open_folder(folder))
    build({"shard": pickle.dumps(shards[0])})
    start = time.monotonic()
    for shard in shards[1:]:
        build({"shard": pickle.dumps(shard)})
    return sum(shard.num_rows for shard in shards[1:]) / (time.monotonic() - start)


def child(*arguments: object) -> dict[str, Any]:
    """A measurement in a process (and on a Ray) of its own."""
    command = [sys.executable, __file__, "--child", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--replicas", type=int, nargs="*", default=[1, 2, 4, 8])
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)  # folder, output, replicas
    arguments = parser.parse_args()
    if arguments.child:
        folder, output, replicas = arguments.child
        print(json.dumps(run(Path(folder), Path(output), int(replicas))))
        return
    figures: dict[str, Any] = {"cores": len(os.sched_getaffinity(0)), "replicas": [], "rows": []}
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        smallest = min(arguments.rows)
        for rows in arguments.rows:
            make_tasks(work / f"tasks-{rows}", rows)
        for replicas in arguments.replicas:
            one = child(work / f"tasks-{smallest}", work / f"replicas-{replicas}", replicas)
            figures["replicas"].append(one)
            print(f"{replicas} replicas, {smallest:,} rows: {one['rows_per_second']:,.0f} rows/s", flush=True)
        for rows in arguments.rows:
            one = child(work / f"tasks-{rows}", work / f"rows-{rows}", 2)
            figures["rows"].append(one)
            print(
                f"{rows:,} rows: {one['rows_per_second']:,.0f} rows/s, {1e6 / one['rows_per_second']:.0f} µs a row, "
                f"driver {1e6 * one['driver_cpu_seconds'] / rows:.0f} µs of CPU a row, "
                f"{one['driver_peak_mib']:,.0f} MiB",
                flush=True,
            )
        figures["prepare_rows_per_second"] = prepare_rate(work / f"tasks-{smallest}")
    costs = [1 / one["rows_per_second"] for one in figures["rows"]]
    largest = figures["rows"][-1]
    driver = largest["rows"] / largest["driver_cpu_seconds"]
    print(f"cost per row, most rows against fewest: {costs[-1] / costs[0]:.2f} x (flat is 1)")
    print(
        f"one driver: {driver:,.0f} rows per second of its own CPU time, enough for "
        f"{driver / GPU_PROMPTS_PER_SECOND:.0f} GPUs at {GPU_PROMPTS_PER_SECOND} prompts/s each"
    )
    per_gpu = GPU_PROMPTS_PER_SECOND / figures["prepare_rows_per_second"]
    print(
        f"one prepare worker, real tokenizer: {figures['prepare_rows_per_second']:,.0f} prompts/s; "
        f"{per_gpu:.2f} of them per GPU"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
