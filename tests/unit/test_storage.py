"""A folder is the same on a disk and in object storage: nothing is half-written, nothing is deleted but by name."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import subprocess
import sys
from types import SimpleNamespace

import obstore
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from obstore.store import LocalStore
from pyarrow import fs

from birbal_ray import storage, stores
from birbal_ray.storage import DamagedFileError, FileRecord, RunError, input_folder, open_folder
from birbal_ray.train.files import Remote
from tests.fixtures.s3_server import BUCKET, s3_proxy

NAMES = ["a.txt", "rows/task #1 [x] ü=1/0-9.parquet", "rows/b.bin"]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_read_and_listed(folder, name):
    data = os.urandom(100)
    assert folder.write_bytes(name, data) == FileRecord(hashlib.sha256(data).hexdigest(), 100)
    assert folder.read_bytes(name) == data
    assert folder.files()[name].size == folder.stat(name).size == 100
    assert folder.is_file(name) and not folder.is_file(name + "x")
    assert folder.write_bytes(name, b"new").size == 3
    assert folder.read_bytes(name) == b"new"
    assert folder.subfolder("rows").files().keys() == {n.removeprefix("rows/") for n in {name} if "/" in n}
    assert pickle.loads(pickle.dumps(folder)) == folder
    assert pickle.loads(pickle.dumps(folder.subfolder("rows"))).at("x") == folder.at("rows/x")


def test_a_folder_that_is_not_there_is_empty_and_its_files_are_absent(folder):
    assert (folder.files(), folder.folders(), folder.is_file("x"), folder.stat("x")) == ({}, [], False, None)
    for read in (folder.read_bytes, folder.read_json, folder.read_text, folder.read_table, folder.open_input):
        with pytest.raises(FileNotFoundError):
            read("x")
    folder.delete(["x", "y/z"])


def test_listings_leave_out_hidden_names(folder):
    for name in ("a", ".lock.json", "rows/.tmp-1-b", ".git/config", "rows/c"):
        folder.write_bytes(name, b"1")
    assert list(folder.files()) == ["a", "rows/c"]
    assert list(folder.files("rows")) == ["rows/c"]
    assert folder.folders() == ["rows"]
    assert len(folder.files(hidden=True)) == 5


def test_damaged_files_are_named(folder):
    folder.write_bytes("a.json", b"{")
    folder.write_bytes("b.json", b"\xff\xfe")
    folder.write_bytes("c.parquet", b"PAR1")
    with pytest.raises(RunError, match=r"a\.json: not valid JSON"):
        folder.read_json("a.json")
    with pytest.raises(RunError, match=r"b\.json: not UTF-8"):
        folder.read_json("b.json")
    with pytest.raises(RunError, match=r"c\.parquet: not a Parquet file"):
        folder.read_table("c.parquet")


def test_tables_are_written_and_read_in_pieces_and_by_pyarrow(folder):
    table = pa.table({"a": range(1000), "b": ["x"] * 1000})
    record = folder.write_parquet("t/one.parquet", table)
    with folder.writer("t/two.parquet") as sink, pq.ParquetWriter(sink, table.schema) as writer:
        writer.write_table(table)
        writer.write_table(table)
    assert folder.read_table("t/one.parquet") == table
    assert folder.read_table("t/two.parquet", ["a"]).num_rows == 2000
    assert record == FileRecord(hashlib.sha256(data := folder.read_bytes("t/one.parquet")).hexdigest(), len(data))
    assert sink.record.size == folder.stat("t/two.parquet").size
    dataset = pyarrow.dataset.dataset(folder.path("t"), filesystem=folder.filesystem, format="parquet")
    assert dataset.count_rows() == 3000


def test_an_error_while_writing_publishes_nothing(folder):
    folder.write_bytes("kept", b"old")
    for name in ("kept", "new"):
        with pytest.raises(ValueError, match="broken"), folder.writer(name) as sink:
            sink.write(b"x" * 20_000_000)
            sink.close()  # as a library's `with` does
            raise ValueError("broken")
    assert (folder.read_bytes("kept"), list(folder.files(hidden=True))) == (b"old", ["kept"])


def test_a_large_file_goes_up_in_parts(folder, tmp_path):
    data = os.urandom(20_000_000)
    (tmp_path / "large").write_bytes(data)
    assert folder.upload(tmp_path / "large", "a/large") == FileRecord(hashlib.sha256(data).hexdigest(), len(data))
    folder.download("a/large", tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == data


def test_deleting_takes_names_and_leaves_everything_else(folder):
    for name in ("a", "rows/b", "rows/c", "other/d"):
        folder.write_bytes(name, b"1")
    folder.delete(["rows/b", "other/d", "absent"])
    assert list(folder.files()) == ["a", "rows/c"]
    folder.delete([])
    assert folder.folders() == ["rows"]


def test_names_that_are_absent_are_no_error_in_a_store_that_makes_them_one(tmp_path, monkeypatch):
    """As Google's does, and obstore's store on a disk, which ends at the first one."""
    store, rows = LocalStore(tmp_path, mkdir=True), [f"rows/{number}" for number in range(60)]
    for name in rows:
        obstore.put(store, f"run/{name}", b"1")
    with pytest.raises(FileNotFoundError):
        obstore.delete(store, ["run/absent"])
    monkeypatch.setattr(storage, "connect", lambda place, patient=True: store)
    folder = storage.Folder("gs://bucket/run", fs.LocalFileSystem(), "bucket/run")
    folder.delete(["absent", *rows[:50], "absent too"])
    assert {one["path"] for one in obstore.list(store).collect()} == {f"run/{name}" for name in rows[50:]}
    folder.delete(["absent"])


def test_atomic_write_leaves_no_temporary_file(tmp_path):
    storage.write_atomic(tmp_path / "a" / "f.txt", b"one")
    storage.write_json(tmp_path / "a" / "f.txt", {"ü": 2})
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["f.txt"]
    assert storage.read_json(tmp_path / "a" / "f.txt") == {"ü": 2}


def test_a_file_is_on_the_disk_before_it_has_its_name_and_then_its_folder_is(tmp_path, monkeypatch):
    """What a power cut would show."""
    synced = []

    def record(descriptor):
        found = os.fstat(descriptor)
        synced.append((found.st_ino, found.st_size, (tmp_path / "f").exists()))

    monkeypatch.setattr(os, "fsync", record)
    open_folder(tmp_path).write_bytes("f", b"new")
    assert synced[0] == ((tmp_path / "f").stat().st_ino, 3, False)
    assert [(inode, named) for inode, _, named in synced[1:]] == [(tmp_path.stat().st_ino, True)]


def test_killed_while_writing_keeps_the_old_content(tmp_path):
    (tmp_path / "f.bin").write_bytes(b"old")
    code = (
        "import os, sys\nfrom birbal_ray.storage import open_folder\n"
        "os.fsync = lambda descriptor: os.kill(os.getpid(), 9)\n"  # dies between writing and renaming
        "open_folder(sys.argv[1]).write_bytes('f.bin', b'new' * 1000)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == -9
    assert (tmp_path / "f.bin").read_bytes() == b"old"
    assert list(open_folder(tmp_path).files()) == ["f.bin"]


def test_urls_are_checked(s3):
    assert storage.is_url("s3://a/b") and storage.is_url("gs://a") and not storage.is_url("s3:/a")
    assert storage.absolute("s3://a/b/") == "s3://a/b"
    assert storage.join("s3://a/b/", "c") == "s3://a/b/c"
    for wrong in ("file:///tmp/a", "S3://bucket/a", "hdfs://host/a"):
        with pytest.raises(RunError, match=f"{wrong}: expected a path, or a URL that begins with s3:// or gs://"):
            open_folder(wrong)
    for wrong in ("s3://", "s3://bucket/../elsewhere", "s3://bucket//a"):
        with pytest.raises(RunError, match="expected s3://bucket/folder"):
            open_folder(wrong)
    with pytest.raises(RunError, match="needed here, not a URL"):
        open_folder("s3://bucket/a").local  # noqa: B018
    with pytest.raises(RunError, match=r"s3://no-such-bucket/run/x: no such bucket"):
        open_folder("s3://no-such-bucket/run").write_bytes("x", b"1")


def test_a_store_that_refuses_is_named_in_one_line(s3, monkeypatch):
    with s3_proxy(s3, lambda method, path: None) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server["AWS_ENDPOINT_URL"])
        monkeypatch.setattr(stores, "RETRY_SECONDS", 0.1)
        with pytest.raises(RunError, match=r"^s3://birbal-tests/x/a: .*check the bucket, AWS_") as caught:
            open_folder(f"s3://{BUCKET}/x").write_bytes("a", b"1")
    assert "\n" not in str(caught.value)


def test_an_outage_shorter_than_the_retries_costs_nothing(s3, monkeypatch):
    refused = iter([None] * 4)
    with s3_proxy(s3, lambda method, path: next(refused, 0.0)) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server["AWS_ENDPOINT_URL"])
        open_folder(f"s3://{BUCKET}/outage").write_bytes("a", b"1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3["AWS_ENDPOINT_URL"])
    assert open_folder(f"s3://{BUCKET}/outage").read_bytes("a") == b"1"


def test_keys_may_come_from_the_shared_credentials_file(s3, monkeypatch, tmp_path):
    (tmp_path / "credentials").write_text("[work]\naws_access_key_id = test\naws_secret_access_key = test\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "work")
    folder = open_folder(f"s3://{BUCKET}/credentials")
    folder.write_bytes("a", b"1")
    assert folder.read_bytes("a") == b"1"


def test_an_input_at_a_url_is_copied_once_and_again_where_it_changed(s3, monkeypatch, tmp_path):
    monkeypatch.setenv("BIRBAL_CACHE", str(tmp_path / "cache"))
    folder = open_folder(f"s3://{BUCKET}/inputs/model")
    for name in ("config.json", "weights/a.safetensors", "ray/x"):
        folder.write_bytes(name, name.encode())
    copy = input_folder(folder.place, lambda name: not name.startswith("ray/"))
    assert {p.relative_to(copy).as_posix() for p in copy.rglob("*") if p.is_file()} == {
        "config.json",
        "weights/a.safetensors",
    }
    before = (copy / "config.json").stat().st_ino
    folder.write_bytes("weights/a.safetensors", b"longer than it was before")
    folder.delete(["ray/x"])
    assert input_folder(folder.place) == copy
    assert (copy / "weights/a.safetensors").read_bytes() == b"longer than it was before"
    assert (copy / "config.json").stat().st_ino == before, "not fetched again"
    assert input_folder(folder.at("config.json")).read_bytes() == b"config.json"
    folder.delete(["config.json"])
    assert not (input_folder(folder.place) / "config.json").exists()
    with pytest.raises(RunError, match="nothing there"):
        input_folder(f"s3://{BUCKET}/inputs/absent")
    assert input_folder(tmp_path) == tmp_path


def test_a_removed_cache_removes_nothing_at_the_url(s3, monkeypatch, tmp_path):
    import shutil

    monkeypatch.setenv("BIRBAL_CACHE", str(tmp_path / "cache"))
    folder = open_folder(f"s3://{BUCKET}/inputs/many")
    for number in range(8):
        folder.write_bytes(f"rows/{number}", b"1")
    copy = input_folder(folder.place)
    shutil.rmtree(copy / "rows")
    input_folder(folder.place)
    shutil.rmtree(tmp_path / "cache")
    with Remote(folder, tmp_path / "working") as remote:
        remote.add("rows")
    assert len(folder.files()) == 8


def test_a_store_that_fails_while_it_sends_a_file_is_not_taken_for_a_damaged_file(tmp_path, monkeypatch):
    def fail(error):
        def failing(*arguments):
            raise error

        return failing

    folder, table = open_folder(tmp_path), pa.table({"a": range(1000)}).replace_schema_metadata({"made": "up"})
    folder.write_parquet("t.parquet", table)
    data = folder.read_bytes("t.parquet")
    assert folder.read_table("t.parquet", []).schema.metadata[b"made"] == b"up"
    with monkeypatch.context() as patch, pytest.raises(RunError, match="check AWS_") as caught:
        patch.setattr(pq.ParquetFile, "read", fail(OSError("connection reset")))
        patch.setattr(storage.Folder, "read_bytes", fail(RunError("no answer; check AWS_*")))
        folder.read_table("t.parquet")
    assert not isinstance(caught.value, DamagedFileError)
    for damaged in (data[:-8], b"PAR1" + b"\xff" * (len(data) - 20) + data[-16:], b""):
        folder.write_bytes("t.parquet", damaged)
        with pytest.raises(DamagedFileError, match=r"t\.parquet: not a Parquet file, or a damaged one"):
            folder.read_table("t.parquet")


@pytest.mark.parametrize("name", ["../../evil", "rows/../x", "rows//x", "./x"])
def test_an_object_whose_name_leaves_its_folder_is_refused(name):
    """Who may write into a bucket may not write onto the machines that copy from it."""
    listed = [
        fs.FileInfo(f"bucket/model/{name}", fs.FileType.File, size=1, mtime=1.0) for name in ("config.json", name)
    ]
    store = SimpleNamespace(get_file_info=lambda selector: listed)
    folder = storage.Folder("s3://bucket/model", store, "bucket/model")
    with pytest.raises(RunError, match=re.escape(f"the object {name!r} has a name that no file can have; remove it")):
        folder.files()
    listed.pop()
    assert folder.files().keys() == {"config.json"}


def test_a_home_folder_in_a_setting_is_the_users(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    open_folder("~/runs").write_bytes("a", b"1")
    assert (tmp_path / "runs" / "a").read_bytes() == b"1"
    assert input_folder("~/runs") == tmp_path / "runs"
    assert open_folder("~").files().keys() == {"runs/a"}
    assert storage.absolute("~else/x") == str(tmp_path / "~else" / "x"), "only one's own"
