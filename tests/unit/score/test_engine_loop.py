"""Requests join a running engine; a shared prefix goes ahead; a dead engine tells everybody."""

from __future__ import annotations

import threading

import pytest

from birbal_ray.score.engine import Completion, Request, SimulatedEngine
from birbal_ray.score.engine_loop import EngineDeadError, EngineLoop


class RecordingEngine:
    """Notes what is added; finishes a request when `release` allows; caches whole prefixes of 4 tokens."""

    caches_prefixes = True

    def __init__(self):
        self.added, self.queue, self.release = [], [], threading.Semaphore(0)

    def add(self, key, request):
        if request.prompt == "bad":
            raise ValueError("not\nacceptable")
        self.added.append((request.prompt, len(request.token_ids), request.max_tokens))
        self.queue.append((key, request))

    def step(self):
        self.release.acquire()
        key, request = self.queue.pop(0)
        if request.prompt == "die":
            raise MemoryError("device lost")
        cached = 0 if request.prompt == "" else 4
        return [(key, Completion(request.prompt.upper(), cached, 1, "stop"))]

    def has_unfinished(self):
        return bool(self.queue)


def requests(*prompts):
    return [Request(prompt, range(6), 8) for prompt in prompts]


def test_prefix_goes_ahead_and_the_first_completion_pays_for_it():
    engine = RecordingEngine()
    loop = EngineLoop(lambda: engine)
    engine.release.release(9)
    first, second = (future.result(5) for future in loop.submit(requests("a", "b"), prefix=range(4)))
    assert engine.added == [("", 4, 1), ("a", 6, 8), ("b", 6, 8)]
    assert (first.text, first.num_cached_tokens) == ("A", 0)
    assert (second.text, second.num_cached_tokens) == ("B", 4)


def test_groups_behind_one_prefix_share_it_and_order_is_kept():
    engine = RecordingEngine()
    loop = EngineLoop(lambda: engine)
    futures = [*loop.submit(requests("a"), prefix=range(4)), *loop.submit(requests("b", "c"), prefix=range(4))]
    engine.release.release(9)
    assert [future.result(5).text for future in futures] == ["A", "B", "C"]
    assert [prompt for prompt, _, _ in engine.added].count("") == 1


def test_a_refused_request_is_an_error_of_its_own():
    engine = RecordingEngine()
    engine.release.release(9)
    good, bad = EngineLoop(lambda: engine).submit(requests("good", "bad"))
    assert bad.result(5).error == "refused by the engine: not acceptable"
    assert good.result(5).error is None


def test_death_reaches_pending_and_later_callers():
    engine = RecordingEngine()
    loop = EngineLoop(lambda: engine)
    futures = loop.submit(requests("a", "die", "c"))
    engine.release.release(9)
    assert futures[0].result(5).text == "A"
    for future in futures[1:]:
        with pytest.raises(EngineDeadError, match="MemoryError: device lost"):
            future.result(5)
    with pytest.raises(EngineDeadError, match="device lost"):
        loop.submit(requests("later"))


def test_many_threads_get_their_own_answers():
    loop = EngineLoop(SimulatedEngine)
    expected = {text: EngineLoop(SimulatedEngine).submit(requests(text))[0].result(5).text for text in "abcdefgh"}
    results: dict[str, list[str]] = {}

    def ask(text):
        results[text] = [future.result(5).text for future in loop.submit(requests(*[text] * 20))]

    threads = [threading.Thread(target=ask, args=(text,)) for text in "abcdefgh"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert results == {text: [answer] * 20 for text, answer in expected.items()}
