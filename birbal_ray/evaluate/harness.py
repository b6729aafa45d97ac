"""Harness: one model on public benchmarks, one file per finished benchmark."""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from birbal_ray.evaluate import harness_run as harness
from birbal_ray.evaluate.benchmarks import BENCHMARKS, HARNESS, Benchmark, chosen
from birbal_ray.evaluate.harness_results import leaderboard_metrics, result_rows, results_file
from birbal_ray.evaluate.models import EvaluatedModel, resolve_models
from birbal_ray.models import Model, resolve
from birbal_ray.progress import ProgressLine, duration
from birbal_ray.run import (
    MANIFEST_FILE,
    RunFailedError,
    finish_run,
    read_json,
    start_run,
    stoppable,
    write_json,
)
from birbal_ray.settings import ConfigError
from birbal_ray.storage import is_url, run_folder

STEP = "harness"
RESULTS_FILE = "results.json"
BENCHMARKS_FOLDER, TASKS_FOLDER = "benchmarks", "tasks"
SHAPING_PACKAGES = ("lm_eval", "transformers")  # another version may give other figures


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for. Empty `benchmarks` and `tasks`: every benchmark whose data can be had."""

    model: str | None
    output: str | None
    adapter: str | None = None
    benchmarks: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    include_path: Path | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: str = "8"
    device: str | None = None
    backend: str = "hf"
    team: str | None = None


@dataclass(frozen=True, slots=True)
class Unit:
    """What the harness is called for once; it is finished when `file` stands in the run's folder."""

    name: str
    tasks: tuple[str, ...]
    file: str
    num_fewshot: int | None
    benchmark: Benchmark | None = None

    def row(self, done: bool) -> dict[str, Any]:
        """For --dry-run."""
        return {
            "benchmark": self.name,
            "metric": self.benchmark.metric if self.benchmark else None,
            "tasks": " ".join(self.tasks),
            "shots": self.num_fewshot,
            "state": "finished" if done else "to run",
        }


@dataclass(frozen=True, slots=True)
class HarnessResult:
    """A run's folder, its manifest, one row per finished benchmark or task."""

    folder: Path
    manifest: dict[str, Any]
    rows: list[dict[str, Any]]


def dry_run(request: Request) -> list[dict[str, Any]]:
    """What would run, its names checked; loads no model and writes nothing."""
    request = checked(request)
    units = selected(request)
    _index(request, units)
    return [unit.row(_stands(request.output or "", unit)) for unit in units]


def run(request: Request, *, overwrite: bool = False, progress: ProgressLine | None = None) -> HarnessResult:
    """Run what is not finished yet, then write results.json over all that is.

    Raises ConfigError (settings, names, another run's folder), ModelError, RunFailedError (some
    benchmark could not be run; the others are kept and the same command continues).
    """
    progress = progress or ProgressLine()
    request = checked(request)
    output = request.output or ""
    units = selected(request)
    model = resolve(request.model or "")
    adapter = resolve_models(model, [request.adapter], [])[1] if request.adapter else None
    identity, team = _identity(request, model, adapter), _team(request, model, adapter)
    index = _index(request, [unit for unit in units if overwrite or not _stands(output, unit)])
    started = time.monotonic()
    with run_folder(output) as folder, stoppable():
        resumed = start_run(folder, STEP, identity, overwrite=overwrite)
        pending = [unit for unit in units if not (folder / unit.file).exists()]
        if resumed and not pending and (folder / MANIFEST_FILE).exists():
            _write_results(request, team, folder, {})  # another --team needs no measuring
            progress.message(f"{folder} is up to date; nothing to do")
            return _read(folder)
        (folder / MANIFEST_FILE).unlink(missing_ok=True)  # a further benchmark makes it unfinished again
        loaded, failures = _load(index, pending, progress)  # before the model: minutes sooner
        lm = harness.load_model(_loader(request, model, adapter)) if loaded else None
        for unit in pending:
            if unit.name in loaded:
                _measure(index, lm, unit, loaded.pop(unit.name), request.limit, folder, progress)
        _write_results(request, team, folder, failures)
        if failures:
            raise RunFailedError(_told(failures))
        finish_run(
            folder,
            {
                "model": {"name": model.name, "revision": model.revision},
                "adapter": asdict(adapter) if adapter else None,
                "limit": request.limit,
                "finished": [*sorted(_raw(folder)), *sorted(_raw(folder, TASKS_FOLDER))],
                "wall_seconds": round(time.monotonic() - started, 3),
            },
        )
        return _read(folder)


def _stands(output: str, unit: Unit) -> bool:
    return not is_url(output) and (Path(output) / unit.file).exists()


def checked(request: Request) -> Request:
    """The request with an absolute --include-path. Raises ConfigError for what is missing or out of range."""
    harness.version()
    harness.check_backend(request.backend)
    for flag, value in (("--model", request.model), ("--output", request.output)):
        if value is None:
            raise ConfigError(f"{flag} is required")
    if not re.fullmatch(r"auto|[1-9][0-9]*", request.batch_size):
        raise ConfigError(f"--batch-size {request.batch_size}: expected a number from 1, or auto")
    if request.include_path is None:
        return request
    if not request.include_path.is_dir():
        raise ConfigError(f"--include-path {request.include_path}: no such folder")
    return replace(request, include_path=request.include_path.resolve())


def selected(request: Request) -> list[Unit]:
    """What the request names; without names, the benchmarks that the harness or --include-path can serve."""
    found = chosen(request.benchmarks)
    if not request.benchmarks and not request.tasks:
        local = harness.local_tasks(request.include_path) if request.include_path else frozenset()
        found = [one for one in BENCHMARKS.values() if one.source == HARNESS or set(one.tasks) <= local]
    units = [
        Unit(
            one.name,
            one.tasks,
            f"{BENCHMARKS_FOLDER}/{one.name}.json",
            one.num_fewshot if request.num_fewshot is None else request.num_fewshot,
            one,
        )
        for one in found
    ]
    for name in dict.fromkeys(request.tasks):
        if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", name):
            raise ConfigError(f"--task {name}: not a task's name")
        units.append(Unit(name, (name,), f"{TASKS_FOLDER}/{name}.json", request.num_fewshot))
    return units


def _index(request: Request, pending: Sequence[Unit]) -> Any:
    if not pending:
        return None
    names = [task for unit in pending for task in unit.tasks]
    index = harness.manager(request.include_path, names)
    harness.check_known(index, names)
    return index


def _load(index: Any, pending: Sequence[Unit], progress: ProgressLine) -> tuple[dict[str, list[Any]], dict[str, str]]:
    """Unit name → its tasks with their data; unit name → why its data can't be had."""
    if pending and harness.go_offline_without_hub():
        progress.message("the Hub does not answer: only its cache and local files are read")
    loaded, failures = {}, {}
    for unit in pending:
        progress.update(f"{unit.name}: reading its data")
        try:
            loaded[unit.name] = harness.load_tasks(index, unit.tasks)
        except harness.TaskUnavailableError as error:
            failures[unit.name] = str(error)
            if len(pending) > 1:
                progress.message(f"{unit.name}: not run: {error}")
    return loaded, failures


def _measure(
    index: Any, lm: Any, unit: Unit, tasks: list[Any], limit: int | None, folder: Path, progress: ProgressLine
) -> None:
    progress.message(f"{unit.name}: {len(tasks)} tasks" if len(tasks) > 1 else f"{unit.name}: {unit.tasks[0]}")
    started = time.monotonic()
    measure = unit.benchmark.measure if unit.benchmark else None
    raw = harness.evaluate(index, lm, tasks, num_fewshot=unit.num_fewshot, limit=limit, measure=measure)
    if unit.benchmark:
        leaderboard_metrics({unit.name: raw})  # what has no value must not count as finished
    seconds = time.monotonic() - started
    write_json(folder / unit.file, {**raw, "wall_seconds": round(seconds, 3)})
    progress.message(f"{unit.name}: done in {duration(seconds)}")


def _loader(request: Request, model: Model, adapter: EvaluatedModel | None) -> harness.Loader:
    return harness.Loader(
        model.path,
        Path(adapter.path) if adapter else None,
        adapter.rank if adapter else None,
        request.backend,
        request.device,
        request.batch_size,
    )


def _told(failures: dict[str, str]) -> str:
    if len(failures) == 1:
        ((name, reason),) = failures.items()
        return f"{name}: not run: {reason}"
    return f"not run: {', '.join(failures)}; the reasons are above and in {RESULTS_FILE}"


def _identity(request: Request, model: Model, adapter: EvaluatedModel | None) -> dict[str, Any]:
    """What decides the figures of one benchmark; which benchmarks are run is not part of it."""
    return {
        "model": model.fingerprint,
        "adapter": adapter.fingerprint if adapter else None,
        "limit": request.limit,
        "num_fewshot": request.num_fewshot,
        "backend": request.backend,
        "include_path": _content_hash(request.include_path) if request.include_path else None,
        "packages": {name: importlib.metadata.version(name) for name in SHAPING_PACKAGES},
    }


def _content_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.is_file() and "__pycache__" not in file.parts:
            with file.open("rb") as handle:
                content = hashlib.file_digest(handle, "sha256").hexdigest()
            digest.update(f"{file.relative_to(folder).as_posix()}:{content}\n".encode())
    return digest.hexdigest()


def _team(request: Request, model: Model, adapter: EvaluatedModel | None) -> str:
    name = Path(model.name).name
    return request.team or (f"{name} + {adapter.name}" if adapter else name)


def _raw(folder: Path, kind: str = BENCHMARKS_FOLDER) -> dict[str, dict[str, Any]]:
    return {file.stem: read_json(file) for file in sorted((folder / kind).glob("*.json"))}


def _write_results(request: Request, team: str, folder: Path, failures: dict[str, str]) -> None:
    content = results_file(team, _raw(folder), _raw(folder, TASKS_FOLDER), limit=request.limit, failures=failures)
    if not (folder / RESULTS_FILE).exists() or read_json(folder / RESULTS_FILE) != content:
        write_json(folder / RESULTS_FILE, content)


def _read(folder: Path) -> HarnessResult:
    rows = result_rows(_raw(folder), _raw(folder, TASKS_FOLDER))
    return HarnessResult(folder, read_json(folder / MANIFEST_FILE), rows)
