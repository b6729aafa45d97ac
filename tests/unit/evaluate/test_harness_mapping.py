"""Benchmarks of the harness mapped to the leaderboard's metrics, without the harness."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
from click.testing import CliRunner

from birbal_ray.cli.main import main
from birbal_ray.evaluate import harness
from birbal_ray.evaluate.benchmarks import (
    BENCHMARKS,
    BIG_BENCH,
    BIG_BENCH_LEFT_OUT,
    FILE,
    choose,
    leaderboard_metrics,
    listing,
    not_measured,
    result_rows,
    results_file,
    sample_measure,
)
from birbal_ray.evaluate.config import HarnessConfig
from birbal_ray.evaluate.leaderboard import METRICS, SCENARIOS, load_results
from birbal_ray.run import RunError
from birbal_ray.settings import ConfigError


def raw(task, measure, value, stderr=0.01, documents=50, shots=5):
    """What the harness returns, as far as it is read."""
    return {
        "results": {task: {"alias": task, measure: value, measure.replace(",", "_stderr,"): stderr}},
        "n-samples": {task: {"original": documents, "effective": documents}},
        "n-shot": {task: shots},
    }


def test_every_metric_is_measured_or_has_a_reason():
    measured = [benchmark.metric for benchmark in BENCHMARKS.values()]
    assert len(measured) == len(set(measured)) == 13
    assert set(measured) | set(not_measured()) == set(METRICS)
    assert not set(measured) & set(not_measured())
    assert {METRICS[name].scenario for name in measured} == set(SCENARIOS)
    assert [row["metric"] for row in listing()] == list(METRICS)
    assert all("Robustness" in name or "Fairness" in name or name.startswith("sam_sum") for name in not_measured())
    assert all(row["remark"] for row in listing() if row["needs"])
    assert [row["benchmark"] for row in listing() if row["remark"] == FILE] == ["sam_sum", "corr2cause"]


def test_big_bench_is_the_organisers_list_and_what_the_harness_lacks_is_said():
    assert len({*BIG_BENCH, *BIG_BENCH_LEFT_OUT}) == 18
    assert BENCHMARKS["bigbench"].tasks == tuple(f"bigbench_{name}_multiple_choice" for name in BIG_BENCH)
    (row,) = [row for row in listing() if row["benchmark"] == "bigbench"]
    assert "14 of the organisers' 18 tasks" in row["remark"]
    assert all(name in row["remark"] for name in BIG_BENCH_LEFT_OUT)


def test_harness_results_become_metrics():
    found = leaderboard_metrics(
        {
            "gsm8k": {"results": {"gsm8k": {"exact_match,strict-match": 0.41, "exact_match,flexible-extract": 0.5}}},
            "mmlu": raw("mmlu", "acc,none", 0.62),
        }
    )
    assert found == {"MMLU - EM": 0.62, "GSM8K - EM": 0.41}


def test_several_tasks_are_averaged_plainly():
    tasks = BENCHMARKS["bigbench"].tasks
    values = {task: {"acc,none": number / 20} for number, task in enumerate(tasks)}
    assert leaderboard_metrics({"bigbench": {"results": values}}) == {"BIG-bench - EM": pytest.approx(0.325)}
    del values[tasks[3]]
    with pytest.raises(RunError, match=f"benchmark bigbench: task '{tasks[3]}' gave None as 'acc,none'.*nothing"):
        leaderboard_metrics({"bigbench": {"results": values}})


@pytest.mark.parametrize("value", [None, "0.5", True, math.nan, 1.5, -0.1])
def test_a_value_that_is_no_fraction_is_refused(value):
    with pytest.raises(RunError, match="expected a number from 0 to 1"):
        leaderboard_metrics({"mmlu": raw("mmlu", "acc,none", value)})


def test_results_file_is_what_the_leaderboard_reads(tmp_path):
    content = results_file(
        "mine", {"mmlu": raw("mmlu", "acc,none", 0.62)}, {}, limit=None, failures={"gsm8k": "no data"}
    )
    (tmp_path / "results.json").write_text(json.dumps(content))
    assert load_results(tmp_path / "results.json")[:2] == ("mine", {"MMLU - EM": 0.62})
    assert content["comparable"] is False
    assert content["not_measured"]["GSM8K - EM"] == "not run: no data"
    assert content["not_measured"]["BBQ - EM"] == "not run: birbal harness --benchmark bbq"
    assert content["not_measured"]["MMLU - EM (Fairness)"] == "the harness has no perturbed prompts"
    assert len(content["metrics"]) + len(content["not_measured"]) == len(METRICS) == 31


def test_rows_of_benchmarks_and_other_tasks():
    rows = result_rows({"mmlu": raw("mmlu", "acc,none", 0.62)}, {"x": raw("x", "f1,none", 12.5, stderr="N/A", shots=0)})
    assert rows == [
        {"benchmark": "mmlu", "metric": "MMLU - EM", "value": 0.62, "stderr": 0.01, "documents": 50, "shots": 5},
        {"benchmark": "x", "metric": "x: f1,none", "value": 12.5, "stderr": None, "documents": 50, "shots": 0},
    ]


def test_own_measures_from_samples():
    samples = [
        {"filtered_resps": ["Tom meets Ann at six."], "target": "Tom meets Ann at six"},
        {"filtered_resps": ["nothing"], "target": ["Ann is late", "nothing"]},
    ]
    assert sample_measure("exact_match", samples) == 0.5
    assert sample_measure("rouge_2", samples) == 0.5
    with pytest.raises(RunError, match="generate_until"):
        sample_measure("rouge_2", [{"filtered_resps": [(-1.5, False)], "target": 0}])
    with pytest.raises(RunError, match="no documents"):
        sample_measure("rouge_2", [])


def test_unknown_names_are_named_with_the_nearest(monkeypatch):
    assert [one.name for one in choose(["gsm8k", "mmlu", "gsm8k"])] == ["gsm8k", "mmlu"]
    with pytest.raises(ConfigError, match=r"unknown benchmark 'ethics_cm'.*see birbal harness --list"):
        choose(["ethics_cm"])

    class Index:
        all_tasks = ("gsm8k", "mmlu")

    def runs(*names):
        return harness.select_runs(HarnessConfig(model="m", output="o", tasks=list(names)))

    monkeypatch.setattr(harness, "_manager", lambda include, with_defaults: Index())
    assert harness.task_index(None, runs("mmlu")).all_tasks == Index.all_tasks
    assert harness.task_index(None, []) is None
    with pytest.raises(ConfigError, match=r"task 'gsm9k'.*did you mean 'gsm8k'.*--include-path"):
        harness.task_index(None, runs("mmlu", "gsm9k"))


def test_settings_come_from_a_file_from_set_and_from_flags(tmp_path, monkeypatch):
    """Flags win over --set, which wins over the file; a number is a batch size, too."""
    file = tmp_path / "own.yaml"
    file.write_text("model: from-file\noutput: from-file\nlimit: 3\nbatch_size: 4\ntasks: [one]\n")
    seen = []
    monkeypatch.setattr(harness, "dry_run", lambda config: seen.append(config) or [])
    arguments = ["--config", str(file), "--set", "limit=5", "--set", "output=from-set", "--output", "from-flag"]
    done = CliRunner().invoke(main, ["harness", *arguments, "--include-path", str(tmp_path), "--dry-run"])
    assert done.exit_code == 0, done.output
    assert seen == [
        HarnessConfig(
            model="from-file", output="from-flag", limit=5, batch_size="4", tasks=["one"], include_path=tmp_path
        )
    ]
    wrong = CliRunner().invoke(main, ["harness", "--set", "limits=5"])
    assert wrong.exit_code == 2 and "did you mean limit" in wrong.stderr.replace("'", "")


def test_list_needs_no_harness():
    code = (
        "import sys\nsys.modules['lm_eval'] = None\nfrom birbal_ray.cli.main import main\n"
        "try:\n    main(['harness', '--list', '--format', 'csv'])\nexcept SystemExit:\n    pass\n"
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == "[]"
    assert len(done.stdout.splitlines()) == 1 + len(METRICS)
    assert 'GSM8K - EM,gsm8k,gsm8k,"exact_match,strict-match"' in done.stdout


def test_without_the_harness_the_extra_is_named(tmp_path, monkeypatch):
    installed = {"lm_eval": "1"}
    monkeypatch.setattr(harness, "package_versions", lambda: installed)
    with pytest.raises(ConfigError, match="--backend vllm: needs the package vllm"):
        harness.check_installed("vllm")
    installed.clear()
    done = CliRunner().invoke(main, ["harness", "--model", "m", "--output", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert done.stderr.strip() == (
        "error: lm-evaluation-harness is not installed; run: pip install 'birbal-ray[harness]'"
    )
    assert not (tmp_path / "out").exists()
