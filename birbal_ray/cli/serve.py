"""`birbal serve`: the submission server."""

from __future__ import annotations

import click

from birbal_ray.cli.options import note, settings_options
from birbal_ray.serve.config import ServeConfig


@click.command()
@settings_options(
    ServeConfig,
    {
        "--run DIR": "run",
        "--model NAME": "model.name",
        "--adapter DIR": "model.adapter",
        "--merged DIR": "merged",
        "--host ADDRESS": "host",
        "--port": "port",
        "--token TEXT": "token",
        "--allow-anyone": "allow_anyone",
        "--compat": "compat",
        "--device": "engine.device",
    },
    step="serve",
)
@click.option("--openai", is_flag=True, help="Become vLLM's own OpenAI server, with model and adapter filled in.")
def serve(config: ServeConfig, openai: bool) -> None:
    """Answer prompts over HTTP as the LLM Efficiency Challenge asked its entrants to.

    POST /process completes a prompt, /tokenize and /decode count and cut it, GET /health and /metrics tell
    how it goes. Requests that come at once share the engine's batch. SIGTERM and Ctrl-C answer what is in
    flight, then end. Only this machine is answered unless there is a --token, or --allow-anyone.

    \b
    Examples:
      birbal serve --run runs/train
      birbal serve --model smollm2-135m --port 9000
      birbal serve --merged models/merged --host 0.0.0.0 --token "$TOKEN"
      curl -s http://127.0.0.1:8080/process -H 'Content-Type: application/json' -d '{"prompt": "2 + 2 ="}'
    """
    from birbal_ray.serve import run as step

    if openai:
        step.serve_openai(config)
    else:
        step.serve(config, note)
