"""Chat prompts to the byte, for three styles of templates; what all prompts of a task share."""

from __future__ import annotations

from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from birbal_ray.ni import prompt
from birbal_ray.ni.schema import Example
from tests.fixtures.chat_templates import IGNORES_SYSTEM, NO_SYSTEM, SPECIAL_END, SYSTEM_TURN, TemplateTokenizer

DEFINITION = "Say whether the colour is warm."
EXAMPLES = (Example("red", "yes"), Example("blue", "no"))


def template(source, **arguments):
    return prompt.read_chat_template(
        partial(TemplateTokenizer(source).apply_chat_template, tokenize=False, **arguments)
    )


GOLDEN = {
    "system turn": (
        template(SYSTEM_TURN, enable_thinking=False),
        "<|start|>system\nSay whether the colour is warm.<|stop|>\n<|start|>user\nred<|stop|>\n"
        "<|start|>assistant\nyes<|stop|>\n<|start|>user\nblue<|stop|>\n<|start|>assistant\nno<|stop|>\n<|start|>user\n",
        "green<|stop|>\n<|start|>assistant\n<think>\n\n</think>\n\n",
        "<|stop|>",
    ),
    "no system turn": (
        template(NO_SYSTEM),
        "<bos><turn>user\nSay whether the colour is warm.\n\nred<end_of_turn>\n<turn>model\nyes<end_of_turn>\n"
        "<turn>user\nblue<end_of_turn>\n<turn>model\nno<end_of_turn>\n<turn>user\n",
        "green<end_of_turn>\n<turn>model\n",
        "<end_of_turn>",
    ),
    "special end of turn": (
        template(SPECIAL_END),
        "<s>[INST] Say whether the colour is warm.\n---\nred [/INST] yes </s>[INST] blue [/INST] no </s>[INST] ",
        "green [/INST]",
        "</s>",
    ),
}


@pytest.mark.parametrize("style", GOLDEN)
def test_prompts_to_the_byte(style):
    chat, prefix, own, end_of_turn = GOLDEN[style]
    assert prompt.render_prefix(DEFINITION, EXAMPLES, chat) == prefix
    assert prompt.render_prompt(DEFINITION, EXAMPLES, "green", chat) == prefix + own
    assert chat.end_of_turn == end_of_turn


@pytest.mark.parametrize("style", GOLDEN)
@settings(max_examples=30)
@given(st.text(max_size=30).filter(str.strip))
def test_all_prompts_of_a_task_share_everything_up_to_the_last_input(style, text):
    chat = GOLDEN[style][0]
    for examples in (EXAMPLES, ()):
        prefix = prompt.render_prefix(DEFINITION, examples, chat)
        assert prompt.render_prompt(DEFINITION, examples, text, chat).startswith(prefix)
        assert prompt.render_prompt(DEFINITION, examples, text).startswith(prompt.render_prefix(DEFINITION, examples))


def test_a_training_prompt_is_the_prompt_without_examples():
    chat = GOLDEN["no system turn"][0]
    assert prompt.render_prompt(DEFINITION, (), "green", chat, preamble=False) == (
        "<bos><turn>user\nSay whether the colour is warm.\n\ngreen<end_of_turn>\n<turn>model\n"
    )
    assert prompt.render_prompt(" ", (), "green", chat) == "<bos><turn>user\ngreen<end_of_turn>\n<turn>model\n"
    plain = prompt.render_prompt(DEFINITION, (), "green", preamble=False)
    assert plain == f"### Instruction:\n{DEFINITION}\n\n### Input:\ngreen\n\n### Response:\n"
    assert prompt.render_prompt("", (), "green", preamble=False) == "### Input:\ngreen\n\n### Response:\n"


def test_a_template_that_ignores_the_system_turn_has_none():
    chat = template(IGNORES_SYSTEM)
    assert (chat.has_system_turn, chat.end_of_turn) == (False, "")
    assert prompt.render_prompt(DEFINITION, (), "x", chat) == f"user: {DEFINITION}\n\nx\n"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('only\n one turn') }}", r"can't render .* \(only one turn\)"),
        ("{{ messages[-1].content }}", "drops or reorders turns"),
        ("fixed text", "drops or reorders turns"),
    ],
)
def test_a_template_that_cannot_hold_the_examples_is_refused(source, reason):
    with pytest.raises(prompt.TemplateError, match=reason):
        template(source)


def test_an_answer_in_a_chat_may_hold_blank_lines():
    assert prompt.extract_answer(" one\n\ntwo \n", chat=True) == "one\n\ntwo"
    assert prompt.extract_answer(" one\n\ntwo \n") == "one"
