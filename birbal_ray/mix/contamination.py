"""Whether a training text overlaps an evaluation's texts, or its task is the evaluation's own."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from birbal_ray.mix.files import read_lines, read_records
from birbal_ray.ni.metrics import tokens

_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying by it loses nothing modulo 2^64
SHORTEST_TEXT_WORDS = 5


def families_of(names: Iterable[str], families: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """The evaluations whose family names occur, as whole words, in any of the names (task, its sources)."""
    plain = [_words_of(name) for name in names]
    return tuple(
        evaluation
        for evaluation, words in families.items()
        if any(_words_of(word) in name for word in words for name in plain)
    )


def _words_of(name: str) -> str:
    """`Hendrycks-Test 2` as `_hendrycks_test_2_`."""
    words = re.sub(r"[\W_]+", "_", name.lower()).strip("_")
    return f"_{words}_"


@dataclass(frozen=True, slots=True)
class NgramIndex:
    """Hashes of every run of `size` words in the evaluation texts, and the shorter texts.

    Words are the tokens of ni.metrics, of every script. An evaluation text under 5 words is left out: it would
    match by accident.
    """

    size: int
    runs: NDArray[np.uint64]  # sorted, distinct
    short_texts: frozenset[bytes]  # the hashes of each one's words
    num_texts: int

    def overlaps(self, rows: Sequence[Sequence[str]]) -> NDArray[np.bool_]:
        """One answer a row, shape (len(rows),); a row is a sequence of texts, looked at one by one."""
        found = np.zeros(len(rows), bool)
        # Index space of what follows: the texts of all rows in turn.
        owner = np.array([row for row, texts in enumerate(rows) for _ in texts], np.int64)
        words = [_word_hashes(text) for texts in rows for text in texts]
        if len(words):
            runs, text = _runs(words, self.size)
            hit = np.array([len(w) < self.size and w.tobytes() in self.short_texts for w in words], bool)
            if len(self.runs):
                place = np.minimum(np.searchsorted(self.runs, runs), len(self.runs) - 1)
                hit[text[self.runs[place] == runs]] = True
            found[owner[hit]] = True
        return found


def build_index(files: Sequence[str], size: int) -> NgramIndex:
    """The index of the texts in files: lines of .txt, every string inside the records of .json, .jsonl and .parquet.

    Raises ConfigError for a file that can't be used.
    """
    runs: list[NDArray[np.uint64]] = [np.empty(0, np.uint64)]
    short: set[bytes] = set()
    count = 0
    for file in map(str, files):
        setting = "contamination.files"
        lines = read_lines(file, setting) if file.endswith(".txt") else read_records(file, setting, also=".txt")
        for words in (_word_hashes(text) for _, value in lines for text in _strings(value)):
            if len(words) >= SHORTEST_TEXT_WORDS:
                count += 1
                if len(words) < size:
                    short.add(words.tobytes())
                else:
                    runs.append(_runs([words], size)[0])
    return NgramIndex(size, np.unique(np.concatenate(runs)), frozenset(short), count)


def _strings(value: Any) -> Iterator[str]:
    """Every text inside a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(item)


@lru_cache(maxsize=1 << 18)
def _word_hashes(text: str) -> NDArray[np.uint64]:
    words = (word.encode("utf-8", "surrogatepass") for word in tokens(text))
    return np.array([int.from_bytes(hashlib.blake2b(word, digest_size=8).digest(), "big") for word in words], np.uint64)


def _runs(words: Sequence[NDArray[np.uint64]], size: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Hash of every run of `size` words, and the number of the text it lies in; no run crosses texts."""
    joined = np.concatenate(words)  # word hashes of all texts in turn
    text = np.repeat(np.arange(len(words)), [len(w) for w in words])  # (len(joined),): which text a word is of
    count = len(joined) - size + 1
    if count <= 0:
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    value = np.zeros(count, np.uint64)
    for offset in range(size):
        value = value * _FACTOR + joined[offset : offset + count]
    inside = text[:count] == text[size - 1 :]
    return value[inside], text[:count][inside]
