"""What the recipe will take: from this machine's own figures where there are any, and within the budget's shares."""

from __future__ import annotations

import json
import math
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from birbal_ray import cluster, doctor, pipeline, plan
from birbal_ray.budget import BudgetClock
from birbal_ray.cli.main import main
from birbal_ray.cli.options import find_config
from birbal_ray.models import ModelError
from birbal_ray.progress import CARDS, PLAN_FILE, figures_key, last_figures, save_figures
from birbal_ray.recipe import PipelineConfig, join_steps
from birbal_ray.report.load import compare_times
from birbal_ray.score.run import keep_figures
from birbal_ray.settings import ConfigError, load_config, seconds_of
from birbal_ray.storage import open_folder
from birbal_ray.train.budget import rate_key
from birbal_ray.train.config import TrainConfig
from birbal_ray.train.preflight import GIB, estimate, shapes_of, total_bytes
from birbal_ray.tune.config import TuneConfig
from birbal_ray.tune.run import figures_of
from birbal_ray.tune.scheduler import BASE_MODEL, FINISHED, TrialResult, TrialScheduler, TrialSpec
from tests.conftest import REPOSITORY


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A machine that has run nothing, and whose model has 135 million weights."""
    monkeypatch.setenv("BIRBAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(plan, "num_weights", lambda model: plan.SMOLLM2_WEIGHTS)
    monkeypatch.setattr(plan, "_flop_per_token", lambda config: 6.0 * plan.SMOLLM2_WEIGHTS)


def recipe(name="tiny", **flags):
    values = {"output": "/nowhere/run", "device": "cpu", **flags}
    return join_steps(load_config(PipelineConfig, find_config("pipeline", name), flags=values))


def by_step(config, gpu=None):
    return {one.step: one for one in plan.plan_recipe(config, gpu)}


def ran_before(config):
    """Figures that steps of these settings keep, see the steps' `run.py`."""
    save_figures(
        figures_key("score", config.score), load_seconds=30.0, overhead_seconds=10.0, rows_per_second=4.0, rows=200.0
    )
    save_figures(
        figures_key("evaluate", config.evaluate),
        **{"load_seconds": 20.0, "overhead_seconds": 12.0, "rows_per_second": 5.0, "asked_fraction": 0.8},
    )
    save_figures(figures_key("tune", config.tune), trial_seconds=30.0, overhead_seconds=20.0)
    save_figures(figures_key("mix", config.mix), seconds=3.0, candidates=300.0)
    save_figures("report", page_seconds=2.0)
    key = rate_key(config.train)
    save_figures(key, tokens_per_second=50.0)
    save_figures(key, setup_seconds=20.0, eval_seconds=5.0, best_seconds=1.0, save_seconds=1.0, overhead_seconds=15.0)


def test_after_a_run_every_step_is_planned_from_it():
    config = recipe()
    ran_before(config)
    steps = by_step(config)
    assert {one.source for one in steps.values()} == {"measured on this machine"}
    assert steps["score"].planned_seconds == pytest.approx(30 + 10 + 200 / 4)
    assert steps["score"].work == "200 prompts of 6 tasks"
    # Eight trials, two at a time: the base model, one baseline and two of the search, then four fresh seeds.
    assert steps["tune"].planned_seconds == pytest.approx(20 + 4 * 30)
    assert steps["mix"].planned_seconds == pytest.approx(3)
    assert steps["report"].planned_seconds == pytest.approx(6 * 2)
    # As many instances as fit in seven tenths of its share by the speed of scoring, of 8 tasks, asked by two models in
    # two ways; the mix considered a fifth of them.
    fitting = int((0.7 * 216 - 2 * 30) * 4 / (8 * 4))
    assert steps["evaluate"].planned_seconds == pytest.approx(2 * 20 + 12 + fitting * 8 * 4 * 0.8 / 5)
    # Training gets the rest: what was used before it, and what is held back for what follows, is not its.
    rest = 900 - (90 + 140 + 3) - 0.24 * 900 - 0.04 * 900
    assert steps["train"].planned_seconds == steps["train"].limit_seconds == pytest.approx(rest)


def test_the_plan_is_what_the_clock_gives(tmp_path):
    """Steps that take what was planned leave training what was planned."""
    config = recipe(output=str(tmp_path))
    ran_before(config)
    steps = by_step(config)

    class Time:
        now = 0.0

        def __call__(self):
            return self.now

    time = Time()
    clock = BudgetClock(open_folder(tmp_path), config.budget, config.shares, {}, now=time)
    for step in ("score", "tune", "mix"):
        with clock.running(step):
            time.now += steps[step].planned_seconds
        with clock.running("report"):
            time.now += 2.0
    assert clock.left("train") == pytest.approx(steps["train"].planned_seconds)


def test_other_settings_are_other_work():
    config = recipe()
    ran_before(config)
    other = config.score.model_copy(
        update={"completion": config.score.completion.model_copy(update={"headroom_tokens": 99})}
    )
    assert last_figures(figures_key("score", config.score)) and not last_figures(figures_key("score", other))
    elsewhere = config.score.model_copy(update={"output": "/elsewhere", "budget": 77.0})
    assert figures_key("score", elsewhere) == figures_key("score", config.score)
    assert by_step(config, "H100")["score"].source.startswith("arithmetic")  # another card than this machine's


def test_a_run_that_its_budget_ended_is_planned_to_its_end_again():
    config = recipe()
    key = figures_key("score", config.score)
    save_figures(key, load_seconds=100.0, overhead_seconds=20.0, rows_per_second=2.0, rows_at_least=120.0)
    step = by_step(config)["score"]
    assert step.planned_seconds == step.limit_seconds == pytest.approx(180)


def test_a_search_that_does_not_fit_leaves_trials_out():
    config = recipe()
    config = config.model_copy(update={"tune": config.tune.model_copy(update={"num_trials": 6})})
    save_figures(figures_key("tune", config.tune), trial_seconds=40.0, overhead_seconds=20.0)
    step = by_step(config)["tune"]
    # The share is 234 s: five rounds of two fit, two of them the four fresh seeds, so four of the six searched.
    assert step.planned_seconds == pytest.approx(20 + 5 * 40)
    assert step.work == "11 short fine-tunes of 768 tokens; 9 fit"
    assert (step.low_seconds, step.high_seconds) == pytest.approx((0.9 * 260, 1.1 * 260))


def test_a_budget_without_time_for_fresh_seeds_is_refused_with_the_least_that_works():
    config = recipe()
    save_figures(figures_key("tune", config.tune), trial_seconds=100.0, overhead_seconds=20.0)
    least = plan.least_seconds(config)
    assert least["tune"] == pytest.approx(0.8 * 0.9 * (20 + 4 * 100))
    with pytest.raises(ConfigError, match=r"tune needs 5 min 02 s to run its baselines.*least that works is 20m,"):
        pipeline.refuse_small_budget(config, least)
    pipeline.refuse_small_budget(config.model_copy(update={"budget": seconds_of("20m")}), least)
    without = recipe(search=False)
    pipeline.refuse_small_budget(without, plan.least_seconds(without))


def test_without_tune_its_share_goes_to_training():
    config = recipe(search=False)
    steps = by_step(config)
    assert list(steps) == ["score", "mix", "train", "evaluate", "report"]
    assert steps["train"].limit_seconds > by_step(recipe())["train"].limit_seconds


@pytest.mark.parametrize(
    ("name", "num_weights"), [("one-day-mistral-7b", 7_241_732_096), ("one-day-qwen3-8b", 8_190_735_360)]
)
def test_the_day_on_a_4090_fits(name, num_weights, monkeypatch):
    monkeypatch.setattr(plan, "num_weights", lambda model: num_weights)
    monkeypatch.setattr(plan, "_flop_per_token", lambda config: 6.0 * num_weights)
    config = recipe(name, device="gpu", tasks="sample-tasks")
    config = config.model_copy(
        update={"score": config.score.model_copy(update={"tasks": config.evaluate.tasks.model_copy()})}
    )
    steps = plan.plan_recipe(config, "GeForce-RTX-4090")
    assert sum(one.planned_seconds for one in steps) <= 24 * 3600
    assert all(one.source for one in steps)
    assert all(one.high_seconds > one.low_seconds > 0 for one in steps)


def test_the_first_session_s_plan_stays_and_meets_what_was_taken(tmp_path):
    config = recipe(output=str(tmp_path))
    ran_before(config)
    said = []
    pipeline.write_plan(config, open_folder(tmp_path), said.append)
    assert said[0].startswith("planned: score 1 min 30 s, tune 2 min 20 s, mix 3 s, train ")
    written = json.loads((tmp_path / PLAN_FILE).read_text())
    assert written["budget_seconds"] == 900
    (tmp_path / "clock.json").write_text(json.dumps({"spent_seconds": {"score": 100.0, "tune": 130.5, "train": 9.0}}))
    for step in ("score", "tune"):
        open_folder(tmp_path).write_json(f"{step}/manifest.json", {})
    times = {row["step"]: row for row in compare_times(open_folder(tmp_path))}
    assert list(times) == ["score", "tune", "mix", "train", "evaluate", "report"]
    assert (times["score"]["planned"], times["score"]["actual"]) == pytest.approx((90, 100))
    assert times["score"]["difference"] == pytest.approx(10)
    assert times["tune"]["difference"] == pytest.approx(-9.5)
    assert times["mix"]["actual"] is None and times["mix"]["difference"] is None
    assert times["train"]["actual"] == 9 and times["train"]["difference"] is None  # it has not ended
    (tmp_path / PLAN_FILE).unlink()
    rows = compare_times(open_folder(tmp_path))
    assert [(row["step"], row["actual"], row["planned"]) for row in rows] == [
        ("score", 100, None),
        ("tune", 130.5, None),
        ("train", 9, None),
    ]


def test_what_cannot_be_planned_is_said_and_does_not_stop_the_run(tmp_path):
    config = recipe(output=str(tmp_path), device="gpu")
    (tmp_path / PLAN_FILE).write_text("{}")
    said = []
    pipeline.write_plan(config, open_folder(tmp_path), said.append)
    (line,) = said
    assert line.startswith("no plan: resources.accelerator_type (or `birbal plan --gpu`) names no card of which")
    assert all(word in line for word in (*CARDS, "birbal plan --gpu", "birbal doctor"))
    assert not (tmp_path / PLAN_FILE).exists()


@pytest.mark.parametrize("budget", [None, 86_400.0])
def test_a_search_on_a_card_without_figures_starts(tmp_path, monkeypatch, budget):
    monkeypatch.setattr(pipeline, "source_problem", lambda source, **options: "")
    config = recipe("one-day-mistral-7b", tasks="sample-tasks", budget=budget)
    known, config = config, config.replace({"tune.resources.accelerator_type": "RTX-A6000"})
    least = plan.least_seconds(config)
    assert least.keys() == {"score", "train", "evaluate", "report"}
    pipeline.check_recipe(config)
    clock = BudgetClock(open_folder(tmp_path), budget, config.shares, least)
    assert clock.left("tune") == (8640.0 if budget else math.inf)
    assert plan.least_seconds(known)["tune"] > 0


def test_a_budget_of_seconds_leaves_no_step_less_than_nothing():
    ran_before(config := recipe(budget=10.0))
    plans = plan.plan_recipe(config)
    assert all(one.limit_seconds is None or one.limit_seconds >= 0 for one in plans)
    train = next(one for one in plans if one.step == "train")
    assert train.limit_seconds == 0, "the mix alone takes more than is left"
    assert train.planned_seconds == 0 and train.work.endswith("; no step fits")
    low, high = plan.money(plans, 3600.0)
    assert 0 < low <= high <= sum(60 if one.limit_seconds is None else one.limit_seconds for one in plans)


def test_a_pipeline_dry_run_prints_the_plan_and_refuses_what_cannot_work(tmp_path, monkeypatch):
    save_figures("smollm2-135m cpu vllm", tokens_per_second=1000.0)
    arguments = ["pipeline", "--config", "tiny", "--device", "cpu", "--output", str(tmp_path / "run"), "--dry-run"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    steps = {line.split()[0] for line in result.stdout.splitlines()[2:]}
    assert steps == {"score", "tune", "mix", "train", "evaluate", "report"}
    assert "nothing was started" in result.stderr
    listed = json.loads(CliRunner().invoke(main, [*arguments, "--format", "json"]).stdout)
    assert {row["step"] for row in listed} == steps
    result = CliRunner().invoke(main, [*arguments, "--budget", "60s"])
    assert result.exit_code == 2
    assert "budget 1 min 00 s is too small" in result.stderr
    monkeypatch.setattr(pipeline, "source_problem", lambda source, **options: f"source {source.name}: is gated")
    result = CliRunner().invoke(main, [*arguments, "--set", "mix.sources=[{name: lima}]"])
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == "error: source lima: is gated"
    assert not (tmp_path / "run").exists()


def test_each_card_has_its_own_price():
    arguments = ["plan", "--config", "tiny", "--gpu", "GeForce-RTX-4090", "--gpu-price", "0.40", "--gpu", "H100"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2 and "1 given for 2 cards; give one for each --gpu" in result.stderr
    once, tenfold = (CliRunner().invoke(main, [*arguments, "--gpu-price", price]).stderr for price in ("25", "250"))
    assert once.splitlines()[0] == tenfold.splitlines()[0], "of the first card"
    low, ten_low = (float(text.splitlines()[1].split(", cost ")[1].split()[0]) for text in (once, tenfold))
    assert ten_low == pytest.approx(10 * low, abs=0.1) and low > 0


def test_the_readme_s_command_for_another_card_names_it_in_every_step():
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    (line,) = (line for line in readme.splitlines() if "accelerator_type=" in line and line.startswith("birbal "))
    small = ["--tasks", "sample-tasks", "--set", "score.tasks.select=all", "--set", "mix.sources=[]", "--dry-run"]
    result = CliRunner().invoke(main, [*shlex.split(line)[1:], *small])
    assert result.exit_code == 0, result.output
    assert "A100's data sheet" in result.stdout and "4090" not in result.stdout


@pytest.mark.parametrize("command", [["pipeline", "--dry-run"], ["pipeline"], ["plan"]])
def test_a_held_out_task_that_is_none_is_refused_before_anything_starts(tmp_path, monkeypatch, command):
    monkeypatch.setattr(pipeline, "RUN", {})  # a step that is called would be a KeyError
    arguments = ["--config", "tiny", "--device", "cpu", "--output", str(tmp_path / "run"), "--no-tune"]
    result = CliRunner().invoke(main, [*command, *arguments, "--held-out-task", "sampel004"])
    assert result.exit_code == 2, result.output
    assert "no task 'sampel004' (nearest: 'sample004_short_reading_question')" in result.stderr
    result = CliRunner().invoke(main, [*command, *arguments, "--set", "evaluate.tasks.exclude=[sampel004]"])
    assert command == ["plan"] or (result.exit_code, "no task 'sampel004'" in result.stderr) == (2, True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ([], "mix.task_score.exact_match_budget = 50000: the tasks that are scored have 27 instances"),
        (["mix.policy=uniform"], "exact_match_budget + generation_budget = 100000: the tasks that are scored have 63"),
        (["mix.task_score.exact_match_budget=27"], "generation_budget = 50000: the tasks that are scored have 36"),
        (["mix.task_score={exact_match_budget: 27, generation_budget: 36}"], ""),  # a tenth is left to evaluate
        (["mix.task_score.allow_shortfall=true"], ""),
        (["mix.policy=birbal_2023"], ""),
        (["budget=1000h"], ""),
        (["search=true"], ""),
    ],
)
def test_a_mix_that_no_scoring_could_fill_is_refused_before_it(tmp_path, write_task, changes, refusal):
    write_task("task_a", 30, Categories=["Program Execution"])
    folder = write_task("task_b", 40, Categories=["Title Generation"])
    flags = {"tasks": str(folder), "output": "/nowhere/run"}
    made = load_config(PipelineConfig, None, ["search=false", *changes], flags)
    if not refusal:
        pipeline.check_tasks(join_steps(made))
        return
    with pytest.raises(ConfigError, match=re.escape(refusal)):
        pipeline.check_tasks(join_steps(made))


def test_nothing_starts_where_a_dataset_cannot_be_had(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "source_problem", lambda source, **options: f"source {source.name}: is gated")
    monkeypatch.setattr(pipeline, "RUN", {})  # a step that is called would be a KeyError
    arguments = ["pipeline", "--config", "tiny", "--device", "cpu", "--output", str(tmp_path / "run")]
    result = CliRunner().invoke(main, [*arguments, "--set", "mix.sources=[{name: lima}, {name: quac}]"])
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == "error: source lima: is gated; source quac: is gated"
    assert not (tmp_path / "run").exists()


def test_doctor_looks_for_the_datasets_of_a_recipe(monkeypatch):
    monkeypatch.setattr(doctor, "source_problem", lambda source, **options: "gated" if source.name == "lima" else "")
    monkeypatch.setattr(doctor, "_model", lambda name: doctor.Check("model", name))
    result = CliRunner().invoke(main, ["doctor", "--config", "one-day-mistral-7b", "--format", "json"])
    rows = {row["check"]: row for row in json.loads(result.stdout)}
    assert rows["model"]["found"] == "mistralai/Mistral-7B-v0.1"
    assert (rows["lima"]["state"], rows["math_instruct"]["state"]) == ("problem", "ok")
    assert "lima: gated" in result.stderr
    assert result.exit_code == 1


@pytest.mark.parametrize(
    ("here", "lacks"),
    [
        ((0, None), "this machine has no GPU; wanted: GeForce-RTX-4090, H100 for score, tune, train, evaluate"),
        ((2, "A100"), "this machine has 2 × A100; wanted: GeForce-RTX-4090, H100 for score, tune, train, evaluate"),
        ((1, "GeForce-RTX-4090"), "this machine has 1 × GeForce-RTX-4090; wanted: H100 for train"),
        ((1, None), ""),  # a card for which Ray has no name
    ],
)
def test_a_recipe_for_a_card_that_is_not_here_is_planned_and_not_started(tmp_path, monkeypatch, here, lacks):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster, "local_cards", lambda: here)
    monkeypatch.setattr(pipeline, "RUN", {})  # a step that is called would be a KeyError
    monkeypatch.setattr(pipeline, "source_problem", lambda source, **options: "")
    output = ["--output", str(tmp_path / "run"), "--set", "train.resources.accelerator_type=H100"]
    command = ["pipeline", "--config", "one-day-mistral-7b", "--tasks", "sample-tasks", *output]
    command += ["--set", "score.tasks.select=all", "--set", "evaluate.tasks.select=all"]
    result = CliRunner().invoke(main, [*command, "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "GeForce-RTX-4090, H100: " in result.stderr, "the cards that the plan is for"
    assert (f"the recipe can't run here: {lacks}" in result.stderr) == bool(lacks)
    if lacks:
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 2
        assert result.stderr.startswith(f"error: {lacks}")
        assert not (tmp_path / "run").exists()
    monkeypatch.setattr(doctor, "local_cards", lambda: (0, None))
    monkeypatch.setattr(cluster, "local_cards", lambda: (0, None))
    monkeypatch.setattr(doctor, "source_problem", lambda source, **options: "")
    monkeypatch.setattr(doctor, "_model", lambda name: doctor.Check("model", name))
    result = CliRunner().invoke(main, ["doctor", "--config", "one-day-mistral-7b"])
    assert result.exit_code == 1
    wanted = "gpus: this machine has no GPU; wanted: GeForce-RTX-4090 for score, tune, train, evaluate"
    assert wanted in result.stderr


def test_a_recipe_for_another_card_runs_on_a_cluster_and_where_its_steps_are_done(monkeypatch):
    monkeypatch.setattr(cluster, "local_cards", lambda: (0, None))
    wanted = recipe("one-day-mistral-7b", device=None).cards
    assert wanted == dict.fromkeys(["score", "tune", "train", "evaluate"], "GeForce-RTX-4090")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert cluster.missing_cards(wanted) == ""
    monkeypatch.delenv("RAY_ADDRESS")
    assert "this machine has no GPU" in cluster.missing_cards(wanted)
    assert cluster.missing_cards({}) == ""
    assert recipe("tiny").cards == {}
    assert recipe("tiny", device="gpu").cards == dict.fromkeys(["score", "train", "evaluate"])


@pytest.mark.parametrize("gpu", [[], ["--gpu", "GeForce-RTX-4090"]])
def test_a_plan_refuses_a_budget_that_the_pipeline_would_refuse(gpu):
    save_figures("smollm2-135m cpu vllm", tokens_per_second=1000.0)
    result = CliRunner().invoke(main, ["plan", "--config", "tiny", "--device", "cpu", *gpu, "--budget", "24"])
    assert result.exit_code == 2, result.output
    assert "error: budget 24 s is too small: " in result.stderr
    result = CliRunner().invoke(main, ["plan", "--config", "tiny", "--device", "cpu", *gpu, "--budget", "24h"])
    assert result.exit_code == 0, result.output
    least = [plan.least_seconds(recipe(), card)["score"] for card in (None, "GeForce-RTX-4090")]
    assert least == [plan.LOAD_SECONDS[device][0] + 10 for device in ("cpu", "gpu")]


def test_a_dry_run_says_the_hours_of_the_plan():
    """The step's own function in both, so that their figures can't differ."""
    config = recipe()
    ran_before(config)
    steps = by_step(config)
    for step, made in (
        ("score", lambda: plan.plan_score(config.score)),
        ("tune", lambda: plan.plan_tune(config.tune, seconds=0.26 * 900)),
        ("mix", lambda: plan.plan_mix(config.mix, 288)),
    ):
        assert steps[step].hours in plan.describe_hours(made)
    said = plan.describe_hours(lambda: plan.plan_score(recipe(device="gpu").score))
    assert said.startswith("no estimate of time: resources.accelerator_type (or `birbal plan --gpu`) names no card")


def test_the_day_with_an_instruct_model_asks_by_its_template_everywhere():
    config = recipe("one-day-qwen3-8b", device="gpu")
    prompts = [config.score.prompt, config.tune.train.prompt, config.train.prompt, config.evaluate.prompt]
    assert {one.format for one in prompts} == {"chat"}
    assert all(one.chat_template_arguments == {"enable_thinking": False} for one in prompts)
    models = {
        config.score.model.name,
        config.tune.train.model.name,
        config.train.model.name,
        config.evaluate.model.name,
    }
    assert models == {"Qwen/Qwen3-8B"}
    alone = load_config(TrainConfig, find_config("train", "qwen3-8b-24gb"))
    for name in ("epochs", "lora", "neftune_alpha", "batch", "optimizer", "evaluation", "checkpoint"):
        assert getattr(config.train, name) == getattr(alone, name), name


@pytest.mark.parametrize("name", ["one-day-mistral-7b", "one-day-qwen3-8b"])
def test_the_day_s_training_and_trials_fit_the_card(name, tmp_path):
    """The preflight's memory with the model's shape as its config.json has it; no weights."""
    shapes = {
        "one-day-mistral-7b": ("mistral", 32_000, 14_336, 32),
        "one-day-qwen3-8b": ("qwen3", 151_936, 12_288, 36),
    }
    names = ("model_type", "vocab_size", "intermediate_size", "num_hidden_layers")
    own = dict(zip(names, shapes[name], strict=True))
    shape = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, **own}
    (tmp_path / "config.json").write_text(json.dumps({**shape, "tie_word_embeddings": False}))
    config = recipe(name, device="gpu")
    for train in (config.train, config.tune.train):
        on_card = train.replace({"resources.device": "gpu"})
        parts = estimate(shapes_of(tmp_path, train.lora.target_modules), on_card)
        assert total_bytes(parts) < CARDS["GeForce-RTX-4090"].memory_gib * GIB


def test_doctor_wants_room_for_a_recipe_s_weights_and_checkpoints(tmp_path, monkeypatch):
    shape = {"model_type": "mistral", "vocab_size": 100, "hidden_size": 8, "intermediate_size": 16, "head_dim": 4}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(shape | heads))
    monkeypatch.setattr(doctor.models, "resolve_model", lambda *names, weights: SimpleNamespace(path=tmp_path))
    sets = ["train.lora.r=2", "train.checkpoint.keep=4"]
    sets.append("train.lora.target_modules=[q_proj]")
    made = load_config(PipelineConfig, None, sets)
    weights = 2 * 100 * 8 + 3 * 8 + (8 + 4 + 4 + 8) * 8 + 3 * 8 * 16  # embeddings, head; norms; attention; the rest
    checkpoint = 3 * 4 * 2 * (8 + 8)  # r x (in + out) float32, and Adam's states
    assert doctor.recipe_bytes(made, tmp_path) == 2 * weights + 5 * checkpoint
    assert doctor.recipe_bytes(made, Path("/proc")) == 5 * checkpoint, "the weights come to another disk"
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert doctor.recipe_bytes(made, tmp_path) == 5 * checkpoint

    def unknown(*names, weights):
        raise ModelError("the Hub can't be reached")

    monkeypatch.setattr(doctor.models, "resolve_model", unknown)
    assert doctor.recipe_bytes(made, tmp_path) == 0
    monkeypatch.setattr(doctor, "recipe_bytes", lambda recipe, folder: 50 << 30)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: SimpleNamespace(free=40 << 30))
    monkeypatch.setattr(doctor, "_model", lambda name: doctor.Check("model", name))
    for recipe_given, advice in ((made, "50 GiB or more are needed; --output elsewhere"), (None, "")):
        (disk,) = [one for one in doctor.examine("m", str(tmp_path), recipe_given) if one.name == "disk"]
        assert disk.advice == advice


@pytest.mark.parametrize("kind", ["vit", "mamba", "no such kind"])
def test_a_model_whose_sizes_are_unknown_costs_doctor_no_more_than_its_disk_space(tmp_path, monkeypatch, kind):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "num_hidden_layers": 1, "hidden_size": 8}))
    monkeypatch.setattr(doctor.models, "resolve_model", lambda *names, weights: SimpleNamespace(path=tmp_path))
    assert doctor.recipe_bytes(PipelineConfig(), tmp_path) == 0


@pytest.mark.parametrize("config", [[], ["--config", "tiny"]])
@pytest.mark.parametrize("found", [{"ray": "2"}, {"ray": "2", "torch": "2", "transformers": "5"}])
def test_doctor_names_what_is_not_installed(monkeypatch, config, found):
    """Or is there and can't be imported."""
    monkeypatch.setitem(sys.modules, "torch", None)  # whose import then fails
    monkeypatch.setattr(doctor, "package_versions", lambda: found)
    monkeypatch.setattr(doctor, "_gpus", lambda *arguments: [])
    result = CliRunner().invoke(main, ["doctor", *config, "--format", "json"])
    states = {row["check"]: row["state"] for row in json.loads(result.stdout)}
    assert states["torch"] == ("ok" if "torch" in found else "problem")
    assert states["pyarrow"] == "problem" and result.exit_code == 1
    assert "model: " in result.stderr and "Traceback" not in result.output


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ([], "smollm2-135m"),
        (["--model", "a/b"], "a/b"),
        (["--config", "one-day-qwen3-8b"], "Qwen/Qwen3-8B"),
        (["--config", "one-day-qwen3-8b", "--model", "a/b"], "a/b"),
    ],
)
def test_doctor_looks_for_one_model_and_for_its_room(monkeypatch, arguments, name):
    seen = []
    monkeypatch.setattr(doctor, "source_problem", lambda source, **options: "")

    def absent(model, revision=None, *, weights):
        seen.append(model)
        raise ModelError("not here")

    monkeypatch.setattr(doctor.models, "resolve_model", absent)
    result = CliRunner().invoke(main, ["doctor", *arguments])
    assert result.exit_code == 1 and "model: not here" in result.stderr
    assert set(seen) == {name} and len(seen) == (2 if "--config" in arguments else 1)


@pytest.mark.parametrize("compiler", ["/usr/bin/gcc", None])
def test_doctor_looks_for_a_compiler_where_there_is_a_card(monkeypatch, compiler):
    import torch

    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(doctor, "local_cards", lambda: (1, "L4"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda n: SimpleNamespace(name="L4", total_memory=2**30))
    monkeypatch.setattr(doctor.shutil, "which", lambda name: compiler)
    checks = {check.name: check for check in doctor.examine("no-such-model", "runs")}
    assert "gpu 0" in checks and bool(checks["compiler"].advice) == (compiler is None)


def test_figures_are_of_what_this_process_measured():
    values = ((20.0, 10.0, 30), (30.0, 15.0, 70))
    sessions = [dict(zip(("load_seconds", "steady_seconds", "rows"), one, strict=True)) for one in values]
    keep_figures("evaluate x", sessions, 90.0, asked_fraction=0.5)
    assert last_figures("evaluate x") == {
        "load_seconds": 25.0,  # of one engine
        "rows_per_second": 4.0,
        "overhead_seconds": 15.0,
        "asked_fraction": 0.5,
    }
    keep_figures("evaluate y", [], 90.0)  # nothing was left to do
    keep_figures("evaluate y", [{"load_seconds": 20.0, "steady_seconds": 1.0, "rows": 3}], 90.0)
    assert last_figures("evaluate y") == {}


def test_a_search_keeps_what_a_trial_took():
    config = TuneConfig(num_trials=2, resources={"max_concurrent": 2}, proxy={"tokens": 100})
    specs = [TrialSpec(BASE_MODEL, "base", BASE_MODEL, 0, {})]
    specs += [TrialSpec(f"search-{n}", "search", f"search-{n}", 0, {}, tokens=100) for n in range(2)]
    specs.append(TrialSpec("best-x2", "transfer", "best", 1, {}, tokens=200))
    seconds = [10.0, 40.0, 50.0, 120.0]
    results = [
        TrialResult(spec, FINISHED, 1.0, [[1, 1.0]], seconds=taken) for spec, taken in zip(specs, seconds, strict=True)
    ]
    figures = figures_of(TrialScheduler(config, results), 150.0)
    assert figures == {"trial_seconds": pytest.approx((40 + 50 + 60) / 3), "overhead_seconds": pytest.approx(150 - 110)}
    assert figures_of(TrialScheduler(config, results[:1]), 150.0) == {}
