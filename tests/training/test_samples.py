import pyarrow.parquet as pq
import pytest

from birbal_ray.settings import ConfigError
from birbal_ray.train.data import IGNORED, encode, prepare, preview

QUESTION = "### Input:\nhe said\n\n### Response:\n"


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


def test_sequence_is_bos_question_answer_eos_and_loss_is_on_answer_and_eos(tokenizer):
    ((ids, labels),) = encode(tokenizer, [QUESTION], ["he did"])
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[1:-1]) == QUESTION + "he did"
    answer = tokenizer("he did", add_special_tokens=False)["input_ids"]
    assert [label for label in labels if label != IGNORED] == [*answer, tokenizer.eos_token_id]
    assert labels[: -len(answer) - 1] == [IGNORED] * (len(ids) - len(answer) - 1)


def test_preview_shows_the_mask_token_by_token(tokenizer):
    ((ids, labels),) = encode(tokenizer, ["a\n"], ["he"])
    assert preview(tokenizer, ids, labels) == [
        {"token_id": 0, "text": "<s>", "loss": False},
        {"token_id": tokenizer.convert_tokens_to_ids("a"), "text": "a", "loss": False},
        {"token_id": tokenizer.convert_tokens_to_ids("Ċ"), "text": "\n", "loss": False},
        {"token_id": tokenizer.convert_tokens_to_ids("he"), "text": "he", "loss": True},
        {"token_id": 1, "text": "</s>", "loss": True},
    ]


def test_a_token_across_the_border_counts_as_answer(tokenizer):
    ((ids, labels),) = encode(tokenizer, ["a\n"], ["\nb"])
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert tokens == ["<s>", "a", "ĊĊ", "b", "</s>"]
    assert [label != IGNORED for label in labels] == [False, False, True, True, True]


def test_packs_hold_every_sample_once_and_fit(tokenizer, tiny_mix, tmp_path):
    from datasets import load_from_disk

    figures = prepare(tiny_mix, tmp_path / "packed", tokenizer, 128, "drop", 8)
    rows = pq.read_table(tiny_mix / "train.parquet").to_pylist()
    wanted = sorted(ids for ids, _ in encode(tokenizer, [r["question"] for r in rows], [r["answer"] for r in rows]))
    packs = load_from_disk(str(tmp_path / "packed" / "train"))
    found = []
    for pack in packs:
        assert len(pack["input_ids"]) == len(pack["labels"]) == sum(pack["seq_lengths"]) <= 128
        start = 0
        for length in pack["seq_lengths"]:
            found.append(pack["input_ids"][start : start + length])
            start += length
    assert sorted(found) == wanted
    train = figures["train"]
    assert (train.num_rows, train.num_samples, train.num_long) == (60, 60, 0)
    assert train.num_tokens == sum(map(len, wanted))
    assert train.packing_efficiency_fraction == train.num_tokens / (len(packs) * 128)
    assert train.packing_efficiency_fraction > 0.8
    assert len(packs) < 60


@pytest.mark.parametrize("policy", ["drop", "truncate"])
def test_long_samples_are_counted_and_handled_as_asked(tokenizer, tiny_mix, tmp_path, policy):
    from datasets import load_from_disk

    rows = pq.read_table(tiny_mix / "train.parquet").to_pylist()
    encoded = list(encode(tokenizer, [r["question"] for r in rows], [r["answer"] for r in rows]))
    figures = prepare(tiny_mix, tmp_path / "packed", tokenizer, 60, policy, 8)["train"]
    long = [ids for ids, _ in encoded if len(ids) > 60]
    answerless = [labels for _, labels in encoded if len(labels) > 60 and all(x == IGNORED for x in labels[:60])]
    assert figures.num_long == len(long) > 0
    kept = 60 - len(long) if policy == "drop" else 60 - len(answerless)
    assert figures.num_samples == kept
    lengths = [n for pack in load_from_disk(str(tmp_path / "packed" / "train")) for n in pack["seq_lengths"]]
    assert max(lengths) <= 60
    assert len(lengths) == kept


def test_nothing_that_fits_is_an_error_with_the_length_to_set(tokenizer, tiny_mix, tmp_path):
    with pytest.raises(
        ConfigError, match=r"batch.sequence_length is 16: no train row fits \(the shortest has \d+ tokens\)"
    ):
        prepare(tiny_mix, tmp_path / "packed", tokenizer, 16, "drop", 8)
