"""A LoRA adapter on disk: where it is, whether it fits a model, the model with it on top or folded in."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from birbal_ray.models import Model, load_tokenizer, quiet_libraries, read_json_object, read_shapes
from birbal_ray.schemas import MANIFEST_FILE, RUN_FILE
from birbal_ray.settings import ConfigError
from birbal_ray.storage import absolute, input_folder, is_url, join, read_json

ADAPTER_FOLDER, ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter", "adapter_config.json", "adapter_model.safetensors"
CHOICES = 20  # next tokens that a reference holds of each prompt


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """A LoRA adapter on disk. `place` names it on any node: its URL, else its path; `run`: its training's manifest."""

    name: str
    path: Path
    place: str
    rank: int
    fingerprint: str
    run: dict[str, Any]
    settings: dict[str, Any]  # of its adapter_config.json
    modules: tuple[str, ...]  # names of the adapted modules inside a layer (q_proj), sorted


def find_adapter(given: str, model: Model, option: str = "--adapter") -> AdapterFolder:
    """The adapter in a PEFT folder or an output folder of `birbal train` (or its URL), which must be one of `model`.

    Raises ConfigError, which names the `option` that gave it, for a folder that holds none, and for one that was made
    for another model: trained here on other weights, naming another Hub id, or of other modules or shapes, which
    engines serve as the base model or die of. Raises ModelError or RunError for damaged files.
    """
    path = input_folder(given, lambda name: "/" not in name or name.startswith(f"{ADAPTER_FOLDER}/"))
    if not path.is_dir():
        raise ConfigError(f"{option} {given}: no such folder")
    place = absolute(given) if is_url(given) else ""
    if not (path / ADAPTER_CONFIG).exists() and (path / ADAPTER_FOLDER).is_dir():
        path, place = path / ADAPTER_FOLDER, place and join(place, ADAPTER_FOLDER)
    for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (path / file).exists():
            raise ConfigError(
                f"{option} {given}: no {file}; expected a LoRA adapter saved by PEFT as safetensors, "
                "or an output folder of `birbal train`"
            )
    path = path.resolve()
    settings = read_json_object(path / ADAPTER_CONFIG, f"{option} {given}")
    if settings.get("peft_type") != "LORA" or not isinstance(settings.get("r"), int):
        raise ConfigError(f"{path / ADAPTER_CONFIG}: peft_type is {settings.get('peft_type')!r}, expected LORA")
    manifest = path.parent / MANIFEST_FILE
    if path.name == ADAPTER_FOLDER and not manifest.exists() and (path.parent / RUN_FILE).exists():
        raise ConfigError(f"{option} {given}: of an unfinished `birbal train` run; rerun its command to finish it")
    found = read_json(manifest) if path.name == ADAPTER_FOLDER and manifest.exists() else None
    run = found if isinstance(found, dict) and found.get("step") == "train" else {}
    base = run.get("identity", {}).get("model_fingerprint")
    if base is not None and model.fingerprint and base != model.fingerprint:
        raise ConfigError(
            f"{option} {given}: trained on {run['model']['name']} with other weights than --model {model.name}"
        )
    named = str(settings.get("base_model_name_or_path") or "")
    of_the_hub = all(len(one.split("/")) == 2 and not Path(one).exists() for one in (named, model.name))
    other = f"it names {named}" if base is None and of_the_hub and named.lower() != model.name.lower() else None
    if other := other or _misfit(path / ADAPTER_WEIGHTS, model):
        raise ConfigError(f"{option} {given}: made for another model than {model.name}: {other}")
    name = path.parent.name if path.name == ADAPTER_FOLDER else path.name
    tensors = read_shapes(path / ADAPTER_WEIGHTS, str(path))  # an embedding's are named lora_embedding_A
    modules = tuple(sorted({_module(tensor).rpartition(".")[2] for tensor in tensors if ".lora_" in tensor}))
    fingerprint = adapter_fingerprint(path)
    return AdapterFolder(name, path, place or str(path), settings["r"], fingerprint, run, settings, modules)


def adapter_fingerprint(folder: Path) -> str:
    """SHA-256 of an adapter's weights and settings; the folder holds both."""
    digest = hashlib.sha256()
    for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
        with (folder / name).open("rb") as file:
            hashlib.file_digest(file, lambda: digest)  # goes on with it
    return digest.hexdigest()


def _lora_shapes(weights: Path) -> dict[str, list[int]]:
    """Shapes of an adapter's matrices, by the tensor's name; reads the file's header only."""
    shapes = read_shapes(weights, str(weights.parent))
    return {name: shape for name, shape in shapes.items() if re.search(r"\.lora_[AB]\.weight$", name)}


def _module(tensor: str) -> str:
    """The model's module that an adapter's matrix belongs to."""
    return tensor.removeprefix("base_model.model.").rpartition(".lora_")[0]


def _misfit(weights: Path, model: Model) -> str | None:
    """Why an adapter's matrices don't fit the model's, or None. Reads the headers of the safetensors only."""
    lora = _lora_shapes(weights)
    tensors: dict[str, list[int]] = {}
    for file in model.path.glob("*.safetensors"):
        tensors |= read_shapes(file, str(model.path))
    modules = {name.rpartition(".")[0] for name in tensors}
    adapted = {name: _module(name) for name in lora}
    if lora and modules and modules.isdisjoint(adapted.values()):
        return f"the model has none of its modules (first: {next(iter(adapted.values()))})"
    for name, module in adapted.items():
        shape = tensors.get(f"{module}.weight", [])  # quantised weights have other names, or one column
        side = 1 if ".lora_A." in name else 0  # A reads the module's inputs, B writes its outputs
        if len(shape) == 2 and shape[1] > 1 and lora[name][side] != shape[side]:
            kind = "inputs" if side else "outputs"
            return f"{module} has {lora[name][side]} {kind} there, {shape[side]} in the model"
    return None


def load_with_adapter(base: Path, adapter: Path, dtype: str, device: str = "cpu") -> Any:
    """The base model in `dtype` (a torch dtype's name) with the adapter on top, for inference.

    Never the 4-bit weights that it was trained on: a delta added to them would be rounded away.
    """
    quiet_libraries()
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=getattr(torch, dtype), trust_remote_code=False, use_safetensors=True
    )
    return PeftModel.from_pretrained(model.to(device), adapter).eval()


def reference_prompts(prompts: Sequence[list[int]], adapter: Any, base: Any) -> list[dict[str, Any]]:
    """`prompts` of a reference.json. `adapter`, `base`: float32 logits of the next token, (prompts, vocabulary)."""
    found, chosen = adapter.log_softmax(-1).topk(min(CHOICES, adapter.shape[-1]))
    without = base.log_softmax(-1).gather(-1, chosen)
    keys = ("token_ids", "next_token_ids", "adapter_log_probs", "base_log_probs")
    rows = zip(prompts, chosen.tolist(), found.tolist(), without.tolist(), strict=True)
    return [dict(zip(keys, row, strict=True)) for row in rows]


def measure_reference(model: Any, prompts: Sequence[list[int]]) -> dict[str, Any]:
    """A reference.json of `load_with_adapter`'s model, in its dtype. `prompts`: token ids.

    Training's own was measured on 4-bit weights, whose rounding may hide what a small adapter changes.
    """
    import torch

    def next_token_logits() -> Any:  # float32, (prompts, vocabulary)
        asked = (torch.tensor([ids], device=model.device) for ids in prompts)
        return torch.stack([model(input_ids=ids).logits[0, -1].float().cpu() for ids in asked])

    with torch.inference_mode():
        with_adapter = next_token_logits()
        with model.disable_adapter():
            return {"prompts": reference_prompts(prompts, with_adapter, next_token_logits())}


def merge_adapter(model: Any, base: Path, folder: Path) -> None:
    """Fold the adapter of `load_with_adapter`'s model in; the whole model, tokenizer too, as `folder`.

    The folder appears under its name when it is whole; one that stands there is replaced. The model can't
    be used any more. Raises ValueError when a folded weight is not finite.
    """
    merged = model.merge_and_unload(safe_merge=True)
    temporary = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    merged.save_pretrained(temporary, max_shard_size="5GB", safe_serialization=True)
    load_tokenizer(base).save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
