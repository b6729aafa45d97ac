"""An evaluation's folder, without engines: what may not change once its result is known, what a killed one leaves."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pyarrow as pa
import pytest

from birbal_ray.evaluate import run as step
from birbal_ray.evaluate.config import EvaluateConfig
from birbal_ray.progress import ProgressLine
from birbal_ray.run import RunMismatchError, open_run
from birbal_ray.schemas import COMPARISONS, COMPARISONS_FILE, EVALUATION, EVALUATION_FILE
from birbal_ray.score.plan import plan_run
from birbal_ray.settings import ConfigError
from birbal_ray.storage import cache_folder, read_json
from tests.fixtures.tensors import write_tensors


@pytest.fixture
def config(tmp_path, write_task):
    """Of a simulated base model and one adapter."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    write_tensors(tmp_path / "mine" / "adapter_model.safetensors", {"a.lora_A.weight": [1, 1]})
    return EvaluateConfig(
        tasks={"path": str(write_task("warm"))},
        engine={"backend": "simulated", "device": "cpu"},
        adapters=[str(tmp_path / "mine")],
        output=str(tmp_path / "run"),
    )


def finish(config):
    """A finished evaluation, its rows made up."""
    setup = step.prepare_evaluation(config)
    plan = plan_run(setup.scoring, ProgressLine(), excluded=setup.held_out.keys)
    figures = {"num_tasks": 1, "p_value": 1.0, "p_adjusted": 1.0, "is_primary": True}
    numbers = {
        field.name: 0.0 if pa.types.is_floating(field.type) else 0
        for field in COMPARISONS
        if pa.types.is_floating(field.type) or pa.types.is_integer(field.type)
    }
    rows = [{**numbers, **figures, **setup.primary()}]
    with open_run(config.output, step.STEP, step.identify_evaluation(setup, plan)) as run:
        files = {
            EVALUATION_FILE: run.folder.write_parquet(EVALUATION_FILE, EVALUATION.empty_table()),
            COMPARISONS_FILE: run.folder.write_parquet(COMPARISONS_FILE, pa.Table.from_pylist(rows, COMPARISONS)),
        }
        run.finish({"asked": setup.asked}, files, summary="")


def test_the_primary_comparison_can_not_be_chosen_when_its_result_is_known(config, capsys):
    finish(config)
    kept = step.evaluate(config)
    assert (kept.evaluation, kept.comparisons[0]["model"]) == ([], "mine"), "each from its own table"
    assert "is up to date" in capsys.readouterr().err
    assert step.evaluate(config.replace({"primary.model": "mine"})).comparisons, "the same, in other words"
    with pytest.raises(ConfigError, match=r"primary.prompt_format: zero_shot → few_shot"):
        step.evaluate(config.replace({"primary.prompt_format": "few_shot"}))


@pytest.mark.parametrize("key", ["model.name", "tasks.label_overrides"])
def test_overwriting_deletes_neither_the_base_model_nor_the_labels(config, asked, tmp_path, key):
    """`inputs/` in the folder is the step's own."""
    finish(config)
    mine = tmp_path / "run" / "inputs" / "mine"
    mine.mkdir(parents=True)
    (mine / "labels.csv").write_text("name,label,reason\n")
    with pytest.raises(ConfigError, match=r"this folder holds an input \(.*inputs/mine"):
        asked(config.replace({key: str(mine if key == "model.name" else mine / "labels.csv")}), overwrite=True)
    assert (mine / "labels.csv").exists()


def test_nor_while_a_further_model_is_not_finished(config, asked, tmp_path):
    finish(config)
    wider = second(config, tmp_path)
    before = (tmp_path / "run" / "manifest.json").read_bytes()
    asked(wider)
    assert (tmp_path / "run" / "manifest.json").read_bytes() == before, "what is known stays until more is known"
    with pytest.raises(ConfigError, match=r"primary.model: mine → other"):
        asked(wider.replace({"primary.model": "other"}))


@pytest.mark.parametrize(
    ("most", "fraction"), [(None, (90 + 12) / 112), (50, (50 + 12) / 62), (12, 1.0), (99, 102 / 111)]
)
def test_the_fraction_that_is_asked_counts_each_task_with_what_it_can_give(most, fraction):
    """Two tasks of 100 and 12 instances; a mix considered ten of the first."""
    tasks = [
        SimpleNamespace(num_available=available, num_instances=min(most or available, available - considered))
        for available, considered in ((100, 10), (12, 0))
    ]
    plan = SimpleNamespace(tasks=tasks, num_rows=sum(task.num_instances for task in tasks))
    assert step.asked_fraction(plan, most) == pytest.approx(fraction)


def test_only_this_runs_folded_models_are_cleared_away(tmp_path, monkeypatch):
    """For runs at URLs they lie in the machine's cache, where another evaluation may be at work."""
    monkeypatch.setenv("BIRBAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(step, "load_with_adapter", lambda *arguments: None)
    monkeypatch.setattr(step, "merge_adapter", lambda model, base, folder: folder.mkdir())
    monkeypatch.setattr(step, "resolve_model", lambda path: SimpleNamespace(fingerprint="f"))
    engine = SimpleNamespace(dtype="float32", device="cpu")
    setup = SimpleNamespace(
        scoring=SimpleNamespace(engine=engine), model=SimpleNamespace(path=tmp_path), scoring_of=lambda path: path
    )
    one = SimpleNamespace(kind=step.ADAPTER, name="mine", path=str(tmp_path), fingerprint="a")
    places = [SimpleNamespace(is_local=False, place=f"s3://bucket/{name}") for name in "ab"]
    with step._model_of(setup, [one], places[0], ProgressLine()) as (first, _):
        left = [file for file in cache_folder().rglob(".folded-*") if file.is_dir()]
        with step._model_of(setup, [one], places[1], ProgressLine()) as (second, _):
            assert left[0].exists() and first != second
    (left[0].parent / ".folded-killed" / "mine").mkdir(parents=True)
    with step._model_of(setup, [one], places[0], ProgressLine()):
        assert not (left[0].parent / ".folded-killed").exists()


@pytest.fixture
def asked(monkeypatch):
    """asked(config) calls `evaluate` without engines: the models and prompt formats that it would ask for."""
    monkeypatch.setattr(step, "_score", lambda *arguments: None)
    monkeypatch.setattr(step, "_finish", lambda setup, plan, run: [one.name for one in setup.models])
    return step.evaluate


def second(config, tmp_path, value=1):
    """The same evaluation, with another adapter behind the first."""
    (tmp_path / "other").mkdir(exist_ok=True)
    (tmp_path / "other" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    write_tensors(tmp_path / "other" / "adapter_model.safetensors", {"a.lora_A.weight": [1, 1]}, value)
    return config.replace({"adapters": [*config.adapters, str(tmp_path / "other")]})


def test_a_further_adapter_or_prompt_format_keeps_the_rows_that_are_there(config, asked, tmp_path):
    fewer = config.replace({"prompt_formats": ["zero_shot"]})
    for wider in (second(fewer, tmp_path), config, second(config, tmp_path)):
        finish(fewer)
        row = tmp_path / "run" / "rows" / "kept.parquet"
        row.parent.mkdir(exist_ok=True)
        row.write_bytes(b"rows")
        kept = (tmp_path / "run" / "run.json").read_bytes()
        assert asked(wider) == ["base", "mine", "other"][: len(wider.adapters) + 1]
        assert read_json(tmp_path / "run" / "manifest.json")["asked"].keys() == {"base/zero_shot", "mine/zero_shot"}
        assert row.exists() and (tmp_path / "run" / "run.json").read_bytes() == kept


def test_a_result_that_is_known_stays_among_the_compared(config, asked, tmp_path):
    """Without it the others' p-values would be adjusted for fewer comparisons."""
    finish(second(config, tmp_path))
    (tmp_path / "third").mkdir()
    for file in (tmp_path / "other").iterdir():
        (tmp_path / "third" / file.name).write_bytes(file.read_bytes())
    asked(second(config, tmp_path).replace({"adapters": [*second(config, tmp_path).adapters, str(tmp_path / "third")]}))
    before = (tmp_path / "run" / "manifest.json").read_bytes()
    for changes, value, line in (
        ({"adapters": config.adapters}, 1, r"models.other/zero_shot: [0-9a-f]+ → \(none\)"),
        ({"prompt_formats": ["zero_shot"]}, 1, r"models.mine/few_shot: [0-9a-f]+ → \(none\)"),
        ({"tasks.instances_per_task": 1}, 1, r"plan: "),
        ({}, 2, r"models.other/few_shot: [0-9a-f]+ → [0-9a-f]+\n"),
    ):
        with pytest.raises(RunMismatchError, match=line):
            asked(second(config, tmp_path, value).replace(changes))
    assert (tmp_path / "run" / "manifest.json").read_bytes() == before


def test_rows_lie_where_their_model_s_weights_are_named(config, tmp_path):
    """A name that is given to another adapter finds no rows of the one before."""
    folders = []
    for value in (1, 2):
        *_, other = (setup := step.prepare_evaluation(second(config, tmp_path, value))).models
        folders += [variant.folder for variant in setup.variants(other)]
        assert folders[-1] == f"other-{other.fingerprint[:12]}/few_shot/"
    assert len(set(folders)) == 4


def test_an_adapter_in_front_would_be_another_primary_comparison(config, asked, tmp_path):
    finish(config)
    wider = second(config, tmp_path)
    with pytest.raises(ConfigError, match=r"primary.model: mine → other"):
        asked(wider.replace({"adapters": wider.adapters[::-1]}))
    assert asked(config).comparisons, "the refusal left the finished evaluation as it was"
