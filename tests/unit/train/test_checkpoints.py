import os
import threading
import time

import pytest

from birbal_ray import storage
from birbal_ray.storage import RunError, open_folder
from birbal_ray.train import checkpoints
from birbal_ray.train.checkpoints import Remote, all_checkpoints, finish_checkpoint, latest_checkpoint, remove_old
from tests.fixtures.s3_server import BUCKET, s3_proxy


def write(folder, step, text="x"):
    written = folder / ".work" / f"checkpoint-{step}"
    written.mkdir(parents=True)
    (written / "optimizer.pt").write_text(text)
    return finish_checkpoint(written, folder)


def test_latest_is_by_number_and_unfinished_ones_do_not_count(tmp_path):
    assert latest_checkpoint(tmp_path / "none") is None
    for step in (8, 64, 128, 1_000_000):
        write(tmp_path, step)
    (tmp_path / ".work" / "checkpoint-2000000").mkdir()
    (tmp_path / ".old-step-3000000").mkdir()
    assert latest_checkpoint(tmp_path).name == "step-1000000"
    assert [p.name for p in all_checkpoints(tmp_path)] == ["step-000008", "step-000064", "step-000128", "step-1000000"]


def test_the_same_step_again_replaces_it(tmp_path):
    write(tmp_path, 8, "first")
    again = write(tmp_path, 8, "second")
    assert (again / "optimizer.pt").read_text() == "second"
    assert len(all_checkpoints(tmp_path)) == 1


def test_remove_old_keeps_the_latest(tmp_path):
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    remove_old(tmp_path, 2)
    assert [p.name for p in all_checkpoints(tmp_path)] == ["step-000003", "step-000004"]
    assert not list(tmp_path.glob(".old-*"))


def test_pruning_at_a_url_goes_by_its_own_records(folder, tmp_path):
    """A checkpoint or adapter that is still being uploaded supersedes nothing; an outage stops nothing."""
    for name in ("step-000003", "step-000006", "step-000009"):
        for file in ("optimizer.pt", "files.json"):
            folder.write_bytes(f"checkpoints/{name}/{file}", b"{}")
    folder.delete(["checkpoints/step-000009/files.json"])
    for name in ("step-000004", "step-000008"):
        folder.write_bytes(f"best/{name}/adapter_model.safetensors", b"")
    folder.write_json("best.json", {"folder": "best/step-000004"})
    remote = Remote(folder, tmp_path)
    remote.prune(keep=1)
    assert {name.split("/")[1] for name in folder.files("checkpoints")} == {"step-000006", "step-000009"}
    assert {name.split("/")[1] for name in folder.files("best")} == {"step-000004", "step-000008"}
    folder.write_json("best.json", {"folder": "best/step-000008"})
    remote.prune(keep=1)
    assert {name.split("/")[1] for name in folder.files("best")} == {"step-000008"}


def test_an_outage_of_the_store_does_not_end_the_training(tmp_path):
    class Unreachable:
        place = "s3://bucket/run"

        def files(self, under):
            raise RunError("s3://bucket/run: can't be reached")

        def is_file(self, name):
            raise RunError("s3://bucket/run: can't be reached")

    remote = Remote(Unreachable(), tmp_path)
    remote.prune(keep=1)
    assert not remote.stop_requested()


def test_uploads_go_up_in_order_the_marker_last(folder, tmp_path):
    working = tmp_path / "working"
    for number, name in enumerate(["z.bin", "a/b.bin", "files.json"]):
        (working / "step-1" / name).parent.mkdir(parents=True, exist_ok=True)
        (working / "step-1" / name).write_bytes(name.encode())
        os.utime(working / "step-1" / name, (number, number))
    (working / "metrics.jsonl").write_text("1\n")
    seen: list[str] = []
    upload = type(folder).upload

    class Watched(type(folder)):
        __slots__ = ()

        def upload(self, file, name):
            seen.append(name)
            return upload(self, file, name)

    with Remote(Watched(folder.place, folder.filesystem, folder.root), working) as remote:
        remote.add("step-1", "absent", "metrics.jsonl")
        while not folder.is_file("metrics.jsonl"):
            time.sleep(0.01)
        (working / "metrics.jsonl").write_text("1\n2\n")
        remote.add("metrics.jsonl")
        remote.add("step-1")
    assert seen == ["step-1/z.bin", "step-1/a/b.bin", "step-1/files.json", "metrics.jsonl", "metrics.jsonl"]
    assert folder.read_text("metrics.jsonl") == "1\n2\n"


def test_uploads_go_on_through_an_outage_and_what_never_went_up_is_said(s3, monkeypatch, tmp_path, capsys):
    away = threading.Event()
    away.set()
    monkeypatch.setattr(storage, "RETRY_SECONDS", 0.05)
    monkeypatch.setattr(checkpoints, "FIRST_RETRY_SECONDS", 0.05)
    (tmp_path / "a").write_text("a")
    with s3_proxy(s3, lambda method, path: None if away.is_set() else 0.0) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server["AWS_ENDPOINT_URL"])
        folder = open_folder(f"s3://{BUCKET}/uploads")
        with Remote(folder, tmp_path) as remote:
            remote.add("a")
            while not remote._failed:
                time.sleep(0.01)
            assert "tried again" in capsys.readouterr().err
            away.clear()
            while not folder.is_file("a"):
                time.sleep(0.01)
        assert folder.read_text("a") == "a"
        (tmp_path / "b").write_text("b")
        away.set()
        message = rf"1 file\(s\) are not uploaded \(first: b: .*kept in {tmp_path}"
        with pytest.raises(RunError, match=message), Remote(folder, tmp_path) as remote:
            remote.add("b")


def test_a_working_folder_that_is_the_run_folder_needs_no_upload(tmp_path):
    (tmp_path / "a").write_text("a")
    with Remote(open_folder(tmp_path), tmp_path) as remote:
        remote.add("a")
    assert (tmp_path / "a").read_text() == "a"


def test_an_upload_that_fails_as_nobody_expects_ends_the_run(s3, tmp_path):
    folder = open_folder(f"s3://{BUCKET}/unexpected")

    class Broken(storage.Folder):
        def upload(self, source, name):
            raise ValueError("no such thing")

    (tmp_path / "step").mkdir()
    (tmp_path / "step" / "optimizer.pt").write_text("x")
    broken = Broken(folder.place, folder.filesystem, folder.root)
    message = r"1 file\(s\) are not uploaded \(first: step: no such thing\)"
    with pytest.raises(RunError, match=message), Remote(broken, tmp_path) as remote:
        remote.add("step")
