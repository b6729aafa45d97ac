"""`birbal evaluate --gate DELTA`: exit 1 where a scope lost more than DELTA, zero-shot or few-shot."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from birbal_ray.cli.main import main
from birbal_ray.evaluate import run as step
from birbal_ray.storage import open_folder, read_json
from tests.fixtures.made_run import make_evaluation
from tests.fixtures.score_folder import made_up_rows


@pytest.fixture
def evaluate(tmp_path, monkeypatch):
    """evaluate(gain, *options) → (click's result, COMPARISONS rows) of a finished evaluation with this mean gain."""

    def run(gain, *options):
        folder = open_folder(tmp_path / f"gain {gain}")
        if not folder.files():
            make_evaluation(folder.local, made_up_rows(8, 2), ("adapter",), gain)
        tables = [folder.read_table(f"{name}.parquet").to_pylist() for name in ("evaluation", "comparisons")]
        done = step.EvaluateResult(folder, read_json(folder.local / "manifest.json"), *tables)
        monkeypatch.setattr(step, "evaluate", lambda config, *, overwrite: done)
        arguments = ["evaluate", "--output", folder.place, "--format", "json", *map(str, options)]
        return CliRunner().invoke(main, arguments), done.comparisons

    return run


def test_a_loss_beyond_delta_on_any_scope_is_exit_code_1_and_named(evaluate):
    result, comparisons = evaluate(-0.1)
    assert result.exit_code == 0, "without a gate, an evaluation is a finding"
    losses = sorted(-row["difference"] for row in comparisons)
    assert losses[0] > 0
    middle = (losses[2] + losses[3]) / 2
    result, _ = evaluate(-0.1, "--gate", middle)
    assert result.exit_code == 1
    assert json.loads(result.stdout), "the table is printed all the same"
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    worse = [row for row in comparisons if -row["difference"] > middle]
    assert line.count("worse than the base model") == len(worse) == len(losses) - 3
    assert {row["prompt_format"] for row in worse} == {"zero_shot", "few_shot"}
    for row in worse:
        assert f"{-row['difference']:.3f} worse than the base model, {row['prompt_format']}, {row['scope']} (" in line


def test_a_loss_within_delta_and_a_gain_pass(evaluate):
    _, comparisons = evaluate(-0.1)
    largest = max(-row["difference"] for row in comparisons)
    assert evaluate(-0.1, "--gate", largest + 1e-6)[0].exit_code == 0
    assert evaluate(-0.1, "--gate", largest - 1e-6)[0].exit_code == 1
    assert evaluate(0.3, "--gate", 0)[0].exit_code == 0


def test_a_gate_that_is_no_share_of_a_score_is_refused(evaluate):
    for gate in ("-0.1", "nan", "2"):
        result, _ = evaluate(0.3, "--gate", gate)
        assert result.exit_code == 2 and "gate" in result.stderr


def test_a_pipeline_ends_with_the_gate_s_verdict(evaluate, tmp_path, monkeypatch):
    from birbal_ray import pipeline
    from birbal_ray.cli import recipe

    _, comparisons = evaluate(-0.1)
    done = step.evaluate(None, overwrite=False)
    monkeypatch.setattr(recipe, "explain_command", lambda mix: "birbal mix explain x")

    def run_pipeline(config, *, overwrite, announce, show):
        show["evaluate"](done)
        return "report.html"

    monkeypatch.setattr(pipeline, "run_pipeline", run_pipeline)
    for gate, code in (("0.0", 1), ("1.0", 0)):
        result = CliRunner().invoke(
            main, ["pipeline", "--output", str(tmp_path / "p"), "--set", f"evaluate.gate={gate}"]
        )
        assert result.exit_code == code, result.output
        assert result.stderr.count("error: adapter is") == code
        assert "everything else on one page: report.html" in result.stderr
    assert len(comparisons) > 1
