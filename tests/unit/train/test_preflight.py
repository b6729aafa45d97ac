"""The estimate on made-up shapes, by hand, and what it advises."""

from dataclasses import replace

import pytest

from birbal_ray.progress import MEASURED, measured_speed
from birbal_ray.settings import ConfigError, load_config
from birbal_ray.train import preflight
from birbal_ray.train.budget import Forecast, forecast_training
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
    with_micro,
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
    parts, config = parts_of()
    assert num_trainable(MISTRAL, config.lora) == 335_544_320
    outputs = 32 * (4096 + 1024 + 1024 + 4096 + 14336 + 14336 + 4096)  # DoRA: a size for each
    dora, config = parts_of(lora__use_dora=True)
    assert num_trainable(MISTRAL, config.lora) == 335_544_320 + outputs
    assert dora["optimizer"] - parts["optimizer"] == 8 * outputs
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
    found = Preflight(TrainConfig(), parts, 24 * GIB, "batch.micro=1 batch.accumulation=8", 1, {}, None)
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
    took = Forecast(100.0, 0.1, MEASURED, start_seconds=50.0, once_seconds=80.0, step_seconds=10.2)

    def with_budget(text, forecast=took):
        return Preflight(load_config(TrainConfig, flags={"budget": text}), [], None, None, 1, {}, forecast)

    with pytest.raises(ConfigError, match=r"budget=60 s is too short: .* took 90 s .* set --budget to 91s or more"):
        preflight.refuse_if_too_short(with_budget("60s"))
    preflight.refuse_if_too_short(with_budget("91s"))
    preflight.refuse_if_too_short(with_budget("60s", replace(took, source="arithmetic")))


def test_a_forecast_by_hand():
    """10 steps of 1,000 tokens at 100 a second; an evaluation and the best adapter every 5 steps, a checkpoint too."""
    config = load_config(TrainConfig, flags={**FULL, "evaluation.every_steps": 5, "checkpoint.every_steps": 5})
    kept = dict(zip(("setup", "eval", "best", "save", "overhead"), (20.0, 5.0, 1.0, 2.0, 30.0), strict=True))
    figures = {f"{name}_seconds": seconds for name, seconds in kept.items()}
    found = forecast_training(config, 1000, 400, measured_speed(100.0), figures)
    assert (found.tokens_per_second, found.is_measured) == (100.0, True)
    assert found.once_seconds == 20 + 5 + 1 + 2
    assert found.step_seconds == pytest.approx(10 + (5 + 1 + 2) / 5)
    assert found.least_budget_seconds == pytest.approx(28 + 11.6)
    likeliest = 30 + 28 + 10 * 11.6
    assert found.seconds(10) == pytest.approx((likeliest / 1.1, likeliest / 0.9))
    assert found.steps_within(28 + 10 * 11.6) == pytest.approx(10)
    assert found.steps_within(1) == 0
    guessed = forecast_training(
        config.replace({"resources.device": "cpu"}), 1000, 600, measured_speed(100.0), {}, 200e6
    )
    # 20 to 60 s to load on a CPU, 3 passes a training step against one, a second to write the adapter, 3 a checkpoint.
    assert guessed.once_seconds == pytest.approx(40 + 600 / 300 + 1 + 3)


@pytest.mark.parametrize(
    ("micro", "accumulation", "most", "wanted"),
    [(8, 1, 4, (4, 2)), (5, 1, 2, (1, 5)), (3, 4, 2, (2, 6)), (1, 4, 2, (1, 4))],
)
def test_a_smaller_micro_batch_keeps_the_sequences_of_a_step(micro, accumulation, most, wanted):
    config = load_config(TrainConfig, flags={"batch.micro": micro, "batch.accumulation": accumulation})
    assert tuple(with_micro(config, most).values()) == wanted
