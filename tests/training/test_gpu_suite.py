"""The suite for a card's owner, as far as it runs without one: a small model in its place, the CPU in the card's."""

import json
import shutil

import pytest

from birbal_ray.train.data import prepare
from tests.conftest import make_mix
from tests.fixtures.random_model import write_random_model
from tests.gpu import test_full_recipe as suite

SMALL = {"batch.sequence_length": 128, "lora.r": 4, "lora.alpha": 8, "max_steps": 2, "evaluation.num_rows": 4}


@pytest.fixture
def mistral(tiny_model, tmp_path):
    from transformers import AutoConfig, MistralConfig

    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    vocabulary = AutoConfig.from_pretrained(tiny_model).vocab_size
    small = {**suite.MISTRAL_7B, **shape, "num_key_value_heads": 2, "vocab_size": vocabulary, "sliding_window": 48}
    folder = tmp_path / "mistral"
    folder.mkdir()
    write_random_model(folder, MistralConfig(**small))
    for file in tiny_model.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture
def folder(mistral, tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    real = suite.recipe
    monkeypatch.setattr(suite, "recipe", lambda model, **changes: real(model, **{**SMALL, **changes}))
    monkeypatch.setattr(suite, "KERNEL", "per-sample sdpa")
    (tmp_path / "mix").mkdir()
    make_mix(tmp_path / "mix", 60, 8)
    (tmp_path / "run").mkdir()
    config = suite.recipe(mistral, epochs=1)
    prepare(tmp_path / "mix", tmp_path / "run" / "packed", AutoTokenizer.from_pretrained(mistral), config)
    return tmp_path / "run"


def test_its_self_check_and_its_speed_are_recorded(mistral, folder):
    results = {}
    suite.test_the_self_check_passes_on_the_card("cpu", results, mistral, folder)
    assert results["self-check"]["packed_difference"] < 1e-3
    suite.test_tokens_a_second_of_each_kernel("cpu", results, mistral, folder, "auto")
    assert results["tokens/s, attention=auto, micro 1"] > 0
    json.dumps(results)


def test_its_figures_are_written_and_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(suite, "RESULTS_FILE", tmp_path / "gpu-results.json")
    suite.write_results({"card": "NVIDIA GeForce RTX 4090"})
    assert json.loads((tmp_path / "gpu-results.json").read_text()) == {"card": "NVIDIA GeForce RTX 4090"}
    assert "gpu-results.json" in capsys.readouterr().out
