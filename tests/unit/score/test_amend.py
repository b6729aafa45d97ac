"""A score run grows, shrinks and changes: what is there and still asked for stays byte for byte."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest

from birbal_ray.manifest import read_manifest
from birbal_ray.schemas import SCORE_ROWS
from birbal_ray.score import plan as planning
from birbal_ray.score import results, run, shards, stages
from birbal_ray.score.config import ScoreConfig
from birbal_ray.score.run import score
from birbal_ray.score.shards import RowFiles
from birbal_ray.settings import ConfigError, load_config
from birbal_ray.storage import Folder, RunError
from tests.conftest import task_values
from tests.fixtures.inline_scoring import Interrupted, inline_scoring

__all__ = ["inline_scoring"]


@pytest.fixture
def scored(write_task, tmp_path, inline_scoring, monkeypatch):
    """scored(setting=value, …) runs `birbal score` on the tasks written so far; its result."""
    monkeypatch.setenv("BIRBAL_CACHE", str(tmp_path / "cache"))
    write_task("task_a", 20)
    write_task("task_b", 12, Definition=["Another one."])

    def call(retry_errors=False, rescore_all=False, overwrite=False, **settings):
        values = {
            "tasks.path": str(tmp_path / "tasks"),
            "output": str(tmp_path / "run"),
            "engine.backend": "simulated",
            "engine.device": "cpu",
            "shard_rows": 5,
            **{key.replace("__", "."): value for key, value in settings.items()},
        }
        config = load_config(ScoreConfig, None, [], values)
        return score(config, retry_errors=retry_errors, rescore_all=rescore_all, overwrite=overwrite)

    return call


def files(tmp_path, under="rows"):
    folder = tmp_path / "run" / under
    return {
        file.relative_to(folder).as_posix(): (file.read_bytes(), file.stat().st_mtime_ns, file.stat().st_ino)
        for file in sorted(folder.rglob("*.parquet"))
    }


def rows(tmp_path):
    tables = [pq.read_table(file, partitioning=None) for file in sorted((tmp_path / "run" / "rows").rglob("*.parquet"))]
    found = [row for table in tables for row in table.to_pylist()]
    assert len({row["row_id"] for row in found}) == len(found)
    return {row["row_id"]: row for row in found}


def texts(some):
    """Rows without what depends on which prompt of a task came first in a session."""
    return {key: {**row, "num_cached_tokens": None} for key, row in some.items()}


def test_a_grown_run_keeps_the_hashes_of_the_files_it_had(scored, tmp_path, write_task, monkeypatch):
    before = scored().manifest["files"]
    write_task("task_c", 3)
    hashed = []
    monkeypatch.setattr(results.Folder, "record_of", lambda folder, name: hashed.append(name))
    after = scored().manifest["files"]
    assert hashed == [] and {name: after[name] for name in before if name.startswith("rows/")}.items() <= before.items()


def test_a_run_says_what_it_holds_and_then_that_it_is_up_to_date(scored, tmp_path, capsys):
    result = scored()
    assert result.manifest["rows"] == {"available": 32, "planned": 32, "scored": 32, "errors": {}}
    listed = result.manifest["files"]
    assert {name for name in listed if name.startswith("rows/")} == {f"rows/{name}" for name in files(tmp_path)}
    assert {"tasks.parquet", "task_scores.parquet", "quarantine.jsonl"} <= listed.keys()
    before = files(tmp_path)
    again = scored()
    assert "is up to date: 32 rows of 2 tasks; nothing to do" in capsys.readouterr().err
    assert (again.manifest, again.task_scores, files(tmp_path)) == (result.manifest, result.task_scores, before)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({"tasks__instances_per_task": 8}, {}),
        ({"tasks__instances_per_task": 8, "shard_rows": 3}, {"tasks__instances_per_task": 11}),
        ({"tasks__exclude": ["task_b"]}, {}),
        ({}, {"engine__max_model_len": 4096, "shard_rows": 7}),
        ({}, {"resources__shards_in_flight": 1, "resources__max_num_seqs": 3}),
    ],
)
def test_what_is_there_stays_when_more_is_asked_for(scored, tmp_path, first, then):
    scored(**first)
    before = files(tmp_path)
    scored(**then)
    after, kept_rows = files(tmp_path), rows(tmp_path)
    assert before.items() <= after.items()
    assert not (tmp_path / "run" / "set_aside").exists()
    scored(overwrite=True, **then)
    assert texts(rows(tmp_path)) == texts(kept_rows), "the same rows as in one go"
    assert read_manifest(tmp_path / "run", "score")["rows"]["planned"] == len(kept_rows)


def test_overwriting_deletes_no_model(scored, tmp_path):
    """`inputs/` in the folder is the step's own."""
    scored()
    weights = tmp_path / "run" / "inputs" / "model" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_text("")
    with pytest.raises(ConfigError, match=r"this folder holds an input \(.*inputs/model"):
        scored(overwrite=True, model__name=str(weights.parent))
    assert weights.exists()


def test_an_interrupted_run_continues_with_what_is_missing(scored, tmp_path, inline_scoring, capsys):
    inline_scoring(stop_after=3)
    with pytest.raises(Interrupted):
        scored()
    before = files(tmp_path)
    assert len(before) == 3
    inline_scoring()
    scored(shard_rows=4)
    assert before.items() <= files(tmp_path).items()
    assert "continuing: 3 of " in capsys.readouterr().err
    assert len(rows(tmp_path)) == 32


def test_a_dropped_task_is_set_aside_and_its_return_is_scored(scored, tmp_path, capsys):
    scored()
    before = files(tmp_path)
    dropped = {name: content for name, content in before.items() if name.startswith("task_b/")}
    result = scored(tasks__exclude=["task_b"])
    assert files(tmp_path) == {name: content for name, content in before.items() if name not in dropped}
    aside = files(tmp_path, "set_aside/1")
    assert {name: data for name, (data, *_) in aside.items()} == {name: data for name, (data, *_) in dropped.items()}
    assert [row["task"] for row in result.task_scores] == ["task_a"]
    assert "3 files of rows are damaged or not what is asked for now" in capsys.readouterr().err
    assert scored().manifest["rows"]["planned"] == 32


def test_a_changed_task_is_scored_again_and_only_it(scored, write_task, tmp_path):
    scored()
    before = files(tmp_path)
    write_task("task_b", 12, Definition=["A repaired one."])
    scored()
    after = files(tmp_path)
    assert all((after[name] == content) == name.startswith("task_a/") for name, content in before.items())
    assert all(
        ("A repaired one." in row["few_shot_prompt"]) == (row["task"] == "task_b") for row in rows(tmp_path).values()
    )
    assert len(files(tmp_path, "set_aside/1")) == 3


def test_fewer_instances_set_whole_files_aside_and_cut_none(scored, tmp_path):
    scored()
    before = files(tmp_path)
    result = scored(tasks__instances_per_task=7)
    assert files(tmp_path) == {
        name: before[name] for name in before if not name.endswith(("15.parquet", "20.parquet", "12.parquet"))
    }
    assert [row["num_instances"] for row in result.task_scores] == [10, 10]
    assert len(files(tmp_path, "set_aside/1")) == 3
    assert scored(tasks__instances_per_task=7).manifest == result.manifest


@pytest.mark.parametrize(
    ("settings", "difference"),
    [
        ({"prompt__num_shots": 1}, "prompt.num_shots: 4 → 1"),
        ({"seed": 3}, "seed: 0 → 3"),
        ({"engine__dtype": "float16"}, "engine.dtype: auto → float16"),
        ({"completion__headroom_tokens": 9}, "completion.headroom_tokens: 8 → 9"),
    ],
)
def test_a_run_of_another_prompt_or_numerics_is_refused_and_left_alone(scored, tmp_path, settings, difference):
    scored()
    before = files(tmp_path)
    with pytest.raises(ConfigError, match=difference.replace(".", r"\.")):
        scored(**settings)
    assert files(tmp_path) == before
    scored()


def test_only_files_with_error_rows_are_written_again(scored, write_task, tmp_path):
    entries = task_values(20)["Instances"]
    entries[13]["input"] = "word " * 300  # too long for the first run's engine
    entries[4]["output"] = []  # no reference: an error again
    write_task("task_c", Instances=entries)
    settings = {"engine__max_model_len": 200}
    result = scored(**settings)
    assert result.manifest["rows"]["errors"] == {"prompt too long": 1, "no reference": 1}
    before, before_rows = files(tmp_path), rows(tmp_path)
    assert scored(engine__max_model_len=4096).manifest["rows"]["errors"] == result.manifest["rows"]["errors"]
    assert files(tmp_path) == before, "a longer limit alone changes no row"
    result = scored(engine__max_model_len=4096, retry_errors=True)
    assert result.manifest["rows"]["errors"] == {"no reference": 1}
    after, after_rows = files(tmp_path), rows(tmp_path)
    changed = [name for name in before if before[name] != after[name]]
    failed = {row["row_id"] for row in before_rows.values() if row["error"]}
    for name in changed:
        ids = set(pq.read_table(tmp_path / "run" / "rows" / name, partitioning=None)["row_id"].to_pylist())
        assert ids & failed
    assert len(changed) <= len(failed) == 2
    assert {key: row for key, row in after_rows.items() if key not in failed} == {
        key: row for key, row in before_rows.items() if key not in failed
    }
    assert after_rows["task_c:t-13"]["error"] is None and after_rows["task_c:t-13"]["prediction"]


def test_another_metric_scores_again_from_the_predictions_without_an_engine(
    scored, tmp_path, inline_scoring, monkeypatch
):
    scored()
    before = rows(tmp_path)
    inline_scoring(stop_after=0)
    for module in (run, results, planning, shards):
        monkeypatch.setattr(module, "METRIC_VERSION", 99)
    monkeypatch.setattr(stages, "score_answer", lambda label, answer, references: 0.25)
    result = scored()
    after = rows(tmp_path)
    assert {row["score"] for row in after.values()} == {0.25}
    assert [row["task_score"] for row in result.task_scores] == [0.25, 0.25]
    same = [name for name in SCORE_ROWS.names if name != "score"]
    assert [[row[name] for name in same] for row in after.values()] == [
        [row[name] for name in same] for row in before.values()
    ]


def test_rescore_computes_all_scores_and_says_what_has_no_prediction(scored, tmp_path, inline_scoring, monkeypatch):
    scored(tasks__instances_per_task=8)
    before = files(tmp_path)
    inline_scoring(stop_after=0)
    scored(tasks__instances_per_task=8, rescore_all=True)
    assert files(tmp_path) == before, "nothing changed, so nothing is written"
    monkeypatch.setattr(stages, "score_answer", lambda label, answer, references: 0.5)
    result = scored(tasks__instances_per_task=8, rescore_all=True)
    assert {row["score"] for row in rows(tmp_path).values()} == {0.5}
    assert result.manifest["rows"]["scored"] == 16
    with pytest.raises(RunError, match="16 rows have no prediction yet: run the same command without --rescore"):
        scored(rescore_all=True)


def test_one_command_scores_again_and_tries_error_rows_again(scored, write_task, tmp_path, monkeypatch):
    entries = task_values(20)["Instances"]
    entries[13]["input"] = "word " * 300
    write_task("task_c", Instances=entries)
    assert scored(engine__max_model_len=200).manifest["rows"]["errors"] == {"prompt too long": 1}
    monkeypatch.setattr(stages, "score_answer", lambda label, answer, references: 0.5)
    result = scored(engine__max_model_len=4096, retry_errors=True, rescore_all=True)
    assert result.manifest["rows"]["errors"] == {}
    assert {row["score"] for row in rows(tmp_path).values()} == {0.5}


def test_rows_without_their_table_are_known_by_their_own_metadata(scored, tmp_path):
    scored()
    before = files(tmp_path)
    (tmp_path / "run" / "tasks.parquet").unlink()
    scored()
    assert files(tmp_path) == before


def test_the_manifest_is_withdrawn_before_anything_changes(scored, tmp_path, inline_scoring, monkeypatch):
    scored(tasks__instances_per_task=8)
    inline_scoring(stop_after=0)
    with pytest.raises(Interrupted):
        scored()
    assert not (tmp_path / "run" / "manifest.json").exists()
    assert len(rows(tmp_path)) == 16
    inline_scoring()
    assert scored().manifest["rows"]["planned"] == 32


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-20], lambda data: b"", lambda data: data[:50] + bytes(len(data) - 50)]
)
def test_damaged_files_are_moved_aside_and_scored_again(scored, tmp_path, damage):
    expected = (scored(), rows(tmp_path))[1]
    target = tmp_path / "run" / "rows" / "task_a" / "000005-000010.parquet"
    (tmp_path / "run" / "manifest.json").unlink()
    target.write_bytes(damage(target.read_bytes()))
    with pytest.raises(RunError, match=r"1 files of rows were damaged .*000005-000010.* run the same command again"):
        scored()
    scored()
    assert texts(rows(tmp_path)) == texts(expected)


@pytest.mark.parametrize("flags", [{"retry_errors": True}, {"rescore_all": True}, {"adaptive__enabled": True}])
def test_whatever_reads_a_damaged_file_first_moves_it_aside(scored, tmp_path, inline_scoring, flags):
    expected = (scored(), rows(tmp_path))[1]
    target = tmp_path / "run" / "rows" / "task_a" / "000005-000010.parquet"
    target.write_bytes(bytes(target.stat().st_size))  # of the size that the manifest names
    inline_scoring(stop_after=0)
    with pytest.raises(RunError, match=r"1 files of rows were damaged .*000005-000010.* run the same command again"):
        scored(**flags)
    inline_scoring()
    scored()
    assert texts(rows(tmp_path)) == texts(expected)


def test_task_by_task_results_name_the_task_whose_rows_are_not_its_own(scored, tmp_path):
    scored()
    plan = planning.plan_run(
        load_config(ScoreConfig, None, [], {"tasks.path": str(tmp_path / "tasks"), "engine.backend": "simulated"})
    )
    folder = results.open_folder(tmp_path / "run" / "rows")
    first, other = folder.read_table("task_a/000000-000005.parquet"), folder.read_table("task_b/000000-000005.parquet")
    for wrong in (other, first.slice(0, 1).take([0] * 5)):
        folder.write_parquet("task_a/000005-000010.parquet", wrong)
        with pytest.raises(
            RunError, match=r"task task_a: 20 rows with .* not its 20 planned ones; move .*rows/task_a away and"
        ):
            results.summarise(folder, RowFiles(folder.files()), plan.tasks)


def test_adaptive_decisions_are_kept_replayed_and_said_in_tasks_parquet(scored, write_task, tmp_path, inline_scoring):
    write_task("task_c", 60, Definition=["A third one."])
    adaptive = {
        "adaptive__enabled": True,
        "adaptive__first_instances": 10,
        "adaptive__score_margin": 0.3,
        "adaptive__exact_match_budget": 0,
    }
    inline_scoring(stop_after=4)
    with pytest.raises(Interrupted):
        scored(**adaptive)
    inline_scoring()
    result = scored(**adaptive)
    log = json.loads((tmp_path / "run" / "decisions.json").read_text())
    table = {row["task"]: row for row in pq.read_table(tmp_path / "run" / "tasks.parquet").to_pylist()}
    assert {name: row["num_instances"] for name, row in table.items()} == {"task_a": 10, "task_b": 10, "task_c": 10}
    assert {one["task"]: one["reason"] for one in log} == {name: row["stop_reason"] for name, row in table.items()}
    assert all(reason.startswith("score known to ±") for reason in (row["stop_reason"] for row in table.values()))
    assert result.manifest["rows"]["planned"] == 30
    assert scored(**adaptive).manifest == result.manifest
    before = files(tmp_path)
    full = scored()
    assert full.manifest["rows"]["planned"] == 92
    assert before.items() <= files(tmp_path).items()


def test_an_adaptive_run_is_scored_again_without_an_engine_and_keeps_its_reasons(
    scored, tmp_path, inline_scoring, monkeypatch
):
    adaptive = {
        "adaptive__enabled": True,
        "adaptive__first_instances": 10,
        "adaptive__score_margin": 0.4,
        "adaptive__exact_match_budget": 0,
    }
    before = scored(**adaptive)
    assert before.manifest["rows"]["planned"] == 20
    inline_scoring(stop_after=0)
    after = scored(**adaptive, rescore_all=True)
    assert after.manifest["stops"] == before.manifest["stops"] and after.task_scores == before.task_scores
    monkeypatch.setattr(stages, "score_answer", lambda label, answer, references: float(answer == "yes"))
    with pytest.raises(RunError, match="rows have no prediction yet: run the same command without --rescore"):
        scored(**adaptive | {"adaptive__score_margin": 0.1}, rescore_all=True)


def test_error_rows_are_tried_again_when_the_budget_of_time_has_ended(scored, write_task, tmp_path):
    entries = task_values(20)["Instances"]
    entries[13]["input"] = "word " * 300
    write_task("task_c", Instances=entries)
    adaptive = {"adaptive__enabled": True, "budget": 3600}
    assert scored(**adaptive, engine__max_model_len=200).manifest["rows"]["errors"] == {"prompt too long": 1}
    result = scored(**adaptive | {"budget": 1}, engine__max_model_len=4096, retry_errors=True)
    assert result.manifest["rows"]["errors"] == {} and result.manifest["rows"]["planned"] == 52


def test_a_folder_of_an_earlier_version_is_refused_in_one_line(scored, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"step": "score", "identity": {"row_format": 1}, "identity_hash": "0"}))
    with pytest.raises(ConfigError, match="another version of birbal_ray made this run"):
        scored()


@pytest.mark.parametrize(
    ("name", "gone"),
    [("tasks.parquet", []), ("000000-000005.parquet", []), ("000000-000005.parquet", ["tasks.parquet"])],
)
def test_a_store_that_fails_for_a_moment_costs_no_row(scored, tmp_path, monkeypatch, name, gone):
    scored()
    before = files(tmp_path)
    for one in ("manifest.json", *gone):  # as if it had been stopped at its end
        (tmp_path / "run" / one).unlink()

    def failing(read):
        def fail(self, asked, *arguments):
            if asked.endswith(name):
                raise RunError(f"{self.at(asked)}: connection reset; check the bucket")
            return read(self, asked, *arguments)

        return fail

    with monkeypatch.context() as patch, pytest.raises(RunError, match="check the bucket"):
        for method in ("read_table", "read_bytes"):
            patch.setattr(Folder, method, failing(getattr(Folder, method)))
        scored()
    assert files(tmp_path) == before
    scored()
    assert files(tmp_path) == before
