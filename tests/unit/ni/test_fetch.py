"""Fetching the archive: https, resumable, checked, safe to unpack."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from birbal_ray.ni.obtain import fetch_archive
from birbal_ray.ni.reader import find_task_files
from birbal_ray.ni.schema import TaskError
from tests.conftest import slow, task_values
from tests.unit.ni.test_reader import archive


class Server(ThreadingHTTPServer):
    """Serves one file with Range support; breaks off after `cut` bytes once."""

    def __init__(self, data):
        self.data, self.cut, self.ranges, self.tag, self.redirect = data, None, [], '"v1"', None
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        if self.path != "/ni.tar.gz":
            self.send_error(404)
            return
        if server.redirect:
            self.send_response(302)
            self.send_header("Location", server.redirect)
            self.end_headers()
            return
        start = 0
        wanted = self.headers.get("Range")
        if wanted and self.headers.get("If-Range") == server.tag:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
        server.ranges.append(start)
        if start >= len(server.data):
            self.send_error(416)
            return
        body = server.data[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", server.tag)
        self.end_headers()
        if server.cut is not None:
            body, server.cut = body[: server.cut], None
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(tmp_path):
    noise = hashlib.shake_256(b"noise").hexdigest(50_000)
    tasks = {f"ni-master/tasks/task{n}.json": json.dumps(task_values(3, Note=noise)).encode() for n in range(4)}
    data = archive(tmp_path / "made.tar.gz", {"ni-master/README.md": b"hello", **tasks}).read_bytes()
    server = Server(data)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()  # seconds that ending it takes
    server.url = f"http://127.0.0.1:{server.server_port}/ni.tar.gz"
    yield server
    server.shutdown()
    server.server_close()


def test_fetch_and_fetch_again(server, tmp_path):
    record = fetch_archive(server.url, tmp_path / "ni", sha256=hashlib.sha256(server.data).hexdigest())
    assert record["num_files"] == 4
    assert sorted(file.name for file in (tmp_path / "ni").iterdir()) == ["fetch.json", "tasks"]
    assert len(list((tmp_path / "ni" / "tasks").iterdir())) == 4
    assert fetch_archive(server.url, tmp_path / "ni") == record
    assert server.ranges == [0]


def test_a_cut_download_continues_where_it_stopped(server, tmp_path):
    server.cut = 20_000
    with pytest.raises(TaskError, match=r"broke off at 20000 of .* bytes; run the same command again"):
        fetch_archive(server.url, tmp_path / "ni")
    assert not (tmp_path / "ni" / "tasks").exists()
    assert fetch_archive(server.url, tmp_path / "ni")["num_files"] == 4
    assert server.ranges == [0, 20_000]


def test_killed_after_the_last_byte(server, tmp_path):
    server.cut = 20_000
    with pytest.raises(TaskError):
        fetch_archive(server.url, tmp_path / "ni")
    (part,) = (tmp_path / "ni").glob(".download-*.part")
    part.write_bytes(server.data)
    assert fetch_archive(server.url, tmp_path / "ni")["num_files"] == 4


def test_a_redirect_is_checked_too(server, tmp_path):
    server.redirect = "http://192.0.2.1/ni.tar.gz"
    with pytest.raises(TaskError, match=r"192\.0\.2\.1/ni\.tar\.gz: only https"):
        fetch_archive(server.url, tmp_path / "ni")


def test_a_file_that_changed_on_the_server_is_fetched_anew(server, tmp_path):
    server.cut = 20_000
    with pytest.raises(TaskError):
        fetch_archive(server.url, tmp_path / "ni")
    server.tag = '"v2"'
    assert fetch_archive(server.url, tmp_path / "ni")["num_files"] == 4
    assert server.ranges == [0, 0]


def test_wrong_checksum_is_refused_and_nothing_stays(server, tmp_path):
    with pytest.raises(TaskError, match="expected 00ff; the download was deleted"):
        fetch_archive(server.url, tmp_path / "ni", sha256="00ff")
    assert list((tmp_path / "ni").iterdir()) == []


def test_members_cannot_leave_the_folder(server, tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name in ("../../tasks/escape.json", "/tmp/tasks/absolute.json", "ni/tasks/good.json"):
            info = tarfile.TarInfo(name)
            info.size = 2
            tar.addfile(info, io.BytesIO(b"{}"))
        link = tarfile.TarInfo("ni/tasks/link.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    server.data = buffer.getvalue()
    fetch_archive(server.url, tmp_path / "deep" / "ni")
    names = sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.json"))
    inside = ("fetch.json", "tasks/absolute.json", "tasks/escape.json", "tasks/good.json")
    assert names == [f"deep/ni/{name}" for name in inside]
    assert not (tmp_path / "deep" / "ni" / "tasks" / "link.json").exists()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://example.org/x.tar.gz", "only https"),
        ("file:///etc/passwd", "only https"),
        ("{server}/absent.tar.gz", "the server answered 404"),
        ("http://127.0.0.1:9/x.tar.gz", "can.t be reached"),
    ],
)
def test_refused_urls(server, tmp_path, url, message):
    url = url.replace("{server}", server.url.rsplit("/", 1)[0])
    with pytest.raises(TaskError, match=message):
        fetch_archive(url, tmp_path / "ni")


@slow  # of 45 MB: what test_a_cut_download_continues_where_it_stopped shows of a small one
def test_the_real_archive(shared_data, server, tmp_path):
    file = shared_data / "natural-instructions-subset.tar.gz"
    server.data = file.read_bytes()
    server.cut = len(server.data) // 3
    with pytest.raises(TaskError, match="run the same command again"):
        fetch_archive(server.url, tmp_path / "ni")
    record = fetch_archive(server.url, tmp_path / "ni")
    digest = hashlib.sha256(server.data).hexdigest()
    assert record == {"url": server.url, "sha256": digest, "num_files": 179, "num_bytes": file.stat().st_size}
    assert server.ranges == [0, len(server.data) // 3]
    with tarfile.open(file) as tar:
        sizes = {member.name.rpartition("/")[2]: member.size for member in tar if member.name.endswith(".json")}
    assert {path.name: path.stat().st_size for path in (tmp_path / "ni" / "tasks").iterdir()} == sizes
    assert len(find_task_files(tmp_path / "ni" / "tasks")) == 179


def test_not_an_archive(server, tmp_path):
    server.data = b"<html>not found</html>"
    with pytest.raises(TaskError, match="can't be unpacked"):
        fetch_archive(server.url, tmp_path / "ni")
    assert not list((tmp_path / "ni").glob(".download-*"))


@pytest.mark.parametrize("place", [0.3, 0.5, 0.7, 0.999])
def test_a_damaged_archive_is_deleted(server, tmp_path, place):
    """One byte is another: tarfile alone would end there without a word."""
    at = int(len(server.data) * place)
    server.data = server.data[:at] + bytes([server.data[at] ^ 255]) + server.data[at + 1 :]
    with pytest.raises(TaskError, match=r"can't be unpacked .* and was deleted; fetch it again"):
        fetch_archive(server.url, tmp_path / "ni")
    assert not list((tmp_path / "ni").glob(".download-*"))


def test_a_disk_that_is_full_while_unpacking_keeps_the_download(server, tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("birbal_ray.ni.obtain.Path.write_bytes", full)
        with pytest.raises(TaskError, match=r"no space left on the disk\); the download is kept"):
            fetch_archive(server.url, tmp_path / "ni")
    assert [file.suffix for file in (tmp_path / "ni").iterdir()] == [".gz"], "what was unpacked is gone"
    assert fetch_archive(server.url, tmp_path / "ni")["num_files"] == 4
    assert server.ranges == [0], "downloaded once"
