"""The search without Ray: what is tried, in which order, what may be concluded."""

import math
import re
from dataclasses import asdict

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner

from benchmarks.search import compare
from birbal_ray.cli.main import main
from birbal_ray.mix.config import MixConfig
from birbal_ray.mix.run import mix
from birbal_ray.models import Model
from birbal_ray.pipeline import _mix_settings
from birbal_ray.plan import money, plan_tune
from birbal_ray.progress import ProgressLine, save_figures
from birbal_ray.recipe import PipelineConfig
from birbal_ray.run import RUN_FILE, RunFailedError, RunMismatchError, Step, open_run
from birbal_ray.settings import ConfigError, load_config
from birbal_ray.status import read_status
from birbal_ray.storage import open_folder
from birbal_ray.train.budget import rate_key
from birbal_ray.train.config import TrainConfig
from birbal_ray.tune import run as tune_run
from birbal_ray.tune.config import TuneConfig, num_rows
from birbal_ray.tune.records import (
    MIX_FILE,
    RESULT_FILE,
    read_results,
    table_of,
    trial_file,
    write_result,
    write_spec,
)
from birbal_ray.tune.run import _finish, estimate
from birbal_ray.tune.scheduler import (
    BASE,
    BASELINE,
    FAILED,
    FINISHED,
    PREDICTED,
    REPEAT,
    SEARCH,
    STOPPED,
    TrialResult,
    TrialScheduler,
    TrialSpec,
    best_so_far,
)
from birbal_ray.tune.space import baseline_mix, mix_of, predicted_best, ratios_of
from birbal_ray.tune.stats import (
    by_name,
    compare_seeds,
    describe_comparisons,
    describe_result,
    rank_agreement,
    winner,
)
from birbal_ray.tune.trial import group_losses, make_mix, read_questions, weighted_mean
from tests.conftest import slow
from tests.fixtures.score_folder import made_up_rows, write_score_folder

OPTIMUM = {"gamma": 1.5, "exact_match_fraction": 0.35, "failed_first": 1.0}


def config_of(**changes):
    budgets = {"exact_match_budget": 60, "generation_budget": 60, "allow_shortfall": True}
    return TuneConfig(**{"num_trials": 6, "num_initial": 6, "mix": {"task_score": budgets}, **changes})


def synthetic_objective(values):
    """A bowl with its lowest point, 1.0, at OPTIMUM; mixes without ratios lie on its rim."""
    if not values:
        return 2.0
    off = (values["gamma"] - OPTIMUM["gamma"]) / 4, values["exact_match_fraction"] - OPTIMUM["exact_match_fraction"]
    return 1.0 + off[0] ** 2 + off[1] ** 2 + 0.1 * (1 - values["failed_first"])


def result_of(spec, noise=0.0):
    objective = synthetic_objective(spec.values) + noise * spec.seed
    return TrialResult(spec, FINISHED, objective, [[1, objective]], mix_sha256="x")


def run_out(scheduler, noise=0.0, most=1000):
    """Keys in the order in which they were handed out; ends after `most`."""
    keys = []
    while len(keys) < most and (spec := scheduler.next()) is not None:
        keys.append(spec.key)
        scheduler.tell(result_of(spec, noise))
    return keys


def searched(scheduler):
    return [result for result in scheduler.results.values() if result.spec.kind in (SEARCH, PREDICTED)]


def test_the_order_of_the_trials():
    scheduler = TrialScheduler(config_of(repeats={"top": 2, "seeds": 3}))
    keys = run_out(scheduler)
    assert len(keys) == len(set(keys)) == scheduler.num_trials == 1 + 4 + 6 + 1 + 3 * 6
    assert not scheduler.running
    kinds = [scheduler.results[key].spec.kind for key in keys]
    assert kinds == [BASE] + [BASELINE] * 4 + [SEARCH] * 6 + [PREDICTED] + [REPEAT] * 18
    repeats = [scheduler.results[key].spec for key in keys[-18:]]
    assert {spec.seed for spec in repeats} == {1, 2, 3}
    best = min(scheduler.of_kind(SEARCH), key=lambda result: result.objective)
    assert {spec.name for spec in repeats} == {*scheduler.config.baselines, PREDICTED, best.spec.name}
    for spec in repeats:
        assert spec.mix == scheduler.results[spec.name].spec.mix | {"seed": spec.seed}


def test_repeats_wait_for_every_trial_that_could_be_among_the_best():
    scheduler = TrialScheduler(config_of(predicted=False))
    specs = [scheduler.next() for _ in range(11)]
    assert scheduler.next() is None
    assert len(scheduler.running) == 11
    for spec in specs[:-1]:
        scheduler.tell(result_of(spec))
        assert scheduler.next() is None
    scheduler.tell(result_of(specs[-1]))
    again = [scheduler.next() for _ in range(3)]
    assert [spec.kind for spec in again] == [REPEAT] * 3, "repeats do not wait for each other"


@pytest.mark.parametrize("most", [0, 1, 4, 7, 10, 11, 12, 15, 23])
def test_an_interrupted_search_goes_on(tmp_path, most):
    folder = open_folder(tmp_path)
    config = config_of(repeats={"top": 1, "seeds": 3})
    first = TrialScheduler(config, remember=lambda spec: write_spec(folder, spec, "/scores"))
    done = run_out(first, most=most)
    for key in done:
        write_result(folder, first.results[key])
    lost = first.next()  # handed out, then the power went off
    results, started = read_results(folder)
    assert [spec.key for spec in started] == ([lost.key] if lost else [])
    second = TrialScheduler(config, results, started, lambda spec: write_spec(folder, spec, "/scores"))
    spec = second.next()
    assert spec == lost, "what was started is run as it was"
    if spec:
        second.tell(result_of(spec))
    more = run_out(second)
    assert not set(more) & {*done, lost.key if lost else ""}
    assert len(done) + len(more) + bool(lost) == second.num_trials


def test_after_the_even_start_proposals_come_from_the_results_not_from_the_session():
    """Optuna is asked afresh with all results: an interrupted search proposes what an uninterrupted one would."""
    config = config_of(num_trials=8, num_initial=7, predicted=False, repeats={"top": 0})
    first = TrialScheduler(config)
    run_out(first)
    kept = [result for key, result in first.results.items() if key != "search-007"]
    second = TrialScheduler(config, kept)
    spec = second.next()
    assert spec == first.results["search-007"].spec
    assert spec.values["gamma"] == pytest.approx(OPTIMUM["gamma"], abs=1.5)
    initial = [first.results[f"search-{number:03d}"].spec.values for number in range(4)]
    for low, high in ((0.1, 0.5), (0.5, 0.9)):  # Sobol points cover every half evenly
        assert sum(low <= values["exact_match_fraction"] <= high for values in initial) == 2


def test_a_gaussian_process_names_the_bottom_of_a_noisy_bowl():
    bottom = np.array([0.375, 0.3125, 1.0])
    for seed in range(3):
        chance = np.random.default_rng(seed)
        points = chance.random((24, 3))
        points[:, 2] = points[:, 2].round()
        losses = 1 + ((points - bottom) ** 2 * [1, 1, 0.1]).sum(axis=1) + 0.02 * chance.normal(size=24)
        best = predicted_best(points, losses, np.array([False, False, True]), seed)
        assert best == pytest.approx(bottom, abs=0.12)
        assert (best == predicted_best(points, losses, np.array([False, False, True]), seed)).all()


@slow
def test_the_search_comes_closer_to_the_optimum_than_random_trials():
    distances = [compare(seed) for seed in range(20)]
    assert sum(search < random for search, random in distances) >= 18


def test_a_stopped_or_failed_trial_is_never_among_the_best():
    scheduler = TrialScheduler(config_of(num_trials=4, predicted=False, repeats={"top": 4, "seeds": 2}))
    specs = [scheduler.next() for _ in range(9)]
    for spec in specs:
        if spec.key == "search-001":
            scheduler.tell(TrialResult(spec, STOPPED, 0.0, [[1, 0.0]]))
        elif spec.key == "search-002":
            scheduler.tell(TrialResult(spec, FAILED, None, error="out of memory"))
        else:
            scheduler.tell(result_of(spec))
    assert sorted(scheduler.finalists()) == ["search-000", "search-003"]
    assert table_of(list(scheduler.results.values())).num_rows == 9


def test_a_diverged_trial_has_failed_for_good_and_the_search_goes_on(tmp_path):
    config, folder = config_of(), open_folder(tmp_path)
    scheduler = TrialScheduler(config, remember=lambda spec: write_spec(folder, spec, "/scores"))
    specs = {spec.key: spec for spec in (scheduler.next() for _ in range(11))}
    diverged = {
        "task_score": TrialResult(specs["task_score"], FINISHED, math.nan, [[1, 3.0], [2, math.nan]]),
        "search-001": TrialResult(specs["search-001"], FINISHED, math.nan, [[1, math.nan], [2, math.nan]]),
        "search-002": TrialResult(specs["search-002"], STOPPED, math.inf, [[1, math.inf]]),
    }
    for key, spec in specs.items():
        result = diverged.get(key) or result_of(spec)
        write_result(folder, result)
        scheduler.tell(result)
    # As a search wrote it that took any number for a loss.
    folder.write_json(trial_file(specs["search-001"], RESULT_FILE), asdict(diverged["search-001"]))
    results, started = read_results(folder)
    assert started == []
    again = TrialScheduler(config, results, started)
    for one in (scheduler, again):
        assert {key for key, result in one.results.items() if result.status == FAILED} == set(diverged)
        assert one.results["search-001"].objective is None
        assert one.results["search-001"].error.startswith("its loss is nan after optimizer step 2: it diverged")
        assert not set(one.finalists()) & set(diverged)
    assert {result.spec.key: result.status for result in results}["search-002"] == FAILED, "on disk, too"
    keys = run_out(again)
    assert PREDICTED not in keys, "4 losses are too few"
    assert not set(keys) & set(specs)
    assert table_of(list(again.results.values())).column("objective").null_count == 3


def stopped_search(num_stopped, num_trials=6, rungs=((1, 0.5),), **changes):
    """A scheduler before its surrogate's trial; some trials ended at their first rung, half a nat above their end."""
    scheduler = TrialScheduler(config_of(num_trials=num_trials, **changes))
    for number, spec in enumerate([scheduler.next() for _ in range(5 + num_trials)]):
        objective = synthetic_objective(spec.values)
        whole = [[step, objective + more] for step, more in rungs] + [[9, objective]]
        if spec.kind == SEARCH and number < 5 + num_stopped:
            scheduler.tell(TrialResult(spec, STOPPED, whole[0][1], whole[:1]))
        else:
            scheduler.tell(TrialResult(spec, FINISHED, objective, whole))
    return scheduler


def test_a_stopped_trial_counts_with_what_others_lost_from_its_rung_on():
    """As in configs/tune/tiny.yaml: of six, three are stopped; with the baseline that has ratios, 7 have a loss."""
    scheduler = stopped_search(3)
    points = scheduler.points()
    assert len(points) == 7
    for values, loss in points:
        assert loss == pytest.approx(synthetic_objective(values)), "at the first rung all are 0.5 above their end"
    spec = scheduler.next()
    assert spec.kind == PREDICTED
    scheduler.tell(result_of(spec))
    assert scheduler.left_out == ""
    assert len(scheduler.results) + len(run_out(scheduler)) == scheduler.num_trials == 1 + 4 + 6 + 1 + 4 * 6


def test_a_prediction_without_enough_trials_is_left_out_in_words_and_in_the_count():
    scheduler = stopped_search(1, num_trials=3)
    assert scheduler.num_trials == 1 + 4 + 3 + 1 + 4 * 6, "not known yet"
    keys = run_out(scheduler)
    assert scheduler.left_out == (
        "the predicted mix is left out: 4 trials with ratios have a loss, "
        "a Gaussian process on 3 ratios needs 5; raise num_trials"
    )
    assert PREDICTED not in keys
    assert len(scheduler.results) == scheduler.num_trials == 1 + 4 + 3 + 4 * 6
    assert TrialScheduler(scheduler.config).left_out == ""


def test_a_baseline_that_wins_by_its_fresh_seeds_alone_gives_its_mix(scores, tmp_path):
    config = config_of(scores=str(scores), output=str(tmp_path), seed=4, repeats={"top": 1, "seeds": 2})
    scheduler = TrialScheduler(config)
    while (spec := scheduler.next()) is not None:
        if spec.key == "uniform":
            scheduler.tell(TrialResult(spec, FAILED, None, error="out of memory"))
        elif spec.name == "uniform":
            scheduler.tell(TrialResult(spec, FINISHED, 0.5, [[1, 0.5]]))
        else:
            scheduler.tell(result_of(spec))
    with open_run(tmp_path, Step("tune", ["*"]), {}) as run:
        result = _finish(scheduler, run, ProgressLine())
    assert result.manifest["best"] == {"mix": "uniform", "is_baseline": True, "ratios": {}}
    best = load_config(MixConfig, tmp_path / "best_mix.yaml")
    asked = MixConfig(**{**scheduler.results["uniform"].spec.mix, "scores": str(scores)})
    assert (best, best.seed) == (asked, 4)
    first = result.manifest["summary_rows"][0]
    assert (first["mix"], first["status"], first["loss"], first["mean loss"]) == ("uniform", "failed", None, 0.5)
    (row,) = read_status(tmp_path)
    assert (row.done, row.planned, row.progress.split(";")[0]) == (len(scheduler.results),) * 2 + (
        f"{len(scheduler.results)} trials",
    )


def test_a_verdict_by_hand():
    def of(name, *losses):
        return {name: dict(enumerate(losses, 1))}

    # Differences 0.1, 0.2, 0.3: mean 0.2, deviation 0.1, t of two degrees of freedom 4.3027.
    found = compare_seeds("new", "old", of("new", 1.0, 1.0, 1.0) | of("old", 1.1, 1.2, 1.3))
    assert found.over_seeds.mean == pytest.approx(0.2)
    assert found.margin == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-5)
    assert found.outcome() == "no difference"
    assert found.sentence() == (
        "no difference found between new and the baseline old: +0.2000 ± 0.2484 (3 seeds); "
        "showing it would take about 5 seeds"
    )
    clear = compare_seeds("new", "old", of("new", 1.0, 1.0, 1.0) | of("old", 1.20, 1.21, 1.19))
    assert clear.sentence() == "new is better than the baseline old by 0.2000 ± 0.0248 (3 seeds)"
    assert compare_seeds("old", "new", of("new", 1.0, 1.0) | of("old", 1.2, 1.2001)).outcome() == "worse"
    assert compare_seeds("new", "old", of("new", 1.0) | of("old", 9.0)).outcome() == "no difference", "one lucky trial"
    assert compare_seeds("new", "old", of("new", 1.0)) is None
    # One of several: the interval alone decides nothing.
    assert clear.sentence(0.049) == clear.sentence() and clear.outcome(0.05) == "no difference"
    (first, second) = describe_comparisons([clear, clear], ("another", "old"))
    assert first["p_adjusted"] == second["p_adjusted"] == pytest.approx(2 * clear.over_seeds.p_value)
    assert clear.over_seeds.p_value < 0.025
    assert first["outcome"] == "better" and first["sentence"] == clear.sentence()
    many = describe_comparisons([clear] * 100, ("another", "old"))
    assert {one["outcome"] for one in many} == {"no difference"}
    assert many[0]["sentence"].startswith("no difference found between new and the baseline old: +0.2000 ± 0.0248")
    # Seeds that only one of them finished don't count.
    paired = compare_seeds("new", "old", {"new": {1: 1.0, 2: 1.0, 9: 0.0}, "old": {1: 1.5, 2: 1.5}})
    assert (paired.over_seeds.num_pairs, paired.over_seeds.mean) == (2, 0.5)


def test_the_winner_has_the_lowest_mean_over_fresh_seeds_not_the_best_trial():
    scheduler = TrialScheduler(config_of(repeats={"top": 2, "seeds": 2}))
    run_out(scheduler)
    objectives = by_name(list(scheduler.results.values()))
    assert all(set(seeds) == {1, 2} for seeds in objectives.values()), "the search's own trials are not asked"
    lucky, steady = scheduler.finalists()
    objectives[lucky], objectives[steady] = {1: 3.0, 2: 3.0}, {1: 1.0, 2: 1.2}
    assert winner([lucky, steady], ["uniform"], objectives) == steady
    assert winner([lucky, steady], ["uniform"], objectives | {"uniform": {1: 0.1, 2: 0.1}}) == "uniform"
    assert winner([lucky, steady], [], objectives | {lucky: {1: 0.0}}) == steady, "half its seeds are missing"


def test_best_so_far():
    def ended(loss, status=FINISHED):
        return TrialResult(TrialSpec("k", SEARCH, "k", 0, {}), status, loss)

    found = best_so_far([ended(None, FAILED), ended(3.0), ended(1.0, STOPPED), ended(2.0), ended(2.5)])
    assert math.isnan(found[0])
    assert found[1:] == [3.0, 3.0, 2.0, 2.0]


def test_every_trial_has_as_many_rows():
    sources = [{"name": "lima", "max_rows": 40}, {"name": "quac", "max_rows": 20}]
    base = MixConfig(task_score={"exact_match_budget": 100, "generation_budget": 40}, sources=sources)
    assert num_rows(base) == 200
    ratios = ratios_of(base)
    assert (ratios["source:lima"], ratios["source:quac"]) == (0.2, 0.1)
    moved = {"gamma": 2.0, "exact_match_fraction": 0.25, "failed_first": 0.0, "source:lima": 0.5}
    made = MixConfig(**mix_of(base, ratios | moved))
    assert num_rows(made) == 200
    assert [source.max_rows for source in made.sources] == [100, 20]
    assert (made.task_score.exact_match_budget, made.task_score.generation_budget) == (20, 60)
    assert (made.task_score.gamma, made.task_score.failed_first) == (2.0, False)


def test_baselines_are_what_their_names_say():
    base = config_of().mix
    for name in ("uniform", "proportional", "birbal_2023", "task_score"):
        made = MixConfig(**baseline_mix(name, base))
        assert made.policy == name and num_rows(made) == num_rows(base)
    assert MixConfig(**baseline_mix("task_score", base)).task_score == base.task_score


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    return write_score_folder(tmp_path_factory.mktemp("tuning") / "scores", made_up_rows(8, 60, seed=3))


def test_every_trial_can_be_rebuilt_from_its_file(scores, tmp_path):
    config = config_of(scores=str(scores))
    scheduler = TrialScheduler(
        config,
        remember=lambda spec: write_spec(open_folder(tmp_path), spec, str(scores)),
    )
    suites, trains = set(), set()
    for _ in range(1 + 4 + 2):  # the base model, the baselines, the first of the search
        spec = scheduler.next()
        scheduler.tell(result_of(spec))
        made = make_mix(spec, config, tmp_path / "made" / spec.key)
        suites.add(made["files"]["validation.parquet"]["sha256"])
        if spec.kind == BASE:
            continue
        trains.add(made["files"]["train.parquet"]["sha256"])
        file = tmp_path / trial_file(spec, MIX_FILE)
        again = mix(load_config(MixConfig, file, flags={"output": str(tmp_path / "again" / spec.key)})).manifest
        assert again["files"] == made["files"]
    assert len(suites) == 1, "all are judged on the same rows"
    assert len(trains) > 4


def test_validation_rows_are_the_same_for_any_seed_and_never_trained_on(scores, tmp_path):
    found = set()
    for seed, policy in ((0, "task_score"), (7, "task_score"), (1, "birbal_2023")):
        folder = tmp_path / f"{policy}-{seed}"
        settings = {"exact_match_budget": 50, "generation_budget": 50, "allow_shortfall": True}
        mix(
            MixConfig(
                scores=str(scores),
                output=str(folder),
                seed=seed,
                policy=policy,
                task_score=settings,
                validation_rows_per_task=5,
            )
        )
        rows = {
            split: pq.read_table(folder / f"{split}.parquet").to_pylist() for split in ("train", "eval", "validation")
        }
        ids = {split: {row["row_id"] for row in rows[split]} for split in rows}
        assert not ids["validation"] & (ids["train"] | ids["eval"])
        texts = {(row["instruction"], row["input"]) for row in rows["validation"]}
        assert not texts & {(row["instruction"], row["input"]) for row in rows["train"] + rows["eval"]}
        per_task = {
            task: [row["task"] for row in rows["validation"]].count(task)
            for task in {r["task"] for r in rows["validation"]}
        }
        assert set(per_task.values()) == {5}
        assert all(row["answer"] and row["question"] for row in rows["validation"])
        audit = pq.read_table(folder / "audit.parquet").to_pylist()
        assert {row["row_id"] for row in audit if row["reason"] == "validation"} == ids["validation"]
        assert not any(row["kept"] for row in audit if row["split"] == "validation")
        found.add(frozenset(ids["validation"]))
    assert len(found) == 1


def test_failed_first_off_draws_as_they_come(scores, tmp_path):
    shares = {}
    for failed_first in (True, False):
        folder = tmp_path / str(failed_first)
        settings = {"exact_match_budget": 40, "generation_budget": 0, "failed_first": failed_first}
        mix(MixConfig(scores=str(scores), output=str(folder), task_score=settings))
        rows = [r for s in ("train", "eval") for r in pq.read_table(folder / f"{s}.parquet").to_pylist()]
        shares[failed_first] = sum(row["score"] == 0 for row in rows) / len(rows)
    assert shares[True] == 1.0
    assert shares[False] < 0.9


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mix": {"policy": "birbal_2023"}}, "mix.policy"),
        ({"mix": {"scores": "x"}}, "mix.scores is decided by the search"),
        ({"train": {"max_steps": 4}}, "train.max_steps is decided by the search"),
        ({"search": {"gamma": {"low": 2, "high": 1}}}, "low (2) must be below high (1)"),
        ({"search": {"source_fractions": {"lima": {"low": 0, "high": 0.2}}}}, "max_rows"),
        ({"baselines": []}, "repeats.top=0"),
        ({"baselines": ["unifrom"]}, "uniform"),
        ({"proxy": {"steps": 4}}, "unknown key 'proxy.steps'"),
        ({"mixes": {"mine": {"sede": 1}}}, "mixes.mine: unknown key 'sede' (did you mean 'seed'?)"),
        (
            {"mixes": {"mine": {"task_score": {"gamma": "x"}}}},
            "mixes.mine: task_score.gamma = 'x': input should be a valid",
        ),
        ({"validation": {"weights": {"exact": 2}}}, "validation.weights.exact: no such group; there are exact_match"),
        (
            {"validation": {"weights": {"generation": -1}}},
            "validation.weights.generation = -1: input should be greater",
        ),
        ({"transfer": {"factor": 4}, "repeats": {"top": 0}}, "transfer.factor needs repeats.top"),
        (
            {
                "search": {"gamma": None, "exact_match_fraction": None, "failed_first": False},
                "mix": {"sources": [{"name": "lima", "max_rows": 100}]},
            },
            "search: no ratio is searched",
        ),
        (
            {
                "search": {"source_fractions": {"quac": {"low": 0, "high": 0.5}}},
                "mix": {
                    "task_score": {"exact_match_budget": 20, "generation_budget": 10},
                    "sources": [{"name": "lima", "max_rows": 60}, {"name": "quac", "max_rows": 10}],
                },
            },
            "less than 1, beside the 0.6 of the sources that are not searched",
        ),
        (
            {"baselines": ["uniform"], "repeats": {"primary": "proportional"}},
            "repeats.primary=proportional is not among",
        ),
    ],
)
def test_wrong_settings_are_named(tmp_path, changes, said):
    file = tmp_path / "tune.yaml"
    file.write_text(yaml.safe_dump(changes))
    with pytest.raises(ConfigError) as error:
        load_config(TuneConfig, file)
    assert said in str(error.value)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / RUN_FILE).write_text("{}")
    assert read_results(open_folder(tmp_path)) == ([], [])


# --- objective, budget, transfer, power


def test_the_objective_is_a_weighted_mean_over_groups():
    losses = {"t1": 1.0, "t2": 3.0, "t3": 5.0, "lima": 7.0}
    groups = {"t1": "exact_match", "t2": "exact_match", "t3": "generation", "lima": "source:lima"}
    found = group_losses(losses, groups)
    assert found == {"exact_match": 2.0, "generation": 5.0, "source:lima": 7.0}
    assert weighted_mean(found, {}) == pytest.approx(14 / 3)
    assert weighted_mean(found, {"exact_match": 2, "source:lima": 0}) == pytest.approx(3.0)
    with pytest.raises(ConfigError, match="all weigh 0"):
        weighted_mean(found, dict.fromkeys(found, 0.0))


def test_files_to_judge_by_hold_question_and_answer(tmp_path):
    (tmp_path / "mine.jsonl").write_text(
        '{"question": "q1", "answer": "a1", "more": 1}\n{"question": "q2", "answer": "a2"}\n'
    )
    assert read_questions(str(tmp_path / "mine.jsonl")) == {"question": ["q1", "q2"], "answer": ["a1", "a2"]}
    (tmp_path / "other.jsonl").write_text('{"question": "q1", "reply": "a1"}\n')
    with pytest.raises(ConfigError, match=r"has the columns question, reply; .* no such answer"):
        read_questions(str(tmp_path / "other.jsonl"))
    with pytest.raises(ConfigError, match=r"absent.parquet: no such file"):
        read_questions(str(tmp_path / "absent.parquet"))
    (tmp_path / "dates.jsonl").write_text('{"question": "when?", "answer": "1969-07-20"}\n' * 2)
    assert read_questions(str(tmp_path / "dates.jsonl"))["answer"] == ["1969-07-20"] * 2, "texts, as they are written"
    for name, text in (
        ("none.jsonl", "\n"),
        ("null.jsonl", '{"question": "q", "answer": null}'),
        ("list.jsonl", "[1]"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError, match=rf"validation.files: .*{name}.* expected "):
            read_questions(str(tmp_path / name))


def timed(spec, seconds):
    return TrialResult(spec, FINISHED, 1.0, [[1, 1.0]], num_tokens=spec.tokens, seconds=seconds)


def test_a_budget_ends_the_search_in_time_for_the_fresh_seeds():
    """A trial takes 10 s; 1 + 2 baselines, 1 predicted and 3 × 2 repeats leave 1,000 - 30 - 70 s for the search."""
    clock = [1000.0]
    config = config_of(
        num_trials=400, num_initial=512, baselines=["uniform", "task_score"], repeats={"top": 1, "seeds": 2}
    )
    scheduler = TrialScheduler(config, seconds_left=lambda: clock[0])
    kinds = []
    while (spec := scheduler.next()) is not None:
        kinds.append(spec.kind)
        clock[0] -= 10
        scheduler.tell(timed(spec, 10))
    assert 85 <= kinds.count(SEARCH) < 92
    assert kinds[-7:] == [PREDICTED] + [REPEAT] * 6
    assert clock[0] >= 0
    assert scheduler.cut_short == ""


def test_a_budget_that_is_over_stops_before_what_does_not_fit():
    clock = [1000.0]
    config = config_of(num_trials=2, predicted=False, baselines=["uniform"], repeats={"top": 1, "seeds": 4})
    scheduler = TrialScheduler(config, seconds_left=lambda: clock[0])
    keys = []
    while (spec := scheduler.next()) is not None:
        keys.append(spec.key)
        if spec.kind == REPEAT:
            clock[0] = 5.0
        scheduler.tell(timed(spec, 10))
    assert keys[-1] == "uniform-seed1"
    assert scheduler.cut_short == "the budget ended before search-000-seed1 and what follows it"


def test_the_best_mix_and_the_baselines_run_again_for_longer():
    config = config_of(
        predicted=False, baselines=["uniform", "task_score"], repeats={"top": 1, "seeds": 2}, transfer={"factor": 4}
    )
    scheduler = TrialScheduler(config)
    keys = run_out(scheduler)
    best = scheduler.finalists()[0]
    assert keys[-3:] == [f"{best}-x4-seed1", "uniform-x4-seed1", "task_score-x4-seed1"]
    assert len(keys) == scheduler.num_trials
    assert {scheduler.results[key].spec.tokens for key in keys[-3:]} == {4 * config.proxy.tokens}
    assert {result.spec.tokens for result in scheduler.of_kind(REPEAT)} == {config.proxy.tokens}


def test_mixes_of_the_users_are_compared_without_a_search():
    config = config_of(
        num_trials=0,
        baselines=["proportional", "uniform"],
        mixes={"steep": {"task_score": {"gamma": 3}}, "published": {"policy": "birbal_2023"}},
        repeats={"top": 0, "seeds": 2, "primary": "proportional"},
    )
    scheduler = TrialScheduler(config)
    keys = run_out(scheduler)
    arms = ["proportional", "uniform", "steep", "published"]
    assert keys == ["base_model", *(f"{name}-seed{seed}" for seed in (1, 2) for name in arms)]
    assert len(keys) == scheduler.num_trials == estimate(config)[-1]["number"]
    mixes = {spec.name: spec.mix for spec in (scheduler.results[key].spec for key in keys)}
    assert mixes["steep"]["task_score"] == mixes["uniform"]["task_score"] | {"gamma": 3.0}
    assert (mixes["steep"]["policy"], mixes["published"]["policy"]) == ("task_score", "birbal_2023")
    assert {scheduler.results[f"{name}-seed2"].spec.mix["seed"] for name in arms} == {2}


def test_without_a_search_the_best_mix_of_the_users_is_what_birbal_mix_gets(scores, tmp_path):
    config = config_of(
        scores=str(scores),
        output=str(tmp_path),
        seed=4,
        num_trials=0,
        baselines=["proportional", "uniform"],
        mixes={"steep": {"task_score": {"gamma": 3}}, "flat": {"task_score": {"gamma": 0}}},
        repeats={"top": 0, "seeds": 3},
    )
    scheduler = TrialScheduler(config)
    losses = {"proportional": 1.2, "uniform": 1.1, "steep": 0.9, "flat": 1.0, "base_model": 3.0}
    while (spec := scheduler.next()) is not None:
        loss = losses[spec.name] + 0.01 * spec.seed
        scheduler.tell(TrialResult(spec, FINISHED, loss, [[1, loss]]))
    with open_run(tmp_path, Step("tune", ["*"]), {}) as run:
        manifest = _finish(scheduler, run, ProgressLine()).manifest
    assert manifest["best"] == {"mix": "steep", "is_baseline": False, "ratios": {}}
    assert load_config(MixConfig, tmp_path / "best_mix.yaml").task_score.gamma == 3
    assert [row["mix"] for row in manifest["summary_rows"]] == ["steep", "flat", "uniform", "proportional"]
    assert [row["fresh seeds"] for row in manifest["summary_rows"]] == [3] * 4
    pairs = [(one["mix"], one["baseline"], one["is_primary"]) for one in manifest["comparisons"]]
    against = "proportional"
    assert pairs == [("steep", against, True), ("flat", against, False), ("uniform", against, False)]
    assert not (tmp_path / "search.png").exists()
    recipe = PipelineConfig(output=str(tmp_path), tune=config, mix=config.mix)
    assert _mix_settings(recipe).task_score.gamma == 3, "the recipe trains on the mix that won"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_trials": 0}, "nothing to compare"),
        ({"mixes": {"uniform": {}}}, "mixes.uniform"),
        ({"mixes": {"mine": {"task_score": {"gama": 1}}}}, "gama"),
        ({"mixes": {"mine": {}}, "baselines": [], "repeats": {"top": 0}}, "baselines"),
        # Of the folders that these would get, one is hidden, one is the run's own, others may be another trial's.
        *(
            ({"mixes": {name: {}}}, f"mixes.{re.escape(name)}: a name has letters")
            for name in (".mine", "..", "a/b", "", "a\nb", "mine-seed2", "uniform-x4", "search-000", "predicted")
        ),
    ],
)
def test_mixes_that_can_not_be_compared_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        config_of(**changes)


@pytest.mark.parametrize("num_trials", [0, 6])
@pytest.mark.parametrize("longer", [0, 4])
def test_no_two_trials_have_one_key(num_trials, longer):
    names = ["my_mix", "_mine", "half_x2", "7", "uniform_seed9", "search_000", "Predicted"]
    transfer = {"factor": longer, "seeds": 2}
    config = config_of(num_trials=num_trials, mixes=dict.fromkeys(names, STEEP), transfer=transfer)
    keys = run_out(scheduler := TrialScheduler(config))
    assert len(set(keys)) == len(keys) == scheduler.num_trials
    assert {result.spec.name for result in scheduler.of_kind(REPEAT)} >= set(names)


def test_rank_agreement_by_hand():
    short = {"a": {1: 1.0}, "b": {1: 2.0, 2: 2.2}, "c": {1: 3.0}, "only here": {1: 0.0}}
    long = {"a": {1: 0.5}, "b": {1: 0.9}, "c": {1: 0.7}}
    found = rank_agreement(short, long)
    assert (found["agreement"], found["num_pairs"]) == (pytest.approx(2 / 3), 3)
    assert (found["order"], found["order_longer"]) == (["a", "b", "c"], ["a", "c", "b"])
    assert rank_agreement(short, {"a": {1: 1.0}}) is None


def test_only_the_comparison_named_beforehand_keeps_its_p_value():
    def losses(*values):
        return dict(enumerate(values))

    objectives = {
        "new": losses(1, 1, 1),
        "x": losses(1.1, 1.2, 1.3),
        "y": losses(1.1, 1.1, 1.12),
        "z": losses(1, 1.1, 1),
    }
    found = [compare_seeds("new", name, objectives) for name in "xyz"]
    rows = describe_comparisons(found, ("new", "x"))
    assert [row["is_primary"] for row in rows] == [True, False, False]
    assert rows[0]["p_adjusted"] == rows[0]["p_value"]
    assert rows[1]["p_adjusted"] == pytest.approx(min(1, 2 * rows[1]["p_value"]))
    assert rows[2]["p_adjusted"] == rows[2]["p_value"]


def test_the_table_of_trials_adds_up():
    config = config_of(
        baselines=["uniform"],
        proxy={"tokens": 1000},
        repeats={"top": 1, "seeds": 2},
        transfer={"factor": 4},
    )
    *rows, total = estimate(config)
    assert [row["number"] for row in rows] == [1, 1, 6, 1, 4, 2]
    assert total["number"] == TrialScheduler(config).num_trials == 15
    assert total["tokens each"] == 1000 * (1 + 6 + 1 + 4) + 4000 * 2


def test_the_hours_of_a_search_are_the_plan_s(monkeypatch, tmp_path):
    """By the rate of fine-tunes, where no search of this kind ran here."""
    monkeypatch.setenv("BIRBAL_CACHE", str(tmp_path))
    save_figures(rate_key(TrainConfig().replace({"resources.device": "cpu"})), tokens_per_second=10.0)
    config = config_of(
        baselines=["uniform"],
        proxy={"tokens": 1000},
        repeats={"top": 1, "seeds": 2},
        transfer={"factor": 4},
        resources={"max_concurrent": 2},
    )
    plan = plan_tune(config)
    # Two at a time: 1 + 1 + 6 trials, the predicted one, 4 fresh seeds; then 2 of four times the length.
    rounds = 4 + 1 + 2 + 4
    assert plan.low_seconds == pytest.approx(5 + rounds * (20 / 4 + 1000 / 11))
    assert plan.high_seconds == pytest.approx(30 + rounds * (60 + 1000 / 9))
    assert plan.source == "measured on this machine"
    assert money([plan], 3.0 * 2)[0] == pytest.approx(plan.low_seconds / 3600 * 6)


def test_a_dry_run_prints_trials_hours_and_costs(scores, tmp_path, monkeypatch):
    monkeypatch.setenv("BIRBAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tune_run, "resolve_model", lambda *arguments: Model("proxy", tmp_path, None, "f"))
    settings = ["num_trials=0", "mixes={steep: {task_score: {gamma: 3}}}", "baselines=[uniform]", "repeats.seeds=2"]
    settings += ["proxy.tokens=3600", "resources.price_per_hour=2"]
    save_figures(rate_key(TrainConfig().replace({"resources.device": "cpu"})), tokens_per_second=1.0)
    cache = {file: file.read_bytes() for file in (tmp_path / "cache").rglob("*") if file.is_file()}
    given = [part for one in settings for part in ("--set", one)]
    done = CliRunner().invoke(main, ["tune", "--scores", str(scores), "--dry-run", "--format", "csv", *given])
    assert done.exit_code == 0, done.output
    table = done.stdout.splitlines()
    assert table[0] == "trials,number,tokens each"
    assert table[-1] == "in all,5,14400"
    # A base model and four fresh seeds of an hour each, give or take a tenth, one after the other.
    assert "takes 4 h 33 min to 5 h 38 min (measured on this machine): 4 short fine-tunes of 3,600" in done.stderr
    assert "costs 9.11 to 11.29, at 2 an hour" in done.stderr
    assert {file: file.read_bytes() for file in (tmp_path / "cache").rglob("*") if file.is_file()} == cache


@pytest.fixture
def tuned(scores, tmp_path, monkeypatch):
    """tuned(**changes) calls `tune` on a made-up model, without Ray: the keys of the trials it ran, its manifest.

    Trials whose keys are in `tuned.broken` fail as those do whose process died.
    """
    monkeypatch.setenv("BIRBAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tune_run, "resolve_model", lambda *arguments: Model("proxy", tmp_path, None, "f"))

    def search(scheduler, folder, trainable, options, progress, run):
        while (spec := scheduler.next()) is not None:
            ran.append(spec.key)
            if spec.key in broken:
                scheduler.tell(TrialResult(spec, FAILED, None, error="out of memory"))
                continue
            result = timed_result(spec)
            write_result(folder, result)
            scheduler.tell(result)

    ran: list[str] = []
    broken: set[str] = set()
    monkeypatch.setattr(tune_run, "search", search)

    def call(*, overwrite=False, **changes):
        settings = {"num_trials": 0, "baselines": ["proportional"], "mixes": {"steep": STEEP}}
        settings |= {"repeats": {"top": 0, "seeds": 2}, "scores": str(scores), "output": str(tmp_path / "run")}
        ran.clear()
        config = config_of(**{**settings, **changes})
        found = tune_run.tune(config, overwrite=overwrite)
        return list(ran), found.manifest

    call.broken = broken
    return call


STEEP, FLAT = {"task_score": {"gamma": 3}}, {"task_score": {"gamma": 0}}


def timed_result(spec):
    loss = {"proportional": 1.2, "steep": 1.0, "flat": 1.1}.get(spec.name, 2.0) + 0.01 * spec.seed
    return TrialResult(spec, FINISHED, loss, [[1, loss]], num_tokens=spec.tokens, seconds=1000.0)


def test_overwriting_deletes_no_sources(tuned, tmp_path):
    """`trials/` in the folder is the step's own."""
    tuned()
    file = tmp_path / "run" / "trials" / "mine.jsonl"
    file.write_text('{"instruction": "a", "input": "b", "output": "c"}\n')
    source = {"name": "mine", "path": str(file), "columns": {"input": "input", "output": "output"}, "max_rows": 1}
    for reading in ({"sources": [source]}, {"contamination": {"files": [str(file)]}}):
        with pytest.raises(ConfigError, match=r"this folder holds an input \(.*trials/mine"):
            tuned(overwrite=True, mix=reading)
    assert file.exists()


def test_a_failed_trial_is_named(tuned):
    tuned.broken.add("steep-seed2")
    _, manifest = tuned()
    assert manifest["failed"] == ["steep-seed2"] and manifest["trials"] == {"finished": 4, "failed": 1}
    assert "failed: steep-seed2" in describe_result(manifest)
    assert tuned() == ([], manifest), "it is finished"


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"mixes": {"steep": {"task_score": {"gamma": 2}}}}, "settings.mixes.steep.task_score.gamma: 3 → 2"),
        ({"mixes": {"flat": FLAT, "steep": STEEP}}, "settings.mixes.flat.task_score.gamma: (none) → 0"),
        ({"mixes": {"flat": FLAT}}, "settings.mixes.steep.task_score.gamma: 3 → (none)"),
        ({"mixes": {"steep": STEEP, "flat": FLAT}}, "settings.mixes.flat.task_score.gamma: (none) → 0"),
        ({"repeats": {"top": 0, "seeds": 3}}, "settings.repeats.seeds: 2 → 3"),
        ({"repeats": {"top": 0, "seeds": 2, "primary": "proportional"}}, "settings.repeats.primary"),
        ({"baselines": ["uniform", "proportional"]}, "settings.baselines"),
        ({"validation": {"rows_per_task": 3}}, "settings.validation.rows_per_task: 16 → 3"),
        ({"proxy": {"tokens": 5}}, "settings.proxy.tokens"),
        ({"seed": 1}, "settings.seed: 0 → 1"),
    ],
)
def test_what_changes_or_adds_a_trial_is_refused(tuned, changes, difference):
    tuned()
    with pytest.raises(RunMismatchError, match=re.escape(difference)):
        tuned(**changes)


def test_a_trial_finds_the_files_of_its_mix_from_any_folder(tuned, tmp_path, monkeypatch):
    def made_from(folder):
        sources = [{"name": "mine", "path": f"{folder}mine.jsonl", "columns": {"output": "answer"}, "max_rows": 5}]
        budgets = {"exact_match_budget": 60, "generation_budget": 60, "allow_shortfall": True}
        return {"task_score": budgets, "sources": sources, "contamination": {"files": [f"{folder}held.txt"]}}

    monkeypatch.chdir(tmp_path)
    other = [{"name": "mine", "path": "other.jsonl", "columns": {"output": "answer"}, "max_rows": 5}]
    mixes = {"steep": {**STEEP, "sources": other}}
    _, manifest = tuned(mix=made_from(""), mixes=mixes)
    for trial, file in (("proportional", "mine.jsonl"), ("steep", "other.jsonl")):
        mix = yaml.safe_load((tmp_path / "run" / "trials" / f"{trial}-seed1" / "mix.yaml").read_text())
        assert mix["sources"][0]["path"] == str(tmp_path / file)
        assert mix["contamination"]["files"] == [str(tmp_path / "held.txt")]
    assert tuned(mix=made_from(f"{tmp_path}/"), mixes=mixes) == ([], manifest), "the same search, spelled otherwise"


def test_overwriting_deletes_no_adapter_to_start_from_and_no_source_of_one_mix(tuned, tmp_path):
    inside = str(tmp_path / "run" / "trials" / "mine")
    tuned()
    (tmp_path / "run" / "trials" / "mine").mkdir()
    source = {"name": "mine", "path": inside, "columns": {"output": "output"}, "max_rows": 1}
    mixes = {"steep": STEEP, "mine": {"sources": [source]}}
    for reading in ({"train": {"lora": {"from_adapter": inside}}}, {"mixes": mixes}):
        with pytest.raises(ConfigError, match=r"this folder holds an input \(.*trials/mine"):
            tuned(overwrite=True, **reading)


def test_a_search_that_its_budget_cut_short_goes_on_with_a_larger_one(tuned, capsys):
    keys, manifest = tuned(budget=500)  # a trial takes 1,000 s
    assert manifest["cut_short"] == "the budget ended before steep-seed1 and what follows it"
    assert tuned(budget=500)[0] == [] and tuned(budget=400)[0] == []
    more, manifest = tuned(budget=1e9)
    assert more == ["steep-seed1", "proportional-seed2", "steep-seed2"] and manifest["cut_short"] is None
    assert len(keys) + len(more) == 5


def test_an_interrupted_search_whose_budget_is_over_waits_for_a_larger_one(tuned, tmp_path):
    tuned(budget=1e9)
    for name in ("manifest.json", "trials/steep-seed1/result.json", "trials/steep-seed2/result.json"):
        (tmp_path / "run" / name).unlink()
    keys, manifest = tuned(budget=1e-9)
    assert keys == [] and manifest["cut_short"] == "the budget had ended before the last trials"
    assert tuned(budget=1e9)[0] == ["steep-seed1", "steep-seed2"]


def test_a_budget_that_ended_before_any_trial_is_said(tuned):
    with pytest.raises(RunFailedError, match=r"the budget of 0 s was over before any trial had ended; .* --budget"):
        tuned(budget=1e-9)


def test_a_card_for_trials_that_get_none_is_refused(tuned):
    """Ray Tune would wait for ever without a word."""
    with pytest.raises(ConfigError, match=r"resources.accelerator_type=L4 with resources.num_gpus=0"):
        tuned(resources={"accelerator_type": "L4"})


def test_shares_that_could_not_be_filled_are_said():
    manifest = {
        "base_objective": None,
        "weights": {"exact_match": 1.0},
        "left_out": None,
        "cut_short": "the budget ended",
        "unfilled": {"trials": 3, "most_rows": 1200},
        "comparisons": [],
        "transfer": None,
        "best": {"mix": "uniform", "is_baseline": True},
    }
    lines = describe_result(manifest)
    assert "3 trials could not fill their shares (up to 1,200 rows short)" in lines[2]
    assert lines[1] == "the budget ended"


def test_old_keys_are_accepted_with_a_warning(capsys):
    config = load_config(TuneConfig, None, ["validation.looks=3", "surrogate=false"])
    assert (config.validation.num_rungs, config.predicted) == (3, False)
    assert "'looks' is now 'num_rungs'" in capsys.readouterr().err
    config = load_config(PipelineConfig, None, ["tune.num_random=5", "tune.stopping={grace_looks: 2}"]).tune
    assert (config.num_initial, config.stopping.grace_rungs) == (5, 2)
    assert "'num_random' is now 'num_initial'" in capsys.readouterr().err
