"""`birbal merge` asks real vLLM whether the merged model changed as PEFT says."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from birbal_ray.cli.main import main
from birbal_ray.models import resolve_model
from birbal_ray.progress import ProgressLine
from birbal_ray.run import RunError, open_run
from birbal_ray.train import merge as step
from tests.conftest import slow

pytestmark = pytest.mark.vllm


@slow
def test_vllm_on_the_merged_model_is_compared_with_peft(served_model, tiny_mix, tmp_path):
    """Then on the base model in its place, as if nothing had been folded in."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    settings = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    manifest = {
        "model": {"name": str(served_model), "revision": None, "path": str(served_model)},
        "settings": {"mix": str(tiny_mix)},
        "result": {"best_step": 4},
    }
    identity = {"model_fingerprint": resolve_model(str(served_model)).fingerprint}
    with open_run(tmp_path / "run", "train", identity, owns=["adapter/*"]) as run:
        get_peft_model(AutoModelForCausalLM.from_pretrained(served_model), settings).save_pretrained(
            tmp_path / "run" / "adapter"
        )
        run.finish(manifest, [name for name in run.folder.files() if name.startswith("adapter/")], summary="")
    command = ["merge", "--run", tmp_path / "run", "--output", tmp_path / "merged", "--dtype", "float32"]
    result = CliRunner().invoke(main, [str(part) for part in (*command, "--prompts", 3, "--format", "json")])
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)
    print(row)
    assert row["engine_applied_fraction"] == pytest.approx(1.0, abs=0.02)
    assert row["engine_difference_nats"] < 1e-2
    assert (tmp_path / "merged" / step.ENGINE_LOG).is_file()

    ids = [2 + (7 * n * n) % 240 for n in range(40)]
    prompt = {"token_ids": ids, "next_token_ids": [5], "adapter_log_probs": [-0.1], "base_log_probs": [-9.0]}
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(served_model)(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    prompt["base_log_probs"] = [float(base[5])]
    with pytest.raises(RunError, match=r"vLLM on the merged model: it changes PEFT's .* the engine does not apply it"):
        step._compare_engine(served_model, "float32", {"prompts": [prompt]}, tmp_path / "engine.log", ProgressLine())
