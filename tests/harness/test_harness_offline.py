"""The real lm-evaluation-harness on questions of ours and a tiny model, without a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from birbal_ray.cli.main import main
from birbal_ray.evaluate.benchmarks import BENCHMARKS, FILE
from birbal_ray.evaluate.config import HarnessConfig
from birbal_ray.evaluate.leaderboard import METRICS, place_models

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'birbal-ray[harness]'")

COLOURS = ["red", "dark blue", "green as grass", "a pale, pale yellow", "grey", "violet"]
THINGS = ["the sky", "a lemon", "this door", "her old bicycle", "snow at noon", "the third stone", "a plum", "tea"]
CHOICE_TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: What colour has {{{{thing}}}}?\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata: {{version: 1.0}}
"""
TEXT_TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n\\n"], do_sample: false, max_gen_toks: 6}}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata: {{version: 1.0}}
"""


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


@pytest.fixture
def include(tmp_path: Path) -> Path:
    """A folder of task files: TruthfulQA's name with questions of ours, a task of ours."""
    folder = tmp_path / "include"
    folder.mkdir()
    for name, rows in (("truthfulqa_mc1", choice_rows()), ("our_colours", choice_rows()[:5])):
        write_task(folder, CHOICE_TASK, name, rows)
    return folder


def choice_rows() -> list[dict[str, Any]]:
    rows = []
    for number, thing in enumerate(THINGS):
        choices = [COLOURS[(number + step) % len(COLOURS)] for step in range(2 + number % 3)]
        rows.append({"thing": thing, "choices": choices, "label": number % len(choices)})
    return rows


def write_task(folder: Path, template: str, name: str, rows: list[dict[str, Any]]) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{name}.yaml").write_text(template.format(name=name, data=data, cache=folder.parent / "cache"))


def model_of(folder: Path, adapter: Path | None = None) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def accuracies(folder: Path, rows: list[dict[str, Any]], adapter: Path | None = None) -> tuple[float, float]:
    """(acc, acc_norm) from log-likelihoods computed here, one sequence at a time."""
    import torch

    model, tokenizer = model_of(folder, adapter)
    plain = normed = 0
    for row in rows:
        context = f"Question: What colour has {row['thing']}?\nAnswer:"
        sums = []
        for choice in row["choices"]:
            start = len(tokenizer(context)["input_ids"])
            ids = tokenizer(f"{context} {choice}", return_tensors="pt")["input_ids"]
            with torch.no_grad():
                logs = torch.log_softmax(model(input_ids=ids).logits[0].double(), -1)
            sums.append(sum(float(logs[at - 1, ids[0, at]]) for at in range(start, ids.shape[1])))
        by_length = [total / len(choice) for total, choice in zip(sums, row["choices"], strict=True)]
        plain += sums.index(max(sums)) == row["label"]
        normed += by_length.index(max(by_length)) == row["label"]
    return plain / len(rows), normed / len(rows)


def birbal(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def adapter(tiny_model: Path, tmp_path: Path) -> Path:
    """A LoRA adapter with random weights, strong enough to change answers."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=512, target_modules=["v_proj", "down_proj", "lm_head"], init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config)
    model.save_pretrained(tmp_path / "lora")
    return tmp_path / "lora"


def test_figures_equal_own_log_likelihoods_and_are_not_measured_twice(tiny_model, include, tmp_path, monkeypatch):
    out = tmp_path / "out"
    command = ["harness", "--model", tiny_model, "--output", out, "--include-path", include, "--device", "cpu"]
    first = birbal(*command, "--task", "our_colours", "--format", "json")
    assert first.exit_code == 0, first.output
    acc, acc_norm = accuracies(tiny_model, choice_rows()[:5])
    rows = {row["metric"]: row for row in json.loads(first.stdout)}
    assert rows["our_colours: acc,none"]["value"] == pytest.approx(acc)
    assert rows["our_colours: acc_norm,none"]["value"] == pytest.approx(acc_norm)
    assert rows["our_colours: acc,none"]["documents"] == 5
    assert json.loads((out / "results.json").read_text())["metrics"] == {}

    # A benchmark is added to the run: what is finished is not run again.
    task_file = out / "tasks" / "our_colours.json"
    before = task_file.stat().st_mtime_ns
    second = birbal(*command, "--task", "our_colours", "--benchmark", "truthfulqa", "--team", "tiny")
    assert second.exit_code == 0, second.output
    assert "not comparable" in second.stderr
    assert task_file.stat().st_mtime_ns == before
    results = json.loads((out / "results.json").read_text())
    acc, acc_norm = accuracies(tiny_model, choice_rows())
    assert 0 < acc < 1 and acc != acc_norm  # else the comparison says little
    assert results["metrics"] == {"TruthfulQA - EM": pytest.approx(acc)}
    raw = json.loads((out / "benchmarks" / "truthfulqa.json").read_text())
    assert raw["results"]["truthfulqa_mc1"]["acc_norm,none"] == pytest.approx(acc_norm)
    assert results["comparable"] is False and "indication" in results["note"]
    assert set(results["metrics"]) | set(results["not_measured"]) == set(METRICS)

    # Everything stands: no model is loaded, nothing is measured.
    def forbidden(*arguments: object, **settings: object) -> None:
        raise AssertionError("run again")

    for name in ("_manager", "load_model", "run_tasks"):
        monkeypatch.setattr(f"birbal_ray.evaluate.harness.{name}", forbidden)
    third = birbal(*command, "--task", "our_colours", "--benchmark", "truthfulqa", "--team", "renamed")
    assert third.exit_code == 0, third.output
    assert "up to date" in third.stderr
    teams, places, _ = place_models([out / "results.json"])
    assert teams["renamed"] == {"TruthfulQA - EM": pytest.approx(acc)}
    assert len(places) == 9
    assert birbal("leaderboard", "--add", out / "results.json").exit_code == 0

    other = birbal(*command, "--task", "our_colours", "--limit", 2)
    assert other.exit_code == 2 and "limit: None → 2" in other.stderr


def test_an_adapter_is_measured(tiny_model, adapter, include, tmp_path):
    out = tmp_path / "out"
    done = birbal(
        *("harness", "--model", tiny_model, "--adapter", adapter, "--output", out, "--include-path", include),
        *("--benchmark", "truthfulqa", "--device", "cpu", "--batch-size", 3),
    )
    assert done.exit_code == 0, done.output
    raw = json.loads((out / "benchmarks" / "truthfulqa.json").read_text())["results"]["truthfulqa_mc1"]
    with_adapter = accuracies(tiny_model, choice_rows(), adapter)
    assert (raw["acc,none"], raw["acc_norm,none"]) == pytest.approx(with_adapter)
    assert with_adapter != accuracies(tiny_model, choice_rows())
    assert json.loads((out / "results.json").read_text())["team"].endswith(" + lora")


def test_generated_text_is_scored_by_own_measures(tiny_model, include, tmp_path):
    model, tokenizer = model_of(tiny_model)
    rows = []
    for number, question in enumerate(["### does rain cause floods", "he # he", "Why", "two plus two is"]):
        ids = tokenizer(question, return_tensors="pt")["input_ids"]
        made = model.generate(ids, attention_mask=ids * 0 + 1, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        text = tokenizer.decode(made, skip_special_tokens=True).split("\n\n")[0]
        rows.append({"question": question, "answer": text if number != 1 and text.strip() else "something else"})
    expected = sum(row["answer"] != "something else" for row in rows) / len(rows)
    assert expected > 0
    for name in ("corr2cause", "sam_sum"):
        write_task(include, TEXT_TASK, name, rows)
    out = tmp_path / "out"
    command = ["harness", "--model", tiny_model, "--output", out, "--include-path", include, "--device", "cpu"]
    done = birbal(*command, "--benchmark", "corr2cause", "--benchmark", "sam_sum", "--batch-size", 1)
    assert done.exit_code == 0, done.output
    metrics = json.loads((out / "results.json").read_text())["metrics"]
    assert metrics["corr2cause - EM"] == pytest.approx(expected)
    assert 0 <= metrics["sam_sum - ROUGE-2"] <= 1
    raw = json.loads((out / "benchmarks" / "corr2cause.json").read_text())
    assert "samples" not in raw


def test_data_out_of_reach_is_named_and_the_rest_is_kept(tiny_model, include, tmp_path):
    text = (include / "truthfulqa_mc1.yaml").read_text()
    absent = text.replace("truthfulqa_mc1", "absent_one", 1).replace("dataset_path: json", "dataset_path: owner/absent")
    (include / "absent_one.yaml").write_text(absent)
    out = tmp_path / "out"
    command = ["harness", "--model", tiny_model, "--output", out, "--include-path", include, "--device", "cpu"]
    done = birbal(*command, "--task", "absent_one", "--benchmark", "truthfulqa", "--limit", 3)
    assert done.exit_code == 1, done.output
    error = next(line for line in done.stderr.splitlines() if line.startswith("error:"))
    assert "owner/absent" in error and "--include-path" in error
    assert not (out / "manifest.json").exists()
    results = json.loads((out / "results.json").read_text())
    assert list(results["metrics"]) == ["TruthfulQA - EM"] and results["note"].startswith("only the first 3 documents")


def test_wrong_usage_writes_nothing(tiny_model, include, tmp_path):
    out = tmp_path / "out"
    command = ["harness", "--model", tiny_model, "--output", out, "--include-path", include]
    for arguments, reason in (
        (["--benchmark", "mmul"], "unknown benchmark 'mmul' (did you mean 'mmlu'?)"),
        (["--task", "../etc"], "--task ../etc: not a task's name"),
        (["--batch-size", "many"], "--batch-size many: expected a number from 1, or auto"),
        (["--adapter", include], "no adapter_config.json"),
        (["--include-path", tmp_path / "nowhere"], "nowhere: no such folder"),
    ):
        done = birbal(*command, "--task", "our_colours", *arguments)
        assert done.exit_code == 2, done.output
        assert reason in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not out.exists()


def test_dry_run_shows_what_would_run(tiny_model, include, tmp_path):
    done = birbal(
        *("harness", "--model", tiny_model, "--output", tmp_path / "out", "--include-path", include),
        *("--benchmark", "truthfulqa", "--task", "our_colours", "--dry-run", "--format", "json"),
    )
    assert done.exit_code == 0, done.output
    assert [row["benchmark"] for row in json.loads(done.stdout)] == ["truthfulqa", "our_colours"]
    assert not (tmp_path / "out").exists()


def test_every_mapped_task_and_measure_is_in_the_installed_harness():
    from birbal_ray.evaluate import harness

    def runs(*names):
        return harness.select_runs(HarnessConfig(model="m", output="o", tasks=list(names)))

    entries = harness.task_index(None, runs("mmlu")).task_index
    for benchmark in BENCHMARKS.values():
        metric, _, chosen_filter = benchmark.measure.partition(",")
        for task in benchmark.tasks:
            if benchmark.lacks == FILE:
                assert task not in entries, f"the harness now has {task}"
                continue
            config = entries[task].cfg
            metrics = [one["metric"] for one in config.get("aggregate_metric_list") or config["metric_list"]]
            assert metric in metrics, task
            filters = [one["name"] for one in config.get("filter_list", [])] or ["none"]
            assert chosen_filter in filters, task
    with pytest.raises(ValueError, match=r"task 'gsm9k'.*did you mean 'gsm8k'"):
        harness.task_index(None, runs("gsm8k", "gsm9k"))
