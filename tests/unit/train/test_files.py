import json
import os
import threading
import time

import pytest

from birbal_ray import storage, stores
from birbal_ray.storage import RunError, open_folder
from birbal_ray.train import files
from birbal_ray.train.files import Remote, all_checkpoints, finish_checkpoint, latest_checkpoint, remove_old
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


def test_pruning_at_a_url_goes_by_its_own_records(s3, tmp_path):
    """A checkpoint or adapter that is still being uploaded supersedes nothing; an outage stops nothing."""
    folder = open_folder(f"s3://{BUCKET}/{tmp_path.name}")
    for name in ("step-000003", "step-000006", "step-000009"):
        for file in ("optimizer.pt", "files.json"):
            folder.write_bytes(f"checkpoints/{name}/{file}", b"{}")
    folder.delete(["checkpoints/step-000009/files.json"])
    for name in ("step-000004", "step-000008"):
        folder.write_bytes(f"best/{name}/adapter_model.safetensors", b"")
    folder.write_json("best.json", {"folder": "best/step-000004"})
    with Remote(folder, tmp_path) as remote:
        remote.prune(keep=1)
    assert {name.split("/")[1] for name in folder.files("checkpoints")} == {"step-000006", "step-000009"}
    assert {name.split("/")[1] for name in folder.files("best")} == {"step-000004", "step-000008"}
    folder.write_json("best.json", {"folder": "best/step-000008"})
    with Remote(folder, tmp_path) as remote:
        remote.prune(keep=1)
    assert {name.split("/")[1] for name in folder.files("best")} == {"step-000008"}


def test_an_outage_of_the_store_neither_ends_nor_holds_up_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "STOP_POLL_SECONDS", 0.01)
    asked, answer = threading.Event(), threading.Event()

    class Unreachable:
        place = "s3://bucket/run"

        def files(self, under):
            raise RunError("s3://bucket/run: can't be reached")

        def is_file(self, name):
            asked.set()
            answer.wait(60)
            raise RunError("s3://bucket/run: can't be reached")

    with Remote(Unreachable(), tmp_path) as remote:
        remote.prune(keep=1)
        assert asked.wait(60)
        assert not remote.stop_requested(), "while the store has not answered"
        answer.set()


def test_the_worker_hears_of_a_stop_at_a_url(s3, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "STOP_POLL_SECONDS", 0.01)
    folder = open_folder(f"s3://{BUCKET}/{tmp_path.name}")
    with Remote(folder, tmp_path) as remote:
        assert not remote.stop_requested()
        folder.write_bytes("stop", b"")
        while not remote.stop_requested():
            time.sleep(0.01)


def state(working, step, elapsed, best=None):
    """What a session leaves in its folder: a checkpoint, its clock, the best adapter."""
    if step:
        write(working / "checkpoints", step)
    working.mkdir(exist_ok=True)
    (working / "clock.json").write_text(json.dumps({"elapsed_seconds": elapsed}))
    if best:
        folder = working / "best" / f"step-{best:06d}"
        folder.mkdir(parents=True)
        (folder / "adapter_model.safetensors").write_text(str(best))
        (working / "best.json").write_text(json.dumps({"folder": f"best/{folder.name}"}))


def test_a_session_uploads_what_an_earlier_one_here_could_not(s3, tmp_path):
    folder = open_folder(f"s3://{BUCKET}/{tmp_path.name}")
    state(tmp_path, 8, 10.0, best=8)
    folder.write_bytes("best/step-000008/adapter_model.safetensors", b"8")
    before = folder.stat("best/step-000008/adapter_model.safetensors")
    with Remote(folder, tmp_path) as remote:
        remote.add_leftovers()
    assert {"checkpoints/step-000008/files.json", "clock.json", "best.json"} <= folder.files().keys()
    assert folder.stat("best/step-000008/adapter_model.safetensors") == before, "not again what is there"


@pytest.mark.parametrize(
    ("here", "there", "kept"),
    [
        ((16, 20.0), (8, 30.0), "here"),  # an outage kept the later checkpoint from being uploaded
        ((8, 20.0), (8, 10.0), "here"),
        ((8, 20.0), (8, 30.0), "there"),  # a session on another machine, killed before its next checkpoint
        ((8, 20.0), (16, 30.0), "there"),
        ((0, 0.0), (0, 5.0), "there"),
    ],
)
def test_a_continuation_takes_the_state_that_got_further(s3, tmp_path, here, there, kept):
    folder = open_folder(f"s3://{BUCKET}/{tmp_path.name}")
    state(tmp_path / "working", *here, best=4)
    state(tmp_path / "other", *there, best=6)
    with Remote(folder, tmp_path / "other") as remote:
        remote.add_leftovers()
    files.download_state(folder, tmp_path / "working")
    step, elapsed = here if kept == "here" else there
    latest = latest_checkpoint(tmp_path / "working" / "checkpoints")
    assert (latest.name if latest else None) == (f"step-{step:06d}" if step else None)
    assert json.loads((tmp_path / "working" / "clock.json").read_text()) == {"elapsed_seconds": elapsed}
    best = json.loads((tmp_path / "working" / "best.json").read_text())["folder"]
    assert best == f"best/step-00000{4 if kept == 'here' else 6}"
    assert [one.name for one in (tmp_path / "working" / "best").iterdir()] == [best.removeprefix("best/")]


def test_at_its_end_a_session_rides_out_an_outage_once_not_for_each_file(s3, tmp_path):
    place = open_folder(f"s3://{BUCKET}/{tmp_path.name}")
    tries, closing = [], threading.Event()

    class Away(type(place)):
        __slots__ = ()

        def upload(self, file, name):
            closing.wait(60)
            tries.append(name)
            raise RunError("can't be reached")

    for number in range(5):
        (tmp_path / f"file-{number}").write_text("x")
    remote = Remote(Away(place.place, place.filesystem, place.root), tmp_path)
    with pytest.raises(RunError, match=r"5 file\(s\) are not uploaded \(first: file-0: can't be reached"), remote:
        remote.add(*(f"file-{number}" for number in range(5)))
        remote._closing.set()
        closing.set()
    assert tries == ["file-0"]


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
    monkeypatch.setattr(stores, "RETRY_SECONDS", 0.05)
    monkeypatch.setattr(files, "FIRST_RETRY_SECONDS", 0.05)
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
