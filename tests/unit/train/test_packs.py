"""From a mix's rows to packs, with a tokenizer of one token a character."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from birbal_ray.settings import ConfigError
from birbal_ray.storage import RunError
from birbal_ray.train import data
from birbal_ray.train.config import TrainConfig
from birbal_ray.train.data import IGNORED, load_packs, prepare


class Characters:
    """What `encode` asks of a tokenizer."""

    bos_token_id, eos_token_id, name_or_path = 1, 2, "characters"

    def __call__(self, texts, **options):
        return {"input_ids": [[ord(character) for character in text] for text in texts]}


def of_length(length, policy="drop"):
    """Settings of short sequences; below what `TrainConfig` allows."""
    return TrainConfig(epochs=1).replace({"batch.sequence_length": length, "batch.long_samples": policy})


@pytest.fixture
def mix(tmp_path):
    """Seven rows of 5 to 11 tokens with BOS and EOS; two of them over 9."""
    lengths = [3, 4, 5, 6, 7, 8, 9]
    rows = {"question": ["q" * (length - 2) for length in lengths], "answer": ["aa"] * len(lengths)}
    for split in ("train", "eval"):
        pq.write_table(pa.table(rows), tmp_path / f"{split}.parquet")
    return tmp_path


@pytest.mark.parametrize("batch_rows", [2, 1000])
@pytest.mark.parametrize(("policy", "num_samples"), [("drop", 5), ("truncate", 7)])
def test_rows_become_samples_whatever_their_batches(mix, tmp_path, monkeypatch, batch_rows, policy, num_samples):
    monkeypatch.setattr(data, "BATCH_ROWS", batch_rows)
    said, config = [], of_length(9, policy)
    found = prepare(mix, tmp_path / "packed", Characters(), config, said.append)
    train = found["train"]
    assert (train.num_rows, train.num_long, train.num_samples) == (7, 2, num_samples)
    assert "tokenised 7 of 7 train rows" in said
    packs = list(load_packs(tmp_path / "packed", "train"))
    samples = []
    for pack in packs:
        assert len(pack["input_ids"]) == len(pack["labels"]) == sum(pack["seq_lengths"]) <= 9
        start = 0
        for length in pack["seq_lengths"]:
            samples.append((pack["input_ids"][start : start + length], pack["labels"][start : start + length]))
            start += length
    assert sorted(len(ids) for ids, _ in samples) == [5, 6, 7, 8, 9, 9, 9][:num_samples]

    for ids, labels in samples:
        question = 1 + ids[1:].count(ord("q"))
        assert ids[0] == 1 and labels[:question] == [IGNORED] * question and labels[question:] == ids[question:]
    assert train.num_tokens == sum(len(ids) for ids, _ in samples)
    assert train.num_loss_tokens == sum(label != IGNORED for _, labels in samples for label in labels)
    assert prepare(mix, tmp_path / "packed", None, config) == found, "used again"
    (tmp_path / "packed" / "packs.json").write_text("{")
    with pytest.raises(RunError, match=r"/packs\.json: not valid JSON"):
        prepare(mix, tmp_path / "packed", None, config)


@pytest.mark.parametrize("batch_rows", [1, 3, 1000])
def test_a_small_eval_split_takes_the_first_rows_that_fit(mix, tmp_path, monkeypatch, batch_rows):
    monkeypatch.setattr(data, "BATCH_ROWS", batch_rows)
    table = pq.read_table(mix / "eval.parquet")
    pq.write_table(table.take([6, 5, 0, 1, 2]), mix / "validation.parquet")  # the first two are too long
    options = {"num_eval_rows": 2, "eval_split": "validation"}
    found = prepare(mix, tmp_path / "packed", Characters(), of_length(9), **options)
    assert (found["eval"].num_samples, found["eval"].num_long, found["train"].num_samples) == (2, 2, 5)
    assert sum(sum(pack["seq_lengths"]) for pack in load_packs(tmp_path / "packed", "eval")) == 5 + 6


@pytest.mark.parametrize(
    ("num_packs", "micro", "accumulation", "steps"), [(16, 2, 4, 2), (17, 2, 4, 3), (20, 1, 8, 3), (1, 2, 4, 1)]
)
def test_an_epochs_steps_are_those_of_the_trainer(num_packs, micro, accumulation, steps):
    batch = TrainConfig(batch={"micro": micro, "accumulation": accumulation}).batch
    assert data.count_steps(num_packs, batch) == steps


def test_rows_that_all_are_too_long_name_the_length_to_set(mix, tmp_path):
    with pytest.raises(ConfigError, match=r"no train row fits \(the shortest has 5 tokens\); set it to 5 or more"):
        prepare(mix, tmp_path / "packed", Characters(), of_length(4))
