"""A model's chat template from its tokenizer to token ids, stops and training samples."""

from __future__ import annotations

import pytest

from birbal_ray.models import ModelError, read_template
from birbal_ray.ni.prompt import render_prompt
from birbal_ray.ni.schema import Example
from birbal_ray.score.tokens import prompt_token_ids, stops
from birbal_ray.train.data import IGNORED, encode_rows, text_columns
from tests.fixtures.chat_templates import IGNORES_SYSTEM, NO_SYSTEM, SPECIAL_END, SYSTEM_TURN, TemplateTokenizer

STYLES = {"system turn": SYSTEM_TURN, "no system turn": NO_SYSTEM, "special end of turn": SPECIAL_END}
EXAMPLES = (Example("red", "yes"), Example("blue", "no"))


@pytest.mark.parametrize("style", STYLES)
def test_prompt_ids_are_the_templates_text_and_nothing_else(style):
    tokenizer = TemplateTokenizer(STYLES[style])
    chat = read_template(tokenizer, "chat", {})
    text = render_prompt("Is it warm?", EXAMPLES, "green", chat)
    (ids,) = prompt_token_ids(tokenizer, [text], chat=chat)
    assert tokenizer.decode(ids) == text
    assert ids.count(tokenizer.bos_token_id) == text.count("<s>") <= 1, "no second BOS"


@pytest.mark.parametrize(("style", "end"), [("system turn", "<|stop|>"), ("no system turn", "<end_of_turn>")])
def test_a_completion_stops_at_the_end_of_turn_not_at_a_blank_line(style, end):
    tokenizer = TemplateTokenizer(STYLES[style])
    strings, ids = stops(tokenizer, read_template(tokenizer, "chat", {}))
    assert (strings, tokenizer.decode(ids)) == ((), end)
    assert stops(tokenizer, None) == (("\n\n",), ())


def test_an_end_of_turn_of_several_tokens_is_a_stop_string():
    tokenizer = TemplateTokenizer("{% for m in messages %}{{ m.role }}: {{ m.content }}[END]\n{% endfor %}")
    assert stops(tokenizer, read_template(tokenizer, "chat", {})) == (("[END]",), ())


def test_a_template_that_ends_no_turn_ends_it_with_eos():
    chat = read_template(TemplateTokenizer(IGNORES_SYSTEM), "chat", {})
    assert chat.end_of_turn == "</s>"


def test_the_published_format_needs_no_template():
    assert read_template(TemplateTokenizer(None), "birbal", {}) is None


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (None, r"made-up-model: its tokenizer has no chat template; set prompt.format to birbal"),
        ("{{ raise_exception('no turns') }}", r"made-up-model: the chat template can't render .*; set prompt.format"),
    ],
)
def test_a_model_without_a_usable_template_is_refused(source, reason):
    with pytest.raises(ModelError, match=reason) as caught:
        read_template(TemplateTokenizer(source), "chat", {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("style", STYLES)
def test_a_training_sample_is_the_prompt_the_answer_and_the_end_of_turn(style):
    tokenizer = TemplateTokenizer(STYLES[style])
    chat = read_template(tokenizer, "chat", {"enable_thinking": False})
    rows = {"instruction": ["Is it warm?", ""], "input": ["red", "blue"], "output": ["yes\n\nvery", "</s> no"]}
    assert text_columns(chat=True) == list(rows)
    for number, (ids, start) in enumerate(encode_rows(tokenizer, rows, chat)):
        labels = [IGNORED] * start + ids[start:]
        asked = render_prompt(rows["instruction"][number], (), rows["input"][number], chat)
        assert tokenizer.decode(ids) == asked + rows["output"][number] + chat.end_of_turn
        (prompt_ids,) = prompt_token_ids(tokenizer, [asked], chat=chat)
        assert ids[: len(prompt_ids)] == prompt_ids, "as at inference"
        assert labels == [IGNORED] * len(prompt_ids) + ids[len(prompt_ids) :]
        answer = ids[len(prompt_ids) : -1]
        assert tokenizer.eos_token_id not in answer, "an answer that spells a special token stays text"
