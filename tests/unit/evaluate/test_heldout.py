"""What a mix leaves for an evaluation, and who may compete."""

import hashlib
import json
import shutil

import pyarrow.parquet as pq
import pytest

from birbal_ray.evaluate import harness, heldout
from birbal_ray.evaluate.config import EvaluateConfig, HarnessConfig
from birbal_ray.evaluate.heldout import HeldOut, check_names, held_out, resolve_models
from birbal_ray.evaluate.run import prepare_evaluation
from birbal_ray.mix.config import MixConfig
from birbal_ray.mix.run import mix
from birbal_ray.models import Model
from birbal_ray.ni.reader import parse_task
from birbal_ray.ni.schema import order_instances, text_key
from birbal_ray.run import RunError
from birbal_ray.settings import ConfigError
from birbal_ray.storage import read_json, write_json
from tests.fixtures.score_folder import made_up_rows, write_score_folder
from tests.fixtures.tensors import write_tensors


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mix")
    scores = write_score_folder(folder / "scores", made_up_rows(6, 40, seed=2))
    budgets = {"exact_match_budget": 40, "generation_budget": 30}
    mix(MixConfig(scores=str(scores), output=str(folder / "mix"), task_score=budgets))
    return folder / "mix"


def test_every_candidate_of_a_sampled_task_is_left_out(made):
    found = held_out(made)
    audit = pq.read_table(made / "audit.parquet").to_pylist()
    sampled = {row["task"] for row in audit if row["kept"]}
    assert found.sampled == sampled
    dropped = [row for row in audit if not row["kept"] and row["task"] in sampled]
    assert dropped
    assert {row["row_id"] for row in audit if row["task"] in sampled} <= found.keys
    assert not {row["row_id"] for row in audit if row["task"] not in sampled} & found.keys
    assert found.kind(next(iter(sampled))) == "instances"
    assert found.kind("never seen") == "task"


def test_a_text_that_was_trained_on_is_left_out_under_any_id(made, write_task):
    trained = pq.read_table(made / "train.parquet").to_pylist()[0]
    instances = [
        {"id": "new-1", "input": trained["input"], "output": ["x"]},
        {"id": "new-2", "input": "something else", "output": ["x"]},
    ]
    folder = write_task("another", Definition=[trained["instruction"]], Instances=instances)
    task = parse_task("another", (folder / "another.json").read_bytes())
    assert text_key(trained["instruction"], trained["input"]) in held_out(made).keys
    assert [one.instance_id for one in order_instances(task, 0, held_out(made).keys)] == ["new-2"]
    assert len(order_instances(task, 0)) == 2


@pytest.fixture(scope="module")
def other_mix(made, tmp_path_factory):
    """Of the same scores, with rows of generation tasks alone."""
    folder = tmp_path_factory.mktemp("other") / "mix"
    budgets = {"exact_match_budget": 0, "generation_budget": 50, "allow_shortfall": True}
    mix(MixConfig(scores=str(made.parent / "scores"), output=str(folder), task_score=budgets))
    return folder


def trained_on(mix_folder, folder):
    """A training run's folder whose manifest names the mix as it is now."""
    run = adapter(folder, "simulated")
    manifest = read_json(run / "manifest.json")
    identity_hash = read_json(mix_folder / "manifest.json")["identity_hash"]
    write_json(run / "manifest.json", {**manifest, "mix": {"path": str(mix_folder), "identity_hash": identity_hash}})
    return run


def setup_of(*adapters, mix=None, **changes):
    where = {"tasks": {"path": "not read"}, "output": "not written", **changes}
    engine = {"backend": "simulated", "device": "cpu"}
    return prepare_evaluation(
        EvaluateConfig(**where, engine=engine, adapters=[str(one) for one in adapters], mix=mix and str(mix))
    )


def test_of_several_mixes_the_union_is_left_out(made, other_mix, tmp_path):
    one, two = trained_on(made, tmp_path / "one"), trained_on(other_mix, tmp_path / "two")
    both = held_out(made).keys | held_out(other_mix).keys
    assert held_out(other_mix).keys - held_out(made).keys
    assert held_out(made).keys - held_out(other_mix).keys
    for setup in (setup_of(one, two), setup_of(one, two, mix=made), setup_of(two, mix=made)):
        assert setup.held_out.keys == both
        assert set(setup.mixes) == {str(made), str(other_mix)}
        assert setup.held_out.sampled == held_out(made).sampled | held_out(other_mix).sampled
    assert setup_of(one).mixes == setup_of(one, mix=made).mixes == [str(made)]
    assert setup_of(mix=made).held_out.keys == held_out(made).keys
    assert setup_of().held_out == HeldOut(frozenset(), None) and setup_of().held_out.kind("task0") == "unknown"


def test_an_adapter_whose_mix_is_not_there_any_more(made, other_mix, tmp_path):
    moved, run = tmp_path / "moved", trained_on(made, tmp_path / "run")
    shutil.copytree(made, moved)
    for reason, path in (("no such folder", tmp_path / "gone"), ("holds another one by now", other_mix)):
        manifest = read_json(run / "manifest.json")
        manifest["mix"]["path"] = str(path)
        write_json(run / "manifest.json", manifest)
        with pytest.raises(ConfigError, match=f"adapter run: what it was trained on.*{reason}.*--mix DIR"):
            setup_of(run)
        with pytest.raises(ConfigError, match=f"{reason}.*nor is it --mix {other_mix}"):
            setup_of(run, mix=other_mix)
        assert setup_of(run, mix=moved).mixes == [str(moved)], "told by its identity hash"


def test_the_primary_comparison_is_of_a_model_that_was_given(made, tmp_path):
    run = trained_on(made, tmp_path / "run")
    assert setup_of(run).primary() == {"model": "run", "prompt_format": "zero_shot", "scope": "all"}
    assert setup_of(run, primary={"model": "run", "prompt_format": "few_shot"}).primary()["prompt_format"] == "few_shot"
    with pytest.raises(ConfigError, match=r"primary\.model=other: is none of run"):
        setup_of(run, primary={"model": "other"})


def test_an_edited_mix_is_refused(made, tmp_path):
    shutil.copytree(made, tmp_path / "mix")
    audit = (tmp_path / "mix" / "audit.parquet").read_bytes()
    (tmp_path / "mix" / "audit.parquet").write_bytes(audit[:-9] + b"x" + audit[-8:])  # of the same size
    with pytest.raises(RunError, match=r"audit.parquet: edited since its run finished"):
        held_out(tmp_path / "mix")


def test_no_mix_there(tmp_path):
    with pytest.raises(ConfigError, match="expected the output of `birbal mix`"):
        held_out(tmp_path)


def adapter(folder, fingerprint=None, **settings):
    (folder / "adapter").mkdir(parents=True)
    values = {"peft_type": "LORA", "r": 16, **settings}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(values))
    write_tensors(folder / "adapter" / "adapter_model.safetensors", {"a.lora_A.weight": [1, 1]})
    if fingerprint:
        manifest = {
            "step": "train",
            "identity": {"model_fingerprint": fingerprint},
            "mix": {"path": "runs/mix"},
            "model": {"name": "other"},
        }
        (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def model(tmp_path):
    return Model("base-model", tmp_path, None, "f0")


def test_a_training_run_says_its_adapter_and_mix(model, tmp_path):
    run = adapter(tmp_path / "run-7", "f0")
    base, one, two = resolve_models(model, [str(run), f"mine={run / 'adapter'}"], [])
    assert (base.name, base.kind, base.fingerprint) == ("base", "base", "f0")
    assert (one.name, one.rank, one.mix) == ("run-7", 16, "runs/mix")
    assert (two.name, two.path) == ("mine", one.path)
    files = [(run / "adapter" / name).read_bytes() for name in ("adapter_model.safetensors", "adapter_config.json")]
    assert one.fingerprint == hashlib.sha256(b"".join(files)).hexdigest()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: ["nowhere"], "no such folder"),
        (lambda folder: [str(folder)], r"no adapter_config\.json; expected a LoRA adapter"),
        (lambda folder: [str(adapter(folder / "a", peft_type="IA3"))], "peft_type is 'IA3', expected LORA"),
        (lambda folder: [str(adapter(folder / "b", "f1"))], "trained on other with other weights than --model base"),
        (lambda folder: [str(adapter(folder / "c")), f"c={folder / 'c'}"], "two models are named 'c'"),
        (lambda folder: [f"a b={adapter(folder / 'd')}"], "a name takes letters"),
    ],
)
def test_what_is_no_adapter_of_this_model_is_refused(model, tmp_path, make, message):
    with pytest.raises(ConfigError, match=message):
        check_names([one.name for one in resolve_models(model, make(tmp_path), [])])


@pytest.mark.parametrize(
    ("spelled", "name"),
    [
        *((spelled, "merged") for spelled in ("{0}/merged", "{0}/merged/", "../merged", ".", "sub/..")),
        *((spelled, "current") for spelled in ("{0}/current", "../current/", "~/current")),
        ("s3://bucket/models/merged/", "merged"),
    ],
)
def test_a_merged_model_has_the_name_that_its_folder_is_called_by(model, tmp_path, monkeypatch, spelled, name):
    (tmp_path / "merged" / "sub").mkdir(parents=True)
    (tmp_path / "current").symlink_to("merged")
    monkeypatch.setattr(heldout, "resolve_model", lambda path: model)
    monkeypatch.setattr(harness, "resolve_model", lambda name: Model(name, tmp_path, None, "f0"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "merged")
    given = spelled.format(tmp_path)
    assert resolve_models(model, [], [given])[1].name == name
    assert harness.resolve_measured(HarnessConfig(model=given, output="out"))[3] == name


def test_the_harness_names_an_adapter_as_its_folder_is_called(model, tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "resolve_model", lambda name: Model(name, tmp_path, None, "f0"))
    monkeypatch.chdir(tmp_path)
    for name in ("run of today (2)", "base", "läuft"):
        given = str(adapter(tmp_path / name, "f0"))
        config = HarnessConfig(model=".", adapter=given, output="out")
        assert harness.resolve_measured(config)[3] == f"{tmp_path.name} + {name}"
        assert harness.resolve_measured(config.replace({"adapter": f"mine={given}"}))[1].name == "mine"
