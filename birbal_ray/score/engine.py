"""Inference engines: the contract, vLLM in this process, and whether one applies the adapter that it serves."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from birbal_ray.models import ModelError, read_json_object
from birbal_ray.ni.prompt import STOP
from birbal_ray.schemas import REFERENCE_FILE
from birbal_ray.score.config import EngineSettings, ResourceSettings

CPU_MAX_NUM_SEQS = 32
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # vLLM's choice
CPU_BLOCK_TOKENS = 32  # the smallest its attention kernel takes
GREEDY_TEMPERATURE = 1e-6  # up to here the likeliest token is taken
LOWEST_LOGPROB = -1e4  # stands for a probability of zero, whose logarithm no JSON can hold


class RequestRefusedError(ValueError):
    """The engine can't serve this one request; the message says why. Every other request goes on."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. The defaults: greedy, up to the stop string that ends a few-shot answer."""

    temperature: float = 0.0  # 0 to 2; up to GREEDY_TEMPERATURE: greedy
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0
    seed: int | None = None  # of this request alone; None: another text each time
    stop: tuple[str, ...] = (STOP,)  # the completion's text ends before the first of them
    stop_token_ids: tuple[int, ...] = ()  # beside EOS: the completion ends before the first of them
    logprobs: bool = False  # fill Completion.tokens
    prompt_logprobs: bool = False  # fill Completion.prompt_tokens

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return 0 <= self.temperature <= GREEDY_TEMPERATURE


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt. `token_ids` are those of `prompt`, special tokens included."""

    prompt: str
    token_ids: Sequence[int]
    max_tokens: int
    adapter: str = ""  # name of one that the engine was made with; none: the base model
    sampling: Sampling = Sampling()


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter that an engine serves beside its model. `path`: a PEFT folder."""

    name: str
    path: str
    rank: int
    modules: tuple[str, ...] = ()  # that it changes in a layer (q_proj); none: it may change any


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token, its natural log probability before temperature, top_k and top_p, and the likeliest in its place."""

    token_id: int
    logprob: float  # finite, at most 0
    top_token_id: int
    top_logprob: float


@dataclass(frozen=True, slots=True)
class Completion:
    """What came back: text up to a stop string, or an `error` for this request alone.

    `tokens` holds the uncut completion, `prompt_tokens` the prompt's tokens from the second one on (nothing comes
    before the first); both are empty unless the request asked for them.
    """

    text: str
    num_cached_tokens: int | None
    num_completion_tokens: int
    finish_reason: str | None
    error: str | None = None
    tokens: tuple[TokenLogprob, ...] = ()
    prompt_tokens: tuple[TokenLogprob, ...] = ()


class Engine(Protocol):
    """Requests go in one by one, completions come out of `step` as they finish. Not thread-safe."""

    max_model_len: int  # prompt and completion tokens together

    def add(self, key: str, request: Request) -> None:
        """Queue a request under a key of the caller's; raises RequestRefusedError when it can't be served."""

    def step(self) -> list[tuple[str, Completion]]:
        """Advance all queued requests; (key, completion) of those that finished."""

    def abort(self, key: str) -> None:
        """Forget a request; its key never comes out of `step`. A key that is not queued changes nothing."""

    def has_unfinished(self) -> bool:
        """Whether `step` has work."""


def vllm_arguments(
    model: Path, engine: EngineSettings, resources: ResourceSettings, adapters: Sequence[Adapter] = ()
) -> dict[str, Any]:
    """Keyword arguments of `vllm.LLM` for these settings; `engine.arguments` win where both name one."""
    if engine.device == "cpu":
        device: dict[str, Any] = {
            "max_num_seqs": CPU_MAX_NUM_SEQS,
            "enforce_eager": True,
            # Prefixes are shared in whole blocks; the CPU default of 128 tokens loses a third of them
            # (0.62 of the prompt tokens from the cache and 3.9 requests/s, against 0.81 and 5.4).
            "block_size": CPU_BLOCK_TOKENS,
        }
    else:
        share = min(1.0, resources.gpus_per_replica)  # replicas on one card divide its memory
        device = {"gpu_memory_utilization": resources.gpu_memory_utilization * share}
        if resources.gpus_per_replica > 1:
            # "mp": inside a Ray actor vLLM would ask Ray for the cards that this actor holds already.
            device |= {"tensor_parallel_size": int(resources.gpus_per_replica), "distributed_executor_backend": "mp"}
    if resources.max_num_seqs:
        device["max_num_seqs"] = resources.max_num_seqs
    if adapters:
        rank = lora_rank(max(one.rank for one in adapters))
        # On a CPU vLLM 0.29 takes the last place for requests without an adapter. It must stay empty, or the base
        # model's prompts are answered with the adapter where both are in a batch.
        places = 1 + len(adapters) if engine.device == "cpu" else 1
        device |= {"enable_lora": True, "max_loras": places, "max_lora_rank": rank}
    return {
        "model": str(model),
        # Without AVX-512 bf16 ran at 0.78 against float32's 4.75 requests/s.
        "dtype": "float32" if engine.device == "cpu" and engine.dtype == "auto" else engine.dtype,
        "max_model_len": engine.max_model_len,
        "enable_prefix_caching": True,
        "generation_config": "vllm",  # not the model's own sampling defaults
        "trust_remote_code": False,
        "disable_log_stats": True,
        "seed": 0,
        **device,
        **engine.arguments,
    }


def lora_rank(rank: int) -> int:
    """The rank that vLLM must provide for adapters up to `rank`; it refuses a larger one than it knows."""
    return next((choice for choice in LORA_RANKS if choice >= rank), rank)


def set_vllm_environment(kv_cache_gib: float | None = None) -> None:
    """Set what vLLM reads from the environment when it is imported; the user's own values win.

    `kv_cache_gib`: of its CPU engine, a setting, which wins.
    """
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # FlashInfer's sampler is compiled by nvcc when the engine starts, and few machines have one; greedy and seeded
    # requests never use it.
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    # Tensor parallel: a fork of a process that has asked torch for its cards can't use them.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    if kv_cache_gib is not None:
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, round(kv_cache_gib)))


class VllmEngine:
    """vLLM without its extra process.

    In-process because it is up in a third of the time and hands out `num_cached_tokens` per request
    (docs/decisions/0002).
    """

    def __init__(
        self, model: Path, engine: EngineSettings, resources: ResourceSettings, adapters: Sequence[Adapter] = ()
    ) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        set_vllm_environment(resources.kv_cache_gib if engine.device == "cpu" else None)
        from vllm import LLM, SamplingParams
        from vllm.exceptions import VLLMClientError
        from vllm.inputs import TokensPrompt
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import RequestOutputKind

        if engine.device == "cpu" and resources.threads_per_replica:
            import torch

            torch.set_num_threads(resources.threads_per_replica)
        self._tokens_prompt, self._sampling_params = TokensPrompt, SamplingParams
        self._final_only = RequestOutputKind.FINAL_ONLY
        # vLLM's own refusals are no ValueErrors; some that it never gave a class of its own are.
        self._refusals = (VLLMClientError, ValueError, TypeError)
        self._adapters = {one.name: LoRARequest(one.name, n, one.path) for n, one in enumerate(adapters, 1)}
        arguments = vllm_arguments(model, engine, resources, adapters)
        if engine.device == "cpu" and all(one.modules for one in adapters):
            # Else the output layer is prepared for adapters, too, and there vLLM 0.29 dies of the prompt log
            # probabilities of two requests at once.
            modules = {name for one in adapters for name in one.modules}
            arguments.setdefault("lora_target_modules", sorted(modules) or None)
        self._engine = LLM(**arguments).llm_engine
        self.max_model_len = self._engine.model_config.max_model_len
        self._num_embeddings = self._engine.model_config.get_vocab_size()
        # Ready means that it has answered: a broken engine shows here, and the first real prompt is not the slow one.
        self.add("warm-up", Request("", [0], 2))
        while self.has_unfinished():
            self.step()

    def add(self, key: str, request: Request) -> None:
        """Queue a request. Its ids are checked against the model's embedding: vLLM lets a larger tokenizer's pass."""
        if request.adapter and request.adapter not in self._adapters:
            raise RequestRefusedError(f"no adapter {request.adapter!r}; there are: {', '.join(self._adapters) or '-'}")
        if max(request.token_ids, default=0) >= self._num_embeddings:
            raise RequestRefusedError(
                f"token id {max(request.token_ids)} is beyond the model's {self._num_embeddings} embeddings; "
                "is the tokenizer another model's?"
            )
        chosen = request.sampling
        try:
            params = self._sampling_params(
                temperature=0.0 if chosen.greedy else chosen.temperature,
                top_k=chosen.top_k,
                top_p=chosen.top_p,
                seed=chosen.seed,
                stop=list(chosen.stop),
                stop_token_ids=list(chosen.stop_token_ids),
                max_tokens=request.max_tokens,
                logprobs=1 if chosen.logprobs else None,
                prompt_logprobs=1 if chosen.prompt_logprobs else None,
                output_kind=self._final_only,
            )
            prompt = self._tokens_prompt(prompt_token_ids=list(request.token_ids))
            self._engine.add_request(key, prompt, params, lora_request=self._adapters.get(request.adapter))
        except self._refusals as error:
            raise RequestRefusedError(str(error)) from error

    def step(self) -> list[tuple[str, Completion]]:
        """One scheduler step: a chunk of prefill, one token for every running sequence."""
        finished = []
        for output in self._engine.step():
            if output.finished:
                best = output.outputs[0]
                completion = Completion(
                    best.text,
                    output.num_cached_tokens,
                    len(best.token_ids),
                    best.finish_reason,
                    tokens=_token_logprobs(best.token_ids, best.logprobs or ()),
                    prompt_tokens=_token_logprobs(
                        (output.prompt_token_ids or [])[1:], (output.prompt_logprobs or [])[1:]
                    ),
                )
                finished.append((output.request_id, completion))
        return finished

    def abort(self, key: str) -> None:
        """Free the request's place in the batch and its cache blocks."""
        self._engine.abort_request([key])

    def has_unfinished(self) -> bool:
        """Whether any request is queued or running."""
        return self._engine.has_unfinished_requests()


def _token_logprobs(token_ids: Iterable[int], positions: Iterable[Any]) -> tuple[TokenLogprob, ...]:
    """`positions`: per token vLLM's {token id: Logprob}, which holds the token itself and the likeliest one."""

    def finite(value: float) -> float:
        return value if math.isfinite(value) else LOWEST_LOGPROB

    found = []
    for token_id, candidates in zip(token_ids, positions, strict=False):  # no positions: nobody asked
        top = min(candidates, key=lambda one: candidates[one].rank)
        found.append(TokenLogprob(token_id, finite(candidates[token_id].logprob), top, finite(candidates[top].logprob)))
    return tuple(found)


# An engine that finds none of an adapter's modules serves the base model without an error. Training leaves
# reference.json beside an adapter: of a few prompts the likeliest next tokens, with their log probabilities under the
# adapter and under the base model. An engine that serves the adapter changes them as PEFT does.
MIN_APPLIED = 0.1  # an engine that shows less of an adapter's change than this does not apply it
# The smallest change that is looked at, in nats: in one engine, with and without the adapter; and for a model that it
# was folded into, of whose base model only PEFT was asked.
MIN_CHANGE, MIN_CHANGE_FOLDED = 0.1, 1.0


@dataclass(frozen=True, slots=True)
class Agreement:
    """An engine against PEFT, over one next token of each prompt: the one that the adapter changes most."""

    change_nats: float  # PEFT's largest change of a log probability by the adapter
    applied_fraction: float  # of PEFT's change in the engine: 1 is all of it, 0 the base model
    difference_nats: float  # largest distance of the engine's log probability from PEFT's, adapter on


def check_engine(engine: Engine, model: Path, adapters: Sequence[Adapter]) -> None:
    """Refuse an engine that does not apply what has a reference.json: its model, if folded, and each adapter.

    Raises ModelError with the numbers.
    """
    folded = "it is not the adapter that was folded into this model"
    beside = "fold it in with `birbal merge` (evaluate: --set serve_adapters=merged)"
    for name, folder, least in [
        ("", model, MIN_CHANGE_FOLDED),
        *((a.name, Path(a.path), MIN_CHANGE) for a in adapters),
    ]:
        if (folder / REFERENCE_FILE).is_file():
            reference = read_json_object(folder / REFERENCE_FILE, f"adapter in {folder}")
            if reason := why_not_applied(compare_with_peft(engine, reference, name), least):
                raise ModelError(f"adapter in {folder}: {reason}; {beside if name else folded}")


def compare_with_peft(engine: Engine, reference: Mapping[str, Any], adapter: str = "") -> Agreement:
    """Ask the engine for the reference's prompts; without `adapter` its model is one that the adapter was folded into.

    Prompts longer than the engine takes are left out.
    """
    probes = []  # (token ids with the next token, PEFT's log probability with the adapter, without it)
    for prompt in reference["prompts"]:
        choices = zip(prompt["next_token_ids"], prompt["adapter_log_probs"], prompt["base_log_probs"], strict=True)
        token, with_adapter, without = max(choices, key=lambda one: abs(one[1] - one[2]))
        if len(prompt["token_ids"]) + 1 < engine.max_model_len:
            probes.append(([*prompt["token_ids"], token], with_adapter, without))
    served = _last_log_probs(engine, [ids for ids, *_ in probes], adapter)
    base = _last_log_probs(engine, [ids for ids, *_ in probes], "") if adapter else [probe[2] for probe in probes]
    changes = [with_adapter - without for _, with_adapter, without in probes]
    shown = sum((a - b) * change for a, b, change in zip(served, base, changes, strict=True))
    return Agreement(
        change_nats=max(map(abs, changes), default=0.0),
        applied_fraction=shown / max(1e-12, sum(change**2 for change in changes)),
        difference_nats=max((abs(a - probe[1]) for a, probe in zip(served, probes, strict=True)), default=0.0),
    )


def why_not_applied(found: Agreement, least_change: float = MIN_CHANGE) -> str | None:
    """Why the engine can't have applied the adapter, or None; a change under `least_change` nats proves nothing."""
    if found.change_nats < least_change or found.applied_fraction >= MIN_APPLIED:
        return None
    return (
        f"it changes PEFT's log probabilities by up to {found.change_nats:.2f} nats, and the engine shows "
        f"{max(0.0, found.applied_fraction):.0%} of that change: the engine does not apply it"
    )


def _last_log_probs(engine: Engine, prompts: Sequence[Sequence[int]], adapter: str) -> list[float]:
    """The log probability of each prompt's last token, in nats."""
    asked = Sampling(prompt_logprobs=True)
    for number, ids in enumerate(prompts):
        engine.add(f"reference-{number}", Request("", ids, 1, adapter, asked))
    found: dict[str, float] = {}
    while engine.has_unfinished():
        found |= {key: done.prompt_tokens[-1].logprob for key, done in engine.step()}
    return [found[f"reference-{number}"] for number in range(len(prompts))]
