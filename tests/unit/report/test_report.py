"""The report: its numbers are the files', its texts are escaped, its bytes repeat, its errors are one line."""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as ET
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from birbal_ray.adapters import adapter_fingerprint
from birbal_ray.cli.main import main
from birbal_ray.evaluate.leaderboard import METRICS
from birbal_ray.manifest import FORMAT
from birbal_ray.report.load import conclusion_of
from birbal_ray.report.plots import draw
from birbal_ray.report.run import report
from birbal_ray.run import MANIFEST_FILE, RunError
from birbal_ray.schemas import EVALUATION
from birbal_ray.settings import ConfigError, sha256_of
from birbal_ray.storage import open_folder, read_json, write_json
from tests.fixtures.made_run import NASTY, make_run
from tests.fixtures.s3_server import BUCKET

PLOTS = ("scores", "mix", "training", "differences", "tasks-zero_shot", "tasks-few_shot")


class Page(HTMLParser):
    """`tables`: id → rows of column → (text, data-value); everything else that tests ask for."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.tags, self.ids, self.links, self.values, self.text = {}, Counter(), [], [], {}, ""
        self._table = self._cell = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags[tag] += 1
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found[name] for name in ("href", "src", "xlink:href") if name in found]
        if tag == "table":
            self._table = self.tables.setdefault(found["id"].removeprefix("table-"), [])
        elif tag == "tr" and self._table is not None:
            self._table.append({})
        elif tag == "td":
            self._cell = found["data-column"]
            self._table[-1][self._cell] = ("", found.get("data-value"))
        elif tag == "dd" and "data-value" in found:
            self.values[found["data-value"]] = True

    def handle_endtag(self, tag):
        self._cell = None if tag == "td" else self._cell
        self._table = None if tag == "table" else self._table

    def handle_data(self, data):
        self.text += data
        if self._cell is not None:
            text, value = self._table[-1][self._cell]
            self._table[-1][self._cell] = (text + data, value)

    def rows(self, table):
        """Without the heading."""
        return [row for row in self.tables[table] if row]


@pytest.fixture(scope="module")
def run_and_plots(tmp_path_factory):
    """A run with its report, and the plots as they were drawn for it."""
    folder, drawn = make_run(tmp_path_factory.mktemp("made") / "run"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("birbal_ray.report.run.draw", lambda sections: drawn.update(draw(sections)) or drawn)
        report(folder)
    return folder, drawn


@pytest.fixture(scope="module")
def run(run_and_plots):
    return run_and_plots[0]


@pytest.fixture(scope="module")
def page(run):
    return Page((run / "report.html").read_text(encoding="utf-8"))


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


@pytest.fixture
def same_plots(run_and_plots, monkeypatch):
    """Those of `run` are taken again: drawing them takes 2.4 s, and these tests look at where they go."""
    monkeypatch.setattr("birbal_ray.report.run.draw", lambda sections: run_and_plots[1])


@pytest.fixture
def without_plots(monkeypatch):
    """These tests look at the text."""
    monkeypatch.setattr("birbal_ray.report.run.draw", lambda *sections: {})


def command(*arguments):
    return CliRunner().invoke(main, ["report", *(str(argument) for argument in arguments)])


def assert_same(cells, row):
    for column, (text, value) in cells.items():
        if isinstance(row[column], float):
            assert float(value) == row[column]
            assert text.replace("−", "-").removeprefix("+") == f"{row[column]:.3f}"
        elif isinstance(row[column], int):
            assert (text, value) == (f"{row[column]:,}", str(row[column]))
        else:
            assert (text, value) == ("–" if row[column] is None else row[column], None)


@pytest.mark.parametrize(
    ("table", "file", "num_columns"),
    [
        ("scores", "score/task_scores.parquet", 7),
        ("mix-tasks", "mix/tasks.parquet", 7),
        ("comparisons", "evaluate/comparisons.parquet", 13),
    ],
)
def test_a_table_holds_its_file(run, page, table, file, num_columns):
    expected = pq.read_table(run / file).to_pylist()
    found = page.rows(table)
    assert len(found) == len(expected) > 0
    for cells, row in zip(found, expected, strict=True):
        assert len(cells) == num_columns
        assert_same(cells, row)


@pytest.mark.parametrize("prompt_format", ["zero_shot", "few_shot"])
def test_before_and_after_holds_the_evaluation(run, page, prompt_format):
    rows = pq.read_table(run / "evaluate" / "evaluation.parquet").to_pylist()
    expected = {(r["task"], r["model"]): r for r in rows if r["prompt_format"] == prompt_format}
    found = page.rows(f"tasks-{prompt_format}")
    assert [cells["task"][0] for cells in found] == sorted({task for task, _ in expected})
    for cells in found:
        task = cells["task"][0]
        scores = {}
        for model in ("base", "adapter"):
            row = expected[task, model]
            mine = {name.partition(":")[2]: cell for name, cell in cells.items() if name.startswith(f"{model}:")}
            scores[model] = row["task_score"]
            assert_same({name: cell for name, cell in mine.items() if name != "difference"}, row)
        assert float(cells["adapter:difference"][1]) == scores["adapter"] - scores["base"]
        assert cells["held_out"][0] == expected[task, "base"]["held_out"]


def test_what_was_left_out_is_the_audit(run, page):
    audit = pq.read_table(run / "mix" / "audit.parquet").to_pylist()
    counts = Counter((row["source"], row["reason"]) for row in audit if not row["kept"])
    found = {cells["reason"][0]: cells for cells in page.rows("dropped")}
    assert found.keys() == {reason for _, reason in counts}
    for reason, cells in found.items():
        assert cells["meaning"][0]
        for source in ("natural_instructions", "notes"):
            assert int(cells[f"source:{source}"][1]) == counts[source, reason]
        assert int(cells["rows"][1]) == sum(count for (_, other), count in counts.items() if other == reason)
    composition = read_json(run / "mix" / MANIFEST_FILE)["composition"]
    for cells, row in zip(page.rows("composition"), composition, strict=True):
        assert_same(cells, row)


def test_training_and_origins_are_the_manifests(run, page):
    lines = [json.loads(line) for line in (run / "train" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert [float(cells["eval_loss"][1]) for cells in page.rows("evaluations")] == losses
    result = read_json(run / "train" / MANIFEST_FILE)["result"]
    for name in ("base_eval_loss", "best_eval_loss", "elapsed_seconds", "train_tokens", "epochs", "num_steps"):
        assert repr(result[name]) in page.values
    assert "57 min 37 s of 1 h 00 min (96.0 %)" in page.text
    for step in ("score", "mix", "train", "evaluate"):
        manifest = read_json(run / step / MANIFEST_FILE)
        assert manifest["identity_hash"] in page.text
        assert f"{step}/manifest.json" in page.text
        assert f"origin-{step}" in page.ids
        assert f"#origin-{step}" in page.links
        for name, version in manifest["packages"].items():
            assert f"{name} {version}" in page.text


def test_texts_from_data_are_escaped(run, page):
    assert page.tags["script"] == 0
    assert NASTY in page.text
    assert any(NASTY.replace("/", "|") in cells["task"][0] for cells in page.rows("scores"))
    for name in PLOTS:
        drawing = (run / "report" / f"{name}.svg").read_text(encoding="utf-8")
        assert "<script" not in drawing
        texts = "".join(ET.fromstring(drawing).itertext())
        assert ("task0003_<script>alert('$x_1$" in texts) == name.startswith("tasks-")


def test_nothing_comes_from_outside(run, page):
    text = (run / "report.html").read_text(encoding="utf-8")
    for forbidden in ("http:", "https:", "@import", "@font-face", "file:", '<link rel="stylesheet'):
        assert forbidden not in text
    assert all(link.startswith("#") or link == "data:," for link in page.links)
    assert text.count("url(") == text.count("url(#")
    assert page.tags["svg"] == len(PLOTS)
    assert len(page.ids) == len(set(page.ids))
    for link in page.links:
        assert link == "data:," or link[1:] in page.ids


def test_the_command_gives_the_same_bytes_for_the_same_inputs(run, copy):
    shutil.rmtree(copy / "report")
    (copy / "report.html").unlink()
    result = command(copy)
    assert result.exit_code == 0
    assert result.stdout == f"{copy / 'report.html'}\n"
    assert "no difference from the base model found" in result.stderr
    names = sorted(path.name for path in (copy / "report").iterdir())
    assert names == sorted(f"{name}.{kind}" for name in PLOTS for kind in ("png", "svg"))
    for name in ("report.html", *(f"report/{name}" for name in names)):
        assert (copy / name).read_bytes() == (run / name).read_bytes(), name
    assert not list(copy.rglob(".tmp-*"))


def test_steps_that_are_not_there_are_named(copy):
    shutil.rmtree(copy / "train")
    shutil.rmtree(copy / "mix")
    (copy / "evaluate" / MANIFEST_FILE).unlink()
    result = report(copy)
    assert result.missing == {"mix": "not run", "train": "not run", "evaluate": "not finished"}
    page = Page(Path(result.file).read_text(encoding="utf-8"))
    for text in ("Mix: not run", "Train: not run", "Evaluate: not finished", "holds no finished train step"):
        assert text in page.text
    assert page.tables.keys() == {"scores", "leaderboard"}
    assert result.conclusions[0].title == "There is no finished evaluation yet"
    assert sorted(path.stem for path in Path(result.plots).glob("*.svg")) == ["scores"]  # the others' plots are gone


def test_a_step_s_own_folder_is_a_run_too(copy):
    result = report(copy / "train")
    assert Path(result.file) == copy / "train" / "report.html"
    assert set(result.missing) == {"score", "mix", "evaluate"}
    assert result.conclusions[0].title == "There is no finished evaluation yet"
    text = Page(Path(result.file).read_text(encoding="utf-8")).text
    assert all(figure in text for figure in ("3.300", "2.059"))  # the section shows them


def test_a_folder_without_steps_is_refused(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / MANIFEST_FILE).write_text('{"name": "an app"}')
    with pytest.raises(ConfigError, match="no finished step in it; expected folders like score, mix, train, evaluate"):
        report(tmp_path)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "run.json").write_text('{"step": "train", "identity": {}}')
    with pytest.raises(RunError, match=r"started, not finished: train"):
        report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_step_s_folder_bears_its_name(copy, without_plots):
    shutil.copytree(copy / "train", copy / "train-2")
    assert report(copy).missing == {}
    (copy / "train").rename(copy / "train-1")
    assert report(copy).missing == {"train": "not run"}


def test_steps_of_other_runs_are_pointed_out(copy, without_plots):
    manifest = read_json(copy / "train" / MANIFEST_FILE)
    write_json(copy / "train" / MANIFEST_FILE, {**manifest, "mix": {"path": "mix", "identity_hash": "f" * 64}})
    page = Page(Path(report(copy).file).read_text(encoding="utf-8"))
    assert "train was made from another mix run than the one in this folder" in page.text


def test_an_evaluation_of_another_adapter_than_train_holds_is_pointed_out(copy, without_plots):
    folder = copy / "train" / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    manifest = read_json(copy / "evaluate" / MANIFEST_FILE)
    manifest["models"][1]["fingerprint"] = adapter_fingerprint(folder)
    write_json(copy / "evaluate" / MANIFEST_FILE, manifest)
    report(copy)
    assert "their numbers don't belong together" not in Page((copy / "report.html").read_text()).text
    (folder / "adapter_model.safetensors").write_bytes(b"trained anew")
    report(copy)
    text = Page((copy / "report.html").read_text()).text
    assert "evaluate asked adapter (" in text
    assert "not the adapter that train holds now" in text
    manifest["models"][1]["kind"] = "merged"
    write_json(copy / "evaluate" / MANIFEST_FILE, manifest)
    report(copy)
    assert "don't belong together" not in Page((copy / "report.html").read_text()).text, "no adapter was asked"


def test_an_added_model_is_placed(run, same_plots, tmp_path):
    name = "<b>mine</b>"
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"team": name, "metrics": dict.fromkeys(list(METRICS)[:20], 0.5)}))
    result = report(run, tmp_path / "out" / "page.html", [results])
    assert Path(result.plots) == tmp_path / "out" / "page-plots"
    assert (Path(result.plots) / "scores.png").read_bytes().startswith(b"\x89PNG")
    page = Page(Path(result.file).read_text(encoding="utf-8"))
    assert page.tags["b"] == 0
    board = {cells["team"][0]: cells for cells in page.rows("leaderboard")}
    assert len(board) == 9
    listed = CliRunner().invoke(main, ["leaderboard", "--add", str(results), "--format", "json"])
    for row in json.loads(listed.stdout):
        assert board[row["team"]]["rank"] == (str(row["rank"]), str(row["rank"]))
        assert float(board[row["team"]]["score_full"][1]) == row["Score_full"]
        assert float(board[row["team"]]["win_rate:MMLU"][1]) == row["MMLU"]
    assert f"{name} would be number {board[name]['rank'][0]} of 9" in " ".join(page.text.split())
    assert "11 of 31 metrics missing, counted as worst" in page.text


def test_without_an_added_model_none_is_placed(page):
    assert "None of the challenge's public benchmarks was run" in " ".join(page.text.split())
    assert len(page.rows("leaderboard")) == 8


@pytest.mark.parametrize(
    ("low", "difference", "high", "num_tasks", "kind", "title"),
    [
        (0.01, 0.05, 0.09, 30, "better", "a is better than the base model by 0.050 (0.010 to 0.090)"),
        (-0.09, -0.05, -0.01, 30, "worse", "a is worse than the base model by 0.050 (0.010 to 0.090)"),
        (1e-4, 0.05, 0.09, 30, "better", "a is better than the base model by 0.050 (less than 0.001 to 0.090)"),
        (-0.01, 0.05, 0.09, 30, "open", "a: no difference from the base model found; the interval contains 0"),
        (0.0, 0.05, 0.09, 30, "open", "a: no difference from the base model found; the interval contains 0"),
        (0.05, 0.05, 0.05, 1, "open", "a: one task can't tell whether it is better than the base model"),
    ],
)
def test_the_conclusion_is_honest(low, difference, high, num_tasks, kind, title):
    found = conclusion_of(
        {
            **{"model": "a", "prompt_format": "zero_shot", "scope": "all", "num_tasks": num_tasks, "p_adjusted": 0.01},
            **{"base_score": 0.3, "score": 0.3 + difference, "difference": difference},
            **{"difference_low": low, "difference_high": high, "num_wins": 1, "num_losses": 2, "num_ties": 3},
        }
    )
    assert (found.kind, found.title) == (kind, title)
    assert found.text.startswith("Zero-shot over ")


@pytest.mark.parametrize(
    ("p_adjusted", "title"),
    [
        (0.049, "a is better than the base model by 0.050 (0.010 to 0.090)"),
        (
            0.05,
            "a: no difference from the base model found; one of several comparisons, p ≥ 0.05 by Holm",
        ),
    ],
)
def test_one_of_several_comparisons_needs_its_adjusted_p_value(p_adjusted, title):
    found = conclusion_of(
        {
            **{"model": "a", "prompt_format": "few_shot", "scope": "all", "num_tasks": 30, "p_adjusted": p_adjusted},
            **{"base_score": 0.3, "score": 0.35, "difference": 0.05, "difference_low": 0.01, "difference_high": 0.09},
            **{"num_wins": 20, "num_losses": 5, "num_ties": 5},
        }
    )
    assert found.title == title


def test_each_model_gets_a_conclusion(tmp_path, without_plots):
    folder = make_run(tmp_path / "run", num_tasks=4, adapters=("first", "second"))
    result = report(folder)
    assert [conclusion.title.split()[0].rstrip(":") for conclusion in result.conclusions] == ["first", "second"]
    page = Page(Path(result.file).read_text(encoding="utf-8"))
    assert {cells["model"][0] for cells in page.rows("comparisons")} == {"first", "second"}
    assert page.tags["h1"] == 1


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["{tmp}/absent"], 2, "absent: no such folder"),
        (["{tmp}"], 2, "no finished step in it"),
        (["{run}", "--output", "{tmp}"], 2, "expected a file name that ends in .html"),
        (["{run}", "--output", "{tmp}/folder.html"], 2, "is a folder, expected a file name"),
        (["{run}", "--output", "{tmp}/x.html", "--add", "{tmp}/absent.json"], 2, "absent.json: no such file"),
    ],
)
def test_what_can_t_be_reported_is_said_in_one_line(run, tmp_path, arguments, code, reason):
    (tmp_path / "folder.html").mkdir()
    result = command(*(text.format(tmp=tmp_path, run=run) for text in arguments))
    assert result.exit_code == code, result.output
    assert reason in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.glob("*.htm?/*")) and not (tmp_path / "x.html").exists()


@pytest.mark.parametrize(
    "damaged", ["score/task_scores.parquet", "mix/audit.parquet", "mix/tasks.parquet", "evaluate/comparisons.parquet"]
)
def test_a_damaged_file_is_named(copy, damaged):
    (copy / damaged).write_bytes(b"no parquet")
    with pytest.raises(RunError, match=damaged.rpartition("/")[2]):
        report(copy)


def test_without_matplotlib_the_reason_is_said(run, monkeypatch):
    monkeypatch.setattr("birbal_ray.report.run.importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r'need matplotlib, which is not installed: pip install "birbal_ray\[train\]"'
    ):
        report(run)


def test_an_evaluation_without_a_mix_is_not_called_held_out(copy, without_plots):
    file = copy / "evaluate" / "evaluation.parquet"
    rows = [{**row, "held_out": "unknown"} for row in pq.read_table(file).to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows, schema=EVALUATION), file)
    with pytest.raises(RunError, match=r"evaluation\.parquet: edited since its run finished"):
        report(copy)
    manifest = read_json(file.with_name(MANIFEST_FILE))
    manifest["files"][file.name]["sha256"] = sha256_of(file)
    write_json(file.with_name(MANIFEST_FILE), manifest)
    text = " ".join(Page(Path(report(copy).file).read_text(encoding="utf-8")).text.split())
    assert "the evaluated models may have been trained on these instances" in text
    assert "none was among the mix's candidates" not in text


def test_results_of_the_harness_are_placed_with_their_caveat(copy, without_plots):
    runs = {
        **{"harness-base": ("harness", {}, False), "harness-adapter": ("harness", {"MMLU - EM": 0.4}, False)},
        **{"harness-few": ("harness", {"MMLU - EM": 0.3}, False), "helm": ("helm", {"MMLU - EM": 0.4}, True)},
    }
    for name, (step, metrics, comparable) in runs.items():
        results = {"team": "mine", "metrics": metrics, "note": "an indication", "comparable": comparable}
        write_json(copy / name / "results.json", results)
        write_json(copy / name / MANIFEST_FILE, {"step": step, "identity": {}, "identity_hash": name, "format": FORMAT})
    result = report(copy, added=[copy / "harness-adapter" / "results.json"])
    page = Page(Path(result.file).read_text(encoding="utf-8"))
    placed = [cells["team"][0] for cells in page.rows("leaderboard") if cells["team"][0].startswith("mine")]
    assert sorted(placed) == ["mine", "mine (harness-few)", "mine (helm)"]  # the run without a metric has no place
    assert "mine: not comparable: an indication." in page.text
    assert "mine (helm): comparable: an indication." in page.text
    assert "harness-base/manifest.json" in page.text


def test_a_run_at_a_url_gives_the_same_page_there(run, same_plots, s3):
    folder = open_folder(f"s3://{BUCKET}/report/run")
    for file in run.rglob("*"):
        if file.is_file() and not file.is_relative_to(run / "report"):
            folder.upload(file, file.relative_to(run).as_posix())
    folder.write_bytes("report/mix.png", b"an earlier one")
    folder.write_bytes("report/tasks-chat.png", b"of a prompt format that is gone")
    others = ("report/notes.txt", "report/mix.csv", "report/tasks-to-do.md")
    for name in others:
        folder.write_bytes(name, b"somebody's")
    result = report(folder.place)
    assert (result.file, result.plots) == (folder.at("report.html"), folder.at("report"))
    assert folder.read_bytes("report.html") == (run / "report.html").read_bytes()
    expected = {f"report/{name}.{kind}" for name in PLOTS for kind in ("svg", "png")}
    assert folder.files("report").keys() == {*expected, *others}
    assert folder.read_bytes("report/mix.png") == (run / "report" / "mix.png").read_bytes()


@pytest.mark.parametrize("step", ["score", "mix", "train", "evaluate"])
def test_a_step_of_another_version_is_refused(copy, without_plots, step):
    manifest = read_json(copy / step / MANIFEST_FILE)
    for other in ({}, {"format": FORMAT + 1}):
        write_json(copy / step / MANIFEST_FILE, {k: v for k, v in manifest.items() if k != "format"} | other)
        done = command(copy)
        assert done.exit_code == 1
        assert f"{step}: another version of birbal_ray made this run, and this one can't report it" in done.stderr


def test_what_was_planned_stands_beside_what_was_taken(copy, page, without_plots):
    assert "times" not in page.tables  # no pipeline made it
    steps = [
        {
            "step": step,
            "work": NASTY,
            "low_seconds": 80.0,
            "high_seconds": 100.0,
            "planned_seconds": 90.0,
            "source": NASTY,
        }
        for step in ("score", "evaluate")
    ]
    write_json(copy / "plan.json", {"budget_seconds": 900, "steps": steps})
    write_json(copy / "clock.json", {"budget_seconds": 900, "spent_seconds": {"score": 78.2}})
    page = Page(Path(report(copy).file).read_text())
    scored, evaluated = page.tables["times"][1:]
    assert [scored[name][0] for name in ("step", "planned", "actual", "difference", "alone")] == [
        *("score", "1 min 30 s", "1 min 18 s", "\u221212 s", "1 min 20 s to 1 min 40 s"),
    ]
    assert scored["work"][0] == scored["source"][0] == NASTY
    assert (evaluated["actual"][0], evaluated["difference"][0]) == ("\u2013", "\u2013")
    assert not page.tags["script"]
    (copy / "plan.json").unlink()
    page = Page(Path(report(copy).file).read_text())
    assert [row["actual"][0] for row in page.tables["times"][1:]] == ["1 min 18 s"]
