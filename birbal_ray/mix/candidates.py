"""Candidates of a mix as compact columns, with what was decided about them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from birbal_ray.mix.allocation import Allocation

NO_TWIN = -1


@dataclass(frozen=True, slots=True)
class Group:
    """A task of the score run, or an outside source (`label` None)."""

    name: str
    source: str
    label: str | None = None
    task_score: float | None = None
    max_rows: int | None = None
    families: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Candidates:
    """All candidates as columns of equal length n; 46 bytes a row, texts stay on disk."""

    group: NDArray[np.int32]  # index into the groups
    row_hash: NDArray[np.uint64]  # order inside a task
    shuffle_hash: NDArray[np.uint64]  # order of the mix
    key: NDArray[np.uint64]  # equal for repeats
    score: NDArray[np.float64]  # NaN where there is none
    ladder: NDArray[np.float64]  # birbal_2023's view of the answer; NaN where there is none
    bits: NDArray[np.uint16]  # Bits

    def __len__(self) -> int:
        return len(self.group)


@dataclass(frozen=True, slots=True)
class Decisions:
    """One decision a candidate, in the candidates' order.

    `rank` is the row's place in the audit: kept rows first, in the mix's order, then validation rows.
    `usable` and `allocated` count per group.
    """

    reason: NDArray[np.uint8]
    bucket: NDArray[np.uint8]
    twin: NDArray[np.int64]
    rank: NDArray[np.int64]
    num_kept: int
    num_validation: int
    usable: NDArray[np.int64]
    allocated: NDArray[np.int64]
    allocations: dict[str, Allocation]
