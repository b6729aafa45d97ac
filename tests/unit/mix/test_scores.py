"""A score folder after mishaps, and with names of tasks that pyarrow takes for hidden files."""

import json

import pytest

from birbal_ray.mix.scores import open_scores
from birbal_ray.run import MANIFEST_FILE, RunError
from birbal_ray.score.results import export_published_json
from tests.fixtures.score_folder import made_up_rows, write_score_folder


def test_lost_or_damaged_rows_are_not_exported_as_if_whole(tmp_path):
    folder = write_score_folder(tmp_path / "scores", made_up_rows(2, 20), shard_rows=10)
    file = sorted((folder / "rows").rglob("*.parquet"))[1]
    whole = file.read_bytes()
    file.write_bytes(b"\xff" * len(whole))
    with pytest.raises(RunError, match="damaged"):
        export_published_json(folder, tmp_path / "out")
    file.write_bytes(whole[:100])
    with pytest.raises(RunError, match=r"first: .*000020\.parquet has 100 bytes, not"):
        export_published_json(folder, tmp_path / "out")
    file.unlink()
    with pytest.raises(RunError, match=r"first: .*000020\.parquet is missing"):
        export_published_json(folder, tmp_path / "out")
    file.write_bytes(whole)
    (file.parent / "000000-000020.parquet").write_bytes(whole)  # a file that the run didn't write
    assert export_published_json(folder, tmp_path / "out") == (2, 40)


def test_a_folder_of_another_version_is_refused(tmp_path):
    folder = write_score_folder(tmp_path / "scores", made_up_rows(4, 40))
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    for other in ({"format": 3}, {"format": None, "files": {"quarantined": [], "excluded": []}}):
        (folder / MANIFEST_FILE).write_text(json.dumps(manifest | other))
        with pytest.raises(RunError, match=r"another version of birbal_ray made this run.*run `birbal score` again"):
            open_scores(folder)


def test_tasks_whose_names_begin_with_an_underscore_are_read_and_exported(tmp_path):
    names = ("_first", "second", "third")
    rows = [row | {"task": names[number // 20]} for number, row in enumerate(made_up_rows(3, 20))]
    folder = write_score_folder(tmp_path / "scores", rows)
    (folder / "rows" / "third" / ".tmp-1-2-000000-000020.parquet").write_bytes(b"half")  # of a writer that was killed
    scores = open_scores(folder)
    assert [name.split("/")[1] for name in scores.files] == ["_first", "second", "third"]
    assert export_published_json(folder, tmp_path / "out") == (3, 60)
    for name in names:
        records = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        assert len(records) == 20, name
