"""Prompts to the byte, answers, scores."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from birbal_ray.ni import metrics, prompt
from birbal_ray.ni.reader import parse_task
from birbal_ray.ni.schema import TaskError
from tests.conftest import task_values


@pytest.fixture
def task():
    return parse_task("t1", json.dumps(task_values()).encode())


def test_prompt_bytes(task):
    assert prompt.render_prompt(task.definition, prompt.examples_of(task, 1), "green") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nSay whether the colour is warm.\n\n"
        "### Input:\nred\n\n### Response:\nyes\n\n### Input:\ngreen\n\n### Response:\n"
    )


def test_shots_are_at_most_what_the_task_has(task):
    assert prompt.examples_of(task, 9) == prompt.examples_of(task, 2) == task.positive_examples
    with pytest.raises(TaskError, match=r"t1.json: 'Positive Examples' has 2 entries, num_shots is 9"):
        prompt.examples_of(task, 9, strict=True)


@pytest.mark.parametrize(
    ("completion", "answer"),
    [("yes\n\n### Input:\nmore", "yes"), (" yes ", "yes"), ("two\nlines\n\nrest", "two\nlines"), ("\n\nlate", "")],
)
def test_extract_answer(completion, answer):
    assert prompt.extract_answer(completion) == answer


def test_exact_match_is_any_reference_and_case_counts():
    assert metrics.exact_match("b", ["a", "b"]) == 1.0
    assert metrics.exact_match("b", ["a", " b\n"]) == 1.0
    assert metrics.exact_match("B", ["a", "b"]) == 0.0
    assert metrics.exact_match("", ["a"]) == 0.0


def test_rouge_l_hand_computed():
    # common subsequence "the cat sat": 3 of 4 words and 3 of 6 words
    assert metrics.rouge_l("the cat sat down", ["on the mat the cat sat"]) == pytest.approx(2 * 0.75 * 0.5 / 1.25)
    assert metrics.rouge_l("a b", ["x", "a b"]) == 1.0
    assert metrics.rouge_l("!?", ["!?"]) == 0.0
    assert metrics.rouge_l("", ["a"]) == metrics.rouge_l("a", [""]) == 0.0


ASCII = st.text(alphabet="aAbB cC1.,\n-_\0'", max_size=40)


@given(ASCII, ASCII)
def test_rouge_l_equals_rouge_score(answer, reference):
    from rouge_score import rouge_scorer  # imports nltk, for seconds

    oracle = rouge_scorer.RougeScorer(["rougeL"])
    assert metrics.rouge_l(answer, [reference]) == oracle.score(reference, answer)["rougeL"].fmeasure
