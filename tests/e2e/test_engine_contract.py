"""vLLM keeps the same contract as the engine that most tests run on."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path

import pytest

from birbal_ray.models import ModelError
from birbal_ray.score.config import EngineSettings, ResourceSettings
from birbal_ray.score.engine import (
    MIN_CHANGE,
    Adapter,
    Request,
    Sampling,
    VllmEngine,
    check_engine,
    compare_with_peft,
    vllm_arguments,
)
from tests.conftest import slow
from tests.e2e.processes import NUM_THREADS
from tests.fixtures.engine_contract import MAX_MODEL_LEN, EngineContract

pytestmark = pytest.mark.vllm
LINEAR = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")  # of a Llama's layer


class TestVllmEngine(EngineContract):
    @pytest.fixture(scope="class")
    def engine(self, served_model):
        settings = EngineSettings(device="cpu", max_model_len=MAX_MODEL_LEN)
        return VllmEngine(served_model, settings, ResourceSettings(kv_cache_gib=1, threads_per_replica=NUM_THREADS))


@pytest.mark.parametrize(
    ("engine", "resources", "ranks"),
    [
        ({"device": "cpu"}, {}, []),
        ({"device": "gpu"}, {}, []),
        ({"device": "gpu"}, {"gpus_per_replica": 2, "max_num_seqs": 64}, [16, 128]),
        ({"device": "gpu"}, {"gpus_per_replica": 0.5}, []),
        ({"device": "gpu", "arguments": {"quantization": "fp8", "kv_cache_dtype": "fp8"}}, {}, [8]),
    ],
)
def test_vllm_takes_every_argument(engine, resources, ranks):
    """Against the signature of vLLM's own class, for cards that are not here."""
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs

    adapters = [Adapter(f"a{rank}", "folder", rank) for rank in ranks]
    given = vllm_arguments(Path("m"), EngineSettings(**engine), ResourceSettings(**resources), adapters)
    inspect.signature(LLM).bind(**given)
    made = EngineArgs(**given)
    assert {name: getattr(made, name) for name in given} == given


@pytest.fixture(scope="module")
def adapter(served_model, tmp_path_factory):
    """A LoRA adapter with random weights on all linear layers of the tiny model, saved by PEFT."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    settings = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(AutoModelForCausalLM.from_pretrained(served_model), settings).save_pretrained(folder)
    return folder


def test_an_adapter_gives_the_log_probabilities_that_peft_gives(served_model, adapter):
    """In one batch with the base model, each gives its own."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = [2 + (7 * n * n) % 240 for n in range(40)]
    settings = EngineSettings(device="cpu", max_model_len=MAX_MODEL_LEN)
    resources = ResourceSettings(kv_cache_gib=1, threads_per_replica=NUM_THREADS)
    engine = VllmEngine(served_model, settings, resources, [Adapter("mine", str(adapter), 8, LINEAR)])
    engine.add("base", Request("", ids, 1, sampling=Sampling(prompt_logprobs=True)))
    engine.add("adapted", Request("", ids, 1, adapter="mine", sampling=Sampling(prompt_logprobs=True)))
    found = {}
    while engine.has_unfinished():
        found |= dict(engine.step())
    base = AutoModelForCausalLM.from_pretrained(served_model).eval()
    expected = {}
    with torch.no_grad():
        for name, model in (("base", base), ("adapted", None)):
            model = model or PeftModel.from_pretrained(base, adapter).eval()
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)  # position, vocabulary
            expected[name] = [logprobs[place, token].item() for place, token in enumerate(ids[1:])]
    for name, values in expected.items():
        assert [one.logprob for one in found[name].prompt_tokens] == pytest.approx(values, abs=1e-3)
    assert max(abs(a - b) for a, b in zip(*expected.values(), strict=True)) > 0.05, "the adapter changes something"


@slow
def test_an_adapter_that_vllm_does_not_apply_is_refused(served_model, adapter, tmp_path):
    """The same adapter twice: as it is, and with weights that change nothing, as if vLLM had found no module of it."""
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    ids = [2 + (7 * n * n) % 240 for n in range(40)]
    base = AutoModelForCausalLM.from_pretrained(served_model).eval()
    with torch.no_grad():
        without = base(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        with_adapter = (
            PeftModel.from_pretrained(base, adapter).eval()(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        )
    chosen = with_adapter.topk(20).indices
    prompt = {"token_ids": ids, "next_token_ids": chosen.tolist()}
    prompt |= {"adapter_log_probs": with_adapter[chosen].tolist(), "base_log_probs": without[chosen].tolist()}
    assert (with_adapter - without)[chosen].abs().max() > MIN_CHANGE
    alive, dead = tmp_path / "alive", tmp_path / "dead"
    for folder in (alive, dead):
        shutil.copytree(adapter, folder)
        (folder / "reference.json").write_text(json.dumps({"prompts": [prompt]}))
    weights = load_file(dead / "adapter_model.safetensors")
    zero = {name: torch.zeros_like(x) if "lora_B" in name else x for name, x in weights.items()}
    save_file(zero, dead / "adapter_model.safetensors")
    settings = EngineSettings(device="cpu", max_model_len=MAX_MODEL_LEN)
    adapters = [Adapter("alive", str(alive), 8, LINEAR), Adapter("dead", str(dead), 8, LINEAR)]
    engine = VllmEngine(
        served_model, settings, ResourceSettings(kv_cache_gib=1, threads_per_replica=NUM_THREADS), adapters
    )
    check_engine(engine, served_model, adapters[:1])
    found = compare_with_peft(engine, {"prompts": [prompt]}, "alive")
    assert found.applied_fraction == pytest.approx(1.0, abs=0.01) and found.difference_nats < 1e-2
    with pytest.raises(ModelError, match=r"/dead: it changes PEFT's .* the engine does not apply it"):
        check_engine(engine, served_model, adapters)
