import json
import math
import time

import pytest

from birbal_ray.settings import ConfigError, load_config
from birbal_ray.storage import RunError
from birbal_ray.train.budget import Clock, Deadline, budget_by_clock, learning_rate_factor
from birbal_ray.train.config import TrainConfig


class Time:
    """A clock that tests move."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def run_to_the_end(budget, total_steps, step_seconds, tmp_path, setup_seconds=5.0):
    now = Time()
    deadline = Deadline(budget, total_steps, Clock(tmp_path / "clock.json", now))
    deadline.clock.eval_seconds, deadline.clock.save_seconds = 4.0, 1.0
    now.now += setup_seconds
    deadline.clock.start_stepping()
    progress, step = [deadline.progress(0)], 0
    while progress[-1] < 1.0 and step < total_steps:
        now.now += step_seconds
        step += 1
        deadline.step_took(step_seconds)
        progress.append(deadline.progress(step))
    return step, progress, deadline


def test_what_was_imported_before_the_clock_was_made_counts(tmp_path):
    now = Time()
    clock = Clock(tmp_path / "clock.json", now, started=now.now - 8.0)
    now.now += 2.0
    clock.start_stepping()
    now.now += 1.0
    clock.save()
    assert (clock.elapsed_seconds, clock.setup_seconds) == (11.0, 10.0)
    assert Clock(tmp_path / "clock.json", now).elapsed_seconds == 11.0


def test_steps_that_all_fit_follow_the_steps(tmp_path):
    step, progress, _ = run_to_the_end(10_000, 50, 1.0, tmp_path)
    assert step == 50
    assert progress == [pytest.approx(k / 50) for k in range(51)]


def test_a_short_budget_ends_the_run_in_time_with_progress_one(tmp_path):
    step, progress, deadline = run_to_the_end(100, 1000, 1.0, tmp_path)
    assert progress[-1] == 1.0
    assert progress == sorted(progress)
    # The final evaluation, the checkpoint and the margin still fit; no time for a further step was left.
    left = 100 - deadline.clock.elapsed_seconds
    assert 1.1 * 5 + 1.0 <= left < 1.1 * 5 + 1.0 + 1.0
    assert step == 88
    # All but the last of the cosine was used.
    assert progress[-2] > 0.97


def test_an_evaluation_that_is_due_counts_before_the_next_step(tmp_path):
    now = Time()
    deadline = Deadline(100, 1000, Clock(tmp_path / "clock.json", now))
    deadline.step_took(1.0)
    now.now += 95
    assert deadline.progress(10) < 1.0
    assert deadline.progress(10, due_seconds=4.0) == 1.0


def test_a_damaged_clock_is_named(tmp_path):
    (tmp_path / "clock.json").write_text('{"elapsed_sec')
    with pytest.raises(RunError, match=r"/clock\.json: not valid JSON"):
        Clock(tmp_path / "clock.json")


def test_time_survives_restarts(tmp_path):
    now = Time()
    first = Clock(tmp_path / "clock.json", now)
    now.now += 7
    first.start_stepping()
    now.now += 33
    first.save()
    now.now += 500  # nobody is up
    second = Clock(tmp_path / "clock.json", now)
    assert second.elapsed_seconds == 40
    assert second.setup_seconds == 7
    now.now += 3
    assert second.elapsed_seconds == 43
    assert second.setup_seconds == 10
    second.save()
    assert json.loads((tmp_path / "clock.json").read_text())["elapsed_seconds"] == 43


def test_what_the_end_takes_is_held_back_after_a_restart_too(tmp_path):
    now = Time()
    first = Deadline(100, 1000, Clock(tmp_path / "clock.json", now))
    first.clock.eval_seconds, first.clock.save_seconds = 20.0, 10.0
    first.step_took(5.0)
    now.now += 60
    assert first.progress(10) < 1.0
    first.clock.save()
    second = Deadline(100, 1000, Clock(tmp_path / "clock.json", now))
    assert second.reserve_seconds == first.reserve_seconds == pytest.approx(34)
    now.now += 1.0
    assert second.progress(10) == 1.0, "a step of 5 s would end after second 66"
    assert second.evaluation_fits()
    now.now += 18.0
    assert not second.evaluation_fits()
    second.step_took(1.0)
    assert second.clock.step_seconds == 1.0, "what this session measures counts"


def test_forecast_counts_evaluations_and_stops_at_the_wanted_steps(tmp_path):
    now = Time()
    deadline = Deadline(1000, 500, Clock(tmp_path / "clock.json", now))
    assert deadline.forecast(0, 100, 64, 64) is None
    deadline.step_took(10.0)
    forecast = deadline.forecast(0, 100, 64, 64)
    assert forecast["by_budget"]
    assert forecast["num_steps"] == 99
    assert forecast["epochs"] == pytest.approx(0.99)
    deadline.clock.eval_seconds = 640.0
    assert deadline.forecast(0, 100, 64, 64)["num_steps"] == math.floor((1000 - 1.1 * 640 - 1) / 20)
    unlimited = Deadline(None, 500, Clock(tmp_path / "other.json", now))
    unlimited.step_took(10.0)
    assert unlimited.forecast(3, 100, 64, 64)["num_steps"] == 500
    assert not unlimited.forecast(3, 100, 64, 64)["by_budget"]


def test_learning_rate_warms_up_then_falls_to_its_floor():
    def factor(step, total=1000, warmup=100, floor=0.0):
        return learning_rate_factor(step, step / total, warmup, floor)

    assert factor(0) == pytest.approx(0.01)
    assert factor(49) == pytest.approx(0.5 * 0.5 * (1 + math.cos(math.pi * 0.049)))
    assert factor(500) == pytest.approx(0.5)
    assert factor(1000) == 0.0
    assert factor(1000, floor=0.1) == pytest.approx(0.1)
    # A run of 20 steps warms up for two of them, not a hundred.
    assert factor(2, total=20) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.1)))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("24h", 86400), ("1h30m", 5400), ("90 m", 5400), ("45s", 45), ("1d", 86400), ("0.5h", 1800), (60, 60)],
)
def test_durations(text, seconds):
    assert load_config(TrainConfig, flags={"budget": text}).budget == seconds


@pytest.mark.parametrize("text", ["24 hours", "h", "-5m", "1x", ""])
def test_bad_durations_name_the_value(text):
    with pytest.raises(ConfigError, match="budget"):
        load_config(TrainConfig, flags={"budget": text})


def test_a_recipe_s_deadline_counts_what_the_worker_s_clock_does_not(tmp_path):
    """Packing, a wait for a node, another worker's start: the session still ends by the recipe's own time."""
    clock = Clock(tmp_path / "clock.json")
    clock._before = 200.0  # of earlier sessions
    assert budget_by_clock(600.0, None, clock) == 600.0
    assert budget_by_clock(None, None, clock) is None
    assert budget_by_clock(600.0, time.time() + 100, clock) == pytest.approx(300, abs=9)
    assert budget_by_clock(None, time.time() + 100, clock) == pytest.approx(300, abs=9)
    assert budget_by_clock(250.0, time.time() + 100, clock) == 250.0
    assert budget_by_clock(600.0, time.time() - 500, clock) == 1.0, "the run ends at once, and says so"
