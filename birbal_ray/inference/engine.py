"""Inference engines: vLLM in this process, fed request by request."""

from __future__ import annotations

import hashlib
import itertools
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

from birbal_ray.config.score import EngineSettings, ResourceSettings
from birbal_ray.ni.prompt import STOP

CPU_MAX_NUM_SEQS, GPU_MAX_NUM_SEQS = 32, 256
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # vLLM's choice
CPU_BLOCK_TOKENS = 32  # the smallest its attention kernel takes


class EngineDeadError(RuntimeError):
    """The engine failed as a whole; its process must be replaced."""


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt. `token_ids` are those of `prompt`, special tokens included."""

    prompt: str
    token_ids: Sequence[int]
    max_tokens: int
    adapter: str = ""  # name of one that the engine was made with; none: the base model


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter that an engine serves beside its model. `path`: a PEFT folder."""

    name: str
    path: str
    rank: int


@dataclass(frozen=True, slots=True)
class Completion:
    """What came back: greedy text up to the stop string, or an `error` for this request alone."""

    text: str
    num_cached_tokens: int | None
    num_completion_tokens: int
    finish_reason: str | None
    error: str | None = None


class Engine(Protocol):
    """Requests go in one by one, completions come out of `step` as they finish. Not thread-safe."""

    caches_prefixes: bool

    def add(self, key: str, request: Request) -> None:
        """Queue a request under a key of the caller's; raises ValueError when it is not acceptable."""

    def step(self) -> list[tuple[str, Completion]]:
        """Advance all queued requests; (key, completion) of those that finished."""

    def has_unfinished(self) -> bool:
        """Whether `step` has work."""


class VllmEngine:
    """vLLM without its extra process.

    In-process because it is up in a third of the time and hands out `num_cached_tokens` per request
    (docs/decisions/0002).
    """

    caches_prefixes = True

    def __init__(
        self, model: Path, engine: EngineSettings, resources: ResourceSettings, adapters: Sequence[Adapter] = ()
    ) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        cpu = engine.device == "cpu"
        if cpu:
            os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, round(resources.kv_cache_gib)))
        from vllm import LLM, SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import RequestOutputKind

        if cpu and resources.threads_per_replica:
            import torch

            torch.set_num_threads(resources.threads_per_replica)
        self._tokens_prompt = TokensPrompt
        self._sampling = SamplingParams
        self._final_only = RequestOutputKind.FINAL_ONLY
        self._adapters = {one.name: LoRARequest(one.name, n, one.path) for n, one in enumerate(adapters, 1)}
        lora = {"enable_lora": True, "max_loras": 1, "max_lora_rank": _lora_rank(adapters)} if adapters else {}
        self._engine = LLM(
            model=str(model),
            # Without AVX-512 bf16 ran at 0.78 against float32's 4.75 requests/s.
            dtype="float32" if cpu and engine.dtype == "auto" else engine.dtype,
            max_model_len=engine.max_model_len,
            max_num_seqs=resources.max_num_seqs or (CPU_MAX_NUM_SEQS if cpu else GPU_MAX_NUM_SEQS),
            gpu_memory_utilization=resources.gpu_memory_utilization,
            enforce_eager=cpu,
            enable_prefix_caching=True,
            # Prefixes are shared in whole blocks; the CPU default of 128 tokens loses a third of them
            # (0.62 of the prompt tokens from the cache and 3.9 requests/s, against 0.81 and 5.4).
            block_size=CPU_BLOCK_TOKENS if cpu else None,
            generation_config="vllm",  # not the model's own sampling defaults: decoding is greedy
            trust_remote_code=False,
            disable_log_stats=True,
            seed=0,
            **lora,
        ).llm_engine
        # Ready means that it has answered: a broken engine shows here, and the first real prompt is not the slow one.
        self.add("warm-up", Request("", [0], 2))
        while self.has_unfinished():
            self.step()

    def add(self, key: str, request: Request) -> None:
        """Queue a request; vLLM's own validation raises ValueError."""
        params = self._sampling(
            temperature=0.0, max_tokens=request.max_tokens, stop=[STOP], output_kind=self._final_only
        )
        prompt = self._tokens_prompt(prompt_token_ids=list(request.token_ids))
        lora = self._adapters[request.adapter] if request.adapter else None
        self._engine.add_request(key, prompt, params, lora_request=lora)

    def step(self) -> list[tuple[str, Completion]]:
        """One scheduler step: a chunk of prefill, one token for every running sequence."""
        finished = []
        for output in self._engine.step():
            if output.finished:
                best = output.outputs[0]
                completion = Completion(best.text, output.num_cached_tokens, len(best.token_ids), best.finish_reason)
                finished.append((output.request_id, completion))
        return finished

    def has_unfinished(self) -> bool:
        """Whether any request is queued or running."""
        return self._engine.has_unfinished_requests()


class SimulatedEngine:
    """Makes answers up from a hash of the prompt; for tests of everything around an engine.

    A prompt that holds SIMULATED-ROW-ERROR is refused, one that holds SIMULATED-ENGINE-DEATH ends
    the engine. Each request takes `row_seconds`.
    """

    caches_prefixes = False
    WORDS = ("yes", "no", "red", "seven", "the river runs north", "a quiet morning", "it depends on the weather")

    def __init__(self, row_seconds: float = 0.0) -> None:
        self._row_seconds = row_seconds
        self._queue: deque[tuple[str, Request]] = deque()

    def add(self, key: str, request: Request) -> None:
        """Queue a request, unless it asks for an error."""
        if "SIMULATED-ROW-ERROR" in request.prompt.rsplit("### Input:", 1)[-1]:
            raise ValueError("simulated row error")
        self._queue.append((key, request))

    def step(self) -> list[tuple[str, Completion]]:
        """Finish the oldest request."""
        key, request = self._queue.popleft()
        if "SIMULATED-ENGINE-DEATH" in request.prompt:
            raise RuntimeError("simulated engine death")
        if self._row_seconds:
            time.sleep(self._row_seconds)
        seen = f"{request.adapter}{request.prompt}".encode()
        pick = int.from_bytes(hashlib.blake2b(seen, digest_size=4).digest())
        text = self.WORDS[pick % len(self.WORDS)]
        return [(key, Completion(text, None, len(text.split()), "stop"))]

    def has_unfinished(self) -> bool:
        """Whether any request is queued."""
        return bool(self._queue)


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
    """

    def __init__(self, make_engine: Callable[[], Engine]) -> None:
        """Returns when the engine is made; raises what `make_engine` raises."""
        self._engine: Engine
        self._inbox: queue.SimpleQueue[_Group] = queue.SimpleQueue()
        self._running: dict[str, Callable[[Completion], None]] = {}
        self._waiting: dict[_Prefix, list[_Group]] = {}  # groups behind a prefix being computed
        self._keys = itertools.count()
        self._open: set[Future[Completion]] = set()
        self._death: str | None = None
        self._lock = threading.Lock()
        made: Future[None] = Future()
        threading.Thread(target=self._run, args=(make_engine, made), name="engine", daemon=True).start()
        made.result()

    def submit(self, requests: Sequence[Request], prefix: Sequence[int] = ()) -> list[Future[Completion]]:
        """Futures of the completions, in the requests' order.

        `prefix` holds the token ids that all requests begin with (at least nearly: only whole cache
        blocks that agree are used); then they all name the same adapter. Raises EngineDeadError when
        the engine died before.
        """
        group = _Group((requests[0].adapter if requests else "", tuple(prefix)), requests, [Future() for _ in requests])
        with self._lock:
            if self._death is not None:
                raise EngineDeadError(self._death)
            self._open.update(group.futures)
            self._inbox.put(group)
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
        except Exception as error:  # whatever the engine raises, its callers must hear of it
            with self._lock:
                self._death = f"{type(error).__name__}: {_one_line(error)}"
                for future in self._open:
                    future.set_exception(EngineDeadError(self._death))

    def _take_new(self, *, block: bool) -> None:
        while True:
            try:
                group = self._inbox.get(block=block)
            except queue.Empty:
                return
            block = False
            if not group.prefix[1] or not self._engine.caches_prefixes:
                self._start(group, 0)
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
            self._add(request, partial(self._finish, future, computed))
            computed = 0

    def _finish(self, future: Future[Completion], computed: int, completion: Completion) -> None:
        if computed and completion.num_cached_tokens is not None:
            completion = replace(completion, num_cached_tokens=max(0, completion.num_cached_tokens - computed))
        with self._lock:
            self._open.discard(future)
        future.set_result(completion)

    def _add(self, request: Request, done: Callable[[Completion], None]) -> None:
        key = str(next(self._keys))  # not the row id: a shard may be retried beside its own ghost
        try:
            self._engine.add(key, request)
        except ValueError as error:
            done(Completion("", None, 0, None, f"refused by the engine: {_one_line(error)}"))
        else:
            self._running[key] = done


def load_engine(
    model: Path, engine: EngineSettings, resources: ResourceSettings, adapters: Sequence[Adapter] = ()
) -> Engine:
    """The engine that the settings name; `engine.device` must be resolved (cpu or gpu)."""
    if engine.backend == "simulated":
        return SimulatedEngine(resources.simulated_row_seconds)
    return VllmEngine(model, engine, resources, adapters)


def _lora_rank(adapters: Sequence[Adapter]) -> int:
    """The smallest rank that vLLM provides for and that holds all adapters."""
    wanted = max(one.rank for one in adapters)
    return next((rank for rank in LORA_RANKS if rank >= wanted), wanted)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
