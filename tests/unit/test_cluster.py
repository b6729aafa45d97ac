"""What fits on a cluster's nodes, and a local cluster's folder."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from birbal_ray import cluster
from birbal_ray.cluster import WorkerRequest, can_place
from birbal_ray.storage import RunError

GPU = {"CPU": 64.0, "GPU": 1.0, "accelerator_type:A10G": 1.0}


@pytest.mark.parametrize(
    ("num_gpus", "node", "places"),
    [
        (0.2, GPU, 5),  # 1 // 0.2 is 4.0
        (0.1, GPU, 10),
        (0.5, {**GPU, "GPU": 2.0}, 4),
        (0.6, {**GPU, "GPU": 2.0}, 2),  # a share lies on one card
        (1 / 3, GPU, 3),
        (2.0, {**GPU, "GPU": 5.0}, 2),
        (1.0, {**GPU, "GPU": 0.5}, 0),
        (0.5, {**GPU, "GPU": 0.5}, 1),
        (0.2, {**GPU, "CPU": 3.0}, 3),
    ],
)
def test_fractions_of_cards_are_counted_as_ray_places_them(num_gpus, node, places):
    request = WorkerRequest("replica", places, 1.0, num_gpus)
    assert request.places_on(node) == places
    assert can_place(request, [node]) is None
    assert can_place(WorkerRequest("replica", places + 1, 1.0, num_gpus), [node]).startswith(
        f"the cluster can place {places} of {places + 1} replicas"
    )


def test_cards_are_wanted_or_avoided():
    assert WorkerRequest("worker", 1, 1.0, 1.0, "A10G").places_on(GPU) == 1
    assert WorkerRequest("worker", 1, 1.0, 1.0, "H100").places_on(GPU) == 0
    assert WorkerRequest("worker", 1, 1.0, 1.0, None, ("A10G",)).places_on(GPU) == 0
    assert "no node has a H100 with 1 free CPUs" in can_place(WorkerRequest("worker", 1, 1.0, 1.0, "H100"), [GPU])
    assert WorkerRequest("replica", 1, 1.0, 0.0, "H100").places_on(GPU) == 64, "a CPU worker takes any node"
    assert can_place(WorkerRequest("replica", 1, 1.0, total_cpus=100), [GPU]) is not None


@pytest.mark.parametrize(
    ("address", "dialled"),
    [
        ("10.0.0.2:6379", ("10.0.0.2", 6379)),
        ("[::1]:6379", ("::1", 6379)),
        ("ray://head:10001", ("head", 10001)),
        ("https://anyscale.example:443", None),  # of a service that Ray knows: Ray asks it for the cluster
        ("anyscale://project:1", None),
        ("auto", None),
    ],
)
def test_a_cluster_is_dialled_where_its_address_is_a_host_s(monkeypatch, address, dialled):
    called = []

    def connect(place, timeout):
        called.append(place)
        raise OSError("refused")

    monkeypatch.setattr(cluster.socket, "create_connection", connect)
    with pytest.raises(RunError, match="no Ray cluster answers there") if dialled else contextlib.nullcontext():
        cluster._check_answers(address)
    assert called == ([dialled] if dialled else [])


def test_a_folder_whose_driver_lives_is_kept_and_a_dead_ones_is_removed(monkeypatch, tmp_path):
    """By a lock that the kernel keeps: the driver's number may mean nothing here (another pid namespace)."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = (
        "import sys, time, tempfile\nfrom birbal_ray import cluster\ntempfile.tempdir = sys.argv[1]\n"
        "cluster.os.getpid = lambda: 999999\ncluster.MAX_FOLDER_LENGTH = 200\n"
        "with cluster._session_folder() as folder:\n    print(folder, flush=True)\n    time.sleep(60)"
    )
    driver = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    folder = Path(driver.stdout.readline().strip())
    (folder / "session").mkdir()
    cluster.remove_stale_folders()
    assert (folder / "session").is_dir()
    driver.kill()
    driver.wait()
    cluster.remove_stale_folders()
    assert not folder.exists()


@pytest.mark.parametrize("ends", ["by itself", "killed"])
def test_the_log_of_an_engine_at_a_url_leaves_nothing_on_its_node(monkeypatch, tmp_path, ends):
    code = (
        "import sys\nfrom types import SimpleNamespace\nfrom birbal_ray.score.stages import _log_into\n"
        "_log_into(SimpleNamespace(is_local=False), 'logs/replica.log')\nprint('at work', flush=True)\nsys.stdin.read()"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    engine = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, env=environment)
    until = time.monotonic() + 60
    while not any(file.read_text() for file in tmp_path.glob("*/replica.log")) and time.monotonic() < until:
        time.sleep(0.05)
    assert len(list(tmp_path.iterdir())) == 1
    if ends == "killed":
        engine.kill()
    engine.communicate()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if ends == "killed":
        cluster.remove_stale_folders()
    assert not list(tmp_path.iterdir())


def test_a_temporary_folder_too_long_for_rays_sockets_is_replaced_and_that_is_said(monkeypatch, tmp_path, capsys):
    long = tmp_path / ("x" * 24)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with cluster._session_folder() as folder:
        assert folder.parent == Path("/tmp")
        assert len(f"{folder}/session_2026-01-31_12-00-00_123456_1234567/sockets/plasma_store") <= 107
    assert not folder.exists() and not list(long.iterdir())
    assert "too long for the paths of Ray's sockets" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["ray.data._internal.prefetcher", "__main__"])
def test_how_a_thread_of_rays_ended_is_for_its_log_alone(monkeypatch, caplog, module):
    """Ray Data's prefetcher finds no Ray any more when a command is stopped."""
    shown = []
    monkeypatch.setattr(threading, "excepthook", functools.partial(cluster._log_ray_threads, shown.append))
    monkeypatch.setattr(logging.getLogger("ray"), "propagate", True)
    names = {"__name__": module}
    exec("def run():\n    raise AttributeError('address_info')", names)
    thread = threading.Thread(target=names["run"])
    thread.start()
    thread.join()
    assert ("address_info" in caplog.text, len(shown)) == ((True, 0) if module.startswith("ray.") else (False, 1))
