"""The full recipe on a model of Mistral-7B's shape: does the memory estimate hold, how fast is it?

Needs an NVIDIA GPU of 24 GiB or more, 16 GB of main memory, 15 GB of disk; no network, no weights:

    make setup && .venv/bin/python -m pytest -s tests/gpu

A larger card is capped to 24 GiB. Prints measured peak against `birbal train --dry-run`'s estimate, and
tokens/s; docs/decisions/0023 has room for the figures.
"""

import json
import shutil

import pytest

from birbal_ray.settings import load_config
from birbal_ray.train import preflight
from birbal_ray.train.checkpoints import read_metrics
from birbal_ray.train.config import TrainConfig
from birbal_ray.train.data import prepare
from tests.conftest import REPOSITORY, make_mix
from tests.fixtures.random_model import write_random_model

pytestmark = pytest.mark.gpu
CARD_BYTES = 24 * preflight.GIB
MISTRAL_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


@pytest.fixture(scope="module")
def card():
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU, and torch sees none here")
    total = torch.cuda.get_device_properties(0).total_memory
    if total < 0.95 * CARD_BYTES:
        pytest.skip(f"needs a card of 24 GiB, this one has {total / preflight.GIB:.1f}")
    torch.cuda.set_per_process_memory_fraction(min(1.0, CARD_BYTES / total))
    return torch.cuda.get_device_name(0)


@pytest.fixture(scope="module")
def mistral(card, tiny_model, tmp_path_factory):
    from transformers import MistralConfig

    folder = tmp_path_factory.mktemp("mistral")
    write_random_model(folder, MistralConfig(**MISTRAL_7B))
    for file in tiny_model.glob("tokenizer*"):
        shutil.copy(file, folder)
    yield folder
    shutil.rmtree(folder)


def test_peak_memory_is_what_the_preflight_says(card, mistral, tmp_path):
    from transformers import AutoTokenizer

    from birbal_ray.train.sft import fine_tune

    flags = {"model.name": str(mistral), "budget": None, "max_steps": 3, "evaluation.num_rows": 40}
    config = load_config(TrainConfig, REPOSITORY / "configs" / "train" / "mistral-7b-qlora.yaml", flags=flags)
    config = config.model_copy(update={"budget": None})
    (tmp_path / "mix").mkdir()
    make_mix(tmp_path / "mix", 12_000, 400)
    packing = prepare(tmp_path / "mix", tmp_path / "packed", AutoTokenizer.from_pretrained(mistral), 8192, "drop", 400)
    assert packing["train"].num_packs >= 24  # 3 steps of 2 x 4
    shapes = preflight.shapes_of(mistral, config.lora.target_modules)
    parts = preflight.estimate(shapes, config, gpu=True, attention=config.model.attention)
    estimate = preflight.total_bytes(parts)

    outcome = fine_tune(config, mistral, tmp_path)
    last = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "loss" in line][-1]
    figures = {
        "card": card,
        "attention": config.model.attention,
        "estimate_gib": round(estimate / preflight.GIB, 2),
        "peak_gib": round(outcome.peak_memory_bytes / preflight.GIB, 2),
        "tokens_per_second": round(last["tokens"] / last["step_seconds"]),
        "parts_gib": {part.part: round(part.num_bytes / preflight.GIB, 2) for part in parts},
    }
    print(json.dumps(figures, indent=1))
    assert outcome.peak_memory_bytes <= CARD_BYTES
    assert outcome.peak_memory_bytes <= 1.05 * estimate, "the preflight promises too much"
    assert outcome.peak_memory_bytes >= 0.6 * estimate, "the preflight refuses what would fit"
