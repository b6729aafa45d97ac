"""Runs whose output is an s3:// URL, against an S3 server on this machine (moto)."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator

import pytest
from pyarrow import fs

from birbal_ray.mirror import Mirror
from birbal_ray.object_store import filesystem_of
from birbal_ray.run import RunError
from birbal_ray.storage import local_copy, refresh, run_folder, working_copy
from tests.conftest import task_values
from tests.e2e.processes import birbal, finish, kill_whole, wait_for
from tests.ray.conftest import scored_rows

pytestmark = pytest.mark.timeout(400)
BUCKET = "birbal-tests"
NUM_TASKS, NUM_INSTANCES, SHARD_ROWS = 3, 40, 4
NUM_SHARDS = NUM_TASKS * NUM_INSTANCES // SHARD_ROWS


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment by which clients find the server; it has one bucket."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with (tmp_path_factory.mktemp("moto") / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    end = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(urllib.request.Request(f"{address}/{BUCKET}", method="PUT"), timeout=10)
            break
        except (urllib.error.URLError, ConnectionError):
            assert process.poll() is None and time.monotonic() < end, "the S3 server did not start"
            time.sleep(0.2)
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
    yield {"AWS_ENDPOINT_URL": address, **keys}
    process.kill()
    process.wait()


@pytest.fixture
def storage(server, monkeypatch, tmp_path) -> Callable[[str], fs.FileSystem]:
    """This process's view of the server; machine(name) makes it a machine whose disk is empty (or as it left it)."""
    for name, value in server.items():
        monkeypatch.setenv(name, value)

    def machine(name: str) -> dict[str, str]:
        monkeypatch.setenv("BIRBAL_CACHE", str(tmp_path / name))
        return {"BIRBAL_CACHE": str(tmp_path / name), **server}

    machine("first")
    return machine


def objects(url: str) -> dict[str, int]:
    """Name below the URL → size, of every object there."""
    system, base = filesystem_of(url)
    infos = system.get_file_info(fs.FileSelector(base, recursive=True, allow_not_found=True))
    return {info.path[len(base) + 1 :]: info.size for info in infos if info.type == fs.FileType.File}


def test_a_run_folder_is_the_same_here_and_there(storage):
    url = f"s3://{BUCKET}/same"
    with run_folder(url) as folder:
        (folder / "run.json").write_text("{}")
        (folder / "rows").mkdir()
        (folder / "rows" / "a.parquet").write_bytes(b"a" * 100)
        (folder / "rows" / ".tmp-1-b.parquet").write_bytes(b"half")
        refresh(folder)
        assert objects(url).keys() - {".lease.json"} == {"run.json", "rows/a.parquet"}
        (folder / "rows" / "a.parquet").unlink()
        (folder / "manifest.json").write_text("{}")
    assert objects(url) == {"run.json": 2, "manifest.json": 2}

    storage("second")
    with run_folder(url) as folder:
        assert sorted(file.name for file in folder.iterdir() if file.name[0] != ".") == ["manifest.json", "run.json"]
        (folder / "manifest.json").write_text('{"a": 1}')

    storage("first")  # whose copy is stale now
    assert (local_copy(url) / "manifest.json").read_text() == '{"a": 1}'
    with pytest.raises(RunError, match="nothing there"):
        local_copy(f"s3://{BUCKET}/absent")
    with pytest.raises(RunError, match="expected s3://bucket/folder"):
        working_copy("s3://bucket/../elsewhere")
    with pytest.raises(RunError, match="check the bucket"), run_folder("s3://no-such-bucket/run"):
        pass


@pytest.mark.parametrize("uploaded", [("run.json", "c.txt"), ()])
def test_an_outage_costs_nothing_that_was_finished(storage, monkeypatch, uploaded):
    """Pushes that break off half-way, or all of them; the next run here brings up the rest."""
    url, upload = f"s3://{BUCKET}/outage-{len(uploaded)}", Mirror._upload

    def broken(self: Mirror, name: str, stamp: tuple[int, int]) -> None:
        if name not in uploaded:
            raise OSError("the network is away")
        upload(self, name, stamp)

    names = {"run.json", "a.txt", "b.txt", "c.txt"}
    with monkeypatch.context() as patch:
        patch.setattr(Mirror, "_upload", broken)
        with pytest.raises(RunError, match="the network is away"), run_folder(url) as folder:
            for name in sorted(names, reverse=True):
                (folder / name).write_text(name)
    assert objects(url).keys() - {".lease.json"} == set(uploaded)
    with run_folder(url) as folder:
        assert {file.name for file in folder.iterdir() if file.name[0] != "."} == names
    assert objects(url).keys() == names


def test_a_deleted_working_copy_is_fetched_again_and_nothing_is_removed_there(storage):
    url = f"s3://{BUCKET}/deleted"
    with run_folder(url) as folder:
        (folder / "run.json").write_text("{}")
        (folder / "rows").mkdir()
        (folder / "rows" / "a.parquet").write_text("a")
    shutil.rmtree(folder)
    with run_folder(url) as folder:
        assert (folder / "rows" / "a.parquet").read_text() == "a"
    assert objects(url).keys() == {"run.json", "rows/a.parquet"}


def test_killed_before_an_upload_was_written_down_a_run_goes_on_from_its_own_files(storage, monkeypatch):
    url = f"s3://{BUCKET}/unrecorded"
    with monkeypatch.context() as patch, run_folder(url) as folder:
        refresh(folder)
        patch.setattr(Mirror, "_remember", lambda self: None)
        (folder / "a.txt").write_text("a")
    (folder / "b.txt").write_text("b")
    with run_folder(url):
        pass
    assert objects(url).keys() == {"a.txt", "b.txt"}


def test_what_was_finished_and_not_uploaded_is_uploaded_by_the_next_run_here(storage, monkeypatch):
    url = f"s3://{BUCKET}/ahead"
    with run_folder(url) as folder:
        (folder / "run.json").write_text("{}")
    (folder / "late.txt").write_text("finished while the network was away")
    with run_folder(url):
        pass
    assert objects(url)["late.txt"] == 35
    storage("second")
    with run_folder(url) as other:
        (other / "late.txt").write_text("changed elsewhere")
    storage("first")
    (folder / "stray.txt").write_text("of a copy that is no longer the latest")
    with run_folder(url) as folder:
        assert (folder / "late.txt").read_text() == "changed elsewhere"
        assert not (folder / "stray.txt").exists()


def test_one_run_at_a_url(storage):
    url = f"s3://{BUCKET}/one"
    hold = (
        "import sys, time\nfrom birbal_ray.storage import run_folder\n"
        f"with run_folder({url!r}):\n    print('held', flush=True)\n    time.sleep(300)\n"
    )
    environment = {**os.environ, **storage("other")}
    holder = subprocess.Popen([sys.executable, "-c", hold], env=environment, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    storage("first")
    with pytest.raises(RunError, match=f"another run is writing there .pid {holder.pid}"), run_folder(url):
        pass
    holder.kill()
    holder.wait()
    with run_folder(url):  # its lease is not renewed any more
        pass
    assert ".lease.json" not in objects(url)


def test_score_killed_and_continued_on_another_machine_then_mix(storage, tmp_path):
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    for number in range(NUM_TASKS):
        values = task_values(NUM_INSTANCES, Definition=[f"Definition {number}."])
        (tasks / f"task{number}.json").write_text(json.dumps(values))
    settings = ["--set", "engine.backend=simulated", "--device", "cpu", "--set", f"shard_rows={SHARD_ROWS}"]
    score = ["score", "--tasks", tasks, *settings, "--output"]
    finish(birbal(*score, tmp_path / "score"))

    url = f"s3://{BUCKET}/runs/score"
    first = birbal(*score, url, "--set", "resources.simulated_row_seconds=0.1")
    wait_for(lambda: sum(name.startswith("rows/") for name in objects(url)) >= 4, first)
    kill_whole(first)
    kept = {name for name in objects(url) if name.startswith("rows/")}
    assert 4 <= len(kept) < NUM_SHARDS
    assert "manifest.json" not in objects(url)
    (row,) = json.loads(finish(birbal("status", url, "--format", "json"))[0])
    assert (row["state"], row["done"]) == ("stopped", len(kept) * SHARD_ROWS), "its lease's process is gone"

    storage("second")
    _, errors = finish(birbal(*score, url))
    assert f"continuing: {len(kept)} of {NUM_SHARDS} shards ({len(kept) * SHARD_ROWS} rows) are done" in errors
    assert f"{url}: up to date" in errors
    assert "manifest.json" in objects(url)

    there, _ = finish(birbal("status", url, "--format", "json"))
    (row,) = json.loads(there)
    assert (row["step"], row["state"], row["folder"]) == ("score", "done", url)
    assert (row["done"], row["planned"]) == (NUM_TASKS * NUM_INSTANCES, NUM_TASKS * NUM_INSTANCES)

    storage("third")
    mixed = f"s3://{BUCKET}/runs/mix"
    budgets = ["task_score.exact_match_budget=20", "task_score.allow_shortfall=true", "filters.max_short_input_words=0"]
    sets = [part for one in budgets for part in ("--set", one)]
    for scores, output in ((url, mixed), (tmp_path / "score", tmp_path / "mix")):
        finish(birbal("mix", "--scores", scores, "--output", output, *sets))
    assert scored_rows(local_copy(url)) == scored_rows(tmp_path / "score"), "each row once, as on a disk"
    there = local_copy(mixed)
    assert json.loads((there / "manifest.json").read_text())["scores"]["path"] == url
    sums = [hashlib.sha256((mix / "train.parquet").read_bytes()).hexdigest() for mix in (there, tmp_path / "mix")]
    assert sums[0] == sums[1]
