"""`birbal merge` on a model of two layers: what was written answers as the adapter did."""

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from birbal_ray.cli.main import main
from birbal_ray.evaluate import run as evaluate_run
from birbal_ray.models import load_tokenizer, read_template, resolve_model
from birbal_ray.ni.prompt import render_prompt
from birbal_ray.progress import ProgressLine
from birbal_ray.run import MANIFEST_FILE, Step, open_run
from birbal_ray.score.config import ScoreConfig
from birbal_ray.score.engine import Agreement
from birbal_ray.settings import ConfigError
from birbal_ray.storage import RunError, open_folder, read_json, write_json
from birbal_ray.train import merge as step
from birbal_ray.train.card import merged_card
from birbal_ray.train.merge import ollama_modelfile
from tests.fixtures.chat_templates import SPECIAL_END, SYSTEM_TURN


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory):
    """A training run with an adapter that changes every layer."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("train")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    identity = {"model_fingerprint": resolve_model(str(tiny_model)).fingerprint}
    manifest = {
        "model": {"name": str(tiny_model), "revision": None, "path": str(tiny_model)},
        "settings": {"prompt": {"format": "birbal", "chat_template_arguments": {}}},
        "result": {"best_step": 4},
    }
    with open_run(folder, Step("train", ["adapter/*"]), identity) as run:
        model.save_pretrained(folder / "adapter")
        prompts = [[1, 5, 9, 7], [1, 8, 8], [1, 30, 31, 32, 33], [1, 12]]
        write_json(folder / "adapter" / "reference.json", {"prompts": [{"token_ids": ids} for ids in prompts]})
        run.finish(manifest, [name for name in run.folder.files() if name.startswith("adapter/")], summary="")
    return folder


def merge(run, output, *arguments):
    """Without vLLM: it takes no heads as small as this model's."""
    command = ["merge", "--run", run, "--output", output, "--no-engine", *arguments]
    return CliRunner().invoke(main, [str(argument) for argument in command])


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.1), ("float32", 1e-4)])
def test_the_merged_model_is_base_and_adapter(trained, tiny_model, tmp_path, dtype, tolerance):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    arguments = ("--dtype", dtype)
    result = merge(trained, tmp_path / "merged", *arguments, "--format", "json")
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)
    assert row["num_prompts"] == 4
    assert row["max_logit_difference"] < tolerance
    if dtype == "float32":  # rounded to bfloat16, random weights have near-ties in every answer
        assert row["same_tokens_fraction"] > 0.9
    assert read_json(tmp_path / "merged" / MANIFEST_FILE)["dtype"] == dtype

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert merged.dtype == getattr(torch, dtype)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    ids = AutoTokenizer.from_pretrained(tmp_path / "merged")("he said", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        plain = base(ids).logits
        expected = PeftModel.from_pretrained(base, trained / "adapter")(ids).logits
        found = merged(ids).logits.float()
    assert (found - expected).abs().max() < tolerance
    assert (expected - plain).abs().max() > 3 * tolerance, "the adapter does something"

    again = merge(trained, tmp_path / "merged", *arguments)
    assert "up to date; nothing to do" in again.stderr


def test_an_engine_is_checked_on_the_weights_that_it_loads(trained, tiny_model, tmp_path):
    """Training measured the adapter on 4-bit weights, which may be further from these than the adapter moves them."""
    import torch
    from transformers import AutoModelForCausalLM

    four_bits = {"next_token_ids": [7, 8], "adapter_log_probs": [-1.0, -2.0], "base_log_probs": [-9.0, -9.0]}
    prompts = [{"token_ids": ids, **four_bits} for ids in ([1, 5, 9, 7], [1, 8, 8])]
    adapter = shutil.copytree(trained / "adapter", tmp_path / "adapter")
    write_json(adapter / "reference.json", {"prompts": prompts})
    scoring = ScoreConfig(engine={"device": "cpu"})
    setup = SimpleNamespace(
        scoring=scoring,
        model=resolve_model(str(tiny_model)),
        scoring_of=lambda path: scoring.replace({"model.name": path}),
    )
    one = SimpleNamespace(kind=evaluate_run.ADAPTER, name="mine", path=str(adapter), fingerprint="a")
    with evaluate_run._model_of(setup, [one], open_folder(tmp_path), ProgressLine()) as (config, _):
        found = read_json(Path(config.model.name) / "reference.json")["prompts"]
        folded = AutoModelForCausalLM.from_pretrained(config.model.name, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    for prompt, asked in zip(found, prompts, strict=True):
        assert prompt["token_ids"] == asked["token_ids"]
        ids, choices = torch.tensor([prompt["token_ids"]]), torch.tensor(prompt["next_token_ids"])
        for model, name in ((folded, "adapter_log_probs"), (base, "base_log_probs")):
            with torch.inference_mode():
                expected = model(input_ids=ids).logits[0, -1].log_softmax(-1)[choices]
            assert prompt[name] == pytest.approx(expected.tolist(), abs=1e-4)


def test_other_base_weights_than_were_trained_on_are_refused(trained, tmp_path):
    other = tmp_path / "train"
    other.mkdir()
    manifest = read_json(trained / MANIFEST_FILE)
    write_json(other / MANIFEST_FILE, manifest | {"identity": {"model_fingerprint": "0" * 64}, "files": {}})
    result = merge(other, tmp_path / "merged")
    assert result.exit_code == 2
    name = manifest["model"]["name"]
    assert f"{other}: trained on {name} with other weights than {name} holds now" in result.stderr
    assert not (tmp_path / "merged").exists()


def test_an_adapter_without_the_prompts_of_its_training_is_refused(trained, tmp_path):
    other = tmp_path / "train"
    shutil.copytree(trained, other)
    manifest = read_json(other / MANIFEST_FILE)
    del manifest["files"]["adapter/reference.json"]
    write_json(other / MANIFEST_FILE, manifest)
    (other / "adapter" / "reference.json").unlink()
    result = merge(other, tmp_path / "merged")
    assert result.exit_code == 1
    assert "adapter: no reference.json, whose prompts the merged model is compared on; put" in result.stderr


def test_a_modelfile_for_ollama_holds_the_prompt_format(trained, tmp_path):
    result = merge(trained, tmp_path / "merged", "--modelfile")
    assert result.exit_code == 0, result.output
    text = (tmp_path / "merged" / "Modelfile").read_text()
    planned = merge(trained, tmp_path / "other", "--modelfile", "--dry-run", "--format", "json")
    listed = {row["file"].partition(",")[0] for row in json.loads(planned.stdout)}
    assert listed - {"birbal_manifest.json"} == set(read_json(tmp_path / "merged" / MANIFEST_FILE)["files"])
    assert not (tmp_path / "other").exists()
    assert text.startswith("FROM .\n")
    assert "### Instruction:\n{{ .System }}\n\n{{ end }}### Input:\n{{ .Prompt }}\n\n### Response:\n" in text
    assert 'PARAMETER stop "</s>"' in text
    assert "Modelfile" in read_json(tmp_path / "merged" / MANIFEST_FILE)["files"]


@pytest.mark.parametrize(
    ("template", "arguments", "expected"),
    [
        (
            SYSTEM_TURN,
            {"enable_thinking": False},
            "{{ if .System }}<|start|>system\n{{ .System }}<|stop|>\n{{ end }}<|start|>user\n{{ .Prompt }}<|stop|>\n"
            "<|start|>assistant\n<think>\n\n</think>\n\n{{ .Response }}<|stop|>",
        ),
        (
            SPECIAL_END,  # its BOS is left out: Ollama adds it
            {},
            "{{ if .System }}[INST] {{ .System }}\n---\n{{ else }}[INST] {{ end }}{{ .Prompt }} [/INST]"
            "{{ .Response }}</s>",
        ),
    ],
)
def test_a_modelfile_for_a_chat_run_holds_its_template(tiny_model, template, arguments, expected):
    """Filled in as Ollama does it, the template gives what `render_prompt` gives."""
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.chat_template = template
    chat = read_template(tokenizer, "chat", arguments)
    text = ollama_modelfile(tokenizer, chat)
    found = text.partition('TEMPLATE """')[2].partition('"""')[0]
    assert found == expected
    before, inside, after = re.split(r"\{\{ if \.System \}\}|\{\{ end \}\}", found)
    given, _, alone = inside.partition("{{ else }}")
    for system in ("Count.", ""):
        kept = before + (given if system else alone) + after
        filled = kept.replace("{{ .System }}", system).replace("{{ .Prompt }}", "one two").partition("{{ .Resp")[0]
        assert filled == render_prompt(system, (), "one two", chat).removeprefix("<s>")
    assert f'PARAMETER stop "{chat.end_of_turn}"' in text and 'PARAMETER stop "\\n\\n"' not in text


def test_a_chat_template_that_ollama_cannot_say_is_refused(tiny_model):
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.chat_template = SYSTEM_TURN.replace(
        "{{ message.content }}", "{{ message.content }} {{ message.content }}"
    )
    with pytest.raises(ConfigError, match="--modelfile: Ollama's template can't say what this chat template does"):
        ollama_modelfile(tokenizer, read_template(tokenizer, "chat", {}))


def test_the_card_of_a_merged_model_says_how_to_load_it():
    card = "---\nlibrary_name: peft\n---\n\n# LoRA adapter for m\n\nold\n\n## Use\n\nPeftModel\n\n## Data\n\nrows\n"
    merged = merged_card(card, "bfloat16")
    assert "library_name: transformers" in merged and "# Tuned m" in merged and merged.endswith("## Data\n\nrows\n")
    assert "PeftModel" not in merged and "The adapter is folded into bfloat16 weights." in merged


@pytest.fixture
def compare(monkeypatch, tmp_path):
    """compare(what vLLM would say, or an error) → what `birbal merge` makes of it; without the other process."""

    def run(answer):
        def ask(*arguments):
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr(step, "ask_vllm", ask)
        monkeypatch.setattr(
            "concurrent.futures.ProcessPoolExecutor", lambda number, context: ThreadPoolExecutor(number)
        )
        return step._compare_engine(tmp_path, "float32", {"prompts": []}, tmp_path / "log", ProgressLine())

    return run


def test_vllm_on_the_merged_model_must_change_as_peft_does(compare):
    assert compare(Agreement(2.0, 0.98, 0.01))["engine_applied_fraction"] == 0.98
    with pytest.raises(RunError, match=r"vLLM on the merged model: .* up to 2\.00 nats, .* shows 1% of that"):
        compare(Agreement(2.0, 0.01, 2.0))


def test_a_model_that_vllm_cannot_load_is_said_and_kept(compare, capsys):
    assert compare(RuntimeError("no room on the card")) == {}
    said = capsys.readouterr().err
    assert "warning: vLLM did not load the merged model, so nothing compares it (RuntimeError: no room" in said
