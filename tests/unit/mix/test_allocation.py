"""Hand-computed counts and properties of both selection policies."""

import random

from hypothesis import given
from hypothesis import strategies as st

from birbal_ray.mix.allocation import (
    LADDER_CAPS,
    TaskDemand,
    allocate,
    band_name,
    band_quota,
    ladder_cap,
    train_size,
)
from tests.conftest import examples


def counts(budget, *tasks, gamma=1.0):
    return allocate(budget, [TaskDemand(*task) for task in tasks], gamma).counts


def test_budget_follows_what_the_model_gets_wrong():
    # weights 0.75 and 0.25 of a budget of 100
    assert counts(100, ("a", 1000, 0.25), ("b", 1000, 0.75)) == {"a": 75, "b": 25}


def test_full_task_passes_its_share_on():
    # a would take 50, holds 10; the other 90 go to b and c by 0.25 : 0.25
    assert counts(100, ("a", 10, 0.5), ("b", 1000, 0.75), ("c", 1000, 0.75)) == {"a": 10, "b": 45, "c": 45}


def test_two_tasks_fill_one_after_the_other():
    # level 40/2.0 = 20: a (1.0, 5) full; 35/1.0 = 35: b (0.5, 12 < 17.5) full; 23 left for c
    assert counts(40, ("a", 5, 0.0), ("b", 12, 0.5), ("c", 100, 0.5)) == {"a": 5, "b": 12, "c": 23}


def test_largest_remainder_and_ties_by_name():
    # shares 10/3 each: one row over, to the first by name
    assert counts(10, ("c", 9, 0.5), ("a", 9, 0.5), ("b", 9, 0.5)) == {"a": 4, "b": 3, "c": 3}
    # weights 0.5 and 0.75: shares 2.4 and 3.6 of 6, the seat goes to the larger remainder
    assert counts(6, ("a", 9, 0.5), ("b", 9, 0.25)) == {"a": 2, "b": 4}


def test_gamma_bends_the_weights():
    assert counts(100, ("a", 1000, 0.0), ("b", 1000, 0.5), gamma=2.0) == {"a": 80, "b": 20}
    assert counts(100, ("a", 1000, 0.0), ("b", 1000, 1.0), gamma=0.0) == {"a": 50, "b": 50}


def test_solved_task_gives_nothing():
    assert counts(10, ("a", 100, 1.0), ("b", 100, 0.9)) == {"a": 0, "b": 10}


def test_shortfall_names_the_short_tasks():
    result = allocate(100, [TaskDemand("a", 10, 0.5), TaskDemand("b", 60, 0.5), TaskDemand("solved", 500, 1.0)])
    assert result.counts == {"a": 10, "b": 60, "solved": 0}
    assert result.shortfall == 30
    assert [(task.name, task.wanted, task.num_candidates) for task in result.short_tasks] == [("a", 50, 10)]
    exact = allocate(70, [TaskDemand("a", 10, 0.5), TaskDemand("b", 60, 0.5)])
    assert (exact.shortfall, exact.short_tasks) == (0, ())


def test_published_ladder_of_caps():
    assert [ladder_cap(decile / 10 + 0.05) for decile in range(10)] == list(LADDER_CAPS)
    assert ladder_cap(0.0) == 350 and ladder_cap(1.0) == 50 and ladder_cap(0.9) == 50
    assert ladder_cap(0.85, factor=2.0) == 200 and ladder_cap(0.95, factor=0.5) == 25
    assert ladder_cap(0.5, factor=0.33) == 82  # int(250 · 0.33)


def test_published_bands():
    assert [band_quota(0, n) for n in (0, 1, 5, 9)] == [0, 0, 4, 7]
    assert [band_quota(3, n) for n in (4, 5, 9, 10)] == [0, 1, 1, 2]
    assert [band_name(n) for n in (0, 1, 6)] == ["rouge_0.0", "rouge_0.2", "rouge_0.7"]


def test_split_is_the_published_one():
    sizes = (0, 2, 49, 50, 100, 100_000)
    assert [train_size(n, 0.02) for n in sizes] == [int(0.98 * n) for n in sizes]


def test_a_mix_of_one_row_trains_on_it():
    assert [train_size(n, fraction) for n in (1, 2) for fraction in (0.02, 0.5, 0.99)] == [1] * 6


def test_an_even_part_reaches_the_tasks_that_the_scores_leave_out():
    demands = [TaskDemand("bad", 900, 0.0), TaskDemand("half", 900, 0.5), TaskDemand("solved", 900, 1.0)]
    demands.append(TaskDemand("unfit", 900, 0.0, 0))
    assert allocate(600, demands).counts == {"bad": 400, "half": 200, "solved": 0, "unfit": 0}
    # Half of 600: 75 to each of the four, the other half as before.
    assert allocate(600, demands, even_fraction=0.5).counts == {"bad": 275, "half": 175, "solved": 75, "unfit": 75}
    assert set(allocate(600, demands, even_fraction=1.0).counts.values()) == {150}
    assert allocate(10, demands[2:]).counts == {"solved": 0, "unfit": 0}
    assert allocate(10, demands[2:], even_fraction=0.1).counts == {"solved": 5, "unfit": 5}


demand_lists = st.lists(st.tuples(st.integers(0, 400), st.floats(0, 1)), min_size=1, max_size=30).map(
    lambda pairs: [TaskDemand(f"task{i:03d}", n, s) for i, (n, s) in enumerate(pairs)]
)


@examples(300)
@given(demand_lists, st.integers(0, 4000), st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.7]), st.integers())
def test_properties(demands, budget, gamma, shuffle_seed):
    result = allocate(budget, demands, gamma)
    given_rows = sum(result.counts.values())
    assert given_rows + result.shortfall == budget
    assert result.shortfall >= 0
    by_name = {demand.name: demand for demand in demands}
    assert all(0 <= count <= by_name[name].num_candidates for name, count in result.counts.items())
    if result.shortfall:  # everything with a weight is used up
        for demand in demands:
            if (1 - demand.task_score) ** gamma > 0:
                assert result.counts[demand.name] == demand.num_candidates
    shuffled = list(demands)
    random.Random(shuffle_seed).shuffle(shuffled)
    assert allocate(budget, shuffled, gamma) == result
    for one in demands:  # monotone: a worse task that is not full gets no fewer rows
        for other in demands:
            worse = (1 - one.task_score) ** gamma > (1 - other.task_score) ** gamma
            if worse and result.counts[one.name] < one.num_candidates:
                assert result.counts[one.name] >= result.counts[other.name]
