"""``F.multi_head_attention_forward`` as the linear maps and products it is made of.

As torch computes it, to rounding, with the same random numbers; but the rows keep a dimension of their own, where
torch flattens them among the positions before the last linear map. Shapes: T positions of the query, S of keys and
values, N rows, H heads of E/H channels.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``query [T, N, E]``, ``key, value [S, N, E]`` (or all without N) to ``[T, N, E]`` and weights ``[N, T, S]``."""
    batched = query.dim() == 3
    if not batched:
        query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    if use_separate_proj_weight:
        biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
        weights = (q_proj_weight, k_proj_weight, v_proj_weight)
        q, k, v = (F.linear(x, _given(w), b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
    else:
        q, k, v = _packed_projections(query, key, value, _given(in_proj_weight), in_proj_bias)
    if bias_k is not None and bias_v is not None:
        k = torch.cat([k, bias_k.repeat(1, k.shape[1], 1)])
        v = torch.cat([v, bias_v.repeat(1, v.shape[1], 1)])
    q, k, v = (_heads(x, num_heads) for x in (q, k, v))
    k = k if static_k is None else static_k.view(*k.shape[:2], *static_k.shape[1:])
    v = v if static_v is None else static_v.view(*v.shape[:2], *static_v.shape[1:])
    if add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    causal = is_causal and key_padding_mask is None and not need_weights
    mask = None if causal else _mask(attn_mask, key_padding_mask, q, k)
    p = dropout_p if training else 0.0
    if need_weights:
        scores = (q * math.sqrt(1 / q.shape[-1])) @ k.transpose(-2, -1)
        weights_of_heads = F.softmax(scores if mask is None else scores + mask, dim=-1)
        weights_of_heads = F.dropout(weights_of_heads, p) if p else weights_of_heads
        attended = weights_of_heads @ v
    else:
        attended = F.scaled_dot_product_attention(q, k, v, mask, p, causal)
    output = F.linear(attended.permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias)
    output = output if batched else output.squeeze(1)
    if not need_weights:
        return output, None
    returned = weights_of_heads.mean(1) if average_attn_weights else weights_of_heads
    return output, returned if batched else returned.squeeze(0)


def _given(weight: Tensor | None) -> Tensor:
    assert weight is not None, "multi_head_attention_forward: a projection weight is None"
    return weight


def _packed_projections(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, ...]:
    """One weight ``[3 E, E]`` for all three, used as few times as torch uses it."""
    size = query.shape[-1]
    if query is key is value:
        return F.linear(query, weight, bias).chunk(3, -1)
    parts = [size, 2 * size] if key is value else [size] * 3
    weights, biases = weight.split(parts), [None] * 3 if bias is None else bias.split(parts)
    inputs = (query, key) if key is value else (query, key, value)
    q, *rest = (F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=False))
    return (q, *(rest[0].chunk(2, -1) if key is value else rest))


def _heads(x: Tensor, heads: int) -> Tensor:
    """``[T, N, E] -> [N, H, T, E/H]``."""
    return x.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)


def _mask(attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """Both masks as numbers to be added to ``[N, H, T, S]``; keys that the module has added are never masked."""
    n, h, t, s = *q.shape[:3], k.shape[2]
    found = None
    if attn_mask is not None:
        found = _additive(attn_mask, q, s)
        found = found if found.dim() == 2 else found.view(n, h, t, s)
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask, q, s).view(n, 1, 1, s)
        found = padding if found is None else found + padding
    return found


def _additive(mask: Tensor, q: Tensor, keys: int) -> Tensor:
    """A mask of truth values (True: left out) as numbers, for all ``keys``."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, -math.inf)
    return F.pad(mask, (0, keys - mask.shape[-1]))
