"""The submission server of the LLM Efficiency Challenge as a FastAPI app: schemas, routes, who may call.

`wrap_prompt` and `cut_answer` are what the challenge's server does to prompts and answers, pure.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel, Field

from birbal_ray import __version__
from birbal_ray.score import engine
from birbal_ray.score.loop import EngineDeadError, EngineLoop
from birbal_ray.score.monitor import COUNTED
from birbal_ray.score.tokens import Tokenizer, prompt_token_ids

CLIENT_GONE = 499  # nobody reads it
MAX_BODY_BYTES = 4 << 20  # a prompt of a whole book has less
BLANK_LINE = "\n\n"
ANSWER_WORDS = "the answer is"
_ANSWER = re.compile(rf"\s*{ANSWER_WORDS}(?:\s*:\s*|\s+)([^\W\d_])(?!\w)", re.IGNORECASE)


# A length makes pydantic look at the text: half a surrogate pair, which JSON can spell, is read by no tokenizer.
Text = Annotated[str, Field(min_length=0)]


class ProcessRequest(BaseModel):
    """A prompt to complete. Fields that are not here are ignored: HELM sends `top_p`, `stop_sequences` and others."""

    prompt: Text
    num_samples: int = Field(1, ge=1, le=1, description="the challenge doesn't say how several would be joined")
    max_new_tokens: int = Field(50, ge=0)
    top_k: int = Field(200, ge=0, description="0: all tokens")
    temperature: float = Field(1e-7, ge=0, le=2, allow_inf_nan=False, description="up to 1e-6: the likeliest token")
    seed: int | None = None
    echo_prompt: bool | None = None


class Token(BaseModel):
    """A token and its natural log probability, before temperature and top_k; the likeliest token in its place."""

    text: str
    logprob: float
    top_logprob: dict[str, float]


class ProcessResponse(BaseModel):
    """`text` follows the answer rule, `tokens` is the completion uncut; `logprob` is the sum over `tokens`."""

    text: str
    tokens: list[Token]
    logprob: float
    request_time: float = Field(description="seconds")


class TokenizeRequest(BaseModel):
    """A text to count or to cut."""

    text: Text
    truncation: bool = True
    max_length: int = Field(2048, ge=1)


class TokenizeResponse(BaseModel):
    """Token ids, with the special tokens that a prompt begins with."""

    tokens: list[int]
    request_time: float


class DecodeRequest(BaseModel):
    """Token ids of a text."""

    tokens: list[int]


class DecodeResponse(BaseModel):
    """The text, special tokens left out."""

    text: str
    request_time: float


class ServedTokenizer(Tokenizer, Protocol):
    """The part of a transformers tokenizer that the server uses."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of token ids."""


@dataclass(frozen=True)
class Service:
    """What the app answers with and whom. `meters`: name of COUNTED → adds to a counter elsewhere, Ray's for one."""

    loop: EngineLoop
    tokenizer: ServedTokenizer
    num_embeddings: int  # ids from here on are no tokens
    adapter: str = ""  # of the engine's
    compat: bool = False
    token: str | None = None
    allow_anyone: bool = False
    meters: Mapping[str, Callable[[float], None]] = field(default_factory=dict)
    on_death: Callable[[], None] = lambda: None  # called when the engine is dead


def make_app(service: Service) -> FastAPI:
    """The app. Requests that run at once share the engine's batch; one whose client is gone leaves it."""
    app = FastAPI(title="birbal_ray", version=__version__, docs_url=None, redoc_url=None)  # their pages load scripts
    # One thread, because a tokenizer is not safe in several; not the event loop, because a megabyte takes a second.
    tokenizing = ThreadPoolExecutor(1, "tokenizer")
    counts = dict.fromkeys(COUNTED, 0)

    async def off_loop(function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(tokenizing, function, *arguments)

    def count(completion: engine.Completion, num_prompt_tokens: int) -> None:
        added = {
            "rows": 1,
            "errors": int(completion.error is not None),
            "prompt_tokens": num_prompt_tokens,
            "cached_tokens": completion.num_cached_tokens or 0,
            "completion_tokens": completion.num_completion_tokens,
        }
        for name, number in added.items():
            counts[name] += number
            if number and name in service.meters:
                service.meters[name](number)

    def token_ids(text: str) -> list[int]:
        return prompt_token_ids(service.tokenizer, [text])[0]

    def described(tokens: Sequence[engine.TokenLogprob]) -> list[Token]:
        text = service.tokenizer.decode
        return [
            Token(
                text=text([one.token_id]), logprob=one.logprob, top_logprob={text([one.top_token_id]): one.top_logprob}
            )
            for one in tokens
        ]

    @app.exception_handler(RequestValidationError)
    async def refuse(request: Request, error: RequestValidationError) -> Response:
        """Say what is wrong without sending the input back: it may be a megabyte, or no Unicode."""
        problems = [{"loc": list(one["loc"]), "msg": one["msg"], "type": one["type"]} for one in error.errors()]
        return JSONResponse({"detail": problems}, 422)

    @app.exception_handler(EngineDeadError)
    async def dead(request: Request, error: EngineDeadError) -> Response:
        service.on_death()
        return JSONResponse({"detail": f"the engine failed: {error}"}, 503)

    @app.post("/process")
    async def process(asked: ProcessRequest, request: Request) -> ProcessResponse:
        """Complete a prompt."""
        started = time.monotonic()
        prompt = wrap_prompt(asked.prompt)
        ids = await off_loop(token_ids, prompt)
        only_prompt = asked.max_new_tokens == 0
        num_new = max(asked.max_new_tokens, 1 if asked.echo_prompt else 0)  # the engine makes at least one token
        if len(ids) + num_new > service.loop.max_model_len:
            raise HTTPException(
                400,
                f"the prompt has {len(ids)} tokens and max_new_tokens is {asked.max_new_tokens}; together they may be "
                f"at most the model's length, {service.loop.max_model_len}",
            )
        if num_new == 0:
            return ProcessResponse(text="", tokens=[], logprob=0.0, request_time=time.monotonic() - started)
        sampling = engine.Sampling(
            temperature=asked.temperature,
            top_k=asked.top_k,
            seed=None if asked.seed is None else asked.seed % (1 << 63),  # vLLM takes -1 for no seed
            stop=(),
            logprobs=not only_prompt,
            prompt_logprobs=only_prompt,
        )
        completion = await answered(engine.Request(prompt, ids, num_new, service.adapter, sampling), request)
        if completion is None:
            raise HTTPException(CLIENT_GONE)
        count(completion, len(ids))
        if completion.error:
            raise HTTPException(400, completion.error)
        tokens = await off_loop(described, completion.prompt_tokens if only_prompt else completion.tokens)
        if only_prompt:  # nothing comes before the first token, so nothing says how likely it is
            first = await off_loop(service.tokenizer.decode, ids[:1])
            tokens.insert(0, Token(text=first, logprob=0.0, top_logprob={}))
        text = "" if only_prompt else completion.text
        return ProcessResponse(
            text=prompt + text if asked.echo_prompt else cut_answer(text, compat=service.compat),
            tokens=tokens,
            logprob=sum(one.logprob for one in tokens),
            request_time=time.monotonic() - started,
        )

    async def answered(asked: engine.Request, request: Request) -> engine.Completion | None:
        """The engine's completion, or None when the client hangs up before it is there."""
        (future,) = service.loop.submit([asked])
        completion: asyncio.Future[Any] = asyncio.wrap_future(future)
        gone: asyncio.Future[Any] = asyncio.ensure_future(hung_up(request))
        try:
            await asyncio.wait({completion, gone}, return_when=asyncio.FIRST_COMPLETED)
            if completion.done():
                return completion.result()
            return None
        finally:
            completion.cancel()  # nothing happens where it is done
            gone.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await gone

    async def hung_up(request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    @app.post("/tokenize")
    async def tokenize(asked: TokenizeRequest) -> TokenizeResponse:
        """Token ids of a text, cut to `max_length` unless `truncation` is off."""
        started = time.monotonic()
        ids = await off_loop(token_ids, asked.text)
        return TokenizeResponse(
            tokens=ids[: asked.max_length] if asked.truncation else ids, request_time=time.monotonic() - started
        )

    @app.post("/decode")
    async def decode(asked: DecodeRequest) -> DecodeResponse:
        """The text of token ids."""
        started = time.monotonic()
        if wrong := [one for one in asked.tokens if not 0 <= one < service.num_embeddings]:
            raise HTTPException(422, f"token id {wrong[0]}: expected 0 to {service.num_embeddings - 1}")
        text = await off_loop(lambda: service.tokenizer.decode(asked.tokens, skip_special_tokens=True))
        return DecodeResponse(text=text, request_time=time.monotonic() - started)

    @app.get("/health")
    async def health() -> dict[str, str]:
        """200 while the engine lives, else 503."""
        if service.loop.death is not None:
            raise EngineDeadError(service.loop.death)
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> Response:
        """What was served so far, in Prometheus's text format."""
        lines = [f"# TYPE birbal_{name} counter\nbirbal_{name} {number}\n" for name, number in counts.items()]
        return PlainTextResponse("".join(lines))

    app.add_middleware(Guard, token=service.token, allow_anyone=service.allow_anyone)
    return app


class Guard:
    """Answers 401 or 403 to whoever may not call, and 411 or 413 to a body of unknown or huge size, before any route.

    With a token: 401 without one, 403 for a wrong one. Without: 403 for a client on another machine, and for a page
    whose name was made to point at this one (its Host header isn't ours), unless anyone is allowed.
    """

    def __init__(self, app: Any, token: str | None, allow_anyone: bool) -> None:
        self._app, self._token, self._allow_anyone = app, token, allow_anyone

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and (refusal := self._refusal(scope)):
            await refusal(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Mapping[str, Any]) -> Response | None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        if self._token is not None:
            kind, _, given = headers.get(b"authorization", b"").partition(b" ")
            if kind.lower() != b"bearer":
                return JSONResponse({"detail": "send Authorization: Bearer TOKEN"}, 401, {"WWW-Authenticate": "Bearer"})
            if not secrets.compare_digest(given.strip(), self._token.encode()):
                return JSONResponse({"detail": "wrong token"}, 403)
        elif not self._allow_anyone and not _is_from_here(scope, headers):
            return JSONResponse({"detail": "this server answers its own machine only; start it with --token"}, 403)
        if b"transfer-encoding" in headers:
            return JSONResponse({"detail": "send Content-Length; a body in chunks is not taken"}, 411)
        if int(headers.get(b"content-length", b"0")) > MAX_BODY_BYTES:
            return JSONResponse({"detail": f"the body may have at most {MAX_BODY_BYTES:,} bytes"}, 413)
        return None


def _is_from_here(scope: Mapping[str, Any], headers: Mapping[bytes, bytes]) -> bool:
    """Whether a client on this machine asked for it by a name of this machine."""
    name = re.sub(r":\d*$", "", headers.get(b"host", b"").decode("latin-1"))  # without its port
    return is_loopback((scope.get("client") or ("",))[0]) and is_loopback(name.strip("[]"))


def is_loopback(host: str) -> bool:
    """Whether an address or name means this machine itself."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def wrap_prompt(prompt: str) -> str:
    """The prompt as the model was trained to see it; one that has two blank lines or more has its own form."""
    if prompt.count(BLANK_LINE) >= 2:
        return prompt
    return f"### Input:\n{prompt}\n\n### Response:\n"


def cut_answer(completion: str, *, compat: bool = False) -> str:
    """The completion up to its first blank line; of "The answer is: B, …" the letter alone.

    Only a letter that stands by itself counts: "The answer is Paris" stays whole. With `compat`, the published
    server's rule: the first character that is no white space after the words, so ":" for "The answer is: B".
    """
    text = completion.split(BLANK_LINE, 1)[0]
    if compat:
        begins = text.lower().startswith(ANSWER_WORDS)
        return text[len(ANSWER_WORDS) :].strip()[:1] if begins else text
    found = _ANSWER.match(text)
    return found[1] if found else text
