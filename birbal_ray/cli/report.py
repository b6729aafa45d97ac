"""`birbal report`."""

from __future__ import annotations

from pathlib import Path

import click

from birbal_ray.cli.common import note


@click.command(short_help="One page on what a run's steps did.")
@click.argument("run")
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE", help="The page; default: RUN/report.html.")
@click.option(
    "--add",
    "added",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A model's results, placed on the leaderboard; see `birbal leaderboard`. Repeatable.",
)
def report(run: str, output: Path | None, added: tuple[Path, ...]) -> None:
    """Write one HTML page on the score, mix, train and evaluate steps in RUN, with plots as PNG and SVG beside it.

    RUN is a folder that holds the steps' output folders, or one of these. Steps that are not there
    are named as not run. The page needs nothing but itself: it can be mailed, printed, archived.

    \b
    Examples:
      birbal report runs/demo
      birbal report runs/demo --output demo.html --add results.json
    """
    from birbal_ray.report.run import NOT_REPORTED
    from birbal_ray.report.run import report as write_report
    from birbal_ray.storage import added_to

    with added_to(run, NOT_REPORTED) as folder:
        result = write_report(folder, output, added)
    for verdict in result.verdicts:
        note(verdict.title)
    for step, state in result.missing.items():
        note(f"{step}: {state}")
    note(f"plots: {result.plots}")
    click.echo(result.file)
