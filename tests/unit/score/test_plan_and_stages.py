"""What a run takes on, and how completions become scored rows; no Ray."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial

import pytest

from birbal_ray.ni.schema import TaskError
from birbal_ray.score import plan as planning
from birbal_ray.score import stages
from birbal_ray.score.config import CompletionSettings, ScoreConfig
from birbal_ray.settings import load_config
from tests.unit.ni.test_reader import archive


def config(folder, **flags):
    values = {"tasks.path": str(folder), "engine.backend": "simulated", **flags}
    return load_config(ScoreConfig, None, [], values)


def make(folder, **flags):
    settings = config(folder, **flags)
    return planning.make_plan(settings, partial(stages.load_tokenizer, settings), count_tokens=True)


def test_shards_cover_every_instance_once_and_tasks_stay_adjacent(write_task):
    folder = write_task("task_a", 10)
    write_task("task_b", 3)
    shards = make(folder).shards(4)
    assert [(s.task, s.chunk, s.num_chunks, s.num_rows) for s in shards] == [
        ("task_a", 0, 3, 4),
        ("task_a", 1, 3, 4),
        ("task_a", 2, 3, 2),
        ("task_b", 0, 1, 3),
    ]
    assert len({s.file_name for s in shards}) == 4


def test_prepare_rows_of_all_shards_are_the_first_k_in_hash_order(write_task):
    folder = write_task("task_a", 30)
    settings = config(folder, **{"tasks.instances_per_task": 9, "shard_rows": 4})
    plan = planning.make_plan(settings, partial(stages.load_tokenizer, settings))
    prepare = stages.BuildPrompts(settings)
    ids = []
    for shard in plan.shards(4):
        row = prepare(asdict(shard))
        ids += stages._from_bytes(row["prepared"])["row_id"].to_pylist()
    assert len(ids) == len(set(ids)) == 9
    fewer = config(folder, **{"tasks.instances_per_task": 5, "shard_rows": 100})
    (shard,) = planning.make_plan(fewer, partial(stages.load_tokenizer, fewer)).shards(100)
    row = stages.BuildPrompts(fewer)(asdict(shard))
    assert stages._from_bytes(row["prepared"])["row_id"].to_pylist() == ids[:5]


def test_unusable_files_are_quarantined_and_strict_stops(write_task):
    folder = write_task("good")
    (folder / "bad.json").write_text("{")
    (folder / "empty.json").write_text("")
    plan = make(folder)
    assert [task.name for task in plan.tasks] == ["good"]
    assert {file for file, _ in plan.quarantined} == {"bad.json", "empty.json"}
    with pytest.raises(TaskError, match=r"bad\.json: not valid JSON"):
        make(folder, **{"tasks.strict": True})


def test_strict_wants_all_shots(write_task):
    folder = write_task("good")  # two positive examples
    assert make(folder).tasks[0].num_shots == 2
    with pytest.raises(TaskError, match="'Positive Examples' has 2 entries, num_shots is 4"):
        make(folder, **{"tasks.strict": True})


def test_nothing_usable_is_an_error(write_task, tmp_path):
    folder = write_task("task_a", Categories=["Translation"])
    with pytest.raises(TaskError, match=r"no usable task \(category Translation\)"):
        make(folder)
    with pytest.raises(TaskError, match="none of its 1 tasks is chosen"):
        make(folder, **{"tasks.exclude": ["task_a"]})
    with pytest.raises(TaskError, match="no task 'task_b'"):
        make(folder, **{"tasks.exclude": ["task_b"]})


def test_archive_is_unpacked_before_workers_read_it(write_task, tmp_path):
    folder = write_task("task_a", 5)
    data = (folder / "task_a.json").read_bytes()
    plan = make(archive(tmp_path / "ni.tar.gz", {"ni/tasks/task_a.json": data}))
    assert plan.tasks[0].member == "ni/tasks/task_a.json"
    plan = planning.unpack_archives(plan, tmp_path / "inputs")
    assert (tmp_path / "inputs" / "task_a.json").read_bytes() == data
    assert plan.shards(10)[0].path == str(tmp_path / "inputs" / "task_a.json")


def test_a_task_file_that_changes_during_the_run_stops_it(write_task):
    folder = write_task("task_a", 5)
    settings = config(folder)
    (shard,) = planning.make_plan(settings, partial(stages.load_tokenizer, settings)).shards(10)
    write_task("task_a", 6)
    with pytest.raises(TaskError, match="changed while the run was going on"):
        stages.BuildPrompts(settings)(asdict(shard))


def test_too_long_prompts_and_bad_instances_are_error_rows_before_the_engine(write_task):
    entries = [
        {"id": "ok", "input": "short", "output": ["x"]},
        {"id": "long", "input": "word " * 400_000, "output": ["x"]},  # 2 MB
        {"id": "empty", "input": "nothing to compare with", "output": []},
    ]
    folder = write_task("task_a", Instances=entries)
    settings = config(folder)
    (shard,) = planning.make_plan(settings, partial(stages.load_tokenizer, settings)).shards(10)
    row = stages.BuildPrompts(settings)(asdict(shard))
    rows = {row["instance_id"]: row for row in stages._from_bytes(row["prepared"]).to_pylist()}
    assert rows["ok"]["error"] is None
    assert rows["ok"]["token_ids"]
    assert rows["long"]["error"].startswith("prompt too long: 400")
    assert "engine.max_model_len 2048 leaves" in rows["long"]["error"]
    assert rows["empty"]["error"].startswith("no reference")
    assert rows["long"]["token_ids"] == rows["empty"]["token_ids"] == []


def test_completion_tokens():
    settings = CompletionSettings(max_completion_tokens=50, headroom_fraction=0.5, headroom_tokens=8)
    assert planning.completion_tokens("exact_match", [1, 2, 7], settings) == 15
    assert planning.completion_tokens("generation", [10] * 99 + [1000], settings) == 23  # p99, not the longest
    assert planning.completion_tokens("generation", [100], settings) == 50
    assert planning.completion_tokens("exact_match", [], settings) == 8


def completed(row_id, prediction, answer, error=None):
    return {
        "orig_input": "in",
        "few_shot_prompt": "p",
        "answer": answer,
        "row_id": row_id,
        "instance_id": row_id,
        "error": error,
        "num_prompt_tokens": 5,
        "prediction": prediction,
        "num_cached_tokens": None,
        "num_completion_tokens": 1,
        "finish_reason": "stop",
    }


def test_scored_rows():
    rows = [completed("a", "yes\n\nmore", ["no", "yes"]), completed("b", "", ["no"], "prompt too long: …")]
    first, second = stages.scored_table("t", "exact_match", rows).to_pylist()
    assert (first["extracted"], first["score"], first["metric"]) == ("yes", 1.0, "exact_match")
    assert (second["score"], second["error"]) == (None, "prompt too long: …")
    (row,) = stages.scored_table("t", "generation", [completed("a", "the red car", ["a red car"])]).to_pylist()
    assert (row["metric"], round(row["score"], 4)) == ("rouge_l", 0.6667)
    json.dumps(row)
