"""The command line: quick help with examples, exit codes, formats."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from birbal_ray.cli.main import main
from tests.conftest import task_values
from tests.fixtures.score_folder import made_up_rows, write_score_folder

SCORE = ["score", "--tasks", "{tasks}", "--output", "{out}"]
HEAVY = ("ray", "torch", "vllm", "transformers", "datasets", "pyarrow", "pydantic", "numpy")


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("arguments", "heavy", "shown"),
    [(["--help"], HEAVY, "birbal demo"), (["score", "--help"], HEAVY[:6], "birbal score")],  # a step's has its schema
)
def test_help_imports_nothing_heavy(arguments, heavy, shown):
    code = (
        "import sys\nfrom birbal_ray.cli.main import main\n"
        f"try:\n    main({arguments})\nexcept SystemExit:\n    pass\n"
        f"print([name for name in {heavy} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == "[]"
    assert shown in done.stdout


def commands(group, path=()):
    for name in group.list_commands(None):
        command = group.get_command(None, name)
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


@pytest.mark.parametrize(("path", "command"), [pytest.param(*pair, id=" ".join(pair[0])) for pair in commands(main)])
def test_every_command_has_help_with_an_example(path, command):
    result = run(*path, "--help")
    assert result.exit_code == 0
    assert "Example" in result.output
    assert f"birbal {' '.join(path)}" in result.output
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{path} {parameter.opts}"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (
            ["score", "--tasks", "nowhere", "--output", "{out}"],
            "nowhere: no such file or folder; `birbal tasks fetch",
        ),
        (["score", "--tasks", "{tasks}s", "--output", "{out}"], "no such file or folder; did you mean {tasks}?"),
        (["score", "--tasks", "{tasks}"], "--output is required"),
        (["score", "--output", "{out}"], "--tasks is required"),
        (["score", "--config", "nowhere.yaml"], "nowhere.yaml: no such file"),
        ([*SCORE, "--set", "prompt.shots=3"], "unknown key 'prompt.shots'"),
        ([*SCORE, "--model", "smollm3"], "model 'smollm3': no such folder"),
        ([*SCORE, "--model", "{tasks}"], "no config.json"),
        ([*SCORE, "--select", "task_aa"], "no task 'task_aa' (nearest: 'task_a')"),
        (["score", "--tasks", "{tasks}", "--output", "{tasks}/task_a.json"], "is a file, expected a folder"),
        (["tasks", "show", "task_aa", "--tasks", "{tasks}"], "no task 'task_aa' (nearest: 'task_a')"),
        (["tasks", "list", "--tasks", "{tasks}/task_a.txt"], "task_a.txt: no such file"),
        ([*SCORE, "--model", "nobody"], "not a Hub id"),
        (["serve", "--model", "{partial}"], "1 of 2 weight files are missing (first: two.safetensors)"),
        ([*SCORE, "--set", "tasks.label_overrides={latin}"], "latin.csv: not UTF-8 at byte 16"),
    ],
)
def test_wrong_usage_is_exit_code_2_with_one_line(write_task, tmp_path, arguments, reason):
    folder, partial, latin = write_task("task_a"), tmp_path / "partial", tmp_path / "latin.csv"
    latin.write_bytes("name,label\ntask_é,generation\n".encode("latin-1"))
    partial.mkdir()
    for name in ("config.json", "one.safetensors"):
        (partial / name).write_text("{}")
    weights = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (partial / "model.safetensors.index.json").write_text(json.dumps(weights))
    places = {"tasks": folder, "out": tmp_path / "out", "partial": partial, "latin": latin}
    filled = [text.format(**places) for text in arguments]
    result = run(*filled)
    assert result.exit_code == 2, result.output
    assert reason.replace("{tasks}", str(folder)) in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_an_unreachable_hub_model_says_what_to_do(write_task, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    folder = write_task("task_a")
    result = run("score", "--tasks", folder, "--output", tmp_path / "out", "--model", "owner/absent-model")
    assert result.exit_code == 2
    assert "model 'owner/absent-model': no such folder; the Hub can't be reached" in result.stderr
    assert "give a local folder" in result.stderr


@pytest.mark.parametrize("command", [["tasks", "fetch"], ["export-predictions", "run"]])
def test_a_url_is_not_taken_for_a_local_folder(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*command, "--output", "s3://bucket/there")
    assert result.exit_code == 2
    assert "expected a folder on this machine" in result.stderr
    assert not list(tmp_path.iterdir())


def test_exporting_what_is_no_run_is_wrong_usage_in_one_line(write_task, tmp_path):
    result = run("export-predictions", write_task("task_a"), "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stderr.strip().endswith("no manifest.json here; expected the output of `birbal score`")
    assert len(result.stderr.strip().splitlines()) == 1


def test_an_export_says_what_lies_beside_it(tmp_path):
    scores, out = write_score_folder(tmp_path / "scores", made_up_rows(2, 5)), tmp_path / "out"
    assert run("export-predictions", scores, "--output", out).stderr == f"10 rows in 2 files: {out}\n"
    (out / "task_of_a_larger_run.json").write_text("[]")
    said = run("export-predictions", scores, "--output", out).stderr
    assert "1 more .json files are there, which this run did not write" in said


def test_tasks_list_in_three_formats():
    rows = json.loads(run("tasks", "list", "--format", "json").stdout)
    assert len(rows) == 8
    assert {row["label"] for row in rows} == {"exact_match", "generation"}
    table = list(csv.DictReader(io.StringIO(run("tasks", "list", "--format", "csv").stdout)))
    assert [row["task"] for row in table] == [row["task"] for row in rows]
    text = run("tasks", "list").stdout
    assert "sample001_review_sentiment" in text
    assert table[0].keys() == rows[0].keys() == set(re.split(r"\s{2,}", text.splitlines()[0]))


def test_sample_tasks_are_what_their_kind_says():
    rows = json.loads(run("tasks", "list", "--format", "json").stdout)
    assert [row["label"] for row in rows] == ["exact_match"] * 4 + ["generation"] * 4
    assert all(40 <= row["instances"] <= 80 and row["shots"] == 4 for row in rows)
    assert run("tasks", "validate").exit_code == 0


def test_tasks_show_prints_a_whole_prompt():
    output = run("tasks", "show", "sample002_list_operation").stdout
    assert output.count("### Response:") == 5
    assert "--- references ---" in output


def test_validate_names_each_finding_and_fails(write_task):
    folder = write_task("good")
    write_task("mixed", Instances=[*task_values(1)["Instances"], {"id": "x", "input": "y", "output": []}])
    (folder / "broken.json").write_text('{"Definition": ')
    result = run("tasks", "validate", "--tasks", folder, "--format", "json")
    findings = json.loads(result.stdout)
    assert result.exit_code == 1
    assert [(row["file"], row["kind"]) for row in findings] == [
        ("broken.json", "unusable file"),
        ("mixed.json", "unusable instance"),
    ]
    assert "3 files read, 1 can't be used" in result.stderr


def test_label_csv_can_be_given_back_as_overrides(write_task, tmp_path):
    from birbal_ray.ni.metrics import read_overrides

    folder = write_task("task_a")
    (tmp_path / "labels.csv").write_text(run("tasks", "label", "--tasks", folder, "--format", "csv").stdout)
    assert read_overrides(tmp_path / "labels.csv")["task_a"].value == "exact_match"
    (tmp_path / "other.csv").write_text("name,label\ntask_b,generation\n")
    settings = ["engine.backend=simulated", f"tasks.label_overrides={tmp_path / 'other.csv'}"]
    sets = [part for value in settings for part in ("--set", value)]
    result = run("score", "--tasks", folder, "--output", tmp_path / "out", *sets, "--dry-run")
    assert "1 tasks of " in result.stderr and "other.csv are not in " in result.stderr
    assert "(first: task_b)" in result.stderr


def test_dry_run_counts_and_starts_nothing(write_task, tmp_path):
    bad = [{"id": f"bad-{n}", "input": "x", "output": []} for n in range(3)]
    folder = write_task("task_a", Instances=[*task_values(10)["Instances"], *bad])
    arguments = ["score", "--tasks", folder, "--output", tmp_path / "out", "--set", "engine.backend=simulated"]
    result = run(*arguments, "--dry-run", "--format", "json")
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)
    assert (row["instances"], row["shots"], row["too long"]) == (13, 2, 0)
    assert "prompts 10 in 1 shards" in result.stderr
    # Counted at white space: "shade number N" and what follows "### Input:" are each prompt's own.
    shared, own = row["shared tokens"], row["own tokens"]
    assert own == 10 * len(["shade", "number", "1", "###", "Response:"])
    assert f"prompt tokens {10 * shared + own}: {10 * shared} shared" in result.stderr.replace(",", "")
    assert "nothing was started" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([*SCORE, "--retry-errors", "--rescore"], "--rescore starts no engine; give one of them"),
        (["status", "{out}", "--watch", "--format", "json"], "leave out --format or --watch"),
        (["pipeline", "--output", "{out}", "--format", "json"], "--format is for the plan that --dry-run prints"),
        (["doctor", "--cluster", "--config", "demo"], "give --score-config and --train-config"),
        (
            ["serve", "--openai", "--compat", "--model", "{out}", "--device", "cpu"],
            "--compat is a rule of the submission",
        ),
        (["serve", "--token", "", "--model", "{out}"], "token = '': string should have at least 1 character"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(tmp_path, arguments, reason):
    result = run(*(text.format(tasks=tmp_path, out=tmp_path / "out") for text in arguments))
    assert result.exit_code == 2
    assert reason in " ".join(result.stderr.split())
    assert not list(tmp_path.iterdir())


def test_doctor_reports_this_machine():
    rows = {row["check"]: row for row in json.loads(run("doctor", "--format", "json").stdout)}
    assert rows["python"]["state"] == rows["ray"]["state"] == rows["vllm"]["state"] == "ok"
    result = run("doctor", "--model", "no-such-model", "--format", "json")
    assert result.exit_code == 1
    assert "no-such-model" in result.stderr
