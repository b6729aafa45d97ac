"""Every line of the submission API, over HTTP, on the simulated engine."""

from __future__ import annotations

import asyncio
import json
import math
import threading

import httpx
import pytest
from fastapi.testclient import TestClient

from birbal_ray.score.engine import Completion
from birbal_ray.score.loop import EngineLoop
from birbal_ray.score.simulated import SAYS, SimulatedEngine
from birbal_ray.score.tokens import NUM_EMBEDDINGS, SimulatedTokenizer
from birbal_ray.serve.app import MAX_BODY_BYTES, Service, make_app

HERE = ("127.0.0.1", 50000)


def service(engine=None, **options):
    made = engine or SimulatedEngine(max_model_len=2048)
    return Service(EngineLoop(lambda: made), SimulatedTokenizer(), NUM_EMBEDDINGS, **options)


def client(app=None, address=HERE, **options):
    return TestClient(app or make_app(service(**options)), base_url="http://127.0.0.1:8080", client=address)


@pytest.fixture(scope="module")
def server():
    with client() as made:
        yield made


def said(text):
    """A prompt that the simulated engine answers with `text`."""
    return SAYS + json.dumps(text)


def process(server, prompt, **fields):
    answer = server.post("/process", json={"prompt": prompt, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def numbers(value):
    if isinstance(value, dict):
        return [found for one in value.values() for found in numbers(one)]
    if isinstance(value, list):
        return [found for one in value for found in numbers(one)]
    return [] if isinstance(value, str) else [value]


# --- /process


def test_the_answer_has_the_published_shape_and_only_finite_numbers(server):
    answer = process(server, said("it depends on the weather"))
    assert answer.keys() == {"text", "tokens", "logprob", "request_time"}
    assert answer["text"] == "it depends on the weather"
    assert [token["text"] for token in answer["tokens"]] == answer["text"].split()
    for token in answer["tokens"]:
        assert token.keys() == {"text", "logprob", "top_logprob"}
        assert max(token["top_logprob"].values()) >= token["logprob"]
    assert answer["logprob"] == pytest.approx(sum(token["logprob"] for token in answer["tokens"]))
    assert all(isinstance(one, float) and math.isfinite(one) for one in numbers(answer))
    assert answer["request_time"] >= 0


class Recorder(SimulatedEngine):
    """Keeps the requests that reach it."""

    def __init__(self):
        super().__init__(max_model_len=2048)
        self.seen = []

    def add(self, key, request):
        self.seen.append(request)
        super().add(key, request)


def test_defaults_and_unknown_fields():
    engine = Recorder()
    with client(engine=engine, adapter="") as server:
        process(server, "x")
        helm = {
            "num_return_sequences": 1,
            "top_p": 1.0,
            "top_k_per_token": 1,
            "stop_sequences": ["\n"],
            "num_samples": 1,
            "max_new_tokens": 5,
            "temperature": 1e-7,
            "echo_prompt": False,
        }
        process(server, "x", **helm)
    first, second = engine.seen
    assert (first.max_tokens, first.sampling.top_k, first.sampling.temperature) == (50, 200, 1e-7)
    assert (first.sampling.seed, first.sampling.top_p, first.sampling.stop) == (None, 1.0, ())
    assert first.sampling.logprobs and not first.sampling.prompt_logprobs and first.sampling.greedy
    assert second.sampling == first.sampling and second.max_tokens == 5


@pytest.mark.parametrize("seed", [0, -1, 1 << 63, 1 << 70, None])
def test_any_seed_is_one_that_the_engine_takes(seed):
    engine = Recorder()
    with client(engine=engine) as server:
        process(server, "x", seed=seed, temperature=1.0)
    (request,) = engine.seen
    assert request.sampling.seed is None if seed is None else 0 <= request.sampling.seed < 1 << 63


def test_the_prompt_rule_decides_what_the_model_sees():
    engine = Recorder()
    with client(engine=engine) as server:
        process(server, " one\n\nblank ")
        process(server, "two\n\nblank\n\nlines")
    assert [one.prompt for one in engine.seen] == [
        "### Input:\n one\n\nblank \n\n### Response:\n",
        "two\n\nblank\n\nlines",
    ]
    assert engine.seen[0].token_ids == SimulatedTokenizer()([engine.seen[0].prompt])["input_ids"][0]


def test_greedy_answers_repeat_and_ignore_the_seed(server):
    texts = {process(server, "p", temperature=t, seed=s)["text"] for t in (0, 1e-7, 1e-6) for s in (None, 1, 2)}
    assert len(texts) == 1


def test_a_seed_fixes_sampling(server):
    def texts(seed):
        return [process(server, f"p {n}", temperature=1.0, seed=seed)["text"] for n in range(8)]

    assert texts(1) == texts(1) != texts(2)
    assert texts(None) != texts(None)


def test_max_new_tokens_cuts(server):
    answer = process(server, said("one two three four"), max_new_tokens=2)
    assert answer["text"] == "one two" and len(answer["tokens"]) == 2


@pytest.mark.parametrize(
    ("completion", "text", "compat_text"),
    [("The answer is: A", "A", ":"), ("cut here\n\nnot this", "cut here", "cut here"), ("The answer is b", "b", "b")],
)
def test_answer_rules_leave_the_tokens_uncut(server, completion, text, compat_text):
    answer = process(server, said(completion))
    assert answer["text"] == text
    assert " ".join(token["text"] for token in answer["tokens"]) == completion
    with client(compat=True) as published:
        assert process(published, said(completion))["text"] == compat_text


@pytest.mark.parametrize("compat", [False, True])
def test_an_echo_is_the_whole_text_without_rules(compat):
    prompt = said("The answer is: A\n\nmore")
    with client(compat=compat) as server:
        answer = process(server, prompt, echo_prompt=True)
    assert answer["text"] == f"### Input:\n{prompt}\n\n### Response:\nThe answer is: A\n\nmore"
    assert " ".join(token["text"] for token in answer["tokens"]) == "The answer is: A\n\nmore"


def test_no_new_tokens(server):
    answer = process(server, "a prompt", max_new_tokens=0)
    assert (answer["text"], answer["tokens"], answer["logprob"]) == ("", [], 0.0)


def test_no_new_tokens_with_an_echo_tells_how_likely_the_prompt_is(server):
    answer = process(server, "a b\n\nc d\n\ne", max_new_tokens=0, echo_prompt=True)
    assert answer["text"] == "a b\n\nc d\n\ne"
    assert [token["text"] for token in answer["tokens"]] == ["a", "b", "c", "d", "e"]
    first, *others = answer["tokens"]
    assert (first["logprob"], first["top_logprob"]) == (0.0, {})
    assert all(token["logprob"] < 0 for token in others)
    assert answer["logprob"] == pytest.approx(sum(token["logprob"] for token in others))


@pytest.mark.parametrize(
    ("num_words", "new", "status"),
    [(2044 - 50, 50, 200), (2045 - 50, 50, 400), (2044, 0, 200), (3000, 50, 400), (10, 2048, 400)],
)
def test_a_prompt_beyond_the_models_length_is_refused_with_both_numbers(server, num_words, new, status):
    # "### Input:\n… \n\n### Response:\n" adds four words.
    answer = server.post("/process", json={"prompt": "w " * num_words, "max_new_tokens": new})
    assert answer.status_code == status
    if status == 400:
        assert str(num_words + 4) in answer.json()["detail"] and "2048" in answer.json()["detail"]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"prompt": None},
        {"prompt": 7},
        {"prompt": ["x"]},
        {"prompt": "x", "num_samples": 2},
        {"prompt": "x", "num_samples": 0},
        {"prompt": "x", "max_new_tokens": -1},
        {"prompt": "x", "max_new_tokens": 1.5},
        {"prompt": "x", "top_k": -1},
        {"prompt": "x", "temperature": -0.5},
        {"prompt": "x", "temperature": 2.5},
        {"prompt": "x", "seed": "s"},
        {"prompt": "\ud800 half a character"},
        [],
        "x",
        None,
    ],
)
def test_fields_out_of_range_are_422_with_the_reason(server, body):
    answer = server.post("/process", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code == 422
    assert answer.json()["detail"]


@pytest.mark.parametrize(
    "content", ["", "{", '{"prompt": "x"', "\x00", '{"prompt": NaN}', '{"prompt": "x", "temperature": NaN}']
)
def test_malformed_json_is_422(server, content):
    answer = server.post("/process", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422


def test_what_the_engine_refuses_is_a_400(server):
    answer = server.post("/process", json={"prompt": "SIMULATED-ROW-ERROR"})
    assert answer.status_code == 400 and "simulated row error" in answer.json()["detail"]


def test_an_empty_prompt(server):
    assert process(server, "")["text"]


def test_a_prompt_of_a_megabyte_is_refused_without_an_echo(server):
    answer = server.post("/process", json={"prompt": "word " * 200_000})
    assert answer.status_code == 400 and len(answer.text) < 500
    one_word = server.post("/process", json={"prompt": "x" * (1 << 20)})
    assert one_word.status_code == 200
    wrong = server.post("/process", json={"prompt": ["word " * 200_000]})
    assert wrong.status_code == 422 and len(wrong.text) < 500


# --- many at once


class Batching(SimulatedEngine):
    """Finishes everything that is queued in one step, once `release` is set."""

    def __init__(self):
        super().__init__(max_model_len=2048)
        self.release, self.largest, self.aborted = threading.Event(), 0, []

    def step(self):
        if not self.release.wait(0.001):
            return []
        self.largest = max(self.largest, len(self._queue))
        return [pair for _ in range(len(self._queue)) for pair in super(Batching, self).step()]

    def abort(self, key):
        self.aborted.append(key)
        super().abort(key)


def test_200_requests_at_once_share_the_batch_and_get_their_own_answers():
    engine = Batching()
    app = make_app(service(engine))

    async def ask() -> list[dict]:
        transport = httpx.ASGITransport(app, client=HERE)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8080") as http:
            asking = [asyncio.ensure_future(http.post("/process", json={"prompt": said(f"n{n}")})) for n in range(200)]
            while len(engine._queue) < 200:
                await asyncio.sleep(0.01)
            engine.release.set()
            return [answer.json() for answer in await asyncio.gather(*asking)]

    assert [answer["text"] for answer in asyncio.run(ask())] == [f"n{n}" for n in range(200)]
    assert engine.largest == 200


def test_a_client_that_hangs_up_frees_its_place():
    engine = Batching()
    app = make_app(service(engine))
    body = json.dumps({"prompt": "never read"}).encode()

    async def hang_up() -> list[dict]:
        sent, arrived = [], [{"type": "http.request", "body": body, "more_body": False}]
        scope = {
            **{"type": "http", "method": "POST", "path": "/process", "raw_path": b"/process", "query_string": b""},
            **{"headers": [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")], "client": HERE},
            **{"http_version": "1.1", "scheme": "http", "server": ("127.0.0.1", 8080), "root_path": ""},
        }

        async def receive():
            if arrived:
                return arrived.pop()
            while not engine._queue:
                await asyncio.sleep(0.001)
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        await app(scope, receive, send)
        while not engine.aborted:
            await asyncio.sleep(0.001)
        return sent

    sent = asyncio.run(asyncio.wait_for(hang_up(), 10))
    assert sent[0]["status"] == 499
    assert not engine._queue
    engine.release.set()
    with client(app) as server:
        assert process(server, said("goes on"))["text"] == "goes on"


def test_a_dead_engine_is_a_503_and_ends_the_server():
    ended = threading.Event()
    with client(on_death=ended.set) as server:
        assert server.get("/health").json() == {"status": "ok"}
        answer = server.post("/process", json={"prompt": "SIMULATED-ENGINE-DEATH"})
        assert answer.status_code == 503 and "simulated engine death" in answer.json()["detail"]
        assert ended.is_set()
        assert server.get("/health").status_code == 503
        assert server.post("/process", json={"prompt": "x"}).status_code == 503


# --- /tokenize, /decode, /metrics


def test_tokenize_and_decode(server):
    text = " ".join(f"w{n}" for n in range(3000))

    def tokens(**fields):
        answer = server.post("/tokenize", json={"text": text, **fields}).json()
        assert answer.keys() == {"tokens", "request_time"} and math.isfinite(answer["request_time"])
        return answer["tokens"]

    everything = SimulatedTokenizer()([text])["input_ids"][0]
    assert tokens() == everything[:2048]
    assert tokens(truncation=False) == everything
    assert tokens(truncation=False, max_length=5) == everything
    assert tokens(max_length=5) == everything[:5]
    assert server.post("/tokenize", json={"text": text, "max_length": 0}).status_code == 422
    assert server.post("/tokenize", json={"text": ""}).json()["tokens"] == []
    decoded = server.post("/decode", json={"tokens": everything[:7]}).json()
    assert decoded.keys() == {"text", "request_time"}
    assert decoded["text"] == "w0 w1 w2 w3 w4 w5 w6"
    assert server.post("/decode", json={"tokens": []}).json()["text"] == ""


@pytest.mark.parametrize("tokens", [[-1], [NUM_EMBEDDINGS], [1 << 70], ["a"], None])
def test_decode_refuses_what_is_no_token(server, tokens):
    assert server.post("/decode", json={"tokens": tokens}).status_code == 422


class Special:
    """A tokenizer with a BOS, an EOS that it appends, and letters."""

    bos_token_id = 1

    def __call__(self, text, *, add_special_tokens=True):
        return {"input_ids": [[1, *map(ord, one), 2] if add_special_tokens else [*map(ord, one)] for one in text]}

    def decode(self, token_ids, *, skip_special_tokens=False):
        names = {} if skip_special_tokens else {1: "<s>", 2: "</s>"}
        return "".join(names.get(one, chr(one) if one > 2 else "") for one in token_ids)


def test_special_tokens_begin_a_prompt_never_end_it_and_are_left_out_of_decoded_text():
    engine = Recorder()
    with client(make_app(Service(EngineLoop(lambda: engine), Special(), 1 << 15))) as server:
        ids = server.post("/tokenize", json={"text": "ab"}).json()["tokens"]
        assert ids == [1, 97, 98]
        assert server.post("/decode", json={"tokens": [*ids, 2]}).json()["text"] == "ab"
        process(server, "a\n\nb\n\nc")
    assert engine.seen[0].token_ids == [1, *map(ord, "a\n\nb\n\nc")]


def test_metrics_count_what_was_served():
    counted = []
    with client(meters={"rows": counted.append, "completion_tokens": counted.append}) as server:
        process(server, said("one two three"))
        server.post("/process", json={"prompt": "SIMULATED-ROW-ERROR"})
        text = server.get("/metrics").text
    lines = dict(line.split() for line in text.splitlines() if not line.startswith("#"))
    assert (lines["birbal_rows"], lines["birbal_errors"], lines["birbal_completion_tokens"]) == ("2", "1", "3")
    assert int(lines["birbal_prompt_tokens"]) > 0 and lines["birbal_cached_tokens"] == "0"
    assert counted == [1, 3, 1]


# --- who may call, and what there is

ROUTES = [("POST", "/process"), ("POST", "/tokenize"), ("POST", "/decode"), ("GET", "/health"), ("GET", "/metrics")]


@pytest.mark.parametrize(("method", "path"), [*ROUTES, ("GET", "/openapi.json"), ("GET", "/nothing")])
def test_a_stranger_is_refused_everywhere(method, path):
    with client(address=("192.0.2.7", 50000)) as server:
        assert server.request(method, path, json={"prompt": "x"}).status_code == 403
    with client(address=("192.0.2.7", 50000), token="secret") as server:
        assert server.request(method, path, json={"prompt": "x"}).status_code == 401


def test_a_token_is_asked_of_everybody():
    for address in (HERE, ("192.0.2.7", 50000)):
        with client(address=address, token="sécret") as server:
            for given, status in (("Bearer s\u00e9cret", 200), ("Bearer wrong", 403), ("Basic x", 401), ("", 401)):
                headers = {"Authorization": given.encode()} if given else {}
                assert server.get("/health", headers=headers).status_code == status, given


def test_a_page_that_points_its_name_at_this_machine_is_refused(server):
    assert server.get("/health", headers={"Host": "evil.example"}).status_code == 403
    assert server.get("/health", headers={"Host": "localhost.evil.example:8080"}).status_code == 403
    for name in ("localhost:8080", "localhost", "127.0.0.1", "[::1]:8080", "[::1]", "127.0.0.1:8080"):
        assert server.get("/health", headers={"Host": name}).status_code == 200, name


def test_anyone_may_call_where_that_was_said():
    with client(address=("192.0.2.7", 50000), allow_anyone=True) as server:
        assert server.get("/health", headers={"Host": "somewhere.example"}).status_code == 200


@pytest.mark.parametrize("path", ["/", "/docs", "/redoc", "/static/x", "/../etc/passwd", "/process/..", "/process"])
def test_nothing_else_is_served(server, path):
    assert server.get(path).status_code in (404, 405)


def test_the_schema_names_the_routes(server):
    paths = server.get("/openapi.json").json()["paths"]
    assert sorted(paths) == sorted(path for _, path in ROUTES)


def test_every_error_of_a_completion_is_told():
    """The completion's error, not an empty text, reaches the client."""

    class Refuses(SimulatedEngine):
        def step(self):
            return [(self._queue and next(iter(self._queue)), Completion("", None, 0, None, "lost"))][: self._pop()]

        def _pop(self):
            self._queue.clear()
            return 1

    with client(engine=Refuses()) as server:
        answer = server.post("/process", json={"prompt": "x"})
        assert (answer.status_code, answer.json()["detail"]) == (400, "lost")


@pytest.mark.parametrize("path", ["/process", "/tokenize", "/decode"])
def test_a_body_without_end_is_not_read(path):
    """Whoever may call may not fill the machine's memory."""
    with client() as server:
        huge = server.post(path, content=b"x" * (MAX_BODY_BYTES + 1))
        assert huge.status_code == 413 and f"{MAX_BODY_BYTES:,} bytes" in huge.json()["detail"]
        assert server.post(path, content=iter([b"{}"])).status_code == 411
    with client(address=("192.0.2.7", 50000)) as server:
        assert server.post(path, content=b"x" * (MAX_BODY_BYTES + 1)).status_code == 403, "a stranger learns nothing"
