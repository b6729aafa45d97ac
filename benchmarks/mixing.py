"""Mixing a million scored rows: in one process, on Ray's workers, with pandas; what each corrected defect changes.

    .venv/bin/python benchmarks/mixing.py scale [--rows 1000000] [--json FILE]
    .venv/bin/python benchmarks/mixing.py corrections [--tasks shared/data/….tar.gz] [--json FILE]

`scale` makes score folders of a quarter of the rows and of all of them, mixes each with all three (every
measurement in a process of its own), checks that all chose the same rows in the same order, and prints
rows/s, peak memory of the whole process tree (proportional set size, shared memory counted once) and ratios.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NUM_TASKS = 200
BUDGET_FRACTION = 20  # each label's budget is a twentieth of the larger size: 50,000 of 1,000,000
SAMPLE_SECONDS = 0.25
OBJECT_STORE_MIB = 128  # small enough that the larger size spills: what is flat then stays flat


def main() -> None:
    """Run the chosen part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    scale = parts.add_parser("scale")
    scale.add_argument("--rows", type=int, default=1_000_000)
    scale.add_argument("--keep", type=Path, help="folder for the made-up scores, reused by a later call")
    scale.add_argument("--json", type=Path)
    corrections = parts.add_parser("corrections")
    corrections.add_argument("--tasks", type=Path, help="real task files; made-up rows without it")
    corrections.add_argument("--json", type=Path)
    child = parts.add_parser("child")
    child.add_argument("kind", choices=["make", "birbal", "ray", "pandas"])
    child.add_argument("scores", type=Path)
    child.add_argument("output", type=Path)
    child.add_argument("rows", type=int)
    child.add_argument("budget", type=int)
    arguments = parser.parse_args()
    if arguments.part == "child":
        CHILDREN[arguments.kind](arguments.scores, arguments.output, arguments.rows, arguments.budget)
        return
    result = measure_scale(arguments) if arguments.part == "scale" else measure_corrections(arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


# --- scale ----------------------------------------------------------------------------------------


def measure_scale(arguments: argparse.Namespace) -> dict[str, Any]:
    """Both versions on a quarter of the rows and on all of them."""
    runs = []
    with tempfile.TemporaryDirectory(prefix="birbal-bench-") as scratch:
        base = arguments.keep or Path(scratch)
        budget = arguments.rows // BUDGET_FRACTION
        for rows in (arguments.rows // 4, arguments.rows):
            scores = base / f"scores-{rows}"
            if not (scores / "manifest.json").exists():
                made = in_child("make", scores, scores, rows, 0)
                print(f"made {rows:,} scored rows in {made['seconds']:.0f} s", flush=True)
            found = {}
            for kind in KINDS:
                output = Path(scratch) / f"{kind}-{rows}"
                found[kind] = {"kind": kind, "rows": rows, **in_child(kind, scores, output, rows, budget)}
                runs.append(found[kind])
                print(line(found[kind]), flush=True)
            if len({found[kind]["digest"] for kind in KINDS}) > 1:
                raise SystemExit(f"{rows:,} rows: the versions chose other train and eval rows, or in another order")
            ours = [mix_bytes(Path(scratch) / f"{kind}-{rows}") for kind in ("birbal", "ray")]
            if ours[0] != ours[1]:
                raise SystemExit(f"{rows:,} rows: Ray's workers gave other bytes")
            print(
                f"{rows:,} rows: all chose the same rows in the same order; birbal and ray: the same bytes", flush=True
            )
    by = {(run["kind"], run["rows"]): run for run in runs}
    small, large = arguments.rows // 4, arguments.rows
    ratios = {
        f"{kind}_memory_{large}_over_{small}": by[kind, large]["peak_mib"] / by[kind, small]["peak_mib"]
        for kind in KINDS
    }
    for rows in (small, large):
        for kind in ("birbal", "ray"):
            for key in ("rows_per_second", "peak_mib"):
                ratios[f"{key}_{kind}_over_pandas_{rows}"] = by[kind, rows][key] / by["pandas", rows][key]
    for name, value in ratios.items():
        print(f"{name}: {value:.2f}")
    return {"cpus": os.cpu_count(), "load_before": os.getloadavg(), "runs": runs, "ratios": ratios}


def mix_bytes(folder: Path) -> dict[str, bytes]:
    """SHA-256 of each file of a mix that holds data."""
    import hashlib

    from birbal_ray.mix.files import mix_files
    from birbal_ray.schemas import TASKS_FILE

    return {name: hashlib.sha256((folder / name).read_bytes()).digest() for name in [*mix_files(), TASKS_FILE]}


def line(run: dict[str, Any]) -> str:
    """One run as text."""
    memory = f"peak {run['peak_mib']:6,.0f} MiB (driver {run['driver_mib']:,.0f})"
    speed = f"{run['seconds']:6.1f} s, {run['cpu_seconds']:5.0f} s of CPU, {run['rows_per_second']:8,.0f} rows/s"
    return f"{run['kind']:7} {run['rows']:>9,} rows: {speed}, {memory}, start {run['start_seconds']:.1f} s"


def in_child(kind: str, scores: Path, output: Path, rows: int, budget: int) -> dict[str, Any]:
    """Run one measurement in a fresh process and sample the memory of its tree."""
    import psutil

    command = [sys.executable, __file__, "child", kind, str(scores), str(output), str(rows), str(budget)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    watched = psutil.Process(process.pid)
    peak = driver_peak = 0.0
    at_peak: dict[str, int] = {}
    cpu: dict[int, float] = {}  # seconds of each process, as last seen
    while process.poll() is None:
        total = driver = 0.0
        sizes: dict[str, int] = {}
        for member in [watched, *children_of(watched)]:
            try:
                size = member.memory_full_info().pss / 2**20
                cpu[member.pid] = sum(member.cpu_times()[:2])
            except psutil.Error:
                continue
            total += size
            sizes[f"{name_of(member)} {member.pid}"] = round(size)
            driver = size if member.pid == process.pid else driver
        if total > peak:
            peak, at_peak = total, sizes
        driver_peak = max(driver_peak, driver)
        time.sleep(SAMPLE_SECONDS)
    if process.returncode:
        raise SystemExit(f"{kind} failed")
    assert process.stdout is not None
    result = json.loads(process.stdout.read().splitlines()[-1])
    used = round(sum(cpu.values()), 1)
    return {
        **result,
        "cpu_seconds": used,
        "peak_mib": round(peak),
        "driver_mib": round(driver_peak),
        "at_peak_mib": at_peak,
    }


def name_of(process: Any) -> str:
    """What a process is: Ray names its workers, the others go by their program."""
    import psutil

    try:
        words = process.cmdline()
    except psutil.Error:
        return "gone"
    return words[0].rsplit("/", 1)[-1] if words else "gone"


def children_of(process: Any) -> list[Any]:
    """All descendants; none when the process is gone."""
    import psutil

    try:
        return list(process.children(recursive=True))
    except psutil.Error:
        return []


def make(scores: Path, output: Path, rows: int, budget: int) -> None:
    """Write a made-up score folder."""
    from tests.fixtures.score_folder import stream_made_up_rows, write_score_folder

    started = time.perf_counter()
    write_score_folder(scores, stream_made_up_rows(NUM_TASKS, rows // NUM_TASKS), shard_rows=1000)
    print(json.dumps({"seconds": time.perf_counter() - started}))


def in_process(scores: Path, output: Path, rows: int, budget: int) -> None:
    """`birbal mix` as it is: one process, no Ray."""
    from birbal_ray.mix.run import mix

    started = time.perf_counter()
    mix(settings(scores, output, budget))
    report(rows, time.perf_counter() - started, 0.0, output)


def with_ray(scores: Path, output: Path, rows: int, budget: int) -> None:
    """`birbal mix` on Ray's workers, Ray's start apart."""
    import ray

    from birbal_ray.cluster import QUIET_ENVIRONMENT
    from birbal_ray.mix.run import mix

    os.environ.update(QUIET_ENVIRONMENT)
    with tempfile.TemporaryDirectory(prefix="bm-", ignore_cleanup_errors=True) as folder:
        started = time.perf_counter()
        ray.init(
            address="local",
            num_cpus=os.cpu_count() or 2,
            object_store_memory=OBJECT_STORE_MIB << 20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            _temp_dir=folder,
        )
        ready = time.perf_counter()
        mix(settings(scores, output, budget, in_process_mib=0, chunk_mib=4))
        done = time.perf_counter()
        ray.shutdown()
    report(rows, done - ready, ready - started, output)


def settings(scores: Path, output: Path, budget: int, **resources: int) -> Any:
    """The mix that all versions make."""
    from birbal_ray.mix.config import MixConfig

    budgets = {"exact_match_budget": budget, "generation_budget": budget}
    return MixConfig(scores=str(scores), output=str(output), task_score=budgets, resources=resources)


def with_pandas(scores: Path, output: Path, rows: int, budget: int) -> None:
    """The same selection and files as a pandas program that reads everything into memory."""
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    from birbal_ray.mix.allocation import TaskDemand, allocate, train_size
    from birbal_ray.mix.features import repeat_keys, row_hashes, shuffle_hashes
    from birbal_ray.ni.prompt import render_prompt

    started = time.perf_counter()
    columns = ["orig_input", "answer", "row_id", "task", "label", "score", "error"]
    frame = pq.read_table(scores / "rows", columns=columns, partitioning=None).to_pandas()
    tasks = pd.read_parquet(scores / "tasks.parquet")[["task", "definition"]]
    frame = frame.merge(tasks, on="task", how="left")
    frame["output"] = frame["answer"].str[0].fillna("")
    frame["row_hash"] = row_hashes((text.encode() for text in frame["row_id"]), 0)
    frame["shuffle_hash"] = shuffle_hashes(frame["row_hash"].to_numpy())
    definitions, inputs = ([text.encode() for text in frame[name]] for name in ("definition", "orig_input"))
    frame["key"] = repeat_keys(definitions, inputs, compat=False)
    input_words = frame["orig_input"].str.count(" ") + 1
    words = frame["definition"].str.count(" ") + 1 + input_words
    reason = pd.Series("", index=frame.index)
    for name, mask in (
        ("error", frame["error"].notna()),
        ("too_long", words >= 800),
        ("short_input", input_words <= 4),
        ("empty_output", frame["output"].str.strip() == ""),
    ):
        reason[(reason == "") & mask] = name
    alive = frame[reason == ""].sort_values("shuffle_hash")
    reason[alive.index[alive["key"].duplicated()]] = "duplicate"
    alive = frame[reason == ""].copy()
    exact = alive["label"] == "exact_match"
    alive["rest"] = ~((exact & (alive["score"] == 0)) | (~exact & (alive["score"] < 0.2)))
    task_scores = pd.read_parquet(scores / "task_scores.parquet").set_index("task")["task_score"]
    limits: dict[str, int] = {}
    for label in ("exact_match", "generation"):
        sizes = alive[alive["label"] == label].groupby("task").size()
        limits |= allocate(budget, [TaskDemand(t, int(n), task_scores[t]) for t, n in sizes.items()]).counts
    alive = alive.sort_values(["task", "rest", "row_hash"])
    alive = alive[alive.groupby("task").cumcount() < alive["task"].map(limits)].sort_values("shuffle_hash")
    reason[reason == ""] = "over_allocation"
    reason[alive.index] = "kept"
    output.mkdir(parents=True)
    audit = frame[["row_id", "task", "label", "score", "shuffle_hash"]].assign(reason=reason)
    audit = audit.assign(dropped=reason != "kept").sort_values(["dropped", "shuffle_hash"])
    pq.write_table(pa.Table.from_pandas(audit), output / "audit.parquet", compression="zstd")
    alive["question"] = [
        render_prompt(d, (), t, preamble=False) for d, t in zip(alive["definition"], alive["orig_input"], strict=True)
    ]
    cut = train_size(len(alive), 0.02)
    for split, part in (("train", alive.iloc[:cut]), ("eval", alive.iloc[cut:])):
        part = part.rename(columns={"definition": "instruction", "orig_input": "input"}).assign(answer=part["output"])
        table = pa.Table.from_pandas(part.drop(columns=["error"]))
        pq.write_table(table, output / f"{split}.parquet", compression="zstd")
        part[["question", "answer"]].to_json(output / f"{split}.jsonl", orient="records", lines=True, force_ascii=False)
        part[["instruction", "input", "output"]].to_json(output / f"{split}.json", orient="records", force_ascii=False)
    report(rows, time.perf_counter() - started, 0.0, output)


def report(rows: int, seconds: float, start_seconds: float, output: Path) -> None:
    """What the parent reads; the digest is that of the train and eval rows' ids in order."""
    import hashlib

    import pyarrow.parquet as pq

    files = (pq.ParquetFile(output / f"{split}.parquet") for split in ("train", "eval"))
    ids = [row_id for file in files for row_id in file.read(["row_id"])["row_id"].to_pylist()]
    digest = hashlib.sha256("\n".join(ids).encode()).hexdigest()
    record = {"seconds": seconds, "rows_per_second": rows / seconds, "start_seconds": start_seconds}
    print(json.dumps({**record, "kept": len(ids), "digest": digest}))


KINDS = ("birbal", "ray", "pandas")
CHILDREN = {"make": make, "birbal": in_process, "ray": with_ray, "pandas": with_pandas}


# --- corrections ----------------------------------------------------------------------------------


def measure_corrections(arguments: argparse.Namespace) -> dict[str, Any]:
    """How many rows of a birbal_2023 mix each corrected defect of the published scripts changes."""
    import numpy as np

    from birbal_ray.mix import select
    from birbal_ray.mix.config import MixConfig
    from birbal_ray.mix.features import Flags
    from birbal_ray.mix.plan import make_context, plan_mix
    from birbal_ray.mix.scores import open_scores
    from birbal_ray.mix.select import Reason
    from tests.fixtures.score_folder import made_up_rows, write_score_folder

    with tempfile.TemporaryDirectory(prefix="birbal-bench-") as scratch:
        rows: Any = list(real_rows(arguments.tasks)) if arguments.tasks else made_up_rows(100, 1000, seed=3)
        definitions = real_definitions(arguments.tasks) if arguments.tasks else None
        folder = write_score_folder(Path(scratch) / "s", rows, definitions=definitions, shard_rows=4000)
        scores = open_scores(folder)
        plans = {
            compat: plan_mix(
                make_context(MixConfig(policy="birbal_2023", birbal_2023={"compat": compat}), scores),
                [],
                Path(scratch) / "work",
            )
            for compat in (True, False)
        }
        columns = {compat: plan.candidates for compat, plan in plans.items()}
        groups = plans[True].context.groups
        by_id = {f"{row['task']}:{row['instance_id']}": row for row in rows}
        texts = [
            (row["prediction"].split("\n\n")[0].strip(), *row["answer"])
            for row in (by_id[row_id] for row_id in plans[True].row_ids.to_pylist())
        ]
        empty = np.array([any(not text.replace(".", "") for text in group) for group in texts])
        old, new = columns[True], columns[False]
        unfiltered = old.flags & ~np.uint16(Flags.EMPTY_OUTPUT)
        published = dataclasses.replace(old, flags=unfiltered)
        only_empty = np.where(empty, new.published, old.published)
        steps = {
            "an empty answer is not perfect": dataclasses.replace(published, published=only_empty),
            "ROUGE-L counts every word, not distinct ones": dataclasses.replace(
                published, published=np.where(empty, old.published, new.published)
            ),
            "repeats need the same instruction": dataclasses.replace(published, key=new.key),
            "empty outputs are dropped": dataclasses.replace(published, flags=old.flags),
            "all of them": new,
        }
        plain = MixConfig(policy="birbal_2023")
        before = select.decide(published, groups, plain).reason == Reason.KEPT
        print(f"{len(before):,} scored rows of {len(groups)} tasks, {before.sum():,} kept as published")
        result: dict[str, Any] = {"rows": len(before), "kept_as_published": int(before.sum()), "corrections": {}}
        for name, candidates in steps.items():
            after = select.decide(candidates, groups, plain).reason == Reason.KEPT
            added, removed = int((after & ~before).sum()), int((before & ~after).sum())
            print(f"{name}: +{added:,} −{removed:,} rows")
            result["corrections"][name] = {"added": added, "removed": removed}
        return result


def real_tasks(path: Path) -> Iterator[tuple[Any, str]]:
    """Task files with their labels."""
    from birbal_ray.ni.metrics import default_overrides, label_task
    from birbal_ray.ni.reader import find_task_files, parse_task, read_files

    overrides = default_overrides()
    for file, data in read_files(find_task_files(path)):
        task = parse_task(file.name, data)
        yield task, label_task(task, overrides).value


def real_definitions(path: Path) -> dict[str, str]:
    """Task → definition."""
    return {task.name: task.definition for task, _ in real_tasks(path)}


def real_rows(path: Path, per_task: int = 1000) -> Iterator[dict[str, Any]]:
    """Real inputs and references; the answers are made up (right with a chance per task, 2 % empty)."""
    from birbal_ray.ni.schema import order_instances

    for number, (task, label) in enumerate(real_tasks(path)):
        rng = random.Random(number)
        skill = rng.random()
        taken = [i for i in order_instances(task, 0)[:per_task] if i.error is None and i.references]
        for instance, other in zip(taken, itertools.islice(itertools.cycle(taken), 1, None), strict=False):
            source = instance if rng.random() < skill else other
            answer = source.references[0]
            if label == "generation":
                words = answer.split(" ")
                answer = " ".join(words[: max(1, round(len(words) * (1 - rng.random() / 2)))])
            yield {
                "task": task.name,
                "label": label,
                "instance_id": instance.row_id.removeprefix(f"{task.name}:"),
                "orig_input": instance.input,
                "answer": list(instance.references),
                "prediction": "" if rng.random() < 0.02 else answer,
                "error": None,
            }


if __name__ == "__main__":
    main()
