"""A finished run's adapter folder: its files, model card, upload to the Hub; the loss curve."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from birbal_ray.adapters import ADAPTER_CONFIG, ADAPTER_FOLDER, ADAPTER_WEIGHTS
from birbal_ray.manifest import fill_template
from birbal_ray.models import Model
from birbal_ray.ni.prompt import CHAT
from birbal_ray.run import MANIFEST_FILE
from birbal_ray.schemas import REFERENCE_FILE
from birbal_ray.settings import one_line
from birbal_ray.storage import CHUNK_BYTES, Folder, RunError

CURVE_FILE, CARD_FILE = "loss_curve.png", "README.md"
# One meaning each in every figure, also the report's; told apart with every common colour blindness (Okabe and Ito).
INK, MID, EVAL_COLOUR, ADAPTER_COLOUR = "#22272e", "#8b929a", "#b5559c", "#1b9e77"
Lines = Sequence[Mapping[str, Any]]  # of metrics.jsonl
PUSHED_MANIFEST = "birbal_manifest.json"  # the run's, in a repository on the Hub
ADAPTER_FILES = (CARD_FILE, ADAPTER_CONFIG, ADAPTER_WEIGHTS, REFERENCE_FILE)


def publish_adapter(
    folder: Folder, best: Folder, manifest: dict[str, Any], mix_manifest: dict[str, Any], model: Model
) -> list[str]:
    """Copy the best adapter to adapter/ of the run, with its card; the names of its files.

    It names the base model so that others can load it: as on the Hub where it came from there. Raises RunError for a
    folder without weights.
    """
    files = best.files()
    if ADAPTER_WEIGHTS not in files:
        raise RunError(
            f"{best}: no {ADAPTER_WEIGHTS}, although {folder.at('best.json')} names this folder's adapter as the best; "
            "put it back and run the same command again (the latest checkpoint holds an adapter, too)"
        )
    names = [f"{ADAPTER_FOLDER}/{CARD_FILE}"]
    for file in files.keys() - {CARD_FILE}:
        name = f"{ADAPTER_FOLDER}/{file}"
        names.append(name)
        if file == ADAPTER_CONFIG:
            settings = best.read_json(file)
            if model.revision and "/" in model.name and not Path(model.name).exists():
                settings |= {"base_model_name_or_path": model.name, "revision": model.revision}
            folder.write_json(name, settings)
        elif file == REFERENCE_FILE:
            own = {"model": model.name, "model_fingerprint": model.fingerprint}
            folder.write_json(name, best.read_json(file) | own)
        else:
            with best.open_input(file) as source, folder.writer(name) as sink:
                shutil.copyfileobj(source, sink, CHUNK_BYTES)
    folder.write_bytes(f"{ADAPTER_FOLDER}/{CARD_FILE}", adapter_card(manifest, mix_manifest).encode())
    return sorted(names)


def push_to_hub(folder: Folder, names: list[str], repository: str) -> str:
    """Upload files of a finished run, and its manifest, to a model repository on the Hub; its address.

    A repository that does not exist is created, as a private one. Files of adapter/ go to its top. Raises RunError
    where the Hub refuses (no token, no right to write there) or can't be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalTokenNotFoundError

    try:
        hub = HfApi()
        address = hub.create_repo(repository, private=True, exist_ok=True)
        targets = {name: name.removeprefix(f"{ADAPTER_FOLDER}/") for name in names} | {MANIFEST_FILE: PUSHED_MANIFEST}
        with tempfile.TemporaryDirectory(prefix="birbal-push-") as temporary:  # a merged model is not kept twice
            here = folder.local if folder.is_local else Path(temporary)
            for name in () if folder.is_local else targets:
                folder.download(name, here / name)
            operations = [CommitOperationAdd(target, str(here / name)) for name, target in targets.items()]
            hub.create_commit(repository, operations, commit_message="Upload from birbal_ray")
        return str(address)
    except (HTTPError, HFValidationError, LocalTokenNotFoundError, ConnectionError) as error:
        raise RunError(
            f"--push {repository}: the Hub did not take it ({one_line(error)[:300]}); set HF_TOKEN to a token that may "
            f"write there. The files are kept in {folder}, and the same command tries again"
        ) from None


def adapter_card(manifest: dict[str, Any], mix: dict[str, Any]) -> str:
    """Markdown with the Hub's YAML head: base model, data, settings, losses, how to load; from two manifests."""
    model, settings = manifest["model"], manifest["settings"]
    head = {
        "base_model": model["name"],
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "qlora", "sft", "trl", "birbal_ray"],
    }
    on_hub = model["revision"] and "/" in model["name"]
    values = {
        "mix": mix,
        "head": yaml.safe_dump(head, sort_keys=False).strip(),
        "base": repr(model["name" if on_hub else "path"]),
        "is_chat": settings["prompt"]["format"] == CHAT,
    }
    return fill_template(Path(__file__).with_name("card.md.j2"), {**manifest, **values})


def merged_card(card: str, dtype: str) -> str:
    """The card of the adapter's model folder after a merge: the same data and training, another way to load it."""
    head, _, rest = card.partition("## Use\n")
    head = head.replace("library_name: peft", "library_name: transformers").replace("# LoRA adapter for", "# Tuned")
    load = "`AutoModelForCausalLM.from_pretrained(FOLDER)` loads it; so do vLLM and `birbal score --model FOLDER`."
    data = rest.partition("## Data\n")[2]
    return f"{head}The adapter is folded into {dtype} weights.\n\n## Use\n\n{load}\n\n## Data\n{data}"


def plot_losses(axes: Any, steps: Lines, evaluations: Lines, best: tuple[int, float]) -> None:
    """Train and eval loss; `best`: step and eval loss of the best adapter."""
    at, losses = [line["step"] for line in steps], [line["loss"] for line in steps]
    evaluated = [line["step"] for line in evaluations], [line["eval_loss"] for line in evaluations]
    axes.plot(at, losses, color=MID, linewidth=0.8, label="train")
    axes.plot(*evaluated, color=EVAL_COLOUR, marker="o", markersize=4, linewidth=1.4, label="eval")
    axes.plot(*best, color=ADAPTER_COLOUR, marker="*", markersize=14, linestyle="none", label="best adapter")
    axes.set_ylabel("loss (nats a token)")


def draw_loss_curve(metrics: Lines, best: tuple[int, float], sink: Any) -> None:
    """Write a PNG to a binary file: `plot_losses` of the lines of metrics.jsonl."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    steps, evaluations = ([line for line in metrics if name in line] for name in ("loss", "eval_loss"))
    plot_losses(axes, steps, evaluations, best)
    axes.annotate(f"{best[1]:.4f}", best, textcoords="offset points", xytext=(0, 10), ha="center")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("optimizer step")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(sink, format="png")
