"""Training sequences: token ids, labels, packs of several samples that fit one sequence length."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from birbal_ray.run import write_json
from birbal_ray.settings import ConfigError

PACKED_FOLDER = "packed"
FIGURES_FILE = "packing.json"
IGNORED = -100  # the label of a token without loss
BATCH_ROWS = 1000  # rows tokenised together

# One sample, or several in a row (`seq_lengths` says where each ends).
SEQUENCES = pa.schema(
    [
        pa.field("input_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("labels", pa.list_(pa.int32()), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True)
class Packing:
    """What became of a split's rows. Tokens are those of kept samples."""

    num_rows: int
    num_long: int  # over the sequence length: dropped, or cut under long_samples: truncate
    num_samples: int  # kept
    num_tokens: int
    num_loss_tokens: int  # answers and their EOS
    num_packs: int
    packing_efficiency_fraction: float  # tokens / (packs x sequence length)


def encode(tokenizer: Any, questions: Sequence[str], answers: Sequence[str]) -> Iterator[tuple[list[int], list[int]]]:
    """(token ids, labels) of BOS + question + answer + EOS; labels are IGNORED but on answer and EOS.

    The text is tokenised in one piece, as it will be continued at inference; a token that holds the
    end of a question and the begin of its answer counts as answer. A tokenizer without BOS (or EOS)
    gets none.
    """
    heads = tokenizer(list(questions), add_special_tokens=False)["input_ids"]
    texts = [question + answer for question, answer in zip(questions, answers, strict=True)]
    wholes = tokenizer(texts, add_special_tokens=False)["input_ids"]
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for head, whole in zip(heads, wholes, strict=True):
        shared = next(
            (i for i, (a, b) in enumerate(zip(head, whole, strict=False)) if a != b), min(len(head), len(whole))
        )
        ids = [*begin, *whole, *end]
        start = len(begin) + shared
        yield ids, [IGNORED] * start + ids[start:]


def prepare(
    mix: Path,
    folder: Path,
    tokenizer: Any,
    sequence_length: int,
    long_samples: str,
    num_eval_rows: int,
    progress: Callable[[str], None] = lambda text: None,
    eval_split: str = "eval",
) -> dict[str, Packing]:
    """Packed `train` and `eval` of a mix in `folder` (datasets' Arrow layout); figures by split.

    `eval` is made of the mix's `eval_split`. What stands there from an earlier session is used again.
    Raises ConfigError when nothing fits the sequence length or a split is empty.
    """
    figures_file = folder / FIGURES_FILE
    if figures_file.exists():
        return {split: Packing(**one) for split, one in json.loads(figures_file.read_text()).items()}
    shutil.rmtree(folder, ignore_errors=True)
    figures = {}
    for split, limit in (("train", None), ("eval", num_eval_rows)):
        file = mix / f"{eval_split if split == 'eval' else split}.parquet"
        table = pq.read_table(file, columns=["question", "answer"])
        if table.num_rows == 0:
            raise ConfigError(f"{file}: no rows" + _EMPTY_EVAL * (split == "eval"))
        table = table.slice(0, limit) if limit else table
        figures[split] = _pack_split(split, table, folder, tokenizer, sequence_length, long_samples, progress)
    write_json(figures_file, {split: asdict(one) for split, one in figures.items()})
    return figures


_EMPTY_EVAL = "; make the mix with eval_fraction above 0, the best adapter is chosen by its loss there"


def _pack_split(
    split: str,
    table: pa.Table,
    folder: Path,
    tokenizer: Any,
    sequence_length: int,
    long_samples: str,
    progress: Callable[[str], None],
) -> Packing:
    from datasets import Dataset, disable_progress_bars
    from trl import pack_dataset

    disable_progress_bars()

    ids: list[list[int]] = []
    labels: list[list[int]] = []
    num_long, shortest = 0, None
    for batch in table.to_batches(max_chunksize=BATCH_ROWS):
        rows = batch.to_pydict()
        for one_ids, one_labels in encode(tokenizer, rows["question"], rows["answer"]):
            shortest = min(len(one_ids), shortest or len(one_ids))
            if len(one_ids) > sequence_length:
                num_long += 1
                one_ids, one_labels = one_ids[:sequence_length], one_labels[:sequence_length]
                if long_samples == "drop" or all(label == IGNORED for label in one_labels):
                    continue
            ids.append(one_ids)
            labels.append(one_labels)
        progress(f"tokenised {len(ids) + num_long:,} of {table.num_rows:,} {split} rows")
    if not ids:
        raise ConfigError(
            f"batch.sequence_length is {sequence_length}: no {split} row fits (the shortest has {shortest} tokens); "
            f"set it to {shortest} or more, or batch.long_samples=truncate"
        )
    samples = Dataset(pa.table({"input_ids": ids, "labels": labels}, schema=SEQUENCES))
    packs = pack_dataset(samples, sequence_length, "bfd", {"load_from_cache_file": False, "keep_in_memory": True})
    packs.save_to_disk(str(folder / split))
    num_tokens = sum(map(len, ids))
    return Packing(
        num_rows=table.num_rows,
        num_long=num_long,
        num_samples=len(ids),
        num_tokens=num_tokens,
        num_loss_tokens=sum(label != IGNORED for one in labels for label in one),
        num_packs=len(packs),
        packing_efficiency_fraction=num_tokens / (len(packs) * sequence_length),
    )


def preview(tokenizer: Any, input_ids: Sequence[int], labels: Sequence[int]) -> list[dict[str, Any]]:
    """One row per token: its id, its text, whether it has loss; for eyes and tests."""
    return [
        {"token_id": token, "text": tokenizer.decode([token]), "loss": label != IGNORED}
        for token, label in zip(input_ids, labels, strict=True)
    ]
