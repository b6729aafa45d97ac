"""What `birbal status` says of run folders, made here as the steps make them."""

from __future__ import annotations

import csv
import io
import json
import os
import shlex
import socket
import subprocess
import sys
import time

import pyarrow as pa
import pytest
from click.testing import CliRunner

from birbal_ray.cli.main import main
from birbal_ray.run import locked, start_run, write_atomic, write_json, write_parquet
from birbal_ray.schemas import TASKS
from birbal_ray.score.plan import PromptVariant, Shard
from birbal_ray.settings import ConfigError
from birbal_ray.status import status
from birbal_ray.tune.config import TuneConfig
from birbal_ray.tune.records import remember_job, write_record
from birbal_ray.tune.scheduler import FAILED, FINISHED, STOPPED, Job, Plan, Record
from birbal_ray.tune.space import TaskCounts

TASK_SIZES = {"task_a": 10, "task_b-of": 7}
DONE = {
    "score": {
        "model": {"name": "org/model"},
        "settings": {"tasks": {"path": "my tasks"}},
        "rows": {"planned": 17, "scored": 16, "errors": {"prompt too long": 1}},
        "wall_seconds": 12.5,
    },
    "tune": {"trials": {"finished": 5, "stopped": 2}, "best": {"mix": "search-003"}},
    "mix": {"scores": {"model": "org/model"}, "rows": {"kept": 1200, "train": 1176, "eval": 24}, "wall_seconds": 3.0},
    "train": {
        "model": {"name": "org/model"},
        "result": {"num_steps": 40, "epochs": 2.0, "ended_by": "budget", "best_eval_loss": 2.0587, "best_step": 30}
        | {"elapsed_seconds": 3456.0},
    },
    "evaluate": {"rows": {"planned": 736, "scored": 732, "errors": 4}, "wall_seconds": 45.6},
}


def begin(folder, step, identity=None):
    folder.mkdir(parents=True)
    start_run(folder, step, identity or {"made": "up"})
    return folder


def finish(folder, step):
    """What `finish_run` leaves, without asking git for the commit."""
    begin(folder, step)
    write_json(folder / "manifest.json", {"step": step, "identity": {}, **DONE[step]})
    return folder


def begin_scoring(folder, step="score", **identity):
    begin(folder, step, {"config": {"shard_rows": 4}, **identity})
    row = {name: [] for name in ("categories", "sources", "domains", "licenses")}
    row |= {"label": "generation", "label_reason": "", "definition": "", "sha256": "", "num_shots": 0}
    rows = [
        {**row, "task": task, "num_available": size, "num_instances": size, "max_completion_tokens": 8}
        for task, size in TASK_SIZES.items()
    ]
    write_parquet(folder / "tasks.parquet", pa.Table.from_pylist(rows, schema=TASKS))
    return folder


def write_shards(folder, *chunks, variant=None):
    for task, chunk in chunks:
        count = -(-TASK_SIZES[task] // 4)
        shard = Shard(task, "", "", "generation", chunk, count, 0, 8, variant or PromptVariant())
        write_atomic(folder / "rows" / shard.file_name, b"as good as Parquet here")


def one(run, now=None):
    (row,) = status(run, now)
    return row


def seen(row):
    return row.progress, row.done, row.planned


def command(*arguments):
    return CliRunner().invoke(main, ["status", *(str(argument) for argument in arguments)])


def test_a_stopped_score_run_counts_the_rows_of_its_shards(tmp_path):
    folder = begin_scoring(tmp_path / "score")
    assert seen(one(folder)) == ("0 of 17 rows", 0, 17)
    write_shards(folder, ("task_a", 0), ("task_a", 2), ("task_b-of", 1))  # 4, the last 2, the last 3
    (folder / "rows" / ".tmp-1-2-task_a-00001-of-00003.parquet").write_bytes(b"half")
    (folder / "sessions.jsonl").write_text('{"wall_seconds": 2.5}\n{"wall_seconds": 4}\n')
    row = one(folder)
    assert seen(row) == ("9 of 17 rows", 9, 17)
    assert (row.step, row.state, row.wall_seconds) == ("score", "stopped", 6.5)
    assert row.next == "run the same birbal score command again"
    (folder / "tasks.parquet").unlink()  # killed in the second before it was written
    assert seen(one(folder)) == ("planning", None, None)


def test_an_evaluation_plans_each_model_in_each_format(tmp_path):
    models = {"base": "base 0", "mine": "adapter 1"}
    formats = ["few_shot", "zero_shot"]
    folder = begin_scoring(tmp_path / "e", "evaluate", models=models, prompt_formats=formats)
    write_shards(folder, ("task_a", 0), variant=PromptVariant("base", "zero_shot"))
    write_shards(folder, ("task_a", 0), ("task_a", 1), variant=PromptVariant("mine", "few_shot", "mine"))
    assert seen(one(folder)) == ("12 of 68 rows", 12, 68)


def test_training_tells_step_loss_and_budget(tmp_path):
    folder = begin(tmp_path / "train", "train", {"settings": {"budget": 3600.0}})
    assert seen(one(folder)) == ("no step yet", None, None)
    forecast = {"num_steps": 280, "epochs": 2.8, "by_budget": True}
    write_json(folder / "status.json", {"step": 12, "max_steps": 300, "epoch": 0.12, "forecast": forecast})
    write_json(folder / "clock.json", {"elapsed_seconds": 725.0, "setup_seconds": 9.0})
    lines = [{"step": 10, "eval_loss": 2.5}, {"step": 11, "loss": 2.25}, {"step": 12, "loss": 2.125}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 13, "lo')
    row = one(folder)
    assert (row.done, row.planned, row.wall_seconds) == (12, 300, 725.0)
    assert row.progress == (
        "step 12 of 300, epoch 0.12, loss 2.1250, eval loss 2.5000, 280 steps (2.8 epochs) will fit, "
        "12 min 05 s of 1 h 00 min"
    )
    write_json(folder / "session.json", {"error": "the card ran out of memory"})
    assert one(folder).progress.endswith("failed: the card ran out of memory")
    with locked(folder):  # it was an earlier session's
        assert "failed" not in one(folder).progress


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_trials": 3, "surrogate": False, "baselines": ["uniform"]},
        {"repeats": {"top": 0}, "baselines": []},
        {"repeats": {"top": 3, "seeds": 5}},
    ],
)
def test_a_search_tells_trials_ended_of_those_planned(tmp_path, settings):
    config = TuneConfig(**settings)
    identity = {"settings": config.model_dump(mode="json", exclude={"scores", "output", "resources"})}
    folder = begin(tmp_path / "tune", "tune", identity)
    for key, ending in {"a": (FINISHED, 2.5), "b": (STOPPED, 2.25), "c": (FAILED, None), "d": None}.items():
        job = Job(key, "search", key, 0, {})
        remember_job(folder, job, "scores")
        if ending:
            write_record(folder, Record(job, *ending))
    planned = Plan(config, TaskCounts({"generation": 2}, {"generation": 9})).num_trials
    text = f"3 of {planned} trials (1 failed, 1 finished, 1 stopped), 1 begun, lowest loss 2.2500"
    assert seen(one(folder)) == (text, 3, planned)


def test_running_is_what_a_living_process_holds(tmp_path):
    folder = begin_scoring(tmp_path / "score")
    with locked(folder):
        before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
        row = one(folder, time.time() + 60)
        assert (row.state, row.detail, row.next) == ("running", f"running as pid {os.getpid()}", "")
        assert 60 <= row.wall_seconds < 90
        assert before == {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert one(folder).state == "stopped"


def test_a_killed_process_holds_nothing(tmp_path):
    folder = begin_scoring(tmp_path / "score")
    dead = subprocess.Popen(["true"])
    dead.wait()
    write_json(folder / ".lock.json", {"pid": dead.pid, "host": socket.gethostname()})
    assert one(folder).state == "stopped"


def test_a_pid_that_another_process_got_since_holds_nothing(tmp_path):
    folder = begin_scoring(tmp_path / "score")
    with locked(folder):
        lock = folder / ".lock.json"
        os.utime(lock, (1e9, 1e9))  # long before this process began
        assert one(folder).state == "stopped"


def test_a_run_on_another_host_is_judged_by_its_files(tmp_path):
    folder = begin_scoring(tmp_path / "score")
    write_json(folder / ".lock.json", {"pid": 1, "host": "node-7"})
    row = one(folder)
    assert (row.state, row.detail) == ("running", "running on node-7, unless it was killed")
    later = time.time() + 3 * 3600
    row = one(folder, later)
    assert (row.state, row.detail) == ("stopped", "stopped, it seems: node-7 has written nothing for 3 h 00 min")
    write_shards(folder, ("task_a", 0))  # a file in a folder below counts
    os.utime(folder / "rows", (later - 60, later - 60))
    assert one(folder, later).state == "running"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b'{"pid": -1}', b'{"pid": "x", "host": "y"}', b"\xff"])
def test_a_lock_s_holder_that_can_t_be_read_is_none(tmp_path, content):
    folder = begin_scoring(tmp_path / "score")
    (folder / ".lock.json").write_bytes(content)
    assert one(folder).state == "stopped"


def test_a_folder_of_steps_is_shown_in_the_order_they_run_whatever_they_are_called(tmp_path):
    finish(tmp_path / "a-mix", "mix")
    finish(tmp_path / "z", "score")
    begin_scoring(tmp_path / "b", "score")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text('{"name": "of another tool"}')
    (tmp_path / "notes.txt").write_text("x")
    rows = status(tmp_path)
    assert [(row.step, row.folder.name, row.state) for row in rows] == [
        *[("score", "b", "stopped"), ("score", "z", "done"), ("mix", "a-mix", "done")],
        *[
            ("train", "train", "not begun"),
            ("evaluate", "evaluate", "not begun"),
            ("report", "report.html", "not begun"),
        ],
    ]
    assert seen(rows[1]) == ("17 rows, 1 with errors", 17, 17)
    assert rows[2].progress == "1,200 rows (1,176 train, 24 eval)"


def test_next_is_a_command_that_birbal_takes(tmp_path):
    run = tmp_path / "my run"
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
        finish(run / step, step)
        for rows in (status(run), status(run / step)):
            words = [shlex.split(row.next) for row in rows if row.next]
            assert words == [["birbal", *arguments]]
            main.get_command(None, arguments[0]).make_context(arguments[0], arguments[1:])
    assert [row.next for row in status(run / "score")] == [""]
    (run / "report.html").write_text("")
    assert [row.next for row in status(run) if row.next] == []
    assert (status(run)[-1].state, status(run)[-1].progress) == ("done", "")
    os.utime(run / "report.html", (1e9, 1e9))
    assert status(run)[-1].progress == "older than score, tune, mix, train, evaluate"
    assert [row.next for row in status(run) if row.next] == [f"birbal report {shlex.quote(str(run))}"]


def test_a_step_folder_may_be_the_current_one(tmp_path, monkeypatch):
    finish(tmp_path / "run" / "score", "score")
    monkeypatch.chdir(tmp_path / "run" / "score")
    result = command(".", "--format", "json")
    assert (
        json.loads(result.stdout)[0]["next"] == f"birbal mix --scores {tmp_path}/run/score --output {tmp_path}/run/mix"
    )


def test_what_a_pipeline_began_the_pipeline_continues(tmp_path):
    finish(tmp_path / "score", "score")
    write_atomic(tmp_path / "logs" / "ray.log", b"")
    again = "run the same birbal demo or birbal pipeline command again"
    assert [row.next for row in status(tmp_path) if row.next] == [again]
    begin(tmp_path / "mix", "mix")
    assert [row.next for row in status(tmp_path) if row.next] == [again]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe"])
def test_damaged_records_are_told_with_the_way_out(tmp_path, content):
    for name in ("score", "mix"):
        finish(tmp_path / name, name)
    (tmp_path / "score" / "run.json").write_bytes(content)
    (tmp_path / "mix" / "manifest.json").write_bytes(content)
    score, mix = status(tmp_path)[:2]
    assert (score.step, score.state, mix.step, mix.state) == ("score", "damaged", "mix", "damaged")
    assert f"{tmp_path}/score/run.json: not valid JSON" in score.progress
    assert score.next == "run the same birbal score command again, with --overwrite"
    assert mix.next == f"remove {tmp_path}/mix/manifest.json, then run the same birbal mix command again"
    (tmp_path / "score" / "manifest.json").unlink()
    assert [row.state for row in status(tmp_path) if row.step == "?"] == ["damaged"]
    assert command(tmp_path).exit_code == command(tmp_path / "score").exit_code == 0


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"3", b'{"step": "x", "wall_seconds": "y"}', b"\xff\xfe", b"null\n"]
)
@pytest.mark.parametrize(
    ("step", "file"),
    [
        *[("score", "tasks.parquet"), ("score", "sessions.jsonl"), ("train", "status.json"), ("train", "clock.json")],
        *[("train", "session.json"), ("train", "metrics.jsonl"), ("tune", "trials/d/result.json")],
    ],
)
def test_other_damaged_files_end_in_a_row_not_in_a_traceback(tmp_path, step, file, content):
    folder = tmp_path / step
    if step == "score":
        begin_scoring(folder)
    else:
        settings = {"budget": None, "baselines": [], "repeats": {"top": 0}, "num_trials": 3, "surrogate": True}
        begin(folder, step, {"settings": settings})
        write_json(folder / "status.json", {"step": 1, "max_steps": 3, "epoch": 0.1, "forecast": None})
        remember_job(folder, Job("d", "search", "d", 0, {}), "scores")
    (folder / file).write_bytes(content)
    result = command(folder, "--format", "json")
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)
    assert (row["step"], row["state"]) == (step, "stopped")


@pytest.mark.parametrize("step", ["score", "mix", "train", "tune", "evaluate"])
def test_records_with_other_content_than_ours_end_in_a_row(tmp_path, step):
    folder = begin_scoring(tmp_path / "run", step)
    write_json(folder / "run.json", {"step": step, "identity": [1]})
    assert one(folder).state == "stopped"
    assert step == "mix" or "not as birbal writes it" in one(folder).progress
    write_json(folder / "manifest.json", {"step": step, "rows": 3})
    assert one(folder).state == "done"
    assert "not as birbal writes it" in one(folder).progress


def test_what_is_no_run_folder_is_wrong_usage(tmp_path):
    finish(tmp_path / "runs" / "demo" / "mix", "mix")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for run, reason in (
        ("absent", "absent: no such folder"),
        ("empty", "empty: no run folder"),
        ("file", "file: no run folder"),
        ("runs", "there are some in demo"),
    ):
        with pytest.raises(ConfigError, match=reason):
            status(tmp_path / run)
        result = command(tmp_path / run)
        assert (result.exit_code, result.stdout) == (2, "")
        assert len(result.stderr.splitlines()) == 1


def test_the_command_prints_three_formats(tmp_path):
    finish(tmp_path / "score", "score")
    with locked(begin(tmp_path / "mix", "mix")):
        text = command(tmp_path)
        table = list(csv.DictReader(io.StringIO(command(tmp_path, "--format", "csv").stdout)))
        values = json.loads(command(tmp_path, "--format", "json").stdout)
    assert text.exit_code == 0
    assert f"running as pid {os.getpid()}" in text.stdout
    assert "17 rows, 1 with errors" in text.stdout
    assert [row["state"] for row in table] == ["done", "running", "not begun", "not begun", "not begun"]
    assert [row["step"] for row in values] == [row["step"] for row in table]
    assert (values[0]["done"], values[0]["planned"], values[0]["wall_seconds"]) == (17, 17, 12.5)
    assert values[0]["touched"].endswith("+00:00")
    assert f"next: birbal train --mix {tmp_path}/mix" not in text.stdout


def test_nothing_heavy_is_imported(tmp_path):
    begin_scoring(tmp_path / "score")
    code = (
        "import sys\nfrom birbal_ray.cli.main import main\n"
        f"try:\n    main(['status', {str(tmp_path)!r}])\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('ray', 'torch', 'transformers', 'datasets', 'optuna', 'vllm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
