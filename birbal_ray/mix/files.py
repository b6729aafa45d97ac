"""Records and lines of users' files, local or at a URL, in whatever encoding announces itself."""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from birbal_ray.settings import ConfigError, one_line
from birbal_ray.storage import Folder, absolute, open_folder

SUFFIXES = (".json", ".jsonl", ".parquet")
BATCH_ROWS = 2048
PIECE_CHARS = 1 << 20  # of a .json array, read at a time
# Between the records of a .json array.
_OPENING, _COMMA, _CLOSING, _EMPTY = map(re.compile, (r"\s*\[\s*", r"\s*,\s*", r"\s*\]\s*", r"\s*\[\s*\]\s*"))
_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


def locate(place: str, setting: str) -> tuple[Folder, str]:
    """Folder and name of a file; `setting` is what error messages call it. A path is a path, never a pattern."""
    parent, _, name = absolute(place).rpartition("/")
    folder = open_folder(parent or "/")
    if not name or not folder.is_file(name):
        raise ConfigError(f"{setting}: {place}: no such file")
    return folder, name


def sha256_of_file(place: str, setting: str) -> str:
    """SHA-256 (hex) of a file, read in pieces."""
    folder, name = locate(place, setting)
    return folder.record_of(name).sha256


def read_lines(place: str, setting: str) -> Iterator[tuple[int, str]]:
    """(number from 1, text) of each line of a UTF-8 or UTF-16 file.

    Only \\n, \\r and \\r\\n end a line: U+2028, NEL and form feed are text. Raises ConfigError for another encoding.
    """
    number = 0
    with _open_text(place, setting) as file:
        try:
            for number, line in enumerate(file, 1):
                yield number, line.rstrip("\r\n")
        except UnicodeError:
            raise _not_unicode(place, setting, f"after line {number}") from None


def read_records(place: str, setting: str, also: str = "") -> Iterator[tuple[int, Any]]:
    """(number from 1, record) of a .jsonl, .json (an array, or one record a line) or .parquet file.

    Text stays text, dates included. Memory: a batch of rows. Raises ConfigError naming file and row.
    """
    if not place.endswith(SUFFIXES):
        raise ConfigError(f"{setting}: {place}: expected {also + ', ' if also else ''}{', '.join(SUFFIXES)}")
    if place.endswith(".parquet"):
        yield from _parquet_records(place, setting)
        return
    if place.endswith(".json"):
        with _open_text(place, setting) as file:
            try:
                is_array = file.read(4096).lstrip()[:1] == "["
            except UnicodeError:
                raise _not_unicode(place, setting, "at its start") from None
        if is_array:
            yield from _array_records(place, setting)
            return
    for number, line in read_lines(place, setting):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise ConfigError(f"{setting}: {place}, line {number}: not JSON ({error.msg})") from None


def _open_text(place: str, setting: str) -> io.TextIOWrapper:
    folder, name = locate(place, setting)
    file = folder.open_input(name)
    start = file.read(4)
    file.seek(0)
    encoding = next((encoding for mark, encoding in _MARKS if start.startswith(mark)), "utf-8")
    return io.TextIOWrapper(file, encoding=encoding, newline="")


def _not_unicode(place: str, setting: str, where: str) -> ConfigError:
    return ConfigError(f"{setting}: {place}, {where}: neither UTF-8 nor UTF-16; save the file as UTF-8")


def _parquet_records(place: str, setting: str) -> Iterator[tuple[int, Any]]:
    folder, name = locate(place, setting)
    number = 0
    try:
        with folder.open_input(name) as file:
            for batch in pq.ParquetFile(file).iter_batches(BATCH_ROWS):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
    except (pa.ArrowException, OSError) as error:
        reason = one_line(error)
        raise ConfigError(f"{setting}: {place}, after row {number}: not a Parquet file ({reason})") from None


def _array_records(place: str, setting: str) -> Iterator[tuple[int, Any]]:
    decoder, number, text, position, is_last = json.JSONDecoder(), 0, "", 0, False
    with _open_text(place, setting) as file:
        while True:
            problem = f"after row {number}: not JSON (expected , or ])"
            if end := (_CLOSING if number else _EMPTY).match(text, position):
                if end.end() < len(text):
                    more = "more than one JSON array; make it one array, or one record a line in a .jsonl"
                    raise ConfigError(f"{setting}: {place}, after row {number}: {more}")
                if is_last:
                    return
            elif start := (_COMMA if number else _OPENING).match(text, position):
                try:
                    record, after = decoder.raw_decode(text, start.end())
                    if after < len(text) or is_last:  # else a number may go on in the next piece
                        number, position = number + 1, after
                        yield number, record
                        continue
                except json.JSONDecodeError as error:
                    problem = f"row {number + 1}: not JSON ({error.msg})"
            if is_last:
                raise ConfigError(f"{setting}: {place}, {problem}")
            try:
                piece = file.read(PIECE_CHARS)
            except UnicodeError:
                raise _not_unicode(place, setting, f"after row {number}") from None
            text, position, is_last = text[position:] + piece, 0, not piece
