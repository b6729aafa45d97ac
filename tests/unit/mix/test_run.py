"""A mix from end to end in this process: outputs, audit, reasons, reruns, bad input."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from birbal_ray.mix.config import MixConfig
from birbal_ray.mix.files import diff, explain
from birbal_ray.mix.plan import MixPlan
from birbal_ray.mix.run import dry_run, mix
from birbal_ray.mix.select import Reason
from birbal_ray.run import MANIFEST_FILE, RUN_FILE, RunError, RunMismatchError
from birbal_ray.schemas import AUDIT, MIX_ROWS, SCORE_ROWS
from birbal_ray.settings import ConfigError, load_config
from tests.fixtures.score_folder import list_files_as_they_are, made_up_rows, write_score_folder

DATA_FILES = [
    *("audit.parquet", "train.parquet", "eval.parquet", "train.jsonl", "eval.jsonl", "tasks.parquet"),
    *("alpaca/train.json", "alpaca/eval.json", "alpaca/dataset_info.json"),
]
BUDGETS = {"exact_match_budget": 300, "generation_budget": 250}


@pytest.fixture(scope="module")
def rows():
    return made_up_rows(12, 200, seed=1)


@pytest.fixture(scope="module")
def scores(rows, tmp_path_factory):
    return write_score_folder(tmp_path_factory.mktemp("scores") / "s", rows)


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    path = tmp_path_factory.mktemp("outside") / "notes.jsonl"
    records = [
        {"q": f"What is written on page {n} of the notes?", "a": f"word {n}", "bot": n % 10 == 0} for n in range(80)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    columns = {"input": "q", "output": "a", "llm_written": "bot"}
    return {"name": "notes", "path": str(path), "columns": columns, "max_rows": 40, "license": "CC0-1.0"}


def config(scores, folder, **changes):
    return MixConfig(**{"scores": str(scores), "output": str(folder), "seed": 5, "task_score": BUDGETS, **changes})


@pytest.fixture(scope="module")
def made(scores, outside, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mix") / "m"
    return mix(config(scores, folder, sources=[outside]))


def read(folder, name):
    return pq.read_table(folder / name).to_pylist()


def data_of(folder):
    return {name: (folder / name).read_bytes() for name in DATA_FILES}


def test_budgets_are_met_to_the_row(made):
    kept = {(row["source"], row["label"]): row["kept"] for row in made.composition}
    assert kept == {
        ("natural_instructions", "exact_match"): 300,
        ("natural_instructions", "generation"): 250,
        ("notes", None): 40,
    }


def test_audit_reconciles_with_everything(made, rows):
    audit = read(made.folder.local, "audit.parquet")
    assert pq.read_schema(made.folder.local / "audit.parquet").equals(AUDIT)
    counts = made.manifest["rows"]
    assert len(audit) == counts["candidates"] == len(rows) + 80
    assert counts["kept"] + sum(counts["dropped"].values()) == counts["candidates"]
    for reason, count in {"kept": counts["kept"], **counts["dropped"]}.items():
        assert sum(row["reason"] == reason for row in audit) == count
    assert len({row["row_id"] for row in audit}) == len(audit)
    assert [row["kept"] for row in audit] == sorted((row["kept"] for row in audit), reverse=True)
    assert counts["dropped"]["llm_written"] == 8
    tasks = read(made.folder.local, "tasks.parquet")
    assert sum(task["num_candidates"] for task in tasks) == len(audit)
    assert sum(task["num_kept"] for task in tasks) == counts["kept"]


def test_kept_rows_are_the_files_rows(made):
    audit = [row for row in read(made.folder.local, "audit.parquet") if row["kept"]]
    for split in ("train", "eval"):
        table = pq.read_table(made.folder.local / f"{split}.parquet")
        assert table.schema.equals(MIX_ROWS)
        full = table.to_pylist()
        assert [row["row_id"] for row in full] == [row["row_id"] for row in audit if row["split"] == split]
        lines = [json.loads(line) for line in (made.folder.local / f"{split}.jsonl").read_text().splitlines()]
        assert lines == [{"question": row["question"], "answer": row["answer"]} for row in full]
        alpaca = json.loads((made.folder.local / "alpaca" / f"{split}.json").read_text())
        assert alpaca == [{name: row[name] for name in ("instruction", "input", "output")} for row in full]
        for row in full:
            head = f"### Instruction:\n{row['instruction']}\n\n" if row["instruction"] else ""
            assert row["question"] == f"{head}### Input:\n{row['input']}\n\n### Response:\n"
            assert row["answer"] == row["output"]
            assert row["selected_by"] in ("task_score:failed", "task_score:rest", "notes:all")
    assert made.manifest["rows"]["eval"] == 590 - int(0.98 * 590)


def test_failed_rows_come_first_inside_a_task(made):
    audit = read(made.folder.local, "audit.parquet")
    for task in {row["task"] for row in audit if row["label"]}:
        mine = [row for row in audit if row["task"] == task]
        if any(row["reason"] == "over_allocation" and row["bucket"] == "failed" for row in mine):
            assert not any(row["kept"] and row["bucket"] == "rest" for row in mine)


def test_every_row_explains_itself(made):
    seen = set()
    for row in read(made.folder.local, "audit.parquet"):
        if (row["reason"], row["bucket"]) in seen:
            continue
        seen.add((row["reason"], row["bucket"]))
        answer = explain(made.folder, row["row_id"])
        assert answer["kept"] == row["kept"] and Reason[row["reason"].upper()].text in answer["why"]
        if row["reason"] == "duplicate":
            assert explain(made.folder, answer["repeats"])["row_id"] in answer["why"]
    assert {"kept", "error", "duplicate", "over_allocation", "short_input", "too_long"} <= {
        reason for reason, _ in seen
    }
    with pytest.raises(ConfigError, match="no candidate 'task0000_made_up_exact_match:x'"):
        explain(made.folder, "task0000_made_up_exact_match:x")
    with pytest.raises(ConfigError, match=r"no task or source 'task0000_made_up_exact' \(did you mean"):
        explain(made.folder, "task0000_made_up_exact:x")


def test_loads_as_a_dataset(made, tmp_path):
    import datasets

    loaded = datasets.load_dataset(str(made.folder.local), cache_dir=str(tmp_path))
    assert {name: len(split) for name, split in loaded.items()} == {"train": 578, "eval": 12}
    assert loaded["train"].column_names == MIX_ROWS.names
    lines = datasets.load_dataset("json", data_files=str(made.folder.local / "train.jsonl"), cache_dir=str(tmp_path))
    assert lines["train"].column_names == ["question", "answer"]
    alpaca = datasets.load_dataset(
        "json", data_files=str(made.folder.local / "alpaca/train.json"), cache_dir=str(tmp_path)
    )
    assert set(alpaca["train"].column_names) == {"instruction", "input", "output"} and len(alpaca["train"]) == 578


def test_other_trainers_are_told_how_to_get_the_training_text(made):
    text = (made.folder.local / "alpaca" / "README.md").read_text()
    axolotl = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])["datasets"][0]
    names = axolotl["type"]
    for line in (made.folder.local / axolotl["path"]).read_text().splitlines():
        record = json.loads(line)
        # axolotl: system ("" here) + the format without input, which the record has none of; the answer by itself
        assert not {"input", "system"} & record.keys()
        assert names["no_input_format"].format(instruction=record[names["field_instruction"]]) == record["question"]
        assert record[names["field_output"]] == record["answer"]
    info = json.loads((made.folder.local / "alpaca" / "dataset_info.json").read_text())
    for split in ("train", "eval"):
        entry = info[f"birbal_text_{split}"]
        lines = (made.folder.local / "alpaca" / entry["file_name"]).read_text().splitlines()
        assert all(set(entry["columns"].values()) == json.loads(line).keys() for line in lines)
    assert "birbal_text_train" in text and "alpaca/README.md" in (made.folder.local / "README.md").read_text()


def test_card_says_what_is_inside(made):
    card = (made.folder.local / "README.md").read_text()
    for expected in ("590 instruction rows", "| notes |", "CC0-1.0", "`task_score`", "seed 5", "llm_written"):
        assert expected in card


def test_order_of_files_and_their_cut_change_nothing(made, rows, outside, scores, tmp_path):
    tasks = sorted({row["task"] for row in rows}, reverse=True)
    shuffled = [row for task in tasks for row in reversed(rows) if row["task"] == task]
    other = write_score_folder(tmp_path / "s", shuffled, shard_rows=37)
    again = mix(config(other, tmp_path / "m", sources=[outside]))
    assert data_of(again.folder.local) == data_of(made.folder.local)


def test_another_seed_is_another_draw(made, scores, outside, tmp_path):
    other = mix(config(scores, tmp_path / "m", sources=[outside], seed=6))
    result = diff(made.folder, other.folder)
    assert result["settings"] == ["settings.seed: 5 → 6"]
    assert result["rows"]["a"] == result["rows"]["b"] == 590 and 0 < result["rows"]["in_both"] < 590
    assert result["rows"]["only_a"] == 590 - result["rows"]["in_both"]
    assert all(row["difference"] == 0 for row in result["sources"])
    assert diff(made.folder, made.folder)["rows"] == {"a": 590, "b": 590, "in_both": 590, "only_a": 0, "only_b": 0}


def test_diff_counts_tasks(made, scores, tmp_path):
    other = mix(config(scores, tmp_path / "m", task_score={**BUDGETS, "gamma": 3.0}))
    result = diff(made.folder, other.folder)
    assert {row["source"]: row["difference"] for row in result["sources"]} == {"natural_instructions": 0, "notes": -40}
    changed = [row for row in result["tasks"] if row["source"] == "natural_instructions"]
    assert changed and sum(row["difference"] for row in changed) == 0


def test_rerun_does_nothing_and_other_settings_are_refused(made, scores, outside):
    before = (made.folder.local / MANIFEST_FILE).stat().st_mtime_ns
    again = mix(config(scores, made.folder, sources=[outside]))
    assert (made.folder.local / MANIFEST_FILE).stat().st_mtime_ns == before and again.composition == made.composition
    with pytest.raises(RunMismatchError, match=r"settings\.seed: 5 → 9"):
        mix(config(scores, made.folder, sources=[outside], seed=9))


def test_overwrite_and_unfinished_start_anew(scores, tmp_path):
    first = mix(config(scores, tmp_path / "m"))
    data = data_of(first.folder.local)
    second = mix(config(scores, tmp_path / "m", seed=9), overwrite=True)
    assert data_of(second.folder.local) != data
    (tmp_path / "m" / MANIFEST_FILE).unlink()
    (tmp_path / "m" / "train.parquet").write_bytes(b"half")
    (tmp_path / "m" / ".work" / "out").mkdir(parents=True)
    third = mix(config(scores, tmp_path / "m"))
    assert data_of(third.folder.local) == data and not (tmp_path / "m" / ".work").exists()


def test_nothing_appears_when_writing_fails(scores, tmp_path, monkeypatch):
    def lose_a_row(plan):
        *tables, last = read_texts(plan)
        yield from [*tables, last.slice(1)]

    read_texts = MixPlan.read_texts
    monkeypatch.setattr(MixPlan, "read_texts", lose_a_row)
    with pytest.raises(
        RunError, match=r"550 rows were to be written from rank 0 on, 549 arrived; .*nothing was written"
    ):
        mix(config(scores, tmp_path / "m"))
    assert not any((tmp_path / "m" / name).exists() for name in [*DATA_FILES, MANIFEST_FILE, "README.md"])


def test_dry_run_writes_nothing(scores, made, outside, tmp_path):
    result = dry_run(config(scores, tmp_path / "m", sources=[outside]))
    assert result.composition == made.composition and result.folder is None
    assert result.manifest["rows"] == made.manifest["rows"]
    assert not (tmp_path / "m").exists()


def test_an_output_that_is_or_holds_an_input_is_refused(scores, tmp_path):
    with pytest.raises(ConfigError, match="this folder is an input"):
        mix(config(scores, scores))
    (tmp_path / "m").mkdir()
    file = tmp_path / "m" / "mine.jsonl"
    file.write_text('{"input": "a", "output": "b"}\n')
    source = {"name": "mine", "path": str(file), "columns": {"input": "input", "output": "output"}}
    for inputs in ({"sources": [source]}, {"contamination": {"files": [str(file)]}}):
        with pytest.raises(ConfigError, match=r"this folder holds an input \(.*mine"):
            mix(config(scores, tmp_path / "m", **inputs))


def test_birbal_2023_end_to_end(scores, tmp_path):
    result = mix(config(scores, tmp_path / "m", policy="birbal_2023"))
    audit = read(result.folder.local, "audit.parquet")
    buckets = {row["bucket"].rsplit("_", 1)[0] for row in audit if row["reason"] not in ("error",)}
    assert buckets == {"accuracy", "rouge"}
    reasons = {row["reason"] for row in audit}
    assert {"answered_correctly", "answered_well", "not_drawn", "several_references", "kept"} <= reasons
    kept = next(row for row in audit if row["kept"])
    assert "drawn from" in explain(result.folder, kept["row_id"])["why"]


def test_llm_written_rows_can_be_let_in(scores, outside, tmp_path):
    result = mix(config(scores, tmp_path / "m", sources=[{**outside, "max_rows": None}], include_llm_written=True))
    assert {row["source"]: row["kept"] for row in result.composition}["notes"] == 80
    whole = mix(config(scores, tmp_path / "w", sources=[{**outside, "llm_written": True}]))
    assert whole.manifest["rows"]["dropped"]["llm_written"] == 80


@pytest.mark.parametrize("action", ["report", "drop"])
def test_contamination_gate(action, rows, scores, tmp_path):
    long = next(r for r in rows if r["error"] is None and 20 < len(r["orig_input"].split()) < 100)
    (tmp_path / "eval.txt").write_text("In the test: " + long["orig_input"] + "\n")
    gate = {
        "action": action,
        "files": [str(tmp_path / "eval.txt")],
        "families": {"mine": [rows[0]["task"]]},
    }
    budgets = {"exact_match_budget": 9000, "generation_budget": 9000, "allow_shortfall": True}
    result = mix(config(scores, tmp_path / "m", contamination=gate, task_score=budgets))
    found = result.manifest["contamination"]["found"]
    assert found["family:mine"] == 200 and found["ngram"] >= 1
    audit = {row["row_id"]: row for row in read(result.folder.local, "audit.parquet")}
    hit = audit[f"{long['task']}:{long['instance_id']}"]
    assert "ngram" in hit["contamination"]
    family = [row for row in audit.values() if row["task"] == rows[0]["task"] and row["reason"] != "error"]
    assert all(row["contamination"].startswith("family:mine") for row in family)
    if action == "drop":
        assert {row["reason"] for row in family} == {"contaminated_family"}
        assert hit["reason"] in ("contaminated_ngram", "contaminated_family")
    else:
        assert any(row["kept"] for row in family)
    assert f"Action: `{action}`" in (result.folder.local / "README.md").read_text()


def test_a_source_of_which_nothing_is_left_is_named(scores, outside, tmp_path):
    """Such as openbookqa and cnn_dailymail of the shipped settings, which are evaluations themselves."""
    source = {**outside, "name": "openbookqa.copy"}
    gate = {"action": "drop"}
    result = mix(config(scores, tmp_path / "m", contamination=gate, sources=[source, outside]))
    why = "none of its rows is in the mix (72 contaminated_family, 8 llm_written)"
    assert result.manifest["notes"] == {"openbookqa.copy": why}
    assert f"- openbookqa.copy: {why}" in (result.folder.local / "README.md").read_text()
    notes = {row["task"]: row["note"] for row in read(result.folder.local, "tasks.parquet")}
    assert notes["openbookqa.copy"] == why and notes["notes"] is None
    kept = mix(config(scores, tmp_path / "k", contamination=gate | {"families": {"openbookqa": []}}, sources=[source]))
    assert kept.manifest["notes"] == {} and kept.manifest["contamination"]["found"] == {}


def test_near_duplicates(rows, tmp_path):
    base = "a fairly long question about how rivers change their course over many hundred years of erosion and rain"
    twins = [
        {**rows[0], "instance_id": f"near-{n}", "orig_input": base + tail, "prediction": "wrong", "error": None}
        for n, tail in enumerate(["", " today", " now"])
    ]
    folder = write_score_folder(tmp_path / "s", [*rows[:200], *twins])
    budgets = {"exact_match_budget": 150, "generation_budget": 0}
    result = mix(config(folder, tmp_path / "m", dedup={"near": True}, task_score=budgets))
    near = [row for row in read(result.folder.local, "audit.parquet") if "near-" in row["row_id"]]
    assert sorted(row["reason"] == "near_duplicate" for row in near) == [False, True, True]
    dropped = next(row["row_id"] for row in near if row["reason"] == "near_duplicate")
    assert "near-" in explain(result.folder, dropped)["repeats"]


# --- bad input ------------------------------------------------------------------------------------


def test_a_budget_larger_than_all_candidates(scores, tmp_path):
    with pytest.raises(ConfigError, match=r"exact_match_budget = 50000: only \d+ exact_match .*allow_shortfall"):
        mix(MixConfig(scores=str(scores), output=str(tmp_path / "m")))
    lower = mix(config(scores, tmp_path / "m"))  # the failed attempt is not in the way
    assert lower.manifest["rows"]["kept"] == 550


def test_shortfall_is_named_when_allowed(scores, tmp_path):
    budgets = {"exact_match_budget": 5000, "generation_budget": 100, "allow_shortfall": True}
    result = mix(config(scores, tmp_path / "m", task_score=budgets))
    entry = result.manifest["allocation"]["exact_match"]
    assert entry["allocated"] + entry["shortfall"] == 5000 and entry["short_tasks"]
    assert result.manifest["allocation"]["generation"]["shortfall"] == 0
    assert "Budgets not met" in (result.folder.local / "README.md").read_text()


def copied(scores, tmp_path):
    return shutil.copytree(scores, tmp_path / "copied")


def test_score_folder_that_is_not_there_or_unfinished(scores, made, tmp_path):
    with pytest.raises(ConfigError, match="gone: no such folder; expected the output of `birbal score`"):
        mix(config(tmp_path / "gone", tmp_path / "m"))
    folder = copied(scores, tmp_path)
    (folder / MANIFEST_FILE).unlink()
    with pytest.raises(RunError, match=r"an unfinished `birbal score` run \(no manifest.json\)"):
        mix(config(folder, tmp_path / "m"))
    (folder / RUN_FILE).unlink()
    with pytest.raises(ConfigError, match=r"no manifest.json here; expected the output of `birbal score`"):
        mix(config(folder, tmp_path / "m"))
    with pytest.raises(ConfigError, match="the output of `birbal mix`, expected that of `birbal score`"):
        mix(config(made.folder, tmp_path / "m"))


def test_scores_of_another_model(scores, tmp_path):
    with pytest.raises(ConfigError, match="scored by made-up-model, the configuration says model = 'mistral'"):
        mix(config(scores, tmp_path / "m", model="mistral"))
    named = mix(config(scores, tmp_path / "m", model="made-up-model"))
    assert named.manifest["scores"]["model"] == "made-up-model"
    assert mix(config(scores, tmp_path / "m")).manifest == named.manifest, "the same mix, with less to be checked"


def test_half_written_scores(scores, tmp_path):
    folder = copied(scores, tmp_path)
    shard = sorted((folder / "rows").rglob("*.parquet"))[1]
    content = shard.read_bytes()
    middle = len(content) // 3
    for wrong in (content[: len(content) // 2], content[:middle] + b"\xff" * 64 + content[middle + 64 :]):
        shard.write_bytes(wrong)
        with pytest.raises(RunError, match=f"{shard.name}: not a readable Parquet file"):
            mix(config(list_files_as_they_are(folder), tmp_path / "m"))
    shard.unlink()
    with pytest.raises(RunError, match=f"1 file.s. of this finished run are missing.*first: .*{shard.name} is missing"):
        mix(config(folder, tmp_path / "m"))


def test_files_of_rows_that_the_run_did_not_write_are_not_read(scores, tmp_path):
    """What a killed writer, a copy by hand or a program that keeps folders the same left there."""
    folder = copied(scores, tmp_path)
    shard = sorted((folder / "rows").rglob("*.parquet"))[1]
    for name in (".tmp-1-x.parquet", "copy.parquet", f"{shard.stem} (1).parquet"):
        shutil.copy(shard, shard.with_name(name))
        shutil.copy(shard, folder / "rows" / name)
    first, second = (mix(config(place, tmp_path / name)) for name, place in (("a", scores), ("b", folder)))
    assert data_of(first.folder.local) == data_of(second.folder.local)


def test_score_files_of_another_layout(scores, tmp_path):
    folder = copied(scores, tmp_path)
    shard = sorted((folder / "rows").rglob("*.parquet"))[0]
    table = pq.read_table(shard)
    text = pa.array([str(score) for score in table["score"].to_pylist()])
    names = pa.array(["elsewhere"] * len(table))
    for wrong, problem in (
        (table.drop_columns("prediction"), "column 'prediction' is missing"),
        (table.set_column(table.schema.get_field_index("score"), "score", text), "'score' is string, expected double"),
        (
            table.set_column(table.schema.get_field_index("task"), SCORE_ROWS.field("task"), names),
            r"task 'elsewhere' is not in the run's tasks\.parquet",
        ),
    ):
        pq.write_table(wrong, shard)
        with pytest.raises(RunError, match=problem):
            mix(config(list_files_as_they_are(folder), tmp_path / "m"))
    list_files_as_they_are(folder)
    (folder / "task_scores.parquet").unlink()
    with pytest.raises(RunError, match=r"missing or have changed \(first: task_scores\.parquet is missing\)"):
        mix(config(folder, tmp_path / "m"))


def test_output_folder_of_something_else(scores, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="not empty and not a birbal run"):
        mix(config(scores, tmp_path / "m"))


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["task_score.gama=2"], "unknown key 'task_score.gama' .did you mean 'gamma'"),
        (["task_score.gamma=-1"], "task_score.gamma = -1"),
        (["policy=best"], "policy = 'best'"),
        (["sources=[{name: nobody}]"], "'nobody' is no known dataset"),
        (["sources=[{name: lima}, {name: lima}]"], "source name 'lima' is taken"),
        (["eval_fraction=1"], "eval_fraction = 1"),
        (["contamination.families={samsum: []}"], r"no evaluation 'samsum' to leave out \(did you mean 'sam_sum'\?\)"),
    ],
)
def test_bad_settings(assignments, message):
    with pytest.raises(ConfigError, match=message):
        load_config(MixConfig, None, assignments)


def test_missing_flags(scores):
    with pytest.raises(ConfigError, match="--scores is required"):
        mix(MixConfig(output="x"))
    with pytest.raises(ConfigError, match="--output is required"):
        mix(MixConfig(scores=str(scores)))


# --- what is in the way, and what is not ------------------------------------------------------------


def test_an_unfinished_mix_with_a_damaged_record_is_made_from_scratch_when_that_is_asked_for(scores, tmp_path):
    made = mix(config(scores, tmp_path / "m"))
    data = data_of(made.folder.local)
    (tmp_path / "m" / MANIFEST_FILE).unlink()
    (tmp_path / "m" / RUN_FILE).write_text("{")
    with pytest.raises(RunError, match=r"run\.json: not valid JSON.*choose another --output"):
        mix(config(scores, tmp_path / "m"))
    assert data_of(mix(config(scores, tmp_path / "m"), overwrite=True).folder.local) == data


def test_a_mix_that_another_process_finishes_meanwhile_is_not_replaced(scores, tmp_path, monkeypatch):
    """It was unfinished when this command began, and of other settings."""
    from birbal_ray.mix import run as step

    first = mix(config(scores, tmp_path / "m"))
    data, manifest = data_of(first.folder.local), (tmp_path / "m" / MANIFEST_FILE).read_bytes()
    (tmp_path / "m" / MANIFEST_FILE).unlink()
    opened = step.open_run

    def finished_meanwhile(*arguments, **options):
        (tmp_path / "m" / MANIFEST_FILE).write_bytes(manifest)
        return opened(*arguments, **options)

    monkeypatch.setattr(step, "open_run", finished_meanwhile)
    with pytest.raises(RunMismatchError):
        mix(config(scores, tmp_path / "m", seed=9))
    assert data_of(first.folder.local) == data


@pytest.mark.parametrize("name", ["my-rows.parquet", "more.jsonl", "alpaca/mine.json"])
def test_overwrite_takes_no_file_that_a_mix_does_not_write(name, scores, tmp_path):
    mix(config(scores, tmp_path / "m"))
    (tmp_path / "m" / name).write_bytes(b"mine")
    for finished in (True, False):
        if not finished:
            (tmp_path / "m" / MANIFEST_FILE).unlink()
        with pytest.raises(ConfigError, match=rf"--overwrite deletes nothing here.*\(first: {name}\)"):
            mix(config(scores, tmp_path / "m", seed=9), overwrite=True)
    assert (tmp_path / "m" / name).read_bytes() == b"mine"
    assert (tmp_path / "m" / "train.parquet").exists()


def test_the_card_does_not_say_where_a_users_file_lies(made, outside):
    assert "| notes | notes.jsonl |" in (made.folder.local / "README.md").read_text()
    folder = str(outside["path"]).rpartition("/")[0]
    assert folder not in (made.folder.local / "README.md").read_text()
    assert made.manifest["sources"][0]["location"] == outside["path"], "its own record does"


@pytest.mark.parametrize("name", ["audit.parquet", "tasks.parquet"])
def test_questions_to_an_edited_mix_are_refused(name, scores, tmp_path):
    folder = mix(config(scores, tmp_path / "m")).folder
    row_id = read(folder.local, "audit.parquet")[0]["row_id"]
    data = (folder.local / name).read_bytes()
    (folder.local / name).write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])  # of the same size
    with pytest.raises(RunError, match=rf"{name}: edited since its run finished.*put the original back"):
        explain(folder, row_id)
    if name == "audit.parquet":
        with pytest.raises(RunError, match=rf"{name}: edited since its run finished"):
            diff(folder, folder)
