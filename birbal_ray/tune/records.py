"""Trials on disk: what was to run, how it ended. A trial is finished when its result file is there."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from birbal_ray.storage import Folder
from birbal_ray.tune.scheduler import FINISHED, TrialResult, TrialSpec, mark_diverged

TRIALS_FOLDER, ADAPTER_FOLDER = "trials", "adapter"
SPEC_FILE, RESULT_FILE, MIX_FILE = "trial.json", "result.json", "mix.yaml"
OBJECTIVE, RUNG = "objective", "rung"  # of what a trial reports

# trials.parquet. Objectives: weighted mean over groups of the held-out loss, nats a token.
TRIALS = pa.schema(
    [
        pa.field("trial", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),  # base | baseline | mix | search | predicted | repeat | transfer
        pa.field("mix", pa.string(), nullable=False),  # trials of one mix differ by seed or tokens only
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("status", pa.string(), nullable=False),  # finished | stopped | failed
        pa.field("objective", pa.float64()),
        pa.field("groups", pa.map_(pa.string(), pa.float64()), nullable=False),  # group → loss
        pa.field("tasks", pa.map_(pa.string(), pa.float64()), nullable=False),  # task, source or file → loss
        pa.field("ratios", pa.map_(pa.string(), pa.float64()), nullable=False),
        pa.field("steps", pa.int64(), nullable=False),
        pa.field("tokens", pa.int64(), nullable=False),
        pa.field("rows", pa.int64(), nullable=False),  # of its mix
        pa.field("unfilled_rows", pa.int64(), nullable=False),  # that the mix was to have and the scores did not hold
        pa.field("mix_sha256", pa.string(), nullable=False),  # of train.parquet
        pa.field("seconds", pa.float64(), nullable=False),
        pa.field("node", pa.string(), nullable=False),
        pa.field("error", pa.string(), nullable=False),
    ]
)


def trial_file(spec: TrialSpec, name: str) -> str:
    """A file of a trial, inside the run's folder."""
    return f"{TRIALS_FOLDER}/{spec.key}/{name}"


def write_spec(run: Folder, spec: TrialSpec, scores: str) -> None:
    """Write down what a trial is before it starts; its mix as a file that `birbal mix` takes."""
    if spec.mix:
        run.write_bytes(trial_file(spec, MIX_FILE), mix_yaml(spec.mix, scores, [f"Trial {spec.key}."]).encode())
    run.write_json(trial_file(spec, SPEC_FILE), asdict(spec))


def mix_yaml(mix: dict[str, Any], scores: str, about: Sequence[str]) -> str:
    """Settings of `birbal mix` as YAML, with comments on top."""
    lines = ["birbal mix --config THIS_FILE --output DIR", "", *about]
    head = "".join(f"# {line}".rstrip() + "\n" for line in lines)
    return head + "\n" + yaml.safe_dump({"scores": scores, **mix}, sort_keys=False, allow_unicode=True)


def read_results(run: Folder) -> tuple[list[TrialResult], list[TrialSpec]]:
    """Results of trials that ended, and specs of those that started and did not end."""
    results, started = [], []
    names = run.files(TRIALS_FOLDER)
    for name in sorted(name for name in names if name.endswith(f"/{SPEC_FILE}")):
        result = f"{name.removesuffix(SPEC_FILE)}{RESULT_FILE}"
        if result in names:
            results.append(TrialResult.from_dict(run.read_json(result)))
        else:
            started.append(TrialSpec(**run.read_json(name)))
    return results, started


def write_result(run: Folder, result: TrialResult) -> None:
    """Make a trial finished, or, where its loss is no number, failed for good."""
    run.write_json(trial_file(result.spec, RESULT_FILE), asdict(mark_diverged(result)))


def table_of(results: Sequence[TrialResult]) -> pa.Table:
    """TRIALS rows."""
    rows = [
        {
            **asdict(result),  # also what is no column
            "trial": result.spec.key,
            "kind": result.spec.kind,
            "mix": result.spec.name,
            "seed": result.spec.seed,
            "ratios": result.spec.values,
            "steps": int(result.rungs[-1][0]) if result.rungs else 0,
            "tokens": result.num_tokens,
            "rows": result.num_rows,
            "unfilled_rows": result.num_unfilled,
        }
        for result in results
    ]
    return pa.Table.from_pylist(rows, schema=TRIALS)


class RungReporter:
    """Sends each objective of a trial to Tune as it is measured, and writes the result at the end."""

    def __init__(self, run: Folder, spec: TrialSpec, num_rungs: int) -> None:
        self._run, self._spec, self._num_rungs = run, spec, num_rungs
        self._started = time.monotonic()
        self._rungs: list[list[float]] = []

    def keep(self, adapter: Path) -> None:
        """Copy an adapter's folder beside the result, before the result says that the trial has ended."""
        for file in sorted(adapter.iterdir()):
            self._run.upload(file, trial_file(self._spec, f"{adapter.name}/{file.name}"))

    def report(self, step: int, objective: float, **figures: Any) -> None:
        """One objective after `step` optimizer steps; the last one, with the result's `figures`, ends the trial."""
        import ray
        from ray import tune

        self._rungs.append([step, objective])
        if len(self._rungs) == self._num_rungs:
            seconds, node = time.monotonic() - self._started, ray.get_runtime_context().get_node_id()
            write_result(
                self._run,
                TrialResult(self._spec, FINISHED, objective, self._rungs, seconds=seconds, node=node, **figures),
            )
        tune.report({OBJECTIVE: objective, RUNG: len(self._rungs), "step": step})
