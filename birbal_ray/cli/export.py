"""`birbal export-predictions`."""

from __future__ import annotations

from pathlib import Path

import click

from birbal_ray.cli.common import note, refuse_url


@click.command("export-predictions", short_help="A score run as the published JSON.")
@click.argument("run")
@click.option(
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    callback=refuse_url,
    help="Folder for one JSON file per task.",
)
def export_predictions(run: str, output: Path) -> None:
    """Write a finished score run as JSON, one file per task: the layout of the published recipe.

    Each file is a list of {orig_input, few_shot_prompt, answer, prediction}, ordered by row id.

    \b
    Example:
      birbal export-predictions runs/score --output predictions/
    """
    from birbal_ray.score.export import export_published_json
    from birbal_ray.storage import local_copy

    files, rows = export_published_json(local_copy(run), output)
    note(f"{rows} rows in {files} files: {output}")
