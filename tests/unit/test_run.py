"""Run folders, on a disk and in object storage: nothing destroyed, nothing half-finished read as complete."""

from __future__ import annotations

import errno
import json
import os
import time

import pytest

from birbal_ray.manifest import check_input, read_manifest
from birbal_ray.run import RunMismatchError, Step, open_run
from birbal_ray.settings import ConfigError
from birbal_ray.storage import Folder, RunError, open_folder
from tests.fixtures.s3_server import BUCKET

OWNS = ("rows/*/*.parquet", "tasks.parquet")
SCORE = Step("score", OWNS)
IDENTITY = {"config": {"seed": 1, "model": "a"}}


def finished(folder, identity=IDENTITY, step="score", names=("rows/a/0.parquet", "tasks.parquet")):
    """A finished run; gives its manifest."""
    with open_run(folder, Step(step, OWNS), identity) as opened:
        records = {name: folder.write_bytes(name, name.encode()) for name in names}
        return opened.finish({"rows": 3}, records, summary="3 rows")


def contents(folder):
    return {name: folder.read_bytes(name) for name in folder.files(hidden=True) if "lock" not in name}


def test_a_run_goes_from_its_record_through_progress_to_its_manifest(folder):
    with open_run(folder, SCORE, IDENTITY) as opened:
        assert (opened.resumed, opened.manifest, opened.files) == (False, None, {})
        assert folder.read_json("run.json")["identity"] == IDENTITY
        opened.progress(1, 4, text="1 of 4 rows", rate_per_second=2.0)
        opened.progress(2, 4)  # too soon
        opened.progress(4, 4, text="4 of 4 rows", final=True)
        seen = folder.read_json("progress.json")
        assert (seen["done"], seen["total"], seen["text"]) == (4, 4, "4 of 4 rows")
        assert 0 <= seen["wall_seconds"] < 60 and seen["started_at"] <= seen["updated_at"] <= time.time()
        opened.session({"prompts": 4})
        record = folder.write_bytes("rows/a/0.parquet", b"rows")
        folder.write_bytes("tasks.parquet", b"tasks")
        with pytest.raises(FileNotFoundError):
            opened.finish({}, ["absent"], summary="")
        assert "manifest.json" not in folder.files()
        opened.finish({"rows": 4}, ["tasks.parquet"], summary="4 rows")
        manifest = opened.finish({"rows": 4}, {"rows/a/0.parquet": record}, summary="4 rows")
    assert manifest == read_manifest(folder, "score") == json.loads(folder.read_text("manifest.json"))
    assert (manifest["step"], manifest["rows"], manifest["summary"]) == ("score", 4, "4 rows")
    assert manifest["files"] == {"rows/a/0.parquet": {"sha256": record.sha256, "size": 4}}
    assert manifest["packages"]["pyarrow"] and manifest["wall_seconds"] >= 0
    with open_run(folder, SCORE, IDENTITY) as opened:
        assert (opened.resumed, opened.manifest) == (True, manifest)
        assert opened.files["rows/a/0.parquet"].size == 4
        opened.session({"prompts": 0})
        assert opened.sessions() == [{"prompts": 4}, {"prompts": 0}]
        opened.withdraw()
    with pytest.raises(RunError, match="unfinished `birbal score` run"):
        read_manifest(folder, "score")


def test_wall_seconds_are_those_of_all_sessions(folder, monkeypatch):
    with open_run(folder, SCORE, IDENTITY) as opened:
        opened._clock_start -= 100
        monkeypatch.setattr("time.time", lambda: 1e6)  # the machine's clock is set; no budget pays for that
        opened.progress(1, 2, final=True)
    with open_run(folder, SCORE, IDENTITY) as opened:
        assert 100 <= opened.wall_seconds < 160


def test_what_ended_a_session_is_recorded(folder):
    with pytest.raises(RunError), open_run(folder, Step("train"), {}) as opened:
        opened.progress(3, 9, text="step 3 of 9", final=True)
        raise RunError("the card\nran out of memory")
    seen = folder.read_json("progress.json")
    assert (seen["error"], seen["done"], seen["text"]) == ("the card ran out of memory", 3, "step 3 of 9")


def test_changed_identity_is_refused_with_the_difference(folder):
    finished(folder)
    before = contents(folder)
    with (
        pytest.raises(RunMismatchError) as caught,
        open_run(folder, SCORE, {"config": {"seed": 2, "model": "a"}}),
    ):
        pass
    assert caught.value.differences == ["config.seed: 1 → 2"]
    assert "--overwrite" in str(caught.value)
    assert contents(folder) == before


def test_overwrite_deletes_a_finished_run_and_continues_an_unfinished_one(folder):
    finished(folder)
    with open_run(folder, SCORE, IDENTITY, overwrite=True) as opened:
        assert (opened.resumed, opened.manifest, opened.files) == (False, None, {})
        assert contents(folder).keys() == {"run.json"}
        folder.write_bytes("tasks.parquet", b"1")
    with open_run(folder, SCORE, IDENTITY, overwrite=True) as opened:
        assert opened.resumed, "the same command, stopped and called again, loses nothing"
        assert "tasks.parquet" in opened.files
    with open_run(folder, SCORE, {"other": 1}, overwrite=True) as opened:
        assert not opened.resumed and contents(folder).keys() == {"run.json"}
    folder.write_bytes("run.json", b"{")
    with open_run(folder, SCORE, IDENTITY, overwrite=True) as opened:
        assert not opened.resumed and folder.read_json("run.json")["identity"] == IDENTITY


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_inputs_folder_is_refused(folder, overwrite):
    scores = folder.subfolder("runs").subfolder("score")
    finished(scores)
    before = contents(folder)
    for output, word in ((scores, "is"), (folder.subfolder("runs"), "holds"), (folder, "holds")):
        message = f"this folder {word} an input"
        with (
            pytest.raises(ConfigError, match=message),
            open_run(output.place, Step("mix", ("*",)), {}, overwrite=overwrite, inputs=[scores.place, "org/model"]),
        ):
            pass
    assert contents(folder) == before
    with open_run(folder.subfolder("runs/score-2"), Step("mix", ("*",)), {}, inputs=[scores.place]):
        pass


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "spelled",
    ["~/runs/mix/train.jsonl", "runs/../runs/mix/train.jsonl", "runs/mix/linked.jsonl", "other/train.jsonl", "~/runs/"],
)
def test_an_input_is_seen_in_the_output_however_it_is_spelled(tmp_path, monkeypatch, spelled, overwrite):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    finished(mix := open_folder("~/runs/mix"), step="mix", names=("train.jsonl", "linked.jsonl"))
    (tmp_path / "elsewhere.jsonl").write_bytes(b"mine")
    (mix.local / "linked.jsonl").unlink()
    (mix.local / "linked.jsonl").symlink_to(tmp_path / "elsewhere.jsonl")
    (tmp_path / "other").symlink_to(mix.local)
    before = contents(mix)
    for output in ("~/runs/mix", "runs/./mix/", "other"):
        with (
            pytest.raises(ConfigError, match=r"this folder (is|holds) an input .*; choose another --output"),
            open_run(
                "~/runs" if spelled == "~/runs/" else output,
                Step("mix", OWNS),
                {},
                overwrite=overwrite,
                inputs=[spelled],
            ),
        ):
            pass
    assert contents(mix) == before and (mix.local / "linked.jsonl").is_symlink()


@pytest.mark.parametrize("overwrite", [False, True])
def test_another_steps_run_is_refused(folder, overwrite):
    finished(folder, step="train")
    before = contents(folder)
    message = "holds the output of `birbal train`, not of `birbal score`; choose another --output"
    with (
        pytest.raises(ConfigError, match=message),
        open_run(folder, Step("score", ("*",)), IDENTITY, overwrite=overwrite),
    ):
        pass
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["notes.txt", "rows/notes.txt", "sub/run.json", "rows.parquet"])
def test_files_that_the_step_did_not_make_are_never_deleted(folder, name):
    finished(folder)
    folder.write_bytes(name, b"mine")
    before = contents(folder)
    with (
        pytest.raises(ConfigError, match=rf"--overwrite deletes nothing here.*\(first: {name}\)"),
        open_run(folder, SCORE, IDENTITY, overwrite=True),
    ):
        pass
    assert contents(folder) == before
    with open_run(folder, SCORE, IDENTITY) as opened:  # without it nothing would be deleted
        assert opened.manifest


def test_hidden_files_of_others_are_left_alone(folder):
    finished(folder)
    folder.write_bytes(".git/config", b"mine")
    with open_run(folder, SCORE, IDENTITY, overwrite=True):
        assert folder.read_bytes(".git/config") == b"mine"


def test_a_strangers_folder_is_not_touched(folder):
    folder.write_bytes("thesis.txt", b"mine")
    message = r"not empty and not a birbal run.*thesis\.txt"
    with pytest.raises(ConfigError, match=message), open_run(folder, Step("score", ("*",)), {}, overwrite=True):
        pass
    assert contents(folder) == {"thesis.txt": b"mine"}


def test_a_finished_run_that_lost_or_changed_a_file_is_made_again(folder, capsys):
    finished(folder)
    for spoil, reason in (
        (lambda: folder.delete(["tasks.parquet"]), "tasks.parquet is missing"),
        (lambda: folder.write_bytes("tasks.parquet", b""), "tasks.parquet has 0 bytes, not 13"),
        (lambda: folder.write_bytes("manifest.json", b"{}"), "files"),
        (lambda: folder.write_bytes("manifest.json", b"{half"), "not valid JSON"),
    ):
        finished(folder)
        spoil()
        if "manifest" not in reason and "JSON" not in reason and reason != "files":
            with pytest.raises(RunError, match=reason):
                read_manifest(folder, "score")
        with open_run(folder, SCORE, IDENTITY) as opened:
            assert (opened.resumed, opened.manifest) == (True, None)
            assert "manifest.json" not in folder.files()
        assert reason in capsys.readouterr().err


def test_an_input_that_was_edited_is_refused(folder):
    manifest = finished(folder)
    check_input(folder, manifest, ["tasks.parquet", "rows/a/0.parquet"])
    folder.write_bytes("tasks.parquet", b"tasks.parqueT")
    read_manifest(folder, "score")  # the sizes are right
    with pytest.raises(RunError, match=r"tasks\.parquet: edited since its run finished") as caught:
        check_input(folder, manifest, ["rows/a/0.parquet", "tasks.parquet"])
    assert "\n" not in str(caught.value)
    folder.delete(["tasks.parquet"])
    with pytest.raises(RunError, match=r"tasks\.parquet: missing"):
        check_input(folder, manifest, ["tasks.parquet"])


def test_manifests_that_are_not_a_steps_finished_run_are_refused(folder):
    with pytest.raises(ConfigError, match="no such folder"):
        read_manifest(folder, "score")
    folder.write_bytes("x", b"")
    with pytest.raises(ConfigError, match=r"no manifest\.json here"):
        read_manifest(folder, "score")
    folder.delete(["x"])
    finished(folder)
    with pytest.raises(ConfigError, match="the output of `birbal score`, expected that of `birbal mix`"):
        read_manifest(folder, "mix")
    folder.write_bytes("manifest.json", b"[1]")
    with pytest.raises(RunError, match="expected a JSON object, found list"):
        read_manifest(folder, "score")
    folder.write_bytes("manifest.json", b"{half")
    with pytest.raises(RunError, match="not valid JSON"):
        read_manifest(folder, "score")


OLD = {"step": "mix", "identity": {"seed": 1}, "identity_hash": "0" * 64}


@pytest.mark.parametrize(
    "files",
    [
        {"train.parquet": "4e388ab32b10dc8dbc7e28144f552830adc74787c1e2c0824032078a79f227fb"},  # a mix: name → sha256
        {"quarantined": [], "excluded": []},  # score: counts
        None,  # training: none
    ],
)
def test_folders_of_the_previous_version_are_refused(folder, files):
    folder.write_json("run.json", OLD)
    folder.write_json("manifest.json", {**OLD, "rows": {"kept": 3}, **({} if files is None else {"files": files})})
    folder.write_bytes("train.parquet", b"rows")
    before = contents(folder)
    with pytest.raises(RunError, match=r"another version of birbal_ray made this run.*run `birbal mix` again"):
        read_manifest(folder, "mix")
    message = "another version of birbal_ray made this run.*choose another --output"
    with pytest.raises(ConfigError, match=message) as caught, open_run(folder, Step("mix", OWNS), {"seed": 1}):
        pass
    assert "\n" not in str(caught.value)
    assert contents(folder) == before


def test_temporary_files_of_killed_processes_are_cleared_and_others_are_not(tmp_path):
    folder = open_folder(tmp_path)
    (tmp_path / ".tmp-1-2-run.json").write_text("{")
    with open_run(folder, SCORE, IDENTITY):
        folder.write_bytes("rows/a/.tmp-1-2-0.parquet", b"half")
        folder.write_bytes(".tmp-1-2-tasks.parquet", b"half")
        (tmp_path / ".tmp-mine").mkdir()  # no name that a writer of ours gives
    with open_run(folder, SCORE, IDENTITY) as opened:
        assert opened.resumed
        assert set(folder.files(hidden=True)) == {"run.json", ".lock", ".lock.json"}
        assert (tmp_path / ".tmp-mine").exists()


def test_temporary_names_are_nobodys_where_no_run_was_begun(tmp_path):
    (tmp_path / ".tmp-thesis").mkdir()
    (tmp_path / ".tmp-thesis" / "chapter.txt").write_text("mine")
    (tmp_path / ".tmp-notes").write_text("mine")
    (tmp_path / ".tmp-1-2-.lock.json").write_text("{")
    for overwrite in (False, True):
        message = r"not a birbal run.*holds \.tmp-notes, \.tmp-thesis\)"
        with (
            pytest.raises(ConfigError, match=message),
            open_run(tmp_path, Step("score", ("*",)), {}, overwrite=overwrite),
        ):
            pass
    assert (tmp_path / ".tmp-thesis" / "chapter.txt").read_text() == (tmp_path / ".tmp-notes").read_text() == "mine"


def test_overwrite_deletes_nothing_behind_a_link(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "a.parquet").write_bytes(b"mine")
    folder = open_folder(tmp_path / "run")
    with open_run(folder, Step("score", ("*.parquet", "rows/*")), IDENTITY):
        folder.write_bytes("rows/a.parquet", b"ours")
    (folder.local / "link").symlink_to(outside)
    (folder.local / "rows" / "link").symlink_to(outside)
    with (
        pytest.raises(ConfigError, match=r"--overwrite deletes nothing here.*link/a\.parquet"),
        open_run(folder, Step("score", ("*.parquet", "rows/*")), {"other": 1}, overwrite=True),
    ):
        pass
    assert (outside / "a.parquet").read_bytes() == b"mine"
    assert folder.read_bytes("rows/a.parquet") == b"ours"


def test_a_pattern_without_a_folder_owns_no_file_in_one(tmp_path):
    folder = open_folder(tmp_path)
    with open_run(folder, Step("merge", ("*.json", "*.txt")), IDENTITY):
        folder.write_bytes("config.json", b"{}")
    for name in ("harness/run.json", "notes/todo.txt"):  # another step's run, a user's notes
        folder.write_bytes(name, b"{}")
    with (
        pytest.raises(ConfigError, match=r"holds 2 file\(s\) that `birbal merge` did not make \(first: harness/run"),
        open_run(folder, Step("merge", ("*.json", "*.txt")), {"other": 1}, overwrite=True),
    ):
        pass
    assert folder.is_file("config.json")
    assert folder.is_file("notes/todo.txt")


def test_a_run_of_an_earlier_layout_is_refused_with_what_differs_and_what_to_do(folder):
    finished(folder, {"settings": {"seed": 1, "retired": True}, "packages": {"ray": "2"}})
    before = contents(folder)
    with (
        pytest.raises(RunMismatchError) as caught,
        open_run(folder, SCORE, {"settings": {"seed": 1, "later": 0}, "packages": {"ray": "2"}}),
    ):
        pass
    assert caught.value.differences == ["settings.later: (none) → 0", "settings.retired: True → (none)"]
    assert str(caught.value).splitlines()[-1].startswith("Choose another --output, ")
    assert contents(folder) == before


@pytest.mark.parametrize("edited", [{}, {"config": 3}, {"config": "mine"}, {"config": []}, {"config": {"seed": {}}}])
def test_an_identity_that_was_edited_is_another_one(tmp_path, edited):
    with open_run(tmp_path, SCORE, edited):
        pass
    with pytest.raises(RunMismatchError), open_run(tmp_path, SCORE, IDENTITY):
        pass


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["run.json", "manifest.json", "progress.json"])
def test_a_store_that_fails_is_not_taken_for_damage(tmp_path, monkeypatch, name, overwrite):
    folder = open_folder(tmp_path / "run")
    finished(folder)
    if name == "progress.json":
        folder.delete(["manifest.json"])
        folder.write_json(name, {"wall_seconds": 5.0})
    before, read = contents(folder), Folder.read_bytes

    def failing(self, asked):
        if asked == name:
            raise RunError(f"{self.at(asked)}: connection reset; check the bucket")
        return read(self, asked)

    with (
        monkeypatch.context() as patch,
        pytest.raises(RunError, match=r"check the bucket$"),  # and no advice to delete anything
    ):
        patch.setattr(Folder, "read_bytes", failing)
        with open_run(folder, SCORE, IDENTITY, overwrite=overwrite):
            pass
    assert contents(folder) == before


def test_an_unfinished_run_that_starts_over_makes_room_for_other_settings(folder):
    mix = Step("mix", ("tasks.parquet",), starts_over=True)
    with open_run(folder, mix, IDENTITY):
        folder.write_bytes("tasks.parquet", b"half")
        folder.write_bytes("notes.txt", b"mine")
    with open_run(folder, mix, {"other": 1}) as opened:
        assert not opened.resumed and folder.read_json("run.json")["identity"] == {"other": 1}
        assert folder.files().keys() == {"run.json", "notes.txt"}
        opened.finish({}, {}, summary="")
    before = contents(folder)
    with pytest.raises(RunMismatchError), open_run(folder, mix, IDENTITY):
        pass
    with (
        pytest.raises(ConfigError, match="holds the output of `birbal mix`"),
        open_run(folder, Step("score", ("*",), starts_over=True), {}),
    ):
        pass
    assert contents(folder) == before


def test_another_steps_run_is_refused_where_its_record_is_damaged(tmp_path):
    folder = open_folder(tmp_path / "run")
    finished(folder, step="train", names=("adapter/weights",))
    folder.write_bytes("run.json", b"{")
    before = contents(folder)
    for overwrite in (False, True):
        with (
            pytest.raises(ConfigError, match="holds the output of `birbal train`, not of `birbal mix`"),
            open_run(folder, Step("mix", ("*",)), IDENTITY, overwrite=overwrite),
        ):
            pass
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["my-notes.json", "logs/what I did.md", "sessions/notes.txt"])
def test_a_finished_runs_own_list_says_what_it_made(tmp_path, name):
    folder = open_folder(tmp_path / "run")
    owns = ("*.json", "rows/*/*.parquet", "tasks.parquet")  # of a step whose files' names come from elsewhere
    finished(folder)
    folder.write_bytes(name, b"mine")
    with (
        pytest.raises(ConfigError, match=f"--overwrite deletes nothing here.*first: {name}"),
        open_run(folder, Step("score", owns), IDENTITY, overwrite=True),
    ):
        pass
    assert folder.read_bytes(name) == b"mine"


def test_a_run_of_a_later_version_is_left_to_it(tmp_path):
    folder = open_folder(tmp_path / "run")
    finished(folder)
    for name in ("run.json", "manifest.json"):
        folder.write_json(name, {**folder.read_json(name), "format": 3})
    before = contents(folder)
    with pytest.raises(RunError, match="another version of birbal_ray made this run"):
        read_manifest(folder, "score")
    with (
        pytest.raises(ConfigError, match="another version of birbal_ray made this run"),
        open_run(folder, SCORE, IDENTITY),
    ):
        pass
    assert contents(folder) == before


def test_a_file_is_no_run_folder(tmp_path):
    (tmp_path / "notes").write_text("mine")
    with (
        pytest.raises(ConfigError, match="notes: is a file, expected a folder"),
        open_run(tmp_path / "notes", Step("score"), {}),
    ):
        pass
    assert (tmp_path / "notes").read_text() == "mine"


def test_a_full_disk_names_the_folder_and_what_to_do(tmp_path):
    with (
        pytest.raises(
            RunError, match=r"run: \[Errno 28\] No space left on device; make room on the disk: .* continues$"
        ),
        open_run(tmp_path / "run", Step("score"), {}),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert "No space left" in open_folder(tmp_path / "run").read_json("progress.json")["error"]


@pytest.mark.parametrize("ends", [KeyboardInterrupt(), ValueError("half a file")])
def test_whatever_ends_a_run_whose_lock_is_lost_the_lock_is_the_reason(s3, ends):
    with (
        pytest.raises(RunError, match="another run took this folder over"),
        open_run(f"s3://{BUCKET}/lost-{type(ends).__name__}", Step("score"), {}) as opened,
    ):
        opened.folder.guard.lost = "another run took this folder over"
        raise ends
