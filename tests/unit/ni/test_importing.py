"""Task files from tables: which rows become examples, instances, or are left out with a reason."""

from __future__ import annotations

import json

import pytest

from birbal_ray.ni import metrics
from birbal_ray.ni.obtain import ImportOptions, make_tasks, read_csv
from birbal_ray.ni.reader import parse_task
from birbal_ray.ni.schema import TaskError

ROWS = [{"question": f"Is {n} even?", "answer": "no" if n % 2 else "yes", "topic": "ab"[n // 10]} for n in range(20)]
COLUMNS = ["question", "answer", "topic"]


def options(**changes):
    values = {"name": "t", "inputs": ("question",), "outputs": ("answer",), "definition": "Say yes or no."}
    return ImportOptions(**{**values, "source": "data.csv", **changes})


def made(rows=ROWS, **changes):
    """(tasks as the reader reads them by name, what was left out by reason)."""
    tasks, dropped = make_tasks(COLUMNS, rows, options(**changes))
    counts = {reason: len(numbers) for reason, numbers in dropped.items()}
    return {name: parse_task(name, json.dumps(values).encode()) for name, values in tasks.items()}, counts


def test_each_row_is_an_example_or_an_instance():
    tasks, dropped = made()
    task = tasks["t"]
    assert (len(task.positive_examples), len(task.instances), dropped, task.repairs) == (4, 16, {}, {})
    asked = {one.input for one in task.positive_examples} | {one.input for one in task.instances}
    assert asked == {row["question"] for row in ROWS}
    assert task.definition == "Say yes or no."
    assert metrics.label_task(task).value == "exact_match"
    by_id = {one.instance_id: one for one in task.instances}
    assert all(by_id[f"t-{n}"].input == row["question"] for n, row in enumerate(ROWS, 1) if f"t-{n}" in by_id)


def test_the_same_table_gives_the_same_files_and_another_seed_other_examples():
    first, again, other = (make_tasks(COLUMNS, ROWS, options(seed=seed))[0] for seed in (0, 0, 1))
    assert first == again
    assert first["t"]["Positive Examples"] != other["t"]["Positive Examples"]


def test_groups_become_tasks():
    tasks, dropped = made(group_by="topic", definition="About {group}: yes or no?", name="my")
    assert sorted(tasks) == ["my_a", "my_b"]
    assert [len(task.instances) for task in tasks.values()] == [6, 6]
    assert tasks["my_b"].definition == "About b: yes or no?"
    assert dropped == {}


def test_group_names_are_names_of_files():
    topics = ["a/b", "a b", "../..", "東京", "x" * 400, "a:b", ""]
    rows = [{"question": f"q{n}", "answer": "x", "topic": topic} for topic in topics for n in range(2)]
    tasks, dropped = made(rows, group_by="topic")
    assert sorted(tasks)[:5] == ["t_a_b", "t_a_b_2", "t_a_b_3", "t_group", "t_" + "x" * 188]
    assert "t_東京" in tasks
    assert dropped == {"no text in column 'topic'": 2}


def test_a_name_without_room_for_the_group_gets_a_number():
    tasks, _ = made(group_by="topic", name="n" * 195)
    assert sorted(tasks) == ["n" * 195 + "_", "n" * 195 + "__2"]


def test_a_text_that_utf_8_can_not_hold_is_repaired():
    rows = [{"question": f"q{n} \ud83d", "answer": "x\udc00", "topic": "\ud800"} for n in range(4)]
    tasks, dropped = make_tasks(COLUMNS, rows, options(group_by="topic"))
    json.dumps(tasks, ensure_ascii=False).encode()
    assert not dropped and all("\ufffd" in one["input"] for one in tasks["t_group"]["Instances"])


def test_what_cannot_be_used_is_left_out_with_its_reason():
    rows = [
        {"question": "a", "answer": "1"},
        {"question": " ", "answer": "1"},
        {"question": None, "answer": "1"},
        {"question": ["a list"], "answer": "1"},
        {"question": "b", "answer": ""},
        {"question": "c"},
        {"question": "a", "answer": "1"},
        {"question": "a", "answer": "one"},
        {"question": "d", "answer": 7, None: ["extra"]},
        {"question": "e", "answer": float("nan")},
        {"question": 5, "answer": [2.5, True, "2.5"]},
    ]
    tasks, dropped = make_tasks(COLUMNS, rows, options(num_examples=0))
    assert [(one["input"], one["output"]) for one in tasks["t"]["Instances"]] == [
        ("a", ["1", "one"]),
        ("5", ["2.5", "true"]),
    ]
    assert {reason: len(numbers) for reason, numbers in dropped.items()} == {
        "no text in column 'question'": 3,
        "no text in column 'answer'": 3,
        "same input as an earlier row": 1,
        "same input as an earlier row: its output became a reference": 1,
        "more cells than the header has": 1,
    }
    assert dropped["no text in column 'answer'"][0] == 5


def test_several_columns():
    rows = [{"question": f"q{n}", "answer": "x", "topic": "y"} for n in range(4)]
    tasks, _ = make_tasks(COLUMNS, rows, options(inputs=("topic", "question"), outputs=("answer", "topic")))
    assert tasks["t"]["Instances"][0]["input"].startswith("topic: y\nquestion: q")
    assert tasks["t"]["Instances"][0]["output"] == ["x", "y"]


def test_answers_as_question_answering_datasets_hold_them():
    """SQuAD's layout: an object of parallel lists, whose `text` are the answers."""
    answers = {"text": ["north", "the north"], "answer_start": [3, 0]}
    rows = [{"question": f"q{n}", "answer": answers} for n in range(4)]
    rows += [{"question": "unanswerable", "answer": {"text": [], "answer_start": []}}]
    rows += [{"question": "single", "answer": {"text": "south"}}, {"question": "listed", "answer": [{"text": "east"}]}]
    rows += [{"question": "no text", "answer": {"start": 3}}]
    tasks, dropped = make_tasks(COLUMNS, rows, options(num_examples=0))
    outputs = {one["input"]: one["output"] for one in tasks["t"]["Instances"]}
    assert outputs["q0"] == ["north", "the north"]
    assert (outputs["single"], outputs["listed"]) == (["south"], ["east"])
    assert dropped == {"no text in column 'answer'": [5, 8]}


def test_few_rows_keep_as_many_instances_as_examples():
    assert len(made(ROWS[:3])[0]["t"].positive_examples) == 1
    with pytest.raises(TaskError, match=r"data.csv: no task can be made \(1 rows: the only row of its task"):
        made(ROWS[:1])
    with pytest.raises(TaskError, match="it has no rows"):
        made([])


def test_a_missing_column_is_named_with_the_nearest():
    expected = r"^data.csv: no column 'questions' \(nearest: 'question'\); it has 'question', 'answer', 'topic'$"
    with pytest.raises(TaskError, match=expected):
        made(inputs=("questions",))


TABLES = {
    "comma.csv": 'question,answer\nIs it, so?,yes\n"two\nlines",no\n'.replace("Is it, so?", '"Is it, so?"'),
    "semicolon.csv": 'question;answer\nIs it, so?;yes\n"two\nlines";no\n',
    "tab.tsv": 'question\tanswer\nIs it, so?\tyes\n"two\nlines"\tno\n',
    "bom.csv": '\ufeffquestion,answer\n"Is it, so?",yes\n"two\nlines",no\n',
    "windows.csv": 'question,answer\r\n"Is it, so?",yes\r\n"two\nlines",no\r\n',
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_each_kind(tmp_path, name):
    (tmp_path / name).write_bytes(TABLES[name].encode())
    columns, rows = read_csv(tmp_path / name, ["question", "answer"])
    assert columns == ["question", "answer"]
    assert rows == [{"question": "Is it, so?", "answer": "yes"}, {"question": "two\nlines", "answer": "no"}]


def test_a_line_separator_inside_a_text_ends_no_row(tmp_path):
    (tmp_path / "x.csv").write_text("question,answer\na\u2028b\x0cc,yes\n", encoding="utf-8")
    assert read_csv(tmp_path / "x.csv", ["question"])[1] == [{"question": "a\u2028b\x0cc", "answer": "yes"}]


def test_a_cell_may_be_large(tmp_path):
    (tmp_path / "x.csv").write_text("question,answer\n" + "word " * 100_000 + ",yes\n")
    assert len(read_csv(tmp_path / "x.csv", ["question"])[1][0]["question"]) == 500_000


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        (
            "x.csv",
            "question,answer\ngr\xf6\xdfe,yes\n".encode("latin-1"),
            r"x.csv: not UTF-8 at byte 18; save it as UTF-8",
        ),
        ("x.csv", b"question,answer,answer\na,b,c\n", "two columns are named 'answer'"),
    ],
)
def test_an_unreadable_table_is_named(tmp_path, name, data, reason):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(TaskError, match=reason):
        read_csv(tmp_path / name, ["question", "answer"])
