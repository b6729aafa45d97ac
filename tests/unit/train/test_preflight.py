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
    linear=LAYER * 32, targets=LAYER * 32, into_residual=((4096, 4096), (4096, 14336)) * 32,
    num_other=2 * 32000 * 4096 + 65 * 4096, norm_features=2 * 32 * 4096,
    num_layers=32, hidden=4096, num_heads=32, vocabulary=32000,
)  # fmt: skip
FULL = {"resources.device": "gpu", "resources.accelerator_type": "GeForce-RTX-4090"}


def parts_of(**changes):
    config = load_config(TrainConfig, flags={**FULL, **{k.replace("__", "."): v for k, v in changes.items()}})
    return {part.part: part.num_bytes for part in estimate(MISTRAL, config)}, config


def test_known_parts_of_mistral_7b():
    parts, _ = parts_of()
    assert num_trainable(MISTRAL, 128) == 335_544_320
    assert parts["LoRA weights"] == parts["gradients"] == 335_544_320 * 4
    assert parts["optimizer"] == 335_544_320 * 8
    num_linear = 32 * sum(a * b for a, b in LAYER)
    assert num_linear == 6_979_321_856
    assert parts["base weights"] == pytest.approx(num_linear * 0.51587, rel=1e-4)
    assert "attention mask" not in parts
    assert parts_of(model__attention="sdpa")[0]["attention mask"] == (2 * 8192) ** 2 * 2


def test_checkpointing_and_smaller_batches_need_less():
    full = sum(parts_of()[0].values())
    assert sum(parts_of(gradient_checkpointing=False)[0].values()) > full
    assert sum(parts_of(batch__micro=1)[0].values()) < full
    assert sum(parts_of(lora__r=64)[0].values()) < full


def test_the_advice_is_the_first_change_that_fits_and_keeps_the_tokens_a_step():
    _, config = parts_of(batch__micro=8, batch__accumulation=1, gradient_checkpointing=False)
    limit = total_bytes(estimate(MISTRAL, parts_of(batch__micro=2)[1]))
    change = change_that_fits(MISTRAL, config, limit)
    assert change == "gradient_checkpointing=true batch.micro=2 batch.accumulation=4"
    assert change_that_fits(MISTRAL, config, GIB) is None


def test_refusal_names_need_memory_and_the_change():
    parts = [preflight.Part("base weights", 30 * GIB, "")]
    found = Preflight(
        parts=parts, memory_bytes=24 * GIB, change="batch.micro=1 batch.accumulation=8", fits=False, num_trainable=1,
        packing={}, kernel="", steps_per_epoch=1.0, tokens_per_second=None, speed_source="", least_budget_seconds=None,
        steps_in_budget=None, epochs_in_budget=None,
    )  # fmt: skip
    with pytest.raises(
        ConfigError,
        match=r"30.0 GiB are needed, the device has 24.0; it would fit with --set batch.micro=1 --set batch.acc",
    ):
        refuse_if_too_large(found)


def test_card_memory_is_known_by_rays_name():
    config = load_config(TrainConfig, flags=FULL)
    assert preflight.device_memory_bytes(config) == int(23.6 * GIB), "what torch reports, less than the maker's 24"
    own = load_config(TrainConfig, flags={**FULL, "resources.memory_gib": 11})
    assert preflight.device_memory_bytes(own) == 11 * GIB


def test_the_full_recipe_agrees_with_a_calculation_by_hand():
    """Part by part within a tenth: the layers' inputs, what one recomputed layer keeps, and so on, in GiB."""
    by_hand = {
        "base weights": 3.35,
        "embeddings, head, norms": 0.49,
        "LoRA weights": 1.25,
        "gradients": 1.25,
        "optimizer": 2.5,
        "layer inputs": 4.0,
        "one recomputed layer": 3.9,
        "transients": 1.5,
        "CUDA context": 0.8,
    }
    parts, config = parts_of()
    found = {name: num_bytes / GIB for name, num_bytes in parts.items()}
    assert found.keys() - by_hand.keys() == {"fragments"}
    for name, wanted in by_hand.items():
        assert found[name] == pytest.approx(wanted, rel=0.1), name
    assert 19 <= sum(found.values()) <= 21
    assert sum(parts.values()) <= preflight.device_memory_bytes(config)


def test_dropout_masks_take_a_byte_for_each_input():
    with_masks, without = parts_of()[0], parts_of(lora__dropout=0.0)[0]
    tokens, inputs = 2 * 8192, sum(into for _, into in LAYER)
    assert with_masks["one recomputed layer"] - without["one recomputed layer"] == tokens * inputs


def test_a_dense_mask_is_named_with_its_cost():
    assert preflight.dense_mask_warning("sdpa", 4096) is None
    assert preflight.dense_mask_warning("auto", 16384) is None
    assert "16,384 x 16,384 (256 MiB" in preflight.dense_mask_warning("sdpa", 16384)


def test_arithmetic_of_the_full_recipe_is_what_a_calculation_by_hand_gives():
    """0.72 PFLOP of linear work in a micro batch, 0.63 of attention beside it where a dense mask is used."""
    _, config = parts_of()
    tokens = 2 * 8192
    packed = preflight.flops_per_token(MISTRAL, config)
    assert packed * tokens == pytest.approx(0.72e15, rel=0.05)
    dense = preflight.flops_per_token(MISTRAL, parts_of(model__attention="sdpa")[1])
    assert (dense - packed) * tokens == pytest.approx(0.63e15, rel=0.05)
    assert 0.45 * 165e12 / packed == pytest.approx(1700, rel=0.05), "tokens/s on an RTX 4090"


@pytest.mark.parametrize(
    ("flags", "kernel"),
    [
        ({}, "varlen FlashAttention of torch"),
        ({"resources.accelerator_type": "T4"}, "sdpa sample by sample, without a mask (the varlen kernel does not run"),
        ({"model.dtype": "float32"}, "sdpa sample by sample"),
        ({"resources.device": "cpu", "resources.accelerator_type": None}, "sdpa sample by sample"),
        ({"model.attention": "eager"}, "eager"),
    ],
)
def test_the_kernel_to_expect_is_named(flags, kernel):
    given = {key: value for key, value in {**FULL, **flags}.items() if value is not None}
    assert preflight.expected_kernel(load_config(TrainConfig, flags=given)).startswith(kernel)


def test_a_budget_shorter_than_what_was_measured_here_is_refused():
    found = Preflight(
        parts=[], memory_bytes=None, change=None, fits=True, num_trainable=1, packing={}, kernel="",
        steps_per_epoch=1.0, tokens_per_second=100.0, speed_source="last seen here", least_budget_seconds=90.2,
        steps_in_budget=0, epochs_in_budget=0.0,
    )  # fmt: skip
    config = load_config(TrainConfig, flags={"budget": "60s"})
    with pytest.raises(ConfigError, match=r"budget=60 s is too short: .* took 90 s .* set --budget to 91s or more"):
        preflight.refuse_if_too_short(found, config)
    preflight.refuse_if_too_short(found, load_config(TrainConfig, flags={"budget": "91s"}))
