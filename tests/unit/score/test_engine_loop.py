"""Requests join a running engine; a shared prefix goes ahead; a dead engine tells everybody."""

from __future__ import annotations

import threading

import pytest

from birbal_ray.score.engine import Completion, Request, RequestRefusedError
from birbal_ray.score.loop import EngineDeadError, EngineLoop
from birbal_ray.score.simulated import SimulatedEngine


class RecordingEngine:
    """Notes what is added; finishes a request when `release` allows; caches whole prefixes of 4 tokens."""

    max_model_len = 10

    def __init__(self):
        self.added, self.queue, self.release = [], [], threading.Semaphore(0)

    def add(self, key, request):
        if request.prompt == "bad":
            raise RequestRefusedError("not\nacceptable")
        self.added.append((request.prompt, len(request.token_ids), request.max_tokens))
        self.queue.append((key, request))

    def step(self):
        self.release.acquire()
        key, request = self.queue.pop(0)
        if request.prompt == "die":
            raise MemoryError("device lost")
        cached = 0 if request.prompt == "" else 4
        return [(key, Completion(request.prompt.upper(), cached, 1, "stop"))]

    def abort(self, key):
        self.queue = [entry for entry in self.queue if entry[0] != key]

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


def test_groups_that_come_together_start_with_the_longest_completions():
    engine = RecordingEngine()
    loop = EngineLoop(lambda: engine, gather_seconds=0.2)
    short, long = Request("short", range(6), 2), Request("long", range(6), 8)
    futures = [*loop.submit([short], prefix=range(4)), *loop.submit([long], prefix=range(1, 5))]
    engine.release.release(9)
    assert [future.result(5).text for future in futures] == ["SHORT", "LONG"]
    assert [prompt for prompt, *_ in engine.added if prompt] == ["long", "short"]


def test_a_refused_request_is_an_error_of_its_own():
    engine = RecordingEngine()
    engine.release.release(9)
    good, bad = EngineLoop(lambda: engine).submit(requests("good", "bad"))
    assert bad.result(5).error == "refused by the engine: not acceptable"
    assert good.result(5).error is None


@pytest.mark.parametrize("num_tokens", [10, 11, 500])
def test_a_prefix_that_does_not_fit_is_not_sent_ahead(num_tokens):
    engine = RecordingEngine()
    loop = EngineLoop(lambda: engine)
    engine.release.release(9)
    (future,) = loop.submit(requests("a"), prefix=range(num_tokens))
    assert future.result(5).text == "A"
    assert [prompt for prompt, _, _ in engine.added] == ["a"]


def test_a_prefix_that_nobody_uses_is_not_sent_ahead():
    engine = RecordingEngine()
    loop = EngineLoop(lambda: engine)
    engine.release.release(9)
    assert loop.submit([], prefix=range(4)) == []
    assert loop.submit(requests("a"))[0].result(5).text == "A"
    assert [prompt for prompt, _, _ in engine.added] == ["a"]


def test_a_refused_prefix_leaves_each_request_to_be_judged_alone():
    class RefusesPrefixes(RecordingEngine):
        def add(self, key, request):
            if request.prompt == "":
                raise RequestRefusedError("token id beyond the embeddings")
            super().add(key, request)

    engine = RefusesPrefixes()
    engine.release.release(9)
    good, bad = EngineLoop(lambda: engine).submit(requests("good", "bad"), prefix=range(4))
    assert (good.result(5).text, good.result(5).num_cached_tokens) == ("GOOD", 4)
    assert bad.result(5).error == "refused by the engine: not acceptable"


def test_a_cancelled_request_frees_its_place_and_harms_nobody():
    engine = RecordingEngine()
    loop = EngineLoop(lambda: engine)
    first, *futures = loop.submit(requests("first", "gone", "b"))
    engine.release.release()
    assert first.result(5).text == "FIRST"
    assert futures[0].cancel()
    (later,) = loop.submit(requests("later"))  # the engine's thread sees the cancellation before this
    engine.release.release(9)
    assert later.result(5).text == "LATER" and futures[1].result(5).text == "B"
    assert not engine.queue and loop.death is None
    assert not loop._open and not loop._running


def test_a_request_cancelled_behind_its_prefix_is_never_added():
    engine = RecordingEngine()
    loop = EngineLoop(lambda: engine)
    gone, stays = loop.submit(requests("gone", "stays"), prefix=range(4))
    assert gone.cancel()
    engine.release.release(9)
    assert stays.result(5).text == "STAYS"
    assert [prompt for prompt, _, _ in engine.added] == ["", "stays"]


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
