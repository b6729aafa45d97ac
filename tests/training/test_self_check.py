"""The check of a chosen model: a sound one passes, a planted leak and a planted dead adapter are named."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen3Config

from birbal_ray.run import RunError
from birbal_ray.settings import ConfigError, load_config
from birbal_ray.train import attention
from birbal_ray.train.attention import choose_attention
from birbal_ray.train.config import TrainConfig
from birbal_ray.train.self_check import (
    apply_if_equal,
    apply_kernels,
    check_architecture,
    check_model,
    compare,
    measure_sample,
)

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def adapted(config=None, implementation="auto", **lora):
    torch.manual_seed(0)
    config = config or LlamaConfig(**SHAPE)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=choose_attention(implementation))
    options = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "lora_dropout": 0.5, **lora}
    return get_peft_model(model, LoraConfig(**options))


@pytest.mark.parametrize("implementation", ["auto", "sdpa", "eager"])
@pytest.mark.parametrize("make", [LlamaConfig, MistralConfig, Qwen3Config])
def test_a_sound_model_passes_and_is_left_as_it_was(make, implementation):
    model = adapted(make(**SHAPE), implementation).train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = check_model(model, torch.float32)
    assert max(found.packed_difference, found.packed_gradient_difference, found.eager_difference) < 1e-5
    assert model.training
    assert model.get_base_model().config._attn_implementation == choose_attention(implementation)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


def test_a_planted_leak_is_caught_with_the_layers_named(monkeypatch):
    real = attention.borders_of

    def one_segment(*arguments, **options):
        borders, _ = real(*arguments, **options)
        return borders[[0, -1]], int(borders[-1])

    monkeypatch.setattr(attention, "borders_of", one_segment)
    with pytest.raises(RunError, match=r"in a pack see each other: the logits .* layer types: .*LlamaAttention"):
        check_model(adapted(), torch.float32)


def test_a_kernel_that_computes_something_else_is_caught(monkeypatch):
    real = attention.per_sample_attention
    monkeypatch.setattr(attention, "per_sample_attention", lambda q, k, v, *rest: real(q, k, 3 * v, *rest))
    with pytest.raises(RunError, match=r"model.attention=auto differs from eager .*set model.attention=eager"):
        check_model(adapted(), torch.float32)


def test_a_planted_dead_adapter_is_caught_and_named():
    model = adapted()
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    layer.forward = layer.base_layer.forward
    with pytest.raises(RunError, match=r"the adapter of 1 of 14 modules gets no gradient \(up_proj\)"):
        check_model(model, torch.float32)


def test_nothing_to_train_and_no_number_are_caught():
    model = adapted()
    for parameter in model.parameters():
        parameter.requires_grad = False
    with pytest.raises(RunError, match="no trainable parameter"):
        check_model(model, torch.float32)
    model = adapted()
    torch.nn.init.constant_(model.get_base_model().model.norm.weight, float("nan"))
    with pytest.raises(RunError, match="loss is not a number on its first sample"):
        check_model(model, torch.float32)


def test_a_4_bit_request_that_leaves_the_weights_alone_is_caught():
    with pytest.raises(RunError, match=r"nf4 left 100% of the weights at 16 bits \(the largest: .*\)"):
        check_model(adapted(), torch.float32, "nf4")


def test_a_config_alone_is_enough_and_hybrid_layers_are_refused_by_name(tmp_path):
    def write(name, config, model_type=None):
        (tmp_path / name).mkdir()
        config.save_pretrained(tmp_path / name)
        return tmp_path / name

    big = MistralConfig(**SHAPE | {"num_hidden_layers": 40, "vocab_size": 32000, "intermediate_size": 14336})
    found = check_architecture(write("mistral", big), TrainConfig())
    assert found.packed_difference < 1e-5
    named = load_config(TrainConfig, flags={"lora.target_modules": ["no_such_proj"]})
    with pytest.raises(ConfigError, match=r"lora.target_modules=\['no_such_proj'\]"):
        check_architecture(tmp_path / "mistral", named)

    from transformers import Qwen3NextConfig

    hybrid = Qwen3NextConfig(
        **SHAPE | {"num_hidden_layers": 4},
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        num_experts=2,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    )
    assert "linear_attention" in json.loads((write("hybrid", hybrid) / "config.json").read_text())["layer_types"]
    with pytest.raises(RunError, match=r"cannot compute packed samples.*layer types: full_attention, linear_att"):
        check_architecture(tmp_path / "hybrid", TrainConfig())


def test_fused_kernels_stay_only_where_they_compute_the_same():
    """Stand-ins for Liger's: each replaces the norms' forward, as its own functions do."""
    model = adapted()
    norm = model.get_base_model().model.norm
    expected = measure_sample(model, torch.float32)
    assert apply_kernels(model, torch.float32, "auto") == "none (Liger's kernels need CUDA)"

    def fused(scale):
        def forward(x):
            return scale * torch.nn.functional.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)

        return lambda: setattr(norm, "forward", forward)

    assert apply_if_equal(model, torch.float32, fused(1.0)) is None
    assert "forward" in vars(norm)
    del norm.forward
    reason = apply_if_equal(model, torch.float32, fused(1.1))
    assert "they change logits by 10.0%" in reason
    assert "forward" not in vars(norm), "undone"

    def broken():
        raise RuntimeError("no kernel image is available for execution on the device")

    assert apply_if_equal(model, torch.float32, broken).startswith("no kernel image")
    assert compare(measure_sample(model, torch.float32), expected) == (0.0, 0.0)
