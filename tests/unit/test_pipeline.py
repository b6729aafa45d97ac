"""One budget for all steps: what each may take, over interruptions, and what it is asked for."""

from __future__ import annotations

import contextlib
import json
import math
from types import SimpleNamespace

import pytest
import yaml

from birbal_ray import pipeline
from birbal_ray.budget import BudgetClock
from birbal_ray.lock import hold_lock
from birbal_ray.progress import CLOCK_FILE, figures_key, read_times, save_figures
from birbal_ray.recipe import HELD_OUT_FRACTION, STEPS, PipelineConfig, ShareSettings, join_steps
from birbal_ray.run import RunFailedError, RunMismatchError, Step, open_run
from birbal_ray.settings import ConfigError, load_config, seconds_of
from birbal_ray.status import describe_times
from birbal_ray.storage import RunError, open_folder

SHARES = ShareSettings(score=0.2, tune=0.1, evaluate=0.2, report=0.05)
LEAST = {"score": 5.0, "tune": 5.0, "train": 10.0, "evaluate": 5.0, "report": 1.0}


class Time:
    """A clock that tests set."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def clock_in(folder, budget=1000.0, time=None, **options):
    return BudgetClock(open_folder(folder), budget, SHARES, LEAST, now=time or Time(), **options)


def spend(clock, time, step, seconds):
    with clock.running(step):
        time.now += seconds


def test_shares_hold_back_what_later_steps_need(tmp_path):
    time = Time()
    clock = clock_in(tmp_path, time=time)
    assert clock.left("score") == pytest.approx(200)
    assert clock.left("train") == pytest.approx(750)  # before anything ran: all but evaluate and report


def test_what_a_step_leaves_over_goes_to_training(tmp_path):
    time = Time()
    clock = clock_in(tmp_path, time=time)
    spend(clock, time, "score", 50)
    spend(clock, time, "tune", 20)
    spend(clock, time, "mix", 10)
    assert clock.left("train") == pytest.approx(1000 - 80 - 250)
    assert clock.overrun("score") < 0


def test_an_overrun_is_taken_from_training(tmp_path):
    time = Time()
    clock = clock_in(tmp_path, time=time)
    spend(clock, time, "score", 260)
    assert clock.overrun("score") == pytest.approx(60)
    assert clock.left("train") == pytest.approx(1000 - 260 - 250)
    assert clock.left("score") == LEAST["score"]  # a continuation can still do something


def test_the_mix_has_no_share_and_is_not_limited(tmp_path):
    time = Time()
    clock = clock_in(tmp_path, time=time)
    assert clock.left("mix") == math.inf
    spend(clock, time, "mix", 120)
    assert clock.left("mix") == math.inf
    assert clock.overrun("mix") == clock.overrun("train") == 0
    assert clock.left("train") == pytest.approx(1000 - 120 - 250)


def test_the_clock_survives_a_kill_to_within_a_beat(tmp_path):
    time = Time()
    clock = clock_in(tmp_path, time=time)
    spend(clock, time, "score", 30)
    record = json.loads((tmp_path / CLOCK_FILE).read_text())
    assert record["spent_seconds"]["score"] == pytest.approx(30)
    later = Time()
    later.now = 5000.0  # another boot: its monotonic clock is another one
    again = clock_in(tmp_path, time=later)
    assert again.total == pytest.approx(30)
    spend(again, later, "score", 10)
    assert again.spent["score"] == pytest.approx(40)


def test_a_look_at_a_recipe_that_has_ended_takes_no_time(tmp_path):
    time = Time()
    clock = clock_in(tmp_path, time=time)
    spend(clock, time, "score", 30)
    before = (tmp_path / CLOCK_FILE).read_bytes()
    again = clock_in(tmp_path, time=time)
    again.has_ended = True
    spend(again, time, "score", 10)
    spend(again, time, "report", 10)
    assert again.total == pytest.approx(30)
    assert (tmp_path / CLOCK_FILE).read_bytes() == before


def test_status_says_what_is_used_of_the_budget(tmp_path):
    time = Time()
    assert describe_times(read_times(open_folder(tmp_path))) == ""
    clock = clock_in(tmp_path, time=time)
    spend(clock, time, "score", 90)
    spend(clock, time, "mix", 5)
    assert (
        describe_times(read_times(open_folder(tmp_path)))
        == "time: 1 min 35 s of 16 min 40 s (score 1 min 30 s, mix 5 s)"
    )


def test_from_scratch_forgets_the_time_and_the_decisions(tmp_path):
    time = Time()
    clock = clock_in(tmp_path, time=time)
    spend(clock, time, "score", 30)
    assert clock.decide("train.budget", lambda: 600.0) == 600.0
    assert clock_in(tmp_path).decide("train.budget", lambda: 1.0) == 600.0
    fresh = clock_in(tmp_path, overwrite=ALL)
    assert fresh.total == 0
    assert fresh.decide("train.budget", lambda: 1.0) == 1.0


def test_a_continued_training_gets_the_same_budget_and_an_earlier_end(tmp_path):
    config = join_steps(PipelineConfig(output=str(tmp_path), tasks="t", budget=1000, shares=SHARES))
    time = Time()
    clock = clock_in(tmp_path, time=time)
    spend(clock, time, "score", 100)

    def seconds_to_the_end(settings):
        return settings.resources.end_by - pipeline.time.time()

    first = pipeline.settings_of("train", config, clock)
    assert first.budget == pytest.approx(650 - pipeline.TRAIN_START_SECONDS)
    assert seconds_to_the_end(first) == pytest.approx(first.budget, abs=9)
    spend(clock, time, "train", 260)  # also what was lost between two sessions, or waiting for a node
    second = pipeline.settings_of("train", config, clock)
    assert second.budget == first.budget
    assert seconds_to_the_end(second) == pytest.approx(650 - 260 - pipeline.TRAIN_START_SECONDS, abs=9)


def test_training_without_time_is_refused_before_its_budget_is_fixed(tmp_path):
    config = join_steps(PipelineConfig(output=str(tmp_path), tasks="t", budget=1000, shares=SHARES))
    time = Time()
    clock = clock_in(tmp_path, time=time)
    spend(clock, time, "score", 740)
    with pytest.raises(ConfigError, match="leaves training 10 s; it needs 25 s: give the same command a larger"):
        pipeline.settings_of("train", config, clock)
    larger = clock_in(tmp_path, budget=2000.0)
    assert pipeline.settings_of("train", config, larger).budget == pytest.approx(760 - pipeline.TRAIN_START_SECONDS)


def test_another_budget_decides_again(tmp_path):
    assert clock_in(tmp_path).decide("evaluate.instances_per_task", lambda: 3) == 3
    assert clock_in(tmp_path, budget=5000.0).decide("evaluate.instances_per_task", lambda: 9) == 9


def test_a_continued_score_run_has_the_budget_it_started_with(tmp_path):
    config = join_steps(PipelineConfig(output=str(tmp_path), tasks="t", budget=1000, shares=SHARES))
    time = Time()
    clock = clock_in(tmp_path, time=time)
    first = pipeline.settings_of("score", config, clock).budget
    spend(clock, time, "score", 150)
    assert pipeline.settings_of("score", config, clock).budget == first == pytest.approx(200)


@pytest.mark.parametrize(
    ("step", "following", "record"),
    [("score", "tune", {"settings": {"budget": 200.0}}), ("tune", "mix", {"budget": 200.0})],
)
@pytest.mark.parametrize("budget", [5000, None])
def test_a_larger_budget_comes_too_late_for_what_the_next_step_was_made_from(tmp_path, step, following, record, budget):
    """Else scoring would go on, and search and mix refuse the changed scores."""
    config = join_steps(PipelineConfig(output=str(tmp_path), tasks="t", budget=budget, shares=SHARES))
    (tmp_path / step).mkdir()
    (tmp_path / step / "manifest.json").write_text(json.dumps(record))
    larger = pipeline.settings_of(step, config, clock_in(tmp_path, budget=budget)).budget
    assert larger is None if budget is None else larger > 200
    (tmp_path / following).mkdir()
    (tmp_path / following / "run.json").write_text("{}")
    assert pipeline.settings_of(step, config, clock_in(tmp_path, budget=budget)).budget == 200
    restarted = pipeline.settings_of(step, config, clock_in(tmp_path, budget=budget, overwrite=ALL)).budget
    assert restarted != 200, "with --overwrite"


@pytest.fixture
def scored(tmp_path, monkeypatch):
    """scored(*sessions) makes a score run on the sample tasks, of (load seconds, steady seconds, rows): its recipe."""
    monkeypatch.setenv("BIRBAL_CACHE", str(tmp_path / "cache"))

    def make(*sessions, **settings):
        folder = open_folder(tmp_path / "score")
        folder.write_json("manifest.json", {"settings": {"engine": {"device": "cpu"}}})
        for number, values in enumerate(sessions, 1):
            record = dict(zip(("load_seconds", "steady_seconds", "rows"), values, strict=True))
            folder.write_json(f"sessions/{number}.json", record)
        values = {"output": str(tmp_path), "tasks": "sample-tasks", "budget": 1000, **settings}
        return join_steps(PipelineConfig.model_validate(values))

    return make


def test_an_evaluation_asks_what_its_time_allows(scored):
    config = scored((10.0, 50.0, 200))
    assert pipeline.instances_that_fit(config, 500.0) == int((500 * 0.7 - 20) * 4 / (8 * 2 * 2))
    assert pipeline.instances_that_fit(config, 1.0) == 2


@pytest.mark.parametrize("last", [(10.0, 0.0, 0), (10.0, 50.0, 2)])
def test_the_speed_of_scoring_is_that_of_all_its_sessions(scored, last):
    """The last one may have had a handful of rows left, or none."""
    config = scored((10.0, 50.0 - last[1], 200 - last[2]), last)
    assert pipeline.instances_that_fit(config, 500.0) == int((500 * 0.7 - 20) * 4 / (8 * 2 * 2))


def test_a_session_that_answered_nothing_says_nothing_of_an_engine_s_load(scored):
    """It waited for a card, say, and gave up."""
    config = scored((1200.0, 0.0, 0), (10.0, 50.0, 200))
    assert pipeline.instances_that_fit(config, 500.0) == int((500 * 0.7 - 20) * 4 / (8 * 2 * 2))


def test_where_the_sessions_say_too_little_the_speed_is_what_was_measured_here_before(scored):
    config = scored((10.0, 1.0, 3))
    assert pipeline.instances_that_fit(config, 500.0) == int((500 * 0.7 - 2 * 60) * 1 / (8 * 2 * 2))
    save_figures(figures_key("score", config.score), load_seconds=10.0, rows_per_second=2.0)
    assert pipeline.instances_that_fit(config, 500.0) == int((500 * 0.7 - 20) * 2 / (8 * 2 * 2))


def test_an_evaluation_s_time_is_for_the_tasks_that_it_takes(scored, write_task):
    write_task("taken", 3)
    write_task("left_out", 3, Categories=["Translation"])
    write_task("held_back", 3)
    folder = write_task("MMLU", 3)
    (folder / "broken.json").write_text("{")
    config = scored((10.0, 50.0, 200), tasks=str(folder), evaluate={"tasks": {"exclude": ["held_back"]}})
    assert pipeline.instances_that_fit(config, 60.0) == int((60 * 0.7 - 20) * 4 / (1 * 2 * 2))


def test_adaptive_scoring_fills_the_shares_of_the_pipeline_s_mix():
    """What scoring is given itself stays."""
    mix = {"task_score": {"exact_match_budget": 70, "generation_budget": 80, "gamma": 2.0, "failed_below": 0.3}}
    mix["task_score"]["even_fraction"] = 0.5
    score = {"adaptive": {"enabled": True, "generation_budget": 5}}
    given = {"output": "o", "tasks": "t", "mix": mix, "score": score}
    config = PipelineConfig.model_validate({**given, "search": False})
    adaptive = join_steps(config).score.adaptive
    assert (adaptive.exact_match_budget, adaptive.generation_budget, adaptive.gamma) == (70, 5, 2.0)
    assert (adaptive.even_fraction, adaptive.failed_below) == (0.5, 0.3)

    searched = {"mix": {"task_score": {"exact_match_budget": 90, "generation_budget": 0}}}
    config = PipelineConfig.model_validate({**given, "tune": searched, "search": True})
    assert join_steps(config).score.adaptive.exact_match_budget == 90, "the search's mixes ask for more"
    assert join_steps(config.replace({"search": False})).score.adaptive.exact_match_budget == 70
    ladder = PipelineConfig.model_validate({**given, "mix": {**mix, "policy": "birbal_2023"}, "search": False})
    assert join_steps(ladder).score.adaptive.exact_match_budget == 50_000, "the ladder reads no budget"


def test_without_a_budget_nothing_is_limited(tmp_path):
    config = join_steps(PipelineConfig(output=str(tmp_path), tasks="t"))
    clock = clock_in(tmp_path, budget=None)
    assert pipeline.settings_of("score", config, clock).budget is None
    assert pipeline.settings_of("train", config, clock).budget is None
    assert not config.score.adaptive.enabled


def test_within_a_budget_scoring_may_stop_where_it_is(tmp_path):
    config = join_steps(PipelineConfig(output=str(tmp_path), tasks="t", budget=1000))
    assert config.score.adaptive.enabled


@pytest.mark.parametrize(("budget", "step"), [(20, "score"), (60, "evaluate")])
def test_a_budget_that_is_too_small_names_the_least_that_works(tmp_path, budget, step):
    config = PipelineConfig(output=str(tmp_path), budget=budget, shares=ShareSettings(score=0.1, evaluate=0.3))
    least = {**LEAST, step: 40.0}
    with pytest.raises(ConfigError, match=f"is too small.*{step} needs.*the least that works is ") as caught:
        pipeline.refuse_small_budget(config, least)
    enough = seconds_of(str(caught.value).rpartition("works is ")[2].partition(",")[0])
    pipeline.refuse_small_budget(config.model_copy(update={"budget": enough}), least)


def test_a_recipe_without_held_out_tasks_leaves_rows_of_each_to_evaluate(tmp_path):
    config = PipelineConfig(output=str(tmp_path), tasks="my-tasks")
    assert join_steps(config).score.tasks.held_out_fraction == HELD_OUT_FRACTION
    assert join_steps(config).evaluate.scoring().tasks.held_out_fraction == 0
    assert join_steps(config.replace({"held_out_tasks": ["b"]})).score.tasks.held_out_fraction == 0
    asked = PipelineConfig(output=str(tmp_path), tasks="my-tasks", score={"tasks": {"held_out_fraction": 0}})
    assert join_steps(asked).score.tasks.held_out_fraction == 0


def test_steps_are_joined_and_held_out_tasks_are_only_evaluated(tmp_path):
    config = join_steps(
        PipelineConfig(output=str(tmp_path), tasks="my-tasks", model="org/model", held_out_tasks=["b"], device="cpu")
    )
    assert config.score.tasks.exclude == ["b"]
    assert config.evaluate.tasks.exclude == []
    assert {config.score.tasks.path, config.evaluate.tasks.path} == {"my-tasks"}
    assert config.mix.scores == config.score.output == config.tune.scores
    assert config.train.mix == config.mix.output == config.evaluate.mix
    assert config.evaluate.adapters == [f"adapter={config.train.output}"]
    assert {config.score.model.name, config.train.model.name, config.evaluate.model.name} == {"org/model"}
    assert config.tune.train.model.name == "smollm2-135m"  # the proxy is its own model
    assert config.train.resources.device == config.score.engine.device == "cpu"


def test_an_evaluation_on_other_tasks_keeps_them(tmp_path):
    values = {"output": str(tmp_path), "score": {"tasks": {"path": "train"}}, "evaluate": {"tasks": {"path": "test"}}}
    config = join_steps(PipelineConfig.model_validate(values))
    assert (config.score.tasks.path, config.evaluate.tasks.path) == ("train", "test")


def test_a_recipe_without_output_is_refused():
    with pytest.raises(ConfigError, match="--output is required"):
        join_steps(PipelineConfig())


def test_shares_leave_something_for_training():
    with pytest.raises(ConfigError, match=r"the shares sum to 1\.01; below 1"):
        load_config(PipelineConfig, None, ["shares.score=0.85"])


def test_the_demo_is_a_recipe_of_one_file():
    from birbal_ray.cli.options import find_config

    file = find_config("pipeline", "demo")
    config = load_config(PipelineConfig, file)
    assert set(yaml.safe_load(file.read_text())) <= {*PipelineConfig.model_fields}
    assert not config.search
    assert set(STEPS) - {"report", "tune"} <= set(yaml.safe_load(file.read_text()))


# --- all steps in turn, made up: what is asked of each, and what an interruption costs


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """recipe(overwrite=, budget=, **made_from) runs the pipeline with steps that only write a file; the steps it made.

    `recipe.ends` maps a step to what it raises.
    """
    made, ends, made_from = [], {}, {}

    def fake(step):
        def run(settings, *, overwrite):
            where = open_folder(settings.output)
            with open_run(
                where, Step(step, ("rows",)), {"from": made_from.get(step, 0)}, overwrite=overwrite
            ) as opened:
                if step in ends:
                    raise ends[step]
                if opened.manifest is None:
                    made.append(step)
                    rows = where.write_bytes("rows", step.encode())
                    opened.finish(
                        {"best": {"mix": "x", "ratios": {}, "is_baseline": False}}, {"rows": rows}, summary=""
                    )
                return opened.manifest

        return run

    def report(place):
        made.append("report")
        return SimpleNamespace(file=f"{place}/report.html")

    monkeypatch.setattr(pipeline, "RUN", {step: fake(step) for step in STEPS if step != "report"})
    monkeypatch.setattr(pipeline, "report", report)
    monkeypatch.setattr(pipeline, "ray_session", lambda *arguments, **options: contextlib.nullcontext())
    monkeypatch.setattr(pipeline, "least_seconds", lambda config: LEAST)
    monkeypatch.setattr(pipeline, "check_sources", lambda config, **options: None)
    monkeypatch.setattr(pipeline, "check_tasks", lambda config: None)
    monkeypatch.setattr(pipeline, "write_plan", lambda *arguments: None)
    monkeypatch.setattr(pipeline, "settings_of", lambda step, config, clock: getattr(config, step))
    monkeypatch.setattr(pipeline, "save_figures", lambda *arguments, **figures: None)
    said = []

    def run(*, overwrite=False, budget=None, **changed):
        made_from.update(changed)
        made.clear()
        config = PipelineConfig(output=str(tmp_path / "runs"), tasks="t", budget=budget, shares=SHARES)
        pipeline.run_pipeline(config, overwrite=overwrite, announce=said.append)
        return [step for step in made if step != "report"]

    run.ends, run.folder, run.said = ends, tmp_path / "runs", said
    return run


ALL = ["score", "tune", "mix", "train", "evaluate"]


def test_a_pipeline_within_a_budget_says_what_each_step_may_take(recipe):
    recipe(budget=5000.0)
    limits = {text.split()[1].rstrip(":"): "(at most " in text for text in recipe.said if text[0].isdigit()}
    assert limits == {**dict.fromkeys(STEPS, True), "mix": False}
    assert not [text for text in recipe.said if "more than its share" in text]


def test_a_look_at_a_finished_recipe_with_another_budget_leaves_its_clock(recipe):
    recipe(budget=5000.0)
    before = (recipe.folder / "clock.json").read_bytes()
    assert recipe() == []
    assert (recipe.folder / "clock.json").read_bytes() == before


def test_a_pipeline_that_overwrites_keeps_what_it_made_when_it_is_called_again(recipe):
    assert recipe() == ALL
    assert recipe() == []
    recipe.ends["train"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        recipe(overwrite=True)
    del recipe.ends["train"]
    assert recipe(overwrite=True) == ["train", "evaluate"], "stopped in training: the same command continues there"
    assert recipe(overwrite=True) == ALL, "that one came to its end: this is another"
    assert recipe() == []


def test_a_pipeline_that_overwrites_keeps_what_a_plain_call_between_has_made(recipe):
    assert recipe() == ALL
    for step, overwrite in (("train", True), ("evaluate", False)):
        recipe.ends[step] = KeyboardInterrupt()
        with pytest.raises(KeyboardInterrupt):
            recipe(overwrite=overwrite)
        del recipe.ends[step]
    assert recipe(overwrite=True) == ["evaluate"]


@pytest.fixture
def stopped(recipe):
    """A pipeline that overwrites, stopped in its training; `by_hand(step, made_from)` overwrites a step without it."""
    recipe()
    recipe.ends["train"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        recipe(overwrite=True)
    del recipe.ends["train"]

    def by_hand(step, made_from):
        with open_run(recipe.folder / step, Step(step, ("rows",)), {"from": made_from}, overwrite=True) as opened:
            opened.finish({}, {"rows": opened.folder.write_bytes("rows", b"mine")}, summary="")

    return by_hand


@pytest.mark.parametrize("step", ["mix", "train"])
def test_a_pipeline_that_overwrites_replaces_what_was_made_by_hand_since(recipe, stopped, step):
    stopped(step, 7)
    with pytest.raises(RunMismatchError):
        recipe()
    assert recipe(overwrite=True) == [*dict.fromkeys([step, "train", "evaluate"])], "and keeps the others that it made"
    said = any(f"{recipe.folder / step} holds a run of other settings or inputs" in text for text in recipe.said)
    assert said == (step == "mix"), "training was to start over in any case"


def test_a_pipeline_that_overwrites_keeps_what_was_made_by_hand_as_it_makes_it(recipe, stopped):
    stopped("mix", 0)
    assert recipe(overwrite=True) == ["train", "evaluate"]
    assert (recipe.folder / "mix" / "rows").read_bytes() == b"mine"


def test_what_a_step_of_other_settings_took_does_not_count(recipe, stopped):
    clock = json.loads((recipe.folder / CLOCK_FILE).read_text())
    clock["spent_seconds"] |= {"score": 700.0, "mix": 900.0}
    (recipe.folder / CLOCK_FILE).write_text(json.dumps(clock))
    assert recipe(overwrite=True, mix=1) == ["mix", "train", "evaluate"]
    spent = json.loads((recipe.folder / CLOCK_FILE).read_text())["spent_seconds"]
    assert spent["score"] >= 700 and spent["mix"] < 9


def test_a_step_that_refuses_to_overwrite_leaves_the_clock_as_it_was(recipe):
    assert recipe(budget=5000.0) == ALL
    before = (recipe.folder / CLOCK_FILE).read_bytes()
    (recipe.folder / "score" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="--overwrite deletes nothing here"):
        recipe(overwrite=True, budget=5000.0)
    assert json.loads((recipe.folder / CLOCK_FILE).read_text()) == json.loads(before)


def test_a_refused_command_that_overwrites_leaves_the_clock_as_it_was(recipe):
    recipe(budget=5000.0)
    before = (recipe.folder / CLOCK_FILE).read_bytes()
    with pytest.raises(ConfigError, match="budget"):
        recipe(overwrite=True, budget=1.0)
    assert (recipe.folder / CLOCK_FILE).read_bytes() == before
    assert recipe(budget=5000.0) == []


def test_a_larger_budget_is_the_same_command_that_overwrites(recipe):
    recipe.ends["train"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        recipe(overwrite=True, budget=5000.0)
    del recipe.ends["train"]
    assert recipe(overwrite=True, budget=6000.0) == ["train", "evaluate"]


def test_another_command_that_overwrites_makes_again_what_it_asks_otherwise(recipe):
    recipe.ends["train"] = KeyboardInterrupt()
    for budget, mix in ((None, 0), (5000.0, 1)):
        with pytest.raises(KeyboardInterrupt):
            recipe(overwrite=True, budget=budget, mix=mix)
    del recipe.ends["train"]
    with pytest.raises(RunMismatchError):
        recipe(mix=2)
    assert recipe(overwrite=True, mix=2) == ["mix", "train", "evaluate"]
    assert json.loads((recipe.folder / CLOCK_FILE).read_text())["to_overwrite"] == []


def test_an_unfinished_step_of_the_same_settings_is_never_deleted(recipe):
    """Neither by the first command that overwrites, nor by the next one."""
    recipe.ends["train"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        recipe()
    work = recipe.folder / "train" / "rows"
    work.write_text("half of it")
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            recipe(overwrite=True)
        assert work.read_text() == "half of it"


def test_a_step_of_other_settings_is_refused_without_advice_to_delete_the_others(recipe):
    recipe()
    with pytest.raises(RunMismatchError) as caught:
        recipe(mix=1)
    assert caught.value.differences == ["from: 0 → 1"]
    mix = recipe.folder / "mix"
    assert "move this folder, and those of the steps after it, away" in str(caught.value)
    assert f"{mix} holds a run" in str(caught.value) and "--overwrite deletes the runs of all steps" in str(
        caught.value
    )
    assert recipe.folder.joinpath("score", "rows").exists()


def test_two_pipelines_in_a_folder_exclude_each_other(recipe):
    recipe()
    before = (recipe.folder / CLOCK_FILE).read_bytes()
    with hold_lock(open_folder(recipe.folder)), pytest.raises(RunError, match="another run is writing here"):
        recipe(overwrite=True)
    assert (recipe.folder / CLOCK_FILE).read_bytes() == before
    assert recipe() == []


def test_a_search_that_failed_is_tried_again_until_the_mix_is_made_without_it(recipe):
    recipe.ends |= {"tune": RunFailedError("every trial failed"), "mix": KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        recipe(budget=5000.0)
    assert any("every trial failed; the mix is made with the ratios of its settings" in text for text in recipe.said)
    del recipe.ends["mix"]
    recipe.ends["train"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        recipe(budget=5000.0)
    recipe.ends.clear()
    assert recipe(budget=6000.0) == ["train", "evaluate"], "a mix that is made keeps its ratios, in any budget"
    assert any("is not tried again" in text for text in recipe.said)
    assert recipe(budget=6000.0, overwrite=True) == ALL


def test_what_was_made_again_is_known_at_once_and_a_step_that_is_gone_delays_nothing(tmp_path):
    folder, steps = open_folder(tmp_path), ("score", "tune", "mix")
    BudgetClock(folder, None, SHARES, LEAST, overwrite=steps).keep("score")
    again = BudgetClock(folder, None, SHARES, LEAST, overwrite=steps)
    assert [again.starts_over(step) for step in steps] == [False, True, True]
    again.keep("mix")  # the search was turned off for this one
    once_more = BudgetClock(folder, None, SHARES, LEAST, overwrite=("score", "mix"))
    assert once_more.starts_over("score") and once_more.starts_over("mix")
