"""vLLM on a card keeps the contract of engines. Nobody has run this yet: no card was at hand when it was written."""

import pytest

from birbal_ray.models import resolve_model
from birbal_ray.score.config import EngineSettings, ResourceSettings
from birbal_ray.score.engine import Request, Sampling, VllmEngine
from tests.fixtures.engine_contract import MAX_MODEL_LEN, EngineContract, finished, ids

pytestmark = [pytest.mark.gpu, pytest.mark.vllm]


class TestVllmEngineOnACard(EngineContract):
    @pytest.fixture(scope="class")
    def engine(self):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs an NVIDIA GPU, and torch sees none here")
        settings = EngineSettings(device="gpu", max_model_len=MAX_MODEL_LEN, arguments={"block_size": 32})
        resources = ResourceSettings(gpu_memory_utilization=0.3)
        return VllmEngine(resolve_model("smollm2-135m").path, settings, resources)

    def test_an_unseeded_sample(self, engine):
        """By the sampler that vLLM would have nvcc compile."""
        sampling = Sampling(temperature=1.0, top_k=50, top_p=0.9, stop=())
        (done,) = finished(engine, Request("a prompt", ids(1, 40), 8, sampling=sampling))
        assert done.error is None and 1 <= done.num_completion_tokens <= 8
