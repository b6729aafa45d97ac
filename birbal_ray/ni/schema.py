"""Records of the Natural Instructions task layout."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from importlib import resources
from pathlib import Path


class TaskError(ValueError):
    """A task file can't be used; the message is one line that names the file and the reason."""


def sample_tasks_folder() -> Path:
    """The folder of the project's own sample tasks."""
    return Path(str(resources.files("birbal_ray") / "sample_tasks"))


def read_text(file: Path) -> str:
    """A text file's content, without a byte order mark; raises TaskError when it is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise TaskError(f"{file}: not UTF-8 at byte {error.start}; save it as UTF-8") from None


@dataclass(frozen=True, slots=True)
class Example:
    """One positive example: the input and the output it shows."""

    input: str
    output: str


@dataclass(frozen=True, slots=True)
class Instance:
    """One input with its references.

    `row_id` is `{task}:{instance_id}`, with `#2`, `#3`, … on repeats. `error` says why it can't be
    scored (then `references` may be empty); such an instance still becomes a row.
    """

    row_id: str
    instance_id: str
    input: str
    references: tuple[str, ...]
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """One task file. `repairs` counts what the reader repaired, by kind."""

    name: str
    definition: str
    positive_examples: tuple[Example, ...]
    instances: tuple[Instance, ...]
    categories: tuple[str, ...]
    sources: tuple[str, ...]
    input_languages: tuple[str, ...]
    output_languages: tuple[str, ...]
    licenses: tuple[str, ...]
    sha256: str
    repairs: dict[str, int]
    definition_is_text: bool = False  # in the file, where newer ones hold a list


def hash_order(row_id: str, seed: int) -> bytes:
    """Sort key that orders instances by a hash of (seed, row_id), the only randomness used here."""
    return hashlib.blake2b(f"{seed}\x1f{row_id}".encode("utf-8", "surrogatepass"), digest_size=8).digest()


def text_key(instruction: str, text: str) -> str:
    """`text:` and a hash of what is asked: instances that ask the same have the same key."""
    digest = hashlib.blake2b(f"{instruction}\x1f{text}".encode("utf-8", "surrogatepass"), digest_size=16)
    return f"text:{digest.hexdigest()}"


def order_instances(task: Task, seed: int, excluded: Collection[str] = frozenset()) -> list[Instance]:
    """The task's instances in hash order.

    `excluded` holds row ids and text keys that are passed over.
    """
    instances = [
        one
        for one in task.instances
        if not excluded or not (one.row_id in excluded or text_key(task.definition, one.input) in excluded)
    ]
    return sorted(instances, key=lambda instance: (hash_order(instance.row_id, seed), instance.row_id))
