"""Prompts: the published recipe's, byte for byte, or a model's own chat template; answers taken from completions.

Every function takes `chat`, the model's template, or None for the published format. Either way all prompts
of a task share everything up to the last input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jinja2

from birbal_ray.ni.schema import Example, Task, TaskError

PREAMBLE = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
STOP = "\n\n"
BIRBAL, CHAT = "birbal", "chat"  # values of prompt.format
DEFAULT_NUM_SHOTS = 4
# Texts that a template is probed with: letters only, so that no template changes them.
_SYSTEM, _USER, _ASSISTANT, _INPUT = "BirbalProbeSystem", "BirbalProbeUser", "BirbalProbeAssistant", "BirbalProbeInput"

Messages = list[dict[str, str]]  # {"role": system | user | assistant, "content": text}


class TemplateError(ValueError):
    """A chat template can't be used; the message is one line that says why."""


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A model's chat template, and what `read_chat_template` found out about it.

    `apply(messages, add_generation_prompt=…)` gives the text of a conversation.
    """

    apply: Callable[..., str]
    has_system_turn: bool
    end_of_turn: str  # what follows an assistant's text; empty where nothing but white space does


def read_chat_template(apply: Callable[..., str]) -> ChatTemplate:
    """Find out by trying whether a template has a system turn and how it ends an assistant's turn.

    `apply` is a tokenizer's `apply_chat_template` with `tokenize=False` and its arguments bound. Raises
    TemplateError where it can't render turns of user, assistant and user.
    """
    turns = [_turn("user", _USER), _turn("assistant", _ASSISTANT), _turn("user", _INPUT)]
    try:
        text = apply(turns, add_generation_prompt=True)
        ending = apply(turns[:2], add_generation_prompt=False)
    except Exception as error:  # whatever the model's own template raises
        reason = " ".join(str(error).split())[:200]
        raise TemplateError(f"the chat template can't render user, assistant and user turns ({reason})") from None
    if not 0 <= text.find(_USER) < text.find(_ASSISTANT) < text.rfind(_INPUT) or _ASSISTANT not in ending:
        raise TemplateError("the chat template drops or reorders turns of user, assistant and user")
    try:
        has_system_turn = _SYSTEM in apply([_turn("system", _SYSTEM), *turns], add_generation_prompt=True)
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError):  # its own way to refuse the turn
        has_system_turn = False
    end_of_turn = ending[ending.rindex(_ASSISTANT) + len(_ASSISTANT) :].strip().split("\n")[0]
    return ChatTemplate(apply, has_system_turn, end_of_turn)


def render_prompt(
    definition: str, examples: Sequence[Example], text: str, chat: ChatTemplate | None = None, *, preamble: bool = True
) -> str:
    """The prompt for one input, after its examples as given.

    Without `preamble` the published format leaves out its first sentence, and a blank definition too:
    that is its training text. A chat template has turns either way.
    """
    if chat is None:
        return f"{render_prefix(definition, examples, preamble=preamble)}{text}\n\n### Response:\n"
    return chat.apply(_messages(definition, examples, text, chat), add_generation_prompt=True)


def render_prefix(
    definition: str, examples: Sequence[Example], chat: ChatTemplate | None = None, *, preamble: bool = True
) -> str:
    """What the prompts of `render_prompt` begin with, whatever their input: all up to it."""
    if chat is not None:
        prompt = chat.apply(_messages(definition, examples, _INPUT, chat), add_generation_prompt=True)
        return prompt[: prompt.rindex(_INPUT)]
    instruction = f"### Instruction:\n{definition}\n\n" if preamble or definition.strip() else ""
    shots = "".join(f"### Input:\n{one.input}\n\n### Response:\n{one.output}\n\n" for one in examples)
    return f"{PREAMBLE + STOP if preamble else ''}{instruction}{shots}### Input:\n"


def examples_of(task: Task, num_shots: int = DEFAULT_NUM_SHOTS, *, strict: bool = False) -> tuple[Example, ...]:
    """The first `num_shots` positive examples, in file order. With `strict`, fewer raise TaskError."""
    if strict and len(task.positive_examples) < num_shots:
        raise TaskError(
            f"{task.name}.json: 'Positive Examples' has {len(task.positive_examples)} "
            f"{'entry' if len(task.positive_examples) == 1 else 'entries'}, num_shots is {num_shots}"
        )
    return task.positive_examples[:num_shots]


def extract_answer(completion: str, chat: bool = False) -> str:
    """What is compared with the references, outer white space removed.

    The published format ends an answer at the first blank line, a chat template at the end of the turn.
    """
    return completion.strip() if chat else completion.split(STOP, 1)[0].strip()


def _messages(definition: str, examples: Sequence[Example], text: str, chat: ChatTemplate) -> Messages:
    turns = [turn for one in examples for turn in (_turn("user", one.input), _turn("assistant", one.output))] + [
        _turn("user", text)
    ]
    if not definition.strip():
        return turns
    if chat.has_system_turn:
        return [_turn("system", definition), *turns]
    return [_turn("user", f"{definition}\n\n{turns[0]['content']}"), *turns[1:]]


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
