"""`birbal tasks import`: from a table to task files that the other commands read."""

from __future__ import annotations

import csv
import json
import shlex

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.unit.cli.test_cli import run

ROWS = [{"question": f"Is {n} even?", "answer": "no" if n % 2 else "yes", "kind": "ab"[n % 2]} for n in range(20)]
COLUMNS = ["--input", "question", "--output", "answer", "--definition", "Say yes or no."]


@pytest.fixture
def table(tmp_path):
    with (tmp_path / "data.csv").open("w", newline="") as handle:
        writer = csv.DictWriter(handle, ["question", "answer", "kind"])
        writer.writeheader()
        writer.writerows([*ROWS, {"question": "empty?", "answer": "", "kind": "a"}])
    return tmp_path / "data.csv"


def test_from_a_csv_to_a_planned_score_run(table, tmp_path):
    folder = tmp_path / "my-tasks"
    result = run("tasks", "import", table, *COLUMNS, "--name", "even", "--folder", folder, "--format", "json")
    assert result.exit_code == 0
    (row,) = json.loads(result.stdout)
    assert (row["task"], row["label"], row["instances"], row["shots"]) == ("even", "exact_match", 16, 4)
    assert "left out 1 of 21 rows (the first is row 21): no text in column 'answer'" in result.stderr
    assert run("tasks", "validate", "--tasks", folder).exit_code == 0
    page = run("tasks", "show", "even", "--tasks", folder).stdout
    assert "### Instruction:\nSay yes or no.\n" in page
    planned = run(
        "score", "--tasks", folder, "--output", tmp_path / "out", "--set", "engine.backend=simulated", "--dry-run"
    )
    assert planned.exit_code == 0
    assert "even" in planned.stdout + planned.stderr


def test_parquet_gives_the_same_files_and_groups_become_tasks(table, tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "data.parquet")
    for source in ("data.csv", "data.parquet"):
        arguments = [tmp_path / source, *COLUMNS, "--group-by", "kind", "--folder", tmp_path / source[5:]]
        assert run("tasks", "import", *arguments).exit_code == 0
    for name in ("data_a.json", "data_b.json"):
        ours, theirs = (json.loads((tmp_path / kind / name).read_text()) for kind in ("csv", "parquet"))
        assert ours["Source"] != theirs["Source"]
        assert ours["Instances"] == theirs["Instances"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("d.jsonl", '{"question": "a\u2028b\\fc", "answer": "yes"}\n\n{"question": "two\\nlines", "answer": "no"}\r\n'),
        ("d.json", '[{"question": "a\u2028b\\fc", "answer": "yes"},\n {"question": "two\\nlines", "answer": "no"}]'),
    ],
)
def test_json_in_any_unicode(name, text, encoding, tmp_path):
    (tmp_path / name).write_bytes(text.encode(encoding))
    result = run("tasks", "import", tmp_path / name, *COLUMNS, "--folder", tmp_path / "t", "--num-examples", 0)
    assert result.exit_code == 0, result.stderr
    rows = [(one["input"], one["output"]) for one in json.loads((tmp_path / "t" / "d.json").read_text())["Instances"]]
    assert rows == [("a\u2028b\x0cc", ["yes"]), ("two\nlines", ["no"])]


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("d.xlsx", "PK", "d.xlsx: expected .csv, .tsv, .json, .jsonl, .parquet; export the table as CSV"),
        ("d.jsonl", '{"question": "a"}\n{"question": \n', "d.jsonl, line 2: not JSON (Expecting value)"),
        (
            "d.jsonl",
            '{"question": "a"}\n["a", "b"]\n',
            "d.jsonl, row 2: expected an object with columns, found ['a', 'b']",
        ),
        ("d.json", "[1, 2]", "d.json, row 1: expected an object with columns, found 1"),
        ("d.jsonl", '{"question": ' + "[" * 100_000, "d.jsonl, line 1: not JSON ("),
        ("d.json", '[{"question": ' + "9" * 5000 + "}]", "d.json: not JSON ("),
        ("d.json", '[{"question": "a"}][]', "d.json: not JSON (Extra data: line 1 column 20"),
        ("d.txt", '{"question": "a"}', "d.txt: expected .csv, .tsv, .json, .jsonl, .parquet"),
    ],
)
def test_a_file_that_can_t_be_read_is_named(name, text, reason, tmp_path):
    (tmp_path / name).write_text(text)
    result = run("tasks", "import", tmp_path / name, *COLUMNS, "--folder", tmp_path / "t")
    assert result.exit_code == 2 and reason in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_files_that_are_there_stay(table, tmp_path):
    arguments = ["tasks", "import", table, *COLUMNS, "--folder", tmp_path / "t"]
    assert run(*arguments).exit_code == 0
    before = (tmp_path / "t" / "data.json").read_bytes()
    (tmp_path / "t" / "other.json").write_text("mine")
    result = run(*arguments, "--num-examples", 2)
    assert result.exit_code == 2
    assert "data.json exists; give another --name or --folder, or --overwrite" in result.stderr
    assert (tmp_path / "t" / "data.json").read_bytes() == before
    assert run(*arguments, "--num-examples", 2, "--overwrite").exit_code == 0
    assert "fewer than 18 examples" in run(*arguments, "--num-examples", 18, "--overwrite").stderr
    assert (tmp_path / "t" / "data.json").read_bytes() != before
    assert (tmp_path / "t" / "other.json").read_text() == "mine"


def test_a_dataset_with_named_classes(tmp_path, monkeypatch):
    """A folder that `datasets` reads, as it reads a repository of the Hub."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "reviews"
    folder.mkdir()
    features = [
        {"name": "text", "dtype": "string"},
        {"name": "mood", "dtype": {"class_label": {"names": ["bad", "good"]}}},
    ]
    card = {"dataset_info": {"features": features}, "configs": [{"config_name": "default", "data_files": "data.jsonl"}]}
    (folder / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")
    lines = [json.dumps({"text": f"review {n}", "mood": n % 2}) for n in range(8)]
    (folder / "data.jsonl").write_text("\n".join(lines))
    arguments = ["--input", "text", "--output", "mood", "--definition", "The mood?", "--folder", tmp_path / "t"]
    result = run("tasks", "import", folder, *arguments)
    assert result.exit_code == 0, result.stderr
    task = json.loads((tmp_path / "t" / "reviews.json").read_text())
    assert {one["output"] for one in task["Positive Examples"]} == {"bad", "good"}


def test_the_examples_of_the_help_make_tasks(tmp_path, monkeypatch):
    """On tables of ours with the columns that they name; the dataset's in the layout that the Hub's has."""
    import datasets

    (tmp_path / "reviews.csv").write_text("review,mood\n" + "".join(f"review {n},good\n" for n in range(8)))
    answers = {"text": ["north", "the north"], "answer_start": [0, 4]}
    rows = [{"id": f"{n}", "title": "T", "context": "c", "question": f"q{n}", "answers": answers} for n in range(8)]
    asked = []

    def load(name, subset, split, revision):
        asked.append((name, split))
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.chdir(tmp_path)
    lines = run("tasks", "import", "--help").stdout.splitlines()
    commands = [shlex.split(line)[1:] for line in lines if line.strip().startswith("birbal tasks import ")]
    assert len(commands) == 2 and all(run(*one).exit_code == 0 for one in commands)
    assert asked == [("rajpurkar/squad", "train")]
    for name, outputs in (("mood", ["good"]), ("squad", ["north", "the north"])):
        task = json.loads((tmp_path / "my-tasks" / f"{name}.json").read_text())
        assert len(task["Instances"]) == 4 and task["Instances"][0]["output"] == outputs


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["{table}", "--input", "questoin", *COLUMNS[2:]], "no column 'questoin' (nearest: 'question')"),
        (["absent.csv", *COLUMNS], "absent.csv: no such file"),
        (["{bad}", *COLUMNS], "bad.parquet, after row 0: not a Parquet file"),
        (["no-such/dataset", *COLUMNS], "no-such/dataset: no such file, and not a dataset that the Hub gives"),
        (["{table}", *COLUMNS, "--name", "a:b"], "a:b.json: the name holds a ':'"),
        (["{table}", *COLUMNS, "--name", "a/b"], "a/b.json: the name holds a '/'"),
        (["{table}", *COLUMNS[:4], "--definition", " "], "data.json: 'Definition' is empty"),
        (["{empty}", *COLUMNS], "empty.csv: the file is empty"),
        (["{folder}", *COLUMNS], ": no such file, and not a dataset that the Hub gives"),
        (["{script}", *COLUMNS], "gives (Dataset scripts are no longer supported"),
        (["{table}", *COLUMNS, "--folder", "{table}"], "data.csv: expected a folder, but it, or a part of this path"),
        (["{table}", *COLUMNS, "--folder", "{table}/x"], "data.csv/x: expected a folder, but it, or a part of this"),
        (["{table}", *COLUMNS, "--split", "test"], "data.csv is a file; leave --split, --subset and --revision out"),
        (["{bad}", *COLUMNS, "--subset", "en"], "bad.parquet is a file; leave --split, --subset and --revision out"),
        (["{table}", *COLUMNS, "--revision", "v2"], "data.csv is a file; leave --split, --subset and --revision out"),
        (["{table}", *COLUMNS, "--folder", "s3://bucket/tasks"], "expected a folder on this machine"),
    ],
)
def test_wrong_usage_is_one_line(table, tmp_path, monkeypatch, arguments, reason):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "empty.csv").write_text("\n")
    (tmp_path / "script").mkdir()
    (tmp_path / "script" / "script.py").write_text("")
    names = ("bad.parquet", "empty.csv", "script")
    places = {"table": table, "folder": tmp_path, **{name.split(".")[0]: tmp_path / name for name in names}}
    if "--folder" not in arguments:
        arguments = [*arguments, "--folder", str(tmp_path / "t")]
    result = run("tasks", "import", *(argument.format(**places) for argument in arguments))
    assert result.exit_code == 2
    assert reason in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1 or "Usage:" in result.stderr
    assert "Errno" not in result.stderr
    assert not (tmp_path / "t").exists()
