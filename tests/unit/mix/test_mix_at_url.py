"""Scores, sources, evaluation texts and the mix itself in object storage: the same bytes as on a disk."""

import json

import pytest

from birbal_ray.mix.config import MixConfig
from birbal_ray.mix.files import diff, explain
from birbal_ray.mix.run import mix
from birbal_ray.run import MANIFEST_FILE
from birbal_ray.settings import ConfigError
from birbal_ray.storage import open_folder
from tests.fixtures.s3_server import BUCKET
from tests.fixtures.score_folder import made_up_rows, write_score_folder

BUDGETS = {"exact_match_budget": 30, "generation_budget": 30}


def settings(place):
    folder = open_folder(place)
    lines = [json.dumps({"q": f"Which thing has the number {n} in this list?", "a": f"thing {n}"}) for n in range(9)]
    folder.write_bytes("notes.jsonl", "\n".join(lines).encode())
    folder.write_bytes("eval.txt", b"which thing has the number 3 in this list\n")
    source = {"name": "notes", "path": folder.at("notes.jsonl"), "columns": {"input": "q", "output": "a"}}
    return MixConfig(
        scores=folder.at("scores"),
        output=folder.at("mix"),
        task_score=BUDGETS,
        sources=[source],
        contamination={"files": [folder.at("eval.txt")], "action": "drop"},
    )


@pytest.fixture
def place(s3, tmp_path):
    return f"s3://{BUCKET}/{tmp_path.name}"


def test_the_same_mix_at_a_url_as_on_a_disk(place, tmp_path):
    rows = made_up_rows(4, 60, seed=1)
    for folder in (place, str(tmp_path)):
        write_score_folder(f"{folder}/scores", rows)
    here, there = mix(settings(str(tmp_path))), mix(settings(place))
    names = here.manifest["files"].keys() - {"README.md"}  # it says where the source lies
    assert all(there.manifest["files"][name] == here.manifest["files"][name] for name in names)
    assert there.manifest["contamination"]["found"] == {"ngram": 1}
    for name in names:
        assert there.folder.read_bytes(name) == here.folder.read_bytes(name), name
    assert diff(here.folder, there.folder)["rows"]["in_both"] == 68
    kept = there.folder.read_table("train.parquet", ["row_id"])["row_id"][0].as_py()
    assert explain(f"{place}/mix", kept)["kept"]


def test_a_mix_at_a_url_that_lost_a_file_is_made_again(place, capsys):
    write_score_folder(f"{place}/scores", made_up_rows(4, 60, seed=1))
    made = mix(settings(place))
    before = {name: made.folder.read_bytes(name) for name in made.manifest["files"]}
    mix(settings(place))
    assert "up to date" in capsys.readouterr().err
    made.folder.delete(["train.parquet"])
    again = mix(settings(place))
    assert "train.parquet is missing" in capsys.readouterr().err
    assert {name: again.folder.read_bytes(name) for name in again.manifest["files"]} == before


def test_the_scores_at_a_url_are_never_overwritten(place):
    write_score_folder(f"{place}/scores", made_up_rows(4, 60, seed=1))
    before = open_folder(f"{place}/scores").files()
    for output in (f"{place}/scores", place):
        with pytest.raises(ConfigError, match=r"(holds|is) an input"):
            mix(settings(place).model_copy(update={"output": output}), overwrite=True)
    assert open_folder(f"{place}/scores").files() == before and MANIFEST_FILE in before
