"""The simulated engine keeps the engines' contract; vLLM's arguments are vLLM's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from birbal_ray.score.config import (
    OWNED_ARGUMENTS,
    EngineSettings,
    ResourceSettings,
    ScoreConfig,
    vllm_argument_names,
)
from birbal_ray.score.engine import Adapter, vllm_arguments
from birbal_ray.score.simulated import SimulatedEngine
from birbal_ray.score.tokens import SimulatedTokenizer
from birbal_ray.settings import ConfigError, load_config
from tests.fixtures.engine_contract import MAX_MODEL_LEN, EngineContract


class TestSimulatedEngine(EngineContract):
    @pytest.fixture
    def engine(self):
        return SimulatedEngine(max_model_len=MAX_MODEL_LEN)


def test_the_simulated_tokenizer_decodes_what_it_has_seen():
    tokenizer = SimulatedTokenizer()
    (ids,) = tokenizer(["a  b\n\nc a"])["input_ids"]
    assert len(ids) == 4 and ids[0] == ids[3]
    assert SimulatedTokenizer().decode(ids) == "a b c a"


def cards(**resources):
    return ResourceSettings(**resources)


def arguments(device="gpu", resources=None, adapters=(), **engine):
    """What vLLM would be called with; every name is one of vLLM's own."""
    given = vllm_arguments(Path("m"), EngineSettings(device=device, **engine), resources or cards(), adapters)
    if known := vllm_argument_names():
        assert given.keys() <= known
    return given


def test_several_cards_make_one_tensor_parallel_engine():
    given = arguments(resources=cards(gpus_per_replica=2))
    assert (given["tensor_parallel_size"], given["gpu_memory_utilization"]) == (2, 0.9)


def test_engines_on_one_card_divide_its_memory():
    given = arguments(resources=cards(gpus_per_replica=0.5, gpu_memory_utilization=0.8))
    assert given["gpu_memory_utilization"] == pytest.approx(0.4)
    assert "tensor_parallel_size" not in given


def test_cards_between_whole_numbers_are_refused():
    with pytest.raises(ConfigError, match=r"resources.gpus_per_replica = 1.5: above 1 it must be a whole number"):
        load_config(ScoreConfig, None, ["resources.gpus_per_replica=1.5"])


def test_the_number_of_sequences_is_vllms_own_on_a_gpu_unless_set():
    assert "max_num_seqs" not in arguments()
    assert arguments(device="cpu")["max_num_seqs"] == 32
    assert arguments(resources=cards(max_num_seqs=7))["max_num_seqs"] == 7
    assert arguments(device="cpu", resources=cards(max_num_seqs=7))["max_num_seqs"] == 7


def test_further_arguments_pass_through_and_win_over_the_devices():
    given = arguments(device="cpu", arguments={"quantization": "fp8", "block_size": 64})
    assert (given["quantization"], given["block_size"]) == ("fp8", 64)


def test_adapters_make_room_for_the_largest_rank():
    adapters = [Adapter("a", "a", 4), Adapter("b", "b", 100)]
    assert arguments(adapters=adapters)["max_lora_rank"] == 128
    assert arguments(adapters=adapters)["enable_lora"] is True
    assert "enable_lora" not in arguments()


def test_an_argument_that_vllm_does_not_have_is_refused_with_the_nearest():
    if not vllm_argument_names():
        pytest.skip("vLLM is not installed")
    wanted = (
        r"--set engine.arguments.quantisation=fp8: .*no engine argument 'quantisation' \(did you mean 'quantization'"
    )
    with pytest.raises(ConfigError, match=wanted):
        load_config(ScoreConfig, None, ["engine.arguments.quantisation=fp8"])


@pytest.mark.parametrize("name", sorted(OWNED_ARGUMENTS))
def test_an_argument_that_another_setting_decides_is_refused_with_its_name(name):
    with pytest.raises(ConfigError, match=f"'{name}' can't be set here: {OWNED_ARGUMENTS[name]}"):
        load_config(ScoreConfig, None, [f"engine.arguments.{name}=1"])
    assert not vllm_argument_names() or name in vllm_argument_names()
