"""The models that the GPU checks run on, at a size for CPUs."""

from birbal_ray.train import preflight
from tests.fixtures.random_model import write_random_model


def test_it_loads_and_has_the_shape_asked_for(tmp_path, monkeypatch):
    import torch
    from transformers import AutoModelForCausalLM, MistralConfig

    monkeypatch.setattr("tests.fixtures.random_model.SHARD_BYTES", 50_000)
    config = MistralConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    write_random_model(tmp_path, config)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    loss = model(input_ids=torch.arange(100)[None], labels=torch.arange(100)[None]).loss
    assert 4 < float(loss) < 8
    assert preflight.shapes_of(tmp_path, "all-linear").num_layers == 2
