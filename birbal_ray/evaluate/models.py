"""Who is compared: the base model, its adapters, merged models."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from birbal_ray.models import Model, resolve_model
from birbal_ray.run import MANIFEST_FILE, read_json
from birbal_ray.settings import ConfigError
from birbal_ray.storage import absolute, child, is_url, local_copy

BASE, ADAPTER, MERGED = "base", "adapter", "merged"
ADAPTER_FOLDER, ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter", "adapter_config.json", "adapter_model.safetensors"
NOT_NEEDED = ("checkpoints", "best", "packed", "tensorboard")  # of a training run, to use its adapter
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*$")


@dataclass(frozen=True, slots=True)
class EvaluatedModel:
    """A model to evaluate. `path`: the adapter's or model's folder; `fingerprint`: what its weights are.

    `origin`: what names it on any node: its URL, where it has one, else `path`.
    """

    name: str
    kind: str
    path: str
    fingerprint: str
    rank: int | None = None  # of an adapter
    mix: str | None = None  # that an adapter was trained on, where its run says so
    origin: str = ""
    mix_identity: str | None = None  # identity hash of that mix


def resolve_models(model: Model, adapters: Sequence[str], merged: Sequence[str]) -> list[EvaluatedModel]:
    """The base model first, then adapters, then merged models; each name once.

    An adapter is a PEFT folder or an output folder of `birbal train`; `NAME=DIR` names it, else its
    folder does. Raises ConfigError for a folder that holds no LoRA adapter, one trained on another
    base model, or a name given twice; ModelError for a merged model that can't be had.
    """
    found = [EvaluatedModel(BASE, BASE, str(model.path), model.fingerprint, origin=str(model.path))]
    found += [_adapter(*_named(given), model) for given in adapters]
    for given in merged:
        name, path = _named(given)
        other = resolve_model(path)
        origin = absolute(path) if is_url(path) else str(other.path)
        found.append(EvaluatedModel(name or Path(path).name, MERGED, str(other.path), other.fingerprint, origin=origin))
    names = [one.name for one in found]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two models are named {name!r}; name them: --adapter NAME=DIR, --merged NAME=DIR")
        if not _NAME.match(name):
            raise ConfigError(f"model {name!r}: a name takes letters, digits, '.', '_' and '-'; give NAME=DIR")
    return found


def _named(given: str) -> tuple[str | None, str]:
    name, equals, path = given.partition("=")
    return (name, path) if equals and "/" not in name else (None, given)


def _adapter(name: str | None, path: str, model: Model) -> EvaluatedModel:
    folder = local_copy(path, NOT_NEEDED)
    if not folder.is_dir():
        raise ConfigError(f"--adapter {path}: no such folder")
    origin = absolute(path) if is_url(path) else ""
    if not (folder / ADAPTER_CONFIG).exists() and (folder / ADAPTER_FOLDER).is_dir():
        folder = folder / ADAPTER_FOLDER
        origin = origin and child(origin, ADAPTER_FOLDER)
    for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / file).exists():
            raise ConfigError(
                f"--adapter {path}: no {file}; expected a LoRA adapter saved by PEFT as safetensors, "
                "or an output folder of `birbal train`"
            )
    folder = folder.resolve()
    settings = read_json(folder / ADAPTER_CONFIG)
    if settings.get("peft_type") != "LORA" or not isinstance(settings.get("r"), int):
        raise ConfigError(f"{folder / ADAPTER_CONFIG}: peft_type is {settings.get('peft_type')!r}, expected LORA")
    run = folder.parent / MANIFEST_FILE
    manifest = read_json(run) if folder.name == ADAPTER_FOLDER and run.exists() else {}
    trained = manifest if manifest.get("step") == "train" else {}
    base = trained.get("identity", {}).get("model_fingerprint")
    if base is not None and base != model.fingerprint:
        raise ConfigError(
            f"--adapter {path}: trained on {trained['model']['name']} with other weights than --model {model.name}"
        )
    mix = trained.get("mix", {})
    return EvaluatedModel(
        name or (folder.parent.name if folder.name == ADAPTER_FOLDER else folder.name),
        ADAPTER,
        str(folder),
        adapter_fingerprint(folder),
        settings["r"],
        mix.get("path"),
        origin or str(folder),
        mix.get("identity_hash"),
    )


def adapter_fingerprint(folder: Path) -> str:
    """SHA-256 of an adapter's weights and settings; the folder holds both."""
    digest = hashlib.sha256()
    for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
        with (folder / name).open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
