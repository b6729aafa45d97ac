"""What the commands share: options, tables, and how an error becomes an exit code."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import click

EXIT_FAILED, EXIT_USAGE = 1, 2


class Commands(click.Group):
    """A group whose known errors end as one line on stderr: exit 2 for settings and inputs, 1 for a failed run."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; map our own exceptions to exit codes, let bugs show their traceback."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("\nstopped; what is finished is kept, the same command continues", err=True)
            ctx.exit(EXIT_FAILED)
        except (click.ClickException, BrokenPipeError):  # the latter, of `| head`, is click's to end quietly
            raise
        except Exception as error:
            code = _exit_code(error)
            if code is None:
                raise
            click.echo(f"error: {error}", err=True)
            if _keeps_work(error):
                click.echo("what is finished is kept; the same command continues", err=True)
            ctx.exit(code)


def config_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--config FILE and --set key.path=value (explicit flags win over --set, which wins over the file)."""
    command = click.option(
        "--set",
        "assignments",
        multiple=True,
        metavar="KEY=VALUE",
        help="Override one setting, e.g. engine.max_model_len=1024.",
    )(command)
    return click.option("--config", "config_file", metavar="FILE", help="YAML file of settings; see configs/.")(command)


format_option = click.option(
    "--format",
    "output_format",
    type=click.Choice(["text", "json", "csv"]),
    default="text",
    help="How to print the table.",
)


overwrite_option = click.option(
    "--overwrite",
    is_flag=True,
    help="Start anew where a finished run is, or one of other settings; the same one, unfinished, goes on.",
)


def refuse_url(context: click.Context, option: click.Parameter, value: Any) -> Any:
    """An option's callback: its value is a folder of this machine."""
    if ":/" in str(value):  # what pathlib leaves of ://
        raise click.BadParameter(f"{value}: expected a folder on this machine; upload what is written there")
    return value


def print_table(rows: Sequence[dict[str, Any]], output_format: str, columns: Sequence[str] | None = None) -> None:
    """Print rows on stdout as text, JSON or CSV; `columns` gives the order for text and CSV."""
    names = list(columns or (rows[0] if rows else []))
    if output_format == "json":
        click.echo(json.dumps(list(rows), indent=1, ensure_ascii=False))
    elif output_format == "csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        click.echo(text.getvalue(), nl=False)
    else:
        from tabulate import tabulate

        cells = [[_shown(row.get(name)) for name in names] for row in rows]
        numeric = [all(isinstance(row.get(name), (int, float, type(None))) for row in rows) for name in names]
        align = ["right" if is_number else "left" for is_number in numeric]
        click.echo(
            tabulate(cells, headers=names, tablefmt="simple", colalign=align if rows else None, disable_numparse=True)
        )


def note(text: str) -> None:
    """A line on stderr."""
    print(text, file=sys.stderr, flush=True)


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)


def _exit_code(error: Exception) -> int | None:
    from birbal_ray.models import ModelError
    from birbal_ray.ni.schema import TaskError
    from birbal_ray.run import RunError
    from birbal_ray.settings import ConfigError

    if isinstance(error, (ConfigError, TaskError, ModelError)):
        return EXIT_USAGE
    if isinstance(error, (FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)):
        return EXIT_USAGE  # a path on the command line that can't be what it should be
    return EXIT_FAILED if isinstance(error, (RunError, OSError)) else None  # a full disk, a lost connection


def _keeps_work(error: Exception) -> bool:
    from birbal_ray.run import RunFailedError

    return isinstance(error, RunFailedError)
