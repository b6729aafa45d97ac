"""What `birbal status` says of run folders, made by the interface the steps use, on a disk and in object storage."""

from __future__ import annotations

import csv
import io
import json
import os
import shlex
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

from birbal_ray.cli.main import main
from birbal_ray.lock import this_process
from birbal_ray.manifest import read_manifest
from birbal_ray.progress import read_times
from birbal_ray.run import Step, open_run
from birbal_ray.settings import ConfigError
from birbal_ray.status import read_status
from birbal_ray.storage import RunError, open_folder
from tests.conftest import SLOW
from tests.fixtures.s3_server import BUCKET

DONE = {
    "score": {"model": {"name": "org/model"}, "settings": {"tasks": {"path": "my tasks"}}},
    "tune": {},
    "mix": {"scores": {"model": "org/model"}},
    "train": {"model": {"name": "org/model"}},
    "evaluate": {},
}
SUMMARY = "17 rows, 1 with errors"


def start(folder, step, **progress):
    """A run that was stopped after it said how far it was."""
    with open_run(folder, Step(step), {"made": "up"}) as run:
        if progress:
            run.progress(**{"done": None, "total": None, **progress}, final=True)
    return open_folder(folder)


def finish(folder, step):
    with open_run(folder, Step(step), {"made": "up"}) as run:
        run.progress(17, 17, text="17 of 17 rows", final=True)
        run.finish({**DONE[step], "wall_seconds": 12.5}, {}, summary=SUMMARY)
    return open_folder(folder)


def only(run, now=None):
    (row,) = read_status(str(run), now)
    return row


def command(*arguments):
    return CliRunner().invoke(main, ["status", *(str(argument) for argument in arguments)])


def test_a_stopped_run_says_what_it_last_said(folder):
    start(folder, "score")
    row = only(folder)
    assert (row.state, row.progress, row.done, row.planned) == ("stopped", "", None, None)
    start(folder, "score", done=9, total=17, text="9 of 17 rows")
    row = only(folder)
    assert (row.step, row.state, row.progress, row.done, row.planned) == ("score", "stopped", "9 of 17 rows", 9, 17)
    assert row.next == "run the same birbal score command again"
    assert (row.folder, row.wall_seconds) == (folder.place, folder.read_json("progress.json")["wall_seconds"])
    assert row.touched == folder.read_json("progress.json")["updated_at"]


def test_a_stopped_run_of_helm_names_the_command_that_made_it(tmp_path):
    run = start(tmp_path / "helm", "helm")
    assert only(run).next == "run the same birbal harness --helm command again"
    with pytest.raises(RunError, match=r"an unfinished `birbal harness --helm` run"):
        read_manifest(run, "helm")
    with pytest.raises(ConfigError, match=r"holds the output of `birbal harness --helm`, not of `birbal mix`"):
        start(run, "mix")


def test_a_finished_run_says_its_summary(folder):
    finish(folder, "score")
    row = only(folder)
    assert (row.state, row.progress, row.done, row.planned, row.wall_seconds) == ("done", SUMMARY, 17, 17, 12.5)
    assert row.touched == folder.stat("manifest.json").modified


def test_what_ended_a_session_is_shown_until_the_next_one(folder):
    with pytest.raises(RunError), open_run(folder, Step("train"), {"made": "up"}) as run:
        run.progress(12, 300, text="step 12 of 300", final=True)
        raise RunError("the card ran out of memory")
    assert only(folder).progress == "step 12 of 300, failed: the card ran out of memory"
    with open_run(folder, Step("train"), {"made": "up"}):  # it was an earlier session's
        assert "failed" not in only(folder).progress


def test_running_is_what_a_living_process_holds(folder):
    with open_run(folder, Step("score"), {"made": "up"}) as run:
        run.progress(1, 4, text="1 of 4 rows", final=True)
        before = {name: stat for name, stat in folder.files(hidden=True).items() if "lock" not in name}
        row = only(folder, time.time() + 60)
        assert (row.state, row.detail, row.next) == ("running", f"running as pid {os.getpid()}", "")
        assert 60 <= row.wall_seconds < 90
        assert {name: before[name] for name in before if "lock" not in name}.items() <= folder.files(
            hidden=True
        ).items()
    assert only(folder).state == "stopped"


def test_a_killed_process_holds_nothing(folder):
    start(folder, "score")
    dead = subprocess.Popen(["true"])
    dead.wait()
    folder.write_json(".lock.json", {**this_process(), "pid": dead.pid})
    assert only(folder).state == "stopped"


def test_a_pid_that_another_process_got_since_holds_nothing(folder):
    start(folder, "score")
    folder.write_json(".lock.json", {**this_process(), "started": 1e9})
    assert only(folder).state == "stopped"


@pytest.mark.parametrize("change", [{"host": "node-7"}, {"boot": "another pid namespace", "host": "node-7"}])
def test_a_run_on_another_host_is_judged_by_its_files(folder, change):
    start(folder, "score")
    folder.write_json(".lock.json", {**this_process(), **change})
    row = only(folder)
    assert (row.state, row.detail) == ("running", "running on node-7, unless it was killed")
    later = time.time() + 3 * 3600
    row = only(folder, later)
    assert row.state == "stopped"
    assert row.detail.startswith("stopped, it seems: node-7 has written nothing for ")
    folder.write_json("progress.json", {"updated_at": later - 60})
    assert only(folder, later).state == "running"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b'{"pid": -1}', b'{"pid": "x", "host": "y"}', b"\xff"])
def test_a_lock_s_holder_that_can_t_be_read_is_none(tmp_path, content):
    start(tmp_path, "score")
    (tmp_path / ".lock.json").write_bytes(content)
    assert only(tmp_path).state == "stopped"


def test_a_folder_of_steps_is_shown_in_the_order_they_run_whatever_they_are_called(folder):
    finish(folder.subfolder("a-mix"), "mix")
    finish(folder.subfolder("z"), "score")
    start(folder.subfolder("b"), "score")
    folder.write_bytes("other/manifest.json", b'{"name": "of another tool"}')
    folder.write_bytes("notes.txt", b"x")
    rows = read_status(folder.place)
    assert [(row.step, row.folder.removeprefix(f"{folder}/"), row.state) for row in rows] == [
        *[("score", "b", "stopped"), ("score", "z", "done"), ("mix", "a-mix", "done")],
        *[
            ("train", "train", "not started"),
            ("evaluate", "evaluate", "not started"),
            ("report", "report.html", "not started"),
        ],
    ]


def test_an_adapter_trained_by_the_chat_template_is_evaluated_by_it(tmp_path):
    prompt = {"format": "chat", "chat_template_arguments": {"enable_thinking": False}}
    with open_run(tmp_path / "train", Step("train"), {"made": "up"}) as run:
        run.finish({**DONE["train"], "settings": {"prompt": prompt}}, {}, summary=SUMMARY)
    words = shlex.split(only(tmp_path / "train").next)[2:]
    asked = main.get_command(None, "evaluate").make_context("evaluate", words).params
    assert '{"enable_thinking": false}' in str(asked) and "prompt.format=chat" in str(asked)


@pytest.mark.parametrize("at", ["disk", "s3"])
def test_next_is_a_command_that_birbal_takes(request, tmp_path, at):
    if at == "s3":
        request.getfixturevalue("s3")
    run = open_folder(f"s3://{BUCKET}/my run" if at == "s3" else tmp_path / "my run")
    expected = {
        "score": ["mix", "--scores", f"{run}/score", "--output", f"{run}/mix"],
        "tune": ["mix", "--config", f"{run}/tune/best_mix.yaml", "--output", f"{run}/mix"],
        "mix": ["train", "--mix", f"{run}/mix", "--model", "org/model", "--output", f"{run}/train"],
        "train": [
            *("evaluate", "--tasks", "my tasks", "--model", "org/model"),
            *("--adapter", f"{run}/train", "--output", f"{run}/evaluate"),
        ],
        "evaluate": ["report", f"{run}"],
    }
    for step, arguments in expected.items():
        finish(run.subfolder(step), step)
        for rows in (read_status(run.place), read_status(run.at(step))):
            words = [shlex.split(row.next) for row in rows if row.next]
            assert words == [["birbal", *arguments]]
            main.get_command(None, arguments[0]).make_context(arguments[0], arguments[1:])
    assert [row.next for row in read_status(run.at("score"))] == [""]
    if at == "s3":
        return
    (run.local / "report.html").write_text("")
    assert [row.next for row in read_status(run.place) if row.next] == []
    assert (read_status(run.place)[-1].state, read_status(run.place)[-1].progress) == ("done", "")
    os.utime(run.local / "report.html", (1e9, 1e9))
    assert read_status(run.place)[-1].progress == "older than score, tune, mix, train, evaluate"
    assert [row.next for row in read_status(run.place) if row.next] == [f"birbal report {shlex.quote(str(run))}"]


def test_a_step_folder_may_be_the_current_one(tmp_path, monkeypatch):
    finish(tmp_path / "run" / "score", "score")
    monkeypatch.chdir(tmp_path / "run" / "score")
    result = command(".", "--format", "json")
    assert (
        json.loads(result.stdout)[0]["next"] == f"birbal mix --scores {tmp_path}/run/score --output {tmp_path}/run/mix"
    )


def test_what_a_pipeline_began_the_pipeline_continues(folder):
    finish(folder.subfolder("score"), "score")
    folder.write_bytes("logs/ray.log", b"")
    again = "run the same birbal demo or birbal pipeline command again"
    assert [row.next for row in read_status(folder.place) if row.next] == [again]
    start(folder.subfolder("mix"), "mix")
    assert [row.next for row in read_status(folder.place) if row.next] == [again]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe"])
def test_a_damaged_record_is_named_and_its_step_makes_it_again(folder, content):
    if not (folder.is_local or content == b"{" or SLOW):
        pytest.skip("one damage at a URL is enough: it is read there as on a disk")
    for name in ("score", "mix"):
        finish(folder.subfolder(name), name)
    folder.write_bytes("score/run.json", content)
    folder.write_bytes("mix/manifest.json", content)
    for name, file in (("mix", "manifest.json"), ("score", "run.json")):
        with pytest.raises(RunError, match=rf"{name}/{file}: not .*or it is damaged"):
            read_status(folder.at(name))
        result = command(folder.place)
        assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1)
    with open_run(folder.subfolder("mix"), Step("mix"), {"made": "up"}) as run:
        assert run.resumed and run.manifest is None
    with open_run(folder.subfolder("score"), Step("score"), {"made": "up"}, overwrite=True) as run:
        assert not run.resumed


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b'{"wall_seconds": "y", "updated_at": [], "done": "x", "text": 3}',
        b"\xff\xfe",
        b"null\n",
    ],
)
def test_a_damaged_progress_file_ends_in_a_row_not_in_a_traceback(tmp_path, content):
    start(tmp_path, "score", done=1)
    (tmp_path / "progress.json").write_bytes(content)
    result = command(tmp_path, "--format", "json")
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)
    assert (row["step"], row["state"]) == ("score", "stopped")


@pytest.mark.parametrize("step", ["score", "mix", "train", "tune", "evaluate"])
def test_folders_of_the_previous_version_are_shown(tmp_path, step):
    record = {"step": step, "identity": {"seed": 1}, "identity_hash": "0"}
    open_folder(tmp_path).write_json("run.json", record)
    assert only(tmp_path).state == "stopped"
    open_folder(tmp_path).write_json("manifest.json", {**record, "rows": 3, "result": {"elapsed_seconds": 5}})
    row = only(tmp_path)
    assert (row.state, row.progress) == ("done", "")


def test_a_manifest_of_another_tool_is_none_of_a_step(tmp_path):
    finish(tmp_path / "mix", "mix")
    (tmp_path / "audio").mkdir()
    (tmp_path / "audio" / "manifest.json").write_text('{"file": 1}\n{"file": 2}\n')
    assert read_status(tmp_path)[0].step == "mix"


def test_a_pipeline_is_shown_before_its_first_step_has_started(tmp_path):
    """While it reads the tasks for its plan, and fetches the weights."""
    (tmp_path / "clock.json").write_text('{"budget_seconds": 60, "spent_seconds": {}}')
    rows = read_status(tmp_path)
    assert [row.step for row in rows] == ["score", "mix", "train", "evaluate", "report"]
    assert {row.state for row in rows} == {"not started"}


def test_what_is_no_run_folder_is_wrong_usage(tmp_path):
    finish(tmp_path / "runs" / "demo" / "mix", "mix")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for run, reason in (
        ("absent", "absent: no such folder"),
        ("empty", "empty: no run folder"),
        ("file", "file: no run folder"),
        ("runs", "runs: no run folder"),
    ):
        with pytest.raises(ConfigError, match=reason):
            read_status(tmp_path / run)
        result = command(tmp_path / run)
        assert (result.exit_code, result.stdout) == (2, "")
        assert len(result.stderr.splitlines()) == 1


def test_the_command_prints_three_formats(folder):
    finish(folder.subfolder("score"), "score")
    with open_run(folder.subfolder("mix"), Step("mix"), {}):
        text = command(folder.place)
        table = list(csv.DictReader(io.StringIO(command(folder.place, "--format", "csv").stdout)))
        values = json.loads(command(folder.place, "--format", "json").stdout)
    assert text.exit_code == 0
    assert f"running as pid {os.getpid()}" in text.stdout
    assert SUMMARY in text.stdout
    assert [row["state"] for row in table] == ["done", "running", "not started", "not started", "not started"]
    assert [row["step"] for row in values] == [row["step"] for row in table]
    assert (values[0]["done"], values[0]["planned"], values[0]["wall_seconds"]) == (17, 17, 12.5)
    assert values[0]["touched"].endswith("+00:00")
    assert "next: birbal train --mix" not in text.stdout


def test_nothing_heavy_is_imported(tmp_path):
    start(tmp_path / "score", "score")
    code = (
        "import sys\nfrom birbal_ray.cli.main import main\n"
        f"try:\n    main(['status', {str(tmp_path)!r}])\nexcept SystemExit:\n    pass\n"
        "heavy = ('ray', 'torch', 'transformers', 'datasets', 'optuna', 'vllm', 'obstore')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_a_watched_run_fits_a_narrow_terminal(tmp_path, monkeypatch):
    """One screen: each step with its time and its plan, what runs in its own words, the budget."""
    monkeypatch.setenv("COLUMNS", "80")
    finish(tmp_path / "score", "score")
    text = "step 33/1660 · epoch 0.40 · loss 2.3412 · lr 3.71e-04 · 57 tokens/s · eval loss 2.5012 · ends in 4 min 11 s"
    folder = start(tmp_path / "train", "train", done=33, total=1660, text=text)
    folder.write_json("progress.json", {**folder.read_json("progress.json"), "wall_seconds": 26.0})
    steps = [{"step": step, "planned_seconds": seconds} for step, seconds in (("score", 15.0), ("evaluate", 142.0))]
    (tmp_path / "plan.json").write_text(json.dumps({"steps": steps}))
    (tmp_path / "clock.json").write_text(
        json.dumps({"budget_seconds": 900, "spent_seconds": {"report": 3.0, "train": 60.0, "score": 13.0}})
    )
    monkeypatch.setattr("birbal_ray.cli.recipe.WATCH_SECONDS", 0.0)
    lines = command(tmp_path, "--watch").output.splitlines()
    screen = lines[: lines.index(next(line for line in lines if line.startswith("next")))]
    assert screen[:7] == [
        str(tmp_path),
        "score     done         12 s (15 s planned)",
        f"          {SUMMARY}",
        "train     stopped      26 s",
        "          step 33/1660 · epoch 0.40 · loss 2.3412 · lr 3.71e-04 · 57 tokens/s ·",
        "          eval loss 2.5012 · ends in 4 min 11 s",
        "evaluate  not started  2 min 22 s planned",
    ]
    assert screen[-1] == (
        "time: 1 min 16 s of 15 min 00 s (score 13 s, train 1 min 00 s, report 3 s); 2 min 22 s planned for what has "
        "not started"
    )


@pytest.mark.parametrize("plan", ["", "{", "[]", '{"steps": 3}', '{"steps": [{}]}'])
def test_a_plan_that_can_t_be_read_is_none(tmp_path, plan):
    assert read_times(open_folder(tmp_path)) == (None, {}, {})
    for name in ("plan.json", "clock.json"):
        (tmp_path / name).write_text(plan)
    assert read_times(open_folder(tmp_path)) == (None, {}, {})
