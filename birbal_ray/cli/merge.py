"""`birbal merge`."""

from __future__ import annotations

import click

from birbal_ray.cli.common import format_option, print_table


@click.command(short_help="Fold an adapter into its base model's weights.")
@click.option(
    "--run",
    "run",
    metavar="DIR",
    required=True,
    help="Output folder of `birbal train`.",
)
@click.option("--output", metavar="DIR", required=True, help="The merged model's folder.")
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float32"]),
    default="bfloat16",
    show_default=True,
    help="Of the merged weights; never 4-bit.",
)
@click.option("--prompts", type=click.IntRange(min=1), default=8, show_default=True, help="Eval rows to compare on.")
@click.option("--overwrite", is_flag=True, help="Start anew where the folder holds another merge.")
@format_option
def merge(run: str, output: str, dtype: str, prompts: int, overwrite: bool, output_format: str) -> None:
    """Merge the adapter of a training run into unquantised base weights, and compare before with after.

    The output is a model folder (safetensors) that `birbal score --model DIR`, vLLM and transformers load.

    \b
    Example:
      birbal merge --run runs/train --output models/mistral-7b-birbal
    """
    from birbal_ray.train.merge import merge as step

    result = step(run, output, dtype=dtype, num_prompts=prompts, overwrite=overwrite)
    print_table([result.manifest["comparison"] | {"model": str(result.folder)}], output_format)
