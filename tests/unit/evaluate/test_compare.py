"""A contender against the base model: pairs, intervals, wording."""

import random

import pytest

from birbal_ray.evaluate.compare import TaskPair, compare, pair_tasks, scopes


def pairs(differences, label="exact_match", held_out="instances"):
    return [TaskPair(f"t{n}", label, held_out, 0.5, 0.5 + d) for n, d in enumerate(differences)]


def test_a_task_counts_by_the_rows_that_both_scored():
    base = {"a": {"1": 1.0, "2": 0.0, "3": 1.0}, "b": {"1": 1.0}}
    contender = {"a": {"1": 0.0, "2": 1.0, "9": 1.0}, "b": {}}
    about = {"a": ("exact_match", "task"), "b": ("generation", "instances"), "c": ("generation", "task")}
    assert pair_tasks(base, contender, about) == [TaskPair("a", "exact_match", "task", 0.5, 0.5)]


def test_means_wins_losses_and_ties_by_hand():
    figures = compare(pairs([0.2, -0.1, 0.0, 0.3]), 1000, 0)
    assert figures["num_tasks"] == 4
    assert figures["base_score"] == pytest.approx(0.5)
    assert figures["score"] == pytest.approx(0.6)
    assert figures["difference"] == pytest.approx(0.1)
    assert (figures["num_wins"], figures["num_losses"], figures["num_ties"]) == (2, 1, 1)
    assert figures["difference_low"] <= 0.1 <= figures["difference_high"]


def test_an_equal_shift_has_no_spread_and_tasks_are_drawn_in_pairs():
    values = [TaskPair(f"t{n}", "generation", "task", n / 10, n / 10 + 0.05) for n in range(10)]
    figures = compare(values, 500, 1)
    assert figures["difference_low"] == pytest.approx(0.05)
    assert figures["difference_high"] == pytest.approx(0.05)


def test_the_interval_is_the_seeds_and_close_to_theory():
    chance = random.Random(5)
    values = pairs([chance.gauss(0.03, 0.1) for _ in range(400)])
    one, same, other = compare(values, 4000, 3), compare(values, 4000, 3), compare(values, 4000, 4)
    assert one == same
    assert one["difference_low"] != other["difference_low"]
    spread = (sum((p.contender - p.base - one["difference"]) ** 2 for p in values) / 400) ** 0.5
    assert one["difference_high"] - one["difference_low"] == pytest.approx(2 * 1.96 * spread / 400**0.5, rel=0.06)


def test_one_task_says_nothing():
    figures = compare(pairs([0.4]), 1000, 0)
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
