"""`model.adapter` scores a LoRA adapter: pinned for every worker, part of the identity, refused where it can't be."""

from __future__ import annotations

import json

import pytest

from birbal_ray.adapters import adapter_fingerprint
from birbal_ray.evaluate.config import EvaluateConfig
from birbal_ray.score.config import ScoreConfig
from birbal_ray.score.run import pin_model
from birbal_ray.settings import ConfigError, load_config
from tests.fixtures.tensors import write_tensors


@pytest.fixture
def adapter(tmp_path):
    folder = tmp_path / "run" / "adapter"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    write_tensors(folder / "adapter_model.safetensors", {"base_model.model.q_proj.lora_A.weight": [4, 6]})
    return folder


def config(**values):
    return load_config(ScoreConfig, None, [], {"engine.backend": "simulated", **values})


def test_an_adapter_is_pinned_and_decides_the_fingerprint(adapter, monkeypatch):
    monkeypatch.chdir(adapter.parent.parent)
    pinned, revision, fingerprint = pin_model(config(**{"model.adapter": "run"}))
    assert pinned.model.adapter == str(adapter)
    assert (revision, fingerprint) == (None, f"simulated+{adapter_fingerprint(adapter)}")


def test_without_an_adapter_the_fingerprint_is_the_models():
    pinned, _, fingerprint = pin_model(config())
    assert (pinned.model.adapter, fingerprint) == (None, "simulated")


def test_what_is_no_adapter_is_refused_before_anything_starts(tmp_path):
    with pytest.raises(ConfigError, match=r"no adapter_config.json; expected a LoRA adapter saved by PEFT"):
        pin_model(config(**{"model.adapter": str(tmp_path)}))


def test_an_evaluation_names_its_adapters_elsewhere():
    with pytest.raises(ConfigError, match=r"unknown key 'model.adapter'"):
        load_config(EvaluateConfig, None, ["model.adapter=runs/train"])
    assert load_config(EvaluateConfig, None, ["model.name=m"]).scoring().model.adapter is None
