"""Train: QLoRA on a mix within a wall-clock budget, one adapter out, resumable."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
import time
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from birbal_ray.adapters import find_adapter
from birbal_ray.cluster import decide_device
from birbal_ray.manifest import check_input, package_versions, read_manifest
from birbal_ray.models import Model, load_tokenizer, pin_model, resolve_model
from birbal_ray.ni.prompt import CHAT
from birbal_ray.progress import ProgressLine, save_figures
from birbal_ray.run import Run, Step, StepResult, open_run, sigterm_as_interrupt
from birbal_ray.settings import ConfigError, require
from birbal_ray.storage import Folder, RunError, absolute, open_folder
from birbal_ray.train import files
from birbal_ray.train.budget import rate_key
from birbal_ray.train.card import CURVE_FILE, draw_loss_curve, publish_adapter
from birbal_ray.train.config import TrainConfig
from birbal_ray.train.data import Packing, prepare, text_columns
from birbal_ray.train.files import parse_metrics, working_folder
from birbal_ray.train.launch import train_on_cluster
from birbal_ray.train.preflight import (
    Preflight,
    describe_preflight,
    refuse_if_too_large,
    refuse_if_too_short,
    run_preflight,
)
from birbal_ray.train.worker import why_diverged

CALIBRATION_STEPS = 4
TEXT_PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes")
STEP = Step("train", files.OWNS)


class TrainResult(StepResult):
    """A finished run."""


def train(config: TrainConfig, *, overwrite: bool = False) -> TrainResult:
    """Train, or continue, in `config.output`, a path or a URL.

    Raises ConfigError (settings, mix, memory, another run's folder), ModelError, RunError (the run
    broke off; the last checkpoint is kept and the same command continues).
    """
    progress, started = ProgressLine(), time.monotonic()
    output = require(config.output, "--output")
    config, model = resolve_config(config)
    mix, mix_manifest = read_mix(config)
    identity = _identity(config, model, mix_manifest)
    inputs = [config.mix or "", str(model.path), *filter(None, [config.lora.from_adapter])]
    with open_run(output, STEP, identity, inputs=inputs, overwrite=overwrite) as run:
        if run.manifest:
            progress.message(f"{run.folder} is up to date; nothing to do")
            return TrainResult(run.folder, run.manifest)
        if not run.folder.is_local and files.WORKING_FILE not in run.files:
            run.folder.write_json(files.WORKING_FILE, {"token": uuid.uuid4().hex})
        working = working_folder(run.folder)
        packing = prepare(mix, working / files.PACKED_FOLDER, load_tokenizer(model.path), config, progress.update)
        if not run.folder.is_local:
            for file in sorted((working / files.PACKED_FOLDER).iterdir()):
                name = f"{files.PACKED_FOLDER}/{file.name}"
                if name not in run.files:
                    run.folder.upload(file, name)
        found = run_preflight(config, model, packing)
        for line in describe_preflight(found):
            progress.message(line)
        refuse_if_too_large(found)
        if files.METRICS_FILE not in run.files:
            refuse_if_too_short(found)  # one that is under way ends in time whatever this machine has measured since
        if files.METRICS_FILE in run.files:
            progress.message(f"continuing from the last checkpoint in {run.folder}")
        run.folder.delete([files.STOP_FILE])
        outcome = train_on_cluster(config, model, run.folder, progress, run)
        if outcome["ended_by"] == "stop":
            progress.message(f"stopped after step {outcome['num_steps']}, checkpoint saved; the same command continues")
            raise KeyboardInterrupt
        result = _finish(config, model, run, mix_manifest, packing, outcome, progress)
        if not run.folder.is_local:
            shutil.rmtree(working, ignore_errors=True)
        if not run.resumed:
            rest = time.monotonic() - started - result.manifest["result"]["elapsed_seconds"]
            per_row = packing["train"].num_tokens / packing["train"].num_samples
            save_figures(rate_key(config), overhead_seconds=rest, tokens_per_row=per_row)
        return result


def dry_run(config: TrainConfig, *, calibrate: bool = False) -> Preflight:
    """Tokens, memory, and what will fit in the budget.

    Checks the architecture; trains a few steps to `calibrate`. Without it neither weights nor a card are needed: the
    model's config and tokenizer are enough.
    """
    progress = ProgressLine()
    if calibrate and os.environ.get("RAY_ADDRESS"):
        raise ConfigError("--calibrate: its packs lie on this machine; unset RAY_ADDRESS, on a machine with the card")
    config, model = resolve_config(config, weights=calibrate)
    mix, _ = read_mix(config)
    with tempfile.TemporaryDirectory(prefix="birbal-train-") as name:
        folder = Path(name)
        packed, few = folder / files.PACKED_FOLDER, 8 if calibrate else None
        packing = prepare(mix, packed, load_tokenizer(model.path), config, progress.update, num_eval_rows=few)
        found = run_preflight(config, model, packing)
        from birbal_ray.train.self_check import check_architecture

        progress.update("checking packing and adapter on the model's architecture")
        check_architecture(model.path, config)
        progress.message(
            "packed samples do not see each other, and the adapter gets a gradient (checked without weights)"
        )
        if calibrate and found.fits:
            progress.message(f"calibrating: {CALIBRATION_STEPS} steps")
            short = config.replace({"budget": None, "max_steps": CALIBRATION_STEPS, "output": None})
            with sigterm_as_interrupt():
                train_on_cluster(short, model, open_folder(folder), progress)
            found = run_preflight(config, model, packing)
    progress.close()
    return found


def resolve_config(config: TrainConfig, *, weights: bool = True) -> tuple[TrainConfig, Model]:
    """(configuration with `auto` decided and paths absolute, its model). Raises ConfigError, ModelError."""
    mix = absolute(require(config.mix, "--mix"))
    asked, card = config.resources.device, config.resources.accelerator_type
    device = "gpu" if asked == "auto" and card else decide_device(asked, "resources.device")
    if device == "cpu" and config.optimizer.name not in ("auto", "adamw_torch"):
        raise ConfigError(f"optimizer.name={config.optimizer.name} needs a GPU; auto takes adamw_torch on a CPU")
    if device == "cpu" and config.resources.accelerator_type:
        raise ConfigError(
            f"resources.accelerator_type={config.resources.accelerator_type} with --device cpu; leave one out"
        )
    for tracker in config.trackers:
        if importlib.util.find_spec(tracker) is None:
            raise ConfigError(f"trackers: {tracker} is not installed; run: pip install {tracker}")
    model = resolve_model(config.model.name, config.model.revision, weights=weights)
    changes = {"mix": mix, "resources.device": device, "model": config.model.replace(pin_model(model))}
    if config.lora.from_adapter:
        place = absolute(config.lora.from_adapter)
        adapter = find_adapter(place, model, "--from-adapter")
        if adapter.rank != config.lora.r:
            raise ConfigError(f"--from-adapter {place}: its r is {adapter.rank}; pass --set lora.r={adapter.rank}")
        changes |= {"lora.from_adapter": adapter.place, "lora.target_modules": list(adapter.modules)}
        names = {"alpha": "lora_alpha", "dropout": "lora_dropout", "use_rslora": "use_rslora", "use_dora": "use_dora"}
        changes |= {f"lora.{ours}": adapter.settings[peft] for ours, peft in names.items() if peft in adapter.settings}
    return config.replace(changes), model


def read_mix(config: TrainConfig) -> tuple[Folder, dict[str, Any]]:
    """The mix's folder and manifest. Raises RunError or ConfigError for another folder, an unfinished or edited mix."""
    folder = open_folder(config.mix or "")
    manifest = read_manifest(folder, "mix")
    splits = ("train.parquet", "eval.parquet")
    check_input(folder, manifest, splits)
    for name in splits:
        try:
            with folder.open_input(name) as source:
                wanted = text_columns(chat=config.prompt.format == CHAT)
                absent = set(wanted) - set(pq.read_schema(source).names)
        except pa.ArrowInvalid as error:
            raise ConfigError(f"{folder.at(name)}: not a Parquet file ({error})") from None
        if absent:
            raise ConfigError(
                f"{folder.at(name)}: no column {', '.join(sorted(absent))}; expected the output of `birbal mix`"
            )
    return folder, manifest


def _identity(config: TrainConfig, model: Model, mix_manifest: dict[str, Any]) -> dict[str, Any]:
    """Everything that decides the adapter.

    Paths and resources don't, nor does how a step's sequences are split, or when checkpoints are saved.
    """
    undecisive = {"resources", "output", "mix", "trackers", "model", "gradient_checkpointing", "kernels", "checkpoint"}
    settings = config.model_dump(exclude=undecisive, mode="json")
    settings["model"] = config.model.model_dump(exclude={"name", "revision", "attention"})
    batch = settings["batch"]
    batch["sequences_per_step"] = batch.pop("micro") * batch.pop("accumulation")
    if config.lora.from_adapter:
        settings["lora"]["from_adapter"] = find_adapter(config.lora.from_adapter, model).fingerprint
    return {
        "settings": settings,
        "model_fingerprint": model.fingerprint,
        "mix": {name: mix_manifest["files"][name] for name in ("train.parquet", "eval.parquet")},
        "packages": package_versions(TEXT_PACKAGES),
    }


def _finish(
    config: TrainConfig,
    model: Model,
    run: Run,
    mix_manifest: dict[str, Any],
    packing: dict[str, Packing],
    outcome: dict[str, Any],
    progress: ProgressLine,
) -> TrainResult:
    """Read what the worker left in the run folder, publish the best adapter, and write the manifest."""
    folder = run.folder
    metrics = parse_metrics(folder.read_text(files.METRICS_FILE)) if folder.is_file(files.METRICS_FILE) else []
    if not folder.is_file(files.BEST_FILE):
        reason = next(filter(None, map(why_diverged, metrics)), "the run made no evaluation")
        raise RunError(f"{folder}: no adapter was kept; {reason}")
    best, clock = folder.read_json(files.BEST_FILE), folder.read_json(files.CLOCK_FILE)
    base_loss = next(line["eval_loss"] for line in metrics if "eval_loss" in line and line["step"] == 0)
    if best["eval_loss"] >= base_loss:
        progress.message(f"warning: no adapter beats the base model's eval loss of {base_loss:.4f}")
    manifest = {
        "settings": config.model_dump(mode="json"),
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
            "eased": folder.read_json(files.EASED_FILE) if folder.is_file(files.EASED_FILE) else None,
            "self_check": folder.read_json(files.SELF_CHECK_FILE) if folder.is_file(files.SELF_CHECK_FILE) else None,
            "train_tokens": sum(line["tokens"] for line in metrics if "loss" in line),
            "base_eval_loss": base_loss,
            "best_eval_loss": best["eval_loss"],
            "best_step": best["step"],
            "elapsed_seconds": round(clock["elapsed_seconds"], 3),
            "setup_seconds": round(clock["setup_seconds"], 3),
        },
    }
    with folder.writer(CURVE_FILE) as sink:
        draw_loss_curve(metrics, (best["step"], best["eval_loss"]), sink)
    names = publish_adapter(folder, folder.subfolder(best["folder"]), manifest, mix_manifest, model)
    listed = [*names, CURVE_FILE, files.METRICS_FILE, files.BEST_FILE]
    summary = (
        f"eval loss {base_loss:.4f} → {best['eval_loss']:.4f} at step {best['step']:,} of {outcome['num_steps']:,} "
        f"(ended by {outcome['ended_by']})"
    )
    return TrainResult(folder, run.finish(manifest, listed, summary=summary))
