"""A model against the base model: pairs, intervals, what is named beforehand, the gate."""

import random

import pytest

from birbal_ray.evaluate.compare import TaskPair, adjust, compare, gate_failures, pair_tasks, scopes
from birbal_ray.evaluate.config import EvaluateConfig


def pairs(differences, label="exact_match", held_out="instances"):
    return [TaskPair(f"t{n}", label, held_out, 0.5, 0.5 + d) for n, d in enumerate(differences)]


def test_a_task_counts_by_the_rows_that_both_scored():
    base = {"a": {"1": 1.0, "2": 0.0, "3": 1.0}, "b": {"1": 1.0}}
    other = {"a": {"1": 0.0, "2": 1.0, "9": 1.0}, "b": {}}
    about = {"a": ("exact_match", "task"), "b": ("generation", "instances"), "c": ("generation", "task")}
    assert pair_tasks(base, other, about) == [TaskPair("a", "exact_match", "task", 0.5, 0.5)]


def test_means_wins_losses_and_ties_by_hand():
    figures = compare(pairs([0.2, -0.1, 0.0, 0.3]))
    assert figures["num_tasks"] == 4
    assert figures["base_score"] == pytest.approx(0.5)
    assert figures["score"] == pytest.approx(0.6)
    assert figures["difference"] == pytest.approx(0.1)
    assert (figures["num_wins"], figures["num_losses"], figures["num_ties"]) == (2, 1, 1)
    assert figures["difference_low"] <= 0.1 <= figures["difference_high"]


def test_an_equal_shift_has_no_spread_and_tasks_are_drawn_in_pairs():
    values = [TaskPair(f"t{n}", "generation", "task", n / 10, n / 10 + 0.05) for n in range(10)]
    figures = compare(values)
    assert figures["difference_low"] == pytest.approx(0.05)
    assert figures["difference_high"] == pytest.approx(0.05)


def test_the_interval_is_close_to_theory_and_repeats_exactly():
    chance = random.Random(5)
    values = pairs([chance.gauss(0.03, 0.1) for _ in range(400)])
    one, same = compare(values), compare(values)
    assert one == same
    spread = (sum((p.score - p.base - one["difference"]) ** 2 for p in values) / 400) ** 0.5
    assert one["difference_high"] - one["difference_low"] == pytest.approx(2 * 1.96 * spread / 400**0.5, rel=0.06)
    # 80 % power needs an effect of 1.96 + 0.84 standard errors.
    assert one["detectable_difference"] == pytest.approx(2.8 * spread / 400**0.5, rel=0.02)


def test_one_task_says_nothing():
    figures = compare(pairs([0.4]))
    assert (figures["difference_low"], figures["difference_high"]) == (-1.0, 1.0)


def test_scopes_are_labels_and_kinds_of_being_held_out():
    mixed = pairs([0.1, 0.2]) + pairs([0.3], label="generation", held_out="task")
    assert {name: len(members) for name, members in scopes(mixed).items()} == {
        "all": 3,
        "exact_match": 2,
        "generation": 1,
        "held-out instances": 2,
        "held-out tasks": 1,
    }
    assert set(scopes(pairs([0.1]))) == {"all", "exact_match"}


def row(model, scope, p_value, difference=0.0, prompt_format="zero_shot"):
    named = {"model": model, "prompt_format": prompt_format, "scope": scope, "num_tasks": 9}
    return {**named, "p_value": p_value, "difference": difference}


def test_the_comparison_named_beforehand_keeps_its_p_value_and_the_others_share_theirs():
    rows = [row("a", "all", 0.04), row("a", "generation", 0.01), row("b", "all", 0.03), row("b", "generation", 0.5)]
    found = adjust(rows, {"model": "a", "prompt_format": "zero_shot", "scope": "all"})
    assert [one["is_primary"] for one in found] == [True, False, False, False]
    # Holm over 0.01, 0.03, 0.5: times 3, 2, 1.
    assert [one["p_adjusted"] for one in found] == pytest.approx([0.04, 0.03, 0.06, 0.5])
    assert adjust([], {}) == []


def test_the_gate_names_every_scope_that_lost_more():
    rows = [
        row("a", "all", 1.0, -0.01),
        row("a", "generation", 1.0, -0.03, "few_shot"),
        row("a", "exact_match", 1, 0.2),
    ]
    (line,) = gate_failures(rows, 0.02)
    assert line == "a is 0.030 worse than the base model, few_shot, generation (9 tasks; --gate allows 0.02)"
    assert len(gate_failures(rows, 0.0)) == 2
    assert gate_failures(rows, 0.03) == []


def test_the_primary_comparison_must_be_among_those_made():
    with pytest.raises(ValueError, match=r"primary\.prompt_format=few_shot is not among prompt_formats"):
        EvaluateConfig(prompt_formats=["zero_shot"], primary={"prompt_format": "few_shot"})
