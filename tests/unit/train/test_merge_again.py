"""A merge that is called again; no weights are loaded."""

import pytest

from birbal_ray.models import Model
from birbal_ray.run import RunMismatchError, open_run
from birbal_ray.settings import ConfigError
from birbal_ray.train import merge as step


@pytest.fixture
def merged(tmp_path, monkeypatch):
    """merged(**options) calls `merge` on a folder of finished weights, as made without a Modelfile."""
    trained = {"identity_hash": "t", "result": {"best_step": 1}, "model": {"name": "base"}}
    (tmp_path / "base").mkdir()
    model = Model("base", tmp_path / "base", None, "f")
    monkeypatch.setattr(step, "_read_run", lambda run: (trained, model))
    monkeypatch.setattr(step, "_read_prompt_format", lambda trained, model: (None, None))
    monkeypatch.setattr(step, "ollama_modelfile", lambda tokenizer, chat: "FROM .\n")
    identity = {"train": "t", "best_step": 1, "dtype": "bfloat16", "modelfile": False, "model_fingerprint": "f"}
    with open_run(tmp_path / "merged", step.STEP, identity) as run:
        kept = {"model": trained["model"], "dtype": "bfloat16", "comparison": {"num_prompts": 8}}
        run.finish(kept, {"model.safetensors": run.folder.write_bytes("model.safetensors", b"weights")}, summary="8")

    def call(**options):
        return step.merge("runs/train", str(tmp_path / "merged"), **options).manifest

    return call


def test_a_finished_merge_is_up_to_date_and_other_files_or_weights_are_another_one(merged, capsys):
    merged()
    assert "is up to date" in capsys.readouterr().err
    for options, difference in (
        ({"dtype": "float32"}, r"dtype: bfloat16 → float32"),
        ({"modelfile": True}, r"modelfile: False → True"),
    ):
        with pytest.raises(RunMismatchError, match=difference):
            merged(**options)


def test_a_template_that_ollama_can_not_write_leaves_nothing_behind(merged, monkeypatch, tmp_path):
    def refuse(tokenizer, chat):
        raise ConfigError("Ollama's template can't say this")

    monkeypatch.setattr(step, "ollama_modelfile", refuse)
    with pytest.raises(ConfigError, match="Ollama's template"):
        step.merge("runs/train", str(tmp_path / "other"), modelfile=True)
    assert not (tmp_path / "other").exists(), "the same folder takes the merge without a Modelfile"
