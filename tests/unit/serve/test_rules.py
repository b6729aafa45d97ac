"""The prompt rule and both answer rules."""

from __future__ import annotations

import pytest

from birbal_ray.serve.app import cut_answer, wrap_prompt


@pytest.mark.parametrize(
    "prompt", ["", "2 + 2 =", " padded \n", "one\n\nblank line", "three\n\n\nbreaks are one blank line"]
)
def test_a_prompt_with_fewer_than_two_blank_lines_is_wrapped_unstripped(prompt):
    assert wrap_prompt(prompt) == f"### Input:\n{prompt}\n\n### Response:\n"


@pytest.mark.parametrize("prompt", ["a\n\nb\n\nc", "\n\n\n\n", "### Input:\nx\n\n### Response:\n\n\n"])
def test_a_prompt_with_two_blank_lines_is_used_as_it_is(prompt):
    assert wrap_prompt(prompt) == prompt


@pytest.mark.parametrize(
    ("completion", "answer", "published"),
    [
        ("plain text", "plain text", "plain text"),
        (" spaces stay ", " spaces stay ", " spaces stay "),
        ("first\n\nsecond\n\nthird", "first", "first"),
        ("\n\nnothing before", "", ""),
        ("line\nline", "line\nline", "line\nline"),
        ("The answer is B", "B", "B"),
        ("The answer is: A", "A", ":"),
        ("THE ANSWER IS:C.", "C", ":"),
        ("the answer is  d) because", "d", "d"),
        ("The answer is :\tE\n", "E", ":"),
        ("The answer is A\n\nThe answer is B", "A", "A"),
        ("The answer is Paris", "The answer is Paris", "P"),
        ("The answer is: 42", "The answer is: 42", ":"),
        ("The answer is", "The answer is", ""),
        ("The answer isn't B", "The answer isn't B", "n"),
        ("I think the answer is B", "I think the answer is B", "I think the answer is B"),
        ("", "", ""),
    ],
)
def test_answers(completion, answer, published):
    assert cut_answer(completion) == answer
    assert cut_answer(completion, compat=True) == published
