"""`birbal tasks`: look at task files before anything runs."""

from __future__ import annotations

from pathlib import Path

import click

from birbal_ray.cli.main import EXIT_FAILED
from birbal_ray.cli.options import format_option, note, print_table, refuse_url


def _local(context: click.Context, option: click.Parameter, path: str | None) -> Path | None:
    from birbal_ray.storage import local_copy

    return None if path is None else local_copy(path)


tasks_option = click.option(
    "--tasks",
    "path",
    metavar="PATH",
    callback=_local,
    help="Folder, .json, archive, or a URL of one; default: the sample tasks.",
)


@click.group()
def tasks() -> None:
    """List, show, check, label and download task files.

    \b
    Examples:
      birbal tasks list
      birbal tasks show sample001_review_sentiment
      birbal tasks fetch --output natural-instructions
    """


@tasks.command("list")
@tasks_option
@click.option("--label", type=click.Choice(["exact_match", "generation"]), help="Only tasks of this label.")
@format_option
def list_tasks(path: Path | None, label: str | None, output_format: str) -> None:
    """One line per task: label, instances, positive examples, categories, whether it is one of the 462.

    \b
    Example:
      birbal tasks list --tasks natural-instructions/ --label exact_match --format csv
    """
    from birbal_ray.ni.catalog import summarise_tasks

    rows = [row for row in summarise_tasks(path) if label in (None, row["label"])]
    columns = ["task", "label", "instances", "shots", "category", "selected"]
    print_table(rows, output_format, columns)
    note(f"{len(rows)} tasks, {sum(row['instances'] or 0 for row in rows):,} instances")


@tasks.command()
@click.argument("name")
@tasks_option
@click.option("--num-shots", type=click.IntRange(min=0), default=4, help="Positive examples in the prompt.")
def show(name: str, path: Path | None, num_shots: int) -> None:
    """Show one task: its definition, label and a whole few-shot prompt with its references.

    \b
    Example:
      birbal tasks show sample002_list_operation
    """
    from birbal_ray.ni.catalog import describe_task

    click.echo(describe_task(path, name, num_shots))


@tasks.command()
@tasks_option
@format_option
@click.pass_context
def validate(context: click.Context, path: Path | None, output_format: str) -> None:
    """Read every task file; say what was repaired, what can't be used and what can't score 1.

    The exit code is 1 if a file can't be used.

    \b
    Example:
      birbal tasks validate --tasks my-tasks/
    """
    from birbal_ray.ni.catalog import find_faults

    rows, num_files, num_bad = find_faults(path)
    print_table(rows, output_format, ["file", "kind", "count", "finding"])
    note(f"{num_files} files read, {num_bad} can't be used")
    if num_bad:
        context.exit(EXIT_FAILED)


@tasks.command("label")
@tasks_option
@click.option("--compare", type=click.Path(path_type=Path), help="CSV with name,label to compare with.")
@format_option
def label_tasks(path: Path | None, compare: Path | None, output_format: str) -> None:
    """Give every task its label, exact_match or generation, and the reason.

    The CSV form can be edited and given back as tasks.label_overrides.

    \b
    Example:
      birbal tasks label --tasks my-tasks/ --format csv > labels.csv
    """
    from birbal_ray.ni.catalog import compare_labels, summarise_tasks

    surveyed = summarise_tasks(path)
    rows = [
        {"name": row["task"], "label": row["label"], "reason": row["label reason"]} for row in surveyed if row["label"]
    ]
    if len(rows) < len(surveyed):
        note(f"{len(surveyed) - len(rows)} files can't be used and have no label; see birbal tasks validate")
    if compare is not None:
        num_labelled = len(rows)
        agreed, rows = compare_labels(rows, compare)
        left = num_labelled - agreed - len(rows)
        uncompared = f"; {left} tasks are not in {compare}" if left else ""
        note(f"{agreed} labels agree, {len(rows)} differ" + (" (listed)" if rows else "") + uncompared)
    print_table(rows, output_format)


@tasks.command()
@click.option("--output", required=True, type=click.Path(path_type=Path), callback=refuse_url, help="Folder to fill.")
@click.option("--url", help="A tar.gz with a tasks/ folder; default: the Natural Instructions archive.")
@click.option("--sha256", help="Refuse an archive with another checksum.")
def fetch(output: Path, url: str | None, sha256: str | None) -> None:
    """Download and unpack the Natural Instructions task files (Apache-2.0, allenai/natural-instructions).

    An interrupted download continues; only task files are unpacked, none outside the folder.

    \b
    Example:
      birbal tasks fetch --output natural-instructions
    """
    from birbal_ray.ni.fetch import DEFAULT_URL, fetch_archive
    from birbal_ray.progress import ProgressLine

    progress = ProgressLine()
    record = fetch_archive(url or DEFAULT_URL, output, sha256=sha256, progress=progress.update)
    progress.close()
    note(f"{record['num_files']} task files (archive sha256 {record['sha256']})")
    click.echo(output / "tasks")
