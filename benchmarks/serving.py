"""Requests per second of `birbal serve` beside vLLM's own OpenAI server: same model, engine settings, prompts.

    python benchmarks/serving.py --rounds 2 --json serving.json

Each server is started, asked and stopped in turn, `--rounds` times; then 1, 8 and 32 clients send prompts of about
200 tokens, three quarters of them shared, and read 16 new tokens, greedily. vLLM's server is `birbal serve --openai`,
asked for the log probabilities that the challenge's answers hold, too. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

CLIENTS = {1: 12, 8: 64, 32: 96}  # clients → requests
MAX_NEW = 16
PORT = 8199


def prompts(number: int, salt: str) -> list[str]:
    """Few-shot prompts of four made-up tasks; `salt` keeps one measurement's apart from the next one's."""
    found = []
    for n in range(number):
        task = f"{salt} task {n % 4}"
        shots = "".join(
            f"### Input:\nItem {k} of {task}: the {word} one.\n\n### Response:\n{word}\n\n"
            for k, word in enumerate(("red", "tall", "quiet", "seventh", "old", "green"))
        )
        own = f"### Input:\nItem {n}: the new one.\n\n### Response:\n"
        found.append(f"### Instruction:\nName the property, {task}.\n\n{shots}{own}")
    return found


def measure(kind: str, model: str, salt: str) -> dict[int, float]:
    """Clients → requests per second of one server, started for it."""
    command = [sys.executable, "-m", "birbal_ray", "serve", "--model", model, "--port", str(PORT), "--device", "cpu"]
    command += ["--set", "engine.max_model_len=2048", "--set", "resources.kv_cache_gib=1"]
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen([*command, *(["--openai"] if kind == "vllm" else [])], stdout=log, stderr=log)
        try:
            limits = httpx.Limits(max_connections=64)
            with httpx.Client(base_url=f"http://127.0.0.1:{PORT}", timeout=900, limits=limits) as http:
                while True:
                    try:
                        if http.get("/health").status_code == 200:
                            break
                    except httpx.TransportError:
                        if server.poll() is not None:
                            log.seek(0)
                            raise RuntimeError(log.read().decode()[-2000:]) from None
                        time.sleep(0.5)

                def ask(prompt: str) -> int:
                    if kind == "birbal":
                        answer = http.post("/process", json={"prompt": prompt, "max_new_tokens": MAX_NEW})
                        return len(answer.raise_for_status().json()["tokens"])
                    body = {"model": model, "prompt": prompt, "max_tokens": MAX_NEW}
                    answer = http.post("/v1/completions", json={**body, "temperature": 0, "logprobs": 1})
                    return answer.raise_for_status().json()["usage"]["completion_tokens"]

                with ThreadPoolExecutor(8) as pool:
                    list(pool.map(ask, prompts(16, f"{salt} warm-up")))
                rates = {}
                for clients, number in CLIENTS.items():
                    asked = prompts(number, f"{salt} {clients}")
                    started = time.monotonic()
                    with ThreadPoolExecutor(clients) as pool:
                        tokens = sum(pool.map(ask, asked))
                    seconds = time.monotonic() - started
                    rates[clients] = number / seconds
                    rate = f"{number / seconds:6.2f} requests/s"
                    print(f"{kind:7} {clients:3} clients: {rate}, {tokens} tokens, {seconds:.1f} s", flush=True)
                return rates
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rounds = []
    for number in range(options.rounds):
        order = ("birbal", "vllm") if number % 2 == 0 else ("vllm", "birbal")
        rounds.append({kind: measure(kind, options.model, f"round {number}") for kind in order})
    for clients in CLIENTS:
        ratios = [one["birbal"][clients] / one["vllm"][clients] for one in rounds]
        each = ", ".join(f"{ratio:.3f}" for ratio in ratios)
        print(f"{clients:3} clients: {statistics.median(ratios):.3f} x vLLM's server (rounds: {each})")
    if options.json:
        options.json.write_text(json.dumps(rounds, indent=1))


if __name__ == "__main__":
    main()
