"""What a report shows: the finished steps of a run folder, their manifests and tables as plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from birbal_ray.adapters import ADAPTER_CONFIG, ADAPTER_FOLDER, ADAPTER_WEIGHTS, adapter_fingerprint
from birbal_ray.evaluate.models import ADAPTER, BASE
from birbal_ray.manifest import check_input
from birbal_ray.mix.rows import AUDIT_FILE, MIX_TASKS, Reason
from birbal_ray.progress import CLOCK_FILE, PLAN_FILE
from birbal_ray.run import MANIFEST_FILE, RUN_FILE, RunError
from birbal_ray.schemas import (
    COMPARISONS,
    COMPARISONS_FILE,
    EVALUATION,
    EVALUATION_FILE,
    TASK_SCORES,
    TASK_SCORES_FILE,
    TASKS_FILE,
)
from birbal_ray.settings import ConfigError
from birbal_ray.storage import Folder, input_folder
from birbal_ray.train.checkpoints import read_metrics
from birbal_ray.train.files import METRICS_FILE

Row = Mapping[str, Any]
STEPS = ("score", "mix", "train", "evaluate")  # those with a section of their own, in the order they run
LABELS = ("exact_match", "generation")
# Runs of version 0.1.0 lack them.
NEW_COLUMNS = ("is_primary", "p_value", "p_adjusted", "detectable_difference", "note")


@dataclass(frozen=True, slots=True)
class StepRun:
    """A finished step. `name` is its path below the run folder, `.` when it is the run folder itself."""

    step: str
    name: str
    folder: Folder
    manifest: Row


@dataclass(frozen=True, slots=True)
class Found:
    """The steps of a run folder. `finished`: those of STEPS, in that order; `missing`: step → how far it is.

    `others`: finished runs of other steps, by folder name; there may be several of a step.
    """

    name: str
    finished: Mapping[str, StepRun]
    others: tuple[StepRun, ...]
    missing: Mapping[str, str]


def find_steps(run: Folder) -> Found:
    """Find the steps in the folders of `run` by their manifests; or `run` itself, when it is a step's folder.

    Where several folders hold the same one of STEPS, the one that bears its name counts. Raises
    RunError (no finished step, a damaged manifest), ConfigError (several, none of that name).
    """
    files = run.files()
    if not files and not (run.is_local and run.local.is_dir()):
        raise RunError(f"{run}: no such folder; expected one that holds the outputs of birbal's steps")
    is_step = RUN_FILE in files or MANIFEST_FILE in files
    names = ["."] if is_step else sorted({name.partition("/")[0] for name in files if "/" in name})
    found: dict[str, list[StepRun]] = {}
    started = set()
    for name in names:
        folder = run if is_step else run.subfolder(name)
        records = []
        for file in (MANIFEST_FILE, RUN_FILE):  # other tools write a manifest.json, too: ours names its step
            content = folder.read_json(file) if (file if is_step else f"{name}/{file}") in files else None
            records.append(content if isinstance(content, dict) and isinstance(content.get("step"), str) else None)
        manifest, record = records
        if manifest is not None:
            found.setdefault(manifest["step"], []).append(StepRun(manifest["step"], name, folder, manifest))
        elif record is not None:
            started.add(record["step"])
    if not found:
        unfinished = f" (started, not finished: {', '.join(sorted(started))})" if started else ""
        raise RunError(
            f"{run}: no finished step in it{unfinished}; expected folders like {', '.join(STEPS)}, each with a "
            f"{MANIFEST_FILE}, as `birbal demo --output {run}` makes them"
        )
    finished: dict[str, StepRun] = {}
    for step in STEPS:
        runs = found.pop(step, [])
        named = [one for one in runs if one.name in (step, ".")] or runs
        if len(runs) > 1 and named == runs:
            several = ", ".join(one.name for one in runs)
            raise ConfigError(
                f"{run}: {len(runs)} finished {step} runs ({several}); call the one to report on {run.at(step)}"
            )
        finished |= {step: named[0]} if named else {}
    return Found(
        name=run.place.rpartition("/")[2] or "run",
        finished=finished,
        others=tuple(one for step in sorted(found) for one in found[step]),
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
    models = models_of(manifests.get("evaluate", {}))
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


def models_of(manifest: Row) -> list[dict[str, Any]]:
    """The models that an evaluation compared; earlier versions called them contenders."""
    return manifest.get("models") or manifest.get("contenders") or []


def read_score(step: StepRun) -> dict[str, Any]:
    """The manifest, `tasks` (TASK_SCORES rows) and `labels` (`label_means` of these)."""
    tasks = _read_rows(step, TASK_SCORES_FILE, TASK_SCORES)
    return {**step.manifest, "tasks": tasks, "labels": label_means(tasks)}


def label_means(tasks: Sequence[Row]) -> list[dict[str, Any]]:
    """Of each label that has scored tasks among these TASK_SCORES rows: label, num_tasks, mean_task_score."""
    found = []
    for label in LABELS:
        values = [row["task_score"] for row in tasks if row["label"] == label and row["task_score"] is not None]
        if values:
            found.append({"label": label, "num_tasks": len(values), "mean_task_score": sum(values) / len(values)})
    return found


def read_mix(step: StepRun) -> dict[str, Any]:
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
    tasks = _read_rows(step, TASKS_FILE, MIX_TASKS)
    return {**step.manifest, "tasks": tasks, "sources": sources, "dropped": dropped}


def read_train(step: StepRun) -> dict[str, Any]:
    """The manifest, `steps` and `evaluations`: lines of metrics.jsonl that have a `loss`, an `eval_loss`."""
    lines = read_metrics(input_folder(step.folder.at(METRICS_FILE)))
    steps, evaluations = ([line for line in lines if name in line] for name in ("loss", "eval_loss"))
    return {**step.manifest, "steps": steps, "evaluations": evaluations}


def read_evaluation(step: StepRun) -> dict[str, Any]:
    """The manifest, `tasks` (EVALUATION rows), `comparisons`, `kinds` (model → kind) and `names` without the base.

    `formats`: prompt format → a row per task that the base model answered, zero-shot first, tasks by name: `task`,
    `label`, `held_out`, and per model `{name}:{EVALUATION column}` and `{name}:difference` from the base model.
    """
    tasks = _read_rows(step, EVALUATION_FILE, EVALUATION)
    kinds = {row["model"]: row["kind"] for row in tasks}
    names = dict.fromkeys([*(one["name"] for one in models_of(step.manifest) if one["name"] in kinds), *kinds])
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
        "comparisons": _read_rows(step, COMPARISONS_FILE, COMPARISONS),
        "kinds": kinds,
        "names": [name for name in names if name != BASE],
        "formats": formats,
    }


def read_times(run: Folder) -> list[dict[str, Any]]:
    """What a pipeline in `run` planned and took, in seconds, a row a step; none where no pipeline ran there.

    `planned` is the middle of `low` to `high` or the time that the budget gave, whichever is less. A step that has not
    started has no `actual`, one that has not ended no `difference`; without a plan there is only `actual`.
    """
    plan, clock = (run.read_json(file) if run.is_file(file) else {} for file in (PLAN_FILE, CLOCK_FILE))
    spent = clock.get("spent_seconds", {})  # a training run's own clock.json has other keys
    planned = {one["step"]: one for one in plan.get("steps", [])}
    rows = []
    for step in planned or spent:
        one, actual = planned.get(step, {}), spent.get(step)
        row = {name: one.get(f"{name}_seconds") for name in ("planned", "low", "high")} | {"actual": actual}
        has_ended = run.is_file(f"{'evaluate' if step == 'report' else step}/{MANIFEST_FILE}")
        known = has_ended and actual is not None and row["planned"] is not None
        row["difference"] = actual - row["planned"] if known else None
        rows.append({"step": step, "work": one.get("work"), **row, "source": one.get("source")})
    return rows


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


def _read_rows(step: StepRun, file: str, schema: pa.Schema) -> list[dict[str, Any]]:
    """A table's rows. Raises RunError when it can't be read or lacks a column."""
    table = _read_table(step, file)
    table = table.rename_columns(["model" if name == "contender" else name for name in table.column_names])
    for name in schema.names:
        if name not in table.column_names and name not in NEW_COLUMNS:
            found = ", ".join(table.column_names)
            raise RunError(f"{step.folder.at(file)}: column {name!r} is missing (found {found})")
    return table.to_pylist()


def _read_table(step: StepRun, file: str, columns: list[str] | None = None) -> pa.Table:
    check_input(step.folder, step.manifest, [file])
    return step.folder.read_table(file, columns)
