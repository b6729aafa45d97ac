"""Models: train an adapter, merge it, serve it; the base models that come with birbal."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

import click

from birbal_ray.cli.options import (
    dry_run_option,
    format_option,
    note,
    overwrite_option,
    print_table,
    settings_options,
)
from birbal_ray.score.config import ServeConfig
from birbal_ray.train.config import TrainConfig

if TYPE_CHECKING:
    from birbal_ray.train.preflight import Preflight
    from birbal_ray.train.run import TrainResult


@click.command()
@settings_options(
    TrainConfig,
    (
        "--mix DIR",
        "--output DIR",
        "--model NAME = model.name",
        "--from-adapter DIR",
        "--budget TIME",
        "--device",
        "--seed",
    ),
    step="train",
)
@overwrite_option
@dry_run_option("Tokens, memory by part, steps in the budget; trains nothing.")
@click.option("--calibrate", is_flag=True, help="With --dry-run: run 4 steps to learn the speed.")
@click.option("--push", metavar="REPO", help="Then upload the adapter to this Hub repository (private; HF_TOKEN).")
@format_option
def train(
    config: TrainConfig, overwrite: bool, dry_run: bool, calibrate: bool, push: str | None, output_format: str
) -> None:
    """Fine-tune a 4-bit base model with LoRA on a mix; the adapter of the lowest eval loss is kept.

    One Ray Train worker, on the card that resources.accelerator_type names. The learning rate
    follows a cosine to the deadline, so that a run that can't do all epochs still ends annealed.
    Checkpoints go to OUTPUT/checkpoints; SIGTERM and Ctrl-C save one first; the same command goes on.

    \b
    Examples:
      birbal train --mix runs/mix --output runs/train --config tiny
      birbal train --mix runs/mix --output runs/train --config mistral-7b-qlora --dry-run
      birbal train --mix runs/mix --output runs/train --config mistral-7b-qlora --budget 23h
    """
    from birbal_ray.train import run as step

    if calibrate and not dry_run:
        raise click.UsageError("--calibrate goes with --dry-run")
    if dry_run:
        found = step.dry_run(config, calibrate=calibrate)
        from birbal_ray.plan import describe_hours, plan_train
        from birbal_ray.train.preflight import refuse_if_too_large, refuse_if_too_short

        print_preflight(found, output_format)
        refuse_if_too_large(found)
        refuse_if_too_short(found)
        if found.forecast is None:  # else its times are said already
            train, held_back = (found.packing[split].num_tokens for split in ("train", "eval"))
            note(describe_hours(lambda: plan_train(config, train, held_back, rest=config.budget)))
        if push:
            from birbal_ray.train.card import ADAPTER_FILES, PUSHED_MANIFEST

            note(f"would upload to {push}: {', '.join([*ADAPTER_FILES, PUSHED_MANIFEST])}")
    else:
        result = step.train(config, overwrite=overwrite)
        print_train(result, output_format)
        if push:
            from birbal_ray.adapters import ADAPTER_FOLDER
            from birbal_ray.train.card import push_to_hub

            names = [name for name in result.manifest["files"] if name.startswith(f"{ADAPTER_FOLDER}/")]
            note(f"uploaded to {push_to_hub(result.folder, names, push)}")


def print_preflight(found: Preflight, output_format: str) -> None:
    """Memory by part on stdout, the rest on stderr."""
    from birbal_ray.train.preflight import GIB, describe_preflight, total_bytes

    rows = [{"part": part.part, "GiB": part.num_bytes / GIB, "how": part.how} for part in found.parts]
    rows.append({"part": "total", "GiB": total_bytes(found.parts) / GIB, "how": "estimate"})
    if found.memory_bytes:
        fits = "fits" if found.fits else "too little"
        rows.append({"part": "the device has", "GiB": found.memory_bytes / GIB, "how": fits})
    print_table(rows, output_format)
    for line in describe_preflight(found):
        note(line)
    if found.forecast is None:
        note("speed unknown on this device: add --calibrate, or train once")


def print_train(result: TrainResult, output_format: str = "text") -> None:
    """Losses and where the adapter is."""
    outcome, folder = result.manifest["result"], result.folder
    names = ("epochs", "ended_by", "base_eval_loss", "best_eval_loss", "best_step")
    row = {"steps": outcome["num_steps"], **{name.replace("_", " "): outcome[name] for name in names}}
    print_table([{**row, "seconds": outcome["elapsed_seconds"], "adapter": folder.at("adapter")}], output_format)
    note(f"loss curve: {folder.at('loss_curve.png')}")
    note(f"TensorBoard: tensorboard --logdir {shlex.quote(folder.at('tensorboard'))}")


@click.command()
@click.option("--run", metavar="DIR", required=True, help="Output folder of `birbal train`.")
@click.option("--output", metavar="DIR", required=True, help="The merged model's folder.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", help="Of the merged weights.")
@click.option("--modelfile", is_flag=True, help="Also write a Modelfile, for `ollama create`.")
@click.option("--engine/--no-engine", default=True, help="Also compare vLLM on the merged model with PEFT.")
@click.option("--push", metavar="REPO", help="Then upload the model to this Hub repository (private; HF_TOKEN).")
@overwrite_option
@dry_run_option("List the files that it would make and --push upload; load no model.")
@format_option
def merge(run: str, output: str, push: str | None, dry_run: bool, output_format: str, **options: Any) -> None:
    """Merge the adapter of a training run into unquantised base weights, and compare before with after.

    The output is a model folder (safetensors) that `birbal score --model DIR`, vLLM and transformers load.

    \b
    Example:
      birbal merge --run runs/train --output models/mistral-7b-birbal
    """
    from birbal_ray.train import merge as step

    if dry_run:
        print_table([{"file": name} for name in step.plan_merge(run, modelfile=options["modelfile"])], output_format)
        return
    result = step.merge(run, output, **options)
    print_table([result.manifest["comparison"] | {"model": str(result.folder)}], output_format)
    if push:
        from birbal_ray.train.card import push_to_hub

        note(f"uploaded to {push_to_hub(result.folder, list(result.manifest['files']), push)}")


@click.command()
@settings_options(
    ServeConfig,
    (
        "--run DIR",
        "--model NAME = model.name",
        "--adapter DIR",
        "--merged DIR",
        "--host ADDRESS",
        "--port",
        "--token TEXT",
        "--allow-anyone",
        "--compat",
        "--device",
    ),
    step="serve",
)
@click.option("--openai", is_flag=True, help="Become vLLM's own OpenAI server, with model and adapter filled in.")
def serve(config: ServeConfig, openai: bool) -> None:
    """Answer prompts over HTTP as the LLM Efficiency Challenge asked its entrants to.

    POST /process completes a prompt, /tokenize and /decode count and cut it, GET /health and /metrics tell
    how it goes. Requests that come at once share the engine's batch; each must say its Content-Length. SIGTERM
    and Ctrl-C answer what is in flight, then end. Only this machine is answered unless there is a --token, or
    --allow-anyone.

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


@click.command()
@format_option
def models(output_format: str) -> None:
    """List the models that come with birbal.

    Any local folder of safetensors and any Hub id works wherever a model is asked for.

    \b
    Example:
      birbal models
    """
    from birbal_ray.models import EMBEDDED, EMBEDDED_FOLDER
    from birbal_ray.storage import cache_folder

    what = "SmolLM2-135M-Instruct, 4-bit weights unpacked to float32 (540 MB); for CPUs and demos"
    is_ready = (cache_folder() / "models" / EMBEDDED_FOLDER).is_dir()
    print_table([{"model": EMBEDDED, "what": what, "license": "Apache-2.0", "ready": is_ready}], output_format)
