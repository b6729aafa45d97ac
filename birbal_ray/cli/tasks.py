"""`birbal tasks`: look at task files before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from birbal_ray.cli.main import EXIT_FAILED
from birbal_ray.cli.options import format_option, note, print_table, refuse_url


def _local(context: click.Context, option: click.Parameter, path: str | None) -> Path | None:
    from birbal_ray.storage import input_folder

    return None if path in (None, "sample-tasks") else input_folder(path or "")


tasks_option = click.option(
    "--tasks",
    "path",
    metavar="PATH",
    callback=_local,
    help="Folder, .json, archive, or a URL of one; without it: the sample tasks.",
)


@click.group()
def tasks() -> None:
    """List, show, check, label, import and download task files.

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
    """One line per task: its label and why, instances, positive examples, categories.

    "selected" says whether it is one of Birbal's 462 tasks, "excluded" why runs leave it out (exclude_families).

    \b
    Example:
      birbal tasks list --tasks natural-instructions/ --label exact_match --format csv
    """
    from birbal_ray.ni.catalog import summarise_tasks
    from birbal_ray.progress import counted

    rows = [row for row in summarise_tasks(path) if label in (None, row["label"])]
    print_table(rows, output_format)
    num_instances = sum(row["instances"] or 0 for row in rows)
    note(f"{counted(len(rows), 'task')}, {counted(num_instances, 'instance')}")


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
def validate(path: Path | None, output_format: str) -> None:
    """Read every task file; say what was repaired, what can't be used and what can't score 1.

    The exit code is 1 if a file can't be used.

    \b
    Example:
      birbal tasks validate --tasks my-tasks/
    """
    from birbal_ray.ni.catalog import find_faults
    from birbal_ray.progress import counted

    rows, num_files, num_bad = find_faults(path)
    print_table(rows, output_format, ["file", "kind", "count", "finding"])
    note(f"{counted(num_files, 'file')} read, {num_bad} can't be used{'' if rows else ', nothing to report'}")
    if num_bad:
        raise click.exceptions.Exit(EXIT_FAILED)


@tasks.command("label")
@tasks_option
@format_option
def label_tasks(path: Path | None, output_format: str) -> None:
    """Give every task its label, exact_match or generation, and the reason.

    The CSV form can be edited and given back as tasks.label_overrides.

    \b
    Example:
      birbal tasks label --tasks my-tasks/ --format csv > labels.csv
    """
    from birbal_ray.ni.catalog import summarise_tasks

    surveyed = summarise_tasks(path)
    rows = [
        {"name": row["task"], "label": row["label"], "reason": row["label reason"]} for row in surveyed if row["label"]
    ]
    if len(rows) < len(surveyed):
        note(f"{len(surveyed) - len(rows)} files can't be used and have no label; see birbal tasks validate")
    print_table(rows, output_format)


@tasks.command("import")
@click.argument("source")
@click.option(
    "--input", "inputs", multiple=True, required=True, metavar="COLUMN", help="The inputs; repeat it to join some."
)
@click.option("--output", "outputs", multiple=True, required=True, metavar="COLUMN", help="Right answers; repeatable.")
@click.option("--definition", required=True, help="What is asked, in words; {group} stands for the group.")
@click.option("--name", help="The task's name; default: that of the file or dataset.")
@click.option("--group-by", metavar="COLUMN", help="Make one task for each value of this column.")
@click.option(
    "--folder",
    default="my-tasks",
    type=click.Path(path_type=Path),
    callback=refuse_url,
    help="Where the task files go.",
)
@click.option("--num-examples", type=click.IntRange(min=0), default=4, help="Rows that become positive examples.")
@click.option("--category", default="", help="Kind of task, e.g. 'Title Generation'; the label rule reads it.")
@click.option("--language", default="English", help="Of inputs and outputs.")
@click.option("--license", default="unknown", help="Of the rows; mix and model card name it.")
@click.option("--split", help="Of a dataset; default: train.")
@click.option("--subset", help="Of a dataset on the Hub: its configuration.")
@click.option("--revision", help="Of a dataset on the Hub.")
@click.option("--overwrite", is_flag=True, help="Replace task files of the same names.")
@format_option
def import_tasks(
    source: str, name: str | None, folder: Path, overwrite: bool, output_format: str, **options: Any
) -> None:
    """Make task files of your own rows: a CSV, TSV, JSONL, JSON or Parquet file, or a dataset on the Hub.

    A few rows become the positive examples, the others instances. An output may be a list, or an object whose
    "text" is one (as in SQuAD). Prints each task with its label, and says
    which rows it left out and why.

    \b
    Examples:
      birbal tasks import reviews.csv --input review --output mood --definition "Say the review's mood." --name mood
      birbal tasks import rajpurkar/squad --input context --input question --output answers --definition "Answer."
    """
    import json

    from birbal_ray.ni import catalog
    from birbal_ray.ni.obtain import ImportOptions, make_tasks
    from birbal_ray.ni.reader import parse_task
    from birbal_ray.ni.schema import TaskError
    from birbal_ray.progress import counted
    from birbal_ray.storage import write_atomic

    name = name or Path(source).absolute().name.split(".")[0]
    on_hub = {name: options.pop(name) for name in ("split", "subset", "revision")}
    settings = ImportOptions(name=name, source=source, **options)
    columns, rows = _read_source(source, settings, **on_hub)
    files, dropped = make_tasks(columns, rows, settings)
    texts = {name: json.dumps(values, indent=1, ensure_ascii=False).encode() for name, values in files.items()}
    for name, text in texts.items():
        parse_task(name, text)  # raises where the name can't be a task's
        if (folder / f"{name}.json").exists() and not overwrite:
            raise TaskError(f"{folder / name}.json exists; give another --name or --folder, or --overwrite")
    for name, text in texts.items():
        write_atomic(folder / f"{name}.json", text)
    written = [row for row in catalog.summarise_tasks(folder) if row["task"] in files]
    print_table(written, output_format, ["task", "label", "label reason", "instances", "shots"])
    if any(row["shots"] < settings.num_examples for row in written):
        note(f"fewer than {settings.num_examples} examples (shots): at most half of a task's rows become examples")
    for reason, numbers in dropped.items():
        note(f"left out {len(numbers):,} of {len(rows):,} rows (the first is row {numbers[0]}): {reason}")
    note(f"{counted(len(files), 'task file')} in {folder}; next: birbal tasks validate --tasks {folder}")


def _read_source(
    source: str, settings: Any, split: str | None, subset: str | None, revision: str | None
) -> tuple[list[str], list[dict[str, Any]]]:
    """(columns, rows) of a file, or of a dataset on the Hub or in a folder."""
    from birbal_ray.mix.sources import SUFFIXES, read_records
    from birbal_ray.ni.obtain import read_csv
    from birbal_ray.ni.schema import TaskError
    from birbal_ray.settings import one_line

    file = Path(source)
    if file.suffix in (".csv", ".tsv", *SUFFIXES) or file.is_file():
        if split or subset or revision:
            raise TaskError(f"{source} is a file; leave --split, --subset and --revision out")
        if file.suffix in (".csv", ".tsv"):
            if not file.is_file():
                raise TaskError(f"{source}: no such file")
            return read_csv(file, settings.columns)
        if file.suffix not in SUFFIXES:
            raise TaskError(f"{source}: expected .csv, .tsv, {', '.join(SUFFIXES)}; export the table as CSV")
        records = list(read_records(source, "SOURCE"))
        for number, record in records:
            if not isinstance(record, dict):
                raise TaskError(f"{source}, row {number}: expected an object with columns, found {record!r:.60}")
        rows = [record for _, record in records]
        if not rows:
            raise TaskError(f"{source}: it has no rows")
        return list(dict.fromkeys(key for row in rows for key in row)), rows
    import datasets

    datasets.disable_progress_bars()
    try:
        dataset = datasets.load_dataset(source, subset, split=split or "train", revision=revision)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetGenerationError) as error:
        reason = one_line(error)[:200]
        raise TaskError(f"{source}: no such file, and not a dataset that the Hub gives ({reason})") from None
    # Of a ClassLabel, numbers that stand for names.
    names = {name: one.names for name, one in dataset.features.items() if isinstance(one, datasets.ClassLabel)}
    rows = [
        {name: names[name][value] if name in names and value is not None else value for name, value in row.items()}
        for row in dataset
    ]
    return dataset.column_names, rows


@tasks.command()
@click.option("--output", required=True, type=click.Path(path_type=Path), callback=refuse_url, help="Folder to fill.")
@click.option("--url", help="A tar.gz with a tasks/ folder; default: the Natural Instructions archive.")
@click.option("--sha256", help="Refuse an archive with another checksum.")
def fetch(output: Path, url: str | None, sha256: str | None) -> None:
    """Download and unpack the Natural Instructions task files (Apache-2.0, allenai/natural-instructions).

    An interrupted download continues where the server can (GitHub begins again); only task files are unpacked, none
    outside the folder.

    \b
    Example:
      birbal tasks fetch --output natural-instructions
    """
    from birbal_ray.ni.obtain import DEFAULT_URL, fetch_archive
    from birbal_ray.progress import ProgressLine

    progress = ProgressLine()
    record = fetch_archive(url or DEFAULT_URL, output, sha256=sha256, progress=progress.update)
    progress.close()
    note(f"{record['num_files']} task files (archive sha256 {record['sha256']})")
    click.echo(output / "tasks")
