"""Attention over packed samples without a mask: a token sees the earlier tokens of its own sample, nothing else.

transformers calls `packed_attention` in every layer of a model whose attention implementation is PACKED. On a CUDA
card it runs FlashAttention's varlen kernel, which torch ships; elsewhere `scaled_dot_product_attention` sample by
sample. Both get the samples' borders from `borders_of`.

Shapes: B rows, H query heads, K key/value heads (H is a multiple of K), T tokens of the flattened batch, D head size.
Index space: `borders` is a tensor of S + 1 token positions; sample s holds the tokens borders[s] to borders[s + 1] - 1.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.utils.import_utils import is_flash_attn_2_available

from birbal_ray.settings import ConfigError

PACKED = "birbal_packed"  # the name under which transformers knows `packed_attention`
QUERY_CHUNK = 512  # queries at a time under a sliding window, where the fallback needs a mask of the chunk's band
# Arguments of transformers' attention functions that change the scores. Ignoring one would train another model.
_UNSUPPORTED = {"softcap": "soft caps", "s_aux": "attention sinks", "position_bias": "position biases"}


def choose_attention(requested: str) -> str:
    """The `attn_implementation` for transformers: `auto` is PACKED, registered here; others stay as they are."""
    if requested != "auto":
        if requested == "flash_attention_2" and not is_flash_attn_2_available():
            raise ConfigError("model.attention=flash_attention_2: flash-attn is not installed; auto needs no package")
        return requested
    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, refuse_padding)
    return PACKED


def name_kernel(implementation: str, device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    """What computes attention, in words, for logs, the manifest and `birbal doctor`."""
    if implementation != PACKED:
        return implementation
    reason = why_not_varlen(device, dtype, head_size)
    return f"per-sample sdpa ({reason})" if reason else "varlen FlashAttention of torch"


@functools.cache
def why_not_varlen(device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
    """Why torch's varlen kernel cannot run there, or None where it can."""
    if device.type != "cuda":
        return f"torch's varlen kernel needs CUDA, the device is {device.type}"
    if not torch.backends.cuda.is_flash_attention_available():
        return "this torch was built without FlashAttention"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"the varlen kernel needs compute capability 8.0, this card has {major}.{minor}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the varlen kernel computes in bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    if head_size > 256 or head_size % 8:
        return f"the varlen kernel takes head sizes up to 256 that are multiples of 8, not {head_size}"
    return None


def refuse_padding(*arguments: Any, attention_mask: torch.Tensor | None = None, **options: Any) -> None:
    """transformers' mask function: builds no mask. Raises ValueError where a padding mask hides a token."""
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError(
            "model.attention=auto takes packed samples, and this batch is padded: concatenate the samples and restart "
            "position_ids, or set model.attention=sdpa"
        )


def borders_of(
    num_rows: int,
    num_tokens: int,
    device: torch.device,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    position_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, int]:
    """(borders: int32, length of the longest sample) of `num_rows` rows with `num_tokens` tokens each.

    From TRL's collator (`cu_seq_lens_q`) where it is given; else a sample starts at each position id 0 and at each row.
    """
    total = num_rows * num_tokens
    if cu_seq_lens_q is None or num_rows > 1:
        starts = torch.zeros(num_rows, num_tokens, dtype=torch.bool, device=device)
        starts[:, 0] = True
        if position_ids is not None:
            starts |= position_ids.to(device).expand(num_rows, num_tokens) == 0
        ends = torch.tensor([total], device=device)
        cu_seq_lens_q = torch.cat([starts.flatten().nonzero().flatten(), ends])
        max_length_q = None
    if max_length_q is None:
        max_length_q = int(cu_seq_lens_q.diff().max())
    return cu_seq_lens_q.to(device=device, dtype=torch.int32), int(max_length_q)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # (B, H, T / B, D)
    key: torch.Tensor,  # (B, K, T / B, D)
    value: torch.Tensor,  # (B, K, T / B, D)
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: (B, T / B, H, D), and no weights.

    `sliding_window` counts the token itself: a query sees that many keys at most. Raises ValueError for whatever it
    would have to ignore: masks, caches, dropout, soft caps, sinks, attention in both directions.
    """
    num_rows, num_heads, num_tokens, _ = query.shape
    unsupported = [what for name, what in _UNSUPPORTED.items() if options.get(name) is not None]
    if attention_mask is not None:
        unsupported.append("a dense mask")
    if key.shape[2] != num_tokens:
        unsupported.append("a cache of earlier keys")
    if dropout:
        unsupported.append("attention dropout")
    if not (options.get("is_causal") if options.get("is_causal") is not None else getattr(module, "is_causal", True)):
        unsupported.append("attention in both directions")
    if unsupported:
        raise ValueError(
            f"{type(module).__name__} needs {', '.join(unsupported)}, which model.attention=auto does not compute; "
            "set model.attention=eager"
        )
    borders, longest = borders_of(
        num_rows,
        num_tokens,
        query.device,
        options.get("cu_seq_lens_q"),
        options.get("max_length_q"),
        options.get("position_ids"),
    )
    # One row of T tokens; heads behind tokens: (T, H, D).
    query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    if query.is_cuda and query.dtype == torch.float32 and torch.is_autocast_enabled("cuda"):
        query, key, value = (x.to(torch.get_autocast_dtype("cuda")) for x in (query, key, value))
    if why_not_varlen(query.device, query.dtype, query.shape[-1]) is None and value.shape[-1] == query.shape[-1]:
        from torch.nn.attention.varlen import varlen_attn

        window = (-1, 0) if sliding_window is None else (sliding_window - 1, 0)
        shape = {"window_size": window, "enable_gqa": num_heads != key.shape[1], "scale": scaling}
        output = varlen_attn(query, key, value, borders, borders, longest, longest, **shape)
    else:
        output = per_sample_attention(query, key, value, borders.tolist(), scaling, sliding_window)
    return output.unflatten(0, (num_rows, num_tokens)), None


def per_sample_attention(
    query: torch.Tensor,  # (T, H, D)
    key: torch.Tensor,  # (T, K, D)
    value: torch.Tensor,  # (T, K, D)
    borders: list[int],
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """Causal attention sample by sample, (T, H, D). No mask is larger than a chunk of queries times its window."""
    groups = query.shape[1] // key.shape[1]
    if query.is_cuda and groups > 1:  # the CUDA kernels that build no scores in full take equal numbers of heads
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    attend: Any = functools.partial(
        scaled_dot_product_attention, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))  # (1, heads, T, D)
    outputs = []
    for start, end in itertools.pairwise(borders):
        if sliding_window is None or end - start <= sliding_window:
            parts = [x[:, :, start:end] for x in (query, key, value)]
            outputs.append(attend(*parts, is_causal=True))
            continue
        for first in range(start, end, QUERY_CHUNK):
            last = min(first + QUERY_CHUNK, end)
            oldest = max(start, first - sliding_window + 1)
            # (queries, keys) of the chunk, both as token positions of the pack
            distance = torch.arange(first, last)[:, None] - torch.arange(oldest, last)[None, :]
            band = ((distance >= 0) & (distance < sliding_window)).to(query.device)
            parts = [query[:, :, first:last], key[:, :, oldest:last], value[:, :, oldest:last]]
            outputs.append(attend(*parts, attn_mask=band))
    return torch.cat(outputs, dim=2)[0].transpose(0, 1)
