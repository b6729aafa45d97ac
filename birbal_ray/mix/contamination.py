"""Whether a training text overlaps an evaluation's texts, or its task is the evaluation's own."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from birbal_ray.settings import ConfigError, nearest

# Evaluation → names that its data goes by in task names, task sources and outside sources. The
# evaluations are those of the 2023 challenge (open: MMLU, TruthfulQA, BIG-bench, GSM8K, BBQ and BBH,
# OpenBookQA, CNN/DailyMail among its HELM scenarios; hidden: sam_sum, corr2cause, MATH, ethics).
FAMILIES: dict[str, tuple[str, ...]] = {
    "sam_sum": ("samsum", "sam_sum"),
    "openbookqa": ("openbookqa", "open_book_qa", "obqa"),
    "cnn_dailymail": ("cnn_dailymail", "cnn_daily_mail", "cnn_dm"),
    "bigbench": ("bigbench", "big_bench"),
    "ethics": ("hendrycks_ethics", "ethics", "ethics_justice", "ethics_commonsense", "ethics_deontology"),
    "mmlu": ("mmlu", "hendrycks_test"),
    "truthfulqa": ("truthfulqa", "truthful_qa"),
    "gsm8k": ("gsm8k", "gsm_8k"),
    "bbq": ("bbq",),
    "bbh": ("bbh", "big_bench_hard"),
    "math": ("hendrycks_math", "competition_math"),
    "corr2cause": ("corr2cause",),
}

_WORD = re.compile(r"[^\W_]+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying by it loses nothing modulo 2^64


def chosen_families(evaluations: Sequence[str], extra: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Evaluation → names to look for. Raises ConfigError for an evaluation that has no list."""
    known = {**FAMILIES, **{name: tuple(words) for name, words in extra.items()}}
    for name in evaluations:
        if name not in known:
            raise ConfigError(
                f"contamination.evaluations: no family {name!r}{nearest(name, known)}; "
                f"known: {', '.join(sorted(known))}; add yours under contamination.families"
            )
    return {name: known[name] for name in dict.fromkeys([*evaluations, *extra])}


def families_of(names: Iterable[str], families: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """The evaluations whose family names occur, as whole words, in any of the names (task, its sources)."""
    plain = [f"_{re.sub(r'[^a-z0-9]+', '_', name.lower()).strip('_')}_" for name in names]
    return tuple(
        evaluation
        for evaluation, words in families.items()
        if any(f"_{word}_" in name for word in words for name in plain)
    )


@dataclass(frozen=True, slots=True)
class NgramIndex:
    """Hashes of every run of `size` words in the evaluation texts, and of texts shorter than that as a whole.

    Words are runs of letters and digits, lower-cased. An evaluation text under 5 words is left out
    (it would match by accident).
    """

    size: int
    runs: NDArray[np.uint64]  # sorted, distinct
    short_texts: NDArray[np.uint64]  # sorted, distinct
    num_texts: int

    def overlaps(self, parts: Sequence[Sequence[str]]) -> NDArray[np.bool_]:
        """One answer a row; a row is a sequence of texts, looked at one by one."""
        owners = [row for row, texts in enumerate(parts) for _ in texts]
        words = [_word_hashes(text) for texts in parts for text in texts]
        found = np.zeros(len(parts), bool)
        lengths = np.array([len(w) for w in words], np.int64)
        if not len(lengths):
            return found
        runs, owner_text = _runs(words, lengths, self.size)
        hit_texts = owner_text[_contains(self.runs, runs)]
        whole = np.array([_whole(w) for w in words], np.uint64)
        hit = _contains(self.short_texts, whole)
        hit[hit_texts] = True
        found[np.array(owners, np.int64)[hit]] = True
        return found


SHORTEST_TEXT_WORDS = 5


def build_index(files: Sequence[str | Path], size: int) -> NgramIndex:
    """The index of evaluation texts in files. Raises ConfigError for a file that can't be used."""
    runs: list[NDArray[np.uint64]] = []
    short: list[np.uint64] = []
    count = 0
    for file in files:
        for text in evaluation_texts(Path(file)):
            words = _word_hashes(text)
            if len(words) < SHORTEST_TEXT_WORDS:
                continue
            count += 1
            if len(words) < size:
                short.append(_whole(words))
            else:
                runs.append(_runs([words], np.array([len(words)]), size)[0])
    return NgramIndex(
        size,
        np.unique(np.concatenate(runs)) if runs else np.empty(0, np.uint64),
        np.unique(np.array(short, np.uint64)),
        count,
    )


def evaluation_texts(file: Path) -> Iterator[str]:
    """Texts of one file: lines of .txt, every string inside the records of .jsonl, string columns of .parquet."""
    if not file.is_file():
        raise ConfigError(f"contamination.files: {file}: no such file")
    if file.suffix == ".txt":
        yield from (line for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    elif file.suffix == ".jsonl":
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if line.strip():
                try:
                    yield from _strings(json.loads(line))
                except json.JSONDecodeError as error:
                    raise ConfigError(f"contamination.files: {file}, line {number}: not JSON ({error.msg})") from None
    elif file.suffix == ".parquet":
        try:
            parquet = pq.ParquetFile(file)
        except (pa.ArrowInvalid, OSError) as error:
            raise ConfigError(f"contamination.files: {file}: not a Parquet file ({error})") from None
        for batch in parquet.iter_batches(4096):
            for column in batch.columns:
                yield from _strings(column.to_pylist())
    else:
        raise ConfigError(f"contamination.files: {file}: expected .txt, .jsonl or .parquet")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)


@lru_cache(maxsize=1 << 18)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def _word_hashes(text: str) -> NDArray[np.uint64]:
    return np.array([_word_hash(word) for word in _WORD.findall(text.lower())], np.uint64)


def _whole(words: NDArray[np.uint64]) -> np.uint64:
    value = np.uint64(len(words))
    with np.errstate(over="ignore"):
        for word in words[: 1 << 10]:
            value = value * _FACTOR + word
    return value


def _runs(
    words: Sequence[NDArray[np.uint64]], lengths: NDArray[np.int64], size: int
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Hash of every run of `size` words, and the number of the text it lies in; no run crosses texts."""
    joined = np.concatenate(words) if len(words) else np.empty(0, np.uint64)
    owner = np.repeat(np.arange(len(words)), lengths)
    count = len(joined) - size + 1
    if count <= 0:
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    value = np.zeros(count, np.uint64)
    for offset in range(size):
        value = value * _FACTOR + joined[offset : offset + count]
    inside = owner[:count] == owner[size - 1 :]
    return value[inside], owner[:count][inside]


def _contains(sorted_values: NDArray[np.uint64], wanted: NDArray[np.uint64]) -> NDArray[np.bool_]:
    if not len(sorted_values):
        return np.zeros(len(wanted), bool)
    place = np.minimum(np.searchsorted(sorted_values, wanted), len(sorted_values) - 1)
    found: NDArray[np.bool_] = sorted_values[place] == wanted
    return found
