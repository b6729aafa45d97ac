"""What a run takes on, and how completions become scored rows; no Ray."""

from __future__ import annotations

import json
import os
import pickle
import threading
from dataclasses import replace

import pyarrow as pa
import pytest

from birbal_ray.ni.schema import TaskError
from birbal_ray.score import loop, stages
from birbal_ray.score import plan as planning
from birbal_ray.score.config import CompletionSettings, ScoreConfig
from birbal_ray.score.engine import Sampling
from birbal_ray.score.plan import completion_tokens, plan_run, publish_inputs
from birbal_ray.score.shards import ZERO_SHOT, RowFiles, Shard
from birbal_ray.score.tokens import SimulatedTokenizer
from birbal_ray.settings import load_config
from birbal_ray.storage import open_folder
from tests.unit.ni.test_reader import archive


def config(folder, **flags):
    values = {"tasks.path": str(folder), "engine.backend": "simulated", **flags}
    return load_config(ScoreConfig, None, [], values)


def make(folder, **flags):
    return plan_run(config(folder, **flags), count_tokens=True)


def built(settings, folder, shard):
    """A shard's rows with their prompts."""
    row = stages.BuildPrompts(settings, open_folder(folder))({"shard": pickle.dumps(shard)})
    return pickle.loads(row["rows"]).rows


def test_shards_cover_every_instance_once_and_tasks_stay_adjacent(write_task):
    folder = write_task("task_a", 10)
    write_task("task_b", 3)
    shards = make(folder).shards(4)
    assert [(s.task, s.first, s.last) for s in shards] == [
        ("task_a", 0, 4),
        ("task_a", 4, 8),
        ("task_a", 8, 10),
        ("task_b", 0, 3),
    ]
    assert [s.name for s in shards][2:] == ["task_a/000008-000010.parquet", "task_b/000000-000003.parquet"]


def test_a_part_of_each_task_may_be_held_out(write_task):
    folder = write_task("task_a", 56)
    write_task("task_b", 3)
    for changes, expected in (
        ({}, [56, 3]),
        ({"tasks.held_out_fraction": 0.1}, [50, 2]),  # the last in hash order; of a few instances one
        ({"tasks.held_out_fraction": 0.5}, [28, 1]),
        ({"tasks.held_out_fraction": 0.9}, [5, 1]),
        ({"tasks.held_out_fraction": 0.5, "tasks.instances_per_task": 20}, [20, 1]),
    ):
        assert [task.num_instances for task in make(folder, **changes).tasks] == expected
        counted = [task.num_prompts + task.num_too_long for task in make(folder, **changes).tasks]
        assert counted == expected


def test_only_gaps_between_files_are_planned_whatever_their_size(write_task):
    folder = write_task("task_a", 20)
    found = RowFiles(["task_a/000003-000007.parquet", "task_a/000012-000014.parquet", "task_a/notes.txt", "x.parquet"])
    assert [(s.first, s.last) for s in make(folder).shards(5, found)] == [(0, 3), (7, 10), (10, 12), (14, 15), (15, 20)]
    assert found.num_rows("task_a") == 6 and found.total_rows == 6
    assert not make(folder).shards(5, RowFiles(s.name for s in make(folder).shards(3)))


def test_rows_that_two_files_hold_are_said():
    found = RowFiles(["t/000000-000004.parquet", "t/000002-000006.parquet", "t/000004-000008.parquet"])
    assert found.overlapping == ["t/000002-000006.parquet"]
    assert found.num_rows("t") == 8


def test_a_task_may_have_more_than_a_million_rows():
    names = [Shard("t", "", "", "generation", n, n + 50_000, 8).name for n in range(0, 1_200_000, 50_000)]
    found = RowFiles(names)
    assert found.overlapping == [] and found.names("t") == names and found.gaps("t", 1_200_000) == []


def test_prompt_rows_of_all_shards_are_the_first_k_in_hash_order(write_task):
    folder = write_task("task_a", 30)
    settings = config(folder, **{"tasks.instances_per_task": 9})
    ids = [row["row_id"] for shard in plan_run(settings).shards(4) for row in built(settings, folder, shard)]
    assert len(ids) == len(set(ids)) == 9
    fewer = config(folder, **{"tasks.instances_per_task": 5})
    (shard,) = plan_run(fewer).shards(100)
    assert [row["row_id"] for row in built(fewer, folder, shard)] == ids[:5]


def test_more_instances_leave_the_limit_of_completions_as_it_is(write_task):
    entries = [{"id": str(n), "input": f"word {n}", "output": ["x " * (n + 1)]} for n in range(40)]
    folder = write_task("task_a", Instances=entries)
    one, many = (plan_run(config(folder, **{"tasks.instances_per_task": n})).tasks[0] for n in (1, 40))
    assert one.identity == many.identity


def test_a_plan_is_cached_by_a_files_size_and_time(write_task, monkeypatch, tmp_path):
    monkeypatch.setenv("BIRBAL_CACHE", str(tmp_path / "cache"))
    folder = write_task("task_a", 5)
    (folder / "broken.json").write_text("{")
    first = plan_run(config(folder))
    monkeypatch.setattr("birbal_ray.ni.reader.parse_task", None)  # not called again
    assert plan_run(config(folder)) == first
    assert plan_run(config(folder, **{"tasks.instances_per_task": 2})).tasks[0].num_instances == 2
    monkeypatch.undo()
    monkeypatch.setenv("BIRBAL_CACHE", str(tmp_path / "cache"))
    write_task("task_a", 7)
    assert plan_run(config(folder)).tasks[0].num_instances == 7
    assert plan_run(config(folder, seed=1)).tasks[0].num_instances == 7
    file = folder / "task_a.json"
    stat, text = file.stat(), file.read_text(encoding="utf-8")
    file.write_text(text.replace("warm", "cold"), encoding="utf-8")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file.stat().st_size == stat.st_size
    assert plan_run(config(folder)).tasks[0].definition == "Say whether the colour is cold."


def test_a_plan_without_some_instances_is_not_cached(write_task, monkeypatch, tmp_path):
    """Every mix leaves out other instances, and would leave a file behind."""
    monkeypatch.setenv("BIRBAL_CACHE", str(tmp_path / "cache"))
    folder = write_task("task_a", 5)
    row_ids = [
        one.row_id for one in next(planning.reader.read_tasks(planning.reader.find_task_files(folder)))[1].instances
    ]
    for taken in (row_ids[:2], row_ids[:3]):
        assert plan_run(config(folder), excluded=frozenset(taken)).tasks[0].num_excluded == len(taken)
    assert not (tmp_path / "cache").exists()
    assert plan_run(config(folder)).tasks[0].num_excluded == 0
    assert len(list((tmp_path / "cache" / "plans").iterdir())) == 1


def test_a_plan_is_cached_for_one_tokenizer(write_task, monkeypatch, tmp_path):
    """A folder of the same name may hold another model; its tokenizer decides how long completions may get."""

    class Tokenizer(SimulatedTokenizer):
        name_or_path = str(tmp_path / "model")

    read, parse = [], planning.reader.parse_task
    monkeypatch.setenv("BIRBAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(planning, "load_tokenizer", lambda config: Tokenizer())
    monkeypatch.setattr(planning.reader, "parse_task", lambda name, data: read.append(name) or parse(name, data))
    folder = write_task("task_a", 5)
    (tmp_path / "model").mkdir()
    for content in ("one", "another"):
        (tmp_path / "model" / "tokenizer.json").write_text(content)
        for _ in range(2):
            plan_run(config(folder))
    assert read == ["task_a", "task_a"]


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
    write_task("good", **{"Positive Examples": [{"input": f"in {n}", "output": "x"} for n in range(4)]})
    write_task("translates", Categories=["Translation"])
    assert make(folder, **{"tasks.strict": True}).excluded == (("translates", "category Translation"),)


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
    run = open_folder(tmp_path / "run")
    plan = publish_inputs(plan, run, everything=False)
    (shard,) = plan.shards(10)
    assert run.read_bytes(shard.path) == data
    assert len(built(config(folder), run, shard)) == 5


def test_a_task_file_that_changes_during_the_run_stops_it(write_task):
    folder = write_task("task_a", 5)
    settings = config(folder)
    (shard,) = plan_run(settings).shards(10)
    write_task("task_a", 6)
    with pytest.raises(TaskError, match="changed while the run was going on"):
        built(settings, folder, shard)


def test_too_long_prompts_and_bad_instances_are_error_rows_before_the_engine(write_task):
    entries = [
        {"id": "ok", "input": "short", "output": ["x"]},
        {"id": "long", "input": "word " * 400_000, "output": ["x"]},  # 2 MB
        {"id": "empty", "input": "nothing to compare with", "output": []},
    ]
    folder = write_task("task_a", Instances=entries)
    settings = config(folder)
    (shard,) = plan_run(settings).shards(10)
    rows = {row["instance_id"]: row for row in built(settings, folder, shard)}
    assert rows["ok"]["error"] is None
    assert rows["ok"]["token_ids"]
    assert rows["long"]["error"].startswith("prompt too long: 400")
    assert "engine.max_model_len 2048 leaves" in rows["long"]["error"]
    assert rows["empty"]["error"].startswith("no reference")
    assert rows["long"]["token_ids"] == rows["empty"]["token_ids"] == []


def test_completion_tokens():
    settings = CompletionSettings(max_completion_tokens=50, headroom_fraction=0.5, headroom_tokens=8)
    assert completion_tokens("exact_match", [1, 2, 7], settings) == 15
    assert completion_tokens("generation", [10] * 99 + [1000], settings) == 23  # p99, not the longest
    assert completion_tokens("generation", [100], settings) == 50
    assert completion_tokens("exact_match", [], settings) == 8


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
    first, second = stages.score_table("t", "exact_match", rows).to_pylist()
    assert (first["extracted"], first["score"], first["metric"]) == ("yes", 1.0, "exact_match")
    assert (second["score"], second["error"]) == (None, "prompt too long: …")
    (row,) = stages.score_table("t", "generation", [completed("a", "the red car", ["a red car"])]).to_pylist()
    assert (row["metric"], round(row["score"], 4)) == ("rouge_l", 0.6667)
    json.dumps(row)


def test_rows_that_are_tried_again_change_nothing_else():
    old = pa.table({"row_id": ["a", "b", "c"], "score": [0.5, None, None]})
    new = pa.table({"row_id": ["c"], "score": [1.0]})
    assert stages.replace_rows(old, (2,), new).to_pylist() == [*old.slice(0, 2).to_pylist(), *new.to_pylist()]


def test_chat_prompts_hold_the_examples_as_turns_and_stop_at_the_end_of_turn(write_task):
    folder = write_task("t", 3)
    settings = config(folder, **{"prompt.format": "chat", "prompt.num_shots": 1})
    (shard,) = plan_run(settings).shards(10)
    build = stages.BuildPrompts(settings, open_folder(folder))
    made = pickle.loads(build({"shard": pickle.dumps(shard)})["rows"])
    (first, *_) = made.rows
    shared = "<system>\nSay whether the colour is warm.\n<end>\n<user>\nred\n<end>\n<assistant>\nyes\n<end>\n<user>\n"
    assert first["few_shot_prompt"] == f"{shared}{first['orig_input']}\n<end>\n<assistant>\n"
    assert first["token_ids"] == SimulatedTokenizer()([first["few_shot_prompt"]])["input_ids"][0]
    assert made.prefix_token_ids == SimulatedTokenizer()([shared])["input_ids"][0]
    (end,) = SimulatedTokenizer()(["<end>"])["input_ids"]
    assert made.sampling == Sampling(stop=(), stop_token_ids=tuple(end))
    zero_shot = replace(shard, variant=replace(shard.variant, prompt_format=ZERO_SHOT))
    (first, *_) = pickle.loads(build({"shard": pickle.dumps(zero_shot)})["rows"]).rows
    assert first["few_shot_prompt"] == (
        f"<system>\nSay whether the colour is warm.\n<end>\n<user>\n{first['orig_input']}\n<end>\n<assistant>\n"
    )


def test_the_plan_counts_the_tokens_of_chat_prompts(write_task):
    folder = write_task("t", 6)
    for prompt_format in ("birbal", "chat"):
        settings = config(folder, **{"prompt.format": prompt_format})
        (task,) = plan_run(settings, count_tokens=True).tasks
        (shard,) = plan_run(settings).shards(10)
        assert task.num_shared_tokens * 6 + task.num_own_tokens == sum(
            row["num_prompt_tokens"] for row in built(settings, folder, shard)
        )


def test_a_blank_line_ends_an_answer_only_in_the_published_format(write_task):
    instances = [{"id": n, "input": f"in {n}", "output": ["one long part of it\n\nand another"]} for n in range(3)]
    folder = write_task("t", Instances=instances)
    (published,) = make(folder).tasks
    (chat,) = make(folder, **{"prompt.format": "chat"}).tasks
    assert (published.unreachable_fraction, chat.unreachable_fraction) == (1.0, 0.0)
    assert "a blank line in the references" in published.unreachable_reason
    rows = [completed("a", instances[0]["output"][0], instances[0]["output"])]
    for prompt_format, score in (("birbal", 0.83), ("chat", 1.0)):
        (row,) = stages.score_table("t", "generation", rows, prompt_format).to_pylist()
        assert round(row["score"], 2) == score


def test_references_that_no_completion_can_be_as_long_as_are_said(write_task):
    folder = write_task("t", Instances=[{"id": n, "input": f"in {n}", "output": ["word " * 500]} for n in range(3)])
    (task,) = make(folder).tasks
    assert task.unreachable_fraction == 1.0
    assert task.unreachable_reason == "the references have more tokens than a completion may have"


def test_a_shard_that_must_be_alone_waits_for_the_others():
    turns, inside, beside = loop.Turns(3), [], []
    together, leave = threading.Barrier(4, timeout=30), threading.Event()

    def run(name, alone):
        with turns.take(alone=alone):
            inside.append(name)
            if alone:
                beside.append(list(inside))
            else:
                together.wait()
                leave.wait(30)
            inside.remove(name)

    threads = [threading.Thread(target=run, args=(f"first {n}", False)) for n in range(3)]
    threads += [threading.Thread(target=run, args=(f"alone {n}", True)) for n in range(2)]
    for thread in threads[:3]:
        thread.start()
    together.wait()  # the three are in at once
    for thread in threads[3:]:
        thread.start()
    assert sorted(inside) == ["first 0", "first 1", "first 2"]
    leave.set()
    for thread in threads:
        thread.join(30)
    assert sorted(beside) == [["alone 0"], ["alone 1"]] and inside == []
