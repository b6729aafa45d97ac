"""Trials on disk: what was asked, how it ended. A trial is finished when its result file is there."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from birbal_ray.run import read_json, write_atomic, write_json
from birbal_ray.tune.scheduler import Job, Record, settled

TRIALS_FOLDER = "trials"
JOB_FILE, RESULT_FILE, MIX_FILE = "trial.json", "result.json", "mix.yaml"

# trials.parquet. Objectives: mean over tasks of the held-out loss, nats a token.
TRIALS = pa.schema(
    [
        pa.field("trial", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),  # base | baseline | search | surrogate | repeat
        pa.field("mix", pa.string(), nullable=False),  # trials of one mix differ by seed only
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("status", pa.string(), nullable=False),  # finished | stopped | failed
        pa.field("objective", pa.float64()),
        pa.field("ratios", pa.map_(pa.string(), pa.float64()), nullable=False),
        pa.field("steps", pa.int64(), nullable=False),
        pa.field("tokens", pa.int64(), nullable=False),
        pa.field("rows", pa.int64(), nullable=False),  # of its mix
        pa.field("mix_sha256", pa.string(), nullable=False),  # of train.parquet
        pa.field("seconds", pa.float64(), nullable=False),
        pa.field("node", pa.string(), nullable=False),
        pa.field("error", pa.string(), nullable=False),
    ]
)


def trial_folder(run: Path, job: Job) -> Path:
    """Where a trial keeps its files."""
    return run / TRIALS_FOLDER / job.key


def remember_job(run: Path, job: Job, scores: str) -> None:
    """Write down what a trial is before it begins; its mix as a file that `birbal mix` takes."""
    folder = trial_folder(run, job)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if job.mix:
        write_atomic(folder / MIX_FILE, mix_yaml(job.mix, scores, [f"Trial {job.key}."]).encode())
    write_json(folder / JOB_FILE, job.to_dict())


def mix_yaml(mix: dict[str, Any], scores: str, about: Sequence[str]) -> str:
    """Settings of `birbal mix` as YAML, with comments on top."""
    lines = ["birbal mix --config THIS_FILE --output DIR", "", *about]
    head = "".join(f"# {line}".rstrip() + "\n" for line in lines)
    return head + "\n" + yaml.safe_dump({"scores": scores, **mix}, sort_keys=False, allow_unicode=True)


def read_records(run: Path) -> tuple[list[Record], list[Job]]:
    """Records of trials that ended, and jobs that began and did not."""
    records, begun = [], []
    for file in sorted((run / TRIALS_FOLDER).glob(f"*/{JOB_FILE}")):
        result = file.parent / RESULT_FILE
        if result.exists():
            records.append(Record.from_dict(read_json(result)))
        else:
            begun.append(Job.from_dict(read_json(file)))
    return records, begun


def write_record(run: Path, record: Record) -> None:
    """Make a trial finished, or, where its loss is no number, failed for good."""
    write_json(trial_folder(run, record.job) / RESULT_FILE, settled(record).to_dict())


def table_of(records: Sequence[Record]) -> pa.Table:
    """TRIALS rows."""
    rows = [
        {
            "trial": record.job.key,
            "kind": record.job.kind,
            "mix": record.job.name,
            "seed": record.job.seed,
            "status": record.status,
            "objective": record.objective,
            "ratios": list(record.job.values.items()),
            "steps": int(record.looks[-1][0]) if record.looks else 0,
            "tokens": record.num_tokens,
            "rows": record.num_rows,
            "mix_sha256": record.mix_sha256,
            "seconds": record.seconds,
            "node": record.node,
            "error": record.error,
        }
        for record in records
    ]
    return pa.Table.from_pylist(rows, schema=TRIALS)


def one_line(error: object) -> str:
    """The last line of an error's text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:500] if lines else type(error).__name__
