"""Train: QLoRA on a mix within a wall-clock budget, one adapter out, resumable."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from birbal_ray.models import Model, load_tokenizer, pin_model, read_template, resolve_model
from birbal_ray.progress import ProgressLine
from birbal_ray.run import (
    MANIFEST_FILE,
    RunError,
    finish_run,
    package_versions,
    read_json,
    read_manifest,
    start_run,
    stoppable,
    write_atomic,
)
from birbal_ray.settings import ConfigError, require
from birbal_ray.storage import absolute, is_url, local_copy, run_folder
from birbal_ray.train.card import adapter_card, draw_loss_curve
from birbal_ray.train.checkpoints import BEST_FILE, EASED_FILE, METRICS_FILE, SELF_CHECK_FILE, STOP_FILE, read_metrics
from birbal_ray.train.config import TrainConfig
from birbal_ray.train.data import PACKED_FOLDER, Packing, prepare
from birbal_ray.train.deadline import CLOCK_FILE
from birbal_ray.train.launch import STEP, ease, mark_diverged, train_on_cluster
from birbal_ray.train.preflight import Preflight, describe_preflight, refuse_if_too_large, run_preflight

ADAPTER_FOLDER, CURVE_FILE = "adapter", "loss_curve.png"
CALIBRATION_STEPS = 4
TEXT_PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes")


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a run left."""

    folder: Path
    manifest: dict[str, Any]


def train(config: TrainConfig, *, overwrite: bool = False, progress: ProgressLine | None = None) -> TrainResult:
    """Train, or continue, in `config.output`.

    Raises ConfigError (settings, mix, memory, another run's folder), ModelError, RunError (the run
    broke off; the last checkpoint is kept and the same command continues).
    """
    progress = progress or ProgressLine()
    config, model = resolve_config(config)
    mix = local_copy(config.mix or "")
    mix_manifest = read_mix(mix)
    tokenizer = load_tokenizer(model.path)
    chat = read_template(tokenizer, config.prompt.format, config.prompt.chat_template_arguments)
    with run_folder(require(config.output, "--output"), follow=True) as folder, stoppable():
        resumed = start_run(folder, STEP, _identity(config, model, mix_manifest), overwrite=overwrite)
        if resumed and (folder / MANIFEST_FILE).exists():
            progress.message(f"{folder} is up to date; nothing to do")
            return TrainResult(folder, read_json(folder / MANIFEST_FILE))
        packing = prepare(
            mix,
            folder / PACKED_FOLDER,
            tokenizer,
            config.batch.sequence_length,
            config.batch.long_samples,
            config.evaluation.num_rows,
            progress.update,
            seed=config.seed,
            epochs=config.epochs,
            chat=chat,
        )
        found = run_preflight(config, model, packing)
        for line in describe_preflight(found, config):
            progress.message(line)
        refuse_if_too_large(found)
        (folder / STOP_FILE).unlink(missing_ok=True)
        if resumed and read_metrics(folder / METRICS_FILE):
            progress.message(f"continuing from the last checkpoint in {folder}")
        outcome = train_on_cluster(ease(config, folder), model, folder, progress, found.steps_per_epoch)
        if outcome["ended_by"] == "stop":
            progress.message(f"stopped after step {outcome['num_steps']}, checkpoint saved; the same command continues")
            raise KeyboardInterrupt
        return _finish(config, model, folder, mix_manifest, packing, outcome, progress)


def dry_run(config: TrainConfig, *, calibrate: bool = False, progress: ProgressLine | None = None) -> Preflight:
    """Tokens, memory, and what will fit in the budget; trains nothing but, to calibrate, a few steps."""
    progress = progress or ProgressLine()
    place = _calibration_place(config) if calibrate else None
    config, model = resolve_config(config)
    mix = local_copy(config.mix or "")
    read_mix(mix)
    tokenizer = load_tokenizer(model.path)
    chat = read_template(tokenizer, config.prompt.format, config.prompt.chat_template_arguments)
    with tempfile.TemporaryDirectory(prefix="birbal-train-", dir=place) as name:
        folder = Path(name)
        packing = prepare(
            mix,
            folder / PACKED_FOLDER,
            tokenizer,
            config.batch.sequence_length,
            config.batch.long_samples,
            config.evaluation.num_rows if not calibrate else 8,
            progress.update,
            seed=config.seed,
            chat=chat,
        )
        found = run_preflight(config, model, packing)
        if calibrate and found.fits:
            progress.message(f"calibrating: {CALIBRATION_STEPS} steps")
            short = config.model_copy(update={"budget": None, "max_steps": CALIBRATION_STEPS, "output": None})
            with stoppable():
                train_on_cluster(short, model, folder, progress, found.steps_per_epoch)
            found = run_preflight(config, model, packing)
    progress.close()
    return found


def resolve_config(config: TrainConfig) -> tuple[TrainConfig, Model]:
    """(configuration with `auto` decided and paths absolute, its model). Raises ConfigError, ModelError."""
    mix = absolute(require(config.mix, "--mix"))
    device = config.resources.device
    if device == "auto":
        if os.environ.get("RAY_ADDRESS") and not config.resources.accelerator_type:
            raise ConfigError(
                "resources.device is auto, but RAY_ADDRESS names a cluster of other machines; give --device"
            )
        import torch

        device = "gpu" if config.resources.accelerator_type or torch.cuda.is_available() else "cpu"
    if device == "cpu" and config.optimizer.name not in ("auto", "adamw_torch"):
        raise ConfigError(f"optimizer.name={config.optimizer.name} needs a GPU; auto takes adamw_torch on a CPU")
    if device == "cpu" and config.resources.accelerator_type:
        raise ConfigError(
            f"resources.accelerator_type={config.resources.accelerator_type} with --device cpu; leave one out"
        )
    for tracker in config.trackers:
        if importlib.util.find_spec(tracker) is None:
            raise ConfigError(f"trackers: {tracker} is not installed; run: pip install {tracker}")
    model = resolve_model(config.model.name, config.model.revision)
    resources = config.resources.model_copy(update={"device": device})
    model_settings = config.model.model_copy(update=pin_model(model))
    return config.model_copy(update={"mix": mix, "resources": resources, "model": model_settings}), model


def read_mix(mix: Path) -> dict[str, Any]:
    """The mix's manifest. Raises RunError or ConfigError when it is none, unfinished, or lacks a column."""
    manifest = read_manifest(mix, "mix")
    for split in ("train", "eval"):
        file = mix / f"{split}.parquet"
        if not file.exists():
            raise ConfigError(f"{file}: missing, though {mix / MANIFEST_FILE} is there; make the mix again")
        absent = {"question", "answer"} - set(pq.read_schema(file).names)
        if absent:
            raise ConfigError(f"{file}: no column {', '.join(sorted(absent))}; expected the output of `birbal mix`")
    return manifest


def _calibration_place(config: TrainConfig) -> Path | None:
    """Where packs go that a worker on another node reads: beside --output. None without a cluster: anywhere."""
    if not os.environ.get("RAY_ADDRESS"):
        return None
    if not config.output or is_url(config.output):
        found = f"--output is {config.output}" if config.output else "there is no --output"
        raise ConfigError(
            f"--calibrate on a cluster (RAY_ADDRESS) keeps its packs beside --output, for the worker to read: {found}; "
            "give a folder on storage that all nodes see, or unset RAY_ADDRESS to calibrate on this machine"
        )
    place = Path(config.output).resolve().parent
    place.mkdir(parents=True, exist_ok=True)
    return place


def _identity(config: TrainConfig, model: Model, mix_manifest: dict[str, Any]) -> dict[str, Any]:
    """Everything that decides the adapter; paths and resources don't, nor does how a step's sequences are split."""
    settings = config.model_dump(
        exclude={"resources", "output", "mix", "trackers", "model", "gradient_checkpointing", "kernels"}, mode="json"
    )
    settings["model"] = config.model.model_dump(exclude={"name", "revision", "attention"})
    settings["checkpoint"].pop("keep")
    batch = settings["batch"]
    batch["sequences_per_step"] = batch.pop("micro") * batch.pop("accumulation")
    versions = package_versions()
    return {
        "settings": settings,
        "model_fingerprint": model.fingerprint,
        "mix": {name: mix_manifest["files"][name] for name in ("train.parquet", "eval.parquet")},
        "packages": {name: versions[name] for name in TEXT_PACKAGES if name in versions},
    }


def _finish(
    config: TrainConfig,
    model: Model,
    folder: Path,
    mix_manifest: dict[str, Any],
    packing: dict[str, Packing],
    outcome: dict[str, Any],
    progress: ProgressLine,
) -> TrainResult:
    metrics = read_metrics(folder / METRICS_FILE)
    if not (folder / BEST_FILE).exists():
        reason = next(filter(None, map(mark_diverged, metrics)), "the run made no evaluation")
        raise RunError(f"{folder}: no adapter was kept; {reason}")
    best = read_json(folder / BEST_FILE)
    base_loss = next(line["eval_loss"] for line in metrics if "eval_loss" in line and line["step"] == 0)
    if best["eval_loss"] >= base_loss:
        progress.message(f"warning: no adapter beats the base model's eval loss of {base_loss:.4f}")
    clock = read_json(folder / CLOCK_FILE)
    settings = config.model_dump(mode="json")
    eased, checked = folder / EASED_FILE, folder / SELF_CHECK_FILE
    manifest = {
        "settings": settings,
        "seed": config.seed,
        "model": {"name": config.model.name, "revision": model.revision, "path": str(model.path)},
        "mix": {"path": config.mix, "identity_hash": mix_manifest["identity_hash"]},
        "packing": {split: asdict(one) for split, one in packing.items()},
        "rows": {
            "train": packing["train"].num_rows,
            "kept": packing["train"].num_samples,
            "dropped": {"too_long": packing["train"].num_rows - packing["train"].num_samples},
        },
        "result": {
            **outcome,
            "eased": read_json(eased) if eased.exists() else None,
            "self_check": read_json(checked) if checked.exists() else None,
            "train_tokens": sum(line["tokens"] for line in metrics if "loss" in line),
            "base_eval_loss": base_loss,
            "best_eval_loss": best["eval_loss"],
            "best_step": best["step"],
            "elapsed_seconds": round(clock["elapsed_seconds"], 3),
            "setup_seconds": round(clock["setup_seconds"], 3),
        },
    }
    draw_loss_curve(metrics, best["step"], folder / CURVE_FILE)
    card = adapter_card(manifest, settings, mix_manifest)
    _publish_adapter(folder, folder / best["folder"], card, config, model)
    finish_run(folder, manifest)
    return TrainResult(folder, read_json(folder / MANIFEST_FILE))


def _publish_adapter(folder: Path, best: Path, card: str, config: TrainConfig, model: Model) -> None:
    """Copy the best adapter to adapter/, with its card, naming the base model so that others can load it."""
    temporary = folder / f".tmp-{ADAPTER_FOLDER}"
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(best, temporary)
    adapter_config = json.loads((temporary / "adapter_config.json").read_text(encoding="utf-8"))
    if model.revision and model.name == config.model.name and "/" in model.name and not Path(model.name).exists():
        adapter_config |= {"base_model_name_or_path": model.name, "revision": model.revision}
    write_atomic(temporary / "adapter_config.json", (json.dumps(adapter_config, indent=1) + "\n").encode())
    write_atomic(temporary / "README.md", card.encode())
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder / ADAPTER_FOLDER)
    temporary.rename(folder / ADAPTER_FOLDER)
