"""`birbal serve` as a process, on the simulated engine: what it says, how it ends, what it exits with."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading

import httpx
import pytest

from tests.e2e.processes import wait_for


@pytest.fixture
def serve(tmp_path):
    """serve(*options) → (process, URL); ended afterwards."""
    started = []

    def start(*options):
        log = tmp_path / f"log-{len(started)}"
        command = [sys.executable, "-m", "birbal_ray", "serve", "--port", "0", "--device", "cpu"]
        command += ["--set", "engine.backend=simulated", *options]
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        started.append(process)
        wait_for(lambda: "serving simulated at " in log.read_text(), process, 60)
        return process, re.search(r"http://\S+", log.read_text())[0], log

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_answers_what_is_in_flight_and_ends_with_0(serve, number):
    process, url, _ = serve("--set", "resources.simulated_row_seconds=1.5")
    answers, sent = [], threading.Event()

    def ask():
        extensions = {"trace": lambda event, _: sent.set() if event == "http11.send_request_body.complete" else None}
        with httpx.Client(timeout=60) as client:
            answers.append(client.post(f"{url}/process", json={"prompt": "x"}, extensions=extensions))

    asking = threading.Thread(target=ask)
    asking.start()
    assert sent.wait(30)
    assert httpx.get(f"{url}/health", timeout=30).status_code == 200  # what was sent before is taken before
    process.send_signal(number)
    asking.join(30)
    assert process.wait(30) == 0
    assert answers[0].status_code == 200 and answers[0].json()["text"]
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{url}/health")


def test_a_dead_engine_ends_the_process_with_1_and_the_reason(serve):
    process, url, log = serve()
    assert httpx.post(f"{url}/process", json={"prompt": "SIMULATED-ENGINE-DEATH"}).status_code == 503
    assert process.wait(30) == 1
    assert "error: the engine failed: RuntimeError: simulated engine death" in log.read_text()


def test_a_token_is_asked_of_every_client(serve):
    _, url, _ = serve("--token", "secret", "--host", "0.0.0.0")
    assert re.fullmatch(r"http://0\.0\.0\.0:\d+", url)
    assert httpx.get(f"{url}/health").status_code == 401
    assert httpx.get(f"{url}/health", headers={"Authorization": "Bearer secret"}).json() == {"status": "ok"}
