"""What the challenge's server does to prompts and answers: two rules, pure."""

from __future__ import annotations

import re

BLANK_LINE = "\n\n"
ANSWER_WORDS = "the answer is"
_ANSWER = re.compile(rf"\s*{ANSWER_WORDS}(?:\s*:\s*|\s+)([^\W\d_])(?!\w)", re.IGNORECASE)


def wrap_prompt(prompt: str) -> str:
    """The prompt as the model was trained to see it; one that has two blank lines or more has its own form."""
    if prompt.count(BLANK_LINE) >= 2:
        return prompt
    return f"### Input:\n{prompt}\n\n### Response:\n"


def cut_answer(completion: str, *, compat: bool = False) -> str:
    """The completion up to its first blank line; of "The answer is: B, …" the letter alone.

    Only a letter that stands by itself counts: "The answer is Paris" stays whole. With `compat`, the published
    server's rule: the first character that is no white space after the words, so ":" for "The answer is: B".
    """
    text = completion.split(BLANK_LINE, 1)[0]
    if compat:
        begins = text.lower().startswith(ANSWER_WORDS)
        return text[len(ANSWER_WORDS) :].strip()[:1] if begins else text
    found = _ANSWER.match(text)
    return found[1] if found else text
