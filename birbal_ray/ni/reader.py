"""Read task files as they are in the wild.

The reader repairs what a file holds where the meaning is plain (counted in `Task.repairs`), makes an
instance with an `error` of one that can't be scored, and raises TaskError where the file can't be used.
"""

from __future__ import annotations

import codecs
import difflib
import gzip
import hashlib
import itertools
import json
import math
import tarfile
import unicodedata
import zlib
from collections import Counter, deque
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from birbal_ray.ni.schema import Example, Instance, Task, TaskError

ARCHIVE_SUFFIXES = (".tar.gz", ".tgz", ".tar")
FILES_AHEAD = 8  # are read while one is at work
MAX_NAME_BYTES = 200  # a result file has the task's name and some more; file systems allow 255
MAX_FILE_BYTES = 1 << 30  # of one archive member
MAX_ARCHIVE_BYTES = 16 << 30  # of all its task files, unpacked


@dataclass(frozen=True, slots=True)
class TaskFile:
    """Where a task's bytes are: a file, or a member of a tar archive."""

    name: str
    path: Path
    member: str | None = None

    @property
    def label(self) -> str:
        """As messages and result files name it: printable."""
        return printable(f"{self.path.name}:{self.member}" if self.member else self.path.name)


def find_task_files(path: Path) -> list[TaskFile]:
    """The task files of a folder (or its `tasks/`), one `.json` file, or a tar archive; by name.

    Of an archive: the .json files in a folder `tasks`, or, without one, those nearest to its root. Hidden
    files are left out. Raises TaskError when the path is absent or holds no task file.
    """
    if not path.exists():
        advice = "" if path.suffix else f"; `birbal tasks fetch --output {path}` downloads Natural Instructions there"
        if near := difflib.get_close_matches(path.name, [one.name for one in path.parent.glob("*")], n=1):
            advice = f"; did you mean {path.parent / near[0]}?"
        raise TaskError(f"{path}: no such file or folder{advice}")
    if path.is_dir():
        folder = path / "tasks" if (path / "tasks").is_dir() else path
        files = [TaskFile(file.stem, file) for file in folder.glob("*.json") if not file.name.startswith(".")]
    elif path.name.endswith(ARCHIVE_SUFFIXES):
        members = [PurePosixPath(member) for member, _ in _members(path)]
        inside = [member for member in members if member.parent.name == "tasks"]
        depth = min((len(member.parts) for member in members), default=0)
        chosen = inside or [member for member in members if len(member.parts) == depth]
        files = [TaskFile(member.stem, path, str(member)) for member in chosen]
    elif path.suffix == ".json":
        files = [TaskFile(path.stem, path)]
    else:
        raise TaskError(
            f"{path}: not a folder, a .json task file or a {'/'.join(ARCHIVE_SUFFIXES)} archive; `birbal tasks import` "
            "makes task files of a table"
        )
    if not files:
        raise TaskError(f"{path}: holds no task files (*.json, or tasks/*.json); `birbal tasks fetch` downloads some")
    return sorted(files, key=lambda file: file.name)


def read_tasks(files: list[TaskFile]) -> Iterator[tuple[TaskFile, Task | TaskError]]:
    """Each file's task, or why it can't be used; the order is that of `read_files`."""
    for file, data in read_files(files):
        try:
            yield file, parse_task(file.name, data)
        except TaskError as error:
            yield file, error


def read_files(files: list[TaskFile]) -> Iterator[tuple[TaskFile, bytes | OSError]]:
    """Each file's bytes, or why it can't be read; the members of one archive come in one pass over it."""
    plain = iter([file for file in files if file.member is None])
    with ThreadPoolExecutor(2) as pool:  # a disk reads on while the caller is at work on what it gave
        ahead = deque((file, pool.submit(_read, file.path)) for file in itertools.islice(plain, FILES_AHEAD))
        while ahead:
            file, reading = ahead.popleft()
            yield file, reading.result()
            ahead.extend((one, pool.submit(_read, one.path)) for one in itertools.islice(plain, 1))
    archives = {file.path for file in files if file.member is not None}
    for archive in sorted(archives):
        wanted = {file.member: file for file in files if file.member and file.path == archive}
        for member, data in _members(archive, wanted):
            yield wanted[member], data


def _read(path: Path) -> bytes | OSError:
    try:
        return path.read_bytes()
    except OSError as error:
        return error


def parse_task(name: str, data: bytes | OSError) -> Task:
    """A task from a file's bytes; raises TaskError naming the file and the reason.

    Instances with the same input become one with the references of all, in order. Row ids
    are made of the file's ids, of positions (from 0) where there are none, with `#n` on repeats.
    """
    shown = printable(name)
    if isinstance(data, OSError):
        raise TaskError(f"{shown}.json: can't be read ({data.strerror})")
    if len(name.encode("utf-8", "surrogatepass")) > MAX_NAME_BYTES:
        raise TaskError(f"{shown[:40]}….json: the name is longer than {MAX_NAME_BYTES} bytes; rename the file")
    wrong = {
        "bytes that are no text in UTF-8": shown != name,
        "a ':', which ends the task's name in row ids": ":" in name,
        "a '/', which ends a folder's name": "/" in name,
        "a dot at its start, which hides files": name.startswith("."),
    }
    if what := next((what for what, found in wrong.items() if found), ""):
        raise TaskError(f"{shown}.json: the name holds {what}; rename the file")
    repairs: Counter[str] = Counter()
    try:
        values = _parse_json(name, data, repairs)
        definition = values.get("Definition")
        first = definition[0] if isinstance(definition, list) and definition else definition
        if not isinstance(first, str) or not first.strip():
            found = "empty" if isinstance(first, str) else _kind(definition)
            raise TaskError(f"{name}.json: 'Definition' is {found}, expected a text or a list of texts")
        task = Task(
            name=name,
            definition=clean_text(first, Counter()),
            positive_examples=_examples(name, values.get("Positive Examples"), repairs),
            instances=_instances(name, values.get("Instances"), repairs),
            categories=_strings(values.get("Categories")),
            sources=_strings(values.get("Source")),
            input_languages=_strings(values.get("Input_language")),
            output_languages=_strings(values.get("Output_language")),
            licenses=_strings(values.get("Instance License")),
            sha256=hashlib.sha256(data).hexdigest(),
            repairs={},
            definition_is_text=isinstance(definition, str),
        )
    except RecursionError:
        raise TaskError(f"{name}.json: not a task file (nested too deeply)") from None
    return replace(task, repairs=dict(repairs))


def printable(name: str) -> str:
    """The name with escapes for what no terminal or UTF-8 file can hold."""
    unprintable = ("Cc", "Cs", "Zl", "Zp")  # control characters, surrogates (bytes that are not UTF-8), line ends
    escaped = (ascii(one)[1:-1] if unicodedata.category(one) in unprintable else one for one in name)
    return name if name.isascii() and name.isprintable() else "".join(escaped)


def _members(archive: Path, wanted: Collection[str] | None = None) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of the archive's .json files, or of the `wanted` ones; nothing is extracted.

    Without `wanted` bytes are empty. Names are normal: without a leading `./`.
    """
    unpacked = open if archive.suffix == ".tar" else gzip.open
    num_bytes = 0
    try:
        with unpacked(archive, "rb") as plain, tarfile.open(fileobj=plain, mode="r|") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                if not member.isreg() or path.suffix != ".json" or path.name.startswith("."):
                    continue
                if wanted is not None and str(path) not in wanted:
                    continue
                num_bytes += member.size
                if member.size > MAX_FILE_BYTES or num_bytes > MAX_ARCHIVE_BYTES:
                    raise TaskError(f"{archive}: unpacks to more than it should ({printable(member.name)})")
                file = tar.extractfile(member) if wanted is not None else None
                yield str(path), file.read() if file else b""
            while plain.read(1 << 20):  # to gzip's checksum: tarfile takes a damaged header for the archive's end
                pass
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise TaskError(f"{archive}: not a readable tar archive ({error})") from None


def _parse_json(name: str, data: bytes, repairs: Counter[str]) -> dict[str, Any]:
    if not data.strip():
        raise TaskError(f"{name}.json: the file is empty")
    if data.startswith(codecs.BOM_UTF8):
        repairs["byte order mark"] += 1
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        which = " (it looks like UTF-16 or UTF-32)" if b"\0" in data[:4] else ""
        raise TaskError(f"{name}.json: not UTF-8 at byte {error.start}{which}; save it as UTF-8") from None
    if "\0" in text[:4]:
        raise TaskError(f"{name}.json: not UTF-8 (it looks like UTF-16 or UTF-32); save it as UTF-8")
    try:
        # Not orjson: real files hold bare NaN and unpaired surrogates.
        values = json.loads(text, object_pairs_hook=unique_keys)
    except json.JSONDecodeError as error:
        ends_there = error.pos >= len(text.rstrip()) - 1 or error.msg.startswith("Unterminated string")
        truncated = ", the file ends there: truncated?" if ends_there else ""
        raise TaskError(
            f"{name}.json: not valid JSON at line {error.lineno} column {error.colno} ({error.msg}{truncated})"
        ) from None
    except ValueError as error:  # an integer of more than 4,300 digits, a key given twice
        raise TaskError(f"{name}.json: not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise TaskError(f"{name}.json: expected an object at the top, found {_kind(values)}")
    return values


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """json's `object_pairs_hook` that raises ValueError where a key repeats; by itself json keeps the last value."""
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice!r} is given twice in one object")
    return values


def _examples(name: str, value: Any, repairs: Counter[str]) -> tuple[Example, ...]:
    if not isinstance(value, list):
        raise TaskError(f"{name}.json: 'Positive Examples' is {_kind(value)}, expected a list")
    examples = []
    for entry in value:
        outputs = list(_texts(entry.get("output"), repairs)) if isinstance(entry, dict) else []
        if not outputs or not isinstance(entry.get("input"), str):
            repairs["positive example dropped (no input and output text)"] += 1
            continue
        examples.append(Example(clean_text(entry["input"], repairs), outputs[0]))
    return tuple(examples)


def _instances(name: str, value: Any, repairs: Counter[str]) -> tuple[Instance, ...]:
    if not isinstance(value, list):
        raise TaskError(f"{name}.json: 'Instances' is {_kind(value)}, expected a list")
    if not value:
        raise TaskError(f"{name}.json: 'Instances' is empty")
    by_input: dict[str, int] = {}
    numbers: dict[str, int] = {}  # row id → the largest number of one that an id of the file gave
    instances: list[Instance] = []
    for position, entry in enumerate(value):
        instance_id, text, references, error = _instance(position, entry, repairs)
        first = by_input.get(text) if error is None else None
        if first is not None:
            merged = dict.fromkeys(instances[first].references + references)
            instances[first] = replace(instances[first], references=tuple(merged))
            repairs["instance merged into one with the same input"] += 1
            continue
        row_id = given = f"{name}:{instance_id}"
        while row_id in numbers:
            numbers[given] += 1
            row_id = f"{given}#{numbers[given]}"
        numbers[row_id] = 1
        if row_id != given:
            repairs["repeated instance id given a suffix"] += 1
        if error is None:
            by_input[text] = len(instances)
        instances.append(Instance(row_id, instance_id, text, references, error))
    return tuple(instances)


def _instance(position: int, entry: Any, repairs: Counter[str]) -> tuple[str, str, tuple[str, ...], str | None]:
    """(id, input, references, error) of an entry."""
    if not isinstance(entry, dict):
        return str(position), "", (), f"not an object: instance {position} is {_kind(entry)}"
    given = entry.get("id")
    instance_id = clean_text(str(given), repairs) if given not in (None, "") else str(position)
    text = entry.get("input")
    if not isinstance(text, str):
        return instance_id, "", (), f"'input' is {_kind(text)}, expected a text"
    text = clean_text(text, repairs)
    output = entry.get("output")
    if output is not None and not isinstance(output, list):
        repairs["output given as a single value, not a list"] += 1
    references = list(_texts(output, repairs)) if output is not None else []
    unique = tuple(dict.fromkeys(references))
    if len(unique) < len(references):
        repairs["repeated reference dropped"] += len(references) - len(unique)
    filled = tuple(reference for reference in unique if reference.strip())
    if not filled:
        reason = "no reference: every 'output' is empty" if unique else "no reference: 'output' holds no text"
        return instance_id, text, unique, reason
    if len(filled) < len(unique):
        repairs["empty reference beside others dropped"] += 1
    return instance_id, text, filled, None


def _texts(value: Any, repairs: Counter[str]) -> Iterator[str]:
    """The texts of an output: a text, a number, a list of them, a list of such lists."""
    if isinstance(value, str):
        yield clean_text(value, repairs)
    elif isinstance(value, list):
        for entry in value:
            if isinstance(entry, str):
                yield clean_text(entry, repairs)
                continue
            if isinstance(entry, list):
                repairs["list inside an output taken apart"] += 1
            yield from _texts(entry, repairs)
    elif (isinstance(value, int) and not isinstance(value, bool)) or (
        isinstance(value, float) and math.isfinite(value)
    ):
        repairs["number taken as a reference text"] += 1
        yield str(value)
    else:
        repairs[f"reference dropped ({_kind(value)}, not a text)"] += 1


def _strings(value: Any) -> tuple[str, ...]:
    entries = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return tuple(clean_text(entry, Counter()) for entry in entries if isinstance(entry, str))


def clean_text(text: str, repairs: Counter[str]) -> str:
    """Text that can be written as UTF-8: unpaired surrogates become U+FFFD."""
    if text.isascii():
        return text
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        repairs["unpaired surrogate replaced by U+FFFD"] += 1
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _kind(value: Any) -> str:
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    if isinstance(value, float) and not math.isfinite(value):
        return "not a finite number"
    names = {dict: "an object", str: "a text", bool: "a boolean", type(None): "missing or null"}
    return names.get(type(value), "a number")
