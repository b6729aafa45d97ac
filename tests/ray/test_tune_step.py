"""`birbal tune` from scores to a mix, on a model of two layers: killed on the way, called again, its files taken up."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner
from matplotlib.image import imread

from birbal_ray.cli.main import main
from birbal_ray.storage import read_json
from tests.conftest import REPOSITORY
from tests.e2e.processes import birbal, finish, kill_whole, wait_for
from tests.fixtures.score_folder import made_up_rows, write_score_folder

pytestmark = pytest.mark.timeout(600)

BASELINES = ["uniform", "task_score"]
# configs/tune/tiny.yaml, smaller: one base, two baselines, three of the search, (2 + 1) mixes with two fresh seeds.
SMALLER = {
    "num_trials": 3,
    "num_initial": 3,
    "baselines": BASELINES,
    "mix": {"task_score": {"exact_match_budget": 40, "generation_budget": 40, "allow_shortfall": True}},
    "proxy": {"tokens": 2000},
    "repeats": {"top": 1, "seeds": 2},
    "resources": {"num_cpus": 1, "max_concurrent": 1},  # a trial takes 2 s, its process 15 s of a core to start
}
NUM_TRIALS = 1 + 2 + 3 + 3 * 2


def results_of(run: Path) -> dict[str, tuple[int, bytes]]:
    """Trials that ended: when their result was written, and what it says."""
    files = (run / "trials").glob("*/result.json")
    return {file.parent.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in files}


def made_by_mix(config: Path, output: Path) -> str:
    """SHA-256 of the train.parquet that `birbal mix` makes from a file."""
    done = CliRunner().invoke(main, ["mix", "--config", str(config), "--output", str(output)])
    assert done.exit_code == 0, done.output
    return hashlib.sha256((output / "train.parquet").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def searched(tiny_model, tmp_path_factory):
    """(run folder, command, results at the kill, stdout and stderr of the second call)."""
    root = tmp_path_factory.mktemp("tune")
    scores = write_score_folder(root / "scores", made_up_rows(4, 60, seed=3, words=(3, 8)))
    settings = yaml.safe_load((REPOSITORY / "configs" / "tune" / "tiny.yaml").read_text()) | SMALLER
    settings["train"]["model"]["name"] = str(tiny_model)
    (root / "tune.yaml").write_text(yaml.safe_dump(settings))
    run = root / "run"
    command = ["tune", "--config", root / "tune.yaml", "--scores", scores, "--output", run]
    process = birbal(*command)
    wait_for(lambda: len(results_of(run)) >= 2, process)
    kill_whole(process)
    before = results_of(run)
    return run, command, before, finish(birbal(*command))


def test_killed_and_called_again_it_ends_and_repeats_no_finished_trial(searched):
    run, command, before, (_, errors) = searched
    after = results_of(run)
    assert 2 <= len(before) < NUM_TRIALS == len(after)
    assert {name: after[name] for name in before} == before
    assert f"continuing: {len(before)} trials have ended and are kept" in errors
    manifest = read_json(run / "manifest.json")
    assert sum(manifest["trials"].values()) == NUM_TRIALS
    assert "failed" not in manifest["trials"]
    again = CliRunner().invoke(main, [str(argument) for argument in command])
    assert (again.exit_code, "nothing to do" in again.stderr) == (0, True)
    assert results_of(run) == after


def test_the_table_has_the_baselines_and_what_was_left_out_is_said(searched):
    run, _, _, (output, errors) = searched
    lines = output.splitlines()
    for name in [*BASELINES, "search-000", "search-001", "search-002"]:
        assert sum(line.startswith(f"{name} ") for line in lines) == 1
    manifest = read_json(run / "manifest.json")
    assert manifest["left_out"].startswith("the predicted mix is left out: 4 trials with ratios")
    assert manifest["left_out"] in errors
    assert [found["baseline"] for found in manifest["comparisons"]] == BASELINES
    for found in manifest["comparisons"]:
        assert found["num_seeds"] == 2
        assert found["sentence"] in errors


def test_the_records_agree(searched):
    run = searched[0]
    rows = {row["trial"]: row for row in pq.read_table(run / "trials.parquet").to_pylist()}
    records = {name: json.loads(text) for name, (_, text) in results_of(run).items()}
    assert rows.keys() == records.keys()
    for name, row in rows.items():
        assert (row["status"], row["objective"]) == (records[name]["status"], records[name]["objective"])
    assert rows["uniform"]["objective"] < rows["base_model"]["objective"], "training shows"
    assert len({record["validation_sha256"] for record in records.values()} - {""}) == 1


def test_its_files_make_the_same_mixes_to_the_byte(searched, tmp_path):
    run = searched[0]
    rows = {row["trial"]: row for row in pq.read_table(run / "trials.parquet").to_pylist()}
    repeat = next(name for name, row in rows.items() if row["kind"] == "repeat" and row["mix"].startswith("search"))
    assert made_by_mix(run / "trials" / repeat / "mix.yaml", tmp_path / "again") == rows[repeat]["mix_sha256"]
    best = read_json(run / "manifest.json")["best"]["mix"]
    assert made_by_mix(run / "best_mix.yaml", tmp_path / "best") == rows[best]["mix_sha256"]
    assert pq.read_metadata(tmp_path / "best" / "train.parquet").num_rows == rows[best]["rows"]


def test_the_picture_is_a_picture(searched):
    file = searched[0] / "search.png"
    assert file.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    height, width, _ = imread(file).shape
    assert min(height, width) > 200
