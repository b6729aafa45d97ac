"""Task files, names and archives that are not as they should be: used where the meaning is plain, else named."""

from __future__ import annotations

import json
import os

import pytest

from birbal_ray.ni import catalog, reader
from birbal_ray.ni.reader import find_task_files, parse_task, read_files, read_tasks
from birbal_ray.ni.schema import Example, TaskError
from tests.conftest import task_values
from tests.unit.ni.test_reader import archive


def parse(**changes):
    return parse_task("t1", json.dumps(task_values(3, **changes)).encode())


def test_numbers_as_outputs_and_example_outputs():
    examples = [{"input": "cat", "output": 3}, {"input": "horse", "output": [5.5]}, {"input": "x", "output": True}]
    task = parse(**{"Positive Examples": examples}, Instances=[{"id": 1, "input": "a", "output": 0}])
    assert task.positive_examples == (Example("cat", "3"), Example("horse", "5.5"))
    assert task.instances[0].references == ("0",)
    assert task.repairs == {
        "number taken as a reference text": 3,
        "reference dropped (a boolean, not a text)": 1,
        "positive example dropped (no input and output text)": 1,
        "output given as a single value, not a list": 1,
    }


def test_nested_lists_and_objects_as_outputs():
    outputs = ([["food"], ["sport", ["play"]]], {"text": "food"}, [[]], [{"text": "food"}, "food"])
    task = parse(Instances=[{"id": n, "input": f"in {n}", "output": output} for n, output in enumerate(outputs)])
    assert [one.references for one in task.instances] == [("food", "sport", "play"), (), (), ("food",)]
    assert [bool(one.error) for one in task.instances] == [False, True, True, False]
    assert task.repairs["list inside an output taken apart"] == 4
    assert task.repairs["reference dropped (an object, not a text)"] == 2


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('{"Definition": ["x"], "Instances": [], "Instances": [1]}', "Instances"),
        ('{"Definition": ["x"], "Instances": [{"input": "a", "output": "b", "output": "c"}]}', "output"),
    ],
)
def test_a_key_given_twice_is_said_not_lost(text, key):
    with pytest.raises(TaskError, match=rf"bad\.json: not valid JSON \(the key '{key}' is given twice"):
        parse_task("bad", text.encode())


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"])
def test_another_encoding_is_named(encoding):
    data = json.dumps(task_values(Definition=["Größe?"]), ensure_ascii=False).encode(encoding)
    with pytest.raises(TaskError, match=r"^bad\.json: not UTF-8 .*save it as UTF-8$") as caught:
        parse_task("bad", data)
    assert ("looks like UTF-16" in str(caught.value)) == (encoding != "latin-1")


def test_bare_nan_and_infinity_are_no_references():
    text = json.dumps(task_values(Instances=[{"id": 1, "input": "a", "output": [float("nan"), float("inf"), "b"]}]))
    assert "NaN" in text
    task = parse_task("t1", text.encode())
    assert task.instances[0].references == ("b",)
    assert task.repairs == {"reference dropped (not a finite number, not a text)": 2}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("ü" * 101, "longer than 200 bytes"),
        (os.fsdecode(b"caf\xe9"), r"caf\\udce9\.json: the name holds bytes that are no text in UTF-8"),
        ("two\nlines", r"two\\nlines\.json: the name holds"),
        ("a:b", "a ':'"),
    ],
)
def test_a_name_that_result_files_cannot_have_is_that_files_problem(tmp_path, name, reason):
    with pytest.raises(TaskError, match=reason) as caught:
        parse_task(name, json.dumps(task_values()).encode())
    str(caught.value).encode()
    for file in (name, "good"):
        (tmp_path / f"{file}.json").write_text(json.dumps(task_values()))
    found = dict(read_tasks(find_task_files(tmp_path)))
    assert sorted(isinstance(task, TaskError) for task in found.values()) == [False, True]
    assert all(file.label.encode() for file in found)
    rows, num_files, num_bad = catalog.find_faults(tmp_path)
    assert (num_files, num_bad, len(rows)) == (2, 1, 1)
    json.dumps(rows, ensure_ascii=False).encode()
    json.dumps(catalog.summarise_tasks(tmp_path), ensure_ascii=False).encode()


def test_names_of_any_letters_and_signs_are_names(tmp_path):
    names = ["task #1", "задача", "50% [a]?", "a=b", "é", "#"]
    for name in names:
        (tmp_path / f"{name}.json").write_text(json.dumps(task_values(1)))
    assert sorted(task.name for _, task in read_tasks(find_task_files(tmp_path))) == sorted(names)


@pytest.mark.parametrize("prefix", ["", "./", "mine/", "ni/tasks/", "./tasks/"])
def test_archives_may_be_flat(tmp_path, prefix):
    files = {name: json.dumps(task_values()).encode() for name in ("a", "b")}
    members = {f"{prefix}{name}.json": data for name, data in files.items()}
    tar = archive(tmp_path / "x.tgz", {**members, f"{prefix}._a.json": b"\0\5\x16\7", "deep/er/README.json": b"{}"})
    assert {file.name: data for file, data in read_files(find_task_files(tar))} == files


def test_hidden_files_of_a_folder_are_no_tasks(tmp_path):
    (tmp_path / "._a.json").write_bytes(b"\0\5\x16\7")
    with pytest.raises(TaskError, match="holds no task files"):
        find_task_files(tmp_path)
    with pytest.raises(TaskError, match=r"\._a\.json: the name holds a dot at its start, which hides files"):
        parse_task("._a", json.dumps(task_values()).encode())


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    tar = archive(tmp_path / "x.tgz", {"tasks/a.json": b" " * 2000})
    monkeypatch.setattr(reader, "MAX_FILE_BYTES", 1000)
    with pytest.raises(TaskError, match=r"unpacks to more than it should \(tasks/a.json\)"):
        find_task_files(tar)


def test_faults_name_references_that_cannot_score_1(tmp_path):
    outputs = ["First paragraph is this one here.\n\nSecond paragraph is quite another one.", "one line only is fine"]
    instances = [{"id": n, "input": f"in {n}", "output": [outputs[n % 2]]} for n in range(4)]
    (tmp_path / "para.json").write_text(json.dumps(task_values(Instances=instances)))
    rows, _, num_bad = catalog.find_faults(tmp_path)
    assert num_bad == 0
    assert [(row["kind"], row["count"]) for row in rows] == [("unreachable", 2)]
    assert rows[0]["finding"] == (
        "2 of its instances, on which no answer can score 1: a blank line in the references: a completion ends there; "
        "the task gets no share by its errors"
    )
    assert "unreachable 2 of its instances" in catalog.describe_task(tmp_path, "para", 4)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("nums", {"repaired"}),
        ("nested", {"repaired", "unusable instance"}),
        ("para", {"unreachable"}),
        ("zhsum", set()),
    ],
)
def test_each_awkward_case_file_is_read_and_said(shared_data, name, kinds):
    rows, _, num_bad = catalog.find_faults(shared_data / "cases" / "tasks" / f"{name}.json")
    assert (num_bad, {row["kind"] for row in rows}) == (0, kinds)
