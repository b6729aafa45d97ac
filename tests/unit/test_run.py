"""Run folders: nothing half-written is read as whole, nothing is mixed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from birbal_ray import run
from birbal_ray.settings import ConfigError


def test_atomic_write_leaves_no_temporary_file(tmp_path):
    run.write_atomic(tmp_path / "a" / "f.txt", b"one")
    run.write_atomic(tmp_path / "a" / "f.txt", b"two")
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["f.txt"]
    assert (tmp_path / "a" / "f.txt").read_bytes() == b"two"


def test_killed_while_writing_keeps_the_old_content(tmp_path):
    target = tmp_path / "f.bin"
    target.write_bytes(b"old")
    code = (
        "import os, sys, pathlib\nfrom birbal_ray import run\n"
        "os.fsync = lambda descriptor: os.kill(os.getpid(), 9)\n"  # dies between writing and renaming
        "run.write_atomic(pathlib.Path(sys.argv[1]), b'new' * 1000)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(target)]).returncode == -9
    assert target.read_bytes() == b"old"


def test_changed_identity_is_refused_with_the_difference(tmp_path):
    assert run.start_run(tmp_path, "score", {"config": {"seed": 1, "model": "a"}}) is False
    assert run.start_run(tmp_path, "score", {"config": {"seed": 1, "model": "a"}}) is True
    with pytest.raises(run.RunMismatchError) as caught:
        run.start_run(tmp_path, "score", {"config": {"seed": 2, "model": "a"}})
    assert caught.value.differences == ["config.seed: 1 → 2"]
    assert "--overwrite" in str(caught.value)
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "x").write_text("old")
    assert run.start_run(tmp_path, "score", {"config": {"seed": 2}}, overwrite=True) is False
    assert not (tmp_path / "rows").exists()


def test_overwrite_starts_a_finished_run_anew_and_an_unfinished_one_goes_on(tmp_path):
    run.start_run(tmp_path, "score", {"a": 1})
    (tmp_path / "old").write_text("x")
    assert run.start_run(tmp_path, "score", {"a": 1}, overwrite=True) is True
    assert (tmp_path / "old").exists(), "the same command, stopped and called again, loses nothing"
    (tmp_path / "manifest.json").write_text("{}")
    assert run.start_run(tmp_path, "score", {"a": 1}, overwrite=True) is False
    assert sorted(file.name for file in tmp_path.iterdir()) == ["run.json"]
    (tmp_path / "run.json").write_text("{")
    assert run.start_run(tmp_path, "score", {"a": 1}, overwrite=True) is False
    assert sorted(file.name for file in tmp_path.iterdir()) == ["run.json"]


def test_killed_before_its_first_file_was_named(tmp_path):
    (tmp_path / ".tmp-1-2-run.json").write_text("{")
    assert run.start_run(tmp_path, "score", {"a": 1}) is False
    assert sorted(file.name for file in tmp_path.iterdir()) == ["run.json"]


def test_a_strangers_folder_is_not_touched(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"not empty and not a birbal run.*thesis\.txt"):
        run.start_run(tmp_path, "score", {}, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_temporary_names_are_nobodys_where_no_run_was_begun(tmp_path):
    (tmp_path / ".tmp-thesis").mkdir()
    (tmp_path / ".tmp-thesis" / "chapter.txt").write_text("mine")
    (tmp_path / ".tmp-notes").write_text("mine")
    (tmp_path / ".tmp-1-2-.lock.json").write_text("{")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=r"not a birbal run.*holds \.tmp-notes, \.tmp-thesis\)"):
            run.start_run(tmp_path, "score", {}, overwrite=overwrite)
    assert (tmp_path / ".tmp-thesis" / "chapter.txt").read_text() == (tmp_path / ".tmp-notes").read_text() == "mine"


def test_temporary_names_in_a_run_folder_are_cleared(tmp_path):
    run.start_run(tmp_path, "score", {"a": 1})
    (tmp_path / ".tmp-adapter").mkdir()
    (tmp_path / ".tmp-1-2-tasks.parquet").write_text("half")
    assert run.start_run(tmp_path, "score", {"a": 1}) is True
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]


def test_manifest_of_an_unfinished_or_other_run_is_refused(tmp_path):
    with pytest.raises(run.RunError, match="no such folder"):
        run.read_manifest(tmp_path / "absent", "score")
    with pytest.raises(run.RunError, match=r"no manifest\.json here"):
        run.read_manifest(tmp_path, "score")
    run.start_run(tmp_path, "score", {"config": {}})
    with pytest.raises(run.RunError, match="unfinished `birbal score` run"):
        run.read_manifest(tmp_path, "score")
    run.finish_run(tmp_path, {"rows": 3})
    manifest = run.read_manifest(tmp_path, "score")
    assert manifest["rows"] == 3
    assert manifest["packages"]["pyarrow"]
    with pytest.raises(run.RunError, match="the output of `birbal score`, expected that of `birbal mix`"):
        run.read_manifest(tmp_path, "mix")
    (tmp_path / "manifest.json").write_text("{half")
    with pytest.raises(run.RunError, match="not valid JSON"):
        run.read_manifest(tmp_path, "score")


def test_lock_names_its_holder_and_falls_with_the_process(tmp_path):
    code = (
        "import sys, time, pathlib\nfrom birbal_ray import run\n"
        "with run.locked(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(run.RunError, match=f"another run is writing here \\(pid {holder.pid} on"), run.locked(tmp_path):
        pass
    holder.kill()
    holder.wait()
    for _ in range(50):
        try:
            with run.locked(tmp_path):
                held = json.loads((tmp_path / ".lock.json").read_text())
            break
        except run.RunError:
            time.sleep(0.1)
    assert held["pid"] == os.getpid()
