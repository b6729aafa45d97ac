"""Exact match and ROUGE-2, against values worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from birbal_ray.evaluate.benchmarks import exact_match, rouge_2


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        ("Paris", ["Paris"], 1),
        (" Paris\n", ["Paris"], 1),
        ("Paris", ["Rome", "Paris "], 1),
        ("paris", ["Paris"], 0),
        ("Paris.", ["Paris"], 0),
        ("the  city of an  angel", ["City of angel!"], 0),
        ("a b", ["b"], 0),
        ("ab", ["b"], 0),
        ("the-cat", ["cat"], 0),
        ("there", ["re"], 0),
        ("3.5", ["35"], 0),
        ("“Paris”", ["Paris"], 0),
        ("The.", ["?"], 0),
        ("", [""], 0),
        (" ", [""], 0),
        ("x", [], 0),
    ],
)
def test_exact_match(answer, references, expected):
    assert exact_match(answer, references) == expected


@given(st.text(max_size=30))
def test_only_an_empty_text_does_not_match_itself(text):
    assert exact_match(f" {text}\n", [text]) == bool(text.strip())


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        ("Amanda baked cookies for Jerry", ["Amanda baked cookies for Jerry"], 1.0),
        # pairs: 3 of the answer's 4 are among the reference's 5 → P 3/4, R 3/5
        ("amanda baked cookies yesterday evening", ["Amanda baked cookies yesterday at noon"], 2 * 0.75 * 0.6 / 1.35),
        ("she bakes cookies", ["She baked cookie"], 1.0),  # stemmed
        ("cookies", ["cookies"], 0.0),  # one word has no pair
        ("", ["Amanda baked cookies"], 0.0),
        ("red green", ["green red"], 0.0),
        ("blue sky", ["no match", "the blue sky"], 2 / 3),  # the best reference counts: P 1, R 1/2
        ("blue sky", [], 0.0),
    ],
)
def test_rouge_2_by_hand(answer, references, expected):
    assert rouge_2(answer, references) == pytest.approx(expected, abs=1e-12)
