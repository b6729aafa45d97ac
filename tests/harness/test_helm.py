"""What HELM measured becomes figures, rows and a results file; slow: HELM itself against the server."""

from __future__ import annotations

import contextlib
import json

import pytest
from click.testing import CliRunner

from birbal_ray.cli.main import main
from birbal_ray.evaluate import harness, helm
from birbal_ray.evaluate.config import HarnessConfig
from birbal_ray.manifest import read_manifest
from birbal_ray.models import Model
from birbal_ray.progress import ProgressLine
from birbal_ray.run import RunError, RunFailedError, RunMismatchError
from birbal_ray.settings import ConfigError
from tests.conftest import REPOSITORY, slow

PLUGINS = REPOSITORY / "tests" / "harness" / "helm_plugins"


def stat(measure, mean, *, split="test", count=1, **perturbation):
    about = {"name": measure, "split": split} | ({"perturbation": perturbation} if perturbation else {})
    return {"name": about, "mean": mean, "count": count}


@pytest.fixture
def suite(tmp_path):
    """write(run name, stats…) → the suite's folder, as HELM lays it out."""

    def write(name, *stats):
        (tmp_path / name).mkdir()
        (tmp_path / name / "stats.json").write_text(json.dumps(stats))
        return tmp_path

    return write


def test_a_challenge_scenario_is_a_metric_with_its_perturbations(suite):
    stats = [
        stat("exact_match", 0.5),
        stat("exact_match", 0.9, split="valid"),
        stat("exact_match", 0.4, name="robustness", computed_on="worst"),
        stat("exact_match", 0.45, name="robustness", computed_on="perturbed"),
        stat("exact_match", 0.3, name="fairness", computed_on="worst"),
        stat("num_instances", 20.0),
    ]
    (figure,) = helm.read_figures(suite("mmlu:subject=anatomy,model=neurips_local", *stats)).values()
    assert (figure["metric"], figure["measure"], figure["value"], figure["instances"]) == (
        "MMLU - EM",
        "exact_match",
        0.5,
        20,
    )
    assert figure["perturbed"] == {"MMLU - EM (Robustness)": 0.4, "MMLU - EM (Fairness)": 0.3}


def test_a_metric_is_the_mean_over_its_scenarios_runs_and_others_give_none(suite):
    suite("mmlu:subject=anatomy,model=neurips_local", stat("exact_match", 0.5))
    suite("mmlu:subject=law,model=neurips_local", stat("exact_match", 1.0))
    folder = suite("simple_mcqa:model=neurips_local", stat("exact_match", 0.25))
    written = helm.results("team", helm.read_figures(folder), 20)
    assert written["metrics"] == {"MMLU - EM": 0.75} and written["comparable"] is True
    assert "only 20 instances" in written["note"] and "not scenarios of the challenge: simple_mcqa" in written["note"]


def test_without_a_challenge_scenario_nothing_compares(suite):
    written = helm.results("team", helm.read_figures(suite("simple_mcqa", stat("exact_match", 0.25))), 20)
    assert written["metrics"] == {} and written["comparable"] is False


def test_a_run_without_a_measure_that_is_known_is_an_error(suite):
    with pytest.raises(RunError, match="none of exact_match"):
        helm.read_figures(suite("odd", stat("bleu", 0.5)))


@pytest.mark.parametrize("comparable", [True, False])
def test_the_leaderboard_says_whether_the_figures_compare(tmp_path, comparable):
    file = tmp_path / "results.json"
    figures = {"metric": "GSM8K - EM" if comparable else None, "value": 0.25, "perturbed": {}}
    file.write_text(json.dumps(helm.results("ours", {"gsm": figures}, None)))
    result = CliRunner().invoke(main, ["leaderboard", "--add", str(file), "--format", "json"])
    assert result.exit_code == 0
    assert f"ours: {'' if comparable else 'not '}comparable: measured by HELM (crfm-helm==0.5.16)" in result.stderr
    (row,) = [row for row in json.loads(result.stdout) if row["team"] == "ours"]
    assert (row["GSM8K"] > 0) is comparable


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "m"], "--output is required"),
        (["--model", "m", "--output", "o", "--benchmark", "gsm8k"], "--benchmark has no meaning with --helm"),
        (["--model", "m", "--output", "o", "--backend", "vllm"], "--backend has no meaning with --helm"),
        (["--model", "m", "--output", "o", "--batch-size", "4"], "--batch-size has no meaning with --helm"),
        (["--model", "m", "--output", "o", "--dry-run"], "--dry-run has no meaning with --helm"),
        (["--model", "m", "--output", "o", "--include-path", "configs"], "no *.py there"),
        (["--model", "nowhere", "--output", "o"], "model 'nowhere': no such folder"),
        (["--model", "m", "--output", "s3://b/o"], "--output s3://b/o: HELM writes to a folder of this machine"),
    ],
)
def test_wrong_usage_is_one_line(arguments, message):
    result = CliRunner().invoke(main, ["harness", "--helm", *arguments])
    assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1


@pytest.fixture
def called(tmp_path, monkeypatch):
    """called(options) runs the step without HELM or a server: what `called.says` says goes to its log, a call each."""

    def call(helm_folder, config, entries, url, folder, log):
        asked.append(entries)
        text, code = says.pop(0) if says else ("", 0)
        with log.open("a") as out:
            out.write(text)
        for name in entries:
            entry = folder / "helm" / "runs" / helm.SUITE / name.partition(":")[0]
            entry.mkdir(parents=True, exist_ok=True)
            (entry / "stats.json").write_text(json.dumps([stat("exact_match", 0.5)]))
        return code

    asked, says = [], []
    model = Model("m", tmp_path, None, "f")
    monkeypatch.setattr(helm, "resolve_measured", lambda config: (model, None, {"model": "f"}, config.team or "team"))
    monkeypatch.setattr(helm, "environment", lambda progress: tmp_path)
    monkeypatch.setattr(helm, "_server", lambda *arguments: contextlib.nullcontext("http://127.0.0.1"))
    monkeypatch.setattr(helm, "_call_helm", call)

    def run(*, overwrite=False, **changes):
        return helm.run_helm(HarnessConfig(model="m", output=str(tmp_path / "run"), **changes), overwrite=overwrite)

    run.asked, run.says = asked, says
    return run


def test_overwriting_deletes_no_plugins(called, tmp_path):
    """`helm/` in the folder is the step's own."""
    plugins = tmp_path / "run" / "helm" / "plugins"
    called()
    plugins.mkdir()
    (plugins / "mine.py").write_text("")
    with pytest.raises(ConfigError, match=r"this folder holds an input \(.*helm/plugins\)"):
        called(overwrite=True, include_path=plugins)
    assert (plugins / "mine.py").exists()


def test_plugins_in_the_users_home_are_found(called, tmp_path, monkeypatch):
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "mine.py").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path))
    config = HarnessConfig(model="m", output="o", include_path="~/plugins")
    assert helm.check_options(config).include_path == harness.check_options(config).include_path == tmp_path / "plugins"


@pytest.mark.parametrize("content", ['["crfm-he', "{}", None])
def test_an_environment_that_was_not_finished_is_made_again(tmp_path, monkeypatch, content):
    commands = []
    monkeypatch.setenv("BIRBAL_CACHE", str(tmp_path))
    monkeypatch.setattr(helm.subprocess, "run", lambda command, **options: commands.append(command) or Made())
    folder = tmp_path / "helm" / helm.HELM.rpartition("==")[2]
    if content is not None:
        folder.mkdir(parents=True)
        (folder / "complete.json").write_text(content)
    assert helm.environment(ProgressLine()) == folder / "bin"
    assert len(commands) == 3
    helm.environment(ProgressLine())
    assert len(commands) == 3, "now it is there"


class Made:
    returncode = 0


def test_a_run_remembers_the_requests_that_an_earlier_session_repeated(called):
    """HELM skips what it has measured, so a later session has nothing to repeat."""
    called.says.append(("Retrying (attempt 1)", 0))
    with pytest.raises(RunFailedError, match="HELM repeated 1 requests"):
        called()
    assert called().manifest["num_retries"] == 1


def test_a_finished_run_asks_for_further_entries_only(called, tmp_path, capsys):
    first = called(tasks=["simple_mcqa"])
    again = called(tasks=["simple_mcqa"])
    assert (again.rows, again.manifest, len(called.asked)) == (first.rows, first.manifest, 1)
    assert "is up to date" in capsys.readouterr().err
    more = called(tasks=["gsm"])
    assert [row["entry"] for row in more.rows] == ["gsm", "simple_mcqa"] and called.asked[1:] == [["gsm"]]
    assert called(tasks=["simple_mcqa", "gsm"]).rows == more.rows and len(called.asked) == 2
    assert called(team="another", tasks=["gsm"]).manifest["team"] == "another"


def test_an_edited_plugin_makes_other_figures(called, tmp_path):
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "mine.py").write_text("A = 1")
    options = {"tasks": ["simple_mcqa"], "include_path": tmp_path / "plugins"}
    called(**options)
    (tmp_path / "plugins" / "mine.py").write_text("A = 2")
    with pytest.raises(RunMismatchError, match=r"plugins.mine.py: "):
        called(**options)


def test_what_helm_said_last_is_the_reason(called):
    called.says.append(("first\nno such entry\n", 3))
    with pytest.raises(RunFailedError, match=r"HELM ended with code 3: no such entry \(logs: "):
        called()


@slow
@pytest.mark.vllm
def test_helm_unmodified_runs_to_the_end_without_a_retry(tmp_path):
    """The offline scenarios and one of ours whose prompts HELM must cut: /tokenize and /decode."""
    options = HarnessConfig(
        model="smollm2-135m",
        output=str(tmp_path / "run"),
        tasks=[*helm.OFFLINE_ENTRIES, "birbal_long_prompt"],
        include_path=PLUGINS,
        limit=20,
        device="cpu",
    )
    result = helm.run_helm(options)
    for row in result.rows:
        print(row)
    assert {row["entry"].partition(":")[0] for row in result.rows} == {
        *("simple_mcqa", "simple_classification", "synthetic_reasoning_natural", "dyck_language_np=3"),
        "birbal_long_prompt",
    }
    assert all(0 <= row["value"] <= 1 for row in result.rows)
    assert read_manifest(result.folder, helm.STEP.name)["num_retries"] == 0
    long_prompts = result.folder.local / "helm" / "runs" / helm.SUITE
    (state,) = long_prompts.glob("birbal_long_prompt*/scenario_state.json")
    lengths = [len(one["request"]["prompt"].split()) for one in json.loads(state.read_text())["request_states"]]
    assert len(lengths) == 3 and max(lengths) < 3000, "HELM cut what did not fit"
