"""A finished run's adapter folder: its files, model card, upload to the Hub; the loss curve."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import jinja2
import yaml

from birbal_ray.models import ADAPTER_CONFIG, ADAPTER_FOLDER, ADAPTER_WEIGHTS, REFERENCE_FILE, Model
from birbal_ray.ni.prompt import CHAT
from birbal_ray.run import MANIFEST_FILE
from birbal_ray.settings import one_line
from birbal_ray.storage import Folder, RunError

CURVE_FILE, CARD_FILE = "loss_curve.png", "README.md"
TEMPLATE = "card.md.j2"
PUSHED_MANIFEST = "birbal_manifest.json"  # the run's, in a repository on the Hub
ADAPTER_FILES = (CARD_FILE, ADAPTER_CONFIG, ADAPTER_WEIGHTS, REFERENCE_FILE)


def publish_adapter(
    folder: Folder, best: Path, manifest: dict[str, Any], mix_manifest: dict[str, Any], model: Model
) -> list[str]:
    """Copy the best adapter to adapter/ of the run, with its card; the names of its files.

    It names the base model so that others can load it: as on the Hub where it came from there.
    """
    names = []
    for file in sorted(best.iterdir()):
        name = f"{ADAPTER_FOLDER}/{file.name}"
        names.append(name)
        if file.name == ADAPTER_CONFIG:
            settings = json.loads(file.read_text(encoding="utf-8"))
            if model.revision and "/" in model.name and not Path(model.name).exists():
                settings |= {"base_model_name_or_path": model.name, "revision": model.revision}
            folder.write_json(name, settings)
        elif file.name == REFERENCE_FILE:
            reference = json.loads(file.read_text(encoding="utf-8"))
            folder.write_json(name, {**reference, "model": model.name, "model_fingerprint": model.fingerprint})
        elif file.name != CARD_FILE:
            folder.upload(file, name)
    card = adapter_card(manifest, mix_manifest)
    folder.write_bytes(f"{ADAPTER_FOLDER}/{CARD_FILE}", card.encode())
    return sorted({*names, f"{ADAPTER_FOLDER}/{CARD_FILE}"})


def push_to_hub(folder: Folder, names: list[str], repository: str) -> str:
    """Upload files of a finished run, and its manifest, to a model repository on the Hub; its address.

    A repository that does not exist is created, as a private one. Files of adapter/ go to its top. Raises RunError
    where the Hub refuses (no token, no right to write there) or can't be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    try:
        hub = HfApi()
        address = hub.create_repo(repository, private=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="birbal-push-") as temporary:
            operations = []
            for name in [*names, MANIFEST_FILE]:
                file = Path(temporary) / name
                if folder.is_local:
                    file = folder.local / name
                else:
                    folder.download(name, file)
                target = name.removeprefix(f"{ADAPTER_FOLDER}/") if name != MANIFEST_FILE else PUSHED_MANIFEST
                operations.append(CommitOperationAdd(path_in_repo=target, path_or_fileobj=str(file)))
            hub.create_commit(repository, operations, commit_message="Upload from birbal_ray")
        return str(address)
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, ConnectionError) as error:
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
    options: dict[str, Any] = {"undefined": jinja2.StrictUndefined, "trim_blocks": True, "keep_trailing_newline": True}
    template = jinja2.Template(Path(__file__).with_name(TEMPLATE).read_text(encoding="utf-8"), **options)
    on_hub = model["revision"] and "/" in model["name"]
    return template.render(
        {**manifest, "mix": mix},
        head=yaml.safe_dump(head, sort_keys=False).strip(),
        base=repr(model["name" if on_hub else "path"]),
        is_chat=settings["prompt"]["format"] == CHAT,
    )


def merged_card(card: str, dtype: str) -> str:
    """The card of the adapter's model folder after a merge: the same data and training, another way to load it."""
    head, _, rest = card.partition("## Use\n")
    head = head.replace("library_name: peft", "library_name: transformers").replace("# LoRA adapter for", "# Tuned")
    load = "`AutoModelForCausalLM.from_pretrained(FOLDER)` loads it; so do vLLM and `birbal score --model FOLDER`."
    data = rest.partition("## Data\n")[2]
    return f"{head}The adapter is folded into {dtype} weights.\n\n## Use\n\n{load}\n\n## Data\n{data}"


def smoothed(values: list[float]) -> list[float]:
    """Exponential moving average, corrected for its start."""
    weight, average, correction, result = 0.8, 0.0, 0.0, []
    for value in values:
        average, correction = weight * average + (1 - weight) * value, weight * correction + (1 - weight)
        result.append(average / correction)
    return result


def draw_loss_curve(metrics: list[dict[str, Any]], best_step: int | None, sink: Any) -> None:
    """Write a PNG to a binary file: train and eval loss over steps, the best adapter's evaluation marked."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    train = [(line["step"], line["loss"]) for line in metrics if "loss" in line]
    evaluations = [(line["step"], line["eval_loss"]) for line in metrics if "eval_loss" in line]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    if train:
        steps, losses = [step for step, _ in train], [loss for _, loss in train]
        axes.plot(steps, losses, color="#9db8d9", linewidth=1, label="train loss, each step")
        axes.plot(steps, smoothed(losses), color="#1f5fa8", linewidth=1.8, label="train loss, smoothed")
    if evaluations:
        axes.plot(*zip(*evaluations, strict=True), color="#d0661b", marker="o", markersize=4, label="eval loss")
    for step, loss in evaluations:
        if step == best_step:
            axes.plot(step, loss, marker="*", markersize=15, color="#2e8b3d", linestyle="none", label="best adapter")
            axes.annotate(f"{loss:.4f}", (step, loss), textcoords="offset points", xytext=(0, 10), ha="center")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per token (nats)")
    axes.grid(alpha=0.3)
    axes.legend()
    FigureCanvasAgg(figure).print_png(sink)
