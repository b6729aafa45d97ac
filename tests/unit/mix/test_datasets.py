"""Adapters of outside datasets, on small files of ours in each upstream's column layout."""

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from birbal_ray.mix.config import SourceSettings
from birbal_ray.mix.datasets import (
    ANSWER_FROM_TEXT,
    CANNOT_ANSWER,
    CHOOSE_COMPLETION,
    HUB_DATASETS,
    SUMMARIZE,
)
from birbal_ray.mix.sources import origin_of, read_source, source_problem
from birbal_ray.schemas import OUTSIDE_ROWS
from birbal_ray.settings import ConfigError

RECORDS = {
    "lima": [
        {"conversations": ["How do I keep basil alive indoors?", "Give it light and water."], "source": "ours"},
        {"conversations": ["Which knot holds a swing?", "A bowline.", "And a hammock?", "Two."], "source": "multi"},
        {"conversations": ["A question without an answer"], "source": "ours"},
    ],
    "open_platypus": [
        {"input": "", "output": "4", "instruction": "What is two plus two?", "data_source": "MATH/PRM-800K"},
        {"input": "A cat sat.", "output": "B", "instruction": "Pick one.", "data_source": "reclor"},
        {"input": "", "output": "hello", "instruction": "Say hello nicely to me.", "data_source": "airoboros"},
    ],
    "math_instruct": [
        {
            "source": "data/CoT/gsm_train.json",
            "instruction": " Tom has 3 pears and buys 4. How many has he? ",
            "output": "3 + 4 = 7\n#### 7\nThe answer is: 7",
        },
        {"source": "data/CoT/MATH_train.json", "instruction": "Find x.", "output": "x is 2. The answer is: 2"},
        {"source": "data/PoT/numglue.json", "instruction": "How many?", "output": "print(3)"},
    ],
    "quac": [
        {
            "dialogue_id": "d1",
            "wikipedia_page_title": "A baker",
            "background": "",
            "section_title": "Early life",
            "context": "She was born in a mill and learned to bake. CANNOTANSWER",
            "turn_ids": ["d1_q#0", "d1_q#1"],
            "questions": ["Where was she born?", "Whom did she marry?"],
            "followups": [0, 1],
            "yesnos": [2, 2],
            "answers": {"texts": [["in a mill"], ["CANNOTANSWER"]], "answer_starts": [[13], [44]]},
            "orig_answers": {"texts": ["in a mill", "CANNOTANSWER"], "answer_starts": [13, 44]},
        }
    ],
    "openbookqa": [
        {
            "id": "7-980",
            "question_stem": "A kettle left on a stove will",
            "choices": {"text": ["freeze", "boil", "sing", "grow"], "label": ["A", "B", "C", "D"]},
            "answerKey": "B",
        }
    ],
    "cnn_dailymail": [{"article": "A bridge opened on Monday.", "highlights": "Bridge opens .", "id": "0" * 40}],
}

EXPECTED = {
    "lima": [
        ("", "How do I keep basil alive indoors?", "Give it light and water.", "ours"),
        ("", "Which knot holds a swing?", "A bowline.", "multi"),
    ],
    "open_platypus": [
        ("", "What is two plus two?", "4", "MATH/PRM-800K"),
        ("Pick one.", "A cat sat.", "B", "reclor"),
        ("", "Say hello nicely to me.", "hello", "airoboros"),
    ],
    "math_instruct": [
        ("", "Tom has 3 pears and buys 4. How many has he?", "3 + 4 = 7\nThe answer is: 7", "data/CoT/gsm_train.json"),
        ("", "Find x.", "x is 2. The answer is: 2", "data/CoT/MATH_train.json"),
        ("", "How many?", "print(3)", "data/PoT/numglue.json"),
    ],
    "quac": [
        (
            ANSWER_FROM_TEXT,
            "Early life\nShe was born in a mill and learned to bake.\n\nQuestion: Where was she born?",
            "in a mill",
            "quac",
        ),
        (
            ANSWER_FROM_TEXT,
            "Early life\nShe was born in a mill and learned to bake.\n\nQuestion: Where was she born?"
            "\nAnswer: in a mill\nQuestion: Whom did she marry?",
            CANNOT_ANSWER,
            "quac",
        ),
    ],
    "openbookqa": [
        (
            CHOOSE_COMPLETION,
            "A kettle left on a stove will\nA. freeze\nB. boil\nC. sing\nD. grow",
            "boil",
            "openbookqa",
        )
    ],
    "cnn_dailymail": [
        (
            SUMMARIZE,
            "A bridge opened on Monday.",
            "Bridge opens .",
            "cnn_dailymail",
        )
    ],
}


def load(source):
    origin = origin_of(source)
    table = pa.concat_tables(read_source(source, origin))
    assert table.schema.equals(OUTSIDE_ROWS)
    return table.to_pylist(), origin


def write(tmp_path, records, kind):
    path = tmp_path / f"data.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.parametrize("name", sorted(RECORDS))
def test_upstream_layout(name, kind, tmp_path):
    path = write(tmp_path, RECORDS[name], kind)
    rows, origin = load(SourceSettings(name=name, path=path))
    assert [(r["instruction"], r["input"], r["output"], r["task"]) for r in rows] == EXPECTED[name]
    assert origin.revision.startswith("sha256:")
    assert all(r["row_id"].startswith(f"{name}:") for r in rows)


def test_llm_written_rows_are_marked(tmp_path):
    for name, expected in (("open_platypus", [True, False, True]), ("math_instruct", [False, False, True])):
        path = write(tmp_path, RECORDS[name], "jsonl")
        rows, _ = load(SourceSettings(name=name, path=path))
        assert [row["llm_written"] for row in rows] == expected
    assert [r["license"] for r in rows] == ["MIT"] * 3


def test_each_part_of_math_instruct_carries_its_licence(tmp_path):
    parts = ("gsm_train", "aqua_rat", "MATH_train")
    records = [{"source": f"data/CoT/{part}.json", "instruction": "How many?", "output": "7"} for part in parts]
    rows, _ = load(SourceSettings(name="math_instruct", path=write(tmp_path, records, "jsonl")))
    assert [row["license"] for row in rows] == ["MIT", "Apache-2.0", "MIT"]
    assert not any(row["llm_written"] for row in rows)


def test_platypus_rows_carry_their_own_licence(tmp_path):
    path = write(tmp_path, RECORDS["open_platypus"], "jsonl")
    rows, _ = load(SourceSettings(name="open_platypus", path=path))
    assert [row["license"] for row in rows] == ["MIT", "non-commercial", "other"]


def test_every_upstream_has_a_fixture_and_a_revision():
    assert set(RECORDS) == set(HUB_DATASETS)
    for upstream in HUB_DATASETS.values():
        assert upstream.revision == "main" or re.fullmatch("[0-9a-f]{7,40}", upstream.revision)


def test_local_file_with_a_mapping(tmp_path):
    records = [
        {"q": "What grows on vines in autumn?", "a": "grapes", "kind": "plants", "bot": False},
        {"q": "What grows on vines in autumn?", "a": "grapes", "kind": "plants", "bot": True},
        {"q": None, "a": "nothing", "kind": "odd", "bot": None},
    ]
    path = write(tmp_path, records, "jsonl")
    source = SourceSettings(
        name="garden",
        path=path,
        columns={"input": "q", "output": "a", "task": "kind", "llm_written": "bot"},
        instruction="Answer in one word.",
        license="CC0-1.0",
    )
    rows, _ = load(source)
    assert [(r["instruction"], r["input"], r["output"]) for r in rows] == [
        ("Answer in one word.", "What grows on vines in autumn?", "grapes"),
        ("Answer in one word.", "What grows on vines in autumn?", "grapes"),
        ("Answer in one word.", "", "nothing"),
    ]
    assert rows[1]["row_id"] == rows[0]["row_id"] + "#2"
    assert [r["llm_written"] for r in rows] == [False, True, False]
    assert {r["license"] for r in rows} == {"CC0-1.0"}
    reordered, _ = load(source.model_copy(update={"path": write(tmp_path, records[::-1], "jsonl")}))
    assert {r["row_id"] for r in reordered} == {r["row_id"] for r in rows}


@pytest.mark.parametrize(
    ("settings", "records", "message"),
    [
        (
            {"name": "lima"},
            [{"conversation": ["a", "b"], "source": "x"}],
            r"source lima: .*, row 1 is not in the layout .*KeyError: 'conversations'.*found conversation, source;",
        ),
        (
            {"name": "openbookqa"},
            [{"question_stem": "a", "choices": 3, "answerKey": "A"}],
            "row 1 is not in the layout",
        ),
        (
            {"name": "mine", "columns": {"output": "answer"}},
            [{"anwser": "x"}],
            r"source mine: .*data\.jsonl: column 'answer' is missing \(did you mean 'anwser'\?\); found anwser",
        ),
        ({"name": "mine", "columns": {"output": "n"}}, [{"n": 3}], "output is int, expected text"),
    ],
)
def test_other_columns_are_a_clear_error(settings, records, message, tmp_path):
    path = write(tmp_path, records, "jsonl")
    with pytest.raises(ConfigError, match=message):
        load(SourceSettings(path=path, **settings))


def test_unreadable_files(tmp_path):
    columns = {"output": "a"}
    with pytest.raises(ConfigError, match=r"source mine: .*gone\.jsonl: no such file"):
        origin_of(SourceSettings(name="mine", path=str(tmp_path / "gone.jsonl"), columns=columns))
    (tmp_path / "a.csv").write_text("a\n1\n")
    with pytest.raises(ConfigError, match=r"expected .json, .jsonl, .parquet"):
        origin_of(SourceSettings(name="mine", path=str(tmp_path / "a.csv"), columns=columns))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 broken")
    with pytest.raises(ConfigError, match=r"source mine: .*a\.parquet, after row 0: not a Parquet file"):
        load(SourceSettings(name="mine", path=str(tmp_path / "a.parquet"), columns=columns))
    (tmp_path / "a.jsonl").write_text('{"a": "x"}\n{"a": \n')
    with pytest.raises(ConfigError, match=r"source mine: .*a\.jsonl, line 2: not JSON"):
        load(SourceSettings(name="mine", path=str(tmp_path / "a.jsonl"), columns=columns))


def unreachable(self, *args, **kwargs):
    import httpx2

    raise httpx2.ConnectError("no route to host")


def test_hub_out_of_reach_says_how_to_use_a_file(monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"GAIR/lima can't be had from the Hub \(.*no route to host\).*path: FILE"):
        origin_of(SourceSettings(name="lima"))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that has every dataset, where only those in `gated` need a token that it is not given."""
    import httpx2
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    gated: set[str] = set()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def check(self, repository, repo_type):
        if repository in gated:
            response = httpx2.Response(401, request=httpx2.Request("GET", "https://huggingface.co"))
            raise GatedRepoError("401 Client Error", response=response)

    info = type("Info", (), {"sha": "a" * 40})()
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *given, **options: info)
    monkeypatch.setattr(huggingface_hub.HfApi, "auth_check", check)
    return gated


def test_a_gated_dataset_without_a_token_is_known_before_it_is_read(hub):
    for name in ("lima", "open_platypus", "quac"):
        assert source_problem(SourceSettings(name=name)) == ""
    hub.add("GAIR/lima")
    problem = source_problem(SourceSettings(name="lima"))
    assert problem.startswith(
        "source lima: GAIR/lima is gated: accept its terms at https://huggingface.co/datasets/GAIR"
    )
    assert "set HF_TOKEN" in problem and "\n" not in problem
    assert source_problem(SourceSettings(name="open_platypus")) == ""


def test_what_is_not_there_is_known_before_it_is_read(hub, monkeypatch, tmp_path):
    import huggingface_hub

    columns = {"output": "a"}
    file = tmp_path / "a.jsonl"
    assert "source mine: " in source_problem(SourceSettings(name="mine", path=str(file), columns=columns))
    file.write_text('{"a": "x"}\n')
    assert source_problem(SourceSettings(name="mine", path=str(file), columns=columns)) == ""

    for error in (OSError("no route to host"), RuntimeError("no route to host")):  # requests', hf_xet's
        monkeypatch.setattr(huggingface_hub.HfApi, "auth_check", lambda *given, error=error, **options: throw(error))
        assert "can't be had from the Hub (no route to host)" in source_problem(SourceSettings(name="openbookqa"))


def test_a_pipeline_s_datasets_are_here_before_it_starts(hub, monkeypatch, tmp_path):
    import huggingface_hub

    asked = []
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-0.parquet").touch()

    def download(repository, *, local_files_only, **options):
        asked.append(local_files_only)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert source_problem(SourceSettings(name="open_platypus"), download=True) == "" and asked == [False]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *given, **options: throw(OSError("no route")))
    assert "(no route)" in source_problem(SourceSettings(name="open_platypus"), download=True)


def throw(error):
    raise error


def test_every_revision_is_one_that_downloads_take():
    """A branch, or a commit's complete hash: the Hub gives nothing for a short one."""
    found = {known.revision for known in HUB_DATASETS.values()}
    assert all(one == "main" or (len(one) == 40 and int(one, 16)) for one in found), found


def test_a_file_may_be_a_link_as_the_hubs_cache_has_it(tmp_path):
    blob = tmp_path / "0123abcd"
    blob.write_text('{"a": "x", "b": "y"}\n')
    (tmp_path / "rows.jsonl").symlink_to(blob)
    columns = {"input": "a", "output": "b"}
    source = SourceSettings(name="mine", path=str(tmp_path / "rows.jsonl"), columns=columns)
    assert [len(table) for table in read_source(source, origin_of(source))] == [1]


def test_a_revision_without_the_dataset_s_files(hub, monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *given, **options: str(tmp_path))
    source = SourceSettings(name="open_platypus")
    with pytest.raises(ConfigError, match=r"holds no data/train-\*\.parquet; set revision"):
        list(read_source(source, origin_of(source)))


@pytest.mark.parametrize("is_offline", [True, False])
def test_what_is_in_the_local_cache_needs_no_network(is_offline, hub, monkeypatch, tmp_path):
    import huggingface_hub

    def offline(self, *args, **kwargs):
        raise huggingface_hub.errors.OfflineModeIsEnabled("offline")

    sources = {
        "lima": ("GAIR--lima", "a" * 40, "train.jsonl"),  # a branch
        "openbookqa": ("allenai--openbookqa", HUB_DATASETS["openbookqa"].revision, "main/train-0.parquet"),
    }
    assert origin_of(SourceSettings(name="lima")).revision == "a" * 40  # what the Hub said is remembered
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", is_offline)
    for call in ("dataset_info", "list_repo_tree", "auth_check"):
        monkeypatch.setattr(huggingface_hub.HfApi, call, offline if is_offline else unreachable)
    for name, (folder, commit, file) in sources.items():
        source, place = (
            SourceSettings(name=name),
            tmp_path / "cache" / f"datasets--{folder}" / "snapshots" / commit / file,
        )
        assert "can't be had from the Hub" in source_problem(source)
        place.parent.mkdir(parents=True)
        (tmp_path / "cache" / f"datasets--{folder}" / "snapshots" / ("b" * 40)).mkdir()  # an older one
        assert "can't be had from the Hub" in source_problem(source)  # without these files
        write(place.parent, RECORDS[name], place.suffix[1:])
        (place.parent / f"data{place.suffix}").rename(place)
        assert source_problem(source) == ""
        assert origin_of(source).revision == commit
        assert len(load(source)[0]) == len(EXPECTED[name])
    with pytest.raises(ConfigError, match="can't be had from the Hub"):
        origin_of(SourceSettings(name="lima", revision="v2"))


def test_a_branch_is_resolved_to_its_commit(hub, monkeypatch):
    import huggingface_hub

    asked = []

    def info(self, repository, *, revision, **options):
        asked.append((repository, revision))
        return type("Info", (), {"sha": "a" * 40})()

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    assert origin_of(SourceSettings(name="lima")).revision == "a" * 40
    assert origin_of(SourceSettings(name="quac")).revision == HUB_DATASETS["quac"].revision  # a commit, as it is
    origin_of(SourceSettings(name="quac", revision="main"))
    assert asked == [("GAIR/lima", "main"), ("allenai/quac", "main")]
