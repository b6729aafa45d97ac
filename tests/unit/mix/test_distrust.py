"""A mix takes nothing on trust: each wrong value is one line that names the file, the row, and what to do."""

import json
import math
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from birbal_ray.mix.config import MixConfig
from birbal_ray.mix.run import mix
from birbal_ray.run import MANIFEST_FILE, RunError
from birbal_ray.settings import ConfigError, load_config
from tests.fixtures.score_folder import list_files_as_they_are, made_up_rows, write_score_folder

BUDGETS = {"exact_match_budget": 20, "generation_budget": 20, "allow_shortfall": True}


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    return write_score_folder(tmp_path_factory.mktemp("scores") / "s", made_up_rows(4, 40, seed=1))


def config(scores, folder, **changes):
    return MixConfig(**{"scores": str(scores), "output": str(folder), "task_score": BUDGETS, **changes})


def edited(scores, tmp_path, name, row, values):
    """A copy of the scores in which a row (from 0) of the first file that matches `name` has other values."""
    folder = shutil.copytree(scores, tmp_path / "edited")
    file = sorted(folder.glob(name))[0]
    table = pq.read_table(file)
    rows = table.to_pylist()
    rows[row] |= values
    schema = pa.schema([field.with_nullable(True) for field in table.schema])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), file)
    return list_files_as_they_are(folder), file


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"score": math.nan}, "score is no number from 0 to 1"),
        ({"score": 1.5}, "score is no number from 0 to 1"),
        ({"score": -0.1}, "score is no number from 0 to 1"),
        ({"score": None, "error": None}, "score is null without an error"),
        ({"label": "essay"}, "label is unknown"),
        ({"label": None}, "label is null"),
        ({"orig_input": None}, "orig_input is null"),
        ({"answer": None}, "answer is null"),
        ({"answer": ["yes", None]}, "a reference is null"),
        ({"prediction": None}, "prediction is null"),
        ({"row_id": None}, "row_id is null"),
        ({"task": None}, "task is null"),
    ],
)
def test_values_that_no_score_run_writes(values, problem, scores, tmp_path):
    folder, file = edited(scores, tmp_path, "rows/**/*.parquet", 4, values)
    with pytest.raises(RunError) as caught:
        mix(config(folder, tmp_path / "m"))
    assert str(caught.value).startswith(f"{file}, row 5: {problem}; run `birbal score` again")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"task_score": None}, "task_score does not fit num_scored"),
        ({"num_scored": 0}, "task_score does not fit num_scored"),
        ({"task_score": math.nan}, "task_score is no number from 0 to 1"),
        ({"task_score": 1.01}, "task_score is no number from 0 to 1"),
        ({"label": "essay"}, "label is unknown"),
    ],
)
def test_task_scores_that_make_no_sense(values, problem, scores, tmp_path):
    folder, _ = edited(scores, tmp_path, "task_scores.parquet", 1, values)
    with pytest.raises(RunError, match=rf"task_scores\.parquet, row 2: {problem}; run `birbal score` again"):
        mix(config(folder, tmp_path / "m"))


@pytest.mark.parametrize("name", ["task_scores.parquet", "tasks.parquet", "rows/**/*.parquet"])
def test_an_edited_file_is_noticed_by_its_hash(name, scores, tmp_path):
    folder = shutil.copytree(scores, tmp_path / "edited")
    file = sorted(folder.glob(name))[0]
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    record = manifest["files"][file.relative_to(folder).as_posix()]
    record["sha256"] = "0" * 64  # as if the file had other bytes of the same number
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    with pytest.raises(RunError, match=rf"{file.name}: edited since its run finished"):
        mix(config(folder, tmp_path / "m"))


def test_a_manifest_that_is_no_object(scores, tmp_path):
    folder = shutil.copytree(scores, tmp_path / "edited")
    (folder / MANIFEST_FILE).write_text("[]")
    with pytest.raises(RunError, match=r"manifest\.json: expected a JSON object, found list"):
        mix(config(folder, tmp_path / "m"))


def test_rows_with_errors_are_never_right_or_wrong(tmp_path):
    rows = made_up_rows(2, 40, seed=1)
    for row in rows[:10]:
        row["error"] = "prompt too long"
        row["prediction"] = row["answer"][0]
    folder = write_score_folder(tmp_path / "s", rows)
    results = {}
    for policy in ("task_score", "birbal_2023", "uniform", "proportional"):
        made = mix(config(folder, tmp_path / policy, policy=policy))
        audit = pq.read_table(tmp_path / policy / "audit.parquet").to_pylist()
        wrong = [row for row in audit if row["row_id"] in {f"{r['task']}:{r['instance_id']}" for r in rows[:10]}]
        results[policy] = {(row["reason"], row["score"], row["bucket"]) for row in wrong}
        assert made.manifest["rows"]["dropped"]["error"] >= 10
    assert set(results) and all(found == {("error", None, "none")} for found in results.values())


def source_file(tmp_path, content, name="rows.jsonl"):
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    columns = {"input": "q", "output": "a"}
    return {"name": "mine", "path": str(file), "columns": columns}


LONG = "Please say something useful about this one thing here"


@pytest.mark.parametrize(
    ("content", "name", "problem"),
    [
        ("", "rows.jsonl", "holds no rows; give another file"),
        ("[]", "rows.json", "holds no rows; give another file"),
        (
            b'{"q": "Caf\xe9", "a": "x"}\n',
            "rows.jsonl",
            "after line 0: neither UTF-8 nor UTF-16; save the file as UTF-8",
        ),
        (b'[{"q": "Caf\xe9", "a": "x"}]', "rows.json", "neither UTF-8 nor UTF-16; save the file as UTF-8"),
        (
            '{"q": "x", "a": "y"}\n{"q": "x", "a": 3}\n',
            "rows.jsonl",
            "row 2: output is int, expected text (3); quote it",
        ),
        ('{"q": "x", "a": "y"}\n[1]\n', "rows.jsonl", "row 2: expected an object with columns, found list"),
        ('[{"q": "x", "a": "y"}, {"q": ', "rows.json", "not JSON (Expecting value: line 1 column 30"),
        ('[{"q": "x", "a": "y"}]\n[{"q": "x", "a": "y"}]\n', "rows.json", "not JSON (Extra data: line 2 column 1"),
        ('[]{"q": "x", "a": "y"}', "rows.json", "not JSON (Extra data: line 1 column 3"),
        ('[{"q": "x", "a": "y"} {"q": "x", "a": "y"}]', "rows.json", "not JSON (Expecting ',' delimiter: line 1 col"),
        ('[{"q": "x", "a": "y"}[{"q": "x", "a": "y"}]', "rows.json", "not JSON (Expecting ',' delimiter: line 1 col"),
        ('[{"q": "x", "a": "y"},]', "rows.json", "rows.json: not JSON ("),
        ('[,{"q": "x", "a": "y"}]', "rows.json", "not JSON (Expecting value: line 1 column 2"),
        ('[{"q": "x", "a": "y"}', "rows.json", "not JSON (Expecting ',' delimiter: line 1 col"),
    ],
)
def test_sources_that_can_t_be_used(content, name, problem, scores, tmp_path):
    source = source_file(tmp_path, content, name)
    with pytest.raises(ConfigError, match=re.escape(problem)) as caught:
        mix(config(scores, tmp_path / "m", sources=[source]))
    assert source["path"] in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_a_column_that_is_no_boolean(scores, tmp_path):
    source = source_file(tmp_path, json.dumps({"q": LONG, "a": "x", "bot": "no"}) + "\n")
    source["columns"]["llm_written"] = "bot"
    with pytest.raises(ConfigError, match="row 1: llm_written is 'no', expected true, false or null"):
        mix(config(scores, tmp_path / "m", sources=[source]))


def outputs(folder):
    tables = [pq.read_table(folder / f"{split}.parquet").to_pylist() for split in ("train", "eval")]
    return sorted(row["output"] for table in tables for row in table if row["source"] == "mine")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "v[2]/rows.jsonl", "*/rows?.json"])
def test_text_stays_text_and_a_path_is_a_path(name, encoding, scores, tmp_path):
    source_file(tmp_path, json.dumps({"q": LONG, "a": "wrong file"}), "v2/rows.jsonl")
    records = [
        {"q": f"{LONG}\u2028 {n}", "a": answer} for n, answer in enumerate(("2024-01-05", "12", "true", "ü\x85"))
    ]
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    text = "\n".join(lines) if name.endswith("l") else "[" + ",\n".join(lines) + "]\n"
    mix(config(scores, tmp_path / "m", sources=[source_file(tmp_path, text.encode(encoding), name)]))
    assert outputs(tmp_path / "m") == sorted(record["a"] for record in records)


def test_shared_cases(shared_data, scores, tmp_path):
    columns = {"input": "q", "output": "a"}
    dates = {"name": "mine", "path": str(shared_data / "cases/source/date.jsonl"), "columns": columns}
    made = mix(config(scores, tmp_path / "dates", sources=[dates]))
    assert outputs(tmp_path / "dates") == ["2024-01-05", "2024-01-06"]
    pattern = {**dates, "path": str(shared_data / "cases/source-path/v[2]/rows.jsonl")}
    mix(config(scores, tmp_path / "path", sources=[pattern]))
    assert "wrong" not in outputs(tmp_path / "path")
    assert made.manifest["sources"][0]["location"] == str(Path(dates["path"]).resolve())


def test_an_array_longer_than_its_start(tmp_path):
    from birbal_ray.mix.sources import read_records

    records = [{"q": f"{LONG} {n}", "a": f'answer {n}, [x] {{y}} \\ " {"z" * (n % 37)}'} for n in range(200)]
    for indent in (None, 2):
        (tmp_path / "a.json").write_text(json.dumps(records, indent=indent))
        assert list(read_records(str(tmp_path / "a.json"), "x")) == list(enumerate(records, 1))
        for end in ("[1]", ", 1", "x"):
            (tmp_path / "a.json").write_text(json.dumps(records) + end)
            with pytest.raises(ConfigError, match=r"x: .*a\.json: not JSON \(Extra data"):
                list(read_records(str(tmp_path / "a.json"), "x"))


def test_a_factor_of_infinity():
    with pytest.raises(ConfigError, match=r"birbal_2023\.factor = inf"):
        load_config(MixConfig, None, ["birbal_2023.factor=.inf"])
    with pytest.raises(ConfigError, match=r"task_score\.gamma = nan"):
        load_config(MixConfig, None, ["task_score.gamma=.nan"])


@pytest.mark.parametrize(("count", "train"), [(1, 1), (2, 1), (3, 2)])
def test_a_mix_of_few_rows_has_train_rows(count, train, scores, tmp_path):
    budgets = {"exact_match_budget": count, "generation_budget": 0}
    made = mix(config(scores, tmp_path / "m", task_score=budgets))
    assert made.manifest["rows"]["train"] == train and made.manifest["rows"]["eval"] == count - train
    assert len(pq.read_table(tmp_path / "m" / "train.parquet")) == train


def test_an_empty_mix_is_refused(scores, tmp_path):
    with pytest.raises(ConfigError, match=r"the mix would be empty: 160 candidates \(.* over_allocation"):
        mix(config(scores, tmp_path / "m", task_score={"exact_match_budget": 0, "generation_budget": 0}))


@pytest.mark.parametrize(
    ("filters", "advice"),
    [({"max_short_input_words": 999}, "lower filters.max_short_input_words"), ({"max_words": 1}, "raise filters.max_")],
)
def test_a_mix_that_filters_leave_empty_names_them(scores, tmp_path, filters, advice):
    with pytest.raises(ConfigError, match=rf"the mix would be empty: 160 candidates \(.*\); {advice}"):
        mix(config(scores, tmp_path / "m", filters=filters))


def test_the_scores_are_never_overwritten(scores, tmp_path):
    folder = shutil.copytree(scores, tmp_path / "s")
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    for output in (folder, tmp_path):
        with pytest.raises(ConfigError, match=r"(holds|is) an input"):
            mix(config(folder, output), overwrite=True)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("damage", ["unlink", "empty"])
@pytest.mark.parametrize("name", ["train.parquet", "audit.parquet", "alpaca/eval.json"])
def test_a_finished_mix_that_lost_a_file_is_made_again(damage, name, scores, tmp_path):
    folder = tmp_path / "m"
    mix(config(scores, folder))
    before = {file: file.read_bytes() for file in folder.rglob("*.*") if file.suffix in (".parquet", ".json", ".jsonl")}
    (folder / name).unlink() if damage == "unlink" else (folder / name).write_bytes(b"")
    made = mix(config(scores, folder))
    after = {file: file.read_bytes() for file in before}
    changed = {file.name for file in before if before[file] != after[file]}
    assert changed <= {"manifest.json", "progress.json"} and made.manifest["rows"]["kept"] == 40


@pytest.mark.parametrize("is_text", [True, False])
@pytest.mark.parametrize("compat", [True, False])
def test_compat_takes_the_first_letter_of_a_text_definition(is_text, compat, tmp_path):
    rows = made_up_rows(2, 40, seed=1)
    columns = {row["task"]: {"definition_is_text": is_text} for row in rows}
    folder = write_score_folder(tmp_path / "s", rows, columns=columns)
    mix(config(folder, tmp_path / "m", policy="birbal_2023", birbal_2023={"compat": compat}))
    found = {row["instruction"] for row in pq.read_table(tmp_path / "m" / "train.parquet").to_pylist()}
    whole = {f"Do what {row['task']} asks." for row in rows}
    assert found == ({"D"} if is_text and compat else whole)
