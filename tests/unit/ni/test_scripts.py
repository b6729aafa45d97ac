"""Text of every script: a right answer scores 1, a wrong one clearly less; lengths are counted as read."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from birbal_ray.ni import metrics, prompt
from birbal_ray.ni.reader import parse_task
from tests.conftest import examples, task_values

# name: (right answer, wrong answer, tokens of the right one)
SCRIPTS = {
    "ASCII": ("The cat sat on the mat.", "A dog ran to its house.", 6),
    "Han": ("东京是日本的首都。", "罗马位于意大利。", 8),
    "Kana": ("コーヒーをのみます。", "ねこがすきだった。", 9),
    "half-width Kana": ("ｶﾞｲﾄﾞ", "テレビ", 3),
    "Hangul": ("나는 어제 학교에 갔다.", "그녀는 오늘 집에서 잔다.", 4),
    "Cyrillic": ("Москва — столица России.", "Париж стоит на реке.", 3),
    "Greek": ("Η Αθήνα είναι μεγάλη.", "Το Παρίσι ήταν μικρό.", 4),
    "Arabic": ("القاهرة عاصمة مصر", "باريس مدينة فرنسية", 3),
    "Persian with a non-joiner": ("من می‌روم", "او آمد", 2),
    "Hebrew": ("ירושלים עיר גדולה", "תל אביב קטנה", 3),
    "Devanagari": ("दिल्ली भारत की राजधानी है", "मुंबई बड़ा शहर था", 5),
    "Thai": ("กรุงเทพเป็นเมืองหลวง", "โตเกียวอยู่ไกลมากๆ", 17),
    "Khmer": ("ភ្នំពេញ", "សៀមរាប", 4),
    "Lao": ("ວຽງຈັນ", "ຫຼວງພະບາງ", 5),
    "Burmese": ("မြန်မာ", "ထိုင်း", 3),
    "German": ("Die Straße führt über die Brücke.", "Das Mädchen mag süße Äpfel.", 6),
    "Vietnamese": ("Hà Nội là thủ đô", "Huế thì rất đẹp", 5),
    "Turkish": ("İstanbul büyük bir şehir", "Ankara başkent oldu", 4),
    "emoji": ("😀👍🏽", "😡💔", 3),
    "emoji joined to one": ("👩‍👩‍👧", "🏳️‍🌈", 3),
    "zero-width": ("mod\u200bel an\ufeffswer", "other text", 2),
    "combining marks": (unicodedata.normalize("NFD", "café crème"), "thé vert", 2),
    "full width": ("Ｈｅｌｌｏ　１２３", "Ｂｙｅ　４５６", 2),
    "NUL": ("alpha\0beta", "gamma\0delta", 2),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_right_answer_scores_1_and_a_wrong_one_clearly_less(name):
    right, wrong, num_tokens = SCRIPTS[name]
    assert len(metrics.tokens(right)) == num_tokens, metrics.tokens(right)
    assert metrics.rouge_l(right, [right]) == metrics.exact_match(right, [right]) == 1.0
    assert metrics.rouge_l(wrong, [right]) <= 0.35
    assert metrics.exact_match(wrong, [right]) == 0.0
    extracted = prompt.extract_answer(f" {right}\n\n### Input:")
    assert metrics.rouge_l(extracted, [right]) == metrics.exact_match(extracted, [right]) == 1.0


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        (unicodedata.normalize("NFD", "Über café 각 ガ"), "Über café 각 ガ"),
        ("STRASSE", "Straße"),
        ("ΣΟΦΟΣ", "σοφός".replace("ό", "ο")),
        ("ｶﾀｶﾅ", "カタカナ"),
        ("don't stop", "don’t – stop…"),
        ("ﬁne", "fine"),
    ],
)
def test_rouge_l_sees_one_text_however_it_is_encoded(answer, reference):
    assert metrics.rouge_l(answer, [reference]) == 1.0


def test_a_word_differs_by_its_vowel_signs_and_accents():
    assert metrics.rouge_l("की", ["का"]) == metrics.rouge_l("schon", ["schön"]) == 0.0


def test_part_of_an_answer_without_spaces_counts_for_its_characters():
    # 4 of 5 characters and 4 of 4
    assert metrics.rouge_l("今天下雨", ["今天不下雨"]) == pytest.approx(8 / 9)


def test_exact_match_takes_canonically_equal_texts_as_equal_and_nothing_more():
    assert metrics.exact_match(unicodedata.normalize("NFD", "việt"), ["việt"]) == 1.0
    assert metrics.exact_match("\ufeffyes\u200b ", ["yes"]) == 1.0, "zero-width space around it"
    assert metrics.exact_match("２", ["2"]) == metrics.exact_match("straße", ["strasse"]) == 0.0
    assert metrics.exact_match("ye\u200bs", ["yes"]) == 0.0, "inside, every character counts"


@examples(50)
@given(st.text(st.characters(max_codepoint=127), max_size=30))
def test_ascii_text_has_the_same_tokens_by_the_general_rule(ascii_text):
    assert metrics.tokens(ascii_text + " é")[:-1] == metrics.tokens(ascii_text + " e")[:-1]


@examples(50)
@given(st.text(max_size=30))
def test_any_text_with_tokens_scores_1_against_itself(any_text):
    assert metrics.has_token(any_text) == bool(metrics.tokens(any_text))
    assert metrics.rouge_l(any_text, [any_text]) == float(metrics.has_token(any_text))
    assert metrics.exact_match(any_text, [any_text]) == 1.0


@pytest.mark.parametrize(
    ("counted", "words"),
    [
        ("", 0),
        ("two words", 2),
        (" a  - b\n", 3),
        ("Привет мир", 2),
        ("今天上午学校举行了运动会，气氛热烈。", 16),
        ("iPhone 15是新产品", 6),
        ("โรงเรียน", 7),
        ("！？", 1),
    ],
)
def test_count_words(counted, words):
    assert metrics.count_words(counted) == words


def make_task(outputs, **changes):
    instances = [{"id": n, "input": f"in {n}", "output": output} for n, output in enumerate(outputs)]
    return parse_task("t1", json.dumps(task_values(Instances=instances, **changes)).encode())


def test_long_references_without_spaces_are_generation():
    task = make_task([["第0小学今天上午举行了全校学生参加的春季运动会，现场气氛热烈。"]] * 3)
    assert metrics.label_task(task).value == "generation"
    assert metrics.label_task(make_task([["正面"]] * 3)).value == "exact_match"


def unreachable(outputs, label="generation", **options):
    found = metrics.find_unreachable(make_task(outputs), label, prompt.extract_answer, **options)
    return found.fraction, found.reason or ""


def test_references_that_score_1_against_themselves_are_reachable():
    assert unreachable([["yes"], [" two\nlines "], ["!?", "x"], ["one\n\ntwo", "three"], ["是"]]) == (0.0, "")
    assert unreachable([["!?"], ["-"]], "exact_match") == (0.0, "")


def test_a_task_says_which_references_no_answer_can_score_1_on():
    fraction, reason = unreachable([["first one\n\nsecond two"], ["fine"], ["a\n\nb", "\n\nlate"], ["ok"]])
    assert (fraction, reason) == (0.5, "a blank line in the references: a completion ends there")
    assert unreachable([["a\n\nb"]], "exact_match")[0] == 1.0
    fraction, reason = unreachable([["!?"], ["fine"], ["..."], ["ok"]])
    assert (fraction, "ROUGE-L" in reason) == (0.5, True)
    fraction, reason = unreachable([["long"], ["ok"]], fits=lambda reference: reference != "long")
    assert (fraction, "tokens" in reason) == (0.5, True)


def test_instances_without_references_do_not_count():
    assert unreachable([[""], ["ok"]]) == (0.0, "")


CASES = ("9002_chinese", "9003_russian", "9004_german")


@pytest.mark.parametrize("name", CASES)
def test_awkward_case_files_score_1_on_their_references(shared_data, name):
    (file,) = (shared_data / "cases" / "tasks").glob(f"task{name}*.json")
    task = parse_task(file.stem, file.read_bytes())
    label = metrics.label_task(task).value
    answers = [instance.references[0] for instance in task.instances]
    assert label == "generation"
    assert metrics.find_unreachable(task, label, prompt.extract_answer).fraction == 0.0
    for answer, other in zip(answers, answers[1:] + answers[:1], strict=True):
        assert metrics.rouge_l(answer, [answer]) == 1.0
        assert metrics.rouge_l(answer, [other]) < 0.95
    assert Path(file).stem == task.name
