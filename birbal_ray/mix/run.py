"""Mix: from scored rows and outside datasets to a training set, each row with its reason."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from birbal_ray.cluster import ray_session, told
from birbal_ray.mix.build import read_texts
from birbal_ray.mix.card import dataset_card
from birbal_ray.mix.config import MixConfig
from birbal_ray.mix.draft import Draft, draft_mix
from birbal_ray.mix.rows import MIX_TASKS
from birbal_ray.mix.scores import ScoreFolder, open_scores
from birbal_ray.mix.sources import Origin, origin_of
from birbal_ray.mix.write import TASKS_FILE, WORK_FOLDER, MixWriter, mix_files, splits_of
from birbal_ray.progress import ProgressLine
from birbal_ray.run import (
    LOG_FOLDER,
    MANIFEST_FILE,
    RUN_FILE,
    RunError,
    finish_run,
    read_json,
    start_run,
    stoppable,
    write_atomic,
    write_parquet,
)
from birbal_ray.settings import ConfigError
from birbal_ray.storage import absolute, is_url, local_copy, run_folder

STEP = "mix"
CARD_FILE = "README.md"
ANY_SIZE_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class MixResult:
    """What a run left, or (folder None) what a dry run would have written."""

    folder: Path | None
    composition: list[dict[str, Any]]
    manifest: dict[str, Any]


def mix(config: MixConfig, *, overwrite: bool = False, progress: ProgressLine | None = None) -> MixResult:
    """Make the mix in `config.output`; a finished one made from the same things is left as it is.

    An interrupted run starts over (nothing of it is read). Raises ConfigError (settings, sources,
    budgets, another run's folder) and RunError (damaged or unfinished scores).
    """
    progress = progress or ProgressLine()
    config = _here(config)
    scores, origins = _inputs(config, progress)
    with run_folder(_required(config.output, "--output")) as folder, stoppable():
        identity = _identity(config, scores, origins)
        resumed = start_run(folder, STEP, identity, overwrite=overwrite or _is_unfinished(folder))
        if resumed and (folder / MANIFEST_FILE).exists():
            manifest = read_json(folder / MANIFEST_FILE)
            progress.message(f"{folder} is up to date: {manifest['rows']['kept']:,} rows; nothing to do")
            return MixResult(folder, manifest["composition"], manifest)
        started = time.monotonic()
        work = folder / WORK_FOLDER
        shutil.rmtree(work, ignore_errors=True)
        try:
            with ExitStack() as stack:
                draft = _draft(config, scores, origins, work, folder / LOG_FOLDER / "ray.log", progress, stack)
                writer = _write(draft, folder, config, progress)
        finally:
            shutil.rmtree(work, ignore_errors=True)
            progress.close()
        manifest = _manifest(config, draft, writer, scores, origins)
        write_parquet(folder / TASKS_FILE, pa.Table.from_pylist(draft.task_table(), schema=MIX_TASKS))
        write_atomic(folder / CARD_FILE, dataset_card(manifest, identity["settings"]).encode())
        manifest["files"] = {
            name: _sha256(folder / name) for name in [*mix_files(writer.splits), TASKS_FILE, CARD_FILE]
        }
        manifest["wall_seconds"] = round(time.monotonic() - started, 3)
        finish_run(folder, manifest)
        return MixResult(folder, manifest["composition"], read_json(folder / MANIFEST_FILE))


def dry_run(config: MixConfig, progress: ProgressLine | None = None) -> MixResult:
    """Decide everything and write nothing."""
    progress = progress or ProgressLine()
    config = _here(config)
    scores, origins = _inputs(config, progress)
    with tempfile.TemporaryDirectory(prefix="birbal-mix-") as name:
        work = Path(name)
        with ExitStack() as stack:
            draft = _draft(config, scores, origins, work, work / "ray.log", progress, stack)
    progress.close()
    return MixResult(None, draft.composition(), _manifest(config, draft, None, scores, origins))


def _here(config: MixConfig) -> MixConfig:
    """Scores fetched from a URL are on this node only: no other one can read them."""
    if not is_url(config.scores or ""):
        return config
    resources = config.resources.model_copy(update={"in_process_mib": ANY_SIZE_MIB})
    return config.model_copy(update={"resources": resources})


def _inputs(config: MixConfig, progress: ProgressLine) -> tuple[ScoreFolder, list[Origin]]:
    scores = open_scores(local_copy(_required(config.scores, "--scores")), config.model)
    model = scores.model or "an unnamed model"
    progress.message(f"{scores.num_rows:,} scored rows of {len(scores.tasks)} tasks by {model}")
    return scores, [origin_of(source) for source in config.sources]


def _is_unfinished(folder: Path) -> bool:
    # A mix appears all at once, so an unfinished one holds nothing that other settings could spoil.
    run_file = folder / RUN_FILE
    return run_file.exists() and not (folder / MANIFEST_FILE).exists() and read_json(run_file).get("step") == STEP


def _required(value: str | None, flag: str) -> str:
    if not value:
        raise ConfigError(f"{flag} is required (or set it in the --config file)")
    return value


def _draft(
    config: MixConfig,
    scores: ScoreFolder,
    origins: Sequence[Origin],
    work: Path,
    log_file: Path,
    progress: ProgressLine,
    stack: ExitStack,
) -> Draft:
    num_cpus = config.resources.num_cpus or (os.cpu_count() or 2) + 2
    return draft_mix(
        config,
        scores,
        origins,
        work,
        progress.update,
        lambda: stack.enter_context(ray_session(num_cpus, log_file, about=told(STEP, config.output))),
    )


def _identity(config: MixConfig, scores: ScoreFolder, origins: Sequence[Origin]) -> dict[str, Any]:
    """Everything that decides the rows; paths and resources don't."""
    settings = config.model_dump(exclude={"resources", "output", "scores"})
    for source in settings["sources"]:
        source.pop("path")
    settings["contamination"]["files"] = [_sha256(Path(f)) for f in config.contamination.files]
    return {
        "settings": settings,
        "scores": {"run": scores.identity_hash, "files": scores.content_hash},
        "sources": {origin.name: {"revision": origin.revision, "license": origin.license} for origin in origins},
    }


def _write(draft: Draft, folder: Path, config: MixConfig, progress: ProgressLine) -> MixWriter:
    total = len(draft.gathered.candidates)
    writer = MixWriter(folder, config.policy, splits_of(config))
    with writer.writing():
        outcomes = draft.outcomes()
        for table in read_texts(draft.chunks, draft.places(), in_process=draft.in_process):
            writer.add(outcomes.complete(table))
            progress.update(f"wrote {writer.num_rows:,} of {total:,} audit rows")
        # Inside the block: if a row got lost on the way, none of the files appears.
        kept, dropped = writer.reasons["kept"], draft.dropped()
        expected = {"kept": draft.decisions.num_kept, **dropped}
        if writer.num_rows != total or {r: n for r, n in writer.reasons.items() if n} != {
            r: n for r, n in expected.items() if n
        }:
            raise RunError(
                f"{folder}: {total:,} candidates were decided on, {writer.num_rows:,} arrived ({kept:,} kept); "
                "rerun the command (nothing was written)"
            )
    return writer


def _manifest(
    config: MixConfig, draft: Draft, writer: MixWriter | None, scores: ScoreFolder, origins: Sequence[Origin]
) -> dict[str, Any]:
    kept = draft.decisions.num_kept
    return {
        "seed": config.seed,
        "scores": {"path": absolute(config.scores or ""), "model": scores.model, "rows": scores.num_rows},
        "sources": [origin.record() for origin in origins],
        "rows": {
            "candidates": len(draft.gathered.candidates),
            "kept": kept,
            "train": draft.num_train,
            "eval": kept - draft.num_train,
            "dropped": draft.dropped(),
        },
        "composition": draft.composition(),
        "allocation": draft.shortfalls(),
        "licenses": _licenses(writer, origins, scores),
        "contamination": {
            "action": config.contamination.action,
            "ngram": config.contamination.ngram,
            "num_texts": draft.lookup.ngrams.num_texts if draft.lookup.ngrams else 0,
            "evaluations": sorted({*config.contamination.evaluations, *config.contamination.families}),
            "found": draft.contaminated(),
        },
    }


def _licenses(writer: MixWriter | None, origins: Sequence[Origin], scores: ScoreFolder) -> list[dict[str, str]]:
    where = {origin.name: (origin.location, origin.revision) for origin in origins}
    found = writer.licenses if writer else {}
    return [
        {
            "source": source,
            "origin": where.get(source, ("Natural Instructions task files", ""))[0],
            "revision": where.get(source, ("", f"score run {scores.identity_hash[:12]}"))[1],
            "licences": ", ".join(sorted(licences)),
        }
        for source, licences in sorted(found.items())
    ]


def _sha256(path: Path) -> str:
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
