"""The submission server on real vLLM: conformance, and the same greedy texts as the engine gives evaluation."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest

from birbal_ray.models import load_tokenizer, resolve_model
from birbal_ray.score.config import EngineSettings, ResourceSettings, ServeConfig
from birbal_ray.score.engine import Request, Sampling, VllmEngine
from birbal_ray.score.loop import EngineLoop
from birbal_ray.score.tokens import prompt_token_ids
from birbal_ray.serve.app import wrap_prompt
from birbal_ray.serve.run import openai_command
from birbal_ray.settings import load_config
from tests.conftest import REPOSITORY, SLOW, slow
from tests.e2e.processes import NUM_THREADS, kill_whole, wait_for

pytestmark = pytest.mark.vllm
NUM_PROMPTS, MAX_NEW = 200 if SLOW else 60, 16
TIE = 1e-3  # two tokens this near in log probability may swap with the batch


@contextlib.contextmanager
def running(folder, *options):
    """(client of a server started with these options, its process)"""
    log = folder / "log"
    threads = ("--set", f"resources.threads_per_replica={NUM_THREADS}")
    command = [sys.executable, "-m", "birbal_ray", "serve", *options, *threads, "--port", "0"]
    # vLLM's helpers for log probabilities run as they are written: compiling them takes longer than all answers here.
    environment = {**os.environ, "TORCH_COMPILE_DISABLE": "0" if SLOW else "1"}
    with log.open("wb") as out:
        process = subprocess.Popen(list(map(str, command)), stdout=out, stderr=subprocess.STDOUT, env=environment)
    wait_for(lambda: "serving " in log.read_text(), process)
    with httpx.Client(base_url=re.search(r"http://\S+", log.read_text())[0], timeout=900) as client:
        yield client, process
    if process.poll() is None:
        kill_whole(process)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(tmp_path_factory.mktemp("serve"), "--config", REPOSITORY / "configs/serve/tiny.yaml") as made:
        yield made


def process(server, prompt, **fields):
    answer = server[0].post("/process", json={"prompt": prompt, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def prompts() -> list[str]:
    """Prompts of four kinds and many lengths, some with a form of their own, some to be wrapped."""
    kinds = [
        "What is {n} plus {m}?",
        "### Instruction:\nSay whether the number is even.\n\n### Input:\n{n}\n\n### Response:\n",
        "Name the capital of the country number {n} of the alphabet.",
        "### Input:\nRepeat: {many}\n\n### Response:\n{n}\n\n### Input:\nRepeat: {many} {m}\n\n### Response:\n",
    ]
    return [
        kinds[n % 4].format(n=n, m=n * 7 % 13, many=" ".join(f"item {k}" for k in range(n % 9)))
        for n in range(NUM_PROMPTS)
    ]


@pytest.mark.parametrize(
    "more",
    [
        {"engine.device": "cpu"},
        {
            **{"engine.device": "gpu", "resources.gpus_per_replica": 2},
            "engine.arguments": {"kv_cache_dtype": "fp8", "hf_overrides": {"rope_theta": 1e6}, "enforce_eager": True},
        },
    ],
)
def test_vllms_own_server_reads_its_command(more):
    """By vLLM's own parser; for cards that are not here, too."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    config = load_config(ServeConfig, None, [], {"model.name": "smollm2-135m", "port": 9000, **more})
    command = openai_command(config)
    read = make_arg_parser(FlexibleArgumentParser()).parse_args(command[3:])
    assert (read.port, read.served_model_name, read.max_model_len) == (9000, ["smollm2-135m"], 8192)
    assert read.tensor_parallel_size == more.get("resources.gpus_per_replica", 1)
    assert read.trust_remote_code is False and read.enforce_eager is True and not read.disable_log_stats
    if "engine.arguments" in more:
        assert (read.kv_cache_dtype, read.hf_overrides) == ("fp8", {"rope_theta": 1e6})


@slow
def test_vllms_own_server_starts_and_answers(served_model, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "birbal_ray", "serve", "--openai", "--model", served_model, "--device", "cpu"]
    command += ["--port", port, "--set", "engine.max_model_len=512", "--set", "resources.kv_cache_gib=1"]
    log = tmp_path / "log"
    with log.open("wb") as out:
        server = subprocess.Popen(list(map(str, command)), stdout=out, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: "Application startup complete" in log.read_text(), server)
        asked = {"model": str(served_model), "prompt": "Count: one two", "max_tokens": 3, "temperature": 0}
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=asked, timeout=60)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 3
    finally:
        kill_whole(server)


def test_the_answer_is_the_models_and_every_number_is_finite(server):
    answer = process(server, "What is the capital of France?", max_new_tokens=8)
    assert "Paris" in answer["text"]
    assert "".join(token["text"] for token in answer["tokens"]).startswith(answer["text"])
    for token in answer["tokens"]:
        assert math.isfinite(token["logprob"]) and token["logprob"] <= 0
        assert list(token["top_logprob"].values()) == [token["logprob"]]  # greedy
    assert answer["logprob"] == pytest.approx(sum(token["logprob"] for token in answer["tokens"]))


def test_log_probabilities_are_those_before_temperature(server):
    """The prompt's own, asked with no new tokens, are those that the completion was given at any temperature."""
    wrapped = "### Input:\nCount to ten.\n\n### Response:\n"
    hot = process(server, "Count to ten.", max_new_tokens=6, temperature=1.5, seed=3, echo_prompt=True)
    assert hot["text"].startswith(wrapped)
    again = process(server, hot["text"] + "\n\n\n\n", max_new_tokens=0, echo_prompt=True)
    texts = [token["text"] for token in again["tokens"]]
    first = len(server[0].post("/tokenize", json={"text": wrapped}).json()["tokens"])
    for generated, scored in zip(hot["tokens"], again["tokens"][first:], strict=False):
        if generated["text"] != scored["text"]:  # the text was cut into other tokens
            break
        assert scored["logprob"] == pytest.approx(generated["logprob"], abs=2e-2), texts


def test_seeds(server):
    def text(seed):
        return process(server, "Tell me a story.", max_new_tokens=12, temperature=1.0, seed=seed)["text"]

    assert text(11) == text(11)
    assert len({text(seed) for seed in range(4)}) > 1


def test_tokenize_cuts_and_decode_turns_back(server):
    text = "The quick brown fox. " * 200
    cut = server[0].post("/tokenize", json={"text": text, "max_length": 50}).json()["tokens"]
    whole = server[0].post("/tokenize", json={"text": text, "truncation": False}).json()["tokens"]
    assert len(cut) == 50 and whole[:50] == cut and len(whole) > 50
    assert server[0].post("/decode", json={"tokens": whole}).json()["text"] == text


def test_over_long_empty_and_wrong(server):
    answer = server[0].post("/process", json={"prompt": "word " * 5000})
    assert answer.status_code == 400 and "4096" in answer.text and re.search(r"has 5\d\d\d tokens", answer.text)
    assert process(server, "", max_new_tokens=2)["tokens"]
    assert server[0].post("/process", content=b"{").status_code == 422
    assert server[0].get("/health", headers={"Host": "evil.example"}).status_code == 403


def test_a_client_that_hangs_up_frees_the_engine(server):
    gives_up = httpx.Timeout(60, read=1.0)
    with pytest.raises(httpx.ReadTimeout):
        server[0].post("/process", json={"prompt": "Tell a long story.", "max_new_tokens": 3000}, timeout=gives_up)
    started = time.monotonic()
    process(server, "hi", max_new_tokens=1)
    assert time.monotonic() - started < 60, "it would take minutes behind the story"


@pytest.mark.timeout(2400)
@pytest.mark.parametrize("name", ["tiny", pytest.param("smollm2-135m", marks=slow)])
def test_the_server_gives_the_texts_that_evaluation_gets(name, served_model, tmp_path):
    """Each difference must begin where the two likeliest tokens are nearer than TIE; all are printed."""
    model = served_model if name == "tiny" else resolve_model(name).path
    asked = prompts()
    settings = ("--model", model, "--device", "cpu", "--set", "engine.max_model_len=1024")
    with (
        running(tmp_path, *settings, "--set", "resources.kv_cache_gib=1") as server,
        concurrent.futures.ThreadPoolExecutor(16) as pool,
    ):
        served = list(pool.map(lambda one: process(server, one, max_new_tokens=MAX_NEW, echo_prompt=True), asked))
        server[1].send_signal(signal.SIGTERM)  # memory and cores for the other engine
        assert server[1].wait(60) == 0
    tokenizer = load_tokenizer(model)
    engine = EngineSettings(device="cpu", max_model_len=1024)
    loop = EngineLoop(
        lambda: VllmEngine(model, engine, ResourceSettings(kv_cache_gib=1, threads_per_replica=NUM_THREADS))
    )
    texts = [wrap_prompt(one) for one in asked]
    ids = prompt_token_ids(tokenizer, texts)
    sampling = Sampling(stop=(), logprobs=True)
    futures = loop.submit([Request(t, i, MAX_NEW, sampling=sampling) for t, i in zip(texts, ids, strict=True)])
    differences = []
    for text, one, future in zip(texts, served, futures, strict=True):
        mine, theirs = future.result(), one["tokens"]
        decoded = [tokenizer.decode([token.token_id]) for token in mine.tokens]
        place = next((n for n, token in enumerate(theirs) if decoded[n : n + 1] != [token["text"]]), None)
        if place is None:
            assert one["text"] == text + mine.text
            continue
        # Greedy: each side's choice is its likeliest, so the choices' distance is that of the two likeliest.
        gap = abs(theirs[place]["logprob"] - mine.tokens[place].logprob)
        differences.append((text[-60:], place, theirs[place]["text"], decoded[place], gap))
    print(
        f"{name}: {len(asked)} prompts, {sum(len(one['tokens']) for one in served)} tokens, {len(differences)} differ"
    )
    for line in differences:
        print(json.dumps(line))
    assert all(gap < TIE for *_, gap in differences), differences
    assert len(differences) < NUM_PROMPTS / 10
