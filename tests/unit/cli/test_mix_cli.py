"""`birbal mix`: tables, formats, exit codes."""

import csv
import io
import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from birbal_ray.cli.main import main
from birbal_ray.mix.config import MixConfig
from birbal_ray.settings import load_config
from tests.fixtures.score_folder import made_up_rows, write_score_folder

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    return str(write_score_folder(tmp_path_factory.mktemp("scores") / "s", made_up_rows(4, 60)))


@pytest.fixture(scope="module")
def run():
    return lambda *arguments: CliRunner().invoke(main, ["mix", *map(str, arguments)])


@pytest.fixture(scope="module")
def folder(run, scores, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "m"
    result = run("--scores", scores, "--output", folder, "--config", REPOSITORY / "configs/mix/tiny.yaml")
    assert result.exit_code == 0, result.output
    assert "exact_match" in result.stdout and "100" in result.stdout
    assert "left out:" in result.stderr and str(folder) in result.stderr
    return folder


def test_formats(run, scores, folder):
    common = ("--scores", scores, "--output", folder, "--config", REPOSITORY / "configs/mix/tiny.yaml", "--format")
    rows = json.loads(run(*common, "json").stdout)
    assert [row["kept"] for row in rows] == [100, 100]
    table = list(csv.DictReader(io.StringIO(run(*common, "csv").stdout)))
    assert [row["label"] for row in table] == ["exact_match", "generation"]


def test_dry_run_leaves_no_folder(run, scores, tmp_path):
    result = run(
        *("--scores", scores, "--output", tmp_path / "m", "--dry-run", "--policy", "birbal_2023", "--seed", 3),
    )
    assert result.exit_code == 0 and "nothing was written" in result.stderr and not (tmp_path / "m").exists()


def test_explain_and_diff(run, folder, scores, tmp_path):
    line = json.loads((folder / "train.jsonl").read_text().splitlines()[0])
    import pyarrow.parquet as pq

    first = pq.read_table(folder / "train.parquet").slice(0, 1).to_pylist()[0]
    assert line["question"] == first["question"]
    result = run("explain", first["row_id"], "--mix", folder)
    assert result.exit_code == 0 and "in the mix: its task" in result.stdout and first["row_id"] in result.stdout
    answer = json.loads(run("explain", first["row_id"], "--mix", folder, "--format", "json").stdout)
    assert answer[0]["kept"] is True and answer[0]["split"] == "train"
    other = tmp_path / "other"
    settings = ("--set", "task_score.allow_shortfall=true", "--set", "task_score.generation_budget=20")
    assert run("--scores", scores, "--output", other, *settings).exit_code == 0
    text = run("diff", folder, other)
    assert text.exit_code == 0 and "rows in both" in text.stdout
    assert "settings.task_score.generation_budget: 100 → 20" in text.stderr
    found = json.loads(run("diff", folder, other, "--format", "json").stdout)
    assert found["rows"]["a"] == 200
    assert run("diff", folder, folder).stdout.rstrip().endswith("every task has the same count in both")
    assert "difference" in run("diff", folder, other, "--format", "csv").stdout.splitlines()[0]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--output", "x"), 2, "error: --scores is required"),
        (("--scores", "{tmp}/gone", "--output", "{tmp}/m"), 2, "gone: no such folder"),
        (("--scores", "{scores}", "--output", "{tmp}/m"), 2, "task_score.exact_match_budget = 50000: only"),
        (("--scores", "{scores}", "--output", "{tmp}/m", "--model", "other"), 2, "scored by made-up-model"),
        (("--scores", "{scores}", "--output", "{tmp}/m", "--set", "polcy=x"), 2, "unknown key 'polcy'"),
        (("--scores", "{scores}", "--output", "{tmp}/m", "--config", "{tmp}/no.yaml"), 2, "no.yaml: no such file"),
        (("explain", "a:b", "--mix", "{folder}"), 2, "no candidate 'a:b'"),
        (("explain", "a:b", "--mix", "{tmp}"), 2, "expected the output of `birbal mix`"),
        (("diff", "{folder}", "{tmp}/gone"), 2, "gone: no such folder"),
    ],
)
def test_exit_codes(run, folder, scores, tmp_path, arguments, code, message):
    filled = [a.format(tmp=tmp_path, scores=scores, folder=folder) for a in arguments]
    result = run(*filled)
    assert result.exit_code == code and message in result.stderr and "Traceback" not in result.output


def test_a_mix_of_version_0_1_is_refused_with_what_to_do(run, folder, tmp_path):
    old = shutil.copytree(folder, tmp_path / "old")
    manifest = json.loads((old / "manifest.json").read_text())
    del manifest["format"]
    (old / "manifest.json").write_text(json.dumps(manifest))
    result = run("explain", "a:b", "--mix", old)
    assert result.exit_code == 1
    assert result.stderr == (
        f"error: {old}: another version of birbal_ray made this run, and this one can't read it; "
        "run `birbal mix` again with another --output\n"
    )


def test_help_has_examples(run):
    for arguments in ((), ("explain",), ("diff",)):
        result = run(*arguments, "--help")
        assert result.exit_code == 0 and "Example" in result.output


@pytest.mark.parametrize("file", sorted((REPOSITORY / "configs/mix").glob("*.yaml")), ids=lambda f: f.name)
def test_configs_are_valid(file):
    config = load_config(MixConfig, file)
    assert f"--config configs/mix/{file.name}" in file.read_text().splitlines()[0]
    if file.name != "tiny.yaml":
        assert len(config.sources) == 6
