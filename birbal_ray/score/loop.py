"""The thread that owns an engine and feeds it from many callers, and the turns in which these come."""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial

from birbal_ray.score.engine import Completion, Engine, Request, RequestRefusedError
from birbal_ray.settings import one_line


class EngineDeadError(RuntimeError):
    """The engine failed as a whole; its process must be replaced."""


_Prefix = tuple[str, tuple[int, ...]]  # adapter, token ids: what is cached under one isn't for another


@dataclass(frozen=True, slots=True)
class _Group:
    """Requests that begin with the same tokens, and where their completions go."""

    prefix: _Prefix
    requests: Sequence[Request]
    futures: list[Future[Completion]]


class EngineLoop:
    """A thread that owns an engine and feeds it requests from any number of threads.

    The engine is made in that thread too: OpenMP keeps a pool of (bound) threads per calling thread,
    and one that was set up elsewhere is not used (5.9 instead of 7.1-8.7 rows/s on two cores).
    Requests join the running batch as they come, so the engine never drains between two callers'
    shards. A group's shared prefix goes in ahead, alone, for one step: prompts that are scheduled
    together before their prefix is cached would each compute it (measured: 0.63 instead of 0.8 of
    the prompt tokens from the cache). The group's first completion pays for it, in
    `num_cached_tokens`. When the engine fails, every pending and later call gets EngineDeadError.

    Groups that come together start with the longest completions: else these end last, beside idle places.
    `gather_seconds`: how long an idle engine waits for more groups after the first one.
    """

    def __init__(self, make_engine: Callable[[], Engine], gather_seconds: float = 0.0) -> None:
        """Returns when the engine is made; raises what `make_engine` raises."""
        self._engine: Engine
        self._gather_seconds = gather_seconds
        self._inbox: queue.SimpleQueue[_Group | Future[Completion]] = queue.SimpleQueue()  # a future: cancelled
        self._running: dict[str, Callable[[Completion], None]] = {}
        self._waiting: dict[_Prefix, list[_Group]] = {}  # groups behind a prefix being computed
        self._keys = itertools.count()
        self._open: dict[Future[Completion], str] = {}  # key in the engine; "": not there yet
        self.death: str | None = None  # why the engine failed
        self._lock = threading.Lock()
        made: Future[None] = Future()
        threading.Thread(target=self._run, args=(make_engine, made), name="engine", daemon=True).start()
        made.result()

    @property
    def max_model_len(self) -> int:
        """Tokens of a prompt and its completion together, at most."""
        return self._engine.max_model_len

    def submit(self, requests: Sequence[Request], prefix: Sequence[int] = ()) -> list[Future[Completion]]:
        """Futures of the completions, in the requests' order. Cancelling one frees its place in the batch.

        `prefix` holds the token ids that all requests begin with (at least nearly: only whole cache
        blocks that agree are used); then they all name the same adapter. Raises EngineDeadError when
        the engine died before.
        """
        group = _Group((requests[0].adapter if requests else "", tuple(prefix)), requests, [Future() for _ in requests])
        with self._lock:
            if self.death is not None:
                raise EngineDeadError(self.death)
            self._open.update(dict.fromkeys(group.futures, ""))
            self._inbox.put(group)
        for future in group.futures:
            future.add_done_callback(lambda done: self._inbox.put(done) if done.cancelled() else None)
        return group.futures

    def _run(self, make_engine: Callable[[], Engine], made: Future[None]) -> None:
        try:
            self._engine = make_engine()
        except BaseException as error:  # raised to whoever waits for the engine
            made.set_exception(error)
            return
        made.set_result(None)
        try:
            while True:
                self._take_new(block=not self._engine.has_unfinished())
                for key, completion in self._engine.step() if self._engine.has_unfinished() else ():
                    self._running.pop(key)(completion)
        except BaseException as error:  # whatever the engine raises, its callers must hear of it
            with self._lock:
                self.death = f"{type(error).__name__}: {one_line(error)[:300]}"
            for future in list(self._open):
                if future.set_running_or_notify_cancel():
                    future.set_exception(EngineDeadError(self.death))

    def _take_new(self, *, block: bool) -> None:
        new = []
        with contextlib.suppress(queue.Empty):
            if block:
                new.append(self._inbox.get())
                time.sleep(self._gather_seconds)
            while True:
                new.append(self._inbox.get_nowait())
        for cancelled in (one for one in new if isinstance(one, Future)):
            if key := self._open.pop(cancelled, ""):
                self._engine.abort(key)
                self._running.pop(key, None)
        groups = [one for one in new if isinstance(one, _Group)]
        for group in sorted(groups, key=lambda one: -max((request.max_tokens for request in one.requests), default=0)):
            if not group.requests or not 0 < len(group.prefix[1]) < self._engine.max_model_len:
                self._start(group, 0)  # nobody uses the prefix, or it doesn't fit and would only be refused
            elif group.prefix in self._waiting:
                self._waiting[group.prefix].append(group)
            else:
                self._waiting[group.prefix] = [group]
                adapter, token_ids = group.prefix
                self._add(Request("", token_ids, 1, adapter), partial(self._prefix_ready, group.prefix))

    def _prefix_ready(self, prefix: _Prefix, completion: Completion) -> None:
        computed = 0 if completion.error else len(prefix[1]) - (completion.num_cached_tokens or 0)
        for group in self._waiting.pop(prefix):
            self._start(group, computed)
            computed = 0

    def _start(self, group: _Group, computed: int) -> None:
        for request, future in zip(group.requests, group.futures, strict=True):
            if not future.cancelled():
                key = self._add(request, partial(self._finish, future, computed))
                if key in self._running:  # not refused
                    self._open[future] = key
                computed = 0

    def _finish(self, future: Future[Completion], computed: int, completion: Completion) -> None:
        if computed and completion.num_cached_tokens is not None:
            completion = replace(completion, num_cached_tokens=max(0, completion.num_cached_tokens - computed))
        self._open.pop(future, None)
        if future.set_running_or_notify_cancel():
            future.set_result(completion)

    def _add(self, request: Request, done: Callable[[Completion], None]) -> str:
        key = str(next(self._keys))  # not the row id: a shard may be retried beside its own ghost
        try:
            self._engine.add(key, request)
        except RequestRefusedError as error:
            done(Completion("", None, 0, None, f"refused by the engine: {one_line(error)[:300]}"))
        else:
            self._running[key] = done
        return key


class Turns:
    """Lets `most` threads in, or one alone, in the order in which they come."""

    def __init__(self, most: int) -> None:
        self._most, self._entrance, self._places = most, threading.Lock(), threading.Semaphore(most)

    @contextlib.contextmanager
    def take(self, *, alone: bool) -> Iterator[None]:
        num_places = self._most if alone else 1
        with self._entrance:  # nobody passes one that waits until all places are free
            for _ in range(num_places):
                self._places.acquire()
        try:
            yield
        finally:
            self._places.release(num_places)
