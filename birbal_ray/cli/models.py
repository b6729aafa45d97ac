"""`birbal models`."""

from __future__ import annotations

import click

from birbal_ray.cli.common import format_option, print_table


@click.group(invoke_without_command=True, short_help="The models that come with us.")
@format_option
@click.pass_context
def models(context: click.Context, output_format: str) -> None:
    """List the models that come with us; `fetch` makes one ready.

    Any local folder of safetensors and any Hub id works wherever a model is asked for.

    \b
    Examples:
      birbal models
      birbal models fetch smollm2-135m
      birbal models fetch mistralai/Mistral-7B-v0.1
    """
    if context.invoked_subcommand is not None:
        return
    from birbal_ray.models import EMBEDDED, cache_folder

    rows = [
        {
            "model": model.name,
            "what": model.summary,
            "license": model.license,
            "ready": (cache_folder() / "models" / f"{model.name}-{model.sha256[:12]}").is_dir(),
        }
        for model in EMBEDDED.values()
    ]
    print_table(rows, output_format)


@models.command()
@click.argument("name")
@click.option("--revision", help="Hub revision: branch, tag or commit.")
def fetch(name: str, revision: str | None) -> None:
    """Download or convert a model now, and print its folder.

    \b
    Example:
      birbal models fetch smollm2-135m
    """
    from birbal_ray.models import resolve

    click.echo(resolve(name, revision).path)
