"""Merge: an adapter folded into its base model's weights, compared before and after; ready for Ollama and the Hub."""

from __future__ import annotations

import concurrent.futures
import importlib.util
import itertools
import multiprocessing
import re
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from birbal_ray.adapters import ADAPTER_FOLDER, load_with_adapter, measure_reference, merge_adapter
from birbal_ray.cluster import log_to
from birbal_ray.manifest import check_input, read_manifest
from birbal_ray.models import TOKENIZER_FILES, Model, load_tokenizer, read_template, resolve_model
from birbal_ray.ni.prompt import STOP, ChatTemplate, render_prompt
from birbal_ray.progress import ProgressLine
from birbal_ray.run import LOG_FOLDER, Step, StepResult, open_run
from birbal_ray.schemas import REFERENCE_FILE
from birbal_ray.score.config import EngineSettings, ResourceSettings
from birbal_ray.score.engine import Agreement, compare_with_peft, why_not_applied
from birbal_ray.settings import ConfigError, one_line
from birbal_ray.storage import RunError, cache_folder, input_folder, open_folder, read_json
from birbal_ray.train.card import CARD_FILE, PUSHED_MANIFEST, merged_card

MODELFILE = "Modelfile"
STEP = Step("merge", ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", CARD_FILE, MODELFILE))
WORKING = ".merging-"
NEW_TOKENS = 16
ENGINE_LOG = f"{LOG_FOLDER}/engine.log"


def merge(
    run: str,
    output: str,
    *,
    dtype: str = "bfloat16",
    modelfile: bool = False,
    engine: bool = True,
    overwrite: bool = False,
) -> StepResult:
    """Fold the adapter of a training run into base weights of `dtype`, as a model folder in `output`.

    The comparison holds, over the prompts that training kept beside the adapter: the largest absolute difference of the
    next-token logits, the fraction of greedy tokens that agree, and, with `engine` and where vLLM can load the model,
    how much of the adapter's change vLLM shows on it. `modelfile` also writes a Modelfile, for `ollama create NAME -f
    Modelfile`.
    Raises RunError (no finished run there; vLLM answers as the base model does), ConfigError (another run's folder,
    other base weights than were trained on, a chat template that Ollama can't write).
    """
    progress = ProgressLine()
    trained, model = _read_run(run)
    text = ollama_modelfile(*_read_prompt_format(trained, model)) if modelfile else ""
    identity = {
        "train": trained["identity_hash"],
        "best_step": trained["result"]["best_step"],
        "dtype": dtype,
        "modelfile": modelfile,
        "model_fingerprint": model.fingerprint,
    }
    inputs = [run, str(model.path)]
    with open_run(output, STEP, identity, inputs=inputs, overwrite=overwrite) as merging:
        folder = merging.folder
        if merging.manifest:
            progress.message(f"{folder} is up to date; nothing to do")
            return StepResult(folder, merging.manifest)
        adapter = input_folder(run, lambda name: name.startswith(f"{ADAPTER_FOLDER}/")) / ADAPTER_FOLDER
        here = open_folder(adapter.parent)
        check_input(here, trained, here.files(ADAPTER_FOLDER))
        if not (adapter / REFERENCE_FILE).is_file():
            raise RunError(
                f"{adapter}: no {REFERENCE_FILE}, whose prompts the merged model is compared on; put the adapter's own "
                "back, or train again"
            )
        prompts = [prompt["token_ids"] for prompt in read_json(adapter / REFERENCE_FILE)["prompts"]]
        if folder.is_local:
            for leftover in folder.local.glob(f"{WORKING}*"):  # of a merge that was killed: a model's size
                shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=WORKING, dir=folder.local if folder.is_local else None) as name:
            working = Path(name) / "model"
            comparison, reference = _merge(model.path, adapter, working, dtype, prompts, progress)
            if engine and importlib.util.find_spec("vllm"):
                progress.update("the merged model's log probabilities by vLLM")
                log = (folder.local if folder.is_local else cache_folder()) / ENGINE_LOG
                comparison |= _compare_engine(working, dtype, reference, log, progress)
            progress.close()
            if text:
                (working / MODELFILE).write_text(text, encoding="utf-8")
            if (card := adapter / CARD_FILE).is_file():
                (working / CARD_FILE).write_text(merged_card(card.read_text(encoding="utf-8"), dtype), encoding="utf-8")
            files = sorted(file.name for file in working.iterdir())
            for file in files:
                if folder.is_local:
                    (working / file).replace(folder.local / file)
                else:
                    folder.upload(working / file, file)
        manifest = {"model": trained["model"], "dtype": dtype, "comparison": comparison}
        same = f"{comparison['same_tokens_fraction']:.1%} of {comparison['num_prompts']} answers' tokens the same"
        return StepResult(folder, merging.finish(manifest, files, summary=f"{dtype} weights; {same}"))


def plan_merge(run: str, *, modelfile: bool = False) -> list[str]:
    """The files that `merge` would make and `--push` upload. Raises as `merge` does, before any weight is loaded."""
    trained, model = _read_run(run)
    files = {"config.json", "generation_config.json", "tokenizer_config.json", PUSHED_MANIFEST, CARD_FILE}
    files |= {name for name in TOKENIZER_FILES if (model.path / name).is_file()}
    if load_tokenizer(model.path).chat_template:
        files.add("chat_template.jinja")
    if modelfile:
        ollama_modelfile(*_read_prompt_format(trained, model))
        files.add(MODELFILE)
    return ["model.safetensors, or shards of it of 5 GB", *sorted(files)]


def _read_run(run: str) -> tuple[dict[str, Any], Model]:
    """(manifest of a finished training, its base model); ConfigError for other weights than were trained on."""
    trained = read_manifest(run, "train")
    name = trained["model"]["name"]
    model = resolve_model(name, trained["model"]["revision"] if "/" in name else None)
    if trained["identity"]["model_fingerprint"] != model.fingerprint:
        raise ConfigError(
            f"--run {run}: trained on {name} with other weights than {model.path} holds now; "
            "an adapter fits no others: put them back there"
        )
    return trained, model


def _read_prompt_format(trained: dict[str, Any], model: Model) -> tuple[Any, ChatTemplate | None]:
    """(tokenizer, the chat template that a run was trained in; None: the published format)."""
    tokenizer = load_tokenizer(model.path)
    prompt = trained["settings"]["prompt"]
    return tokenizer, read_template(tokenizer, prompt["format"], prompt["chat_template_arguments"])


def ollama_modelfile(tokenizer: Any, chat: ChatTemplate | None) -> str:
    """A Modelfile for `ollama create`: the weights beside it, one turn of the prompt format as template, greedy.

    Without a chat template: the published format, in which an answer also ends at a blank line. Raises ConfigError for
    a template that Ollama's can't express.
    """
    ends = [chat.end_of_turn, tokenizer.eos_token] if chat else [tokenizer.eos_token, STOP]
    lines = ["FROM .", f'TEMPLATE """{_ollama_template(chat, tokenizer.bos_token or "")}"""', "PARAMETER temperature 0"]
    quoted = [end.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") for end in dict.fromkeys(ends) if end]
    return "\n".join([*lines, *(f'PARAMETER stop "{end}"' for end in quoted), ""])


def _ollama_template(chat: ChatTemplate | None, begin: str) -> str:
    """The texts around definition and input, found by rendering two marks. Ollama adds the BOS `begin` itself."""
    system, prompt = "BirbalMarkSystem", "BirbalMarkPrompt"
    both, alone = (
        re.split(f"({system}|{prompt})", render_prompt(one, (), prompt, chat, preamble=False).removeprefix(begin))
        for one in (system, "")
    )
    texts_differ = both[1::2] != [system, prompt] or alone[1::2] != [prompt] or both[-1] != alone[-1]
    if texts_differ or re.search(r'\{\{|"""', "".join(both + alone)):
        raise ConfigError(
            "--modelfile: Ollama's template can't say what this chat template does (it repeats or moves a turn's text, "
            "or holds '{{'); merge without it, and write the Modelfile by hand"
        )
    (first, _, between, _, after), otherwise = both, alone[0]
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(otherwise[::-1], between[::-1], strict=False))
    common = "".join(one for one, _ in pairs)[::-1]
    between, otherwise = between.removesuffix(common), otherwise.removesuffix(common)
    end = chat.end_of_turn if chat else ""
    without = "{{ else }}" + otherwise if otherwise else ""
    choice = "{{ if .System }}" + first + "{{ .System }}" + between + without + "{{ end }}"
    return choice + common + "{{ .Prompt }}" + after + "{{ .Response }}" + end


def _merge(
    base: Path, adapter: Path, working: Path, dtype: str, prompts: list[list[int]], progress: ProgressLine
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(how the merged model in `working` compares with PEFT, PEFT's log probabilities as in reference.json)."""
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    progress.update(f"loading {base} as {dtype}")
    model = load_with_adapter(base, adapter, dtype, device)
    progress.update("answers with the adapter")
    before = [_answer(model, ids) for ids in prompts]
    reference = measure_reference(model, prompts)
    progress.update("merging")
    merge_adapter(model, base, working)
    del model
    # What counts is what was written.
    merged = AutoModelForCausalLM.from_pretrained(working, dtype=getattr(torch, dtype), use_safetensors=True)
    merged = merged.to(device).eval()
    progress.update("answers of the merged model")
    after = [_answer(merged, ids) for ids in prompts]
    del merged
    if device == "cuda":
        torch.cuda.empty_cache()  # for the engine
    same = [
        a == b for (_, one), (_, other) in zip(before, after, strict=True) for a, b in zip(one, other, strict=False)
    ]
    return {
        "num_prompts": len(prompts),
        "same_tokens_fraction": sum(same) / max(1, len(same)),
        "max_logit_difference": max(float((a - b).abs().max()) for (a, _), (b, _) in zip(before, after, strict=True)),
    }, reference


def _answer(model: Any, ids: list[int], num_tokens: int = NEW_TOKENS) -> tuple[Any, list[int]]:
    """(float32 logits of the first answer token, (vocabulary,) on the CPU; greedy token ids)."""
    import torch

    asked = torch.tensor([ids], device=model.device)
    options = {"attention_mask": torch.ones_like(asked), "max_new_tokens": num_tokens, "do_sample": False}
    found = model.generate(input_ids=asked, output_logits=True, return_dict_in_generate=True, **options)
    return found.logits[0][0].float().cpu(), found.sequences[0, len(ids) :].tolist()


def _compare_engine(
    folder: Path, dtype: str, reference: dict[str, Any], log: Path, progress: ProgressLine
) -> dict[str, float]:
    """vLLM on the merged model against PEFT, in a process of its own. Raises RunError if it answers as the base does.

    Where vLLM can't load the model (a card that is too small for it, say), that is said, and nothing compared.
    """
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            found = pool.submit(ask_vllm, folder, dtype, reference, log).result()
        except Exception as error:  # whatever vLLM raises, or its process died of: the merge itself is good
            why = f"{type(error).__name__}: {one_line(error)[:200]}; log: {log}"
            progress.message(f"warning: vLLM did not load the merged model, so nothing compares it ({why})")
            return {}
    if reason := why_not_applied(found):
        raise RunError(f"vLLM on the merged model: {reason}")
    return {f"engine_{name}": value for name, value in asdict(found).items()}


def ask_vllm(folder: Path, dtype: str, reference: dict[str, Any], log: Path) -> Agreement:
    """`compare_with_peft` by vLLM in this process, whose output goes to `log`."""
    log_to(log)
    import torch

    from birbal_ray.score.engine import VllmEngine

    longest = max(len(prompt["token_ids"]) for prompt in reference["prompts"])
    device = "gpu" if torch.cuda.is_available() else "cpu"
    settings = EngineSettings(device=device, dtype=dtype, max_model_len=max(16, longest + 2))
    return compare_with_peft(VllmEngine(folder, settings, ResourceSettings(kv_cache_gib=1)), reference)
