"""`birbal train`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from birbal_ray.cli.common import config_options, format_option, note, overwrite_option, print_table

if TYPE_CHECKING:
    from birbal_ray.train.preflight import Preflight
    from birbal_ray.train.run import TrainResult


@click.command(short_help="QLoRA on a mix, within a wall-clock budget.")
@click.option("--mix", metavar="DIR", help="Output folder of `birbal mix`.")
@click.option("--output", metavar="DIR", help="Run folder; the same command continues a run that broke off.")
@click.option("--model", metavar="NAME", help="smollm2-135m, a local folder, or a Hub id (smollm2-135m).")
@click.option("--budget", metavar="TIME", help="Wall-clock time for the worker: 24h, 90m, 45s. It ends in time.")
@click.option("--device", type=click.Choice(["auto", "cpu", "gpu"]), help="Where to train (auto).")
@click.option("--seed", type=click.IntRange(min=0), help="Other initial adapter weights, another order.")
@overwrite_option
@click.option("--dry-run", is_flag=True, help="Tokens, memory by part, steps in the budget; trains nothing.")
@click.option("--calibrate", is_flag=True, help="With --dry-run: run 4 steps to learn the speed.")
@config_options
@format_option
def train(
    mix: str | None,
    output: str | None,
    model: str | None,
    budget: str | None,
    device: str | None,
    seed: int | None,
    overwrite: bool,
    dry_run: bool,
    calibrate: bool,
    config_file: str | None,
    assignments: tuple[str, ...],
    output_format: str,
) -> None:
    """Fine-tune a 4-bit base model with LoRA on a mix; the adapter of the lowest eval loss is kept.

    One Ray Train worker, on the card that resources.accelerator_type names. The learning rate
    follows a cosine to the deadline, so that a run that can't do all epochs still ends annealed.
    Checkpoints go to OUTPUT/checkpoints; SIGTERM and Ctrl-C save one first; the same command goes on.

    \b
    Examples:
      birbal train --mix runs/mix --output runs/train --config configs/train/tiny.yaml
      birbal train --mix runs/mix --output runs/train --config configs/train/mistral-7b-qlora.yaml --dry-run
      birbal train --mix runs/mix --output runs/train --config configs/train/mistral-7b-qlora.yaml --budget 23h
    """
    from birbal_ray.settings import load_config
    from birbal_ray.train import run as step
    from birbal_ray.train.config import TrainConfig
    from birbal_ray.train.preflight import refuse_if_too_large

    if calibrate and not dry_run:
        raise click.UsageError("--calibrate goes with --dry-run")
    flags = {
        **{"mix": mix, "output": output, "model.name": model, "budget": budget, "seed": seed},
        "resources.device": device,
    }
    config = load_config(TrainConfig, config_file, assignments, flags)
    if dry_run:
        found = step.dry_run(config, calibrate=calibrate)
        print_preflight(found, config, output_format)
        refuse_if_too_large(found)
        return
    print_result(step.train(config, overwrite=overwrite), output_format)


def print_preflight(found: Preflight, config: Any, output_format: str) -> None:
    """Memory by part on stdout, the rest on stderr."""
    from birbal_ray.train.preflight import GIB, describe_preflight, total_bytes

    rows = [{"part": part.part, "GiB": part.num_bytes / GIB, "how": part.how} for part in found.parts]
    rows.append({"part": "total", "GiB": total_bytes(found.parts) / GIB, "how": "estimate"})
    if found.memory_bytes:
        rows.append(
            {"part": "the device has", "GiB": found.memory_bytes / GIB, "how": "fits" if found.fits else "too little"}
        )
    print_table(rows, output_format)
    for line in describe_preflight(found, config):
        note(line)
    if found.tokens_per_second is None:
        note("speed unknown on this device: add --calibrate, or train once")


def print_result(result: TrainResult, output_format: str) -> None:
    """Losses and where the adapter is."""
    outcome, folder = result.manifest["result"], result.folder
    row = {
        "steps": outcome["num_steps"],
        "epochs": outcome["epochs"],
        "ended by": outcome["ended_by"],
        "base eval loss": outcome["base_eval_loss"],
        "best eval loss": outcome["best_eval_loss"],
        "best step": outcome["best_step"],
        "seconds": outcome["elapsed_seconds"],
        "adapter": str(folder / "adapter"),
    }
    print_table([row], output_format)
    note(f"loss curve: {folder / 'loss_curve.png'}; TensorBoard: tensorboard --logdir {folder / 'tensorboard'}")
