"""Task files from a table of one's own: rows of inputs and outputs become examples and instances."""

from __future__ import annotations

import csv
import datetime
import decimal
import io
import itertools
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from birbal_ray.ni.catalog import nearest
from birbal_ray.ni.metrics import count_words
from birbal_ray.ni.reader import MAX_NAME_BYTES, clean_text
from birbal_ray.ni.schema import TaskError, hash_order, read_text

CSV_DELIMITERS = (",", ";", "\t", "|")
MAX_CELL_CHARACTERS = 1 << 30


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """What the columns of a table mean, and what the task files say."""

    name: str
    inputs: tuple[str, ...]  # several: lines of `column: text`
    outputs: tuple[str, ...]  # each is a reference, and each entry of a list, and an object's `text` (SQuAD)
    definition: str  # {group} stands for the group
    group_by: str | None = None  # one task for each value of this column
    num_examples: int = 4
    category: str = ""
    language: str = "English"
    license: str = "unknown"
    source: str = ""
    seed: int = 0

    @property
    def columns(self) -> list[str]:
        """Those that the table must have."""
        return [*self.inputs, *self.outputs, *filter(None, [self.group_by])]


def read_rows(file: Path, columns: Sequence[str]) -> tuple[list[str], list[dict[str, Any]]]:
    """(columns found, rows) of a .csv, .tsv, .jsonl or .json file (a list of objects).

    A CSV may be separated by another sign than the comma: the first of CSV_DELIMITERS is taken that
    gives all of `columns`. Raises TaskError naming file and line.
    """
    text = read_text(file)
    if file.suffix in (".csv", ".tsv"):
        return _read_csv(file, text, columns)
    if file.suffix == ".json":
        lines = [(1, text)]
    else:  # split at \n alone: U+2028 and the like may stand in a JSON text
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    rows: list[Any] = []
    for number, line in lines:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TaskError(f"{file} line {number}: not valid JSON ({error})") from None
        rows += value if file.suffix == ".json" and isinstance(value, list) else [value]
        if not all(isinstance(row, dict) for row in (rows if file.suffix == ".json" else rows[-1:])):
            raise TaskError(f"{file} line {number}: expected JSON objects, one for each row")
    return list(dict.fromkeys(key for row in rows for key in row)), rows


def make_tasks(
    columns: Sequence[str], rows: Iterable[Mapping[str, Any]], options: ImportOptions
) -> tuple[dict[str, dict[str, Any]], dict[str, list[int]]]:
    """(task files by name, reason → numbers from 1 of rows that are in none).

    The same rows give the same files, whatever their order in time.

    Rows with the same input become one instance with the outputs of all. Examples are taken in hash
    order from the shorter half of a task's rows, of different outputs as far as there are, at most half
    of the rows; they are no instances. Raises TaskError when a column is missing or no row is left.
    """
    for column in options.columns:
        if column not in columns:
            hint = nearest(column, columns)
            raise TaskError(f"{options.source}: no column {column!r}{hint}; it has {', '.join(columns) or 'none'}")
    dropped: dict[str, list[int]] = defaultdict(list)
    groups: dict[str, dict[str, tuple[int, list[str]]]] = {}  # group → input → (row number, outputs)
    for number, row in enumerate(rows, 1):
        group = (_text(row.get(options.group_by)) or "") if options.group_by else ""
        inputs = {column: _text(row.get(column)) or "" for column in options.inputs}
        blank = [column for column, text in inputs.items() if not text.strip()]
        outputs = [text for column in options.outputs for text in _texts(row.get(column)) if text.strip()]
        if None in row:  # csv's key for what is beyond the header
            dropped["more cells than the header has"].append(number)
        elif options.group_by and not group.strip():
            dropped[f"no text in column {options.group_by!r}"].append(number)
        elif blank:
            dropped[f"no text in column {blank[0]!r}"].append(number)
        elif not outputs:
            dropped[f"no text in {' or '.join(f'column {name!r}' for name in options.outputs)}"].append(number)
        else:
            lines = [f"{column}: {text}" for column, text in inputs.items()]
            one = inputs[options.inputs[0]] if len(lines) == 1 else "\n".join(lines)
            known = groups.setdefault(group, {}).setdefault(one, (number, []))[1]
            if known:
                new = not set(outputs) <= set(known)
                what = ": its output became a reference" if new else ""
                dropped[f"same input as an earlier row{what}"].append(number)
            known += [text for text in dict.fromkeys(outputs) if text not in known]
    tasks: dict[str, dict[str, Any]] = {}
    for group, instances in sorted(groups.items()):
        if len(instances) == 1 and options.num_examples:
            ((number, _),) = instances.values()
            dropped["the only row of its task: nothing is left beside an example"].append(number)
            continue
        name = options.name
        if options.group_by:
            slug = re.sub(r"[^\w.-]+", "_", group).strip("_.") or "group"
            while slug and len(f"{name}_{slug}".encode()) > MAX_NAME_BYTES - 10:
                slug = slug[:-1]
            names = (f"{name}_{slug}" + (f"_{n}" if n > 1 else "") for n in itertools.count(1))
            name = next(one for one in names if one not in tasks)
        tasks[name] = _task_values(name, group, instances, options)
    if not tasks:
        reasons = (
            "; ".join(f"{len(numbers):,} rows: {reason}" for reason, numbers in dropped.items()) or "it has no rows"
        )
        raise TaskError(f"{options.source}: no task can be made ({reasons})")
    return tasks, dict(dropped)


def _task_values(
    name: str, group: str, instances: Mapping[str, tuple[int, list[str]]], options: ImportOptions
) -> dict[str, Any]:
    lengths = {text: count_words(f"{text} {outputs[0]}") for text, (_, outputs) in instances.items()}
    median = sorted(lengths.values())[(len(lengths) - 1) // 2]
    candidates = sorted(
        (text for text in instances if lengths[text] <= median),
        key=lambda text: hash_order(f"{name}:{text}", options.seed),
    )
    first_of = {instances[text][1][0]: text for text in reversed(candidates)}  # output → its first candidate
    candidates.sort(key=lambda text: first_of[instances[text][1][0]] != text)  # stable: one of each output first
    examples = candidates[: min(options.num_examples, len(instances) // 2)]
    return {
        "Contributors": [],
        "Source": [options.source],
        "Categories": [options.category] if options.category else [],
        "Domains": [],
        "Input_language": [options.language],
        "Output_language": [options.language],
        "Definition": [options.definition.replace("{group}", group)],
        "Positive Examples": [{"input": text, "output": instances[text][1][0], "explanation": ""} for text in examples],
        "Negative Examples": [],
        "Instances": [
            {"id": f"{name}-{number}", "input": text, "output": outputs}
            for text, (number, outputs) in instances.items()
            if text not in examples
        ],
        "Instance License": [options.license],
    }


def _read_csv(file: Path, text: str, columns: Sequence[str]) -> tuple[list[str], list[dict[str, Any]]]:
    csv.field_size_limit(MAX_CELL_CHARACTERS)
    delimiters = ("\t",) if file.suffix == ".tsv" else CSV_DELIMITERS
    headers = {one: next(csv.reader(io.StringIO(text, newline=""), delimiter=one), []) for one in delimiters}
    delimiter = next((one for one, header in headers.items() if set(columns) <= set(header)), delimiters[0])
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    found = list(reader.fieldnames or [])
    if repeated := {name for name in found if found.count(name) > 1}.intersection(columns):
        raise TaskError(f"{file}: two columns are named {sorted(repeated)[0]!r}; rename one")
    try:
        return found, list(reader)
    except csv.Error as error:
        raise TaskError(f"{file} line {reader.line_num}: not valid CSV ({error})") from None


def _texts(value: Any) -> Iterator[str]:
    """The texts of an output's cell: its own, those of a list's entries, those of an object's `text`."""
    if isinstance(value, (list, tuple)):
        for entry in value:
            yield from _texts(entry)
    elif isinstance(value, Mapping):
        yield from _texts(value.get("text"))
    elif (text := _text(value)) is not None:
        yield text


def _text(value: Any) -> str | None:
    """The cell as a text for UTF-8; None for what is none: a list, an object, nothing, not a finite number."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    kinds = (str, int, float, decimal.Decimal, datetime.date, datetime.time, datetime.datetime)
    return clean_text(str(value), Counter()) if isinstance(value, kinds) else None
