"""What the pipeline costs beside the engines: the driver, the plan, the summary, a finished run.

    python benchmarks/pipeline_scaling.py --json scaling.json                     # all parts, up to a million rows
    python benchmarks/pipeline_scaling.py --parts driver --rows 100000 5000000
    python benchmarks/pipeline_scaling.py --parts folder --shards 2000

Each measurement runs in a process of its own. With `--json FILE` its figures are kept there as soon as it ends, and
a later call measures only what is missing: the benchmark may be stopped at any time.

pipeline  rows/s of all of `birbal score` with the simulated engine, by rows and replicas. On a machine with few cores
          all processes share these; the first row count is run with every number of replicas.
driver    the driver alone: the real schedule, ledger and Ray Data, in shards of 512 rows, around stages that only
          hand on blocks of the real size. Prompts, engines and writers are processes that a cluster spreads over its
          nodes; the driver is one, so it sets how many engines a run can feed. A real one is taken to do 300 prompts/s.
folder    a made-up finished run of so many shards: planning its task files for the first time and from the cache,
          adding its rows up, and finding that it is up to date.
prepare   prompts/s of one prepare worker with the small model's tokenizer: how many of them a GPU needs.
adaptive  rows/s of the pipeline with 462 tasks: every instance by a list of shards, and by adaptive decisions that
          have to compute each task's share.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pickle
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from birbal_ray.score.config import GPU_SHARD_ROWS, ScoreConfig
from birbal_ray.settings import load_config

GPU_PROMPTS_PER_SECOND, NUM_GPUS = 300, 64
SHARED_WORDS, OWN_WORDS = 300, 58
INSTANCES_PER_TASK = 2_000
FOLDER_SHARDS_PER_TASK, FOLDER_SHARD_ROWS = 20, 250
ADAPTIVE_TASKS, ADAPTIVE_INSTANCES = 462, 200
PARTS = ("driver", "folder", "adaptive", "pipeline", "prepare")
WORDS = ["amber", "basin", "cedar", "delta", "ember", "fjord", "grove", "harbor", "island", "jungle", "kernel"]


def make_tasks(folder: Path, num_rows: int, per_task: int = INSTANCES_PER_TASK, own_words: int = OWN_WORDS) -> None:
    """Task files with `num_rows` instances in all."""
    folder.mkdir(parents=True)
    chance = random.Random(0)

    def text(count: int) -> str:
        return " ".join(chance.choices(WORDS, k=count))

    for first in range(0, num_rows, per_task):
        count = min(per_task, num_rows - first)
        examples = [{"input": text(50), "output": "yes"} for _ in range(4)]
        values = {
            "Definition": [text(SHARED_WORDS - 200)],
            "Categories": ["Made Up"],
            "Positive Examples": examples,
            "Instances": [
                {"id": str(number), "input": f"{text(own_words)} {number}", "output": ["yes"]}
                for number in range(first, first + count)
            ],
        }
        (folder / f"made_up_{first:07d}.json").write_text(json.dumps(values))


def settings(tasks: Path, output: Path, replicas: int = 1, **more: Any) -> ScoreConfig:
    flags = {
        "tasks.path": str(tasks),
        "output": str(output),
        "engine.backend": "simulated",
        "engine.device": "cpu",
        "shard_rows": GPU_SHARD_ROWS,
        "resources.num_replicas": replicas,
        "resources.num_prepare_workers": max(1, replicas // 2),
    }
    return load_config(ScoreConfig, None, [], flags | {name.replace("__", "."): value for name, value in more.items()})


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# Measurements. Each runs in a child process, in an empty folder of its own.


def measure_pipeline(work: Path, rows: int, replicas: int) -> dict[str, Any]:
    """All of `birbal score`, everything real but the engine."""
    from birbal_ray.score.run import score

    make_tasks(work / "tasks", rows)
    return run_score(score, settings(work / "tasks", work / "run", replicas))


def run_score(score: Any, config: ScoreConfig) -> dict[str, Any]:
    start, cpu = time.monotonic(), cpu_seconds()
    session = score(config).manifest["last_session"]
    return {
        "rows": session["rows"],
        "rows_per_second": session["rows"] / session["steady_seconds"],
        "wall_seconds": time.monotonic() - start,
        "steady_seconds": session["steady_seconds"],
        "driver_cpu_seconds": cpu_seconds() - cpu,
        "driver_peak_mib": peak_mib(),
    }


def measure_driver(work: Path, rows: int, replicas: int) -> dict[str, Any]:
    """The schedule, the ledger and Ray Data around stages that do nothing, as `birbal score` calls them."""
    from birbal_ray.cluster import ray_session
    from birbal_ray.progress import ProgressLine
    from birbal_ray.score import pipeline
    from birbal_ray.score.adaptive import FixedSchedule
    from birbal_ray.score.pipeline import Session
    from birbal_ray.score.shards import Shard
    from birbal_ray.storage import open_folder

    class Build:
        def __init__(self, *_: Any) -> None:
            self._block = os.urandom(3_000) * GPU_SHARD_ROWS  # a shard's prompts and token ids

        def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            return {"shard": row["shard"], "rows": self._block}

    class Complete:
        def __init__(self, _: Any, __: Any, ___: Any, monitor: Any, folder: Any, *____: Any) -> None:
            import ray

            self._folder, self._monitor = folder, monitor
            self._replica = ray.get_runtime_context().get_actor_id()
            ray.get(monitor.started.remote(self._replica, "node"))
            ray.get(monitor.ready.remote(self._replica))
            self._first = folder.local / f"first-{self._replica}"

        def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            import ray

            from birbal_ray.score.shards import Tally, WrittenFile
            from birbal_ray.storage import FileRecord

            if not self._first.exists():
                self._first.write_text(repr(time.time()))
            shard = pickle.loads(row["shard"])
            ray.get(self._monitor.begin.remote(self._replica, shard.name, shard.num_rows))
            self._monitor.completed.remote(self._replica, shard.name)
            self._monitor.add.remote(self._replica, {"rows": shard.num_rows, "prompt_tokens": 300 * shard.num_rows})
            file = self._folder.local / "rows" / shard.name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
            rows = shard.num_rows
            done = WrittenFile(shard.name, shard.task, rows, 0, FileRecord("0" * 64, 0), Tally(rows, rows, 0.0, 0.0))
            ray.get(self._monitor.written.remote(done))
            return {"file": shard.name}

    pipeline.BuildPrompts, pipeline.ScorePrompts = Build, Complete  # type: ignore[misc,assignment]
    config = settings(work, work / "run", replicas)
    folder = open_folder(str(work / "run"))
    folder.local.mkdir(parents=True, exist_ok=True)
    shards = []
    for first in range(0, rows, INSTANCES_PER_TASK):
        last = min(rows, first + INSTANCES_PER_TASK) - first
        cuts = range(0, last, GPU_SHARD_ROWS)
        about = f"made_up_{first:07d}", "", "", "exact_match"
        shards += [Shard(*about, cut, min(last, cut + GPU_SHARD_ROWS), 8) for cut in cuts]
    session = Session(ProgressLine(), 0)
    samples: list[tuple[float, int, float, float]] = []  # seconds, rows, CPU seconds, MiB

    def see(snapshot: Any) -> None:
        session.see(snapshot)
        samples.append((time.monotonic(), snapshot.rows_written, cpu_seconds(), status_mib("VmRSS")))

    with ray_session(pipeline.logical_cpus(config)):
        started, start, cpu, memory = time.time(), time.monotonic(), cpu_seconds(), peak_mib()
        pipeline.score_shards(FixedSchedule(shards), config, "made up", folder, see)
        seconds, cpu = time.monotonic() - start, cpu_seconds() - cpu
    later = np.array([one for one in samples if one[1] * 10 >= rows])  # what a start costs is not a row's
    # CPU = what was before + a second's (polling) + a row's.
    unknowns = np.column_stack([np.ones(len(later)), later[:, 0] - later[0, 0], later[:, 1]])
    (_, per_second, per_row), *_ = np.linalg.lstsq(unknowns, later[:, 2])
    first_at = min(float(file.read_text()) for file in folder.local.glob("first-*"))
    assert session.last.rows_written == rows
    return {
        "rows": rows,
        "shards": len(shards),
        "rows_per_second": rows / seconds,
        "seconds_to_first_shard": first_at - started,
        "wall_seconds": seconds,
        "driver_cpu_seconds": cpu,
        "polls": len(later),
        "driver_cpu_fraction_of_time": per_second,
        "driver_cpu_seconds_per_further_row": per_row,
        "driver_mib_at_a_tenth": later[0, 3],
        "driver_mib_at_the_end": later[-1, 3],
        "driver_mib_before": memory,
        "driver_peak_mib": peak_mib(),
    }


def make_rows(schedule: Any, config: Any, _: str, folder: Any, on_poll: Any, **__: Any) -> None:
    """In place of `score_shards`: rows of constant texts through the real writer, without Ray."""
    from birbal_ray.schemas import ROWS_FOLDER, SCORE_ROWS
    from birbal_ray.score.monitor import EngineMonitor
    from birbal_ray.score.stages import write_rows

    monitor, rows, position = EngineMonitor(schedule, 1, 0), folder.subfolder(ROWS_FOLDER), 0
    texts = dict.fromkeys(("orig_input", "few_shot_prompt", "prediction", "instance_id", "extracted"), "made up")
    numbers = {"num_prompt_tokens": 380, "num_cached_tokens": 300, "num_completion_tokens": 2}
    while (pickled := monitor.take(position)) is not None:
        for shard in map(pickle.loads, pickled):
            size = shard.num_rows
            about = {"task": shard.task, "label": shard.label, "metric": "exact_match", "finish_reason": "stop"}
            columns = {name: [value] * size for name, value in (texts | numbers | about).items()}
            columns["row_id"] = [f"{shard.task}:{number}" for number in range(shard.first, shard.last)]
            columns["score"] = [float(number % 3 == 0) for number in range(size)]
            columns |= {"answer": [["yes"]] * size, "error": [None] * size}
            table = pa.table({name: columns[name] for name in SCORE_ROWS.names}, schema=SCORE_ROWS)
            monitor.written(write_rows(rows, table, shard, config.adaptive.failed_below))
            on_poll(monitor.snapshot())
        position += len(pickled)


def measure_folder(work: Path, num_shards: int, _: int) -> dict[str, Any]:
    """A finished run of `num_shards` files, made without an engine; then the parts of `birbal score` on it."""
    from birbal_ray.score import run as score_run
    from birbal_ray.score.plan import plan_run
    from birbal_ray.score.results import summarise
    from birbal_ray.score.shards import RowFiles
    from birbal_ray.storage import open_folder

    rows = num_shards * FOLDER_SHARD_ROWS
    make_tasks(work / "tasks", rows, FOLDER_SHARDS_PER_TASK * FOLDER_SHARD_ROWS, own_words=2)
    config = settings(work / "tasks", work / "run", shard_rows=FOLDER_SHARD_ROWS)
    figures: dict[str, Any] = {"rows": rows, "shards": num_shards}
    for name in ("plan", "plan_from_cache"):
        start, cpu = time.monotonic(), cpu_seconds()
        plan = plan_run(config)
        figures |= {f"{name}_seconds": time.monotonic() - start, f"{name}_cpu_seconds": cpu_seconds() - cpu}
    score_run.score_shards = make_rows  # type: ignore[assignment]
    score_run.ray_session = lambda *_, **__: contextlib.nullcontext()  # type: ignore[assignment]
    score_run.check_cluster = lambda config: None
    score_run.score(config)
    command = [sys.executable, "-m", "birbal_ray", "score", "--tasks", str(work / "tasks")]
    command += ["--output", str(work / "run")]
    more = ["engine.backend=simulated", f"shard_rows={FOLDER_SHARD_ROWS}", "engine.device=cpu"]
    command += [part for one in more for part in ("--set", one)]
    start, cpu = time.monotonic(), children_cpu_seconds()
    said = subprocess.run(command, check=True, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE).stderr
    assert "is up to date" in said, said
    figures["up_to_date_seconds"] = time.monotonic() - start
    figures["up_to_date_cpu_seconds"] = children_cpu_seconds() - cpu
    folder = open_folder(config.output or "").subfolder("rows")
    child = os.fork()  # the peak of what follows alone
    if child == 0:
        start, cpu = time.monotonic(), cpu_seconds()
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = status_mib("VmRSS")
        results = summarise(folder, RowFiles(folder.files()), plan.tasks)
        assert results.rows["scored"] == rows
        seconds = {"seconds": time.monotonic() - start, "cpu_seconds": cpu_seconds() - cpu}
        seen = seconds | {"peak_mib": status_mib("VmHWM"), "mib_before": before}
        (work / "summary.json").write_text(json.dumps(seen))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status == 0
    seen = json.loads((work / "summary.json").read_text())
    return figures | {f"summary_{name}": value for name, value in seen.items()}


def children_cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def status_mib(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) / 1024


def measure_adaptive(work: Path, decides: int, _: int) -> dict[str, Any]:
    """462 tasks, all instances; with `decides` every step is a decision that needs the task's share.

    The margin is always met and the budgets are almost all there is: each task goes on to its end, look by look.
    """
    from birbal_ray.score.run import score

    rows = ADAPTIVE_TASKS * ADAPTIVE_INSTANCES
    make_tasks(work / "tasks", rows, ADAPTIVE_INSTANCES)
    more = {
        "adaptive__enabled": bool(decides),
        "adaptive__score_margin": 0.5,
        "adaptive__first_instances": 50,
        "adaptive__exact_match_budget": rows * 95 // 100,
    }
    figures = run_score(score, settings(work / "tasks", work / "run", 2, **more))
    assert figures["rows"] == rows
    decisions = work / "run" / "decisions.json"
    return figures | {"decisions": len(json.loads(decisions.read_text())) if decisions.exists() else 0}


def measure_prepare(work: Path, rows: int, _: int) -> dict[str, Any]:
    """Prompts/s of one prepare worker with the small model's tokenizer."""
    from birbal_ray.score.plan import plan_run
    from birbal_ray.score.stages import BuildPrompts
    from birbal_ray.storage import open_folder

    make_tasks(work / "tasks", rows)
    config = load_config(ScoreConfig, None, [], {"tasks.path": str(work / "tasks")})
    shards = plan_run(config).shards(GPU_SHARD_ROWS)
    build = BuildPrompts(config, open_folder(str(work)))
    build({"shard": pickle.dumps(shards[0])})
    start, cpu = time.monotonic(), cpu_seconds()
    for shard in shards[1:]:
        build({"shard": pickle.dumps(shard)})
    rows = sum(shard.num_rows for shard in shards[1:])
    return {
        "rows_per_second": rows / (time.monotonic() - start),
        "rows_per_cpu_second": rows / (cpu_seconds() - cpu),
    }


MEASUREMENTS = {
    "pipeline": measure_pipeline,
    "driver": measure_driver,
    "folder": measure_folder,
    "adaptive": measure_adaptive,
    "prepare": measure_prepare,
}


def child(part: str, size: int, replicas: int) -> dict[str, Any]:
    """A measurement in a process (and on a Ray, with a cache of plans) of its own."""
    with tempfile.TemporaryDirectory(prefix="birbal-bench-") as work:
        command = [sys.executable, __file__, "--child", part, work, str(size), str(replicas)]
        environment = os.environ | ({} if part == "prepare" else {"BIRBAL_CACHE": f"{work}/cache"})
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        return json.loads(done.stdout.splitlines()[-1])


def describe(part: str, one: Mapping[str, Any]) -> str:
    if part in ("pipeline", "driver", "adaptive"):
        cost = 1e6 * one["driver_cpu_seconds"] / one["rows"]
        text = f"{one['rows_per_second']:,.0f} rows/s, driver {cost:.1f} µs of CPU a row, "
        text += f"{one['driver_peak_mib']:,.0f} MiB"
        if part == "driver":
            text += (
                f" ({one['driver_mib_before']:,.0f} before, {one['driver_mib_at_a_tenth']:,.0f} at a tenth of the "
                f"rows, {one['driver_mib_at_the_end']:,.0f} at the end), first shard in an engine after "
                f"{one['seconds_to_first_shard']:.1f} s; {cards_fed(one)}"
            )
        return text + (f", {one['decisions']:,} decisions" if part == "adaptive" else "")
    if part == "folder":
        timed = [
            f"{what} {one[f'{name}_seconds']:.1f} s ({one[f'{name}_cpu_seconds']:.1f} of CPU)"
            for what, name in (
                ("planned in", "plan"),
                ("from the cache in", "plan_from_cache"),
                ("up to date after", "up_to_date"),
                ("added up in", "summary"),
            )
        ]
        memory = f"{one['summary_peak_mib']:,.0f} MiB ({one['summary_mib_before']:,.0f} before)"
        return f"{one['rows']:,} rows: {', '.join(timed)}, {memory}"
    rate = one["rows_per_cpu_second"]
    return (
        f"{one['rows_per_second']:,.0f} prompts/s, {rate:,.0f} per second of CPU: "
        f"{GPU_PROMPTS_PER_SECOND / rate:.2f} a GPU"
    )


def cards_fed(one: Mapping[str, Any]) -> str:
    fraction, seconds = one["driver_cpu_fraction_of_time"], one["driver_cpu_seconds_per_further_row"]
    asked = NUM_GPUS * GPU_PROMPTS_PER_SECOND
    return (
        f"{fraction:.1%} of a core whatever is done and {1e6 * seconds:.1f} µs a further row (fitted to {one['polls']} "
        f"polls), so {asked:,} rows/s of {NUM_GPUS} GPUs at {GPU_PROMPTS_PER_SECOND} prompts/s would take "
        f"{fraction + asked * seconds:.0%} of a core"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000], help="of driver and pipeline")
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2, 4, 8], help="of pipeline")
    parser.add_argument("--shards", type=int, default=20_000, help="of folder, 250 rows each")
    parser.add_argument("--json", type=Path, help="keep the figures here, and measure only what is not there yet")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)  # part, folder, size, replicas
    arguments = parser.parse_args()
    if arguments.child:
        part, work, size, replicas = arguments.child
        print(json.dumps(MEASUREMENTS[part](Path(work), int(size), int(replicas))))
        return
    figures: dict[str, Any] = {}
    if arguments.json and arguments.json.exists():
        figures = json.loads(arguments.json.read_text())
    asked = {
        "driver": [(rows, 2) for rows in arguments.rows],
        "folder": [(arguments.shards, 1)],
        "adaptive": [(0, 2), (1, 2)],
        "pipeline": list(
            dict.fromkeys(
                [(arguments.rows[0], replicas) for replicas in arguments.replicas]
                + [(rows, 2) for rows in arguments.rows]
            )
        ),
        "prepare": [(4 * INSTANCES_PER_TASK, 1)],
    }
    for part in arguments.parts:
        for size, replicas in asked[part]:
            name = f"{part} {size} {replicas}"
            if name not in figures:
                load = os.getloadavg()[0]
                figures[name] = child(part, size, replicas) | {"load": load, "cores": len(os.sched_getaffinity(0))}
                if arguments.json:
                    arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
            print(f"{name} (load {figures[name]['load']:.0f}): {describe(part, figures[name])}", flush=True)


if __name__ == "__main__":
    main()
