"""The estimate on made-up shapes, by hand, and what it advises."""

import pytest

from birbal_ray.settings import ConfigError, load_config
from birbal_ray.train import preflight
from birbal_ray.train.config import TrainConfig
from birbal_ray.train.preflight import (
    GIB,
    Preflight,
    Shapes,
    change_that_fits,
    estimate,
    num_trainable,
    refuse_if_too_large,
    total_bytes,
)

# Mistral-7B: 32 layers of q, k, v, o, gate, up, down; 32,000 words; the head is not tied.
LAYER = ((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336))
MISTRAL = Shapes(
    linear=LAYER * 32, targets=LAYER * 32, num_other=2 * 32000 * 4096 + 65 * 4096,
    num_layers=32, hidden=4096, num_heads=32, vocabulary=32000,
)  # fmt: skip
FULL = {"resources.device": "gpu", "resources.accelerator_type": "GeForce-RTX-4090"}


def parts_of(attention="flash_attention_2", **changes):
    config = load_config(TrainConfig, flags={**FULL, **{k.replace("__", "."): v for k, v in changes.items()}})
    return {part.part: part.num_bytes for part in estimate(MISTRAL, config, gpu=True, attention=attention)}, config


def test_known_parts_of_mistral_7b():
    parts, _ = parts_of()
    assert num_trainable(MISTRAL, 128) == 335_544_320
    assert parts["LoRA weights"] == parts["gradients"] == 335_544_320 * 4
    assert parts["optimizer"] == 335_544_320 * 8
    num_linear = 32 * sum(a * b for a, b in LAYER)
    assert num_linear == 6_979_321_856
    assert parts["base weights"] == pytest.approx(num_linear * 0.51587, rel=1e-4)
    assert "attention mask" not in parts
    assert parts_of("sdpa")[0]["attention mask"] == (2 * 8192) ** 2 * 2


def test_checkpointing_and_smaller_batches_need_less():
    full = sum(parts_of()[0].values())
    assert sum(parts_of(gradient_checkpointing=False)[0].values()) > full
    assert sum(parts_of(batch__micro=1)[0].values()) < full
    assert sum(parts_of(lora__r=64)[0].values()) < full


def test_the_advice_is_the_first_change_that_fits_and_keeps_the_tokens_a_step():
    _, config = parts_of(batch__micro=8, batch__accumulation=1, gradient_checkpointing=False)
    limit = total_bytes(estimate(MISTRAL, parts_of(batch__micro=2)[1], gpu=True, attention="flash_attention_2"))
    change = change_that_fits(MISTRAL, config, limit, gpu=True, attention="flash_attention_2")
    assert change == "gradient_checkpointing=true batch.micro=2 batch.accumulation=4"
    assert change_that_fits(MISTRAL, config, GIB, gpu=True, attention="flash_attention_2") is None


def test_refusal_names_need_memory_and_the_change():
    parts = [preflight.Part("base weights", 30 * GIB, "")]
    found = Preflight(
        parts=parts, memory_bytes=24 * GIB, change="batch.micro=1 batch.accumulation=8", fits=False, num_trainable=1,
        packing={}, steps_per_epoch=1.0, tokens_per_second=None, steps_in_budget=None, epochs_in_budget=None,
    )  # fmt: skip
    with pytest.raises(
        ConfigError,
        match=r"30.0 GiB are needed, the device has 24.0; it would fit with --set batch.micro=1 --set batch.acc",
    ):
        refuse_if_too_large(found)


def test_card_memory_is_known_by_rays_name():
    config = load_config(TrainConfig, flags=FULL)
    assert preflight.device_memory_bytes(config) == 24 * GIB
    own = load_config(TrainConfig, flags={**FULL, "resources.memory_gib": 11})
    assert preflight.device_memory_bytes(own) == 11 * GIB
