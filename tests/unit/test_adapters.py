"""An adapter is found where it lies, and one of another model is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from birbal_ray.adapters import find_adapter
from birbal_ray.models import Model, ModelError
from birbal_ray.settings import ConfigError
from birbal_ray.storage import RunError
from tests.fixtures.tensors import write_tensors

SHAPES = {"model.layers.0.self_attn.q_proj.weight": [8, 6], "model.layers.0.mlp.down_proj.weight": [6, 12]}
FITS = {
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": [4, 6],
    "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": [8, 4],
}


@pytest.fixture
def model(tmp_path):
    (tmp_path / "model").mkdir()
    write_tensors(tmp_path / "model" / "model.safetensors", SHAPES)
    return Model("owner/base", tmp_path / "model", None, "f" * 64)


def adapter(folder: Path, shapes=FITS, **settings) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, **settings}))
    write_tensors(folder / "adapter_model.safetensors", shapes)
    return folder


def test_a_peft_folder(tmp_path, model):
    found = find_adapter(str(adapter(tmp_path / "mine")), model)
    assert (found.name, found.rank, found.path, found.run) == ("mine", 4, tmp_path / "mine", {})
    assert (found.modules, found.settings) == (("q_proj",), {"peft_type": "LORA", "r": 4})


def test_an_adapter_s_embedding_is_one_of_its_modules(tmp_path, model):
    """Else an engine leaves it out and reports no error."""
    shapes = {**FITS, "base_model.model.model.embed_tokens.lora_embedding_A": [4, 9]}
    assert find_adapter(str(adapter(tmp_path / "mine", shapes)), model).modules == ("embed_tokens", "q_proj")


def test_the_output_of_a_training_run(tmp_path, model):
    adapter(tmp_path / "run" / "adapter")
    manifest = {"step": "train", "identity": {"model_fingerprint": "f" * 64}, "model": {"name": "owner/base"}}
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))
    found = find_adapter(str(tmp_path / "run"), model)
    assert (found.name, found.path, found.run) == ("run", tmp_path / "run" / "adapter", manifest)
    manifest["identity"]["model_fingerprint"] = "0" * 64
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))
    assert find_adapter(str(tmp_path / "run"), replace(model, fingerprint="")).run == manifest, "weights not here yet"
    with pytest.raises(ConfigError, match="trained on owner/base with other weights than --model owner/base"):
        find_adapter(str(tmp_path / "run"), model)


def test_the_adapter_of_an_unfinished_training_run_is_refused(tmp_path, model):
    """Its mix is not known yet, so that an evaluation would leave nothing of it out."""
    adapter(tmp_path / "run" / "adapter")
    (tmp_path / "run" / "run.json").write_text("{}")
    for given in ("run", "run/adapter"):
        with pytest.raises(ConfigError, match=r"of an unfinished `birbal train` run; rerun its command to finish it"):
            find_adapter(str(tmp_path / given), model)


def test_a_manifest_beside_an_adapter(tmp_path, model):
    """A damaged one may be its training's, which knows the mix; a list is another tool's."""
    adapter(tmp_path / "run" / "adapter")
    (tmp_path / "run" / "manifest.json").write_text('{"step": "tr')
    with pytest.raises(RunError, match=r"run/manifest.json: not valid JSON"):
        find_adapter(str(tmp_path / "run"), model)
    (tmp_path / "run" / "manifest.json").write_text("[]")
    assert find_adapter(str(tmp_path / "run"), model).run == {}


@pytest.mark.parametrize("name", ["Owner/Base", "", None, "some/local/folder"])
def test_a_base_of_the_same_name_or_of_no_hub_name_passes(tmp_path, model, name):
    assert find_adapter(str(adapter(tmp_path / "a", base_model_name_or_path=name)), model).rank == 4


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("shapes", "settings", "reason"),
    [
        (FITS, {"base_model_name_or_path": "owner/other"}, "it names owner/other"),
        (FITS | {f"{Q}.lora_A.weight": [4, 7]}, {}, "q_proj has 7 inputs there, 6 in the model"),
        (FITS | {f"{Q}.lora_B.weight": [9, 4]}, {}, "q_proj has 9 outputs there, 8 in the model"),
        (
            {"base_model.model.transformer.h.0.attn.lora_A.weight": [4, 6]},
            {},
            "none of its modules",
        ),
    ],
)
def test_an_adapter_of_another_model_is_refused_with_both_names(tmp_path, model, shapes, settings, reason):
    folder = adapter(tmp_path / "a", shapes, **settings)
    with pytest.raises(ConfigError, match=f"--adapter {folder}: made for another model than owner/base: .*{reason}"):
        find_adapter(str(folder), model)


def test_quantised_weights_are_not_compared(tmp_path, model):
    write_tensors(model.path / "model.safetensors", {"model.layers.0.self_attn.q_proj.weight": [24, 1]})
    assert find_adapter(str(adapter(tmp_path / "a")), model).rank == 4


def test_what_is_no_adapter(tmp_path, model):
    with pytest.raises(ConfigError, match="no such folder"):
        find_adapter(str(tmp_path / "nowhere"), model)
    with pytest.raises(ConfigError, match=r"no adapter_config.json; expected a LoRA adapter saved by PEFT"):
        find_adapter(str(model.path), model)
    with pytest.raises(ConfigError, match="peft_type is 'IA3', expected LORA"):
        find_adapter(str(adapter(tmp_path / "ia3", peft_type="IA3")), model)
    for number, content in enumerate(("{", "[1]")):  # cut off, and none of PEFT's
        damaged = adapter(tmp_path / f"damaged-{number}")
        (damaged / "adapter_config.json").write_text(content)
        with pytest.raises(ModelError, match=f"--adapter {damaged}: adapter_config.json is not a JSON object .*get it"):
            find_adapter(str(damaged), model)
    pointer = adapter(tmp_path / "pointer") / "adapter_model.safetensors"
    for content in (
        b"",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
        b"\x05" + bytes(7) + b"[1,2]",
    ):
        pointer.write_bytes(content)
        with pytest.raises(ModelError, match=r"adapter_model\.safetensors .*(damaged or broke off|Git LFS pointer)"):
            find_adapter(str(pointer.parent), model)
