"""Records of the Natural Instructions task layout."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


class TaskError(ValueError):
    """A task file can't be used; the message is one line that names the file and the reason."""


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
    """One task file. `repairs` counts what the reader mended, by kind."""

    name: str
    definition: str
    positive_examples: tuple[Example, ...]
    instances: tuple[Instance, ...]
    categories: tuple[str, ...]
    sources: tuple[str, ...]
    domains: tuple[str, ...]
    input_languages: tuple[str, ...]
    output_languages: tuple[str, ...]
    licenses: tuple[str, ...]
    sha256: str
    num_bytes: int
    repairs: dict[str, int]


def hash_order(row_id: str, seed: int) -> bytes:
    """Sort key that orders instances by a hash of (seed, row_id), the only randomness used here."""
    return hashlib.blake2b(f"{seed}\x1f{row_id}".encode("utf-8", "surrogatepass"), digest_size=8).digest()


def take_first(task: Task, count: int | None, seed: int) -> list[Instance]:
    """The first `count` instances in hash order, all of them when `count` is None."""
    ordered = sorted(task.instances, key=lambda instance: (hash_order(instance.row_id, seed), instance.row_id))
    return ordered if count is None else ordered[:count]
