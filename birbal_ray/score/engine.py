"""Inference engines: vLLM in this process, fed request by request."""

from __future__ import annotations

import hashlib
import os
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from birbal_ray.ni.prompt import STOP
from birbal_ray.score.config import EngineSettings, ResourceSettings

CPU_MAX_NUM_SEQS, GPU_MAX_NUM_SEQS = 32, 256
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # vLLM's choice
CPU_BLOCK_TOKENS = 32  # the smallest its attention kernel takes


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
