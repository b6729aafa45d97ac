"""Policies against which every claim is made, and what is said of tasks that get less than their share."""

import pyarrow.parquet as pq
import pytest

from birbal_ray.mix.config import MixConfig
from birbal_ray.mix.files import explain
from birbal_ray.mix.run import mix
from birbal_ray.settings import ConfigError
from tests.fixtures.score_folder import made_up_rows, made_up_task, write_score_folder

BUDGETS = {"exact_match_budget": 90, "generation_budget": 70}


def rows_of_sizes(*sizes):
    return [row for number, size in enumerate(sizes) for row in made_up_task(number, len(sizes), size, seed=4)]


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    return write_score_folder(tmp_path_factory.mktemp("scores") / "s", rows_of_sizes(40, 80, 160, 320))


def table(folder, name="tasks.parquet"):
    return pq.read_table(folder / name).to_pylist()


def make(scores, folder, **changes):
    return mix(MixConfig(**{"scores": str(scores), "output": str(folder), "task_score": BUDGETS, **changes}))


def test_uniform_takes_as_many_of_every_task(scores, tmp_path):
    made = make(scores, tmp_path / "m", policy="uniform")
    tasks = table(tmp_path / "m")
    small = min(task["num_usable"] for task in tasks)
    assert made.manifest["rows"]["kept"] == 160 == sum(task["num_kept"] for task in tasks)
    assert small < 40  # the smallest task is used up, the others share the rest evenly
    assert sorted(task["num_kept"] for task in tasks) == sorted([small, *split(160 - small, 3)])
    assert {row["selected_by"] for row in table(tmp_path / "m", "train.parquet")} == {"uniform:all"}


def split(total, parts):
    return [total // parts + (number < total % parts) for number in range(parts)]


def test_proportional_follows_the_size_of_tasks(scores, tmp_path):
    make(scores, tmp_path / "m", policy="proportional")
    tasks = table(tmp_path / "m")
    usable = sum(task["num_usable"] for task in tasks)
    assert sum(task["num_kept"] for task in tasks) == 160
    assert all(abs(task["num_kept"] - 160 * task["num_usable"] / usable) < 1 for task in tasks)


@pytest.mark.parametrize("policy", ["uniform", "proportional"])
def test_random_policies_look_at_no_score(policy, scores, tmp_path):
    make(scores, tmp_path / "a", policy=policy)
    better = [{**row, "prediction": row["answer"][0]} for row in rows_of_sizes(40, 80, 160, 320)]
    make(write_score_folder(tmp_path / "s", better), tmp_path / "b", policy=policy)
    ids = [[row["row_id"] for row in table(tmp_path / name, "train.parquet")] for name in "ab"]
    assert ids[0] == ids[1]
    kept = next(row for row in table(tmp_path / "a", "audit.parquet") if row["kept"])
    assert f"({policy}), in hash order" in explain(tmp_path / "a", kept["row_id"])["why"]


@pytest.mark.parametrize("failed_first", [True, False])
def test_a_kept_row_says_what_came_first_and_how_the_model_did(failed_first, scores, tmp_path):
    make(scores, tmp_path / "m", task_score={**BUDGETS, "failed_first": failed_first})
    order = "failed rows first" if failed_first else "in hash order"
    seen = set()
    for row in table(tmp_path / "m", "audit.parquet"):
        if row["kept"] and row["bucket"] not in seen:
            seen.add(row["bucket"])
            answered = "the model failed this one" if row["bucket"] == "failed" else "the model did not fail this one"
            assert explain(tmp_path / "m", row["row_id"])["why"].endswith(f"usable rows, {order}; {answered}")
    assert seen == {"failed", "rest"}


def test_a_budget_of_both_labels_that_can_t_be_met(scores, tmp_path):
    budgets = {"exact_match_budget": 9000, "generation_budget": 1000}
    with pytest.raises(ConfigError, match=r"generation_budget = 10000: only \d+ scored candidates .*allow_shortfall"):
        make(scores, tmp_path / "m", policy="uniform", task_score=budgets)
    allowed = make(scores, tmp_path / "m", policy="uniform", task_score={**budgets, "allow_shortfall": True})
    assert allowed.manifest["allocation"]["any label"]["shortfall"] == 10000 - allowed.manifest["rows"]["kept"]


def test_no_error_driven_share_where_no_answer_can_score_1(tmp_path):
    rows = made_up_rows(4, 80, seed=1)
    names = sorted({row["task"] for row in rows})
    unfit = {"unreachable_fraction": 0.5, "unreachable_reason": "a blank line in the references"}
    columns = {names[0]: unfit, names[1]: unfit | {"unreachable_fraction": 0.05}}
    folder = write_score_folder(tmp_path / "s", rows, columns=columns)
    made = make(folder, tmp_path / "m", task_score={"exact_match_budget": 20, "generation_budget": 20})
    tasks = {task["task"]: task for task in table(tmp_path / "m")}
    note = "no error-driven share: a blank line in the references (in 50% of its instances)"
    assert (tasks[names[0]]["num_kept"], tasks[names[0]]["note"]) == (0, note)
    assert tasks[names[1]]["num_kept"] > 0 and tasks[names[1]]["note"] is None
    assert made.manifest["notes"] == {names[0]: note}
    assert f"- {names[0]}: {note}" in (tmp_path / "m" / "README.md").read_text()
    dropped = next(
        row
        for row in table(tmp_path / "m", "audit.parquet")
        if (row["task"], row["reason"]) == (names[0], "over_allocation")
    )
    assert note in explain(tmp_path / "m", dropped["row_id"])["why"]
    make(folder, tmp_path / "u", policy="uniform")
    assert {task["task"]: task["num_kept"] for task in table(tmp_path / "u")}[names[0]] > 0
    budgets = {"exact_match_budget": 20, "generation_budget": 20, "even_fraction": 0.5}
    make(folder, tmp_path / "e", task_score=budgets)
    (even,) = (task for task in table(tmp_path / "e") if task["task"] == names[0])
    assert (even["num_kept"], even["note"]) == (5, note), "a quarter of the label's budget: its part of the even half"


def test_a_share_that_stopped_scoring_left_unfilled_is_said(tmp_path):
    rows = rows_of_sizes(20, 200, 200, 200)
    names = sorted({row["task"] for row in rows})
    columns = {name: {"stop_reason": "its interval is narrow enough"} for name in names[:2]}
    folder = write_score_folder(tmp_path / "s", rows, columns=columns)
    made = make(folder, tmp_path / "m", task_score={"exact_match_budget": 100, "generation_budget": 50})
    assert made.manifest["rows"]["kept"] == 150, "other tasks fill the budget"
    assert list(made.manifest["notes"]) == [names[0]]
    assert "can be drawn: scoring stopped (its interval is narrow enough)" in made.manifest["notes"][names[0]]
