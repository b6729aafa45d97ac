"""The search without Ray: what is tried, in which order, what may be concluded."""

import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from birbal_ray.mix.config import MixConfig
from birbal_ray.mix.run import mix
from birbal_ray.mix.scores import open_scores
from birbal_ray.progress import ProgressLine
from birbal_ray.run import RUN_FILE, start_run, write_json
from birbal_ray.settings import ConfigError, load_config
from birbal_ray.tune.config import TuneConfig
from birbal_ray.tune.records import (
    MIX_FILE,
    RESULT_FILE,
    read_records,
    remember_job,
    table_of,
    trial_folder,
    write_record,
)
from birbal_ray.tune.run import _finish, task_counts
from birbal_ray.tune.scheduler import (
    BASE,
    BASELINE,
    FAILED,
    FINISHED,
    REPEAT,
    SEARCH,
    STOPPED,
    SURROGATE,
    Job,
    Plan,
    Record,
    best_so_far,
)
from birbal_ray.tune.space import Point, TaskCounts, baseline_mix, mix_of, num_rows, point_of
from birbal_ray.tune.stats import by_name, verdict, winner
from birbal_ray.tune.surrogate import num_needed, predicted_best
from birbal_ray.tune.trial import make_mix
from tests.fixtures.score_folder import made_up_rows, write_score_folder

COUNTS = TaskCounts({"exact_match": 6, "generation": 2}, {"exact_match": 300, "generation": 900})
OPTIMUM = {"gamma": 1.5, "exact_match_fraction": 0.35, "failed_first": 1.0}


def config_of(**changes):
    budgets = {"exact_match_budget": 60, "generation_budget": 60, "allow_shortfall": True}
    return TuneConfig(**{"num_trials": 6, "num_random": 3, "mix": {"task_score": budgets}, **changes})


def synthetic_objective(values):
    """A bowl with its lowest point, 1.0, at OPTIMUM; mixes without ratios lie on its rim."""
    if not values:
        return 2.0
    off = (values["gamma"] - OPTIMUM["gamma"]) / 4, values["exact_match_fraction"] - OPTIMUM["exact_match_fraction"]
    return 1.0 + off[0] ** 2 + off[1] ** 2 + 0.1 * (1 - values["failed_first"])


def record_of(job, noise=0.0):
    objective = synthetic_objective(job.values) + noise * job.seed
    return Record(job, FINISHED, objective, [[1, objective]], mix_sha256="x")


def run_out(plan, noise=0.0, most=1000):
    """Keys in the order in which they were handed out; ends after `most`."""
    keys = []
    while len(keys) < most and (job := plan.next()) is not None:
        keys.append(job.key)
        plan.tell(record_of(job, noise))
    return keys


def searched(plan):
    return [record for record in plan.records.values() if record.job.kind in (SEARCH, SURROGATE)]


def test_the_order_of_the_trials():
    plan = Plan(config_of(repeats={"top": 2, "seeds": 3}), COUNTS)
    keys = run_out(plan)
    assert len(keys) == len(set(keys)) == plan.num_trials == 1 + 4 + 6 + 1 + 3 * 6
    assert not plan.running
    kinds = [plan.records[key].job.kind for key in keys]
    assert kinds == [BASE] + [BASELINE] * 4 + [SEARCH] * 6 + [SURROGATE] + [REPEAT] * 18
    repeats = [plan.records[key].job for key in keys[-18:]]
    assert {job.seed for job in repeats} == {1, 2, 3}
    best = sorted(searched(plan), key=lambda record: record.objective)[:2]
    assert {job.name for job in repeats} == {*plan.config.baselines, *(record.job.name for record in best)}
    for job in repeats:
        assert job.mix == plan.records[job.name].job.mix | {"seed": job.seed}


def test_repeats_wait_for_every_trial_that_could_be_among_the_best():
    plan = Plan(config_of(surrogate=False), COUNTS)
    jobs = [plan.next() for _ in range(11)]
    assert plan.next() is None
    assert len(plan.running) == 11
    for job in jobs[:-1]:
        plan.tell(record_of(job))
        assert plan.next() is None
    plan.tell(record_of(jobs[-1]))
    again = [plan.next() for _ in range(3)]
    assert [job.kind for job in again] == [REPEAT] * 3, "repeats do not wait for each other"


@pytest.mark.parametrize("most", [0, 1, 4, 7, 10, 11, 12, 15, 23])
def test_an_interrupted_search_goes_on(tmp_path, most):
    config = config_of(repeats={"top": 1, "seeds": 3})
    first = Plan(config, COUNTS, remember=lambda job: remember_job(tmp_path, job, "/scores"))
    done = run_out(first, most=most)
    for key in done:
        write_record(tmp_path, first.records[key])
    lost = first.next()  # handed out, then the power went off
    records, begun = read_records(tmp_path)
    assert [job.key for job in begun] == ([lost.key] if lost else [])
    second = Plan(config, COUNTS, records, begun, lambda job: remember_job(tmp_path, job, "/scores"))
    job = second.next()
    assert job == lost, "what was begun is run as it was"
    if job:
        second.tell(record_of(job))
    more = run_out(second)
    assert not set(more) & {*done, lost.key if lost else ""}
    assert len(done) + len(more) + bool(lost) == second.num_trials


def test_synthetic_optimum_is_found_and_sooner_than_at_random():
    """24 trials, the surrogate's among them: the best lies near the optimum, nearer than the best of 24 random ones."""
    found, at_random = [], []
    for seed in range(5):
        plan = Plan(config_of(num_trials=23, num_random=8, seed=seed, repeats={"top": 1, "seeds": 2}), COUNTS)
        run_out(plan)
        best = min(searched(plan), key=lambda record: record.objective)
        found.append(best.objective)
        assert best.job.values["failed_first"] == OPTIMUM["failed_first"]
        assert abs(best.job.values["gamma"] - OPTIMUM["gamma"]) < 0.6
        assert abs(best.job.values["exact_match_fraction"] - OPTIMUM["exact_match_fraction"]) < 0.12
        random = Plan(
            config_of(num_trials=24, num_random=24, seed=seed, surrogate=False, repeats={"top": 1, "seeds": 2}), COUNTS
        )
        run_out(random)
        assert len(searched(plan)) == len(searched(random)) == 24
        at_random.append(min(record.objective for record in searched(random)))
    assert np.mean(found) - 1 < 0.5 * (np.mean(at_random) - 1), (found, at_random)


def test_surrogate_names_the_bottom_of_a_bowl():
    config = config_of()
    ranges = Plan(config, COUNTS)._distributions
    random = np.random.default_rng(0)
    points = [
        (values, synthetic_objective(values))
        for values in (
            {
                "gamma": random.uniform(0, 4),
                "exact_match_fraction": random.uniform(0.1, 0.9),
                "failed_first": float(random.integers(0, 2)),
            }
            for _ in range(40)
        )
    ]
    best = predicted_best(points, ranges, seed=0)
    assert best["failed_first"] == 1.0
    assert best["gamma"] == pytest.approx(OPTIMUM["gamma"], abs=0.4)
    assert best["exact_match_fraction"] == pytest.approx(OPTIMUM["exact_match_fraction"], abs=0.1)
    assert num_needed(ranges) == 5


def test_a_stopped_or_failed_trial_is_never_among_the_best():
    plan = Plan(config_of(num_trials=4, surrogate=False, repeats={"top": 4, "seeds": 2}), COUNTS)
    jobs = [plan.next() for _ in range(9)]
    for job in jobs:
        if job.key == "search-001":
            plan.tell(Record(job, STOPPED, 0.0, [[1, 0.0]]))
        elif job.key == "search-002":
            plan.tell(Record(job, FAILED, None, error="out of memory"))
        else:
            plan.tell(record_of(job))
    assert sorted(plan.finalists()) == ["search-000", "search-003"]
    assert table_of(list(plan.records.values())).num_rows == 9


def test_a_diverged_trial_has_failed_for_good_and_the_search_goes_on(tmp_path):
    config = config_of()
    plan = Plan(config, COUNTS, remember=lambda job: remember_job(tmp_path, job, "/scores"))
    jobs = {job.key: job for job in (plan.next() for _ in range(11))}
    diverged = {
        "task_score": Record(jobs["task_score"], FINISHED, math.nan, [[1, 3.0], [2, math.nan]]),
        "search-001": Record(jobs["search-001"], FINISHED, math.nan, [[1, math.nan], [2, math.nan]]),
        "search-002": Record(jobs["search-002"], STOPPED, math.inf, [[1, math.inf]]),
    }
    for key, job in jobs.items():
        record = diverged.get(key) or record_of(job)
        write_record(tmp_path, record)
        plan.tell(record)
    # As a search wrote it that took any number for a loss.
    write_json(trial_folder(tmp_path, jobs["search-001"]) / RESULT_FILE, diverged["search-001"].to_dict())
    records, begun = read_records(tmp_path)
    assert begun == []
    again = Plan(config, COUNTS, records, begun)
    for one in (plan, again):
        assert {key for key, record in one.records.items() if record.status == FAILED} == set(diverged)
        assert one.records["search-001"].objective is None
        assert one.records["search-001"].error.startswith("its loss is nan after optimizer step 2: it diverged")
        assert not set(one.finalists()) & set(diverged)
    assert {record.job.key: record.status for record in records}["search-002"] == FAILED, "on disk, too"
    keys = run_out(again)
    assert "surrogate" not in keys, "4 losses are too few"
    assert not set(keys) & set(jobs)
    assert table_of(list(again.records.values())).column("objective").null_count == 3


def stopped_search(num_stopped, num_trials=6, looks=((1, 0.5),), **changes):
    """A plan before its surrogate's trial; some trials ended at their first look, half a nat above their end."""
    plan = Plan(config_of(num_trials=num_trials, **changes), COUNTS)
    for number, job in enumerate([plan.next() for _ in range(5 + num_trials)]):
        objective = synthetic_objective(job.values)
        whole = [[step, objective + more] for step, more in looks] + [[9, objective]]
        if job.kind == SEARCH and number < 5 + num_stopped:
            plan.tell(Record(job, STOPPED, whole[0][1], whole[:1]))
        else:
            plan.tell(Record(job, FINISHED, objective, whole))
    return plan


def test_the_surrogate_learns_from_the_last_look_that_enough_trials_had():
    """As in configs/tune/tiny.yaml: of six, three are stopped; with a baseline 4 have a loss at the end, 7 at first."""
    plan = stopped_search(3)
    points = plan._points()
    assert len(points) == 7
    for values, loss in points:
        assert loss == pytest.approx(synthetic_objective(values) + 0.5), "all at the same look"
    job = plan.next()
    assert job.kind == SURROGATE
    plan.tell(record_of(job))
    assert plan.left_out == ""
    assert len(plan.records) + len(run_out(plan)) == plan.num_trials == 1 + 4 + 6 + 1 + 4 * 6
    enough = stopped_search(2)._points()
    assert [loss for _, loss in enough] == [synthetic_objective(values) for values, _ in enough]
    assert len(enough) == 5


def test_a_surrogate_without_enough_trials_is_left_out_in_words_and_in_the_count():
    plan = stopped_search(1, num_trials=3)
    assert plan.num_trials == 1 + 4 + 3 + 1 + 4 * 6, "not known yet"
    keys = run_out(plan)
    assert plan.left_out == (
        "the surrogate's trial is left out: 4 trials with ratios have a loss, "
        "a regression on 3 ratios needs 5; raise num_trials"
    )
    assert SURROGATE not in keys
    assert len(plan.records) == plan.num_trials == 1 + 4 + 3 + 4 * 6
    assert Plan(plan.config, COUNTS).left_out == ""


def test_a_baseline_that_wins_by_its_fresh_seeds_alone_gives_its_mix(scores, tmp_path):
    config = config_of(scores=str(scores), output=str(tmp_path), seed=4, repeats={"top": 1, "seeds": 2})
    store = open_scores(scores)
    plan = Plan(config, task_counts(store))
    start_run(tmp_path, "tune", {})
    while (job := plan.next()) is not None:
        if job.key == "uniform":
            plan.tell(Record(job, FAILED, None, error="out of memory"))
        elif job.name == "uniform":
            plan.tell(Record(job, FINISHED, 0.5, [[1, 0.5]]))
        else:
            plan.tell(record_of(job))
    result = _finish(config, store, plan, tmp_path, ProgressLine())
    assert result.manifest["best"] == {"mix": "uniform", "is_baseline": True, "ratios": {}}
    best = load_config(MixConfig, tmp_path / "best_mix.yaml")
    asked = MixConfig(**{**plan.records["uniform"].job.mix, "scores": str(scores)})
    assert (best, best.seed) == (asked, 4)
    first = result.manifest["summary"][0]
    assert (first["mix"], first["status"], first["loss"], first["mean loss"]) == ("uniform", "failed", None, 0.5)


def test_a_verdict_by_hand():
    def of(name, *losses):
        return {name: dict(enumerate(losses, 1))}

    # Differences 0.1, 0.2, 0.3: mean 0.2, deviation 0.1, t of two degrees of freedom 4.3027.
    found = verdict("new", "old", of("new", 1.0, 1.0, 1.0) | of("old", 1.1, 1.2, 1.3))
    assert found.difference == pytest.approx(0.2)
    assert found.margin == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-5)
    assert found.outcome == "no difference"
    assert found.sentence() == "no difference found between new and the baseline old: +0.2000 ± 0.2484 (3 seeds)"
    clear = verdict("new", "old", of("new", 1.0, 1.0, 1.0) | of("old", 1.20, 1.21, 1.19))
    assert clear.sentence() == "new is better than the baseline old by 0.2000 ± 0.0248 (3 seeds)"
    assert verdict("old", "new", of("new", 1.0, 1.0) | of("old", 1.2, 1.2001)).outcome == "worse"
    assert verdict("new", "old", of("new", 1.0) | of("old", 9.0)).outcome == "no difference", "one lucky trial"
    assert verdict("new", "old", of("new", 1.0)) is None
    # Seeds that only one of them finished don't count.
    paired = verdict("new", "old", {"new": {1: 1.0, 2: 1.0, 9: 0.0}, "old": {1: 1.5, 2: 1.5}})
    assert (paired.num_seeds, paired.difference) == (2, 0.5)


def test_the_winner_has_the_lowest_mean_over_fresh_seeds_not_the_best_trial():
    plan = Plan(config_of(repeats={"top": 2, "seeds": 2}), COUNTS)
    run_out(plan)
    objectives = by_name(list(plan.records.values()))
    assert all(set(seeds) == {1, 2} for seeds in objectives.values()), "the search's own trials are not asked"
    lucky, steady = plan.finalists()
    objectives[lucky], objectives[steady] = {1: 3.0, 2: 3.0}, {1: 1.0, 2: 1.2}
    assert winner([lucky, steady], ["uniform"], objectives) == steady
    assert winner([lucky, steady], ["uniform"], objectives | {"uniform": {1: 0.1, 2: 0.1}}) == "uniform"
    assert winner([lucky, steady], [], objectives | {lucky: {1: 0.0}}) == steady, "half its seeds are missing"


def test_best_so_far():
    def ended(loss, status=FINISHED):
        return Record(Job("k", SEARCH, "k", 0, {}), status, loss)

    found = best_so_far([ended(None, FAILED), ended(3.0), ended(1.0, STOPPED), ended(2.0), ended(2.5)])
    assert math.isnan(found[0])
    assert found[1:] == [3.0, 3.0, 2.0, 2.0]


def test_every_trial_has_as_many_rows():
    sources = [{"name": "lima", "max_rows": 40}, {"name": "quac", "max_rows": 20}]
    base = MixConfig(task_score={"exact_match_budget": 100, "generation_budget": 40}, sources=sources)
    assert num_rows(base) == 200
    assert point_of(base).source_fractions == {"lima": 0.2, "quac": 0.1}
    made = MixConfig(**mix_of(base, Point(2.0, 0.25, False, {"lima": 0.5, "quac": 0.1})))
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
    plan = Plan(config, task_counts(open_scores(scores)), remember=lambda job: remember_job(tmp_path, job, str(scores)))
    suites, trains = set(), set()
    for _ in range(9):
        job = plan.next()
        plan.tell(record_of(job))
        made = make_mix(job, config, tmp_path / "made" / job.key)
        suites.add(made["files"]["validation.parquet"]["sha256"])
        if job.kind == BASE:
            continue
        trains.add(made["files"]["train.parquet"]["sha256"])
        file = trial_folder(tmp_path, job) / MIX_FILE
        again = mix(load_config(MixConfig, file, flags={"output": str(tmp_path / "again" / job.key)})).manifest
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
    assert read_records(tmp_path) == ([], [])
