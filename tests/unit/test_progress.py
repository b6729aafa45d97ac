"""Arithmetic about cards, against what was published about one."""

from __future__ import annotations

import pytest

from birbal_ray import progress

MISTRAL_7B, LLAMA_8B = 7_241_732_096, 8_030_261_248


def within(speed: progress.Speed, rate: float) -> bool:
    return speed.low <= rate <= speed.high


def test_a_4090_trains_as_fast_as_torchtune_measured():
    # 2,413 tokens/s for Llama-3.1-8B at 2k packs: without the second forward pass, so four sixths of the work.
    found = progress.estimate_tokens("GeForce-RTX-4090", progress.TRAIN_FLOP_PER_WEIGHT * LLAMA_8B)
    assert within(found, 2413 * 4 / 6)
    assert "GeForce-RTX-4090" in found.source


def test_a_4090_answers_as_fast_as_was_measured():
    # mushfiqrahman.dev: Mistral-7B, 256 prompt and 128 new tokens, 11.9 requests/s.
    assert within(progress.estimate_prompts("GeForce-RTX-4090", MISTRAL_7B, 256, 128), 11.9)


@pytest.mark.parametrize("card", sorted(progress.CARDS))
def test_longer_prompts_larger_models_take_longer(card):
    short = progress.estimate_prompts(card, MISTRAL_7B, 60, 5)
    assert short.low < short.high
    assert short.low > progress.estimate_prompts(card, MISTRAL_7B, 120, 5).low
    assert short.high > progress.estimate_prompts(card, LLAMA_8B, 60, 5).high
    assert progress.estimate_tokens(card, 6 * MISTRAL_7B).low > progress.estimate_tokens(card, 6 * LLAMA_8B).low
