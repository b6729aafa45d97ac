"""What the report says, as plain values read from the steps' files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from birbal_ray.mix.rows import DESCRIPTIONS, MIX_TASKS, Reason
from birbal_ray.mix.scores import read_table
from birbal_ray.mix.write import AUDIT_FILE
from birbal_ray.mix.write import TASKS_FILE as MIX_TASKS_FILE
from birbal_ray.report.load import StepFolder
from birbal_ray.run import RunError
from birbal_ray.schemas import COMPARISONS, COMPARISONS_FILE, EVALUATION, EVALUATION_FILE, TASK_SCORES
from birbal_ray.schemas import TASK_SCORES_FILE as SCORES_FILE
from birbal_ray.train.checkpoints import METRICS_FILE, read_metrics

Row = Mapping[str, Any]
LABELS = ("exact_match", "generation")
BASE = "base"


@dataclass(frozen=True, slots=True)
class Scored:
    """`tasks`: TASK_SCORES rows; `labels`: label, num_tasks, mean task score of the tasks that have one."""

    model: str | None
    num_quarantined: int
    rows: Row  # the manifest's counts
    tokens: Row
    tasks: tuple[Row, ...]
    labels: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Mixed:
    """`tasks`: MIX_TASKS rows; `dropped`: reason, meaning, rows, then rows per source under `source:{name}`."""

    policy: str
    settings: Row
    rows: Row
    sources: tuple[str, ...]
    composition: tuple[Row, ...]
    tasks: tuple[Row, ...]
    dropped: tuple[Row, ...]
    licenses: tuple[Row, ...]
    shortfalls: tuple[Row, ...]  # label, budget, allocated, shortfall, num_short_tasks
    contamination: Row


@dataclass(frozen=True, slots=True)
class Trained:
    """`steps` and `evaluations`: lines of metrics.jsonl that have a `loss`, an `eval_loss`."""

    model: str | None
    settings: Row
    packing: Row
    result: Row
    steps: tuple[Row, ...]
    evaluations: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Evaluated:
    """`tasks`: EVALUATION rows; `comparisons`: COMPARISONS rows; `contenders` leave the base model out."""

    model: str | None
    contenders: tuple[str, ...]
    kinds: Mapping[str, str]
    formats: tuple[str, ...]  # zero_shot first
    tasks: tuple[Row, ...]
    comparisons: tuple[Row, ...]
    num_left_out: int | None  # instances that the mix had in its hands

    @property
    def is_held_out(self) -> bool:
        """Whether it is known that the contenders have not seen the instances."""
        return all(row["held_out"] in ("task", "instances") for row in self.tasks)

    def of(self, prompt_format: str) -> dict[str, dict[str, Row]]:
        """task → contender → its EVALUATION row, tasks by name; those that the base model did not get left out."""
        found: dict[str, dict[str, Row]] = {}
        for row in sorted(self.tasks, key=lambda row: row["task"]):
            if row["prompt_format"] == prompt_format:
                found.setdefault(row["task"], {})[row["model"]] = row
        return {task: rows for task, rows in found.items() if BASE in rows}


def scored_of(step: StepFolder) -> Scored:
    """Raises RunError when the task scores can't be read, as its siblings do for their files."""
    manifest = step.manifest
    tasks = tuple(read_table(step.path / SCORES_FILE, TASK_SCORES).to_pylist())
    labels = []
    for label in LABELS:
        values = [row["task_score"] for row in tasks if row["label"] == label and row["task_score"] is not None]
        if values:
            labels.append({"label": label, "num_tasks": len(values), "mean_task_score": sum(values) / len(values)})
    return Scored(
        model=model_name(manifest),
        num_quarantined=len(manifest.get("files", {}).get("quarantined", [])),
        rows=manifest.get("rows", {}),
        tokens=manifest.get("tokens", {}),
        tasks=tasks,
        labels=tuple(labels),
    )


def mixed_of(step: StepFolder) -> Mixed:
    """Reads two columns of the audit; memory grows with their distinct values, not with the rows."""
    manifest = step.manifest
    counts = _count_audit(step.path / AUDIT_FILE)
    composition = tuple(manifest["composition"])
    sources = tuple(dict.fromkeys(row["source"] for row in composition))
    totals: dict[str, int] = {}
    for (_, reason), number in counts.items():
        totals[reason] = totals.get(reason, 0) + number
    dropped = [
        {
            "reason": reason,
            "meaning": DESCRIPTIONS[Reason[reason.upper()]] if reason.upper() in Reason.__members__ else "",
            "rows": total,
            **{f"source:{source}": counts.get((source, reason), 0) for source in sources},
        }
        for reason, total in sorted(totals.items(), key=lambda item: (-item[1], item[0]))
        if reason != Reason.KEPT.word
    ]
    settings = manifest.get("identity", {}).get("settings", {})
    return Mixed(
        policy=settings.get("policy", "unknown"),
        settings=settings,
        rows=manifest["rows"],
        sources=sources,
        composition=composition,
        tasks=tuple(read_table(step.path / MIX_TASKS_FILE, MIX_TASKS).to_pylist()),
        dropped=tuple(dropped),
        licenses=tuple(manifest["licenses"]),
        shortfalls=tuple(
            {"label": label, **entry, "num_short_tasks": len(entry["short_tasks"])}
            for label, entry in manifest["allocation"].items()
            if entry["shortfall"]
        ),
        contamination=manifest["contamination"],
    )


def trained_of(step: StepFolder) -> Trained:
    """Losses from metrics.jsonl, the rest from the manifest."""
    lines = read_metrics(step.path / METRICS_FILE)
    return Trained(
        model=model_name(step.manifest),
        settings=step.manifest["settings"],
        packing=step.manifest["packing"],
        result=step.manifest["result"],
        steps=tuple(line for line in lines if "loss" in line),
        evaluations=tuple(line for line in lines if "eval_loss" in line),
    )


def evaluated_of(step: StepFolder) -> Evaluated:
    """Contenders in the manifest's order, then those only the tables have."""
    tasks = tuple(read_table(step.path / EVALUATION_FILE, EVALUATION).to_pylist())
    kinds = {row["model"]: row["kind"] for row in tasks}
    named = [entry.get("name") for entry in step.manifest.get("models", [])]
    names = dict.fromkeys([*(name for name in named if name in kinds), *kinds])
    return Evaluated(
        model=model_name(step.manifest),
        contenders=tuple(name for name in names if name != BASE),
        kinds=kinds,
        formats=tuple(sorted({row["prompt_format"] for row in tasks}, key=lambda name: (name != "zero_shot", name))),
        tasks=tasks,
        comparisons=tuple(read_table(step.path / COMPARISONS_FILE, COMPARISONS).to_pylist()),
        num_left_out=step.manifest.get("rows", {}).get("left_out"),
    )


def model_name(manifest: Row) -> str | None:
    """The name of the model that a manifest speaks of."""
    model = manifest.get("model")
    return model.get("name") if isinstance(model, Mapping) else model


def _count_audit(file: Path) -> dict[tuple[str, str], int]:
    """(source, reason) → candidates."""
    try:
        table = pq.read_table(file, columns=["source", "reason"], read_dictionary=["source", "reason"])
    except (pa.ArrowInvalid, OSError) as error:
        raise RunError(f"{file}: not a readable audit ({' '.join(str(error).split())})") from None
    counts = table.group_by(["source", "reason"]).aggregate([([], "count_all")]).to_pylist()
    return {(row["source"], row["reason"]): row["count_all"] for row in counts}
