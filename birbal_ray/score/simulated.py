"""An engine that makes answers up, for tests of everything around an engine.

It keeps the contract of the real one: the same tests run against both.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Iterable, Sequence

from birbal_ray.score.engine import Completion, Request, RequestRefusedError, TokenLogprob
from birbal_ray.score.tokens import NUM_EMBEDDINGS, word_token_ids

WORDS = ("yes", "no", "red", "seven", "the river runs north", "a quiet morning", "it depends on the weather")
BLOCK_TOKENS = 32  # prefixes are cached in whole blocks
START_FAILURE = "SIMULATED_START_FAILURE"  # an environment variable: engines of this node never start
ROW_ERROR, ENGINE_DEATH, SAYS = "SIMULATED-ROW-ERROR", "SIMULATED-ENGINE-DEATH", "SIMULATED-SAYS "


class SimulatedEngine:
    """Answers with a hash of the prompt; each request takes `row_seconds`.

    A prompt whose last input holds SIMULATED-ROW-ERROR is refused, one that holds SIMULATED-ENGINE-DEATH ends the
    engine, one that holds SIMULATED-SAYS and a JSON string is answered with that string.
    """

    def __init__(self, row_seconds: float = 0.0, max_model_len: int = 2048, adapters: Iterable[str] = ()) -> None:
        self.max_model_len = max_model_len
        self._row_seconds, self._adapters = row_seconds, frozenset(adapters)
        self._queue: dict[str, Request] = {}
        self._cached: set[int] = set()  # of each block computed, a hash of the tokens up to its end
        self._unseeded = itertools.count()

    def add(self, key: str, request: Request) -> None:
        """Queue a request, unless a real engine would refuse it or it asks for an error."""
        ids, sampling = request.token_ids, request.sampling
        if ROW_ERROR in request.prompt.rsplit("### Input:", 1)[-1]:
            raise RequestRefusedError("simulated row error")
        if request.adapter and request.adapter not in self._adapters:
            raise RequestRefusedError(f"no adapter {request.adapter!r}")
        if not 0 < len(ids) < self.max_model_len:
            raise RequestRefusedError(f"the prompt has {len(ids)} tokens, expected 1 to {self.max_model_len - 1}")
        if not 0 <= min(ids) <= max(ids) < NUM_EMBEDDINGS:
            raise RequestRefusedError(f"token id {max(ids)} is beyond the model's {NUM_EMBEDDINGS} embeddings")
        if request.max_tokens < 1 or not 0 <= sampling.temperature <= 2 or not 0 < sampling.top_p <= 1:
            raise RequestRefusedError("max_tokens, temperature or top_p is out of range")
        self._queue[key] = request

    def step(self) -> list[tuple[str, Completion]]:
        """Finish the oldest request."""
        key, request = next(iter(self._queue.items()))
        if ENGINE_DEATH in request.prompt:
            raise RuntimeError("simulated engine death")
        del self._queue[key]
        if self._row_seconds and request.prompt:  # a prefix sent ahead has none
            time.sleep(self._row_seconds)
        words = self._answer(request).split(" ")
        room = min(request.max_tokens, self.max_model_len - len(request.token_ids))
        ids, finish_reason = word_token_ids(words[:room]), "stop" if len(words) <= room else "length"
        if ends := [place for place, token_id in enumerate(ids) if token_id in request.sampling.stop_token_ids]:
            ids, room, finish_reason = ids[: ends[0] + 1], ends[0], "stop"
        text = " ".join(words[:room])
        if ends := [text.index(stop) for stop in request.sampling.stop if stop in text]:
            text, finish_reason = text[: min(ends)], "stop"
        completion = Completion(
            text,
            self._use_cache(request),
            len(ids),
            finish_reason,
            tokens=_token_logprobs(ids) if request.sampling.logprobs else (),
            prompt_tokens=_token_logprobs(request.token_ids[1:]) if request.sampling.prompt_logprobs else (),
        )
        return [(key, completion)]

    def abort(self, key: str) -> None:
        """Drop the request."""
        self._queue.pop(key, None)

    def has_unfinished(self) -> bool:
        """Whether any request is queued."""
        return bool(self._queue)

    def _answer(self, request: Request) -> str:
        if SAYS in request.prompt:
            said, _ = json.JSONDecoder().raw_decode(request.prompt.split(SAYS, 1)[1])
            return str(said)
        seed = request.sampling.seed
        chance = f"unseeded {next(self._unseeded)}" if seed is None else f"seed {seed}"
        seen = f"{request.adapter}{request.prompt}{'' if request.sampling.greedy else chance}".encode()
        return WORDS[int.from_bytes(hashlib.blake2b(seen, digest_size=4).digest()) % len(WORDS)]

    def _use_cache(self, request: Request) -> int:
        """Tokens of the prompt's leading blocks that an earlier prompt computed; at least one is always computed."""
        ids = tuple(request.token_ids)
        blocks = [hash((request.adapter, ids[:end])) for end in range(BLOCK_TOKENS, len(ids), BLOCK_TOKENS)]
        num_cached = sum(1 for _ in itertools.takewhile(self._cached.__contains__, blocks))
        self._cached.update(blocks)
        return num_cached * BLOCK_TOKENS


def _token_logprobs(token_ids: Sequence[int]) -> tuple[TokenLogprob, ...]:
    """Made up: the likeliest token in place of each is the token itself."""
    made_up = [(one, -(one % 97 + 1) / 50) for one in token_ids]
    return tuple(TokenLogprob(token_id, logprob, token_id, logprob) for token_id, logprob in made_up)
