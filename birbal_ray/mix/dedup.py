"""Near-duplicate inputs under the same instruction, by MinHash (library: rensa)."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from birbal_ray.ni.metrics import tokens

NUM_HASHES = 128  # 512 bytes a row
SHINGLE_WORDS = 3
# What must agree exactly: numbers, and signs that are no punctuation (a hyphen between letters is none).
_EXACT = re.compile(r"""\d+(?:[.,]\d+)*|[^\w\s.,;:!?'"“”‘’„«»()\[\]{}…–—-]|(?<![^\W\d_])-|-(?![^\W\d_])""")


def signatures(texts: Sequence[str]) -> NDArray[np.uint32]:
    """MinHash signatures of word 3-grams, shape (len(texts), NUM_HASHES); equal texts have equal ones anywhere."""
    import rensa

    shingles = [
        [" ".join(words[i : i + SHINGLE_WORDS]) for i in range(max(1, len(words) - SHINGLE_WORDS + 1))]
        for words in map(tokens, texts)
    ]
    matrix = rensa.RMinHash.digest_matrix_from_token_sets(shingles, NUM_HASHES, 42)
    return np.array(matrix.to_rows(), np.uint32).reshape(len(texts), NUM_HASHES)


def exact_parts(text: str) -> str:
    """The numbers and signs of a text, in order: texts that differ here (`3 + 4`, `3 + 5`) are no repeats."""
    return " ".join(_EXACT.findall(text))


def bands_for(threshold: float) -> tuple[int, int]:
    """(bands, rows per band) whose half-way point lies at or just below `threshold`; bands × rows = NUM_HASHES."""
    fitting = [(NUM_HASHES // rows, rows) for rows in (1, 2, 4, 8, 16, 32)]
    return [(b, r) for b, r in fitting if (1 / b) ** (1 / r) <= threshold - 0.05][-1]


def near_duplicates(
    order: NDArray[np.int64], exact_key: NDArray[np.uint64], table: NDArray[np.uint32], threshold: float
) -> dict[int, int]:
    """`{row: the earlier row it nearly repeats}` for candidate indices given best first.

    exact_key: (candidates,), equal where instruction, numbers and signs agree. table: (candidates, NUM_HASHES).
    Rows meet in a bucket when a band of their signatures and their exact key agree; a row falls when its
    estimated Jaccard similarity with an earlier surviving row of the bucket reaches the threshold.
    """
    bands, width = bands_for(threshold)
    duplicate_of: dict[int, int] = {}
    for number in range(bands):
        # `key` and `by_key` index positions in `order`, not candidates.
        key = exact_key[order]
        for column in np.asarray(table[order, number * width : (number + 1) * width]).T:
            key = key * np.uint64(0x9E3779B97F4A7C15) + column
        by_key = np.argsort(key, kind="stable")
        edges = np.flatnonzero(np.r_[True, np.diff(key[by_key]) != 0, True]) if len(order) else np.zeros(1, int)
        for start, end in itertools.pairwise(edges):
            if end - start == 1:
                continue
            bucket = order[by_key[start:end]]
            alive = np.array([row for row in bucket if int(row) not in duplicate_of], np.int64)
            while len(alive) > 1:
                first, rest = alive[0], alive[1:]
                alike = (table[rest] == table[first]).mean(axis=1) >= threshold
                duplicate_of.update((int(row), int(first)) for row in rest[alike])
                alive = rest[~alike]
    return duplicate_of
