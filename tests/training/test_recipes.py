"""Every recipe in configs/train is proven by the preflight for its card, from a model's config alone."""

import json
import shutil

import pytest
from click.testing import CliRunner
from transformers import LlamaConfig, MistralConfig, Qwen3Config

from birbal_ray.cli.main import main
from birbal_ray.models import load_tokenizer
from birbal_ray.progress import estimate_tokens
from birbal_ray.settings import load_config
from birbal_ray.train import preflight
from birbal_ray.train.config import TrainConfig
from birbal_ray.train.self_check import check_architecture
from tests.conftest import REPOSITORY
from tests.fixtures.chat_templates import SPECIAL_END, SYSTEM_TURN

# Shapes are facts; the files are made here.
SHARED = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
SHAPES = {
    "mistral-7b-qlora": MistralConfig(
        **SHARED, vocab_size=32000, intermediate_size=14336, num_hidden_layers=32, sliding_window=4096
    ),
    "qwen3-8b-24gb": Qwen3Config(
        **SHARED, vocab_size=151936, intermediate_size=12288, num_hidden_layers=36, tie_word_embeddings=False
    ),
    "llama-3.1-8b-24gb": LlamaConfig(
        **SHARED, vocab_size=128256, intermediate_size=14336, num_hidden_layers=32, tie_word_embeddings=False
    ),
}
NUM_TRAINABLE = {"mistral-7b-qlora": 335_544_320, "qwen3-8b-24gb": 87_293_952, "llama-3.1-8b-24gb": 83_886_080}


@pytest.mark.parametrize("name", SHAPES)
def test_the_recipe_fits_its_card_and_the_architecture_is_sound(name, tmp_path):
    SHAPES[name].save_pretrained(tmp_path)
    config = load_config(TrainConfig, REPOSITORY / "configs" / "train" / f"{name}.yaml")
    shapes = preflight.shapes_of(tmp_path, config.lora.target_modules)
    assert preflight.num_trainable(shapes, config.lora) == NUM_TRAINABLE[name]
    parts = preflight.estimate(shapes, config)
    total, card = preflight.total_bytes(parts), preflight.device_memory_bytes(config)
    assert card == int(23.6 * preflight.GIB)
    assert 0.4 * card < total < card
    rate = 0.45 * 165e12 / preflight.flops_per_token(shapes, config)
    assert 1200 < rate < 1800
    assert check_architecture(tmp_path, config).packed_difference < 1e-3


def test_every_recipe_for_a_card_is_among_them():
    files = {file.stem for file in (REPOSITORY / "configs" / "train").glob("*.yaml")}
    assert files == {*SHAPES, "tiny"}


@pytest.mark.parametrize("name", SHAPES)
def test_a_dry_run_plans_the_day_from_config_and_tokenizer_alone(name, tiny_model, tiny_mix, tmp_path, monkeypatch):
    """Without weights, network or card: tokens/s by arithmetic with its source, and the epochs that fit 24 hours."""
    monkeypatch.setattr("birbal_ray.train.self_check.check_architecture", lambda *arguments: None)  # checked above
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("BIRBAL_CACHE", str(tmp_path / "cache"))
    model = tmp_path / "model"
    SHAPES[name].save_pretrained(model)
    for file in tiny_model.glob("tokenizer*"):
        shutil.copy(file, model)
    if name != "mistral-7b-qlora":
        tokenizer = load_tokenizer(model)
        tokenizer.chat_template = SYSTEM_TURN if "qwen" in name else SPECIAL_END
        tokenizer.save_pretrained(model)
    command = ["train", "--dry-run", "--config", name, "--mix", tiny_mix, "--model", model, "--format", "json"]
    result = CliRunner().invoke(main, [str(argument) for argument in command])
    assert result.exit_code == 0, result.output
    assert {row["part"]: row for row in json.loads(result.stdout)}["the device has"] == {
        "part": "the device has", "GiB": pytest.approx(23.6, abs=0.01), "how": "fits",
    }  # fmt: skip
    config = load_config(TrainConfig, REPOSITORY / "configs" / "train" / f"{name}.yaml")
    flop = preflight.flops_per_token(preflight.shapes_of(model, "all-linear"), config)
    low, high, source = estimate_tokens("GeForce-RTX-4090", flop)
    assert low < 0.45 * 165e12 / flop < high
    assert f"estimate, not measured: {(low + high) / 2:,.0f} tokens/s ({source})" in result.stderr
    assert "of 165 TFLOP/s (GeForce-RTX-4090's data sheet)" in source
    assert "would fit in the budget" in result.stderr
    assert "attention: varlen FlashAttention of torch" in result.stderr
