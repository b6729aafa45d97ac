"""One writer at a time, on a disk and in object storage, however slow the store or however long a machine pauses."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time

import pyarrow as pa
import pytest

from birbal_ray import lock
from birbal_ray.run import Step, open_run
from birbal_ray.storage import Folder, RunError, open_folder
from tests.conftest import slow
from tests.fixtures.s3_server import BUCKET, python_at, s3_proxy

LEASE = 5.0  # short, but not for a process that a busy machine keeps waiting
HOLD = """
import sys, time
from birbal_ray import lock, run
lock.LEASE_SECONDS, lock.RENEW_SECONDS, lock.LEASE_MARGIN_SECONDS = (float(sys.argv[3]) / n for n in (1, 10, 10))
with run.open_run(sys.argv[1], run.Step("score"), {}) as opened:
    print("held", flush=True)
    end = time.monotonic() + float(sys.argv[2])
    while time.monotonic() < end:
        start = time.time()
        if opened.folder.guard:  # in object storage
            opened.folder.guard.check()
        print(start, time.time(), flush=True)
        time.sleep(0.01)
"""


@pytest.fixture
def short_lease(monkeypatch):
    for name, value in (("LEASE_SECONDS", LEASE), ("RENEW_SECONDS", LEASE / 10), ("LEASE_MARGIN_SECONDS", LEASE / 10)):
        monkeypatch.setattr(lock, name, value)


@pytest.fixture
def interruptible():
    """As in a terminal: what runs in the background inherits an ignored SIGINT."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_holder_is_named_and_a_killed_ones_lock_is_taken_over(folder, short_lease):
    holder = python_at({}, HOLD, folder.place, "60", str(LEASE))
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    message = f"another run is writing here \\(pid {holder.pid} on"
    with pytest.raises(RunError, match=message), open_run(folder, Step("score"), {}):
        pass
    assert lock.lock_holder(folder)["pid"] == holder.pid
    holder.kill()
    holder.wait()
    assert lock.lock_holder(folder) is None
    with open_run(folder, Step("score"), {}):
        assert lock.lock_holder(folder)["pid"] == os.getpid()
    assert lock.lock_holder(folder) is None


def test_a_dead_holder_on_another_machine_is_waited_for(s3, short_lease, monkeypatch):
    monkeypatch.setattr(lock, "LEASE_SECONDS", 1.2)
    folder = open_folder(f"s3://{BUCKET}/elsewhere")
    folder.write_json(".lock.json", {**lock.this_process(), "host": "gone", "beat": 3})
    start = time.monotonic()
    with open_run(folder, Step("score"), {}) as opened:
        assert time.monotonic() - start >= lock.LEASE_SECONDS
        opened.folder.guard.check()


def test_who_loses_the_lock_stops_and_publishes_nothing(s3, short_lease, interruptible):
    """As after a long pause of the machine: another run took the folder over."""
    folder = open_folder(f"s3://{BUCKET}/lost")
    with pytest.raises(RunError, match="took this folder over"), open_run(folder, Step("score"), {}) as opened:
        folder.write_json(".lock.json", {**lock.this_process(), "host": "other", "beat": 1})
        time.sleep(20)  # interrupted by the thread that renews
        opened.finish({}, [], summary="")
    assert "manifest.json" not in folder.files()
    assert folder.read_json(".lock.json")["host"] == "other", "and the lock stays the other's"
    with (
        pytest.raises(RunError, match="took this folder over"),
        open_run(f"s3://{BUCKET}/lost-2", Step("score"), {}) as opened,
    ):
        opened.folder.write_json(".lock.json", {**lock.this_process(), "host": "other", "beat": 1})
        opened.folder.guard._valid_until = 0.0
        opened.finish({}, [], summary="")


def test_whoever_works_for_a_run_that_lost_its_lock_publishes_nothing_more(s3, monkeypatch):
    """A writer in another process, on any node, finds out from the store, which it asks at most every few seconds."""
    url = f"s3://{BUCKET}/lost-by-the-driver"
    monkeypatch.setattr(lock, "RENEW_SECONDS", 60.0)
    reads, read = [], Folder.read_version

    def counted(self, name, **options):
        reads.append(name)
        return read(self, name, **options)

    with pytest.raises(RunError, match="took this folder over"), open_run(url, Step("score"), {}) as opened:
        monkeypatch.setattr(Folder, "read_version", counted)
        rows = pickle.loads(pickle.dumps(opened.folder)).subfolder("rows")
        again = pickle.loads(pickle.dumps(rows))
        for name in ("a", "b", "c"):
            rows.write_bytes(name, b"1")
            again.write_bytes(name, b"1")
        assert reads == [".lock.json"] * 2, "one request of each copy"
        open_folder(url).write_json(".lock.json", {**lock.this_process(), "host": "other", "beat": 1})
        monkeypatch.setattr(lock, "CHECK_SECONDS", 0.0)
        for publish in (
            lambda: rows.write_bytes("d", b"2"),
            lambda: again.write_parquet("d", pa.table({"x": [1]})),
            lambda: rows.delete(["a"]),
        ):
            with pytest.raises(RunError, match=r"another run \(pid .* on other\) took this folder over"):
                publish()
        opened.folder.guard._valid_until = 0.0  # the driver asks before it writes, too
        opened.folder.write_bytes("rows/d", b"2")
    assert set(open_folder(url).subfolder("rows").files()) == {"a", "b", "c"}


def test_the_question_who_holds_the_lock_waits_through_an_outage(s3, monkeypatch):
    """The driver's lease has run out and its renewals fail; a worker asks for the first time. Nobody else came."""
    url, down = f"s3://{BUCKET}/outage-of-the-lock", threading.Event()
    monkeypatch.setattr(lock, "RENEW_SECONDS", 60.0)
    with s3_proxy(s3, lambda method, path: None if down.is_set() else 0.0) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server["AWS_ENDPOINT_URL"])
        with open_run(url, Step("score"), {}) as opened:
            opened.folder.guard._valid_until = 0.0
            for number, folder in enumerate((opened.folder, pickle.loads(pickle.dumps(opened.folder)))):
                down.set()
                threading.Timer(2.0, down.clear).start()
                folder.write_bytes(f"rows/{number}", b"1")
                assert not down.is_set()
            assert set(opened.folder.files("rows")) == {"rows/0", "rows/1"}


def test_a_worker_that_outlives_its_run_publishes_nothing_more(s3):
    url = f"s3://{BUCKET}/outlived"
    with open_run(url, Step("score"), {}) as opened:
        there = pickle.loads(pickle.dumps(opened.folder))
    with pytest.raises(RunError, match="has ended"):
        there.write_bytes("rows/a", b"1")


@pytest.mark.parametrize(("lease", "delay"), [(LEASE, LEASE / 3), (1.2, 2.0)])
def test_two_runs_are_never_inside_at_once_however_slow_the_store_writes(s3, lease, delay):
    """PUTs of a third of the lease, and longer than it; the second starts while the first is at work."""
    url = f"s3://{BUCKET}/slow-{lease}"
    with s3_proxy(s3, lambda method, path: delay if method == "PUT" and "lock" in path else 0.0) as server:
        first = python_at(server, HOLD, url, "60" if delay < lease else "2.5", str(lease))
        if delay < lease:
            assert first.stdout is not None and first.stdout.readline() == "held\n"
        else:
            time.sleep(delay + 0.5)
        second = python_at(server, HOLD, url, "2.5", str(lease))
        printed = second.communicate(timeout=60)[0]
        if delay < lease:
            first.kill()
        inside = []
        for lines in (first.communicate(timeout=60)[0], printed):
            inside.append([tuple(map(float, line.split())) for line in lines.split("\n") if " " in line])
    # A check that began at one's time and one that ended at the other's: no two may overlap.
    spans = [(checks[0][1], checks[-1][1]) for checks in inside if checks]
    assert len(spans) <= 1 or spans[0][1] < spans[1][0] or spans[1][1] < spans[0][0]
    if delay < lease:
        assert inside[0] and not inside[1], "the first keeps its folder, the second is refused"


def test_a_paused_holder_does_not_come_back_inside(s3):
    """SIGSTOP for longer than the lease, as a suspended machine: the second takes over, the first stops."""
    url = f"s3://{BUCKET}/paused"
    elsewhere = HOLD.replace("lock.LEASE", "lock.is_alive = lambda holder: None\nlock.LEASE", 1)
    first = python_at(s3, elsewhere, url, "60", str(LEASE))
    assert first.stdout is not None and first.stdout.readline() == "held\n"
    first.stdout.readline()
    os.kill(first.pid, signal.SIGSTOP)
    second = python_at(s3, elsewhere, url, "3", str(LEASE))
    assert second.stdout is not None and second.stdout.readline() == "held\n"
    inside = float(second.stdout.readline().split()[0])
    os.kill(first.pid, signal.SIGCONT)
    checks = [line.split() for line in first.communicate(timeout=30)[0].split("\n") if " " in line]
    assert first.returncode != 0
    assert all(float(end) < inside for _, end in checks)
    second.communicate(timeout=30)
    assert second.returncode == 0


@slow
@pytest.mark.timeout(600)
def test_two_runs_with_the_lease_as_it_is_and_writes_of_20_seconds(s3):
    """The first keeps its folder however long it works, the second is refused."""
    hold = "\n".join(line for line in HOLD.split("\n") if "LEASE_SECONDS" not in line)
    url = f"s3://{BUCKET}/slow-20"
    with s3_proxy(s3, lambda method, path: 20.0 if method == "PUT" else 0.0) as server:
        first = python_at(server, hold, url, "100")
        time.sleep(25)
        second = python_at(server, hold, url, "100")
        assert "held" not in second.communicate(timeout=300)[0]
        assert second.returncode != 0
        printed = first.communicate(timeout=300)[0].split("\n")
    checks = [tuple(map(float, line.split())) for line in printed if " " in line]
    assert first.returncode == 0 and checks[-1][1] - checks[0][0] > 90
