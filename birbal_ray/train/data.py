"""Training sequences: token ids, where their loss starts, and packs of samples that fill one sequence length.

Index spaces: a *sample* is a kept row of the split, numbered in the mix's order; a *pack* is a list of sample numbers;
a *layout* is one epoch's list of packs and holds every sample once.
"""

from __future__ import annotations

import bisect
import hashlib
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from birbal_ray.models import read_template
from birbal_ray.ni.prompt import ChatTemplate, render_prompt
from birbal_ray.settings import ConfigError
from birbal_ray.storage import Folder, open_folder, read_json, write_json
from birbal_ray.train.config import BatchSettings, TrainConfig

FIGURES_FILE = "packs.json"
IGNORED = -100  # the label of a token without loss
BATCH_ROWS = 1000  # rows tokenised together
MAX_LAYOUTS = 8  # epochs with packs of their own; later epochs use these again

SAMPLES = pa.schema(
    [
        pa.field("input_ids", pa.large_list(pa.int32()), nullable=False),
        pa.field("loss_start", pa.int32(), nullable=False),  # tokens before this position have no loss
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
    num_packs: int  # in each epoch
    packing_efficiency_fraction: float  # tokens / (packs x sequence length)


class PackedSamples:
    """A split's packs of one epoch at a time, as TRL takes them: `input_ids`, `labels`, `seq_lengths` of each pack."""

    def __init__(self, samples: pa.Table, layouts: Sequence[Sequence[Sequence[int]]]) -> None:
        self._ids = samples["input_ids"].combine_chunks()
        self._loss_starts = samples["loss_start"].to_numpy()
        self._layouts, self._epoch = layouts, 0

    def set_epoch(self, epoch: int) -> None:
        """Take the packs of that epoch, counted from 0."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._layouts[0])

    def __getitem__(self, pack: int) -> dict[str, list[int]]:
        if not 0 <= pack < len(self):
            raise IndexError(pack)
        found: dict[str, list[int]] = {"input_ids": [], "labels": [], "seq_lengths": []}
        for sample in self._layouts[self._epoch % len(self._layouts)][pack]:
            ids, start = self._ids[sample].as_py(), self._loss_starts[sample]
            found["input_ids"] += ids
            found["labels"] += [IGNORED] * start + ids[start:]
            found["seq_lengths"].append(len(ids))
        return found

    def prompts(self, count: int, max_tokens: int) -> list[list[int]]:
        """Token ids before the loss of the first samples: 1 to `count` prompts, at most `max_tokens` together."""
        found: list[list[int]] = []
        for sample, start in enumerate(self._loss_starts.tolist()):
            if len(found) == count:
                break
            if start and start + sum(map(len, found)) <= max_tokens:
                found.append(self._ids[sample].as_py()[:start])
        return found or [self._ids[0].as_py()[:1]]

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        return (self[pack] for pack in range(len(self)))


def encode(tokenizer: Any, questions: Sequence[str], answers: Sequence[str]) -> Iterator[tuple[list[int], int]]:
    """(token ids, where the loss starts) of BOS + question + answer + EOS; the loss is on answer and EOS.

    The text is tokenised in one piece, as it will be continued at inference; a token that holds the
    end of a question and the beginning of its answer counts as answer. Text that spells a special token stays text.
    A tokenizer without BOS gets none. Raises ConfigError for a tokenizer without EOS.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"model {tokenizer.name_or_path}: its tokenizer has no EOS token, so no answer would have an end; "
            "name one as eos_token in its tokenizer_config.json"
        )
    plain = {"add_special_tokens": False, "split_special_tokens": True}
    heads = tokenizer(list(questions), **plain)["input_ids"]
    texts = [question + answer for question, answer in zip(questions, answers, strict=True)]
    full_texts = tokenizer(texts, **plain)["input_ids"]
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    for head, full in zip(heads, full_texts, strict=True):
        shared = next(
            (i for i, (a, b) in enumerate(zip(head, full, strict=False)) if a != b), min(len(head), len(full))
        )
        yield [*begin, *full, tokenizer.eos_token_id], len(begin) + shared


def encode_rows(
    tokenizer: Any, rows: Mapping[str, Sequence[str]], chat: ChatTemplate | None
) -> Iterator[tuple[list[int], int]]:
    """(token ids, where the loss starts) of rows with the columns `text_columns`.

    Without a chat template see `encode`. With one: the prompt as at inference, the answer, the template's end of turn;
    the loss is on answer and end of turn. An answer that spells a special token stays text.
    """
    if chat is None:
        yield from encode(tokenizer, rows["question"], rows["answer"])
        return
    asked = zip(rows["instruction"], rows["input"], strict=True)
    prompts = [render_prompt(instruction, (), text, chat) for instruction, text in asked]
    heads = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    answers = tokenizer(list(rows["output"]), add_special_tokens=False, split_special_tokens=True)["input_ids"]
    (end,) = tokenizer([chat.end_of_turn], add_special_tokens=False)["input_ids"]
    for head, answer in zip(heads, answers, strict=True):
        yield [*head, *answer, *end], len(head)


def text_columns(*, chat: bool) -> list[str]:
    """The columns of a mix that training texts are made of."""
    return ["instruction", "input", "output"] if chat else ["question", "answer"]


def prepare(
    mix: Folder | Path,
    folder: Path,
    tokenizer: Any,
    config: TrainConfig,
    progress: Callable[[str], None] = lambda text: None,
    *,
    num_eval_rows: int | None = None,
    eval_split: str = "eval",
) -> dict[str, Packing]:
    """Tokenised samples and packs of a mix's `train` and `eval` in `folder`; figures by split. See `load_packs`.

    `eval` is made of the first rows of the mix's `eval_split`, as many as the settings say; with `num_eval_rows`, of
    the first so many that fit. Files of an earlier session are used again. Raises ConfigError when nothing fits the
    sequence length, no token has a loss, or a split is empty; ModelError for a tokenizer without the chat template that
    the settings ask for.
    """
    figures_file = folder / FIGURES_FILE
    if figures_file.exists():
        return {split: Packing(**one) for split, one in read_json(figures_file).items()}
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    figures = {}
    chat = read_template(tokenizer, config.prompt.format, config.prompt.chat_template_arguments)
    splits = {
        "train": (None, None, min(math.ceil(config.epochs), MAX_LAYOUTS)),
        "eval": (None if num_eval_rows else config.evaluation.num_rows, num_eval_rows, 1),
    }
    for split, (limit, most, num_layouts) in splits.items():
        source = open_folder(mix)
        name = f"{eval_split if split == 'eval' else split}.parquet"
        file, table = source.at(name), source.read_table(name, columns=text_columns(chat=chat is not None))
        if table.num_rows == 0:
            hint = "; make the mix with eval_fraction above 0, the best adapter is chosen by its loss there"
            raise ConfigError(f"{file}: no rows{hint * (split == 'eval')}")
        table = table.slice(0, limit) if limit else table
        samples, num_long = _tokenise(split, table, tokenizer, config.batch, progress, chat, most)
        lengths = np.diff(samples["input_ids"].combine_chunks().offsets.to_numpy())
        layouts = make_layouts(lengths.tolist(), config.batch.sequence_length, config.seed, num_layouts)
        _write(folder / f"{split}.arrow", samples)
        packs = [{"epoch": epoch, "samples": pack} for epoch, layout in enumerate(layouts) for pack in layout]
        types = {"epoch": pa.int32(), "samples": pa.list_(pa.int32())}
        _write(folder / f"{split}_packs.arrow", pa.Table.from_pylist(packs, schema=pa.schema(types)))
        num_tokens = int(lengths.sum())
        figures[split] = Packing(
            num_rows=table.num_rows,
            num_long=num_long,
            num_samples=len(lengths),
            num_tokens=num_tokens,
            num_loss_tokens=num_tokens - int(samples["loss_start"].to_numpy().sum()),
            num_packs=len(layouts[0]),
            packing_efficiency_fraction=num_tokens / (len(layouts[0]) * config.batch.sequence_length),
        )
        if figures[split].num_loss_tokens == 0:
            raise ConfigError(f"{file}: no token of any answer is left to train on; its answers are empty or cut off")
    write_json(figures_file, {split: asdict(one) for split, one in figures.items()})
    return figures


def count_steps(num_packs: int, batch: BatchSettings) -> int:
    """Optimizer steps in an epoch; the last one may see fewer packs than the others."""
    return math.ceil(math.ceil(num_packs / batch.micro) / batch.accumulation)


def load_packs(folder: Path, split: str) -> PackedSamples:
    """The packs that `prepare` wrote for `train` or `eval`; samples stay on disk until a pack is asked for."""
    layouts: list[list[list[int]]] = []
    for row in _read(folder / f"{split}_packs.arrow").to_pylist():
        if row["epoch"] == len(layouts):
            layouts.append([])
        layouts[-1].append(row["samples"])
    return PackedSamples(_read(folder / f"{split}.arrow"), layouts)


def make_layouts(lengths: Sequence[int], capacity: int, seed: int, num_layouts: int) -> list[list[list[int]]]:
    """One layout for each epoch: packs of at most `capacity` tokens, the same number of packs in each.

    The samples of an epoch come in the order of a hash of (seed, epoch, sample number).
    """
    layouts = []
    for epoch in range(num_layouts):
        key = {n: hashlib.blake2b(f"{seed}/{epoch}/{n}".encode(), digest_size=8).digest() for n in range(len(lengths))}
        layouts.append(pack_in_order(sorted(key, key=key.__getitem__), lengths, capacity))
    num_packs = max(map(len, layouts))
    for layout in layouts:
        while len(layout) < num_packs:  # an epoch that packs tighter: its fullest packs are halved
            longest = max(range(len(layout)), key=lambda pack: len(layout[pack]))
            half = len(layout[longest]) // 2
            layout.append(layout[longest][half:])
            del layout[longest][half:]
    return layouts


def pack_in_order(order: Iterable[int], lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best fit: each sample goes into the fullest pack that has room for it, else into a new one.

    Samples are not sorted by length, so that lengths inside a pack vary as they do in the mix.
    """
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, pack), ascending
    shortest = min(lengths)
    for sample in order:
        at = bisect.bisect_left(room, (lengths[sample], -1))
        if at < len(room):
            left, pack = room.pop(at)
        else:
            left, pack = capacity, len(packs)
            packs.append([])
        packs[pack].append(sample)
        if left - lengths[sample] >= shortest:
            bisect.insort(room, (left - lengths[sample], pack))
    return packs


def _tokenise(
    split: str,
    table: pa.Table,
    tokenizer: Any,
    batch: BatchSettings,
    progress: Callable[[str], None],
    chat: ChatTemplate | None,
    most: int | None,
) -> tuple[pa.Table, int]:
    """(samples that fit, number of rows over the sequence length); it ends at the first `most` that fit."""
    samples: list[pa.Table] = []  # of each batch: as Python's numbers all rows would take several times the memory
    num_done, num_long, shortest = 0, 0, None
    length = batch.sequence_length
    for rows in table.to_batches(max_chunksize=BATCH_ROWS):
        fitting = []
        for ids, start in encode_rows(tokenizer, rows.to_pydict(), chat):
            shortest = min(len(ids), shortest or len(ids))
            if len(ids) > length:
                num_long += 1
                if batch.long_samples == "drop" or start >= length:
                    continue
            fitting.append({"input_ids": ids[:length], "loss_start": start})
        samples.append(pa.Table.from_pylist(fitting, schema=SAMPLES))
        if most and sum(map(len, samples)) >= most:
            return pa.concat_tables(samples).slice(0, most).combine_chunks(), num_long
        num_done += rows.num_rows
        progress(f"tokenised {num_done:,} of {table.num_rows:,} {split} rows")
    if not any(map(len, samples)):
        raise ConfigError(
            f"batch.sequence_length is {length}: no {split} row fits (the shortest has {shortest} tokens); "
            f"set it to {shortest} or more, or batch.long_samples=truncate"
        )
    return pa.concat_tables(samples).combine_chunks(), num_long


def _write(file: Path, table: pa.Table) -> None:
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def _read(file: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(file))).read_all()
