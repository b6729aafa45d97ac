"""A merge that is called again with other files asked of it; no weights are loaded."""

import pytest

from birbal_ray.models import Model
from birbal_ray.run import RunMismatchError, open_run
from birbal_ray.storage import open_folder
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


def test_a_modelfile_may_be_asked_of_a_finished_merge(merged, tmp_path, capsys):
    first = merged()
    assert "is up to date" in capsys.readouterr().err
    added = merged(modelfile=True)
    folder = open_folder(tmp_path / "merged")
    assert folder.read_text("Modelfile") == "FROM .\n"
    assert added["files"] == {**first["files"], "Modelfile": folder.record_of("Modelfile")._asdict()}
    assert (added["comparison"], added["identity"]["modelfile"]) == (first["comparison"], True)
    for options in ({"modelfile": True}, {}):
        assert merged(**options) == added
        assert "is up to date" in capsys.readouterr().err


def test_other_weights_are_another_merge(merged):
    with pytest.raises(RunMismatchError, match=r"dtype: bfloat16 → float32"):
        merged(dtype="float32", modelfile=True)
