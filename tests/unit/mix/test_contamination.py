"""Overlap with evaluation texts, task families, near-duplicates."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from birbal_ray.mix import features
from birbal_ray.mix.config import FAMILIES, ContaminationSettings
from birbal_ray.mix.features import build_index, families_of
from birbal_ray.mix.sources import read_texts
from birbal_ray.settings import ConfigError
from tests.conftest import examples

EVALUATION = "The quick brown fox jumps over the lazy dog while seven grey geese watch from the frozen lake at noon."


def index_of(file, size=13):
    return build_index(read_texts([file], "contamination.files"), size)


@pytest.fixture
def index(tmp_path):
    (tmp_path / "a.txt").write_text(f"{EVALUATION}\n\nwho keeps the old lighthouse lamp\ntoo short\n")
    return index_of(tmp_path / "a.txt")


def hits(index, *texts):
    return [index.overlaps([text]) for text in texts]


def test_thirteen_words_in_a_row(index):
    words = EVALUATION.split()
    assert index.num_texts == 2
    thirteen, twelve = " ".join(words[2:15]), " ".join(words[2:14])
    assert hits(index, "Before it all: " + thirteen, "Before it all: " + twelve) == [True, False]


def test_case_and_punctuation_do_not_hide_it(index):
    assert hits(index, EVALUATION.upper().replace(" ", " - ")) == [True]


def test_a_run_does_not_cross_texts(index):
    words = EVALUATION.split()
    left, right = " ".join(words[:8]), " ".join(words[8:16])
    assert not index.overlaps([left, right])
    assert index.overlaps(["unrelated", EVALUATION]) and not index.overlaps(["unrelated"])


def test_short_evaluation_texts_match_as_a_whole(index):
    assert hits(index, "Who keeps the old lighthouse lamp?", "Who keeps the old lighthouse lamp now?", "too short") == [
        True,
        False,
        False,
    ]


def test_every_file_kind_gives_the_same_index(tmp_path):
    (tmp_path / "a.txt").write_text(EVALUATION + "\n")
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": {"stem": EVALUATION}, "n": [1, None]}) + "\n\n")
    pq.write_table(pa.table({"text": [EVALUATION], "n": [1]}), tmp_path / "a.parquet")
    runs = [index_of(tmp_path / f"a.{kind}").runs.tolist() for kind in ("txt", "jsonl", "parquet")]
    assert runs[0] == runs[1] == runs[2] and len(runs[0]) == len(EVALUATION.split()) - 12


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.txt", None, "no such file"),
        ("a.csv", "x", "expected .txt, .json, .jsonl, .parquet"),
        ("a.jsonl", "{broken", "line 1: not JSON"),
        ("a.parquet", "broken", "not a Parquet file"),
    ],
)
def test_bad_evaluation_files(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        index_of(tmp_path / name)


words = st.lists(st.sampled_from(["a", "b", "c"]), max_size=12)


@examples(200)
@given(words, st.lists(words, max_size=6), st.integers(3, 5))
def test_equals_a_plain_search(evaluation, rows, size):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.txt"
        file.write_text(" ".join(evaluation) + "\n")
        index = index_of(file, size)
    long_enough = range(len(evaluation) - size + 1) if len(evaluation) >= 5 else ()
    runs = {tuple(evaluation[i : i + size]) for i in long_enough}
    expected = [any(tuple(row[i : i + size]) in runs for i in range(len(row))) for row in rows]
    assert hits(index, *(" ".join(row) for row in rows)) == expected


def families(**own):
    return ContaminationSettings(families=own).all_families


def test_families_by_whole_words():
    known = families(mine=["secret_set"])
    assert families_of(["task1572_samsum_summary", "samsum"], known) == ("sam_sum",)
    assert families_of(["task10_bbqsauce_recipes"], known) == ()
    assert families_of(["task7_x", "Secret-Set (https://example.org)"], known) == ("mine",)
    assert families_of(["task106_scruples_ethical_judgment"], known) == ()
    own = families(mine=["Hendrycks-Test", "数学"], mmlu=[])
    assert families_of(["task9_hendrycks_test_law"], own) == families_of(["MMLU", "hendrycks test"], own) == ("mine",)
    assert families_of(["task1_数学_qa"], own) == ("mine",)
    assert families_of(["task1_语文_qa", "hendrycks"], own) == (), "words are compared as words, however they are spelt"


def test_an_evaluation_may_be_left_out_or_named_otherwise():
    assert families_of(["task1_samsum"], families(sam_sum=[])) == ()
    assert families_of(["task1_samsum", "dialogues"], families(sam_sum=["dialogues"])) == ("sam_sum",)
    assert "sam_sum" not in families(sam_sum=[]) and families().keys() == FAMILIES.keys()


def test_near_duplicates_under_the_same_instruction():
    base = "the committee will meet on the second floor of the old town hall every first monday of the month at nine"
    other_text = "an entirely different text about growing tomatoes in cold weather"
    texts = [base, base + " sharp", other_text, base.upper() + "!"]
    table = features.signatures(texts)
    same = np.array([1, 1, 1, 1], np.uint64)
    order = np.array([1, 0, 2, 3])
    assert features.near_duplicates(order, same, table, 0.8) == {0: 1, 3: 1}
    other = np.array([1, 2, 1, 1], np.uint64)
    assert features.near_duplicates(order, other, table, 0.8) == {3: 0}
    assert features.near_duplicates(np.empty(0, np.int64), same, table, 0.8) == {}


def test_near_duplicates_do_not_depend_on_the_rows_place():
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(list("abcdefgh"), 30)) for _ in range(40)]
    texts += [text.replace("a", "b", 1) for text in texts]
    table, ones = features.signatures(texts), np.ones(len(texts), np.uint64)
    order = np.arange(len(texts))
    found = features.near_duplicates(order, ones, table, 0.7)
    shuffled = rng.permutation(len(texts))  # row i is now text shuffled[i]
    back = np.argsort(shuffled)
    again = features.near_duplicates(back[order], ones, table[shuffled], 0.7)
    assert {int(shuffled[a]): int(shuffled[b]) for a, b in again.items()} == found and found


def test_bands_sit_below_the_threshold():
    for threshold in (0.55, 0.7, 0.8, 0.9, 0.99):
        bands, rows = features.bands_for(threshold)
        assert bands * rows == features.NUM_HASHES and (1 / bands) ** (1 / rows) < threshold


# --- whatever the separators, encodings and scripts ------------------------------------------------


@pytest.mark.parametrize(
    "separator", [" ", "\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\u00a0", "\u3000", "\t"]
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_copies_are_found_whatever_separates_their_words(separator, encoding, tmp_path):
    text = EVALUATION.replace(" ", separator)
    (tmp_path / "a.txt").write_bytes(f"{text}\r\n".encode(encoding))
    (tmp_path / "a.jsonl").write_bytes((json.dumps({"t": text}, ensure_ascii=False) + "\n").encode(encoding))
    (tmp_path / "a.json").write_bytes(json.dumps([{"t": text}], ensure_ascii=False).encode(encoding))
    for kind in ("txt", "jsonl", "json"):
        if kind == "txt" or separator not in "\t\x0b\x0c\x1c":  # JSON escapes those itself
            index = index_of(tmp_path / f"a.{kind}")
            assert index.num_texts == 1 and hits(index, EVALUATION, text) == [True, True], kind


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
def test_latin_1_is_refused_in_one_line(name, tmp_path):
    (tmp_path / name).write_bytes('{"t": "Café au lait"}\n'.encode("latin-1"))
    with pytest.raises(ConfigError, match=rf"contamination\.files: .*{name}, .*neither UTF-8 nor UTF-16") as caught:
        index_of(tmp_path / name)
    assert len(str(caught.value).splitlines()) == 1


def test_scripts_without_spaces_count_by_character(tmp_path):
    sentence = "这家餐厅的服务非常好环境也很安静我们朋友都喜欢下次还会再来"
    (tmp_path / "a.txt").write_text(sentence + "\n", encoding="utf-8")
    index = index_of(tmp_path / "a.txt")
    assert index.num_texts == 1 and len(index.runs) == len(sentence) - 12
    assert hits(index, f"他说：{sentence[5:18]}。", sentence[5:17]) == [True, False]


def test_shared_cases(shared_data):
    folder = shared_data / "cases/contamination"
    whole = (folder / "whole.txt").read_text(encoding="utf-8")
    assert hits(index_of(folder / "ls.txt"), whole) == [True]
    halves = "first half of a text second half of the very same text here"
    assert hits(index_of(folder / "ls.jsonl"), halves) == [True]
    assert index_of(folder / "bom.jsonl").num_texts == 1
    chinese = (folder / "zh.txt").read_text(encoding="utf-8").splitlines()
    index = index_of(folder / "zh.txt")
    assert index.num_texts == len(chinese) and hits(index, *chinese) == [True] * len(chinese)
    with pytest.raises(ConfigError, match=r"latin\.txt, after line 0: neither UTF-8 nor UTF-16"):
        index_of(folder / "latin.txt")


# --- near-duplicates see numbers and signs ----------------------------------------------------------


def near_pairs(texts, threshold=0.6):
    keys = np.array([hash(features.exact_parts(text)) % (1 << 63) for text in texts], np.uint64)
    return features.near_duplicates(np.arange(len(texts)), keys, features.signatures(texts), threshold)


def test_eight_sums_are_eight_rows():
    frame = "Please work out the following sum step by step and give the result of it as one number only: {} = ?"
    sums = ("12 + 7", "12 + 8", "12 - 7", "12 * 7", "12 / 7", "1.2 + 7", "12 % 7", "-12 + 7")
    assert near_pairs([frame.format(one) for one in sums]) == {}
    assert near_pairs([frame.format("12 + 7"), frame.format("12 + 7") + " Thanks"]) == {1: 0}


def test_punctuation_and_case_do_not_hide_a_repeat():
    text = "the well-known committee will meet on the second floor of the old town hall every monday of the month"
    assert near_pairs([text, text.upper() + "!", f"“{text}”, again"]) == {1: 0, 2: 0}


def test_repeats_in_scripts_without_spaces_are_found():
    text = "这家餐厅的服务非常好环境也很安静我们朋友都喜欢下次还会再来这家电影院的座位也很舒服"
    assert near_pairs([text, text + "了", "手机的电池不好用了要换新的才行因为充电太慢而且总是自动关机"]) == {1: 0}
