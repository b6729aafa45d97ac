"""The scheduler of adaptive scoring against made-up tasks: no Ray, no clock."""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from birbal_ray.mix.allocation import TaskDemand, allocate
from birbal_ray.ni.metrics import Label
from birbal_ray.score.adaptive import GROW, STOP, TIME_UP, USED_UP, AdaptiveSchedule, FixedSchedule
from birbal_ray.score.config import AdaptiveSettings
from birbal_ray.score.shards import PlannedTask, RowFiles, Shard, Tally, WrittenFile
from birbal_ray.storage import FileRecord
from tests.conftest import examples


def task(name, size, label="exact_match", limit=8):
    empty = {"repairs": {}, "definition": "", "categories": (), "sources": (), "licenses": ()}
    return PlannedTask(name, "", None, "0", Label(label, ""), size, size, 4, limit, **empty)


class Model:
    """Fixed scores of every row of every task, in hash order."""

    def __init__(self, tasks, skill, seed=0):
        rng = random.Random(seed)
        self.scores = {
            one.name: [
                float(rng.random() < skill[one.name])
                if one.label.value == "exact_match"
                else min(1.0, max(0.0, rng.gauss(skill[one.name], 0.2)))
                for _ in range(one.num_instances)
            ]
            for one in tasks
        }
        self.below = {one.name: 1e-9 if one.label.value == "exact_match" else 0.2 for one in tasks}

    def tally(self, name, first, last):
        values = self.scores[name][first:last]
        failed = sum(value < self.below[name] for value in values)
        return Tally(len(values), failed, sum(values), sum(value * value for value in values))

    def write(self, shard):
        record = FileRecord("0" * 64, 1)
        return WrittenFile(
            shard.name, shard.task, shard.num_rows, 0, record, self.tally(shard.task, shard.first, shard.last)
        )


def run(schedule, model, rng, in_flight=4, stop_after=None):
    """Score what the schedule gives out, finishing in a random order; every shard given out."""
    given, running = [], []
    while not schedule.finished or running:
        while len(running) < in_flight and (shard := schedule.next()):
            given.append(shard)
            running.append(shard)
        assert running, "the schedule waits for nothing"
        schedule.record(model.write(running.pop(rng.randrange(len(running)))))
        if stop_after is not None and len(given) >= stop_after:
            return given
    assert schedule.next() is None
    return given


def covered(given):
    rows = {}
    for shard in given:
        rows.setdefault(shard.task, []).extend(range(shard.first, shard.last))
    return rows


@examples(40)
@given(
    st.lists(st.tuples(st.integers(1, 900), st.floats(0, 1), st.booleans()), min_size=1, max_size=8),
    st.integers(1, 200),
    st.integers(0, 800),
    st.sampled_from([0.03, 0.05, 0.2]),
    st.integers(0, 1000),
)
def test_every_task_ends_with_a_prefix_of_its_rows_and_a_true_reason(kinds, shard_rows, budget, margin, seed):
    tasks = [task(f"t{n}", size, "exact_match" if exact else "generation") for n, (size, _, exact) in enumerate(kinds)]
    model = Model(tasks, {f"t{n}": skill for n, (_, skill, _) in enumerate(kinds)}, seed)
    asked = AdaptiveSettings(score_margin=margin, exact_match_budget=budget, generation_budget=budget)
    schedule = AdaptiveSchedule(tasks, asked, shard_rows, RowFiles(()), {})
    rows = covered(run(schedule, model, random.Random(seed)))
    decisions = schedule.decided()
    demands = {label: [] for label in ("exact_match", "generation")}
    for one in tasks:
        size = len(rows[one.name])
        assert sorted(rows[one.name]) == list(range(size)), "every row once, without gaps"
        assert size == one.num_instances or size in {100 * 2**k for k in range(20)}
        tally = model.tally(one.name, 0, size)
        demands[one.label.value].append(TaskDemand(one.name, one.num_instances, min(1.0, tally.mean)))
    for one in tasks:
        size, label = len(rows[one.name]), one.label.value
        tally = model.tally(one.name, 0, size)
        assert (schedule.stops[one.name].reason == USED_UP) == (size == one.num_instances)
        if size < one.num_instances:
            assert tally.half_width(label) <= margin
            low, _ = tally.interval(label)
            others = [other for other in demands[label] if other.name != one.name]
            share = allocate(budget, [*others, TaskDemand(one.name, one.num_instances, low)]).counts[one.name]
            assert tally.num_failed >= share, "with all scores known"
    assert [one.task for one in decisions if one.action == STOP].count("t0") >= 1
    assert all(one.reason for one in decisions)


@examples(25)
@given(st.integers(0, 1000), st.integers(1, 30), st.integers(5, 120))
def test_a_resume_replays_the_decisions_and_uses_every_row(seed, stop_after, shard_rows):
    tasks = [task(f"t{n}", 700, limit=8 + n) for n in range(4)]
    model = Model(tasks, {"t0": 0.02, "t1": 0.4, "t2": 0.9, "t3": 0.99}, seed)
    asked = AdaptiveSettings(exact_match_budget=300, score_margin=0.05)
    first = AdaptiveSchedule(tasks, asked, shard_rows, RowFiles(()), {})
    done = run(first, model, random.Random(seed), in_flight=1, stop_after=stop_after)
    log = first.decided()
    found = RowFiles(shard.name for shard in done)
    tallies = {}
    for shard in done:
        tallies[shard.task] = tallies.get(shard.task, Tally()) + model.tally(shard.task, shard.first, shard.last)
    again = AdaptiveSchedule(tasks, asked, shard_rows, found, tallies, log)
    rest = run(again, model, random.Random(seed + 1))
    rows = covered([*done, *rest])
    assert all(sorted(numbers) == list(range(len(numbers))) for numbers in rows.values())
    resumed = [*log, *again.decided()]
    grown = [(one.task, one.size) for one in resumed if one.action == GROW]
    assert len(grown) == len(set(grown)), "nothing is decided twice"


def test_a_wide_margin_and_no_budget_stop_at_the_first_look():
    tasks = [task("a", 5000), task("b", 5000, "generation")]
    asked = AdaptiveSettings(score_margin=0.2, exact_match_budget=0, generation_budget=0)
    schedule = AdaptiveSchedule(tasks, asked, 64, RowFiles(()), {})
    rows = covered(run(schedule, Model(tasks, {"a": 0.5, "b": 0.5}), random.Random(0)))
    assert {name: len(numbers) for name, numbers in rows.items()} == {"a": 100, "b": 100}


def test_a_task_whose_references_can_not_score_asks_for_no_share():
    tasks = [task("a", 5000), task("b", 5000)]
    unfit = [replace(tasks[0], unreachable_reason="no reference scores 1", unreachable_fraction=1.0), tasks[1]]
    asked = AdaptiveSettings(score_margin=0.2, exact_match_budget=200, generation_budget=0)
    sizes = {}
    for one in (tasks, unfit):
        schedule = AdaptiveSchedule(one, asked, 64, RowFiles(()), {})
        given = run(schedule, Model(tasks, {"a": 0.0, "b": 0.5}), random.Random(0))
        sizes[one is unfit] = {name: len(numbers) for name, numbers in covered(given).items()}
    assert sizes == {False: {"a": 200, "b": 200}, True: {"a": 100, "b": 400}}


def test_a_few_references_that_can_not_score_cost_a_task_no_share():
    """The mix still gives it all of it."""
    some = [replace(task("a", 5000), unreachable_reason="a blank line", unreachable_fraction=0.01), task("b", 5000)]
    asked = AdaptiveSettings(score_margin=0.2, exact_match_budget=200, generation_budget=0)
    schedule = AdaptiveSchedule(some, asked, 64, RowFiles(()), {})
    given = run(schedule, Model(some, {"a": 0.0, "b": 0.5}), random.Random(0))
    assert {name: len(numbers) for name, numbers in covered(given).items()} == {"a": 200, "b": 200}


def test_error_rows_ask_for_no_share():
    class Failing(Model):
        def tally(self, name, first, last):
            return Tally() if name == "a" else super().tally(name, first, last)

    tasks = [task("a", 150), task("b", 5000)]
    asked = AdaptiveSettings(score_margin=0.2, exact_match_budget=200)
    schedule = AdaptiveSchedule(tasks, asked, 64, RowFiles(()), {})
    model = Failing(tasks, {"a": 0.0, "b": 0.5})
    rows = covered(run(schedule, model, random.Random(0)))
    assert model.tally("b", 0, len(rows["b"])).num_failed >= 200, "the whole budget is b's"
    assert schedule.stops["a"].reason == USED_UP


def test_an_even_part_is_filled_with_rows_of_any_score_and_the_rest_with_failed_ones():
    tasks = [task("solved", 5000), task("half", 5000)]
    model, sizes = Model(tasks, {"solved": 1.0, "half": 0.5}), {}
    for even in (0.0, 0.5):
        asked = AdaptiveSettings(score_margin=0.2, exact_match_budget=600, gamma=4, even_fraction=even)
        schedule = AdaptiveSchedule(tasks, asked, 64, RowFiles(()), {})
        given = run(schedule, model, random.Random(0))
        sizes[even] = {name: len(numbers) for name, numbers in covered(given).items()}
    # Of 600 rows, 300 are spread evenly: 150 of each. The other 300 are owed to failures.
    assert sizes == {0.0: {"solved": 100, "half": 1600}, 0.5: {"solved": 200, "half": 800}}


def test_long_completions_come_first_and_all_tasks_get_their_first_range_before_any_its_second():
    tasks = [task("short", 400, limit=8), task("long", 400, limit=200)]
    schedule = AdaptiveSchedule(tasks, AdaptiveSettings(), 100, RowFiles(()), {})
    assert [schedule.next().task for _ in range(2)] == ["long", "short"]
    assert schedule.next() is None and not schedule.finished


def test_more_instances_reopen_a_task_that_was_used_up():
    model = Model([task("a", 300)], {"a": 0.5})
    asked = AdaptiveSettings(score_margin=0.001)
    schedule = AdaptiveSchedule([task("a", 120)], asked, 100, RowFiles(()), {})
    done = run(schedule, model, random.Random(0))
    found, tallies = RowFiles(shard.name for shard in done), {"a": model.tally("a", 0, 120)}
    again = AdaptiveSchedule([task("a", 300)], asked, 100, found, tallies, schedule.decided())
    assert sum(shard.num_rows for shard in run(again, model, random.Random(0))) == 180


def test_rows_to_try_again_go_first_and_count_for_no_size():
    retry = Shard("a", "", "0", "exact_match", 0, 120, 8, retry=(3,))
    model = Model([task("a", 120)], {"a": 0.5})
    found, tallies = RowFiles([retry.name]), {"a": model.tally("a", 0, 120)}
    schedule = AdaptiveSchedule([task("a", 120)], AdaptiveSettings(), 100, found, tallies, retries=[retry])
    assert not schedule.finished and schedule.next() == retry
    schedule.record(model.write(retry))
    assert schedule.finished


@pytest.mark.parametrize("label", ["exact_match", "generation"])
def test_half_widths_agree_with_the_intervals_that_are_reported(label):
    tally = Tally.of(Model([task("a", 300, label)], {"a": 0.4}).scores["a"], label)
    low, high = tally.interval(label)
    assert tally.half_width(label) == pytest.approx((high - low) / 2)
    assert Tally(1, 0, 1.0, 1.0).half_width(label) == math.inf


def test_intervals():
    low, high = Tally.of([1.0] * 5 + [0.0] * 5, "exact_match").interval("exact_match")
    assert (round(low, 4), round(high, 4)) == (0.2366, 0.7634)  # Wilson, n = 10
    assert Tally.of([0.0] * 10, "exact_match").interval("exact_match")[0] == 0.0
    scores = [0.2, 0.5, 0.4]
    low, high = Tally.of(scores, "generation").interval("generation")
    # Student's t with 2 degrees of freedom (quantile 4.3027), not the normal distribution's 1.96.
    reach = 4.302652729911275 * statistics.stdev(scores) / math.sqrt(3)
    assert (low, high) == (0.0, pytest.approx(statistics.mean(scores) + reach))
    low, _ = Tally.of([0.5, 0.52, 0.48], "generation").interval("generation")
    assert low == pytest.approx(0.5 - 0.0496828, abs=1e-6)
    assert Tally.of([0.7], "generation").interval("generation") == (0.0, 1.0), "one score has no spread"


def test_a_fixed_schedule_gives_its_list_and_ends():
    shards = [Shard("t", "", "", "exact_match", n, n + 1, 8) for n in range(3)]
    schedule = FixedSchedule(shards)
    assert [schedule.next() for _ in range(3)] == shards
    assert schedule.finished and schedule.next() is None
    assert FixedSchedule([]).finished


def test_when_time_is_up_tasks_stop_where_they_are():
    tasks = [task("a", 1000), task("b", 1000)]
    model = Model(tasks, {"a": 0.5, "b": 0.5})
    schedule = AdaptiveSchedule(tasks, AdaptiveSettings(first_instances=20), 10, RowFiles([]), {})
    given = [schedule.next() for _ in range(3)]
    schedule.end()
    assert schedule.next() is None
    assert not schedule.finished  # what was given out is still to come
    for shard in given:
        schedule.record(model.write(shard))
    assert schedule.finished
    assert schedule.size()[0] == sum(shard.num_rows for shard in given)
    assert {stop.reason for stop in schedule.stops.values()} == {TIME_UP}
    assert sum(stop.size for stop in schedule.stops.values()) == schedule.size()[0]


def test_a_task_that_is_scored_to_its_end_when_time_is_up_is_used_up():
    model = Model([task("a", 10), task("b", 1000)], {"a": 0.5, "b": 0.5})
    schedule = AdaptiveSchedule([task("a", 10), task("b", 1000)], AdaptiveSettings(), 50, RowFiles([]), {})
    given = [schedule.next() for _ in range(2)]
    schedule.end()
    for shard in given:
        schedule.record(model.write(shard))
    assert {name: stop.reason for name, stop in schedule.stops.items()} == {"a": USED_UP, "b": TIME_UP}


def test_rows_to_try_again_are_tried_when_time_is_up():
    retry = Shard("a", "", "0", "exact_match", 0, 100, 8, retry=(3,))
    model = Model([task("a", 1000)], {"a": 0.5})
    found, tallies = RowFiles([retry.name]), {"a": model.tally("a", 0, 100)}
    schedule = AdaptiveSchedule([task("a", 1000)], AdaptiveSettings(), 100, found, tallies, retries=[retry])
    schedule.end()
    assert schedule.size() == (retry.num_rows, retry.work)
    assert schedule.next() == retry and schedule.next() is None
    schedule.record(model.write(retry))
    assert schedule.finished


def test_a_run_that_time_ended_continues_when_there_is_more():
    model = Model([task("a", 1000)], {"a": 0.5})
    first = AdaptiveSchedule([task("a", 1000)], AdaptiveSettings(first_instances=20), 10, RowFiles([]), {})
    shard = first.next()
    first.end()
    first.record(model.write(shard))
    log = first.decided()
    again = AdaptiveSchedule(
        [task("a", 1000)],
        AdaptiveSettings(first_instances=20),
        10,
        RowFiles([shard.name]),
        {"a": model.tally("a", shard.first, shard.last)},
        log,
    )
    assert not again.finished
    assert again.next().first == shard.last
