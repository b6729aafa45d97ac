"""Merge: an adapter folded into its base model's weights, compared before and after; ready for Ollama and the Hub."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from birbal_ray.manifest import read_input, read_manifest
from birbal_ray.models import ADAPTER_FOLDER, load_tokenizer, load_with_adapter, merge_adapter, resolve_model
from birbal_ray.progress import ProgressLine
from birbal_ray.run import open_run, sigterm_as_interrupt
from birbal_ray.settings import ConfigError
from birbal_ray.storage import Folder, input_folder, open_folder

STEP = "merge"
OWNS = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "README.md", "Modelfile", "work/*")
NEW_TOKENS = 16
MODELFILE = "Modelfile"
# Ollama's template language. The prompt format that the mix was trained in: no preamble, the answer ends with EOS.
BIRBAL_TEMPLATE = (
    "{{ if .System }}### Instruction:\n{{ .System }}\n\n{{ end }}"
    "### Input:\n{{ .Prompt }}\n\n### Response:\n{{ .Response }}"
)


@dataclass(frozen=True, slots=True)
class MergeResult:
    """A model folder and how it compares."""

    folder: Folder
    manifest: dict[str, Any]


def merge(
    run: str,
    output: str,
    *,
    dtype: str = "bfloat16",
    num_prompts: int = 8,
    modelfile: bool = False,
    overwrite: bool = False,
) -> MergeResult:
    """Fold the adapter of a training run into base weights of `dtype`, as a model folder in `output`.

    The comparison holds, over eval prompts of the run's mix: the largest absolute difference of the
    next-token logits, and the fraction of greedy tokens that agree. `modelfile` also writes a Modelfile, for
    `ollama create NAME -f Modelfile`. Raises RunError (no finished run there), ConfigError (another run's folder,
    other base weights than were trained on).
    """
    progress = ProgressLine()
    trained = read_manifest(run, "train")
    model = resolve_model(
        trained["model"]["name"], trained["model"]["revision"] if "/" in trained["model"]["name"] else None
    )
    if trained["identity"]["model_fingerprint"] != model.fingerprint:
        raise ConfigError(
            f"--run {run}: trained on {trained['model']['name']} with other weights than {model.path} holds now; "
            "an adapter fits no others: put them back there"
        )
    identity = {
        "train": trained["identity_hash"],
        "best_step": trained["result"]["best_step"],
        "dtype": dtype,
        "modelfile": modelfile,
        "model_fingerprint": model.fingerprint,
    }
    with (
        sigterm_as_interrupt(),
        open_run(output, STEP, identity, owns=OWNS, overwrite=overwrite, inputs=[run, str(model.path)]) as merging,
    ):
        folder = merging.folder
        if merging.manifest:
            progress.message(f"{folder} is up to date; nothing to do")
            return MergeResult(folder, merging.manifest)
        questions = _questions(trained["settings"]["mix"], num_prompts)
        adapter = input_folder(run, lambda name: name.startswith(f"{ADAPTER_FOLDER}/")) / ADAPTER_FOLDER
        with tempfile.TemporaryDirectory(prefix="work", dir=folder.local if folder.is_local else None) as name:
            working = Path(name) / "model"
            comparison = _merge(model.path, adapter, working, dtype, questions, progress)
            if modelfile:
                (working / MODELFILE).write_text(ollama_modelfile(working), encoding="utf-8")
            files = sorted(file.name for file in working.iterdir())
            for file in files:
                if folder.is_local:
                    (working / file).replace(folder.local / file)
                else:
                    folder.upload(working / file, file)
        manifest = {"model": trained["model"], "dtype": dtype, "comparison": comparison}
        same = f"{comparison['same_tokens_fraction']:.1%} of {comparison['num_prompts']} answers' tokens the same"
        return MergeResult(folder, merging.finish(manifest, files, summary=f"{dtype} weights; {same}"))


def ollama_modelfile(folder: Path) -> str:
    """A Modelfile for `ollama create`: the weights beside it, the prompt format as template, greedy answers."""
    from transformers import AutoTokenizer

    stop = AutoTokenizer.from_pretrained(folder, trust_remote_code=False).eos_token
    lines = ["FROM .", f'TEMPLATE """{BIRBAL_TEMPLATE}"""', "PARAMETER temperature 0"]
    return "\n".join([*lines, f"PARAMETER stop {stop!r}".replace("'", '"'), 'PARAMETER stop "\\n\\n"', ""])


def _questions(mix: str, count: int) -> list[str]:
    folder = open_folder(mix)
    try:
        read_input(folder, read_manifest(folder, "mix"), "eval.parquet")
    except FileNotFoundError:
        raise ConfigError(
            f"{folder.at('eval.parquet')}: missing; the comparison takes its prompts from the mix that was trained on"
        ) from None
    return folder.read_table("eval.parquet", columns=["question"]).slice(0, count)["question"].to_pylist()


def _merge(
    base: Path, adapter: Path, working: Path, dtype: str, questions: list[str], progress: ProgressLine
) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(base)
    progress.update(f"loading {base} as {dtype}")
    model = load_with_adapter(base, adapter, dtype, device)
    progress.update("answers with the adapter")
    before = [_answer(model, tokenizer, question) for question in questions]
    progress.update("merging")
    merge_adapter(model, base, working)
    del model
    # What counts is what was written.
    merged = (
        AutoModelForCausalLM.from_pretrained(working, dtype=getattr(torch, dtype), use_safetensors=True)
        .to(device)
        .eval()
    )
    progress.update("answers of the merged model")
    after = [_answer(merged, tokenizer, question) for question in questions]
    progress.close()
    tokens = [
        (a, b) for (_, one), (_, other) in zip(before, after, strict=True) for a, b in zip(one, other, strict=False)
    ]
    return {
        "num_prompts": len(questions),
        "same_tokens_fraction": sum(a == b for a, b in tokens) / max(1, len(tokens)),
        "max_logit_difference": max(float((a - b).abs().max()) for (a, _), (b, _) in zip(before, after, strict=True)),
    }


def _answer(model: Any, tokenizer: Any, question: str) -> tuple[Any, list[int]]:
    """(logits of the first answer token, greedy token ids)."""
    import torch

    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = torch.tensor([begin + tokenizer(question, add_special_tokens=False)["input_ids"]], device=model.device)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, -1].float().cpu()
        made = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False
        )
    return logits, made[0, ids.shape[1] :].tolist()
