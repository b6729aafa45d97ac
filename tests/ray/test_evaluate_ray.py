"""Evaluation on Ray with the simulated engine: what is asked, of whom, and that a killed run goes on."""

import json
import re
import time

import pyarrow.parquet as pq
import pytest

from birbal_ray.evaluate.heldout import held_out
from tests.conftest import task_values
from tests.fixtures.tensors import write_tensors

SIMULATED = ["--set", "engine.backend=simulated", "--device", "cpu"]
NUM_INSTANCES, NUM_SCORED, NUM_ASKED = 60, 20, 30


@pytest.fixture(scope="module")
def finish(here):
    def run(*arguments, code=0):
        found, out, err = here(*arguments)
        assert found == code, err
        return out, err

    return run


@pytest.fixture(scope="module")
def setting(finish, tmp_path_factory):
    """Three tasks, a mix made from the scores of two of them, an adapter folder."""
    root = tmp_path_factory.mktemp("evaluate")
    (root / "tasks").mkdir()
    for number in range(3):
        instances = [
            {"id": str(n), "input": f"shade {n} of task {number}", "output": ["yes" if n % 2 else "no"]}
            for n in range(NUM_INSTANCES)
        ]
        values = task_values(Definition=[f"Definition {number}."], Instances=instances)
        (root / "tasks" / f"task{number}.json").write_text(json.dumps(values))
    scores = root / "scores"
    exclude = ["--set", "tasks.exclude=[task2]", "--instances-per-task", NUM_SCORED]
    finish("score", "--tasks", root / "tasks", "--output", scores, *exclude, *SIMULATED)
    budgets = ["--set", "task_score.exact_match_budget=20", "--set", "task_score.allow_shortfall=true"]
    finish("mix", "--scores", scores, "--output", root / "mix", *budgets, "--set", "task_score.generation_budget=0")
    (root / "adapter").mkdir()
    (root / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    write_tensors(root / "adapter" / "adapter_model.safetensors", {"a.lora_A.weight": [1, 1]})
    return root


def arguments(root, output, *more):
    folders = ["--tasks", root / "tasks", "--mix", root / "mix", "--adapter", f"mine={root / 'adapter'}"]
    counts = ["--instances-per-task", NUM_ASKED, "--set", "shard_rows=5"]
    return ["evaluate", *folders, "--output", output, *counts, *SIMULATED, *more]


def rows_of(run):
    """{model}/{prompt format}/{task}/{file} → rows, without what the cache happened to hold when they were asked."""
    return {
        re.sub("-(simulated|[0-9a-f]{12})/", "/", file.relative_to(run / "rows").as_posix(), count=1): pq.read_table(
            file
        )
        .drop_columns("num_cached_tokens")
        .to_pylist()
        for file in sorted((run / "rows").rglob("[!.]*.parquet"))
    }


@pytest.fixture(scope="module")
def evaluated(finish, setting):
    out, err = finish(*arguments(setting, setting / "run", "--format", "json"))
    return setting / "run", json.loads(out), err


def test_nothing_the_mix_had_is_asked(evaluated, setting):
    run, comparisons, err = evaluated
    rows = rows_of(run)
    found = held_out(setting / "mix")
    assert found.sampled == {"task0", "task1"}
    for model in ("base", "mine"):
        for prompt_format in ("zero_shot", "few_shot"):
            asked = [row for name, part in rows.items() if name.startswith(f"{model}/{prompt_format}/") for row in part]
            assert len(asked) == len({row["row_id"] for row in asked}) == 3 * NUM_ASKED
            assert not {row["row_id"] for row in asked} & found.keys
            for row in asked:
                zero_shot = row["few_shot_prompt"].startswith("### Instruction:\n")
                assert zero_shot == (prompt_format == "zero_shot")
                assert row["few_shot_prompt"].endswith(f"### Input:\n{row['orig_input']}\n\n### Response:\n")
    assert f"{2 * NUM_SCORED} of {setting / 'mix'}" in err
    assert "1 of 3 tasks were never sampled" in err
    assert {row["scope"] for row in comparisons} == {"all", "exact_match", "held-out instances", "held-out tasks"}


def test_tables_are_the_rows_means(evaluated):
    run, comparisons, _ = evaluated
    rows = rows_of(run)
    table = pq.read_table(run / "evaluation.parquet").to_pylist()
    assert len(table) == 2 * 2 * 3
    means = {}
    for line in table:
        prefix = f"{line['model']}/{line['prompt_format']}/{line['task']}/"
        scores = [row["score"] for name, part in rows.items() if name.startswith(prefix) for row in part]
        assert line["num_scored"] == len(scores) == NUM_ASKED
        assert line["task_score"] == pytest.approx(sum(scores) / len(scores))
        assert line["held_out"] == ("task" if line["task"] == "task2" else "instances")
        means.setdefault((line["model"], line["prompt_format"]), []).append(line["task_score"])
    for line in comparisons:
        if line["scope"] == "all":
            base, mine = (means[name, line["prompt_format"]] for name in ("base", "mine"))
            assert line["base_score"] == pytest.approx(sum(base) / 3)
            assert line["difference"] == pytest.approx(sum(mine) / 3 - sum(base) / 3)
    assert means["base", "zero_shot"] != means["mine", "zero_shot"], "the adapter's name reaches the engine"
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["rows"] == {"planned": 360, "scored": 360, "errors": 0, "left_out": 2 * NUM_SCORED}
    assert [one["name"] for one in manifest["models"]] == ["base", "mine"]


def test_killed_and_called_again_it_has_the_same_rows(birbal, finish, evaluated, setting, tmp_path):
    slow = ["--set", "resources.simulated_row_seconds=0.02"]
    process = birbal(*arguments(setting, tmp_path / "run", *slow))
    end = time.monotonic() + 120
    while not len(rows_of(tmp_path / "run")) >= 10:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)
    process.kill()
    process.communicate()
    _, err = finish(*arguments(setting, tmp_path / "run", *slow))
    assert "rows are done and skipped" in err
    assert rows_of(tmp_path / "run") == rows_of(evaluated[0])
    assert pq.read_table(tmp_path / "run" / "comparisons.parquet").equals(
        pq.read_table(evaluated[0] / "comparisons.parquet")
    )


def test_another_adapter_is_another_run(finish, evaluated, setting):
    write_tensors(setting / "adapter" / "adapter_model.safetensors", {"a.lora_A.weight": [1, 1]}, value=1)
    _, err = finish(*arguments(setting, evaluated[0]), code=2)
    assert "models.mine/zero_shot: " in err
    assert "--overwrite" in err
