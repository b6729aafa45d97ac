"""What the selection must know of each candidate, found column by column: about 46 bytes a row, and its id."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntFlag

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from rapidfuzz.distance import LCSseq

from birbal_ray.mix.allocation import LADDER_MAX_INPUT_WORDS, LADDER_MAX_WORDS
from birbal_ray.mix.config import MixConfig
from birbal_ray.ni.metrics import EXACT_MATCH, count_words, rouge_l, tokens
from birbal_ray.ni.prompt import STOP

_SPACELESS = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Khmer}\p{Lao}\p{Myanmar}]"


class Flags(IntFlag):
    """What is known of a candidate from its text, whatever the policy makes of it (a uint16)."""

    ERROR = 1
    LLM_WRITTEN = 2
    FAMILY = 4
    NGRAM = 8
    TOO_LONG = 16
    SHORT_INPUT = 32
    EMPTY_OUTPUT = 64
    SEVERAL_REFERENCES = 128
    PUBLISHED_TOO_LONG = 256  # birbal_2023: ≥ 800 words together
    PUBLISHED_LONG_INPUT = 512  # birbal_2023, generation: > 1,100 words of input


@dataclass(frozen=True, slots=True)
class Block:
    """Some candidates as columns of equal length; a row's index in the block is its index in each of them."""

    group: NDArray[np.int32]
    flags: NDArray[np.uint16]
    score: NDArray[np.float64]  # NaN where there is none
    row_id: pa.Array
    instruction: pa.Array
    input: pa.Array
    output: pa.Array
    task: pa.Array | None = None  # outside rows only
    # Only for birbal_2023, one a row: label, raw completion, references; None where nothing is to be compared.
    answers: Sequence[tuple[str, str, Sequence[str]] | None] = ()


def extract_features(block: Block, config: MixConfig, ngrams: NgramIndex | None) -> pa.Table:
    """The columns of `Candidates`, and row_id and task (null but for outside rows), rows in the block's order.

    Where near-duplicates are sought, also exact_key (uint64) and signature (4 · NUM_HASHES bytes a row).
    """
    flags = block.flags | _text_flags(block, config)
    if ngrams is not None:
        hits = map(ngrams.overlaps, zip(block.input.to_pylist(), block.output.to_pylist(), strict=True))
        flags[list(hits)] |= np.uint16(Flags.NGRAM)
    published = np.full(len(flags), math.nan)
    for row, answer in enumerate(block.answers):
        if answer is not None:
            published[row] = birbal_2023_score(*answer, config.compat)
    row_hash = row_hashes(_bytes_of(block.row_id), config.seed)
    columns = {
        "group": block.group,
        "row_hash": row_hash,
        "shuffle_hash": shuffle_hashes(row_hash),
        "key": repeat_keys(_bytes_of(block.instruction), _bytes_of(block.input), config.compat),
        "score": block.score,
        "published": published,
        "flags": flags,
        "row_id": block.row_id,
        "task": pa.nulls(len(row_hash), pa.string()) if block.task is None else block.task,
    }
    if config.dedup.near:
        inputs = block.input.to_pylist()
        pairs = zip(block.instruction.to_pylist(), inputs, strict=True)
        columns["exact_key"] = hash_all(f"{one}\x1f{exact_parts(text)}".encode() for one, text in pairs)
        columns["signature"] = pa.array([row.tobytes() for row in signatures(inputs)], pa.binary(4 * NUM_HASHES))
    return pa.table(columns)


def hash_all(texts: Iterable[bytes]) -> NDArray[np.uint64]:
    """The first 64 bits of each text's BLAKE2b; among a million texts two agree by accident once in 4·10^7 runs."""
    digest = hashlib.blake2b
    return np.frombuffer(b"".join([digest(text, digest_size=8).digest() for text in texts]), ">u8").astype(np.uint64)


def row_hashes(row_ids: Iterable[bytes], seed: int) -> NDArray[np.uint64]:
    """The order inside a task: the project's hash order of (seed, row_id), see ni.schema.hash_order."""
    prefix = f"{seed}\x1f".encode()
    return hash_all([prefix + row_id for row_id in row_ids])


def shuffle_hashes(row_hash: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The order of the mix: each row hash mixed (splitmix64's last steps, a bijection).

    By `row_hash` itself, the rows of the most thinned-out tasks would come first.
    """
    value = row_hash + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def repeat_keys(instructions: Iterable[bytes], inputs: Iterable[bytes], compat: bool) -> NDArray[np.uint64]:
    """Equal for rows that repeat each other; `compat` compares inputs alone, as the published scripts do."""
    if compat:
        return hash_all(inputs)
    return hash_all([b"%b\x1f%b" % pair for pair in zip(instructions, inputs, strict=True)])


def num_words(texts: pa.Array, published: bool = False) -> NDArray[np.int64]:
    """Words of each text: parts between single spaces, as the published scripts count them (an empty text has 1).

    Text in a script without spaces is counted by character instead, unless `published`.
    """
    words: NDArray[np.int64] = pc.count_substring(texts, " ").to_numpy(zero_copy_only=False).astype(np.int64) + 1
    if not published and not pc.all(pc.string_is_ascii(texts)).as_py():
        for row in np.flatnonzero(pc.match_substring_regex(texts, _SPACELESS).to_numpy(zero_copy_only=False)):
            words[row] = count_words(texts[int(row)].as_py())
    return words


def birbal_2023_score(label: str, completion: str, references: Sequence[str], compat: bool) -> float:
    """How well the published 2023 selection thinks a row was answered.

    Exact match: 1.0 if the raw answer equals a reference as a string, else 0.0. Generation: ROUGE-L in
    [0, 1] of the lower-cased texts without dots. `compat` also reproduces two defects: an empty answer (or
    reference) counts as perfect, and ROUGE-L is that of the `rouge` package 1.0.1, which counts distinct words only.
    """
    answer = completion.split(STOP, 1)[0]
    if label == EXACT_MATCH:
        return float(answer in references)
    plain = [reference.replace(".", "").lower() for reference in references]
    answer = answer.strip().replace(".", "").lower()
    if not compat:
        return rouge_l(answer, plain)
    # Published: whichever side is empty is replaced by the other, so the pair scores 1 (less 5e-9). That
    # substitution also stays for the row's later references; as the maximum is taken, the score is the same.
    pairs = [(answer or reference or "dummy", reference or answer or "dummy") for reference in plain]
    return max((distinct_word_rouge_l(left, right) for left, right in pairs), default=0.0)


def distinct_word_rouge_l(answer: str, reference: str) -> float:
    """F1 of the `rouge` package 1.0.1 (rouge-l, no dots in the texts): over sets of distinct words."""
    hypothesis, target = " ".join(answer.split()).split(" "), " ".join(reference.split()).split(" ")
    words, others = set(target), set(hypothesis)
    # A word can be in the subsequence twice only if it is twice in both; otherwise its length is the
    # number of distinct words, and the fast library gives it.
    if any(target.count(word) > 1 and hypothesis.count(word) > 1 for word in words & others):
        common = len(set(_subsequence(target, hypothesis)))
    else:
        common = int(LCSseq.similarity(target, hypothesis))
    recall, precision = common / len(words), common / len(others)
    return 2.0 * ((precision * recall) / (precision + recall + 1e-8))


def _subsequence(first: list[str], second: list[str]) -> list[str]:
    # Which of the longest subsequences is taken decides how many distinct words it has, so the way
    # back must turn as the package does: up only where that is strictly longer.
    width = len(second) + 1
    table = [[0] * width]  # (len(first) + 1, len(second) + 1): length of the longest one up to there
    for word in first:
        above, row = table[-1], [0] * width
        for column, other in enumerate(second, 1):
            row[column] = above[column - 1] + 1 if word == other else max(above[column], row[column - 1])
        table.append(row)
    i, j, found = len(first), len(second), []
    while i and j:
        if first[i - 1] == second[j - 1]:
            found.append(first[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found


def _bytes_of(texts: pa.Array) -> list[bytes]:
    values: list[bytes] = texts.cast(pa.binary()).to_pylist()
    return values


def _text_flags(block: Block, config: MixConfig) -> NDArray[np.uint16]:
    input_words = num_words(block.input, config.compat)
    words = num_words(block.instruction, config.compat) + input_words
    conditions: Mapping[Flags, NDArray[np.bool_]] = {
        Flags.TOO_LONG: words >= config.filters.max_words,
        Flags.PUBLISHED_TOO_LONG: words >= LADDER_MAX_WORDS,
        Flags.PUBLISHED_LONG_INPUT: input_words > LADDER_MAX_INPUT_WORDS,
        Flags.SHORT_INPUT: input_words <= config.filters.max_short_input_words,
        Flags.EMPTY_OUTPUT: pc.equal(pc.utf8_trim_whitespace(block.output), "").to_numpy(zero_copy_only=False),
    }
    flags = np.zeros(len(words), np.uint16)
    for flag, condition in conditions.items():
        flags[condition] |= np.uint16(flag)
    return flags


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


SHORTEST_TEXT_WORDS = 5  # a shorter evaluation text would match by accident


@dataclass(frozen=True, slots=True)
class NgramIndex:
    """Hashes of every run of `size` words in the evaluation texts, and of each shorter text.

    Words are the tokens of ni.metrics, of every script.
    """

    size: int
    runs: NDArray[np.uint64]  # sorted, distinct
    num_texts: int

    def overlaps(self, texts: Iterable[str]) -> bool:
        """Whether one of the texts shares a run of words; none crosses texts."""
        for text in texts if len(self.runs) else ():
            found = run_hashes(text, self.size)
            place = np.searchsorted(self.runs, found).clip(max=len(self.runs) - 1)
            if (self.runs[place] == found).any():
                return True
        return False


def build_index(texts: Iterable[str], size: int) -> NgramIndex:
    """The index of evaluation texts; those under SHORTEST_TEXT_WORDS words are left out."""
    runs = [run_hashes(text, size) for text in texts if len(tokens(text)) >= SHORTEST_TEXT_WORDS]
    return NgramIndex(size, np.unique(np.concatenate([np.empty(0, np.uint64), *runs])), len(runs))


def run_hashes(text: str, size: int) -> NDArray[np.uint64]:
    """Hash of every run of `size` words of a text, or of all its words where they are fewer."""
    words = tokens(text)
    spans = (words[start : start + size] for start in range(max(1, len(words) - size + 1)))
    return hash_all([" ".join(span).encode("utf-8", "surrogatepass") for span in spans])


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
