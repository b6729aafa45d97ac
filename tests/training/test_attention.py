"""Attention over packs equals attention over each sample alone: loss and every gradient."""

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, Qwen3Config

from birbal_ray.train import attention
from birbal_ray.train.attention import PACKED, choose_attention

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 16384,
}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "heads_of_their_own": LlamaConfig(**SHAPE | {"num_key_value_heads": 4}),
    "qwen3": Qwen3Config(**SHAPE),
    "mistral_window": MistralConfig(**SHAPE, sliding_window=7),
}


def make_model(config, implementation):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=choose_attention(implementation))


def loss_and_gradients(model, sequences, packed):
    """Summed loss of the sequences, in one row of packs or one by one, and the gradient of every weight."""
    model.zero_grad()
    if packed:
        lengths = torch.tensor([len(one) for one in sequences])
        borders = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(torch.int32)
        batches = [
            {
                "input_ids": torch.cat(sequences)[None],
                "position_ids": torch.cat([torch.arange(len(one)) for one in sequences])[None],
                "cu_seq_lens_q": borders,
                "cu_seq_lens_k": borders,
                "max_length_q": int(lengths.max()),
                "max_length_k": int(lengths.max()),
            }
        ]
    else:
        batches = [{"input_ids": one[None]} for one in sequences]
    total = 0.0
    for batch in batches:
        logits = model(**batch, use_cache=False).logits[0]
        positions = batch.get("position_ids", torch.arange(logits.shape[0])[None])[0]
        inside = positions[1:] > 0  # the first token of a sample is predicted by no other
        losses = torch.nn.functional.cross_entropy(logits[:-1], batch["input_ids"][0, 1:], reduction="none")
        loss = (losses * inside).sum()
        if loss.requires_grad:
            loss.backward()
        total += float(loss.detach())
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def sequences_of(lengths, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, SHAPE["vocab_size"], (length,), generator=generator) for length in lengths]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("lengths", [(9, 1, 23, 4), (1, 1, 2), (40,), (1, 30, 1)])
def test_a_pack_has_the_loss_and_the_gradients_of_its_samples_alone(name, lengths):
    """The samples alone go through eager attention, which shares no code with ours."""
    sequences = sequences_of(lengths)
    loss, gradients = loss_and_gradients(make_model(CONFIGS[name], "auto"), sequences, packed=True)
    expected, wanted = loss_and_gradients(make_model(CONFIGS[name], "eager"), sequences, packed=False)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert gradients.keys() == wanted.keys()
    for key in wanted:
        torch.testing.assert_close(gradients[key], wanted[key], rtol=1e-5, atol=1e-5, msg=key)


@pytest.mark.parametrize("window", [None, 600])
def test_a_full_pack_of_8192_tokens_equals_its_samples(window, monkeypatch):
    """The window is longer than a chunk of queries, a sample longer than both."""
    shape = SHAPE | {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = MistralConfig(**shape, sliding_window=window)
    sequences = sequences_of((3000, 1, 511, 513, 2048, 2119))
    assert sum(map(len, sequences)) == 8192
    loss, gradients = loss_and_gradients(make_model(config, "auto"), sequences, packed=True)
    expected, wanted = loss_and_gradients(make_model(config, "eager"), sequences, packed=False)
    assert loss == pytest.approx(expected, rel=1e-5)
    for key in wanted:  # sums over 8,192 tokens: relative to the largest entry
        largest = float(wanted[key].abs().max())
        torch.testing.assert_close(gradients[key], wanted[key], rtol=1e-5, atol=1e-5 * largest, msg=key)


def test_no_mask_is_larger_than_a_chunk_and_its_window(monkeypatch):
    masks = []
    real = attention.scaled_dot_product_attention

    def watched(*tensors, attn_mask=None, **options):
        masks.append(None if attn_mask is None else attn_mask.shape)
        return real(*tensors, attn_mask=attn_mask, **options)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", watched)
    query, key = torch.randn(3000, 4, 8), torch.randn(3000, 2, 8)
    attention.per_sample_attention(query, key, key, [0, 2900, 3000], None, sliding_window=100)
    assert all(queries <= attention.QUERY_CHUNK and keys < queries + 100 for queries, keys in filter(None, masks))
    assert masks[-1] is None, "a sample within the window needs none"
    masks.clear()
    attention.per_sample_attention(query, key, key, [0, 2900, 3000], None, sliding_window=None)
    assert masks == [None, None]


def test_borders_come_from_the_collator_or_from_the_positions():
    positions = torch.tensor([[0, 1, 2, 0, 0, 1]])
    borders, longest = attention.borders_of(1, 6, torch.device("cpu"), position_ids=positions)
    assert (borders.tolist(), longest) == ([0, 3, 4, 6], 3)
    given = torch.tensor([0, 3, 4, 6], dtype=torch.int32)
    borders, longest = attention.borders_of(1, 6, torch.device("cpu"), given, 3, positions)
    assert (borders.tolist(), longest) == ([0, 3, 4, 6], 3)
    assert attention.borders_of(2, 3, torch.device("cpu"))[0].tolist() == [0, 3, 6]


def test_what_it_would_have_to_ignore_is_refused():
    model = make_model(CONFIGS["llama"], "auto")
    ids = sequences_of((6,))[0][None].repeat(2, 1)
    mask = torch.ones(2, 6, dtype=torch.long)
    same = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(same[0], same[1])
    mask[1, 4:] = 0
    with pytest.raises(ValueError, match=r"this batch is padded: concatenate .* or set model.attention=sdpa"):
        model(input_ids=ids, attention_mask=mask, use_cache=False)

    layer = model.model.layers[0].self_attn
    q, k = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    for options, what in (
        ({"softcap": 50.0}, "soft caps"),
        ({"s_aux": torch.zeros(4)}, "attention sinks"),
        ({"dropout": 0.1}, "attention dropout"),
        ({"is_causal": False}, "attention in both directions"),
    ):
        with pytest.raises(ValueError, match=rf"{what}, which model.attention=auto does not compute; set .*eager"):
            attention.packed_attention(layer, q, k, k, None, **options)
    with pytest.raises(ValueError, match="a cache of earlier keys"):
        attention.packed_attention(layer, q[:, :, :1], k, k, None)
    with pytest.raises(ValueError, match="a dense mask"):
        attention.packed_attention(layer, q, k, k, torch.zeros(1, 1, 5, 5))


def test_the_kernel_in_force_is_named_with_the_reason_for_a_fallback():
    cpu = torch.device("cpu")
    assert choose_attention("auto") == PACKED
    assert choose_attention("eager") == "eager"
    assert attention.name_kernel("sdpa", cpu, torch.float32, 64) == "sdpa"
    named = attention.name_kernel(PACKED, cpu, torch.float32, 64)
    assert named == "per-sample sdpa (torch's varlen kernel needs CUDA, the device is cpu)"
