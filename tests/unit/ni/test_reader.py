"""Task files as they are in the wild."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from birbal_ray.ni.reader import find_task_files, parse_task, read_files, read_tasks
from birbal_ray.ni.schema import TaskError, hash_order, order_instances
from tests.conftest import task_values


def parse(**changes):
    return parse_task("t1", json.dumps(task_values(3, **changes)).encode())


def instances(*entries):
    return parse(Instances=list(entries)).instances


def test_plain_task():
    task = parse()
    assert [i.row_id for i in task.instances] == ["t1:t-0", "t1:t-1", "t1:t-2"]
    assert task.instances[1].references == ("yes",)
    assert (task.definition, task.categories) == ("Say whether the colour is warm.", ("Sentiment Analysis",))
    assert task.repairs == {}


def test_old_schema_definition_as_text_and_no_ids():
    task = parse(Definition="One text.", Instances=[{"input": "a", "output": ["x"]}, {"input": "b", "output": ["y"]}])
    assert task.definition == "One text."
    assert [i.instance_id for i in task.instances] == ["0", "1"]


def test_repeated_ids_get_stable_suffixes():
    rows = instances(*({"id": "same", "input": text, "output": ["x"]} for text in "abc"))
    assert [i.row_id for i in rows] == ["t1:same", "t1:same#2", "t1:same#3"]


def test_a_file_may_repeat_one_id_throughout():
    rows = instances(*({"id": "same", "input": str(n), "output": "x"} for n in range(20_000)))
    assert rows[-1].row_id == "t1:same#20000" and len({row.row_id for row in rows}) == 20_000


def test_same_input_merges_references_in_order():
    rows = instances(
        {"id": "1", "input": "a", "output": ["x", "y"]},
        {"id": "2", "input": "b", "output": ["z"]},
        {"id": "3", "input": "a", "output": ["y", "w"]},
    )
    assert [(i.row_id, i.references) for i in rows] == [("t1:1", ("x", "y", "w")), ("t1:2", ("z",))]


def test_output_as_text_number_and_junk():
    rows = instances(
        {"id": "1", "input": "a", "output": "plain"},
        {"id": "2", "input": "b", "output": [7, "x"]},
        {"id": "3", "input": "c", "output": [{"no": 1}, "x", None]},
    )
    assert [i.references for i in rows] == [("plain",), ("7", "x"), ("x",)]


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"id": "1", "input": "a", "output": []}, "no reference"),
        ({"id": "1", "input": "a"}, "no reference"),
        ({"id": "1", "input": "a", "output": ["", "  "]}, "every 'output' is empty"),
        ({"id": "1", "input": 5, "output": ["x"]}, "'input' is a number"),
        ("not an object", "not an object: instance 0 is a text"),
        ({"id": "1", "input": "a", "output": [float("nan")]}, "no reference"),
    ],
)
def test_unusable_instance_becomes_a_row_with_a_reason(entry, reason):
    rows = instances(entry, {"id": "ok", "input": "b", "output": ["x"]})
    assert len(rows) == 2
    assert reason in rows[0].error
    assert rows[1].error is None


def test_surrogates_and_byte_order_mark():
    text = json.dumps(task_values(1, Instances=[{"id": "1", "input": "pair \ud83d\ude00", "output": ["lone \ud83d"]}]))
    task = parse_task("t1", b"\xef\xbb\xbf" + text.encode())
    assert task.instances[0].input == "pair \U0001f600"
    assert task.instances[0].references == ("lone �",)
    assert task.repairs == {"byte order mark": 1, "unpaired surrogate replaced by U+FFFD": 1}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (json.dumps(task_values()).encode()[:200], "truncated?"),
        (b"[1, 2]", "expected an object at the top, found a list"),
        (b'{"Definition": ["x"], "Positive Examples": [], "Instances": {}}', "'Instances' is an object"),
        (b'{"Definition": ["x"], "Positive Examples": [], "Instances": []}', "'Instances' is empty"),
        (b'{"Definition": 3, "Positive Examples": [], "Instances": []}', "'Definition' is a number"),
        (b'{"Definition": [" "], "Positive Examples": [], "Instances": []}', "'Definition' is empty"),
        (b'{"Definition": ["x"], "Positive Examples": 1, "Instances": []}', "'Positive Examples' is a number"),
        (b"\xff\xfe\x00", "not UTF-8 at byte 0"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"Definition": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (OSError(13, "Permission denied"), "can't be read (Permission denied)"),
    ],
)
def test_unusable_file_names_itself_and_the_reason(data, reason):
    with pytest.raises(TaskError, match=r"bad\.json") as caught:
        parse_task("bad", data)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_two_megabyte_input_is_read_whole():
    (row,) = instances({"id": "1", "input": "word " * 400_000, "output": ["x"]})
    assert len(row.input) == 2_000_000


def archive(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("place", [0.3, 0.5, 0.7, 0.999])
def test_a_damaged_archive_is_refused_not_shortened(tmp_path, place):
    """One byte is another: tarfile alone takes a bad header for the archive's end."""
    tar = archive(
        tmp_path / "x.tar.gz", {f"tasks/t{n}.json": json.dumps(task_values(n + 1)).encode() for n in range(9)}
    )
    data = bytearray(tar.read_bytes())
    data[int(len(data) * place)] ^= 255
    tar.write_bytes(data)
    with pytest.raises(TaskError, match="not a readable tar archive"):
        find_task_files(tar)


def test_archive_and_folder_give_the_same_tasks(tmp_path):
    files = {f"task{n}": json.dumps(task_values(n + 1)).encode() for n in range(3)}
    (tmp_path / "x" / "tasks").mkdir(parents=True)
    for name, data in files.items():
        (tmp_path / "x" / "tasks" / f"{name}.json").write_bytes(data)
    tar = archive(tmp_path / "x.tar.gz", {f"ni-master/tasks/{name}.json": data for name, data in files.items()})
    for path in (tmp_path / "x", tar):
        found = find_task_files(path)
        assert [file.name for file in found] == ["task0", "task1", "task2"]
        assert {file.name: data for file, data in read_files(found)} == files


def test_a_file_that_cannot_be_read_is_one_files_problem(tmp_path):
    (tmp_path / "good.json").write_text(json.dumps(task_values()))
    (tmp_path / "gone.json").symlink_to(tmp_path / "nowhere")
    found = {file.name: task for file, task in read_tasks(find_task_files(tmp_path))}
    assert str(found["gone"]) == "gone.json: can't be read (No such file or directory)"
    assert len(found["good"].instances) == 6


@pytest.mark.parametrize("name", ["absent", "empty-folder", "text.txt", "broken.tar.gz"])
def test_path_without_tasks_is_refused_by_name(tmp_path, name):
    (tmp_path / "empty-folder").mkdir()
    (tmp_path / "text.txt").write_text("x")
    (tmp_path / "broken.tar.gz").write_bytes(b"\x1f\x8b broken")
    with pytest.raises(TaskError, match=name):
        find_task_files(tmp_path / name)


def test_hash_order_is_stable_and_other_tasks_do_not_change_it():
    task = parse_task("t1", json.dumps(task_values(50)).encode())
    first = [i.row_id for i in order_instances(task, seed=0)[:10]]
    reversed_file = parse_task("t1", json.dumps(task_values(50, Instances=task_values(50)["Instances"][::-1])).encode())
    assert [i.row_id for i in order_instances(reversed_file, seed=0)[:10]] == first
    assert [i.row_id for i in order_instances(task, seed=0)[:20]][:10] == first
    assert [i.row_id for i in order_instances(task, seed=1)[:10]] != first
    assert hash_order("t1:t-0", 0).hex() == "ce3196785cb1eead"


def test_a_number_too_large_for_a_float_is_a_text_like_others():
    number = 10**400
    (row,) = instances({"id": "1", "input": "a", "output": [number]})
    assert (row.error, row.references) == (None, (str(number),))
