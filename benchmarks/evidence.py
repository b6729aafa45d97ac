"""Does choosing data by what the model gets wrong help? Eight mixes, equal training tokens, fresh paired seeds.

    python benchmarks/evidence.py --tasks natural-instructions-subset.tar.gz --work runs/evidence
    python benchmarks/evidence.py --work runs/evidence --only report --json docs/evidence.json --plot docs/evidence.png

Five stages, each of which goes on where it stopped: choose (tasks by a fixed rule), score (`birbal score`), tune
(`birbal tune --config evidence`: one short fine-tune a cell), judge (`birbal evaluate`: task scores through vLLM, a
seed at a time), report (tables from whatever cells have finished). On two CPU cores with SmolLM2-135M: 20 minutes of
scoring, 41 cells of 6 to 9 minutes, two at a time, and 8 to 16 minutes of judging a seed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from birbal_ray.evaluate.config import EvaluateConfig
from birbal_ray.evaluate.run import EVALUATION_FILE, evaluate
from birbal_ray.mix.config import MixConfig
from birbal_ray.mix.run import mix
from birbal_ray.ni import metrics, prompt, reader
from birbal_ray.ni.prompt import render_prompt
from birbal_ray.ni.schema import Task, TaskError, order_instances
from birbal_ray.score.config import ScoreConfig
from birbal_ray.score.run import score
from birbal_ray.settings import load_config
from birbal_ray.statistics import holm, outcome, paired_difference
from birbal_ray.storage import input_folder, open_folder
from birbal_ray.tune.config import TuneConfig
from birbal_ray.tune.records import ADAPTER_FOLDER, read_results, trial_file
from birbal_ray.tune.run import tune
from birbal_ray.tune.scheduler import BASE_MODEL, FINISHED, REPEAT, TrialResult

CONFIG = Path(__file__).resolve().parents[1] / "configs/tune/evidence.yaml"
STAGES = ("choose", "score", "tune", "judge", "report")
LABELS = ("exact_match", "generation")
NUM_SCORED, NUM_HELD_OUT = 12, 4  # tasks of each label
MIN_INSTANCES, MAX_PROMPT_CHARACTERS, MAX_ANSWER_CHARACTERS = 1000, 1500, 120  # what two cores can score
ROWS_PER_TASK = 200
HELD_OUT_ROWS = 12  # of a held-out task, for its loss
PRIMARY_MEASURE = "loss, held-out instances"
JUDGED_ROWS = 8  # of every task, for its task score


def choose_tasks(tasks: str) -> dict[str, list[str]]:
    """ "scored" and "held_out" task names: English, short, over 1,000 instances, the first by a hash of the name."""
    overrides = metrics.default_overrides()
    found: dict[str, list[str]] = {label: [] for label in LABELS}
    for _, task in reader.read_tasks(reader.find_task_files(input_folder(tasks))):
        if isinstance(task, TaskError) or not {*task.input_languages, *task.output_languages} <= {"English"}:
            continue
        usable = [one for one in task.instances if one.error is None]
        if len(usable) < MIN_INSTANCES:
            continue
        shared = len(prompt.render_prefix(task.definition, prompt.examples_of(task)))
        longest = [sorted(map(len, texts))[len(usable) * 95 // 100] for texts in _texts_of(usable)]
        if shared + longest[0] <= MAX_PROMPT_CHARACTERS and longest[1] <= MAX_ANSWER_CHARACTERS:
            found[metrics.label_task(task, overrides).value].append(task.name)
    chosen = {}
    for label, names in found.items():
        names.sort(key=lambda name: hashlib.sha256(name.encode()).hexdigest())
        chosen[label] = names[: NUM_SCORED + NUM_HELD_OUT]
        if len(chosen[label]) < NUM_SCORED + NUM_HELD_OUT:
            raise SystemExit(f"{tasks}: {len(names)} short {label} tasks; {NUM_SCORED + NUM_HELD_OUT} are needed")
    return {
        "scored": sorted(name for names in chosen.values() for name in names[:NUM_SCORED]),
        "held_out": sorted(name for names in chosen.values() for name in names[NUM_SCORED:]),
    }


def _texts_of(instances: Any) -> tuple[list[str], list[str]]:
    return [one.input for one in instances], [one.references[0] for one in instances]


def write_held_out(tasks: str, names: list[str], folder: Path) -> list[str]:
    """One Parquet of question and answer for each held-out task; their paths, by name."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [file for file in reader.find_task_files(input_folder(tasks)) if file.name in names]
    for _, task in reader.read_tasks(files):
        assert isinstance(task, Task)
        rows = [one for one in order_instances(task, 0) if one.error is None][:HELD_OUT_ROWS]
        table = {
            "question": [render_prompt(task.definition, (), one.input, preamble=False) for one in rows],
            "answer": [one.references[0] for one in rows],
        }
        pq.write_table(pa.table(table), folder / f"{task.name}.parquet")
    return [str(folder / f"{name}.parquet") for name in names]


def score_config(tasks: str, names: list[str], work: Path) -> ScoreConfig:
    """200 rows of each task, four shots, on whatever this machine has."""
    flags: dict[str, Any] = {"tasks.path": tasks, "tasks.select": names, "tasks.instances_per_task": ROWS_PER_TASK}
    flags |= {"completion.max_completion_tokens": 48, "shard_rows": 50, "output": str(work / "score")}
    return load_config(ScoreConfig, None, [], flags)


def tune_config(work: Path, files: list[str], seeds: int | None) -> TuneConfig:
    """configs/tune/evidence.yaml with this run's folders; held-out tasks are judged and weigh nothing."""
    flags: dict[str, Any] = {"scores": str(work / "score"), "output": str(work / "tune"), "validation.files": files}
    flags["validation.weights"] = {f"file:{Path(file).stem}": 0.0 for file in files}
    if seeds:
        flags["repeats.seeds"] = seeds
    return load_config(TuneConfig, CONFIG, [], flags)


def judge(tasks: str, names: list[str], config: TuneConfig, work: Path, only_seed: int | None) -> None:
    """Task scores of each seed whose cells have all finished, once; instances that a mix may hold are left out."""
    # Of a task that this mix samples, evaluation skips every candidate. `proportional` samples them all; task_score
    # leaves out a task whose metric can't reach 1, which other mixes train on.
    values = {**config.mix.model_dump(), "policy": "proportional", "scores": config.scores, "output": str(work / "mix")}
    mix(MixConfig.model_validate(values))
    results, _ = read_results(open_folder(str(work / "tune")))
    for seed, cells in finished_cells(results).items():
        if only_seed not in (None, seed) or cells.keys() != {*config.baselines, *config.mixes}:
            continue
        adapters = [
            f"{name}={work / 'tune' / trial_file(cell.spec, ADAPTER_FOLDER)}" for name, cell in sorted(cells.items())
        ]
        flags: dict[str, Any] = {"tasks.path": tasks, "tasks.select": names, "tasks.instances_per_task": JUDGED_ROWS}
        if only_seed is not None:
            flags["resources.threads_per_replica"] = 1
        flags |= {"adapters": adapters, "mix": values["output"], "prompt_formats": ["zero_shot"]}
        flags |= {"completion.max_completion_tokens": 48, "engine.max_model_len": 1024}
        evaluate(load_config(EvaluateConfig, None, [], {**flags, "output": str(work / "judge" / f"seed{seed}")}))


def finished_cells(results: list[TrialResult]) -> dict[int, dict[str, TrialResult]]:
    """Seed → mix → its cell."""
    seeds: dict[int, dict[str, TrialResult]] = {}
    for one in results:
        if one.spec.kind == REPEAT and one.status == FINISHED:
            seeds.setdefault(one.spec.seed, {})[one.spec.name] = one
    return dict(sorted(seeds.items()))


Measures = dict[str, dict[str, dict[int, dict[str, float]]]]  # measure → mix → seed → task → value, higher is better


def read_measures(work: Path) -> tuple[Measures, dict[str, dict[str, float]]]:
    """What is judged: minus the loss, and the task score; and the base model's, measure → task → value."""
    results, _ = read_results(open_folder(str(work / "tune")))
    seeds = finished_cells(results)
    measures: Measures = {}
    base: dict[str, dict[str, float]] = {}

    def put(measure: str, name: str, seed: int, task: str, value: float) -> None:
        if name == BASE_MODEL:
            base.setdefault(measure, {})[task] = value
        else:
            measures.setdefault(measure, {}).setdefault(name, {}).setdefault(seed, {})[task] = value

    untrained = [one for one in results if one.spec.name == BASE_MODEL]
    for seed, cells in [*seeds.items(), *((0, {BASE_MODEL: one}) for one in untrained)]:
        for name, cell in cells.items():
            for task, loss in cell.tasks.items():
                held_out = task.startswith("file:")
                put(f"loss, held-out {'tasks' if held_out else 'instances'}", name, seed, task, -loss)
    for seed in seeds:
        folder = open_folder(str(work / "judge" / f"seed{seed}"))
        if not folder.is_file("manifest.json"):
            continue
        for row in folder.read_table(EVALUATION_FILE).to_pylist():
            kind = "tasks" if row["held_out"] == "task" else "instances"
            name = BASE_MODEL if row["kind"] == "base" else row["model"]
            put(f"task score, held-out {kind}", name, seed, row["task"], row["task_score"])
    return measures, base


def compare_measure(by_mix: Mapping[str, Mapping[int, Mapping[str, float]]], against: str) -> list[dict[str, Any]]:
    """Every mix against one of them, over tasks (the claim) and over seeds (the repeatability), best mean first.

    Over tasks: each task's difference, a mean over seeds. Over seeds: each seed's difference, a mean over tasks.
    """
    baseline = by_mix[against]
    rows = []
    for name, cells in by_mix.items():
        seeds = sorted(cells.keys() & baseline.keys())
        if not seeds:
            continue
        means = {"mix": name, "mean": fmean(fmean(cells[seed].values()) for seed in seeds), "num_seeds": len(seeds)}
        if name == against:
            rows.append(means)
            continue
        tasks = sorted(set.intersection(*(set(cells[seed]) & set(baseline[seed]) for seed in seeds)))
        # (num_seeds, num_tasks)
        table = np.array([[cells[seed][task] - baseline[seed][task] for task in tasks] for seed in seeds])
        over_tasks, over_seeds = paired_difference(table.mean(axis=0)), paired_difference(table.mean(axis=1))
        rows.append(
            means
            | {"over_tasks": asdict(over_tasks), "over_seeds": asdict(over_seeds)}
            | {"better_tasks": int((table.mean(axis=0) > 0).sum())}
        )
    return sorted(rows, key=lambda row: -row["mean"])


def adjust(found: Mapping[str, list[dict[str, Any]]], primary: str) -> None:
    """Mark the one comparison named beforehand, `primary` by PRIMARY_MEASURE; Holm over all others of all measures.

    Every row gets its adjusted p-value and the verdict that this allows.
    """
    compared = [(measure, row) for measure, rows in found.items() for row in rows if "over_tasks" in row]
    for measure, row in compared:
        row["is_primary"] = (measure, row["mix"]) == (PRIMARY_MEASURE, primary)
    others = iter(holm([row["over_tasks"]["p_value"] for _, row in compared if not row["is_primary"]]))
    for _, row in compared:
        tasks = row["over_tasks"]
        row["p_adjusted"] = tasks["p_value"] if row["is_primary"] else next(others)
        row["outcome"] = outcome(tasks["low"], tasks["high"], tasks["num_pairs"], row["p_adjusted"])


def report(config: TuneConfig, work: Path, json_file: Path | None, plot_file: Path | None) -> None:
    """Print tables; write JSON and a plot."""
    primary = (next(iter(config.mixes)), config.repeats.primary or config.baselines[0])
    measures, base = read_measures(work)
    if primary[1] not in measures.get(PRIMARY_MEASURE, {}):
        raise SystemExit(f"{work}: no cell of {primary[1]} has finished yet; run the stage tune")
    found = {measure: compare_measure(by_mix, primary[1]) for measure, by_mix in measures.items()}
    adjust(found, primary[0])
    for measure, rows in found.items():
        untrained = fmean(base[measure].values()) if measure in base else math.nan
        print(f"\n{measure} (base model {untrained:+.4f}; higher is better)\n")
        print(f"| mix | seeds | mean | less {primary[1]}, over tasks | p | over seeds | tasks better | detectable |")
        print("|---|---|---|---|---|---|---|---|")
        for row in rows:
            if "over_tasks" not in row:
                print(f"| {row['mix']} | {row['num_seeds']} | {row['mean']:+.4f} | | | | | |")
                continue
            name = f"{row['mix']}{' (primary)' * row['is_primary']}"
            print(f"| {name} | {row['num_seeds']} | {row['mean']:+.4f} | {' | '.join(_cells(row))}")
    others = [row["mix"] for row in found[PRIMARY_MEASURE] if row["mix"] != primary[1]]
    cells = finished_cells(read_results(open_folder(str(work / "tune")))[0])
    counts = count_rows(config, work, cells)
    scores = pq.read_table(work / "score" / "task_scores.parquet", columns=["task", "task_score"]).to_pydict()
    task_scores = dict(zip(scores["task"], scores["task_score"], strict=True))
    explained = {name: explain(cells, counts, task_scores, name, primary[1]) for name in others}
    for name, one in explained.items():
        print(
            f"\n{name} against {primary[1]}, by task: loss difference and rows; correlation {one['correlation']:.2f}\n"
        )
        print(f"| task | task score | rows | rows under {primary[1]} | better by |")
        print("|---|---|---|---|---|")
        for row in one["tasks"]:
            figures = f"{row['num_rows']:.1f} | {row['num_rows_baseline']:.1f} | {row['difference']:+.3f}"
            print(f"| {row['task']} | {row['task_score']:.3f} | {figures} |")
    if json_file:
        content = {
            "primary": [*primary, PRIMARY_MEASURE],
            "settings": config.model_dump(mode="json"),
            "comparisons": found,
        }
        content |= {"base": base, "measures": measures, "by_task": explained}
        for path in (str(work), str(work.resolve())):  # no paths of this machine
            content = json.loads(json.dumps(content).replace(path, "WORK"))
        json_file.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    if plot_file:
        draw(found, primary[1], plot_file)


def _cells(row: Mapping[str, Any]) -> list[str]:
    tasks, seeds = row["over_tasks"], row["over_seeds"]
    spread = (
        f"{seeds['mean']:+.4f} [{seeds['low']:+.4f}, {seeds['high']:+.4f}]" if seeds["num_pairs"] > 1 else "one seed"
    )
    return [
        f"{tasks['mean']:+.4f} [{tasks['low']:+.4f}, {tasks['high']:+.4f}] {row['outcome']}",
        f"{row['p_adjusted']:.3f}",
        spread,
        f"{row['better_tasks']} of {tasks['num_pairs']}",
        f"{tasks['detectable']:.4f} |",
    ]


def count_rows(
    config: TuneConfig, work: Path, cells: Mapping[int, Mapping[str, TrialResult]]
) -> dict[str, Counter[str]]:
    """Key of a cell → rows of each task in its mix, which is made again from the settings that the cell kept."""
    counts: dict[str, Counter[str]] = {}
    for cell in (cell for by_mix in cells.values() for cell in by_mix.values()):
        output = str(work / "mixes" / cell.spec.key)
        mix(MixConfig.model_validate({**cell.spec.mix, "scores": config.scores, "output": output}))
        table = open_folder(output).read_table("train.parquet", columns=["task"])
        counts[cell.spec.key] = Counter(table["task"].to_pylist())
    return counts


def explain(
    cells: Mapping[int, Mapping[str, TrialResult]],
    counts: Mapping[str, Mapping[str, int]],
    task_scores: Mapping[str, float],
    name: str,
    baseline: str,
) -> dict[str, Any]:
    """Where a mix wins and loses: task → task score, rows of it in both mixes, loss difference; means over seeds.

    `correlation`: of a task's loss difference with the difference of the logarithms of its rows + 1, over tasks and
    seeds that both mixes have.
    """
    tasks = list(task_scores)
    pairs = [(by_mix[name], by_mix[baseline]) for by_mix in cells.values() if {name, baseline} <= by_mix.keys()]
    # (seeds, tasks), (seeds, tasks, 2)
    difference = np.array([[other.tasks[task] - mine.tasks[task] for task in tasks] for mine, other in pairs])
    num_rows = np.array([[[counts[one.spec.key][task] for one in pair] for task in tasks] for pair in pairs])
    logs = np.log1p(num_rows)
    correlation = np.corrcoef(difference.ravel(), (logs[..., 0] - logs[..., 1]).ravel())[0, 1]
    table = [
        {"task": task, "task_score": task_scores[task], "num_rows": float(num_rows[:, i, 0].mean())}
        | {"num_rows_baseline": float(num_rows[:, i, 1].mean()), "difference": float(difference[:, i].mean())}
        for i, task in enumerate(tasks)
    ]
    return {"correlation": float(correlation), "tasks": sorted(table, key=lambda row: row["difference"])}


def draw(found: Mapping[str, list[dict[str, Any]]], baseline: str, file: Path) -> None:
    """A panel per measure: each mix's difference from the baseline, with its 95 % interval over tasks."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    height = math.ceil(len(found) / 2)  # in panels, two side by side
    figure, axes = plt.subplots(height, 2, figsize=(9, 3 * height), sharey=True, squeeze=False)
    order = sorted({row["mix"] for rows in found.values() for row in rows if "over_tasks" in row})
    for axis, (measure, rows) in zip(axes.flat, sorted(found.items()), strict=False):
        by_mix = {row["mix"]: row["over_tasks"] for row in rows if "over_tasks" in row}
        for place, name in enumerate(order):
            if not (one := by_mix.get(name)):
                continue
            axis.plot([one["low"], one["high"]], [place, place], color="tab:blue")
            axis.plot(one["mean"], place, "o", color="tab:blue")
        axis.axvline(0, color="gray", linewidth=0.8)
        axis.set_yticks(range(len(order)), order)
        axis.locator_params(axis="x", nbins=6)
        axis.set_title(measure, fontsize=9)
        axis.set_xlabel(f"better than {baseline} →", fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=150)


def main() -> None:
    """Run the stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", help="folder or archive of task files")
    parser.add_argument("--work", type=Path, required=True, help="folder of the run; the same command goes on there")
    parser.add_argument("--only", choices=STAGES, help="one stage, whose earlier ones are done")
    parser.add_argument("--seeds", type=int, help="instead of the configuration's")
    parser.add_argument("--seed", type=int, help="judge this one alone, on one core, beside others")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    stages = (options.only,) if options.only else STAGES
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    chosen_file, held_out = work / "tasks.json", work / "held_out"
    if "choose" in stages or not chosen_file.exists():
        chosen_file.write_text(json.dumps({"tasks": options.tasks, **choose_tasks(options.tasks)}, indent=1))
    chosen = json.loads(chosen_file.read_text())
    files = write_held_out(chosen["tasks"], chosen["held_out"], held_out)
    config = tune_config(work, files, options.seeds)
    if "score" in stages:
        score(score_config(chosen["tasks"], chosen["scored"], work))
    if "tune" in stages:
        tune(config)
    if "judge" in stages:
        judge(chosen["tasks"], [*chosen["scored"], *chosen["held_out"]], config, work, options.seed)
    if "report" in stages:
        report(config, work, options.json, options.plot)


if __name__ == "__main__":
    main()
