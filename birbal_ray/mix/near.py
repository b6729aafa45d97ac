"""Near-duplicate inputs under the same instruction, by MinHash (library: rensa)."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

NUM_HASHES = 128  # 512 bytes a row
SHINGLE_WORDS = 3
_WORD = re.compile(r"[^\W_]+")


def signatures(texts: Sequence[str]) -> NDArray[np.uint32]:
    """MinHash signatures, shape (len(texts), NUM_HASHES); equal texts have equal ones on any machine."""
    import rensa

    matrix = rensa.RMinHash.digest_matrix_from_token_sets([_shingles(text) for text in texts], NUM_HASHES, 42)
    return np.array(matrix.to_rows(), np.uint32).reshape(len(texts), NUM_HASHES)


def bands_for(threshold: float) -> tuple[int, int]:
    """(bands, rows per band) whose half-way point lies at or just below `threshold`; bands × rows = NUM_HASHES."""
    fitting = [(NUM_HASHES // rows, rows) for rows in (1, 2, 4, 8, 16, 32)]
    below = [(b, r) for b, r in fitting if (1 / b) ** (1 / r) <= threshold - 0.05]
    return below[-1]


def near_duplicates(
    order: NDArray[np.int64],
    instruction_hash: NDArray[np.uint64],
    table: NDArray[np.uint32],
    place: NDArray[np.int64],
    threshold: float,
) -> dict[int, int]:
    """`{row: the earlier row it nearly repeats}` for rows given best first.

    Row i has signature table[place[i]]. Rows meet in a bucket when a band of their signatures
    and their instruction agree; a row falls when its estimated Jaccard similarity with an earlier
    surviving row of the bucket reaches the threshold. The same for any order of the rows on disk.
    """
    bands, width = bands_for(threshold)
    twins: dict[int, int] = {}
    for number in range(bands):
        part = np.ascontiguousarray(table[place[order], number * width : (number + 1) * width])
        key = _mix(part, instruction_hash[order])
        by_key = np.lexsort((np.arange(len(order)), key))
        sorted_keys = key[by_key]
        starts = np.flatnonzero(np.r_[True, sorted_keys[1:] != sorted_keys[:-1]]) if len(by_key) else by_key
        ends = np.r_[starts[1:], len(by_key)] if len(by_key) else starts
        for start, end in zip(starts[ends - starts > 1], ends[ends - starts > 1], strict=True):
            _thin(order[by_key[start:end]], table, place, threshold, twins)
    return twins


def _thin(
    bucket: NDArray[np.int64],
    table: NDArray[np.uint32],
    place: NDArray[np.int64],
    threshold: float,
    twins: dict[int, int],
) -> None:
    alive = np.array([row for row in bucket if int(row) not in twins], np.int64)
    while len(alive) > 1:
        first, rest = alive[0], alive[1:]
        alike = (table[place[rest]] == table[place[first]]).mean(axis=1) >= threshold
        for row in rest[alike]:
            twins[int(row)] = int(first)
        alive = rest[~alike]


def _mix(part: NDArray[np.uint32], instruction_hash: NDArray[np.uint64]) -> NDArray[np.uint64]:
    value = instruction_hash.copy()
    for column in range(part.shape[1]):
        value = value * np.uint64(0x9E3779B97F4A7C15) + part[:, column]
    return value


def _shingles(text: str) -> list[str]:
    words = _WORD.findall(text.lower())
    if len(words) < SHINGLE_WORDS:
        return [" ".join(words)]
    return [" ".join(words[i : i + SHINGLE_WORDS]) for i in range(len(words) - SHINGLE_WORDS + 1)]
