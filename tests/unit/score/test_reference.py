"""An engine that serves the base model instead of an adapter is refused."""

import json

import pytest

from birbal_ray.models import ModelError
from birbal_ray.schemas import REFERENCE_FILE
from birbal_ray.score.engine import (
    Adapter,
    Agreement,
    Completion,
    TokenLogprob,
    check_engine,
    compare_with_peft,
    why_not_applied,
)
from birbal_ray.score.simulated import SimulatedEngine
from tests.fixtures.engine_contract import MAX_MODEL_LEN, EngineContract

PROMPTS = {(5, 6, 7): 11, (8, 9): 12}  # token ids → the next token that the adapter changes most


class ShiftingEngine(SimulatedEngine):
    """A simulated engine whose prompts' last tokens an adapter makes likelier by `shift` nats (0: a dead adapter)."""

    def __init__(self, shift=0.0, adapters=("mine",), max_model_len=MAX_MODEL_LEN):
        super().__init__(max_model_len=max_model_len, adapters=adapters)
        self._shift = shift

    def step(self):
        adapted = {key for key, request in self._queue.items() if request.adapter}
        return [(key, self._shifted(done) if key in adapted else done) for key, done in super().step()]

    def _shifted(self, done: Completion) -> Completion:
        if not done.prompt_tokens:
            return done
        last = done.prompt_tokens[-1]
        logprob = min(0.0, last.logprob + self._shift)
        moved = TokenLogprob(last.token_id, logprob, last.token_id, logprob)
        return Completion(
            done.text, done.num_cached_tokens, done.num_completion_tokens, done.finish_reason,
            tokens=done.tokens, prompt_tokens=(*done.prompt_tokens[:-1], moved),
        )  # fmt: skip


class TestShiftingEngine(EngineContract):
    @pytest.fixture
    def engine(self):
        return ShiftingEngine(0.1, adapters=())


def reference(change, prompts=PROMPTS):
    """What PEFT would have computed: the adapter makes each prompt's token likelier by `change` nats, another not."""
    return {
        "prompts": [
            {
                "token_ids": list(ids),
                "next_token_ids": [token + 1, token],
                "adapter_log_probs": [-1.0, -(token % 97 + 1) / 50 + change],
                "base_log_probs": [-1.0, -(token % 97 + 1) / 50],
            }
            for ids, token in prompts.items()
        ]
    }


def test_an_adapter_that_is_applied_agrees():
    found = compare_with_peft(ShiftingEngine(0.2), reference(0.2), "mine")
    assert found == Agreement(pytest.approx(0.2), pytest.approx(1.0), pytest.approx(0.0))
    assert why_not_applied(found) is None


@pytest.mark.parametrize("shift", [0.0, 0.01, -0.2])
def test_a_planted_dead_adapter_is_caught(shift):
    found = compare_with_peft(ShiftingEngine(shift), reference(0.2), "mine")
    assert found.applied_fraction == pytest.approx(shift / 0.2)
    said = why_not_applied(found)
    assert said is not None and said.startswith("it changes PEFT's log probabilities by up to 0.20 nats, and the eng")
    assert f"shows {max(0, round(100 * shift / 0.2))}% of that change" in said


def test_so_small_a_change_proves_nothing():
    assert why_not_applied(compare_with_peft(ShiftingEngine(0.0), reference(0.05), "mine")) is None
    assert why_not_applied(compare_with_peft(ShiftingEngine(0.0), {"prompts": []}, "mine")) is None


def test_prompts_that_the_engine_does_not_take_are_left_out():
    prompts = {**PROMPTS, tuple(range(2, 2 + MAX_MODEL_LEN)): 40}
    found = compare_with_peft(ShiftingEngine(0.2), reference(0.2, prompts), "mine")
    assert found.applied_fraction == pytest.approx(1.0)


def test_a_model_that_an_adapter_was_folded_into_is_compared_with_pefts_base():
    """Without an adapter's name the engine answers as the base model does here: nothing was folded in."""
    found = compare_with_peft(ShiftingEngine(), reference(1.2))
    assert found.applied_fraction == pytest.approx(0.0)
    assert why_not_applied(found, 1.0) is not None


def test_an_engine_is_checked_against_every_reference_beside_its_model_and_adapters(tmp_path):
    model, good, bad, foreign = (tmp_path / name for name in ("model", "good", "bad", "foreign"))
    for folder in (model, good, bad, foreign):
        folder.mkdir()
    (good / REFERENCE_FILE).write_text(json.dumps(reference(0.2)))
    (bad / REFERENCE_FILE).write_text(json.dumps(reference(5.0)))
    adapters = [Adapter(one.name, str(one), 8) for one in (good, foreign, bad)]
    engine = ShiftingEngine(0.2, adapters=("good", "bad", "foreign"))
    check_engine(engine, model, adapters[:2])
    with pytest.raises(ModelError, match=r"adapter in .*/bad: .* 5\.00 nats, .*: the engine does not apply it; fold"):
        check_engine(engine, model, adapters)
    (model / REFERENCE_FILE).write_text(json.dumps(reference(1.2)))
    with pytest.raises(ModelError, match=r"adapter in .*/model: .*; it is not the adapter that was folded into this"):
        check_engine(engine, model, adapters[:2])
    (model / REFERENCE_FILE).write_text('{"prompts": [')
    with pytest.raises(ModelError, match=r"adapter in .*/model: reference.json is not a JSON object .*get it again"):
        check_engine(engine, model, [])
