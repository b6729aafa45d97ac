"""What an engine is given where it shares a card or a process with others."""

from __future__ import annotations

import threading

import pytest

from birbal_ray.score import engine, stages


def test_what_a_user_has_set_for_vllm_wins(monkeypatch):
    monkeypatch.setenv("VLLM_USE_FLASHINFER_SAMPLER", "1")
    monkeypatch.delenv("VLLM_WORKER_MULTIPROC_METHOD", raising=False)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")  # a setting wins over it
    engine.set_vllm_environment(3.2)
    assert engine.os.environ["VLLM_USE_FLASHINFER_SAMPLER"] == "1"
    assert engine.os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
    assert engine.os.environ["VLLM_CPU_KVCACHE_SPACE"] == "3"


@pytest.mark.parametrize(("gpus_per_replica", "waits"), [(0.5, True), (1.0, False), (2.0, False)])
def test_engines_that_share_a_card_start_one_after_the_other(gpus_per_replica, waits, monkeypatch, tmp_path):
    monkeypatch.setattr(stages.tempfile, "gettempdir", lambda: str(tmp_path))
    inside = threading.Event()

    def start():
        with stages._turn_on_card(gpus_per_replica):
            inside.set()

    other = threading.Thread(target=start)
    with stages._turn_on_card(gpus_per_replica):
        other.start()
        assert inside.wait(0.3) is not waits
    other.join()
    assert inside.is_set()
