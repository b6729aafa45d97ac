"""The tasks of a run cut into shards: the records that a plan consists of."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from birbal_ray.ni import labels
from birbal_ray.schemas import TASKS

FEW_SHOT, ZERO_SHOT = "few_shot", "zero_shot"


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to ask a task's instances. `contender` is empty in a score run; `adapter`: of the engine, or none."""

    contender: str = ""
    prompt_format: str = FEW_SHOT  # zero_shot: the training text
    adapter: str = ""

    @property
    def folder(self) -> str:
        """Where its shards go, below the rows folder."""
        return f"{self.contender}/{self.prompt_format}/" if self.contender else ""


@dataclass(frozen=True, slots=True)
class PlannedTask:
    """One task of the run. Token counts are None unless the plan was asked to count."""

    name: str
    path: str
    member: str | None  # of the archive at `path`
    sha256: str
    label: labels.Label
    num_available: int
    num_instances: int
    num_shots: int
    max_completion_tokens: int
    repairs: dict[str, int]
    definition: str
    categories: tuple[str, ...]
    sources: tuple[str, ...]
    domains: tuple[str, ...]
    licenses: tuple[str, ...]
    num_excluded: int = 0  # instances that the run may not take
    num_shared_tokens: int | None = None  # the prefix, once
    num_own_tokens: int | None = None  # what follows it, over all instances
    num_too_long: int | None = None
    num_prompts: int | None = None  # for the engine: neither too long nor without a reference


@dataclass(frozen=True, slots=True)
class Shard:
    """A chunk of one task's instances: the unit of work, of output and of resumption."""

    task: str
    path: str
    sha256: str
    label: str
    chunk: int
    num_chunks: int
    num_rows: int
    max_completion_tokens: int
    variant: Variant = Variant()

    @property
    def file_name(self) -> str:
        """The shard's Parquet file, below the rows folder."""
        return f"{self.variant.folder}{self.task}-{self.chunk:05d}-of-{self.num_chunks:05d}.parquet"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Shard:
        """The inverse of `dataclasses.asdict`."""
        return cls(**{**values, "variant": Variant(**values["variant"])})


@dataclass(frozen=True, slots=True)
class Plan:
    """The tasks of a run by name, and the files that were left out: (file, reason)."""

    tasks: tuple[PlannedTask, ...]
    quarantined: tuple[tuple[str, str], ...]
    excluded: tuple[tuple[str, str], ...]
    absent: tuple[str, ...]
    unknown_overrides: tuple[str, ...] = ()  # tasks of tasks.label_overrides that have no file

    @property
    def num_rows(self) -> int:
        """Rows that the run will hold."""
        return sum(task.num_instances for task in self.tasks)

    def shards(self, shard_rows: int, variants: Sequence[Variant] = (Variant(),)) -> list[Shard]:
        """All shards, those of one task and variant adjacent, long completions first.

        A task of long completions that comes last leaves the engines a handful of sequences to the end
        (docs/decisions/0002): started first, the short ones fill the batch beside it.
        """
        result = []
        longest_first = sorted(self.tasks, key=lambda task: (-task.max_completion_tokens, task.name))
        for variant, task in itertools.product(variants, longest_first):
            count = math.ceil(task.num_instances / shard_rows)
            for chunk in range(count):
                rows = min(shard_rows, task.num_instances - chunk * shard_rows)
                result.append(
                    Shard(
                        task.name,
                        task.path,
                        task.sha256,
                        task.label.value,
                        chunk,
                        count,
                        rows,
                        task.max_completion_tokens,
                        variant,
                    )
                )
        return result

    def table(self) -> pa.Table:
        """The tasks as TASKS rows."""
        return pa.Table.from_pylist(
            [
                {
                    "task": task.name,
                    "label": task.label.value,
                    "label_reason": task.label.reason,
                    "definition": task.definition,
                    "categories": list(task.categories),
                    "sources": list(task.sources),
                    "domains": list(task.domains),
                    "licenses": list(task.licenses),
                    "sha256": task.sha256,
                    "num_shots": task.num_shots,
                    "num_available": task.num_available,
                    "num_instances": task.num_instances,
                    "max_completion_tokens": task.max_completion_tokens,
                }
                for task in self.tasks
            ],
            schema=TASKS,
        )
