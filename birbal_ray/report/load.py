"""What a report shows: a run folder's finished steps, their manifests and tables as plain values, the main result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from birbal_ray.adapters import ADAPTER_CONFIG, ADAPTER_FOLDER, ADAPTER_WEIGHTS, adapter_fingerprint
from birbal_ray.manifest import FORMAT, StepFolder, check_input, command_of, find_steps
from birbal_ray.mix.select import Reason
from birbal_ray.progress import counted, read_times
from birbal_ray.run import MANIFEST_FILE, RunError
from birbal_ray.schemas import (
    ADAPTER,
    AUDIT_FILE,
    BASE,
    COMPARISONS_FILE,
    EVALUATION_FILE,
    TASK_SCORES_FILE,
    TASKS_FILE,
)
from birbal_ray.settings import ConfigError
from birbal_ray.statistics import BETTER, TOO_FEW, WORSE, outcome
from birbal_ray.storage import Folder, input_folder
from birbal_ray.train.files import METRICS_FILE, read_metrics

Row = Mapping[str, Any]
STEPS = ("score", "mix", "train", "evaluate")  # those with a section of their own, in the order they run
LABELS = ("exact_match", "generation")


@dataclass(frozen=True, slots=True)
class Found:
    """The steps of a run folder. `finished`: those of STEPS, in that order; `missing`: step → how far it is.

    `others`: finished runs of other steps, by folder name; there may be several of a step.
    """

    name: str
    finished: Mapping[str, StepFolder]
    others: tuple[StepFolder, ...]
    missing: Mapping[str, str]


def find_finished(run: Folder) -> Found:
    """Find the steps in the folders of `run` by their manifests; or `run` itself, when it is a step's folder.

    One of STEPS counts where its folder bears its name. Raises RunError (only unfinished steps, a damaged record, a run
    of an earlier version), ConfigError (none at all).
    """
    found = sorted(find_steps(run), key=lambda one: one.step)
    ours = [one for one in found if one.step in STEPS and one.name in (one.step, ".")]
    finished = {step: one for step in STEPS for one in ours if one.step == step and one.manifest}
    others = tuple(one for one in found if one.step not in STEPS and one.manifest)
    started = {one.step for one in found if not one.manifest}
    for one in finished.values():
        if one.manifest.get("format") != FORMAT:
            raise RunError(
                f"{one.folder}: another version of birbal_ray made this run, and this one can't report it; "
                f"install that version, or run `{command_of(one.step)}` again with another --output"
            )
    if not finished and not others:
        unfinished = f" (started, not finished: {', '.join(sorted(started))})" if started else ""
        is_there = not run.is_local or run.local.is_dir()
        raise (RunError if started else ConfigError)(
            f"{run}: {'no finished step in it' if is_there else 'no such folder'}{unfinished}; expected folders like "
            f"{', '.join(STEPS)}, each with a {MANIFEST_FILE}, as `birbal demo --output {run}` makes them"
        )
    return Found(
        name=run.place.rpartition("/")[2] or "run",
        finished=finished,
        others=others,
        missing={step: "not finished" if step in started else "not run" for step in STEPS if step not in finished},
    )


def mismatches(found: Found) -> list[str]:
    """What says that two steps here were not made from one another, so that their numbers don't belong together."""
    lines = []
    manifests: dict[str, Any] = {step: one.manifest for step, one in found.finished.items()}
    made_from = {
        ("mix", "score"): ((manifests.get("mix", {}).get("identity") or {}).get("scores") or {}).get("run"),
        ("train", "mix"): (manifests.get("train", {}).get("mix") or {}).get("identity_hash"),
    }
    for (step, before), wanted in made_from.items():
        if wanted and before in manifests and manifests[before].get("identity_hash") != wanted:
            lines.append(
                f"{step} was made from another {before} run than the one in this folder (identity hash "
                f"{str(wanted)[:12]}…): their numbers don't belong together"
            )
    models = manifests.get("evaluate", {}).get("models", [])
    evaluated = {one["name"]: one["fingerprint"] for one in models if one["kind"] == ADAPTER}
    train = found.finished.get("train")
    names = [f"{ADAPTER_FOLDER}/{name}" for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG)]
    if evaluated and train and all(train.folder.is_file(name) for name in names):
        now = adapter_fingerprint(input_folder(train.folder.at(ADAPTER_FOLDER)))
        if now not in evaluated.values():
            asked = " and ".join(f"{name} ({fingerprint[:12]}…)" for name, fingerprint in evaluated.items())
            lines.append(
                f"evaluate asked {asked}, not the adapter that train holds now (fingerprint {now[:12]}…): their "
                "numbers don't belong together"
            )
    return lines


def read_score(step: StepFolder) -> dict[str, Any]:
    """The manifest, `tasks` (TASK_SCORES rows) and `labels` (`label_means` of these)."""
    tasks = _read_table(step, TASK_SCORES_FILE).to_pylist()
    return {**step.manifest, "tasks": tasks, "labels": label_means(tasks)}


def label_means(tasks: Sequence[Row]) -> list[dict[str, Any]]:
    """Of each label that has scored tasks among these TASK_SCORES rows: label, num_tasks, mean_task_score."""
    found = []
    for label in LABELS:
        values = [row["task_score"] for row in tasks if row["label"] == label and row["task_score"] is not None]
        if values:
            found.append({"label": label, "num_tasks": len(values), "mean_task_score": sum(values) / len(values)})
    return found


def read_mix(step: StepFolder) -> dict[str, Any]:
    """The manifest, `tasks` (MIX_TASKS rows), `sources` and `dropped`: reason, meaning, rows, `source:{name}`.

    Reads two columns of the audit; memory grows with their distinct values, not with the rows.
    """
    sources = list(dict.fromkeys(row["source"] for row in step.manifest["composition"]))
    totals: dict[str, int] = {}
    counts: dict[tuple[str, str], int] = {}
    audit = _read_table(step, AUDIT_FILE, ["source", "reason"])
    for row in audit.group_by(["source", "reason"]).aggregate([([], "count_all")]).to_pylist():
        counts[row["source"], row["reason"]] = row["count_all"]
        totals[row["reason"]] = totals.get(row["reason"], 0) + row["count_all"]
    dropped = [
        {
            "reason": reason,
            "meaning": Reason[reason.upper()].text if reason.upper() in Reason.__members__ else "",
            "rows": total,
            **{f"source:{source}": counts.get((source, reason), 0) for source in sources},
        }
        for reason, total in sorted(totals.items(), key=lambda item: (-item[1], item[0]))
        if reason != Reason.KEPT.word
    ]
    tasks = _read_table(step, TASKS_FILE).to_pylist()
    return {**step.manifest, "tasks": tasks, "sources": sources, "dropped": dropped}


def read_train(step: StepFolder) -> dict[str, Any]:
    """The manifest, `steps` and `evaluations`: lines of metrics.jsonl that have a `loss`, an `eval_loss`."""
    lines = read_metrics(input_folder(step.folder.at(METRICS_FILE)))
    steps, evaluations = ([line for line in lines if name in line] for name in ("loss", "eval_loss"))
    return {**step.manifest, "steps": steps, "evaluations": evaluations}


def read_evaluation(step: StepFolder) -> dict[str, Any]:
    """The manifest, `tasks` (EVALUATION rows), `comparisons`, `kinds` (model → kind) and `names` without the base.

    `formats`: prompt format → a row per task that the base model answered, zero-shot first, tasks by name: `task`,
    `label`, `held_out`, and per model `{name}:{EVALUATION column}` and `{name}:difference` from the base model.
    """
    tasks = _read_table(step, EVALUATION_FILE).to_pylist()
    kinds = {row["model"]: row["kind"] for row in tasks}
    names = dict.fromkeys([*(one["name"] for one in step.manifest["models"] if one["name"] in kinds), *kinds])
    formats: dict[str, list[dict[str, Any]]] = {}
    for prompt_format in sorted({row["prompt_format"] for row in tasks}, key=lambda name: (name != "zero_shot", name)):
        by_task: dict[str, dict[str, Row]] = {}
        for row in sorted(tasks, key=lambda row: row["task"]):
            if row["prompt_format"] == prompt_format:
                by_task.setdefault(row["task"], {})[row["model"]] = row
        formats[prompt_format] = [_pivot(task, rows) for task, rows in by_task.items() if BASE in rows]
    return {
        **step.manifest,
        "tasks": tasks,
        "comparisons": _read_table(step, COMPARISONS_FILE).to_pylist(),
        "kinds": kinds,
        "names": [name for name in names if name != BASE],
        "formats": formats,
    }


def compare_times(run: Folder) -> list[dict[str, Any]]:
    """What a pipeline in `run` planned and took, in seconds, a row a step; none where no pipeline ran there.

    `planned` is the middle of `low` to `high` or the time that the budget gave, whichever is less. A step that has not
    started has no `actual`, one that has not ended no `difference`; without a plan there is only `actual`.
    """
    times = read_times(run)
    rows = []
    for step in times.plans or times.spent:
        one, actual = times.plans.get(step, {}), times.spent.get(step)
        row: dict[str, Any] = {name: one.get(f"{name}_seconds") for name in ("planned", "low", "high")} | {
            "actual": actual
        }
        has_ended = run.is_file(f"{'evaluate' if step == 'report' else step}/{MANIFEST_FILE}")
        known = has_ended and actual is not None and row["planned"] is not None
        row["difference"] = actual - row["planned"] if known else None
        rows.append({"step": step, "work": one.get("work"), **row, "source": one.get("source")})
    return rows


@dataclass(frozen=True, slots=True)
class Conclusion:
    """`kind`: better | worse | open (no difference found) | none (nothing was compared)."""

    kind: str
    title: str
    text: str


def conclude(sections: Mapping[str, Mapping[str, Any]]) -> list[Conclusion]:
    """One for each evaluated model: over all tasks, zero-shot where that was run, else the first prompt format.

    `sections`: step → what load's readers give.
    """
    evaluated = sections.get("evaluate", {"names": []})
    found = []
    for name in evaluated["names"]:
        rows = [row for row in evaluated["comparisons"] if (row["model"], row["scope"]) == (name, "all")]
        if rows:
            order = list(evaluated["formats"])
            found.append(conclusion_of(min(rows, key=lambda row: order.index(row["prompt_format"]))))
    if not found:
        nothing = "Nothing to compare: no model but the base model was evaluated"
        title = nothing if "evaluate" in sections else "There is no finished evaluation yet"
        found.append(Conclusion("none", title, "The sections below say what there is."))
    return found


def conclusion_of(row: Row) -> Conclusion:
    """Say what a COMPARISONS row shows: what Holm's p and the interval leave open, and too few tasks, included."""
    name, low, high = row["model"], row["difference_low"], row["difference_high"]
    text = (
        f"{words(row['prompt_format']).capitalize()} over {counted(row['num_tasks'], 'task')}, the mean task score is "
        f"{row['score']:.3f}; the base model's is {row['base_score']:.3f}. Difference {signed(row['difference'])}, "
        f"95 % interval {signed(low)} to {signed(high)}. Better on {row['num_wins']}, worse on {row['num_losses']}, "
        f"the same on {row['num_ties']}."
    )
    kind = outcome(low, high, row["num_tasks"], row["p_adjusted"])
    if kind == TOO_FEW:
        few = "one task" if row["num_tasks"] == 1 else f"{row['num_tasks']} tasks"
        return Conclusion("open", f"{name}: {few} can't tell whether it is better than the base model", text)
    if kind in (BETTER, WORSE):
        sign = 1 if kind == BETTER else -1
        near, far = sorted((sign * low, sign * high))
        bound = f"{near:.3f}" if near >= 0.0005 else "less than 0.001"  # never 0.000: the interval excludes 0
        amount = f"{sign * row['difference']:.3f} ({bound} to {far:.3f})"
        return Conclusion(kind, f"{name} is {kind} than the base model by {amount}", text)
    alone = outcome(low, high, row["num_tasks"]) in (BETTER, WORSE)
    why = "one of several comparisons, p ≥ 0.05 by Holm" if alone else "the interval contains 0"
    return Conclusion("open", f"{name}: no difference from the base model found; {why}", text)


def words(prompt_format: str) -> str:
    """`zero_shot` as `zero-shot`."""
    return prompt_format.replace("_", "-")


def signed(value: float) -> str:
    """Three decimals with a sign, a real minus; 0 has none."""
    return f"{value:+.3f}".replace("-", "\u2212") if value else "0.000"


def model_name(manifest: Row) -> str | None:
    """The name of the model that a manifest is about."""
    return (manifest.get("model") or {}).get("name")


READERS = {"score": read_score, "mix": read_mix, "train": read_train, "evaluate": read_evaluation}


def _pivot(task: str, rows: Mapping[str, Row]) -> dict[str, Any]:
    base = rows[BASE]
    found: dict[str, Any] = {"task": task, "label": base["label"], "held_out": base["held_out"]}
    for name, row in rows.items():
        columns = ("num_instances", "num_errors", "task_score", "task_score_low", "task_score_high")
        found |= {f"{name}:{column}": row[column] for column in columns}
        if name != BASE and None not in (row["task_score"], base["task_score"]):
            found[f"{name}:difference"] = row["task_score"] - base["task_score"]
    return found


def _read_table(step: StepFolder, file: str, columns: list[str] | None = None) -> pa.Table:
    check_input(step.folder, step.manifest, [file])
    return step.folder.read_table(file, columns)
