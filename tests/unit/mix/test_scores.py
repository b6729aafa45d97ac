"""A score folder after mishaps, and with names of tasks that other tools take for hidden files."""

import json

import pyarrow.parquet as pq
import pytest

from birbal_ray.mix.config import MixConfig
from birbal_ray.mix.run import mix
from birbal_ray.mix.scores import open_scores
from birbal_ray.run import RunError
from birbal_ray.score.results import export_published_json
from tests.fixtures.score_folder import forget_files, made_up_rows, write_score_folder


def test_lost_or_damaged_rows_are_not_exported_as_if_whole(tmp_path):
    folder = forget_files(write_score_folder(tmp_path / "scores", made_up_rows(2, 20), shard_rows=10))
    file = sorted((folder / "rows").rglob("*.parquet"))[1]
    whole = file.read_bytes()
    file.write_bytes(whole[:100])
    with pytest.raises(RunError, match="damaged"):
        export_published_json(folder, tmp_path / "out")
    file.unlink()
    with pytest.raises(RunError, match=r"10 rows of .* are there, 20 were scored"):
        export_published_json(folder, tmp_path / "out")
    file.write_bytes(whole)
    assert export_published_json(folder, tmp_path / "out") == (2, 40)


def test_a_folder_of_an_earlier_version_gives_the_same_mix(tmp_path):
    budgets = {"exact_match_budget": 20, "generation_budget": 20}
    folder = write_score_folder(tmp_path / "scores", made_up_rows(4, 40))
    new = mix(MixConfig(scores=str(folder), output=str(tmp_path / "new"), task_score=budgets))
    later = ("unreachable_fraction", "unreachable_reason", "definition_is_text", "stop_reason", "metric_version")
    table = pq.read_table(folder / "tasks.parquet")
    pq.write_table(table.drop_columns([name for name in later if name in table.column_names]), folder / "tasks.parquet")
    for task in (folder / "rows").iterdir():
        for number, file in enumerate(sorted(task.glob("*.parquet"))):
            file.rename(folder / "rows" / f"{task.name}-{number:05d}-of-00001.parquet")
        task.rmdir()
    old = mix(MixConfig(scores=str(forget_files(folder)), output=str(tmp_path / "old"), task_score=budgets))
    for name in ("train.parquet", "audit.parquet", "tasks.parquet"):
        assert old.manifest["files"][name] == new.manifest["files"][name]


def test_tasks_whose_names_begin_with_an_underscore_or_a_dot_are_read_and_exported(tmp_path):
    names = ("_first", ".second", "third")
    rows = [row | {"task": names[number // 20]} for number, row in enumerate(made_up_rows(3, 20))]
    folder = write_score_folder(tmp_path / "scores", rows)
    (folder / "rows" / "third" / ".tmp-1-2-000000-000020.parquet").write_bytes(b"half")  # of a writer that was killed
    scores = open_scores(folder)
    assert [file.name.split("/")[1] for file in scores.files] == ["%2Esecond", "_first", "third"]
    assert export_published_json(folder, tmp_path / "out") == (3, 60)
    for name in names:
        records = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        assert len(records) == 20, name
