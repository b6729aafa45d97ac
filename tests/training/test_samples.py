import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from birbal_ray.models import read_template
from birbal_ray.settings import ConfigError
from birbal_ray.train.config import TrainConfig
from birbal_ray.train.data import IGNORED, encode, encode_rows, load_packs, make_layouts, prepare
from tests.fixtures.chat_templates import SPECIAL_END

QUESTION = "### Input:\nhe said\n\n### Response:\n"


def of_length(length, policy="drop", **changes):
    batch = {"sequence_length": length, "long_samples": policy}
    return TrainConfig(**{"epochs": 1, "evaluation": {"num_rows": 8}, "batch": batch, **changes})


def labelled(encoded):
    """(token ids, labels) as training sees them."""
    return ((ids, [IGNORED] * start + ids[start:]) for ids, start in encoded)


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


def test_sequence_is_bos_question_answer_eos_and_loss_is_on_answer_and_eos(tokenizer):
    ((ids, labels),) = labelled(encode(tokenizer, [QUESTION], ["he did"]))
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[1:-1]) == QUESTION + "he did"
    answer = tokenizer("he did", add_special_tokens=False)["input_ids"]
    assert [label for label in labels if label != IGNORED] == [*answer, tokenizer.eos_token_id]
    assert labels[: -len(answer) - 1] == [IGNORED] * (len(ids) - len(answer) - 1)


def test_the_mask_token_by_token(tokenizer):
    ((ids, labels),) = labelled(encode(tokenizer, ["a\n"], ["he"]))
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "a", "Ċ", "he", "</s>"]
    assert (ids[0], ids[-1]) == (0, 1)
    assert [label != IGNORED for label in labels] == [False, False, False, True, True]


def test_a_token_across_the_border_counts_as_answer(tokenizer):
    ((ids, labels),) = labelled(encode(tokenizer, ["a\n"], ["\nb"]))
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert tokens == ["<s>", "a", "ĊĊ", "b", "</s>"]
    assert [label != IGNORED for label in labels] == [False, False, True, True, True]


def test_packs_hold_every_sample_once_and_fit(tokenizer, tiny_mix, tmp_path):
    figures = prepare(tiny_mix, tmp_path / "packed", tokenizer, of_length(128))
    rows = pq.read_table(tiny_mix / "train.parquet").to_pylist()
    wanted = sorted(ids for ids, _ in encode(tokenizer, [r["question"] for r in rows], [r["answer"] for r in rows]))
    packs = load_packs(tmp_path / "packed", "train")
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
    rows = pq.read_table(tiny_mix / "train.parquet").to_pylist()
    encoded = list(labelled(encode(tokenizer, [r["question"] for r in rows], [r["answer"] for r in rows])))
    figures = prepare(tiny_mix, tmp_path / "packed", tokenizer, of_length(60, policy))["train"]
    long = [ids for ids, _ in encoded if len(ids) > 60]
    answerless = [labels for _, labels in encoded if len(labels) > 60 and all(x == IGNORED for x in labels[:60])]
    assert figures.num_long == len(long) > 0
    kept = 60 - len(long) if policy == "drop" else 60 - len(answerless)
    assert figures.num_samples == kept
    lengths = [n for pack in load_packs(tmp_path / "packed", "train") for n in pack["seq_lengths"]]
    assert max(lengths) <= 60
    assert len(lengths) == kept


def test_nothing_that_fits_is_an_error_with_the_length_to_set(tokenizer, tiny_mix, tmp_path):
    with pytest.raises(
        ConfigError, match=r"batch.sequence_length is 16: no train row fits \(the shortest has \d+ tokens\)"
    ):
        prepare(tiny_mix, tmp_path / "packed", tokenizer, of_length(16))


def test_text_that_spells_a_special_token_stays_text(tokenizer):
    ((ids, labels),) = labelled(encode(tokenizer, ["say </s>\n"], ["<s>no</s> end"]))
    assert ids.count(tokenizer.eos_token_id) == ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(ids[1:-1]) == "say </s>\n<s>no</s> end"
    assert labels[-1] == tokenizer.eos_token_id


def test_a_tokenizer_without_eos_is_refused_by_name(tiny_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match=rf"{tiny_model}: its tokenizer has no EOS token"):
        next(encode(tokenizer, ["a"], ["b"]))


def test_answers_that_are_cut_off_leave_nothing_to_train_on(tokenizer, tiny_mix, tmp_path):
    with pytest.raises(ConfigError, match="no train row fits"):
        prepare(tiny_mix, tmp_path / "packed", tokenizer, of_length(17, "truncate"))


@pytest.mark.parametrize("num_rows", [1, 2])
def test_a_mix_of_one_or_two_rows_is_packed(tokenizer, tmp_path, num_rows):
    from tests.conftest import make_mix

    (tmp_path / "mix").mkdir()
    make_mix(tmp_path / "mix", num_rows, 1)
    figures = prepare(tmp_path / "mix", tmp_path / "packed", tokenizer, of_length(512, epochs=3))
    assert (figures["train"].num_samples, figures["train"].num_packs) == (num_rows, 1)
    packs = load_packs(tmp_path / "packed", "train")
    for epoch in range(3):
        packs.set_epoch(epoch)
        assert [len(pack["seq_lengths"]) for pack in packs] == [num_rows]


def test_packs_are_drawn_from_the_shuffled_order():
    """Packs of 8,192 are full, hold lengths as varied as the mix's, and differ from epoch to epoch."""
    import numpy as np

    lengths = np.clip(np.random.default_rng(0).lognormal(5.8, 0.64, 6000), 20, 8192).astype(int).tolist()
    first, second = make_layouts(lengths, 8192, seed=1, num_layouts=2)
    assert len(first) == len(second)
    assert sum(lengths) / (len(first) * 8192) >= 0.97
    for layout in (first, second):
        assert sorted(sample for pack in layout for sample in pack) == list(range(6000))
        assert all(sum(lengths[sample] for sample in pack) <= 8192 for pack in layout)
    assert {tuple(sorted(pack)) for pack in first}.isdisjoint(tuple(sorted(pack)) for pack in second)
    assert make_layouts(lengths, 8192, seed=1, num_layouts=1)[0] == first[: len(first)]
    inside = np.mean([np.std(np.log([lengths[sample] for sample in pack])) for pack in first if len(pack) > 4])
    assert inside > 0.85 * np.std(np.log(lengths))


def test_every_layout_has_the_same_number_of_packs():
    layouts = make_layouts([30, 60, 40, 50, 70, 20, 80, 10, 90, 35], 100, seed=0, num_layouts=8)
    assert len({len(layout) for layout in layouts}) == 1
    assert all(sorted(n for pack in layout for n in pack) == list(range(10)) and all(layout) for layout in layouts)


def test_samples_by_a_chat_template(tokenizer, tmp_path):
    """The mix's texts in the template's turns; one path from the tokenizer on disk to the packs."""
    tokenizer.chat_template = SPECIAL_END
    chat = read_template(tokenizer, "chat", {})
    rows = {
        "instruction": ["Count.", "", "Count."],
        "input": ["one", "two", "three"],
        "output": ["he did", "first\n\nsecond", "</s> is text"],
    }
    for split in ("train", "eval"):
        pq.write_table(pa.table(rows), tmp_path / f"{split}.parquet")
    figures = prepare(tmp_path, tmp_path / "packed", tokenizer, of_length(512, prompt={"format": "chat"}))
    (pack,) = load_packs(tmp_path / "packed", "train")
    encoded = list(labelled(encode_rows(tokenizer, rows, chat)))
    assert sorted(pack["input_ids"]) == sorted(token for ids, _ in encoded for token in ids)
    assert figures["train"].num_loss_tokens == sum(label != IGNORED for _, labels in encoded for label in labels)
    ids, labels = encoded[0]
    assert tokenizer.decode(ids) == "<s>[INST] Count.\n---\none [/INST]he did</s>"
    assert ids.count(tokenizer.bos_token_id) == 1
    answer = tokenizer("he did", add_special_tokens=False)["input_ids"]
    assert [label for label in labels if label != IGNORED] == [*answer, tokenizer.eos_token_id]
