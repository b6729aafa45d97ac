"""Merge: an adapter folded into its base model's weights, compared before and after."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from birbal_ray.models import load_tokenizer, load_with_adapter, merge_adapter, resolve_model
from birbal_ray.progress import ProgressLine
from birbal_ray.run import (
    MANIFEST_FILE,
    finish_run,
    read_json,
    read_manifest,
    start_run,
    stoppable,
)
from birbal_ray.settings import ConfigError
from birbal_ray.storage import local_copy, run_folder
from birbal_ray.train.checkpoints import NOT_NEEDED

STEP = "merge"
NEW_TOKENS = 16


@dataclass(frozen=True, slots=True)
class MergeResult:
    """A model folder and how it compares."""

    folder: Path
    manifest: dict[str, Any]


def merge(
    run: str,
    output: str,
    *,
    dtype: str = "bfloat16",
    num_prompts: int = 8,
    overwrite: bool = False,
    progress: ProgressLine | None = None,
) -> MergeResult:
    """Fold the adapter of a training run into base weights of `dtype`, as a model folder in `output`.

    The comparison holds, over eval prompts of the run's mix: the largest absolute difference of the
    next-token logits, and the fraction of greedy tokens that agree. Raises RunError (no finished
    run there), ConfigError (another run's folder, other base weights than were trained on).
    """
    progress = progress or ProgressLine()
    here = local_copy(run, NOT_NEEDED)
    trained = read_manifest(here, "train")
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
        "model_fingerprint": model.fingerprint,
    }
    with run_folder(output) as folder, stoppable():
        resumed = start_run(folder, STEP, identity, overwrite=overwrite)
        if resumed and (folder / MANIFEST_FILE).exists():
            progress.message(f"{folder} is up to date; nothing to do")
            return MergeResult(folder, read_json(folder / MANIFEST_FILE))
        started = time.monotonic()
        questions = _questions(local_copy(trained["settings"]["mix"]), num_prompts)
        comparison = _merge(model.path, here / "adapter", folder, dtype, questions, progress)
        finish_run(
            folder,
            {
                "model": trained["model"],
                "dtype": dtype,
                "comparison": comparison,
                "wall_seconds": round(time.monotonic() - started, 3),
            },
        )
        return MergeResult(folder, read_json(folder / MANIFEST_FILE))


def _questions(mix: Path, count: int) -> list[str]:
    file = mix / "eval.parquet"
    if not file.exists():
        raise ConfigError(f"{file}: missing; the comparison takes its prompts from the mix that was trained on")
    return pq.read_table(file, columns=["question"]).slice(0, count)["question"].to_pylist()


def _merge(
    base: Path, adapter: Path, folder: Path, dtype: str, questions: list[str], progress: ProgressLine
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
    temporary = folder / ".work"
    merge_adapter(model, base, temporary)
    del model
    # What counts is what was written.
    merged = (
        AutoModelForCausalLM.from_pretrained(temporary, dtype=getattr(torch, dtype), use_safetensors=True)
        .to(device)
        .eval()
    )
    progress.update("answers of the merged model")
    after = [_answer(merged, tokenizer, question) for question in questions]
    for file in temporary.iterdir():
        file.replace(folder / file.name)
    temporary.rmdir()
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
