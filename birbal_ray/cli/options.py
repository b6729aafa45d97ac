"""Options made from the settings' schemas, shipped files of settings, and how the commands print."""

from __future__ import annotations

import csv
import functools
import io
import json
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import click
from annotated_types import Ge, Gt, Le, Lt
from click.core import ParameterSource
from pydantic import BeforeValidator
from pydantic.fields import FieldInfo

import birbal_ray
from birbal_ray.settings import ConfigError, Settings, load_config, nearest

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
    help="Delete a finished run, or one of other settings, and start again; the same one, unfinished, is continued.",
)
# Of the steps that ask a model about tasks.
ASKING_FLAGS = (
    "--tasks PATH = tasks.path",
    "--model NAME = model.name",
    "--output DIR",
    "--instances-per-task",
    "--select WHICH",
    "--replicas = resources.num_replicas",
    "--device",
)
FILE: Any = click.Path(path_type=Path)
# Heading → key of a row, or what makes the cell of one.
Columns = dict[str, str | Callable[[Mapping[str, Any]], Any]]


def dry_run_option(text: str) -> Any:
    """--dry-run, which says what the command would do."""
    return click.option("--dry-run", is_flag=True, help=text)


def settings_options(
    schema: type[Settings], flags: Sequence[str], *, step: str, sections: Sequence[str] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command `flags`, --config, --set and --settings, and call it with the `config` that these add up to.

    A flag is its name, with a word for its value (`--output DIR`); it sets the key of that name, or the only one whose
    last part is so called. `--tasks PATH = tasks.path` names another key, `--model NAME = model.name: text` another
    help, too. Type, range, default and help are the schema's. `step` is the folder of shipped files. Each of
    `sections` may come from a file of its own, --SECTION-config, of the step of that name.
    """
    fields = dict(settings_of(schema))
    options, names = [], {}
    for text in flags:
        flag, _, rest = text.partition(" = ")
        key, _, about = rest.partition(": ")
        name = flag.split()[0].removeprefix("--").replace("-", "_")
        if not key:
            (key,) = [name] if name in fields else (one for one in fields if one.endswith(f".{name}"))
        options.append(_option(flag, fields[key], about or fields[key].description or ""))
        names[name] = key
    free = {key: field.default for key, field in fields.items() if key not in names.values() and key != "seed"}
    numbers = (f"{key}={value}" for key, value in free.items() if isinstance(value, int) and value > 1)
    example = next(numbers, f"{next(iter(fields))}=VALUE")

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def command(config_file: str | None, assignments: tuple[str, ...], **values: Any) -> Any:
            context = click.get_current_context()
            if context.invoked_subcommand is not None:  # `birbal mix explain`: the group's own options don't count
                return None
            given = {}
            for name, key in names.items():
                value = values.pop(name)
                if context.get_parameter_source(name) is not ParameterSource.DEFAULT:
                    given[key] = list(value) if isinstance(value, tuple) else value
            file = None if config_file is None else find_config(step, config_file)
            texts = {section: values.pop(f"{section}_config") for section in sections}
            files = {section: find_config(section, text) for section, text in texts.items() if text}
            return function(load_config(schema, file, assignments, given, files), **values)

        shipped = ", ".join(shipped_configs(step))
        about = "YAML file of settings" + (shipped and f", or the name of one that comes with birbal: {shipped}") + "."
        of_this = "Settings of this step, instead of the section of --config."
        section_options = [
            click.option(f"--{section}-config", metavar="FILE", help=f"The same for {section}." if number else of_this)
            for number, section in enumerate(sections)
        ]
        for option in (
            *reversed(section_options),
            click.option(
                "--settings",
                is_flag=True,
                is_eager=True,
                expose_value=False,
                callback=functools.partial(_print_settings, schema),
                help="List every key of --set and --config with its default, and exit.",
            ),
            click.option(
                "--set", "assignments", multiple=True, metavar="KEY=VALUE", help=f"Set one key, e.g. {example}."
            ),
            click.option("--config", "config_file", metavar="FILE", help=about),
            *reversed(options),
        ):
            command = option(command)
        return command

    return decorate


def settings_of(schema: type[Settings], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """(dotted key, field) of every setting that is no section, in the schema's order."""
    for name, field in schema.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            yield from settings_of(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def shipped_configs(step: str) -> dict[str, Path]:
    """Name → file of the settings that come with the package for one step."""
    package = Path(birbal_ray.__file__).parent  # in a wheel they lie in the package, in a clone beside it
    folder = next(folder for folder in (package / "configs", package.parent / "configs", package) if folder.is_dir())
    return {file.stem: file for file in sorted((folder / step).glob("*.yaml"))}


def find_config(step: str, text: str) -> Path:
    """The file that --config means: a path, or the name of a shipped file. Raises ConfigError with the nearest name."""
    if "/" in text or text.endswith((".yaml", ".yml")) or Path(text).is_file():
        return Path(text)
    shipped = shipped_configs(step)
    if text not in shipped:
        raise ConfigError(
            f"--config {text}: no such file, and no settings of that name come with birbal for {step}"
            f"{nearest(text, shipped)}; there are {', '.join(shipped) or 'none'}"
        )
    return shipped[text]


def refuse_url(context: click.Context, option: click.Parameter, value: Any) -> Any:
    """An option's callback: its value is a folder of this machine."""
    if ":/" in str(value):  # what pathlib leaves of ://
        raise click.BadParameter(f"{value}: expected a folder on this machine; upload what is written there")
    return value


def print_table(rows: Sequence[Mapping[str, Any]], output_format: str, columns: Sequence[str] | Columns = ()) -> None:
    """Print rows on stdout as text, JSON or CSV. `columns`: names, the order for text and CSV; or those of the text."""
    if isinstance(columns, dict):
        if output_format == "text":
            rows = [{name: row[of] if isinstance(of, str) else of(row) for name, of in columns.items()} for row in rows]
        columns = ()
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

        cells = [[shown(row.get(name)) for name in names] for row in rows]
        numeric = [all(isinstance(row.get(name), (int, float, type(None))) for row in rows) for name in names]
        align = ["right" if is_number else "left" for is_number in numeric]
        click.echo(
            tabulate(cells, headers=names, tablefmt="simple", colalign=align if rows else None, disable_numparse=True)
        )


def shown(value: Any) -> str:
    """A cell of a text table: three decimals, thousands separators, `-` for None."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def note(text: str) -> None:
    """Print a line on stderr."""
    print(text, file=sys.stderr, flush=True)


def _option(flag: str, field: FieldInfo, about: str) -> Callable[[Any], Any]:
    """The click option of one setting. Raises TypeError for a type that no flag can give."""
    name, _, metavar = flag.partition(" ")
    kinds = _kinds(field.annotation)
    multiple = kinds == [list]
    kind = _kinds(get_args(field.annotation)[0])[0] if multiple else kinds[0]
    limits = {type(limit): limit for limit in field.metadata}
    low, high = limits.get(Ge, limits.get(Gt)), limits.get(Le, limits.get(Lt))
    bounds: dict[str, Any] = {
        **{"min": getattr(low, "ge", getattr(low, "gt", None)), "min_open": isinstance(low, Gt)},
        **{"max": getattr(high, "le", getattr(high, "lt", None)), "max_open": isinstance(high, Lt)},
    }
    is_flag = kind is bool
    click_type: Any = {
        bool: None,
        str: str,
        Path: Path,
        int: click.IntRange(**bounds),
        float: click.FloatRange(**bounds),
    }.get(kind)
    if get_origin(kind) is Literal:
        click_type = _Choice(get_args(kind))
    elif click_type is None and not is_flag:
        raise TypeError(f"{flag}: no option for a setting of type {field.annotation}")
    return click.option(
        f"{name}/--no-{name[2:]}" if is_flag and field.default else name,
        type=click_type,
        is_flag=is_flag or None,
        multiple=multiple,
        metavar=metavar or None,
        default=(field.default or None) if multiple else field.default,
        help=f"{about[:1].upper()}{about[1:]}.{' Repeatable.' if multiple else ''}",
    )


class _Choice(click.Choice[str]):
    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        """With the nearest choice."""
        return super().get_invalid_choice_message(value, ctx).rstrip(".") + nearest(value, self.choices) + "."


def _kinds(annotation: Any) -> list[Any]:
    """The plain types of `X | None`, `Annotated[X, …]`, `list[X]`; a text that a validator reads counts as str."""
    if get_origin(annotation) is Annotated:
        kind, *metadata = get_args(annotation)
        return [str] if any(isinstance(one, BeforeValidator) for one in metadata) else _kinds(kind)
    if get_origin(annotation) in (Union, types.UnionType):
        return [kind for part in get_args(annotation) for kind in _kinds(part) if kind is not type(None)]
    return [list if get_origin(annotation) is list else annotation]


def _print_settings(schema: type[Settings], context: click.Context, option: click.Parameter, asked: bool) -> None:
    """--settings' callback."""
    if asked:
        rows = []
        for key, field in settings_of(schema):
            default = json.dumps(field.get_default(call_default_factory=True), default=Settings.model_dump)
            short = default if len(default) <= 40 else f"{default[:37]}..."
            rows.append({"key": key, "default": short, "meaning": field.description or ""})
        print_table(rows, "text")
        context.exit()
