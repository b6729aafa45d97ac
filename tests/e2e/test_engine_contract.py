"""vLLM keeps the same contract as the engine that most tests run on."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path

import pytest

from birbal_ray.score.config import EngineSettings, ResourceSettings
from birbal_ray.score.engine import Adapter, VllmEngine, vllm_arguments
from tests.fixtures.engine_contract import MAX_MODEL_LEN, EngineContract

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def served_model(tiny_model, tmp_path_factory):
    """The tiny model with heads of 32 values, the fewest that vLLM's CPU attention takes, and its tokenizer."""
    from transformers import AutoConfig, LlamaForCausalLM

    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("served") / "model")
    config = AutoConfig.from_pretrained(folder)
    config.head_dim = 32
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


class TestVllmEngine(EngineContract):
    @pytest.fixture(scope="class")
    def engine(self, served_model):
        settings = EngineSettings(device="cpu", max_model_len=MAX_MODEL_LEN)
        return VllmEngine(served_model, settings, ResourceSettings(kv_cache_gib=1, threads_per_replica=2))


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
