"""Prompts that adaptive scoring saves, and what they cost in accuracy: scores of a full pass, replayed.

    python benchmarks/adaptive.py --scores RUN --data adaptive_scores.parquet    # take the scores out of a score run
    python benchmarks/adaptive.py --data adaptive_scores.parquet --json adaptive.json
    python benchmarks/adaptive.py --synthetic

The run has scored every instance of its tasks, or the first ones of each in hash order. The replay asks the real
scheduler (`birbal_ray.score.adaptive`) which ranges are scored, and answers with the scores of the full pass. The
budgets of the mix are scaled to the rows at hand: the same share of them that 50,000 + 50,000 are of the 462 tasks.
Order 0 is the run's hash order; the others shuffle each task's rows and say how far one order can be trusted.

(a) prompts of the full pass for each prompt of the adaptive one
(b) tasks whose score is within the margin of the full pass's score
(c) half the sum of differences between the allocations' shares (total variation), and how much of them is filled
(d) the fewest prompts that any rule could do with (`floor`): each task scored up to the row that completes the failed
    rows of its share, as if shares and scores were known beforehand, and no less than the first look
(e) the same rule on 462 tasks, with sizes of real tasks (69 are at hand, the others are drawn from these) and scores
    drawn from the replayed tasks: prompts, hours on one RTX 4090, and what the decisions cost

`--factors` are values of `adaptive.failed_rows_factor`: below 1 a task may stop before its failed rows fill its share,
and the mix takes other rows of it in their place.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from birbal_ray.mix.allocation import TaskDemand, allocate
from birbal_ray.ni import reader
from birbal_ray.ni.metrics import EXACT_MATCH, GENERATION, MAX_UNREACHABLE_FRACTION, Label
from birbal_ray.schemas import ROWS_FOLDER, TASKS_FILE
from birbal_ray.score.adaptive import AdaptiveSchedule
from birbal_ray.score.config import AdaptiveSettings
from birbal_ray.score.shards import PlannedTask, RowFiles, Shard, Tally, WrittenFile
from birbal_ray.storage import FileRecord, open_folder

NI_DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
SCHEMA = pa.schema(
    [
        pa.field("task", pa.string(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("order", pa.int32(), nullable=False),  # position in the task's hash order
        pa.field("score", pa.float64()),  # null: an error row
        pa.field("is_fit", pa.bool_(), nullable=False),  # the task's own references can score: a share is due to it
    ]
)
BUDGET = AdaptiveSettings().exact_match_budget  # of each label
SHARD_ROWS, IN_FLIGHT = 512, 9  # as with one GPU
FULL_INSTANCES = 1000  # of a task, what the goals are about
PROMPTS_PER_SECOND = 75  # one RTX 4090, Mistral-7B, few-shot prompts: arithmetic, not measured


@dataclass(frozen=True)
class TaskScores:
    """A task of the full pass. `scores`: float64 (instances,) in hash order, NaN for an error row.

    The mix gives no share to a task that is not `is_fit`: not even its references score.
    """

    name: str
    label: str
    scores: np.ndarray
    is_fit: bool = True

    def shuffled(self, chance: np.random.Generator) -> TaskScores:
        return replace(self, scores=chance.permutation(self.scores))

    def drawn(self, name: str, size: int, chance: np.random.Generator) -> TaskScores:
        """As many scores with this task's distribution."""
        return replace(self, name=name, scores=chance.choice(self.scores, size))


def extract(run: Path) -> pa.Table:
    """SCHEMA rows of a score run's tasks, finished or not: of each the files that follow on one another from row 0."""
    folder = open_folder(str(run))
    rows = folder.subfolder(ROWS_FOLDER)
    found = RowFiles(rows.files(""))
    parts = []
    for task in folder.read_table(TASKS_FILE).to_pylist():
        position = 0
        for name in found.names(task["task"]):
            first, last = RowFiles.range_of(name)
            if first != position:
                break
            scores = rows.read_table(name, ["score"])["score"]
            columns = {name: [task[name]] * len(scores) for name in ("task", "label")}
            columns |= {"order": list(range(first, last)), "score": scores.to_pylist()}
            columns["is_fit"] = [(task["unreachable_fraction"] or 0.0) <= MAX_UNREACHABLE_FRACTION] * len(scores)
            parts.append(pa.table(columns, schema=SCHEMA))
            position = last
    if not parts:
        raise SystemExit(f"{run}: no rows of any task; give the folder of a score run")
    return pa.concat_tables(parts)


def read_tasks(table: pa.Table) -> list[TaskScores]:
    tasks: dict[tuple[str, str, bool], list[float]] = {}
    for row in table.sort_by([("task", "ascending"), ("order", "ascending")]).to_pylist():
        score = row["score"]
        about = row["task"], row["label"], row["is_fit"]
        tasks.setdefault(about, []).append(np.nan if score is None else score)
    return [TaskScores(name, label, np.array(scores), is_fit) for (name, label, is_fit), scores in tasks.items()]


def synthetic_tasks(num_tasks: int, chance: np.random.Generator) -> list[TaskScores]:
    """Task means from Beta(1, 2); exact match 0 or 1, generation Beta-distributed around the mean."""
    tasks = []
    for number, mean in enumerate(chance.beta(1, 2, num_tasks)):
        label = GENERATION if number % 3 == 0 else EXACT_MATCH
        spread = chance.beta(3 * mean, 3 * (1 - mean), FULL_INSTANCES)
        scores = spread if label == GENERATION else (chance.random(FULL_INSTANCES) < mean).astype(float)
        tasks.append(TaskScores(f"synthetic_{number:03d}", label, scores))
    return tasks


def selected_sizes(chance: np.random.Generator) -> tuple[list[tuple[str, str, int]], int]:
    """([(name, label, instances) of the 462 tasks], how many of these sizes are read from files)."""
    names = (NI_DATA / "selected_tasks.txt").read_text(encoding="utf-8").split()
    labels: dict[str, str] = {}
    for file in ("task_labels_by_name.csv", "task_labels.csv"):  # the second is from the files themselves
        with (NI_DATA / file).open(encoding="utf-8", newline="") as source:
            labels |= {row["name"]: row["label"] for row in csv.DictReader(source)}
    files = reader.find_task_files(NI_DATA / "natural-instructions-subset.tar.gz")
    wanted = [file for file in files if file.name in set(names)]
    sizes = {
        file.name: len(task.instances) for file, task in reader.read_tasks(wanted) if not isinstance(task, Exception)
    }
    known = [(labels[name], size) for name, size in sorted(sizes.items())]
    tasks = []
    for name in names:
        label = labels.get(name) or str(chance.choice([one for one, _ in known]))
        size = sizes.get(name) or int(chance.choice([size for one, size in known if one == label]))
        tasks.append((name, label, size))
    return tasks, len(sizes)


def planned(task: TaskScores) -> PlannedTask:
    nothing: dict[str, Any] = {"definition": "", "categories": (), "sources": (), "licenses": ()}
    size = len(task.scores)
    nothing["unreachable_fraction"] = 0.0 if task.is_fit else 1.0
    return PlannedTask(task.name, "", None, "", Label(task.label, ""), size, size, 4, 8, {}, **nothing)


@dataclass
class Replay:
    """What the adaptive pass scored: `tasks` with the rows it took, and what its decisions cost, in CPU seconds."""

    tasks: list[TaskScores]
    num_decisions: int = 0
    decision_seconds: float = 0.0
    longest_decision_seconds: float = 0.0

    @property
    def num_rows(self) -> int:
        return sum(len(task.scores) for task in self.tasks)


def replay(tasks: list[TaskScores], asked: AdaptiveSettings) -> Replay:
    """Let the scheduler score the tasks; shards finish in the order in which they were given out."""
    by_name, taken = {task.name: task for task in tasks}, dict.fromkeys((task.name for task in tasks), 0)
    result = Replay([])

    def clocked(call: Any, *arguments: Any) -> Any:
        start = time.thread_time()
        answer = call(*arguments)
        seconds = time.thread_time() - start
        result.decision_seconds += seconds
        result.longest_decision_seconds = max(result.longest_decision_seconds, seconds)
        return answer

    schedule = clocked(AdaptiveSchedule, [planned(task) for task in tasks], asked, SHARD_ROWS, RowFiles(()), {})
    running: list[Shard] = []
    while not schedule.finished or running:
        while len(running) < IN_FLIGHT and (shard := clocked(schedule.next)):
            running.append(shard)
        shard = running.pop(0)
        scores = by_name[shard.task].scores[shard.first : shard.last]
        tally = Tally.of(scores[~np.isnan(scores)].tolist(), shard.label, asked.failed_below)
        errors = int(np.isnan(scores).sum())
        file = WrittenFile(shard.name, shard.task, shard.num_rows, errors, FileRecord("", 0), tally)
        clocked(schedule.record, file)
        taken[shard.task] = max(taken[shard.task], shard.last)
    result.num_decisions = len(schedule.decided())
    result.tasks = [replace(task, scores=task.scores[: taken[task.name]]) for task in tasks]
    return result


def failed_rows(task: TaskScores, asked: AdaptiveSettings) -> np.ndarray:
    """bool (instances,): the rows that the model failed, as `Tally.of` counts them."""
    return task.scores == 0 if task.label == EXACT_MATCH else task.scores < asked.failed_below


def fewest_prompts(full: list[TaskScores], counts: Mapping[str, int], asked: AdaptiveSettings) -> int:
    """Rows up to the last failed one of each task's share, at least the first look; all rows where too few failed."""
    total = 0
    for task in full:
        wanted = math.ceil(counts.get(task.name, 0) * asked.failed_rows_factor)
        places = np.flatnonzero(failed_rows(task, asked))[:wanted]
        needed = len(task.scores) if len(places) < wanted else places[-1] + 1 if wanted else 0
        total += min(len(task.scores), max(asked.first_instances, int(needed)))
    return total


def allocation(tasks: list[TaskScores], budgets: Mapping[str, int], asked: AdaptiveSettings) -> dict[str, Any]:
    """What the mix gives each task from these scores: counts, the budget's filled part, the failed rows' part of it."""
    counts: dict[str, int] = {}
    for label, budget in budgets.items():
        usable = [(task, task.scores[~np.isnan(task.scores)]) for task in tasks if task.label == label]
        demands = [
            TaskDemand(task.name, len(scores), min(1.0, float(scores.mean())), None if task.is_fit else 0)
            for task, scores in usable
            if len(scores)
        ]
        counts |= allocate(budget, demands, asked.gamma).counts
    total = max(1, sum(counts.values()))
    failed = sum(min(counts.get(task.name, 0), int(failed_rows(task, asked).sum())) for task in tasks)
    return {
        "counts": counts,
        "shares": {name: count / total for name, count in counts.items()},
        "filled": total / max(1, sum(budgets.values())),
        "failed_fraction": failed / total,
    }


def compare(full: list[TaskScores], asked: AdaptiveSettings) -> dict[str, Any]:
    """The adaptive pass over the full one's scores: figures (a) to (d)."""
    budgets = {EXACT_MATCH: asked.exact_match_budget, GENERATION: asked.generation_budget}
    result = replay(full, asked)
    errors = [
        abs(float(np.nanmean(part.scores)) - float(np.nanmean(task.scores)))
        for part, task in zip(result.tasks, full, strict=True)
        if np.isfinite(part.scores).any()
    ]
    ours, theirs = (allocation(tasks, budgets, asked) for tasks in (result.tasks, full))
    return {
        "prompts": result.num_rows,
        "full_prompts": sum(len(task.scores) for task in full),
        "floor": fewest_prompts(full, theirs["counts"], asked),
        "within_margin": sum(error <= asked.score_margin for error in errors) / len(errors),
        "largest_error": max(errors),
        "total_variation": sum(abs(ours["shares"].get(name, 0.0) - share) for name, share in theirs["shares"].items())
        / 2,
        "filled": ours["filled"],
        "full_filled": theirs["filled"],
        "failed_fraction": ours["failed_fraction"],
        "full_failed_fraction": theirs["failed_fraction"],
        "decisions": result.num_decisions,
        "decision_seconds": result.decision_seconds,
        "longest_decision_seconds": result.longest_decision_seconds,
    }


def orders(tasks: list[TaskScores], count: int) -> Iterator[list[TaskScores]]:
    """The tasks in the run's order, then with their rows shuffled."""
    yield tasks
    for seed in range(1, count):
        chance = np.random.default_rng(seed)
        yield [task.shuffled(chance) for task in tasks]


def scaled(margin: float, factor: float, rows: Mapping[str, int], rows_of_462: Mapping[str, int]) -> AdaptiveSettings:
    """Budgets that are the same share of `rows` as the mix's are of the 462 tasks' rows, by label."""
    exact, generation = (round(BUDGET * rows[label] / rows_of_462[label]) for label in (EXACT_MATCH, GENERATION))
    budgets = {"exact_match_budget": exact, "generation_budget": generation}
    return AdaptiveSettings(score_margin=margin, failed_rows_factor=factor, **budgets)


def rows_by_label(tasks: list[TaskScores]) -> dict[str, int]:
    return {
        label: sum(len(task.scores) for task in tasks if task.label == label) for label in (EXACT_MATCH, GENERATION)
    }


def measure(
    name: str, tasks: list[TaskScores], settings: list[tuple[float, float]], num_orders: int, of_462: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Replays with each (margin, factor), printed: the run's order beside the mean of all orders."""
    sizes = [len(task.scores) for task in tasks]
    print(f"\n{name}: {len(tasks)} tasks, {min(sizes):,} to {max(sizes):,} instances each, {sum(sizes):,} in all")
    print(
        f"{'margin':>6} {'factor':>6} {'order':>12} {'prompts':>8} {'fewer':>7} {'floor':>8} {'within':>7} {'TV':>6} "
        f"{'filled':>14} {'failed':>14}"
    )
    figures = []
    for margin, factor in settings:
        asked = scaled(margin, factor, rows_by_label(tasks), of_462)
        runs = [compare(order, asked) for order in orders(tasks, num_orders)]
        means = {key: statistics.fmean(run[key] for run in runs) for key in runs[0]}
        for order, one in (("the run's", runs[0]), (f"mean of {num_orders}", means))[:num_orders]:
            fewer, floor = (one["full_prompts"] / one[key] for key in ("prompts", "floor"))
            print(
                f"{margin:6g} {factor:6g} {order:>12} {one['prompts']:8,.0f} {fewer:6.2f}x {floor:7.2f}x "
                f"{one['within_margin']:7.1%} {one['total_variation']:6.1%} "
                f"{one['filled']:6.1%} ({one['full_filled']:.0%}) "
                f"{one['failed_fraction']:6.1%} ({one['full_failed_fraction']:.0%})"
            )
        budgets = {"exact_match": asked.exact_match_budget, "generation": asked.generation_budget}
        about = {"tasks": name, "margin": margin, "factor": factor, "budgets": budgets}
        figures.append({**about, "order_0": runs[0], "mean": means})
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scores", type=Path, help="a folder of `birbal score`; with --data they are written there")
    parser.add_argument("--data", type=Path, help="Parquet of (task, label, order, score)")
    parser.add_argument("--synthetic", action="store_true", help="made-up scores of 24 tasks of 1,000 instances")
    parser.add_argument("--margins", type=float, nargs="+", default=[0.03, 0.05, 0.1])
    parser.add_argument("--factors", type=float, nargs="+", default=[1.0, 0.5], help="of failed rows wanted")
    parser.add_argument("--orders", type=int, default=20, help="the run's order and so many less one shuffled ones")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    chance = np.random.default_rng(0)
    if arguments.scores:
        table = extract(arguments.scores)
        if arguments.data:
            pq.write_table(table, arguments.data, compression="zstd")
            print(f"{arguments.data}: {table.num_rows:,} rows, {arguments.data.stat().st_size:,} bytes")
        tasks = read_tasks(table)
    elif arguments.data:
        tasks = read_tasks(pq.read_table(arguments.data))
    elif arguments.synthetic:
        tasks = synthetic_tasks(24, chance)
    else:
        parser.error("give --scores RUN, --data FILE or --synthetic")
    selected, num_read = selected_sizes(chance)
    of_462 = {label: sum(size for _, one, size in selected if one == label) for label in (EXACT_MATCH, GENERATION)}
    print(
        f"462 tasks: {sum(of_462.values()):,} instances, {of_462[EXACT_MATCH]:,} of them exact match; "
        f"{num_read} tasks' sizes are known, the others drawn from them"
    )
    settings = [(margin, factor) for factor in arguments.factors for margin in arguments.margins]
    figures = measure("scores at hand", tasks, settings, arguments.orders, of_462)
    if min(len(task.scores) for task in tasks) < FULL_INSTANCES:
        resampled = [task.drawn(task.name, FULL_INSTANCES, chance) for task in tasks]
        name = f"the same tasks, resampled to {FULL_INSTANCES:,} instances"
        figures += measure(name, resampled, settings, arguments.orders, of_462)
    sources = {label: [task for task in tasks if task.label == label] for label in (EXACT_MATCH, GENERATION)}
    drawn = [
        sources[label][int(chance.integers(len(sources[label])))].drawn(name, size, chance)
        for name, label, size in selected
    ]
    large = measure("462 tasks, scores drawn from these", drawn, settings, 1, of_462)
    for one in (entry["order_0"] for entry in large):
        hours, full = (prompts / PROMPTS_PER_SECOND / 3600 for prompts in (one["prompts"], one["full_prompts"]))
        print(
            f"{hours:.2f} h instead of {full:.2f} h at {PROMPTS_PER_SECOND} prompts/s; {one['decisions']:,} decisions "
            f"took {one['decision_seconds']:.2f} s of CPU, the longest call {one['longest_decision_seconds']:.2f} s: "
            f"{one['prompts'] / one['decision_seconds']:,.0f} rows/s"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(figures + large, indent=1) + "\n")


if __name__ == "__main__":
    main()
