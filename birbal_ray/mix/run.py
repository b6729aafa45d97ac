"""Mix: from scored rows and outside datasets to a training set, each row with its reason."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from birbal_ray.cluster import job_metadata, ray_session
from birbal_ray.mix.config import MixConfig
from birbal_ray.mix.files import BATCH_ROWS, CARD_FILE, OWN_FILES, dataset_card, write_mix
from birbal_ray.mix.plan import MixPlan, make_context, plan_mix
from birbal_ray.mix.reading import Context, sort_texts
from birbal_ray.mix.scores import ScoreFolder, open_scores
from birbal_ray.mix.sources import Origin, origin_of, sha256_of_file
from birbal_ray.progress import ProgressLine, counted, figures_key, save_figures
from birbal_ray.run import Step, open_run
from birbal_ray.schemas import MIX_TASKS, TASKS_FILE
from birbal_ray.settings import require
from birbal_ray.storage import Folder, absolute

# A mix appears all at once, so an unfinished one holds nothing that other settings could spoil.
STEP = Step("mix", OWN_FILES, starts_over=True)
WORK_FOLDER = ".work"
ANY_SIZE_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class MixResult:
    """What a run left, or (folder None) what a dry run would have written."""

    folder: Folder | None
    manifest: dict[str, Any]

    @property
    def composition(self) -> list[dict[str, Any]]:
        """One row per source and label."""
        rows: list[dict[str, Any]] = self.manifest["composition"]
        return rows


def mix(config: MixConfig, *, overwrite: bool = False) -> MixResult:
    """Make the mix in `config.output`; a finished one made from the same things is left as it is.

    An interrupted run starts over (nothing of it is read). Raises ConfigError (settings, sources,
    budgets, another run's folder) and RunError (damaged or unfinished scores).
    """
    progress, started = ProgressLine(), time.monotonic()
    output = require(config.output, "--output")
    scores, origins = _open_inputs(config, progress)
    identity = _identity(config, scores, origins)
    with open_run(output, STEP, identity, inputs=inputs_of(config), overwrite=overwrite) as run:
        if run.manifest is not None:
            progress.message(f"{run.folder} is up to date: {run.manifest['rows']['kept']:,} rows; nothing to do")
            return MixResult(run.folder, run.manifest)

        def tell(text: str) -> None:
            progress.update(text)
            run.progress(None, None, text=text)

        context = make_context(config, scores)
        with _work_folder(run.folder) as work, _ray_if_needed(context):
            plan = plan_mix(context, origins, work, tell)
            texts = sort_texts(plan.read_texts(), plan.num_texts, work / "texts", BATCH_ROWS)
            files, licenses = write_mix(plan, texts, run.folder, tell)
        progress.close()
        manifest = _manifest(plan, licenses, origins)
        table = pa.Table.from_pylist(plan.task_table(), schema=MIX_TASKS)
        files[TASKS_FILE] = run.folder.write_parquet(TASKS_FILE, table)
        files[CARD_FILE] = run.folder.write_bytes(CARD_FILE, dataset_card(manifest, identity["settings"]).encode())
        rows = manifest["rows"]
        run.progress(rows["kept"], rows["kept"], final=True)
        summary = f"{rows['kept']:,} rows ({rows['train']:,} train, {rows['eval']:,} eval) of {rows['candidates']:,}"
        done = run.finish(manifest, files, summary=summary)
        if not config.validation_rows_per_task:  # else it is a trial's, among others
            seconds = time.monotonic() - started
            save_figures(figures_key(STEP.name, config), seconds=seconds, candidates=float(rows["candidates"]))
        return MixResult(run.folder, done)


def dry_run(config: MixConfig) -> MixResult:
    """Decide everything and write nothing."""
    progress = ProgressLine()
    scores, origins = _open_inputs(config, progress)
    context = make_context(config, scores)
    with _work_folder(None) as work, _ray_if_needed(context):
        plan = plan_mix(context, origins, work, progress.update)
    progress.close()
    return MixResult(None, _manifest(plan, {}, origins))


@contextmanager
def _work_folder(folder: Folder | None) -> Iterator[Path]:
    """For what is read again: in the run folder where that is local, so that a killed run's is removed by the next."""
    if folder is None or not folder.is_local:
        with tempfile.TemporaryDirectory(prefix="birbal-mix-") as name:
            yield Path(name)
        return
    work = folder.local / WORK_FOLDER
    shutil.rmtree(work, ignore_errors=True)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def inputs_of(config: MixConfig) -> list[str]:
    """The paths and URLs that a mix is made from."""
    return [config.scores or "", *config.contamination.files, *(one.path for one in config.sources if one.path)]


def _open_inputs(config: MixConfig, progress: ProgressLine) -> tuple[ScoreFolder, list[Origin]]:
    scores = open_scores(require(config.scores, "--scores"), config.model)
    model = scores.model or "an unnamed model"
    progress.message(f"{counted(scores.num_rows, 'scored row')} of {counted(len(scores.tasks), 'task')} by {model}")
    return scores, [origin_of(source) for source in config.sources]


def _ray_if_needed(context: Context) -> AbstractContextManager[object]:
    if context.in_process:
        return nullcontext()
    num_cpus = context.config.resources.num_cpus or (os.cpu_count() or 2) + 2
    return ray_session(num_cpus, about=job_metadata(STEP.name, context.config.output))


def _identity(config: MixConfig, scores: ScoreFolder, origins: Sequence[Origin]) -> dict[str, Any]:
    """Everything that decides the rows; paths and resources don't, nor does `model`, which the scores say."""
    settings = config.model_dump(exclude={"resources", "output", "scores", "model"})
    for source in settings["sources"]:
        source.pop("path")
    files = config.contamination.files
    settings["contamination"]["files"] = [sha256_of_file(file, "contamination.files") for file in files]
    return {
        "settings": settings,
        "scores": {"run": scores.identity_hash, "files": scores.content_hash},
        "sources": {origin.name: {"revision": origin.revision, "license": origin.license} for origin in origins},
    }


def _manifest(plan: MixPlan, licenses: dict[str, set[str]], origins: Sequence[Origin]) -> dict[str, Any]:
    config, scores, ngrams = plan.context.config, plan.context.scores, plan.context.ngrams
    kept = plan.decisions.num_kept
    where = {origin.name: (origin.location, origin.revision) for origin in origins}
    ours = ("Natural Instructions task files", f"score run {scores.identity_hash[:12]}")
    return {
        "seed": config.seed,
        "scores": {"path": absolute(config.scores or ""), "model": scores.model, "rows": scores.num_rows},
        "sources": [asdict(origin) for origin in origins],
        "rows": {
            "candidates": len(plan.candidates),
            "kept": kept,
            "train": plan.num_train,
            "eval": kept - plan.num_train,
            "dropped": plan.dropped(),
        },
        "composition": plan.composition(),
        "allocation": plan.shortfalls(),
        "notes": plan.notes(),
        "licenses": [
            {
                "source": source,
                # Of a local file only its name: card and report are sent to others.
                "origin": origin.rpartition("/")[2] if origin.startswith("/") else origin,
                "revision": revision,
                "licences": ", ".join(sorted(found)),
            }
            for source, found in sorted(licenses.items())
            for origin, revision in (where.get(source, ours),)
        ],
        "contamination": {
            "action": config.contamination.action,
            "ngram": config.contamination.ngram,
            "num_texts": ngrams.num_texts if ngrams else 0,
            "evaluations": sorted(config.contamination.all_families),
            "found": plan.contaminated(),
        },
    }
